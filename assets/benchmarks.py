"""Where the benchmarks' images are: readers of their layouts. `datasets.json` has a row for each.

A reader takes the folder and the row, and returns the class names and {domain or part: [(file,
label), ...]}. A new benchmark is a row, and a reader if its layout is new.
"""

import csv
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10, MNIST, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from assets.tiny_world import (
    SPURIOUS_SPLITS,
    WATERBIRD_CLASSES,
    InputError,
    spurious_digits,
    tiny_rng,
)

DATASETS = json.loads(Path(__file__).with_name("datasets.json").read_text())
PARTS = ("train", "val", "test")


def read_dataset(name: str, root):
    """Class names and {domain or part: [(file, label), ...]} of a row of `DATASETS`.

    Raises: InputError if the folder, its lists or its images are missing or not in the layout.
    """
    row = DATASETS[name]
    path = Path(root) / row["folder"]
    if not path.is_dir():
        raise missing(name, path, root)
    try:
        classes, parts = READERS[row["reader"]](path, row)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"cannot read data set {name!r} ({type(error).__name__}: {error})"
        raise InputError(f"{what}\n  expected: {layout_of(name, path)}") from None
    for part, items in parts.items():
        first = items[0][0] if items else ""
        if not items or not Path(first).is_file():
            what = f"data set {name!r} has no image {first} for its part {part}"
            raise InputError(f"{what}; expected {layout_of(name, path)}")
    return classes, parts


def layout_of(name: str, path: Path) -> str:
    return DATASETS[name]["layout"].replace("PATH", str(path))


def missing(name: str, path, root) -> InputError:
    """The message for a data set that is not there."""
    row = DATASETS[name]
    return InputError(
        f"data set {name!r} is not in {path}\n"
        f"  expected: {layout_of(name, path)}\n"
        f"  get it:   {row['source']}; then say where with --data-root (now {str(root)!r})\n"
        f"  or try:   --dataset {row['stand-in']}, drawn in seconds and without a download"
    )


# ---------- Readers ------------------------------------------------------------------------------
def read_folders(path: Path, row: dict):
    """<domain>/<class>/<image>, images in the order of torchvision's ImageFolder."""
    layout = f"expected {path}/<domain>/<class>/<image>"
    folders, classes = {}, set()
    for domain in row["domains"]:
        if not (path / domain).is_dir():
            wanted = f"{layout} with domains {', '.join(row['domains'])}"
            raise InputError(f"{path} has no domain folder {domain!r}; {wanted}")
        if not any(entry.is_dir() for entry in (path / domain).iterdir()):
            raise InputError(f"{path / domain} has no class folders; {layout}")
        folders[domain] = ImageFolder(path / domain, allow_empty=True)
        classes.update(folders[domain].classes)
    if not folders:
        raise InputError(f"{path} has no domain folder; {layout}")
    for domain, folder in folders.items():
        filled = {folder.classes[label] for label in folder.targets}
        for name in sorted(classes - filled):
            raise InputError(
                f"domain {domain!r} has no image of class {name!r}, which other domains have: "
                f"{path / domain / name} is missing or empty"
            )
    return sorted(classes), {domain: folder.samples for domain, folder in folders.items()}


def read_mini(path: Path, row: dict):
    """DomainNet-mini: lists of `image label`; a class is called like the folder of its images."""
    names, parts = {}, {}
    for domain in row["domains"]:
        parts[domain] = read_mini_list(path / f"{domain}_train_mini.txt", names)
        parts[f"{domain} test"] = read_mini_list(path / f"{domain}_test_mini.txt", names)
    return [names.get(label, f"number {label}") for label in range(max(names) + 1)], parts


def read_mini_list(file: Path, names: dict[int, str]) -> list[tuple]:
    """Images and labels of one list; `names` learns what its labels are called."""
    items = []
    for line in file.read_text().splitlines():
        try:
            image, label = line.rsplit(" ", 1)
            items.append((file.parent / image, int(label)))
        except ValueError:
            wanted = "expected <domain>/<class>/<image> label"
            raise InputError(f"cannot read the line {line!r} of {file}; {wanted}") from None
        names[int(label)] = Path(image).parent.name
        (file.parent / image).stat()  # it is there
    return items


def read_cub(path: Path, row: dict):
    """CUB's paintings and photos: the number of a class folder `001.Albatross` is its identity."""
    paintings, photos = path / "CUB-200-Painting", path / "CUB_200_2011" / "images"
    if not paintings.is_dir() or not photos.is_dir():
        raise missing("cub-paintings", path, path)
    sets = [ImageFolder(folder, allow_empty=True) for folder in (paintings, photos)]
    numbers = [set(), set()]  # capitals in names differ
    for own, images in zip(numbers, sets):
        own.update(name.split(".")[0] for name in images.classes)
    if numbers[0] != numbers[1]:
        differ = sorted(numbers[0] ^ numbers[1])
        raise InputError(f"the class folders of {paintings} and {photos} differ in {differ}")
    classes = [name.split(".", 1)[-1] for name in sets[1].classes]
    return classes, {domain: images.samples for domain, images in zip(row["domains"], sets)}


def read_split(path: Path, row: dict):
    """CoOp's JSON: train, val and test, each a list of [path, label, class name]."""
    lists = json.loads((path / row["lists"]).read_text())
    names, parts = {}, {}
    for part in PARTS:
        parts[part] = []
        for file, label, name in lists[part]:
            parts[part].append((path / row["images"] / file, label))
            names[label] = name
    return [names[label] for label in range(len(names))], parts


def read_aircraft(path: Path, row: dict):
    """variants.txt has a class name a line, images_variant_<part>.txt `number class name`."""
    names = (path / row["lists"]).read_text().split("\n")
    parts = {}
    for part in PARTS:
        parts[part] = []
        for line in (path / f"images_variant_{part}.txt").read_text().splitlines():
            number, name = line.split(" ", 1)
            image = path / row["images"] / f"{number}.jpg"
            parts[part].append((image, names.index(name)))
    return [name for name in names if name], parts


def read_imagenet(path: Path, row: dict):
    """ImageNet or a set that shifts it: a folder for each line `n01440764 tench` of classnames.txt.

    Its classes are those with a folder: 200 in ImageNet-A and -R. ImageNetV2 calls the folder of
    line i just i, which as text would sort 0, 1, 10. ImageNet's validation set is its test set too.
    """
    lines = [line.split(maxsplit=1) for line in (path / row["lists"]).read_text().splitlines()]
    if row["folder"] == "imagenetv2":
        lines = [(str(i), name) for i, (_, name) in enumerate(lines)]
    found, parts = {}, {}
    for part, subfolder in row["parts"].items():
        folder = path / row["images"] / subfolder
        found[part] = [line for line in lines if (folder / line[0]).is_dir()]
        parts[part] = []
        for label, (class_folder, _) in enumerate(found[part]):
            for file in sorted((folder / class_folder).iterdir()):
                if file.suffix.lower() in IMG_EXTENSIONS:
                    parts[part].append((file, label))
    classes, *others = found.values()
    if others and others[0] != classes:
        sizes = f"train has folders of {len(classes)} classes, val of {len(others[0])}"
        raise ValueError(f"{sizes}, and they must be the same")
    return [name for _, name in classes], parts


def read_waterbirds_table(path: Path) -> list[tuple]:
    """Rows of metadata.csv: (file, bird, part, place)."""
    file = path / "metadata.csv"
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    table = []
    try:
        for row in rows:
            numbers = [int(row[column]) for column in ("y", "split", "place")]
            table.append((path / row["img_filename"], *numbers))
    except (KeyError, ValueError, TypeError) as error:
        needs = "columns img_filename and, as whole numbers, y, split, place"
        raise InputError(f"{file} needs {needs} ({error!r})") from None
    return table


def read_waterbirds(path: Path, row: dict):
    """The released folder: train (95 % of the birds in their place), val and test."""
    table, parts = read_waterbirds_table(path), {}
    for number, part in enumerate(PARTS):
        parts[part] = [(file, bird) for file, bird, split, _ in table if split == number]
        if not parts[part]:
            raise InputError(f"{path / 'metadata.csv'} lists no image of the {part} part")
    return WATERBIRD_CLASSES, parts


READERS = {
    "folders": read_folders,
    "mini": read_mini,
    "cub": read_cub,
    "split": read_split,
    "aircraft": read_aircraft,
    "imagenet": read_imagenet,
    "waterbirds": read_waterbirds,
}


# ---------- MNIST-CIFAR, which is composed -------------------------------------------------------
def digits_and_vehicles(root, train: bool, download: bool):
    """Images of digits 0 and 1, (n, 32, 32) each, and of vehicles, (n, 3, 32, 32) each, uint8."""
    try:
        mnist = MNIST(root, train, download=download)
        cifar = CIFAR10(root, train, download=download)
    except (RuntimeError, OSError):
        raise missing("mnist-cifar", Path(root), root) from None
    pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)
    kinds = torch.tensor(cifar.targets)
    digits = [F.pad(mnist.data[mnist.targets == digit], (2, 2, 2, 2)) for digit in (0, 1)]
    vehicles = [pixels[kinds == label] for label in (1, 9)]  # automobile, truck
    return digits, vehicles


def load_mnist_cifar(root, seed: int, download: bool = False) -> dict[str, tuple]:
    """A handwritten digit above a CIFAR-10 vehicle, 64 x 32 pixels, from torchvision's data sets.

    The vehicle (automobile 0, truck 1) is the label; see `SPURIOUS_SPLITS` for the digit (0 or 1,
    padded to 32 x 32). Vehicles and digits of the test parts are split 20/80 into validation and
    test.

    Returns: {part: (pixels (N, 3, 64, 32), labels (N,), groups (N,) = 2 * vehicle + digit)}.
    """
    pools = {"train": digits_and_vehicles(root, True, download), "val": ([], []), "test": ([], [])}
    for kind, images in enumerate(digits_and_vehicles(root, False, download)):
        for pool in images:
            fifth = len(pool) // 5
            pools["val"][kind].append(pool[:fifth])
            pools["test"][kind].append(pool[fifth:])
    splits = {}
    for split in SPURIOUS_SPLITS:
        rng = tiny_rng(seed, "mnist-cifar", split)
        digits, vehicles = pools[split.split("_")[0]]
        labels = np.repeat((0, 1), [len(pool) for pool in vehicles])
        shown = spurious_digits(labels, split, rng)
        tops = [digits[digit][rng.integers(len(digits[digit]))] for digit in shown]
        top = torch.stack(tops)[:, None].expand(-1, 3, -1, -1)
        images = torch.cat([top, torch.cat(vehicles)], 2)  # (N, 3, 64, 32)
        groups = torch.from_numpy(2 * labels + shown)
        splits[split] = images, torch.from_numpy(labels), groups
    return splits
