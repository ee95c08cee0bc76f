"""What learns from CLIP's output features: linear probe, CLIP-Adapter, Tip-Adapter-F.

Each is a module from unit-norm features f (B, D) to logits (B, C). T (C, D) are class features, s
is CLIP's 1 / tau. CoOp, which learns words instead, stands in prompts.py.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MOST = 2**26  # affinities of features and keys at a time: 256 MiB


class Probe(nn.Module):
    """s (f W^T + b). W starts at the class features, or at random unit vectors."""

    def __init__(self, W, scale: float):
        super().__init__()
        self.W = nn.Parameter(W)
        self.b = nn.Parameter(torch.zeros(len(W), device=W.device))
        self.scale = scale

    def forward(self, f):
        return self.scale * (f @ self.W.T + self.b)


class Adapter(nn.Module):
    """s normalise(0.8 f + 0.2 A(f)) T^T, A with a bottleneck of D / 4 (CLIP-Adapter, Gao et al.
    2024)."""

    def __init__(self, T, scale: float):
        super().__init__()
        D = T.shape[1]
        down = nn.Linear(D, D // 4, bias=False)
        up = nn.Linear(D // 4, D, bias=False)
        self.A = nn.Sequential(down, nn.ReLU(), up, nn.ReLU()).to(T.device)
        self.T, self.scale = T, scale

    def forward(self, f):
        adapted = F.normalize(0.8 * f + 0.2 * self.A(f), dim=-1)
        return self.scale * adapted @ self.T.T


class TipAdapter(nn.Module):
    """s f T^T + exp(-5.5 (1 - f K^T)) Y, keys K that start as all features, their labels Y, weighed
    as 16 per class (Tip-Adapter-F, Zhang et al. 2022).

    Features that with all keys have more than `MOST` affinities go in parts, whose affinities are
    computed again for the gradient: the same logits, whatever the number of keys.
    """

    def __init__(self, T, scale: float, features, labels):
        super().__init__()
        C = len(T)
        self.K = nn.Parameter(features.clone())  # the features themselves stay
        self.Y = 16 * C / len(labels) * F.one_hot(labels, C).to(T)
        self.T, self.scale = T, scale

    def forward(self, f):
        parts = f.split(max(1, MOST // len(self.K)))
        if len(parts) == 1:
            return self.logits(f)
        logits = [checkpoint(self.logits, part, use_reentrant=False) for part in parts]
        return torch.cat(logits)

    def logits(self, f):
        affinity = torch.exp(-5.5 * (1 - f @ self.K.T))
        return self.scale * f @ self.T.T + affinity @ self.Y
