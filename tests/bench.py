"""What the methods' extras cost, as ratios of two ways that take turns in one run, so that a busy machine slows both.

python tests/bench.py clipood
"""

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def medians(ways: dict, repeats: int) -> dict[str, float]:
    """Median seconds of every way {name: function}, each called once to warm up and then `repeats` times in turn."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(own[1:]) for name, own in seconds.items()}


def resident() -> int:
    """Bytes of memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def clipood(repeats: int) -> None:
    """The running average beside a training step: ViT-B-32, random weights, batch 36, this machine's CPU."""
    from clipood import BetaMovingAverage, margin_metric_softmax

    logging.disable(logging.WARNING)  # open_clip: "No pretrained weights"
    torch.manual_seed(0)
    tower = open_clip.create_model("ViT-B-32").visual
    optimizer = torch.optim.AdamW(tower.parameters(), lr=5e-6, weight_decay=0.1)
    images, labels = torch.randn(36, 3, 224, 224), torch.randint(65, (36,))
    text = F.normalize(torch.randn(65, 512), dim=-1)
    size = sum(parameter.nbytes for parameter in tower.parameters())

    def step():
        loss = margin_metric_softmax(F.normalize(tower(images), dim=-1), text, labels, 100, 0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    before = resident()  # nothing was freed yet, so what is added is seen
    fused = BetaMovingAverage(tower, steps=5000, beta=0.5)
    fused.update(tower)
    print(f"memory it adds: {(resident() - before) / size:.2f} copies of the weights ({size / 1e6:.0f} MB)")
    average = list(fused.model.parameters())

    @torch.no_grad()
    def loop():
        for mean, parameter in zip(average, tower.parameters()):
            mean.mul_(0.9).add_(parameter, alpha=0.1)

    found = medians({"step": step, "update": lambda: fused.update(tower), "loop": loop}, repeats)
    print(f"training step: {found['step']:.2f} s")
    print(f"BetaMovingAverage.update: {100 * found['update'] / found['step']:.2f} % of it (bound: 1.5 %)")
    print(f"a loop of mul_ and add_ over the tensors: {100 * found['loop'] / found['step']:.2f} % of it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["clipood"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    globals()[args.method](args.repeats)
