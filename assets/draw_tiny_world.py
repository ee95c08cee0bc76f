"""Make `tiny_world.png`, the contact sheet of the README: every thing in every domain, twice.

    python assets/draw_tiny_world.py
"""

import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from assets import tiny_world  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

names = (*common.OFFICE_CLASSES, *common.WATERBIRD_CLASSES)
figure, axes = plt.subplots(8, len(names), figsize=(len(names) * 1.0, 8 * 1.06))
for row, domain in enumerate(("photo", "art_painting", "cartoon", "sketch")):
    rng = common.tiny_rng(1000, "contact sheet", domain)
    for again, pose in enumerate((tiny_world.PRETRAINING_POSE, tiny_world.TASK_POSE)):
        grounds = [list(tiny_world.BACKGROUNDS)[(i + 3 * again) % 8] for i in range(len(names))]
        images = tiny_world.draw(names, domain, grounds, rng.choice(list(tiny_world.COLORS), len(names)), rng, pose)
        for column, pixels in enumerate(images):
            cell = axes[2 * row + again, column]
            cell.imshow(pixels.permute(1, 2, 0), interpolation="nearest")
            cell.set(xticks=[], yticks=[])
            if row == again == 0:
                cell.set_title(names[column], fontsize=9)
        axes[2 * row + again, 0].set_ylabel(f"{domain}\n{('pretraining', 'task')[again]}", fontsize=8)
figure.subplots_adjust(left=0.05, right=0.998, top=0.965, bottom=0.005, wspace=0.04, hspace=0.04)
figure.savefig(Path(__file__).with_name("tiny_world.png"), dpi=132)
