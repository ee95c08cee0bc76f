"""Attention Head Purification: which heads of CLIP to trust on a domain never seen (Wang and Kang, arXiv 2412.07226).

Some attention heads of CLIP carry what a task needs, others carry the domain. Two purifications, trained together:
  task level     HA-LoRA: low-rank updates of the query and value projections, with a down-projection for every head
  domain level   DIG: a gate on every head; gates also feel the MMD between source domains, low-rank factors do not
After training both are folded into the weights: the result is a plain CLIP of the same size and speed.

    python headpurify.py                                    # tiny-pacs, target sketch, CPU, under two minutes
    python headpurify.py --dataset pacs --target all --seeds 0 1 2

What the paper leaves open is called "our choice" in --help and explained in the README.
Row vectors as in the paper: a token is a row z, a layer computes z @ W.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common

# name: (what trains in the image encoder: nothing, all of it, low-rank updates as in LoRA or for every head; gates)
MODES = {"zero-shot": (None, False), "full": ("full", False), "lora": ("lora", False), "ha-lora": ("ha-lora", False),
         "dig": (None, True), "lora+dig": ("lora", True), "ha-lora+dig": ("ha-lora", True)}  # fmt: skip
# A mode may end in settings of its own, `ha-lora+dig/mmd-grad=both`: a study is a list of modes for the same training.
STUDIES = {
    "components": "zero-shot full lora ha-lora dig lora+dig ha-lora+dig",
    "mmd-target": "zero-shot ha-lora+dig/mmd-grad=none ha-lora+dig/mmd-grad=lora ha-lora+dig/mmd-grad=both "
    "ha-lora+dig/mmd-at=layers ha-lora+dig/mmd-at=heads ha-lora+dig",
    "strategy": "zero-shot ha-lora+dig/strategy=alternating ha-lora+dig/strategy=two-stage ha-lora+dig",
    "lora-capacity": "zero-shot lora lora/lora-rank=double lora/lora-rank=match lora+dig lora+dig/lora-rank=double "
    "lora+dig/lora-rank=match ha-lora ha-lora+dig",
    "prompts": " ".join(f"{mode}/prompt={kind}" for kind in ("file", "ensemble", "coop", "promptstyler", "templates")
                        for mode in ("zero-shot", "ha-lora+dig")),
    "drop-heads": "zero-shot ha-lora+dig",
}  # fmt: skip
OWN_SETTINGS = ("rank last-rank lora-rank scale alpha mmd-at mmd-grad bandwidths strategy prompt batch-size epochs lr "
                "gate-lr full-lr weight-decay").split()  # fmt: skip


def settings() -> argparse.Namespace:
    parser = common.common_flags(__doc__)
    method = parser.add_argument_group("attention head purification").add_argument
    method("--modes", nargs="+", metavar="MODE", default=["zero-shot", "lora", "ha-lora+dig"],
           help=f"what to compare, the last is exported: {', '.join(MODES)}; lora/lr=1e-3 (default: %(default)s)")
    method("--study", choices=STUDIES, help="a comparison of the paper or its reviewers in place of --modes; writes "
           "results/headpurify-<study>-<dataset>.json and a figure")  # fmt: skip
    method("--rank", type=int, default=2, help="in all layers but the last two (default: 2, published)")
    method("--last-rank", type=int, default=8, help="in the last two layers (default: 8, published)")
    method("--lora-rank", choices=("same", "double", "match"), default="same", help="of conventional LoRA: these, "
           "doubled, or r (heads + 1) / 2, as many parameters as HA-LoRA has (default: same)")  # fmt: skip
    method("--scale", type=float, default=1.0, help="s, weight of the low-rank updates (default: 1, our choice)")
    method("--alpha", type=float, default=1.0, help="weight of L_MMD (default: 1, our choice)")
    method("--mmd-at", choices=("output", "layers", "heads"), default="output", help="L_MMD compares the encoder's "
           "output, the CLS token after every layer, or its gated heads (default: output, our choice)")  # fmt: skip
    method("--bandwidths", type=float, nargs="+", help="of the kernel (default: a bank around the median, our choice)")
    method("--mmd-grad", choices=("none", "lora", "gates", "both"), default="gates", help="what L_MMD trains")
    method("--strategy", choices=("joint", "alternating", "two-stage"), default="joint", help="both in every step, in "
           "turns, or gates in the second half (default: joint, published)")  # fmt: skip
    method("--prompt", choices=("templates", "ensemble", "coop", "promptstyler", "file"), default="templates",
           help="who makes class features: --templates, open_clip's, CoOp, ..., --class-features (default: templates)")
    method("--class-features", metavar="FILE", help="(C, D) of any other prompt method, .npy; for --prompt file")
    method("--context", type=int, default=4, help="CoOp's learned words, 4 ... 16 (default: 4)")
    method("--drop", nargs="+", metavar="LAYER.HEAD", default=[], help="--study drop-heads: by hand; 1.1 is the first")
    method("--figures", action="store_true", help="draw what heads attend to, their importance, and features")
    training = parser.add_argument_group("training").add_argument
    training("--batch-size", type=int, default=12, help="images per source domain in a step (default: 12, published)")
    training("--epochs", type=int, help="passes over the sources (default: 40, published; 4 with the tiny CLIP)")
    training("--lr", type=float, help="of low-rank factors (default: 5e-4; 3e-3 with the tiny CLIP, our choice)")
    training("--gate-lr", type=float, default=5e-3, help="of gates (default: 5e-3, our choice)")
    training("--full-lr", type=float, help="of full fine-tuning (default: 5e-6; 1e-3 with the tiny CLIP, our choice)")
    training("--weight-decay", type=float, default=0.01, help="of all but the gates (default: 0.01, our choice)")
    training("--eval-every", type=int, default=1, help="epochs between evaluations (default: 1)")
    training("--resume", action="store_true", help="read runs that are complete from their folders")
    args = parser.parse_args()
    if args.study:
        args.modes = [mode for mode in STUDIES[args.study].split() if args.class_features or "file" not in mode]
        args.summary = args.summary or Path("results", f"headpurify-{args.study}-{common.slug(args.dataset)}.json")
    args = common.settle(args)
    for name, tiny, other in (("epochs", 4, 40), ("lr", 3e-3, 5e-4), ("full_lr", 1e-3, 5e-6)):
        if getattr(args, name) is None:
            setattr(args, name, tiny if args.model == "tiny" else other)
    args.modes = {text: read_mode(text, args, parser) for text in dict.fromkeys(args.modes)}
    if any((wrong := width) <= 0 for mode in args.modes.values() for width in mode.bandwidths or []):
        raise common.InputError(f"--bandwidths must be above 0, got {wrong}")
    if args.figures and not [*args.modes.values()][-1].gated:
        raise common.InputError(f"--figures needs gates in the last mode, such as ha-lora+dig, not {[*args.modes][-1]}")
    at_least_1 = "rank last_rank batch_size epochs eval_every context".split()
    for mode, name in itertools.product(args.modes.values(), at_least_1):
        if getattr(mode, name) < 1:
            hint = "; --modes dig trains gates without low-rank updates" if "rank" in name else ""
            raise common.InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(mode, name)}{hint}")
    return args


def read_mode(text: str, args, parser) -> argparse.Namespace:
    """Settings of a mode `name/flag=value/...`: the command's but for its own; `adapter` and `gated` by its name."""
    name, *own = text.split("/")
    if name not in MODES or not {setting.partition("=")[0] for setting in own} <= {*OWN_SETTINGS}:
        raise common.InputError(f"--modes: cannot read {text!r}{common.did_you_mean(name, MODES)} A mode is one of "
                                f"{', '.join(MODES)}; it may set {', '.join(OWN_SETTINGS)}: lora/lr=1e-3")  # fmt: skip
    mode = parser.parse_args([f"--{setting}" for setting in own], argparse.Namespace(**{**vars(args), "modes": None}))
    mode.adapter, mode.gated = MODES[name]
    return mode


# ---------- The method -----------------------------------------------------------------------------
class HeadPurifiedAttention(nn.Module):
    """Self-attention with low-rank updates of each head's query and value projection, and a gate on each head.

        Q_i = z (W_q^i + s B_q^i A_q^i),  V_i = z (W_v^i + s B_v^i A_v^i),  K_i = z W_k^i        (HA-LoRA)
        output = concat_i(a_i head_i) W_o,  a = H softmax(g)                                     (DIG)

    with B^i (D, r) random and A^i (r, d) zero, g zero: at the start it computes what the pretrained layer computes.
    Conventional LoRA (`head_aware=False`) has one B for all heads; cut into heads, B A becomes B A^i.

    Args: mha, the layer's `nn.MultiheadAttention` (batch_first), is kept and frozen; rank r, 0 for no low-rank update;
    gated: learn g, otherwise all gates are 1. Raises: ValueError if the rank is negative or `mha` is of another kind.
    """

    def __init__(self, mha: nn.MultiheadAttention, rank: int, head_aware=True, gated=True, scale: float = 1.0):
        super().__init__()
        if rank < 0:
            raise ValueError(f"rank must be >= 0, got {rank}")
        if not isinstance(mha, nn.MultiheadAttention) or not mha.batch_first or mha.in_proj_weight is None:
            raise ValueError(f"need a batch_first nn.MultiheadAttention with one in_proj_weight, got {mha}")
        self.mha = mha.requires_grad_(False)
        self.rank, self.scale = rank, scale
        H, D, d = mha.num_heads, mha.embed_dim, mha.head_dim
        new = {"device": mha.in_proj_weight.device, "dtype": mha.in_proj_weight.dtype}
        if rank:
            for name in ("q", "v"):
                down = torch.randn(H if head_aware else 1, D, rank, **new) / D**0.5  # z has unit variance: so has z @ B
                self.register_parameter(f"down_{name}", nn.Parameter(down))  # B (H or 1, D, r)
                self.register_parameter(f"up_{name}", nn.Parameter(torch.zeros(H, rank, d, **new)))  # A (H, r, d)
        self.gate_logits = nn.Parameter(torch.zeros(H, **new), requires_grad=gated)  # g (H,)

    def gates(self) -> torch.Tensor:
        """a = H softmax(g): (H,), positive, sums to H."""
        return len(self.gate_logits) * self.gate_logits.softmax(0)

    def lora_parameters(self) -> list[nn.Parameter]:
        return [self.down_q, self.up_q, self.down_v, self.up_v] if self.rank else []

    def in_projection(self) -> torch.Tensor:
        """[W_q W_k W_v] with the updates of all heads added in one batched product, (3D, D) as PyTorch stores it."""
        weight = self.mha.in_proj_weight
        if not self.rank:
            return weight
        factors = (self.down_q, self.up_q), (self.down_v, self.up_v)
        # (H, d, r) @ (H or 1, r, D): row i d + j is column j of head i's update
        q, v = ((up.mT @ down.mT).reshape(weight.shape[1], -1) for down, up in factors)
        return weight + self.scale * torch.cat([q, torch.zeros_like(q), v])

    def forward(self, z, key=None, value=None, need_weights=False, attn_mask=None):
        """z (B, N, D) -> ((B, N, D), None); called by open_clip's blocks like `nn.MultiheadAttention`."""
        B, N, D = z.shape
        qkv = F.linear(z, self.in_projection(), self.mha.in_proj_bias)
        q, k, v = qkv.view(B, N, 3, self.mha.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask)  # (B, H, N, d)
        heads = heads * self.gates().to(heads.dtype)[:, None, None]
        return self.mha.out_proj(heads.transpose(1, 2).reshape(B, N, D)), None

    @torch.no_grad()
    def merge(self) -> nn.MultiheadAttention:
        """The same function as a plain layer: updates in W_q and W_v, gate a_i in the rows of W_o that head i meets."""
        plain = copy.deepcopy(self.mha)
        plain.in_proj_weight.copy_(self.in_projection())
        plain.out_proj.weight.mul_(self.gates().repeat_interleave(plain.head_dim))  # rows of W_o: PyTorch's columns
        return plain


def blocks(visual: nn.Module):
    """The attention blocks of an open_clip ViT image tower. Raises InputError for a tower without them."""
    found = getattr(getattr(visual, "transformer", None), "resblocks", [None])
    if not all(isinstance(getattr(b, "attn", None), nn.MultiheadAttention | HeadPurifiedAttention) for b in found):
        raise common.InputError("head purification needs a ViT of ResidualAttentionBlocks with nn.MultiheadAttention, "
                                f"not a {type(visual).__name__}; use tiny, ViT-B-32, ViT-B-16 or ViT-L-14")  # fmt: skip
    return found


def purify(visual, rank=2, last_rank=8, head_aware=True, gated=True, scale=1.0) -> list[HeadPurifiedAttention]:
    """Swap purified attention into every layer of an image tower, in place, and freeze all else: `last_rank` in the
    last two layers, `rank` in the others; 0 and 0 for gates alone. Returns: the new layers, first to last."""
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


@contextlib.contextmanager
def recorded(visual: nn.Module, where: str):
    """A list that forward passes inside the block fill with tokens (B, N, D) of every layer: "inputs", what attention
    reads; "heads", its gated heads side by side; "layers", what a layer hands on. "output" leaves the list empty."""
    record = []
    with contextlib.ExitStack() as stack:
        for block in blocks(visual):
            if where == "layers":
                stack.callback(block.register_forward_hook(lambda module, args, output: record.append(output)).remove)
            elif where != "output":
                module = block.attn.mha.out_proj if where == "heads" else block.attn
                stack.callback(module.register_forward_pre_hook(lambda module, args: record.append(args[0])).remove)
        yield record


def mmd_loss(features: list[torch.Tensor], domain: torch.Tensor, bandwidths=None) -> torch.Tensor:
    """L_MMD: MMD^2 of the domains of a batch, averaged over pairs of domains and the features (B, D) in the list."""
    pairs = list(itertools.combinations(domain.unique().tolist(), 2))
    if not pairs:
        raise common.InputError("L_MMD compares source domains, so two are needed; with one, use --modes lora ha-lora")
    unit = [F.normalize(feature.float(), dim=-1) for feature in features]
    return torch.stack([common.mmd2(x[domain == a], x[domain == b], bandwidths) for x in unit for a, b in pairs]).mean()


def route_gradients(loss_cls, loss_mmd, trained: list, reached: list, alpha: float) -> None:
    """Write .grad (the point of the paper): what is trained gets the gradient of L_cls, what L_MMD reaches also alpha
    times its gradient. In the paper low-rank factors and gates are trained, and the gates are reached."""
    for parameter, gradient in zip(trained, torch.autograd.grad(loss_cls, trained, retain_graph=bool(reached))):
        parameter.grad = gradient
    if reached:
        for parameter, gradient in zip(reached, torch.autograd.grad(loss_mmd, reached)):
            parameter.grad = parameter.grad + alpha * gradient


@torch.no_grad()
def interference(layers: list[HeadPurifiedAttention]) -> list[float]:
    """|cosine| of the updates s B^i A^i of two heads, for every layer: mean over pairs of heads, queries and values."""
    cosines = []
    for layer in layers:
        down, up = torch.stack([layer.down_q, layer.down_v]), torch.stack([layer.up_q, layer.up_v])
        update = F.normalize((down @ up).flatten(2), dim=-1)  # (2, H, D d)
        H = update.shape[1]
        cosines.append(((update @ update.mT).abs().sum().item() / 2 - H) / (H * (H - 1)))  # without those of itself
    return cosines


# ---------- Prompts: class features (C, D), unit-norm ----------------------------------------------
def coop(model, tokenizer, class_names, split: common.Split, mode, seed: int) -> torch.Tensor:
    """CoOp, its context learned on the sources' image features."""
    encode = common.image_encoder(model.visual, mode.device, mode.precision)
    sets = [replace(images, transform=common.image_transform(model)) for images in split.train.values()]
    x = torch.cat([common.outputs(encode, images, mode.device, workers=mode.workers) for images in sets])
    torch.manual_seed(seed)
    y, scale = torch.cat([images.labels for images in sets]), model.logit_scale.exp().item()
    prompt = common.CoOp(model, tokenizer, class_names, mode.context, mode.device)
    return prompt.fit(x, y, scale, mode.batch_size * len(sets))


def style_loss(style, styled, content, earlier) -> torch.Tensor:
    """PromptStyler's L_style + L_content (Eqs. 1 and 3) of unit-norm features: style (D,), "a S* style of a"; styled
    (C, D), the same with every class; content (C, D), the classes alone; earlier (i - 1, D), to be orthogonal to."""
    diversity = (earlier @ style).abs().mean() if len(earlier) else 0
    return diversity + F.cross_entropy(styled @ content.T, torch.arange(len(content), device=content.device))


def promptstyler(model, tokenizer, class_names, mode, seed: int, steps=100, margin=0.5, scale=5.0) -> torch.Tensor:
    """PromptStyler (Cho et al., ICCV 2023), which sees no image: style words learned one after another, then a linear
    classifier of the texts of all styles and classes, with the ArcFace loss. Steps, margin, scale as published."""
    noun, count = ("picture", 16) if isinstance(tokenizer, common.WordTokenizer) else ("style", 80)
    style = f"a a {noun} of a"  # the second word is S*
    names = [name.replace("_", " ") for name in class_names]
    tokens = tokenizer([f"{style}.", *(f"{style} {name}." for name in names)]).to(mode.device)
    content = common.class_features(model, tokenizer, names, ["{}."], mode.device)  # (C, D)
    torch.manual_seed(seed)
    styles, texts = content[:0], []
    for _ in tqdm(range(count), desc="PromptStyler", disable=None):
        word = nn.Parameter(0.02 * torch.randn_like(common.text_tower(model).token_embedding.weight[:1]))
        optimizer = torch.optim.SGD([word], lr=0.002, momentum=0.9)
        for _ in range(steps):
            found = common.encode_prompts(model, tokens, common.first_word(tokenizer) + 1, word)  # (1 + C, D)
            optimizer.zero_grad()
            style_loss(found[0], found[1:], content, styles).backward()
            optimizer.step()
        styles, texts = torch.cat([styles, found[:1].detach()]), [*texts, found[1:].detach()]
    x, y = torch.cat(texts), torch.arange(len(names), device=mode.device).repeat(count)  # (styles C, D)
    classifier = nn.Parameter(sum(texts))  # (C, D)
    optimizer = torch.optim.SGD([classifier], lr=0.005, momentum=0.9)
    for _ in range(4 * steps):
        angle = (x @ F.normalize(classifier, dim=-1).T).clamp(-1 + 1e-6, 1 - 1e-6).acos()
        optimizer.zero_grad()
        F.cross_entropy(scale * (angle + margin * F.one_hot(y)).cos(), y).backward()
        optimizer.step()
    return F.normalize(classifier.detach(), dim=-1)


def prompt_features(model, tokenizer, class_names, split: common.Split, mode, seed: int) -> torch.Tensor:
    """Class features by `mode.prompt`. Raises: InputError for a file that is not an array of this shape."""
    if mode.prompt == "coop":
        return coop(model, tokenizer, class_names, split, mode, seed)
    if mode.prompt == "promptstyler":
        return promptstyler(model, tokenizer, class_names, mode, seed)
    templates = ["ensemble"] if mode.prompt == "ensemble" else mode.templates
    features = common.class_features(model, tokenizer, class_names, templates, mode.device)
    if mode.prompt == "file":
        try:
            given = torch.from_numpy(np.load(mode.class_features)).float().view(features.shape)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            needed = f"needed is a {tuple(features.shape)} array in .npy, a row for each of {', '.join(class_names)}"
            raise common.InputError(f"--class-features {mode.class_features}: {error}; {needed}") from None
        return F.normalize(given, dim=-1).to(mode.device)
    return features


# ---------- Training -------------------------------------------------------------------------------
def lora_ranks(mode, heads: int) -> list[int]:
    """Ranks in most layers and in the last two. HA-LoRA has r (H D + D) parameters a projection, LoRA r (D + D)."""
    factors = {"same": 1, "double": 2, "match": (heads + 1) / 2}
    factor = factors[mode.lora_rank] if mode.adapter == "lora" else int(mode.adapter == "ha-lora")
    return [round(factor * rank) for rank in (mode.rank, mode.last_rank)]


def trained_now(strategy: str, step: int, steps: int, weights: list, gates: list) -> list:
    """What a step (1 ... steps) trains: both; weights in odd steps, gates in even ones; or gates in the second half."""
    if strategy == "joint" or not weights or not gates:
        return weights + gates
    return weights if (step % 2 if strategy == "alternating" else step <= steps // 2) else gates


def train(visual, features, logit_scale: float, split: common.Split, mode, seed: int, log) -> dict:
    """Fine-tune the image tower `visual` in place on the sources; it ends merged, at its source-validated best.

    Args: features of the classes, (C, D); mode: see `read_mode`; log: called with a dict at every evaluation.
    Returns: target accuracy of three checkpoints, gates (layers, heads), interference, and what training cost.
    """
    torch.manual_seed(seed)
    if mode.adapter == "full":
        layers, weights = [], list(visual.requires_grad_(True).parameters())
    else:
        ranks = lora_ranks(mode, blocks(visual)[0].attn.num_heads)
        layers = purify(visual, *ranks, head_aware=mode.adapter == "ha-lora", gated=mode.gated, scale=mode.scale)
        weights = [parameter for layer in layers for parameter in layer.lora_parameters()]
    gates = [layer.gate_logits for layer in layers if mode.gated]
    reached = set(map(id, {"none": [], "lora": weights, "gates": gates, "both": weights + gates}[mode.mmd_grad]))
    steps_per_epoch = max(1, sum(map(len, split.train.values())) // (mode.batch_size * len(split.train)))
    steps = mode.epochs * steps_per_epoch
    groups = [{"params": weights, "lr": mode.full_lr if mode.adapter == "full" else mode.lr},
              {"params": gates, "lr": mode.gate_lr, "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, weight_decay=mode.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(mode.device.type, enabled=mode.precision == "fp16")
    batches = common.source_batches(split.train, mode.batch_size, seed, mode.workers)
    classify = common.clip_classifier(visual, features, mode.precision)
    history, best, seconds, start = [], (-1.0, {}), 0.0, time.perf_counter()
    visual.train()
    for step in tqdm(range(1, steps + 1), disable=None):
        images, labels, domain = (part.to(mode.device, non_blocking=True) for part in next(batches))
        with common.autocast(mode.device, mode.precision), recorded(visual, mode.mmd_at) as record:
            embedding = visual(images)  # (B, D)
        logits = logit_scale * F.normalize(embedding.float(), dim=-1) @ features.T  # (B, C)
        loss_cls = F.cross_entropy(logits, labels)
        compared = [tokens[:, 0] for tokens in record] or [embedding]
        loss_mmd = mmd_loss(compared, domain, mode.bandwidths) if reached else torch.zeros((), device=mode.device)
        trained = trained_now(mode.strategy, step, steps, weights, gates)
        optimizer.zero_grad()
        reached_now = [parameter for parameter in trained if id(parameter) in reached]
        route_gradients(scaler.scale(loss_cls), scaler.scale(loss_mmd), trained, reached_now, mode.alpha)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if step % (mode.eval_every * steps_per_epoch) == 0 or step == steps:
            row = {"step": step, "loss_cls": loss_cls.item(), "loss_mmd": loss_mmd.item()}
            seconds += time.perf_counter() - start
            visual.eval()
            for name, sets in (("source_holdout", split.holdout), ("target", split.target)):
                row[name] = common.evaluate(classify, sets, mode.device, workers=mode.workers)["accuracy"]
            history.append(row)
            log(row)
            if row["source_holdout"] > best[0]:  # the target is never asked
                state = {name: p.detach().clone() for name, p in visual.named_parameters() if p.requires_grad}
                best = row["source_holdout"], state
            visual.train()
            start = time.perf_counter()
    visual.load_state_dict(best[1], strict=False)
    count = sum(parameter.numel() for parameter in weights + gates)
    result = {
        "checkpoints": common.checkpoint_accuracies(history),
        "gates": [layer.gates().tolist() for layer in layers],
        "interference": interference([layer for layer in layers if layer.rank]),  # mean |cosine| of a layer
        "trainable_parameters": count,
        "trainable_share": count / sum(tensor.numel() for tensor in visual.parameters()),
        "seconds": {"training": seconds, "step": seconds / steps},
    }
    if layers:
        merge(visual)
    visual.eval()
    return result


# ---------- Figures: what heads do -----------------------------------------------------------------
@torch.no_grad()
def silence(visual, layer: int, head: int) -> None:
    """Take a head out of a plain tower, in place: the rows of W_o that it meets become zero."""
    attention = blocks(visual)[layer].attn
    attention.out_proj.weight[:, head * attention.head_dim : (head + 1) * attention.head_dim] = 0


def head_numbers(texts: list[str], visual) -> list[int]:
    """Heads LAYER.HEAD as numbers 0 ... layers * heads - 1. Raises: InputError for what is no head of the tower."""
    shape = len(blocks(visual)), blocks(visual)[0].attn.num_heads
    try:
        return [int(np.ravel_multi_index([int(i) - 1 for i in text.split(".")], shape)) for text in texts]
    except ValueError:
        raise common.InputError(f"--drop {' '.join(texts)}: heads are 1.1 ... {shape[0]}.{shape[1]}") from None


@torch.no_grad()
def head_importance(visual, features, logit_scale: float, images, labels) -> torch.Tensor:
    """By how much the cross-entropy on images (B, 3, h, w) grows without a head of a plain tower: (layers, heads)."""
    loss = lambda: F.cross_entropy(logit_scale * common.clip_classifier(visual, features)(images), labels)  # noqa: E731
    importance = torch.zeros(len(blocks(visual)), blocks(visual)[0].attn.num_heads) - loss().item()
    for layer, head in itertools.product(*map(range, importance.shape)):
        kept = (weight := blocks(visual)[layer].attn.out_proj.weight).clone()
        silence(visual, layer, head)
        importance[layer, head] += loss().item()
        weight.copy_(kept)
    return importance


@torch.no_grad()
def cls_attention(visual, images) -> torch.Tensor:
    """What the CLS token of a plain tower attends to: (layers, B, heads, patches); what is left of 1 is itself."""
    with recorded(visual, "inputs") as record:
        visual(images)
    maps = []
    for block, z in zip(blocks(visual), record):
        q, k, _ = F.linear(z, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
        q, k = (x.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for x in (q[:, :1], k))  # (B, H, 1 or N, d)
        maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 0, 1:])
    return torch.stack(maps)


def drop_curves(model, adapted, gates: torch.Tensor, features, split: common.Split, args, seed: int) -> dict[str, dict]:
    """Accuracy against the number of dropped heads (Figure 1), {order: {dropped, holdout, target}}; nothing is chosen.

    Heads of CLIP go in random order, as --drop says, or least gate first, where gates are learnt on frozen CLIP, each
    source held out once (without L_MMD if that leaves one). Adapt and drop: heads of `adapted`, least of its `gates`.
    """
    frozen, clip_gates, curves, scale = copy.copy(args), 0, {}, model.logit_scale.exp().item()
    frozen.adapter, frozen.gated, frozen.mmd_grad = None, True, "gates" if len(split.train) > 2 else "none"
    for name in split.train:
        others, held_out = {k: v for k, v in split.train.items() if k != name}, {name: split.holdout[name]}
        fold, visual = common.Split(others, held_out, held_out, held_out), copy.deepcopy(model.visual)
        clip_gates += torch.tensor(train(visual, features, scale, fold, frozen, seed, lambda row: None)["gates"])
    orders = {"random": torch.randperm(gates.numel(), generator=torch.Generator().manual_seed(seed)).tolist(),
              **({"by hand": head_numbers(args.drop, model.visual)} if args.drop else {}),
              "gates on frozen CLIP": clip_gates.flatten().argsort().tolist(),
              "adapt and drop": gates.flatten().argsort().tolist()}  # fmt: skip
    numbers = sorted({len(args.drop), *(round(share * gates.numel()) for share in np.linspace(0, 0.75, 9))})
    for name, order in orders.items():
        visual = copy.deepcopy(adapted if name == "adapt and drop" else model.visual)
        classify = common.clip_classifier(visual, features, args.precision)
        stops = [number for number in numbers if number <= len(order)]
        curves[name] = {"dropped": stops, "holdout": [], "target": []}
        for start, stop in zip([0, *stops], stops):
            for head in order[start:stop]:
                silence(visual, *divmod(head, gates.shape[1]))
            for part in ("holdout", "target"):
                result = common.evaluate(classify, getattr(split, part), args.device, workers=args.workers)
                curves[name][part].append(result["accuracy"])
    return curves


def plot_gates(gates: torch.Tensor, title: str, path) -> None:
    """Heat map of the gates (layers, heads) around 1, the value of an untouched head."""
    reach = max(0.05, (gates - 1).abs().max().item())
    figure, axes = plt.subplots(figsize=(1.8 + 0.55 * gates.shape[1], 1.4 + 0.45 * len(gates)), layout="constrained")
    image = axes.imshow(gates.numpy(), cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach, aspect="auto")
    for layer, head in itertools.product(*map(range, gates.shape)):
        shade = "white" if abs(gates[layer, head] - 1) > 0.6 * reach else "black"
        axes.text(head, layer, f"{gates[layer, head]:.2f}", ha="center", va="center", fontsize=8, color=shade)
    axes.set(xlabel="head", ylabel="layer", title=title)
    axes.set_xticks(range(gates.shape[1]), range(1, gates.shape[1] + 1))
    axes.set_yticks(range(len(gates)), range(1, len(gates) + 1))
    figure.colorbar(image, label="gate (1: untouched)")
    common.save_figure(figure, path)


def plot_attention(towers: dict, gates: torch.Tensor, pictures: common.ImageSet, device, path) -> None:
    """CLS attention in `towers` {name: tower}: the heads with the least and the greatest gate, and the last layer."""
    images = pictures.__getitems__(range(len(pictures)))[0].to(device)
    shown = [common.read_image(p) if isinstance(p, str) else p.permute(1, 2, 0) for p in pictures.images]
    rows, ends = {"image": shown}, {"least": int(gates.argmin()), "greatest": int(gates.argmax())}
    for name, visual in towers.items():
        maps = cls_attention(visual, images).cpu()
        maps = maps.unflatten(-1, (round(maps.shape[-1] ** 0.5), -1))  # (layers, B, H, h, w)
        for end, i in ends.items():
            layer, head = divmod(i, gates.shape[1])
            rows[f"{name}\n{end} gate: {layer + 1}.{head + 1}"] = maps[layer, :, head]
        rows[f"{name}\nlast layer, all"] = maps[-1].mean(1)
    figure, axes = plt.subplots(len(rows), len(shown), figsize=(10.3, 1.1 * len(rows)), layout="constrained")
    for line, (label, cells) in zip(axes, rows.items()):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for panel, cell in zip(line, cells):
            panel.imshow(np.asarray(cell))
            panel.set(xticks=[], yticks=[])
    common.save_figure(figure, path)


def plot_features(towers: dict, images: common.ImageSet, args, path) -> None:
    """Image features of the target in the plane of their two principal components, one panel for each tower."""
    figure, axes = plt.subplots(1, len(towers), figsize=(9.5, 4), layout="constrained")
    for panel, (name, visual) in zip(axes, towers.items()):
        x = common.outputs(common.image_encoder(visual, args.device, args.precision), images, args.device)
        plane = (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2].T  # (N, 2)
        for label, class_name in enumerate(images.classes):
            panel.scatter(*plane[images.labels == label].T.numpy(), s=5, label=class_name)
        panel.set(title=name, xlabel="first component", ylabel="second component")
    if len(images.classes) <= 20:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", markerscale=3)
    common.save_figure(figure, path)


def plot_importance(gates: torch.Tensor, importance: torch.Tensor, path) -> None:
    """The gate of every head against what the loss on source hold-outs gains by it, with their rank correlation."""
    ranks = np.stack([values.flatten().argsort().argsort() for values in (gates, importance)])
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    dots = axes.scatter(gates.numpy(), importance.numpy(), c=np.indices(gates.shape)[0] + 1)
    axes.set(xlabel="gate", ylabel="cross-entropy without the head, minus with it")
    axes.set_title(f"Spearman's rank correlation {np.corrcoef(ranks)[0, 1]:.2f}")
    figure.colorbar(dots, label="layer")
    common.save_figure(figure, path)


def plot_study(args, runs: list[dict]) -> None:
    """Of the drop-heads study its curves; of the others the accuracies of their modes, and how heads interfere."""
    stem, names, flat, panels = args.summary.with_suffix(""), args.study != "drop-heads", accuracies(runs), {}
    for title, part in (("source hold-out", "holdout"), ("target", "target")):
        panels[title] = {"": ([*args.modes], 100 * np.array([common.seed_means(flat, m, title) for m in args.modes]))}
        if not names:  # an order of heads takes the place of a mode, a number of dropped heads that of a measure
            drop = [{**run, "modes": {order: dict(zip(map(str, curve["dropped"]), curve[part]))
                                      for order, curve in run["drop"].items()}} for run in runs]  # fmt: skip
            print(f"\n{common.measures_table(f'{title}, %, dropped:', drop)}")
            panels[title] = {order: ([*map(int, row)], 100 * np.array([common.seed_means(drop, order, n) for n in row]))
                             for order, row in drop[0]["modes"].items()}  # fmt: skip
    common.plot_lines(panels, "" if names else "dropped heads", "accuracy, %", f"{stem}.png", names)
    of = {mode: 100 * np.array([run["modes"][mode].get("interference", []) for run in runs]).T for mode in args.modes}
    lines = {mode: (range(1, 1 + len(cosines)), cosines) for mode, cosines in of.items() if len(cosines)}
    common.plot_lines({"updates of two heads": lines}, "layer", "|cosine|, %", f"{stem}-interference.png")


# ---------- Runs -----------------------------------------------------------------------------------
def accuracies(runs: list[dict]) -> list[dict]:
    """Accuracies of runs, for `common.measures_table`, with the last mode's on the target minus that of each other."""
    parts = {"source hold-out": "holdout", "source": "source", "target": "target"}
    flat = lambda result: {name: result[part]["accuracy"] for name, part in parts.items()}  # noqa: E731
    runs = [{**run, "modes": {mode: flat(result) for mode, result in run["modes"].items()}} for run in runs]
    for *others, last in (run["modes"].values() for run in runs):
        for other in others:
            other["last minus this"] = last["target"] - other["target"]
    return runs


def describe(result: dict) -> str:
    text = ", ".join(f"{part} {100 * result[part]['accuracy']:.1f} %" for part in ("holdout", "source", "target"))
    if "seconds" in result:
        text += f"; {result['trainable_parameters']:,} trainable parameters ({100 * result['trainable_share']:.1f} %)"
        text += f", {1000 * result['seconds']['step']:.0f} ms a step"
    return text


def run(args, target: str, seed: int, domains: list[common.Domain], model, preprocess, tokenizer) -> dict:
    """Train and evaluate every mode for one target and one seed, write the run's folder. Returns the outcome."""
    # tiny images are drawn in so many poses that they need no augmentation
    augment = preprocess if args.dataset.startswith("tiny-") else common.image_transform(model, train=True)
    split = common.leave_one_out(domains, target, preprocess, augment)
    class_names, scale, results, prompts = domains[0].images.classes, model.logit_scale.exp().item(), {}, {}
    free = ("data_root", "device", "figures", "output", "resume", "seeds", "summary", "target", "workers")
    config = {name: value for name, value in vars(args).items() if name not in free}
    config = json.loads(json.dumps({**config, "modes": list(args.modes), "target": target, "seed": seed}))
    path = args.output / "headpurify" / (args.study or "") / common.slug(f"{args.dataset}-{target}-seed{seed}")
    if saved := common.resume(path.with_suffix(".checkpoint"), path / "result.json", config) if args.resume else {}:
        return {name: saved[name] for name in saved if name != "settings"}
    with common.run_folder(path) as folder, (folder / "metrics.jsonl").open("w") as metrics:
        common.write_json(folder / "config.json", config)
        for name, mode in args.modes.items():
            if mode.prompt not in prompts:
                prompts[mode.prompt] = prompt_features(model, tokenizer, class_names, split, mode, seed)
            features, visual, result = prompts[mode.prompt], copy.deepcopy(model.visual), {}
            if mode.adapter or mode.gated:
                log = lambda row: print(json.dumps({"mode": name, **row}), file=metrics, flush=True)  # noqa: E731
                result = train(visual, features, scale, split, mode, seed, log)
            classify = common.clip_classifier(visual, features, args.precision)
            for part in ("holdout", "source", "target"):
                result[part] = common.evaluate(classify, getattr(split, part), args.device, workers=args.workers)
            results[name] = result
            print(f"{name}: {describe(result)}", flush=True)
        common.export_clip(model, folder / "model", features, class_names, visual)
        outcome = {"target": target, "seed": seed, "modes": results}
        if mode.gated:
            gates, towers = torch.tensor(result["gates"]), {"CLIP": model.visual, name: visual}
            plot_gates(gates, f"{args.dataset}, target {target}, {name}", folder / "gates.png")
        if args.study == "drop-heads":
            outcome["drop"] = drop_curves(model, visual, gates, features, split, args, seed)
        if args.figures:
            images, labels, _ = (part.to(args.device) for part in next(common.source_batches(split.holdout, 128, seed)))
            importance = head_importance(visual, features, scale, images, labels)
            plot_importance(gates, importance, folder / "importance.png")
            shown = split.target[target].subset(np.linspace(0, len(split.target[target]) - 1, 8))
            plot_attention(towers, gates, shown, args.device, folder / "attention.png")
            plot_features(towers, split.target[target], args, folder / "features.png")
        common.write_json(folder / "result.json", {"settings": config, **outcome})
    print(f"\n{common.run_table(f'{args.dataset}, target {target}, seed {seed}, %', results)}\nstored in {path}/\n")
    return outcome


def main():
    args = settings()
    place, runs, model = "drawn here" if args.dataset.startswith("tiny-") else f"from {args.data_root}", [], None
    print(f"data {args.dataset} ({place}), model {args.model}, device {args.device}, {args.precision}", flush=True)
    for seed in args.seeds:
        domains = common.load_domains(args.dataset, args.data_root, seed, args.cue)
        targets, class_names = common.choose_targets(args.target, [d.name for d in domains]), domains[0].images.classes
        sizes = ", ".join(f"{domain.name} {len(domain.images)}" for domain in domains)
        print(f"images: {sizes}; {len(class_names)} classes", flush=True)
        if model is None:  # after the data: a missing data set is said before weights are fetched
            model, preprocess, tokenizer = common.load_clip(args.model, args.pretrained, args.device)
            head_numbers(args.drop, model.visual)  # asked early
        runs += [run(args, target, seed, domains, model, preprocess, tokenizer) for target in targets]
    if args.study or len(runs) > 1:
        print(common.summary_table(f"{args.dataset}, target accuracy, %", args.modes, runs))
        print(f"\n{common.measures_table(f'{args.dataset}, %', accuracies(runs))}")
    if args.study:
        plot_study(args, runs)
    if args.summary:
        common.write_json(args.summary, {"settings": {**vars(args), "modes": list(args.modes)}, "runs": runs})


if __name__ == "__main__":
    common.command(main)
