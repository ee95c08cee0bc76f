"""Everything the four method files share, in the order a run uses it.

1. Data         image sets, benchmark folders, tiny stand-ins, splits, batches: `load_domains`, `load_parts`, ...
2. CLIP         loading, class features, learned prompts, export: `load_clip`, `class_features`, `CoOp`, `export_clip`
3. MMD          `mmd2`
4. Evaluation   `evaluate`, `outputs`
5. Runs         flags, seeds, devices, output folders, checkpoints, tables

A method file imports this file and libraries, never another method file. `assets/tiny_world.py`, which lies beside the tiny
CLIP, paints the `tiny-` sets and knows the CLIP's words; the error class `InputError` comes from there too.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import CIFAR10, MNIST, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from assets.tiny_world import (
    OFFICE_CLASSES,
    PACS_CLASSES,
    SIDE,
    SPURIOUS_SPLITS,
    TINY_DOMAINS,
    VEHICLES,
    WATERBIRD_CLASSES,
    InputError,
    WordTokenizer,
    draw_digits_and_vehicles,
    draw_domain,
    draw_waterbirds,
    spurious_digits,
    tiny_rng,
)


# ---------- 1. Data --------------------------------------------------------------------------------
@dataclass
class ImageSet(Dataset):
    """Labelled images, either uint8 pixels in memory or files that are read when asked for.

    `transform` takes a PIL image or a (B, 3, H, W) uint8 tensor (see `image_transform`) and returns float32.
    """

    images: torch.Tensor | np.ndarray  # (N, 3, H, W) uint8, or N file names
    labels: torch.Tensor  # (N,) int64, index into `classes`
    classes: tuple[str, ...]
    groups: torch.Tensor | None = None  # (N,) int64, for worst-group accuracy
    transform: Callable | None = None

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        """A whole batch: images (B, 3, h, w) float32 and labels (B,)."""
        if isinstance(self.images, torch.Tensor):
            pixels = self.images[indices]
            images = self.transform(pixels) if self.transform else pixels.float() / 255
        else:
            images = torch.stack([self.transform(read_image(self.images[i])) for i in indices])
        return images, self.labels[indices]

    def __getitem__(self, index):
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def subset(self, indices) -> ImageSet:
        indices = np.asarray(indices, dtype=np.int64)
        groups = None if self.groups is None else self.groups[indices]
        return replace(self, images=self.images[indices], labels=self.labels[indices], groups=groups)

    def of_classes(self, chosen: range) -> ImageSet:
        """The images of a range of classes, which are numbered from 0 again."""
        kept = self.subset(np.flatnonzero((self.labels >= chosen.start) & (self.labels < chosen.stop)))
        return replace(kept, labels=kept.labels - chosen.start, classes=self.classes[chosen.start : chosen.stop])


@dataclass
class Domain:
    """One domain of a benchmark: a training and a balanced part (tiny), a train and a test list (domainnet-mini), or one set."""

    name: str
    images: ImageSet  # to train on while the domain is a source; in a tiny domain the background goes with the class
    balanced: ImageSet | None = None  # to report on; tiny: the background is independent of the class. None where there is one set


@dataclass(frozen=True)
class Benchmark:
    """A row of the table of benchmarks: folders `<data root>/<folder>/<domain>/<class>/<image>`."""

    folder: str
    domains: tuple[str, ...]  # sorted: a domain's place enters its split seed
    source: str  # where people get it
    stand_in: str = "tiny-pacs"
    layout: str = "<domain>/<class>/<image>"


DOMAINBED = "the archive named in DomainBed's download script (github.com/facebookresearch/DomainBed)"
BENCHMARKS = {
    "pacs": Benchmark("PACS", ("art_painting", "cartoon", "photo", "sketch"), DOMAINBED),
    "vlcs": Benchmark("VLCS", ("Caltech101", "LabelMe", "SUN09", "VOC2007"), DOMAINBED),
    "officehome": Benchmark("office_home", ("Art", "Clipart", "Product", "Real World"), DOMAINBED, "tiny-office"),
    "terra": Benchmark("terra_incognita", ("location_100", "location_38", "location_43", "location_46"), DOMAINBED),
    "domainnet": Benchmark("domain_net", ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"), "ai.bu.edu/M3SDA, the cleaned archives", "tiny-office"),
    "domainnet-mini": Benchmark("domain_net", ("clipart", "painting", "real", "sketch"), "ai.bu.edu/M3SDA; the lists: SENTRY's code", "tiny-office",
                                "<domain>/<class>/<image> and the lists <domain>_{train,test}_mini.txt"),
    "cub-paintings": Benchmark(".", ("painting", "photo"), "CUB_200_2011/ from Caltech, CUB-200-Painting/ from thuml/PAN", layout="CUB-200-Painting/<class>/<image> and CUB_200_2011/images/<class>/<image>"),
}  # fmt: skip
# classes, images per class in the cued training part and in the balanced part (a multiple of the 8 backgrounds) of a domain
TINY_BENCHMARKS = {"tiny-pacs": (PACS_CLASSES, 160, 80), "tiny-office": (OFFICE_CLASSES, 80, 40)}


def load_domains(name: str, root: str | Path = "data", seed: int = 0, cue: float = 0.4, also=()) -> list[Domain]:
    """Read every domain of a benchmark, sorted by name.

    Args:
        name: a row of `BENCHMARKS` or `TINY_BENCHMARKS`, or `folder:PATH` for any other folder in the same layout.
        root: the folder that holds the benchmarks' folders; not used by tiny sets.
        seed, cue: of the tiny sets: which images are drawn, and how often (0 ... 1) the background of a training image is its
            class's own; 1/8 is independence.
        also: names of other data sets, for the message about an unknown one.
    Raises: InputError for an unknown name, a missing or empty folder, a class missing in one domain, a cue outside [0, 1].
    """
    if name in TINY_BENCHMARKS:
        return [tiny_domain(name, domain, seed, cue) for domain in TINY_DOMAINS]
    if name.startswith("folder:"):
        path = Path(name.removeprefix("folder:"))
        if not path.is_dir():
            raise InputError(f"no folder {path} (from --dataset {name}); it should hold <domain>/<class>/<image>")
        domains = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
        return read_folders(path, domains)
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        path = Path(root) / benchmark.folder
        if not path.is_dir():
            layout = f"{path}/{benchmark.layout}, domains {', '.join(benchmark.domains)}"
            raise missing(name, path, layout, benchmark.source, root, benchmark.stand_in)
        return {"domainnet-mini": read_mini, "cub-paintings": read_cub}.get(name, read_folders)(path, benchmark.domains)
    raise InputError(f"unknown data set {name!r}{did_you_mean(name, [*BENCHMARKS, *TINY_BENCHMARKS, *also])} "
                     f"Choose from {', '.join([*TINY_BENCHMARKS, *BENCHMARKS, *also])}, or folder:PATH.")  # fmt: skip


def missing(name: str, path, layout: str, source: str, root, stand_in: str) -> InputError:
    """The message for a data set that is not there."""
    return InputError(f"data set {name!r} is not in {path}\n"
                      f"  expected: {layout}\n"
                      f"  get it:   {source}; then say where with --data-root (now {str(root)!r})\n"
                      f"  or try:   --dataset {stand_in}, which is drawn in seconds and needs no download")  # fmt: skip


def read_folders(path: Path, domains: tuple[str, ...]) -> list[Domain]:
    """Read `<path>/<domain>/<class>/<image>`; images in the order of torchvision's ImageFolder."""
    layout = f"expected {path}/<domain>/<class>/<image>"
    if not domains:
        raise InputError(f"{path} has no domain folder; {layout}")
    folders = {}
    for name in domains:
        if not (path / name).is_dir():
            raise InputError(f"{path} has no domain folder {name!r}; {layout} with domains {', '.join(domains)}")
        if not any(entry.is_dir() for entry in (path / name).iterdir()):
            raise InputError(f"{path / name} has no class folders; {layout}")
        folders[name] = ImageFolder(path / name, allow_empty=True)
    classes = tuple(sorted({label for folder in folders.values() for label in folder.classes}))
    for name, folder in folders.items():
        filled = {folder.classes[i] for i in folder.targets}
        for label in classes:
            if label not in filled:
                raise InputError(f"domain {name!r} has no image of class {label!r}, which other domains have: {path / name / label} is missing or empty")
    return [Domain(name, ImageSet(np.array([file for file, _ in folder.samples]), torch.tensor(folder.targets), classes)) for name, folder in folders.items()]


def read_mini(path: Path, domains: tuple[str, ...]) -> list[Domain]:
    """DomainNet-mini: lists `<domain>_{train,test}_mini.txt` of `image label`; a class is called like the folder of its images."""
    names, lists = {}, {}
    for file in [path / f"{domain}_{part}_mini.txt" for domain in domains for part in ("train", "test")]:
        try:
            images, labels = zip(*(line.rsplit(" ", 1) for line in file.read_text().splitlines()))
            lists[file.stem] = np.array([str(path / image) for image in images]), torch.tensor([int(label) for label in labels])
            [(path / image).stat() for image in images]  # each is there
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {file} ({error}); expected lines `<domain>/<class>/<image> label` of images that are there") from None
        names |= {int(label): Path(image).parent.name for image, label in zip(images, labels)}
    classes = tuple(names.get(label, f"number {label}") for label in range(max(names) + 1))
    return [Domain(domain, *(ImageSet(*lists[f"{domain}_{part}_mini"], classes) for part in ("train", "test"))) for domain in domains]


def read_cub(path: Path, domains: tuple[str, ...]) -> list[Domain]:
    """CUB's paintings and photos. The number of a class folder `001.Black_footed_Albatross` is its identity; names differ in capitals."""
    folders = [path / "CUB-200-Painting", path / "CUB_200_2011" / "images"]
    if not all(folder.is_dir() for folder in folders):
        row = BENCHMARKS["cub-paintings"]
        raise missing("cub-paintings", path, f"{path}/{row.layout}", row.source, path, row.stand_in)
    sets = [ImageFolder(folder, allow_empty=True) for folder in folders]
    numbers = [{name.split(".")[0] for name in images.classes} for images in sets]
    if numbers[0] != numbers[1]:
        raise InputError(f"the class folders of {folders[0]} and {folders[1]} have different numbers: {sorted(numbers[0] ^ numbers[1])}")
    names = tuple(name.split(".", 1)[-1] for name in sets[1].classes)
    return [Domain(domain, ImageSet(np.array([file for file, _ in own.samples]), torch.tensor(own.targets), names)) for domain, own in zip(domains, sets)]


def read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise InputError(f"cannot read image {path} ({error}); mend it or remove it") from None


@dataclass(frozen=True)
class PartedSet:
    """A row of the table of data sets with fixed parts train, val and test, in the layout that CoOp users have."""

    folder: str
    images: str  # their folder below it
    lists: str  # the file or files beside it that name images or classes
    read: Callable  # (path of the folder, this row) -> class names, {part: [(image file, label), ...]}
    template: str = "a photo of a {}."


def read_split(path: Path, row: PartedSet):
    """CoOp's JSON: train, val and test, each a list of [path, label, class name]."""
    parts = json.loads((path / row.lists).read_text())
    names = {label: name for items in parts.values() for _, label, name in items}
    files = {part: [(path / row.images / file, label) for file, label, _ in parts[part]] for part in ("train", "val", "test")}
    return [names[label] for label in range(len(names))], files


def read_aircraft(path: Path, row: PartedSet):
    """The release's own lists: a class name a line in variants.txt, `number class name` in images_variant_<part>.txt."""
    names, files = (path / row.lists).read_text().split("\n"), {}
    for part in ("train", "val", "test"):
        lines = [line.split(" ", 1) for line in (path / f"images_variant_{part}.txt").read_text().splitlines()]
        files[part] = [(path / row.images / f"{number}.jpg", names.index(name)) for number, name in lines]
    return [name for name in names if name], files


def read_imagenet(path: Path, row: PartedSet):
    """ImageNet or a set that shifts it: image folders of the classes in classnames.txt (`n01440764 tench` a line).

    Its classes are those with a folder: 200 in ImageNet-A and -R. ImageNetV2 calls the folder of line i just i, which as text
    would sort 0, 1, 10, 100. ImageNet's validation set is also its test set, the others are test sets.
    """
    lines = [line.split(maxsplit=1) for line in (path / row.lists).read_text().splitlines()]
    if row.folder == "imagenetv2":
        lines = [(str(i), name) for i, (_, name) in enumerate(lines)]
    folders = {"train": "train", "val": "val", "test": "val"} if row.folder == "imagenet" else {"test": "."}
    present = {folder: [line for line in lines if (path / row.images / folder / line[0]).is_dir()] for folder in folders.values()}
    classes, *others = present.values()
    if others and others[0] != classes:
        raise ValueError(f"train has folders of {len(classes)} classes, val of {len(others[0])}, and they must be the same")
    files = {part: [(file, label) for label, (own, _) in enumerate(classes) for file in sorted((path / row.images / folder / own).iterdir())
                    if file.suffix.lower() in IMG_EXTENSIONS] for part, folder in folders.items()}  # fmt: skip
    return [name for _, name in classes], files


OPEN_CLASS = {
    "imagenet": PartedSet("imagenet", "images", "classnames.txt", read_imagenet),
    "caltech101": PartedSet("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", read_split),
    "oxfordpets": PartedSet("oxford_pets", "images", "split_zhou_OxfordPets.json", read_split, "a photo of a {}, a type of pet."),
    "stanfordcars": PartedSet("stanford_cars", ".", "split_zhou_StanfordCars.json", read_split),
    "oxfordflowers": PartedSet("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", read_split, "a photo of a {}, a type of flower."),
    "food101": PartedSet("food-101", "images", "split_zhou_Food101.json", read_split, "a photo of {}, a type of food."),
    "fgvcaircraft": PartedSet("fgvc_aircraft", "images", "variants.txt", read_aircraft, "a photo of a {}, a type of aircraft."),
    "sun397": PartedSet("sun397", "SUN397", "split_zhou_SUN397.json", read_split),
    "dtd": PartedSet("dtd", "images", "split_zhou_DescribableTextures.json", read_split, "{} texture."),
    "eurosat": PartedSet("eurosat", "2750", "split_zhou_EuroSAT.json", read_split, "a centered satellite photo of {}."),
    "ucf101": PartedSet("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", read_split, "a photo of a person doing {}."),
}  # fmt: skip
IMAGENET_SHIFTS = {
    "imagenetv2": PartedSet("imagenetv2", "imagenetv2-matched-frequency-format-val", "classnames.txt", read_imagenet),
    "imagenet-sketch": PartedSet("imagenet-sketch", "images", "classnames.txt", read_imagenet),
    "imagenet-a": PartedSet("imagenet-adversarial", "imagenet-a", "classnames.txt", read_imagenet),
    "imagenet-r": PartedSet("imagenet-rendition", "imagenet-r", "classnames.txt", read_imagenet),
}


def load_parts(name: str, root: str | Path = "data") -> dict[str, ImageSet]:
    """Parts train, val and test of a row of `OPEN_CLASS`, or test of a row of `IMAGENET_SHIFTS`.

    Raises: InputError if the folder, its lists or its images are missing or not in the layout.
    """
    row = {**OPEN_CLASS, **IMAGENET_SHIFTS}[name]
    path = Path(root) / row.folder
    layout = f"{path / row.images}/ with the images, {row.lists} in {path}/"
    if not path.is_dir():
        raise missing(name, path, layout, "as CoOp's DATASETS.md says (github.com/KaiyangZhou/CoOp)", root, "tiny-office")
    try:
        names, parts = row.read(path, row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read data set {name!r} ({type(error).__name__}: {error})\n  expected: {layout}") from None
    for part, items in parts.items():
        if not items or not items[0][0].is_file():
            raise InputError(f"data set {name!r} has no image {items[0][0] if items else ''} for its part {part}; expected {layout}")
    return {part: ImageSet(np.array([str(file) for file, _ in items]), torch.tensor([label for _, label in items]), tuple(names))
            for part, items in parts.items()}  # fmt: skip


def tiny_domain(name: str, domain: str, seed: int, cue: float) -> Domain:
    """Draw one domain of a tiny benchmark: its cued training part and its balanced part."""
    classes, *sizes = TINY_BENCHMARKS[name]
    return Domain(domain, *(ImageSet(*part[:2], classes, part[2]) for part in draw_domain(name, classes, domain, seed, cue, sizes)))


def load_tiny_waterbirds(seed: int = 0, cue: float = 0.95, **sizes) -> dict[str, ImageSet]:
    """Land- and waterbirds on land and water, drawn: see `assets/tiny_world.py`. Groups: 2 * bird + place."""
    drawn = draw_waterbirds(seed, cue, **sizes)
    return {part: ImageSet(pixels, labels, WATERBIRD_CLASSES, groups) for part, (pixels, labels, groups) in drawn.items()}


def load_waterbirds(root: str | Path = "data") -> dict[str, ImageSet]:
    """The released Waterbirds folder: train (95 % of the birds in their place), val and test. Groups: 2 * bird + place.

    Raises: InputError if the folder, its `metadata.csv` or one of its columns is missing.
    """
    path = Path(root) / "waterbird_complete95_forest2water2"
    if not (path / "metadata.csv").is_file():
        layout = f"{path}/metadata.csv with columns img_filename, y, split, place, and the images it names"
        raise missing("waterbirds", path, layout, "the archive of that name at github.com/kohpangwei/group_DRO", root, "tiny-waterbirds")
    with (path / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        files = np.array([str(path / row["img_filename"]) for row in rows])
        bird, place, split = (np.array([int(row[column]) for row in rows]) for column in ("y", "place", "split"))
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path / 'metadata.csv'} needs columns img_filename and, as whole numbers, y, split, place ({error!r})") from None
    every = ImageSet(files, torch.from_numpy(bird), WATERBIRD_CLASSES, torch.from_numpy(2 * bird + place))
    parts = {name: every.subset(np.flatnonzero(split == number)) for number, name in enumerate(("train", "val", "test"))}
    for name, part in parts.items():
        if not len(part):
            raise InputError(f"{path / 'metadata.csv'} lists no image of the {name} part")
    return parts


def load_mnist_cifar(root: str | Path = "data", seed: int = 0, download: bool = False) -> dict[str, ImageSet]:
    """A handwritten digit above a CIFAR-10 vehicle, 64 x 32 pixels, from torchvision's MNIST and CIFAR10 under `root`.

    The vehicle (automobile 0, truck 1) is the label; see `SPURIOUS_SPLITS` for the digit (0 or 1, padded to 32 x 32).
    Vehicles and digits of the test parts are split 20/80 into validation and test. Groups: 2 * vehicle + digit.

    Raises: InputError if one of the two data sets is not there (`download` fetches it).
    """
    parts = {}
    for train in (True, False):
        try:
            digits, vehicles = MNIST(root, train, download=download), CIFAR10(root, train, download=download)
        except (RuntimeError, OSError):
            layout = f"{root}/MNIST/raw/ and {root}/cifar-10-batches-py/, as torchvision stores them"
            raise missing("mnist-cifar", root, layout, "--download fetches it", root, "tiny-mnist-cifar") from None
        pools = [[F.pad(digits.data[digits.targets == digit], (2, 2, 2, 2)) for digit in (0, 1)],
                 [torch.from_numpy(vehicles.data[np.array(vehicles.targets) == label]).permute(0, 3, 1, 2) for label in (1, 9)]]
        if train:
            parts["train"] = pools
        else:
            cut = lambda pool, half: pool[: len(pool) // 5] if half == "val" else pool[len(pool) // 5 :]  # noqa: E731
            parts |= {half: [[cut(pool, half) for pool in pair] for pair in pools] for half in ("val", "test")}
    splits = {}
    for split in SPURIOUS_SPLITS:
        rng, (digits, vehicles) = tiny_rng(seed, "mnist-cifar", split), parts[split.split("_")[0]]
        labels = np.repeat((0, 1), [len(pool) for pool in vehicles])
        shown = spurious_digits(labels, split, rng)
        top = torch.stack([digits[digit][rng.integers(len(digits[digit]))] for digit in shown])[:, None].expand(-1, 3, -1, -1)
        splits[split] = ImageSet(torch.cat([top, torch.cat(vehicles)], 2), torch.from_numpy(labels), VEHICLES, torch.from_numpy(2 * labels + shown))
    return splits


def load_tiny_mnist_cifar(seed: int = 0, **difficulty) -> dict[str, ImageSet]:
    """A digit above a vehicle, drawn: see `assets/tiny_world.py`. Groups: 2 * vehicle + digit."""
    drawn = draw_digits_and_vehicles(seed, **difficulty)
    return {part: ImageSet(pixels, labels, VEHICLES, groups) for part, (pixels, labels, groups) in drawn.items()}


def domain_split(n: int, domain_index: int, holdout: float = 0.2, trial: int = 0, part: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Split n images of a domain as DomainBed does: (held-out indices, the rest).

    Args: n in ImageFolder order; domain_index: place among the sorted domain names; trial: 0 in CLIPood; part: "base" or "open"
    where CLIPood splits the images of these classes apart.
    """
    key = (trial, domain_index, part) if part else (trial, domain_index)
    seed = int(hashlib.md5(str(key).encode()).hexdigest(), 16) % 2**31
    order = list(range(n))
    np.random.RandomState(seed).shuffle(order)
    held_out = int(holdout * n)
    return np.array(order[:held_out], dtype=int), np.array(order[held_out:], dtype=int)


@dataclass
class Split:
    """Who may see what when one domain is the target; dictionaries are keyed by domain name."""

    train: dict[str, ImageSet]  # 80 % of every source
    holdout: dict[str, ImageSet]  # the other 20 %: the only images that may choose a model
    source: dict[str, ImageSet]  # for reporting: balanced parts of the sources (tiny), else the hold-outs
    target: dict[str, ImageSet]  # for reporting: balanced part of the target (tiny), else the whole target


def leave_one_out(domains: list[Domain], target: str, preprocess: Callable, augment: Callable) -> Split:
    """Train on all domains but `target`; `augment` is the transform of training images, `preprocess` that of all others."""
    split = Split({}, {}, {}, {})
    for index, domain in enumerate(domains):
        images, balanced = (part and replace(part, transform=preprocess) for part in (domain.images, domain.balanced))
        if domain.name == target:
            split.target[target] = balanced or images
            continue
        held_out, rest = domain_split(len(images), index)
        if not len(held_out):
            raise InputError(f"domain {domain.name!r} has only {len(images)} images: too few to hold 20 % out")
        split.train[domain.name], split.holdout[domain.name] = replace(images.subset(rest), transform=augment), images.subset(held_out)
        split.source[domain.name] = balanced or split.holdout[domain.name]
    return split


class EndlessSampler(Sampler):
    """Indices of one random order after another, without end."""

    def __init__(self, n: int, generator: torch.Generator):
        self.n, self.generator = n, generator

    def __iter__(self):
        while True:
            yield from torch.randperm(self.n, generator=self.generator).tolist()


def as_is(batch):
    return batch


def source_batches(sets: dict[str, ImageSet], per_domain: int, seed: int, workers: int = 0):
    """Endless batches with equally many images of every source domain.

    Yields: images (S * per_domain, 3, h, w), labels and domain numbers (S * per_domain,), domain after domain.
    """
    iterators = []
    for index, images in enumerate(sets.values()):
        generator = torch.Generator().manual_seed(seed * 1000 + index)
        iterators.append(iter(DataLoader(images, per_domain, sampler=EndlessSampler(len(images), generator), collate_fn=as_is,
                                         num_workers=workers, generator=generator, persistent_workers=workers > 0)))  # fmt: skip
    domain = torch.arange(len(sets)).repeat_interleave(per_domain)
    while True:
        images, labels = zip(*(next(iterator) for iterator in iterators))
        yield torch.cat(images), torch.cat(labels), domain


# ---------- 2. CLIP --------------------------------------------------------------------------------
TINY_CLIP = Path(__file__).with_name("assets") / "tiny_clip.safetensors"  # made by assets/pretrain_tiny_clip.py
def image_transform(model, train: bool = False):
    """The model's own preprocessing (open_clip's, written with transforms that take PIL images and uint8 batches alike).

    With `train`, RandomResizedCrop (scale 0.7 ... 1) and a horizontal flip instead of the centre crop (CLIPood, Sec. 4.1).
    """
    config = open_clip.get_model_preprocess_cfg(model)
    size = (config["size"],) * 2 if isinstance(config["size"], int) else tuple(config["size"])
    interpolation = v2.InterpolationMode(config.get("interpolation", "bicubic"))
    if train:
        crop = [v2.RandomResizedCrop(size, (0.7, 1.0), interpolation=interpolation), v2.RandomHorizontalFlip()]
    elif config.get("resize_mode", "shortest") == "squash":
        crop = [v2.Resize(size, interpolation)]
    else:
        crop = [v2.Resize(min(size), interpolation), v2.CenterCrop(size)]
    return v2.Compose([*crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"]), v2.ToPureTensor()])


def load_clip(name: str = "tiny", pretrained: str | None = None, device: str | torch.device = "cpu"):
    """Load a frozen CLIP in float32.

    Args:
        name: `tiny` (shipped), any open_clip model name, `hf-hub:ORG/NAME` or `local-dir:PATH`.
        pretrained: for an open_clip name: a tag (default `openai`) or a checkpoint file. OpenAI's own weights in a *file* need
            a name that ends in `-quickgelu`; for a tag the right activation is set here.
    Returns: (model, preprocess, tokenizer). `model.export_config` is what `export_clip` writes down.
    Raises: InputError if the name is unknown or the weights cannot be had.
    """
    config = {"model_cfg": None, "preprocess_cfg": {}, "vocabulary": None}
    if name == "tiny":
        with safe_open(TINY_CLIP, framework="pt") as file:
            config.update((key, json.loads(file.metadata()[key])) for key in config)
        model = open_clip.CLIP(**config["model_cfg"])
        model.load_state_dict({key: value.float() for key, value in load_file(TINY_CLIP).items()})
        open_clip.set_model_preprocess_cfg(model, {**config["preprocess_cfg"], "size": SIDE})
    else:
        quick_gelu = False
        if ":" not in name:
            if name not in open_clip.list_models():
                raise InputError(f"unknown model {name!r}{did_you_mean(name, open_clip.list_models())} Choose tiny, a name that "
                                 "open_clip.list_models() shows, hf-hub:ORG/NAME or local-dir:PATH.")  # fmt: skip
            pretrained, tags = pretrained or "openai", open_clip.list_pretrained_tags_by_model(name)
            if pretrained not in tags and not Path(pretrained).is_file():
                raise InputError(f"--pretrained {pretrained!r} is neither a file nor a tag of {name}; its tags are: {', '.join(tags)}")
            quick_gelu = bool((open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu", False))
        logging.disable(logging.ERROR)  # a failing download would say the same thirty times
        try:
            model = open_clip.create_model(name, pretrained, force_quick_gelu=quick_gelu, require_pretrained=True)
            config["model_cfg"] = open_clip.get_model_config(name)
        except Exception as error:  # a hub, a file system and a deserialiser can each fail in their own ways
            raise InputError(f"cannot load the weights of {name} ({pretrained or 'its folder'}): {str(error).splitlines()[0]}\n"
                             "  Offline? Give a checkpoint file with --pretrained FILE, or use the shipped --model tiny.") from error  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
        config["model_cfg"]["quick_gelu"] = quick_gelu or config["model_cfg"].get("quick_gelu", False)
        config["preprocess_cfg"] = open_clip.get_model_preprocess_cfg(model)
        if name.startswith("local-dir:"):
            config["vocabulary"] = json.loads((Path(name.removeprefix("local-dir:")) / "open_clip_config.json").read_text()).get("vocabulary")
    if config["vocabulary"]:
        tokenizer = WordTokenizer(config["vocabulary"], model.context_length)
    else:
        tokenizer = open_clip.get_tokenizer(name)
    model.export_config = config
    return model.eval().requires_grad_(False).to(device), image_transform(model), tokenizer


@torch.no_grad()
def class_features(model, tokenizer, class_names, templates=("a photo of a {}.",), device="cpu") -> torch.Tensor:
    """Text features of the classes, unit-norm (C, D): each class averaged over the templates. Underscores become spaces.

    templates: ["ensemble"] stands for open_clip's 80 ImageNet templates, or those of them whose words the tiny CLIP knows.
    Raises: InputError if a template has no `{}`.
    """
    if list(templates) == ["ensemble"]:
        every = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        known = lambda text: {*WordTokenizer.words(text)} - {"{}"} <= {*tokenizer.tokens}  # noqa: E731
        templates = [text for text in every if known(text)] if isinstance(tokenizer, WordTokenizer) else every
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise InputError(f"a template needs {{}} where the class name goes, got {wrong[0] if wrong else templates!r}")
    features = []
    for name in class_names:
        tokens = tokenizer([template.format(name.replace("_", " ")) for template in templates]).to(device)
        features.append(model.encode_text(tokens, normalize=True).mean(0))
    return F.normalize(torch.stack(features), dim=-1)


def encode_prompts(model, tokens: torch.Tensor, start: int, vectors: torch.Tensor) -> torch.Tensor:
    """Text features, unit-norm (n, D), of prompts in which learned vectors stand in for words.

    Args: tokens (n, L); vectors (m, W), or (n, m, W) with vectors of its own for every prompt: the word embeddings at places
    start ... start + m - 1. Gradients flow to the vectors.
    """
    def replace_words(module, arguments, embedded):  # (n, L, W)
        own = vectors.to(embedded.dtype).expand(len(embedded), -1, -1)
        return torch.cat([embedded[:, :start], own, embedded[:, start + own.shape[1] :]], 1)
    handle = text_tower(model).token_embedding.register_forward_hook(replace_words)
    try:
        return model.encode_text(tokens, normalize=True)
    finally:
        handle.remove()


def text_tower(model):
    return getattr(model, "text", model)


def first_word(tokenizer) -> int:
    """Where the first word of a tokenised text stands: 1 after a start token, 0 where there is none (tiny CLIP)."""
    return int(tokenizer("")[0, 0] == tokenizer("a")[0, 0])


class CoOp(nn.Module):
    """Learned context in front of the class names, the same for all classes (Zhou et al., IJCV 2022, Eq. 2).

        prompt of class c = v_1 ... v_m [name of c].        v (m, W): the only parameters

    Args: context: a text, from whose word embeddings v starts (at the zero-shot prompt), or m, for a random start as in the paper
    (standard deviation 0.02, from torch's generator).
    """
    def __init__(self, model, tokenizer, class_names, context: str | int = "a photo of a", device="cpu"):
        super().__init__()
        self.start = first_word(tokenizer)
        embedding = text_tower(model).token_embedding
        if isinstance(context, str):
            words = tokenizer(context)[0]
            vectors = embedding(words[self.start : int(words.argmax())].to(device))  # up to the end token, the highest number
        else:
            vectors = 0.02 * torch.randn(context, embedding.embedding_dim).to(device)
        self.context = nn.Parameter(vectors.detach().float())
        texts = [f"{'a ' * len(vectors)}{name.replace('_', ' ')}." for name in class_names]
        self.encode = functools.partial(encode_prompts, model, tokenizer(texts).to(device), self.start)

    def forward(self) -> torch.Tensor:
        """Class features, unit-norm (C, D)."""
        return self.encode(self.context)

    def fit(self, x, y, logit_scale: float, batch_size: int = 36, steps: int = 200, lr: float = 2e-3) -> torch.Tensor:
        """Learn the context from image features x (N, D), unit-norm, and labels y (N,) by cross-entropy. Returns class features.

        Batches are drawn by torch's generator. Adam, steps and learning rate are our choice (published: SGD, 0.002).
        """
        optimizer = torch.optim.Adam(self.parameters(), lr)
        for _ in range(steps):
            some = torch.randint(len(x), (batch_size,))
            optimizer.zero_grad()
            F.cross_entropy(logit_scale * x[some].to(self.context.device) @ self().T, y[some].to(self.context.device)).backward()
            optimizer.step()
        return self().detach()


def export_clip(model, folder: str | Path, features: torch.Tensor, class_names, visual=None) -> None:
    """Write a plain open_clip model folder: `open_clip.create_model("local-dir:FOLDER")` loads it with none of our code.

    `visual` takes the place of the model's own image tower. `class_features.npy` (C, D) and `classes.json` lie beside the
    weights, so the classifier is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    weights = {**model.state_dict(), **{f"visual.{key}": value for key, value in (visual or model.visual).state_dict().items()}}
    save_file({key: value.cpu().contiguous() for key, value in weights.items()}, folder / "open_clip_model.safetensors")
    write_json(folder / "open_clip_config.json", model.export_config)
    write_json(folder / "classes.json", list(class_names))
    np.save(folder / "class_features.npy", features.cpu().numpy())


# ---------- 3. MMD ---------------------------------------------------------------------------------
def mmd2(x: torch.Tensor, y: torch.Tensor, bandwidths=None) -> torch.Tensor:
    """Squared maximum mean discrepancy between samples x (n, D) and y (m, D), the biased estimator.

        k(x, y) = mean over bandwidths b of exp(-|x - y|^2 / b)
        MMD^2   = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)        (all pairs, the diagonal included)

    bandwidths: positive numbers, in squared units of x. Default (our choice): 1/4, 1/2, 1, 2, 4 times the median squared
    distance between different points of the joint sample, through which no gradient flows.

    Returns: a scalar >= 0, zero for identical samples; differentiable also where points coincide.
    Raises: ValueError if shapes do not fit or a bandwidth is not positive.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(f"mmd2 needs x (n, D) and y (m, D), not empty, got {tuple(x.shape)} and {tuple(y.shape)}")
    joint = torch.cat([x, y])
    joint = joint.float() if joint.dtype in (torch.float16, torch.bfloat16) else joint
    distance = torch.cdist(joint, joint, compute_mode="donot_use_mm_for_euclid_dist").square()  # (n + m, n + m)
    if bandwidths is None:
        off_diagonal = ~torch.eye(len(joint), dtype=torch.bool, device=x.device)
        median = distance.detach()[off_diagonal].median().clamp(min=1e-6)
        bandwidths = [median * factor for factor in (0.25, 0.5, 1, 2, 4)]
    elif not len(bandwidths) or any(float(b) <= 0 for b in bandwidths):
        raise ValueError(f"bandwidths must be positive numbers, got {bandwidths}")
    kernel = sum(torch.exp(-distance / b) for b in bandwidths) / len(bandwidths)
    n = len(x)
    return (kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()).clamp(min=0)


# ---------- 4. Evaluation --------------------------------------------------------------------------
def image_encoder(visual, device, precision: str = "fp32") -> Callable:
    """images (B, 3, h, w) -> unit-norm features (B, D) in float32."""
    def encode(images):
        with autocast(torch.device(device), precision):
            embedding = visual(images)
        return F.normalize(embedding.float(), dim=-1)
    return encode


def clip_classifier(visual, features: torch.Tensor, precision: str = "fp32") -> Callable:
    """images (B, 3, h, w) -> cosine similarities to the class features, (B, C)."""
    encode = image_encoder(visual, features.device, precision)
    return lambda images: encode(images) @ features.T


@torch.no_grad()
def outputs(function: Callable, images: ImageSet, device="cpu", batch_size: int = 256, workers: int = 0) -> torch.Tensor:
    """What `function`, images (B, 3, h, w) -> (B, ...), says of all images, on the CPU: (N, ...)."""
    loader = DataLoader(images, batch_size, collate_fn=as_is, num_workers=workers)
    return torch.cat([function(x.to(device)).cpu() for x, _ in loader])


def evaluate(classify: Callable, sets: dict[str, ImageSet], device="cpu", batch_size: int = 256, workers: int = 0) -> dict:
    """Accuracy of `classify` (images (B, 3, h, w) -> scores (B, C)) on the images of all `sets` (keyed by domain).

    Returns: {"accuracy", "per_domain": {name: ...}, "per_class": {name: ...}, "worst_group" (None without groups)}, in [0, 1].
    """
    correct, labels, groups, per_domain = [], [], [], {}
    for name, images in sets.items():
        hits = (outputs(classify, images, device, batch_size, workers).argmax(1) == images.labels).double()
        per_domain[name] = hits.mean().item()
        correct.append(hits)
        labels.append(images.labels)
        groups.append(images.groups)
    correct, labels = torch.cat(correct), torch.cat(labels)
    classes = next(iter(sets.values())).classes
    per_class = {name: correct[labels == i].mean().item() for i, name in enumerate(classes) if (labels == i).any()}
    worst = None
    if all(g is not None for g in groups):
        groups = torch.cat(groups)
        worst = min(correct[groups == g].mean().item() for g in groups.unique())
    return {"accuracy": correct.mean().item(), "per_domain": per_domain, "per_class": per_class, "worst_group": worst}


def checkpoint_accuracies(history: list[dict]) -> dict[str, float]:
    """Target accuracy of three checkpoints of a run, from its evaluations (dicts with `source_holdout` and `target`).

    `oracle` is chosen on the target itself: nobody could choose it in earnest, it only bounds what selection can gain.
    """
    validated = max(history, key=lambda row: row["source_holdout"])  # the first of equals
    return {"last": history[-1]["target"], "source_validated": validated["target"], "oracle": max(row["target"] for row in history)}


# ---------- 5. Runs --------------------------------------------------------------------------------
def common_flags(description: str) -> argparse.ArgumentParser:
    """The flags that all methods on CLIP have. Every method adds its own group."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="tiny-pacs", help=f"{', '.join([*TINY_BENCHMARKS, *BENCHMARKS])} or folder:PATH (default: tiny-pacs)")
    data.add_argument("--data-root", default="data", help="folder that holds the benchmarks' folders (default: data)")
    data.add_argument("--target", default="sketch", help="held-out domain: name, start of its name, number, or all (default: sketch)")
    data.add_argument("--cue", type=float, default=0.4,
                      help="tiny data: how often a training image stands on its class's own background (default: 0.4)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="tiny, an open_clip name, hf-hub:... or local-dir:... (default: tiny for tiny data, else ViT-B-16)")
    model.add_argument("--pretrained", help="open_clip tag or checkpoint file (default: openai; for OpenAI's weights in a file: --model NAME-quickgelu)")
    model.add_argument("--templates", nargs="+", default=["a photo of a {}."], help="prompts, averaged; `ensemble` for open_clip's ImageNet templates (default: 'a photo of a {}.')")
    return run_flags(parser, "<dataset>-<target>-seed<seed>")


def run_flags(parser: argparse.ArgumentParser, folder: str) -> argparse.ArgumentParser:
    """The flags of every command: seeds, device, output. `folder`: how a run's folder is called, for --help."""
    run = parser.add_argument_group("run")
    run.add_argument("--seeds", "--seed", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    run.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 where a GPU has it, else fp32")
    run.add_argument("--workers", type=int, help="processes that read image files (default: 4 for files, 0 for tiny data)")
    run.add_argument("--output", type=Path, default=Path("runs"), help=f"results go to OUTPUT/<method>/{folder} (default: runs)")
    run.add_argument("--summary", type=Path, help="also write the numbers of all runs to this JSON file")
    return parser


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on others, and check what can be checked before anything is loaded."""
    tiny = args.dataset.startswith("tiny-")
    args.model = args.model or ("tiny" if tiny else "ViT-B-16")
    args.workers = (0 if tiny else 4) if args.workers is None else args.workers
    if args.summary and not args.summary.parent.is_dir():
        raise InputError(f"--summary {args.summary}: there is no folder {args.summary.parent}; make it first")
    if min(args.seeds) < 0:
        raise InputError(f"--seeds must be 0 or more, got {min(args.seeds)}")
    try:
        args.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    except RuntimeError:
        raise InputError(f"--device {args.device!r} is not a device; use auto, cpu, cuda, cuda:1 or mps") from None
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: PyTorch sees no GPU here; use --device cpu")
    if args.precision == "auto":
        args.precision = "bf16" if args.device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return args


def autocast(device: torch.device, precision: str):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def did_you_mean(wrong: str, names) -> str:
    names = {name.lower(): name for name in names}
    close = difflib.get_close_matches(wrong.lower(), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)." if close else "."


def choose_targets(text: str, names: list[str], what: str = "target") -> list[str]:
    """Domains meant by --target (`what`): a name in any case (spaces, `_` and `-` alike), its start, L100 for location_100, a number, `all`.

    Raises: InputError with the nearest name for anything else.
    """
    plain = lambda name: re.sub(r"[\s_-]", "", name.lower())  # noqa: E731
    if text == "all":
        return list(names)
    exact = [name for name in names if plain(name) == plain(text) or re.sub("^location", "l", plain(name)) == plain(text)]
    starts = [name for name in names if plain(text) and plain(name).startswith(plain(text))]
    if exact or len(starts) == 1:
        return exact[:1] or starts
    if text.isdigit() and int(text) < len(names):
        return [names[int(text)]]
    raise InputError(f"unknown {what} {text!r}{did_you_mean(text, names)} Choose from {', '.join(names)}, 0-{len(names) - 1} or all.")


@contextlib.contextmanager
def run_folder(path: Path):
    """A folder to write a run into, which appears at `path` only when the run is complete; a failed run leaves nothing.

    Raises: InputError at once if the place cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write results to {path}: {error.strerror or error}; choose another place with --output") from None
    try:
        yield partial
        partial.chmod(0o755)
        old = partial.with_name(partial.name + ".old")
        if path.exists():
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_checkpoint(path: Path, state: dict) -> None:
    """Replace a checkpoint in one go: whoever is killed while writing leaves the one before intact."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def resume(checkpoint: Path, result: Path, settings: dict) -> dict:
    """What `save_checkpoint` stored of an interrupted run, else the JSON `result` of a complete one, else {}.

    Folders that `run_folder` could not clear, because the run was killed, are cleared.
    Raises: InputError if its entry "settings" differs from `settings`.
    """
    for orphan in checkpoint.parent.glob(f".{result.parent.name}-*"):
        shutil.rmtree(orphan)
    where = checkpoint if checkpoint.exists() else result
    if not where.exists():
        return {}
    print(f"--resume: found {where}", flush=True)
    saved = torch.load(where, map_location="cpu", weights_only=True) if where == checkpoint else json.loads(where.read_text())
    changed = [f"{key} {saved['settings'].get(key)!r}, now {value!r}" for key, value in settings.items() if saved["settings"].get(key) != value]
    if changed:
        raise InputError(f"--resume: {where} has other settings ({'; '.join(changed)}); give those, or leave --resume out to start anew")
    return saved


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, default=str) + "\n")


def percent(values: list[float]) -> str:
    """`62.1` for one value, `62.1 ± 0.4` (mean and sample standard deviation over seeds) for several."""
    values = 100 * np.asarray(values, float)
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def format_table(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    cells = [[title, *columns], *([name, *row] for name, row in rows.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def run_table(title: str, results: dict[str, dict]) -> str:
    """The table of one run: for every mode the accuracies of its source-validated checkpoint, then the target accuracy of
    its last and of its oracle checkpoint."""
    columns = ["source hold-out", "source", "target", "target, last", "target, oracle*"]
    rows = {}
    for mode, result in results.items():
        other = result.get("checkpoints", {})
        rows[mode] = [percent([result[part]["accuracy"]]) for part in ("holdout", "source", "target")]
        rows[mode] += [percent([other[name]]) if other else "-" for name in ("last", "oracle")]
    note = "Checkpoints are chosen on the source hold-out (cued in tiny data).  *chosen on the target itself: for comparison only."
    return format_table(title, columns, rows) + "\n" + note


def summary_table(title: str, modes: list[str], runs: list[dict], measure=lambda result: result["target"]["accuracy"]) -> str:
    """The papers' table: a row for each mode, a column for each target and their average, mean ± deviation over seeds."""
    targets, seeds = (list(dict.fromkeys(run[key] for run in runs)) for key in ("target", "seed"))
    rows = {}
    for mode in modes:
        accuracy = {(run["target"], run["seed"]): measure(run["modes"][mode]) for run in runs}
        columns = [[accuracy[target, seed] for seed in seeds] for target in targets]
        rows[mode] = [percent(column) for column in [*columns, np.mean(columns, axis=0)]]
    return format_table(title, [*targets, "average"], rows)


def seed_means(runs: list[dict], mode: str, measure: str) -> list[float]:
    """Accuracy of a mode averaged over targets, for every seed; [] where it has none. runs: as in `measures_table`."""
    of_seed = {run["seed"]: [] for run in runs if measure in run["modes"][mode]}
    for run in runs:
        of_seed.get(run["seed"], []).append(run["modes"][mode].get(measure))
    return [float(np.mean(values)) for values in of_seed.values()]


def measures_table(title: str, runs: list[dict]) -> str:
    """A row for each mode, a column for each measure, of runs {"seed", "modes": {mode: {measure: accuracy}}}: averages over the
    runs of a seed, mean ± deviation over seeds; - where a mode lacks a measure."""
    measures = list(max(runs[0]["modes"].values(), key=len))
    rows = {mode: [seed_means(runs, mode, measure) for measure in measures] for mode in runs[0]["modes"]}
    return format_table(title, measures, {mode: [percent(v) if v else "-" for v in row] for mode, row in rows.items()})


def save_figure(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_lines(panels: dict[str, dict], x_label: str, y_label: str, path: Path, names: bool = False, **scales) -> None:
    """A panel for each title of {title: {label: (x, y)}} with y (n,), or (n, seeds) for mean and deviation. With `names`, x are
    names: they stand at the left, one below the other, and y goes to the right."""
    figure, axes = plt.subplots(1, len(panels), figsize=((4.2 + names) * len(panels), 3.4), layout="constrained", squeeze=False, sharey=names)
    for panel, (title, curves) in zip(axes[0], panels.items()):
        for label, (x, y) in curves.items():
            y = np.asarray(y).reshape(len(x), -1)
            mean, error = y.mean(1), y.std(1, ddof=1) if y.shape[1] > 1 else None
            if names:
                panel.errorbar(mean, x, xerr=error, capsize=3, fmt="o", label=label)
            else:
                panel.errorbar(x, mean, error, marker="." if len(x) < 50 else "", capsize=3, label=label)
        panel.set(title=title, **dict(zip(("ylabel", "xlabel") if names else ("xlabel", "ylabel"), (x_label, y_label))), **scales)
    axes[0, 0].yaxis.set_inverted(names)  # the first on top
    labels = axes[0, -1].get_legend_handles_labels()
    if any(labels[1]):
        columns = max(1, 45 * len(panels) // (6 + max(map(len, labels[1]))))  # that fit
        figure.set_figheight(3.4 + 0.2 * ((len(labels[1]) - 1) // columns))
        figure.legend(*labels, loc="outside lower center", ncols=min(len(labels[1]), columns), fontsize="small")
    save_figure(figure, path)


def slug(text: str) -> str:
    """A name as a file name: lower case, anything unusual becomes `_`."""
    return re.sub(r"[^a-z0-9.-]+", "_", text.lower()).strip("_")


def command(main: Callable) -> None:
    """Run a script's `main`; an `InputError` becomes one clear message and exit code 2."""
    try:
        main()
    except InputError as error:  # from a reader process the message arrives inside a traceback
        print("error:", str(error).rsplit("InputError: ", 1)[-1].strip(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
