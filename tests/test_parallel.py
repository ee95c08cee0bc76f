"""Two processes are as one: `torchrun --nproc_per_node=2` on CPUs, beside `python`."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, call
from safetensors.torch import load_file

LINES = {
    "clipood": "--modes zero-shot mms+bma --epochs 1 --steps-per-epoch 5 --batch-size 12",
    # five steps, all of them along both losses
    "headpurify": "--modes zero-shot ha-lora+dig --epochs 1 --batch-size 178 --gate-lr 0.05",
}


def start(processes, line, cwd):
    """A command in one process or in several."""
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node={processes}"
    return call(f"{launcher if processes > 1 else ''} {line}", cwd, OMP_NUM_THREADS="1")


def trained(done, cwd):
    """The record and the exported weights of a command that is done."""
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


@pytest.mark.slow
@pytest.mark.parametrize("script", LINES)
def test_two_processes_are_as_one(checkout, script):
    """The same accuracies and weights."""
    line = f"{script}.py {LINES[script]}"
    printed, one, weights = trained(start(1, line, checkout), checkout)
    shutil.rmtree(checkout / "runs")
    printed_by_two, two, weights_of_two = trained(start(2, line, checkout), checkout)
    assert_equal(weights_of_two, weights)
    assert two["rows"]["zero-shot"] == one["rows"]["zero-shot"]
    *_, last = one["rows"]
    for measure, accuracy in one["rows"][last].items():
        assert two["rows"][last][measure] == pytest.approx(accuracy, abs=2e-3)
    assert printed_by_two.count("Best ") == printed.count("Best ") == 1  # one process speaks


@pytest.mark.slow
@pytest.mark.parametrize("script, before, after", [("clipood", 2, 1), ("headpurify", 1, 2)])
def test_a_run_goes_on_in_more_or_fewer_processes(checkout, script, before, after):
    """Stopped by SIGTERM at the third of five steps, where the first process writes."""
    shutil.copy(ROOT / "tests" / "cut.py", checkout)
    *_, expected = trained(start(1, f"{script}.py {LINES[script]}", checkout), checkout)
    shutil.rmtree(checkout / "runs")
    stopped = start(before, f"cut.py {script} 3 {LINES[script]}", checkout)
    assert "stopped by SIGTERM; kept in" in stopped.stderr, stopped.stderr
    (checkpoint,) = (checkout / "runs").rglob("checkpoint.pt")
    (state,) = torch.load(checkpoint, weights_only=True)["state"].values()
    assert state["step"] == 3
    done = start(after, f"{script}.py {LINES[script]} --resume", checkout)
    printed, _, weights = trained(done, checkout)
    assert "--resume: found" in printed
    assert_equal(weights, expected)


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused(checkout):
    odd = start(2, "clipood.py --batch-size 7", checkout)
    assert "--batch-size 7 per source domain cannot be shared by 2 processes" in odd.stderr
    ldfs = start(2, "ldfs.py", checkout)
    assert "ldfs.py runs in one process" in ldfs.stderr
