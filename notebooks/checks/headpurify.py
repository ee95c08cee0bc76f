"""Checks of the exercises in 01_headpurify, and wrong answers that they must tell from right ones.

A check's argument is what the student wrote.
"""

from __future__ import annotations

import copy

import torch

import common
from notebooks.classroom import Wrong, ask, exercise, expect
from notebooks.head_study import (
    head_grid,
    head_importance,
    head_indices,
    output_rows,
    silence,
    source_sample,
)

DROPPED = 4  # heads, in exercise 3
DRAWS = 6  # of as many heads at random


@exercise
def gates(answer) -> str:
    """answer: g (H,) -> a = H softmax(g)."""
    for g in (torch.tensor([0.0, 0.5, -1.0]), torch.tensor([0.3, -0.2, 1.0, 0.0, -2.0])):
        found = ask(answer, g.clone())
        right = len(g) * g.softmax(0)
        mistakes = {
            "The factor H is missing: these sum to 1, so g = 0 would make every head H times "
            "quieter than in CLIP.": g.softmax(0),
            "That is a sigmoid. It looks at each head alone and is 1/2 at g = 0: half of what CLIP "
            "says would be gone before training starts.": g.sigmoid(),
            "Twice a sigmoid is 1 at g = 0, but it looks at each head alone: all gates could fall "
            "together, and nothing would have to be kept. The softmax sums to 1.": 2 * g.sigmoid(),
            "This is exp(g). Divide by the sum over heads, and multiply by H.": g.exp(),
            "You divide by the mean without the factor in the right place: the gates should sum to "
            "H, and these sum to H squared.": len(g) * right,
            "This layer has five heads. You have written 3 where the number of heads belongs, "
            "`len(g)`.": 3 * g.softmax(0),
            "These are right but for the exponential: a softmax is exp(g) over its sum.": (
                len(g) * g / g.sum()
            ),
        }
        expect(found, right, "Gates are positive and sum to the number of heads.", mistakes)
    return "At g = 0 all gates are 1, and a head gets louder only if others get quieter."


@exercise
def merged(answer) -> str:
    """answer: W_o as PyTorch stores it (D, D), gates (H,) -> the same with the gates inside."""
    D, H = 6, 3
    d = D // H
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(D, D, generator=generator)
    tokens = torch.randn(4, D, generator=generator)
    gates = torch.tensor([0.5, 1.0, 1.5])
    each = gates.repeat_interleave(d)  # (D,)
    right = weight * each
    found = ask(answer, weight.clone(), gates.clone())
    mistakes = {
        "You scale the rows of what PyTorch stores. These belong to the numbers that come out of "
        "the layer, each of which mixes all heads. What head i meets are columns here.": (
            weight * each[:, None]
        ),
        "The gates are dealt out one by one, 1 2 3 1 2 3. Heads stand side by side, d numbers "
        "each: 1 1 2 2 3 3, `repeat_interleave`.": weight * gates.repeat(d),
        "Rows, and dealt out one by one: what head i meets are d columns side by side.": (
            weight * gates.repeat(d)[:, None]
        ),
        "You divide by the gates. A louder head must weigh more.": weight / each,
        "That is the transpose of what PyTorch stores: the layer will compute tokens @ weight.T.": (
            right.T
        ),
        "The weight has not changed.": weight,
    }
    hint = "Compare `(tokens * gate of each number) @ weight.T` with `tokens @ merged.T`."
    expect(found, right, hint, mistakes)
    gated = (tokens * each) @ weight.T
    difference = (gated - tokens @ torch.as_tensor(found).float().T).abs().max().item()
    return f"Gates and no gates say the same, up to {difference:.1g}: nothing is left over."


def silenced(visual) -> int:
    """How many heads of a tower say nothing."""
    count = 0
    for layer in range(head_grid(visual)[0]):
        rows = output_rows(visual, layer)  # (D, heads, d)
        count += int((rows == 0).all(2).all(0).sum())
    return count


def places_of(names, visual) -> list[int]:
    """Places of the heads that an answer names. Raises: Wrong unless there are as many as asked."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise Wrong(f'Heads are named "LAYER.HEAD", from "1.1" on. This is {names!r}.')
    names = list(names)
    try:
        places = head_indices(visual, names)
    except common.InputError as error:
        hint = "Layers and heads are counted from 1 in names, and from 0 in `silence`."
        raise Wrong(f"{str(error).replace('--drop ', 'There is no ')}. {hint}") from None
    if len({*places}) != DROPPED:
        raise Wrong(f"{DROPPED} different heads are asked for. These are {', '.join(names)}.")
    return places


def dropped(clip, class_features, task):
    """A check of answers to exercise 3: (visual, sample) -> names of four heads to drop. It says
    how often CLIP is right on the target without them."""
    sample = source_sample(clip, class_features, task, seed=0, per_source=64)

    def reached(places) -> float:
        """Target accuracy without some heads, %."""
        visual = copy.deepcopy(clip.visual)
        for place in places:
            silence(visual, *divmod(int(place), head_grid(visual)[1]))
        classify = common.clip_classifier(visual, class_features)
        tests = {"target": task.tests["target"]}
        return 100 * common.evaluate(classify, tests, clip.device)["target"]

    def by_target() -> torch.Tensor:
        """The heads that the target itself misses least, each asked alone."""
        (images,) = task.tests["target"].values()
        some = torch.arange(0, len(images), 3)
        pixels, labels = images.__getitems__(some)
        importance = head_importance(clip.visual, *sample[:2], pixels, labels)
        return importance.flatten().argsort()[:DROPPED]

    @exercise
    def check(answer) -> str:
        visual = copy.deepcopy(clip.visual)
        names = ask(answer, visual, sample)
        if silenced(visual) > DROPPED:
            raise Wrong(
                f"Your code took out {silenced(visual)} heads on its way and never put them back: "
                "each was measured without all those before it. Copy the tower first, "
                "`copy.deepcopy(visual)`."
            )
        places = places_of(names, clip.visual)
        generator = torch.Generator().manual_seed(0)
        count = len(visual.transformer.resblocks) * head_grid(visual)[1]
        draws = [torch.randperm(count, generator=generator)[:DROPPED] for _ in range(DRAWS)]
        by_chance = sum(map(reached, draws)) / DRAWS
        return (
            f"Without {', '.join(names)} CLIP is right on {reached(places):.1f} % of the target. "
            f"With all heads: {reached([]):.1f} %. Without four at random: {by_chance:.1f} % on "
            "average. Without the four that the target itself misses least, each asked alone: "
            f"{reached(by_target()):.1f} %."
        )

    return check


WRONG = {
    "exercise-1": [
        (
            """
def my_gates(g):
    e = g.exp()
    return e / e.sum()

check.gates(my_gates)
""",
            "factor H is missing",
        ),
        (
            """
def my_gates(g):
    return 1 / (1 + (-g).exp())

check.gates(my_gates)
""",
            "That is a sigmoid",
        ),
        (
            """
def my_gates(g):
    e = g.exp()
    return 3 * e / e.sum()

check.gates(my_gates)
""",
            "five heads",
        ),
    ],
    "exercise-2": [
        (
            """
def my_merge(weight, gates):
    d = len(weight) // len(gates)
    return weight * gates.repeat_interleave(d)[:, None]

check.merged(my_merge)
""",
            "scale the rows",
        ),
        (
            """
def my_merge(weight, gates):
    d = len(weight) // len(gates)
    return weight * gates.repeat(d)

check.merged(my_merge)
""",
            "repeat_interleave",
        ),
        (
            """
def my_merge(weight, gates):
    d = len(weight) // len(gates)
    W_o = weight.T * gates.repeat_interleave(d)[:, None]
    return W_o

check.merged(my_merge)
""",
            "the transpose of what PyTorch stores",
        ),
        (
            """
def my_merge(weight, gates):
    return weight * gates

check.merged(my_merge)
""",
            "RuntimeError",
        ),
    ],
    "exercise-3": [
        (
            """
def my_heads(visual, sample):
    return head_study.head_importance(visual, *sample).flatten().argsort()[:4].tolist()

check.dropped(clip, class_features, task)(my_heads)
""",
            "Heads are named",
        ),
        (
            """
def my_heads(visual, sample):
    losses = {}
    for layer, head in np.ndindex(head_study.head_grid(visual)):
        head_study.silence(visual, layer, head)
        losses[f"{layer + 1}.{head + 1}"] = head_study.loss_of(visual, *sample)
    return sorted(losses, key=losses.get)[:4]

check.dropped(clip, class_features, task)(my_heads)
""",
            "never put them back",
        ),
        (
            """
def my_heads(visual, sample):
    return ["0.1", "1.1", "2.1", "3.1"]

check.dropped(clip, class_features, task)(my_heads)
""",
            "counted from 1 in names",
        ),
    ],
}
