"""Make `tiny_world.png`, the contact sheet of the README: every thing in every domain, twice.

    python support/draw_tiny_world.py

The upper row of a domain shows things as the tiny CLIP was pretrained on them, the lower row as the
tiny sets show them.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import tiny_world

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
POSES = {"pretraining": tiny_world.PRETRAINING_POSE, "task": tiny_world.TASK_POSE}


def contact_sheet():
    """A figure with a column for each thing and two rows for each domain."""
    names = (*tiny_world.OFFICE_CLASSES, *tiny_world.WATERBIRD_CLASSES)
    kinds = list(tiny_world.BACKGROUNDS)
    size = (len(names), 8 * 1.06)
    figure, axes = plt.subplots(8, len(names), figsize=size)
    rows = iter(axes)
    for domain in DOMAINS:
        rng = tiny_world.tiny_rng(1000, "contact sheet", domain)
        for again, (label, pose) in enumerate(POSES.items()):
            grounds = [kinds[(i + 3 * again) % len(kinds)] for i in range(len(names))]
            colors = tiny_world.random_colors(rng, len(names))
            images = tiny_world.draw(names, domain, grounds, colors, rng, pose)
            cells = next(rows)
            for cell, pixels in zip(cells, images):
                cell.imshow(pixels.permute(1, 2, 0), interpolation="nearest")
                cell.set(xticks=[], yticks=[])
            cells[0].set_ylabel(f"{domain}\n{label}", fontsize=8)
    for cell, name in zip(axes[0], names):
        cell.set_title(name, fontsize=9)
    edges = {"left": 0.05, "right": 0.998, "top": 0.965, "bottom": 0.005}
    figure.subplots_adjust(**edges, wspace=0.04, hspace=0.04)
    return figure


if __name__ == "__main__":
    contact_sheet().savefig(Path("assets/tiny_world.png"), dpi=132)
