"""LDFS: features for domains known only by their name (Yan et al., 2024, arXiv 2405.02586).

All labelled images are photos, say, and the classifier should also work on sketches, known only by
the words "a sketch of a {}". What is learnt from photos alone makes CLIP worse on sketches.
Everything happens on CLIP's frozen, unit-norm output features, in two steps:

1. synthesise: a small network per target domain, trained with L_ld + L_pair, moves an image's
   feature as its caption moves: "a photo of a dog on grass" -> "a sketch of a dog on grass"
2. fine-tune: a probe, CLIP-Adapter, CoOp or Tip-Adapter-F learns from both features (L_con)

    python ldfs.py                        # tiny-pacs, from photos to the rest, on a CPU
    python ldfs.py --dataset domainnet-mini --source sketch --targets real painting --finetune coop

The paper has no public code: what it leaves open is called "our choice" in --help.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from support.adapters import Adapter, Probe, TipAdapter
from support.quality import nearest, synthesis_quality
from support.words import WATERBIRDS, WORDS, subjects, text_features


# ---------- Step 1: what a synthesised feature should be -----------------------------------------
def local_direction_loss(features, mapped, text_source, text_target, reach: float = 0.0):
    """A feature should move the way its own caption moves when the words for the domain change.

        L_ld = mean_i ( 1 - cos(dI_i, dT_i) ),    dI_i = M(f_i) - f_i,    dT_i = T(t_i) - T(s_i)

    Near M(f) = f the cosine's gradient is huge, and at M(f) = f it has none. So |dI_i| counts as at
    least 0.01, or as `reach` |dT_i| if that is more (our choice): up to there the loss falls
    linearly along dT_i, from there on it is the cosine.

    Args: features, mapped, text_source, text_target: unit-norm (B, D).
    Returns: a scalar in [0, 2]: 0 where all moves are parallel to their captions' and long enough,
        2 where opposite.
    """
    move = mapped - features  # dI (B, D)
    text = text_target - text_source  # dT (B, D)
    length = text.norm(dim=-1).clamp(min=1e-6)
    shortest = (reach * length).clamp(min=0.01)
    move_length = torch.maximum(move.norm(dim=-1), shortest)
    cosine = (move * text).sum(-1) / (move_length * length)
    return (1 - cosine).mean()


def global_direction_loss(features, mapped, text_source, text_target, labels, reach=0.0):
    """As `local_direction_loss`, but with ONE direction for all images of a class, the mean of
    their captions' (LADS)."""
    same = (labels[:, None] == labels).to(features.dtype)
    mean = same / same.sum(1, keepdim=True)  # (B, B)
    texts = mean @ text_source, mean @ text_target
    return local_direction_loss(features, mapped, *texts, reach)


def perturb_text(text_features, sigma, generator=None):
    """Stochastic text features: normalise(T + sigma * noise), Gaussian noise drawn anew in each
    call, which bridges the gap between texts and images; (B, D) -> unit-norm (B, D)."""
    noise = torch.empty_like(text_features).normal_(generator=generator)
    return F.normalize(text_features + sigma * noise, dim=-1)


def pairwise_loss(features, mapped):
    """Images should be as alike after the mapping as before, unit-norm (B, D) both.

    L_pair = mean over pairs i != j of ( cos(M(f_i), M(f_j)) - cos(f_i, f_j) )^2

    Returns: a scalar, 0 for a single image.
    """
    change = (mapped @ mapped.T - features @ features.T).square()  # (B, B)
    B = len(change)
    total = change.sum() - change.diagonal().sum()
    return total / max(1, B * (B - 1))


# ---------- Step 1: the mapper -------------------------------------------------------------------
class Mapper(nn.Module):
    """M(f) = normalise( f + W_2 relu(W_1 f + b_1) + b_2 ), unit-norm (B, D) -> (B, D).

    W_2 = b_2 = 0 at first: M(f) = f, so that the first step goes along the text. LADS' own mapper
    (`residual=False`) lacks the first f, and starts at random.
    """

    def __init__(self, dim: int, hidden: int, residual: bool = True):
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        if residual:
            for parameter in self.layers[2].parameters():
                nn.init.zeros_(parameter)

    def raw(self, features):
        """Before it is made unit-norm."""
        moved = self.layers(features)
        return features + moved if self.residual else moved

    def forward(self, features):
        return F.normalize(self.raw(features), dim=-1)


def mapper_loss(row, mapper, batch, class_features, scale, sigma, class_weights=None):
    """L = L_ld + pairwise L_pair, and for LADS + consistency L_cc.

    L_cc is the cross-entropy of mapped features against the class names, as in LADS' code: of plain
    cosines (with `temperature=clip`, ours, divided by tau), classes weighted alike. LADS also
    measures moves before they are made unit-norm.

    Args: batch: features (B, D), labels (B,), text_source, text_target (B, D); class_features:
    (C, D); scale: 1 / tau; class_weights: (C,), see `balanced`.
    """
    features, labels, *texts = batch
    raw = mapper.raw(features)
    mapped = F.normalize(raw, dim=-1)
    end = raw if row.mapper == "lads" else mapped
    if sigma:
        texts = [perturb_text(text, sigma) for text in texts]
    if row.direction == "global":
        direction = global_direction_loss(features, end, *texts, labels, row.reach)
    else:
        direction = local_direction_loss(features, end, *texts, row.reach)
    loss = direction + row.pairwise * pairwise_loss(features, mapped)
    if row.consistency:
        cosines = mapped @ class_features.T
        logits = scale * cosines if row.temperature == "clip" else cosines
        loss = loss + row.consistency * F.cross_entropy(logits, labels, class_weights)
    return loss


def balanced(labels, classes: int) -> torch.Tensor:
    """Weights (C,) by which all classes count alike: N / (C n_c)."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return len(labels) / (classes * counts)


def train_mapper(row, train, holdout, class_features, scale, seed):
    """The `Mapper` of the epoch with the lowest noise-free loss on the hold-out, frozen.

    train, holdout: features, labels, text_source, text_target of all images, see `mapper_loss`.
    Raises: InputError if no loss on the hold-out is a number.
    """
    torch.manual_seed(seed)
    features, labels, *_ = train
    mapper = Mapper(features.shape[1], row.hidden, row.mapper == "residual").to(features.device)
    weights = balanced(labels, len(class_features))
    fused = features.device.type == "cuda"
    options = {"lr": row.mapper_lr, "weight_decay": row.weight_decay, "fused": fused}
    watched = common.Steps(torch.optim.AdamW(mapper.parameters(), **options))
    lowest, best = float("inf"), None
    for epoch in range(1, row.mapper_epochs + 1):
        order = torch.randperm(len(features))
        for place, some in enumerate(order.split(row.batch_size), start=1):
            batch = [values[some] for values in train]
            loss = mapper_loss(row, mapper, batch, class_features, scale, row.sigma, weights)
            watched.optimizer.zero_grad()
            loss.backward()
            where = f"the mapper's (--mapper-lr) epoch {epoch}, batch {place} of seed {seed}"
            watched.take(loss, where)
        watched.check()
        loss = holdout_loss(row, mapper, holdout, class_features, scale, weights)
        if loss < lowest:
            lowest, best = loss, copy.deepcopy(mapper.state_dict())
    if best is None:
        hint = f"try a lower --mapper-lr, now {row.mapper_lr:g}"
        raise common.InputError(f"the mapper's loss is {loss}; {hint}")
    mapper.load_state_dict(best)
    return mapper.requires_grad_(False)


@torch.no_grad()
def holdout_loss(row, mapper, holdout, class_features, scale, class_weights) -> float:
    """`mapper_loss` without noise, its mean over batches of 1,024: the pairs of all images at once
    would need memory that grows with the square of their number."""
    count, total = len(holdout[0]), 0.0
    for some in torch.arange(count).split(1024):
        batch = [values[some] for values in holdout]
        loss = mapper_loss(row, mapper, batch, class_features, scale, 0, class_weights)
        total += len(some) / count * loss.item()
    return total


def synthesise(row, clip, targets, train, holdout, class_features, seed) -> dict:
    """Step 1, {target: its `Features`}, made from those of the training images of some classes, in
    their order and with their labels. train, holdout: `Features`; targets: see `load_tasks`."""
    made = {}
    for name, (source_words, target_words, classes) in targets.items():
        parts = []
        for own in (train, holdout):
            captions = subjects(row, clip, own, source_words)  # "red dog on grass"
            text_source = text_features(clip, source_words, captions)  # T(s_i)  (N, D)
            text_target = text_features(clip, target_words, captions)  # T(t_i)  (N, D)
            chosen = of_classes(own.labels, classes)
            values = own.features, own.labels, text_source, text_target
            parts.append([value[chosen] for value in values])
        features, labels, text_source, text_target = parts[0]
        if row.direction == "additive":
            moved = F.normalize(features + text_target - text_source, dim=-1)
        else:
            mapper = train_mapper(row, *parts, class_features, clip.logit_scale, seed)
            moved = mapper(features)
        images = train.images.subset(of_classes(train.labels, classes))
        made[name] = Features(images, moved, labels, features)
    return made


# ---------- Step 2: what learns from the features ------------------------------------------------
def make_classifier(row, clip, class_names, class_features, features, labels):
    """The start of a fine-tuning method: a module whose logits (B, C) come from features (B, D).

    Args: class_features T (C, D); features, labels: all that are learnt from.
    """
    T, scale = class_features, clip.logit_scale
    if row.finetune == "adapter":
        return Adapter(T, scale)
    if row.finetune == "tip-adapter":
        return TipAdapter(T, scale, features, labels)
    if row.finetune == "coop":
        return common.CoOp(clip, class_names)
    if row.finetune == "probe-random":
        return Probe(F.normalize(torch.randn_like(T), dim=-1), scale)
    return Probe(T.clone(), scale)  # "zero-shot" is the probe before it learns


def fine_tune(row, clip, class_names, class_features, sets, seed):
    """Step 2: cross-entropy on original and synthesised features, L_con.

    A step sees --batch-size source features and the same share of the others: all rows of a table
    take equally many steps (our choice; more steps alone change a probe's accuracy).

    Args: sets: (features (n, D), labels (n,)) of the source, then of every synthesised domain.
    Returns: a function, features (B, D) -> logits (B, C).
    Raises: InputError at a loss, gradient or weight that is not finite.
    """
    torch.manual_seed(seed)
    features, labels = (torch.cat(values) for values in zip(*sets))
    model = make_classifier(row, clip, class_names, class_features, features, labels)
    classify = model.logits if row.finetune == "coop" else model
    if row.finetune == "zero-shot":
        return classify
    with_tiny_clip, with_others = LEARNING_RATES[row.finetune]
    lr = row.lr or (with_tiny_clip if row.model == "tiny" else with_others)
    steps = -(-len(sets[0][0]) // row.batch_size)  # an epoch; the last batch may be smaller
    options = {"weight_decay": row.weight_decay, "fused": features.device.type == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), lr, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, row.epochs * steps)
    watched = common.Steps(optimizer)
    for epoch in range(1, row.epochs + 1):
        order = torch.randperm(len(labels))
        for place, some in enumerate(order.tensor_split(steps), start=1):
            loss = F.cross_entropy(classify(features[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            where = f"{row.finetune}'s (--lr) epoch {epoch}, batch {place} of seed {seed}"
            watched.take(loss, where)
            schedule.step()
    watched.check()
    return classify


# ---------- What is measured ---------------------------------------------------------------------
@dataclass
class Features:
    """What CLIP makes of images, or a mapper of what CLIP made of them."""

    images: common.ImageSet
    features: torch.Tensor  # (N, D) unit-norm
    labels: torch.Tensor  # (N,)
    start: torch.Tensor | None = None  # of synthesised features: those that were moved


def encode(clip, images, workers, cache):
    """The one place where images are read. Runs share what is the same for all sources and seeds:
    cache, {pixels or names of files: features}."""
    key = np.asarray(images.images).tobytes()
    if key not in cache:
        features = clip.encode(images, workers)
        cache[key] = features.to(clip.device)
    return Features(images, cache[key], images.labels.to(clip.device))


def of_classes(labels, classes):
    """Places (n,) of the images of these classes."""
    chosen = torch.isin(labels.cpu(), torch.tensor(classes))
    return chosen.nonzero()[:, 0]


@torch.no_grad()
def accuracy(classify, own) -> float:
    hits = classify(own.features).argmax(1) == own.labels
    return hits.double().mean().item()


def accuracies(classify, holdout, source, targets) -> dict[str, float]:
    """On the hold-out, the source, the targets (mean), both (mean), and each target; in [0, 1]."""
    each = {f"target/{name}": accuracy(classify, own) for name, own in targets.items()}
    on_source = accuracy(classify, source)
    on_targets = float(np.mean(list(each.values())))
    return {
        "hold-out": accuracy(classify, holdout),
        "source": on_source,
        "target": on_targets,
        "average": (on_source + on_targets) / 2,
        **each,
    }


def plot_neighbours(made, real, path, columns=12):
    """Figure 4: source images, and below them the real target images nearest to what each row made
    of them. Frames: red, wrong class; blue, the same image as in a column before."""
    pictures, frames = {}, {}
    for row, own in made.items():
        chosen = torch.linspace(0, len(own.labels) - 1, columns).long().tolist()
        images = nearest(own.features[chosen], real.features).tolist()
        pictures["source"] = [own.images.picture(i) for i in chosen]
        pictures[row] = [real.images.picture(i) for i in images]
        frames[row] = [None] * columns
        for column, image in enumerate(images):
            if image in images[:column]:
                frames[row][column] = "tab:blue"
            if real.labels[image] != own.labels[chosen[column]]:
                frames[row][column] = "tab:red"
    common.plot_images(pictures, path, frames=frames)


def write_pictures(args, folder, made, train, targets):
    """Figure 4 for each target, and with --figures all features, for pictures of your own."""
    arrays = {"source": train.features.cpu()}
    for target, real in targets.items():
        rows = {row: own[target] for row, own in made.items() if own}
        if rows and not args.study:
            plot_neighbours(rows, real, folder / f"neighbours-{common.slug(target)}.png")
        arrays[target] = real.features.cpu()
        for row, own in rows.items():
            arrays[f"{target}, {row}"] = own.features.cpu()
    if args.figures:
        common.write_arrays(folder / "analysis.npz", **arrays)


# ---------- Who may see what, and when -----------------------------------------------------------
# in Waterbirds the place is the domain: which place a target is made from, and which birds
OTHER_PLACE = {"water": ("land", [0]), "land": ("water", [1])}


def read_domains(args, seed) -> list[common.Domain]:
    """All domains. Images in files are not read here."""
    data = args.dataset, args.data_root, seed, args.cue
    if args.dataset not in WATERBIRDS:
        return common.load_domains(*data, WATERBIRDS, args.skip_broken)
    parts = common.load_parts(*data, skip_broken=args.skip_broken)
    train, test = parts["train"], parts["test"]
    usual = common.Domain("usual places", of_groups(train, 0, 3), of_groups(test, 0, 3))
    water = common.Domain("water", of_groups(test, 1))  # landbirds there
    land = common.Domain("land", of_groups(test, 2))  # waterbirds there
    return [usual, water, land]


def of_groups(images, *groups: int) -> common.ImageSet:
    """Waterbirds' images of some groups, 2 * bird + place."""
    inside = np.isin(images.groups, groups)
    return images.subset(np.flatnonzero(inside))


def words_for(args, domain):
    """The description of a domain, "a sketch of a {}"."""
    if common.slug(domain) not in args.descriptions:
        hint = f'add --descriptions "{domain}=a ... of a {{}}"'
        raise common.InputError(f"no words describe domain {domain!r}; {hint}")
    return args.descriptions[common.slug(domain)]


def make_task(args, domains, source, others) -> tuple[common.Task, dict]:
    """A task and its targets; see `load_tasks`."""
    split = common.leave_one_out(domains, others[0].name)  # of all but this one
    hold_out = {source: split.tests["hold-out"][source]}
    balanced = split.tests.get("source", hold_out)
    tests = {"hold-out": hold_out, "source": {source: balanced[source]}, "target": {}}
    targets = {}
    for domain in others:
        origin, chosen = source, range(len(split.classes))
        if args.dataset in WATERBIRDS:
            origin, chosen = OTHER_PLACE[domain.name]
        words = words_for(args, origin), words_for(args, domain.name)
        targets[domain.name] = *words, chosen
        tests["target"][domain.name] = domain.balanced or domain.images
    train = {source: split.train[source]}
    return common.Task(split.classes, train, tests), targets


def load_tasks(args, seed):
    """{source: (its task, its targets)}; targets: {name: (words of the images that its features
    are made from, its own words, the classes of these images)}."""
    domains = read_domains(args, seed)
    names = [domain.name for domain in domains]
    chosen = []
    for text in args.targets or ["all"]:
        chosen += common.choose_targets(text, names)
    tasks = {}
    for source in common.choose_targets(args.source, names, "source"):
        if args.targets and args.source != "all" and source in chosen:
            raise common.InputError(f"--targets names {source!r}, the source: its images are known")
        others = [domain for domain in domains if domain.name in chosen and domain.name != source]
        if others:  # none if --source all meets the only one of --targets
            tasks[source] = make_task(args, domains, source, others)
    return tasks


# ---------- Training and tests -------------------------------------------------------------------
def train_and_test(args, clip, task, targets, run, seed, cache) -> None:
    """All rows for one source and seed."""
    read = functools.partial(encode, clip, workers=args.workers, cache=cache)
    train = read(*task.train.values())
    holdout = read(*task.tests["hold-out"].values())
    class_features = clip.class_features(task.classes, args.templates)  # (C, D)
    shared, made, classify = {}, {}, {}
    for name, row in args.rows.items():
        step_1 = tuple(getattr(row, setting) for setting in STEP_1)
        if step_1 not in shared:  # by rows that differ in step 2 only
            features = {}
            if row.direction != "none":
                features = synthesise(row, clip, targets, train, holdout, class_features, seed)
            shared[step_1] = features
        made[name] = shared[step_1]
        sets = [(own.features, own.labels) for own in (train, *made[name].values())]
        classify[name] = fine_tune(row, clip, task.classes, class_features, sets, seed)

    # Everything is learnt. Only now images of the targets are read.
    source = read(*task.tests["source"].values())
    real = {name: read(images) for name, images in task.tests["target"].items()}
    write_pictures(args, run.folder, made, train, real)
    run.extra["synthesised"] = {}
    for name in args.rows:
        if made[name]:
            run.extra["synthesised"][name] = synthesis_quality(made[name], source, real)
        run.add(name, accuracies(classify[name], holdout, source, real))


# ---------- What the paper compares --------------------------------------------------------------
# A name stands for settings; a row may lay its own over them: "ldfs/sigma=0.1".
NOT_LDFS = {"captioner": "template", "sigma": 0.0, "pairwise": 0.0, "reach": 0.0}
ROWS = {
    "zero-shot": {"direction": "none", "finetune": "zero-shot"},
    "plain": {"direction": "none"},  # what --finetune learns from the source alone
    "text": {**NOT_LDFS, "direction": "additive"},
    "lads": {**NOT_LDFS, "direction": "global", "consistency": 1.0, "mapper": "lads"},
    "ldfs": {},
}
MODES = list(ROWS)
# --finetune: learning rate with the tiny CLIP (chosen on source hold-outs), with others (untested)
LEARNING_RATES = {"probe": (3e-3, 1e-3), "probe-random": (1e-2, 1e-3), "adapter": (1e-2, 1e-3)}
LEARNING_RATES |= {"coop": (3e-3, 2e-3), "tip-adapter": (1e-3, 1e-3)}
LOSSES = ["plain", "ldfs/direction=global/sigma=0/pairwise=0", "ldfs/sigma=0/pairwise=0"]
LOSSES += ["ldfs/pairwise=0", "ldfs/sigma=0", "ldfs", "ldfs/reach=0", "ldfs/consistency=1"]
LOSSES += ["ldfs/consistency=1/temperature=clip", "lads", "lads/temperature=clip"]
STUDIES = {
    "losses": LOSSES,
    "captions": ["plain", "ldfs/captioner=template", "ldfs"],
    "finetune": [],
    "sigma": ["plain", *(f"ldfs/sigma={sigma}" for sigma in (0, 0.02, 0.05, 0.1, 0.2, 0.4))],
}
for method in LEARNING_RATES:
    STUDIES["finetune"] += [f"{row}/finetune={method}" for row in ("plain", "lads", "ldfs")]

# ---------- Settings: name, kind, default, default with the tiny CLIP, help ----------------------
CAPTIONERS = ("retrieval", "template", "file")
DIRECTIONS = ("local", "global", "additive", "none")
number = common.at_least(0, float)
count = common.at_least(1)
SETTINGS = [
    ("captioner", CAPTIONERS, "retrieval", "retrieval", "CLIP's nearest phrases, class name, file"),
    ("caption-file", Path, None, None, 'JSON {"path below the data root": "caption"}'),
    ("direction", DIRECTIONS, "local", "local", "of captions (published), class (LADS), unlearnt"),
    ("sigma", number, 0.03, 0.1, "noise on each coordinate of a text feature (our choice)"),
    ("pairwise", number, 1.0, 1.0, "weight of the pairwise regularizer (our choice)"),
    ("consistency", number, 0.0, 0.0, "weight of LADS' class consistency (published: 1)"),
    ("temperature", ("none", "clip"), "none", "none", "of its cosines (none in LADS' code)"),
    ("mapper", ("residual", "lads"), "residual", "residual", "lads: without residual path"),
    ("reach", number, 1.0, 1.0, "least move, in lengths of its caption's (our choice)"),
    ("hidden", count, 384, 384, "width of the mapper (published for LADS)"),
    ("mapper-epochs", count, 50, 50, "the best on the hold-out counts (as LADS)"),
    ("mapper-lr", common.positive, 1e-3, 1e-3, "of AdamW (in LADS' range)"),
    ("weight-decay", number, 0.005, 0.005, "of AdamW in both steps (as LADS)"),
    ("batch-size", count, 256, 256, "source images in a step, in both steps (as LADS)"),
    ("finetune", tuple(LEARNING_RATES), "probe", "probe", "what learns from the features"),
    ("epochs", count, 60, 60, "passes over the source images (our choice)"),
    ("lr", common.positive, None, None, "of AdamW, then a cosine (by --finetune: LEARNING_RATES)"),
]
STEP_1 = """captioner caption_file direction sigma pairwise consistency temperature mapper reach
hidden mapper_epochs mapper_lr weight_decay batch_size""".split()
SOURCE = "labelled domain, or all in turn (officehome: Real World; domainnet, -mini: sketch)"
SEEN = [
    ("source", str, "photo", "photo", SOURCE),
    ("targets", [str], None, None, "domains known by name; only tests see them (all others)"),
    ("descriptions", [str], [], [], "NAME=TEXT: a domain's words (assets/words.json)"),
    common.TEMPLATES,
]
SOURCES = {"officehome": "Real World", "domainnet": "sketch", "domainnet-mini": "sketch"}
OF_MAPPER = "sigma pairwise consistency temperature mapper reach hidden mapper-epochs mapper-lr"
NEEDS = dict.fromkeys(OF_MAPPER.split(), "lads|ldfs")  # {setting: rows that it has an effect on}
NEEDS |= dict.fromkeys(("finetune", "epochs", "lr"), "plain|text|lads|ldfs")
METHOD = common.Method("ldfs", SETTINGS, ROWS, STUDIES, NEEDS)


def settings(argv=None):
    """The command line, or argv, checked; `descriptions` becomes {slug of a domain: its words}."""
    datasets = [*common.dataset_names("domains"), *WATERBIRDS]
    args = common.flags(METHOD, __doc__, MODES, datasets, SEEN, argv)
    preset = {"source": SOURCES.get(args.dataset, "photo")}
    if args.dataset in WATERBIRDS:
        preset = {"source": "usual places"}
        if args.source:
            raise common.InputError(f"--source {args.source} has no effect on {args.dataset}")
    args = common.settle(args, preset)
    words = json.loads(WORDS.read_text())
    descriptions = {**words["descriptions"], **words.get(f"descriptions of {args.dataset}", {})}
    for given in args.descriptions:
        name, _, text = given.partition("=")
        if not common.has_one_place(text):
            what = f"needs {common.ONE_PLACE}"
            raise common.InputError(f"--descriptions: {name}={text!r} {what}")
        descriptions[common.slug(name)] = text
    args.descriptions = descriptions
    captioned = [row for row in args.rows.values() if row.captioner == "file"]
    if args.caption_file and not captioned:
        raise common.InputError("--caption-file has no effect without --captioner file")
    if not all(row.caption_file for row in captioned):
        raise common.InputError("--captioner file needs --caption-file, JSON {path: caption}")
    return args


# ---------- main ---------------------------------------------------------------------------------
def main():
    args = settings()
    if args.model == "tiny":
        torch.set_num_threads(1)  # its matrices are too small to share
    records, clip, cache = [], None, {}
    for seed in args.seeds:
        tasks = load_tasks(args, seed)
        if not clip:  # after the data: a missing data set is said before weights are fetched
            clip = common.load_clip(args.model, args.pretrained, args.device, args.precision)
        for source, (task, targets) in tasks.items():
            print(f"{args.dataset}, from {source}, seed {seed}", flush=True)
            with common.open_run(args, f"from {source}", seed) as run:
                if not run.complete:
                    train_and_test(args, clip, task, targets, run, seed, cache)
            records.append(run.record)
    result = common.report(args, records)
    quality = [{**record, "rows": record["extra"]["synthesised"]} for record in records]
    if quality[0]["rows"]:
        print("\n" + common.table("synthesised features, %", quality))
    return result


if __name__ == "__main__":
    common.command(main)
