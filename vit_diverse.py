"""Diverse attention heads: learn several ways to see, then choose (Nicolicioiu et al., 2023, arXiv
2308.16274).

Training images hold a robust feature and a spurious one that is easier to learn: a network leans on
the easy one, and fails where the two part. Two steps towards the robust one:

1. diversity (DIV): the heads of the last attention layer are trained to have orthogonal input
   gradients, L = L_ERM + lambda L_IG, so that not all of them look at the same easy feature
2. selection (+SEL): after training, only those heads are kept that do best on a few
   out-of-distribution (OOD) images

    python vit_diverse.py                                # tiny-mnist-cifar, on a CPU
    python vit_diverse.py --dataset mnist-cifar --download --seeds 0 1 2 3 4

What the paper leaves open is called "our choice" in --help and explained in results/README.md.
"""

from __future__ import annotations

import copy
import itertools
import re

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import common


# ---------- Diversity: orthogonal input gradients ------------------------------------------------
def input_gradients(logits, per_head_inputs, create_graph: bool = False) -> torch.Tensor:
    """How the top class score changes with what each head reads, for all heads in one call.

        G_i = d p* / d x, through head i alone;    p* = max_c logits_c of an image

    Args: logits (B, C), computed from per_head_inputs (H, B, N, D), of which head i reads copy i.
    Returns: (H, B, N, D).
    """
    top = logits.max(1).values.sum()  # an image's score depends on no other image
    return torch.autograd.grad(top, per_head_inputs, create_graph=create_graph)[0]


def gradient_products(gradients: torch.Tensor) -> torch.Tensor:
    """c_{n,i,j} = <G_{i,n}, G_{j,n}> for i != j, and 0 for i = j: (H, B, N, D) -> (B, N, H, H)."""
    gradients = gradients.permute(1, 2, 0, 3)  # (B, N, H, D)
    others = 1 - torch.eye(gradients.shape[2], device=gradients.device)
    return (gradients @ gradients.mT) * others


def input_gradient_loss(logits, per_head_inputs, normalize: str = "token", reduce: str = "mean"):
    """The regulariser (the poster's equation), averaged over the batch.

        L_IG = 1/N sum_{i != j} sum_n c_{n,i,j}^2

    Args:
        logits, per_head_inputs: (B, C) and (H, B, N, D), see `input_gradients`.
        normalize: "token", each G_{i,n} is scaled to length 1, so that c is a cosine (published
            code); or "none".
        reduce: "mean", divide by H^2 (published code; lambda = 100 assumes it); or "sum".
    Returns: a differentiable scalar >= 0; 0 if heads have orthogonal gradients at every token.
    Raises: ValueError for another `normalize` or `reduce`.
    """
    if normalize not in ("token", "none") or reduce not in ("mean", "sum"):
        got = f"got {normalize!r} and {reduce!r}"
        raise ValueError(f"normalize is 'token' or 'none', reduce 'mean' or 'sum', {got}")
    gradients = input_gradients(logits, per_head_inputs, create_graph=True)  # (H, B, N, D)
    if normalize == "token":
        gradients = F.normalize(gradients, dim=-1)
    products = gradient_products(gradients)  # (B, N, H, H)
    loss = products.square().sum((-1, -2)).mean()
    return loss / len(gradients) ** 2 if reduce == "mean" else loss


def head_cosine(model: DiverseViT, images: torch.Tensor) -> float:
    """How alike heads see: mean |cosine| between the input gradients of two different heads at a
    token, in [0, 1]."""
    with torch.enable_grad():
        inputs = model.head_inputs(images)
        gradients = input_gradients(model.logits(model.head_outputs(inputs)), inputs)
    cosines = gradient_products(F.normalize(gradients, dim=-1)).abs()  # (B, N, H, H)
    H = len(gradients)
    pairs = max(1, H * (H - 1))
    return cosines.sum((-1, -2)).mean().item() / pairs


# ---------- Selection: all subsets of heads ------------------------------------------------------
def head_subsets(heads: int) -> torch.Tensor:
    """All 2^H - 1 non-empty subsets as masks (S, H) of 0 and 1; larger ones first, all heads at 0.

    Raises: InputError (a ValueError) for more than 16 heads, whose subsets are too many to search.
    """
    if not 1 <= heads <= 16:
        raise common.InputError(
            f"all subsets can be searched for 1 to 16 heads, not for {heads} heads"
        )
    *subsets, _ = itertools.product((1.0, 0.0), repeat=heads)  # the empty one comes last
    masks = torch.tensor(subsets)
    return masks[masks.sum(1).argsort(descending=True, stable=True)]


@torch.no_grad()
def collect_heads(model: DiverseViT, images: common.ImageSet, row) -> torch.Tensor:
    """Head outputs of a whole set, (N, H, d): an image runs through the network once, after that a
    subset of heads costs only `model.logits`."""

    def encode(x):
        return model.head_outputs(model.head_inputs(x))

    with common.autocast(row.device, row.precision):
        heads = common.outputs(encode, images, row.device, workers=row.workers)
    return heads.float().to(row.device)


@torch.no_grad()
def subset_hits(model: DiverseViT, heads, labels, masks) -> torch.Tensor:
    """Which images are classified correctly with which heads.

    Args: heads (N, H, d) of `collect_heads`; labels (N,); masks (S, H).
    Returns: (S, N) bool, on the CPU.
    """
    hits = []
    at_once = max(1, 2**15 // len(heads))  # to bound memory: about 32,000 class tokens
    for chunk in masks.to(heads.device).split(at_once):
        logits = model.logits(heads, chunk[:, None])  # (chunk, N, C)
        hits.append(logits.argmax(-1).cpu() == labels)
    return torch.cat(hits)


def subset_scores(hits: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """Accuracy of every subset, (S,), from hits (S, N); with groups (N,), on its worst group."""
    if groups is None:
        return hits.double().mean(1)
    by_group = [hits[:, groups == group].double().mean(1) for group in groups.unique()]
    return torch.stack(by_group).amin(0)


def select_heads(model, heads, labels, groups=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The subset of heads that does best on labelled images (of equally good ones the larger), by
    exhaustive search.

    Args: heads (N, H, d) of `collect_heads`; labels (N,); groups (N,): the worst one counts.
    Returns: its mask (H,), and the score of all subsets (2^H - 1,) in the order of `head_subsets`.
    """
    masks = head_subsets(heads.shape[1])
    scores = subset_scores(subset_hits(model, heads, labels, masks), groups)
    return masks[scores.argmax()], scores  # the first of equals


# ---------- The network: a ViT whose last layer tells what each head read and said ---------------
class PatchEmbedding(nn.Module):
    """Images (B, 3, h, w) -> a class token and the patches, with learned positions, (B, N, D)."""

    def __init__(self, image_size: tuple[int, int], patch_size: int, dim: int):
        super().__init__()
        height, width = image_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"sides {image_size} must be multiples of the patch size {patch_size}")
        patches = height * width // patch_size**2
        self.project = nn.Conv2d(3, dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 1 + patches, dim))

    def forward(self, images):
        patches = self.project(images).flatten(2).mT  # (B, patches, D)
        start = self.class_token.expand(len(images), -1, -1)
        return torch.cat([start, patches], 1) + self.positions


class Block(nn.Module):
    """A plain pre-norm transformer layer."""

    def __init__(self, dim: int, heads: int, dim_head: int, mlp_dim: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.out = nn.Linear(heads * dim_head, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x):
        B, N, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(B, N, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        heads = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, d)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class LastBlock(nn.Module):
    """The last layer: no residual path around its attention, so all that the classifier reads came
    through some head.

        x = concat_i(m_i H / sum(m) head_i) W_o,    output = x + mlp(norm(x))

    Only its class token is read, so attention is computed for that one query: with q = W_q x_cls,
    its score for token n is q . (W_k x_n) = (W_k^T q) . x_n, and head = sum_n a_n W_v x_n
    = W_v (sum_n a_n x_n). The same numbers as full attention for a fraction of its cost, in plain
    products that can be differentiated twice (fused kernels cannot).
    """

    def __init__(self, heads: int, norm, qkv: nn.Linear, out: nn.Linear, mlp_norm, mlp):
        super().__init__()
        self.heads = heads
        self.norm = norm
        self.qkv = qkv  # (D) -> (3 H d): queries, keys and values, each of them head by head
        self.out, self.mlp_norm, self.mlp = out, mlp_norm, mlp

    def head_inputs(self, tokens):
        """(B, N, D) -> (H, B, N, D): what the heads read, a copy for each, so that each has a
        gradient of its own."""
        x = self.norm(tokens)
        return x.expand(self.heads, *x.shape)

    def head_outputs(self, inputs):
        """(H, B, N, D) -> (B, H, d): what each head says to the class token."""
        w_q, w_k, w_v = self.qkv.weight.view(3, self.heads, -1, inputs.shape[-1])  # each (H, d, D)
        b_q = b_v = 0  # the keys' bias adds the same to all scores of a query: no effect
        if self.qkv.bias is not None:
            b_q, _, b_v = self.qkv.bias.view(3, self.heads, 1, -1)  # each (H, 1, d)
        q = inputs[:, :, 0] @ w_q.mT + b_q  # (H, B, d)
        scores = inputs @ (q @ w_k)[..., None] / w_q.shape[1] ** 0.5  # (H, B, N, 1)
        mixed = (scores.softmax(2) * inputs).sum(2)  # (H, B, D)
        return (mixed @ w_v.mT + b_v).transpose(0, 1)

    def output(self, heads, head_mask=None):
        """Head outputs (..., H, d), mask (..., H) or None -> class token (..., D)."""
        if head_mask is not None:
            in_use = head_mask.sum(-1, keepdim=True)
            if (in_use == 0).any():
                raise ValueError("head_mask keeps no head; at least one must be 1")
            heads = heads * (head_mask * (self.heads / in_use)).unsqueeze(-1)
        x = self.out(heads.flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class DiverseViT(nn.Module):
    """The paper's network in three parts: `trunk` (all layers but the last), `last`, `classifier`
    of the class token.

    `forward` is composed of the three steps that training and selection need one by one:
    images -> head_inputs (H, B, N, D) -> head_outputs (B, H, d) -> logits (B, C).

    Args: image_size: (height, width) in pixels.
    Raises: ValueError if the patch size does not divide the image's sides.
    """

    def __init__(
        self, image_size, patch_size, num_classes, dim, depth, heads, mlp_dim, dim_head=64
    ):
        super().__init__()
        *layers, end = [Block(dim, heads, dim_head, mlp_dim) for _ in range(depth)]
        self.trunk = nn.Sequential(PatchEmbedding(image_size, patch_size, dim), *layers)
        self.last = LastBlock(heads, end.norm, end.qkv, end.out, end.mlp_norm, end.mlp)
        self.classifier = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def head_inputs(self, images):
        return self.last.head_inputs(self.trunk(images))

    def head_outputs(self, inputs):
        return self.last.head_outputs(inputs)

    def logits(self, heads, head_mask=None):
        return self.classifier(self.last.output(heads, head_mask))

    def forward(self, images, head_mask=None):
        """(B, 3, h, w) -> (B, C); head_mask: (H,) or (B, H) of 0 and 1, the heads to keep.

        Raises: ValueError if a mask keeps no head.
        """
        return self.logits(self.head_outputs(self.head_inputs(images)), head_mask)


def headwise(vit: nn.Module, num_classes: int) -> DiverseViT:
    """torchvision's or open_clip's ViT, its last layer changed as the paper does, with a new
    classifier. Raises: InputError for another kind of network."""
    trunk, last_layer, end_norm = take_apart(vit)
    last = LastBlock(*last_layer)
    model = DiverseViT((1, 1), 1, num_classes, last.out.out_features, 1, 1, 1)  # its classifier
    model.trunk, model.last, model.classifier[0] = trunk, last, end_norm
    return model


# ---------- Pretrained ViTs ----------------------------------------------------------------------
class PretrainedTrunk(nn.Module):
    """All layers but the last of torchvision's or open_clip's ViT: images -> tokens (B, N, D)."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, images):
        if isinstance(self.vit, torchvision.models.VisionTransformer):
            patches = self.vit._process_input(images)
            start = self.vit.class_token.expand(len(images), -1, -1)
            return self.vit.encoder(torch.cat([start, patches], 1))
        return self.vit.transformer(self.vit._embeds(images))


def take_apart(vit: nn.Module) -> tuple:
    """A copy of a ViT in parts: all layers but the last, the arguments of `LastBlock`, the norm
    behind it. Raises: InputError for another kind of network."""
    vit = copy.deepcopy(vit).requires_grad_(True)
    transformer = getattr(vit, "transformer", None)
    if isinstance(vit, torchvision.models.VisionTransformer):
        *layers, end = vit.encoder.layers
        attention, end_norm = end.self_attention, vit.encoder.ln
        vit.encoder.layers = nn.Sequential(*layers)
        vit.encoder.ln, vit.heads = nn.Identity(), nn.Identity()
    elif isinstance(transformer, open_clip.transformer.Transformer) and vit.attn_pool is None:
        *layers, end = transformer.resblocks
        attention, end_norm = end.attn, vit.ln_post
        transformer.resblocks = nn.ModuleList(layers)
        vit.ln_post, vit.proj = nn.Identity(), None
    else:
        wrong = f"head selection needs a ViT with a class token, not a {type(vit).__name__}"
        raise common.InputError(f"{wrong}; use scratch, vit_b_16, tiny, ViT-B-32, ViT-B-16, ...")
    qkv = nn.Linear(attention.embed_dim, 3 * attention.embed_dim)
    qkv.weight, qkv.bias = attention.in_proj_weight, attention.in_proj_bias
    last = attention.num_heads, end.ln_1, qkv, attention.out_proj, end.ln_2, end.mlp
    return PretrainedTrunk(vit), last, end_norm


def torchvision_vit(pretrained: str | None) -> nn.Module:
    """torchvision's ViT-B/16 with ImageNet weights, downloaded or from a file.

    Raises: InputError if they cannot be had.
    """
    try:
        vit = torchvision.models.vit_b_16(weights=None if pretrained else "IMAGENET1K_V1")
        if pretrained:
            vit.load_state_dict(torch.load(pretrained, map_location="cpu", weights_only=True))
    except Exception as error:  # download, file and format can each fail in their own ways
        why = f"{pretrained or 'IMAGENET1K_V1'}: {str(error).splitlines()[0]}"
        hint = "Offline? Give torchvision's file with --pretrained FILE, or use --model tiny."
        raise common.InputError(f"cannot load vit_b_16's weights {why}\n  {hint}") from error
    statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of ImageNet
    open_clip.set_model_preprocess_cfg(vit, {"size": 224, "interpolation": "bilinear"} | statistics)
    return vit


IMAGE_SIZES = {"tiny-mnist-cifar": (32, 16), "mnist-cifar": (64, 32), "tiny-waterbirds": (32, 32)}


def build(row) -> tuple:
    """The network before training, transforms of training images and of all others."""
    if row.model == "scratch":
        if row.dataset not in IMAGE_SIZES:
            raise common.InputError(f"--model scratch is for small images, not for {row.dataset}")
        widths = row.dim, row.depth, row.heads, row.mlp_dim, row.dim_head
        return DiverseViT(IMAGE_SIZES[row.dataset], 4, 2, *widths), None, None
    if row.model == "vit_b_16":
        vit = torchvision_vit(row.pretrained)
    else:
        vit = common.load_clip(row.model, row.pretrained).visual
    real = not row.dataset.startswith("tiny-")  # real birds are cropped at random and mirrored
    augment = common.image_transform(vit, train=real)
    return headwise(vit, num_classes=2), augment, common.image_transform(vit)


# ---------- Training -----------------------------------------------------------------------------
def train(model: DiverseViT, sets: dict[str, common.ImageSet], row, seed: int) -> list[dict]:
    """Minimise L_ERM + lambda L_IG, in place. Adam; lr / 10 after 70 % of the epochs, again after
    80 % (published).

    Returns: for every epoch its last losses; with --protocol published also what every head alone
    reaches.
    """
    weight = getattr(row, "lambda")  # 0: ERM
    order = torch.Generator().manual_seed(seed)
    options = {"generator": order, "collate_fn": common.as_is, "num_workers": row.workers}
    loader = DataLoader(sets["train"], row.batch_size, shuffle=True, **options)
    optimizer = torch.optim.Adam(model.parameters(), row.lr)
    milestones = [int(part * row.epochs) or 1 for part in (0.7, 0.8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
    scaler = torch.amp.GradScaler(row.device.type, enabled=row.precision == "fp16")

    history = []
    for epoch in tqdm(range(1, row.epochs + 1), desc=f"lambda {weight:g}", disable=None):
        model.train()
        for images, labels in loader:
            images, labels = images.to(row.device), labels.to(row.device)
            with common.autocast(row.device, row.precision):
                inputs = model.head_inputs(images)  # (H, B, N, D)
                logits = model.logits(model.head_outputs(inputs)).float()  # (B, C)
            loss_erm = F.cross_entropy(logits, labels)
            loss_ig = torch.zeros((), device=row.device)
            if weight:
                loss_ig = input_gradient_loss(logits, inputs, row.normalize, row.reduce)
            optimizer.zero_grad()
            # L_IG holds gradients: its own gradient goes through the network a second time
            scaler.scale(loss_erm + weight * loss_ig).backward()
            scaler.step(optimizer)
            scaler.update()
        schedule.step()
        model.eval()
        losses = {"loss_erm": loss_erm.item(), "loss_ig": loss_ig.item()}  # of the last batch
        history.append({"epoch": epoch} | losses)
        if row.protocol == "published":
            history[-1]["single heads"] = single_head_accuracies(model, sets, row)
    return history


def load_sets(args, seed: int) -> tuple[dict[str, common.ImageSet], torch.Tensor | None]:
    """train, val_id, test_id, val_ood and test_ood; weights (N,) of test_id's images, or None.

    Waterbirds has one validation and one test set. As they are they are OOD: place and bird are
    independent. Weighted so that each group counts as much as it does in training, they are ID.
    """
    sets = common.load_parts(args.dataset, args.data_root, seed, args.cue, args.download)
    if args.dataset.endswith("mnist-cifar"):
        return sets, None
    share = torch.bincount(sets["train"].groups, minlength=4) / len(sets["train"])
    groups = sets["test"].groups
    weights = (share / torch.bincount(groups, minlength=4))[groups]
    for part in ("val", "test"):
        sets[f"{part}_id"] = sets[f"{part}_ood"] = sets.pop(part)
    return sets, weights


# ---------- Tests --------------------------------------------------------------------------------
@torch.no_grad()
def what_heads_see(model, heads: torch.Tensor, images: common.ImageSet) -> dict[str, list]:
    """How often each head alone agrees with the label ("robust") and with the other attribute
    ("spurious"); "correlation" (H, H) of the heads' logit margins."""
    alone = torch.eye(model.last.heads, device=heads.device)
    logits = model.logits(heads, alone[:, None]).cpu()  # (H, N, 2)
    answers = logits.argmax(-1)  # (H, N)
    spurious = images.groups % 2
    correlation = torch.corrcoef(logits[..., 1] - logits[..., 0])
    return {
        "robust": (answers == images.labels).double().mean(1).tolist(),
        "spurious": (answers == spurious).double().mean(1).tolist(),
        "correlation": correlation.reshape(len(alone), -1).tolist(),  # also of one head
    }


def budget_draws(model, heads: dict, sets: dict, groups, seed: int) -> dict[str, list]:
    """{n: OOD test accuracies, where n random labelled images of val_ood chose the heads}."""
    masks, scores = head_subsets(model.last.heads), {}
    hits = subset_hits(model, heads["val_ood"], sets["val_ood"].labels, masks)  # (S, N)
    reached = subset_hits(model, heads["test_ood"], sets["test_ood"].labels, masks)
    reached = subset_scores(reached)  # (S,)
    rng = common.tiny_rng(seed, "budget")
    for n in BUDGETS:
        scores[str(n)] = []
        for _ in range(DRAWS):
            some = rng.choice(hits.shape[1], n, replace=False)
            own = None if groups is None else groups[some]
            chosen = subset_scores(hits[:, some], own).argmax()
            scores[str(n)].append(reached[chosen].item())
    return scores


def single_head_accuracies(model, sets: dict, row) -> dict[str, list[float]]:
    """What every head alone reaches, (H,), on each set that does not train."""
    scores, alone = {}, torch.eye(model.last.heads)
    for name, images in sets.items():
        if name != "train":
            hits = subset_hits(model, collect_heads(model, images, row), images.labels, alone)
            scores[name] = subset_scores(hits).tolist()
    return scores


def published_rule(history: list[dict]) -> dict[str, float]:
    """The +SEL row as the paper selected it: on each validation set the best (epoch, head), so that
    ID and OOD are two models. history: of `train`."""
    best = {}
    for kind in ("id", "ood"):
        validation = np.array([epoch["single heads"][f"val_{kind}"] for epoch in history])
        test = np.array([epoch["single heads"][f"test_{kind}"] for epoch in history])
        best[f"published {kind}"] = float(test.flat[validation.argmax()])  # (epochs, H)
    return best


def evaluate_row(row, model, heads: dict, sets: dict, weights, seed: int) -> tuple[dict, dict]:
    """Test accuracies of a row, and which heads it uses, numbered from 1.

    Args: heads: {set: `collect_heads`}; weights: of test_id's images, see `load_sets`.
    """
    validation, test = sets["val_ood"], sets["test_ood"]
    groups = validation.groups if row.select_by == "worst-group" else None
    mask = torch.ones(model.last.heads)
    if row.selected:
        mask, _ = select_heads(model, heads["val_ood"], validation.labels, groups)
    id_hits = subset_hits(model, heads["test_id"], sets["test_id"].labels, mask[None])  # (1, N)
    ood_hits = subset_hits(model, heads["test_ood"], test.labels, mask[None])
    measures = {
        "id": float(np.average(id_hits[0], weights=weights)),
        "ood": subset_scores(ood_hits).item(),
        "worst group": subset_scores(ood_hits, test.groups).item(),
    }
    extra = {"heads": (mask.nonzero().flatten() + 1).tolist()}
    if row.selected and row.study == "budget":
        extra["budget"] = budget_draws(model, heads, sets, groups, seed)
    return measures, extra


def compare(args, run, seed: int) -> None:
    """Train and test every row of one seed."""
    sets, weights = load_sets(args, seed)
    for training, rows in trainings(args.rows).items():
        if rows.keys() <= run.rows.keys():
            continue
        *_, row = rows.values()
        torch.manual_seed(seed)
        model, augment, preprocess = build(row)
        head_subsets(model.last.heads)  # too many heads are refused before training
        model.to(row.device).eval()
        for name, images in sets.items():
            sets[name] = images.transformed(augment if name == "train" else preprocess)
        some = range(min(64, len(sets["val_id"])))
        images, _ = sets["val_id"].__getitems__(some)
        probe = images.to(row.device)

        before = head_cosine(model, probe)
        history = train(model, sets, row, seed)
        after = head_cosine(model, probe)
        file = f"{common.slug(training)}.pt"
        torch.save(model.state_dict(), run.folder / file)
        heads = {}
        for name in ("val_ood", "test_id", "test_ood"):
            heads[name] = collect_heads(model, sets[name], row)  # (N, H, d)
        learnt = what_heads_see(model, heads["test_ood"], sets["test_ood"])
        learnt |= {"cosine before": before, "cosine after": after, "history": history}
        run.extra[training] = learnt
        print(f"{training}: |cosine| of input gradients {before:.3f}, trained {after:.3f}")
        for name, row in rows.items():
            measures, extra = evaluate_row(row, model, heads, sets, weights, seed)
            if row.selected and row.protocol == "published":
                measures |= published_rule(history)
            run.extra.setdefault(name, {}).update(extra)
            run.add(name, measures)
    run.record["rows"] = {name: run.rows[name] for name in args.rows}  # the table's order


# ---------- What the paper compares --------------------------------------------------------------
ROWS = {
    "erm": {"diverse": False, "lambda": 0.0, "selected": False},
    "div": {"diverse": True, "selected": False},
    "erm+sel": {"diverse": False, "lambda": 0.0, "selected": True},
    "div+sel": {"diverse": True, "selected": True},
}
STUDIES = {"budget": list(ROWS), "lambda": []}  # lambda: `lambda_rows`, by the data set
BUDGETS, DRAWS = (8, 16, 32, 64), 50  # labelled OOD images that choose heads, random draws of them


def trainings(rows: dict) -> dict[str, dict]:
    """Rows that differ in selection alone share a training: {its name: {row: its settings}}."""
    groups = {}
    for name, row in rows.items():
        training = re.sub(r"\+sel|/select-by=[^/]*", "", name)
        groups.setdefault(training, {})[name] = row
    return groups


def lambda_rows(weight: float) -> list[str]:
    """Weights around the one that is used, without and with selection."""
    rows = []
    for factor in (0, 0.01, 0.1, 1, 10):
        own = f"lambda={factor * weight:.10g}"
        rows += [f"div/{own}", f"div+sel/{own}"]
    return rows


def budget_table(record: dict) -> dict[str, dict]:
    """OOD accuracy with heads that n labelled OOD images chose, averaged over the draws."""
    rows = {}
    for name in record["rows"]:
        if "budget" in record["extra"][name]:
            draws = record["extra"][name]["budget"]
            rows[name] = {f"n = {n}": np.mean(draws[n]) for n in draws}
            rows[name]["all of val_ood"] = record["rows"][name]["ood"]
    return rows


def draw_heads(run) -> None:
    """--figures: does a head alone follow the label or the other attribute, and how alike do the
    heads of a network answer? As pictures, and as numbers in analysis.npz."""
    points, numbers = {}, {}
    for name, seen in run.extra.items():
        if "robust" in seen:
            path = run.folder / f"correlation-{common.slug(name)}.png"
            common.plot_heat(seen["correlation"], name, "head", "head", path, center=0)
            points[name] = seen["spurious"], seen["robust"]
            for key in ("robust", "spurious", "correlation"):
                numbers[f"{name} {key}"] = seen[key]
    labels = "agrees with the spurious attribute", "agrees with the label"
    path = run.folder / "heads.png"
    common.plot_panels({"single heads": points}, *labels, path, style="points")
    np.savez(run.folder / "analysis.npz", **numbers)


def draw_study(args, records: list[dict]) -> None:
    """OOD accuracy over the budget, or accuracies and the likeness of heads over lambda."""
    path = args.summary.with_name(f"{args.summary.stem}-curves.png")
    if args.study == "budget":
        budgets = [{**record, "rows": budget_table(record)} for record in records]
        print("\n" + common.table("ood, %", budgets))
        curves = {}
        for name in budgets[0]["rows"]:
            ood = [common.seed_means(budgets, name, f"n = {n}") for n in BUDGETS]  # (n, seeds)
            curves[name] = BUDGETS, ood
        names = "labelled OOD images", "OOD accuracy"
        common.plot_panels({"chosen heads": curves}, *names, path, xscale="log")
    else:
        panels = {"div": {}, "div+sel": {}}
        for start, curves in panels.items():
            rows = [name for name in args.rows if name.startswith(f"{start}/")]
            weights = [getattr(args.rows[name], "lambda") for name in rows]
            for measure in ("id", "ood", "worst group"):
                values = [common.seed_means(records, name, measure) for name in rows]
                curves[measure] = weights, values  # (n,), (n, seeds)
        common.plot_panels(panels, "lambda", "accuracy", path, xscale="symlog")
    print(f"Curves are in {path}")


# ---------- Settings: name, kind, default, default with the tiny CLIP, help ----------------------
# What depends on the data set: `mnist-cifar` as published, the others our choice.
VARYING = "model depth dim_head batch_size epochs lr div_lr lambda normalize".split()
DEFAULTS = {
    "tiny-mnist-cifar": ("scratch", 4, 16, 80, 20, 1e-3, 1e-3, 100_000, "none"),
    "mnist-cifar": ("scratch", 6, 64, 80, 100, 1e-4, 1e-3, 100, "token"),
    "tiny-waterbirds": ("tiny", 4, 16, 80, 5, 1e-4, 1e-4, 1, "token"),
    "waterbirds": ("vit_b_16", 6, 64, 64, 10, 1e-5, 1e-5, 1, "token"),
}
count = common.at_least(1)
SETTINGS = [
    ("lambda", common.at_least(0, float), None, None, "weight of L_IG in DIV"),
    ("normalize", ("token", "none"), None, None, "token: unit gradients at every token"),
    ("reduce", ("mean", "sum"), "mean", "mean", "pairs of heads: sum / H^2 (published) or sum"),
    ("select-by", ("accuracy", "worst-group"), "accuracy", "accuracy", "of OOD validation images"),
    ("batch-size", count, None, None, "images in a step"),
    ("epochs", count, None, None, "passes over the training images"),
    ("lr", common.positive, None, None, "of ERM; / 10 after 70 % and after 80 % of the epochs"),
    ("div-lr", common.positive, None, None, "of DIV, which a row may call lr"),
]
NETWORK = [  # of --model scratch
    ("depth", count, None, None, "scratch: layers"),
    ("dim", count, 64, 64, "scratch: width of a token (published: 64)"),
    ("heads", count, 4, 4, "scratch: heads of a layer (published: 4)"),
    ("dim-head", count, None, None, "scratch: width of a head"),
    ("mlp-dim", count, 128, 128, "scratch: hidden width of the MLPs (published: 128)"),
]
PUBLISHED = "published: also the +sel rows as the paper chose them, ID and OOD by different models"
OF_ALL_ROWS = [
    *NETWORK,
    ("protocol", ("one-model", "published"), "one-model", "one-model", PUBLISHED),
    ("download", bool, False, False, "mnist-cifar: fetch MNIST and CIFAR-10 if missing"),
]
METHOD = common.Method("vit_diverse", SETTINGS, ROWS, STUDIES)


def settings():
    """The command's settings. Raises: InputError for one that would have no effect."""
    names = [f"--{name.replace('_', '-')}" for name in VARYING]
    table = {dataset: [*map(str, row)] for dataset, row in DEFAULTS.items()}
    doc = f"{__doc__}\n{common.format_table('defaults', names, table)}"
    args = common.flags(METHOD, doc, list(ROWS), list(DEFAULTS), OF_ALL_ROWS)
    if args.dataset not in DEFAULTS:
        hint = common.did_you_mean(args.dataset, DEFAULTS)
        choice = f"Choose from {', '.join(DEFAULTS)}."
        raise common.InputError(f"unknown data set {args.dataset!r}{hint} {choice}")
    preset = dict(zip(VARYING, DEFAULTS[args.dataset]), cue=0.95)
    model = args.model or preset["model"]
    idle = ["pretrained"] if model == "scratch" else [name for name, *_ in NETWORK]
    if args.dataset != "tiny-waterbirds":
        idle.append("cue")
    if args.dataset != "mnist-cifar":
        idle.append("download")
    for name in idle:
        if getattr(args, name.replace("-", "_")) is not None:
            raise common.InputError(f"--{name} has no effect with {args.dataset}, --model {model}")
    if args.study == "lambda":
        given = getattr(args, "lambda")
        args.modes = lambda_rows(preset["lambda"] if given is None else given)
    args = common.settle(args, preset)
    for name, row in args.rows.items():
        if "/div-lr=" in name and not row.diverse:
            raise common.InputError(f"--modes {name}: div-lr has no effect on ERM")
        if row.diverse and "/lr=" not in name:
            row.lr = row.div_lr
    return args


# ---------- main ---------------------------------------------------------------------------------
def main():
    args = settings()
    print(f"{args.dataset}, model {args.model}, device {args.device}, {args.precision}", flush=True)
    records = []
    for seed in args.seeds:
        with common.open_run(args, "", seed) as run:
            if not run.complete:
                compare(args, run, seed)
                if args.figures:
                    draw_heads(run)
        records.append(run.record)
    common.report(args, records, "ood")
    if args.protocol == "published":
        print("published: best (epoch, head) on each validation set, so ID and OOD are two models")
    if args.study:
        draw_study(args, records)


if __name__ == "__main__":
    common.command(main)
