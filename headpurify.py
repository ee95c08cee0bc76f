"""Attention Head Purification: which heads of CLIP to trust (Wang and Kang, arXiv 2412.07226).

Fine-tuned on some domains, CLIP should work on one never seen. Some of its attention heads carry
what the task needs, others carry the domain. Two purifications, trained together:

task level     HA-LoRA: low-rank updates of the query and value projections, with a down-projection
               B for every head, so that heads do not disturb each other
domain level   DIG: a gate on every head, which also feels the distance L_MMD between the source
               domains. The low-rank factors do not: they would learn to hide the domain

After training both are folded into the weights: a plain CLIP of the same size and speed.

    python headpurify.py                                    # tiny-pacs, target sketch, on a CPU
    python headpurify.py --dataset pacs --target all --seeds 0 1 2

What the paper leaves open is called "our choice" in --help. Row vectors as in the paper: a token is
a row z, a layer computes z @ W.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

import common
from support.head_study import answers_without_each, gains, report_heads, what_heads_carry
from support.heads import cls_attention, drop_curve, greedy_order, head_importance, head_places


# ---------- Purified attention: HA-LoRA and DIG --------------------------------------------------
class HeadPurifiedAttention(nn.Module):
    """Self-attention with an update of each head's query and value projection, and a gate on it.

        Q_i = z (W_q^i + s B_q^i A_q^i),  V_i = z (W_v^i + s B_v^i A_v^i),  K_i = z W_k^i  (HA-LoRA)
        output = concat_i(a_i head_i) W_o,  a = H softmax(g)                               (DIG)

    with B^i (D, r) random and A^i (r, d) zero, g zero: at the start it computes what the pretrained
    layer computes. Conventional LoRA (`head_aware=False`) has one B for all heads: cut into heads,
    B A becomes B A^i.

    Args: mha, the layer's `nn.MultiheadAttention` (batch_first), is kept and frozen; rank r, 0 for
    no low-rank update; gated: learn g, otherwise all gates are 1; scale s. Raises: ValueError.
    """

    def __init__(self, mha, rank: int, head_aware=True, gated=True, scale: float = 1.0):
        super().__init__()
        if rank < 0:
            raise ValueError(f"rank must be >= 0, got {rank}")
        if not isinstance(mha, nn.MultiheadAttention) or not mha.batch_first:
            raise ValueError(f"need a batch_first nn.MultiheadAttention, got {mha}")
        self.mha = mha.requires_grad_(False)
        self.rank, self.scale = rank, scale
        H, D, d = mha.num_heads, mha.embed_dim, mha.head_dim
        new = {"device": mha.in_proj_weight.device, "dtype": mha.in_proj_weight.dtype}
        if rank:
            downs = H if head_aware else 1
            self.down_q = nn.Parameter(torch.randn(downs, D, rank, **new))  # B (H or 1, D, r)
            self.up_q = nn.Parameter(torch.zeros(H, rank, d, **new))  # A (H, r, d)
            self.down_v = nn.Parameter(torch.randn(downs, D, rank, **new))
            self.up_v = nn.Parameter(torch.zeros(H, rank, d, **new))
            for down in (self.down_q, self.down_v):
                down.data /= D**0.5  # z has unit variance: so has z @ B
        g = torch.zeros(H, **new)
        self.gate_logits = nn.Parameter(g, requires_grad=gated)  # (H,)

    def gates(self) -> torch.Tensor:
        """a = H softmax(g): (H,), positive, sums to H."""
        return len(self.gate_logits) * self.gate_logits.softmax(0)

    def lora_parameters(self) -> list[nn.Parameter]:
        if not self.rank:
            return []
        return [self.down_q, self.up_q, self.down_v, self.up_v]

    def in_projection(self) -> torch.Tensor:
        """[W_q W_k W_v] with the updates of all heads, (3D, D) as PyTorch stores it."""
        weight = self.mha.in_proj_weight
        if not self.rank:
            return weight
        W_q, W_k, W_v = weight.chunk(3)  # each (D, D)
        # (H, d, r) @ (H or 1, r, D) is (H, d, D): row i d + j is column j of head i's update
        q = (self.up_q.mT @ self.down_q.mT).flatten(0, 1)
        v = (self.up_v.mT @ self.down_v.mT).flatten(0, 1)
        W_q = W_q.add(q, alpha=self.scale)
        W_v = W_v.add(v, alpha=self.scale)
        return torch.cat([W_q, W_k, W_v])

    def forward(self, z, key=None, value=None, need_weights=False, attn_mask=None):
        """z (B, N, D) -> ((B, N, D), None); open_clip's blocks call it as they call `mha`."""
        B, N, D = z.shape
        with torch.autocast(z.device.type, enabled=False):  # a cast costs more than the products
            weight = self.in_projection()
        qkv = F.linear(z, weight, self.mha.in_proj_bias)  # (B, N, 3D)
        qkv = qkv.view(B, N, 3, self.mha.num_heads, -1).unbind(2)
        q, k, v = [part.transpose(1, 2) for part in qkv]  # each (B, H, N, d)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask)  # (B, H, N, d)
        heads = heads * self.gates()[:, None, None]
        tokens = heads.transpose(1, 2).reshape(B, N, D)  # heads side by side
        with torch.autocast(z.device.type, enabled=False):  # in bf16 a gate of 1.001 would be 1
            return self.mha.out_proj(tokens).to(z.dtype), None

    @torch.no_grad()
    def merge(self) -> nn.MultiheadAttention:
        """The same function as a plain layer: a gate goes into the rows of W_o its head meets."""
        plain = copy.deepcopy(self.mha)
        plain.in_proj_weight.copy_(self.in_projection())
        gates = self.gates().repeat_interleave(plain.head_dim)  # (D,)
        plain.out_proj.weight.mul_(gates)  # rows of W_o are PyTorch's columns
        return plain


def blocks(visual: nn.Module):
    """The attention blocks of an open_clip ViT image tower. Raises InputError if it has none."""
    found = getattr(getattr(visual, "transformer", None), "resblocks", [None])
    for block in found:
        attention = getattr(block, "attn", None)
        if not isinstance(attention, nn.MultiheadAttention | HeadPurifiedAttention):
            what = f"not a {type(visual).__name__}; use tiny, ViT-B-32, ViT-B-16 or ViT-L-14"
            raise common.InputError(f"head purification needs a ViT of attention blocks, {what}")
    return found


def purify(visual, rank=2, last_rank=8, head_aware=True, gated=True, scale=1.0) -> list:
    """Swap purified attention into an image tower, in place, and freeze all else: `last_rank` in
    the last two layers, `rank` in the others; 0 and 0 for gates alone. Returns: the new layers."""
    visual.requires_grad_(False)
    layers = blocks(visual)
    for place, block in enumerate(layers, start=1):
        r = last_rank if place > len(layers) - 2 else rank
        block.attn = HeadPurifiedAttention(block.attn, r, head_aware, gated, scale)
    return [block.attn for block in layers]


def merge(visual: nn.Module) -> nn.Module:
    """Swap plain attention back, in place, with all that was learnt folded in."""
    for block in blocks(visual):
        block.attn = block.attn.merge()
    return visual


# ---------- What L_MMD compares, and what it trains ----------------------------------------------
@contextlib.contextmanager
def recorded(visual: nn.Module, where: str):
    """A list that forward passes inside the block fill with tokens (B, N, D) of every layer:
    "heads", its gated heads side by side; "layers", what it hands on; "output" leaves it empty."""
    tokens, hooks = [], []

    def keep(module, arguments, output=None):
        tokens.append(arguments[0] if output is None else output)

    for block in blocks(visual):
        if where == "layers":
            hooks.append(block.register_forward_hook(keep))
        elif where == "heads":
            hooks.append(block.attn.mha.out_proj.register_forward_pre_hook(keep))
    try:
        yield tokens
    finally:
        for hook in hooks:
            hook.remove()


def mmd_loss(features: list[torch.Tensor], sources: int, bandwidths=None) -> torch.Tensor:
    """L_MMD: MMD^2 of the domains of a batch, averaged over their pairs and over the features (S n,
    D) in the list: n of each of S sources, domain after domain, so that no number is asked for on
    the way. Raises: InputError if there is only one."""
    if sources < 2:
        raise common.InputError("L_MMD compares domains: two are needed, or --modes lora ha-lora")
    one, other = torch.triu_indices(sources, sources, 1, device=features[0].device)  # all pairs
    distances = []
    for feature in features:
        x = F.normalize(feature.float(), dim=-1)
        x = x.unflatten(0, (sources, -1))  # (S, n, D)
        pairs = x.index_select(0, one), x.index_select(0, other)  # (pairs, n, D) each
        distances.append(common.mmd2(*pairs, bandwidths))
    return torch.stack(distances).mean()


def route_gradients(loss_cls, loss_mmd, trained: list, reached: list, alpha: float) -> None:
    """Write .grad, the point of the paper: what is trained gets the gradient of L_cls, what L_MMD
    reaches also alpha times its gradient. In the paper low-rank factors and gates are trained, and
    the gates are reached."""
    gradients = torch.autograd.grad(loss_cls, trained, retain_graph=bool(reached))
    for parameter, gradient in zip(trained, gradients):
        parameter.grad = gradient
    if not reached:
        return
    gradients = torch.autograd.grad(loss_mmd, reached)
    gradients = torch._foreach_mul(gradients, alpha)
    both = torch._foreach_add([parameter.grad for parameter in reached], gradients)
    for parameter, gradient in zip(reached, both):
        parameter.grad = gradient


def trained_now(strategy: str, step: int, steps: int, weights: list, gates: list) -> list:
    """What a step (1 ... steps) trains: both; in turns; or weights first, then gates."""
    if strategy == "joint" or not weights or not gates:
        return weights + gates
    weights_now = step % 2 if strategy == "alternating" else step <= steps // 2
    return weights if weights_now else gates


# ---------- Training -----------------------------------------------------------------------------
def train(clip, class_features, task, row, seed: int, saved=None, save=None) -> tuple:
    """Fine-tune a copy of CLIP's image tower on the sources of a task.

    Args: class_features (C, D), unit-norm; row: see `SETTINGS` and `ROWS`; saved: a state that was
    given to the function `save`, to go on from there. Returns: the tower as it was when it
    classified the source hold-outs best, merged; and what is kept in the record.
    """
    torch.manual_seed(seed)
    visual = copy.deepcopy(clip.visual)
    layers, weights, gates = make_trainable(visual, row)
    reached = {"none": [], "lora": weights, "gates": gates, "both": weights + gates}
    reached = set(reached[row.mmd_grad])  # by L_MMD
    images = sum(map(len, task.train.values()))
    steps_per_epoch = max(1, images // (row.batch_size * len(task.train)))
    steps = row.epochs * steps_per_epoch
    parts, state = training_parts(row, weights, gates, steps, saved)
    learnt, optimizer, schedule, scaler = parts.values()
    batches = common.SourceBatches(task.train, row.batch_size, seed, row.workers, row.device)
    batches.restart(seed, state["step"])
    watched = common.Steps(optimizer, batches, scaler)
    tower = common.compiled(visual.train(), row)
    for step in tqdm(range(state["step"] + 1, steps + 1), disable=None):
        images, labels, _ = [part.to(row.device, non_blocking=True) for part in next(batches)]
        batch = images, labels, len(task.train)
        both = losses(tower, *batch, class_features, clip.logit_scale, row, reached)
        trained = trained_now(row.strategy, step, steps, weights, gates)
        reached_now = [parameter for parameter in trained if parameter in reached]
        optimizer.zero_grad()
        scaled = [scaler.scale(loss) for loss in both]  # which changes them in fp16 alone
        route_gradients(*scaled, trained, reached_now, row.alpha)
        common.average_gradients(trained)  # of all processes, if there are several
        loss_cls, loss_mmd = both
        loss = loss_cls + row.alpha * loss_mmd
        watched.take(loss, f"{row.name}, step {step} of seed {seed}")
        schedule.step()
        state["step"] = step
        due = step % (row.eval_every * steps_per_epoch) == 0 or step == steps
        if not due and not common.was_asked():  # to stop, by a signal
            continue
        watched.check()
        if due:
            accuracies = validate(visual, class_features, task, row, row.watch_target)
            remember(state, both, accuracies, learnt)
        if save:
            whole = state | {name: part.state_dict() for name, part in parts.items()}
            save(whole, trained=step == steps)
    learnt.load_state_dict(state["chosen"])
    found = {**what_was_learnt(visual, layers, weights + gates), "history": state["history"]}
    if layers:
        merge(visual)
    return visual.eval(), found


def training_parts(row, weights: list, gates: list, steps: int, saved=None) -> tuple[dict, dict]:
    """What changes in a training: {name: part}, each with a state dict; and what it has found."""
    optimizer = make_optimizer(row, weights, gates)
    parts = {
        "learnt": nn.ParameterList(weights + gates),
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "scaler": torch.amp.GradScaler(row.device.type, enabled=row.precision == "fp16"),
    }
    if not saved:
        return parts, {"step": 0, "history": [], "best": -1.0, "chosen": None}
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return parts, {name: value for name, value in saved.items() if name not in parts}


def remember(state: dict, both_losses, accuracies: dict, learnt: nn.Module) -> None:
    """A point of the history; and what is learnt so far, if the hold-out was never better."""
    loss_cls, loss_mmd = map(common.mean_over_ranks, both_losses)
    found = {"step": state["step"], "loss_cls": loss_cls, "loss_mmd": loss_mmd, **accuracies}
    state["history"].append(found)
    if accuracies["hold-out"] > state["best"]:  # the target is never asked
        state["best"] = accuracies["hold-out"]
        state["chosen"] = copy.deepcopy(learnt.state_dict())


def make_optimizer(row, weights: list, gates: list) -> torch.optim.Optimizer:
    """AdamW, with a learning rate for gates of its own; they do not decay."""
    lr = row.full_lr if row.adapter == "full" else row.lr
    of_weights = {"params": weights, "lr": lr, "weight_decay": row.weight_decay}
    of_gates = {"params": gates, "lr": row.gate_lr, "weight_decay": 0.0}
    return torch.optim.AdamW([of_weights, of_gates], fused=row.device.type == "cuda")


def what_was_learnt(visual, layers: list, trained: list) -> dict:
    """For the record: how many parameters, the gates (layers, heads), see also `interference`."""
    count = sum(parameter.numel() for parameter in trained)
    total = sum(parameter.numel() for parameter in visual.parameters())
    low_rank = [layer for layer in layers if layer.rank]
    return {
        "parameters": count,
        "share": count / total,
        "gates": [layer.gates().tolist() for layer in layers],
        "interference": interference(low_rank),
    }


def losses(visual, images, labels, sources, class_features, logit_scale, row, reached):
    """L_cls and L_MMD of a batch (B, 3, h, w) of some number of sources, scalars; L_MMD is 0 where
    it reaches nothing."""
    where = row.mmd_at if reached else "output"
    with common.autocast(row.device, row.precision), recorded(visual, where) as tokens:
        embedding = visual(images)  # (B, D)
    features = F.normalize(embedding.float(), dim=-1)
    loss_cls = F.cross_entropy(logit_scale * features @ class_features.T, labels)
    if not reached:
        return loss_cls, torch.zeros((), device=row.device)
    compared = [embedding]
    if tokens:
        compared = [layer[:, 0] for layer in tokens]  # CLS tokens (B, D)
    compared = [common.all_gather(feature, sources) for feature in compared]  # of all processes
    return loss_cls, mmd_loss(compared, sources, row.bandwidths)


def make_trainable(visual, row) -> tuple:
    """Prepare an image tower, in place. Returns: purified layers; parameters: weights, gates."""
    if row.adapter == "full":
        visual.requires_grad_(True)
        return [], list(visual.parameters()), []
    ranks = lora_ranks(row, blocks(visual)[0].attn.num_heads)
    layers = purify(visual, *ranks, row.adapter == "ha-lora", row.gated, row.scale)
    weights, gates = [], []
    for layer in layers:
        weights += layer.lora_parameters()
        if row.gated:
            gates.append(layer.gate_logits)
    return layers, weights, gates


def lora_ranks(row, heads: int):
    """Ranks in most layers and in the last two. A projection has r (H D + D) parameters in HA-LoRA,
    r (D + D) in LoRA: as many where the r of LoRA is (H + 1) / 2 times as large."""
    factor = {None: 0, "ha-lora": 1, "lora": 1}[row.adapter]
    if row.adapter == "lora":
        factor = {"same": 1, "double": 2, "match": (heads + 1) / 2}[row.lora_rank]
    return round(factor * row.rank), round(factor * row.last_rank)


def validate(visual, class_features, task, row, target=True):
    """Accuracies of a tower in training: on source hold-outs, which may choose, and if asked for on
    the target. It goes on in the mode it was in."""
    training = visual.training
    visual.eval()
    classify = common.clip_classifier(visual, class_features, row.precision)
    tests = {name: task.tests[name] for name in ("hold-out", "target")[: 1 + target]}
    measures = common.evaluate(classify, tests, row.device, row.workers)
    visual.train(training)
    return {name: measures[name] for name in tests}


@torch.no_grad()
def interference(layers):
    """|cosine| of the updates s B^i A^i of two heads, for every purified layer: the mean over pairs
    of heads, queries and values. It is high in LoRA, whose heads share one B."""
    cosines = []
    for layer in layers:
        down = torch.stack([layer.down_q, layer.down_v])  # (2, H or 1, D, r)
        up = torch.stack([layer.up_q, layer.up_v])  # (2, H, r, d)
        update = F.normalize((down @ up).flatten(2), dim=-1)  # (2, H, D d)
        H = update.shape[1]
        total = (update @ update.mT).abs().sum().item() / 2  # of queries and values
        cosines.append((total - H) / (H * (H - 1)))  # but those of a head with itself
    return cosines


# ---------- Class features by prompts, (C, D), unit-norm -----------------------------------------
def prompt_features(clip, task, row, seed: int) -> torch.Tensor:
    """Class features as `row.prompt` says: purification goes with any of them."""
    if row.prompt == "coop":
        return coop_features(clip, task, row, seed)
    if row.prompt == "file":
        return common.read_class_features(row.class_features, clip, task.classes)
    templates = ["ensemble"] if row.prompt == "ensemble" else row.templates
    return clip.class_features(task.classes, templates)


def coop_features(clip, task, row, seed: int) -> torch.Tensor:
    """Of the words that CoOp learns on the sources' image features."""
    x = torch.cat([clip.encode(images, row.workers) for images in task.train.values()])  # (N, D)
    y = torch.cat([images.labels for images in task.train.values()])
    torch.manual_seed(seed)
    coop = common.CoOp(clip, task.classes, row.context)
    return coop.fit(x, y, row.batch_size * len(task.train))


# ---------- What heads do ------------------------------------------------------------------------
def gates_on_frozen_clip(clip, class_features, task, row, seed: int):
    """Gates (layers, heads) learnt on frozen CLIP without each source in turn, summed up."""
    own = argparse.Namespace(**{**vars(row), **ROWS["dig"]})
    own.mmd_grad = "gates" if len(task.train) > 2 else "none"  # else nothing to compare
    total = 0
    for name in task.train:
        held_out = {name: task.tests["hold-out"][name]}
        train_sets = {other: images for other, images in task.train.items() if other != name}
        fold = common.Task(task.classes, train_sets, {"hold-out": held_out, "target": held_out})
        _, learnt = train(clip, class_features, fold, own, seed)
        total += torch.tensor(learnt["gates"])
    return total


def source_sample(clip, class_features, task, seed: int, per_source: int) -> tuple:
    """What `loss_of` wants: held-out images, as many of every source."""
    batches = common.SourceBatches(task.tests["hold-out"], per_source, seed)
    images, labels, _ = next(batches)
    return class_features, clip.logit_scale, images.to(clip.device), labels.to(clip.device)


def drop_curves(clip, adapted, gates, class_features, task, row, seed: int) -> dict:
    """{order: {"dropped", "hold-out", "target"}}, accuracies without some heads (Figure 1).

    Heads of CLIP go in random order, as --drop says, by what the sources lose without them (ranked,
    or greedily up to a quarter), or by gates learnt on frozen CLIP; those of `adapted` by `gates`.
    """
    heads, by_hand = gates.numel(), row.drop or []
    generator = torch.Generator().manual_seed(seed)
    orders = {"random": torch.randperm(heads, generator=generator)}
    if by_hand:
        orders["by hand"] = head_places(clip.visual, by_hand)
    sample = source_sample(clip, class_features, task, seed, 64)
    orders["ranked on sources"] = head_importance(clip.visual, *sample).flatten().argsort()
    orders["greedy on sources"] = greedy_order(clip.visual, heads // 4, *sample)
    frozen = gates_on_frozen_clip(clip, class_features, task, row, seed)
    orders["gates on frozen CLIP"] = frozen.flatten().argsort()
    orders["adapt and drop"] = gates.flatten().argsort()
    shares = np.linspace(0, 0.75, 9)
    stops = {len(by_hand), *(round(share * heads) for share in shares)}

    def measure(visual):
        return validate(visual, class_features, task, row)

    curves = {}
    for name, order in orders.items():
        visual = adapted if name == "adapt and drop" else clip.visual
        curves[name] = drop_curve(visual, order, stops, measure)
    return curves


def study_heads(clip, class_features, task, row, gates, seed: int) -> dict:
    """What every head of CLIP carries, {measure: (layers, heads)}; see support/head_study.py."""
    sources = task.tests.get("source", task.tests["hold-out"])
    domains = {**sources, **task.tests["target"]}

    def outputs(function, images):
        return common.outputs(function, images, row.device, workers=row.workers)

    def distance(features, sources):
        return mmd_loss([features], sources, row.bandwidths).item()

    found, mean = what_heads_carry(clip.visual, domains, seed, outputs, distance)
    classify = common.clip_classifier(clip.visual, class_features, row.precision)
    answers = answers_without_each(clip.visual, mean, classify)
    for test in ("hold-out", "target"):
        right = []
        for images in task.tests[test].values():
            right.append(outputs(answers, images) == images.labels[:, None])
        found[f"without it, {test}"] = gains(torch.cat(right), gates.shape)
    return {**found, "gate": gates.tolist()}


def analyse(args, task, run, visual, gates, class_features) -> None:
    """--figures: what heads are worth, and what they attend to, as numbers in analysis.npz."""
    clip = args.clip
    sample = source_sample(clip, class_features, task, run.record["seed"], 128)
    numbers = {"gates": gates}  # (layers, heads), as is the importance
    numbers["importance"] = head_importance(visual, *sample)
    numbers["importance CLIP"] = head_importance(clip.visual, *sample)
    (target,) = task.tests["target"].values()
    shown = target.subset(np.linspace(0, len(target) - 1, 8))
    numbers |= {f"image {i}": shown.picture(i) for i in range(8)}
    pixels, _ = shown.__getitems__(range(8))
    for name, tower in {"CLIP": clip.visual, "purified": visual}.items():
        maps = cls_attention(tower, pixels.to(clip.device)).cpu()
        numbers[f"attention {name}"] = maps.unflatten(-1, tower.grid_size)  # (L, 8, H, h, w)
    common.write_arrays(run.folder / "analysis.npz", **numbers)


# ---------- What the paper compares --------------------------------------------------------------
# What trains in the image tower. A row may have its own settings, "ha-lora+dig/mmd-grad=both".
ROWS = {
    "zero-shot": {"adapter": None, "gated": False},
    "full": {"adapter": "full", "gated": False},
    "lora": {"adapter": "lora", "gated": False},
    "ha-lora": {"adapter": "ha-lora", "gated": False},
    "dig": {"adapter": None, "gated": True},
    "lora+dig": {"adapter": "lora", "gated": True},
    "ha-lora+dig": {"adapter": "ha-lora", "gated": True},
}
OURS = "ha-lora+dig"
MODES = ["zero-shot", "lora", OURS]
PROMPTS = ("file", "ensemble", "coop", "templates")  # a file where --class-features is given
STUDIES = {
    "components": list(ROWS),
    "mmd-target": [
        *("zero-shot", f"{OURS}/mmd-grad=none", f"{OURS}/mmd-grad=lora", f"{OURS}/mmd-grad=both"),
        *(f"{OURS}/mmd-at=layers", f"{OURS}/mmd-at=heads", OURS),
    ],
    "strategy": ["zero-shot", f"{OURS}/strategy=alternating", f"{OURS}/strategy=two-stage", OURS],
    "lora-capacity": [
        *("zero-shot", "lora", "lora/lora-rank=double", "lora/lora-rank=match", "lora+dig"),
        *("lora+dig/lora-rank=double", "lora+dig/lora-rank=match", "ha-lora", OURS),
    ],
    "prompts": [f"{row}/prompt={kind}" for kind in PROMPTS for row in ("zero-shot", OURS)],
    "drop-heads": ["zero-shot", "ha-lora+dig"],  # and the accuracy without some heads
    "heads": ["zero-shot", "ha-lora+dig"],  # and what each head carries
}

# ---------- Settings -----------------------------------------------------------------------------
# name, kind, default, default with the tiny CLIP, what it is
SETTINGS = [
    ("rank", common.at_least(1), 2, 2, "r in all layers but the last two (published: 2)"),
    ("last-rank", common.at_least(1), 8, 8, "r in the last two layers (published: 8)"),
    ("lora-rank", ("same", "double", "match"), "same", "same", "LoRA's; match: HA-LoRA's size"),
    ("scale", common.positive, 1.0, 1.0, "s, weight of the low-rank updates (our choice)"),
    ("alpha", common.at_least(0, float), 1.0, 1.0, "weight of L_MMD (our choice)"),
    ("mmd-grad", ("none", "lora", "gates", "both"), "gates", "gates", "what L_MMD trains"),
    ("mmd-at", ("output", "layers", "heads"), "output", "output", "what it compares (our choice)"),
    ("bandwidths", [common.positive], None, None, "of the kernel (default: a bank, our choice)"),
    ("strategy", ("joint", "alternating", "two-stage"), "joint", "joint", "(published: joint)"),
    ("prompt", PROMPTS, "templates", "templates", "what makes the class features"),
    ("context", common.at_least(1), 4, 4, "words that CoOp learns (published: 4 ... 16)"),
    ("batch-size", common.at_least(1), 12, 12, "images per source in a step (published: 12)"),
    ("epochs", common.at_least(1), 40, 4, "passes over the sources (published: 40)"),
    ("lr", common.positive, 5e-4, 3e-3, "of low-rank factors (our choice)"),
    ("gate-lr", common.positive, 5e-3, 5e-3, "of gates (our choice)"),
    ("full-lr", common.positive, 5e-6, 1e-3, "of full fine-tuning (our choice)"),
    ("weight-decay", common.at_least(0, float), 0.01, 0.01, "of all but gates (our choice)"),
    ("eval-every", common.at_least(1), 1, 1, "epochs between evaluations"),
    ("watch-target", bool, False, True, "evaluate the target as often; the oracle needs it"),
]
OF_ALL_ROWS = [
    common.TARGET,
    common.TEMPLATES,
    *common.SPEED,
    ("class-features", str, None, None, "(C, D) of any other prompt method, .npy; --prompt file"),
    ("drop", [str], None, None, "LAYER.HEAD ... for --study drop-heads; 1.1 is the first"),
]
# {setting: rows that it has an effect on}
NEEDS = {"lora-rank": "^lora", "full-lr": "full", "gate-lr": "dig", "strategy": "lora.dig"}
NEEDS |= dict.fromkeys(("lr", "rank", "last-rank", "scale"), "lora")
NEEDS |= dict.fromkeys(("cache", "compile"), "full|lora|dig")
METHOD = common.Method("headpurify", SETTINGS, ROWS, STUDIES, NEEDS, shared=True)


def settings(argv=None):
    """The command line, or argv, checked. Raises: InputError for what would have no effect."""
    data = common.dataset_names("domains")
    args = common.flags(METHOD, __doc__, MODES, data, OF_ALL_ROWS, argv)
    if args.study == "prompts" and not args.class_features:
        args.modes = [row for row in args.modes if "file" not in row]
    args = common.settle(args)
    if args.class_features and "file" not in {row.prompt for row in args.rows.values()}:
        raise common.InputError("--class-features has no effect without --prompt file")
    if args.compile and {row.mmd_at for row in args.rows.values()} != {"output"}:
        raise common.InputError("--compile hides what layers hand on: it needs --mmd-at output")
    if args.drop and args.study != "drop-heads":
        raise common.InputError("--drop has no effect without --study drop-heads")
    if args.figures and not args.rows[args.modes[-1]].gated:
        raise common.InputError(f"--figures needs gates in the last row, not {args.modes[-1]}")
    return args


# ---------- main ---------------------------------------------------------------------------------
def compare(args, task, run) -> None:
    """Train and test every row. The last is exported and analysed before it counts as finished."""
    clip, seed = args.clip, run.record["seed"]
    common.check_batch_sizes(args.rows, task.train)
    for name, row in args.rows.items():
        if name in run.rows:
            continue
        class_features = prompt_features(clip, task, row, seed)  # (C, D)
        visual, learnt = clip.visual, {}
        if row.adapter or row.gated:
            start = time.perf_counter()
            saved = (run.state or {}).get(name)

            def save(state, trained, name=name):
                run.save({name: state}, trained)

            visual, learnt = train(clip, class_features, task, row, seed, saved, save)
            seconds = time.perf_counter() - start
            run.extra[name] = learnt
            print(f"{name}: {learnt['parameters']:,} parameters trained in {seconds:.0f} s")
        classify = common.clip_classifier(visual, class_features, row.precision)
        measures = common.evaluate(classify, task.tests, row.device, row.workers)
        if learnt and row.watch_target:
            # of other checkpoints; the oracle bounds what choosing one can gain
            targets = [found["target"] for found in learnt["history"]]
            measures |= {"target, last": targets[-1], "target, oracle": max(targets)}
        if name == args.modes[-1]:
            common.export_clip(clip, run.folder / "model", class_features, task.classes, visual)
            if row.gated:
                gates = torch.tensor(learnt["gates"])  # (layers, heads)
                look_at_heads(args, task, run, visual, gates, class_features)
        run.add(name, measures)


def look_at_heads(args, task, run, visual, gates, class_features) -> None:
    """What the last row's gates are, and what --study drop-heads and --figures ask for."""
    name, seed = args.modes[-1], run.record["seed"]
    path = run.folder / "gates.png"
    common.plot_heat(gates, f"gates of {name}", "head", "layer", path, center=1)
    spread = f"{gates.min():.2f} to {gates.max():.2f}, standard deviation {gates.std():.2f}"
    print(f"{name}: gates from {spread}")
    if args.study == "heads":
        row = args.rows[name]
        run.extra["heads"] = study_heads(args.clip, class_features, task, row, gates, seed)
    if args.study == "drop-heads":
        row = args.rows[name]
        curves = drop_curves(args.clip, visual, gates, class_features, task, row, seed)
        run.extra["drop"] = curves
    if args.figures:
        analyse(args, task, run, visual, gates, class_features)


def by_layer(record: dict) -> dict[str, dict]:
    """A view of a record: how alike the updates of two heads are; see `interference`."""
    rows = {}
    for row, learnt in record["extra"].items():
        if learnt.get("interference"):
            rows[row] = dict(enumerate(learnt["interference"], start=1))
    return rows


def by_dropped(record: dict, test: str) -> dict[str, dict]:
    """A view of a record: an order of heads in place of a row, a number of them of a measure."""
    rows = {}
    for order, curve in record["extra"]["drop"].items():
        dropped = map(str, curve["dropped"])
        rows[order] = dict(zip(dropped, curve[test]))
    return rows


def report_study(args, records: list[dict]) -> None:
    """Curves over layers and over dropped heads."""
    path = args.summary.with_suffix("")
    layers = [{**record, "rows": by_layer(record)} for record in records]
    panels = {"updates of two heads": layers}
    common.plot_curves(panels, "layer", "|cosine|", f"{path}-interference.png")
    if args.study == "drop-heads":
        panels = {}
        for test in ("hold-out", "target"):
            panels[test] = [{**record, "rows": by_dropped(record, test)} for record in records]
            print("\n" + common.table(f"{test}, %, heads dropped:", panels[test]))
        common.plot_curves(panels, "dropped heads", "accuracy", f"{path}-curves.png")
    if args.study == "heads":
        report_heads(records, path)
    print(f"More pictures are in {path}-*.png")


def main():
    args = settings()
    data = args.dataset, args.data_root, args.seeds[0], args.cue
    domains = common.load_domains(*data, skip_broken=args.skip_broken)
    targets = common.choose_targets(args.target, [domain.name for domain in domains])
    args.clip = common.load_clip(args.model, args.pretrained, args.device, args.precision)
    augment = common.training_transform(args.clip, args.dataset)
    blocks(args.clip.visual)  # is this a ViT?
    head_places(args.clip.visual, args.drop or [])  # are these heads?
    if args.class_features:  # are they these classes'?
        common.read_class_features(args.class_features, args.clip, domains[0].images.classes)
    records = []
    for seed in args.seeds:
        if args.dataset.startswith("tiny-") and seed != args.seeds[0]:  # real data have no seed
            domains = common.load_domains(args.dataset, args.data_root, seed, args.cue)
        for target in targets:
            print(f"\n{args.dataset}, target {target}, seed {seed}", flush=True)
            with common.open_run(args, target, seed) as run:
                if not run.complete:
                    task = common.leave_one_out(domains, target)
                    folder = common.cache_folder(args)
                    task = task.transformed(augment, args.clip.preprocess, folder)
                    compare(args, task, run)
            records.append(run.record)
    result = common.report(args, records)
    chosen = "Checkpoints are chosen on the hold-out"
    print(f"{chosen}, the oracle's on the target." if args.watch_target else f"{chosen}.")
    if args.study:
        report_study(args, records)
    return result


if __name__ == "__main__":
    common.command(main)
