"""Checks of the exercises in 03_ldfs, and wrong answers that they must tell from right ones.

A check's argument is what the student wrote.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import common
from notebooks.classroom import Wrong, ask, exercise, expect
from support import runs, tiny_clip


def unit(n: int, dim: int, seed: int) -> torch.Tensor:
    """Random unit-norm features (n, dim)."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, dim, generator=generator), dim=-1)


@exercise
def direction(answer) -> str:
    """answer: features, mapped, text_source, text_target, (B, D) each -> L_ld."""
    features, mapped, before, after = (unit(4, 5, seed) for seed in range(4))
    found = ask(answer, features, mapped, before, after)
    move, text = mapped - features, after - before
    cosines = F.cosine_similarity(move, text)  # (B,)
    mean_text = text.mean(0).expand_as(text)
    mistakes = {
        "You return a number for each image: the loss is their mean.": 1 - cosines,
        "You sum over the images. The equation has their mean.": (1 - cosines).sum(),
        "This is the cosine of features, M(f) and T(t). The equation compares *moves*: subtract "
        "where they start.": (1 - F.cosine_similarity(mapped, after)).mean(),
        "You compare a move of the image with a feature of the text: subtract T(s) from T(t).": (
            (1 - F.cosine_similarity(move, after)).mean()
        ),
        "You compare M(f) with a move of the text: subtract f from M(f).": (
            (1 - F.cosine_similarity(mapped, text)).mean()
        ),
        "This is 1 + cos: it is lowest where images move *against* their captions. Check the sign, "
        "and what you subtract from what.": (1 + cosines).mean(),
        "This is the mean cosine, which is highest where the loss should be 0: take 1 - cos.": (
            cosines.mean()
        ),
        "This is the product of the moves, not their cosine: divide by both lengths.": (
            (1 - (move * text).sum(-1)).mean()
        ),
        "You compare with the mean of all captions' moves, the global direction. Each image has "
        "its own caption.": (1 - F.cosine_similarity(move, mean_text)).mean(),
        "You take the mean of the moves first, and one cosine. Take a cosine for each image, then "
        "the mean.": 1 - F.cosine_similarity(move.mean(0), text.mean(0), dim=0),
        "You take one cosine of all numbers at once, over the whole batch. Each image has its own: "
        "the dimension is the last one.": (
            1 - F.cosine_similarity(move.flatten(), text.flatten(), dim=0)
        ),
    }
    expect(found, (1 - cosines).mean(), "Try it on the two images of section 2.2.", mistakes)
    return "Every image moves the way its own caption moves, however far."


@exercise
def pairs(answer) -> str:
    """answer: features, mapped, unit-norm (B, D) -> L_pair."""
    features, mapped = unit(5, 4, seed=5), unit(5, 4, seed=6)
    found = ask(answer, features, mapped)
    B = len(features)
    change = mapped @ mapped.T - features @ features.T  # its diagonal is 0
    total = change.square().sum()
    right = total / (B * (B - 1))
    apart = torch.cdist(mapped, mapped) - torch.cdist(features, features)
    mistakes = {
        "You divide by B^2 and so count the diagonal, i = j, whose difference is always 0. There "
        "are B (B - 1) pairs i != j.": total / B**2,
        "You count each pair once, i < j, and divide by all B (B - 1): that is half the loss.": (
            right / 2
        ),
        "You add up the pairs. The equation has their mean.": total,
        "You add up each pair once. The equation has the mean over all pairs i != j.": total / 2,
        "Differences are not squared, so that pairs that come closer cancel pairs that part.": (
            change.sum() / (B * (B - 1))
        ),
        "You take the absolute difference where the equation has its square.": (
            change.abs().sum() / (B * (B - 1))
        ),
        "You compare distances. The equation compares cosines.": (
            apart.square().sum() / (B * (B - 1))
        ),
        "You look at the mapped features only, and push all of them apart. How alike were they "
        "before?": ((mapped @ mapped.T).square().sum() - B) / (B * (B - 1)),
        "You compare each feature with what became of itself. A pair is two different images.": (
            (1 - (features * mapped).sum(-1)).square().mean()
        ),
        "You return a number for each pair: the loss is their mean.": change.square(),
    }
    expect(found, right, "Try it on the three points of section 2.4: collapsed, 0.4.", mistakes)
    return "Turning all features alike costs nothing, letting them run together does."


def own_words(with_words, clip, target):
    """A check of answers to exercise 3: a description with one {}. It says how good the words are.

    with_words: words -> accuracy on the target; target: (the source's words, its own words, ...).
    """
    source_words, shipped, *_ = target

    def feature(words):
        return clip.encode_text([words.replace("{}", "orange elephant on water")])

    @exercise
    def check(words) -> str:
        if not isinstance(words, str):
            raise Wrong(f"A text in quotes is needed, this is {words!r}.")
        if not runs.has_one_place(words):
            raise Wrong(f"The caption needs exactly one place, `{{}}`: {words!r} has not.")
        unknown = tiny_clip.unknown_words(words.replace("{}", " "), clip.tokenizer.words)
        if unknown:
            raise Wrong(f"The tiny CLIP does not know: {', '.join(unknown)}. Its words are above.")
        try:
            own = feature(words)
        except common.InputError as error:
            raise Wrong(f"{error}") from None
        if torch.allclose(own, feature(source_words), atol=1e-5):
            raise Wrong("These are the words for photos: no caption would move.")
        if torch.allclose(own, feature(shipped), atol=1e-5):
            raise Wrong(f"These are the shipped words, {shipped!r}. What else could you say?")
        theirs, ours = with_words(shipped), with_words(words)
        return (
            f"A probe with features made from your words is right on {ours:.1%} of the sketches, "
            f"from the shipped words, {shipped!r}, on {theirs:.1%}. One seed: a point or two is "
            f"chance. And these are the images on which we report: who chooses words by this "
            f"number is peeking."
        )

    return check


WRONG = {
    "exercise-1": [
        (
            """
def my_direction(features, mapped, text_source, text_target):
    return (1 - F.cosine_similarity(mapped, text_target)).mean()

check.direction(my_direction)
""",
            "compares *moves*",
        ),
        (
            """
def my_direction(features, mapped, text_source, text_target):
    return (1 - F.cosine_similarity(mapped - features, text_target - text_source)).sum()

check.direction(my_direction)
""",
            "sum over the images",
        ),
        (
            """
def my_direction(features, mapped, text_source, text_target):
    return (1 - F.cosine_similarity(mapped - features, text_source - text_target)).mean()

check.direction(my_direction)
""",
            "1 + cos",
        ),
        (
            """
def my_direction(features, mapped, text_source, text_target):
    text = (text_target - text_source).mean(0, keepdim=True)
    return (1 - F.cosine_similarity(mapped - features, text)).mean()

check.direction(my_direction)
""",
            "global direction",
        ),
    ],
    "exercise-2": [
        (
            """
def my_pairs(features, mapped):
    return (mapped @ mapped.T - features @ features.T).square().mean()

check.pairs(my_pairs)
""",
            "count the diagonal",
        ),
        (
            """
def my_pairs(features, mapped):
    B, total = len(features), 0
    for i in range(B):
        for j in range(i):
            total += (mapped[i] @ mapped[j] - features[i] @ features[j]) ** 2
    return total / (B * (B - 1))

check.pairs(my_pairs)
""",
            "each pair once",
        ),
        (
            """
def my_pairs(features, mapped):
    B = len(features)
    return (mapped @ mapped.T - features @ features.T).sum() / (B * (B - 1))

check.pairs(my_pairs)
""",
            "not squared",
        ),
        (
            """
def my_pairs(features, mapped):
    return torch.pdist(mapped).sub(torch.pdist(features)).square().mean()

check.pairs(my_pairs)
""",
            "compare distances",
        ),
    ],
    "exercise-3": [
        (
            """
my_words = "a drawing"

check.own_words(with_words, clip, targets["sketch"])(my_words)
""",
            "exactly one place",
        ),
        (
            """
my_words = "a charcoal picture of a {}"

check.own_words(with_words, clip, targets["sketch"])(my_words)
""",
            "does not know: charcoal",
        ),
        (
            """
my_words = "a photo of a {}."

check.own_words(with_words, clip, targets["sketch"])(my_words)
""",
            "no caption would move",
        ),
        (
            """
my_words = "a sketch of a {}"

check.own_words(with_words, clip, targets["sketch"])(my_words)
""",
            "the shipped words",
        ),
    ],
}
