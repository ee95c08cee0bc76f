"""Checks of the exercises in 00_tiny_world, and wrong answers that they must tell from right ones.

A check's argument is what the student wrote.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from notebooks.classroom import Wrong, as_array, ask, close, exercise, expect


@exercise
def zero_shot(answer) -> str:
    """answer: images (N, D), texts (C, D), tau -> probabilities (N, C)."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 5, generator=generator) * torch.tensor([[0.5], [1.0], [2.0], [3.0]])
    texts = torch.randn(3, 5, generator=generator) * torch.tensor([[2.0], [0.5], [1.5]])
    tau = 0.2
    found = ask(answer, images.clone(), texts.clone(), tau)
    f, t = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    cosines = f @ t.T  # (N, C)
    right = (cosines / tau).softmax(1)
    mistakes = {
        "The features are not of length 1: divide images and texts by their lengths first.": (
            (images @ texts.T / tau).softmax(1)
        ),
        "The texts are not of length 1: a class whose vector happens to be long wins too often.": (
            (f @ texts.T / tau).softmax(1)
        ),
        "The images are not of length 1. The first class is the same, but a long vector makes CLIP "
        "surer than it is.": (images @ t.T / tau).softmax(1),
        "You divide columns by their lengths: each *row* is an image or a text, `dim=1`.": (
            (F.normalize(images, dim=0) @ F.normalize(texts, dim=0).T / tau).softmax(1)
        ),
        "There is no temperature yet: all classes come out nearly equally likely.": (
            cosines.softmax(1)
        ),
        "You multiply by the temperature. A small `tau` should make CLIP surer: divide by it.": (
            (cosines * tau).softmax(1)
        ),
        "Your softmax goes over the images. The probabilities of *one image's classes* add up to "
        "1: `softmax(1)`.": (cosines / tau).softmax(0),
        "These are cosines: their softmax, divided by `tau`, is still missing.": cosines,
        "These are logits: their softmax is still missing.": cosines / tau,
        "These are the logarithms of the probabilities.": right.log(),
        "You say which class is first. Wanted are the probabilities of all classes.": (
            cosines.argmax(1)
        ),
        "This is classes by images. Wanted is (N, C), a row for each image.": right.T,
    }
    expect(found, right, "Go through the example with three texts in section 2.1.", mistakes)
    unsure = ask(answer, images.clone(), texts.clone(), 20.0)
    expect(
        unsure, (cosines / 20).softmax(1), "That is with another `tau`: do you use the given one?"
    )
    return "At any temperature the same class is first; only how sure CLIP is of it changes."


# right answers of six checkpoints among 8 hold-out images on their own background and 12 on others
ON_OWN, ON_OTHER = (4, 5, 8, 0, 2, 8), (7, 8, 7, 9, 6, 5)
ON_TARGET = (0.41, 0.46, 0.44, 0.43, 0.50, 0.39)


def hold_out_hits() -> tuple[torch.Tensor, torch.Tensor]:
    """hits (K, N) and own (N,), the images in a random order."""
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    own = torch.arange(20) < 8
    hits = []
    for right, others in zip(ON_OWN, ON_OTHER):
        place = torch.arange(20)
        hits.append((place < right) | ((place >= 8) & (place < 8 + others)))
    return torch.stack(hits)[:, order], own[order]


@exercise
def fair_report(answer) -> str:
    """answer: hits (K, N), own (N,), target (K,) -> one of the numbers of target."""
    hits, own = hold_out_hits()
    target = torch.tensor(ON_TARGET, dtype=torch.float64)
    found = ask(answer, hits.clone(), own.clone(), target.clone())
    plain = hits.double().mean(1)
    on_own, on_other = hits[:, own].double().mean(1), hits[:, ~own].double().mean(1)
    expected = on_own / 8 + 7 * on_other / 8
    best = expected.argmax()
    its_hits = plain[best]
    mistakes = {
        "You let the target choose: this is the checkpoint that happens to be best on it. A table "
        "calls that an *oracle*, it peeks.": target.max(),
        "You choose on the hold-out as it is, in which own backgrounds are far too frequent (here "
        "as frequent as in training). This checkpoint reads the background.": target[
            plain.argmax()
        ],
        "You ask other backgrounds only. That is nearly it, but one balanced image in eight stands "
        "on its own.": target[on_other.argmax()],
        "You take the last checkpoint. It has not been chosen by anything.": target[-1],
        "This is what the hold-out expects of the chosen checkpoint. Report what it reaches on the "
        "target.": expected[best],
        "This is an accuracy on the hold-out. It chooses; the table shows the target.": plain.max(),
        "This is the chosen checkpoint's hold-out accuracy. The table shows the target.": its_hits,
        "That is the mean over all checkpoints: one of them must be chosen.": target.mean(),
        "That is the checkpoint's place in the list: return its accuracy, `target[place]`.": best,
    }
    hint = "Expect 1/8 of what a checkpoint reaches on own backgrounds, and 7/8 on others."
    expect(found, target[best], hint, mistakes)
    return "It is not the highest number you could have reported, and it is the one to believe."


def against_the_cue(T, probes, together):
    """A check of answers to exercise 3: the sources' features (N, D), labels (N,) and whether the
    background is the class's own (N,) -> class vectors (C, D). It says how good they are.

    Args: T: CLIP's own vectors (C, D); probes: {target: vectors of section 3}; together: of the
    notebook, gives the images of some domains.
    """

    def accuracy(vectors: dict, part: str, of_sources: bool) -> float:
        """In %, the mean over targets."""
        found = []
        for target, W in vectors.items():
            names = [name for name in probes if (name == target) != of_sources]
            f, y, _ = together(names, part)
            found.append(100 * ((f @ W.T).argmax(1) == y).double().mean().item())
        return float(np.mean(found))

    def sources_of(target):
        return together([name for name in probes if name != target], "train")

    @exercise
    def check(answer) -> str:
        vectors = {}
        for target in probes:
            f, y, own = sources_of(target)
            found = ask(answer, f.clone(), y.clone(), own.clone())
            shape = as_array(found).shape
            if shape != tuple(T.shape):
                need = f"Needed is a vector for each class, {tuple(T.shape)}"
                raise Wrong(f"{need}; this has the shape {shape}.")
            if not np.isfinite(as_array(found)).all():
                raise Wrong("There are numbers that are not finite: did the training diverge?")
            vectors[target] = torch.as_tensor(as_array(found), dtype=T.dtype)
        first, *others = vectors.values()
        if close(first, T):
            raise Wrong("These are CLIP's own vectors, zero-shot: nothing has been learnt.")
        if all(close(first, other) for other in others):
            raise Wrong(
                "Your vectors are the same whatever the sources are. They must come from the `f`, "
                "`y` and `own` that you are given: anything else may have seen the target."
            )
        if all(close(vectors[target], probes[target]) for target in probes):
            raise Wrong("This is the probe of section 3, which takes the cue.")
        zero = dict.fromkeys(probes, T)
        told = []
        for part, of_sources, name in (
            ("balanced", False, "targets"),
            ("hold-out", True, "hold-outs"),
        ):
            numbers = [accuracy(each, part, of_sources) for each in (vectors, probes, zero)]
            yours, probe, clip = (f"{number:.1f} %" for number in numbers)
            told.append(f"on the {name} {yours} (the probe {probe}, zero-shot {clip})")
        return f"Your vectors are right {' and '.join(told)}."

    return check


WRONG = {
    "exercise-1": [
        (
            """
def my_zero_shot(images, texts, tau):
    return (images @ texts.T / tau).softmax(-1)

check.zero_shot(my_zero_shot)
""",
            "not of length 1",
        ),
        (
            """
def my_zero_shot(images, texts, tau):
    f, t = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    return (f @ t.T * tau).softmax(-1)

check.zero_shot(my_zero_shot)
""",
            "multiply by the temperature",
        ),
        (
            """
def my_zero_shot(images, texts, tau):
    f, t = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    return (f @ t.T / tau).softmax(0)

check.zero_shot(my_zero_shot)
""",
            "goes over the images",
        ),
        (
            """
def my_zero_shot(images, texts, tau):
    t = texts / texts.norm(dim=1, keepdim=True)
    return (images @ t.T / tau).softmax(1)

check.zero_shot(my_zero_shot)
""",
            "surer than it is",
        ),
        (
            """
def my_zero_shot(images, texts, tau):
    f, t = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    return (f @ t.T / 0.2).softmax(1)

check.zero_shot(my_zero_shot)
""",
            "another `tau`",
        ),
    ],
    "exercise-2": [
        (
            """
def my_report(hits, own, target):
    return target.max()

check.fair_report(my_report)
""",
            "let the target choose",
        ),
        (
            """
def my_report(hits, own, target):
    return target[hits.double().mean(1).argmax()]

check.fair_report(my_report)
""",
            "reads the background",
        ),
        (
            """
def my_report(hits, own, target):
    return target[hits[:, ~own].double().mean(1).argmax()]

check.fair_report(my_report)
""",
            "one balanced image in eight",
        ),
        (
            """
def my_report(hits, own, target):
    expected = hits[:, own].double().mean(1) / 8 + 7 * hits[:, ~own].double().mean(1) / 8
    return expected.max()

check.fair_report(my_report)
""",
            "what it reaches on the target",
        ),
    ],
    "exercise-3": [
        (
            """
def my_vectors(f, y, own):
    return fine_tune(f, y)

check.against_the_cue(T, probes, together)(my_vectors)
""",
            "takes the cue",
        ),
        (
            """
def my_vectors(f, y, own):
    return fine_tune(*together(["sketch"], "balanced")[:2])

check.against_the_cue(T, probes, together)(my_vectors)
""",
            "may have seen the target",
        ),
        (
            """
def my_vectors(f, y, own):
    return clip.logit_scale * f @ T.T

check.against_the_cue(T, probes, together)(my_vectors)
""",
            "a vector for each class",
        ),
        (
            """
def my_vectors(f, y, own):
    return T

check.against_the_cue(T, probes, together)(my_vectors)
""",
            "nothing has been learnt",
        ),
    ],
}
