"""Everything the four method files share, in the order a run uses it.

1. Data         image sets, benchmark folders, tiny stand-ins, splits, batches
2. CLIP         `load_clip` and what travels with a CLIP, learned prompts, export
3. MMD          `mmd2`
4. Evaluation   `evaluate`, `outputs`
5. Settings     flags, and rows of a table that lay their own settings over them
6. Runs         `open_run`: a folder that appears when it is complete, or can be continued
7. Tables       means over targets and seeds, paired differences, what they say
8. Pictures     lines and points, heat map, images, rows of a table

Four words: a **Task** is what one run may see, a **row** is one line of a table, a **run** is one
target and seed, and a **record** is what a run leaves: {"target", "seed", "rows": {row: {measure:
number}}, "extra"}. A measure is a name and a number in [0, 1]; `target/photo`: a part of `target`.

A method file imports this file and libraries, never another method file. `assets/tiny_world.py`
paints the `tiny-` sets and knows the tiny CLIP's words; `InputError` comes from there too.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from assets.benchmarks import (
    DATASETS,
    load_mnist_cifar,
    read_dataset,
    read_folders,
    read_waterbirds_table,
)
from assets.tiny_world import (
    OFFICE_CLASSES,
    PACS_CLASSES,
    TINY_DOMAINS,
    VEHICLES,
    WATERBIRD_CLASSES,
    InputError,
    WordTokenizer,
    draw_digits_and_vehicles,
    draw_domain,
    draw_waterbirds,
    tiny_rng,
)

__all__ = ["tiny_rng"]  # the method files draw with it too
matplotlib.use("Agg")  # no window


# ---------- 1. Data ------------------------------------------------------------------------------
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

    def transformed(self, transform: Callable | None) -> ImageSet:
        return replace(self, transform=transform)

    def subset(self, indices) -> ImageSet:
        indices = np.asarray(indices, dtype=np.int64)
        groups = None if self.groups is None else self.groups[indices]
        return replace(
            self, images=self.images[indices], labels=self.labels[indices], groups=groups
        )

    def of_classes(self, chosen: range) -> ImageSet:
        """The images of a range of classes, which are numbered from 0 again."""
        inside = (self.labels >= chosen.start) & (self.labels < chosen.stop)
        own = self.subset(np.flatnonzero(inside))
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


@dataclass
class Task:
    """What one run may see. Transforms are inside."""

    classes: tuple[str, ...]
    train: dict[str, ImageSet]  # by source domain
    tests: dict[str, dict[str, ImageSet]]  # by test, then by domain; "hold-out" may choose a model


# classes, images per class in the cued training part and in the balanced part of a domain
TINY_BENCHMARKS = {"tiny-pacs": (PACS_CLASSES, 160, 80), "tiny-office": (OFFICE_CLASSES, 80, 40)}


def dataset_names(kind: str) -> list[str]:
    """Names of data sets with "domains", or of those with fixed "parts"."""
    drawn = {"domains": [*TINY_BENCHMARKS], "parts": ["tiny-waterbirds", "tiny-mnist-cifar"]}[kind]
    return drawn + [name for name, row in DATASETS.items() if row["kind"] == kind]


def load_domains(name: str, root="data", seed: int = 0, cue: float = 0.4, also=()) -> list[Domain]:
    """Every domain of a benchmark, sorted by name.

    Args:
        name: one of `dataset_names("domains")`, or `folder:PATH` for PATH/<domain>/<class>/<image>.
        root: the folder that holds the benchmarks' folders.
        seed, cue: of tiny sets: which images are drawn, and how often (0 ... 1) a training image
            stands on its class's own background; 1/8 is independence.
        also: names of other data sets, for the message about an unknown one.
    Raises: InputError for an unknown name, or a folder that is missing or not in the layout.
    """
    if name in TINY_BENCHMARKS:
        return [tiny_domain(name, domain, seed, cue) for domain in TINY_DOMAINS]
    if name.startswith("folder:"):
        path = Path(name.removeprefix("folder:"))
        if not path.is_dir():
            raise InputError(f"no folder {path}; it should hold <domain>/<class>/<image>")
        names = [entry.name for entry in path.iterdir() if entry.is_dir()]
        row = {"domains": sorted(name for name in names if not name.startswith("."))}
        return [Domain(*item) for item in image_sets(*read_folders(path, row)).items()]
    names = [*dataset_names("domains"), *also]
    if name not in DATASETS or name not in names:
        hint = did_you_mean(name, names)
        raise InputError(
            f"unknown data set {name!r}{hint} Choose from {', '.join(names)}, or folder:PATH."
        )
    sets = image_sets(*read_dataset(name, root))
    if name == "domainnet-mini":  # which has a test list for every domain
        domains = DATASETS[name]["domains"]
        return [Domain(domain, sets[domain], sets[f"{domain} test"]) for domain in domains]
    return [Domain(*item) for item in sets.items()]


def load_parts(name: str, root="data", seed=0, cue=0.95, download=False) -> dict[str, ImageSet]:
    """A data set with fixed parts: train, val and test, or those that it has.

    Args: seed, cue: of what is drawn or composed; download: fetch MNIST and CIFAR-10 if missing.
    Raises: InputError if the folder, its lists or its images are missing or not in the layout.
    """
    if name == "tiny-waterbirds":
        return drawn_parts(draw_waterbirds(seed, cue), WATERBIRD_CLASSES)
    if name == "tiny-mnist-cifar":
        return drawn_parts(draw_digits_and_vehicles(seed), VEHICLES)
    if name == "mnist-cifar":
        return drawn_parts(load_mnist_cifar(root, seed, download), VEHICLES)
    sets = image_sets(*read_dataset(name, root))
    if name != "waterbirds":
        return sets
    table = read_waterbirds_table(Path(root) / DATASETS[name]["folder"])
    for number, part in enumerate(sets):
        places = [2 * y + place for _, y, split, place in table if split == number]
        sets[part].groups = torch.tensor(places)
    return sets


def drawn_parts(drawn: dict, classes: tuple[str, ...]) -> dict[str, ImageSet]:
    return {part: ImageSet(x, y, classes, groups) for part, (x, y, groups) in drawn.items()}


def image_sets(classes, parts: dict[str, list]) -> dict[str, ImageSet]:
    """Image sets of {part: [(file, label), ...]}."""
    sets = {}
    for part, items in parts.items():
        files, labels = zip(*items)
        sets[part] = ImageSet(np.array([*map(str, files)]), torch.tensor(labels), tuple(classes))
    return sets


def tiny_domain(name: str, domain: str, seed: int, cue: float) -> Domain:
    """Draw one domain of a tiny benchmark: its cued training part and its balanced part."""
    classes, *sizes = TINY_BENCHMARKS[name]
    parts = []
    for pixels, labels, groups in draw_domain(name, classes, domain, seed, cue, sizes):
        parts.append(ImageSet(pixels, labels, classes, groups))
    return Domain(domain, *parts)


def read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise InputError(f"cannot read image {path} ({error}); mend it or remove it") from None


def image_transform(model: nn.Module, train: bool = False) -> Callable:
    """The model's own preprocessing: open_clip's, written with transforms that take PIL images and
    uint8 batches alike.

    With `train`, RandomResizedCrop (scale 0.7 ... 1) and a horizontal flip instead of the centre
    crop (CLIPood, Sec. 4.1).
    """
    config = open_clip.get_model_preprocess_cfg(model)
    size = config["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    interpolation = v2.InterpolationMode(config.get("interpolation", "bicubic"))
    if train:
        crop = [v2.RandomResizedCrop(size, (0.7, 1.0), interpolation=interpolation)]
        crop.append(v2.RandomHorizontalFlip())
    elif config.get("resize_mode", "shortest") == "squash":
        crop = [v2.Resize(size, interpolation)]
    else:
        crop = [v2.Resize(min(size), interpolation), v2.CenterCrop(size)]
    numbers = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    numbers += [v2.Normalize(config["mean"], config["std"]), v2.ToPureTensor()]
    return v2.Compose([*crop, *numbers])


def did_you_mean(wrong: str, names) -> str:
    names = {name.lower(): name for name in names}
    close = difflib.get_close_matches(wrong.lower(), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)." if close else "."


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


def leave_one_out(domains: list[Domain], target: str, preprocess, augment) -> Task:
    """Train on 80 % of all domains but `target`.

    Tests: "hold-out", the other 20 % of the sources, the only images that may choose a model;
    "source" and "target", the balanced parts of tiny domains. A real domain has none: then the
    target is tested on all its images, and no "source", which would be the hold-out again.
    """
    train, holdout, source, tested = {}, {}, {}, {}
    for index, domain in enumerate(domains):
        balanced = domain.balanced and domain.balanced.transformed(preprocess)
        if domain.name == target:
            tested[target] = balanced or domain.images.transformed(preprocess)
            continue
        held_out, rest = domain_split(len(domain.images), index)
        if not len(held_out):
            few = f"only {len(domain.images)} images: too few to hold 20 % out"
            raise InputError(f"domain {domain.name!r} has {few}")
        train[domain.name] = domain.images.subset(rest).transformed(augment)
        holdout[domain.name] = domain.images.subset(held_out).transformed(preprocess)
        if balanced:
            source[domain.name] = balanced
    tests = {"hold-out": holdout, "source": source, "target": tested}
    return Task(
        domains[0].images.classes, train, {name: sets for name, sets in tests.items() if sets}
    )


def training_transform(clip: Clip, dataset: str) -> Callable:
    """CLIP's augmentation; none for tiny data, which are drawn in so many poses."""
    return clip.preprocess if dataset.startswith("tiny-") else clip.augment


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

    Yields: images (S * per_domain, 3, h, w), labels and domain numbers (S * per_domain,), domain
    after domain.
    """
    iterators = []
    for index, images in enumerate(sets.values()):
        generator = torch.Generator().manual_seed(seed * 1000 + index)
        sampler = EndlessSampler(len(images), generator)
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        options |= {"sampler": sampler, "generator": generator, "collate_fn": as_is}
        iterators.append(iter(DataLoader(images, per_domain, **options)))
    domain = torch.arange(len(sets)).repeat_interleave(per_domain)
    while True:
        images, labels = zip(*(next(iterator) for iterator in iterators))
        yield torch.cat(images), torch.cat(labels), domain


# ---------- 2. CLIP ------------------------------------------------------------------------------
TINY_CLIP = Path(__file__).parent / "assets" / "tiny_clip"  # made by assets/pretrain_tiny_clip.py


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

    @property
    def visual(self) -> nn.Module:
        """The image tower."""
        return self.model.visual

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """Unit-norm text features (n, D), float32."""
        tokens = self.tokenizer(texts).to(self.device)  # (n, L)
        return self.model.encode_text(tokens, normalize=True)

    def encode(self, images: ImageSet, workers: int = 0, batch_size: int = 256) -> torch.Tensor:
        """Unit-norm image features (N, D), float32, on the CPU."""
        encoder = image_encoder(self.visual, self.precision)
        images = images.transformed(self.preprocess)
        return outputs(encoder, images, self.device, batch_size, workers)

    def class_features(self, names, templates=("a photo of a {}.",)) -> torch.Tensor:
        """Text features of the classes, unit-norm (C, D): each class averaged over the templates.

        Underscores in names become spaces. ["ensemble"] stands for open_clip's ImageNet templates.
        Raises: InputError if a template has no `{}`.
        """
        if list(templates) == ["ensemble"]:
            templates = self.ensemble()
        for template in templates:
            if "{}" not in template:
                raise InputError(
                    f"a template needs {{}} where the class name goes, got {template!r}"
                )
        features = []
        for name in names:
            texts = [template.format(name.replace("_", " ")) for template in templates]
            features.append(self.encode_text(texts).mean(0))
        return F.normalize(torch.stack(features), dim=-1)

    def ensemble(self) -> list[str]:
        """open_clip's 80 ImageNet templates, or those of them whose words the tiny CLIP knows."""
        templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        if not isinstance(self.tokenizer, WordTokenizer):
            return templates
        vocabulary = {*self.tokenizer.tokens, "{}"}
        return [text for text in templates if vocabulary.issuperset(WordTokenizer.words(text))]


def load_clip(name="tiny", pretrained=None, device="cpu", precision="fp32") -> Clip:
    """Load a frozen CLIP, its weights in float32.

    Args:
        name: `tiny` (shipped), any open_clip model name, `hf-hub:ORG/NAME` or `local-dir:PATH`.
        pretrained: for an open_clip name, a tag (default `openai`) or a checkpoint file. OpenAI's
            own weights in a file need a name that ends in `-quickgelu`: the file does not tell its
            activation. For a tag the right one is set here.
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
        options = {"force_quick_gelu": quick_gelu, "require_pretrained": True}
        model = open_clip.create_model(name, pretrained, **options)
        model_config = open_clip.get_model_config(name)
    except Exception as error:  # hub, file system and deserialiser fail in ways of their own
        where, why = f"{name} ({pretrained or 'its folder'})", str(error).splitlines()[0]
        raise InputError(
            f"cannot load the weights of {where}: {why}\n"
            "  Offline? Give a checkpoint file with --pretrained FILE, or use --model tiny."
        ) from error
    finally:
        logging.disable(logging.NOTSET)

    vocabulary = None  # of the tiny CLIP's tokenizer: a key of ours, which open_clip passes over
    if name.startswith("local-dir:"):
        file = Path(name.removeprefix("local-dir:"), "open_clip_config.json")
        vocabulary = json.loads(file.read_text()).get("vocabulary")
    if vocabulary:
        tokenizer = WordTokenizer(vocabulary, model.context_length)
    else:
        tokenizer = open_clip.get_tokenizer(name)
    model_config["quick_gelu"] = quick_gelu or model_config.get("quick_gelu", False)
    preprocess_config = open_clip.get_model_preprocess_cfg(model)
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess_config}
    config["vocabulary"] = vocabulary
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


def text_tower(model: nn.Module) -> nn.Module:
    return getattr(model, "text", model)


def first_word(tokenizer) -> int:
    """Where the first word of a tokenised text stands: after a start token, if there is one."""
    return int(tokenizer("")[0, 0] == tokenizer("a")[0, 0])


def encode_prompts(model, tokens: torch.Tensor, start: int, vectors: torch.Tensor) -> torch.Tensor:
    """Text features, unit-norm (n, D), of prompts in which learned vectors stand in for words.

    Args:
        tokens: (n, L).
        vectors: (m, W), or (n, m, W) if every prompt has its own: the word embeddings at places
            start ... start + m - 1. Gradients flow to them.
    """

    def replace_words(module, arguments, embedded):  # (n, L, W)
        own = vectors.to(embedded.dtype).expand(len(embedded), -1, -1)  # (n, m, W)
        end = start + own.shape[1]
        return torch.cat([embedded[:, :start], own, embedded[:, end:]], 1)

    handle = text_tower(model).token_embedding.register_forward_hook(replace_words)
    try:
        return model.encode_text(tokens, normalize=True)
    finally:
        handle.remove()


class CoOp(nn.Module):
    """Learned context in front of the class names, the same for all (Zhou et al., 2022, Eq. 2).

        prompt of class c = v_1 ... v_m [name of c].        v (m, W): the only parameters

    Args: context: a text, from whose word embeddings v starts (at the zero-shot prompt), or m, for
    a random start as in the paper (standard deviation 0.02, from torch's generator).
    """

    def __init__(self, clip: Clip, class_names, context: str | int = "a photo of a"):
        super().__init__()
        self.clip = clip  # no module, so that CLIP's weights are none of ours
        self.start = first_word(clip.tokenizer)
        embedding = text_tower(clip.model).token_embedding
        if isinstance(context, str):
            words = clip.tokenizer(context)[0]
            end = int(words.argmax())  # the end token has the highest number
            vectors = embedding(words[self.start : end].to(clip.device))
        else:
            vectors = 0.02 * torch.randn(context, embedding.embedding_dim).to(clip.device)
        self.context = nn.Parameter(vectors.detach().float())  # (m, W)
        room = "a " * len(vectors)  # words that the vectors stand in for
        texts = [f"{room}{name.replace('_', ' ')}." for name in class_names]
        self.tokens = clip.tokenizer(texts).to(clip.device)  # (C, L)

    def forward(self) -> torch.Tensor:
        """Class features, unit-norm (C, D)."""
        return encode_prompts(self.clip.model, self.tokens, self.start, self.context)

    def fit(self, x, y, batch_size: int = 36, steps: int = 200, lr: float = 2e-3) -> torch.Tensor:
        """Learn the context from unit-norm image features x (N, D) and labels y (N,) by
        cross-entropy. Returns class features (C, D).

        Batches come from torch's generator. Adam and steps are our choice (published: SGD).
        """
        optimizer = torch.optim.Adam(self.parameters(), lr)
        device = self.context.device
        for _ in range(steps):
            some = torch.randint(len(x), (batch_size,))
            logits = self.clip.logit_scale * x[some].to(device) @ self().T  # (B, C)
            loss = F.cross_entropy(logits, y[some].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self().detach()


def export_clip(clip: Clip, folder, class_features, class_names, visual=None) -> None:
    """Write a plain open_clip folder: `open_clip.create_model("local-dir:FOLDER")` loads it with
    none of our code.

    `visual` takes the place of the model's own image tower. `class_features.npy` (C, D) and
    `classes.json` lie beside the weights, so that the classifier is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = clip.model.state_dict()
    for key, value in (visual or clip.visual).state_dict().items():
        weights[f"visual.{key}"] = value
    weights = {key: value.cpu().contiguous() for key, value in weights.items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    write_json(folder / "open_clip_config.json", clip.config)
    write_json(folder / "classes.json", list(class_names))
    np.save(folder / "class_features.npy", class_features.cpu().numpy())


# ---------- 3. MMD -------------------------------------------------------------------------------
def mmd2(x: torch.Tensor, y: torch.Tensor, bandwidths=None) -> torch.Tensor:
    """Squared maximum mean discrepancy of samples x (n, D) and y (m, D), the biased estimator.

        k(x, y) = mean over bandwidths b of exp(-|x - y|^2 / b)
        MMD^2   = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)      (all pairs, also the diagonal)

    bandwidths: positive numbers, in squared units of x. Default (our choice): 1/4, 1/2, 1, 2, 4
    times the median squared distance between different points of the joint sample, through which
    no gradient flows.

    Returns: a scalar >= 0, zero for identical samples; differentiable also where points coincide.
    Raises: ValueError if shapes do not fit or a bandwidth is not positive.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"mmd2 needs x (n, D) and y (m, D), not empty, got {shapes}")
    joint = torch.cat([x, y])
    if joint.dtype in (torch.float16, torch.bfloat16):
        joint = joint.float()
    distance = torch.cdist(joint, joint, compute_mode="donot_use_mm_for_euclid_dist").square()
    if bandwidths is None:
        off_diagonal = ~torch.eye(len(joint), dtype=torch.bool, device=x.device)
        median = distance.detach()[off_diagonal].median().clamp(min=1e-6)
        bandwidths = [median * factor for factor in (0.25, 0.5, 1, 2, 4)]
    elif not len(bandwidths) or any(float(b) <= 0 for b in bandwidths):
        raise ValueError(f"bandwidths must be positive numbers, got {bandwidths}")
    kernel = sum(torch.exp(-distance / b) for b in bandwidths) / len(bandwidths)  # (n + m, n + m)
    n = len(x)
    within = kernel[:n, :n].mean() + kernel[n:, n:].mean()
    return (within - 2 * kernel[:n, n:].mean()).clamp(min=0)


# ---------- 4. Evaluation ------------------------------------------------------------------------
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
    """What `function`, images (B, 3, h, w) -> (B, ...), says of all: (N, ...), on the CPU."""
    loader = DataLoader(images, batch_size, collate_fn=as_is, num_workers=workers)
    return torch.cat([function(x.to(device)).cpu() for x, _ in loader])


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


# ---------- 5. Settings --------------------------------------------------------------------------
# A setting is a tuple (name, kind, default, default with the tiny CLIP, help). Its kind says what
# may be given: a function that reads a text or refuses it, a tuple of choices, [kind] for several,
# bool for a switch. A method's own settings may also be set by single rows of its tables.
def at_least(low: float, number: Callable = int) -> Callable:
    """A kind of setting: a finite number that is `low` or more; whole unless `number` is float."""

    def read(text: str):
        try:
            value = number(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not low <= value < math.inf:
            whole = "a whole number" if number is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {whole}, at least {low}, got {text}")
        return value

    return read


def positive(text: str) -> float:
    """A kind of setting: a finite number above 0."""
    value = at_least(0, float)(text)
    if not value:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def share(text: str) -> float:
    """A kind of setting: a number between 0 and 1."""
    value = at_least(0, float)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


COMMON_SETTINGS = [
    ("data-root", str, "data", "data", "folder that holds the benchmarks' folders"),
    ("cue", share, None, None, "tiny data: share of images on their class's background"),
    ("model", str, None, None, "tiny, open_clip's name, hf-hub:... or local-dir:..."),
    ("pretrained", str, None, None, "tag or file (openai; its weights in a FILE: NAME-quickgelu)"),
    ("device", str, "auto", "auto", "auto, cpu, cuda, cuda:1 or mps"),
    ("precision", ("auto", "fp32", "bf16", "fp16"), "auto", "auto", "auto: bf16 where a GPU can"),
    ("workers", at_least(0), None, None, "processes that read images (4; tiny data 0)"),
    ("output", Path, Path("runs"), Path("runs"), "folder of all runs"),
    ("summary", Path, None, None, "also write the records of all runs to this JSON file"),
    ("resume", bool, False, False, "keep complete runs, continue interrupted ones"),
    ("figures", bool, False, False, "write analysis.npz and more pictures into the runs' folders"),
]


TARGET = ("target", str, "sketch", "sketch", "held-out domain: name, its start, number, or all")
PROMPT = ["a photo of a {}."]
TEMPLATES = ("templates", [str], PROMPT, PROMPT, "prompts, averaged; or: ensemble")


class Parser(argparse.ArgumentParser):
    """One line says what is wrong, where argparse would print the usage of all flags before it."""

    def error(self, message):
        raise InputError(message.removeprefix("argument "))


@dataclass(frozen=True)
class Method:
    """What a script has to offer: its settings, and the rows and studies they are compared in."""

    name: str
    settings: list[tuple]
    rows: dict[str, dict]
    studies: dict[str, list[str]]


def add_settings(group, settings: list[tuple]) -> None:
    """Make a flag of every setting. What is not given stays None until `settle`."""
    for name, kind, default, tiny, text in settings:
        if default is not None and kind is not bool:
            text += f" (default: {default}" + (")" if tiny == default else f"; tiny CLIP: {tiny})")
        options = {"help": text.replace("%", "%%"), "default": None}
        if kind is bool:
            options["action"] = "store_true"
        elif isinstance(kind, tuple):
            options["choices"] = kind
        elif isinstance(kind, list):
            options |= {"type": kind[0], "nargs": "+"}
        else:
            options["type"] = kind
        group.add_argument(f"--{name}", **options)


def flags(method: Method, doc: str, modes: list[str], datasets: list[str], more=(), argv=None):
    """Read the command line.

    Args:
        method: its settings become flags.
        doc: the script's docstring, for --help.
        modes: rows that are compared by default; the last one is the method itself.
        datasets: names for --dataset, the default first.
        more: settings of this script that say what a run sees, so that no single row may set them.
    Returns: a namespace in which what was not given is None.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(method.name, description=doc, formatter_class=raw, allow_abbrev=False)
    data = parser.add_argument_group("what is compared, on what")
    names = ", ".join(datasets) + " or folder:PATH" * ("pacs" in datasets)
    data.add_argument("--dataset", default=datasets[0], help=f"{names} (default: {datasets[0]})")
    rows = f"rows of the table, the last is the method: {', '.join(method.rows)}; a row may have "
    rows += f"settings of its own, {modes[-1]}/lr=1e-3 (default: {' '.join(modes)})"
    data.add_argument("--modes", nargs="+", metavar="ROW", help=rows)
    study = "a comparison of the paper in place of --modes; writes results/<method>-<study>-..."
    data.add_argument("--study", choices=method.studies, help=study)
    data.add_argument("--seeds", "--seed", type=at_least(0), nargs="+", default=[0])
    add_settings(data, more)
    add_settings(parser.add_argument_group("method and training"), method.settings)
    add_settings(parser.add_argument_group("model, device, output"), COMMON_SETTINGS)
    args = parser.parse_args(argv)
    if args.study and args.modes:
        raise InputError("--study and --modes both say what to compare: give one of them")
    args.modes = method.studies[args.study] if args.study else args.modes or modes
    args.method, args.more = method, list(more)
    return args


def settle(args: argparse.Namespace, preset: dict | None = None) -> argparse.Namespace:
    """Fill in what was not given, check what can be checked before anything is loaded, read rows.

    Args:
        args: of `flags`.
        preset: {name: default} that comes before those of the settings; it depends on the data set.
    Returns: args, with `rows`: {text: its settings}, see `read_row`.
    Raises: InputError for values that do not go together.
    """
    preset = dict(preset or {})
    tiny_data = args.dataset.startswith("tiny-")
    if args.cue is not None and not tiny_data:
        raise InputError(f"--cue {args.cue} is for tiny data and has no effect on {args.dataset}")
    preset.setdefault("cue", 0.95 if args.dataset == "tiny-waterbirds" else 0.4)
    preset.setdefault("workers", 0 if tiny_data else 4)
    args.model = args.model or preset.get("model") or ("tiny" if tiny_data else "ViT-B-16")
    if args.model == "tiny" and args.pretrained:
        raise InputError(f"--pretrained {args.pretrained} has no effect with --model tiny")
    if args.study:
        name = f"{args.method.name}-{args.study}-{slug(args.dataset)}.json"
        preset.setdefault("summary", Path("results", name))
    for name, _, default, tiny, _ in [*COMMON_SETTINGS, *args.more, *args.method.settings]:
        key = name.replace("-", "_")
        if getattr(args, key) is None:
            usual = tiny if args.model == "tiny" else default
            setattr(args, key, preset.get(key, usual))
    if args.summary and not args.summary.parent.is_dir():
        folder = args.summary.parent
        raise InputError(f"--summary {args.summary}: there is no folder {folder}; make it first")
    settle_device(args)
    args.rows = {text: read_row(text, args) for text in args.modes}
    return args


def settle_device(args: argparse.Namespace) -> None:
    """Turn --device and --precision into what is there."""
    wanted = args.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        args.device = torch.device(wanted)
    except RuntimeError:
        hint = "use auto, cpu, cuda, cuda:1 or mps"
        raise InputError(f"--device {wanted!r} is not a device; {hint}") from None
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: PyTorch sees no GPU here; use --device cpu")
    if args.precision == "fp16" and args.device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU: on a CPU use fp32 or bf16")
    if args.precision == "auto":
        bf16 = args.device.type == "cuda" and torch.cuda.is_bf16_supported()
        args.precision = "bf16" if bf16 else "fp32"


def read_row(text: str, args: argparse.Namespace) -> argparse.Namespace:
    """A row `name/setting=value/...`: the command's settings, then its name's, then its own on top.

    Raises: InputError for a name that the method does not have, or a setting that no row may set.
    """
    method = args.method
    name, *own = text.split("/")
    if name not in method.rows:
        hint = did_you_mean(name, method.rows)
        raise InputError(f"--modes: no row {name!r}{hint} Choose from {', '.join(method.rows)}.")
    allowed = [setting[0] for setting in method.settings]
    for setting in own:
        wrong = setting.partition("=")[0]
        if wrong not in allowed or "=" not in setting:
            hint = did_you_mean(wrong, allowed)
            raise InputError(
                f"--modes {text}: cannot read {setting!r}{hint} A row may set "
                f"{', '.join(allowed)}, as in {name}/{allowed[0]}=VALUE."
            )
    parser = Parser(allow_abbrev=False)
    add_settings(parser, method.settings)
    try:
        given = vars(parser.parse_args([f"--{setting}" for setting in own]))
    except InputError as error:
        raise InputError(f"--modes {text}: {error}") from None
    given = {key: value for key, value in given.items() if value is not None}
    return argparse.Namespace(**{**vars(args), **method.rows[name], **given, "name": text})


# ---------- 6. Runs ------------------------------------------------------------------------------
NOT_OF_A_RUN = (  # what changes where and how a run goes, but none of its numbers
    "data_root device workers output resume seeds target source summary figures download study "
    "method more rows clip"
).split()


@dataclass
class Run:
    """One target and seed: the folder it writes, and what it has found so far."""

    folder: Path
    settings: dict
    record: dict  # {"target", "seed", "rows": {row: {measure: number}}, "extra"}
    complete: bool = False
    state: dict | None = None  # of a row that was interrupted

    @property
    def rows(self) -> dict[str, dict]:
        return self.record["rows"]

    @property
    def extra(self) -> dict:
        return self.record["extra"]

    def add(self, row: str, measures: dict[str, float], state: dict | None = None) -> None:
        """A row is finished: print its numbers and keep them, with what others go on from."""
        self.rows[row] = measures
        shown = [f"{name} {100 * x:.1f}" for name, x in measures.items() if "/" not in name]
        print(f"{row}: {', '.join(shown)} %", flush=True)
        self.save(state)

    def save(self, state: dict | None = None) -> None:
        """Replace the checkpoint in one go: a kill while it is written leaves the one before."""
        saved = {"settings": self.settings, "record": self.record, "state": state}
        replace_file(self.folder / "checkpoint.pt", saved)


def replace_file(path: Path, value) -> None:
    """torch.save in one go. Raises: InputError if it cannot be written; the file before stays."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch.save
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}; make room, then --resume") from None


@contextlib.contextmanager
def open_run(args, target: str, seed: int, label: str = ""):
    """A run's folder, the one place where runs touch the disk.

    It appears as OUTPUT/<method>/<study>/<data set>-<label>-<target>-seed<seed> when the run is
    complete; until then it is called .<name>.partial. With --resume a complete run is read
    (`run.complete`) and an interrupted one continued, if its settings are these. A run that fails
    leaves its checkpoint, if it has one, and else nothing.

    Raises: InputError if the place cannot be written, or holds a run with other settings.
    """
    name = slug("-".join(part for part in (args.dataset, label, target, f"seed{seed}") if part))
    final = args.output / args.method.name / (args.study or "") / name
    settings = {k: v for k, v in vars(args).items() if k not in NOT_OF_A_RUN}
    settings = json.loads(json.dumps({**settings, "target": target, "seed": seed}, default=str))
    record = {"target": target, "seed": seed, "rows": {}, "extra": {}}
    run = Run(final.with_name(f".{name}.partial"), settings, record)
    old = final.with_name(f".{name}.old")
    if old.exists() and not final.exists():  # a kill came while the new run took its place
        old.rename(final)
    if args.resume:
        resume(run, final)
    if run.complete:
        yield run
        return
    made = make_folder(run.folder, keep=bool(run.rows or run.state))
    try:
        yield run
        run.record = json.loads(json.dumps(run.record))
        write_json(run.folder / "result.json", {"settings": settings, **run.record})
    except BaseException:
        if (run.folder / "checkpoint.pt").exists():
            print(f"{len(run.rows)} finished rows are kept: --resume continues", flush=True)
        else:
            shutil.rmtree(run.folder, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # it holds other runs, or the checkpoint
                folder.rmdir()
        raise
    if final.exists():
        final.rename(old)
    run.folder.rename(final)
    (final / "checkpoint.pt").unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    run.folder = final


def make_folder(path: Path, keep: bool) -> list[Path]:
    """Make an empty folder (with `keep`, leave what it holds). Returns: the folders above it that
    had to be made, the deepest first. Raises: InputError if it cannot be made."""
    missing_folders = [folder for folder in path.parents if not folder.exists()]
    try:
        if path.exists() and not keep:
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise InputError(
            f"cannot write results to {path.parent}: {why}; choose another --output"
        ) from None
    return missing_folders


def resume(run: Run, final: Path) -> None:
    """Fill a run with what an interrupted one left in its folder, or a complete one in `final`."""
    checkpoint, result = run.folder / "checkpoint.pt", final / "result.json"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        record, found = saved["record"], checkpoint
    elif result.exists():
        record, found = json.loads(result.read_text()), result
        saved = {"settings": record.pop("settings"), "state": None}
    else:
        return
    changed = []
    for key in run.settings:
        before, now = saved["settings"].get(key), run.settings[key]
        if before != now:
            changed.append(f"{key} {before!r}, now {now!r}")
    if changed:
        raise InputError(
            f"--resume: {found} has other settings ({'; '.join(changed)}); give those, or leave "
            "--resume out to start anew"
        )
    run.record, run.state, run.complete = record, saved["state"], found == result
    if run.complete:
        run.folder = final
        (final / "checkpoint.pt").unlink(missing_ok=True)
    print(f"--resume: found {found}", flush=True)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, default=str) + "\n")


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


# ---------- 7. Tables ----------------------------------------------------------------------------
# All of them read records: [{"target", "seed", "rows": {row: {measure: number in [0, 1]}}}, ...]
def percent(values: list[float]) -> str:
    """`62.1` for one value, `62.1 ± 0.4` (mean, sample standard deviation) for several."""
    values = 100 * np.asarray(values, float)
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def format_table(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    """Text columns: names at the left, cells at the right of their columns."""
    cells = [[title, *columns], *([name, *row] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for name, *row in cells:
        aligned = [cell.rjust(width) for cell, width in zip(row, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def seed_means(records: list[dict], row: str, measure: str) -> list[float]:
    """A row's number averaged over targets, for every seed; [] where it has none."""
    by_seed = {}
    for record in records:
        if measure in record["rows"][row]:
            by_seed.setdefault(record["seed"], []).append(record["rows"][row][measure])
    return [float(np.mean(values)) for values in by_seed.values()]


def paired(records: list[dict], row: str, other: str, measure: str) -> tuple[float, float, int]:
    """What a row is above another. Both saw the same images in every run, so differences are taken
    within runs and averaged over the targets of a seed; their spread is that between seeds.

    Returns: (mean, standard error over seeds, number of seeds); nan for the error of one seed.
    """
    gains = np.subtract(seed_means(records, row, measure), seed_means(records, other, measure))
    error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else math.nan
    return float(gains.mean()), float(error), len(gains)


def gain(mean: float, error: float, seeds: int) -> str:
    """`+1.3 (se 0.8, 5 seeds)`, in percentage points; see `paired`."""
    spread = f"se {100 * error:.1f}, {seeds} seeds" if seeds > 1 else "1 seed"
    return f"{100 * mean:+.1f} ({spread})"


def measures_of(records: list[dict]) -> list[str]:
    """What tables show: the measures of the row that has most, without parts `target/photo`."""
    longest = max(records[0]["rows"].values(), key=len)
    return [name for name in longest if "/" not in name]


def table(title: str, records: list[dict], versus: str | None = None) -> str:
    """A column for each measure: averages over the targets of a seed, mean ± deviation over seeds,
    - where a row lacks it. With `versus`, a measure: what the last row gains over each other."""
    measures, rows = measures_of(records), {}
    *_, last = records[0]["rows"]
    for row in records[0]["rows"]:
        numbers = [seed_means(records, row, measure) for measure in measures]
        rows[row] = [percent(values) if values else "-" for values in numbers]
        if versus:
            both = seed_means(records, row, versus) and seed_means(records, last, versus)
            differ = row != last and both
            rows[row].append(gain(*paired(records, last, row, versus)) if differ else "-")
    return format_table(title, [*measures, "last minus this"] if versus else measures, rows)


def target_table(title: str, records: list[dict], measure: str = "target") -> str:
    """The papers' table: a column for each target and for their average, mean ± deviation."""
    targets = list(dict.fromkeys(record["target"] for record in records))
    rows = {}
    for row in records[0]["rows"]:
        columns = []
        for target in targets:
            own = [record for record in records if record["target"] == target]
            columns.append(seed_means(own, row, measure))
        columns.append(seed_means(records, row, measure))
        rows[row] = [percent(values) if values else "-" for values in columns]
    return format_table(title, [*targets, "average"], rows)


def closing_line(records: list[dict], measure: str = "target") -> str:
    """What the table says: which row is best, by how much, and whether seeds agree on that."""
    means = {row: seed_means(records, row, measure) for row in records[0]["rows"]}
    means = {row: np.mean(values) for row, values in means.items() if values}
    *_, last = means
    best, *others = sorted(means, key=means.get, reverse=True)
    text = f"Best {measure} accuracy: {best}, {100 * means[best]:.1f} %."
    if best != last:
        others = [last]
    for other in others[:1]:
        mean, error, seeds = paired(records, best, other, measure)
        text += f" It is {gain(mean, error, seeds)} above {other}: "
        if seeds == 1:
            text += "one seed says nothing about chance, try --seeds 0 1 2 3 4."
        elif mean > 2 * error:
            text += "more than two standard errors."
        else:
            text += "less than two standard errors, seeds do not agree on it."
    return text


def report(args, records: list[dict], measure: str = "target") -> None:
    """Tables over all runs, what they say, and which files were written."""
    title = f"{args.dataset}, {len(records)} run{'s' * (len(records) > 1)}, %"
    print("\n" + table(title, records, measure if len(records) > 1 else None))
    if len({record["target"] for record in records}) > 1:
        print("\n" + target_table(f"{args.dataset}, {measure} accuracy, %", records, measure))
    print("\n" + closing_line(records, measure))
    print(f"Runs are in {args.output / args.method.name / (args.study or '')}/")
    if args.summary:
        settings = {
            k: v for k, v in vars(args).items() if k not in ("method", "rows", "more", "clip")
        }
        write_json(args.summary, {"settings": settings, "records": records})
        print(f"Records are in {args.summary}")
    if args.study:
        plot_rows(records, measures_of(records), args.summary.with_suffix(".png"))
        print(f"A picture is in {args.summary.with_suffix('.png')}")


# ---------- 8. Pictures --------------------------------------------------------------------------
def save_figure(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def add_legend(figure, axes, panels: int) -> None:
    """Below the panels, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if not any(labels):
        return
    columns = max(1, 45 * panels // (6 + max(map(len, labels))))
    lines = (len(labels) - 1) // columns
    figure.set_figheight(figure.get_figheight() + 0.2 * lines)
    columns = min(len(labels), columns)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")


def plot_panels(
    panels: dict, x_label: str, y_label: str, path: Path, style="lines", **axes
) -> None:
    """A panel for each title of {title: {label: (x, y)}}: lines, where y (n,) or, for mean and
    deviation, (n, seeds); or, with style "points", points."""
    size = (4.2 * len(panels), 3.6)
    figure, row = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for panel, (title, curves) in zip(row[0], panels.items()):
        for label, (x, y) in curves.items():
            if style == "points":
                panel.scatter(x, y, s=10 if len(x) > 100 else 30, alpha=0.7, label=label)
                continue
            y = np.asarray(y).reshape(len(x), -1)
            error = y.std(1, ddof=1) if y.shape[1] > 1 else None
            marker = "." if len(x) < 50 else ""
            panel.errorbar(x, y.mean(1), error, marker=marker, capsize=3, label=label)
        panel.set(title=title, xlabel=x_label, ylabel=y_label, **axes)
    add_legend(figure, row[0, -1], len(panels))
    save_figure(figure, path)


def plot_rows(records: list[dict], measures: list[str], path: Path) -> None:
    """Every row's numbers, rows one below the other: averages over targets, mean and deviation over
    seeds; a panel for each measure."""
    rows = list(records[0]["rows"])
    size = (1.5 + 3 * len(measures), 1.2 + 0.28 * len(rows))
    options = {"figsize": size, "layout": "constrained", "squeeze": False, "sharey": True}
    figure, panels = plt.subplots(1, len(measures), **options)
    for panel, measure in zip(panels[0], measures):
        for place, row in enumerate(rows):
            values = 100 * np.array(seed_means(records, row, measure))
            if len(values):
                error = values.std(ddof=1) if len(values) > 1 else None
                panel.errorbar(values.mean(), place, xerr=error, capsize=3, fmt="o", color="C0")
        panel.set(title=measure, xlabel="%")
        panel.grid(axis="x", alpha=0.3)
    panels[0, 0].set_yticks(range(len(rows)), rows)
    panels[0, 0].invert_yaxis()  # the first row on top
    save_figure(figure, path)


def plot_heat(
    values, title: str, x_label: str, y_label: str, path, center=None, names=None
) -> None:
    """A table (rows, columns) of numbers as colours, written into the cells where they fit.

    center: the value that is white, red above and blue below it. names: (of columns, of rows) in
    place of numbers from 1.
    """
    values = np.asarray(values)
    rows, columns = values.shape
    names = names or (range(1, columns + 1), range(1, rows + 1))
    size = (2.2 + 0.5 * columns, 1.6 + 0.42 * rows)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    scale = {}
    if center is not None:
        reach = max(0.05, np.abs(values - center).max())
        scale = {"cmap": "RdBu_r", "vmin": center - reach, "vmax": center + reach}
    image = axes.imshow(values, aspect="auto", **scale)
    for row, column in np.ndindex(values.shape) if columns <= 20 else ():
        r, g, b, _ = image.cmap(image.norm(values[row, column]))
        ink = "white" if 0.3 * r + 0.6 * g + 0.1 * b < 0.5 else "black"
        cell = {"ha": "center", "va": "center", "fontsize": 8, "color": ink}
        axes.text(column, row, f"{values[row, column]:.2f}", **cell)
    longest = max(len(str(name)) for name in names[0])
    axes.set_xticks(range(columns), names[0], rotation=90 if longest > 3 else 0)
    axes.set_yticks(range(rows), names[1])
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    figure.colorbar(image)
    save_figure(figure, path)


def plot_images(rows: dict[str, list], path: Path, titles=None, frames=None) -> None:
    """A line of pictures (h, w, 3) or (h, w) for each label.

    titles: above the first line. frames: {label: a colour or None for each of its pictures}.
    """
    columns = max(map(len, rows.values()))
    size = (1.3 + columns, 1.08 * len(rows) + 0.4)
    figure, grid = plt.subplots(
        len(rows), columns, figsize=size, layout="constrained", squeeze=False
    )
    for cells, (label, pictures) in zip(grid, rows.items()):
        cells[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        colors = (frames or {}).get(label, [None] * len(pictures))
        for cell, picture, color in zip(cells, pictures, colors):
            cell.imshow(np.asarray(picture))
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set(color=color or "none", linewidth=4)
    for cell, title in zip(grid[0], titles or ()):
        cell.set_title(title, fontsize=8)
    save_figure(figure, path)
