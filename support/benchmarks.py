"""The benchmarks on disk: which files belong to them, how an image is read, `common.py data`.

`assets/datasets.json` has an entry for each benchmark: its folder, its layout and where to get it.
A reader takes the folder and the entry, and returns the class names and {domain or part: [(file,
label), ...]}; where images have groups, an item is (file, label, group). A new benchmark needs an
entry, and a reader if its layout is new.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import sys
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, MNIST
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

from support import ASSETS, InputError, did_you_mean, reason, slug
from support.tables import format_table
from support.tiny_world import SPURIOUS_SPLITS, WATERBIRD_CLASSES, spurious_digits, tiny_rng

DATASETS = json.loads((ASSETS / "datasets.json").read_text())
PARTS = ("train", "val", "test")

# Pillow warns above 89 million pixels, which is harmless, and refuses images of twice that size.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ---------- An image -----------------------------------------------------------------------------
def read_image(path) -> Image.Image:
    """An image as a browser shows it: upright, in RGB with 8 bits a channel, on white.

    Raises: InputError if it cannot be read.
    """
    try:
        return decode(path)
    except Exception as error:  # every decoder has exceptions of its own
        advice = "repair or remove it; `python common.py data --check NAME` names all of them"
        raise InputError(f"cannot read image {path} ({reason(error)}); {advice}") from None


def decode(path) -> Image.Image:
    with Image.open(str(path)) as image:
        image.load()
        with contextlib.suppress(Exception):  # broken EXIF data: the image stays as it is
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            return grey_in_8_bits(image).convert("RGB")
        if not image.has_transparency_data:
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def grey_in_8_bits(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits, as Pillow does for colour images with 16 bits a channel.

    Raises: ValueError for 32 bits (TIFF), as the file does not say which number is white.
    """
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError(f"numbers of mode {image.mode}, any range: save it with 8 or 16 bits")
    return Image.fromarray((np.asarray(image) // 256).astype(np.uint8))


# ---------- Folders of images --------------------------------------------------------------------
def is_hidden(name: str) -> bool:
    """Files that systems leave beside images: `.DS_Store`, `._1.jpg`, `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def images_below(folder) -> list[str]:
    """Images in a folder and its subfolders, in the order of torchvision's ImageFolder."""
    images = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            if name.lower().endswith(IMG_EXTENSIONS) and not is_hidden(name):
                images.append((parent, name))
    return [os.path.join(*image) for image in sorted(images)]


def folders_in(folder: Path) -> list[str]:
    """Sorted names of the subfolders. Raises: InputError for a link that leads nowhere."""
    names = []
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if is_hidden(name):
            continue
        if not path.exists():
            target = os.readlink(path)
            raise InputError(f"{path} links to {target}, which does not exist; repair or remove it")
        if path.is_dir():
            names.append(name)
    return names


def images_by_class(folder: Path) -> dict[str, list[str]]:
    """{class: its images} of <folder>/<class>/<image>, sorted."""
    return {name: images_below(folder / name) for name in folders_in(folder)}


def numbered(images: dict[str, list[str]]) -> list[tuple]:
    """{class: its images} as [(image, label), ...]; labels count the classes in their order."""
    items = []
    for label, files in enumerate(images.values()):
        items += [(file, label) for file in files]
    return items


def read_folders(path: Path, entry: dict):
    """<domain>/<class>/<image>, images in the order of torchvision's ImageFolder."""
    layout = f"expected {path}/<domain>/<class>/<image>"
    by_domain = {}
    for domain in entry["domains"]:
        if not (path / domain).is_dir():
            wanted = f"{layout} with domains {', '.join(entry['domains'])}"
            raise InputError(f"{path} has no domain folder {domain!r}; {wanted}")
        by_domain[domain] = images_by_class(path / domain)
        if not by_domain[domain]:
            raise InputError(f"{path / domain} has no class folders; {layout}")
    classes = sorted(set().union(*by_domain.values()))
    if len(classes) < 2:
        raise InputError(f"{path} has one class only, {classes[0]!r}; {layout}, several classes")
    for domain, name in itertools.product(by_domain, classes):
        if not by_domain[domain].get(name):
            where = f"{path / domain / name} is missing or empty"
            advice = f"fill it, rename it, or remove {name!r} from all domains"
            raise InputError(f"domain {domain!r} has no image of class {name!r}: {where}; {advice}")
    return classes, {domain: numbered(images) for domain, images in by_domain.items()}


def read_own_folders(path):
    """The user's own images, `read_folders` in which every folder is a domain.

    Returns: (class names, {domain: [(file, label), ...]}), both sorted by name.
    Raises: InputError if the folder is missing or not in the layout.
    """
    path, layout = Path(path).expanduser(), "<domain>/<class>/<image>"
    if not path.is_dir():
        raise InputError(f"no folder {path}; it should hold {layout}")
    domains = folders_in(path)
    if len(domains) < 2:
        number = f"one domain folder only, {domains[0]!r}" if domains else "no domain folder"
        raise InputError(f"{path} has {number}; expected at least two, {layout}")
    if len({slug(domain) for domain in domains}) < len(domains):
        raise InputError(f"domains {domains} of {path} are too alike to name runs; rename or merge")
    return read_folders(path, {"domains": domains})


def read_cub(path: Path, entry: dict):
    """CUB-Paintings: the number in a class folder `001.Albatross` identifies the class."""
    paintings, photos = path / "CUB-200-Painting", path / "CUB_200_2011" / "images"
    if not paintings.is_dir() or not photos.is_dir():
        raise missing("cub-paintings", path, path)
    sets = [images_by_class(folder) for folder in (paintings, photos)]
    numbers = []  # names differ in capitals
    for images in sets:
        numbers.append({name.split(".")[0] for name in images})
    if numbers[0] != numbers[1]:
        differ = sorted(numbers[0] ^ numbers[1])
        raise InputError(f"the class folders of {paintings} and {photos} differ in {differ}")
    classes = [name.split(".", 1)[-1] for name in sets[1]]
    return classes, {domain: numbered(images) for domain, images in zip(entry["domains"], sets)}


# ---------- Lists of images ----------------------------------------------------------------------
def read_lines(file: Path) -> list[str]:
    """The lines of a list, without blank lines and surrounding spaces."""
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


def read_mini(path: Path, entry: dict):
    """DomainNet-mini: lists of `image label`; a class is named after the folder of its images."""
    names, parts = {}, {}
    for domain in entry["domains"]:
        for part, key in (("train", domain), ("test", f"{domain} test")):
            parts[key] = []
            for line in read_lines(path / f"{domain}_{part}_mini.txt"):
                image, label = line.rsplit(maxsplit=1)
                parts[key].append((path / image, int(label)))
                names[int(label)] = Path(image).parent.name
    return [names[label] for label in range(len(names))], parts


def read_split(path: Path, entry: dict):
    """CoOp's JSON: {"train": [["image.jpg", 0, "class name"], ...], "val": ..., "test": ...}."""
    lists = json.loads((path / entry["lists"]).read_text(encoding="utf-8"))
    names, parts = {}, {}
    for part in PARTS:
        parts[part] = []
        for image, label, name in lists[part]:
            names[label] = name
            parts[part].append((path / entry["images"] / image, label))
    return [names[label] for label in range(len(names))], parts


def read_aircraft(path: Path, entry: dict):
    """variants.txt lists the class names, images_variant_<part>.txt `number class name`."""
    classes = read_lines(path / entry["lists"])
    parts = {}
    for part in PARTS:
        parts[part] = []
        for line in read_lines(path / f"images_variant_{part}.txt"):
            number, name = line.split(maxsplit=1)
            image = path / entry["images"] / f"{number}.jpg"
            parts[part].append((image, classes.index(name)))
    return classes, parts


def read_imagenet(path: Path, entry: dict):
    """ImageNet or a shift of it: a folder for each line `n01440764 tench` of classnames.txt.

    The classes are those with a folder: 200 in ImageNet-A and -R. ImageNetV2 names the folder of
    line i just i; sorted as text, 10 would stand before 2. ImageNet is tested on its val part.
    """
    lines = [line.split(maxsplit=1) for line in read_lines(path / entry["lists"])]
    names = dict(lines)  # if a folder is listed twice, the last line counts, as in CoOp
    if entry["folder"] == "imagenetv2":
        names = {str(i): name for i, name in enumerate(names.values())}
    folders, parts = {}, {}
    for part, subfolder in entry["parts"].items():
        folder = path / entry["images"] / subfolder
        folders[part] = [name for name in names if (folder / name).is_dir()]
        parts[part] = numbered({name: images_below(folder / name) for name in folders[part]})
    classes, *others = folders.values()
    if others and others[0] != classes:
        sizes = f"train has folders of {len(classes)} classes, val of {len(others[0])}"
        raise ValueError(f"{sizes}, and they must be the same")
    return [names[folder] for folder in classes], parts


def read_waterbirds(path: Path, entry: dict):
    """The released folder: train (95 % of the birds on their own background), val and test.

    Items are (file, bird, group = 2 * bird + background).
    """
    parts = {part: [] for part in PARTS}
    with (path / "metadata.csv").open(newline="", encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            bird, background = int(line["y"]), int(line["place"])
            item = path / line["img_filename"], bird, 2 * bird + background
            parts[PARTS[int(line["split"])]].append(item)
    return WATERBIRD_CLASSES, parts


# ---------- A benchmark --------------------------------------------------------------------------
READERS = {
    "folders": read_folders,
    "mini": read_mini,
    "cub": read_cub,
    "split": read_split,
    "aircraft": read_aircraft,
    "imagenet": read_imagenet,
    "waterbirds": read_waterbirds,
}


class Missing(InputError):
    """The benchmark's folder is not there."""


def missing(name: str, path: Path, root) -> Missing:
    """The error that says how to get a benchmark."""
    entry = DATASETS[name]
    return Missing(
        f"data set {name!r} is not in {path}\n"
        f"  expected: {layout_of(name, path)}\n"
        f"  get it:   {entry['source']}; then say where with --data-root (now {str(root)!r})\n"
        f"  or try:   --dataset {entry['stand-in']}, drawn in seconds and without a download"
    )


def layout_of(name: str, path: Path) -> str:
    return DATASETS[name]["layout"].replace("PATH", str(path))


def read_dataset(name: str, root):
    """Class names and {domain or part: [(file, label), ...]} of a benchmark in `DATASETS`.

    Raises: InputError if the folder, its lists or its images are missing or not in the layout.
    """
    entry = DATASETS[name]
    path = Path(root) / entry["folder"]
    if not path.is_dir():
        raise missing(name, path, root)
    try:
        classes, parts = READERS[entry["reader"]](path, entry)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"cannot read data set {name!r} ({type(error).__name__}: {error})"
        expected = f"expected: {layout_of(name, path)}\n  get it:   {entry['source']}"
        raise InputError(f"{what}\n  {expected}") from None
    for part, items in parts.items():
        if not any(Path(file).is_file() for file, *_ in items):
            what = f"data set {name!r} has no image for its part {part}"
            raise InputError(f"{what}; expected {layout_of(name, path)}")
    return classes, parts


# ---------- MNIST-CIFAR --------------------------------------------------------------------------
def digits_and_vehicles(root, train: bool, download: bool):
    """Images of digits 0 and 1, (n, 32, 32) each, and of vehicles, (n, 3, 32, 32) each, uint8."""
    try:
        mnist = MNIST(root, train, download=download)
        cifar = CIFAR10(root, train, download=download)
    except (RuntimeError, OSError):
        raise missing("mnist-cifar", Path(root), root) from None
    pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)
    labels = torch.tensor(cifar.targets)
    digits = [F.pad(mnist.data[mnist.targets == digit], (2, 2, 2, 2)) for digit in (0, 1)]
    vehicles = [pixels[labels == label] for label in (1, 9)]  # automobile, truck
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


# ---------- python common.py data ----------------------------------------------------------------
HELP = """Lists the data sets: are they there, and are they complete?

python common.py data                          # all data sets: found or missing, and where
python common.py data --check pacs officehome  # also counts and opens every image
python common.py data --check folder:PATH      # the same for PATH/<domain>/<class>/<image>
"""
READABLE = [name for name, entry in DATASETS.items() if entry["reader"] in READERS]


def files_of(parts: dict[str, list]) -> list[str]:
    """All images of {part: [(file, label, ...), ...]}, each once."""
    items = itertools.chain.from_iterable(parts.values())
    return list(dict.fromkeys(str(file) for file, *_ in items))


def cells_of(name: str, root: str) -> list[str]:
    """Where a data set is, and how many images, domains or parts, and classes it has."""
    folder = Path(root) / DATASETS[name]["folder"]
    if name not in READABLE:  # MNIST-CIFAR has no image files
        complete = (folder / "MNIST").is_dir() and (folder / "cifar-10-batches-py").is_dir()
        return [str(folder) if complete else "missing (--download)", "-", "-", "2"]
    try:
        classes, parts = read_dataset(name, root)
    except Missing:
        return ["missing", "-", "-", "-"]
    except InputError:
        return [f"not complete: try --check {name}", "-", "-", "-"]
    return [str(folder), f"{len(files_of(parts)):,}", str(len(parts)), str(len(classes))]


def problem_of(file: str) -> str:
    """Why an image cannot be read, or "" if it can."""
    try:
        decode(file)
    except Exception as error:  # every decoder has exceptions of its own
        return f"{file} cannot be read ({reason(error)})"
    return ""


def check(name: str, root: str) -> None:
    """Count the images of a data set and open each of them.

    Raises: InputError if the counts are not those published, or if images cannot be read.
    """
    if name.startswith("folder:"):
        classes, parts = read_own_folders(name.removeprefix("folder:"))
    else:
        classes, parts = read_dataset(name, root)
    entry = DATASETS.get(name, {})
    for part, items in parts.items():
        print(f"{name}, {part}: {len(items):,} images")
    files = files_of(parts)
    problems = []
    if "counts" in entry and len(files) not in entry["counts"]:
        published = " or ".join(f"{count:,}" for count in entry["counts"])
        problems.append(f"{len(files):,} images, published are {published}")
    if "classes" in entry and len(classes) != entry["classes"]:
        problems.append(f"{len(classes)} classes, published are {entry['classes']}")
    Image.init()  # threads that load Pillow's decoders at the same time may miss one
    with ThreadPool() as pool:
        results = pool.imap(problem_of, files, chunksize=16)
        problems += filter(None, tqdm(results, name, len(files), disable=None))
    if problems:
        raise InputError(f"{name} is not complete\n  " + "\n  ".join(problems))
    comparison = "as published" if "counts" in entry else "no published count to compare with"
    print(f"{name}: all {len(files):,} images of {len(classes)} classes can be read; {comparison}")


def list_data_sets(argv: list[str] | None = None) -> None:
    """`python common.py data`. Raises: InputError for an unknown or incomplete data set."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("common.py data", description=HELP, formatter_class=form)
    parser.add_argument("--data-root", default="data", help="folder that holds their folders")
    text = f"count its images and open each of them: folder:PATH, {', '.join(READABLE)}"
    parser.add_argument("--check", nargs="+", default=[], metavar="NAME", help=text)
    args = parser.parse_args(sys.argv[2:] if argv is None else argv)
    for name in args.check:
        if name not in READABLE and not name.startswith("folder:"):
            choices = f"{did_you_mean(name, READABLE)} Choose from {', '.join(READABLE)}"
            raise InputError(f"--check {name}: no such data set{choices}, or folder:PATH.")
    for name in args.check:
        check(name, args.data_root)
    if args.check:
        return
    cells = {name: cells_of(name, args.data_root) for name in DATASETS}
    columns = ["where", "images", "domains or parts", "classes"]
    print(format_table(f"data sets in {args.data_root}", columns, cells))
    stand_ins = dict.fromkeys(entry["stand-in"] for entry in DATASETS.values())
    print(f"Drawn in seconds, needing no files: {', '.join(stand_ins)}")
    print("A command with a missing data set says where to get it and how to lay it out.")
