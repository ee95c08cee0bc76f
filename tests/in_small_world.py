"""A script on few images, as a command: python tests/in_small_world.py clipood --epochs 2

With KILLED_AT_FIRST_CHECKPOINT=1 rank 0 is killed after it has saved an epoch.
"""

import functools
import importlib
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from support import parallel, runs, tiny_world


def killed_after(save):
    def save_and_die(run, state):
        save(run, state)
        if state and parallel.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return save_and_die


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (classes, *_) in list(common.TINY_BENCHMARKS.items()):
        common.TINY_BENCHMARKS[name] = classes, 8, 8
    draw = functools.partial(tiny_world.draw_digits_and_vehicles, sizes=(60, 40, 50))
    tiny_world.draw_digits_and_vehicles = draw
    if os.environ.get("KILLED_AT_FIRST_CHECKPOINT"):
        runs.Run.save = killed_after(runs.Run.save)
    script = importlib.import_module(sys.argv.pop(1))
    runs.command(script.main)
