"""LDFS: features for domains known only by their name (Yan et al., arXiv 2405.02586).

All labelled images are photos, say, and the classifier should also work on sketches, known only by the words "a sketch
of a {}". Everything happens on CLIP's frozen, unit-norm output features, in two steps:
  synthesise   a small network per target domain moves an image's feature as its caption moves when the domain's words
               change: "a photo of a red dog on grass" -> "a sketch of a red dog on grass"
  fine-tune    a probe, CLIP-Adapter, CoOp or Tip-Adapter-F learns from the features and the synthesised ones together

    python ldfs.py                                         # tiny-pacs, from photos to the rest, CPU, half a minute
    python ldfs.py --dataset domainnet-mini --source sketch --targets real painting clipart --finetune coop

The paper has no public code; what it leaves open is called "our choice" in --help and explained in the README.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import nn

import common

WORDS = Path(__file__).with_name("assets") / "words.json"  # descriptions of domains, phrases for captions
SOURCES = {"officehome": "Real World", "domainnet": "sketch", "domainnet-mini": "sketch"}  # by default; else photo
# fine-tuning method: learning rate with the tiny CLIP (source hold-out, seeds 1000 and 1001), with others (untested)
FINETUNE = {"probe": (3e-3, 1e-3), "probe-random": (1e-2, 1e-3), "adapter": (1e-2, 1e-3), "coop": (3e-3, 2e-3),
            "tip-adapter": (1e-3, 1e-3)}  # fmt: skip
# A row of a table is a name, where {} stands for --finetune, and the settings that it changes.
NONE, PLAIN = {"direction": "none"}, {"captioner": "template", "sigma": 0.0, "pairwise": 0.0, "reach": 0.0}
LADS = {**PLAIN, "direction": "global", "consistency": 1.0}
ROWS = {"zero-shot": {**NONE, "finetune": "zero-shot"}, "{}": NONE, "{} + text": {**PLAIN, "direction": "additive"},
        "{} + LADS": LADS, "{} + LDFS": {}}  # fmt: skip
STUDIES = {
    "losses": {
        "{}": NONE, "{} + global direction": {"direction": "global", "sigma": 0.0, "pairwise": 0.0},
        "{} + local direction": {"sigma": 0.0, "pairwise": 0.0}, "{} + local, noise": {"pairwise": 0.0},
        "{} + local, pairwise": {"sigma": 0.0}, "{} + LDFS": {},
        "{} + LDFS, reach 0": {"reach": 0.0}, "{} + LDFS, consistency": {"consistency": 1.0},
    },
    "captions": {"{}": NONE, "{} + LDFS, template": {"captioner": "template"}, "{} + LDFS": {}},
    "finetune": {name.replace("{}", method): {**row, "finetune": method} for method in FINETUNE
                 for name, row in (("{}", NONE), ("{} + LADS", LADS), ("{} + LDFS", {}))},
    "sigma": {"{}": NONE, **{f"{{}} + LDFS, sigma {x}": {"sigma": x} for x in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)}},
}  # fmt: skip


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data and model").add_argument
    names = [*common.TINY_BENCHMARKS, "tiny-waterbirds", *common.BENCHMARKS, "waterbirds"]
    data("--dataset", default="tiny-pacs", help=f"{', '.join(names)} or folder:PATH (default: tiny-pacs)")
    data("--data-root", default="data", help="folder that holds the benchmarks' folders (default: data)")
    data("--source", help="domain with labelled images, or all, each in turn (default: photo; officehome Real World, "
         "domainnet and domainnet-mini sketch; waterbirds: always the birds in their usual place)")  # fmt: skip
    data("--targets", nargs="+", help="domains known by name; only the last test sees an image (default: all others)")
    data("--descriptions", nargs="+", default=[], metavar="NAME=TEXT", help="words (default: assets/words.json)")
    data("--cue", type=float, help="tiny data: share of images on their class's background (default: 0.4; birds 0.95)")
    data("--model", help="tiny, open_clip's name, hf-hub:... or local-dir:... (default: tiny for tiny data; ViT-B-16)")
    data("--pretrained", help="open_clip tag or checkpoint file (default: openai)")
    data("--templates", nargs="+", default=["a photo of a {}."], help="zero-shot prompts (default: %(default)s)")
    say = parser.add_argument_group("captions").add_argument
    say("--captioner", choices=("retrieval", "template", "coca", "file"), default="retrieval", help="CLIP's nearest "
        "phrases, only the class, CoCa (a download), --caption-file (default: retrieval, our choice)")  # fmt: skip
    say("--caption-file", type=Path, help='JSON {"path below the data root": "caption"}')
    say("--coca", nargs=2, default=["coca_ViT-L-14", "mscoco_finetuned_laion2b_s13b_b90k"], metavar=("NAME", "TAG"),
        help="captioning model: open_clip's name, and tag or file (default: %(default)s, our choice)")  # fmt: skip
    method = parser.add_argument_group("step 1: one mapper for each target").add_argument
    method("--direction", choices=("local", "global", "additive"), default="local", help="follow each caption's own "
           "direction or its class's, or add it without learning (default: local, published)")  # fmt: skip
    method("--sigma", type=float, help="noise on a coordinate of a text feature (default: 0.03, tiny 0.1; ours)")
    method("--pairwise", type=float, default=1.0, help="weight of the pairwise regularizer (default: 1, our choice)")
    method("--consistency", type=float, default=0.0, help="weight of LADS' class consistency (default: 0, published)")
    method("--reach", type=float, default=1.0, help="least move, in lengths of its caption's (default: 1, our choice)")
    method("--hidden", type=int, default=384, help="width of the mapper (default: 384, published for LADS)")
    method("--mapper-epochs", type=int, default=50, help="the best on the hold-out is kept (default: 50, as LADS)")
    method("--mapper-lr", type=float, default=1e-3, help="of AdamW (default: 1e-3, in LADS' range)")
    method("--weight-decay", type=float, default=0.005, help="of AdamW in both steps (default: 0.005, as LADS)")
    method("--batch-size", type=int, default=256, help="source images in a step, in both steps (default: 256, as LADS)")
    tune = parser.add_argument_group("step 2: fine-tuning").add_argument
    tune("--finetune", choices=FINETUNE, default="probe", help="what learns from the features (default: probe)")
    tune("--epochs", type=int, default=60, help="passes over the source images (default: 60, source hold-out)")
    tune("--lr", type=float, help="of AdamW, at the start of a cosine (default: the table FINETUNE in the file)")
    tune("--study", choices=STUDIES, help="a comparison; writes results/ldfs-<study>-<dataset>.json")
    args = common.run_flags(parser, "<dataset>-<source>-seed<seed>").parse_args()

    if args.study:
        args.summary = args.summary or Path("results", f"ldfs-{args.study}-{common.slug(args.dataset)}.json")
    args = common.settle(args)
    defaults = {"source": SOURCES.get(args.dataset, "photo"), "sigma": 0.1 if args.model == "tiny" else 0.03}
    for name, value in {**defaults, "cue": 0.95 if args.dataset == "tiny-waterbirds" else 0.4}.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    least = dict.fromkeys(("hidden", "mapper_epochs", "batch_size", "epochs"), 1)
    least |= dict.fromkeys(("sigma", "pairwise", "consistency", "reach", "mapper_lr", "weight_decay", "lr"), 0)
    for name, low in least.items():
        if not low <= (low if (value := getattr(args, name)) is None else value) < float("inf"):
            raise common.InputError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    words, given = json.loads(WORDS.read_text()), (text.partition("=")[::2] for text in args.descriptions)
    own = words.get(f"descriptions of {args.dataset}", {}) | {common.slug(name): text for name, text in given}
    args.descriptions = {**words["descriptions"], **own}
    for name, text in args.descriptions.items():
        if "{}" not in text:
            raise common.InputError(f"--descriptions: {name}={text!r} has no {{}} where the name of the thing goes")
    if args.captioner == "file" and not args.caption_file:
        raise common.InputError("--captioner file needs --caption-file, JSON {path below the data root: caption}")
    return args


# ---------- The method: step 1, losses and the mapper; step 2, what learns from the features -------
def local_direction_loss(features, mapped, text_source, text_target, reach: float = 0.0) -> torch.Tensor:
    """A feature should move the way its own caption moves when the words for the domain change.

        L_ld = mean_i ( 1 - cos(dI_i, dT_i) ),    dI_i = M(f_i) - f_i,    dT_i = T(t_i) - T(s_i)

    Near M(f) = f the cosine's gradient is huge, and at M(f) = f it has none. So |dI_i| counts as at least 0.01, or as
    `reach` |dT_i| if that is more: up to there the loss falls linearly along dT_i, from there on it is the cosine.

    Args: features, mapped, text_source, text_target: unit-norm (B, D).
    Returns: a scalar in [0, 2]: 0 where all moves are parallel to their captions' and long enough, 2 where opposite.
    """
    move, text = mapped - features, text_target - text_source  # (B, D)
    length = text.norm(dim=-1).clamp(min=1e-6)
    at_least = torch.maximum(move.norm(dim=-1), (reach * length).clamp(min=0.01))
    return (1 - (move * text).sum(-1) / (at_least * length)).mean()


def global_direction_loss(features, mapped, text_source, text_target, labels=None, reach: float = 0.0) -> torch.Tensor:
    """As `local_direction_loss` with ONE direction, the captions' mean, for all images of a class (LADS), or, without
    labels (B,), for the whole batch."""
    labels = torch.zeros(len(features), device=features.device) if labels is None else labels
    same = (labels[:, None] == labels).to(features.dtype)
    mean = same / same.sum(1, keepdim=True)  # (B, B)
    return local_direction_loss(features, mapped, mean @ text_source, mean @ text_target, reach)


def perturb_text(text_features, sigma: float, generator=None) -> torch.Tensor:
    """Stochastic text features: normalise(T + sigma * noise), Gaussian noise drawn anew; (B, D) -> unit-norm (B, D)."""
    noise = torch.empty_like(text_features).normal_(generator=generator)
    return F.normalize(text_features + sigma * noise, dim=-1)


def pairwise_loss(features, mapped) -> torch.Tensor:
    """Images should be as alike after the mapping as before, unit-norm (B, D) both; 0 for a single image.

    L_pair = mean over pairs i != j of ( cos(M(f_i), M(f_j)) - cos(f_i, f_j) )^2
    """
    change = (mapped @ mapped.T - features @ features.T).square()  # (B, B)
    return (change.sum() - change.diagonal().sum()) / max(1, len(change) * (len(change) - 1))


class Mapper(nn.Module):
    """M(f) = normalise( f + W_2 relu(W_1 f + b_1) + b_2 ), unit-norm (B, D); at first W_2 = b_2 = 0: M(f) = f."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        for parameter in self.layers[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, features):
        return F.normalize(features + self.layers(features), dim=-1)


def mapper_loss(row, mapper, batch, class_features, scale: float, sigma: float) -> torch.Tensor:
    """L = L_ld + pairwise L_pair (+ consistency: cross-entropy of mapped features against the class names, LADS).

    Args: batch: features (B, D), labels (B,), text_source, text_target (B, D); class_features (C, D); scale: 1 / tau.
    """
    features, labels, *texts = batch
    mapped = mapper(features)
    texts = [perturb_text(text, sigma) for text in texts] if sigma else texts
    if row.direction == "global":
        loss = global_direction_loss(features, mapped, *texts, labels, row.reach)
    else:
        loss = local_direction_loss(features, mapped, *texts, row.reach)
    consistency = F.cross_entropy(scale * mapped @ class_features.T, labels)
    return loss + row.pairwise * pairwise_loss(features, mapped) + row.consistency * consistency


def train_mapper(row, train, holdout, class_features, scale: float, seed: int) -> Mapper:
    """The mapper of the epoch with the lowest noise-free loss on the hold-out. train, holdout: see `mapper_loss`."""
    torch.manual_seed(seed)
    mapper, best, kept = Mapper(train[0].shape[1], row.hidden).to(train[0].device), float("inf"), None
    optimizer = torch.optim.AdamW(mapper.parameters(), lr=row.mapper_lr, weight_decay=row.weight_decay)
    for _ in range(row.mapper_epochs):
        for some in torch.randperm(len(train[0])).split(row.batch_size):
            loss = mapper_loss(row, mapper, [x[some] for x in train], class_features, scale, row.sigma)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            loss = mapper_loss(row, mapper, holdout, class_features, scale, sigma=0).item()
        if loss < best:
            best, kept = loss, {name: value.clone() for name, value in mapper.state_dict().items()}
    if kept is None:
        raise common.InputError(f"the mapper's loss is {loss}; try a lower --mapper-lr, now {row.mapper_lr:g}")
    mapper.load_state_dict(kept)
    return mapper.requires_grad_(False)


def make_classifier(row, clip: Clip, class_names, class_features, sets):
    """The start of a fine-tuning method: its parameters, and a function from features (B, D) to logits (B, C).

        probe          s (f W^T + b), from the class features, or from random directions
        adapter        s normalise(0.8 f + 0.2 A(f)) T^T, A with a bottleneck of D / 4 (CLIP-Adapter, Gao et al. 2024)
        coop           s f T(v)^T, class features T of learned words v (Zhou et al. 2022)
        tip-adapter    s f T^T + exp(-5.5 (1 - f K^T)) Y, keys K that start as all features, their labels Y, which weigh
                       as much as 16 per class (Tip-Adapter-F, Zhang et al. 2022)

    Args: class_features T (C, D); sets: (features, labels) of the source and of every synthesised domain. s = 1 / tau.
    """
    s, T = clip.scale, class_features
    if row.finetune == "adapter":
        D = T.shape[1]
        down, up = (nn.Linear(*sizes, bias=False, device=T.device) for sizes in ((D, D // 4), (D // 4, D)))
        layers = nn.Sequential(down, nn.ReLU(), up, nn.ReLU())
        return layers.parameters(), lambda f: s * F.normalize(0.8 * f + 0.2 * layers(f), dim=-1) @ T.T
    if row.finetune == "coop":
        prompts = common.CoOp(clip.model, clip.tokenizer, class_names, device=T.device)
        return prompts.parameters(), lambda f: s * f @ prompts().T
    if row.finetune == "tip-adapter":
        keys, labels = (torch.cat(parts) for parts in zip(*sets))
        keys, values = nn.Parameter(keys), 16 * len(T) / len(labels) * F.one_hot(labels, len(T)).to(T)  # (K, D), (K, C)
        return [keys], lambda f: s * f @ T.T + torch.exp(-5.5 * (1 - f @ keys.T)) @ values
    start = F.normalize(torch.randn_like(T), dim=-1) if row.finetune == "probe-random" else T.clone()
    weight, bias = nn.Parameter(start), nn.Parameter(torch.zeros(len(T), device=T.device))
    return [weight, bias], lambda f: s * (f @ weight.T + bias)


def fine_tune(row, clip: Clip, class_names, class_features, sets, seed: int):
    """Cross-entropy on original and synthesised features, L_con. Returns a function: features (B, D) -> logits (B, C).

    A step sees --batch-size source features and the same share of the others: rows of a table take equally many steps.
    """
    torch.manual_seed(seed)
    parameters, classify = make_classifier(row, clip, class_names, class_features, sets)
    if row.finetune == "zero-shot":
        return classify
    features, labels = (torch.cat(parts) for parts in zip(*sets))
    lr = row.lr or FINETUNE[row.finetune][row.model != "tiny"]
    steps = -(-len(sets[0][0]) // row.batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=row.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, row.epochs * steps)
    for _ in range(row.epochs):
        for some in torch.randperm(len(labels)).tensor_split(steps):
            loss = F.cross_entropy(classify(features[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if not loss.isfinite():
        raise common.InputError(f"the loss of {row.finetune} is {loss.item()}; try a lower --lr, now {lr:g}")
    return classify


# ---------- What CLIP sees and captions say: computed once, then kept ------------------------------
def digest(*parts) -> str:
    """A name that changes with any of its parts: tensors, contents of files (Path), anything else as text."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        part = part.cpu().contiguous().numpy().tobytes() if isinstance(part, torch.Tensor) else part
        part = part.read_bytes() if isinstance(part, Path) else part if isinstance(part, bytes) else str(part).encode()
        state.update(hashlib.blake2b(part).digest())
    return state.hexdigest()


@dataclass
class Seen:
    """Images that were read, a digest of their pixels, and their unit-norm features (N, D)."""

    images: common.ImageSet
    identity: str
    features: torch.Tensor
    labels: torch.Tensor


class Clip:
    """A frozen CLIP, and the folder that keeps what it said, under the names of all that it depends on."""

    def __init__(self, args):
        self.model, self.preprocess, self.tokenizer = common.load_clip(args.model, args.pretrained, args.device)
        self.scale, self.args = self.model.logit_scale.exp().item(), args  # 1 / tau
        code = Path(__file__), Path(common.__file__), WORDS, open_clip.__version__, torch.__version__
        self.identity = digest(*code, self.preprocess, args.precision, args.device, *self.model.state_dict().values())

    def kept(self, what: str, parts, compute):
        """`compute()`, or what it gave before for the same parts, model and code."""
        path = self.args.output / "ldfs" / "cache" / f"{what}-{digest(self.identity, *parts)}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            common.save_checkpoint(path, compute())
        return torch.load(path, weights_only=True)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Unit-norm (n, D); every different text is encoded once."""
        unique, device = list(dict.fromkeys(texts)), self.args.device
        encode = lambda some: self.model.encode_text(self.tokenizer(some).to(device), normalize=True)  # noqa: E731
        compute = lambda: torch.cat([encode(unique[i : i + 256]).float().cpu() for i in range(0, len(unique), 256)])  # noqa: E731
        place = {text: i for i, text in enumerate(unique)}
        return self.kept("texts", unique, compute)[[place[text] for text in texts]].to(device)

    def look(self, images: common.ImageSet) -> Seen:
        """The one place where images are read."""
        args, images = self.args, replace(images, transform=self.preprocess)
        try:
            identity = digest(*([images.images] if torch.is_tensor(images.images) else map(Path, images.images)))
        except OSError as error:
            raise common.InputError(f"cannot read image {error.filename} ({error.strerror})") from None
        encode = common.image_encoder(self.model.visual, args.device, args.precision)
        compute = lambda: common.outputs(encode, images, args.device, 256, args.workers)  # noqa: E731
        features = self.kept("images", [identity], compute)
        return Seen(images, identity, features.to(args.device), images.labels.to(args.device))


# how a caption begins before it says what is in the image: "A black and white photo of a"
OPENING = re.compile(r"^((there (is|are) )?((an?|the) )?([\w-]+ ){0,3}?(photo|photograph|picture|image|painting|sketch|"
                     r"drawing|cartoon|illustration|clipart) (of|with) )?((an?|the) )?", re.IGNORECASE)  # fmt: skip


def subjects(row, clip: Clip, seen: Seen, origin: str) -> list[str]:
    """What is in each image, as a description takes it: "red dog on grass". origin: the description of its domain."""
    names = [name.replace("_", " ") for name in seen.images.classes]
    if row.captioner == "template":
        return [names[label] for label in seen.labels]
    if row.captioner == "file":
        captions = read_captions(row, seen.images)
    elif row.captioner == "retrieval":
        parts = ["retrieval", seen.identity, seen.labels, names, origin, row.dataset]
        captions = clip.kept("captions", parts, lambda: retrieve_captions(row, clip, seen, names, origin))
    else:
        parts = ["coca", seen.identity, *(Path(part) if Path(part).is_file() else part for part in row.coca)]
        captions = clip.kept("captions", parts, lambda: coca_captions(row, seen.images))
    found = [OPENING.sub("", caption.strip(" .\n") + " ").strip() for caption in captions]
    if "" in found:
        caption, image = captions[found.index("")], seen.images.images[found.index("")]
        raise common.InputError(f"--captioner {row.captioner} says {caption!r} of {image}: it names nothing; mend the "
                                "caption, or use --captioner retrieval")  # fmt: skip
    return found


def retrieve_captions(row, clip: Clip, seen: Seen, names, origin: str) -> list[str]:
    """The name of the class with, of every group of phrases, the one whose text is nearest to the image."""
    said = [names[label] for label in seen.labels]
    bank = json.loads(WORDS.read_text())["phrases of the tiny CLIP" if row.model == "tiny" else "phrases"]
    for group, phrases in bank.items():
        if group == "place" and "waterbirds" in row.dataset:  # there the place is the domain
            continue
        texts = [origin.replace("{}", phrase.format(name)) for name in names for phrase in phrases]
        texts = clip.encode_texts(texts).view(len(names), len(phrases), -1)  # (C, P, D)
        nearest = torch.empty_like(seen.labels)
        for label in seen.labels.unique():
            own = seen.labels == label
            nearest[own] = (seen.features[own] @ texts[label].T).argmax(1)
        said = [phrases[i].format(text) for i, text in zip(nearest, said)]
    return said


def read_captions(row, images: common.ImageSet) -> list[str]:
    """The captions of --caption-file, in the order of the images."""
    if torch.is_tensor(images.images):
        raise common.InputError(f"--captioner file needs images in files; those of {row.dataset} are drawn in memory")
    root = row.dataset.removeprefix("folder:") if row.dataset.startswith("folder:") else row.data_root
    paths = [Path(image).relative_to(root).as_posix() for image in images.images]
    try:
        captions = dict(json.loads(row.caption_file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise common.InputError(f"no JSON {{path: caption}} in --caption-file {row.caption_file}: {error}") from None
    if absent := [path for path in paths if path not in captions]:
        raise common.InputError(f"--caption-file {row.caption_file} lacks {len(absent)} of {len(paths)} images, first "
                                f"{absent[0]!r} (a path below {root})")  # fmt: skip
    return [str(captions[path]) for path in paths]


def coca_captions(row, images: common.ImageSet) -> list[str]:
    """Captions by open_clip's CoCa."""
    model, preprocess, tokenizer = common.load_clip(*row.coca, row.device)
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    describe = lambda batch: greedy_captions(model, batch, start, end)  # noqa: E731
    tokens = common.outputs(describe, replace(images, transform=preprocess), row.device, 64, row.workers)
    return [tokenizer.decode(line[1 : line.index(end)]).strip() for line in tokens.tolist()]


@torch.no_grad()
def greedy_captions(model, images, start: int, end: int, length: int = 30) -> torch.Tensor:
    """Word after word the one that CoCa finds likeliest: tokens (B, length), `start`, words, then `end` to the end."""
    latent, tokens = model._encode_image(images)
    text = torch.full((len(images), 1), start, device=images.device)
    while text.shape[1] < length - 1 and (text[:, -1] != end).any():
        logits = model(images, text, image_latent=latent, image_embs=tokens, output_labels=False)["logits"]  # (B, t, V)
        word = torch.where(text[:, -1] == end, end, logits[:, -1].argmax(1))
        text = torch.cat([text, word[:, None]], 1)
    return F.pad(text, (0, length - text.shape[1]), value=end)


# ---------- Tests and figures. made: {target: (features (n, D), labels (n,), places (n,) of their source images)} 
def test(classify, holdout: Seen, source: Seen, targets: dict[str, Seen]) -> dict[str, float]:
    """Accuracy on the source's hold-out, the source, the targets' mean, the mean of both, every target; in [0, 1]."""
    with torch.no_grad():
        accuracy = lambda seen: (classify(seen.features).argmax(1) == seen.labels).double().mean().item()  # noqa: E731
        each, known = {name: accuracy(seen) for name, seen in targets.items()}, accuracy(source)
        mean = float(np.mean([*each.values()]))
        return {"hold-out": accuracy(holdout), "source": known, "target": mean, "average": (known + mean) / 2, **each}


def judge(made: dict, train: Seen, source: Seen, targets: dict[str, Seen]) -> dict[str, float]:
    """What synthesised features are like, averaged over the targets.

    move           mean length |M(f) - f|
    to real shift  cosine of a class's mean move with the difference of its real target and source means
    spread         mean distance of two of the same class; `real spread` that of real ones
    distinct       different images among the nearest real target images, as a share of what is possible
    right class, right domain, both: of the nearest among all real images, of the source and every target
    """
    found, every = [], {"": source, **targets}
    pool, pool_labels = (torch.cat([getattr(seen, part) for seen in every.values()]) for part in ("features", "labels"))
    domains = torch.cat([torch.full_like(seen.labels, i) for i, seen in enumerate(every.values())])
    pairs = lambda x, y: [torch.pdist(x[y == c][:999]).mean().cpu() for c in y.unique() if (y == c).sum() > 1]  # noqa: E731
    nearest = lambda x, to: torch.cat([(some @ to.T).argmax(1) for some in x.split(1024)])  # noqa: E731
    for name, (features, labels, rows) in made.items():
        real, move = targets[name], features - train.features[rows]
        near, image = nearest(features, real.features), nearest(features, pool)
        right, there = pool_labels[image] == labels, domains[image] == [*every].index(name)
        classes = [c for c in labels.unique() if (real.labels == c).any() and (source.labels == c).any()]
        mean = lambda x, y: torch.stack([x[y == c].mean(0) for c in classes])  # noqa: E731
        shift = mean(real.features, real.labels) - mean(source.features, source.labels)
        found.append({
            "move": move.norm(dim=1).mean(), "to real shift": F.cosine_similarity(mean(move, labels), shift).mean(),
            "spread": np.mean(pairs(features, labels)), "real spread": np.mean(pairs(real.features, real.labels)),
            "distinct": len(near.unique()) / min(len(near), len(real.labels)), "right class": right.double().mean(),
            "right domain": there.double().mean(), "both": (right & there).double().mean(),
        })  # fmt: skip
    return {measure: float(np.mean([float(values[measure]) for values in found])) for measure in found[0]}


def plot_neighbours(train: Seen, made: dict[str, dict], targets: dict[str, Seen], path: Path, columns=12) -> None:
    """Figure 4: source images, and below them the real target images nearest to what {row: made} made of them. Frames:
    red, wrong class; blue, or blue sides of a red one, the same image as in a column before."""
    lines = [(row, name) for name in targets for row in ("source", *made)]
    figure, axes = plt.subplots(len(lines), columns, figsize=(columns, 1.08 * len(lines) + 0.5), layout="constrained")
    for (row, name), line in zip(lines, axes):
        (features, labels, rows), real, before = made.get(row, [*made.values()][0])[name], targets[name], set()
        order = labels.argsort(stable=True)[np.linspace(0, len(labels) - 1, columns).astype(int)]
        for i, cell in zip(order, line):
            j = (real.features @ features[i]).argmax().item()
            images, k = (train.images, rows[i].item()) if row == "source" else (real.images, j)
            image = images.images[k]
            cell.imshow(common.read_image(image) if isinstance(image, str) else image.permute(1, 2, 0).numpy())
            cell.set(xticks=[], yticks=[])
            wrong, again = real.labels[j] != labels[i] and row in made, j in before and row in made
            cell.spines[:].set(color="tab:red" if wrong else "tab:blue" if again else "none", linewidth=4)
            cell.spines[["left", "right"]].set_color("tab:blue" if again else "tab:red" if wrong else "none")
            before.add(j)
            if row == "source":
                cell.set_title(train.images.classes[labels[i]].replace("_", " "), fontsize=8)
        line[0].set_ylabel(f"{row.split(' + ')[-1]}\n{name.replace('_', ' ') if row in made else ''}", fontsize=8)
    figure.suptitle("nearest real target images of synthesised features; red: wrong class, blue: repeated", fontsize=10)
    common.save_figure(figure, path)


def plot_features(train: Seen, made: dict[str, dict], targets: dict[str, Seen], path: Path) -> None:
    """Source, synthesised and real target features on the two main axes (PCA) of source and real target."""
    size = {"figsize": (3.6 * len(targets), 3.4 * len(made)), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(len(made), len(targets), **size)
    for panel, (row, name) in zip(axes.flat, [(row, name) for row in made for name in targets]):
        features, _, rows = made[row][name]
        start, real = train.features[rows], targets[name].features
        center = torch.cat([start, real]).mean(0)
        plane = torch.linalg.svd(torch.cat([start, real]) - center, full_matrices=False).Vh[:2]  # (2, D)
        for label, x in (("source", start), ("real target", real), ("synthesised", features)):
            panel.plot(*((x - center) @ plane.T).T.cpu().numpy(), ".", markersize=3, alpha=0.5, label=label)
        panel.set(title=f"{row.split(' + ')[-1]}, {name.replace('_', ' ')}", xticks=[], yticks=[])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=4)
    common.save_figure(figure, path)


# ---------- Runs: who may see what, and when -------------------------------------------------------
@dataclass
class Target:
    """A domain known by its description."""

    name: str
    description: str
    origin: str  # description of the source
    labels: list[int]  # classes of the source that its features are made from: all, but in waterbirds
    images: common.ImageSet  # for the last test only


@dataclass
class Task:
    """A source, 80 % to train on and 20 % held out, what to test it on, and its targets."""

    source: str
    train: common.ImageSet
    holdout: common.ImageSet
    test: common.ImageSet
    targets: list[Target]


def make_task(args, source: str, images: common.ImageSet, index: int, balanced, targets) -> Task:
    """targets: (name, domain it is made from, classes, images) of each; index: the source's, for the split's seed."""
    held_out, rest = (images.subset(rows) for rows in common.domain_split(len(images), index))
    for label, name in enumerate(images.classes):
        if not (rest.labels == label).any() or not len(held_out):
            raise common.InputError(f"source {source!r} ({len(images)} images) has none of class {name!r} to train on, "
                                    "or none to hold out")  # fmt: skip
    for name in [name for target in targets for name in target[:2] if common.slug(name) not in args.descriptions]:
        raise common.InputError(f'no words describe domain {name!r}; add --descriptions "{name}=a ... of a {{}}"')
    words = lambda name: args.descriptions[common.slug(name)]  # noqa: E731
    targets = [Target(name, words(name), words(origin), *known) for name, origin, *known in targets]
    return Task(source, rest, held_out, balanced or held_out, targets)


def load_tasks(args, seed: int) -> list[Task]:
    """A task for every source. Images in files are not read here."""
    if "waterbirds" in args.dataset:
        return [waterbirds(args, seed)]
    domains = common.load_domains(args.dataset, args.data_root, seed, args.cue, also=("tiny-waterbirds", "waterbirds"))
    names, tasks = [domain.name for domain in domains], []
    chosen = [name for text in args.targets or ["all"] for name in common.choose_targets(text, names)]
    for source in common.choose_targets(args.source, names, "source"):
        if source in chosen and args.targets and args.source != "all":
            raise common.InputError(f"--targets names {source!r}, which is the source: its images are known")
        targets = [(d.name, source, [*range(len(d.images.classes))], d.balanced or d.images)
                   for d in domains if d.name in chosen and d.name != source]  # fmt: skip
        index = names.index(source)
        if targets:  # none if --source all meets the only one of --targets
            tasks.append(make_task(args, source, domains[index].images, index, domains[index].balanced, targets))
    return tasks


def waterbirds(args, seed: int) -> Task:
    """Source: training birds in their usual place. Targets: landbirds on water and waterbirds on land, made from the
    source's birds of the same kind."""
    tiny = args.dataset.startswith("tiny-")
    parts = common.load_tiny_waterbirds(seed, args.cue) if tiny else common.load_waterbirds(args.data_root)
    group = lambda part, *groups: parts[part].subset(np.flatnonzero(np.isin(parts[part].groups, groups)))  # noqa: E731
    chosen = [name for text in args.targets or ["all"] for name in common.choose_targets(text, ["water", "land"])]
    targets = ("water", "land", [0], group("test", 1)), ("land", "water", [1], group("test", 2))
    targets = [target for target in targets if target[0] in chosen]
    return make_task(args, "usual places", group("train", 0, 3), 0, group("test", 0, 3), targets)


def synthesise(row, clip: Clip, target: Target, train: Seen, holdout: Seen, class_features, seed: int):
    """Step 1: features (n, D) of a target domain, their labels (n,), and the training images (n,) they come from."""
    parts = []  # of hold-out and training images: features, labels, text_source, text_target
    for seen in (holdout, train):
        said = subjects(row, clip, seen, target.origin)
        words = target.origin, target.description
        texts = [clip.encode_texts([about.replace("{}", x) for x in said]) for about in words]  # (N, D) each
        rows = torch.isin(seen.labels.cpu(), torch.tensor(target.labels)).nonzero()[:, 0]
        parts.append([x[rows] for x in (seen.features, seen.labels, *texts)])
    features, labels, text_source, text_target = parts[1]
    if row.direction == "additive":
        return F.normalize(features + text_target - text_source, dim=-1), labels, rows
    return train_mapper(row, *reversed(parts), class_features, clip.scale, seed)(features), labels, rows


def run(args, clip: Clip, task: Task, seed: int) -> dict:
    """Train and test every row for one source and seed, and write a folder. Returns: {"source", "seed",
    "modes": {row: {measure: accuracy}}, "synthesised": {row: {measure: value}}}."""
    name = "-".join(map(common.slug, [args.dataset, task.source, f"seed{seed}"]))
    with common.run_folder(args.output / "ldfs" / (args.study or "") / name) as folder:
        train, holdout = clip.look(task.train), clip.look(task.holdout)
        zero_shot = common.class_features(clip.model, clip.tokenizer, train.images.classes, args.templates, args.device)
        synthesised, learnt = {}, {}  # rows that differ in step 2 only share step 1
        for name, changes in STUDIES.get(args.study, ROWS).items():
            row, name = argparse.Namespace(**{**vars(args), **changes}), name.replace("{}", args.finetune)
            step_1 = row.direction, row.captioner, row.sigma, row.pairwise, row.consistency, row.reach
            if step_1 not in synthesised:
                synthesised[step_1] = {target.name: synthesise(row, clip, target, train, holdout, zero_shot, seed)
                                       for target in task.targets if row.direction != "none"}  # fmt: skip
            sets = [(train.features, train.labels), *(own[:2] for own in synthesised[step_1].values())]
            learnt[name] = fine_tune(row, clip, train.images.classes, zero_shot, sets, seed), synthesised[step_1]

        # everything is learnt: now images of the targets are read
        source, targets = clip.look(task.test), {target.name: clip.look(target.images) for target in task.targets}
        made = {name: own for name, (_, own) in learnt.items() if own}
        result = {"modes": {name: test(classify, holdout, source, targets) for name, (classify, _) in learnt.items()},
                  "synthesised": {name: judge(own, train, source, targets) for name, own in made.items()}}  # fmt: skip
        if not args.study:
            drawn = {name: made[name] for name in [*made][-2:]}  # LADS and LDFS
            plot_neighbours(train, drawn, targets, folder / "neighbours.png")
            plot_features(train, drawn, targets, folder / "features.png")
        own = {"source": task.source, "seed": seed}
        common.write_json(folder / "result.json", {"settings": {**vars(args), **own}, **result})
    return {**own, **result}


def tables(dataset: str, runs: list[dict]) -> list[str]:
    """Accuracies and the synthesised features' measures; of several sources also target accuracy, source by source."""
    several, made = len({run["source"] for run in runs}) > 1, [{**run, "modes": run["synthesised"]} for run in runs]
    shown = 4 if several else None  # without the single targets
    means = [{**r, "modes": {name: dict([*row.items()][:shown]) for name, row in r["modes"].items()}} for r in runs]
    found = [common.measures_table(f"{dataset}, %", means), common.measures_table("synthesised features, %", made)]
    title, by_source = "target accuracy by source, %", [{**run, "target": run["source"]} for run in runs]
    by_source = common.summary_table(title, [*runs[0]["modes"]], by_source, lambda row: row["target"])
    return [*found, by_source] if several else found


def main():
    args, runs, clip = settings(), [], None
    torch.set_num_threads(1 if args.model == "tiny" else torch.get_num_threads())  # its matrices are too small to share
    print(f"{args.dataset}, model {args.model}, device {args.device}, {args.precision}", flush=True)
    for seed in args.seeds:
        if args.dataset.startswith("tiny-") or not runs:  # real data do not depend on the seed
            tasks = load_tasks(args, seed)
        clip = clip or Clip(args)  # after the data: a missing data set is said before weights are fetched
        for task in tasks:
            print(f"seed {seed}, {task.source}: {len(task.train)} images, {len(task.holdout)} held out", flush=True)
            runs.append(run(args, clip, task, seed))
            print("\n" + "\n\n".join(tables(args.dataset, runs[-1:])) + "\n", flush=True)
    if len(runs) > 1:
        print(f"{len(runs)} runs\n\n" + "\n\n".join(tables(args.dataset, runs)))
    if args.summary:
        common.write_json(args.summary, {"settings": vars(args), "runs": runs})


if __name__ == "__main__":
    common.command(main)
