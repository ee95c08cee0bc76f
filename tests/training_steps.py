"""A training step of every method, and of what it is compared with, on one tower and made-up data.

    make, compared_with = STEPS[name]
    step = make(tower, batch, options)      # step() is a step on this `Batch`

options are flags of the scripts: "--device cuda --precision bf16".
"""

from __future__ import annotations

import copy
import functools
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
from support import runs

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
    """The settings of a command's last row."""
    _, rows = script.settings(f"--model ViT-B-16 {options}".split())
    *_, row = rows.values()
    return row


def fused(optimizer):
    """As on a GPU, also on a CPU: one operation updates all weights."""
    for group in optimizer.param_groups:
        group["fused"] = True
    return optimizer


def scaler_of(row):
    return torch.amp.GradScaler(row.device.type, enabled=row.precision == "fp16")


# ---------- The methods --------------------------------------------------------------------------
def purification(tower, batch: Batch, options: str, mode="ha-lora+dig"):
    row = row_of(headpurify, f"--modes {mode} {options}")
    visual = copy.deepcopy(tower).train()
    _, weights, gates = headpurify.make_trainable(visual, row)
    optimizer = fused(headpurify.make_optimizer(row, weights, gates))
    scaler = scaler_of(row)
    model = runs.compiled(visual, row.compile)
    data = batch.images, batch.labels, batch.class_features, SCALE, SOURCES
    mmd_at = row.mmd_at if gates else None

    def step():
        with common.autocast(row.device, row.precision):
            loss_cls, loss_mmd = headpurify.losses(model, *data, mmd_at, row.bandwidths)
        optimizer.zero_grad()
        scaled = scaler.scale(loss_cls), scaler.scale(loss_mmd)
        headpurify.route_gradients(*scaled, weights + gates, gates, row.alpha)
        scaler.step(optimizer)
        scaler.update()

    return step


def margin_and_average(tower, batch: Batch, options: str):
    row = row_of(clipood, f"--modes mms+bma {options}")
    clip = SimpleNamespace(visual=tower, device=row.device, precision=row.precision)
    parts, _ = clipood.training_parts(clip, None, {"mms+bma": row}, batch.class_features)
    model, optimizer, _, scaler, average = parts.values()
    fused(optimizer)
    replica = runs.compiled(model, row.compile)

    def step():
        with common.autocast(row.device, row.precision):
            output = replica(batch.images)
        loss = clipood.loss_of(row, output, batch.labels, batch.class_features, SCALE)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        average.step = 0  # a benchmark may take more steps than a training
        average.update(model)

    return step


def diversity(tower, batch: Batch, options: str, mode="div"):
    row = row_of(vit_diverse, f"--dataset waterbirds --modes {mode} {options}")
    model = vit_diverse.headwise(tower, num_classes=2).to(row.device).train()
    optimizer = fused(torch.optim.Adam(model.parameters(), row.lr))
    scaler = scaler_of(row)
    trunk = runs.compiled(model.trunk, row.compile)
    labels = batch.labels % 2

    def step():
        loss_erm, loss_ig = vit_diverse.losses(model, trunk, batch.images, labels, row)
        optimizer.zero_grad()
        loss = loss_erm + getattr(row, "lambda") * loss_ig
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def mapping(tower, batch: Batch, options: str):
    """Of features, in float32: the tower is not asked."""
    row = row_of(ldfs, f"--modes ldfs {options}")
    text = batch.class_features
    features = F.normalize(torch.randn_like(text[batch.labels]), dim=-1)  # (B, D)
    data = features, batch.labels, text[batch.labels], text[batch.labels - 1]
    mapper = ldfs.Mapper(text.shape[1], row.hidden).to(row.device)
    optimizer = fused(torch.optim.AdamW(mapper.parameters(), row.mapper_lr))

    def step():
        loss = ldfs.mapper_loss(row, mapper, data, text, SCALE, row.sigma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# {name: (its step, whose time it is compared with)}
STEPS = {
    "full": (functools.partial(purification, mode="full"), "full"),
    "headpurify": (purification, "full"),
    "clipood": (margin_and_average, "full"),
    "vit_diverse, erm": (functools.partial(diversity, mode="erm"), "full"),
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
