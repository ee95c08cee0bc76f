"""How good and how diverse synthesised features are, beside those of real images.

`own`, `source` and `real` are `Features` of ldfs.py: features (N, D), labels (N,), and, if they
were synthesised, `start` (N, D), from where they were moved.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def nearest(features, among) -> torch.Tensor:
    """For each feature (n, D) the place (n,) of the most similar one among (N, D)."""
    size = min(1024, max(1, 2**26 // len(among)))  # at most 256 MiB of cosines at a time
    places = [(some @ among.T).argmax(1) for some in features.split(size)]
    return torch.cat(places)


def class_means(features, labels, classes):
    return torch.stack([features[labels == c].mean(0) for c in classes])  # (C, D)


def spread(own):
    """Mean distance of two features of the same class, at most 999 of each; mean over classes."""
    distances = []
    for c in own.labels.unique():
        same = own.features[own.labels == c][:999]
        if len(same) > 1:
            distances.append(torch.pdist(same).mean().cpu())
    return np.mean(distances)


def synthesis_quality(made, source, targets) -> dict[str, float]:
    """What synthesised features are like, averaged over the targets.

    move           mean length |M(f) - f|
    to real shift  cosine of a class's mean move with the difference of its real target and source
    spread         mean distance of two of the same class; `real spread` that of real ones
    distinct       different images among the nearest real target images, as a share of the most
    right class, right domain, both: of the nearest among all real images, source and targets
    """
    found = {}
    for name, real in targets.items():
        measures = quality_of_moves(made[name], source, real)
        measures |= quality_of_neighbours(made[name], name, source, targets)
        for measure, value in measures.items():
            found.setdefault(measure, []).append(float(value))
    return {measure: float(np.mean(values)) for measure, values in found.items()}


def quality_of_moves(own, source, real) -> dict:
    classes = [c for c in own.labels.unique() if c in real.labels and c in source.labels]
    shift = class_means(real.features, real.labels, classes)
    shift = shift - class_means(source.features, source.labels, classes)
    move = own.features - own.start
    cosines = F.cosine_similarity(class_means(move, own.labels, classes), shift)
    return {
        "move": move.norm(dim=1).mean(),
        "to real shift": cosines.mean(),
        "spread": spread(own),
        "real spread": spread(real),
    }


def quality_of_neighbours(own, target: str, source, targets) -> dict:
    real = targets[target]
    different = nearest(own.features, real.features).unique()
    pool = [source, *targets.values()]
    features = torch.cat([part.features for part in pool])
    labels = torch.cat([part.labels for part in pool])
    domains = [torch.full_like(part.labels, i) for i, part in enumerate(pool)]
    image = nearest(own.features, features)
    right_class = labels[image] == own.labels
    right_domain = torch.cat(domains)[image] == 1 + list(targets).index(target)
    both = right_class & right_domain
    return {
        "distinct": len(different) / min(len(own.labels), len(real.labels)),
        "right class": right_class.double().mean(),
        "right domain": right_domain.double().mean(),
        "both": both.double().mean(),
    }
