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

import functools
import itertools
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import common
from common import runs, tables, vit


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
        normalize: "token", each G_{i,n} is scaled to length 1, so that c is a cosine (authors'
            code); or "none" (poster).
        reduce: "mean", divide by H^2 (authors' code; lambda = 100 assumes it); or "sum" (poster).
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
        logits = model.logits(model.head_outputs(inputs))
        gradients = input_gradients(logits, inputs)
    directions = F.normalize(gradients, dim=-1)
    cosines = gradient_products(directions).abs()  # (B, N, H, H)
    H = len(gradients)
    pairs = max(1, H * (H - 1))
    return cosines.sum((-1, -2)).mean().item() / pairs


# ---------- Selection: all subsets of heads ------------------------------------------------------
def head_subsets(heads: int) -> torch.Tensor:
    """All 2^H - 1 non-empty subsets as masks (S, H) of 0 and 1; larger ones first, all heads at 0.

    Raises: InputError (a ValueError) for more than 16 heads, whose subsets are too many to search.
    """
    if not 1 <= heads <= 16:
        raise common.InputError(f"subsets can be searched of 1 to 16 heads, not of {heads} heads")
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
    last, hits = model.last, []
    contributions = last.contributions(heads)  # (H, N, D), so that a subset costs a sum and the MLP
    chunk_size = max(1, 2**12 // len(heads))  # class tokens that stay in a cache
    for weights in last.weights(masks.to(heads.device)).split(chunk_size):
        x = (weights @ contributions.flatten(1)).view(-1, *contributions.shape[1:])  # (chunk, N, D)
        logits = model.classifier(last.end(x + last.out.bias))  # (chunk, N, C)
        hits.append(logits.argmax(-1).cpu() == labels)
    return torch.cat(hits)


def subset_scores(hits: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """Accuracy of every subset, (S,), from hits (S, N); with groups (N,), on its worst group."""
    if groups is None:
        return hits.double().mean(1)
    by_group = []
    for group in groups.unique():
        by_group.append(hits[:, groups == group].double().mean(1))
    return torch.stack(by_group).amin(0)


def select_heads(model, heads, labels, groups=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The subset of heads that does best on labelled images (of equally good ones the larger), by
    exhaustive search.

    Args: heads (N, H, d) of `collect_heads`; labels (N,); groups (N,): the worst one counts.
    Returns: its mask (H,), and the score of all subsets (2^H - 1,) in the order of `head_subsets`.
    """
    masks = head_subsets(heads.shape[1])
    hits = subset_hits(model, heads, labels, masks)
    scores = subset_scores(hits, groups)
    best = scores.argmax()  # the first of equals
    return masks[best], scores


# ---------- The network: a ViT whose last layer gives each head an input of its own --------------
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
        """(H, B, N, D) -> (B, H, d): what each head outputs at the class token."""
        w_q, w_k, w_v = self.qkv.weight.view(3, self.heads, -1, inputs.shape[-1])  # each (H, d, D)
        b_q = b_v = 0  # the keys' bias adds the same to all scores of a query: no effect
        if self.qkv.bias is not None:
            b_q, _, b_v = self.qkv.bias.view(3, self.heads, 1, -1)  # each (H, 1, d)
        q = inputs[:, :, 0] @ w_q.mT + b_q  # (H, B, d)
        projected = (q @ w_k)[..., None]  # W_k^T q, (H, B, D, 1)
        scores = inputs @ projected / w_q.shape[1] ** 0.5  # (H, B, N, 1)
        attended = (scores.softmax(2) * inputs).sum(2)  # (H, B, D)
        heads = attended @ w_v.mT + b_v  # (H, B, d)
        return heads.transpose(0, 1)

    def output(self, heads, head_mask=None):
        """Head outputs (..., H, d), mask (..., H) or None -> class token (..., D)."""
        if head_mask is not None:
            heads = heads * self.weights(head_mask).unsqueeze(-1)
        return self.end(self.out(heads.flatten(-2)))

    def weights(self, head_mask):
        """m H / sum(m): (..., H). Raises: ValueError if a mask keeps no head."""
        in_use = head_mask.sum(-1, keepdim=True)
        if (in_use == 0).any():
            raise ValueError("head_mask keeps no head; at least one must be 1")
        return head_mask * (self.heads / in_use)

    def contributions(self, heads):
        """Head outputs (N, H, d) -> what each adds to the class token, (H, N, D)."""
        W_o = self.out.weight.T.unflatten(0, (self.heads, -1))  # (H, d, D)
        return heads.transpose(0, 1) @ W_o

    def end(self, x):
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
        *layers, end = [vit.Block(dim, heads, dim_head, mlp_dim) for _ in range(depth)]
        self.trunk = nn.Sequential(vit.PatchEmbedding(image_size, patch_size, dim), *layers)
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


def headwise(network: nn.Module, num_classes: int) -> DiverseViT:
    """torchvision's or open_clip's ViT, its last layer changed as the paper does, with a new
    classifier. Raises: InputError for another kind of network."""
    trunk, last_layer, end_norm = vit.take_apart(network)
    last = LastBlock(*last_layer)
    model = DiverseViT((1, 1), 1, num_classes, last.out.out_features, 1, 1, 1)  # its classifier
    model.trunk = trunk
    model.last = last
    model.classifier[0] = end_norm
    return model


# ---------- The network of a row ------------------------------------------------------------------
IMAGE_SIZES = {"tiny-mnist-cifar": (32, 16), "mnist-cifar": (64, 32), "tiny-waterbirds": (32, 32)}


def build(row) -> tuple:
    """The network before training, transforms of training images and of all others."""
    if row.model == "scratch":
        if row.dataset not in IMAGE_SIZES:
            raise common.InputError(f"--model scratch is for small images, not for {row.dataset}")
        widths = row.dim, row.depth, row.heads, row.mlp_dim, row.dim_head
        return DiverseViT(IMAGE_SIZES[row.dataset], 4, 2, *widths), None, None
    if row.model == "vit_b_16":
        network = vit.torchvision_vit(row.pretrained)
    else:
        network = common.load_clip(row.model, row.pretrained).visual
    real = not row.dataset.startswith("tiny-")  # real birds are cropped at random and mirrored
    augment = common.image_transform(network, train=real)
    return headwise(network, num_classes=2), augment, common.image_transform(network)


# ---------- Training -----------------------------------------------------------------------------
def train(model: DiverseViT, sets: dict[str, common.ImageSet], row, seed: int) -> list[dict]:
    """Minimise L_ERM + lambda L_IG, in place. Adam; lr / 10 after 70 % of the epochs, again after
    80 % (published).

    Returns: for every epoch its last losses; with --protocol published also `epoch_accuracies`.
    Raises: InputError if the loss is not finite.
    """
    weight = getattr(row, "lambda")  # 0: ERM
    lr = row.div_lr if row.diverse else row.lr
    order = torch.Generator().manual_seed(seed)
    options = {"generator": order, "collate_fn": common.as_is, "num_workers": row.workers}
    options |= {"persistent_workers": row.workers > 0, "pin_memory": row.device.type == "cuda"}
    loader = DataLoader(sets["train"], row.batch_size, shuffle=True, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=row.device.type == "cuda")
    milestones = [int(part * row.epochs) or 1 for part in (0.7, 0.8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
    scaler = torch.amp.GradScaler(row.device.type, enabled=row.precision == "fp16")
    trunk = runs.compiled(model.trunk, row.compile)  # not the last layer, differentiated twice

    history = []
    for epoch in tqdm(range(1, row.epochs + 1), desc=f"lambda {weight:g}", disable=None):
        model.train()
        for images, labels in loader:
            images = images.to(row.device, non_blocking=True)  # (B, 3, h, w)
            labels = labels.to(row.device, non_blocking=True)
            loss_erm, loss_ig = losses(model, trunk, images, labels, row)
            optimizer.zero_grad()
            # L_IG holds gradients: its own gradient goes through the network a second time
            loss = loss_erm + weight * loss_ig
            scaler.scale(loss).backward()
            scaler.step(optimizer)  # optimizer.step(), which fp16 skips where a gradient overflows
            scaler.update()
        runs.check_finite(loss, f"lambda {weight:g}, epoch {epoch}", lr)
        schedule.step()
        model.eval()
        point = {"epoch": epoch, "loss_erm": loss_erm.item(), "loss_ig": loss_ig.item()}
        if row.protocol == "published":
            point |= epoch_accuracies(model, sets, row)
        history.append(point)
    return history


def losses(model: DiverseViT, trunk, images, labels, row) -> tuple:
    """L_ERM and L_IG of a batch (B, 3, h, w), scalars; L_IG is 0 where it has no weight. trunk:
    the model's, or the same as a graph."""
    with common.autocast(row.device, row.precision):
        inputs = model.last.head_inputs(trunk(images))  # (H, B, N, D)
        heads = model.head_outputs(inputs)  # (B, H, d)
        logits = model.logits(heads).float()  # (B, C)
    loss_erm = F.cross_entropy(logits, labels)
    if not getattr(row, "lambda"):
        return loss_erm, torch.zeros((), device=row.device)
    return loss_erm, input_gradient_loss(logits, inputs, row.normalize, row.reduce)


# ---------- Tests --------------------------------------------------------------------------------
@torch.no_grad()
def what_heads_see(model, heads: torch.Tensor, images: common.ImageSet) -> dict[str, list]:
    """How often each head alone agrees with the label ("robust") and with the other attribute
    ("spurious"); "correlation" (H, H) of the heads' logit margins."""
    alone = torch.eye(model.last.heads, device=heads.device)
    logits = model.logits(heads, alone[:, None]).cpu()  # (H, N, 2)
    answers = logits.argmax(-1)  # (H, N)
    robust = answers == images.labels
    spurious = answers == images.groups % 2
    margins = logits[..., 1] - logits[..., 0]
    correlation = torch.corrcoef(margins).reshape(len(alone), -1)  # also of one head
    return {
        "robust": robust.double().mean(1).tolist(),
        "spurious": spurious.double().mean(1).tolist(),
        "correlation": correlation.tolist(),
    }


def budget_draws(model, heads: dict, sets: dict, groups, seed: int) -> dict[str, list]:
    """{n: OOD test accuracies, where n random labelled images of val_ood chose the heads}."""
    masks = head_subsets(model.last.heads)
    hits = subset_hits(model, heads["val_ood"], sets["val_ood"].labels, masks)  # (S, N)
    test_hits = subset_hits(model, heads["test_ood"], sets["test_ood"].labels, masks)
    test_scores = subset_scores(test_hits)  # (S,)
    rng = common.tiny_world.tiny_rng(seed, "budget")
    draws = {}
    for n in BUDGETS:
        draws[str(n)] = []
        for _ in range(DRAWS):
            images = rng.choice(hits.shape[1], n, replace=False)
            groups_of_images = None if groups is None else groups[images]
            chosen = subset_scores(hits[:, images], groups_of_images).argmax()
            draws[str(n)].append(test_scores[chosen].item())
    return draws


def epoch_accuracies(model, sets: dict, row) -> dict[str, dict]:
    """What each head alone reaches on every set that does not train, (H,), and all heads, (1,)."""
    H = model.last.heads
    masks = torch.cat([torch.eye(H), torch.ones(1, H)])
    results = {"single heads": {}, "all heads": {}}
    for name, images in sets.items():
        if name == "train":
            continue
        hits = subset_hits(model, collect_heads(model, images, row), images.labels, masks)
        scores = subset_scores(hits).tolist()
        results["single heads"][name] = scores[:H]
        results["all heads"][name] = scores[H:]
    return results


def published_rule(history: list[dict], selected: bool) -> dict[str, float]:
    """A row as the paper selected it: on each validation set the best epoch, in a +SEL row the best
    (epoch, head), so that ID and OOD are two models. history: of `train`."""
    heads = "single heads" if selected else "all heads"
    best = {}
    for kind in ("id", "ood"):
        validation = np.array([epoch[heads][f"val_{kind}"] for epoch in history])  # (epochs, n)
        test = np.array([epoch[heads][f"test_{kind}"] for epoch in history])
        index = validation.argmax()
        best[f"published {kind}"] = float(test.flat[index])
    return best


def evaluate_row(row, model, heads: dict, sets: dict, weights, seed: int) -> tuple[dict, dict]:
    """Test accuracies of a row, and which heads it uses, numbered from 1.

    Args: heads: {set: `collect_heads`}; weights: of test_id's images, see `common.load_id_and_ood`.
    """
    validation, test = sets["val_ood"], sets["test_ood"]
    groups = validation.groups if row.select_by == "worst-group" else None
    mask = torch.ones(model.last.heads)
    if row.selected:
        mask, _ = select_heads(model, heads["val_ood"], validation.labels, groups)
    id_hits = subset_hits(model, heads["test_id"], sets["test_id"].labels, mask[None])  # (1, N)
    ood_hits = subset_hits(model, heads["test_ood"], test.labels, mask[None])
    worst = subset_scores(ood_hits, test.groups)
    metrics = {
        "id": float(np.average(id_hits[0], weights=weights)),
        "ood": subset_scores(ood_hits).item(),
        "worst group": worst.item(),
    }
    in_use = mask.nonzero().flatten() + 1
    extra = {"heads": in_use.tolist()}
    if row.selected and row.study == "budget":
        extra["budget"] = budget_draws(model, heads, sets, groups, seed)
    return metrics, extra


def compare(args, all_rows: dict, run, seed: int) -> None:
    """Train and test every row of one seed."""
    data = args.dataset, args.data_root, seed, args.cue, args.download
    sets, weights = common.load_id_and_ood(*data)
    for training, rows in trainings(all_rows).items():
        if rows.keys() <= run.rows.keys():
            continue
        *_, row = rows.values()  # they differ in selection alone
        model, history, heads = train_network(training, row, sets, run, seed)
        for name, row in rows.items():
            metrics, extra = evaluate_row(row, model, heads, sets, weights, seed)
            if row.protocol == "published":
                metrics |= published_rule(history, row.selected)
            run.add(name, metrics, extra)
    run.record["rows"] = {name: run.rows[name] for name in all_rows}  # the table's order


def train_network(name: str, row, sets: dict, run, seed: int) -> tuple:
    """One training: its network, losses, and head outputs {set: `collect_heads`}; it fills
    run.extra with what heads see and transforms the sets for the network."""
    torch.manual_seed(seed)
    model, augment, preprocess = build(row)
    head_subsets(model.last.heads)  # too many heads are refused before training
    model.to(row.device).eval()
    for part, images in sets.items():
        sets[part] = images.transformed(augment if part == "train" else preprocess)
    indices = range(min(64, len(sets["val_id"])))
    images, _ = sets["val_id"].__getitems__(indices)
    images = images.to(row.device)

    before = head_cosine(model, images)
    history = train(model, sets, row, seed)
    after = head_cosine(model, images)
    print(f"{name}: |cosine| of input gradients {before:.3f}, trained {after:.3f}")
    runs.write_tensors(run.folder / f"{common.slug(name)}.pt", model.state_dict())
    heads, collected = {}, {}
    for part in ("val_ood", "test_id", "test_ood"):
        key = id(sets[part].images)  # Waterbirds has one test set, see `common.load_id_and_ood`
        if key not in collected:
            collected[key] = collect_heads(model, sets[part], row)  # (N, H, d)
        heads[part] = collected[key]
    statistics = what_heads_see(model, heads["test_ood"], sets["test_ood"])
    statistics |= {"cosine before": before, "cosine after": after, "history": history}
    run.extra[name] = statistics
    return model, history, heads


# ---------- What the paper compares --------------------------------------------------------------
ROWS = {
    "erm": "--lambda 0",
    "div": "--diverse",
    "erm+sel": "--lambda 0 --selected",
    "div+sel": "--diverse --selected",
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
        setting = f"lambda={factor * weight:.10g}"
        rows += [f"div/{setting}", f"div+sel/{setting}"]
    return rows


def by_budget(record: dict) -> dict[str, dict]:
    """{row: {n: OOD accuracy with heads that n labelled OOD images chose, mean of the draws}}."""
    rows = {}
    for name, extra in record["extra"].items():
        if "budget" in extra:
            rows[name] = {n: float(np.mean(draws)) for n, draws in extra["budget"].items()}
    return rows


def plot_heads(run) -> None:
    """--figures: each head alone as a point, how often it follows the label and how often the other
    attribute; and how alike the heads of a network answer. The numbers are in result.json."""
    points = {}
    for name, extra in run.extra.items():
        if "robust" not in extra:
            continue
        points[name] = 100 * np.array(extra["spurious"]), 100 * np.array(extra["robust"])
        title, path = f"correlation of heads, {name}", run.folder / f"{common.slug(name)}-heads.png"
        tables.plot_heat(extra["correlation"], title, "head", "head", path, center=0)
    labels = "agrees with the spurious attribute, %", "agrees with the label, %"
    tables.plot_points({"single heads": points}, *labels, run.folder / "heads.png")


# ---------- The command line ---------------------------------------------------------------------
# What depends on the data set: `mnist-cifar` as published, the others our choice.
PRESET_FLAGS = "model depth dim_head batch_size epochs lr div_lr lambda normalize".split()
PRESETS = {
    "tiny-mnist-cifar": ("scratch", 4, 16, 80, 20, 1e-3, 1e-3, 100_000, "none"),
    "mnist-cifar": ("scratch", 6, 64, 80, 100, 1e-4, 1e-3, 100, "token"),
    "tiny-waterbirds": ("tiny", 4, 16, 80, 5, 1e-4, 1e-4, 1, "token"),
    "waterbirds": ("vit_b_16", 6, 64, 64, 10, 1e-5, 1e-5, 1, "token"),
}
DEFAULTS = {dataset: dict(zip(PRESET_FLAGS, values)) for dataset, values in PRESETS.items()}


def parsers() -> tuple:
    """The parser of the command line, and the parser of a row's settings."""
    method = runs.Parser(add_help=False)
    flag = functools.partial(runs.flag, method.add_argument_group("method and training"))
    whole, number, positive = runs.at_least(1), runs.at_least(0, float), runs.positive
    table = "(default: see above)"
    flag("lambda", number, None, f"weight of L_IG in DIV {table}")
    flag("normalize", ("token", "none"), None, f"cosines (authors' code); none: poster {table}")
    flag("reduce", ("mean", "sum"), "mean", "over pairs: sum / H^2 (authors' code) or sum")
    flag("select-by", ("accuracy", "worst-group"), "accuracy", "of OOD validation images")
    flag("batch-size", whole, None, f"images in a step {table}")
    flag("epochs", whole, None, f"passes over the training images {table}")
    flag("lr", positive, None, f"of ERM; / 10 after 70 % and after 80 % of the epochs {table}")
    flag("div-lr", positive, None, f"of DIV, likewise {table}")
    row = runs.Parser(parents=[method], add_help=False, allow_abbrev=False)
    row.add_argument("--diverse", action="store_true")
    row.add_argument("--selected", action="store_true")

    names = method, list(DEFAULTS), ROWS, list(ROWS), STUDIES
    doc = f"{__doc__}\n{tables.value_table('defaults', DEFAULTS)}"
    command = runs.command_parser("vit_diverse", doc, *names)
    flag = functools.partial(runs.flag, command.add_argument_group("of all rows"))
    flag("depth", whole, None, f"scratch: layers {table}")
    flag("dim", whole, 64, "scratch: width of a token (published: 64)")
    flag("heads", whole, 4, "scratch: heads of a layer (published: 4)")
    flag("dim-head", whole, None, f"scratch: width of a head {table}")
    flag("mlp-dim", whole, 128, "scratch: hidden width of the MLPs (published: 128)")
    text = "published: also all rows as the paper chose them, ID and OOD by different models"
    flag("protocol", ("one-model", "published"), "one-model", text)
    flag("download", bool, False, "mnist-cifar: fetch MNIST and CIFAR-10 if missing")
    flag("compile", bool, False, "compile the training pass of all layers but the last")
    return command, row


def preset(args) -> dict:
    """Defaults that depend on the data set."""
    return {**DEFAULTS[args.dataset], "cue": 0.95}


def settings(argv=None) -> tuple:
    """The command line, or argv, and {row: its settings}."""
    command, row_parser = parsers()
    args = runs.read_command(command, preset, STUDIES, argv)
    if args.study == "lambda":
        args.modes = lambda_rows(getattr(args, "lambda"))
    return args, {text: runs.read_row(row_parser, args, ROWS, text) for text in args.modes}


# ---------- main ---------------------------------------------------------------------------------
def main():
    args, rows = settings()
    print(f"{args.dataset}, model {args.model}, device {args.device}, {args.precision}", flush=True)
    records = []
    for seed in args.seeds:
        run = runs.Run(args, "", seed)
        if not run.finished:
            compare(args, rows, run, seed)
            if args.figures:
                plot_heads(run)
            run.finish()
        records.append(run.record)
    tables.report(args, records)
    if args.protocol == "published":
        print("published: the best epoch (and head) on each validation set, ID and OOD apart")
    if args.study == "budget":
        budgets = [{**record, "rows": by_budget(record)} for record in records]
        print("\n" + tables.table("ood, %, heads chosen on n images:", budgets))


if __name__ == "__main__":
    runs.command(main)
