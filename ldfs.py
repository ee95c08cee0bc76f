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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import adapters, captions, prompts, runs, tables


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
    text_length = text.norm(dim=-1).clamp(min=1e-6)
    least_length = (reach * text_length).clamp(min=0.01)
    move_length = torch.maximum(move.norm(dim=-1), least_length)
    cosine = (move * text).sum(-1) / (move_length * text_length)
    return (1 - cosine).mean()


def global_direction_loss(features, mapped, text_source, text_target, labels, reach=0.0):
    """As `local_direction_loss`, but with ONE direction for all images of a class, the mean of
    their captions' (LADS)."""
    same = (labels[:, None] == labels).to(features.dtype)
    class_average = same / same.sum(1, keepdim=True)  # (B, B)
    texts = class_average @ text_source, class_average @ text_target
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
    Raises: InputError if the loss is not finite.
    """
    torch.manual_seed(seed)
    features, labels, *_ = train
    mapper = Mapper(features.shape[1], row.hidden, row.mapper == "residual").to(features.device)
    weights = balanced(labels, len(class_features))
    fused = features.device.type == "cuda"
    options = {"lr": row.mapper_lr, "weight_decay": row.weight_decay, "fused": fused}
    optimizer = torch.optim.AdamW(mapper.parameters(), **options)
    lowest, best = float("inf"), None
    for epoch in range(1, row.mapper_epochs + 1):
        order = torch.randperm(len(features))
        for indices in order.split(row.batch_size):
            batch = [values[indices] for values in train]
            loss = mapper_loss(row, mapper, batch, class_features, scale, row.sigma, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        runs.check_finite(loss, f"the mapper (--mapper-lr), epoch {epoch}", row.mapper_lr)
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
    for indices in torch.arange(count).split(1024):
        batch = [values[indices] for values in holdout]
        loss = mapper_loss(row, mapper, batch, class_features, scale, 0, class_weights)
        total += len(indices) / count * loss.item()
    return total


def synthesise(row, clip, targets, train, holdout, class_features, seed, cache=None) -> dict:
    """Step 1, {target: its `Features`}, in the order of the training images of the given classes.

    train, holdout: `Features`; targets: see `load_tasks`; cache: captions that rows share.
    """
    if row.direction == "none":
        return {}
    cache = {} if cache is None else cache
    synthesised = {}
    for name, (source_words, target_words, classes) in targets.items():
        parts = []
        for real in (train, holdout):
            subjects = captions.subjects(row, clip, real, source_words, cache)  # "red dog on grass"
            text_source = captions.text_features(clip, source_words, subjects)  # T(s_i)  (N, D)
            text_target = captions.text_features(clip, target_words, subjects)  # T(t_i)  (N, D)
            indices = of_classes(real.labels, classes)
            values = real.features, real.labels, text_source, text_target
            parts.append([value[indices] for value in values])
        features, labels, text_source, text_target = parts[0]
        if row.direction == "additive":
            moved = F.normalize(features + text_target - text_source, dim=-1)
        else:
            mapper = train_mapper(row, *parts, class_features, clip.logit_scale, seed)
            moved = mapper(features)
        images = train.images.subset(of_classes(train.labels, classes))
        synthesised[name] = Features(images, moved, labels, features)
    return synthesised


# ---------- Step 2: what learns from the features ------------------------------------------------
def make_classifier(row, clip, class_names, class_features, features, labels):
    """The start of a fine-tuning method: a module whose logits (B, C) come from features (B, D).

    Args: class_features T (C, D); features, labels: all that are learnt from.
    """
    T, scale = class_features, clip.logit_scale
    if row.zero_shot or row.finetune == "probe":
        return adapters.Probe(T.clone(), scale)
    if row.finetune == "adapter":
        return adapters.Adapter(T, scale)
    if row.finetune == "tip-adapter":
        return adapters.TipAdapter(T, scale, features, labels)
    if row.finetune == "coop":
        return prompts.CoOp(clip, class_names)
    return adapters.Probe(F.normalize(torch.randn_like(T), dim=-1), scale)  # probe-random


def fine_tune(row, clip, class_names, class_features, sets, seed):
    """Step 2: cross-entropy on original and synthesised features, L_con.

    A step sees --batch-size source features and the same share of the others: all rows of a table
    take equally many steps (our choice; more steps alone change a probe's accuracy).

    Args: sets: (features (n, D), labels (n,)) of the source, then of every synthesised domain.
    Returns: a function, features (B, D) -> logits (B, C).
    Raises: InputError if the loss is not finite.
    """
    torch.manual_seed(seed)
    features, labels = (torch.cat(values) for values in zip(*sets))
    model = make_classifier(row, clip, class_names, class_features, features, labels)
    classify = model.logits if isinstance(model, prompts.CoOp) else model
    if row.zero_shot:
        return classify
    lr_tiny, lr_other = LEARNING_RATES[row.finetune]
    lr = row.lr or (lr_tiny if row.model == "tiny" else lr_other)
    steps = -(-len(sets[0][0]) // row.batch_size)  # an epoch; the last batch may be smaller
    options = {"weight_decay": row.weight_decay, "fused": features.device.type == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), lr, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, row.epochs * steps)
    for _ in range(row.epochs):
        for indices in torch.randperm(len(labels)).tensor_split(steps):
            loss = F.cross_entropy(classify(features[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    runs.check_finite(loss, f"{row.finetune} (--lr), the last step", lr)
    return classify


# ---------- What is measured ---------------------------------------------------------------------
@dataclass
class Features:
    """CLIP's features of images, or features that a mapper synthesised from them."""

    images: common.ImageSet
    features: torch.Tensor  # (N, D) unit-norm
    labels: torch.Tensor  # (N,)
    start: torch.Tensor | None = None  # of synthesised features: those that were moved


def encode(clip, images, workers, cache):
    """Encode images, or take their features from the cache {pixels or names of files: features},
    which all runs of a command share. Images are read nowhere else."""
    key = np.asarray(images.images).tobytes()
    if key not in cache:
        cache[key] = clip.encode(images, workers).to(clip.device)
    return Features(images, cache[key], images.labels.to(clip.device))


def of_classes(labels, classes):
    """Indices (n,) of the images of these classes."""
    mask = torch.isin(labels.cpu(), torch.tensor(classes))
    return mask.nonzero()[:, 0]


@torch.no_grad()
def accuracy(classify, real) -> float:
    hits = classify(real.features).argmax(1) == real.labels
    return hits.double().mean().item()


def accuracies(classify, holdout, source, targets) -> dict[str, float]:
    """On the hold-out, the source, the targets (mean), both (mean), and each target; in [0, 1]."""
    by_target = {f"target/{name}": accuracy(classify, real) for name, real in targets.items()}
    on_source = accuracy(classify, source)
    on_targets = float(np.mean(list(by_target.values())))
    return {
        "hold-out": accuracy(classify, holdout),
        "source": on_source,
        "target": on_targets,
        "average": (on_source + on_targets) / 2,
        **by_target,
    }


# ---------- How good synthesised features are ----------------------------------------------------
def nearest(features, among) -> torch.Tensor:
    """For each feature (n, D) the index (n,) of the most similar one among (N, D)."""
    size = min(1024, max(1, 2**26 // len(among)))  # at most 256 MiB of cosines at a time
    indices = [(part @ among.T).argmax(1) for part in features.split(size)]
    return torch.cat(indices)


def class_means(features, labels, classes):
    return torch.stack([features[labels == c].mean(0) for c in classes])  # (C, D)


def spread(real):
    """Mean distance of two features of the same class, at most 999 of each; mean over classes."""
    distances = []
    for c in real.labels.unique():
        same = real.features[real.labels == c][:999]
        if len(same) > 1:
            distances.append(torch.pdist(same).mean().cpu())
    return np.mean(distances)


def synthesis_quality(synthesised, source, targets) -> dict[str, float]:
    """What synthesised features are like, averaged over the targets.

    move           mean length |M(f) - f|
    to real shift  cosine of a class's mean move with the difference of its real target and source
    spread         mean distance of two of the same class; `real spread` that of real ones
    distinct       different images among the nearest real target images, as a share of the most
    right class, right domain, both: of the nearest among all real images, source and targets
    """
    results = {}
    for name, real in targets.items():
        metrics = quality_of_moves(synthesised[name], source, real)
        metrics |= quality_of_neighbours(synthesised[name], name, source, targets)
        for measure, value in metrics.items():
            results.setdefault(measure, []).append(float(value))
    return {measure: float(np.mean(values)) for measure, values in results.items()}


def quality_of_moves(synthetic, source, real) -> dict:
    classes = [c for c in synthetic.labels.unique() if c in real.labels and c in source.labels]
    shift = class_means(real.features, real.labels, classes)
    shift = shift - class_means(source.features, source.labels, classes)
    move = synthetic.features - synthetic.start
    cosines = F.cosine_similarity(class_means(move, synthetic.labels, classes), shift)
    return {
        "move": move.norm(dim=1).mean(),
        "to real shift": cosines.mean(),
        "spread": spread(synthetic),
        "real spread": spread(real),
    }


def quality_of_neighbours(synthetic, target: str, source, targets) -> dict:
    real = targets[target]
    distinct = nearest(synthetic.features, real.features).unique()
    pool = [source, *targets.values()]
    features = torch.cat([part.features for part in pool])
    labels = torch.cat([part.labels for part in pool])
    domains = [torch.full_like(part.labels, i) for i, part in enumerate(pool)]
    indices = nearest(synthetic.features, features)
    right_class = labels[indices] == synthetic.labels
    right_domain = torch.cat(domains)[indices] == 1 + list(targets).index(target)
    return {
        "distinct": len(distinct) / min(len(synthetic.labels), len(real.labels)),
        "right class": right_class.double().mean(),
        "right domain": right_domain.double().mean(),
        "both": (right_class & right_domain).double().mean(),
    }


def plot_neighbours(synthesised, real, path, columns=12):
    """Figure 4: source images, and below them the real target images nearest to the features that
    each row synthesised from them. Red frame: wrong class; blue: the same image once more."""
    pictures, frames = {}, {}
    for row, synthetic in synthesised.items():
        indices = torch.linspace(0, len(synthetic.labels) - 1, columns).long().tolist()
        images = nearest(synthetic.features[indices], real.features).tolist()
        pictures["source"] = [synthetic.images.picture(i) for i in indices]
        pictures[row] = [real.images.picture(i) for i in images]
        frames[row] = [None] * columns
        for column, image in enumerate(images):
            if image in images[:column]:
                frames[row][column] = "tab:blue"
            if real.labels[image] != synthetic.labels[indices[column]]:
                frames[row][column] = "tab:red"
    tables.plot_images(pictures, path, frames=frames)


# ---------- Tasks: what training may see ---------------------------------------------------------
# in Waterbirds the place is the domain: which place a target is made from, and which birds
OTHER_PLACE = {"water": ("land", [0]), "land": ("water", [1])}


def read_domains(args, seed) -> list[common.Domain]:
    """All domains. Images in files are not read here."""
    data = args.dataset, args.data_root, seed, args.cue
    if args.dataset not in captions.WATERBIRDS:
        return common.load_domains(*data)
    parts = common.load_parts(*data)
    train, test = parts["train"], parts["test"]
    usual = common.Domain("usual places", of_groups(train, 0, 3), of_groups(test, 0, 3))
    water = common.Domain("water", of_groups(test, 1))  # landbirds there
    land = common.Domain("land", of_groups(test, 2))  # waterbirds there
    return [usual, water, land]


def of_groups(images, *groups: int) -> common.ImageSet:
    """Waterbirds' images of some groups, 2 * bird + place."""
    mask = np.isin(images.groups, groups)
    return images.subset(np.flatnonzero(mask))


def make_task(args, domains, source, others) -> tuple[common.Task, dict]:
    """A task and its targets; see `load_tasks`."""
    split = common.leave_one_out(domains, others[0].name)  # of all but this one
    hold_out = {source: split.tests["hold-out"][source]}
    balanced = split.tests.get("source", hold_out)
    tests = {"hold-out": hold_out, "source": {source: balanced[source]}, "target": {}}
    targets = {}
    for domain in others:
        origin, classes = source, range(len(split.classes))
        if args.dataset in captions.WATERBIRDS:
            origin, classes = OTHER_PLACE[domain.name]
        words = [captions.words_for(name, args.descriptions) for name in (origin, domain.name)]
        targets[domain.name] = *words, classes
        tests["target"][domain.name] = domain.balanced or domain.images
    return common.Task(split.classes, {source: split.train[source]}, tests), targets


def load_tasks(args, seed):
    """{source: (its task, its targets)}; targets: {name: (words of the images that its features
    are made from, its own words, the classes of these images)}."""
    domains = read_domains(args, seed)
    names = [domain.name for domain in domains]
    targets = []
    for text in args.targets or ["all"]:
        targets += common.choose_targets(text, names)
    tasks = {}
    sources = names[:1] if args.dataset in captions.WATERBIRDS else names
    for source in common.choose_targets(args.source, sources, "source"):
        if args.targets and args.source != "all" and source in targets:
            raise common.InputError(f"--targets names {source!r}, the source: its images are known")
        others = [domain for domain in domains if domain.name in targets and domain.name != source]
        if others:  # none if --source all meets the only one of --targets
            tasks[source] = make_task(args, domains, source, others)
    return tasks


# ---------- Training and tests -------------------------------------------------------------------
def train_and_test(args, rows: dict, clip, task, targets, run, seed, cache) -> None:
    """All rows for one source and seed."""
    read = functools.partial(encode, clip, workers=args.workers, cache=cache)
    train = read(*task.train.values())
    holdout = read(*task.tests["hold-out"].values())
    class_features = clip.class_features(task.classes, args.templates)  # (C, D)
    by_step_1, synthesised, classify = {}, {}, {}
    for name, row in rows.items():
        step_1 = tuple(getattr(row, setting) for setting in STEP_1)
        if step_1 not in by_step_1:  # else rows differ in step 2 only
            data = train, holdout, class_features
            by_step_1[step_1] = synthesise(row, clip, targets, *data, seed, cache)
        synthesised[name] = by_step_1[step_1]
        sets = [(part.features, part.labels) for part in (train, *synthesised[name].values())]
        classify[name] = fine_tune(row, clip, task.classes, class_features, sets, seed)

    # Everything is learnt. Only now images of the targets are read.
    source = read(*task.tests["source"].values())
    real = {name: read(images) for name, images in task.tests["target"].items()}
    made = {row: features for row, features in synthesised.items() if features}
    if made and (args.figures or not args.study):
        for target, images in real.items():
            of_target = {row: features[target] for row, features in made.items()}
            path = run.folder / f"neighbours-{common.slug(target)}.png"
            plot_neighbours(of_target, images, path)
    quality = {row: synthesis_quality(features, source, real) for row, features in made.items()}
    run.extra["synthesised"] = quality
    for name in rows:
        run.add(name, accuracies(classify[name], holdout, source, real))


# ---------- What the paper compares --------------------------------------------------------------
# A name stands for settings; a row may override them: "ldfs/sigma=0.1".
NOT_LDFS = "--captioner template --sigma 0 --pairwise 0 --reach 0"
ROWS = {
    "zero-shot": "--direction none --zero-shot",
    "plain": "--direction none",  # what --finetune learns from the source alone
    "text": f"{NOT_LDFS} --direction additive",
    "lads": f"{NOT_LDFS} --direction global --consistency 1 --mapper lads",
    "ldfs": "",
}
# --finetune: learning rate with the tiny CLIP (chosen on source hold-outs), with others (untested)
LEARNING_RATES = {
    "probe": (3e-3, 1e-3),
    "probe-random": (1e-2, 1e-3),
    "adapter": (1e-2, 1e-3),
    "coop": (3e-3, 2e-3),
    "tip-adapter": (1e-3, 1e-3),
}
LOSSES = ["plain", "ldfs/direction=global/sigma=0/pairwise=0", "ldfs/sigma=0/pairwise=0"]
LOSSES += ["ldfs/pairwise=0", "ldfs/sigma=0", "ldfs", "ldfs/reach=0", "ldfs/consistency=1"]
LOSSES += ["ldfs/consistency=1/temperature=clip", "lads", "lads/temperature=clip"]
LEARNED = ("plain", "lads", "ldfs")
STUDIES = {
    "losses": LOSSES,
    "captions": ["plain", "ldfs/captioner=template", "ldfs"],
    "finetune": [f"{row}/finetune={kind}" for kind in LEARNING_RATES for row in LEARNED],
    "sigma": ["plain", *(f"ldfs/sigma={sigma}" for sigma in (0, 0.02, 0.05, 0.1, 0.2, 0.4))],
}
STEP_1 = """captioner caption_file direction sigma pairwise consistency temperature mapper reach
hidden mapper_epochs mapper_lr weight_decay batch_size""".split()


# ---------- The command line ---------------------------------------------------------------------
def parsers() -> tuple:
    """The parser of the command line, and the parser of a row's settings."""
    method = runs.Parser(add_help=False)
    flag = functools.partial(runs.flag, method.add_argument_group("method and training"))
    whole, number, positive = runs.at_least(1), runs.at_least(0, float), runs.positive
    captioners = ("retrieval", "template", "coca", "file")
    flag("captioner", captioners, "retrieval", "CLIP's nearest phrases, class name, CoCa, a file")
    flag("caption-file", Path, None, 'JSON {"path below the data root": "caption"}, and its choice')
    directions = ("local", "global", "additive", "none")
    flag("direction", directions, "local", "of captions (published), class (LADS), unlearnt, none")
    flag("sigma", number, 0.03, "noise on a text feature (our choice; tiny CLIP: 0.1)")
    flag("pairwise", number, 1.0, "weight of the pairwise regularizer (our choice)")
    flag("consistency", number, 0.0, "weight of LADS' class consistency (published: 1)")
    flag("temperature", ("none", "clip"), "none", "of its cosines (none in LADS' code)")
    flag("mapper", ("residual", "lads"), "residual", "lads: without residual path")
    flag("reach", number, 1.0, "least length of a move, in lengths of its caption's (our choice)")
    flag("hidden", whole, 384, "width of the mapper (published for LADS)")
    flag("mapper-epochs", whole, 50, "of which the best on the hold-out counts (as LADS)")
    flag("mapper-lr", positive, 1e-3, "of AdamW (in LADS' range)")
    flag("weight-decay", number, 0.005, "of AdamW in both steps (as LADS)")
    flag("batch-size", whole, 256, "source images in a step, in both steps (as LADS)")
    flag("finetune", tuple(LEARNING_RATES), "probe", "what learns from the features")
    flag("epochs", whole, 60, "passes over the source images (our choice)")
    rates = [f"{name} {lr:g}, {other:g}" for name, (lr, other) in LEARNING_RATES.items()]
    text = f"of AdamW, then a cosine (default with the tiny CLIP, with others: {'; '.join(rates)})"
    flag("lr", positive, None, text)
    row = runs.Parser(parents=[method], add_help=False, allow_abbrev=False)
    row.add_argument("--zero-shot", action="store_true")

    datasets = [*common.dataset_names("domains"), *captions.WATERBIRDS]
    command = runs.command_parser("ldfs", __doc__, method, datasets, ROWS, list(ROWS), STUDIES)
    flag = functools.partial(runs.flag, command.add_argument_group("of all rows"))
    text = "labelled domain, or all in turn (officehome: Real World; domainnet, -mini: sketch)"
    flag("source", str, "photo", text)
    flag("targets", [str], None, "domains known by name; only tests see them (default: all others)")
    flag("descriptions", [str], [], "NAME=TEXT: a domain's words (default: assets/words.json)")
    flag("templates", [runs.template], ["a photo of a {}."], "prompts, averaged; or: ensemble")
    return command, row


def preset(args) -> dict:
    """Defaults that depend on other flags."""
    sources = {"officehome": "Real World", "domainnet": "sketch", "domainnet-mini": "sketch"}
    defaults = {"source": sources.get(args.dataset, "photo")}
    if args.dataset in captions.WATERBIRDS:
        defaults = {"source": "usual places", "cue": 0.95}
    if args.model == "tiny":
        defaults["sigma"] = 0.1
    if args.caption_file:
        defaults["captioner"] = "file"
    return defaults


def settings(argv=None) -> tuple:
    """The command line, or argv, and {row: its settings}; args.descriptions becomes {slug of a
    domain: its words}."""
    command, row_parser = parsers()
    args = runs.read_command(command, preset, STUDIES, argv)
    args.descriptions = captions.read_descriptions(args.dataset, args.descriptions)
    rows = {text: runs.read_row(row_parser, args, ROWS, text) for text in args.modes}
    for row in rows.values():
        if row.captioner == "file" and not row.caption_file:
            raise common.InputError("--captioner file needs --caption-file, JSON {path: caption}")
    return args, rows


# ---------- main ---------------------------------------------------------------------------------
def main():
    args, rows = settings()
    if args.model == "tiny":
        torch.set_num_threads(1)  # its matrices are too small to share
    records, clip, cache = [], None, {}
    for seed in args.seeds:
        tasks = load_tasks(args, seed)
        if not clip:  # after the data: a missing data set is reported before weights are downloaded
            clip = common.load_clip(args.model, args.pretrained, args.device, args.precision)
        for source, (task, targets) in tasks.items():
            print(f"{args.dataset}, from {source}, seed {seed}", flush=True)
            run = runs.Run(args, f"from {source}", seed)
            if not run.finished:
                train_and_test(args, rows, clip, task, targets, run, seed, cache)
                run.finish()
            records.append(run.record)
    tables.report(args, records)
    quality = [{**record, "rows": record["extra"]["synthesised"]} for record in records]
    if quality[0]["rows"]:
        print("\n" + tables.table("synthesised features, %", quality))


if __name__ == "__main__":
    runs.command(main)
