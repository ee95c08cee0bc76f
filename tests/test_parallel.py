"""Two processes are as one: `torchrun --nproc_per_node=2` on CPUs, beside `python`."""

import json

import pytest
import torch
from conftest import ROOT, call
from safetensors.torch import load_file

STEPS = {"clipood": "--steps-per-epoch 3", "headpurify": "--gate-lr 0.05"}
ROW = {"clipood": "mms+bma", "headpurify": "ha-lora+dig"}


def start(ranks, script, arguments, cwd, **environment):
    """A script on few images, in one process or in several."""
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}" * (ranks > 1)
    line = f"{launcher} {ROOT / 'tests' / 'in_small_world.py'} {script} {arguments}"
    return call(line, cwd, OMP_NUM_THREADS="1", **environment)


def trained(done, cwd):
    """What a command printed, its record and the exported weights."""
    assert done.returncode == 0, done.stderr
    (result,) = (cwd / "runs").rglob("result.json")
    weights = load_file(result.parent / "model" / "open_clip_model.safetensors")
    return done.stdout, json.loads(result.read_text()), weights


def assert_equal(weights, expected):
    """Up to the order of sums."""
    for name, weight in expected.items():
        apart = (weights[name] - weight).abs()
        if name.endswith("in_proj_bias"):  # a key's has no effect: Adam follows rounding errors
            apart = apart.unflatten(0, (3, -1))[[0, 2]]
        assert apart.max() < 5e-5, name  # weights move by up to 2e-3


@pytest.fixture(scope="module", params=STEPS)
def line(request):
    """A script and its arguments: six steps, all of them along all losses."""
    script = request.param
    return script, f"--modes zero-shot {ROW[script]} --epochs 2 --batch-size 12 {STEPS[script]}"


@pytest.fixture(scope="module")
def by_one(line, tmp_path_factory):
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("one")
    return trained(start(1, *line, folder), folder)


@pytest.mark.slow
def test_two_ranks_are_as_one(line, by_one, tmp_path):
    printed, record, weights = by_one
    printed_by_two, record_of_two, weights_of_two = trained(start(2, *line, tmp_path), tmp_path)
    assert_equal(weights_of_two, weights)
    assert record_of_two["rows"]["zero-shot"] == record["rows"]["zero-shot"]
    *_, last = record["rows"]
    for measure, accuracy in record["rows"][last].items():
        assert record_of_two["rows"][last][measure] == pytest.approx(accuracy, abs=2e-3)
    assert printed_by_two.count("Best ") == printed.count("Best ") == 1  # one rank speaks


@pytest.mark.slow
def test_a_run_goes_on_with_more_or_fewer_ranks(line, by_one, tmp_path):
    """Rank 0 is killed after the checkpoint of the first of two epochs."""
    before, after = (2, 1) if line[0] == "clipood" else (1, 2)
    killed = start(before, *line, tmp_path, KILLED_AT_FIRST_CHECKPOINT="1")
    assert killed.returncode
    (checkpoint,) = (tmp_path / "runs").rglob("checkpoint.pt")
    (state,) = torch.load(checkpoint, weights_only=True)["state"].values()
    assert state.get("epoch") == 1 or state["step"] == 3
    script, arguments = line
    done = start(after, script, f"{arguments} --resume", tmp_path)
    printed, record, weights = trained(done, tmp_path)
    assert "--resume: found" in printed
    assert_equal(weights, by_one[2])
