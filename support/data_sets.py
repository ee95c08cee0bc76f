"""Which data sets are there, and are they whole?

python common.py data                          # all of them: found or missing, and where
python common.py data --check pacs officehome  # also counts and opens every image

`python common.py table` is about runs: see its --help.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm.auto import tqdm

from support import InputError, did_you_mean
from support.benchmarks import DATASETS, Missing, read_dataset
from support.images import files_of, reasons
from support.report import format_table

DRAWN = list(dict.fromkeys(row["stand-in"] for row in DATASETS.values()))
READ = [name for name, row in DATASETS.items() if row["reader"] != "mnist-cifar"]  # no image files


def line_of(name: str, root: str) -> list[str]:
    """What the list says of a data set: where, images, domains or parts, classes."""
    folder = Path(root) / DATASETS[name]["folder"]
    if name not in READ:
        found = (folder / "MNIST").is_dir() and (folder / "cifar-10-batches-py").is_dir()
        return ["found" if found else "missing (--download)", "-", "-", "2"]
    try:
        classes, parts = read_dataset(name, root)
    except Missing:
        return ["missing", "-", "-", "-"]
    except InputError:
        return [f"not whole: try --check {name}", "-", "-", "-"]
    count = len(files_of(parts))
    return [str(folder), f"{count:,}", str(len(parts)), str(len(classes))]


def check(name: str, root: str) -> None:
    """Count the images of a data set and open each of them. Raises: InputError for one that is not
    as published, or that has images which cannot be read."""
    classes, parts = read_dataset(name, root)
    files = files_of(parts)
    for part, items in parts.items():
        print(f"{name}, {part}: {len(items):,} images")
    wrong = []
    row = DATASETS[name]
    if "counts" in row and len(files) not in row["counts"]:
        published = " or ".join(f"{count:,}" for count in row["counts"])
        wrong.append(f"{len(files):,} images, published are {published}")
    if "classes" in row and len(classes) != row["classes"]:
        wrong.append(f"{len(classes)} classes, published are {row['classes']}")
    for why in tqdm(reasons(files), name, len(files), disable=None):
        if why:
            wrong.append(f"cannot be read: {why}")
    if wrong:
        raise InputError(f"{name} is not whole\n  " + "\n  ".join(wrong))
    known = "as published" if "counts" in row else "there is no published count to compare with"
    print(f"{name}: all {len(files):,} images of {len(classes)} classes can be read; {known}")


def main() -> None:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("common.py", description=__doc__, formatter_class=text)
    parser.add_argument("what", choices=["data"])
    parser.add_argument("--data-root", default="data", help="folder that holds their folders")
    names = f"also count its images, and open each: {', '.join(READ)}"
    parser.add_argument("--check", nargs="+", default=[], metavar="NAME", help=names)
    args = parser.parse_args()
    for name in args.check:
        if name not in READ:
            hint = did_you_mean(name, READ)
            raise InputError(f"--check {name}: no such data set{hint} There are {', '.join(READ)}.")
    if not args.check:
        rows = {name: line_of(name, args.data_root) for name in DATASETS}
        title = f"data sets in {args.data_root}"
        print(format_table(title, ["where", "images", "domains or parts", "classes"], rows))
        print(f"Drawn in seconds, needing no files: {', '.join(DRAWN)}")
        print("Given a missing one, a script says what its folder must hold, and where to get it.")
    for name in args.check:
        check(name, args.data_root)
