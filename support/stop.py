"""Ctrl-C and SIGTERM: a run ends the step it is at, keeps what it can, and the command stops.

Python may meet a signal between any two lines, also while a folder is put in its place. So within a
run a signal is only noted, and `stop_if_asked` stops where a step of training or a batch of an
evaluation has ended. A training that can go on from any step asks `was_asked` after each, and keeps
its state before it stops. A second signal stops at once, as a kill does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from torch.optim.optimizer import register_optimizer_step_post_hook

from support import parallel

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# seconds in which two signals are one: `timeout` sends its own twice. So does torchrun, as soon as
# one process has stopped, and kills what is left after 30 seconds
ONE = 0.2

RUNS_ARE_KEPT = "kept: runs that are complete; --resume goes on after them"


class Stopped(BaseException):
    """A signal came. No Exception, so that nothing takes it for an error and goes on."""


class Heard:
    """What came since the command started."""

    def __init__(self):
        self.number = None  # of the first signal
        self.time = 0.0
        self.steps = 0  # of optimizers since then
        self.in_run = False


heard = Heard()  # one for the process, as its signals are


@contextlib.contextmanager
def listening():
    """Listen to signals. If one came, the second step of any optimizer is the last."""
    heard.__init__()
    before = {number: signal.signal(number, note) for number in SIGNALS}
    hook = register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        hook.remove()
        for number, handler in before.items():
            signal.signal(number, handler)


def note(number: int, _) -> None:
    """The handler of a signal."""
    if heard.number is None:
        heard.number, heard.time = number, time.monotonic()
        if hasattr(signal, "SIGCHLD"):  # to torch, readers that end now are an error
            signal.signal(signal.SIGCHLD, lambda *_: None)
        if not heard.in_run:
            stop_if_asked()
    elif time.monotonic() - heard.time > ONE and not parallel.launched():
        os._exit(128 + number)


@contextlib.contextmanager
def in_steps():
    """Within this a signal waits for the end of a step, or for the end of this."""
    heard.in_run = True
    try:
        yield
    finally:
        heard.in_run = False
    stop_if_asked()


def after_step(*_) -> None:
    """Stop, but not before who took the step could keep its state: that stops by itself."""
    heard.steps += was_asked()
    if heard.steps > 1:
        stop_if_asked()


def was_asked() -> bool:
    return heard.number is not None


def stop_if_asked() -> None:
    """Raises: Stopped if a signal came."""
    if was_asked():
        raise Stopped(RUNS_ARE_KEPT)
