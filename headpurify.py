"""Attention Head Purification: which heads of CLIP to trust (Wang and Kang, arXiv 2412.07226).

Fine-tuned on some domains, CLIP should work on one never seen. Some of its attention heads carry
what the task needs, others carry the domain. Two purifications, trained together:

task level     HA-LoRA: low-rank updates of the query and value projections, with a down-projection
               B for every head, so that heads do not disturb each other
domain level   DIG: a gate on every head, which also receives the gradient of the distance L_MMD
               between the source domains. The low-rank factors do not: they would learn to hide
               the domain

After training both are folded into the weights: a plain CLIP of the same size and speed.

    python headpurify.py                                    # tiny-pacs, target sketch, on a CPU
    python headpurify.py --dataset pacs --target all --seeds 0 1 2

What the paper leaves open is called "our choice" in --help. Row vectors as in the paper: a token is
a row z, a layer computes z @ W.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

import common
from common import parallel, prompts, runs, tables


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
    resblocks = getattr(getattr(visual, "transformer", None), "resblocks", [None])
    for block in resblocks:
        attention = getattr(block, "attn", None)
        if not isinstance(attention, nn.MultiheadAttention | HeadPurifiedAttention):
            what = f"not a {type(visual).__name__}; use tiny, ViT-B-32, ViT-B-16 or ViT-L-14"
            raise common.InputError(f"head purification needs a ViT of attention blocks, {what}")
    return resblocks


def purify(visual, rank=2, last_rank=8, head_aware=True, gated=True, scale=1.0) -> list:
    """Swap purified attention into an image tower, in place, and freeze all else: `last_rank` in
    the last two layers, `rank` in the others; 0 and 0 for gates alone. Returns: the new layers."""
    visual.requires_grad_(False)
    layers = blocks(visual)
    for index, block in enumerate(layers):
        r = last_rank if index >= len(layers) - 2 else rank
        block.attn = HeadPurifiedAttention(block.attn, r, head_aware, gated, scale)
    return [block.attn for block in layers]


def merge(visual: nn.Module) -> nn.Module:
    """Swap plain attention back, in place, with what was learnt folded into the weights."""
    for block in blocks(visual):
        block.attn = block.attn.merge()
    return visual


# ---------- What L_MMD compares, and what it trains ----------------------------------------------
@contextlib.contextmanager
def recorded(visual: nn.Module, where: str):
    """A list that forward passes inside the block fill with tokens (B, N, D) of every layer:
    "heads", its gated heads side by side; "layers", what it hands on; "output" leaves it empty."""
    tokens, hooks = [], []

    def record(module, arguments, output=None):
        tokens.append(arguments[0] if output is None else output)

    for block in blocks(visual):
        if where == "layers":
            hooks.append(block.register_forward_hook(record))
        elif where == "heads":
            hooks.append(block.attn.mha.out_proj.register_forward_pre_hook(record))
    try:
        yield tokens
    finally:
        for hook in hooks:
            hook.remove()


def mmd_loss(features: list[torch.Tensor], sources: int, bandwidths=None) -> torch.Tensor:
    """L_MMD: MMD^2 of the domains of a batch, averaged over their pairs and over the features (S n,
    D) in the list: n of each of S sources, domain after domain.

    Raises: InputError if there is only one source."""
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
    """Write .grad, the point of the paper: all that is trained receives the gradient of L_cls, and
    what L_MMD reaches, a part of it, receives alpha times the gradient of L_MMD in addition. In the
    paper low-rank factors and gates are trained, and L_MMD reaches the gates."""
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
    """The parameters that step 1 ... `steps` trains: both kinds, or in turns, or first the weights
    and then the gates."""
    if strategy == "joint" or not weights or not gates:
        return weights + gates
    weights_now = step % 2 if strategy == "alternating" else step <= steps // 2
    return weights if weights_now else gates


def losses(visual, images, labels, class_features, logit_scale, domains, mmd_at, bandwidths=None):
    """L_cls and L_MMD of a batch, scalars.

    Args: images (S b, 3, h, w) and labels (S b,) of S = `domains` sources, domain after domain;
    class_features (C, D), unit-norm; mmd_at: see `recorded`; None: no L_MMD, which is then 0.
    """
    with recorded(visual, mmd_at or "output") as tokens:
        embedding = visual(images)  # (S b, D)
    features = F.normalize(embedding.float(), dim=-1)
    loss_cls = F.cross_entropy(logit_scale * features @ class_features.T, labels)
    if mmd_at is None:
        return loss_cls, torch.zeros((), device=images.device)
    compared = [layer[:, 0] for layer in tokens] or [embedding]  # CLS tokens (S b, D)
    compared = [parallel.all_gather(x, domains) for x in compared]
    return loss_cls, mmd_loss(compared, domains, bandwidths)


# ---------- Training -----------------------------------------------------------------------------
def train(clip, class_features, task, row, seed: int, run=None) -> tuple[nn.Module, dict]:
    """Fine-tune a copy of CLIP's image tower on the sources of a task.

    Args: class_features (C, D), unit-norm; row: see `parsers`; run: keeps a checkpoint after every
    evaluation, and may have one to go on from. Returns: the tower as it was when it classified the
    source hold-outs best, merged; and what is kept in the record.
    """
    torch.manual_seed(seed)
    visual = copy.deepcopy(clip.visual)
    layers, weights, gates = make_trainable(visual, row)
    choices = {"none": [], "lora": weights, "gates": gates, "both": weights + gates}
    reached, domains = set(choices[row.mmd_grad]), len(task.train)
    mmd_at = row.mmd_at if reached else None
    steps_per_epoch = max(1, sum(map(len, task.train.values())) // (row.batch_size * domains))
    steps = row.epochs * steps_per_epoch
    parts, state = resume(row, weights, gates, steps, run)
    parameters, optimizer, schedule, scaler = parts.values()
    loader = row.batch_size, seed, state["step"], steps, row.workers, row.device
    batches = common.source_batches(task.train, *loader)
    tower = runs.compiled(visual.train(), row.compile)
    for step in tqdm(range(state["step"] + 1, steps + 1), row.name, disable=None):
        images, labels = next(batches)  # (S b, 3, h, w), (S b,)
        batch = images, labels, class_features, clip.logit_scale, domains
        with common.autocast(row.device, row.precision):
            loss_cls, loss_mmd = losses(tower, *batch, mmd_at, row.bandwidths)
        trained = trained_now(row.strategy, step, steps, weights, gates)
        reached_now = [parameter for parameter in trained if parameter in reached]
        optimizer.zero_grad()
        scaled = scaler.scale(loss_cls), scaler.scale(loss_mmd)  # by 1, but in fp16
        route_gradients(*scaled, trained, reached_now, row.alpha)
        parallel.average_gradients(trained)
        scaler.step(optimizer)  # optimizer.step(), which fp16 skips where a gradient overflows
        scaler.update()
        schedule.step()
        if step % (row.eval_every * steps_per_epoch) == 0 or step == steps:
            lr = optimizer.param_groups[0]["initial_lr"]
            runs.check_finite(loss_cls + loss_mmd, f"{row.name}, step {step}", lr)
            accuracies = validate(visual, class_features, task, row)
            remember(state, step, loss_cls, loss_mmd, accuracies, parameters)
            if run:
                checkpoint = {name: part.state_dict() for name, part in parts.items()}
                run.save({row.name: state | checkpoint})
    parameters.load_state_dict(state["best parameters"])
    summary = {**summarise(visual, layers, weights + gates), "history": state["history"]}
    return (merge(visual) if layers else visual).eval(), summary


def resume(row, weights: list, gates: list, steps: int, run=None) -> tuple[dict, dict]:
    """What changes in a training, {name: part}, and what is known so far: as at the start, or as
    in the run's checkpoint."""
    optimizer = make_optimizer(row, weights, gates)
    parts = {
        "parameters": nn.ParameterList(weights + gates),
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "scaler": torch.amp.GradScaler(row.device.type, enabled=row.precision == "fp16"),
    }
    state = {"step": 0, "history": [], "best accuracy": -1.0, "best parameters": None}
    if run and row.name in run.state:
        checkpoint = run.state[row.name]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        state = {name: checkpoint[name] for name in state}
    return parts, state


def remember(state: dict, step: int, loss_cls, loss_mmd, accuracies: dict, parameters) -> None:
    """Add a point to the history; keep the parameters if the hold-out was never better."""
    numbers = map(parallel.mean_over_ranks, (loss_cls, loss_mmd))
    losses = dict(zip(("loss_cls", "loss_mmd"), numbers))
    state["history"].append({"step": step, **losses, **accuracies})
    state["step"] = step
    if accuracies["hold-out"] > state["best accuracy"]:  # the target is never asked
        state["best accuracy"] = accuracies["hold-out"]
        state["best parameters"] = copy.deepcopy(parameters.state_dict())


def make_trainable(visual, row) -> tuple[list, list, list]:
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


def lora_ranks(row, heads: int) -> tuple[int, int]:
    """Ranks in most layers and in the last two. A projection has r (H D + D) parameters in HA-LoRA,
    r (D + D) in LoRA: as many where the r of LoRA is (H + 1) / 2 times as large."""
    factor = {None: 0, "ha-lora": 1, "lora": 1}[row.adapter]
    if row.adapter == "lora":
        factor = {"same": 1, "double": 2, "match": (heads + 1) / 2}[row.lora_rank]
    return round(factor * row.rank), round(factor * row.last_rank)


def make_optimizer(row, weights: list, gates: list) -> torch.optim.Optimizer:
    """AdamW. Gates have a learning rate of their own and do not decay."""
    lr = row.full_lr if row.adapter == "full" else row.lr
    of_weights = {"params": weights, "lr": lr, "weight_decay": row.weight_decay}
    of_gates = {"params": gates, "lr": row.gate_lr, "weight_decay": 0.0}
    return torch.optim.AdamW([of_weights, of_gates], fused=row.device.type == "cuda")


def validate(visual, class_features, task, row) -> dict[str, float]:
    """Accuracies of a tower in training: on source hold-outs, which may choose, and with the tiny
    CLIP on the target, which is only watched. The tower goes on in the mode it was in."""
    training = visual.training
    visual.eval()
    classify = common.clip_classifier(visual, class_features, row.precision)
    tests = {"hold-out": task.tests["hold-out"]}
    if row.model == "tiny":
        tests["target"] = task.tests["target"]
    accuracies = common.evaluate(classify, tests, row.device, row.workers)
    visual.train(training)
    return {name: accuracies[name] for name in tests}


# ---------- What was learnt ----------------------------------------------------------------------
def summarise(visual, layers: list, trained: list) -> dict:
    """For the record: how many parameters, the gates (layers, heads), see also `interference`."""
    count = sum(parameter.numel() for parameter in trained)
    total = sum(parameter.numel() for parameter in visual.parameters())
    return {
        "parameters": count,
        "share": count / total,
        "gates": [layer.gates().tolist() for layer in layers],
        "interference": interference([layer for layer in layers if layer.rank]),
    }


@torch.no_grad()
def interference(layers: list) -> list[float]:
    """|cosine| of the updates s B^i A^i of two heads, for every purified layer: the mean over pairs
    of heads, queries and values. It is high in LoRA, whose heads share one B."""
    cosines = []
    for layer in layers:
        down = torch.stack([layer.down_q, layer.down_v])  # (2, H or 1, D, r)
        up = torch.stack([layer.up_q, layer.up_v])  # (2, H, r, d)
        update = F.normalize((down @ up).flatten(2), dim=-1)  # (2, H, D d)
        H = update.shape[1]
        total = (update @ update.mT).abs().sum().item() / 2  # of queries and values
        cosines.append((total - H) / (H * (H - 1)))  # without those of a head with itself
    return cosines


def by_layer(record: dict) -> dict[str, dict]:
    """{row: {layer: `interference`}} of a record."""
    rows = {}
    for row, extra in record["extra"].items():
        if extra.get("interference"):
            rows[row] = dict(enumerate(extra["interference"], start=1))
    return rows


def plot_interference(records: list[dict], path) -> None:
    layers = [{**record, "rows": by_layer(record)} for record in records]
    panels = {"updates of two heads": layers}
    tables.plot_curves(panels, "layer", "|cosine|", path)


# ---------- Class features by prompts, (C, D), unit-norm -----------------------------------------
def prompt_features(clip, task, row, seed: int) -> torch.Tensor:
    """Class features as `row.prompt` says: purification goes with any of them."""
    if row.prompt == "coop":
        return coop_features(clip, task, row, seed)
    if row.prompt == "promptstyler":
        return prompts.promptstyler(clip, task.classes, seed)
    if row.prompt == "file":
        return prompts.read_class_features(row.class_features, clip, task.classes)
    templates = ["ensemble"] if row.prompt == "ensemble" else row.templates
    return clip.class_features(task.classes, templates)


def coop_features(clip, task, row, seed: int) -> torch.Tensor:
    """Class features of the words that CoOp learns on the sources' image features."""
    x = torch.cat([clip.encode(images, row.workers) for images in task.train.values()])  # (N, D)
    y = torch.cat([images.labels for images in task.train.values()])
    torch.manual_seed(seed)
    coop = prompts.CoOp(clip, task.classes, CONTEXT)
    return coop.fit(x, y, row.batch_size * len(task.train))


# ---------- What the paper compares --------------------------------------------------------------
# What trains in the image tower. A row may have its own settings, "ha-lora+dig/mmd-grad=both".
ROWS = {
    "zero-shot": "",
    "full": "--adapter full",
    "lora": "--adapter lora",
    "ha-lora": "--adapter ha-lora",
    "dig": "--gated",
    "lora+dig": "--adapter lora --gated",
    "ha-lora+dig": "--adapter ha-lora --gated",
}
OURS = "ha-lora+dig"
MODES = ["zero-shot", "lora", OURS]
PROMPTS = ("promptstyler", "ensemble", "coop", "templates")  # and any other's from a file
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
}
CONTEXT = 4  # words that CoOp learns (published: 4 ... 16)


# ---------- The command line ---------------------------------------------------------------------
def parsers() -> tuple:
    """The parser of the command line, and the parser of a row's settings."""
    method = runs.Parser(add_help=False)
    flag = functools.partial(runs.flag, method.add_argument_group("method and training"))
    whole, number, positive = runs.at_least(1), runs.at_least(0, float), runs.positive
    flag("rank", whole, 2, "r in all layers but the last two (published: 2)")
    flag("last-rank", whole, 8, "r in the last two layers (published: 8)")
    flag("lora-rank", ("same", "double", "match"), "same", "of LoRA; match: as large as HA-LoRA")
    flag("scale", positive, 1.0, "s, weight of the low-rank updates (our choice)")
    flag("alpha", number, 1.0, "weight of L_MMD (our choice)")
    flag("mmd-grad", ("none", "lora", "gates", "both"), "gates", "what L_MMD trains (published)")
    flag("mmd-at", ("output", "layers", "heads"), "output", "what it compares (our choice)")
    flag("bandwidths", [positive], None, "of the kernel (default: a bank, our choice)")
    flag("strategy", ("joint", "alternating", "two-stage"), "joint", "of training (published)")
    flag("prompt", (*PROMPTS, "file"), "templates", "what makes the class features")
    flag("batch-size", whole, 12, "images per source in a step (published: 12)")
    flag("epochs", whole, 40, "passes over the sources (published: 40; tiny CLIP: 4)")
    flag("lr", positive, 5e-4, "of low-rank factors (our choice; tiny CLIP: 3e-3)")
    flag("gate-lr", positive, 5e-3, "of gates (our choice)")
    flag("full-lr", positive, 5e-6, "of full fine-tuning (our choice; tiny CLIP: 1e-3)")
    flag("weight-decay", number, 0.01, "of all but gates (our choice)")
    flag("eval-every", whole, 1, "epochs between evaluations")
    row = runs.Parser(parents=[method], add_help=False, allow_abbrev=False)
    row.add_argument("--adapter", choices=("full", "lora", "ha-lora"))
    row.add_argument("--gated", action="store_true")

    datasets = common.dataset_names("domains")
    command = runs.command_parser("headpurify", __doc__, method, datasets, ROWS, MODES, STUDIES)
    flag = functools.partial(runs.flag, command.add_argument_group("of all rows"))
    flag("target", str, "sketch", "held-out domain: its name, start or number, or all")
    flag("templates", [runs.template], ["a photo of a {}."], "prompts, averaged; or: ensemble")
    flag("class-features", str, None, "FILE.npy (C, D) of any prompt method, for --prompt file")
    flag("compile", bool, False, "compile the tower's training pass; with --mmd-at output")
    return command, row


def preset(args) -> dict:
    """Defaults that depend on other flags."""
    defaults = {"prompt": "file"} if args.class_features else {}
    if args.model == "tiny":
        defaults |= {"epochs": 4, "lr": 3e-3, "full_lr": 1e-3}
    return defaults


def settings(argv=None) -> tuple:
    """The command line, or argv, and {row: its settings}."""
    command, row_parser = parsers()
    args = runs.read_command(command, preset, STUDIES, argv)
    rows = {text: runs.read_row(row_parser, args, ROWS, text) for text in args.modes}
    for name, row in rows.items():
        if row.prompt == "file" and not args.class_features:
            raise common.InputError(f"--modes {name} needs --class-features FILE.npy")
        if args.compile and row.mmd_at != "output":
            raise common.InputError("--compile hides what layers hand on: give --mmd-at output")
    return args, rows


# ---------- main ---------------------------------------------------------------------------------
def compare(args, rows: dict, clip, task, run, seed: int) -> None:
    """Train and test every row. The last one is exported."""
    for name, row in rows.items():
        if name in run.rows:
            continue
        class_features = prompt_features(clip, task, row, seed)  # (C, D)
        visual, summary = clip.visual, {}
        if row.adapter or row.gated:
            start = time.perf_counter()
            visual, summary = train(clip, class_features, task, row, seed, run)
            seconds = time.perf_counter() - start
            print(f"{name}: {summary['parameters']:,} parameters trained in {seconds:.0f} s")
        classify = common.clip_classifier(visual, class_features, row.precision)
        metrics = common.evaluate(classify, task.tests, row.device, row.workers)
        if summary and row.model == "tiny":
            # of other checkpoints; the oracle bounds what choosing one can gain
            targets = [point["target"] for point in summary["history"]]
            metrics |= {"target, last": targets[-1], "target, oracle": max(targets)}
        if name == args.modes[-1]:
            common.export_clip(clip, run.folder / "model", class_features, task.classes, visual)
            if row.gated:
                show_gates(name, torch.tensor(summary["gates"]), run.folder)
        run.add(name, metrics, summary)
    if args.figures:
        plot_interference([run.record], run.folder / "interference.png")


def show_gates(name: str, gates: torch.Tensor, folder) -> None:
    """Gates (layers, heads) as a picture and in a line."""
    path = folder / "gates.png"
    tables.plot_heat(gates, f"gates of {name}", "head", "layer", path, center=1)
    spread = f"{gates.min():.2f} to {gates.max():.2f}, standard deviation {gates.std():.2f}"
    print(f"{name}: gates from {spread}")


def main():
    args, rows = settings()
    domains = common.load_domains(args.dataset, args.data_root, args.seeds[0], args.cue)
    targets = common.choose_targets(args.target, [domain.name for domain in domains])
    clip = common.load_clip(args.model, args.pretrained, args.device, args.precision)
    blocks(clip.visual)  # is this a ViT?
    if args.class_features:  # are they these classes'?
        classes = domains[0].images.classes
        prompts.read_class_features(args.class_features, clip, classes)
    records = []
    for seed in args.seeds:
        if args.dataset.startswith("tiny-") and seed != args.seeds[0]:  # real data have no seed
            domains = common.load_domains(args.dataset, args.data_root, seed, args.cue)
        for target in targets:
            print(f"\n{args.dataset}, target {target}, seed {seed}", flush=True)
            run = runs.Run(args, target, seed)
            if not run.finished:
                task = common.leave_one_out(domains, target).transformed(clip)
                compare(args, rows, clip, task, run, seed)
                run.finish()
            records.append(run.record)
    tables.report(args, records)
    oracle = ", the oracle's on the target" if args.model == "tiny" else ""
    print(f"Checkpoints are chosen on the hold-out{oracle}.")
    if args.study:
        path = args.summary.with_suffix("")
        plot_interference(records, f"{path}-interference.png")


if __name__ == "__main__":
    runs.command(main)
