"""Steps of an optimizer: numbers that break are named, and a GPU is not waited for."""

import functools
import time

import pytest
import torch
from operations import Operations
from torch import nn

import clipood
import common
import headpurify
import ldfs
import vit_diverse
from support import steps


# ---------- A queue ------------------------------------------------------------------------------
class Batches:
    step = 0

    def names(self, step):
        return [f"image {step}"]


@pytest.mark.parametrize("broken_step, looked_at", [(1, 3), (3, 3), (4, 6), (5, 6), (7, 7)])
def test_the_first_broken_step_is_named_though_numbers_are_seen_later(broken_step, looked_at):
    """Looking at every third step, and at the end."""
    weight = nn.Parameter(torch.ones(2))
    batches = Batches()
    watched = common.Steps(torch.optim.SGD([weight], 0.1), batches)
    watched.every = 3
    with pytest.raises(common.InputError) as error:
        for step in range(1, 8):
            batches.step = step
            weight.grad = torch.full((2,), torch.nan if step >= broken_step else 1.0)
            watched.take(torch.tensor(0.5), f"step {step}")
        watched.check()
    assert batches.step == looked_at
    message = str(error.value)
    assert message.startswith(f"step {broken_step}, learning rate 0.1: the loss is 0.5, ")
    assert message.endswith(f"this batch: image {broken_step}")


# ---------- --profile -----------------------------------------------------------------------------
@pytest.mark.parametrize("reading, stepping", [(0.99, 0.01), (0.01, 0.99), (0.25, 0.25)])
def test_profile_tells_reading_from_training(monkeypatch, capsys, reading, stepping):
    """By a clock that only readers, steps and an evaluation move: 53 batches of 8 images."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def loader():
        for _ in range(53):
            now[0] += reading
            yield torch.zeros(8, 3, 4, 4), torch.zeros(8)

    weight = nn.Parameter(torch.ones(2))
    watched = common.Steps(torch.optim.SGD([weight], 0.1))
    monkeypatch.setattr(common.profile, "on", True)
    for _ in common.profile.batches(loader()):
        weight.grad = torch.ones(2)
        now[0] += stepping
        watched.take(torch.tensor(0.5), "a step")
        now[0] += 100  # an evaluation
    watched.check()
    monkeypatch.setattr(common.profile, "on", False)
    for _ in common.profile.batches(loader()):
        watched.take(torch.tensor(0.5), "a step that nobody asks about")
    watched.check()
    share = 100 * reading / (reading + stepping)
    speed = 8 / (reading + stepping)
    text = f"{speed:.0f} images/s, {share:.0f} % of the time waiting for data"
    assert capsys.readouterr().out.splitlines() == [f"50 steps: {text}", f"3 steps: {text}"]


@pytest.mark.parametrize(
    "script, line, count",
    [
        (clipood, "--modes mms --epochs 2 --steps-per-epoch 2 --batch-size 14", 2),
        (vit_diverse, "--modes erm --epochs 2 --batch-size 100", 4),
    ],
)
def test_profile_of_a_training(few_images, call_main, script, line, count):
    """A line for each epoch."""
    lines = call_main(script.main, f"{line} --profile").splitlines()
    spoken = [line for line in lines if "waiting for data" in line]
    assert len(spoken) == 2 and all(line.startswith(f"{count} steps: ") for line in spoken), lines


# ---------- No step of any method waits ----------------------------------------------------------
def plain_sgd(groups, *_, **__):
    """In place of Adam, which asks a CPU for the number of its step; on a GPU it does not."""
    return torch.optim.SGD(groups, 1e-4)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Numbers are looked at every so many steps."""
    own = steps.Steps.__init__

    def init(self, *args, **kwargs):
        own(self, *args, **kwargs)
        self.every = steps.EVERY

    monkeypatch.setattr(steps.Steps, "__init__", init)
    for name in ("Adam", "AdamW"):
        monkeypatch.setattr(torch.optim, name, plain_sgd)


@pytest.fixture
def few_images(monkeypatch):
    classes, *_ = common.TINY_BENCHMARKS["tiny-pacs"]
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (classes, 5, 2))
    draw = functools.partial(common.draw_digits_and_vehicles, sizes=(400, 20, 20))
    monkeypatch.setattr(common, "draw_digits_and_vehicles", draw)


TRAININGS = [
    (headpurify, "--modes ha-lora+dig --epochs 1 --batch-size {}", 14),
    (headpurify, "--modes full ha-lora+dig/mmd-at=layers --epochs 1 --batch-size {}", 14),
    (clipood, "--modes linear+ema mms mms+bma --epochs 1 --steps-per-epoch 2 --batch-size {}", 14),
    (ldfs, "--modes lads ldfs --epochs 1 --mapper-epochs 1 --targets cartoon --batch-size {}", 14),
    (vit_diverse, "--modes div+sel --epochs 1 --batch-size {}", 100),
]


@pytest.mark.parametrize("script, line, size", TRAININGS)
def test_no_step_waits_for_a_gpu(as_on_a_gpu, few_images, call_main, script, line, size):
    """An epoch of twice as many steps has as many operations that wait."""
    found = []
    for batch_size in (size, size // 2):
        more_steps = line.format(batch_size).replace("epoch 2 ", f"epoch {2 * size // batch_size} ")
        with Operations() as operations:
            printed = call_main(script.main, f"{more_steps} --output {batch_size}")
        assert "Runs are in" in printed
        found.append((operations.launched, operations.waits))
    (launched, waits), (more, waits_then) = found
    assert more > 1.1 * launched  # there were more steps
    assert waits_then == waits
