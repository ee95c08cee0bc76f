"""What each head of an image tower carries: `python headpurify.py --study heads`.

The paper's Figure 1 says that some heads of CLIP carry the domain, and that without them it
generalises better. Here every head is asked, in numbers (layers, heads):

probe X         how often a linear probe of the head's output at the CLS token is right about X on
                images it was not fitted to: the class, the domain, what a drawn image is made of
MMD             how far the source domains are apart in what the head adds to the CLS token
without it, T   what the accuracy in test T gains if the head says the same whatever it sees
gate            what training made of it

and then how these go together over the heads, by rank correlation. Nothing here trains a tower.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support.heads import ablated, attention_inputs, contribution, head_grid
from support.pictures import plot_heat, plot_heats
from support.report import format_table
from support.stop import stop_if_asked

MOST = 400  # images of a domain that probes and MMD look at
CENTERS = {"without it, hold-out": 0, "without it, target": 0, "gate": 1}  # white in pictures


# ---------- One head -----------------------------------------------------------------------------
@torch.no_grad()
def head_outputs(visual: nn.Module, images) -> torch.Tensor:
    """Outputs of all heads of a plain tower for images (B, 3, h, w), before W_o: at the CLS token,
    and averaged over all tokens. (B, layers, heads, 2, d)."""
    outputs = []
    for attention, z in attention_inputs(visual, images):
        _, weights = attention(z, z, z, average_attn_weights=False)  # (B, H, N, N)
        _, _, W_v = attention.in_proj_weight.chunk(3)  # (D, D)
        _, _, b_v = attention.in_proj_bias.chunk(3)
        v = F.linear(z, W_v, b_v)
        v = v.unflatten(-1, (attention.num_heads, -1))  # (B, N, H, d)
        tokens = weights @ v.transpose(1, 2)  # (B, H, N, d)
        at_cls, mean = tokens[:, :, 0], tokens.mean(2)
        outputs.append(torch.stack([at_cls, mean], 2))
    return torch.stack(outputs, 1)


def probe_accuracy(x, y, fitted, ridge: float = 1e-3) -> float:
    """How often a linear probe is right about y (N,) from x (N, d), on rows where `fitted` (N,) is
    False. It is fitted to the others: least squares towards one-hot labels, with a little ridge."""
    x = x.double()
    deviation = x[fitted].std(0)
    x = (x - x[fitted].mean(0)) / deviation.clamp(min=1e-6)
    x = F.pad(x, (0, 1), value=1)  # (N, d + 1)
    own = x[fitted]
    labels = F.one_hot(y[fitted], int(y.max()) + 1)  # (n, C)
    penalty = ridge * len(own) * torch.eye(x.shape[1], dtype=x.dtype)
    W = torch.linalg.solve(own.T @ own + penalty, own.T @ labels.double())  # (d + 1, C)
    answers = x[~fitted] @ W
    right = answers.argmax(1) == y[~fitted]
    return right.double().mean().item()


# ---------- All heads ----------------------------------------------------------------------------
def what_heads_carry(
    visual: nn.Module, domains: dict, seed: int, outputs: Callable, distance: Callable
) -> tuple[dict[str, list], torch.Tensor]:
    """Probes and MMD of all heads, {measure: (layers, heads)}, and what each says on the average of
    the sources, (layers, heads, d).

    Args: domains, image sets by name, the target last; outputs(function, images): what a function
    of batches says of an image set; distance(features (N, D), S): MMD^2 of S sources, domain after
    domain.
    """
    sample = equal_shares(domains)
    encoded = [outputs(lambda x: head_outputs(visual, x), images) for images in sample]
    x = torch.cat(encoded)  # (N, L, H, 2, d)
    labels = what_is_asked(sample)  # each (N,)
    sources = labels["domain"] < len(domains) - 1
    generator = torch.Generator().manual_seed(seed)
    fitted = torch.rand(len(x), generator=generator) < 0.5

    grid = head_grid(visual)
    found = {}
    for what, y in labels.items():
        found[f"probe {what}"] = accuracy = np.zeros(grid)
        for layer, head in np.ndindex(grid):
            at_cls = x[:, layer, head, 0]  # (N, d)
            accuracy[layer, head] = probe_accuracy(at_cls, y, fitted)
    found["MMD"] = np.zeros(grid)
    for layer, head in np.ndindex(grid):
        at_cls = x[sources, layer, head, 0].to(visual.proj.device)
        added = contribution(visual, layer, head, at_cls)
        squared = distance(added.cpu(), len(domains) - 1)
        found["MMD"][layer, head] = max(0, squared) ** 0.5
    found = {measure: values.tolist() for measure, values in found.items()}
    return found, x[sources, :, :, 1].mean(0)


def equal_shares(domains: dict) -> list:
    """As many images of every domain, spread over it."""
    count = min(MOST, *map(len, domains.values()))
    sample = []
    for images in domains.values():
        places = np.linspace(0, len(images) - 1, count)
        sample.append(images.subset(places))
    return sample


def what_is_asked(sample: list) -> dict[str, torch.Tensor]:
    """Numbers of class and domain of all images, and of what drawn images are made of."""
    labels = {}
    for number, images in enumerate(sample):
        domain = torch.full_like(images.labels, number)
        asked = {"class": images.labels, "domain": domain, **images.attributes}
        for what, values in asked.items():
            labels.setdefault(what, []).append(values)
    return {what: torch.cat(values) for what, values in labels.items()}


def answers_without_each(visual: nn.Module, mean, classify: Callable) -> Callable:
    """A function: images (B, 3, h, w) -> (B, 1 + layers * heads), the class that a tower sees with
    all its heads, and without each: an image is read once for all of them.

    Args: mean (layers, heads, d), what a head says instead; classify(images), scores (B, C) by
    `visual`.
    """
    mean = mean.to(visual.proj.device)

    def answers(images):
        found = [classify(images).argmax(1)]
        for layer, head in np.ndindex(head_grid(visual)):
            stop_if_asked()
            with ablated(visual, layer, head, mean[layer, head]):
                found.append(classify(images).argmax(1))
        return torch.stack(found, 1)

    return answers


def gains(right: torch.Tensor, grid: tuple[int, int]) -> list:
    """What an accuracy gains without each head, (layers, heads), of whether answers (N, 1 + layers
    * heads) were right."""
    accuracies = right.double().mean(0)
    return (accuracies[1:] - accuracies[0]).unflatten(0, grid).tolist()


# ---------- How measures go together -------------------------------------------------------------
def ranks(values) -> np.ndarray:
    """Places in order of size, from 1; equal values share the mean of theirs."""
    _, group, sizes = np.unique(np.ravel(values), return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group]


def rank_correlation(a, b) -> float:
    """Spearman's, between -1 and 1; 0 where all values of one are equal."""
    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale else 0.0


def correlations(record: dict) -> dict[str, dict]:
    """A view of a record: the rank correlation over heads of each measure with each."""
    heads = record["extra"]["heads"]
    rows = {}
    for one, values in heads.items():
        rows[one] = {}
        for other, others in heads.items():
            rows[one][other] = rank_correlation(values, others)
    return rows


def report_heads(records: list[dict], path: str) -> None:
    """Print rank correlations, averaged over runs, and draw them and all measures."""
    measures = list(records[0]["extra"]["heads"])
    views = []
    for record in records:
        rows = correlations(record).values()
        views.append([list(row.values()) for row in rows])
    mean = np.mean(views, 0)  # (measures, measures)
    cells = {}
    for measure, row in zip(measures, mean):
        cells[measure] = [f"{value:+.2f}" for value in row]
    title = "rank correlation over heads"
    print("\n" + format_table(title, measures, cells))
    names = (measures, measures)
    plot_heat(mean, title, "", "", f"{path}-correlation.png", center=0, names=names)
    tables = {}
    for measure in measures:
        runs = [record["extra"]["heads"][measure] for record in records]
        tables[measure] = np.mean(runs, 0)
    plot_heats(tables, "head", "layer", f"{path}-carry.png", CENTERS)
