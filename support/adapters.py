"""What learns from CLIP's output features: linear probe, CLIP-Adapter and Tip-Adapter-F.

Each is a module from unit-norm image features f (B, D) to logits (B, C). T (C, D) are class
features, s is CLIP's 1 / tau. CoOp, which learns words instead, stands in prompts.py.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MAX_AFFINITIES = 2**26  # of features and keys, at a time: 256 MiB in float32


class Probe(nn.Module):
    """s (f W^T + b). W starts at the class features or at random unit vectors, b at 0."""

    def __init__(self, W, scale: float):
        super().__init__()
        self.W = nn.Parameter(W)
        self.b = nn.Parameter(torch.zeros(len(W), device=W.device))
        self.scale = scale

    def forward(self, f):
        return self.scale * (f @ self.W.T + self.b)


class Adapter(nn.Module):
    """s normalise(0.8 f + 0.2 A(f)) T^T, with a bottleneck A of D / 4 units (CLIP-Adapter, Gao et
    al., IJCV 2024)."""

    def __init__(self, T, scale: float):
        super().__init__()
        D = T.shape[1]
        down = nn.Linear(D, D // 4, bias=False)
        up = nn.Linear(D // 4, D, bias=False)
        self.A = nn.Sequential(down, nn.ReLU(), up, nn.ReLU()).to(T.device)
        self.T = T
        self.scale = scale

    def forward(self, f):
        adapted = F.normalize(0.8 * f + 0.2 * self.A(f), dim=-1)
        return self.scale * adapted @ self.T.T


class TipAdapter(nn.Module):
    """s f T^T + exp(-5.5 (1 - f K^T)) Y (Tip-Adapter-F, Zhang et al., ECCV 2022).

    The keys K (N, D) start at all training features. Y (N, C) are their one-hot labels, scaled as
    if there were 16 per class.

    With many keys the features go in parts, and the affinities of a part are computed again for its
    gradient. The logits are the same.
    """

    def __init__(self, T, scale: float, features, labels):
        super().__init__()
        C = len(T)
        self.K = nn.Parameter(features.clone())  # training must not change the features themselves
        self.Y = 16 * C / len(labels) * F.one_hot(labels, C).to(T)
        self.T = T
        self.scale = scale

    def forward(self, f):
        parts = f.split(max(1, MAX_AFFINITIES // len(self.K)))
        if len(parts) == 1:
            return self.logits(f)
        logits = [checkpoint(self.logits, part, use_reentrant=False) for part in parts]
        return torch.cat(logits)

    def logits(self, f):
        affinity = torch.exp(-5.5 * (1 - f @ self.K.T))  # (B, N)
        return self.scale * f @ self.T.T + affinity @ self.Y
