"""Where the benchmarks' images are: readers of their layouts. `datasets.json` has a row for each.

A reader takes the folder and the row, and returns the class names and {domain or part: [(file,
label), ...]}; where images have groups, these come third. A new benchmark is a row, and a reader if
its layout is new.
"""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10, MNIST

from support import ASSETS, InputError, slug
from support.images import folders_in, images_below, images_by_class
from support.tiny_world import (
    SPURIOUS_SPLITS,
    WATERBIRD_CLASSES,
    spurious_digits,
    tiny_rng,
)

DATASETS = json.loads((ASSETS / "datasets.json").read_text())
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
        expected = f"expected: {layout_of(name, path)}\n  get it:   {row['source']}"
        raise InputError(f"{what}\n  {expected}") from None
    for part, items in parts.items():
        if not any(Path(file).is_file() for file, *_ in items):
            first = items[0][0] if items else ""
            what = f"data set {name!r} has no image {first} for its part {part}"
            raise InputError(f"{what}; expected {layout_of(name, path)}")
    return classes, parts


def layout_of(name: str, path: Path) -> str:
    return DATASETS[name]["layout"].replace("PATH", str(path))


class Missing(InputError):
    """A data set is not there, not even in part."""


def missing(name: str, path, root) -> Missing:
    """The message for a data set that is not there."""
    row = DATASETS[name]
    return Missing(
        f"data set {name!r} is not in {path}\n"
        f"  expected: {layout_of(name, path)}\n"
        f"  get it:   {row['source']}; then say where with --data-root (now {str(root)!r})\n"
        f"  or try:   --dataset {row['stand-in']}, drawn in seconds and without a download"
    )


# ---------- Readers ------------------------------------------------------------------------------
def read_folders(path: Path, row: dict):
    """<domain>/<class>/<image>, images in the order of torchvision's ImageFolder."""
    layout = f"expected {path}/<domain>/<class>/<image>"
    found, classes = {}, set()
    for domain in row["domains"]:
        if not (path / domain).is_dir():
            wanted = f"{layout} with domains {', '.join(row['domains'])}"
            raise InputError(f"{path} has no domain folder {domain!r}; {wanted}")
        found[domain] = images_by_class(path / domain)
        if not found[domain]:
            raise InputError(f"{path / domain} has no class folders; {layout}")
        classes.update(found[domain])
    if not found:
        raise InputError(f"{path} has no domain folder; {layout}")
    refuse_alike(f"domains of {path}", found, slug, "runs of both would have the same name")
    refuse_alike(f"classes of {path}", classes, as_read, "CLIP reads both names alike")
    for domain, images in found.items():
        for name in sorted(classes):
            if not images.get(name):
                raise InputError(
                    f"domain {domain!r} has no image of class {name!r}: {path / domain / name} is "
                    f"missing or empty; fill it, or remove {name!r} from all domains"
                )
    if len(classes) < 2:
        raise InputError(f"{path} has one class only, {name!r}: nothing to tell apart; {layout}")
    return sorted(classes), {domain: numbered(images) for domain, images in found.items()}


def read_own_folders(path: Path):
    """`read_folders` of pictures of your own, where every folder is a domain."""
    layout = "<domain>/<class>/<image>"
    if not path.is_dir():
        raise InputError(f"no folder {path}; it should hold {layout}")
    domains = folders_in(path)
    if len(domains) == 1:
        raise InputError(f"{path} has one domain only, {domains[0]!r}; expected several {layout}")
    return read_folders(path, {"domains": domains})


def numbered(images: dict[str, list[str]]) -> list[tuple]:
    """(file, label) of {class: its files}, whose classes are numbered in their order."""
    items = []
    for label, files in enumerate(images.values()):
        items += [(file, label) for file in files]
    return items


def as_read(name: str) -> str:
    """A class name as CLIP's text encoder tells it from others."""
    return " ".join(name.replace("_", " ").lower().split())


def refuse_alike(what: str, names: Iterable[str], key: Callable, why: str) -> None:
    """Raises: InputError for two names with the same key."""
    seen = {}
    for name in sorted(names):
        other = seen.setdefault(key(name), name)
        if other != name:
            raise InputError(f"{what}: {other!r} and {name!r}; {why}: rename or merge them")


def read_lines(file: Path) -> list[str]:
    """The lines of a list. Blank ones, and spaces around one, mean nothing."""
    lines = []
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            lines.append(line.strip())
    return lines


def cannot_read(line, file: Path, wanted: str) -> InputError:
    return InputError(f"cannot read {line!r} in {file}; expected {wanted}")


def read_pairs(file: Path, wanted: str) -> list[tuple[str, str]]:
    """The first word and the rest of every line of a list."""
    pairs = []
    for line in read_lines(file):
        try:
            first, rest = line.split(maxsplit=1)
        except ValueError:
            raise cannot_read(line, file, wanted) from None
        pairs.append((first, rest))
    return pairs


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
    for line in read_lines(file):
        try:
            image, label = line.rsplit(maxsplit=1)
            items.append((file.parent / image, int(label)))
        except ValueError:
            raise cannot_read(line, file, "<domain>/<class>/<image> label") from None
        names[int(label)] = Path(image).parent.name
        (file.parent / image).stat()  # it is there
    return items


def read_cub(path: Path, row: dict):
    """CUB's paintings and photos: the number of a class folder `001.Albatross` is its identity."""
    paintings, photos = path / "CUB-200-Painting", path / "CUB_200_2011" / "images"
    if not paintings.is_dir() or not photos.is_dir():
        raise missing("cub-paintings", path, path)
    sets = [images_by_class(folder) for folder in (paintings, photos)]
    numbers = [set(), set()]  # capitals in names differ
    for own, images in zip(numbers, sets):
        own.update(name.split(".")[0] for name in images)
    if numbers[0] != numbers[1]:
        differ = sorted(numbers[0] ^ numbers[1])
        raise InputError(f"the class folders of {paintings} and {photos} differ in {differ}")
    classes = [name.split(".", 1)[-1] for name in sets[1]]
    return classes, {domain: numbered(images) for domain, images in zip(row["domains"], sets)}


SPLIT = '{"train": [["image.jpg", 0, "class name"], ...], "val": [...], "test": [...]}'


def read_split(path: Path, row: dict):
    """CoOp's JSON: train, val and test, each a list of [path, label, class name]."""
    file = path / row["lists"]
    lists = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(lists, dict):
        raise InputError(f"{file} holds one {type(lists).__name__}; expected {SPLIT}")
    names, parts = {}, {}
    for part in PARTS:
        parts[part] = []
        for entry in lists[part]:
            try:
                image, label, name = entry
                label, name = int(label), name.strip()
            except (ValueError, TypeError, AttributeError):
                raise cannot_read(entry, file, SPLIT) from None
            if names.setdefault(label, name) != name:
                both = f"{names[label]!r} and {name!r}"
                raise InputError(f"{file} calls label {label} {both}; give each class its number")
            parts[part].append((path / row["images"] / image, label))
    for label in range(len(names)):
        if label not in names:
            numbers = f"its {len(names)} classes must be numbered 0 to {len(names) - 1}"
            raise InputError(f"{file} has no image with label {label}; {numbers}")
    return [names[label] for label in range(len(names))], parts


def read_aircraft(path: Path, row: dict):
    """variants.txt has a class name a line, images_variant_<part>.txt `number class name`."""
    names = read_lines(path / row["lists"])
    parts = {}
    for part in PARTS:
        parts[part] = []
        file = path / f"images_variant_{part}.txt"
        for number, name in read_pairs(file, "`image number, class name`, as in `1025794 707-320`"):
            if name not in names:
                where = f"{path / row['lists']} lists no such class; add it there, or mend the line"
                raise InputError(f"{file}: image {number} is of class {name!r}, and {where}")
            image = path / row["images"] / f"{number}.jpg"
            parts[part].append((image, names.index(name)))
    return names, parts


def read_imagenet(path: Path, row: dict):
    """ImageNet or a set that shifts it: a folder for each line `n01440764 tench` of classnames.txt.

    Its classes are those with a folder: 200 in ImageNet-A and -R. ImageNetV2 calls the folder of
    line i just i, which as text would sort 0, 1, 10. ImageNet's validation set is its test set too.
    """
    lines = read_pairs(path / row["lists"], "`folder class name`, as in `n01440764 tench`")
    names = dict(lines)  # of a folder that is listed twice, the last, as in CoOp
    if row["folder"] == "imagenetv2":
        names = {str(i): name for i, name in enumerate(names.values())}
    found, parts = {}, {}
    for part, subfolder in row["parts"].items():
        folder = path / row["images"] / subfolder
        found[part] = [name for name in names if (folder / name).is_dir()]
        images = {name: images_below(folder / name) for name in found[part]}
        parts[part] = numbered(images)
    classes, *others = found.values()
    if others and others[0] != classes:
        sizes = f"train has folders of {len(classes)} classes, val of {len(others[0])}"
        raise ValueError(f"{sizes}, and they must be the same")
    return [names[folder] for folder in classes], parts


def read_waterbirds(path: Path, row: dict):
    """The released folder: train (95 % of the birds in their place), val and test.

    Items are (file, bird, group = 2 * bird + place).
    """
    file, parts = path / "metadata.csv", {part: [] for part in PARTS}
    columns = {"y": 2, "split": 3, "place": 2}  # and how many values each has
    with file.open(newline="", encoding="utf-8-sig") as lines:
        for line in csv.DictReader(lines):
            try:
                image = path / line["img_filename"]
                numbers = [int(line[column]) for column in columns]
            except (KeyError, ValueError, TypeError) as error:
                needs = f"columns img_filename and, as whole numbers, {', '.join(columns)}"
                raise InputError(f"{file} needs {needs} ({error!r})") from None
            for number, (column, values) in zip(numbers, columns.items()):
                if number not in range(values):
                    choice = f"it must be 0 to {values - 1}"
                    raise InputError(f"{file} gives {image.name} {column} {number}; {choice}")
            bird, split, place = numbers
            parts[PARTS[split]].append((image, bird, 2 * bird + place))
    for part, items in parts.items():
        if not items:
            raise InputError(f"{file} lists no image of the {part} part")
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
