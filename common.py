"""What the four method files share: data sets, batches, CLIP, MMD, evaluation.

1. Images       image sets; domains and parts of benchmarks, and their tiny stand-ins
2. Tasks        what one run may see: unseen domains, unseen classes, both
3. Batches      of equally many images of every source domain
4. CLIP         `load_clip` and what travels with a CLIP, export
5. MMD          `mmd2`
6. Evaluation   `evaluate`, `outputs`

`common.runs`, `common.tables` and so on are modules of support/, which one can use without reading.

`python common.py data` lists all data sets and says where they are; `python common.py table` makes
one table a data set of all finished runs.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as pixels

from support import (
    InputError,
    adapters,
    benchmarks,
    captions,
    did_you_mean,
    parallel,
    prompts,
    runs,
    slug,
    tables,
    tiny_clip,
    tiny_world,
    vit,
    why_not_loaded,
)


# ---------- 1. Images ----------------------------------------------------------------------------
@dataclass
class ImageSet(Dataset):
    """Labelled images, either uint8 pixels in memory or files that are read when asked for.

    `transform` takes a PIL image or a (B, 3, H, W) uint8 tensor (see `image_transform`) and returns
    float32; without one, pixels in memory become numbers between 0 and 1.
    """

    images: torch.Tensor | np.ndarray  # (N, 3, H, W) uint8, or N file names
    labels: torch.Tensor  # (N,) int64, index into `classes`
    classes: tuple[str, ...]
    groups: torch.Tensor | None = None  # (N,) int64, for worst-group accuracy
    transform: Callable | None = None
    attributes: dict = field(default_factory=dict)  # of drawn images: {"background": (N,) int64}

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        """A whole batch: images (B, 3, h, w) float32 and labels (B,)."""
        if isinstance(self.images, torch.Tensor):
            batch = self.images[indices]
            images = self.transform(batch) if self.transform else batch.float() / 255
        else:
            images = map(benchmarks.read_image, self.images[indices])
            images = torch.stack([self.transform(image) for image in images])
        return images, self.labels[indices]

    def __getitem__(self, index):
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def transformed(self, transform: Callable | None) -> ImageSet:
        return replace(self, transform=transform)

    def subset(self, indices) -> ImageSet:
        indices = np.asarray(indices, dtype=np.int64)
        groups = None if self.groups is None else self.groups[indices]
        attributes = {name: values[indices] for name, values in self.attributes.items()}
        parts = {"labels": self.labels[indices], "groups": groups, "attributes": attributes}
        return replace(self, images=self.images[indices], **parts)

    def labelled(self, classes: range) -> ImageSet:
        """The images of a range of classes. All class names stay."""
        inside = (self.labels >= classes.start) & (self.labels < classes.stop)
        return self.subset(np.flatnonzero(inside))

    def of_classes(self, classes: range) -> ImageSet:
        """The images of a range of classes, which are numbered from 0 again."""
        images = self.labelled(classes)
        names = self.classes[classes.start : classes.stop]
        return replace(images, labels=images.labels - classes.start, classes=names)

    def picture(self, index: int) -> np.ndarray:
        """An image as it is, for a figure: (h, w, 3) uint8."""
        if isinstance(self.images, torch.Tensor):
            return self.images[index].permute(1, 2, 0).numpy()
        return np.asarray(benchmarks.read_image(self.images[index]))


@dataclass
class Domain:
    """One domain of a benchmark."""

    name: str
    images: ImageSet  # to train on; in a tiny domain the background goes with the class
    balanced: ImageSet | None = None  # to report on, if the domain has a part for that


# classes, images per class in the cued training part and in the balanced part of a domain
TINY_BENCHMARKS = {
    "tiny-pacs": (tiny_world.PACS_CLASSES, 160, 80),
    "tiny-office": (tiny_world.OFFICE_CLASSES, 80, 40),
}


def dataset_names(kind: str) -> list[str]:
    """Names of data sets with "domains", or of those with fixed "parts"."""
    drawn = {"domains": [*TINY_BENCHMARKS], "parts": ["tiny-waterbirds", "tiny-mnist-cifar"]}[kind]
    return drawn + [name for name, entry in benchmarks.DATASETS.items() if entry["kind"] == kind]


def load_domains(name: str, root="data", seed: int = 0, cue: float = 0.4) -> list[Domain]:
    """Every domain of a benchmark, sorted by name.

    Args:
        name: one of `dataset_names("domains")`, or `folder:PATH` for PATH/<domain>/<class>/<image>.
        root: the folder that holds the benchmarks' folders.
        seed, cue: of tiny sets: which images are drawn, and how often (0 ... 1) a training image
            stands on its class's own background; 1/8 is independence.
    Raises: InputError for a folder that is missing or not in the layout.
    """
    if name in TINY_BENCHMARKS:
        return [tiny_domain(name, domain, seed, cue) for domain in tiny_world.TINY_DOMAINS]
    if name.startswith("folder:"):
        sets = image_sets(*benchmarks.read_own_folders(name.removeprefix("folder:")))
    else:
        sets = image_sets(*benchmarks.read_dataset(name, root))
    if name == "domainnet-mini":  # which has a test list for every domain
        domains = benchmarks.DATASETS[name]["domains"]
        return [Domain(domain, sets[domain], sets[f"{domain} test"]) for domain in domains]
    return [Domain(*item) for item in sets.items()]


def load_parts(name: str, root="data", seed=0, cue=0.95, download=False) -> dict[str, ImageSet]:
    """A data set with fixed parts: train, val and test, or those that it has.

    Args:
        seed, cue: of what is drawn or composed.
        download: fetch MNIST and CIFAR-10 if missing.
    Raises: InputError if the folder, its lists or its images are missing or not in the layout.
    """
    if name == "tiny-waterbirds":
        drawn = tiny_world.draw_waterbirds(seed, cue)
        return drawn_parts(drawn, tiny_world.WATERBIRD_CLASSES)
    if name == "tiny-mnist-cifar":
        return drawn_parts(tiny_world.draw_digits_and_vehicles(seed), tiny_world.VEHICLES)
    if name == "mnist-cifar":
        return drawn_parts(benchmarks.load_mnist_cifar(root, seed, download), tiny_world.VEHICLES)
    return image_sets(*benchmarks.read_dataset(name, root))


def load_id_and_ood(name: str, root="data", seed=0, cue=0.95, download=False) -> tuple:
    """A data set with a spurious attribute: {train, val_id, test_id, val_ood, test_ood}, in whose
    OOD parts the attribute is independent of the label; and weights (N,) of test_id's images, or
    None. Args, Raises: as `load_parts`.

    Waterbirds has one validation and one test set. As they are they are OOD. Weighted so that each
    group counts as much as it does in training, they are ID.
    """
    sets = load_parts(name, root, seed, cue, download)
    if name.endswith("mnist-cifar"):
        return sets, None
    in_training = torch.bincount(sets["train"].groups, minlength=4)
    share = in_training / len(sets["train"])  # (4,)
    groups = sets["test"].groups
    weights = share / torch.bincount(groups, minlength=4)
    for part in ("val", "test"):
        images = sets.pop(part)
        sets[f"{part}_id"] = images
        sets[f"{part}_ood"] = images
    return sets, weights[groups]


def drawn_parts(drawn: dict, classes: tuple[str, ...]) -> dict[str, ImageSet]:
    return {part: ImageSet(x, y, classes, groups) for part, (x, y, groups) in drawn.items()}


def image_sets(classes, parts: dict[str, list]) -> dict[str, ImageSet]:
    """Image sets of {part: [(file, label), ...]}; items may have a group as a third."""
    sets = {}
    for part, items in parts.items():
        files = np.array([str(item[0]) for item in items])
        labels = torch.tensor([item[1] for item in items])
        groups = torch.tensor([item[2] for item in items]) if len(items[0]) > 2 else None
        sets[part] = ImageSet(files, labels, tuple(classes), groups)
    return sets


def tiny_domain(name: str, domain: str, seed: int, cue: float) -> Domain:
    """Draw one domain of a tiny benchmark: its cued training part and its balanced part."""
    classes, *sizes = TINY_BENCHMARKS[name]
    drawn = tiny_world.draw_domain(name, classes, domain, seed, cue, sizes)
    parts = []
    for images, labels, groups, attributes in drawn:
        parts.append(ImageSet(images, labels, classes, groups, attributes=attributes))
    return Domain(domain, *parts)


@dataclass
class Augment:
    """CLIPood's augmentation (Sec. 4.1): RandomResizedCrop (scale 0.7 ... 1) and a horizontal flip.

    It has two parts. `crop` runs in the processes that read, image by image, and gives 8 bits, a
    quarter of what float32 would take on the way to a GPU. `normalize` runs there, on a batch.
    """

    size: tuple[int, int]
    interpolation: v2.InterpolationMode
    normalize: Callable  # (..., 3, h, w) uint8 -> float32
    flip: Callable = v2.RandomHorizontalFlip()

    def __call__(self, image) -> torch.Tensor:
        return self.normalize(self.crop(image))

    def crop(self, image) -> torch.Tensor:
        """Of a PIL image or (..., 3, H, W) uint8: (..., 3, h, w) uint8."""
        if isinstance(image, Image.Image):
            image = pixels.pil_to_tensor(image)
        box = RandomResizedCrop.get_params(image, (0.7, 1.0), (3 / 4, 4 / 3))
        part = pixels.crop(image, *box)
        # torch resizes twice as fast where the colours of a pixel lie together
        part = part.movedim(-3, -1).contiguous().movedim(-1, -3)
        return self.flip(pixels.resize(part, self.size, self.interpolation))


def image_transform(model: nn.Module, train: bool = False) -> Callable:
    """The model's own preprocessing: open_clip's, written with transforms that take PIL images and
    uint8 batches alike. With `train`, an `Augment` instead of the centre crop."""
    config = open_clip.get_model_preprocess_cfg(model)
    size = config["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    interpolation = v2.InterpolationMode(config.get("interpolation", "bicubic"))
    normalize = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    normalize += [v2.Normalize(config["mean"], config["std"]), v2.ToPureTensor()]
    if train:
        return Augment(size, interpolation, v2.Compose(normalize))
    if config.get("resize_mode", "shortest") == "squash":
        crop = [v2.Resize(size, interpolation)]
    else:
        crop = [v2.Resize(min(size), interpolation), v2.CenterCrop(size)]
    return v2.Compose([*crop, *normalize])


# ---------- 2. Tasks -----------------------------------------------------------------------------
@dataclass
class Task:
    """What one run may see. Transforms are inside."""

    classes: tuple[str, ...]
    train: dict[str, ImageSet]  # by source domain
    tests: dict[str, dict[str, ImageSet]]  # by test, then by domain; "hold-out" may choose a model

    def __post_init__(self):
        for test, sets in self.tests.items():
            for name, images in sets.items():
                if not len(images):
                    few = "there are too few to split them"
                    raise InputError(f"no image of {name!r} is left for the test {test!r}: {few}")

    def transformed(self, clip: Clip) -> Task:
        """With CLIP's transforms. Drawn images are not augmented: they show so many poses."""
        train, tests = {}, {}
        for name, images in self.train.items():
            drawn = isinstance(images.images, torch.Tensor)
            train[name] = images.transformed(clip.preprocess if drawn else clip.augment)
        for test, sets in self.tests.items():
            sets = {name: images.transformed(clip.preprocess) for name, images in sets.items()}
            tests[test] = sets
        return Task(self.classes, train, tests)


def choose_targets(text: str, names: list[str], what: str = "target") -> list[str]:
    """Domains meant by --target: a name in any case (spaces, `_` and `-` alike), its start, L100
    for location_100, a number, or `all`. Raises: InputError with the nearest name for others.
    """
    if text == "all":
        return list(names)
    wanted = plain(text)
    exact, starts = [], []
    for name in names:
        if wanted in (plain(name), re.sub("^location", "l", plain(name))):
            exact.append(name)
        if wanted and plain(name).startswith(wanted):
            starts.append(name)
    if exact or len(starts) == 1:
        return exact[:1] or starts
    if text.isdigit() and int(text) < len(names):
        return [names[int(text)]]
    choice = f"{', '.join(names)}, 0-{len(names) - 1} or all"
    raise InputError(f"unknown {what} {text!r}{did_you_mean(text, names)} Choose from {choice}.")


def plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def domain_split(
    n: int, domain_index: int, holdout: float = 0.2, trial: int = 0, part: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Split n images of a domain as DomainBed does: (held-out indices, the rest).

    Args:
        n: images, in ImageFolder order.
        domain_index: place among the sorted domain names.
        trial: 0 in CLIPood.
        part: "base" or "open", where CLIPood splits the images of these classes apart.
    """
    key = (trial, domain_index, part) if part else (trial, domain_index)
    seed = int(hashlib.md5(str(key).encode()).hexdigest(), 16) % 2**31
    order = list(range(n))
    np.random.RandomState(seed).shuffle(order)
    held_out = int(holdout * n)
    return np.array(order[:held_out], dtype=int), np.array(order[held_out:], dtype=int)


def hold_out(images: ImageSet, domain_index: int, part: str = "") -> tuple[ImageSet, ImageSet]:
    """A domain's images in two: 20 % that may choose a model, and the rest; see `domain_split`."""
    held_out, rest = domain_split(len(images), domain_index, part=part)
    return images.subset(held_out), images.subset(rest)


def leave_one_out(domains: list[Domain], target: str) -> Task:
    """Train on 80 % of all domains but `target`.

    Tests: "hold-out", the other 20 % of the sources, the only images that may choose a model;
    "source" and "target", the balanced parts of tiny domains. A real domain has none: then the
    target is tested on all its images, and no "source", which would be the hold-out again.
    """
    train, holdout, source, tested = {}, {}, {}, {}
    for index, domain in enumerate(domains):
        name = domain.name
        if name == target:
            tested[name] = domain.balanced or domain.images
            continue
        holdout[name], train[name] = hold_out(domain.images, index)
        if domain.balanced:
            source[name] = domain.balanced
    tests = {"hold-out": holdout, "source": source, "target": tested}
    if not source:
        del tests["source"]
    return Task(domains[0].images.classes, train, tests)


def few_shot(images: ImageSet, shots: int, seed: int, none_ok=False) -> ImageSet:
    """`shots` images of every class, drawn without replacement; all of a class that has fewer.

    Raises: InputError for a class without images, unless `none_ok`.
    """
    rng = tiny_world.tiny_rng(seed, "few shots")
    labels = images.labels.numpy()
    by_class = np.argsort(labels, kind="stable")
    ends = np.bincount(labels, minlength=len(images.classes)).cumsum()
    chosen = []
    for name, indices in zip(images.classes, np.split(by_class, ends[:-1])):
        if not len(indices) and not none_ok:
            raise InputError(f"there is no image of class {name!r} to draw {shots} shots from")
        if len(indices) < shots:
            few = f"class {name!r} has only {len(indices)} images, fewer than {shots} shots"
            print(f"{few}: all are used")
        chosen.append(rng.permutation(indices)[:shots])
    return images.subset(np.concatenate(chosen))


IMAGENET_SHIFTS = ["imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r"]


def imagenet_shift(parts: dict, shots: int, seed: int) -> Task:
    """Train on a few shots of all classes; test on the validation set and on what shifts it."""
    train = few_shot(parts["train"], shots, seed)
    tests = {"imagenet": {"imagenet": parts["test"]}}
    for name in IMAGENET_SHIFTS:
        tests[name] = {name: parts[name]}
    return Task(train.classes, {"imagenet": train}, tests)


def base_and_new(n: int, odd_to_base: bool = True) -> tuple[range, range]:
    """The first half of n classes and the rest; a middle one is base (open class) or new (wild)."""
    if n < 2:
        raise InputError(f"base and new classes need at least 2 classes, there are {n}")
    base = (n + odd_to_base) // 2
    return range(base), range(base, n)


def open_class(parts: dict, name: str, shots: int, seed: int) -> Task:
    """Train on a few shots of base classes; test base and new apart, each over its own names."""
    classes = parts["train"].classes
    base, new = base_and_new(len(classes))
    train = few_shot(parts["train"].of_classes(base), shots, seed)
    validation = parts["val"].of_classes(base)
    if name != "imagenet":  # whose validation images are its test images, all of them
        validation = few_shot(validation, min(shots, 4), seed, none_ok=True)
    tests = {
        "validation": {name: validation},
        "base": {name: parts["test"].of_classes(base)},
        "new": {name: parts["test"].of_classes(new)},
    }
    return Task(classes, {name: train}, tests)


def parts_of_domain(domains, target: str) -> dict[str, ImageSet]:
    """One domain as a data set; a real one, without a balanced part, is tested on its hold-out."""
    index = [domain.name for domain in domains].index(target)
    domain = domains[index]
    validation, train = hold_out(domain.images, index)
    return {"train": train, "val": validation, "test": domain.balanced or validation}


def in_the_wild(domains, target: str) -> Task:
    """Train on the base classes of all domains but one; test that one, over all class names."""
    classes = domains[0].images.classes
    base, new = base_and_new(len(classes), odd_to_base=False)
    train, holdout, source, total = {}, {}, {}, {}
    for index, domain in enumerate(domains):
        name, tested = domain.name, domain.balanced or domain.images
        if name == target:
            total = {"base": tested.labelled(base), "new": tested.labelled(new)}
            continue
        images = domain.images.labelled(base)
        holdout[name], rest = hold_out(images, index, "base")
        train[name] = rest.of_classes(base)
        if domain.balanced:
            source[name] = tested.labelled(base)
    tests = {"hold-out": holdout, "source": source, "total": total}
    if not source:
        del tests["source"]
    return Task(classes, train, tests)


# ---------- 3. Batches ---------------------------------------------------------------------------
def as_is(batch):
    """In place of collecting images one by one: an `ImageSet` gives whole batches."""
    return batch


def endless_order(size: int, seed: int) -> Iterator[int]:
    """0 ... size - 1 in one random order after another."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.empty((), dtype=torch.int64)
    first.random_(generator=generator)  # a number that a DataLoader drew when results/ were made
    while True:
        yield from torch.randperm(size, generator=generator).tolist()


def endless_batches(sizes: list[int], per_domain: int, seed: int) -> Iterator[list[list[tuple]]]:
    """For every step and domain the next images: (index, seed of its augmentation) each. Every rank
    gets its share of every domain's."""
    orders = []
    for domain, size in enumerate(sizes):
        orders.append(endless_order(size, seed * 1000 + domain))
    for step in itertools.count():
        positions = range(step * per_domain, (step + 1) * per_domain)
        batch = []
        for domain, order in enumerate(orders):
            images = [(next(order), hash((seed, domain, position))) for position in positions]
            batch.append(images[parallel.slice_of_rank(per_domain)])
        yield batch


@dataclass
class Sources(Dataset):
    """All source domains as one set, whose items are batches; see `endless_batches`."""

    sets: list[ImageSet]

    def __getitems__(self, batch: list[list[tuple]]) -> tuple:
        """Images (S b, 3, h, w) and labels (S b,), domain after domain."""
        images, labels = [], []
        with torch.random.fork_rng(devices=[]):
            for domain, drawn in zip(self.sets, batch):
                x, y = self.augmented(domain, drawn)
                images.append(x)
                labels.append(y)
        return torch.cat(images), torch.cat(labels)

    @staticmethod
    def augmented(domain: ImageSet, drawn: list[tuple]) -> tuple:
        """Each file is cropped and mirrored by a seed of its own, so that it does not matter which
        process reads it; pixels in memory are all by that of the first."""
        seed_cpu = torch.default_generator.manual_seed  # torch.manual_seed would seed GPUs too
        indices = [index for index, _ in drawn]
        if isinstance(domain.images, torch.Tensor):
            seed_cpu(drawn[0][1])
            return domain.__getitems__(indices)
        crop = getattr(domain.transform, "crop", domain.transform)  # `Augment` ends on the device
        images = []
        for index, seed in drawn:
            seed_cpu(seed)
            x = crop(benchmarks.read_image(domain.images[index]))
            images.append(x.movedim(0, -1))  # (h, w, 3), as they lie in memory
        return torch.stack(images).movedim(-1, 1), domain.labels[indices]


def source_batches(sets, per_domain, seed, start=0, stop=None, workers=0, device="cpu") -> Iterator:
    """Batches with equally many images of every source domain, endless unless `stop` is given.

    The same seed gives the same images, cropped and mirrored alike, however many processes read
    them. A domain smaller than `per_domain` is cycled through, as in DomainBed.

    Args: sets: {domain: `ImageSet`}; per_domain: images of each in a batch, b, of which every rank
    gets an equal part; start, stop: the first step and the one to end before; workers: processes.
    Yields: images (S b, 3, h, w) float32 and labels (S b,), domain after domain, on the device.
    Raises: InputError if b cannot be shared by all ranks.
    """
    ranks = parallel.world_size()
    if per_domain % ranks:
        shares = f"cannot be shared by {ranks} processes: give a multiple of {ranks}"
        raise InputError(f"--batch-size {per_domain} per source domain {shares}")
    sizes = [len(images) for images in sets.values()]
    steps = itertools.islice(endless_batches(sizes, per_domain, seed), start, stop)
    options = {"batch_sampler": steps, "num_workers": workers, "collate_fn": as_is}
    options["pin_memory"] = torch.device(device).type == "cuda"
    transform = next(iter(sets.values())).transform
    for images, labels in DataLoader(Sources([*sets.values()]), **options):
        images = images.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = transform.normalize(images)
        yield images, labels.to(device, non_blocking=True)


# ---------- 4. CLIP ------------------------------------------------------------------------------
TINY_CLIP = Path(__file__).resolve().parent / "assets" / "tiny_clip"  # made by support/tiny_clip.py


@dataclass
class Clip:
    """A frozen CLIP with all that belongs to it; see `load_clip`."""

    model: nn.Module
    visual: nn.Module  # the model's image tower, or another one: `replace(clip, visual=...)`
    preprocess: Callable  # transform of test images
    augment: Callable  # transform of training images
    tokenizer: Callable  # texts -> (n, L) int64
    logit_scale: float  # 1 / tau
    device: torch.device
    precision: str
    config: dict  # what `export_clip` writes
    cache: dict = field(default_factory=dict)  # text features that were computed before

    @torch.no_grad()
    def encode_text(self, texts: list[str], batch_size: int = 256) -> torch.Tensor:
        """Unit-norm text features (n, D), float32. The last bits of a text depend on its batch."""
        key = tuple(texts), batch_size
        if key not in self.cache:
            features = []
            for tokens in self.tokenizer(texts).to(self.device).split(batch_size):  # (b, L)
                features.append(self.model.encode_text(tokens, normalize=True))
            self.cache[key] = torch.cat(features)
        return self.cache[key]

    def encode(self, images: ImageSet, workers: int = 0, batch_size: int = 256) -> torch.Tensor:
        """Unit-norm image features (N, D), float32, on the CPU."""
        encoder = image_encoder(self.visual, self.precision)
        images = images.transformed(self.preprocess)
        return outputs(encoder, images, self.device, batch_size, workers)

    def class_features(self, names, templates=("a photo of a {}.",)) -> torch.Tensor:
        """Text features of the classes, unit-norm (C, D): each class averaged over the templates.

        Underscores in names become spaces. ["ensemble"] stands for open_clip's ImageNet templates.
        """
        if list(templates) == ["ensemble"]:
            templates = self.ensemble()
        texts = []
        for name in names:
            texts += [text.format(name.replace("_", " ")) for text in templates]
        features = self.encode_text(texts, batch_size=len(templates))  # class by class
        features = features.unflatten(0, (-1, len(templates)))  # (C, templates, D)
        return F.normalize(features.mean(1), dim=-1)

    def ensemble(self) -> list[str]:
        """open_clip's 80 ImageNet templates, or those of them whose words the tiny CLIP knows."""
        templates = [text("{}") for text in open_clip.OPENAI_IMAGENET_TEMPLATES]
        if not isinstance(self.tokenizer, tiny_clip.WordTokenizer | tiny_clip.TinyTokenizer):
            return templates
        known = {*self.tokenizer.words, "{}"}
        return [text for text in templates if not tiny_clip.unknown_words(text, known)]


def load_clip(
    name="tiny", pretrained=None, device="cpu", precision="fp32", interpolation=None
) -> Clip:
    """Load a frozen CLIP, its weights in float32.

    Args:
        name: `tiny` (shipped), any open_clip model name, `hf-hub:ORG/NAME` or `local-dir:PATH`.
        pretrained: for an open_clip name, a tag (default `openai`) or a checkpoint file. OpenAI's
            own weights in a file need a name that ends in `-quickgelu`: the file does not tell its
            activation. For a tag the right one is set here.
        interpolation: how images are resized, in place of what the model's own settings say.
    Raises: InputError if the name is unknown or the weights cannot be had.
    """
    if name == "tiny":
        name = f"local-dir:{TINY_CLIP}"
    model, tokenizer, model_config = create_model(name, pretrained)
    preprocess_config = open_clip.get_model_preprocess_cfg(model)
    if interpolation:
        preprocess_config = {**preprocess_config, "interpolation": interpolation}
        open_clip.set_model_preprocess_cfg(model, preprocess_config)
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess_config}
    # a key of ours, which open_clip passes over
    words = tokenizer.words if isinstance(tokenizer, tiny_clip.WordTokenizer) else None
    config["vocabulary"] = words and list(words)
    model = model.eval().requires_grad_(False).to(device)
    return Clip(
        model=model,
        visual=model.visual,
        preprocess=image_transform(model),
        augment=image_transform(model, train=True),
        tokenizer=tokenizer,
        logit_scale=model.logit_scale.exp().item(),
        device=torch.device(device),
        precision=precision,
        config=config,
    )


def create_model(name: str, pretrained: str | None) -> tuple:
    """open_clip's model with its weights, its tokenizer and its "model_cfg". Args, Raises: as of
    `load_clip`."""
    quick_gelu = False
    if ":" not in name:
        pretrained = pretrained or "openai"
        check_weights(name, pretrained)
        tag = open_clip.get_pretrained_cfg(name, pretrained) or {}  # a file has none
        quick_gelu = bool(tag.get("quick_gelu", False))
    if not name.startswith("local-dir:") and not Path(pretrained or "").is_file():
        try_hub()
    logging.disable(logging.ERROR)  # a failing download is logged thirty times
    try:
        options = {"force_quick_gelu": quick_gelu, "require_pretrained": True}
        model = open_clip.create_model(name, pretrained, **options)
        config = open_clip.get_model_config(name)
        tokenizer = tiny_clip.tokenizer_of(name, model)
    except Exception as error:  # hub, file system and deserialiser fail in ways of their own
        where = f"{name} ({pretrained or 'its folder'})"
        raise InputError(
            f"cannot load the weights of {where}: {why_not_loaded(error)}\n  {HINT}"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    config["quick_gelu"] = quick_gelu or config.get("quick_gelu", False)
    return model, tokenizer, config


HINT = (
    "A file must hold a state dict of this model, .pt or .safetensors. Offline? Give one with "
    "--pretrained FILE, copy the hub's folder models--ORG--NAME from the cache of a machine that "
    "has it, or use --model tiny."
)


def try_hub(seconds: float = 3) -> None:
    """Where the hub of weights cannot be reached, look in its cache on this machine alone: it would
    be asked again and again for a minute."""
    try:
        if not getproxies():
            host = urlsplit(constants.ENDPOINT).hostname
            socket.create_connection((host, 443), seconds).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def check_weights(name: str, pretrained: str) -> None:
    """Raises: InputError if open_clip knows no such model, or has no such weights for it."""
    if name not in open_clip.list_models():
        hint = did_you_mean(name, open_clip.list_models())
        choices = "tiny, a name that open_clip.list_models() shows, hf-hub:ORG/NAME, local-dir:PATH"
        raise InputError(f"unknown model {name!r}{hint} Choose {choices}.")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and not Path(pretrained).is_file():
        wrong = f"--pretrained {pretrained!r} is neither a file nor a tag of {name}"
        raise InputError(f"{wrong}; its tags are: {', '.join(tags)}")


def export_clip(clip: Clip, folder, class_features, class_names, visual=None) -> None:
    """Write a plain open_clip folder: `open_clip.create_model("local-dir:FOLDER")` loads it with
    none of our code.

    `visual` takes the place of the model's own image tower. `class_features.npy` (C, D) and
    `classes.json` lie beside the weights, so that the classifier is complete.
    """
    folder = Path(folder)
    tower = (visual or clip.visual).state_dict()
    weights = clip.model.state_dict()
    weights |= {f"visual.{key}": value for key, value in tower.items()}
    weights = {key: value.cpu().contiguous() for key, value in weights.items()}
    runs.write_file(folder / "open_clip_model.safetensors", lambda file: save_file(weights, file))
    runs.write_json(folder / "open_clip_config.json", clip.config)
    if isinstance(clip.tokenizer, tiny_clip.TinyTokenizer):
        merges = clip.tokenizer.file
        runs.write_file(folder / merges.name, lambda file: shutil.copyfile(merges, file))
    runs.write_json(folder / "classes.json", list(class_names))
    runs.write_file(folder / "class_features.npy", lambda file: np.save(file, class_features.cpu()))


# ---------- 5. MMD -------------------------------------------------------------------------------
def mmd2(x: torch.Tensor, y: torch.Tensor, bandwidths=None) -> torch.Tensor:
    """Squared maximum mean discrepancy of samples x (n, D) and y (m, D), the biased estimator.

        k(x, y) = mean over bandwidths b of exp(-|x - y|^2 / b)
        MMD^2   = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)      (all pairs, also the diagonal)

    Several pairs of samples at once: x (..., n, D), y (..., m, D), a number for each.

    bandwidths: positive numbers, in squared units of x. Default (our choice): 1/4, 1/2, 1, 2, 4
    times the median squared distance between different points of the joint sample, through which
    no gradient flows.

    Returns: (...) >= 0, zero for identical samples; differentiable also where points coincide.
    Raises: ValueError if shapes do not fit or a bandwidth is not positive.
    """
    fits = x.ndim >= 2 and x.shape[:-2] == y.shape[:-2] and x.shape[-1:] == y.shape[-1:]
    if not fits or not x.numel() or not y.numel():
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"mmd2 needs x (n, D) and y (m, D), not empty, got {shapes}")
    joint = torch.cat([x, y], -2)  # (..., n + m, D)
    if joint.dtype in (torch.float16, torch.bfloat16):
        joint = joint.float()
    distance = torch.cdist(joint, joint, compute_mode="donot_use_mm_for_euclid_dist").square()
    if bandwidths is None:
        different = off_diagonal(distance.detach()).flatten(-2)
        median = different.median(-1).values.clamp(min=1e-6)[..., None, None]
        bandwidths = [median * factor for factor in (0.25, 0.5, 1, 2, 4)]
    elif not len(bandwidths) or any(float(b) <= 0 for b in bandwidths):
        raise ValueError(f"bandwidths must be positive numbers, got {bandwidths}")
    kernels = [torch.exp(-distance / b) for b in bandwidths]
    kernel = sum(kernels) / len(bandwidths)  # (..., n + m, n + m)
    n = x.shape[-2]
    within_x = kernel[..., :n, :n].mean((-2, -1))
    within_y = kernel[..., n:, n:].mean((-2, -1))
    between = kernel[..., :n, n:].mean((-2, -1))
    return (within_x + within_y - 2 * between).clamp(min=0)


def off_diagonal(square: torch.Tensor) -> torch.Tensor:
    """(..., N, N) -> (..., N - 1, N), all but the diagonal: behind each of its elements come N
    others."""
    N = square.shape[-1]
    behind_first = square.flatten(-2)[..., 1:]
    return behind_first.unflatten(-1, (N - 1, N + 1))[..., :-1]


# ---------- 6. Evaluation ------------------------------------------------------------------------
def autocast(device: torch.device | str, precision: str):
    """Matrix products in half precision where `precision` says so; weights stay in float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None)


def image_encoder(visual: nn.Module, precision: str = "fp32") -> Callable:
    """A function: images (B, 3, h, w) -> unit-norm features (B, D) in float32."""

    def encode(images):
        with autocast(images.device, precision):
            features = visual(images)
        return F.normalize(features.float(), dim=-1)

    return encode


def clip_classifier(visual, class_features: torch.Tensor, precision: str = "fp32") -> Callable:
    """A function: images (B, 3, h, w) -> cosine similarities to the class features, (B, C)."""
    encode = image_encoder(visual, precision)

    def classify(images):
        return encode(images) @ class_features.T

    return classify


@torch.no_grad()
def outputs(function, images: ImageSet, device="cpu", batch_size=256, workers=0) -> torch.Tensor:
    """What `function`, images (B, 3, h, w) -> (B, ...), returns for all: (N, ...), on the CPU. Each
    rank computes its share.

    Raises: InputError for nan, of which an accuracy would make a class.
    """
    shared = len(images) >= parallel.world_size() > 1
    images_of_rank = images
    if shared:
        images_of_rank = images.subset(range(parallel.rank(), len(images), parallel.world_size()))
    options = {"collate_fn": as_is, "num_workers": workers}
    options["pin_memory"] = torch.device(device).type == "cuda"
    results = []
    for x, _ in DataLoader(images_of_rank, batch_size, **options):
        results.append(function(x.to(device, non_blocking=True)))
    results = torch.cat(results).cpu()
    if shared:
        results = parallel.gather_outputs(results, len(images))
    if results.isnan().any():
        raise InputError("a model's outputs are nan: try a lower --lr, or look at its weights")
    return results


def evaluate(classify: Callable, tests: dict, device="cpu", workers=0, batch_size=256) -> dict:
    """Accuracy of `classify`, images (B, 3, h, w) -> scores (B, C), in tests {test: {domain: set}}.

    Returns: {test: accuracy over all its images}, in [0, 1]; for a test of several domains also
    {"test/domain": accuracy}.
    """
    metrics = {}
    for test, sets in tests.items():
        hits = {}
        for domain, images in sets.items():
            scores = outputs(classify, images, device, batch_size, workers)  # (N, C)
            hits[domain] = (scores.argmax(1) == images.labels).double()
        metrics[test] = torch.cat(list(hits.values())).mean().item()
        if len(hits) > 1:
            for domain, correct in hits.items():
                metrics[f"{test}/{domain}"] = correct.mean().item()
    return metrics


def main():
    """`python common.py data` and `python common.py table`."""
    commands = {"data": benchmarks.list_data_sets, "table": tables.table_runs}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in commands:
        raise InputError(f"python common.py {name}: give {' or '.join(commands)}")
    commands[name](sys.argv[2:])


if __name__ == "__main__":
    runs.command(main)
