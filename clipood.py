"""CLIPood: fine-tune CLIP so that it still knows what it was not shown (Shu et al., ICML 2023).

Fine-tuning CLIP on one task makes it forget others: domains and classes that it does not show.
Two changes to the training of the image encoder keep more of it (arXiv 2302.00864):

margin metric softmax   classify by the text features of the class names, with a margin that grows
                        as two names differ in meaning (Eq. 3, 4)
beta moving average     average the whole training trajectory, heaviest at both ends: the zero-shot
                        and the fine-tuned model (Eq. 5 to 7)

The text encoder is frozen, the result is a plain CLIP, and no model is selected: the last average
is the answer.

    python clipood.py                                       # tiny-pacs, target sketch, on a CPU
    python clipood.py --dataset officehome --target all --seeds 0 1 2
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common


# ---------- Margin metric softmax ----------------------------------------------------------------
def class_distances(class_features: torch.Tensor) -> torch.Tensor:
    """D(T_a, T_b) = 1 - S(T_a, T_b), Eq. 4, of unit-norm class_features (C, D).

    Returns: (C, C) in [0, 2], symmetric, exactly 0 on the diagonal.
    """
    distances = (1 - class_features @ class_features.T).clamp(min=0)
    return ((distances + distances.T) / 2).fill_diagonal_(0)


def margin_metric_softmax(
    image_features, class_features, labels, logit_scale, margin
) -> torch.Tensor:
    """CLIPood's training loss, Eq. 3: a wrong class counts as `margin * D` more similar than it is.

        L = -log  exp(S(I_x, T_y) / tau) / sum_c exp( (S(I_x, T_c) + margin D(T_y, T_c)) / tau )

    Args:
        image_features, class_features: unit-norm, (B, D) and (C, D).
        labels: (B,) int64, the row y of each image's class.
        logit_scale: 1 / tau, CLIP's own.
        margin: lambda >= 0; 0 gives the metric softmax of Eq. 2.
    Returns: the mean over the batch, a scalar.
    Raises: ValueError if shapes do not fit or the margin is negative.
    """
    fits = image_features.ndim == 2 and image_features.shape[1:] == class_features.shape[1:]
    if not fits or margin < 0:
        shapes = f"{tuple(image_features.shape)} and {tuple(class_features.shape)}"
        need = "need features (B, D) and (C, D) and margin >= 0"
        raise ValueError(f"{need}, got {shapes}, margin={margin}")
    similarities = image_features @ class_features.T  # (B, C)
    margins = margin * class_distances(class_features)[labels]  # (B, C), 0 for c = y
    return F.cross_entropy(logit_scale * (similarities + margins), labels)


# ---------- Beta moving average ------------------------------------------------------------------
def beta_weights(steps: int, beta: float) -> torch.Tensor:
    """Weight alpha_t of every model on the trajectory theta_0 ... theta_T, Eq. 6.

    Beta(beta, beta) density at (t + 0.5) / (T + 1): beta < 1 favours both ends, the zero-shot and
    the fine-tuned model; beta = 1 is the uniform average of all T + 1.

    Returns: (T + 1,) float64, positive, not normalised.
    Raises: ValueError if steps < 1 or beta <= 0.
    """
    if steps < 1 or not 0 < beta < float("inf"):
        raise ValueError(f"need steps >= 1 and a finite beta > 0, got steps={steps}, beta={beta}")
    t = (torch.arange(steps + 1, dtype=torch.float64) + 0.5) / (steps + 1)
    concentration = torch.tensor(beta, dtype=torch.float64)  # float32 would cost 6 digits
    return torch.distributions.Beta(concentration, concentration).log_prob(t).exp()


def average_shares(average: str, value: float, steps: int) -> torch.Tensor:
    """Share s_t of theta_t when it joins: average_t = (1 - s_t) average_{t-1} + s_t theta_t.

        bma       alpha_t / sum_{k<=t} alpha_k, Eq. 7; value: beta
        ema       1 - value; value: the decay
        uniform   1 / t: theta_1 ... theta_T alike, theta_0 left out
        wise-ft   value at t = T, else 0: only both ends (Wortsman et al., 2022)

    Returns: (T,) float64 for t = 1 ... T.
    Raises: ValueError if the value is out of range.
    """
    if average == "bma":
        weights = beta_weights(steps, value)
        return weights[1:] / weights.cumsum(0)[1:]
    if not 0 <= value <= 1:
        raise ValueError(f"the number of {average} must be between 0 and 1, got {value}")
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    if average == "ema":
        return torch.full_like(t, 1 - value)
    if average == "uniform":
        return 1 / t
    return value * (t == steps).double()


class BetaMovingAverage(nn.Module):
    """Running average of a trajectory, Eq. 5-7: `update(model)` every step, then use `.model`.

        theta_t^BMA = ( sum_{k<t} alpha_k theta_{t-1}^BMA + alpha_t theta_t ) / sum_{k<=t} alpha_k

    It costs one extra copy of the weights whatever T, changed in place, float32 or more whatever
    the model's precision.

    Args:
        model: theta_0, copied.
        steps, beta: T and the shape of the weights, see `beta_weights`.
        shares: s_1 ... s_T of another average in place of BMA's, see `average_shares`.
    """

    def __init__(self, model: nn.Module, steps: int, beta: float = 0.5, shares=None):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        for parameter in self.model.parameters():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(wide)
        shares = average_shares("bma", beta, steps) if shares is None else shares
        self.shares = shares.tolist()
        self.register_buffer("step", torch.tensor(0))  # t, in the state dict; stays on the CPU

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in theta_t. Raises: IndexError after T updates."""
        share = self.shares[self.step]
        self.step += 1
        if share:
            average = list(self.model.parameters())
            pairs = zip(model.parameters(), average)
            current = [parameter.to(mean.dtype) for parameter, mean in pairs]
            torch._foreach_lerp_(average, current, share)  # one fused pass over the weights
        for mean, buffer in zip(self.model.buffers(), model.buffers()):
            mean.copy_(buffer)


# ---------- Training (Algorithm 1) ---------------------------------------------------------------
def training_parts(clip, rows: dict, class_features, steps: int) -> dict:
    """All that changes in a training: a copy of the image tower, its optimizer, its averages."""
    row = next(iter(rows.values()))
    model = copy.deepcopy(clip.visual).requires_grad_(True)
    groups = [{"params": list(model.parameters())}]
    if row.loss == "linear":  # Eq. 1: what the class names say is not used
        C, D = class_features.shape
        head = nn.Linear(D, C, device=clip.device)
        groups.append({"params": list(head.parameters()), "lr": row.head_lr})
        model = nn.Sequential(model, head)
    optimizer = torch.optim.AdamW(groups, lr=row.lr, weight_decay=row.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(clip.device.type, enabled=clip.precision == "fp16")
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    for name, own in rows.items():
        if own.average:
            numbers = {"bma": own.beta, "ema": own.ema, "wise-ft": own.wise_ft, "uniform": 0}
            shares = average_shares(own.average, numbers[own.average], steps)
            parts[name] = BetaMovingAverage(model, steps, shares=shares)
    return parts


def train(clip, task: common.Task, rows: dict, class_features, seed: int, saved=None):
    """Fine-tune a copy of CLIP's image tower with the one loss of `rows`; all averages run along.

    Every epoch starts from a random state of its own, so that an interrupted training continues
    exactly at an epoch's end.

    Args:
        rows: {name: row}, which differ in how the trajectory is averaged, see `trainings`.
        class_features: of the training classes, (C, D).
        saved: a state that was yielded, to go on from there.
    Yields: at the start and after every epoch {name: model} and the state.
    Raises: InputError at a loss or gradient that is not finite, before it reaches any weights.
    """
    row = next(iter(rows.values()))
    torch.manual_seed(seed)
    parts = training_parts(clip, rows, class_features, row.epochs * row.steps_per_epoch)
    state = saved or {"epoch": 0, "loss": None}
    for name, part in parts.items():
        if saved:
            part.load_state_dict(saved[name])
    model, optimizer, schedule, scaler, *averages = parts.values()
    models = {name: parts[name].model if name in parts else model for name in rows}
    image_sets, labels, names = numbered(task.train)
    labels = labels.to(clip.device)

    yield models, state | {name: part.state_dict() for name, part in parts.items()}
    for epoch in range(state["epoch"], row.epochs):
        epoch_seed = seed * 1000 + epoch
        torch.manual_seed(epoch_seed)  # for augmentation
        batches = common.source_batches(image_sets, row.batch_size, epoch_seed, row.workers)
        model.train()
        title = f"{'/'.join(rows)} {epoch + 1}"
        for step in tqdm(range(row.steps_per_epoch), title, leave=False, disable=None):
            images, numbers, _ = next(batches)  # (S b, 3, h, w), (S b,)
            y = labels[numbers]
            with common.autocast(clip.device, clip.precision):
                output = model(images.to(clip.device, non_blocking=True))  # (S b, D or C)
            if row.loss == "linear":
                loss = F.cross_entropy(output.float(), y)
            else:
                features = F.normalize(output.float(), dim=-1)
                scale, margin = clip.logit_scale, row.margin
                loss = margin_metric_softmax(features, class_features, y, scale, margin)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            where = f"step {epoch * row.steps_per_epoch + step + 1} of seed {seed}"
            check_finite(loss, optimizer, scaler, where, [names[i] for i in numbers])
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            for average in averages:
                average.update(model)
        model.eval()
        state = {"epoch": epoch + 1, "loss": loss.item()}
        yield models, state | {name: part.state_dict() for name, part in parts.items()}


def numbered(train: dict[str, common.ImageSet]):
    """Training sets that bring running numbers in place of labels, so that a bad batch can be
    named; the labels (N,) of these numbers, and the N names."""
    image_sets, labels, names = {}, [], []
    for domain, images in train.items():
        numbers = torch.arange(len(names), len(names) + len(images))
        image_sets[domain] = replace(images, labels=numbers)
        labels.append(images.labels)
        names += [f"{domain} {images.name(i)}" for i in range(len(images))]
    return image_sets, torch.cat(labels), names


def check_finite(loss, optimizer, scaler, where: str, names: list[str]) -> None:
    """Raises: InputError that names step, learning rate and images, if something is not finite."""
    gradients = []
    for group in optimizer.param_groups:
        gradients += [p.grad for p in group["params"] if p.grad is not None]
    size = torch.stack(torch._foreach_norm(gradients)).norm()
    # fp16's scaler skips gradients that are not finite
    if loss.isfinite() and (size.isfinite() or scaler.is_enabled()):
        return
    rate = optimizer.param_groups[0]["lr"]
    raise common.InputError(
        f"{where}, learning rate {rate:.3g}: the loss is {loss.item()}, its gradient's norm "
        f"{size.item()}; try a lower --lr, or look at this batch: {', '.join(names)}"
    )


# ---------- Testing ------------------------------------------------------------------------------
IMAGENET_SHIFTS = ["imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r"]


def classifier(clip, model, row, trained: tuple, classes: tuple, text_features):
    """images (B, 3, h, w) -> scores over `classes` (B, C); None if it can name none of them.

    A linear classifier names only the classes it was trained on; any other gets the score -inf.
    """
    if row.loss != "linear":
        return common.clip_classifier(model, text_features(classes), clip.precision)
    columns = [trained.index(name) if name in trained else -1 for name in classes]

    def classify(images):
        with common.autocast(images.device, clip.precision):
            scores = model(images)
        return F.pad(scores.float(), (0, 1), value=-torch.inf)[:, columns]

    return classify if max(columns) >= 0 else None


def test(clip, model, row, task: common.Task, text_features) -> dict[str, float]:
    """Accuracy of one model in every test whose classes it can name: {test: accuracy in [0, 1]}.

    In the wild also base and new, the parts of `total`; with both also H; for ImageNet also its
    shifts' average. text_features: class names -> (C, D).
    """
    measures, trained = {}, first(task.train).classes
    for name, sets in task.tests.items():
        classify = classifier(clip, model, row, trained, first(sets).classes, text_features)
        if classify is None:
            continue
        accuracies = common.evaluate(classify, {name: sets}, clip.device, row.workers, 64)
        if name == "total":
            measures |= {"base": accuracies["total/base"], "new": accuracies["total/new"]}
        measures[name] = accuracies[name]
    if "base" in measures and "new" in measures:
        measures["H"] = harmonic_mean(measures["base"], measures["new"])
    shifts = [measures[name] for name in IMAGENET_SHIFTS if name in measures]
    if shifts:
        measures["average OOD"] = sum(shifts) / len(shifts)
    return measures


def first(sets: dict[str, common.ImageSet]) -> common.ImageSet:
    """All sets of a test, and all sources, have the same classes."""
    return next(iter(sets.values()))


def harmonic_mean(base: float, new: float) -> float:
    """H of the accuracies on base and new classes; 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


# ---------- Three tasks: unseen domains, unseen classes, both ------------------------------------
def few_shot(images: common.ImageSet, shots: int, seed: int, none_ok=False) -> common.ImageSet:
    """`shots` images of every class, drawn without replacement; all of a class that has fewer.

    Raises: InputError for a class without images, unless `none_ok`.
    """
    rng, chosen = common.tiny_rng(seed, "few shots"), []
    for label, name in enumerate(images.classes):
        own = np.flatnonzero(images.labels == label)
        if not len(own) and not none_ok:
            what = f"there is no image of class {name!r} to draw {shots} shots from"
            raise common.InputError(what)
        if len(own) < shots:
            few = f"class {name!r} has only {len(own)} images, fewer than {shots} shots"
            print(f"{few}: all are used")
        chosen.append(rng.permutation(own)[:shots])
    return images.subset(np.concatenate(chosen))


def base_and_new(n: int, odd_to_base: bool = True) -> tuple[range, range]:
    """The first half of n classes and the rest; a middle one is base (open class) or new (wild)."""
    if n < 2:
        raise common.InputError(f"base and new classes need at least 2 classes, there are {n}")
    base = (n + odd_to_base) // 2
    return range(base), range(base, n)


def domain_shift(args, domains, target: str) -> common.Task:
    """Train on all domains but one."""
    task = common.leave_one_out(domains, target, None, None)
    if args.protocol == "official":
        index = [domain.name for domain in domains].index(target)
        images = task.tests["target"][target]
        held_out, _ = common.domain_split(len(images), index)
        task.tests["target"] = {target: images.subset(held_out)}
    return task


def imagenet_shift(args, parts: dict, seed: int) -> common.Task:
    """Train on a few shots of all classes; test on the validation set and on what shifts it."""
    train = few_shot(parts["train"], args.shots, seed)
    tests = {"imagenet": {"imagenet": parts["test"]}}
    for name in IMAGENET_SHIFTS:
        tests[name] = {name: parts[name]}
    return common.Task(train.classes, {"imagenet": train}, tests)


def open_class(args, parts: dict, name: str, seed: int) -> common.Task:
    """Train on a few shots of base classes; test base and new apart, each over its own names."""
    classes = parts["train"].classes
    base, new = base_and_new(len(classes))
    train = few_shot(parts["train"].of_classes(base), args.shots, seed)
    few = min(args.shots, 4)
    validation = few_shot(parts["val"].of_classes(base), few, seed, none_ok=True)
    tests = {"validation": {name: validation}}
    tests["base"] = {name: parts["test"].of_classes(base)}
    tests["new"] = {name: parts["test"].of_classes(new)}
    return common.Task(classes, {name: train}, tests)


def parts_of_domain(domains, target: str) -> dict[str, common.ImageSet]:
    """One domain as a data set; a real one, without a balanced part, is tested on its hold-out."""
    index = [domain.name for domain in domains].index(target)
    images = domains[index].images
    held_out, rest = common.domain_split(len(images), index)
    held_out = images.subset(held_out)
    tested = domains[index].balanced or held_out
    return {"train": images.subset(rest), "val": held_out, "test": tested}


def in_the_wild(args, domains, target: str) -> common.Task:
    """Train on the base classes of all domains but one; test that one, over all class names."""
    classes = domains[0].images.classes
    base, new = base_and_new(len(classes), odd_to_base=False)
    train, holdout, source, total = {}, {}, {}, {}
    for index, domain in enumerate(domains):
        if domain.name == target:
            tested = domain.balanced or domain.images
            total = {"base": with_labels(tested, base), "new": with_labels(tested, new)}
            if args.protocol == "official":
                for part, key in (("base", "base"), ("new", "open")):
                    held_out, _ = common.domain_split(len(total[part]), index, part=key)
                    total[part] = total[part].subset(held_out)
            continue
        images = with_labels(domain.images, base)
        held_out, rest = common.domain_split(len(images), index, part="base")
        holdout[domain.name] = images.subset(held_out)
        train[domain.name] = images.subset(rest).of_classes(base)
        if domain.balanced:
            source[domain.name] = with_labels(domain.balanced, base)
    return common.Task(classes, train, {"hold-out": holdout, "source": source, "total": total})


def with_labels(images: common.ImageSet, chosen: range) -> common.ImageSet:
    return images.subset(np.flatnonzero(np.isin(images.labels, chosen)))


def load_data(args, seed: int):
    """The images of --dataset: a list of domains, or {part: images}."""
    if args.dataset not in common.dataset_names("parts"):
        return common.load_domains(args.dataset, args.data_root, seed, args.cue, PARTED)
    parts = common.load_parts(args.dataset, args.data_root)
    if args.task == "domain-shift":
        for name in IMAGENET_SHIFTS:
            parts[name] = common.load_parts(name, args.data_root)["test"]
    return parts


def make_task(args, data, target: str, seed: int, preprocess, augment) -> common.Task:
    """The task of --task; training images are transformed by `augment`, others by `preprocess`."""
    parted = isinstance(data, dict)
    if args.task == "in-the-wild":
        task = in_the_wild(args, data, target)
    elif args.task == "open-class":
        parts = data if parted else parts_of_domain(data, target)
        task = open_class(args, parts, target, seed)
    else:
        task = imagenet_shift(args, data, seed) if parted else domain_shift(args, data, target)
    for name, images in task.train.items():
        task.train[name] = images.transformed(augment)
    for sets in task.tests.values():
        for name, images in sets.items():
            sets[name] = images.transformed(preprocess)
    task.tests = {test: sets for test, sets in task.tests.items() if sets}
    return task


# ---------- Pictures -----------------------------------------------------------------------------
def plot_averages(args, path: Path) -> None:
    """Figure 4: what theta_t weighs in the final average, and how theta_0's share develops."""
    steps = args.epochs * args.steps_per_epoch
    t, one = range(steps + 1), torch.ones(1)
    final, start = {}, {}
    averages = [("EMA", "ema", args.ema), ("BMA", "bma", args.beta), ("BMA", "bma", 1.0)]
    for label, average, value in averages:
        shares = average_shares(average, value, steps)  # of theta_1 ... theta_T, as they join
        decay = 1 - shares  # of all before
        until_end = torch.cat([decay.flip(0).cumprod(0).flip(0), one])
        start[f"{label} {value:g}"] = t, torch.cat([one, decay.cumprod(0)])
        final[f"{label} {value:g}"] = t, torch.cat([one, shares]) * until_end
    panels = {rf"$\theta_t$ after {steps} steps": final, r"$\theta_0$ after t steps": start}
    common.plot_panels(panels, "t", "weight in the average", path, yscale="log")


def plot_trajectory(extra: dict, measures: list[str], path: Path) -> None:
    """Accuracy of every row along its trajectory."""
    panels = {measure: {} for measure in measures}
    for measure, curves in panels.items():
        for name, own in extra.items():
            points = [point for point in own["history"] if measure in point]
            steps = [point["step"] for point in points]
            curves[name] = steps, [100 * point[measure] for point in points]
    common.plot_panels(panels, "step", "accuracy, %", path)


def plot_sweep(args, records: list[dict]) -> None:
    """Accuracy over lambda or beta: averages over targets, mean and deviation over seeds."""
    setting = {"margin": "margin", "average": "beta"}[args.study]
    panels = {}
    for measure in common.measures_of(records):
        curves = {"MMS": {}, "MMS + BMA": {}, "zero-shot": {}}  # {label: {value: accuracies}}
        for name, row in args.rows.items():
            accuracies = 100 * np.array(common.seed_means(records, name, measure))
            if row.loss == "zero-shot":
                zero_shot = accuracies
            elif row.average == "bma":
                curves["MMS + BMA"][getattr(row, setting)] = accuracies
            elif setting == "margin":
                curves["MMS"][row.margin] = accuracies
        values = curves["MMS + BMA"]
        curves["zero-shot"] = {min(values): zero_shot, max(values): zero_shot}
        panels[measure] = {label: zip(*sorted(c.items())) for label, c in curves.items() if c}
    scale = "linear" if setting == "margin" else "log"
    path = args.summary.with_name(f"{args.summary.stem}-sweep.png")
    common.plot_panels(panels, setting, "accuracy, %", path, xscale=scale)
    print(f"Accuracy over {setting} is in {path}")


def plot_distances(class_features: torch.Tensor, class_names, path: Path) -> None:
    """D(T_y, T_c), similar classes side by side (by the similarities' second eigenvector)."""
    distances = class_distances(class_features.cpu())
    order = torch.linalg.eigh(1 - distances).eigenvectors[:, -2].argsort()
    names = [class_names[i].replace("_", " ") for i in order]
    title = r"$D(T_y, T_c)$: the margin is $\lambda$ times this"
    common.plot_heat(distances[order][:, order], title, "", "", path, names=(names, names))


def example_scores(clip, models: dict, rows: dict, task, text_features) -> dict:
    """Figure 6, for a picture of your own: scores (60, C) of images of the last test, by row."""
    *_, images = list(task.tests.values())[-1].values()
    chosen = np.linspace(0, len(images) - 1, min(60, len(images)), dtype=int)
    images, scores = images.subset(chosen), {"images": chosen.tolist()}
    for name, row in rows.items():
        own = models[name], row, first(task.train).classes, images.classes
        classify = classifier(clip, *own, text_features)
        if classify:
            scores[name] = common.outputs(classify, images, clip.device, 64).tolist()
    return scores


# ---------- What the paper compares --------------------------------------------------------------
def all_rows() -> dict[str, dict]:
    """A loss, alone or with an average: `mms+bma`. Numbers follow as settings:
    `mms+bma/margin=0.5/beta=0.1`."""
    rows = {"zero-shot": {"loss": "zero-shot", "average": ""}}
    for loss in ("linear", "ms", "mms"):
        margin = {"margin": 0.0} if loss == "ms" else {}  # Eq. 2 is Eq. 3 without margin
        rows[loss] = {"loss": loss, "average": "", **margin}
        for average in ("ema", "uniform", "wise-ft", "bma"):
            rows[f"{loss}+{average}"] = {"loss": loss, "average": average, **margin}
    return rows


ROWS = all_rows()
MODES = ["zero-shot", "mms", "mms+wise-ft", "mms+bma"]
MARGINS = ["/margin=0.1", "/margin=0.5", "/margin=1", ""]
BETAS = ["/beta=0.1", "/beta=0.3", "/beta=1", "/beta=2", ""]
STUDIES = {
    "loss": ["zero-shot", "linear", "ms", "mms"],
    "margin": ["zero-shot", "ms", "ms+bma"],
    "average": ["zero-shot", "mms", "mms+ema", "mms+uniform", "mms+wise-ft"],
    "components": ["zero-shot", "linear", "ms", "mms", "mms+wise-ft", "mms+bma"],
}
for margin in MARGINS:
    STUDIES["margin"] += [f"mms{margin}", f"mms+bma{margin}"]
STUDIES["average"] += [f"mms+bma{beta}" for beta in BETAS]

# what a trajectory depends on; averages do not change it
OF_TRAJECTORY = "loss margin batch_size lr head_lr weight_decay epochs steps_per_epoch".split()


def trainings(rows: dict) -> list[dict]:
    """Rows that are averages of one trajectory together. That of the last row comes last."""
    groups = {}
    for name, row in reversed(rows.items()):
        trajectory = tuple(getattr(row, setting) for setting in OF_TRAJECTORY)
        groups.setdefault(trajectory, {})[name] = row
    return [dict(reversed(group.items())) for group in reversed(groups.values())]


# ---------- Settings -----------------------------------------------------------------------------
TASKS = ("domain-shift", "open-class", "in-the-wild")
PARTED = [name for name, row in common.DATASETS.items() if "template" in row]
OF_ALL_ROWS = [
    common.TARGET,
    ("task", TASKS, None, None, "unseen domains, classes, or both (domain-shift if it can)"),
    ("protocol", ("whole", "official"), "whole", "whole", "target: all, or 20 % as authors' code"),
    ("shots", common.at_least(1), 16, 16, "training images per class of few-shot sets (published)"),
    ("templates", [str], None, None, "prompts, averaged; or: ensemble (default: see below)"),
    ("eval-every", common.at_least(0), None, None, "epochs between tests (0; 1 in study average)"),
]
BELOW = "(default: see below)"
SETTINGS = [
    ("margin", common.at_least(0, float), None, None, f"lambda of MMS, Eq. 3 {BELOW}"),
    ("beta", common.positive, None, None, f"of BMA, Eq. 6 {BELOW}"),
    ("ema", common.share, 0.999, 0.95, "decay of EMA, our choice"),
    ("wise-ft", common.share, 0.5, 0.5, "share of the fine-tuned weights, our choice"),
    ("batch-size", common.at_least(1), None, None, f"images per source domain in a step {BELOW}"),
    ("lr", common.positive, None, None, f"at the start; a cosine takes it to 0 {BELOW}"),
    ("head-lr", common.positive, 1e-3, 3e-3, "of the linear classifier, our choice"),
    ("weight-decay", common.at_least(0, float), 0.1, 0.1, "of AdamW, published"),
    ("epochs", common.at_least(1), None, None, BELOW),
    ("steps-per-epoch", common.at_least(1), 500, 20, "published: 500"),
]
METHOD = common.Method("clipood", SETTINGS, ROWS, STUDIES)
# chosen on source hold-outs
TINY = {
    "domain-shift": {"batch_size": 12, "lr": 4e-4, "epochs": 6, "margin": 0.3, "beta": 0.5},
    "open-class": {"batch_size": 36, "lr": 4e-4, "epochs": 2, "margin": 0.3, "beta": 0.1},
    "in-the-wild": {"batch_size": 12, "lr": 2e-4, "epochs": 4, "margin": 0.1, "beta": 0.1},
}
# whose settings a data set takes for which none are published
USUAL = {"domain-shift": "pacs", "open-class": "caltech101", "in-the-wild": "officehome"}


def published(dataset: str, task: str) -> dict | None:
    return common.DATASETS.get(dataset, {}).get("clipood", {}).get(task)


def defaults_table() -> str:
    """What --help says of defaults that depend on the task and the data set."""
    columns, rows = ["batch_size", "lr", "epochs", "margin", "beta"], {}
    for task in TASKS:
        own = {name: published(name, task) for name in common.DATASETS if published(name, task)}
        own |= {"tiny CLIP": TINY[task], "any other": published(USUAL[task], task)}
        for name, row in own.items():
            cells = [f"{row[column]:g}" for column in columns]
            rows[f"{task}, {name}"] = [*cells, row.get("source", "our choice")]
    prompts = [f"  {name:14} {common.DATASETS[name]['template']}" for name in PARTED]
    table = common.format_table("defaults", [*columns, "source"], rows)
    return "\n".join([table, "", "prompts (any other data set: a photo of a {}.)", *prompts])


def preset(args) -> dict:
    """Defaults that depend on the task and the data set."""
    parted = args.dataset in common.dataset_names("parts")
    task = args.task or ("open-class" if parted and args.dataset != "imagenet" else "domain-shift")
    if parted and task != "open-class" and (args.dataset, task) != ("imagenet", "domain-shift"):
        what = f"--task {task} needs domains, {args.dataset} has none"
        raise common.InputError(f"{what}: use --task open-class")
    tiny = args.model == "tiny" or (args.model is None and args.dataset.startswith("tiny-"))
    own = TINY[task] if tiny else published(args.dataset, task) or published(USUAL[task], task)
    template = common.DATASETS.get(args.dataset, {}).get("template", "a photo of a {}.")
    own = {**own, "task": task, "templates": [template], "eval_every": 0}
    if args.study == "average":
        own["eval_every"] = 1
    if args.study:
        name = f"clipood-{args.study}-{common.slug(args.dataset)}-{task}.json"
        own["summary"] = Path("results", name)
    return own


# ---------- main ---------------------------------------------------------------------------------
def compare(args, clip, task: common.Task, run, seed: int, text_features) -> None:
    """Train and test every row for one target and seed; the last one is exported."""
    plot_distances(text_features(task.classes), task.classes, run.folder / "distances.png")
    plot_averages(args, run.folder / "averages.png")
    for rows in trainings(args.rows):
        if rows.keys() <= run.rows.keys():
            continue
        models, state = dict.fromkeys(rows, clip.visual), None
        if first(rows).loss != "zero-shot":
            trained = text_features(first(task.train).classes)
            saved = (run.state or {}).get("/".join(rows))  # it may belong to another training
            for models, state in train(clip, task, rows, trained, seed, saved):
                if args.eval_every and state["epoch"] % args.eval_every == 0:
                    test_on_the_way(clip, models, rows, task, run, state, text_features)
                run.save({"/".join(rows): state})
        if args.figures:
            scores = example_scores(clip, models, rows, task, text_features)
            run.extra.setdefault("scores", {}).update(scores)
        for name, row in rows.items():
            if name == args.modes[-1] and row.loss != "linear":  # which is no CLIP
                own = text_features(task.classes), task.classes, models[name]
                common.export_clip(clip, run.folder / "model", *own)
            measures = test(clip, models[name], row, task, text_features)
            run.add(name, measures, {"/".join(rows): state})  # trained, if it is killed here
    if "scores" in run.extra:
        np.savez(run.folder / "analysis.npz", **run.extra.pop("scores"))
    if run.extra:
        plot_trajectory(run.extra, list(task.tests), run.folder / "trajectory.png")


def test_on_the_way(clip, models, rows, task, run, state, text_features) -> None:
    """A point of every trajectory. WiSE-FT has only an end, rows with a `/` would be too many."""
    for name, row in rows.items():
        if "/" in name or row.average == "wise-ft":
            continue
        history = run.extra.setdefault(name, {"history": []})["history"]
        step = state["epoch"] * row.steps_per_epoch
        if not history or history[-1]["step"] < step:  # not again after an interruption
            measures = test(clip, models[name], row, task, text_features)
            history.append({"step": step, "loss": state["loss"], **measures})


def main():
    names = common.dataset_names("domains") + PARTED
    args = common.flags(METHOD, f"{__doc__}\n{defaults_table()}", MODES, names, OF_ALL_ROWS)
    args = common.settle(args, preset(args))
    data, targets = load_data(args, args.seeds[0]), [args.dataset]
    if isinstance(data, list):
        targets = common.choose_targets(args.target, [domain.name for domain in data])
    clip = common.load_clip(args.model, args.pretrained, args.device, args.precision)
    tiny = args.dataset.startswith("tiny-")
    augment = common.training_transform(clip, args.dataset)

    @functools.cache
    def text_features(classes):
        return clip.class_features(classes, args.templates)

    records, label = [], "" if args.task == "domain-shift" else args.task
    for seed in args.seeds:
        if tiny and seed != args.seeds[0]:  # real data do not depend on the seed
            data = load_data(args, seed)
        for target in targets:
            print(f"\n{args.task} on {args.dataset}, target {target}, seed {seed}", flush=True)
            with common.open_run(args, target, seed, label) as run:
                if not run.complete:
                    task = make_task(args, data, target, seed, clip.preprocess, augment)
                    compare(args, clip, task, run, seed, text_features)
            records.append(run.record)
    common.report(args, records, main_measure(records))
    if args.study in ("margin", "average"):
        plot_sweep(args, records)


def main_measure(records: list[dict]) -> str:
    """What a task is about; a linear classifier has no H."""
    measures = common.measures_of(records)
    names = ("target", "total", "H", "average OOD", "base")
    return next(name for name in names if name in measures)


if __name__ == "__main__":
    common.command(main)
