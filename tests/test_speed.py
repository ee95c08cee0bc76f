"""What a step costs, as far as a CPU can tell; --compile; and that bench.py --gpu would run."""

import functools
import json

import bench
import open_clip
import pytest
import torch
import training_steps
from torch import nn

import clipood
import common
import headpurify
import vit_diverse
from support import graphs


def as_it_is(function):
    """In place of torch.compile, which takes its time."""
    return function


# ---------- Operations of a step -----------------------------------------------------------------
@pytest.fixture(scope="module")
def counts():
    counted = functools.cache(training_steps.operations)
    return lambda name: counted(name).launched


@pytest.mark.parametrize(
    "name, bound",
    [("headpurify", 1.25), ("clipood", 1.02), ("vit_diverse", 1.35), ("ldfs, features", 0.2)],
)
def test_operations_of_a_step_beside_those_it_is_compared_with(counts, name, bound):
    _, other = training_steps.STEPS[name]
    assert counts(name) <= bound * counts(other)


def test_casting_all_weights_in_every_step_takes_more_operations(counts):
    assert counts("clipood") < counts("clipood, published loop") / 1.5


# ---------- --compile ----------------------------------------------------------------------------
SCRIPTS = [
    (headpurify, "--modes ha-lora+dig --epochs 1 --batch-size 40"),
    (clipood, "--modes mms+bma --epochs 1 --steps-per-epoch 2 --batch-size 4"),
    (vit_diverse, "--modes div+sel --epochs 1 --batch-size 160 --depth 2"),
]


def numbers_of(folder, script):
    """Rows, weights {name: tensor} and losses of a command."""
    (result,) = folder.glob(f"{script.__name__}/**/result.json")
    record = json.loads(result.read_text())
    if script is vit_diverse:
        weights = torch.load(result.parent / "div.pt")
    else:
        weights = open_clip.create_model(f"local-dir:{result.parent / 'model'}").state_dict()
    return record["rows"], weights


@pytest.fixture
def small_world(monkeypatch):
    small = {name: (row[0], 16, 8) for name, row in common.TINY_BENCHMARKS.items()}
    monkeypatch.setattr(common, "TINY_BENCHMARKS", small)
    draw = functools.partial(common.draw_digits_and_vehicles, sizes=(320, 80, 80))
    monkeypatch.setattr(common, "draw_digits_and_vehicles", draw)


@pytest.mark.slow
@pytest.mark.parametrize("script, line", SCRIPTS)
def test_compiled_training_gives_the_same_under_the_same_names(
    script, line, small_world, call_main, monkeypatch, tmp_path
):
    backend = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", backend)
    for name, more in (("plain", ""), ("compiled", "--compile")):
        assert "Runs are in" in call_main(script.main, f"{line} {more} --output {name}")
    plain, weights = numbers_of(tmp_path / "plain", script)
    rows, found = numbers_of(tmp_path / "compiled", script)
    assert rows == plain
    assert list(found) == list(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5)


def test_what_is_compiled_has_the_same_weights_and_gradients_twice(monkeypatch):
    """As `route_gradients` asks for them: of two losses, the first keeps the graph."""
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    module = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    names = list(module.state_dict())
    row = training_steps.row_of(headpurify, "--device cpu")
    assert common.compiled(module, row) is module
    row.compile = True
    compiled = common.compiled(module, row)
    x = torch.randn(5, 3)
    found = []
    for one in (module, compiled):
        out = one(x)
        first = torch.autograd.grad(out[:, 0].sum(), list(module.parameters()), retain_graph=True)
        second = torch.autograd.grad(out[:, 1].sum(), module[0].weight)
        found.append([*first, *second])
    assert calls
    for plain, own in zip(*found):
        assert torch.equal(plain, own)
    assert list(module.state_dict()) == names


def test_a_machine_that_cannot_compile_says_so_in_one_line(monkeypatch, call_main):
    def fail(function):
        raise RuntimeError("Failed to find C compiler.\nPlease specify it.")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(common.InputError) as error:
        graphs.check_compiler(torch.device("cpu"))
    assert str(error.value) == "--compile: PyTorch cannot for cpu here: Failed to find C compiler."
    error = call_main(headpurify.main, "--modes dig --compile")
    assert error.startswith("error: --compile: PyTorch cannot") and error.count("\n") == 1


@pytest.mark.parametrize(
    "script, line, message",
    [
        (headpurify, "--modes dig --mmd-at layers", "--compile hides what layers hand on"),
        (headpurify, "--modes zero-shot", "--compile has no effect on any row: zero-shot"),
        (clipood, "--modes zero-shot coop", "--compile has no effect on any row: zero-shot coop"),
    ],
)
def test_compile_is_refused_where_it_cannot_help(script, line, message, call_main, monkeypatch):
    monkeypatch.setattr(torch, "compile", as_it_is)
    assert call_main(script.main, f"{line} --compile").startswith(f"error: {message}")


# ---------- bench.py --gpu -----------------------------------------------------------------------
def test_bench_without_a_gpu_says_so(root):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(common.InputError, match="^--gpu: PyTorch sees no GPU here$"):
        bench.gpu(1)


def test_bench_of_steps_on_a_gpu_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    """With two narrow layers, and a made-up peak."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(torch, "compile", as_it_is)
    monkeypatch.setitem(bench.PEAKS, "own", 1.0)
    tower = training_steps.narrow_tower(layers=2)
    where = torch.device("cpu"), "my own CPU", "fp32"
    bench.compare_speeds(tower, (8,), *where, repeats=1, half=torch.float32)
    rows = json.loads((tmp_path / "results" / "speed-my_own_cpu.json").read_text())["rows"]
    steps = {(row["step"], row["compiled"]) for row in rows}
    assert {step for step, _ in steps} == {*training_steps.STEPS}
    assert {step for step, compiled in steps if not compiled} == {*training_steps.STEPS}
    assert ("clipood, published loop", True) not in steps and ("headpurify", True) in steps
    for row in rows:
        assert row["images/s"] == pytest.approx(8 / row["seconds"])
        assert row["utilisation"] > 0 and row["peak bytes"] is None
        if row["step"] == row["compared with"]:
            assert row["ratio"] == 1
    assert "headpurify, compiled" in capsys.readouterr().out


def test_an_unknown_gpu_has_no_utilisation(capsys):
    assert bench.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert bench.peak_of("NVIDIA H100 PCIe") == 756e12
    assert bench.peak_of("Abacus 1") is None
    assert "no peak is known of 'Abacus 1'" in capsys.readouterr().out
