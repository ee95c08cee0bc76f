"""Diverse attention heads: learn several ways to see, then choose (Nicolicioiu et al., arXiv 2308.16274).

Training images hold a robust feature and a spurious one that is easier to learn. Two steps towards the robust one:
  diversity   heads of the last attention layer are trained to have orthogonal input gradients, so that not all of
              them look at the same easy feature
  selection   after training, only those heads are kept that do best on a few out-of-distribution (OOD) images

    python vit_diverse.py                                   # tiny-mnist-cifar, CPU, under three minutes
    python vit_diverse.py --dataset mnist-cifar --seeds 0 1 2 3 4 5 6 7 8 9

What the paper leaves open is called "our choice" in --help and explained in the README.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import operator
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import common

# What depends on the data set: `mnist-cifar` as published, the others our choice.
VARYING = ("model", "depth", "dim_head", "batch_size", "epochs", "lr", "div_lr", "lambda", "normalize")
DEFAULTS = {
    "tiny-mnist-cifar": ("scratch", 4, 16, 80, 20, 1e-3, 1e-3, 100_000, "none"),
    "mnist-cifar": ("scratch", 6, 64, 80, 100, 1e-4, 1e-3, 100, "token"),
    "tiny-waterbirds": ("tiny", 4, 16, 80, 5, 1e-4, 1e-4, 1, "token"),
    "waterbirds": ("vit_b_16", 6, 64, 64, 10, 1e-5, 1e-5, 1, "token"),
}
BUDGETS, DRAWS = (8, 16, 32, 64), 50  # labelled OOD images to choose heads with, random draws of so many


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = {name: [str(value) for value in row] for name, row in DEFAULTS.items()}
    parser.epilog = common.format_table("defaults", [f"--{name.replace('_', '-')}" for name in VARYING], rows)
    data = parser.add_argument_group("data").add_argument
    data("--dataset", default="tiny-mnist-cifar", help=f"{', '.join(DEFAULTS)} (default: tiny-mnist-cifar)")
    data("--data-root", default="data", help="folder that holds the real data sets (default: data)")
    data("--download", action="store_true", help="mnist-cifar: fetch MNIST and CIFAR-10 into the data root if missing")
    data("--cue", type=float, default=0.95, help="tiny-waterbirds: share of birds in their place (default: 0.95)")
    model = parser.add_argument_group("model (--depth and what follows: only for scratch)").add_argument
    model("--model", help="scratch, vit_b_16 (torchvision's), or a CLIP image tower: tiny, or an open_clip name")
    model("--pretrained", help="weights: a file, or a tag (default: ImageNet's for vit_b_16, openai for CLIP)")
    model("--depth", type=int, help="layers (default: see below)")
    model("--dim", type=int, default=64, help="width of a token (default: 64, published)")
    model("--heads", type=int, default=4, help="heads of a layer (default: 4, published)")
    model("--dim-head", type=int, help="width of a head (default: see below)")
    model("--mlp-dim", type=int, default=128, help="hidden width of the MLPs (default: 128, published)")
    method = parser.add_argument_group("diversity and selection").add_argument
    method("--lambda", type=float, help="weight of L_IG in DIV (default: see below)")
    method("--normalize", choices=("token", "none"), help="token: unit gradients at every token (default: see below)")
    method("--reduce", choices=("mean", "sum"), default="mean", help="pairs of heads: sum / H^2 or sum (default: mean)")
    method("--select-by", choices=("accuracy", "worst-group"), default="accuracy", help="of OOD validation images")
    method("--protocol", choices=("one-model", "published"), default="one-model",
           help="published: also the +SEL rows as the paper selected them, ID and OOD by different models")  # fmt: skip
    training = parser.add_argument_group("training").add_argument
    training("--batch-size", type=int, help="images in a step (default: see below)")
    training("--epochs", type=int, help="passes over the training images (default: see below)")
    training("--lr", type=float, help="learning rate of ERM; a tenth after 70 %% and again after 80 %% of the epochs")
    training("--div-lr", type=float, help="learning rate of DIV, with the same schedule")
    study = parser.add_argument_group("studies").add_argument
    study("--study", choices=("budget", "lambda"), help="choose heads on few OOD images, or sweep lambda in DIV")
    study("--lambdas", type=float, nargs="+", help="default: 0, and 1/100, 1/10, 1 and 10 times --lambda")
    study("--figures", action="store_true", help="draw what single heads see, how they agree, and the study's curves")
    args = common.run_flags(parser, "<dataset>-seed<seed>").parse_args()

    if args.dataset not in DEFAULTS:
        hint = common.did_you_mean(args.dataset, DEFAULTS)
        raise common.InputError(f"unknown data set {args.dataset!r}{hint} Choose from {', '.join(DEFAULTS)}.")
    for name, value in zip(VARYING, DEFAULTS[args.dataset]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("batch_size", "epochs", "depth", "dim", "heads", "dim_head", "mlp_dim"):
        if getattr(args, name) < 1:
            raise common.InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    weight = vars(args)["lambda"]
    args.lambdas = args.lambdas or [0, *(weight * 10**power for power in (-2, -1, 0, 1))]
    if min(weight, *args.lambdas) < 0:
        raise common.InputError(f"lambda must be 0 or more, got {min(weight, *args.lambdas)}")
    return common.settle(args)


# ---------- The network: a vision transformer whose last layer can be asked what each head saw and said 
class PatchEmbedding(nn.Module):
    """Images (B, C, h, w) -> tokens (B, 1 + patches, dim): a class token and the patches, with learned positions."""

    def __init__(self, image_size: tuple[int, int], patch_size: int, dim: int, channels: int):
        super().__init__()
        if image_size[0] % patch_size or image_size[1] % patch_size:
            raise ValueError(f"image sides {image_size} must be multiples of the patch size {patch_size}")
        self.project = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 1 + math.prod(image_size) // patch_size**2, dim))

    def forward(self, images):
        patches = self.project(images).flatten(2).mT  # (B, patches, dim)
        return torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1) + self.positions


def mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Block(nn.Module):
    """A plain pre-norm transformer layer."""

    def __init__(self, dim: int, heads: int, dim_head: int, mlp_dim: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.out = nn.Linear(heads * dim_head, dim)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), mlp(dim, mlp_dim)

    def forward(self, x):
        B, N, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class LastBlock(nn.Module):
    """The last layer: no residual path around its attention, so all that the classifier reads came through some head.

        x = concat_i(m_i H / sum(m) head_i) W_o,  output = x + mlp(norm(x))

    Only its class token is read, so attention is computed for that one query: with q = W_q x_cls, its score for token n
    is q . (W_k x_n) = (W_k^T q) . x_n, and head = sum_n a_n W_v x_n = W_v (sum_n a_n x_n). The same numbers as full
    attention for a fraction of its cost, in plain products that can be differentiated twice (fused kernels cannot).
    """

    def __init__(self, heads: int, norm, qkv: nn.Linear, out: nn.Linear, mlp_norm, mlp):
        super().__init__()
        self.heads = heads  # qkv: (D) -> (3 H d), queries, keys and values, each of them head by head
        self.norm, self.qkv, self.out, self.mlp_norm, self.mlp = norm, qkv, out, mlp_norm, mlp

    def head_inputs(self, tokens):
        """(B, N, D) -> (H, B, N, D): what the heads read, a copy for each, so that each has a gradient of its own."""
        x = self.norm(tokens)
        return x.expand(self.heads, *x.shape)

    def head_outputs(self, inputs):
        """(H, B, N, D) -> (B, H, d): what each head says to the class token."""
        w_q, w_k, w_v = self.qkv.weight.view(3, self.heads, -1, inputs.shape[-1])  # each (H, d, D)
        b_q, _, b_v = (0, 0, 0) if self.qkv.bias is None else self.qkv.bias.view(3, self.heads, 1, -1)
        q = inputs[:, :, 0] @ w_q.mT + b_q  # (H, B, d); a bias of the keys adds the same to all scores: no effect
        scores = inputs @ (q @ w_k)[..., None] / w_q.shape[1] ** 0.5  # (H, B, N, 1)
        mixed = (scores.softmax(2) * inputs).sum(2)  # (H, B, D)
        return (mixed @ w_v.mT + b_v).transpose(0, 1)

    def output(self, heads, head_mask=None):
        """Head outputs (..., H, d), mask (..., H) or None -> class token (..., D)."""
        if head_mask is not None:
            kept = head_mask.sum(-1, keepdim=True)
            if (kept == 0).any():
                raise ValueError("head_mask keeps no head; at least one must be 1")
            heads = heads * (head_mask * (self.heads / kept)).unsqueeze(-1)
        x = self.out(heads.flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class DiverseViT(nn.Module):
    """The paper's network in three parts: `trunk` (all layers but the last), `last`, `classifier` of the class token.

    `forward` is composed of the three steps that training and selection need one by one:
    images -> head_inputs (H, B, N, D) -> head_outputs (B, H, d) -> logits (B, C).

    Args: image_size: side, or (height, width), in pixels; a ValueError says if the patch size does not divide it.
    """

    def __init__(self, image_size, patch_size, num_classes, dim, depth, heads, mlp_dim, channels=3, dim_head=64):
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        *layers, end = [Block(dim, heads, dim_head, mlp_dim) for _ in range(depth)]
        self.trunk = nn.Sequential(PatchEmbedding(size, patch_size, dim, channels), *layers)
        self.last = LastBlock(heads, end.norm, end.qkv, end.out, end.mlp_norm, end.mlp)
        self.classifier = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def head_inputs(self, images):
        return self.last.head_inputs(self.trunk(images))

    def head_outputs(self, inputs):
        return self.last.head_outputs(inputs)

    def logits(self, heads, head_mask=None):
        return self.classifier(self.last.output(heads, head_mask))

    def forward(self, images, head_mask=None):
        """Images (B, C, h, w) -> logits (B, classes). `head_mask`: (H,) or (B, H) of 0 and 1: the heads to keep.

        Raises: ValueError if a mask keeps no head.
        """
        return self.logits(self.head_outputs(self.head_inputs(images)), head_mask)


class PretrainedTrunk(nn.Module):
    """All layers but the last of torchvision's or open_clip's vision transformer: images -> tokens (B, N, D)."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, images):
        if isinstance(self.vit, torchvision.models.VisionTransformer):
            patches = self.vit.conv_proj(images).flatten(2).mT
            tokens = torch.cat([self.vit.class_token.expand(len(images), -1, -1), patches], 1)
            return self.vit.encoder.layers(tokens + self.vit.encoder.pos_embedding)
        return self.vit.transformer(self.vit._embeds(images))


def headwise(vit: nn.Module, num_classes: int) -> DiverseViT:
    """torchvision's or open_clip's vision transformer, its last layer changed as the paper does, with a new classifier.

    Raises: InputError for another kind of network.
    """
    vit = copy.deepcopy(vit).requires_grad_(True)
    if isinstance(vit, torchvision.models.VisionTransformer):
        *layers, end = vit.encoder.layers
        vit.encoder.layers, attention, end_norm = nn.Sequential(*layers), end.self_attention, vit.encoder.ln
        vit.encoder.ln, vit.heads = nn.Identity(), nn.Identity()
    elif isinstance(getattr(vit, "transformer", None), open_clip.transformer.Transformer) and vit.attn_pool is None:
        *layers, end = vit.transformer.resblocks
        vit.transformer.resblocks, attention, end_norm = nn.ModuleList(layers), end.attn, vit.ln_post
        vit.ln_post, vit.proj = nn.Identity(), None
    else:
        raise common.InputError(f"head selection needs a ViT with a class token, not a {type(vit).__name__}; "
                                "use scratch, vit_b_16, tiny, ViT-B-32, ViT-B-16 or ViT-L-14")  # fmt: skip
    qkv = nn.Linear(attention.embed_dim, 3 * attention.embed_dim)
    qkv.weight, qkv.bias = attention.in_proj_weight, attention.in_proj_bias
    model = DiverseViT(1, 1, num_classes, attention.embed_dim, 1, 1, 1)  # keeps only its new classifier
    model.trunk, model.classifier[0] = PretrainedTrunk(vit), end_norm
    model.last = LastBlock(attention.num_heads, end.ln_1, qkv, attention.out_proj, end.ln_2, end.mlp)
    return model


# ---------- Diversity: orthogonal input gradients --------------------------------------------------
def input_gradients(logits: torch.Tensor, per_head_inputs: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
    """G_i = d p* / d x through head i alone, for all heads in one call, p* being the top class score of an image.

    Args: logits (B, C), computed from per_head_inputs (H, B, N, D), of which head i reads copy i.
    Returns: (H, B, N, D).
    """
    return torch.autograd.grad(logits.max(1).values.sum(), per_head_inputs, create_graph=create_graph)[0]


def gradient_products(gradients: torch.Tensor) -> torch.Tensor:
    """c_{n,i,j} = <G_{i,n}, G_{j,n}> for i != j, and 0 for i = j: (H, B, N, D) -> (B, N, H, H)."""
    gradients = gradients.permute(1, 2, 0, 3)  # (B, N, H, D)
    return (gradients @ gradients.mT) * (1 - torch.eye(gradients.shape[2], device=gradients.device))


def input_gradient_loss(logits, per_head_inputs, normalize: str = "token", reduce: str = "mean") -> torch.Tensor:
    """The regulariser L_IG = 1/N sum_{i != j} sum_n c_{n,i,j}^2 (the poster's equation), averaged over the batch.

    Args:
        logits, per_head_inputs: (B, C) and (H, B, N, D), see `input_gradients`.
        normalize: "token", each G_{i,n} is scaled to length 1, so that c is a cosine (published code); or "none".
        reduce: "mean", divide by H^2 (published code; lambda = 100 assumes it); or "sum".
    Returns: a scalar >= 0 that can be differentiated; 0 if heads have orthogonal gradients at every token.
    Raises: ValueError for another `normalize` or `reduce`.
    """
    if normalize not in ("token", "none") or reduce not in ("mean", "sum"):
        raise ValueError(f"normalize is 'token' or 'none', reduce 'mean' or 'sum', got {normalize!r} and {reduce!r}")
    gradients = input_gradients(logits, per_head_inputs, create_graph=True)
    if normalize == "token":
        gradients = F.normalize(gradients, dim=-1)
    loss = gradient_products(gradients).square().sum((-1, -2)).mean()
    return loss / len(gradients) ** 2 if reduce == "mean" else loss


def head_cosine(model: DiverseViT, images: torch.Tensor) -> float:
    """Mean |cosine| between the input gradients of two different heads at a token: how alike heads see, in [0, 1]."""
    with torch.enable_grad():
        inputs = model.head_inputs(images)
        gradients = input_gradients(model.logits(model.head_outputs(inputs)), inputs)
    H = len(gradients)
    return gradient_products(F.normalize(gradients, dim=-1)).abs().sum((-1, -2)).mean().item() / max(1, H * (H - 1))


# ---------- Selection: all subsets of heads --------------------------------------------------------
def head_subsets(heads: int) -> torch.Tensor:
    """All 2^H - 1 non-empty subsets as masks (S, H) of 0 and 1; the larger ones first, so the first is all heads.

    Raises: InputError (a ValueError) for more than 16 heads, whose subsets cannot be searched one by one.
    """
    if not 1 <= heads <= 16:
        raise common.InputError(f"all subsets of heads can be searched for 1 to 16 heads, not for {heads} heads")
    masks = torch.tensor(list(itertools.product((1.0, 0.0), repeat=heads)))[:-1]
    return masks[masks.sum(1).argsort(descending=True, stable=True)]


@torch.no_grad()
def collect_heads(model: DiverseViT, images: common.ImageSet, args) -> torch.Tensor:
    """Head outputs of a whole set, (N, H, d): an image runs through the network once, a subset costs only `logits`."""
    with common.autocast(args.device, args.precision):
        encode = lambda x: model.head_outputs(model.head_inputs(x))  # noqa: E731
        return common.outputs(encode, images, args.device, workers=args.workers).float().to(args.device)


@torch.no_grad()
def subset_hits(model: DiverseViT, heads: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Which images are classified correctly with which heads: (N, H, d), (N,), (S, H) -> (S, N) bool, on the CPU."""
    chunks = masks.to(heads.device).split(max(1, 2**15 // len(heads)))  # of about 32,000 class tokens
    return torch.cat([model.logits(heads, chunk[:, None]).argmax(-1).cpu() == labels for chunk in chunks])


def subset_scores(hits: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """Accuracy of every subset, (S,), from hits (S, N); with groups (N,), its accuracy on its worst group."""
    if groups is None:
        return hits.double().mean(1)
    return torch.stack([hits[:, groups == group].double().mean(1) for group in groups.unique()]).min(0).values


def select_heads(model, heads, labels, groups=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The subset of heads that does best on labelled images (of equally good ones the larger), by exhaustive search.

    Args: heads (N, H, d) of `collect_heads`; labels (N,); groups (N,) to judge by the worst group, or None.
    Returns: its mask (H,), and the score of all subsets (2^H - 1,) in the order of `head_subsets`.
    """
    masks = head_subsets(heads.shape[1])
    scores = subset_scores(subset_hits(model, heads, labels, masks), groups)
    return masks[scores.argmax()], scores  # the first of equals


# ---------- Training and evaluation ----------------------------------------------------------------
def build(args):
    """The network before training, and the transforms of training images and of all others (None: pixels / 255)."""
    if args.model == "scratch":
        size = {"tiny-mnist-cifar": (32, 16), "mnist-cifar": (64, 32), "tiny-waterbirds": 32}.get(args.dataset)
        if size is None:
            raise common.InputError(f"--model scratch is for images of 64 x 32 pixels or less, not for {args.dataset}")
        model = DiverseViT(size, 4, 2, args.dim, args.depth, args.heads, args.mlp_dim, dim_head=args.dim_head)
        return model, None, None
    if args.model == "vit_b_16":
        vit = torchvision_vit(args.pretrained)
    else:
        vit = common.load_clip(args.model, args.pretrained)[0].visual
    real = not args.dataset.startswith("tiny-")  # real birds are cropped at random and mirrored
    return headwise(vit, num_classes=2), common.image_transform(vit, train=real), common.image_transform(vit)


def torchvision_vit(pretrained: str | None) -> nn.Module:
    """torchvision's ViT-B/16 with ImageNet weights, downloaded or from a file. Raises: InputError without them."""
    try:
        vit = torchvision.models.vit_b_16(weights=None if pretrained else "IMAGENET1K_V1")
        if pretrained:
            vit.load_state_dict(torch.load(pretrained, map_location="cpu", weights_only=True))
    except Exception as error:  # download, file and format can each fail in their own ways
        raise common.InputError(f"cannot load the weights of vit_b_16 ({pretrained or 'IMAGENET1K_V1'}): "
                                f"{str(error).splitlines()[0]}\n  Offline? Give torchvision's checkpoint file with "
                                "--pretrained FILE, or use --model scratch.") from error  # fmt: skip
    statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of ImageNet, as it was trained
    open_clip.set_model_preprocess_cfg(vit, {"size": 224, "interpolation": "bilinear", **statistics})
    return vit


def load_splits(args, seed: int, train_transform, transform) -> tuple[dict[str, common.ImageSet], dict]:
    """The sets of a run (train, val_id, test_id, val_ood, test_ood), and weights (N,) of ID images that need some.

    Waterbirds has one validation and one test set. As they are they are OOD: place and bird are independent. Weighted
    so that each group counts as much as it does in training, they measure ID accuracy.
    """
    root, tiny, weights = args.data_root, args.dataset.startswith("tiny-"), {}
    if args.dataset.endswith("mnist-cifar"):
        splits = common.load_tiny_mnist_cifar(seed) if tiny else common.load_mnist_cifar(root, seed, args.download)
    else:
        splits = common.load_tiny_waterbirds(seed, args.cue) if tiny else common.load_waterbirds(root)
        share = torch.bincount(splits["train"].groups, minlength=4) / len(splits["train"])
        for part in ("val", "test"):
            images = splits.pop(part)
            splits[f"{part}_id"], splits[f"{part}_ood"] = images, images
            weights[f"{part}_id"] = (share / torch.bincount(images.groups, minlength=4))[images.groups]
    for name, images in splits.items():
        splits[name] = replace(images, transform=train_transform if name == "train" else transform)
    return splits, weights


def train(model, splits, weight: float, lr: float, args, seed: int) -> list[dict]:
    """Minimise cross-entropy + weight * L_IG in place (Adam; lr / 10 after 70 % and again after 80 % of the epochs).

    Returns: a row for every epoch; with --protocol published it holds what every head alone would reach.
    """
    generator, history = torch.Generator().manual_seed(seed), []
    loader = DataLoader(splits["train"], args.batch_size, shuffle=True, generator=generator, collate_fn=common.as_is,
                        num_workers=args.workers)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(s * args.epochs) or 1 for s in (0.7, 0.8)], 0.1)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == "fp16")

    for epoch in tqdm(range(1, args.epochs + 1), desc=f"lambda {weight:g}", disable=None):
        model.train()
        for images, labels in loader:
            images, labels = images.to(args.device, non_blocking=True), labels.to(args.device, non_blocking=True)
            with common.autocast(args.device, args.precision):
                inputs = model.head_inputs(images)  # (H, B, N, D)
                logits = model.logits(model.head_outputs(inputs)).float()  # (B, C)
            loss_erm, loss_ig = F.cross_entropy(logits, labels), torch.zeros((), device=args.device)
            if weight:
                loss_ig = input_gradient_loss(logits, inputs, args.normalize, args.reduce)
            optimizer.zero_grad()
            scaler.scale(loss_erm + weight * loss_ig).backward()
            scaler.step(optimizer)
            scaler.update()
        schedule.step()
        model.eval()
        history.append({"epoch": epoch, "loss_erm": loss_erm.item(), "loss_ig": loss_ig.item()})
        if args.protocol == "published":
            alone, tests = torch.eye(model.last.heads), {name: part for name, part in splits.items() if name != "train"}
            hits = {k: subset_hits(model, collect_heads(model, s, args), s.labels, alone) for k, s in tests.items()}
            history[-1]["single_heads"] = {name: subset_scores(hit).tolist() for name, hit in hits.items()}
    return history


def evaluate(model, splits, weights, args, seed: int) -> dict:
    """All heads against the heads chosen on val_ood, and what each head sees; all numbers of a row belong to one model.

    Returns: "all" and "selected", test accuracies {"id", "ood", "worst_group"} with the numbers of the "heads" in use;
    "robust" and "spurious", how often each head alone agrees with the label and with the other attribute on test_ood;
    "correlation" (H, H) of the heads' logit margins there; "budget", {n: OOD test accuracies of DRAWS choices}.
    """
    validation, test, masks = splits["val_ood"], splits["test_ood"], head_subsets(model.last.heads)
    outputs = {part: collect_heads(model, splits[part], args) for part in ("val_ood", "test_id", "test_ood")}

    def row(mask):
        hits = {p: subset_hits(model, outputs[p], splits[p].labels, mask[None]) for p in ("test_id", "test_ood")}
        numbers = {"id": float(np.average(hits["test_id"][0], weights=weights.get("test_id")))}
        numbers |= {"ood": subset_scores(hits["test_ood"]).item()}
        numbers |= {"worst_group": subset_scores(hits["test_ood"], test.groups).item()}
        return numbers | {"heads": (mask.nonzero().flatten() + 1).tolist()}

    groups = validation.groups if args.select_by == "worst-group" else None
    chosen, _ = select_heads(model, outputs["val_ood"], validation.labels, groups)
    with torch.no_grad():
        alone = model.logits(outputs["test_ood"], torch.eye(model.last.heads, device=args.device)[:, None]).cpu()
    result = {
        "all": row(masks[0]),
        "selected": row(chosen),
        "robust": (alone.argmax(-1) == test.labels).double().mean(1).tolist(),
        "spurious": (alone.argmax(-1) == test.groups % 2).double().mean(1).tolist(),
        "correlation": torch.corrcoef(alone[..., 1] - alone[..., 0]).reshape(len(alone), -1).tolist(),
    }
    if args.study == "budget":
        hits = subset_hits(model, outputs["val_ood"], validation.labels, masks)
        reached = subset_scores(subset_hits(model, outputs["test_ood"], test.labels, masks))
        rng, result["budget"] = common.tiny_rng(seed, "budget"), {}
        for n in BUDGETS:
            draws = [rng.choice(len(validation), n, replace=False) for _ in range(DRAWS)]
            scores = [subset_scores(hits[:, draw], None if groups is None else groups[draw]) for draw in draws]
            result["budget"][str(n)] = [reached[score.argmax()].item() for score in scores]
    return result


def published_rule(history: list[dict]) -> dict[str, float]:
    """The +SEL row as the paper selected it: on each validation set the best (epoch, head), ID and OOD are two models.
    history: for every epoch {set: accuracies of the heads, (H,)} of the four sets that do not train."""
    row = {}
    for kind in ("id", "ood"):
        validation, test = (np.array([epoch[f"{part}_{kind}"] for epoch in history]) for part in ("val", "test"))
        row[kind] = float(test.flat[validation.argmax()])
    return row


# ---------- Runs, tables, figures ------------------------------------------------------------------
def run(args, seed: int) -> dict:
    """Train and evaluate all methods with one seed, write the run's folder. Returns {"seed", "methods": {name: {}}}."""
    methods = {"ERM": (0.0, args.lr), "DIV": (vars(args)["lambda"], args.div_lr)}
    if args.study == "lambda":
        methods = {f"lambda {weight:g}": (weight, args.div_lr) for weight in args.lambdas}
    path, results = args.output / "vit_diverse" / f"{common.slug(args.dataset)}-seed{seed}", {}
    with common.run_folder(path) as folder, (folder / "metrics.jsonl").open("w") as metrics:
        common.write_json(folder / "config.json", {**vars(args), "seed": seed})
        model, *transforms = build(args)
        head_subsets(model.last.heads)  # too many heads are refused before training
        splits, weights = load_splits(args, seed, *transforms)
        probe = splits["val_id"].__getitems__(range(min(64, len(splits["val_id"]))))[0].to(args.device)
        for name, (weight, lr) in methods.items():
            torch.manual_seed(seed)
            model, start = build(args)[0].to(args.device).eval(), time.time()
            before = head_cosine(model, probe)
            history = train(model, splits, weight, lr, args, seed)
            result = evaluate(model, splits, weights, args, seed)
            result["cosine"] = {"before": before, "after": head_cosine(model, probe)}
            if args.protocol == "published":
                result["published"] = published_rule([row["single_heads"] for row in history])
            results[name] = result | {"seconds": round(time.time() - start, 1)}
            metrics.writelines(json.dumps({"method": name, **row}) + "\n" for row in history)
            torch.save(model.state_dict(), folder / f"{common.slug(name)}.pt")
            plain, kept = (f"{common.percent([result[part]['ood']])} %" for part in ("all", "selected"))
            print(f"seed {seed}, {name}: OOD {plain}, {kept} with heads {result['selected']['heads']}", flush=True)
        common.write_json(folder / "result.json", {"seed": seed, "methods": results})
    print(f"stored in {path}/\n")
    return {"seed": seed, "methods": results}


def over_seeds(runs: list[dict], name: str, *keys) -> np.ndarray:
    """A number (or array) of one method, for every run: `over_seeds(runs, "DIV", "all", "ood")` is (runs,)."""
    return np.array([functools.reduce(operator.getitem, keys, run["methods"][name]) for run in runs])


def result_table(title: str, runs: list[dict]) -> str:
    """The paper's table, mean ± deviation over seeds. Every row is one model, but those of the published rule."""
    rows, parts = {}, {"": "all", "+SEL": "selected", "+SEL, published rule*": "published"}
    for (suffix, part), (name, method) in itertools.product(parts.items(), runs[0]["methods"].items()):
        if part in method:
            keys = [key for key in ("id", "ood", "worst_group") if key in method[part]]
            cells = [common.percent(over_seeds(runs, name, part, key)) for key in keys]
            kept = np.mean([len(run["methods"][name][part].get("heads", [1])) for run in runs])
            rows[name + suffix] = [*cells, *["-"] * (3 - len(cells)), f"{kept:.1f}"]
    table = common.format_table(f"{title}, accuracy, %", ["ID", "OOD", "worst group", "heads"], rows)
    note = "*best (epoch, head) on each validation set: ID and OOD are two models"
    return f"{table}\n{note}" if "*" in table else table


def heads_table(title: str, runs: list[dict]) -> str:
    """What single heads see, mean ± deviation over seeds."""
    rows = {}
    for name in runs[0]["methods"]:
        robust, spurious, correlation = (over_seeds(runs, name, key) for key in ("robust", "spurious", "correlation"))
        alike = np.abs(correlation[:, ~np.eye(robust.shape[1], dtype=bool)]).mean(1)
        cosines = (over_seeds(runs, name, "cosine", when) for when in ("before", "after"))
        rows[name] = [*map(common.percent, (robust.max(1), robust.mean(1), spurious.max(1), alike, *cosines))]
    columns = ["best robust", "mean robust", "most spurious", "|correlation|", "|cosine| before", "|cosine| after"]
    return common.format_table(f"{title}, single heads, %", columns, rows)


def budget_table(title: str, runs: list[dict]) -> str:
    """OOD accuracy with heads chosen on n labelled OOD images, mean ± deviation over seeds and draws."""
    rows = {}
    for name in runs[0]["methods"]:
        draws = [over_seeds(runs, name, "budget", str(n)).ravel() for n in BUDGETS]
        none, every = (over_seeds(runs, name, part, "ood") for part in ("all", "selected"))
        rows[f"{name}+SEL"] = [*map(common.percent, (none, *draws, every))]
    columns = ["no selection", *(f"n = {n}" for n in BUDGETS), "all of val_ood"]
    return common.format_table(f"{title}, OOD accuracy, %", columns, rows)


def plot_heads(title: str, runs: list[dict]):
    """Every head alone: does it follow the label or the other attribute? And how alike do heads of one model answer?"""
    methods = list(runs[0]["methods"])
    widths = [1.45] + [1] * len(methods)
    size = (3.1 * sum(widths), 3.9)
    figure, (heads, *maps) = plt.subplots(1, len(widths), figsize=size, layout="constrained", width_ratios=widths)
    for marker, (name, axes) in enumerate(zip(methods, maps)):
        spurious, robust = (100 * over_seeds(runs, name, key) for key in ("spurious", "robust"))  # (runs, H)
        heads.scatter(spurious, robust, s=36, alpha=0.75, marker="os^Dv"[marker % 5], edgecolor="white", label=name)
        H = robust.shape[1]
        box = (0.5, H + 0.5, H + 0.5, 0.5)  # heads are numbered from 1
        image = axes.imshow(runs[0]["methods"][name]["correlation"], "RdBu_r", vmin=-1, vmax=1, extent=box)
        axes.set(title=f"{name}, seed {runs[0]['seed']}", xlabel="head", xticks=range(1, H + 1), yticks=range(1, H + 1))
    heads.axhline(50, color="0.8", zorder=0)
    heads.axvline(50, color="0.8", zorder=0)
    heads.set(xlabel="agrees with the spurious attribute, %", ylabel="agrees with the label, %", title=title)
    heads.legend(title="single heads")
    figure.colorbar(image, ax=maps, label="correlation of logit margins", shrink=0.75)
    return figure


def plot_budget(title: str, runs: list[dict]):
    """OOD accuracy against the number of labelled OOD images that chose the heads; a band holds 80 % of the draws."""
    figure, axes = plt.subplots(figsize=(7.4, 3.8), layout="constrained")
    for color, name in zip(("C0", "C1"), runs[0]["methods"]):
        draws = np.array([100 * over_seeds(runs, name, "budget", str(n)).ravel() for n in BUDGETS])
        axes.plot(BUDGETS, draws.mean(1), "o-", color=color, label=f"{name}+SEL on n images")
        axes.fill_between(BUDGETS, *np.percentile(draws, (10, 90), axis=1), color=color, alpha=0.18)
        for part, style, label in (("all", ":", "all heads"), ("selected", "--", "SEL on all of val_ood")):
            level = 100 * over_seeds(runs, name, part, "ood").mean()
            axes.axhline(level, color=color, linestyle=style, label=f"{name}, {label}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(BUDGETS, BUDGETS)
    axes.set(xlabel="n labelled OOD images (bands: 80 % of seeds and draws)", ylabel="OOD accuracy, %", title=title)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_lambda(title: str, runs: list[dict]):
    """Accuracy, and likeness of heads, against the weight of the regulariser."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = list(runs[0]["methods"])
    curves = [(left, "ID", "all", "id"), (left, "OOD", "all", "ood"), (left, "OOD, chosen heads", "selected", "ood"),
              (right, "gradients of two heads", "cosine", "after")]  # fmt: skip
    for axes, label, *keys in curves:
        values = 100 * np.array([over_seeds(runs, name, *keys) for name in names])  # (lambdas, runs)
        axes.errorbar(range(len(names)), values.mean(1), values.std(1), fmt="o-", capsize=3, label=label)
    for axes, label in ((left, "accuracy, %"), (right, "mean |cosine| of input gradients, %")):
        axes.set_xticks(range(len(names)), [name.removeprefix("lambda ") for name in names])
        axes.set(xlabel="lambda", ylabel=label, title=title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def main():
    args = settings()
    print(f"data {args.dataset}, model {args.model}, device {args.device}, {args.precision}", flush=True)
    runs = [run(args, seed) for seed in args.seeds]
    title = f"{args.dataset}, {len(runs)} seed{'s' * (len(runs) > 1)}"
    tables = [result_table, heads_table] + [budget_table] * (args.study == "budget")
    plots = [plot_heads] + {"budget": [plot_budget], "lambda": [plot_lambda]}.get(args.study, [])
    print(*(table(title, runs) for table in tables), sep="\n\n")
    if args.figures:
        path = args.output / "vit_diverse" / f"{common.slug(args.dataset)}-figures"
        with common.run_folder(path) as folder:
            for plot in plots:
                plot(title, runs).savefig(folder / f"{plot.__name__.removeprefix('plot_')}.png", dpi=150)
        print(f"\nfigures in {path}/")
    if args.summary:
        common.write_json(args.summary, {"settings": vars(args), "runs": runs})


if __name__ == "__main__":
    common.command(main)
