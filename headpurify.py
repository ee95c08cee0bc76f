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
import itertools
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common


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
        for name in ("q", "v") if rank else ():
            down = torch.randn(H if head_aware else 1, D, rank, **new)  # B (H or 1, D, r)
            up = torch.zeros(H, rank, d, **new)  # A (H, r, d)
            down = down / D**0.5  # z has unit variance: so has z @ B
            self.register_parameter(f"down_{name}", nn.Parameter(down))
            self.register_parameter(f"up_{name}", nn.Parameter(up))
        self.gate_logits = nn.Parameter(torch.zeros(H, **new), requires_grad=gated)  # g (H,)

    def gates(self) -> torch.Tensor:
        """a = H softmax(g): (H,), positive, sums to H."""
        return len(self.gate_logits) * self.gate_logits.softmax(0)

    def lora_parameters(self) -> list[nn.Parameter]:
        return [self.down_q, self.up_q, self.down_v, self.up_v] if self.rank else []

    def in_projection(self) -> torch.Tensor:
        """[W_q W_k W_v] with the updates of all heads, (3D, D) as PyTorch stores it."""
        weight = self.mha.in_proj_weight
        if not self.rank:
            return weight
        D = weight.shape[1]
        # (H, d, r) @ (H or 1, r, D) is (H, d, D): row i d + j is column j of head i's update
        q = (self.up_q.mT @ self.down_q.mT).reshape(D, D)
        v = (self.up_v.mT @ self.down_v.mT).reshape(D, D)
        return weight + self.scale * torch.cat([q, torch.zeros_like(q), v])

    def forward(self, z, key=None, value=None, need_weights=False, attn_mask=None):
        """z (B, N, D) -> ((B, N, D), None); open_clip's blocks call it as they call `mha`."""
        B, N, D = z.shape
        qkv = F.linear(z, self.in_projection(), self.mha.in_proj_bias)  # (B, N, 3D)
        qkv = qkv.view(B, N, 3, self.mha.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask)  # (B, H, N, d)
        heads = heads * self.gates().to(heads.dtype)[:, None, None]
        return self.mha.out_proj(heads.transpose(1, 2).reshape(B, N, D)), None

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
    layers = blocks(visual.requires_grad_(False))
    ranks = [rank] * (len(layers) - 2) + [last_rank] * 2
    for block, r in zip(layers, ranks[-len(layers) :]):
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
    "inputs", what attention reads; "heads", its gated heads side by side; "layers", what a layer
    hands on. "output" leaves the list empty."""
    tokens = []

    def keep(module, args, output=None):
        tokens.append(args[0] if output is None else output)

    with contextlib.ExitStack() as stack:  # which removes the hooks
        for block in blocks(visual):
            if where == "layers":
                stack.callback(block.register_forward_hook(keep).remove)
            elif where != "output":
                module = block.attn.mha.out_proj if where == "heads" else block.attn
                stack.callback(module.register_forward_pre_hook(keep).remove)
        yield tokens


def mmd_loss(features: list[torch.Tensor], domain: torch.Tensor, bandwidths=None) -> torch.Tensor:
    """L_MMD: MMD^2 of domains of a batch, averaged over pairs of domains and the features (B, D) in
    the list. domain: (B,), numbers of domains. Raises: InputError if there is only one."""
    pairs = list(itertools.combinations(domain.unique().tolist(), 2))
    if not pairs:
        raise common.InputError("L_MMD compares domains: two are needed, or --modes lora ha-lora")
    distances = []
    for feature in features:
        x = F.normalize(feature.float(), dim=-1)
        for a, b in pairs:
            distances.append(common.mmd2(x[domain == a], x[domain == b], bandwidths))
    return torch.stack(distances).mean()


def route_gradients(loss_cls, loss_mmd, trained: list, reached: list, alpha: float) -> None:
    """Write .grad, the point of the paper: what is trained gets the gradient of L_cls, what L_MMD
    reaches also alpha times its gradient. In the paper low-rank factors and gates are trained, and
    the gates are reached."""
    gradients = torch.autograd.grad(loss_cls, trained, retain_graph=bool(reached))
    for parameter, gradient in zip(trained, gradients):
        parameter.grad = gradient
    if reached:
        for parameter, gradient in zip(reached, torch.autograd.grad(loss_mmd, reached)):
            parameter.grad = parameter.grad + alpha * gradient


def trained_now(strategy: str, step: int, steps: int, weights: list, gates: list) -> list:
    """What a step (1 ... steps) trains: both; in turns; or weights first, then gates."""
    if strategy == "joint" or not weights or not gates:
        return weights + gates
    weights_now = step % 2 if strategy == "alternating" else step <= steps // 2
    return weights if weights_now else gates


# ---------- Training -----------------------------------------------------------------------------
def train(clip, class_features, task, row, seed: int) -> tuple:
    """Fine-tune a copy of CLIP's image tower on the sources of a task.

    Args: class_features (C, D), unit-norm; row: see `SETTINGS` and `ROWS`. Returns: the tower as it
    was when it classified the source hold-outs best, merged; and what is kept in the record.
    """
    torch.manual_seed(seed)
    visual = copy.deepcopy(clip.visual)
    layers, weights, gates = make_trainable(visual, row)
    reached = {"none": [], "lora": weights, "gates": gates, "both": weights + gates}[row.mmd_grad]
    reached = set(reached)  # by L_MMD
    images_per_step = row.batch_size * len(task.train)
    steps_per_epoch = max(1, sum(map(len, task.train.values())) // images_per_step)
    steps = row.epochs * steps_per_epoch
    lr = row.full_lr if row.adapter == "full" else row.lr
    of_gates = {"params": gates, "lr": row.gate_lr, "weight_decay": 0.0}
    groups = [{"params": weights, "lr": lr}, of_gates]
    optimizer = torch.optim.AdamW(groups, weight_decay=row.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(row.device.type, enabled=row.precision == "fp16")
    batches = common.SourceBatches(task.train, row.batch_size, seed, row.workers)
    history, best, state = [], -1.0, {}
    visual.train()
    for step in tqdm(range(1, steps + 1), disable=None):
        batch = [part.to(row.device, non_blocking=True) for part in next(batches)]
        loss_cls, loss_mmd = losses(visual, *batch, class_features, clip.logit_scale, row, reached)
        trained = trained_now(row.strategy, step, steps, weights, gates)
        reached_now = [parameter for parameter in trained if parameter in reached]
        optimizer.zero_grad()
        scaled = scaler.scale(loss_cls), scaler.scale(loss_mmd)  # changes them in fp16 alone
        route_gradients(*scaled, trained, reached_now, row.alpha)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if step % (row.eval_every * steps_per_epoch) == 0 or step == steps:
            found = {"step": step, "loss_cls": loss_cls.item(), "loss_mmd": loss_mmd.item()}
            history.append(found | validate(visual, class_features, task, row))
            if history[-1]["hold-out"] > best:  # the target is never asked
                best, state = history[-1]["hold-out"], copy.deepcopy(visual.state_dict())
    visual.load_state_dict(state)
    count = sum(parameter.numel() for parameter in weights + gates)
    share = count / sum(parameter.numel() for parameter in visual.parameters())
    learnt = {"parameters": count, "share": share, "history": history}
    learnt["gates"] = [layer.gates().tolist() for layer in layers]  # (layers, heads)
    learnt["interference"] = interference([layer for layer in layers if layer.rank])
    if layers:
        merge(visual)
    return visual.eval(), learnt


def losses(visual, images, labels, domain, class_features, logit_scale, row, reached):
    """L_cls and L_MMD of a batch (B, 3, h, w), scalars; L_MMD is 0 where it reaches nothing."""
    where = row.mmd_at if reached else "output"
    with common.autocast(row.device, row.precision), recorded(visual, where) as tokens:
        embedding = visual(images)  # (B, D)
    logits = logit_scale * F.normalize(embedding.float(), dim=-1) @ class_features.T  # (B, C)
    loss_cls = F.cross_entropy(logits, labels)
    if not reached:
        return loss_cls, torch.zeros((), device=row.device)
    compared = [layer[:, 0] for layer in tokens] or [embedding]  # CLS tokens (B, D)
    return loss_cls, mmd_loss(compared, domain, row.bandwidths)


def make_trainable(visual, row) -> tuple:
    """Prepare an image tower, in place. Returns: purified layers; parameters: weights, gates."""
    if row.adapter == "full":
        return [], list(visual.requires_grad_(True).parameters()), []
    ranks = lora_ranks(row, blocks(visual)[0].attn.num_heads)
    layers = purify(visual, *ranks, row.adapter == "ha-lora", row.gated, row.scale)
    weights = [parameter for layer in layers for parameter in layer.lora_parameters()]
    return layers, weights, [layer.gate_logits for layer in layers if row.gated]


def lora_ranks(row, heads: int):
    """Ranks in most layers and in the last two. A projection has r (H D + D) parameters in HA-LoRA,
    r (D + D) in LoRA: as many where the r of LoRA is (H + 1) / 2 times as large."""
    factor = int(row.adapter == "ha-lora")
    if row.adapter == "lora":
        factor = {"same": 1, "double": 2, "match": (heads + 1) / 2}[row.lora_rank]
    return [round(factor * rank) for rank in (row.rank, row.last_rank)]


def validate(visual, class_features, task, row):
    """Accuracies of a tower in training: on source hold-outs, which may choose, and the target."""
    visual.eval()
    classify = common.clip_classifier(visual, class_features, row.precision)
    tests = {name: task.tests[name] for name in ("hold-out", "target")}
    measures = common.evaluate(classify, tests, row.device, row.workers)
    visual.train()
    return {name: measures[name] for name in tests}


def checkpoint_accuracies(history):
    """Of checkpoints beside the source-validated one. The oracle bounds what selection can gain."""
    targets = [found["target"] for found in history]
    return {"target, last": targets[-1], "target, oracle": max(targets)}


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
    if row.prompt == "coop":  # learns words on the sources' image features (N, D)
        sources = list(task.train.values())
        x = torch.cat([clip.encode(images, row.workers) for images in sources])
        y = torch.cat([images.labels for images in sources])
        torch.manual_seed(seed)
        coop = common.CoOp(clip, task.classes, row.context)
        return coop.fit(x, y, row.batch_size * len(sources))
    templates = ["ensemble"] if row.prompt == "ensemble" else row.templates
    class_features = clip.class_features(task.classes, templates)
    if row.prompt != "file":
        return class_features
    shape = tuple(class_features.shape)
    try:
        given = torch.from_numpy(np.load(row.class_features)).float().view(shape)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        need = f"needed is a {shape} array in .npy, a row for each of {', '.join(task.classes)}"
        raise common.InputError(f"--class-features {row.class_features}: {error}; {need}") from None
    return F.normalize(given, dim=-1).to(row.device)


# ---------- What heads do ------------------------------------------------------------------------
@torch.no_grad()
def silence(visual, layer: int, head: int) -> None:
    """Take a head out of a plain tower, in place: the rows of W_o that it meets become zero."""
    attention = blocks(visual)[layer].attn
    attention.out_proj.weight.unflatten(1, (attention.num_heads, -1))[:, head] = 0  # (D, H, d)


def head_names(visual):
    """LAYER.HEAD from 1.1 on, of every head, in the order of gates (layers, heads)."""
    shape = len(blocks(visual)), blocks(visual)[0].attn.num_heads
    return [f"{layer + 1}.{head + 1}" for layer, head in np.ndindex(*shape)]


@torch.no_grad()
def head_importance(visual, class_features, logit_scale: float, images, labels) -> torch.Tensor:
    """By how much the cross-entropy grows without a head of a plain tower: (layers, heads)."""

    def loss(tower):
        cosines = common.clip_classifier(tower, class_features)(images)  # (B, C)
        return F.cross_entropy(logit_scale * cosines, labels).item()

    layers, heads = len(blocks(visual)), blocks(visual)[0].attn.num_heads
    importance = torch.full((layers, heads), -loss(visual))
    for layer, head in np.ndindex(layers, heads):
        without = copy.deepcopy(visual)
        silence(without, layer, head)
        importance[layer, head] += loss(without)
    return importance


@torch.no_grad()
def cls_attention(visual, images) -> torch.Tensor:
    """What the CLS token of a plain tower attends to beside itself: (layers, B, heads, patches)."""
    with recorded(visual, "inputs") as tokens:
        visual(images)
    maps = []
    for block, z in zip(blocks(visual), tokens):  # z (B, N, D)
        _, weights = block.attn(z, z, z, average_attn_weights=False)  # (B, H, N, N)
        maps.append(weights[:, :, 0, 1:])
    return torch.stack(maps)


def gates_on_frozen_clip(clip, class_features, task, row, seed: int):
    """Gates (layers, heads) learnt on frozen CLIP without each source in turn, summed up."""
    total = 0
    for name in task.train:
        held_out = {name: task.tests["hold-out"][name]}
        train_sets = {other: images for other, images in task.train.items() if other != name}
        fold = common.Task(task.classes, train_sets, {"hold-out": held_out, "target": held_out})
        own = argparse.Namespace(**{**vars(row), **ROWS["dig"]})
        own.mmd_grad = "gates" if len(train_sets) > 1 else "none"  # nothing to compare
        _, learnt = train(clip, class_features, fold, own, seed)
        total += torch.tensor(learnt["gates"])
    return total


def drop_curves(clip, adapted, gates, class_features, task, row, seed: int):
    """{order: {"dropped", "hold-out", "target"}}, accuracies without some heads (Figure 1).

    Heads of CLIP go in random order, as --drop says, or least gate first, where gates are learnt on
    frozen CLIP. Adapt and drop: heads of the tower `adapted`, least of its `gates` first.
    """
    heads, by_hand = gates.numel(), row.drop or []
    frozen = gates_on_frozen_clip(clip, class_features, task, row, seed)
    generator = torch.Generator().manual_seed(seed)
    orders = {"random": torch.randperm(heads, generator=generator).tolist()}
    if by_hand:
        orders["by hand"] = [head_names(clip.visual).index(name) for name in by_hand]
    orders["gates on frozen CLIP"] = frozen.flatten().argsort().tolist()
    orders["adapt and drop"] = gates.flatten().argsort().tolist()
    stops = {round(share * heads) for share in np.linspace(0, 0.75, 9)} | {len(by_hand)}
    curves = {}
    for name, order in orders.items():
        visual = copy.deepcopy(adapted if name == "adapt and drop" else clip.visual)
        curves[name] = curve = {"dropped": [], "hold-out": [], "target": []}
        for dropped, head in enumerate([None, *order]):
            if dropped > 0:
                silence(visual, *divmod(head, gates.shape[1]))
            if dropped in stops:
                curve["dropped"].append(dropped)
                for test, accuracy in validate(visual, class_features, task, row).items():
                    curve[test].append(accuracy)
    return curves


def analyse(args, task, run, visual, gates, class_features):
    """--figures: what heads are worth, and what they attend to; in numbers in analysis.npz."""
    clip, folder = args.clip, run.folder
    images, labels, _ = next(common.SourceBatches(task.tests["hold-out"], 128, run.record["seed"]))
    batch = images.to(clip.device), labels.to(clip.device)
    importance = head_importance(visual, class_features, clip.logit_scale, *batch)
    points = {"heads": {"": (gates.flatten(), importance.flatten())}}
    axes = "gate", "cross-entropy without the head, minus with it"
    common.plot_panels(points, *axes, folder / "importance.png", style="points")
    (images,) = task.tests["target"].values()
    shown = images.subset(np.linspace(0, len(images) - 1, 8))
    pixels = torch.stack([shown[i][0] for i in range(8)]).to(clip.device)
    rows = {"image": [shown.picture(i) for i in range(8)]}
    numbers = {f"image {i}": picture for i, picture in enumerate(rows["image"])}
    for name, tower in {"CLIP": clip.visual, "purified": visual}.items():
        maps = cls_attention(tower, pixels).cpu().unflatten(-1, tower.grid_size)
        rows[f"{name}, last layer"] = maps[-1].mean(1)  # (8, h, w)
        numbers[f"attention {name}"] = maps  # (layers, 8, heads, h, w)
    common.plot_images(rows, folder / "attention.png")
    np.savez(folder / "analysis.npz", gates=gates, importance=importance, **numbers)


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
]
OF_ALL_ROWS = [
    common.TARGET,
    common.TEMPLATES,
    ("class-features", str, None, None, "(C, D) of any other prompt method, .npy; --prompt file"),
    ("drop", [str], None, None, "LAYER.HEAD ... for --study drop-heads; 1.1 is the first"),
]
METHOD = common.Method("headpurify", SETTINGS, ROWS, STUDIES)


def settings():
    """The command's settings. Raises: InputError for one that would have no effect."""
    data = common.dataset_names("domains")
    args = common.flags(METHOD, __doc__, ["zero-shot", "lora", OURS], data, OF_ALL_ROWS)
    if args.study == "prompts" and not args.class_features:
        args.modes = [row for row in args.modes if "file" not in row]
    args = common.settle(args)
    if args.class_features and "file" not in {row.prompt for row in args.rows.values()}:
        raise common.InputError("--class-features has no effect without --prompt file")
    if args.figures and not args.rows[args.modes[-1]].gated:
        raise common.InputError(f"--figures needs gates in the last row, not {args.modes[-1]}")
    return args


# ---------- main ---------------------------------------------------------------------------------
def compare(args, task, run):
    """Train and test every row. The last is exported and pictured before it counts as finished."""
    clip, seed = args.clip, run.record["seed"]
    for name, row in args.rows.items():
        if name in run.rows:
            continue
        class_features = prompt_features(clip, task, row, seed)  # (C, D)
        visual, learnt = clip.visual, {}
        if row.adapter or row.gated:
            start = time.perf_counter()
            visual, learnt = train(clip, class_features, task, row, seed)
            run.extra[name], seconds = learnt, time.perf_counter() - start
            print(f"{name}: {learnt['parameters']:,} parameters trained in {seconds:.0f} s")
        classify = common.clip_classifier(visual, class_features, row.precision)
        measures = common.evaluate(classify, task.tests, row.device, row.workers)
        if learnt:
            measures |= checkpoint_accuracies(learnt["history"])
        if name == args.modes[-1]:
            common.export_clip(clip, run.folder / "model", class_features, task.classes, visual)
        if name == args.modes[-1] and row.gated:
            gates = torch.tensor(learnt["gates"])  # (layers, heads)
            path = run.folder / "gates.png"
            common.plot_heat(gates, f"gates of {name}", "head", "layer", path, center=1)
            if args.study == "drop-heads":
                found = drop_curves(clip, visual, gates, class_features, task, row, seed)
                run.extra["drop"] = found
            if args.figures:
                analyse(args, task, run, visual, gates, class_features)
        run.add(name, measures)


def report_interference(args, records):
    """How alike the updates of two heads are, layer by layer: see `interference`."""
    curves, path = {}, args.summary.with_suffix("")
    for row, learnt in records[0]["extra"].items():
        if learnt.get("interference"):
            cosines = [record["extra"][row]["interference"] for record in records]
            curves[row] = range(1, 1 + len(cosines[0])), np.transpose(cosines)  # (layers, runs)
    panels = {"updates of two heads": curves}
    common.plot_panels(panels, "layer", "|cosine|", f"{path}-interference.png")
    print(f"More pictures are in {path}-*.png")


def report_dropped_heads(args, records):
    """Tables and curves of drop-heads: an order of heads takes the place of a row, a number of
    dropped heads that of a measure."""
    panels = {}
    for test in ("hold-out", "target"):
        dropped = []
        for record in records:
            rows = {}
            for order, curve in record["extra"]["drop"].items():
                rows[order] = dict(zip(map(str, curve["dropped"]), curve[test]))
            dropped.append({**record, "rows": rows})
        print("\n" + common.table(f"{test}, %, heads dropped:", dropped))
        panels[test] = {}
        for order, row in rows.items():
            accuracies = [common.seed_means(dropped, order, number) for number in row]
            panels[test][order] = list(map(int, row)), accuracies
    path = args.summary.with_suffix("")
    common.plot_panels(panels, "dropped heads", "accuracy", f"{path}-curves.png")


def main():
    args = settings()
    domains = common.load_domains(args.dataset, args.data_root, args.seeds[0], args.cue)
    targets = common.choose_targets(args.target, [domain.name for domain in domains])
    args.clip = clip = common.load_clip(args.model, args.pretrained, args.device, args.precision)
    augment = common.training_transform(clip, args.dataset)
    names = head_names(args.clip.visual)
    for name in args.drop or ():
        if name not in names:
            raise common.InputError(f"--drop {name}: heads are {names[0]} ... {names[-1]}")
    records = []
    for seed in args.seeds:
        if args.dataset.startswith("tiny-") and seed != args.seeds[0]:  # real data have no seed
            domains = common.load_domains(args.dataset, args.data_root, seed, args.cue)
        for target in targets:
            print(f"\n{args.dataset}, target {target}, seed {seed}", flush=True)
            with common.open_run(args, target, seed) as run:
                if not run.complete:
                    task = common.leave_one_out(domains, target, clip.preprocess, augment)
                    compare(args, task, run)
            records.append(run.record)
    common.report(args, records)
    print("Checkpoints are chosen on the hold-out, the oracle's on the target.")
    if args.study:
        report_interference(args, records)
    if args.study == "drop-heads":
        report_dropped_heads(args, records)


if __name__ == "__main__":
    common.command(main)
