"""What the four method files share: data sets, CLIP, MMD, evaluation.

1. Images       image sets; domains and parts of benchmarks, and their tiny stand-ins
2. Tasks        what one run may see: unseen domains, unseen classes, both
3. CLIP         `load_clip` and what travels with a CLIP, export
4. MMD          `mmd2`
5. Evaluation   `evaluate`, `outputs`

What any command needs comes from modules in support/, and is called `common.X` like the rest:
settings.py (flags; rows with settings of their own), batches.py (`SourceBatches`, of all source
domains alike), steps.py (`Steps` of an optimizer, watched), graphs.py (`compiled` towers),
parallel.py (several processes as one), runs.py (`open_run`: a folder that appears when it is
complete, or can be continued), report.py (tables and pictures of records), pictures.py, prompts.py
(CoOp and CoCoOp, which the papers compare with), command.py (errors in one line).

Four words: a **Task** is what one run may see, a **row** is one line of a table, a **run** is one
target and seed, and a **record** is what a run leaves: {"target", "seed", "rows": {row: {measure:
number}}, "extra"}. A measure is a name and a number in [0, 1]; `target/photo`: a part of `target`.

`python common.py data` lists all data sets: which are there, and where. `python common.py table`
makes one table a data set of all runs.

A method file imports this file and libraries, never another method file; `support/` never imports
this file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from support import ASSETS as ASSETS
from support import InputError, parallel
from support import did_you_mean as did_you_mean
from support import slug as slug
from support.batches import SourceBatches as SourceBatches
from support.batches import as_is
from support.batches import check_batch_sizes as check_batch_sizes
from support.benchmarks import (
    DATASETS,
    load_mnist_cifar,
    read_dataset,
    read_own_folders,
)
from support.cache import Cache, open_cache
from support.class_features import read_class_features as read_class_features
from support.command import command as command
from support.data_sets import main as list_data_sets
from support.files import replacing, write_json
from support.files import write_arrays as write_arrays
from support.files import write_tensors as write_tensors
from support.graphs import compiled as compiled
from support.images import Augment, leave_out_broken
from support.images import read_image as read_image
from support.parallel import all_gather as all_gather
from support.parallel import average_gradients as average_gradients
from support.parallel import data_parallel as data_parallel
from support.parallel import mean_over_ranks as mean_over_ranks
from support.pictures import plot_heat as plot_heat
from support.pictures import plot_images as plot_images
from support.pictures import plot_panels as plot_panels
from support.profiling import profile as profile
from support.prompts import CoCoOp as CoCoOp
from support.prompts import CoOp as CoOp
from support.prompts import PromptClassifier as PromptClassifier
from support.prompts import encode_all
from support.prompts import encode_prompts as encode_prompts
from support.prompts import first_word as first_word
from support.report import closing_line as closing_line
from support.report import format_table as format_table
from support.report import gain as gain
from support.report import measures_of as measures_of
from support.report import paired as paired
from support.report import percent as percent
from support.report import plot_curves as plot_curves
from support.report import report as report
from support.report import seed_means as seed_means
from support.report import table as table
from support.report import target_table as target_table
from support.report import value_table as value_table
from support.run_tables import main as table_runs
from support.runs import Run as Run
from support.runs import open_run as open_run
from support.settings import ONE_PLACE as ONE_PLACE
from support.settings import SPEED as SPEED
from support.settings import TARGET as TARGET
from support.settings import TEMPLATES as TEMPLATES
from support.settings import Method as Method
from support.settings import at_least as at_least
from support.settings import cache_folder as cache_folder
from support.settings import flags as flags
from support.settings import has_one_place as has_one_place
from support.settings import positive as positive
from support.settings import prompt_template as prompt_template
from support.settings import settle as settle
from support.settings import share as share
from support.steps import Steps as Steps
from support.stop import stop_if_asked
from support.stop import was_asked as was_asked
from support.tiny_words import FILE as MERGES
from support.tiny_words import TinyTokenizer, tokenizer_of
from support.tiny_world import (
    OFFICE_CLASSES,
    PACS_CLASSES,
    TINY_DOMAINS,
    VEHICLES,
    WATERBIRD_CLASSES,
    WordTokenizer,
    draw_digits_and_vehicles,
    draw_domain,
    draw_waterbirds,
    unknown_words,
)
from support.tiny_world import tiny_rng as tiny_rng
from support.weights import OFFLINE, hub_or_cache, why_not


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
    cache: Cache | None = None  # of files, see `cached`

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        """A whole batch: images (B, 3, h, w) float32 and labels (B,)."""
        if isinstance(self.images, torch.Tensor):
            pixels = self.images[indices]
            images = self.transform(pixels) if self.transform else pixels.float() / 255
        else:
            images = torch.stack([self.transform(self.read(i)) for i in indices])
        return images, self.labels[indices]

    def read(self, index: int):
        """A file's image, before its transform: PIL, or (3, h, w) uint8 of the cache."""
        return self.cache[index] if self.cache else read_image(self.images[index])

    def __getitem__(self, index):
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def transformed(self, transform: Callable | None) -> ImageSet:
        return replace(self, transform=transform)

    def cached(self, folder: Path, domain: str) -> ImageSet:
        """Files read from a cache, made now if it is not there. The transform is an `Augment`."""
        side = self.transform.cached_side
        return replace(self, cache=open_cache(self.images.tolist(), folder, domain, side))

    def subset(self, indices) -> ImageSet:
        indices = np.asarray(indices, dtype=np.int64)
        groups = None if self.groups is None else self.groups[indices]
        attributes = {name: values[indices] for name, values in self.attributes.items()}
        own = {"labels": self.labels[indices], "groups": groups, "attributes": attributes}
        own["cache"] = self.cache and self.cache.subset(indices)
        return replace(self, images=self.images[indices], **own)

    def labelled(self, chosen: range) -> ImageSet:
        """The images of a range of classes. All class names stay."""
        inside = (self.labels >= chosen.start) & (self.labels < chosen.stop)
        return self.subset(np.flatnonzero(inside))

    def of_classes(self, chosen: range) -> ImageSet:
        """The images of a range of classes, which are numbered from 0 again."""
        own = self.labelled(chosen)
        classes = self.classes[chosen.start : chosen.stop]
        return replace(own, labels=own.labels - chosen.start, classes=classes)

    def picture(self, index: int) -> np.ndarray:
        """An image as it is, for a figure: (h, w, 3) uint8."""
        if isinstance(self.images, torch.Tensor):
            return self.images[index].permute(1, 2, 0).numpy()
        return np.asarray(read_image(self.images[index]))

    def name(self, index: int) -> str:
        """An image's file, or its number if it was drawn."""
        return f"number {index}" if isinstance(self.images, torch.Tensor) else self.images[index]


@dataclass
class Domain:
    """One domain of a benchmark."""

    name: str
    images: ImageSet  # to train on; in a tiny domain the background goes with the class
    balanced: ImageSet | None = None  # to report on, if the domain has a part for that


# classes, images per class in the cued training part and in the balanced part of a domain
TINY_BENCHMARKS = {"tiny-pacs": (PACS_CLASSES, 160, 80), "tiny-office": (OFFICE_CLASSES, 80, 40)}


def dataset_names(kind: str) -> list[str]:
    """Names of data sets with "domains", or of those with fixed "parts"."""
    drawn = {"domains": [*TINY_BENCHMARKS], "parts": ["tiny-waterbirds", "tiny-mnist-cifar"]}[kind]
    return drawn + [name for name, row in DATASETS.items() if row["kind"] == kind]


def load_domains(
    name: str, root="data", seed: int = 0, cue: float = 0.4, also=(), skip_broken: bool = False
) -> list[Domain]:
    """Every domain of a benchmark, sorted by name.

    Args:
        name: one of `dataset_names("domains")`, or `folder:PATH` for PATH/<domain>/<class>/<image>.
        root: the folder that holds the benchmarks' folders.
        seed, cue: of tiny sets: which images are drawn, and how often (0 ... 1) a training image
            stands on its class's own background; 1/8 is independence.
        also: names of other data sets, for the message about an unknown one.
        skip_broken: leave out files that cannot be read.
    Raises: InputError for an unknown name, or a folder that is missing or not in the layout.
    """
    if name in TINY_BENCHMARKS:
        return [tiny_domain(name, domain, seed, cue) for domain in TINY_DOMAINS]
    if name.startswith("folder:"):
        path = Path(name.removeprefix("folder:")).expanduser()
        sets = image_sets(*read_own_folders(path), skip_broken)
        return [Domain(*item) for item in sets.items()]
    names = [*dataset_names("domains"), *also]
    if name not in DATASETS or name not in names:
        raise unknown_dataset(name, names, ", or folder:PATH")
    sets = image_sets(*read_dataset(name, root), skip_broken)
    if name == "domainnet-mini":  # which has a test list for every domain
        domains = DATASETS[name]["domains"]
        return [Domain(domain, sets[domain], sets[f"{domain} test"]) for domain in domains]
    return [Domain(*item) for item in sets.items()]


def unknown_dataset(name: str, names: list[str], more: str = "") -> InputError:
    hint = did_you_mean(name, names)
    return InputError(f"unknown data set {name!r}{hint} Choose from {', '.join(names)}{more}.")


def load_parts(
    name: str, root="data", seed=0, cue=0.95, download=False, skip_broken=False
) -> dict[str, ImageSet]:
    """A data set with fixed parts: train, val and test, or those that it has.

    Args:
        seed, cue: of what is drawn or composed.
        download: fetch MNIST and CIFAR-10 if missing.
        skip_broken: leave out files that cannot be read.
    Raises: InputError for an unknown name, or if the folder, its lists or its images are missing or
        not in the layout.
    """
    names = dataset_names("parts")
    if name not in names:
        raise unknown_dataset(name, names)
    if name == "tiny-waterbirds":
        return drawn_parts(draw_waterbirds(seed, cue), WATERBIRD_CLASSES)
    if name == "tiny-mnist-cifar":
        return drawn_parts(draw_digits_and_vehicles(seed), VEHICLES)
    if name == "mnist-cifar":
        return drawn_parts(load_mnist_cifar(root, seed, download), VEHICLES)
    return image_sets(*read_dataset(name, root), skip_broken)


def load_id_and_ood(
    name: str, root="data", seed=0, cue=0.95, download=False, skip_broken=False
) -> tuple:
    """A data set with a spurious attribute: {train, val_id, test_id, val_ood, test_ood}, in whose
    OOD parts the attribute is independent of the label; and weights (N,) of test_id's images, or
    None. Args, Raises: as `load_parts`.

    Waterbirds has one validation and one test set. As they are they are OOD. Weighted so that each
    group counts as much as it does in training, they are ID.
    """
    sets = load_parts(name, root, seed, cue, download, skip_broken)
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


def image_sets(classes, parts: dict[str, list], skip_broken: bool = False) -> dict[str, ImageSet]:
    """Image sets of {part: [(file, label), ...]}; items may have a group as a third."""
    if skip_broken:
        parts = leave_out_broken(classes, parts)
    sets = {}
    for part, items in parts.items():
        columns = []  # zip(*items) would take ten times as long with 600,000 items
        for place in range(len(items[0])):
            columns.append([item[place] for item in items])
        files, *numbers = columns
        labels, *groups = map(torch.tensor, numbers)
        sets[part] = ImageSet(np.array([*map(str, files)]), labels, tuple(classes), *groups)
    return sets


def tiny_domain(name: str, domain: str, seed: int, cue: float) -> Domain:
    """Draw one domain of a tiny benchmark: its cued training part and its balanced part."""
    classes, *sizes = TINY_BENCHMARKS[name]
    parts = []
    for pixels, labels, groups, drawn in draw_domain(name, classes, domain, seed, cue, sizes):
        parts.append(ImageSet(pixels, labels, classes, groups, attributes=drawn))
    return Domain(domain, *parts)


def image_transform(model: nn.Module, train: bool = False) -> Callable:
    """The model's own preprocessing: open_clip's, written with transforms that take PIL images and
    uint8 batches alike.

    With `train`, an `Augment` instead of the centre crop.
    """
    config = open_clip.get_model_preprocess_cfg(model)
    size = config["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    interpolation = v2.InterpolationMode(config.get("interpolation", "bicubic"))
    numbers = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    numbers += [v2.Normalize(config["mean"], config["std"]), v2.ToPureTensor()]
    if train:
        return Augment(size, interpolation, v2.Compose(numbers))
    if config.get("resize_mode", "shortest") == "squash":
        crop = [v2.Resize(size, interpolation)]
    else:
        crop = [v2.Resize(min(size), interpolation), v2.CenterCrop(size)]
    return v2.Compose([*crop, *numbers])


def training_transform(clip: Clip, dataset: str) -> Callable:
    """CLIP's augmentation; none for tiny data, which are drawn in so many poses."""
    return clip.preprocess if dataset.startswith("tiny-") else clip.augment


# ---------- 2. Tasks -----------------------------------------------------------------------------
@dataclass
class Task:
    """What one run may see. Transforms are inside."""

    classes: tuple[str, ...]
    train: dict[str, ImageSet]  # by source domain
    tests: dict[str, dict[str, ImageSet]]  # by test, then by domain; "hold-out" may choose a model

    def transformed(self, augment: Callable, preprocess: Callable, cache=None) -> Task:
        """With one transform for training images, which come from a folder of caches if one is
        given, and one transform for all others."""
        train, tests = {}, {}
        for domain, images in self.train.items():
            train[domain] = images.transformed(augment)
            if cache:
                train[domain] = train[domain].cached(cache, domain)
        for test, sets in self.tests.items():
            tests[test] = {name: images.transformed(preprocess) for name, images in sets.items()}
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
        if not len(holdout[name]):
            few = f"only {len(domain.images)} images: too few to hold 20 % out"
            raise InputError(f"domain {name!r} has {few}")
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
    rng = tiny_rng(seed, "few shots")
    labels = images.labels.numpy()
    by_class = np.argsort(labels, kind="stable")
    ends = np.bincount(labels, minlength=len(images.classes)).cumsum()
    chosen = []
    for name, own in zip(images.classes, np.split(by_class, ends[:-1])):
        if not len(own) and not none_ok:
            raise InputError(f"there is no image of class {name!r} to draw {shots} shots from")
        if len(own) < shots:
            few = f"class {name!r} has only {len(own)} images, fewer than {shots} shots"
            print(f"{few}: all are used")
        chosen.append(rng.permutation(own)[:shots])
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


# ---------- 3. CLIP ------------------------------------------------------------------------------
TINY_CLIP = ASSETS / "tiny_clip"  # made by support/pretrain_tiny_clip.py


@dataclass
class Clip:
    """A frozen CLIP with all that belongs to it; see `load_clip`."""

    model: nn.Module
    preprocess: Callable  # transform of test images
    augment: Callable  # transform of training images
    tokenizer: Callable  # texts -> (n, L) int64
    logit_scale: float  # 1 / tau
    device: torch.device
    precision: str
    config: dict  # what `export_clip` writes down
    known: dict = field(default_factory=dict)  # class features that were asked for before
    tower: nn.Module | None = None  # in place of the model's own: `replace(clip, tower=...)`

    @property
    def visual(self) -> nn.Module:
        """The image tower."""
        return self.model.visual if self.tower is None else self.tower

    def encode_text(self, texts: list[str], together: int = 256) -> torch.Tensor:
        """Unit-norm text features (n, D), float32; see `encode_all`."""
        tokens = self.tokenizer(texts).to(self.device)  # (n, L)
        return encode_all(self.model, tokens, together)

    def encode(self, images: ImageSet, workers: int = 0, batch_size: int = 256) -> torch.Tensor:
        """Unit-norm image features (N, D), float32, on the CPU."""
        encoder = image_encoder(self.visual, self.precision)
        images = images.transformed(self.preprocess)
        return outputs(encoder, images, self.device, batch_size, workers)

    def class_features(self, names, templates=("a photo of a {}.",)) -> torch.Tensor:
        """Text features of the classes, unit-norm (C, D): each class averaged over the templates.

        Underscores in names become spaces. ["ensemble"] stands for open_clip's ImageNet templates.
        Raises: InputError if a template has not exactly one `{}`.
        """
        if list(templates) == ["ensemble"]:
            templates = self.ensemble()
        for template in templates:
            if not has_one_place(template):
                raise InputError(f"a template needs {ONE_PLACE}, got {template!r}")
        key = tuple(names), tuple(templates)
        if key not in self.known:
            texts = []
            for name in names:
                texts += [template.format(name.replace("_", " ")) for template in templates]
            features = self.encode_text(texts, len(templates))
            features = features.unflatten(0, (-1, len(templates)))  # (C, templates, D)
            self.known[key] = F.normalize(features.mean(1), dim=-1)
        return self.known[key]

    def ensemble(self) -> list[str]:
        """open_clip's 80 ImageNet templates, or those of them whose words the tiny CLIP knows."""
        templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        if not isinstance(self.tokenizer, WordTokenizer | TinyTokenizer):
            return templates
        known = {*self.tokenizer.words, "{}"}
        return [text for text in templates if not unknown_words(text, known)]


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
    quick_gelu = False
    if ":" not in name:
        pretrained = pretrained or "openai"
        check_weights(name, pretrained)
        tag = open_clip.get_pretrained_cfg(name, pretrained) or {}  # a file has none
        quick_gelu = bool(tag.get("quick_gelu", False))
    logging.disable(logging.ERROR)  # a failing download would say the same thirty times
    try:
        with hub_or_cache(name, pretrained):
            options = {"force_quick_gelu": quick_gelu, "require_pretrained": True}
            model = open_clip.create_model(name, pretrained, **options)
            model_config = open_clip.get_model_config(name)
            tokenizer = tokenizer_of(name, model)
    except Exception as error:  # hub, file system and deserialiser fail in ways of their own
        where = f"{name} ({pretrained or 'its folder'})"
        hint = OFFLINE
        if pretrained and Path(pretrained).is_file():
            hint = f"Needed is a state dict of {name}, .pt or .safetensors."
        raise InputError(
            f"cannot load the weights of {where}: {why_not(error)}\n  {hint}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    model_config["quick_gelu"] = quick_gelu or model_config.get("quick_gelu", False)
    preprocess_config = open_clip.get_model_preprocess_cfg(model)
    if interpolation:
        preprocess_config = {**preprocess_config, "interpolation": interpolation}
        open_clip.set_model_preprocess_cfg(model, preprocess_config)
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess_config}
    own_words = isinstance(tokenizer, WordTokenizer)
    # a key of ours, which open_clip passes over
    config["vocabulary"] = list(tokenizer.words) if own_words else None
    model = model.eval().requires_grad_(False).to(device)
    transforms = image_transform(model), image_transform(model, train=True)
    scale = model.logit_scale.exp().item()
    return Clip(model, *transforms, tokenizer, scale, torch.device(device), precision, config)


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
    Raises: InputError, before anything is written, for numbers that are not finite.
    """
    if parallel.rank():
        return  # the first process writes
    folder = Path(folder)
    tower = (visual or clip.visual).state_dict()
    for key, value in {"class features": class_features, **tower}.items():
        if not value.isfinite().all():
            raise InputError(f"not exported to {folder}: numbers of {key} are not finite")
    weights = clip.model.state_dict()
    weights |= {f"visual.{key}": value for key, value in tower.items()}
    weights = {key: value.cpu().contiguous() for key, value in weights.items()}
    with replacing(folder / "open_clip_model.safetensors") as file:
        save_file(weights, file)
    write_json(folder / "open_clip_config.json", clip.config)
    if isinstance(clip.tokenizer, TinyTokenizer):
        with replacing(folder / MERGES) as file:
            shutil.copyfile(clip.tokenizer.file, file)
    write_json(folder / "classes.json", list(class_names))
    with replacing(folder / "class_features.npy") as file:
        np.save(file, class_features.cpu().numpy())


# ---------- 4. MMD -------------------------------------------------------------------------------
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


# ---------- 5. Evaluation ------------------------------------------------------------------------
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
    """What `function`, images (B, 3, h, w) -> (B, ...), says of all: (N, ...), on the CPU.

    Raises: InputError if it says nan, of which an accuracy would make a class.
    """
    shared = len(images) >= parallel.world_size() > 1
    own = images
    if shared:
        own = images.subset(range(parallel.rank(), len(images), parallel.world_size()))
    options = {"collate_fn": as_is, "num_workers": workers}
    options["pin_memory"] = torch.device(device).type == "cuda"
    found = []
    for x, _ in DataLoader(own, batch_size, **options):
        found.append(function(x.to(device, non_blocking=True)))
        stop_if_asked()
    found = torch.cat(found).cpu()
    if shared:
        found = parallel.gather_outputs(found, len(images))
    if found.isnan().any():
        raise InputError("a model's outputs are nan: try a lower --lr, or look at its weights")
    return found


def evaluate(classify: Callable, tests: dict, device="cpu", workers=0, batch_size=256) -> dict:
    """Accuracy of `classify`, images (B, 3, h, w) -> scores (B, C), in tests {test: {domain: set}}.

    Returns: {test: accuracy over all its images}, in [0, 1]; for a test of several domains also
    {"test/domain": accuracy}.
    """
    measures = {}
    for test, sets in tests.items():
        hits = {}
        for domain, images in sets.items():
            scores = outputs(classify, images, device, batch_size, workers)  # (N, C)
            hits[domain] = (scores.argmax(1) == images.labels).double()
        measures[test] = torch.cat(list(hits.values())).mean().item()
        if len(hits) > 1:
            for domain, own in hits.items():
                measures[f"{test}/{domain}"] = own.mean().item()
    return measures


def published() -> list[dict]:
    """Tables of the papers as they print them, with the command of ours that makes each: {"paper",
    "table", "script", "command", "sets", "columns", "rows": {name: {"ours": row, "accuracy": [%,
    ...]}}, "deviations"}. results/ledger.md shows them beside our numbers."""
    return json.loads((ASSETS / "published.json").read_text())


def main():
    if sys.argv[1:2] == ["table"]:
        table_runs(published())
    else:
        list_data_sets()


if __name__ == "__main__":
    command(main)
