"""Two processes are as one: `torchrun --nproc_per_node=2` on CPUs, beside `python`."""

import json
import shutil

import pytest
from conftest import call
from safetensors.torch import load_file

LINES = {
    "clipood": "--modes zero-shot mms+bma --epochs 1 --steps-per-epoch 5 --batch-size 12",
    # five steps, all of them along both losses
    "headpurify": "--modes zero-shot ha-lora+dig --epochs 1 --batch-size 178 --gate-lr 0.05",
}


def train(processes, script, line, cwd):
    """The record and the exported weights of a command."""
    start = f"-m torch.distributed.run --standalone --nproc_per_node={processes}"
    shutil.rmtree(cwd / "runs", ignore_errors=True)
    done = call(f"{start if processes > 1 else ''} {script}.py {line}", cwd, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    (result,) = (cwd / "runs").rglob("result.json")
    weights = load_file(result.parent / "model" / "open_clip_model.safetensors")
    return done.stdout, json.loads(result.read_text()), weights


@pytest.mark.slow
@pytest.mark.parametrize("script", LINES)
def test_two_processes_are_as_one(checkout, script):
    """The same accuracies, and weights that are equal up to the order of sums."""
    printed, one, weights = train(1, script, LINES[script], checkout)
    printed_by_two, two, weights_of_two = train(2, script, LINES[script], checkout)
    for name, weight in weights.items():
        apart = (weights_of_two[name] - weight).abs()
        if name.endswith("in_proj_bias"):  # a key's has no effect: Adam follows rounding errors
            apart = apart.unflatten(0, (3, -1))[[0, 2]]
        assert apart.max() < 5e-5, name  # weights move by up to 2e-3
    assert two["rows"]["zero-shot"] == one["rows"]["zero-shot"]
    *_, trained = one["rows"]
    for measure, accuracy in one["rows"][trained].items():
        assert two["rows"][trained][measure] == pytest.approx(accuracy, abs=2e-3)
    assert printed_by_two.count("Best ") == printed.count("Best ") == 1  # one process speaks


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused(checkout):
    start = "-m torch.distributed.run --standalone --nproc_per_node=2"
    odd = call(f"{start} clipood.py --batch-size 7", checkout)
    assert "--batch-size 7 per source domain cannot be shared by 2 processes" in odd.stderr
    ldfs = call(f"{start} ldfs.py", checkout)
    assert "ldfs.py runs in one process" in ldfs.stderr
