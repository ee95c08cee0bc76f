"""--profile: how fast a training is, and how much of its time it waits for data."""

from __future__ import annotations

import time

import torch
from tqdm.auto import tqdm

from support import parallel

EVERY = 50  # steps between two lines


class Profile:
    """What steps took since the last line, from when a batch is asked for until its step is taken:
    evaluations do not count."""

    def __init__(self):
        self.on = False
        self.asked = self.there = 0.0  # when was the last batch? in seconds
        self.clear()

    def clear(self) -> None:
        self.steps = self.images = 0
        self.waited = self.spent = 0.0

    def batches(self, loader):
        """The batches of a loader, whose first part is images; until one is there, time waits."""
        asked = time.perf_counter()
        for batch in loader:
            self.asked, self.there = asked, time.perf_counter()
            self.size = len(batch[0]) * parallel.world_size()
            yield batch
            asked = time.perf_counter()

    def step(self, device: torch.device) -> None:
        """A step along the last batch is taken. It waits until a GPU is through with it."""
        if not self.on:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.waited += self.there - self.asked
        self.spent += time.perf_counter() - self.asked
        self.images += self.size
        self.steps += 1
        if self.steps == EVERY:
            self.say(device)

    def say(self, device: torch.device) -> None:
        """Print a line, if there were steps since the last one."""
        if not self.steps:
            return
        text = f"{self.steps} steps: {self.images / self.spent:,.0f} images/s, "
        text += f"{100 * self.waited / self.spent:.0f} % of the time waiting for data"
        if device.type == "cuda":
            most = torch.cuda.max_memory_allocated(device) / 2**30
            text += f", at most {most:.1f} GiB of GPU memory"
        tqdm.write(text)
        self.clear()


profile = Profile()  # one for the process, whose trainings follow each other
