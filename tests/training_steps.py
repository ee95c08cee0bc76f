"""A training step of every method, and of what it is compared with, on one tower and made-up data.

    make, compared_with = STEPS[name]
    step = make(tower, batch, options)      # step() is a step on this `Batch`

options are flags of the scripts: "--device cuda --precision bf16".
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import open_clip
import torch
import torch.nn.functional as F
from operations import Operations

import clipood
import common
import headpurify
import ldfs
import vit_diverse
from support import steps

SOURCES, SCALE = 4, 100.0  # domains of a batch; 1 / tau


@dataclass
class Batch:
    images: torch.Tensor  # (B, 3, h, w)
    labels: torch.Tensor  # (B,)
    class_features: torch.Tensor  # (C, D), unit-norm


def make_batch(tower, size: int, classes: int = 65, device="cpu") -> Batch:
    side = tower.image_size if isinstance(tower.image_size, int) else tower.image_size[0]
    images = torch.randn(size, 3, side, side, device=device)
    labels = torch.randint(classes, (size,), device=device)
    text = torch.randn(classes, tower.output_dim, device=device)
    return Batch(images, labels, F.normalize(text, dim=-1))


def row_of(script, options: str):
    """The last row of a command: the settings that it trains with."""
    *_, row = script.settings(f"--model ViT-B-16 {options}".split()).rows.values()
    return row


def as_one_operation(optimizer) -> None:
    """As on a GPU, also on a CPU."""
    for group in optimizer.param_groups:
        group["fused"] = True


def watched(optimizer, scaler=None) -> common.Steps:
    """As on a GPU: numbers are looked at every so many steps, also on a CPU."""
    as_one_operation(optimizer)
    own = common.Steps(optimizer, scaler=scaler)
    own.every = steps.EVERY
    return own


def scaler_of(row):
    return torch.amp.GradScaler(row.device.type, enabled=row.precision == "fp16")


# ---------- The methods --------------------------------------------------------------------------
def purification(tower, batch: Batch, options: str, mode="ha-lora+dig"):
    row = row_of(headpurify, f"--modes {mode} {options}")
    visual = copy.deepcopy(tower).train()
    _, weights, gates = headpurify.make_trainable(visual, row)
    optimizer, scaler = headpurify.make_optimizer(row, weights, gates), scaler_of(row)
    own = watched(optimizer, scaler)
    model = common.compiled(visual, row)
    data = batch.images, batch.labels, SOURCES, batch.class_features, SCALE, row

    def step():
        both = headpurify.losses(model, *data, {*gates})
        optimizer.zero_grad()
        scaled = [scaler.scale(loss) for loss in both]
        headpurify.route_gradients(*scaled, weights + gates, gates, row.alpha)
        own.take(both[0] + row.alpha * both[1], "a step")

    return step


def full_fine_tuning(tower, batch: Batch, options: str):
    return purification(tower, batch, options, "full")


def margin_and_average(tower, batch: Batch, options: str):
    row = row_of(clipood, f"--modes mms+bma {options}")
    clip = SimpleNamespace(visual=tower, device=row.device, precision=row.precision)
    clip.logit_scale = SCALE
    parts = clipood.training_parts(clip, None, {"mms+bma": row}, batch.class_features, 5000)
    model, optimizer, _, scaler, average = parts.values()
    own = watched(optimizer, scaler)
    replica = common.compiled(model, row)

    def step():
        loss = clipood.loss_of(replica, batch.images, batch.labels, row, clip, batch.class_features)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        own.take(loss, "a step")
        average.step = 0  # a benchmark may take more steps than a training
        average.update(model)

    return step


def diversity(tower, batch: Batch, options: str, mode="div"):
    row = row_of(vit_diverse, f"--dataset waterbirds --modes {mode} {options}")
    model = vit_diverse.headwise(tower, num_classes=2).to(row.device).train()
    optimizer, scaler = torch.optim.Adam(model.parameters(), row.lr), scaler_of(row)
    own = watched(optimizer, scaler)
    trunk = common.compiled(model.trunk, row)

    def step():
        data = batch.images, batch.labels % 2, row
        loss_erm, loss_ig = vit_diverse.losses(model, trunk, *data)
        optimizer.zero_grad()
        loss = loss_erm + getattr(row, "lambda") * loss_ig
        scaler.scale(loss).backward()
        own.take(loss, "a step")

    return step


def plain_training(tower, batch: Batch, options: str):
    return diversity(tower, batch, options, "erm")


def mapping(tower, batch: Batch, options: str):
    """Of features, in float32: the tower is not asked."""
    row = row_of(ldfs, f"--modes ldfs {options.replace('--compile', '')}")
    text = batch.class_features
    features = F.normalize(torch.randn_like(text[batch.labels]), dim=-1)  # (B, D)
    data = features, batch.labels, text[batch.labels], text[batch.labels - 1]
    mapper = ldfs.Mapper(text.shape[1], row.hidden).to(row.device)
    own = watched(torch.optim.AdamW(mapper.parameters(), row.mapper_lr))

    def step():
        loss = ldfs.mapper_loss(row, mapper, data, text, SCALE, row.sigma)
        own.optimizer.zero_grad()
        loss.backward()
        own.take(loss, "a step")

    return step


# ---------- CLIPood as published -----------------------------------------------------------------
def published_loop(tower, batch: Batch, options: str, half=torch.float16):
    """Weights are half precision in a pass and float32 in an optimizer step, cast before and after;
    the average is a loop over the weights, in half precision too."""
    row = row_of(clipood, f"--modes mms {options.replace('--compile', '')}")
    model = in_half(copy.deepcopy(tower).requires_grad_(True), half)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), row.lr, weight_decay=row.weight_decay)
    as_one_operation(optimizer)
    text = batch.class_features.to(half)
    distances = 1 - text @ text.T  # (C, C)

    def step():
        features = model(batch.images.to(half))
        features = features / features.norm(dim=-1, keepdim=True)
        similarities = features @ text.T + row.margin * distances[batch.labels]  # (B, C)
        loss = F.cross_entropy(SCALE * similarities, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
            parameter.grad.data = parameter.grad.data.float()
        optimizer.step()
        open_clip.model.convert_weights_to_lp(model, half)
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters()):
                mean.mul_(0.9).add_(parameter, alpha=0.1)

    return step


def in_half(tower, half):
    """OpenAI's mixture: products in half precision, norms in float32."""
    for module in tower.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.__class__ = open_clip.transformer.LayerNormFp32
    open_clip.model.convert_weights_to_lp(tower, half)
    return tower


# {name: (its step, whose time it is compared with)}
STEPS = {
    "full": (full_fine_tuning, "full"),
    "headpurify": (purification, "full"),
    "clipood": (margin_and_average, "full"),
    "clipood, published loop": (published_loop, "full"),
    "vit_diverse, erm": (plain_training, "full"),
    "vit_diverse": (diversity, "vit_diverse, erm"),
    "ldfs, features": (mapping, "full"),
}


# ---------- Operations ---------------------------------------------------------------------------
def narrow_tower(layers: int = 12):
    """As many layers and heads as ViT-B/16, on which the number of operations depends; not its
    widths."""
    torch.manual_seed(0)
    sizes = {"width": 48, "layers": layers, "heads": 12, "mlp_ratio": 4, "output_dim": 32}
    return open_clip.transformer.VisionTransformer(image_size=32, patch_size=16, **sizes)


def operations(name: str) -> Operations:
    """Of one training step under bf16 autocast, as on a GPU."""
    tower = narrow_tower()
    make, _ = STEPS[name]
    step = make(tower, make_batch(tower, 2 * SOURCES), "--device cpu --precision bf16")
    step()  # the first fills the optimizer
    with Operations() as found:
        step()
    return found
