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

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# name: (low-rank updates, each head with its own down-projection, gates)
MODES = {
    "zero-shot": (False, False, False),
    "lora": (True, False, False),
    "ha-lora": (True, True, False),
    "dig": (False, False, True),
    "lora+dig": (True, False, True),
    "ha-lora+dig": (True, True, True),
}


def settings() -> argparse.Namespace:
    parser = common.common_flags(__doc__)
    method = parser.add_argument_group("attention head purification").add_argument
    method("--modes", nargs="+", choices=MODES, default=["zero-shot", "lora", "ha-lora+dig"],
           help="what to compare; the last one is exported (default: zero-shot lora ha-lora+dig)")  # fmt: skip
    method("--rank", type=int, default=2, help="in all layers but the last two (default: 2, published)")
    method("--last-rank", type=int, default=8, help="in the last two layers (default: 8, published)")
    method("--scale", type=float, default=1.0, help="s, weight of the low-rank updates (default: 1, our choice)")
    method("--alpha", type=float, default=1.0, help="weight of L_MMD for the gates (default: 1, our choice)")
    method("--mmd-at", choices=("output", "layers", "heads"), default="output",
           help="what L_MMD compares: the encoder's output, the CLS token after every layer, or its gated heads "
           "(default: output, our choice)")  # fmt: skip
    training = parser.add_argument_group("training").add_argument
    training("--batch-size", type=int, default=12, help="images per source domain in a step (default: 12, published)")
    training("--epochs", type=int, help="passes over the sources (default: 40, published; 4 with the tiny CLIP)")
    training("--lr", type=float, help="of low-rank factors (default: 5e-4; 3e-3 with the tiny CLIP, our choice)")
    training("--gate-lr", type=float, default=5e-3, help="of gates (default: 5e-3, our choice)")
    training("--weight-decay", type=float, default=0.01, help="of low-rank factors (default: 0.01, our choice)")
    training("--eval-every", type=int, default=1, help="epochs between evaluations (default: 1)")
    args = common.settle(parser.parse_args())
    tiny = args.model == "tiny"
    args.epochs = (4 if tiny else 40) if args.epochs is None else args.epochs
    args.lr = (3e-3 if tiny else 5e-4) if args.lr is None else args.lr
    for name in ("rank", "last_rank", "batch_size", "epochs", "eval_every"):
        if getattr(args, name) < 1:
            hint = "; --modes dig trains gates without low-rank updates" if "rank" in name else ""
            raise common.InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}{hint}")
    return args


# ---------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------


class HeadPurifiedAttention(nn.Module):
    """Self-attention with low-rank updates of each head's query and value projection, and a gate on each head.

        Q_i = z (W_q^i + s B_q^i A_q^i),  V_i = z (W_v^i + s B_v^i A_v^i),  K_i = z W_k^i        (HA-LoRA)
        output = concat_i(a_i head_i) W_o,  a = H softmax(g)                                     (DIG)

    with B^i (D, r) random and A^i (r, d) zero, g zero: at the start it computes what the pretrained layer computes.
    Conventional LoRA (`head_aware=False`) has one B for all heads; cut into heads, B A becomes B A^i.

    Args:
        mha: the layer's `nn.MultiheadAttention` (self-attention, batch_first); kept, and frozen.
        rank: r; 0 for no low-rank update.
        gated: learn g; otherwise all gates are 1.
    Raises: ValueError if the rank is negative or `mha` is of another kind.
    """

    def __init__(
        self, mha: nn.MultiheadAttention, rank: int, head_aware: bool = True, gated: bool = True, scale: float = 1.0
    ):
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
        q, v = (  # (H, d, r) @ (H or 1, r, D): row i d + j is column j of head i's update
            (up.transpose(1, 2) @ down.transpose(1, 2)).reshape(weight.shape[1], -1)
            for down, up in ((self.down_q, self.up_q), (self.down_v, self.up_v))
        )
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
    kinds = (nn.MultiheadAttention, HeadPurifiedAttention)
    if not all(isinstance(getattr(block, "attn", None), kinds) for block in found):
        raise common.InputError(
            f"head purification needs a ViT of ResidualAttentionBlocks with nn.MultiheadAttention, not a "
            f"{type(visual).__name__}; use tiny, ViT-B-32, ViT-B-16 or ViT-L-14"
        )
    return found


def purify(
    visual, rank=2, last_rank=8, last_layers=2, head_aware=True, gated=True, scale=1.0
) -> list[HeadPurifiedAttention]:
    """Swap purified attention into every layer of an image tower, in place, and freeze all else.

    Args: rank `last_rank` in the last `last_layers` layers, `rank` in the others; 0 and 0 for gates alone.
    Returns: the new layers, first to last.
    """
    visual.requires_grad_(False)
    layers = blocks(visual)
    for i, block in enumerate(layers):
        block.attn = HeadPurifiedAttention(
            block.attn, last_rank if i >= len(layers) - last_layers else rank, head_aware, gated, scale
        )
    return [block.attn for block in layers]


def merge(visual: nn.Module) -> nn.Module:
    """Swap plain attention back, in place, with all that was learnt folded in."""
    for block in blocks(visual):
        block.attn = block.attn.merge()
    return visual


@contextlib.contextmanager
def recorded_features(visual: nn.Module, where: str):
    """A list that forward passes inside the block fill with what L_MMD compares: CLS tokens, one (B, D) for each layer.

    `where`: "layers", what a layer hands on; "heads", its gated heads side by side; "output" leaves the list empty.
    """
    record, hooks = [], []
    for block in blocks(visual):
        if where == "layers":
            hooks.append(block.register_forward_hook(lambda module, args, output: record.append(output[:, 0])))
        elif where == "heads":
            projection = block.attn.mha.out_proj
            hooks.append(projection.register_forward_pre_hook(lambda module, args: record.append(args[0][:, 0])))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def mmd_loss(features: list[torch.Tensor], domain: torch.Tensor) -> torch.Tensor:
    """L_MMD: MMD^2 of the domains of a batch, averaged over pairs of domains and the features (B, D) in the list."""
    pairs = list(itertools.combinations(domain.unique().tolist(), 2))
    if not pairs:
        raise common.InputError("L_MMD compares source domains, so two are needed; with one, use --modes lora ha-lora")
    unit = [F.normalize(feature.float(), dim=-1) for feature in features]
    return torch.stack([common.mmd2(x[domain == a], x[domain == b]) for x in unit for a, b in pairs]).mean()


def route_gradients(loss_cls, loss_mmd, lora: list, gates: list, alpha: float) -> None:
    """Write .grad: low-rank factors get that of L_cls, gates that of L_cls + alpha L_MMD (the point of the paper)."""
    parameters = lora + gates
    gradients = torch.autograd.grad(loss_cls, parameters, retain_graph=loss_mmd is not None)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    if loss_mmd is not None:
        for parameter, gradient in zip(gates, torch.autograd.grad(loss_mmd, gates)):
            parameter.grad = parameter.grad + alpha * gradient


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------


def train(visual, features, logit_scale: float, split: common.Split, mode: str, args, seed: int, log) -> dict:
    """Purify the image tower `visual` in place on the sources of `split`; it ends merged, at its source-validated best.

    Args: features: of the classes, (C, D); log: called with a dict at every evaluation.
    Returns: target accuracy of three checkpoints, gates (layers, heads), number of trainable parameters, seconds.
    """
    use_lora, head_aware, gated = MODES[mode]
    torch.manual_seed(seed)
    ranks = (args.rank, args.last_rank) if use_lora else (0, 0)
    layers = purify(visual, *ranks, head_aware=head_aware, gated=gated, scale=args.scale)
    lora = [parameter for layer in layers for parameter in layer.lora_parameters()]
    gates = [layer.gate_logits for layer in layers if gated]

    steps_per_epoch = max(1, sum(map(len, split.train.values())) // (args.batch_size * len(split.train)))
    steps = args.epochs * steps_per_epoch
    groups = [{"params": lora, "lr": args.lr, "weight_decay": args.weight_decay}, {"params": gates, "lr": args.gate_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == "fp16")
    batches = common.source_batches(split.train, args.batch_size, seed, args.workers)
    classify = common.clip_classifier(visual, features, args.precision)
    history, best, start = [], (-1.0, {}), time.time()

    visual.train()
    for step in tqdm(range(1, steps + 1), desc=f"{mode:12}", disable=None):
        images, labels, domain = next(batches)
        images, labels = images.to(args.device, non_blocking=True), labels.to(args.device, non_blocking=True)
        with common.autocast(args.device, args.precision), recorded_features(visual, args.mmd_at) as record:
            embedding = visual(images)  # (B, D)
        logits = logit_scale * F.normalize(embedding.float(), dim=-1) @ features.T  # (B, C)
        loss_cls = F.cross_entropy(logits, labels)
        loss_mmd = mmd_loss(record or [embedding], domain) if gated else torch.zeros((), device=args.device)
        route_gradients(scaler.scale(loss_cls), scaler.scale(loss_mmd) if gated else None, lora, gates, args.alpha)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()

        if step % (args.eval_every * steps_per_epoch) == 0 or step == steps:
            visual.eval()
            holdout = common.evaluate(classify, split.holdout, args.device, workers=args.workers)["accuracy"]
            target = common.evaluate(classify, split.target, args.device, workers=args.workers)["accuracy"]
            row = {"mode": mode, "step": step, "loss_cls": loss_cls.item(), "loss_mmd": loss_mmd.item()}
            history.append({**row, "source_holdout": holdout, "target": target})
            log(history[-1])
            if holdout > best[0]:  # the target is never asked
                best = holdout, {name: p.detach().clone() for name, p in visual.named_parameters() if p.requires_grad}
            visual.train()
    visual.load_state_dict(best[1], strict=False)
    result = {
        "checkpoints": common.checkpoint_accuracies(history),
        "gates": [layer.gates().tolist() for layer in layers],
        "trainable_parameters": sum(parameter.numel() for parameter in lora + gates),
        "seconds": round(time.time() - start, 1),
    }
    merge(visual).eval()
    return result


# ---------------------------------------------------------------------------------------------------
# One run, its figure and its table
# ---------------------------------------------------------------------------------------------------


def plot_gates(gates: list, title: str, path) -> None:
    """Heat map of the gates (layers, heads) around 1, the value of an untouched head."""
    gates = torch.tensor(gates)
    reach = max(0.05, (gates - 1).abs().max().item())
    figure, axes = plt.subplots(figsize=(1.8 + 0.55 * gates.shape[1], 1.4 + 0.45 * len(gates)), layout="constrained")
    image = axes.imshow(gates, cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach, aspect="auto")
    for layer, head in itertools.product(*map(range, gates.shape)):
        value = gates[layer, head].item()
        shade = "white" if abs(value - 1) > 0.6 * reach else "black"
        axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=shade)
    axes.set(xlabel="head", ylabel="layer", title=title)
    axes.set_xticks(range(gates.shape[1]), range(1, gates.shape[1] + 1))
    axes.set_yticks(range(len(gates)), range(1, len(gates) + 1))
    figure.colorbar(image, label="gate (1: untouched)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(args, target: str, seed: int, domains: list[common.Domain], model, preprocess, features) -> dict:
    """Train and evaluate every mode for one target and one seed, write the run's folder. Returns {mode: numbers}."""
    # tiny images are drawn in so many poses that they need no augmentation
    augment = preprocess if args.dataset.startswith("tiny-") else common.image_transform(model, train=True)
    split = common.leave_one_out(domains, target, preprocess, augment)
    class_names = domains[0].images.classes
    logit_scale = model.logit_scale.exp().item()
    path = args.output / "headpurify" / f"{common.slug(args.dataset)}-{common.slug(target)}-seed{seed}"

    results = {}
    with common.run_folder(path) as folder, (folder / "metrics.jsonl").open("w") as metrics:
        common.write_json(folder / "config.json", {**vars(args), "target": target, "seed": seed})
        for mode in args.modes:
            visual, result = copy.deepcopy(model.visual), {}
            if mode != "zero-shot":
                log = lambda row: print(json.dumps(row), file=metrics, flush=True)  # noqa: E731
                result = train(visual, features, logit_scale, split, mode, args, seed, log)
            classify = common.clip_classifier(visual, features, args.precision)
            for part in ("holdout", "source", "target"):
                result[part] = common.evaluate(classify, getattr(split, part), args.device, workers=args.workers)
            results[mode] = result
            holdout, reached = (common.percent([result[part]["accuracy"]]) for part in ("holdout", "target"))
            print(f"{mode}: source hold-out {holdout} %, target {target} {reached} %", flush=True)
        common.export_clip(model, folder / "model", features, class_names, visual)
        if "gates" in result:
            plot_gates(result["gates"], f"{args.dataset}, target {target}, {mode}", folder / "gates.png")
        common.write_json(folder / "result.json", {"target": target, "seed": seed, "modes": results})
    print(f"\n{common.run_table(f'{args.dataset}, target {target}, seed {seed}, %', results)}\nstored in {path}/\n")
    return results


def main():
    args = settings()
    place = "drawn here" if args.dataset.startswith("tiny-") else f"from {args.data_root}"
    print(f"data {args.dataset} ({place}), model {args.model}, device {args.device}, {args.precision}", flush=True)
    runs, model = [], None
    for seed in args.seeds:
        domains = common.load_domains(args.dataset, args.data_root, seed, args.cue)
        targets, class_names = common.choose_targets(args.target, [d.name for d in domains]), domains[0].images.classes
        sizes = ", ".join(f"{domain.name} {len(domain.images)}" for domain in domains)
        print(f"images: {sizes}; {len(class_names)} classes", flush=True)
        if model is None:  # after the data: a missing data set is said before weights are fetched
            model, preprocess, tokenizer = common.load_clip(args.model, args.pretrained, args.device)
            features = common.class_features(model, tokenizer, class_names, args.templates, args.device)
        for target in targets:
            results = run(args, target, seed, domains, model, preprocess, features)
            runs.append({"target": target, "seed": seed, "modes": results})
    if len(runs) > 1:
        print(common.summary_table(f"{args.dataset}, target accuracy, %", args.modes, runs))
    if args.summary:
        common.write_json(args.summary, {"settings": vars(args), "runs": runs})


if __name__ == "__main__":
    common.command(main)
