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
import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

import common
from common import parallel, prompts, runs, tables


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
        self.step = 0  # t

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

    def get_extra_state(self) -> int:
        """t goes with the state dict."""
        return self.step

    def set_extra_state(self, step: int) -> None:
        self.step = step


# ---------- Training (Algorithm 1) ---------------------------------------------------------------
IS_CLIP = ("zero-shot", "ms", "mms")  # what is learnt is an image tower
PROMPTS = {"coop": prompts.CoOp, "cocoop": prompts.CoCoOp}  # what is learnt is words


def train(clip, task: common.Task, rows: dict, class_features, seed: int, run=None) -> dict:
    """Fine-tune a copy of CLIP's image tower with the one loss of `rows`; all averages run along.

    The model stays in eval mode, as in the authors' code: norms with statistics keep CLIP's. Every
    epoch draws images by a seed of its own.

    Args: rows: {name: row}, which differ in how the trajectory is averaged, see `trainings`;
    class_features (C, D) of the training classes; run: keeps a checkpoint after every epoch, and
    may have one to go on from. Returns: {name: model}.
    Raises: InputError if the loss is not finite.
    """
    row, name = first(rows), "/".join(rows)
    torch.manual_seed(seed)
    parts, averages = training_parts(clip, task, rows, class_features)
    model, optimizer, schedule, scaler, *_ = parts.values()
    models = {key: averages[key].model if key in averages else model for key in rows}
    start = load_state(parts, run.state.get(name) if run else None)
    half = stored_in_half(model, row.storage)
    half_averages = []
    for average in averages.values():
        half_averages += stored_in_half(average.model, row.storage)
    round_to_half(half + half_averages)
    if start == 0:
        watch(clip, models, rows, task, run, 0)
    replica = parallel.data_parallel(model)
    replica = runs.compiled(replica, row.compile and row.loss not in PROMPTS)
    loader = {"stop": row.steps_per_epoch, "workers": row.workers, "device": clip.device}
    for epoch in range(start, row.epochs):
        batches = common.source_batches(task.train, row.batch_size, seed * 1000 + epoch, **loader)
        bar = {"desc": f"{name} {epoch + 1}", "total": row.steps_per_epoch, "leave": False}
        for images, labels in tqdm(batches, **bar, disable=None):
            with common.autocast(clip.device, clip.precision):
                output = replica(images)  # (S b, D or C)
            loss = loss_of(row, output, labels, class_features, clip.logit_scale)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)  # optimizer.step(), which fp16 skips where a gradient overflows
            scaler.update()
            schedule.step()
            round_to_half(half)
            for average in averages.values():
                average.update(model)
            round_to_half(half_averages)
        runs.check_finite(loss, f"{name}, epoch {epoch + 1}", row.lr)
        watch(clip, models, rows, task, run, epoch + 1, parallel.mean_over_ranks(loss))
        if run:
            state = {key: part.state_dict() for key, part in parts.items()}
            run.save({name: {"epoch": epoch + 1, **state}})
    return models


def load_state(parts: dict, state: dict | None) -> int:
    """Put a training where a checkpoint left it. Returns: how many epochs are done."""
    if state is None:
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["epoch"]


def training_parts(clip, task, rows: dict, class_features) -> tuple[dict, dict]:
    """All that changes in a training, {name: part}: a copy of the image tower, or learned words;
    its optimizer; its averages, which are also given apart."""
    row, steps = first(rows), first(rows).epochs * first(rows).steps_per_epoch
    model = copy.deepcopy(clip.visual).requires_grad_(True)
    groups = [{"params": list(model.parameters())}]
    if row.loss == "linear":  # Eq. 1: what the class names say is not used
        C, D = class_features.shape
        head = nn.Linear(D, C, device=clip.device)
        groups.append({"params": list(head.parameters()), "lr": row.head_lr})
        model = nn.Sequential(model, head)
    options = {"lr": row.lr, "weight_decay": row.weight_decay}
    optimizer = torch.optim.AdamW(groups, **options, fused=clip.device.type == "cuda")
    if row.loss in PROMPTS:  # the tower stays as it is
        classes = first(task.train).classes
        model = prompts.PromptClassifier(PROMPTS[row.loss](clip, classes))
        optimizer = torch.optim.SGD(model.parameters(), **PROMPT_SGD)
    parts = {
        "model": model,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "scaler": torch.amp.GradScaler(clip.device.type, enabled=clip.precision == "fp16"),
    }
    averages = {}
    for name, settings in rows.items():
        if settings.average:
            values = {"bma": settings.beta, "ema": settings.ema, "wise-ft": settings.wise_ft}
            value = values.get(settings.average, 0)
            shares = average_shares(settings.average, value, steps)
            averages[name] = BetaMovingAverage(model, steps, shares=shares)
    return parts | averages, averages


def loss_of(row, output, labels, class_features, logit_scale) -> torch.Tensor:
    """The loss of a batch: Eq. 3; Eq. 1 for a linear classifier and for learned prompts, whose
    output (B, C) are logits and not features (B, D)."""
    if row.loss not in IS_CLIP:
        return F.cross_entropy(output.float(), labels)
    features = F.normalize(output.float(), dim=-1)
    return margin_metric_softmax(features, class_features, labels, logit_scale, row.margin)


def watch(clip, models: dict, rows: dict, task, run, epoch: int, loss: float | None = None) -> None:
    """With --eval-every, a point of every trajectory."""
    for name, row in rows.items():
        if run and row.eval_every and epoch % row.eval_every == 0:
            point = {"step": epoch * row.steps_per_epoch, "loss": loss}
            point |= test(clip, models[name], row, task)
            run.extra.setdefault(name, {"history": []})["history"].append(point)


def stored_in_half(model: nn.Module, storage: str) -> list[nn.Parameter]:
    """With --storage float16 the weights that the authors' code keeps in float16 between two steps:
    those of OpenAI's `convert_weights`, all but norms and embeddings."""
    if storage == "float32":
        return []
    converted = copy.deepcopy(model)
    open_clip.model.convert_weights_to_lp(converted)
    pairs = zip(model.parameters(), converted.parameters())
    return [weight for weight, low in pairs if low.dtype == torch.float16]


@torch.no_grad()
def round_to_half(weights: list[nn.Parameter]) -> None:
    """Round to float16: what changes a weight by less than about 1/4000 of it is lost."""
    for weight in weights:
        weight.copy_(weight.half())


def first(named: dict):
    """All rows of a training have its loss; all sets of a test, and all sources, its classes."""
    return next(iter(named.values()))


# ---------- Testing ------------------------------------------------------------------------------
def classifier(clip, model, row, trained: tuple, classes: tuple):
    """images (B, 3, h, w) -> scores over `classes` (B, C); None if it can name none of them.

    A linear classifier names only the classes it was trained on; any other gets the score -inf.
    """
    if row.loss in IS_CLIP:
        class_features = clip.class_features(classes, row.templates)  # (C, D)
        return common.clip_classifier(model, class_features, clip.precision)
    columns = list(range(len(classes)))
    if row.loss in PROMPTS:
        model = prompts.PromptClassifier(model.prompts.of_classes(classes))
    else:
        columns = [trained.index(name) if name in trained else -1 for name in classes]

    def classify(images):
        with common.autocast(images.device, clip.precision):
            scores = model(images)
        scores = F.pad(scores.float(), (0, 1), value=-torch.inf)  # the last column: any other
        return scores[:, columns]

    return classify if max(columns) >= 0 else None


def test(clip, model, row, task: common.Task) -> dict[str, float]:
    """Accuracy of one model in every test whose classes it can name: {test: accuracy in [0, 1]}.

    In the wild also base and new, the parts of `total`; with both also H; for ImageNet also its
    shifts' average.
    """
    metrics = {}
    trained = first(task.train).classes
    for name, sets in task.tests.items():
        classify = classifier(clip, model, row, trained, first(sets).classes)
        if classify is None:
            continue
        accuracies = common.evaluate(classify, {name: sets}, clip.device, row.workers, 64)
        if name == "total":
            metrics |= {"base": accuracies["total/base"], "new": accuracies["total/new"]}
        metrics[name] = accuracies[name]
    if "base" in metrics and "new" in metrics:
        metrics["H"] = harmonic_mean(metrics["base"], metrics["new"])
    shifts = [metrics[name] for name in common.IMAGENET_SHIFTS if name in metrics]
    if shifts:
        metrics["average OOD"] = sum(shifts) / len(shifts)
    return metrics


def share_moved(model: nn.Module, start: nn.Module) -> float:
    """The share of weights that are not what they were, in [0, 1]."""
    moved, total = 0, 0
    for now, before in zip(model.parameters(), start.parameters()):
        moved += (now != before).sum().item()
        total += before.numel()
    return moved / total


def harmonic_mean(base: float, new: float) -> float:
    """H of the accuracies on base and new classes; 0 if both are 0."""
    if base + new == 0:
        return 0.0
    return 2 * base * new / (base + new)


# ---------- Three tasks: unseen domains, unseen classes, both ------------------------------------
def make_task(args, data, target: str, seed: int) -> common.Task:
    """The task of --task, on domains or on a data set with parts (see `load_data`)."""
    has_parts = isinstance(data, dict)
    if args.task == "in-the-wild":
        return common.in_the_wild(data, target)
    if args.task == "open-class":
        parts = data if has_parts else common.parts_of_domain(data, target)
        return common.open_class(parts, target, args.shots, seed)
    if has_parts:
        return common.imagenet_shift(data, args.shots, seed)
    task = common.leave_one_out(data, target)
    if args.protocol == "official":
        index = [domain.name for domain in data].index(target)
        held_out, _ = common.hold_out(task.tests["target"][target], index)
        task.tests["target"] = {target: held_out}
    return task


def load_data(args, seed: int):
    """The images of --dataset: a list of domains, or {part: images}."""
    if args.dataset not in common.dataset_names("parts"):
        return common.load_domains(args.dataset, args.data_root, seed, args.cue)
    parts = common.load_parts(args.dataset, args.data_root)
    if args.task == "domain-shift":
        for name in common.IMAGENET_SHIFTS:
            parts[name] = common.load_parts(name, args.data_root)["test"]
    return parts


# ---------- What the paper compares --------------------------------------------------------------
def all_rows() -> dict[str, str]:
    """A loss, alone or with an average: `mms+bma`. Numbers follow as settings:
    `mms+bma/margin=0.5/beta=0.1`."""
    rows = {"zero-shot": "--loss zero-shot", "coop": "--loss coop"}
    rows["cocoop"] = "--loss cocoop --batch-size 1"  # as published
    for loss in ("linear", "ms", "mms"):
        margin = " --margin 0" if loss == "ms" else ""  # Eq. 2 is Eq. 3 without margin
        rows[loss] = f"--loss {loss}{margin}"
        for average in ("ema", "uniform", "wise-ft", "bma"):
            rows[f"{loss}+{average}"] = f"--loss {loss} --average {average}{margin}"
    return rows


ROWS = all_rows()
MODES = ["zero-shot", "mms", "mms+wise-ft", "mms+bma"]
STUDIES = {
    "loss": ["zero-shot", "linear", "ms", "mms"],
    "margin": ["zero-shot", "ms", "ms+bma"],
    "average": ["zero-shot", "mms", "mms+ema", "mms+uniform", "mms+wise-ft"],
    "components": ["zero-shot", "linear", "ms", "mms", "mms+wise-ft", "mms+bma"],
    "prompts": ["zero-shot", "coop", "cocoop", "mms+bma"],
    "storage": ["zero-shot"],  # of weights: what the published learning rates are made for
}
for margin in ("/margin=0.1", "/margin=0.5", "/margin=1", ""):
    STUDIES["margin"] += [f"mms{margin}", f"mms+bma{margin}"]
for beta in ("/beta=0.1", "/beta=0.3", "/beta=1", "/beta=2", ""):
    STUDIES["average"].append(f"mms+bma{beta}")
for lr in ("/lr=5e-6", ""):
    for storage in ("", "/storage=float16"):
        STUDIES["storage"] += [f"mms{lr}{storage}", f"mms+bma{lr}{storage}"]

# what a trajectory depends on; averages do not change it
OF_TRAJECTORY = "loss margin batch_size lr head_lr weight_decay storage epochs steps_per_epoch"


def trainings(rows: dict) -> list[dict]:
    """Rows that are averages of one trajectory together."""
    groups = {}
    for name, row in rows.items():
        trajectory = tuple(getattr(row, setting) for setting in OF_TRAJECTORY.split())
        groups.setdefault(trajectory, {})[name] = row
    return list(groups.values())


# ---------- The command line ---------------------------------------------------------------------
TASKS = ("domain-shift", "open-class", "in-the-wild")
WITH_PARTS = [name for name, entry in common.benchmarks.DATASETS.items() if "template" in entry]
PROMPT_SGD = {"lr": 2e-3, "momentum": 0.9, "weight_decay": 5e-4}  # of CoOp, published
# {"task, data set": its settings}; also of "tiny CLIP", and of "any other" data set
FILE = Path(__file__).with_name("assets") / "clipood.json"
DEFAULTS = json.loads(FILE.read_text())


def parsers() -> tuple:
    """The parser of the command line, and the parser of a row's settings."""
    method = runs.Parser(add_help=False)
    flag = functools.partial(runs.flag, method.add_argument_group("method and training"))
    whole, number, positive = runs.at_least(1), runs.at_least(0, float), runs.positive
    fraction = runs.at_least(0, float, 1)
    table = "(default: see above)"
    flag("margin", number, None, f"lambda of MMS, Eq. 3 {table}")
    flag("beta", positive, None, f"of BMA, Eq. 6 {table}")
    flag("ema", fraction, 0.999, "decay of EMA (our choice; tiny CLIP: 0.95)")
    flag("wise-ft", fraction, 0.5, "share of the fine-tuned weights (our choice)")
    flag("batch-size", whole, None, f"images per source domain in a step {table}")
    flag("lr", positive, None, f"at the start; a cosine takes it to 0 {table}")
    flag("head-lr", positive, 1e-3, "of the linear classifier (our choice; tiny CLIP: 3e-3)")
    flag("weight-decay", number, 0.1, "of AdamW (published)")
    flag("storage", ("float32", "float16"), "float32", "of weights between two steps")
    flag("epochs", whole, None, f"of --steps-per-epoch steps each {table}")
    flag("steps-per-epoch", whole, 500, "(published: 500; tiny CLIP: 20)")
    row = runs.Parser(parents=[method], add_help=False, allow_abbrev=False)
    row.add_argument("--loss", choices=(*IS_CLIP, "linear", *PROMPTS))
    row.add_argument("--average", choices=("ema", "uniform", "wise-ft", "bma"))

    datasets = common.dataset_names("domains") + WITH_PARTS
    doc = f"{__doc__}\n{tables.value_table('defaults', DEFAULTS)}"
    command = runs.command_parser("clipood", doc, method, datasets, ROWS, MODES, STUDIES)
    flag = functools.partial(runs.flag, command.add_argument_group("of all rows"))
    flag("target", str, "sketch", "held-out domain: its name, start or number, or all")
    flag("task", TASKS, None, "unseen domains, unseen classes, or both (default: the first it has)")
    text = "official: as the authors' code, with weights stored in float16, images resized "
    text += "bilinearly, and in domain-shift only 20 % of the target tested"
    flag("protocol", ("whole", "official"), "whole", text)
    flag("shots", whole, 16, "training images per class of few-shot sets (published)")
    text = "prompts, averaged; or: ensemble (default: that of assets/datasets.json)"
    flag("templates", [runs.template], None, text)
    flag("eval-every", runs.at_least(0), 0, "epochs between tests, 0: none (study average: 1)")
    flag("compile", bool, False, "compile the tower's training pass")
    return command, row


def preset(args) -> dict:
    """Defaults that depend on the task, the data set and the model.

    Raises: InputError for a task that the data set does not have.
    """
    name, possible = args.dataset, TASKS
    if name == "imagenet":
        possible = "domain-shift", "open-class"
    elif name in common.dataset_names("parts"):
        possible = ("open-class",)
    task = args.task or possible[0]
    if task not in possible:
        what = f"--task {task} needs domains, {name} has none"
        raise common.InputError(f"{what}: use --task open-class")
    key = "tiny CLIP" if args.model == "tiny" else name
    defaults = DEFAULTS.get(f"{task}, {key}", DEFAULTS[f"{task}, any other"])
    template = common.benchmarks.DATASETS.get(name, {}).get("template", "a photo of a {}.")
    defaults = {**defaults, "task": task, "templates": [template]}
    del defaults["source"]  # where the numbers are from
    if args.model == "tiny":
        defaults |= {"ema": 0.95, "head_lr": 3e-3, "steps_per_epoch": 20}
    if args.study == "average":
        defaults["eval_every"] = 1
    if args.protocol == "official":
        defaults["storage"] = "float16"
    return defaults


def settings(argv=None) -> tuple:
    """The command line, or argv, and {row: its settings}."""
    command, row_parser = parsers()
    args = runs.read_command(command, preset, STUDIES, argv)
    return args, {text: runs.read_row(row_parser, args, ROWS, text) for text in args.modes}


# ---------- Figure 4 -----------------------------------------------------------------------------
def weights_in_average(average: str, value: float, steps: int) -> tuple[torch.Tensor, list]:
    """What theta_0 ... theta_T weigh in the average after T steps, and what theta_0 weighs after 0
    ... T steps, (T + 1,) both; see `average_shares`."""
    weights = torch.ones(1, dtype=torch.float64)
    of_start = [1.0]
    for share in average_shares(average, value, steps):
        weights = torch.cat([(1 - share) * weights, share[None]])
        of_start.append(weights[0].item())
    return weights, of_start


def plot_averages(args, run) -> None:
    """--figures: the weights in an average; their numbers are in result.json."""
    steps = args.epochs * args.steps_per_epoch
    t, final, start = range(steps + 1), {}, {}
    for average, value in (("ema", args.ema), ("bma", args.beta), ("bma", 1.0)):
        label = f"{average} {value:g}"
        weights, of_start = weights_in_average(average, value, steps)
        final[label] = t, weights.tolist()
        start[label] = t, of_start
        run.extra[f"weights in {label}"] = {"final": weights.tolist(), "of the start": of_start}
    panels = {rf"$\theta_t$ after {steps} steps": final, r"$\theta_0$ after t steps": start}
    path = run.folder / "averages.png"
    tables.plot_panels(panels, "t", "weight in the average", path, yscale="log")


# ---------- main ---------------------------------------------------------------------------------
def compare(args, all_rows: dict, clip, task: common.Task, run, seed: int) -> None:
    """Train and test every row for one target and seed; the last one is exported."""
    class_features = clip.class_features(task.classes, args.templates)  # (C, D)
    for rows in trainings(all_rows):
        if rows.keys() <= run.rows.keys():
            continue
        models = dict.fromkeys(rows, clip.visual)
        if first(rows).loss != "zero-shot":
            trained = clip.class_features(first(task.train).classes, args.templates)
            models = train(clip, task, rows, trained, seed, run)
        for name, row in rows.items():
            metrics, extra = test(clip, models[name], row, task), {}
            if row.loss in IS_CLIP:
                extra["weights moved"] = share_moved(models[name], clip.visual)
                if name == args.modes[-1]:
                    folder = run.folder / "model"
                    common.export_clip(clip, folder, class_features, task.classes, models[name])
            run.add(name, metrics, extra)
    run.record["rows"] = {name: run.rows[name] for name in all_rows}  # the table's order
    if args.figures:
        plot_averages(args, run)


def main():
    args, rows = settings()
    data = load_data(args, args.seeds[0])
    targets = [args.dataset]
    if isinstance(data, list):
        targets = common.choose_targets(args.target, [domain.name for domain in data])
    interpolation = "bilinear" if args.protocol == "official" else None
    model = args.model, args.pretrained, args.device, args.precision, interpolation
    clip = common.load_clip(*model)
    label = "" if args.task == "domain-shift" else args.task
    records = []
    for seed in args.seeds:
        if args.dataset.startswith("tiny-") and seed != args.seeds[0]:  # real data have no seed
            data = load_data(args, seed)
        for target in targets:
            print(f"\n{args.task} on {args.dataset}, target {target}, seed {seed}", flush=True)
            run = runs.Run(args, target, seed, label)
            if not run.finished:
                task = make_task(args, data, target, seed).transformed(clip)
                compare(args, rows, clip, task, run, seed)
                run.finish()
            records.append(run.record)
    tables.report(args, records)


if __name__ == "__main__":
    runs.command(main)
