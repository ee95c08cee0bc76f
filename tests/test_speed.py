"""What a step costs, as far as a CPU can tell; --compile; and that bench.py --gpu would run."""

import functools
import json

import bench
import open_clip
import pytest
import torch
import training_steps
from operations import Operations
from torch import nn

import clipood
import common
import headpurify
import ldfs
import vit_diverse
from support import InputError, runs, tiny_world


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (tiny_world.PACS_CLASSES, 5, 2))
    draw = functools.partial(tiny_world.draw_digits_and_vehicles, sizes=(400, 20, 20))
    monkeypatch.setattr(tiny_world, "draw_digits_and_vehicles", draw)


# ---------- Operations of a step -----------------------------------------------------------------
counted = functools.cache(training_steps.operations)


@pytest.mark.parametrize(
    "name, bound",
    [("headpurify", 1.25), ("clipood", 1.02), ("vit_diverse", 1.35), ("ldfs, features", 0.2)],
)
def test_operations_of_a_step_beside_those_it_is_compared_with(name, bound):
    _, other = training_steps.STEPS[name]
    assert counted(name).launched <= bound * counted(other).launched
    assert counted(name).waits == 0


TRAININGS = [  # {b} images in a batch and {n} steps in an epoch
    (headpurify, "--modes full ha-lora+dig/mmd-at=layers --epochs 1 --batch-size {b}", 14),
    (clipood, "--modes mms+bma --epochs 1 --steps-per-epoch {n} --batch-size {b}", 14),
    (ldfs, "--modes lads ldfs --epochs 1 --mapper-epochs 1 --targets art --batch-size {b}", 14),
    (vit_diverse, "--modes div+sel --epochs 1 --batch-size {b}", 100),
]


def plain_sgd(groups, *_, **__):
    """In place of Adam, which asks a CPU for the number of its step; on a GPU it does not."""
    return torch.optim.SGD(groups, 1e-4)


@pytest.mark.parametrize("script, line, size", TRAININGS)
def test_no_step_waits_for_a_gpu(few_images, call_main, monkeypatch, script, line, size):
    """An epoch of twice as many steps has as many operations that wait."""
    monkeypatch.setattr(torch.optim, "Adam", plain_sgd)
    monkeypatch.setattr(torch.optim, "AdamW", plain_sgd)
    counts = []
    for batch_size, steps in ((size, 2), (size // 2, 4)):
        with Operations() as operations:
            printed = call_main(script.main, line.format(b=batch_size, n=steps))
        assert "Runs are in" in printed
        counts.append(operations)
    few_steps, many_steps = counts
    assert many_steps.launched > 1.1 * few_steps.launched
    assert many_steps.waits == few_steps.waits


# ---------- --compile ----------------------------------------------------------------------------
SCRIPTS = [
    (headpurify, "--modes ha-lora+dig --epochs 1 --batch-size 14"),
    (clipood, "--modes mms+bma --epochs 1 --steps-per-epoch 2 --batch-size 4"),
    (vit_diverse, "--modes div+sel --epochs 1 --batch-size 200 --depth 2"),
]


@pytest.fixture
def eager_backend(monkeypatch):
    """Graphs are traced, and then run without a C compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def rows_and_weights(folder, script):
    """What a command wrote: its rows, and weights {name: tensor}."""
    (result,) = folder.glob("**/result.json")
    rows = json.loads(result.read_text())["rows"]
    if script is vit_diverse:
        return rows, torch.load(result.parent / "div.pt")
    return rows, open_clip.create_model(f"local-dir:{result.parent / 'model'}").state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("script, line", SCRIPTS)
def test_compiled_training_gives_the_same_under_the_same_names(
    script, line, few_images, eager_backend, call_main, tmp_path
):
    for name, more in (("plain", ""), ("compiled", "--compile")):
        assert "Runs are in" in call_main(script.main, f"{line} {more} --output {name}")
    rows, weights = rows_and_weights(tmp_path / "plain", script)
    rows_compiled, weights_compiled = rows_and_weights(tmp_path / "compiled", script)
    assert rows_compiled == rows
    assert list(weights_compiled) == list(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(weights_compiled[name], weight, rtol=1e-5, atol=1e-5)


def test_a_compiled_module_has_the_gradients_of_two_losses(eager_backend):
    """As `route_gradients` asks for them: the first keeps the graph for the second."""
    module = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    assert runs.compiled(module, False) is module
    compiled = runs.compiled(module, True)
    assert compiled is not module
    x, gradients = torch.randn(5, 3), []
    for network in (module, compiled):
        out = network(x)
        first = torch.autograd.grad(out[:, 0].sum(), module.parameters(), retain_graph=True)
        second = torch.autograd.grad(out[:, 1].sum(), module[0].weight)
        gradients.append([*first, *second])
    torch.testing.assert_close(*gradients)


# ---------- bench.py --gpu -----------------------------------------------------------------------
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_without_a_gpu_says_so():
    with pytest.raises(InputError, match="^--gpu: PyTorch sees no GPU here$"):
        bench.bench_gpu(1)


def test_bench_of_steps_on_a_gpu_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    """With two narrow layers, and nothing compiled, which takes its time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda module: module)
    tower = training_steps.narrow_tower(layers=2)
    bench.compare_speeds(tower, (8,), "cpu", "my CPU", "fp32", repeats=1)
    rows = json.loads((tmp_path / "results" / "speed-my_cpu.json").read_text())["rows"]
    steps = [row["step"] for row in rows if not row["compiled"]]
    assert steps == [*training_steps.STEPS]
    assert [row["step"] for row in rows if row["compiled"]] == steps[:-1]  # all but ldfs
    for row in rows:
        assert row["images/s"] == pytest.approx(8 / row["seconds"])
        if row["step"] == row["compared with"]:
            assert row["ratio"] == 1
    assert "headpurify, compiled" in capsys.readouterr().out
