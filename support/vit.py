"""Layers of a plain ViT; and torchvision's and open_clip's pretrained ViTs, taken apart.

vit_diverse.py replaces the last layer of a ViT by its own, which has no residual path around its
attention.
"""

from __future__ import annotations

import copy

import open_clip
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from support import InputError, why_not_loaded


# ---------- Layers -------------------------------------------------------------------------------
class PatchEmbedding(nn.Module):
    """Images (B, 3, h, w) -> a class token and the patches with learned positions, (B, N, D).

    Raises: ValueError if the patch size does not divide the image's sides.
    """

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
        qkv = self.qkv(self.norm(x))  # (B, N, 3 H d)
        qkv = qkv.view(B, N, 3, self.heads, -1).unbind(2)  # one backward pass without copies
        q, k, v = [part.transpose(1, 2) for part in qkv]  # each (B, H, N, d)
        heads = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, d)
        tokens = heads.transpose(1, 2).flatten(2)  # (B, N, H d)
        x = x + self.out(tokens)
        return x + self.mlp(self.mlp_norm(x))


# ---------- Pretrained ViTs ----------------------------------------------------------------------
class Trunk(nn.Module):
    """All layers but the last of torchvision's or open_clip's ViT: images (B, 3, h, w) -> tokens
    (B, N, D)."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, images):
        vit = self.vit
        if not isinstance(vit, torchvision.models.VisionTransformer):
            return vit.transformer(vit._embeds(images))
        patches = vit._process_input(images)  # (B, patches, D)
        start = vit.class_token.expand(len(images), -1, -1)
        return vit.encoder(torch.cat([start, patches], 1))


def take_apart(vit: nn.Module) -> tuple:
    """Split a copy of a ViT in front of its last layer.

    Returns: (trunk, last layer, norm after it). The last layer is (number of heads, norm, one
        linear layer for queries, keys and values, output projection, norm, MLP).
    Raises: InputError for another kind of network.
    """
    vit = copy.deepcopy(vit).requires_grad_(True)
    transformer = getattr(vit, "transformer", None)
    if isinstance(vit, torchvision.models.VisionTransformer):
        *layers, last = vit.encoder.layers
        attention, end_norm = last.self_attention, vit.encoder.ln
        vit.encoder.layers = nn.Sequential(*layers)
        vit.encoder.ln = nn.Identity()
        vit.heads = nn.Identity()
    elif isinstance(transformer, open_clip.transformer.Transformer) and vit.attn_pool is None:
        *layers, last = transformer.resblocks
        attention, end_norm = last.attn, vit.ln_post
        transformer.resblocks = nn.ModuleList(layers)
        vit.ln_post = nn.Identity()
        vit.proj = None
    else:
        wrong = f"head selection needs a ViT with a class token, not a {type(vit).__name__}"
        raise InputError(f"{wrong}; use scratch, vit_b_16, tiny, ViT-B-32, ViT-B-16, ...")
    qkv = nn.Linear(attention.embed_dim, 3 * attention.embed_dim)
    qkv.weight = attention.in_proj_weight
    qkv.bias = attention.in_proj_bias
    parts = attention.num_heads, last.ln_1, qkv, attention.out_proj, last.ln_2, last.mlp
    return Trunk(vit), parts, end_norm


def torchvision_vit(pretrained: str | None) -> nn.Module:
    """torchvision's ViT-B/16 with ImageNet weights, downloaded or from a file.

    Raises: InputError if the weights cannot be had.
    """
    weights = None if pretrained else "IMAGENET1K_V1"
    try:
        vit = torchvision.models.vit_b_16(weights=weights)
        if pretrained:
            state = torch.load(pretrained, map_location="cpu", weights_only=True)
            vit.load_state_dict(state)
    except Exception as error:  # downloads, files and formats fail in ways of their own
        wrong = f"cannot load vit_b_16's weights {pretrained or weights}: {why_not_loaded(error)}"
        hint = "Give torchvision's own file with --pretrained FILE, or use --model tiny."
        raise InputError(f"{wrong}\n  {hint}") from error
    preprocess = {"size": 224, "interpolation": "bilinear"}
    preprocess["mean"] = open_clip.constants.IMAGENET_MEAN
    preprocess["std"] = open_clip.constants.IMAGENET_STD
    open_clip.set_model_preprocess_cfg(vit, preprocess)
    return vit
