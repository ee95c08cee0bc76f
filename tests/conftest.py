import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture
def pacs_tree(tmp_path):
    """A PACS folder in the real layout: a few small generated JPEGs per class and domain. Returns the data root."""
    from PIL import Image

    import common

    rng = common.tiny_rng(0, "pacs tree")
    for domain in common.BENCHMARKS["pacs"].domains:
        names = [name for name in common.PACS_CLASSES for _ in range(3)]
        colors, grounds = rng.choice(list(common.COLORS), len(names)), rng.choice(list(common.BACKGROUNDS), len(names))
        for i, (name, pixels) in enumerate(zip(names, common.draw(names, domain, grounds, colors, rng))):
            folder = tmp_path / "data" / "PACS" / domain / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((64, 48)).save(folder / f"pic_{i:03}.jpg")
    return tmp_path / "data"
