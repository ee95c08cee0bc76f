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
import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

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
PROMPTS = {"coop": common.CoOp, "cocoop": common.CoCoOp}  # what is learnt is words


def training_parts(clip, task, rows: dict, class_features, steps: int) -> dict:
    """All that changes in a training: a copy of the image tower, its optimizer, its averages."""
    row = first(rows)
    model = copy.deepcopy(clip.visual).requires_grad_(True)
    groups = [{"params": list(model.parameters())}]
    if row.loss == "linear":  # Eq. 1: what the class names say is not used
        C, D = class_features.shape
        head = nn.Linear(D, C, device=clip.device)
        groups.append({"params": list(head.parameters()), "lr": row.head_lr})
        model = nn.Sequential(model, head)
    options = {"lr": row.lr, "weight_decay": row.weight_decay}
    optimizer = torch.optim.AdamW(groups, **options, fused=clip.device.type == "cuda")
    if row.loss in PROMPTS:  # learns words, and the tower stays as it is
        classes = first(task.train).classes
        model = common.PromptClassifier(PROMPTS[row.loss](clip, classes))
        sgd = {"lr": row.prompt_lr, "momentum": 0.9, "weight_decay": 5e-4}  # as published
        optimizer = torch.optim.SGD(model.parameters(), **sgd)
    parts = {
        "model": model,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "scaler": torch.amp.GradScaler(clip.device.type, enabled=clip.precision == "fp16"),
    }
    for name, own in rows.items():
        if own.average:
            values = {"bma": own.beta, "ema": own.ema, "wise-ft": own.wise_ft, "uniform": 0}
            shares = average_shares(own.average, values[own.average], steps)
            parts[name] = BetaMovingAverage(model, steps, shares=shares)
    return parts


def train(clip, task: common.Task, rows: dict, class_features, seed: int, saved=None):
    """Fine-tune a copy of CLIP's image tower with the one loss of `rows`; all averages run along.

    The model stays in eval mode, as in the authors' code: norms with statistics keep CLIP's. Every
    epoch draws images by a seed of its own.

    Args:
        rows: {name: row}, which differ in how the trajectory is averaged, see `trainings`.
        class_features: of the training classes, (C, D).
        saved: a state that was yielded, to go on from there.
    Yields: at the start, after every epoch, and where a signal asks to stop: {name: model} and the
    state, with which it goes on exactly.
    Raises: InputError at a loss or gradient that is not finite, before it reaches any weights.
    """
    row = first(rows)
    torch.manual_seed(seed)
    parts = training_parts(clip, task, rows, class_features, row.epochs * row.steps_per_epoch)
    state = {"epoch": 0, "step": 0, "loss": None} | (saved or {})
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    model, optimizer, schedule, scaler, *averages = parts.values()
    half, half_averages = [], []
    if row.storage == "float16":  # as in the authors' code
        half = stored_in_half(model)
        for average in averages:
            half_averages += stored_in_half(average.model)
    round_to_half(half + half_averages)
    models = {}
    for name in rows:
        models[name] = parts[name].model if name in parts else model

    yield models, with_parts(state, parts)
    batches = common.SourceBatches(task.train, row.batch_size, seed, row.workers, clip.device)
    watched = common.Steps(optimizer, batches, scaler)
    replica = common.data_parallel(
        model
    )  # the model, or what averages its gradients over processes
    if row.loss not in PROMPTS:
        replica = common.compiled(replica, row)
    for epoch in range(state["epoch"], row.epochs):
        epoch_seed = seed * 1000 + epoch
        taken, steps = state["step"], row.steps_per_epoch  # before an interruption, in all
        batches.restart(epoch_seed, taken, steps - taken)
        title = f"{'/'.join(rows)} {epoch + 1}"
        for step in tqdm(range(taken + 1, steps + 1), title, leave=False, disable=None):
            images, y, _ = next(batches)  # (S b, 3, h, w), (S b,)
            loss = loss_of(replica, images, y, row, clip, class_features)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            place = epoch * steps + step
            watched.take(loss, f"{'/'.join(rows)}, step {place} of seed {seed}")
            schedule.step()
            round_to_half(half)
            for average in averages:
                average.update(model)
            round_to_half(half_averages)
            if common.was_asked() and step < steps:  # to stop, by a signal
                watched.check()
                yield models, with_parts(state | {"step": step}, parts)
        watched.check()
        state = {"epoch": epoch + 1, "step": 0, "loss": common.mean_over_ranks(loss)}
        yield models, with_parts(state, parts)


def with_parts(state: dict, parts: dict) -> dict:
    """What a training goes on from."""
    return state | {name: part.state_dict() for name, part in parts.items()}


def loss_of(model, images, labels, row, clip, class_features) -> torch.Tensor:
    """The loss of a batch: Eq. 3; Eq. 1 for a linear classifier and for learned prompts."""
    labels = labels.to(clip.device, non_blocking=True)
    with common.autocast(clip.device, clip.precision):
        output = model(images.to(clip.device, non_blocking=True))  # (S b, D or C)
    if row.loss not in IS_CLIP:
        return F.cross_entropy(output.float(), labels)
    features = F.normalize(output.float(), dim=-1)
    return margin_metric_softmax(features, class_features, labels, clip.logit_scale, row.margin)


def stored_in_half(model: nn.Module) -> list[nn.Parameter]:
    """The weights that the authors' code keeps in float16 between two steps: those of OpenAI's
    `convert_weights`, all but norms and embeddings."""
    stored = copy.deepcopy(model)
    open_clip.model.convert_weights_to_lp(stored)
    pairs = zip(model.parameters(), stored.parameters())
    return [own for own, low in pairs if low.dtype == torch.float16]


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
        model = common.PromptClassifier(model.prompts.of_classes(classes))
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
    measures = {}
    trained = first(task.train).classes
    for name, sets in task.tests.items():
        classify = classifier(clip, model, row, trained, first(sets).classes)
        if classify is None:
            continue
        accuracies = common.evaluate(classify, {name: sets}, clip.device, row.workers, 64)
        if name == "total":
            measures |= {"base": accuracies["total/base"], "new": accuracies["total/new"]}
        measures[name] = accuracies[name]
    if "base" in measures and "new" in measures:
        measures["H"] = harmonic_mean(measures["base"], measures["new"])
    shifts = [measures[name] for name in common.IMAGENET_SHIFTS if name in measures]
    if shifts:
        measures["average OOD"] = sum(shifts) / len(shifts)
    return measures


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
        domains = args.dataset, args.data_root, seed, args.cue, WITH_PARTS, args.skip_broken
        return common.load_domains(*domains)
    parts = common.load_parts(args.dataset, args.data_root, skip_broken=args.skip_broken)
    if args.task == "domain-shift":
        for name in common.IMAGENET_SHIFTS:
            shift = common.load_parts(name, args.data_root, skip_broken=args.skip_broken)
            parts[name] = shift["test"]
    return parts


# ---------- What the paper compares --------------------------------------------------------------
def all_rows() -> dict[str, dict]:
    """A loss, alone or with an average: `mms+bma`. Numbers follow as settings:
    `mms+bma/margin=0.5/beta=0.1`."""
    rows = {"zero-shot": {"loss": "zero-shot", "average": ""}}
    rows["coop"] = {"loss": "coop", "average": ""}
    rows["cocoop"] = {"loss": "cocoop", "average": "", "batch_size": 1}  # as published
    for loss in ("linear", "ms", "mms"):
        margin = {"margin": 0.0} if loss == "ms" else {}  # Eq. 2 is Eq. 3 without margin
        rows[loss] = {"loss": loss, "average": "", **margin}
        for average in ("ema", "uniform", "wise-ft", "bma"):
            rows[f"{loss}+{average}"] = {"loss": loss, "average": average, **margin}
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
OF_TRAJECTORY = (
    "loss margin batch_size lr head_lr prompt_lr weight_decay storage epochs steps_per_epoch"
)


def trainings(rows: dict) -> list[dict]:
    """Rows that are averages of one trajectory together."""
    groups = {}
    for name, row in rows.items():
        trajectory = tuple(getattr(row, setting) for setting in OF_TRAJECTORY.split())
        groups.setdefault(trajectory, {})[name] = row
    return list(groups.values())


# ---------- Settings: name, kind, default, default with the tiny CLIP, help ----------------------
TASKS = ("domain-shift", "open-class", "in-the-wild")
WITH_PARTS = [name for name, row in common.DATASETS.items() if "template" in row]
ABOVE = "(default: see above)"
TEMPLATES = (
    "prompts, averaged; or: ensemble (default: that of assets/datasets.json, a photo of a {}.)"
)
PROTOCOL = (
    "official: as the authors' code, weights stored in float16, images resized bilinearly, and "
)
PROTOCOL += "in domain-shift only 20 % of the target tested"
OF_ALL_ROWS = [
    common.TARGET,
    *common.SPEED,
    ("task", TASKS, None, None, "unseen domains, classes, or both (domain-shift if it can)"),
    ("protocol", ("whole", "official"), "whole", "whole", PROTOCOL),
    ("shots", common.at_least(1), 16, 16, "training images per class of few-shot sets (published)"),
    ("templates", [common.prompt_template], None, None, TEMPLATES),
    ("eval-every", common.at_least(0), None, None, "epochs between tests (0; 1 in study average)"),
]
SETTINGS = [
    ("margin", common.at_least(0, float), None, None, f"lambda of MMS, Eq. 3 {ABOVE}"),
    ("beta", common.positive, None, None, f"of BMA, Eq. 6 {ABOVE}"),
    ("ema", common.share, 0.999, 0.95, "decay of EMA, our choice"),
    ("wise-ft", common.share, 0.5, 0.5, "share of the fine-tuned weights, our choice"),
    ("batch-size", common.at_least(1), None, None, f"images per source domain in a step {ABOVE}"),
    ("lr", common.positive, None, None, f"at the start; a cosine takes it to 0 {ABOVE}"),
    ("head-lr", common.positive, 1e-3, 3e-3, "of the linear classifier, our choice"),
    ("prompt-lr", common.positive, 2e-3, 2e-3, "of CoOp's and CoCoOp's words (published: 2e-3)"),
    ("weight-decay", common.at_least(0, float), 0.1, 0.1, "of AdamW, published"),
    ("storage", ("float32", "float16"), "float32", "float32", "of weights between two steps"),
    ("epochs", common.at_least(1), None, None, ABOVE),
    ("steps-per-epoch", common.at_least(1), 500, 20, "published: 500"),
]
# {setting: rows that it has an effect on}
TRAINED = "linear|ms|coop"
NEEDS = {"margin": "ms", "beta": "bma", "ema": "ema", "wise-ft": "wise-ft", "lr": "linear|ms"}
NEEDS |= {"head-lr": "linear", "prompt-lr": "coop", "weight-decay": "linear|ms"}
NEEDS |= {"compile": "linear|ms"}
NEEDS |= dict.fromkeys(("batch-size", "epochs", "steps-per-epoch", "cache"), TRAINED)
METHOD = common.Method("clipood", SETTINGS, ROWS, STUDIES, NEEDS, shared=True)
# {"task, data set": its settings}; also of "tiny CLIP", and of "any other" data set
FILE = Path(__file__).with_name("assets") / "clipood.json"
DEFAULTS = json.loads(FILE.read_text())


def preset(args) -> dict:
    """Defaults that depend on the task and the data set."""
    name, possible = args.dataset, TASKS
    if name == "imagenet":
        possible = "domain-shift", "open-class"
    elif name in common.dataset_names("parts"):
        possible = ("open-class",)
    task = args.task or possible[0]
    if task not in possible:
        what = f"--task {task} needs domains, {name} has none"
        raise common.InputError(f"{what}: use --task open-class")
    refuse_idle_settings(args, task)
    own = DEFAULTS.get(f"{task}, {name}", DEFAULTS[f"{task}, any other"])
    if args.model == "tiny" or (args.model is None and name.startswith("tiny-")):
        own = DEFAULTS[f"{task}, tiny CLIP"]
    dataset = common.DATASETS.get(name, {})
    found = {**own, "task": task, "templates": [dataset.get("template", "a photo of a {}.")]}
    found["eval_every"] = 1 if args.study == "average" else 0
    if args.protocol == "official":
        found["storage"] = "float16"
    if args.study:
        file = f"clipood-{args.study}-{common.slug(name)}-{task}.json"
        found["summary"] = Path("results", file)
    return found


def settings(argv=None):
    """The command line, or argv, checked. Raises: InputError for what would have no effect."""
    names = common.dataset_names("domains") + WITH_PARTS
    doc = f"{__doc__}\n{common.value_table('defaults', DEFAULTS)}"
    args = common.flags(METHOD, doc, MODES, names, OF_ALL_ROWS, argv)
    return common.settle(args, preset(args))


def refuse_idle_settings(args, task: str) -> None:
    """Raises: InputError for a setting without effect on this task or data set."""
    has_domains = args.dataset not in common.dataset_names("parts")
    idle = []
    if not has_domains:
        idle.append("target")
    if has_domains and task != "open-class":
        idle.append("shots")
    for name in idle:
        if getattr(args, name) is not None:
            raise common.InputError(f"--{name} has no effect with {args.dataset}, --task {task}")


# ---------- Figures ------------------------------------------------------------------------------
def weights_in_average(average: str, value: float, steps: int) -> tuple[torch.Tensor, list]:
    """What theta_0 ... theta_T weigh in the average after T steps, and what theta_0 weighs after 0
    ... T steps, (T + 1,) both; see `average_shares`."""
    weights = torch.ones(1, dtype=torch.float64)
    of_start = [1.0]
    for share in average_shares(average, value, steps):
        weights = torch.cat([(1 - share) * weights, share[None]])
        of_start.append(weights[0].item())
    return weights, of_start


def draw_figures(args, class_features: torch.Tensor, folder: Path) -> None:
    """--figures: Figure 4, the weights in an average; they and D of Eq. 4 in analysis.npz."""
    numbers = {"distances": class_distances(class_features.cpu())}
    steps = args.epochs * args.steps_per_epoch
    t, final, start = range(steps + 1), {}, {}
    for average, value in (("ema", args.ema), ("bma", args.beta), ("bma", 1.0)):
        label = f"{average} {value:g}"
        numbers[label], of_start = weights_in_average(average, value, steps)
        final[label] = t, numbers[label]
        start[label] = t, of_start
    panels = {rf"$\theta_t$ after {steps} steps": final, r"$\theta_0$ after t steps": start}
    path = folder / "averages.png"
    common.plot_panels(panels, "t", "weight in the average", path, yscale="log")
    common.write_arrays(folder / "analysis.npz", **numbers)


# ---------- main ---------------------------------------------------------------------------------
def compare(args, task: common.Task, run) -> None:
    """Train and test every row for one target and seed; the last one is exported."""
    clip = args.clip
    common.check_batch_sizes(args.rows, task.train)
    class_features = clip.class_features(task.classes, args.templates)  # (C, D)
    for rows in trainings(args.rows):
        if rows.keys() <= run.rows.keys():
            continue
        models, state = train_rows(clip, task, rows, run)
        for name, row in rows.items():
            if name == args.modes[-1] and row.loss in IS_CLIP:
                folder = run.folder / "model"
                common.export_clip(clip, folder, class_features, task.classes, models[name])
            measures = test(clip, models[name], row, task)
            if row.loss in IS_CLIP:
                moved = share_moved(models[name], clip.visual)
                run.extra.setdefault(name, {})["weights moved"] = moved
            run.add(name, measures, state)  # trained, if it is killed here
    run.record["rows"] = {name: run.rows[name] for name in args.rows}  # the table's order
    if args.figures:
        draw_figures(args, class_features, run.folder)


def train_rows(clip, task, rows: dict, run) -> tuple[dict, dict]:
    """The models of rows that share a training, and its state, which is saved on the way."""
    row, key = first(rows), "/".join(rows)
    if row.loss == "zero-shot":
        return dict.fromkeys(rows, clip.visual), {}
    classes = first(task.train).classes
    class_features = clip.class_features(classes, row.templates)
    saved = run.state and run.state.get(key)  # it may belong to another training
    training = train(clip, task, rows, class_features, run.record["seed"], saved)
    for models, state in training:
        if row.eval_every and state["epoch"] % row.eval_every == 0:
            test_on_the_way(clip, models, rows, task, run, state)
        run.save({key: state}, trained=state["epoch"] == row.epochs)
    return models, {key: state}


def test_on_the_way(clip, models, rows, task, run, state) -> None:
    """A point of every trajectory."""
    for name, row in rows.items():
        history = run.extra.setdefault(name, {"history": []})["history"]
        step = state["epoch"] * row.steps_per_epoch
        if not history or history[-1]["step"] < step:  # not again after an interruption
            measures = test(clip, models[name], row, task)
            history.append({"step": step, "loss": state["loss"], **measures})


def main():
    args = settings()
    data = load_data(args, args.seeds[0])
    targets = [args.dataset]
    if isinstance(data, list):
        targets = common.choose_targets(args.target, [domain.name for domain in data])
    interpolation = "bilinear" if args.protocol == "official" else None
    clip = args.model, args.pretrained, args.device, args.precision, interpolation
    args.clip = common.load_clip(*clip)
    augment = common.training_transform(args.clip, args.dataset)
    label = "" if args.task == "domain-shift" else args.task
    records = []
    for seed in args.seeds:
        if args.dataset.startswith("tiny-") and seed != args.seeds[0]:  # real data have no seed
            data = load_data(args, seed)
        for target in targets:
            print(f"\n{args.task} on {args.dataset}, target {target}, seed {seed}", flush=True)
            with common.open_run(args, target, seed, label) as run:
                if not run.complete:
                    task = make_task(args, data, target, seed)
                    folder = common.cache_folder(args)
                    task = task.transformed(augment, args.clip.preprocess, folder)
                    compare(args, task, run)
            records.append(run.record)
    return common.report(args, records)


if __name__ == "__main__":
    common.command(main)
