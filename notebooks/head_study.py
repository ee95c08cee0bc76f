"""Single heads of a ViT image tower: what each carries, what it is worth, where it looks.

Figure 1 of Attention Head Purification says that some heads of CLIP carry the domain, and that CLIP
generalises better without them. This script trains headpurify.py's rows and then asks every head:

probes      how often a linear probe of the head's output at the CLS token is right about the class,
            the domain and what a drawn image is made of; how far the source domains are apart in
            what the head adds (MMD); what accuracies gain if the head always has its mean output;
            its gate; and the rank correlations over heads between all of these
curves      accuracies after dropping more and more heads, in several orders (Figure 1)
attention   what the CLS token attends to in CLIP and in the purified tower, for images of the
            target; by how much the cross-entropy grows without each head, before and after

    python notebooks/head_study.py                                 # tiny-pacs, target sketch
    python notebooks/head_study.py --only curves --drop 1.1 2.3    # and drop two heads by hand
    python notebooks/head_study.py --model local-dir:runs/headpurify/RUN/model

The last command trains nothing: it studies the tower that a run of headpurify.py exported, with the
gates, the data and the target of that run. A head is named LAYER.HEAD, from 1.1 on.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import headpurify
from common import parallel, runs, tables


# ---------- Naming a head, and taking it out -----------------------------------------------------
def head_grid(visual: nn.Module) -> tuple[int, int]:
    """Number of layers, and of heads in a layer."""
    layers = visual.transformer.resblocks
    return len(layers), layers[0].attn.num_heads


def head_names(visual: nn.Module) -> list[str]:
    """LAYER.HEAD of all heads, in the order of gates (layers, heads)."""
    return [f"{layer + 1}.{head + 1}" for layer, head in np.ndindex(head_grid(visual))]


def head_indices(visual: nn.Module, names: list[str]) -> list[int]:
    """Indices of heads among all. Raises: InputError for a name that no head has."""
    known = head_names(visual)
    for name in names:
        if name not in known:
            raise common.InputError(f"--drop {name}: heads are {known[0]} ... {known[-1]}")
    return [known.index(name) for name in names]


def output_rows(visual: nn.Module, layer: int) -> torch.Tensor:
    """The rows of W_o that each head of a layer meets, as PyTorch stores them: (D, heads, d), a
    view."""
    attention = visual.transformer.resblocks[layer].attn
    return attention.out_proj.weight.detach().unflatten(1, (attention.num_heads, -1))


def silence(visual: nn.Module, layer: int, head: int) -> None:
    """Take a head out, in place: the rows of W_o that it meets become zero."""
    output_rows(visual, layer)[:, head] = 0


def contribution(visual: nn.Module, layer: int, head: int, output: torch.Tensor) -> torch.Tensor:
    """What a head adds to a token: its output (..., d) times its rows of W_o, (..., D)."""
    return output @ output_rows(visual, layer)[:, head].T


@contextlib.contextmanager
def ablated(visual: nn.Module, layer: int, head: int, mean: torch.Tensor | None = None):
    """Inside the block a head's output is `mean`, (d,), for every token; zero by default."""
    projection = visual.transformer.resblocks[layer].attn.out_proj
    before = copy.deepcopy(projection.state_dict())
    if mean is not None:
        projection.bias.data += contribution(visual, layer, head, mean)
    silence(visual, layer, head)
    try:
        yield
    finally:
        projection.load_state_dict(before)


# ---------- Importance, and orders in which heads are dropped ------------------------------------
def source_sample(clip, class_features, task, seed: int, per_source: int) -> tuple:
    """The arguments of `loss_of` after the tower: held-out images, equally many of every source."""
    holdout = task.tests["hold-out"]
    images, labels = next(common.source_batches(holdout, per_source, seed, device=clip.device))
    return class_features, clip.logit_scale, images, labels


@torch.no_grad()
def loss_of(visual: nn.Module, class_features, logit_scale: float, images, labels) -> float:
    """Cross-entropy of images (B, 3, h, w) against class features (C, D)."""
    features = F.normalize(visual(images), dim=-1)  # (B, D)
    return F.cross_entropy(logit_scale * (features @ class_features.T), labels).item()


def head_importance(visual: nn.Module, *sample) -> torch.Tensor:
    """By how much the cross-entropy grows without each head: (layers, heads). Below 0 the tower is
    better without it. sample: see `source_sample`."""
    grid = head_grid(visual)
    importance = torch.full(grid, -loss_of(visual, *sample))
    for layer, head in np.ndindex(grid):
        with ablated(visual, layer, head):
            importance[layer, head] += loss_of(visual, *sample)
    return importance


def greedy_order(visual: nn.Module, count: int, *sample) -> torch.Tensor:
    """The first `count` heads to drop, (count,) indices: again and again the head without which the
    cross-entropy is least. sample: see `source_sample`."""
    visual = copy.deepcopy(visual)
    heads = head_grid(visual)[1]
    remaining = list(np.ndindex(head_grid(visual)))
    order = []
    for _ in range(count):
        losses = []
        for layer, head in remaining:
            with ablated(visual, layer, head):
                losses.append(loss_of(visual, *sample))
        layer, head = remaining.pop(int(np.argmin(losses)))
        silence(visual, layer, head)
        order.append(layer * heads + head)
    return torch.tensor(order)


def gates_on_frozen_clip(clip, class_features, task, row, seed: int) -> torch.Tensor:
    """Gates (layers, heads) learned on frozen CLIP without each source in turn, summed up."""
    row = argparse.Namespace(**vars(row) | {"adapter": None, "gated": True})
    if len(task.train) == 2:  # one remains: there is nothing that L_MMD could compare
        row.mmd_grad = "none"
    total = 0
    for name in task.train:
        held_out = {name: task.tests["hold-out"][name]}
        train_sets = {other: images for other, images in task.train.items() if other != name}
        fold = common.Task(task.classes, train_sets, {"hold-out": held_out, "target": held_out})
        _, learned = headpurify.train(clip, class_features, fold, row, seed)
        total += torch.tensor(learned["gates"])
    return total


def drop_orders(args, clip, gates, class_features, task, row, seed: int) -> dict:
    """{name: indices of heads in the order in which they are dropped} (Figure 1).

    Heads of CLIP are dropped in random order, as --drop says, by what the sources lose without them
    (ranked, or greedily up to a quarter), or by gates learned on frozen CLIP; those of the purified
    tower by its `gates` (layers, heads).
    """
    generator = torch.Generator().manual_seed(seed)
    orders = {"random": torch.randperm(gates.numel(), generator=generator)}
    if args.drop:
        orders["by hand"] = head_indices(clip.visual, args.drop)
    sample = source_sample(clip, class_features, task, seed, 64)
    orders["ranked on sources"] = head_importance(clip.visual, *sample).flatten().argsort()
    orders["greedy on sources"] = greedy_order(clip.visual, gates.numel() // 4, *sample)
    if not args.exported:  # with an exported tower nothing is trained
        frozen = gates_on_frozen_clip(clip, class_features, task, row, seed)
        orders["gates on frozen CLIP"] = frozen.flatten().argsort()
    orders["adapt and drop"] = gates.flatten().argsort()
    return orders


def drop_curves(clip, purified, orders: dict, class_features, task, row) -> dict:
    """{order: {"dropped": numbers of dropped heads, "hold-out" and "target": accuracies there}}."""
    heads = len(orders["random"])
    stops = {len(orders.get("by hand", []))}
    for share in np.linspace(0, 0.75, 9):
        stops.add(round(share * heads))
    tests = {name: task.tests[name] for name in ("hold-out", "target")}
    curves = {}
    for name, order in orders.items():
        visual = copy.deepcopy(purified if name == "adapt and drop" else clip.visual)
        classify = common.clip_classifier(visual, class_features, row.precision)
        curve = {"dropped": [], "hold-out": [], "target": []}
        for dropped in range(len(order) + 1):
            if dropped:
                layer, head = divmod(int(order[dropped - 1]), head_grid(visual)[1])
                silence(visual, layer, head)
            if dropped in stops:
                accuracies = common.evaluate(classify, tests, row.device, row.workers)
                curve["dropped"].append(dropped)
                for test in tests:
                    curve[test].append(accuracies[test])
        curves[name] = curve
    return curves


# ---------- Attention ----------------------------------------------------------------------------
@torch.no_grad()
def attention_inputs(visual: nn.Module, images) -> list[tuple]:
    """Every attention layer with the tokens (B, N, D) that enter it."""
    inputs = []

    def keep(attention, arguments):
        inputs.append((attention, arguments[0]))

    hooks = []
    for block in visual.transformer.resblocks:
        hooks.append(block.attn.register_forward_pre_hook(keep))
    visual(images)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def cls_attention(visual: nn.Module, images) -> torch.Tensor:
    """How much the CLS token attends to each patch: (layers, B, heads, patches)."""
    maps = []
    for attention, z in attention_inputs(visual, images):
        _, weights = attention(z, z, z, average_attn_weights=False)  # (B, H, N, N)
        maps.append(weights[:, :, 0, 1:])
    return torch.stack(maps)


def study_attention(clip, purified, gates, class_features, task, seed: int, folder) -> dict:
    """Importance of heads and attention maps, in CLIP and in the purified tower: two pictures in
    the folder, and their numbers: {"importance", "importance CLIP", label: (images, h, w)}.

    Maps are the last layer's, averaged over heads, and those of the heads with the largest and the
    smallest gate.
    """
    sample = source_sample(clip, class_features, task, seed, 128)
    importance = head_importance(purified, *sample)  # (layers, heads)
    before = head_importance(clip.visual, *sample)
    heats = {"gate": gates, "importance in CLIP": before, "importance after": importance}
    centers = {"gate": 1, "importance in CLIP": 0, "importance after": 0}
    tables.plot_heats(heats, "head", "layer", folder / "importance.png", centers)

    (target,) = task.tests["target"].values()
    shown = target.subset(np.linspace(0, len(target) - 1, 6))
    images, _ = shown.__getitems__(range(len(shown)))
    attention = {}
    for name, visual in {"CLIP": clip.visual, "purified": purified}.items():
        maps = cls_attention(visual, images.to(clip.device)).cpu()
        attention[name] = maps.unflatten(-1, visual.grid_size)  # (layers, B, heads, h, w)
    maps = {f"last layer, {name}": values[-1].mean(1) for name, values in attention.items()}
    for index in (gates.argmax().item(), gates.argmin().item()):
        layer, head = divmod(index, gates.shape[1])
        for name, values in attention.items():
            maps[f"head {head_names(purified)[index]}, {name}"] = values[layer, :, head]
    pictures = [shown.picture(i) for i in range(len(shown))]
    tables.plot_images({"image": pictures, **maps}, folder / "attention.png")
    numbers = {"importance": importance, "importance CLIP": before, **maps}
    return {name: values.tolist() for name, values in numbers.items()}


# ---------- What a head carries ------------------------------------------------------------------
@torch.no_grad()
def head_outputs(visual: nn.Module, images) -> torch.Tensor:
    """Outputs of all heads of a plain tower for images (B, 3, h, w), before W_o: at the CLS token,
    and averaged over all tokens. (B, layers, heads, 2, d)."""
    outputs = []
    for attention, z in attention_inputs(visual, images):
        _, weights = attention(z, z, z, average_attn_weights=False)  # (B, H, N, N)
        _, _, W_v = attention.in_proj_weight.chunk(3)  # (D, D)
        _, _, b_v = attention.in_proj_bias.chunk(3)
        v = F.linear(z, W_v, b_v)
        v = v.unflatten(-1, (attention.num_heads, -1))  # (B, N, H, d)
        tokens = weights @ v.transpose(1, 2)  # (B, H, N, d)
        at_cls, mean = tokens[:, :, 0], tokens.mean(2)
        outputs.append(torch.stack([at_cls, mean], 2))
    return torch.stack(outputs, 1)


def probe_accuracy(x, y, fitted, ridge: float = 1e-3) -> float:
    """How often a linear probe is right about y (N,) from x (N, d), on rows where `fitted` (N,) is
    False. It is fitted to the others: least squares towards one-hot labels, with a little ridge."""
    x = x.double()
    deviation = x[fitted].std(0)
    x = (x - x[fitted].mean(0)) / deviation.clamp(min=1e-6)
    x = F.pad(x, (0, 1), value=1)  # (N, d + 1)
    train = x[fitted]
    labels = F.one_hot(y[fitted], int(y.max()) + 1)  # (n, C)
    penalty = ridge * len(train) * torch.eye(x.shape[1], dtype=x.dtype)
    W = torch.linalg.solve(train.T @ train + penalty, train.T @ labels.double())  # (d + 1, C)
    scores = x[~fitted] @ W
    correct = scores.argmax(1) == y[~fitted]
    return correct.double().mean().item()


def what_heads_carry(
    visual: nn.Module, domains: dict, seed: int, bandwidths=None, workers: int = 0
) -> tuple[dict[str, list], torch.Tensor]:
    """Probes and MMD of all heads, {measure: (layers, heads)}, and the mean output of each on the
    sources, (layers, heads, d). At most 400 images of a domain are looked at.

    Args: domains: image sets by name, the target last; bandwidths: of MMD's kernel.
    """
    device = visual.proj.device
    encode = functools.partial(head_outputs, visual)
    count = min(400, *map(len, domains.values()))
    sample = [images.subset(np.linspace(0, len(images) - 1, count)) for images in domains.values()]
    outputs = [common.outputs(encode, images, device, workers=workers) for images in sample]
    at_cls, means = torch.cat(outputs).unbind(3)  # (N, layers, heads, d) each
    labels = {
        "class": torch.cat([images.labels for images in sample]),
        "domain": torch.arange(len(domains)).repeat_interleave(count),
    }
    for name in sample[0].attributes:  # what drawn images are made of
        labels[name] = torch.cat([images.attributes[name] for images in sample])
    of_sources = labels["domain"] < len(domains) - 1
    generator = torch.Generator().manual_seed(seed)
    fitted = torch.rand(len(at_cls), generator=generator) < 0.5

    grid = head_grid(visual)
    measures = {f"probe {name}": np.zeros(grid) for name in labels}
    measures["MMD"] = np.zeros(grid)
    for layer, head in np.ndindex(grid):
        x = at_cls[:, layer, head]  # (N, d)
        for name, y in labels.items():
            measures[f"probe {name}"][layer, head] = probe_accuracy(x, y, fitted)
        added = contribution(visual, layer, head, x[of_sources].to(device)).cpu()
        squared = headpurify.mmd_loss([added], len(domains) - 1, bandwidths).item()
        measures["MMD"][layer, head] = max(0, squared) ** 0.5
    measures = {measure: values.tolist() for measure, values in measures.items()}
    return measures, means[of_sources].mean(0)


def predictions_without_each(visual: nn.Module, mean, classify: Callable) -> Callable:
    """A function: images (B, 3, h, w) -> (B, 1 + layers * heads), the class predicted with all
    heads, and without each: an image is read once for all of them.

    Args: mean (layers, heads, d): the output that takes the place of a head's own; classify: images
    -> scores (B, C) by `visual`.
    """
    mean = mean.to(visual.proj.device)

    def predict(images):
        predictions = [classify(images).argmax(1)]
        for layer, head in np.ndindex(head_grid(visual)):
            with ablated(visual, layer, head, mean[layer, head]):
                predictions.append(classify(images).argmax(1))
        return torch.stack(predictions, 1)

    return predict


def study_probes(clip, class_features, task, row, gates, seed: int) -> dict:
    """What every head of CLIP carries, {measure: (layers, heads)}."""
    sources = task.tests.get("source", task.tests["hold-out"])
    domains = {**sources, **task.tests["target"]}
    options = row.bandwidths, row.workers
    measures, mean = what_heads_carry(clip.visual, domains, seed, *options)
    classify = common.clip_classifier(clip.visual, class_features, row.precision)
    predict = predictions_without_each(clip.visual, mean, classify)
    for test in ("hold-out", "target"):
        correct = []
        for images in task.tests[test].values():
            predictions = common.outputs(predict, images, row.device, workers=row.workers)
            correct.append(predictions == images.labels[:, None])
        accuracies = torch.cat(correct).double().mean(0)  # (1 + layers * heads,)
        gains = accuracies[1:] - accuracies[0]
        measures[f"without it, {test}"] = gains.view_as(gates).tolist()
    return {**measures, "gate": gates.tolist()}


# ---------- Tables and pictures of all runs ------------------------------------------------------
def ranks(values) -> np.ndarray:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, group, sizes = np.unique(np.ravel(values), return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group]


def rank_correlation(a, b) -> float:
    """Spearman's, between -1 and 1; 0 where all values of one are equal."""
    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale else 0.0


def correlations(record: dict) -> dict[str, dict]:
    """A view of a record: the rank correlation over heads of each measure with each."""
    heads = record["extra"]["heads"]
    rows = {}
    for one, values in heads.items():
        rows[one] = {}
        for other, others in heads.items():
            rows[one][other] = rank_correlation(values, others)
    return rows


def report_probes(records: list[dict], path) -> None:
    """Print rank correlations, averaged over runs, and draw them and all measures."""
    measures = list(records[0]["extra"]["heads"])
    heats = {}
    for measure in measures:
        heats[measure] = np.mean([record["extra"]["heads"][measure] for record in records], 0)
    centers = {"without it, hold-out": 0, "without it, target": 0, "gate": 1}  # white
    tables.plot_heats(heats, "head", "layer", f"{path}-carry.png", centers)
    of_runs = [correlations(record) for record in records]
    mean, cells = [], {}
    for one in measures:
        row = []
        for other in measures:
            row.append(np.mean([rows[one][other] for rows in of_runs]))
        mean.append(row)
        cells[one] = [f"{value:+.2f}" for value in row]
    title = "rank correlation over heads"
    print("\n" + tables.format_table(title, measures, cells))
    names = (measures, measures)
    tables.plot_heat(mean, title, "", "", f"{path}-correlation.png", center=0, names=names)


def by_dropped(record: dict, test: str) -> dict[str, dict]:
    """A view of a record: {order: {number of dropped heads: accuracy in a test}}."""
    rows = {}
    for order, curve in record["extra"]["drop"].items():
        dropped = map(str, curve["dropped"])
        rows[order] = dict(zip(dropped, curve[test]))
    return rows


def report_curves(records: list[dict], path) -> None:
    """Print and draw accuracies by the number of dropped heads."""
    panels = {}
    for test in ("hold-out", "target"):
        panels[test] = [{**record, "rows": by_dropped(record, test)} for record in records]
        print("\n" + tables.table(f"{test}, %, heads dropped:", panels[test]))
    tables.plot_curves(panels, "dropped heads", "accuracy", f"{path}-curves.png")


# ---------- The command line ---------------------------------------------------------------------
PARTS = ("probes", "curves", "attention")


def exporting_run(model: str) -> dict | None:
    """result.json of the run that exported a model, local-dir:RUN/model; None for other models."""
    path = Path(model.removeprefix("local-dir:")).parent / "result.json"
    if not model.startswith("local-dir:") or not path.is_file():
        return None
    return json.loads(path.read_text())


def flags_of(run: dict) -> list[str]:
    """The flags that give a run's model, data and last row."""
    flags = {key: run["settings"][key] for key in ("model", "pretrained", "dataset", "cue")}
    flags |= {"target": run["target"], "seeds": run["seed"], "modes": run["settings"]["modes"][-1]}
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


def settings(argv=None) -> tuple:
    """The command line, or argv, and {row: its settings}: headpurify.py's and the study's own."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    usage = "python notebooks/head_study.py [--flag value ...]"
    text = "All other flags (--dataset, --epochs, ...) are headpurify.py's: see its --help."
    parser = runs.Parser(usage=usage, description=__doc__, epilog=text, **form)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    runs.flag(parser, "drop", [str], None, "LAYER.HEAD ..., heads to drop by hand in the curves")
    own, others = parser.parse_known_args(argv)
    args, rows = headpurify.settings(["--modes", "zero-shot", headpurify.OURS, *others])
    exported = None
    run = exporting_run(args.model)
    if run is not None:
        exported = args.model
        if "gates" not in run["extra"].get(run["settings"]["modes"][-1], {}):
            raise common.InputError(f"--model {exported}: the run that exported it has no gates")
        args, rows = headpurify.settings([*others, *flags_of(run)])
    last = rows[args.modes[-1]]
    if not last.gated:
        raise common.InputError(f"--modes: the last row needs gates, {last.name} has none")
    args.script, args.exported = "head_study", exported
    args.only, args.drop = own.only, own.drop or []
    return args, rows


# ---------- main ---------------------------------------------------------------------------------
def study(args, rows: dict, clip, task, run, seed: int) -> None:
    """Train and test all rows, or take an exported tower; then study the last row's heads."""
    row = rows[args.modes[-1]]
    folder = run.folder / "model"
    if args.exported:
        folder = Path(args.exported.removeprefix("local-dir:"))
        before = exporting_run(args.exported)
        run.rows.update(before["rows"])
        run.extra[row.name] = before["extra"][row.name]
    else:
        headpurify.compare(args, rows, clip, task, run, seed)  # exports the last row
    purified = common.load_clip(f"local-dir:{folder}", device=args.device).visual
    class_features = torch.from_numpy(np.load(folder / "class_features.npy")).to(args.device)
    gates = torch.tensor(run.extra[row.name]["gates"])  # (layers, heads)
    if "probes" in args.only:
        run.extra["heads"] = study_probes(clip, class_features, task, row, gates, seed)
    if "curves" in args.only:
        orders = drop_orders(args, clip, gates, class_features, task, row, seed)
        run.extra["drop"] = drop_curves(clip, purified, orders, class_features, task, row)
    if "attention" in args.only:
        parts = clip, purified, gates, class_features, task
        run.extra["attention"] = study_attention(*parts, seed, run.folder)


def main():
    args, rows = settings()
    if parallel.world_size() > 1:
        raise common.InputError("heads are studied in one process: start it without torchrun")
    clip = common.load_clip(args.model, args.pretrained, args.device, args.precision)
    headpurify.blocks(clip.visual)  # is this a ViT?
    head_indices(clip.visual, args.drop)  # are these heads?
    records = []
    for seed in args.seeds:
        domains = common.load_domains(args.dataset, args.data_root, seed, args.cue)
        targets = common.choose_targets(args.target, [domain.name for domain in domains])
        for target in targets:
            print(f"\n{args.dataset}, target {target}, seed {seed}", flush=True)
            run = runs.Run(args, target, seed)
            if not run.finished:
                task = common.leave_one_out(domains, target).transformed(clip)
                study(args, rows, clip, task, run, seed)
                run.finish()
            records.append(run.record)
    tables.report(args, records)
    path = args.output / args.script / common.slug(args.dataset)
    if args.summary:
        path = args.summary.with_suffix("")
    if "probes" in args.only:
        report_probes(records, path)
    if "curves" in args.only:
        report_curves(records, path)
    print(f"Pictures are in {path}-*.png, those of single runs in their folders")


if __name__ == "__main__":
    runs.command(main)
