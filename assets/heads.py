"""Heads of a plain ViT image tower of open_clip: take one out, what it is worth, where it looks.

A head is named LAYER.HEAD, from 1.1 on. Nothing here trains.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def head_grid(visual: nn.Module) -> tuple[int, int]:
    """Layers, and heads of a layer."""
    layers = visual.transformer.resblocks
    return len(layers), layers[0].attn.num_heads


def head_names(visual: nn.Module) -> list[str]:
    """Of every head, in the order of gates (layers, heads)."""
    names = []
    for layer, head in np.ndindex(head_grid(visual)):
        names.append(f"{layer + 1}.{head + 1}")
    return names


@torch.no_grad()
def silence(visual: nn.Module, layer: int, head: int) -> None:
    """Take a head out, in place: the rows of W_o that it meets become zero."""
    attention = visual.transformer.resblocks[layer].attn
    by_head = attention.out_proj.weight.unflatten(1, (attention.num_heads, -1))  # (D, H, d)
    by_head[:, head] = 0


@torch.no_grad()
def head_importance(visual: nn.Module, class_features, logit_scale: float, images, labels):
    """By how much the cross-entropy of images (B, 3, h, w) grows without each head:
    (layers, heads)."""

    def loss(tower):
        features = F.normalize(tower(images), dim=-1)  # (B, D)
        return F.cross_entropy(logit_scale * (features @ class_features.T), labels).item()

    grid = head_grid(visual)
    importance = torch.full(grid, -loss(visual))
    for layer, head in np.ndindex(grid):
        without = copy.deepcopy(visual)
        silence(without, layer, head)
        importance[layer, head] += loss(without)
    return importance


@torch.no_grad()
def cls_attention(visual: nn.Module, images) -> torch.Tensor:
    """What the CLS token attends to beside itself: (layers, B, heads, patches)."""
    read = []

    def keep(attention, arguments):
        read.append((attention, arguments[0]))  # (B, N, D)

    hooks = []
    for block in visual.transformer.resblocks:
        hooks.append(block.attn.register_forward_pre_hook(keep))
    visual(images)
    for hook in hooks:
        hook.remove()
    maps = []
    for attention, z in read:
        _, weights = attention(z, z, z, average_attn_weights=False)  # (B, H, N, N)
        maps.append(weights[:, :, 0, 1:])
    return torch.stack(maps)
