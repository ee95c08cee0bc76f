"""Checks of the exercises in 04_vit_diverse, and wrong answers that they must tell from right ones.

A check's argument is what the student wrote.
"""

from __future__ import annotations

import torch

import vit_diverse
from notebooks.classroom import Wrong, as_array, ask, exercise, expect


@exercise
def products(answer) -> str:
    """answer: gradients (H, N, D) of one image -> L_IG, raw and summed over pairs."""
    generator = torch.Generator().manual_seed(1)
    G = torch.randn(3, 4, 2, generator=generator)
    found = ask(answer, G)
    gram = torch.einsum("ind,jnd->nij", G, G)
    off = gram * (1 - torch.eye(3))
    right = off.square().sum() / 4
    mistakes = {
        "You also count a head with itself, i = j: it cannot be orthogonal to itself.": (
            gram.square().sum() / 4
        ),
        "You count each pair once. The sum over i != j has (i, j) and (j, i).": right / 2,
        "Products are not squared, so that opposite directions cancel parallel ones.": off.sum()
        / 4,
        "You take |c| where the equation has c squared.": off.abs().sum() / 4,
        "You sum over the tokens. The equation has 1/N before the sum.": 4 * right,
        "You divide by the number of pairs, H^2: that is the authors' code, `reduce='mean'`.": (
            right / 9
        ),
        "These are products of cosines: the lengths of the gradients are gone.": (
            (off / (G.norm(dim=-1).T[:, :, None] * G.norm(dim=-1).T[:, None])).square().sum() / 4
        ),
        "You add up the gradients of all tokens before you multiply: heads may look at different "
        "tokens, and that should cost nothing.": (
            ((G.sum(1) @ G.sum(1).T) * (1 - torch.eye(3))).square().sum() / 4
        ),
    }
    expect(found, right, "Go through the sum term by term with the three arrows above.", mistakes)
    return "Heads that read along orthogonal directions cost nothing, wherever they look."


@exercise
def worst_group(answer) -> str:
    """answer: hits (S, N), groups (N,), masks (S, H) -> the mask to keep (H,)."""
    masks = vit_diverse.head_subsets(3)
    hits = torch.zeros(len(masks), 8, dtype=torch.bool)
    groups = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    hits[1, :6] = True  # best on average, no image of group 1
    hits[2, [0, 1, 2, 6]] = True  # half of each group
    hits[6, [0, 1, 2, 7]] = True  # the same with a head less
    hits[5, [0, 6, 7]] = True  # all of group 1, a sixth of group 0
    found = ask(answer, hits, groups, masks)
    if as_array(found).shape == () and float(found) == 2:
        raise Wrong("That is the subset's place in the list: return its mask, `masks[place]`.")
    mistakes = {
        "This subset is best on average, and right for no image of group 1.": masks[1],
        "Two subsets are equally good on their worst group: keep the one with more heads, which "
        "comes first in `masks`.": masks[6],
        "This one is perfect on group 1, and right for a sixth of group 0. The worst group of each "
        "subset counts: take the minimum over groups first, then the best subset.": masks[5],
    }
    expect(
        found,
        masks[2],
        "For each subset: accuracy on every group, and the lowest of them.",
        mistakes,
    )
    return "No group of images pays for the others."


def without_labels(model, sets, heads):
    """A check of answers to exercise 3: logits (H, N, 2) of single heads, on OOD images without
    labels -> a mask (H,). It says how good the choice is."""
    H = model.last.heads
    masks = vit_diverse.head_subsets(H)
    reached = vit_diverse.subset_hits(model, heads["test_ood"], sets["test_ood"].labels, masks)
    reached = vit_diverse.subset_scores(reached)
    logits = model.logits(heads["val_ood"], torch.eye(H)[:, None]).detach()

    @exercise
    def check(answer) -> str:
        mask = as_array(ask(answer, logits.clone()))
        if mask.shape != (H,):
            raise Wrong(f"A mask of {H} heads is needed, {(H,)}; this has the shape {mask.shape}.")
        if not {*mask.tolist()} <= {0.0, 1.0}:
            raise Wrong(f"A mask holds 0 and 1, this one is {mask.tolist()}.")
        if not mask.any():
            raise Wrong("This mask keeps no head: nothing would reach the classifier.")
        flipped = as_array(ask(answer, logits.flip(1)))  # the same images in another order
        if (mask != flipped).any():
            raise Wrong(
                "Another order of the images changes your choice: does it use their places?"
            )
        place = (masks == torch.tensor(mask)).all(1).nonzero().item()
        return (
            f"Your heads reach {100 * reached[place]:.1f} % out of distribution. All heads reach "
            f"{100 * reached[0]:.1f} %, a random subset {100 * reached.mean():.1f} % on average, "
            f"the best one {100 * reached.max():.1f} %."
        )

    return check


WRONG = {
    "exercise-1": [
        (
            """
def my_loss(G):
    H, N, D = G.shape
    total = 0
    for i in range(H):
        for j in range(H):
            for n in range(N):
                total += (G[i, n] @ G[j, n]) ** 2
    return total / N

check.products(my_loss)
""",
            "a head with itself",
        ),
        (
            """
def my_loss(G):
    c = torch.einsum("ind,jnd->nij", G, G) * (1 - torch.eye(len(G)))
    return c.sum() / G.shape[1]

check.products(my_loss)
""",
            "not squared",
        ),
        (
            """
def my_loss(G):
    H, N, D = G.shape
    total = 0
    for i in range(H):
        for j in range(i):
            total += ((G[i] * G[j]).sum(-1) ** 2).mean()
    return total

check.products(my_loss)
""",
            "each pair once",
        ),
    ],
    "exercise-2": [
        (
            """
def my_choice(hits, groups, masks):
    return masks[hits.float().mean(1).argmax()]

check.worst_group(my_choice)
""",
            "best on average",
        ),
        (
            """
def my_choice(hits, groups, masks):
    on_rare = hits[:, groups == 1].float().mean(1)
    return masks[on_rare.argmax()]

check.worst_group(my_choice)
""",
            "perfect on group 1",
        ),
        (
            """
def my_choice(hits, groups, masks):
    scores = [hits[:, groups == group].float().mean(1) for group in groups.unique()]
    return torch.stack(scores).amin(0).argmax()

check.worst_group(my_choice)
""",
            "return its mask",
        ),
        (
            """
def my_choice(hits, groups, masks):
    best, kept = -1, None
    for own, mask in zip(hits, masks):
        worst = min(own[groups == group].float().mean() for group in groups.unique())
        if worst >= best:
            best, kept = worst, mask
    return kept

check.worst_group(my_choice)
""",
            "the one with more heads",
        ),
    ],
    "exercise-3": [
        (
            """
def my_heads(logits):
    return torch.zeros(len(logits))

check.without_labels(models["div"], sets, heads["div"])(my_heads)
""",
            "keeps no head",
        ),
        (
            """
def my_heads(logits):
    return logits.softmax(-1).mean((1, 2))

check.without_labels(models["div"], sets, heads["div"])(my_heads)
""",
            "holds 0 and 1",
        ),
        (
            """
def my_heads(logits):
    first = logits[:, 0].argmax(-1)
    return (first == first[0]).float() if logits[0, 0, 0] > logits[0, -1, 0] else torch.ones(4)

check.without_labels(models["div"], sets, heads["div"])(my_heads)
""",
            "order of the images",
        ),
    ],
}
