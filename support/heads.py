"""Heads of a plain ViT image tower of open_clip: take one out, what it is worth, where it looks.

A head is named LAYER.HEAD, from 1.1 on. Nothing here trains.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support import InputError
from support.stop import stop_if_asked


def head_grid(visual: nn.Module) -> tuple[int, int]:
    """Layers, and heads of a layer."""
    layers = visual.transformer.resblocks
    return len(layers), layers[0].attn.num_heads


def head_places(visual: nn.Module, names: list[str]) -> list[int]:
    """Places of heads in the order of gates (layers, heads). Raises: InputError for a name that no
    head has."""
    known = []
    for layer, head in np.ndindex(head_grid(visual)):
        known.append(f"{layer + 1}.{head + 1}")
    for name in names:
        if name not in known:
            raise InputError(f"--drop {name}: heads are {known[0]} ... {known[-1]}")
    return [known.index(name) for name in names]


def output_rows(visual: nn.Module, layer: int) -> torch.Tensor:
    """What each head of a layer meets of W_o, as PyTorch stores it: (D, heads, d), a view."""
    attention = visual.transformer.resblocks[layer].attn
    return attention.out_proj.weight.detach().unflatten(1, (attention.num_heads, -1))


@torch.no_grad()
def silence(visual: nn.Module, layer: int, head: int) -> None:
    """Take a head out, in place: the rows of W_o that it meets become zero."""
    output_rows(visual, layer)[:, head] = 0


def contribution(visual: nn.Module, layer: int, head: int, output) -> torch.Tensor:
    """What a head adds to a token, output (..., d) times its rows of W_o: (..., D)."""
    return output @ output_rows(visual, layer)[:, head].T


@contextlib.contextmanager
def ablated(visual: nn.Module, layer: int, head: int, mean=None):
    """Inside the block a head says `mean`, (d,), whatever it sees; by default nothing."""
    rows = output_rows(visual, layer)[:, head]  # (D, d), a view
    bias = visual.transformer.resblocks[layer].attn.out_proj.bias.detach()
    rows_before, bias_before = rows.clone(), bias.clone()
    if mean is not None:
        bias += contribution(visual, layer, head, mean)
    silence(visual, layer, head)
    try:
        yield
    finally:
        rows.copy_(rows_before)
        bias.copy_(bias_before)


@torch.no_grad()
def loss_of(visual: nn.Module, class_features, logit_scale: float, images, labels) -> float:
    """Cross-entropy of images (B, 3, h, w) against class features (C, D)."""
    stop_if_asked()
    features = F.normalize(visual(images), dim=-1)  # (B, D)
    return F.cross_entropy(logit_scale * (features @ class_features.T), labels).item()


def head_importance(visual: nn.Module, *data) -> torch.Tensor:
    """By how much the cross-entropy grows without each head: (layers, heads). data: see `loss_of`.
    Below 0: it is better without."""
    grid = head_grid(visual)
    importance = torch.full(grid, -loss_of(visual, *data))
    for layer, head in np.ndindex(grid):
        with ablated(visual, layer, head):
            importance[layer, head] += loss_of(visual, *data)
    return importance


def greedy_order(visual: nn.Module, count: int, *data) -> torch.Tensor:
    """The first `count` heads to drop, (count,) places in the order of gates: again and again the
    one without which the cross-entropy is least. data: see `loss_of`."""
    visual = copy.deepcopy(visual)
    left = list(np.ndindex(head_grid(visual)))
    order = []
    for _ in range(count):
        losses = []
        for layer, head in left:
            with ablated(visual, layer, head):
                losses.append(loss_of(visual, *data))
        layer, head = left.pop(int(np.argmin(losses)))
        silence(visual, layer, head)
        order.append(layer * head_grid(visual)[1] + head)
    return torch.tensor(order)


def drop_curve(visual: nn.Module, order, stops: set[int], measure: Callable) -> dict[str, list]:
    """Drop heads one by one, from a copy. order: places in the order of gates; stops: numbers of
    dropped heads at which `measure`, of a tower, gives {test: accuracy}.

    Returns: {"dropped": those numbers, test: the accuracies there}.
    """
    visual = copy.deepcopy(visual)
    curve = {"dropped": []}
    for dropped in range(len(order) + 1):
        if dropped in stops:
            curve["dropped"].append(dropped)
            for test, accuracy in measure(visual).items():
                curve.setdefault(test, []).append(accuracy)
        if dropped < len(order):
            layer, head = divmod(int(order[dropped]), head_grid(visual)[1])
            silence(visual, layer, head)
    return curve


@torch.no_grad()
def attention_inputs(visual: nn.Module, images) -> list[tuple]:
    """Every attention layer with the tokens (B, N, D) it is given."""
    read = []

    def keep(attention, arguments):
        read.append((attention, arguments[0]))

    hooks = []
    for block in visual.transformer.resblocks:
        hooks.append(block.attn.register_forward_pre_hook(keep))
    visual(images)
    for hook in hooks:
        hook.remove()
    return read


@torch.no_grad()
def cls_attention(visual: nn.Module, images) -> torch.Tensor:
    """What the CLS token attends to beside itself: (layers, B, heads, patches)."""
    maps = []
    for attention, z in attention_inputs(visual, images):
        _, weights = attention(z, z, z, average_attn_weights=False)  # (B, H, N, N)
        maps.append(weights[:, :, 0, 1:])
    return torch.stack(maps)
