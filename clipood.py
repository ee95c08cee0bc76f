"""CLIPood: fine-tune CLIP for domains and classes it never saw (Shu et al., ICML 2023, arXiv 2302.00864).

Fine-tuning CLIP on one task makes it forget others. Two changes to the training of the image encoder keep more of it:
  margin metric softmax (MMS)   classify by the text features, with a margin that grows as class names differ in meaning
  beta moving average (BMA)     average the whole training trajectory, heaviest at both ends: zero-shot and fine-tuned
The text encoder is frozen, the result is a plain CLIP, and no model is selected: the last average is the answer.

    python clipood.py                                       # tiny-pacs, target sketch, CPU, under a minute
    python clipood.py --dataset officehome --target all --seeds 0 1 2

A mode names a loss and an average, each with its number if it is not the default: `mms+bma`, `ms`, `mms@0.5+bma@0.1`,
`linear+ema@0.99`. Modes with the same loss share one training, because averages do not change the trajectory.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common

# (task, data sets): batch size (images per source domain in a step), learning rate, epochs, lambda, beta, source
DEFAULTS = {
    ("domain-shift", "pacs vlcs terra"): (12, 5e-6, 10, 0.3, 0.5, "published"),
    ("domain-shift", "officehome"): (12, 1e-5, 10, 0.3, 0.5, "published"),
    ("domain-shift", "domainnet"): (12, 1e-5, 20, 0.3, 0.5, "published"),
    ("domain-shift", "imagenet"): (36, 5e-6, 10, 0.3, 0.5, "our choice"),
    ("domain-shift", "tiny CLIP"): (12, 4e-4, 6, 0.3, 0.5, "source hold-out"),
    ("open-class", "caltech101 oxfordpets oxfordflowers food101 dtd eurosat"): (36, 5e-6, 1, 0.3, 0.1, "published"),
    ("open-class", "imagenet fgvcaircraft"): (36, 5e-6, 10, 0.3, 0.1, "published"),
    ("open-class", "stanfordcars sun397"): (36, 5e-6, 5, 0.3, 0.1, "published"),
    ("open-class", "ucf101"): (36, 5e-6, 2, 0.3, 0.1, "published"),
    ("open-class", "tiny CLIP"): (36, 4e-4, 2, 0.3, 0.1, "source hold-out"),
    ("in-the-wild", "officehome"): (12, 3e-6, 10, 0.1, 0.1, "published"),
    ("in-the-wild", "domainnet"): (12, 5e-6, 20, 0.1, 0.5, "published"),
    ("in-the-wild", "tiny CLIP"): (12, 2e-4, 4, 0.1, 0.1, "source hold-out"),
}
COLUMNS = ["batch_size", "lr", "epochs", "margin", "beta", "source"]
STUDIES = {
    "loss": "zero-shot linear ms mms",
    "margin": "zero-shot ms ms+bma mms@0.1 mms@0.1+bma mms@0.5 mms@0.5+bma mms@1 mms@1+bma mms mms+bma",
    "average": "zero-shot mms mms+ema mms+uniform mms+wise-ft mms+bma@0.1 mms+bma@0.3 mms+bma@1 mms+bma@2 mms+bma",
    "components": "zero-shot linear ms mms mms+wise-ft mms+bma",
}


def settings() -> argparse.Namespace:
    parser = common.common_flags(__doc__)
    rows = {f"{task}: {names}": [str(value) for value in row] for (task, names), row in DEFAULTS.items()}
    parser.epilog = common.format_table("defaults (first row of a task: any other data set)", COLUMNS, rows)
    parser.set_defaults(templates=None)
    method = parser.add_argument_group("CLIPood").add_argument
    method("--task", choices=("domain-shift", "open-class", "in-the-wild"),
           help="unseen domains; unseen classes, from few shots of the base classes of one domain or of a set without "
           "domains; or both (default: domain-shift; open-class for sets without domains)")  # fmt: skip
    method("--modes", nargs="+", default="zero-shot mms mms+wise-ft mms+bma".split(),
           help="what to compare, the last one is exported: zero-shot, or a loss linear, ms, mms[@LAMBDA], alone or "
           "with +ema[@DECAY], +uniform, +wise-ft[@SHARE], +bma[@BETA] (default: %(default)s)")  # fmt: skip
    method("--study", choices=STUDIES, help="a comparison of Figure 5 in place of --modes, with figures; writes "
           "results/clipood-<study>-<dataset>-<task>.json")  # fmt: skip
    method("--margin", type=float, help="lambda of MMS, Eq. 3 (default: the table below)")
    method("--beta", type=float, help="of BMA, Eq. 6 (default: the table below)")
    method("--ema", type=float, help="decay of EMA (default: 0.999; 0.95 with the tiny CLIP, our choice)")
    method("--wise-ft", type=float, default=0.5, help="share of the fine-tuned weights (default: 0.5, our choice)")
    method("--shots", type=int, default=16, help="training images per class of few-shot sets (default: 16, published)")
    method("--protocol", choices=("whole", "official"), default="whole",
           help="test on the whole target, or on 20 %% of it as the authors' code does (default: whole)")  # fmt: skip
    training = parser.add_argument_group("training").add_argument
    training("--batch-size", type=int, help="images per source domain in a step (default: the table below)")
    training("--lr", type=float, help="at the start; a cosine takes it to 0 (default: the table below)")
    training("--head-lr", type=float, help="of the linear classifier (default: 1e-3; tiny CLIP 3e-3; our choice)")
    training("--weight-decay", type=float, default=0.1, help="of AdamW (default: 0.1, published)")
    training("--epochs", type=int, help="(default: the table below)")
    training("--steps-per-epoch", type=int, help="(default: 500, published; 20 with the tiny CLIP)")
    training("--eval-every", type=int, help="epochs between tests on the way (default: none; 1 in --study average)")
    training("--resume", action="store_true", help="continue this command where it was interrupted, at its last epoch")
    args = parser.parse_args()

    parted = args.dataset in common.OPEN_CLASS
    args.task = args.task or ("open-class" if parted and args.dataset != "imagenet" else "domain-shift")
    if args.study:
        args.modes = STUDIES[args.study].split()
        name = f"clipood-{args.study}-{common.slug(args.dataset)}-{args.task}.json"
        args.summary = args.summary or Path("results", name)
    args = common.settle(args)
    if parted and args.task != "open-class" and (args.task, args.dataset) != ("domain-shift", "imagenet"):
        raise common.InputError(f"--task {args.task} needs domains, {args.dataset} has none: use --task open-class")
    table = {
        name: row for (task, names), row in DEFAULTS.items() if task == args.task for name in (names, *names.split())
    }
    tiny = args.model == "tiny"
    row = table["tiny CLIP"] if tiny else table.get(args.dataset, next(iter(table.values())))
    others = {"ema": 0.95 if tiny else 0.999, "head_lr": 3e-3 if tiny else 1e-3, "steps_per_epoch": 20 if tiny else 500}
    template = common.OPEN_CLASS[args.dataset].template if parted else "a photo of a {}."
    others |= {"eval_every": int(args.study == "average"), "templates": [template]}
    for name, value in {**dict(zip(COLUMNS[:-1], row)), **others}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    least = dict.fromkeys(("batch_size", "epochs", "steps_per_epoch", "shots"), 1)
    for name, low in {**least, **dict.fromkeys(("lr", "head_lr", "weight_decay", "eval_every"), 0)}.items():
        if not low <= getattr(args, name) < float("inf"):
            raise common.InputError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    args.modes = {name: read_mode(name, args) for name in dict.fromkeys(args.modes)}
    return args


class Mode(NamedTuple):
    """What a row of a table stands for: a loss with its lambda, and an average of its trajectory with its number."""

    loss: str  # zero-shot, linear, ms, mms
    margin: float
    average: str  # ema, uniform, wise-ft, bma; "" for the last weights
    value: float  # decay, -, share, beta


def read_mode(text: str, args) -> Mode:
    """Read `zero-shot` or `loss[@lambda][+average[@number]]`; numbers left out are those of the flags."""
    (loss, margin), (average, value) = (part.partition("@")[::2] for part in text.partition("+")[::2])
    losses = {"zero-shot": 0, "linear": 0, "ms": 0, "mms": args.margin}
    averages = {"": 0, "ema": args.ema, "uniform": 0, "wise-ft": args.wise_ft, "bma": args.beta}
    try:
        mode = Mode(loss, float(margin or losses[loss]), average, float(value or averages[average]))
        if average:
            average_shares(average, mode.value, steps=1)
        if not 0 <= mode.margin < float("inf") or (margin and loss != "mms") or (average and loss == "zero-shot"):
            raise ValueError("lambda is a number >= 0 of mms, and zero-shot has no trajectory to average")
    except (KeyError, ValueError) as error:
        raise common.InputError(
            f"--modes: cannot read {text!r} ({error}); a mode is zero-shot, or linear, ms or mms[@LAMBDA], alone or "
            "with an average +ema[@DECAY], +uniform, +wise-ft[@SHARE] or +bma[@BETA]"
        ) from None
    return mode


def trainings(modes: dict[str, Mode]) -> list[dict[str, Mode]]:
    """Modes that come from one trajectory together: those with the same loss and lambda. The last mode comes last."""
    groups = {}
    for name, mode in reversed(modes.items()):
        groups.setdefault((mode.loss, mode.margin), []).append(name)
    return [{name: modes[name] for name in reversed(names)} for names in reversed(groups.values())]


# ---------- The method -----------------------------------------------------------------------------
def class_distances(class_features: torch.Tensor) -> torch.Tensor:
    """D(T_a, T_b) = 1 - S(T_a, T_b), Eq. 4, of unit-norm class_features (C, D).

    Returns: (C, C) in [0, 2], symmetric, exactly 0 on the diagonal.
    """
    distances = (1 - class_features @ class_features.T).clamp(min=0)
    return ((distances + distances.T) / 2).fill_diagonal_(0)


def margin_metric_softmax(image_features, class_features, labels, logit_scale, margin) -> torch.Tensor:
    """The training loss of CLIPood, Eq. 3: a wrong class counts as `margin * D(T_y, T_c)` more similar than it is.

        L = -log  exp(S(I_x, T_y) / tau) / sum_c exp( (S(I_x, T_c) + margin D(T_y, T_c)) / tau )

    Args:
        image_features, class_features: unit-norm, (B, D) and (C, D).
        labels: (B,) int64, the row y of each image's class.
        logit_scale: 1 / tau, CLIP's own.
        margin: lambda >= 0; 0 gives the metric softmax of Eq. 2.
    Returns: the mean over the batch, a scalar.
    Raises: ValueError if shapes do not fit or the margin is negative.
    """
    if image_features.ndim != 2 or image_features.shape[1:] != class_features.shape[1:] or margin < 0:
        shapes = f"{tuple(image_features.shape)} and {tuple(class_features.shape)}"
        raise ValueError(f"need features (B, D) and (C, D) and margin >= 0, got {shapes}, margin={margin}")
    similarities = image_features @ class_features.T  # (B, C)
    widened = similarities + margin * class_distances(class_features)[labels]  # nothing is added for c = y
    return F.cross_entropy(logit_scale * widened, labels)


def beta_weights(steps: int, beta: float) -> torch.Tensor:
    """Weight alpha_t of every model on the trajectory theta_0 ... theta_T, Eq. 6.

    Beta(beta, beta) density at (t + 0.5) / (T + 1): beta < 1 favours both ends, the zero-shot and the fine-tuned model;
    beta = 1 is the uniform average of all T + 1.

    Returns: (T + 1,) float64, positive, not normalised.
    Raises: ValueError if steps < 1 or beta <= 0.
    """
    if steps < 1 or not 0 < beta < float("inf"):
        raise ValueError(f"need steps >= 1 and a finite beta > 0, got steps={steps}, beta={beta}")
    t = (torch.arange(steps + 1, dtype=torch.float64) + 0.5) / (steps + 1)
    concentration = torch.tensor(beta, dtype=torch.float64)  # float32 inside Beta would cost 6 digits
    return torch.distributions.Beta(concentration, concentration).log_prob(t).exp()


def average_shares(average: str, value: float, steps: int) -> torch.Tensor:
    """Share s_t that theta_t takes of the average when it joins: average_t = (1 - s_t) average_{t-1} + s_t theta_t.

        bma       alpha_t / sum_{k<=t} alpha_k, Eq. 7; value: beta
        ema       1 - value; value: the decay
        uniform   1 / t: theta_1 ... theta_T alike, theta_0 left out
        wise-ft   value at t = T, else 0: only the two ends, zero-shot and fine-tuned (Wortsman et al., 2022)

    Returns: (T,) float64 for t = 1 ... T.
    Raises: ValueError if the value is out of range.
    """
    if average == "bma":
        weights = beta_weights(steps, value)
        return weights[1:] / weights.cumsum(0)[1:]
    if not 0 <= value <= 1:
        raise ValueError(f"the number of {average} must be between 0 and 1, got {value}")
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    return {"ema": torch.full_like(t, 1 - value), "uniform": 1 / t, "wise-ft": value * (t == steps).double()}[average]


class BetaMovingAverage(nn.Module):
    """Running average of a trajectory, Eq. 5-7: call `update(model)` after every optimizer step, then use `.model`.

        theta_t^BMA = ( sum_{k<t} alpha_k theta_{t-1}^BMA + alpha_t theta_t ) / sum_{k<=t} alpha_k

    It costs one extra copy of the weights whatever T, changed in place, float32 or more whatever the model's precision.

    Args:
        model: theta_0, copied.
        steps, beta: T and the shape of the weights, see `beta_weights`.
        shares: s_1 ... s_T of another average in place of BMA's, see `average_shares`.
    """

    def __init__(self, model: nn.Module, steps: int, beta: float = 0.5, shares: torch.Tensor | None = None):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self.shares = average_shares("bma", beta, steps).tolist() if shares is None else shares.tolist()
        self.register_buffer("step", torch.tensor(0))  # t, in the state dict; stays on the CPU

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in theta_t. Raises: IndexError after T updates."""
        share = self.shares[self.step]
        self.step += 1
        if share:
            average = list(self.model.parameters())
            current = [parameter.to(mean.dtype) for parameter, mean in zip(model.parameters(), average)]
            torch._foreach_lerp_(average, current, share)  # one fused pass over the weights
        for mean, buffer in zip(self.model.buffers(), model.buffers()):
            mean.copy_(buffer)


# ---------- Three tasks ----------------------------------------------------------------------------
def few_shot(images: common.ImageSet, shots: int, seed: int, none_ok: bool = False) -> common.ImageSet:
    """`shots` images of every class, drawn by `seed` without replacement; all of a class that has fewer (printed).

    Raises: InputError for a class without images, unless `none_ok`.
    """
    rng, chosen = common.tiny_rng(seed, "few shots"), []
    for label, name in enumerate(images.classes):
        own = np.flatnonzero(images.labels == label)
        if not len(own) and not none_ok:
            raise common.InputError(f"there is no image of class {name!r} to draw {shots} shots from")
        if len(own) < shots:
            print(f"class {name!r} has only {len(own)} images, fewer than {shots} shots: all are used", flush=True)
        chosen.append(rng.permutation(own)[:shots])
    return images.subset(np.concatenate(chosen))


def base_and_new(n: int, odd_to_base: bool = True) -> tuple[range, range]:
    """The first half of n classes and the rest; a middle one is base (open class) or new (in the wild)."""
    if n < 2:
        raise common.InputError(f"base and new classes need at least 2 classes, and the data set has {n}")
    base = (n + odd_to_base) // 2
    return range(base), range(base, n)


def harmonic_mean(base: float, new: float) -> float:
    """H of the accuracies on base and new classes; 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


@dataclass
class Task:
    """What one run sees. Every test is scored over the class names of its own images."""

    classes: tuple[str, ...]  # all, also the new ones
    train: dict[str, common.ImageSet]  # by source domain
    tests: dict[str, dict[str, common.ImageSet]]  # by test, then by domain or part


def load_data(args, seed: int):
    """The images of --dataset, {part: set} or a list of domains, and the targets that --target names."""
    if args.dataset not in common.OPEN_CLASS:
        domains = common.load_domains(args.dataset, args.data_root, seed, args.cue, also=common.OPEN_CLASS)
        return domains, common.choose_targets(args.target, [domain.name for domain in domains])
    data = common.load_parts(args.dataset, args.data_root)
    if args.task == "domain-shift":
        data |= {name: common.load_parts(name, args.data_root)["test"] for name in common.IMAGENET_SHIFTS}
    return data, [args.dataset]


def domain_shift(args, domains, target: str) -> Task:
    """Train on all domains but one."""
    split = common.leave_one_out(domains, target, None, None)
    source = split.source if domains[0].balanced else {}  # of real data it is the hold-out again
    if args.protocol == "official":
        index, images = [domain.name for domain in domains].index(target), split.target[target]
        split.target[target] = images.subset(common.domain_split(len(images), index)[0])
    tests = {"hold-out": split.holdout, "source": source, "target": split.target}
    return Task(domains[0].images.classes, split.train, tests)


def open_class(args, parts: dict, name: str, seed: int) -> Task:
    """Train on a few shots of the base classes; test base and new classes apart, each over their own names."""
    base, new = base_and_new(len(parts["train"].classes))
    train = few_shot(parts["train"].of_classes(base), args.shots, seed)
    tests = {"validation": few_shot(parts["val"].of_classes(base), min(args.shots, 4), seed, none_ok=True)}
    tests |= {"base": parts["test"].of_classes(base), "new": parts["test"].of_classes(new)}
    return Task(parts["train"].classes, {name: train}, {test: {name: images} for test, images in tests.items()})


def in_the_wild(args, domains, target: str) -> Task:
    """Train on the base classes of all domains but one; test on that one, over the names of all classes."""
    classes = domains[0].images.classes
    train, holdout, source, total = {}, {}, {}, {}
    for part, chosen in zip(("base", "new"), base_and_new(len(classes), odd_to_base=False)):
        of_part = lambda images: images.subset(np.flatnonzero(np.isin(images.labels, chosen)))  # noqa: E731
        for index, domain in enumerate(domains):
            images, balanced = of_part(domain.images), domain.balanced and of_part(domain.balanced)
            split = lambda n: common.domain_split(n, index, part="base" if part == "base" else "open")  # noqa: E731
            if domain.name == target:
                tested = balanced or images
                total[part] = tested.subset(split(len(tested))[0]) if args.protocol == "official" else tested
            elif part == "base":
                holdout[domain.name], rest = (images.subset(rows) for rows in split(len(images)))
                train[domain.name] = rest.of_classes(chosen)
                source |= {domain.name: balanced} if balanced else {}
    return Task(classes, train, {"hold-out": holdout, "source": source, "total": total})


def make_task(args, data, target: str, seed: int, preprocess, augment) -> Task:
    """The task of --task; `augment` is the transform of training images, `preprocess` that of all others."""
    if args.task == "in-the-wild":
        task = in_the_wild(args, data, target)
    elif args.task == "domain-shift" and args.dataset != "imagenet":
        task = domain_shift(args, data, target)
    elif args.task == "domain-shift":  # train on a few shots of all classes, test on the validation set and its shifts
        train = few_shot(data["train"], args.shots, seed)
        tests = {"imagenet": data["test"], **{name: data[name] for name in common.IMAGENET_SHIFTS}}
        task = Task(train.classes, {"imagenet": train}, {name: {name: images} for name, images in tests.items()})
    else:
        if args.dataset not in common.OPEN_CLASS:  # one domain as a data set; a real one is tested on what is held out
            (index, domain), *_ = [(i, domain) for i, domain in enumerate(data) if domain.name == target]
            held_out, rest = (domain.images.subset(i) for i in common.domain_split(len(domain.images), index))
            data = {"train": rest, "val": held_out, "test": domain.balanced or held_out}
        task = open_class(args, data, target, seed)
    at = lambda sets, transform: {name: replace(images, transform=transform) for name, images in sets.items()}  # noqa: E731
    tests = {name: at(sets, preprocess) for name, sets in task.tests.items() if sets}
    return Task(task.classes, at(task.train, augment), tests)


# ---------- Training and testing -------------------------------------------------------------------
def train(clip, task: Task, modes: dict[str, Mode], text, args, seed: int, state: dict | None = None):
    """Fine-tune a copy of CLIP's image tower with the one loss of `modes`; all their averages run along.

    Every epoch starts from a random state of its own, so that an interrupted run continues exactly at an epoch's end.

    Args: text: features of the training classes, (C, D); state: as yielded, to continue from there, or None.
    Yields: at the start and after every epoch {mode: model} and the state, its epoch and last loss included.
    Raises: InputError at a loss or gradient that is not finite, before it reaches the weights or an average.
    """
    loss_name, margin, *_ = next(iter(modes.values()))
    torch.manual_seed(seed)
    model = copy.deepcopy(clip.visual).requires_grad_(True)
    logit_scale = clip.logit_scale.exp().item()  # 1 / tau
    groups = [{"params": list(model.parameters())}]
    if loss_name == "linear":  # Eq. 1
        head = nn.Linear(text.shape[1], len(text), device=text.device)
        groups.append({"params": list(head.parameters()), "lr": args.head_lr})
        model = nn.Sequential(model, head)
    steps = args.epochs * args.steps_per_epoch
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == "fp16")
    averages = {name: BetaMovingAverage(model, steps, shares=average_shares(mode.average, mode.value, steps))
                for name, mode in modes.items() if mode.average}  # fmt: skip
    models = {name: averages[name].model if mode.average else model for name, mode in modes.items()}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler, **averages}
    for name, part in parts.items() if state else ():
        part.load_state_dict(state[name])
    # a batch brings the number of each image in place of its label, so that a bad batch can be named
    labels = torch.cat([images.labels for images in task.train.values()]).to(args.device)
    numbers = torch.arange(len(labels)).split([len(images) for images in task.train.values()])
    numbered = {name: replace(images, labels=own) for (name, images), own in zip(task.train.items(), numbers)}

    first, last_loss = (state["epoch"], state["loss"]) if state else (0, None)
    for epoch in range(first, args.epochs + 1):
        yield models, {"epoch": epoch, "loss": last_loss, **{name: part.state_dict() for name, part in parts.items()}}
        if epoch == args.epochs:
            return
        torch.manual_seed(seed * 1000 + epoch)  # for augmentation
        batches = common.source_batches(numbered, args.batch_size, seed * 1000 + epoch, args.workers)
        model.train()
        for i in tqdm(range(args.steps_per_epoch), f"{'/'.join(modes)} {epoch + 1}", leave=False, disable=None):
            images, number, _ = next(batches)
            y = labels[number]
            with common.autocast(args.device, args.precision):
                output = model(images.to(args.device, non_blocking=True))  # (B, D), or (B, C) of the linear classifier
            if loss_name == "linear":
                loss = F.cross_entropy(output.float(), y)
            else:
                loss = margin_metric_softmax(F.normalize(output.float(), dim=-1), text, y, logit_scale, margin)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            size = torch.stack(torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])).norm()
            if not (loss.isfinite() and (size.isfinite() or scaler.is_enabled())):  # fp16's scaler skips bad gradients
                names = [image if isinstance(image, str) else f"{domain} {i}"
                         for domain, images in task.train.items() for i, image in enumerate(images.images)]  # fmt: skip
                raise common.InputError(
                    f"step {epoch * args.steps_per_epoch + i + 1} of seed {seed}, learning rate "
                    f"{schedule.get_last_lr()[0]:.3g}: the loss is {loss.item()}, its gradient's norm {size.item()}; "
                    f"try a lower --lr, or look at this batch: {', '.join(names[k] for k in number)}"
                )
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            for average in averages.values():
                average.update(model)
        last_loss = loss.item()
        model.eval()


def classifier(model, mode: Mode, known, classes, features, args):
    """images (B, 3, h, w) -> scores over `classes` (B, C); None if it can name none of them.

    A linear classifier names only the classes it was trained on, `known`; any other gets the score -inf.
    """
    if mode.loss != "linear":
        return common.clip_classifier(model, features(classes), args.precision)
    columns = [known.index(name) if name in known else -1 for name in classes]

    def classify(images):
        with common.autocast(args.device, args.precision):
            scores = model(images)
        return F.pad(scores.float(), (0, 1), value=-torch.inf)[:, columns]

    return classify if max(columns) >= 0 else None


def test(model, mode: Mode, task: Task, features, args) -> dict:
    """Accuracy of one model, in [0, 1], in every test whose classes it can name: {test: accuracy}.

    In the wild also base and new, the parts of `total`; with both also H; for ImageNet also its shifts' average.
    """
    results, known = {}, next(iter(task.train.values())).classes
    for name, sets in task.tests.items():
        classify = classifier(model, mode, known, next(iter(sets.values())).classes, features, args)
        if classify:
            result = common.evaluate(classify, sets, args.device, 64, args.workers)
            results |= {**(result["per_domain"] if name == "total" else {}), name: result["accuracy"]}
    if "base" in results and "new" in results:
        results["H"] = harmonic_mean(results["base"], results["new"])
    shifts = [results[name] for name in common.IMAGENET_SHIFTS if name in results]
    return {**results, "average OOD": sum(shifts) / len(shifts)} if shifts else results


# ---------- Figures --------------------------------------------------------------------------------
def plot_averages(steps: int, ema: float, beta: float, path: Path) -> None:
    """Figure 4: what every theta_t weighs in the final average, and how the share of theta_0 develops."""
    final, start, t = {}, {}, range(steps + 1)
    for label, average, value in ((f"EMA {ema:g}", "ema", ema), (f"BMA {beta:g}", "bma", beta), ("BMA 1", "bma", 1.0)):
        kept, one = 1 - average_shares(average, value, steps), torch.ones(1)  # of the average, when theta_t joins
        start[label] = t, torch.cat([one, kept.cumprod(0)])
        final[label] = t, torch.cat([one, 1 - kept]) * torch.cat([kept.flip(0).cumprod(0).flip(0), one])
    panels = {rf"$\theta_t$ after {steps} steps": final, r"$\theta_0$ after t steps": start}
    common.plot_lines(panels, "t", "weight in the average", path, yscale="log")


def plot_trajectory(history: list[dict], measures: list[str], path: Path) -> None:
    """Accuracy of every mode along its trajectory."""
    panels = {measure: {} for measure in measures}
    for measure, curves in panels.items():
        for mode in dict.fromkeys(row["mode"] for row in history if measure in row):
            rows = [row for row in history if row["mode"] == mode]
            curves[mode] = [row["step"] for row in rows], [100 * row[measure] for row in rows]
    common.plot_lines(panels, "step", "accuracy, %", path)


def plot_sweep(args, runs: list[dict], path: Path) -> None:
    """Accuracy over lambda or beta, and zero-shot: averages over targets, mean and deviation over seeds."""
    curves, margin = {}, args.study == "margin"  # {label: {x: mode}}
    for name, mode in args.modes.items():
        if mode.loss != "zero-shot" and (margin or mode.average == "bma"):
            curves.setdefault("MMS + BMA" if mode.average else "MMS", {})[mode.margin if margin else mode.value] = name
    ends = [end(x for curve in curves.values() for x in curve) for end in (min, max)]
    curves["zero-shot"] = dict.fromkeys(ends, "zero-shot")
    y = lambda curve, measure: [100 * np.array(common.seed_means(runs, curve[x], measure)) for x in sorted(curve)]  # noqa: E731
    panels = {measure: {label: (sorted(curve), y(curve, measure)) for label, curve in curves.items()}
              for measure in runs[0]["modes"]["zero-shot"]}  # fmt: skip
    x_label = r"$\lambda$" if margin else r"$\beta$"
    common.plot_lines(panels, x_label, "accuracy, %", path, xscale="linear" if margin else "log")


def plot_distances(class_features: torch.Tensor, class_names, path: Path) -> None:
    """D(T_y, T_c), similar classes side by side (sorted by the similarities' second eigenvector)."""
    distances = class_distances(class_features.cpu())
    order = torch.linalg.eigh(1 - distances).eigenvectors[:, -2].argsort()
    side = min(9.0, 2.4 + 0.33 * len(order))
    figure, axes = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    image = axes.imshow(distances[order][:, order].numpy())
    names = [class_names[i].replace("_", " ") for i in order] if len(order) <= 70 else []  # more cannot be read
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(r"$D(T_y, T_c)$: the margin is $\lambda$ times this")
    figure.colorbar(image, shrink=0.7)
    common.save_figure(figure, path)


def plot_images(images: common.ImageSet, scores: dict[str, torch.Tensor], scale: float, path: Path) -> None:
    """Figure 6: the images whose true class the margin helped most (upper row) and hurt most (lower row).

    Args: scores: cosine similarities (n, C) after training with `ms` and with `mms`; scale: 1 / tau.
    """
    without, margin = ((scale * scores[name]).softmax(1) for name in ("ms", "mms"))
    gain = (margin - without)[range(len(images)), images.labels]
    order, columns = gain.argsort(descending=True).tolist(), 3
    figure, axes = plt.subplots(2, 2 * columns, figsize=(4.6 * columns, 5), layout="constrained")
    for k, i in enumerate([*order[:columns], *order[-columns:]]):
        picture, bars = axes[k // columns, 2 * (k % columns) : 2 * (k % columns) + 2]
        image = images.images[i]
        picture.imshow(common.read_image(image) if isinstance(image, str) else image.permute(1, 2, 0).numpy())
        picture.set(xticks=[], yticks=[], title=images.classes[images.labels[i]].replace("_", " "))
        top = (margin[i] + without[i]).topk(min(5, len(images.classes))).indices.flip(0)
        for shift, scores, label in ((0.2, margin, "with margin"), (-0.2, without, "without")):
            bars.barh(np.arange(len(top)) + shift, scores[i][top].numpy(), height=0.4, label=label)
        bars.set_yticks(range(len(top)), [images.classes[c].replace("_", " ") for c in top])
        bars.set(xlim=(0, 1), title=f"{gain[i]:+.2f}")
    axes[0, 1].legend(fontsize="x-small", loc="lower right")
    figure.suptitle("class probabilities; above them: what the margin adds to the true class")
    common.save_figure(figure, path)


# ---------- Runs -----------------------------------------------------------------------------------
def run(args, target: str, seed: int, task: Task, model, features) -> dict:
    """Train and test every mode for one target and seed, and write a folder. Returns {mode: {measure: accuracy}}."""
    free = ("output", "resume", "summary", "seeds", "target", "study", "device", "workers", "data_root")
    config = {name: value for name, value in vars(args).items() if name not in free} | {"target": target, "seed": seed}
    config = json.loads(json.dumps(config))  # as it will be read again
    task_name = [] if args.task == "domain-shift" else [args.task]
    path = "-".join(map(common.slug, [args.dataset, *task_name, target, f"seed{seed}"]))
    path = args.output / "clipood" / (args.study or "") / path
    checkpoint = path.with_name(f"{path.name}.checkpoint")
    saved = common.resume(checkpoint, path / "result.json", config) if args.resume else {}
    if "modes" in saved:
        print(f"{path}/ is complete", flush=True)
        return saved["modes"]
    saved = saved or {"settings": config, "results": {}, "scores": {}, "history": [], "training": {}}
    results, scores, history = saved["results"], saved["scores"], saved["history"]
    known = next(iter(task.train.values())).classes
    *_, examples = [images for sets in task.tests.values() for images in sets.values()]  # of the last test
    examples = examples.subset(np.linspace(0, len(examples) - 1, min(60, len(examples))))

    with common.run_folder(path) as folder:
        for modes in trainings(args.modes):
            if modes.keys() <= results.keys():
                continue
            models = dict.fromkeys(modes, model.visual)
            if "zero-shot" not in modes:
                start = saved["training"].get("/".join(modes))
                for models, state in train(model, task, modes, features(known), args, seed, start):
                    common.save_checkpoint(checkpoint, {**saved, "training": {"/".join(modes): state}})
                    if args.eval_every and state["epoch"] % args.eval_every == 0:
                        on_the_way = [name for name in modes if "@" not in name and modes[name].average != "wise-ft"]
                        for name in on_the_way:  # WISE-FT has only an end, variants would be too many
                            row = {"mode": name, "step": state["epoch"] * args.steps_per_epoch, "loss": state["loss"]}
                            history.append({**row, **test(models[name], modes[name], task, features, args)})
            for name, mode in modes.items():
                results[name] = test(models[name], mode, task, features, args)
                reached = ", ".join(f"{measure} {100 * value:.1f}" for measure, value in results[name].items())
                print(f"{name}: {reached} %", flush=True)
                if name in ("ms", "mms"):
                    classify = classifier(models[name], mode, known, examples.classes, features, args)
                    with torch.no_grad():
                        scores[name] = classify(examples.__getitems__(range(len(examples)))[0].to(args.device)).cpu()
        plot_distances(features(task.classes), task.classes, folder / "distances.png")
        plot_averages(args.epochs * args.steps_per_epoch, args.ema, args.beta, folder / "averages.png")
        if len(scores) == 2:
            plot_images(examples, scores, model.logit_scale.exp().item(), folder / "images.png")
        if history:
            plot_trajectory(history, [*task.tests], folder / "trajectory.png")
        if mode.loss != "linear":  # which is no CLIP
            common.export_clip(model, folder / "model", features(task.classes), task.classes, models[name])
        common.write_json(folder / "result.json", {"settings": config, "modes": results, "history": history})
    checkpoint.unlink(missing_ok=True)
    return results


def main():
    args = settings()
    tiny, runs, model = args.dataset.startswith("tiny-"), [], None
    print(f"{args.task} on {args.dataset}, model {args.model}, device {args.device}, {args.precision}", flush=True)
    for seed in args.seeds:
        if tiny or not runs:  # real data do not depend on the seed
            data, targets = load_data(args, seed)
        if model is None:  # after the data: a missing data set is said before weights are fetched
            model, preprocess, tokenizer = common.load_clip(args.model, args.pretrained, args.device)
            # tiny images are drawn in so many poses that they need no augmentation
            augment = preprocess if tiny else common.image_transform(model, train=True)
            features = functools.cache(
                lambda names: common.class_features(model, tokenizer, names, args.templates, args.device)
            )
        for target in targets:
            task = make_task(args, data, target, seed, preprocess, augment)
            sizes = ", ".join(f"{name} {len(images)}" for name, images in task.train.items())
            print(f"target {target}, seed {seed}: training images {sizes}", flush=True)
            runs.append({"target": target, "seed": seed, "modes": run(args, target, seed, task, model, features)})
            title = f"{args.dataset}, target {target}, seed {seed}, %"
            print("\n" + common.measures_table(title, runs[-1:]) + "\n", flush=True)
    if len(runs) > 1:
        print(common.measures_table(f"{args.dataset}, {args.task}, {len(targets)} targets, %", runs))
        for measure in {"target", "total"} & {*runs[0]["modes"][[*args.modes][-1]]}:
            by_target = common.summary_table(f"{measure} accuracy, %", args.modes, runs, lambda row: row[measure])
            print(f"\n{by_target}")
    if args.summary:
        common.write_json(args.summary, {"settings": vars(args), "runs": runs})
    if args.study in ("margin", "average"):
        plot_sweep(args, runs, args.summary.with_suffix(".png"))


if __name__ == "__main__":
    common.command(main)
