"""Checks of the exercises in 05_together, and wrong answers that they must tell from right ones.

A check's argument is what the student wrote.
"""

from __future__ import annotations

import numpy as np
import torch

import common
from notebooks.classroom import Wrong, as_array, ask, exercise, expect

METHODS = ("zero-shot", "ha-lora+dig", "clipood", "ldfs", "div+sel")


@exercise
def allowed(answer) -> str:
    """answer: the names of the methods that may be used with labelled photos and paintings, and
    words for the target."""
    try:
        names = {str(name).lower() for name in answer}
    except TypeError:
        raise Wrong(f"A set of names is needed, this is {answer!r}.") from None
    unknown = sorted(names - {*METHODS})
    if unknown:
        raise Wrong(f"The map has no {unknown[0]!r}. It has: {', '.join(METHODS)}.")
    if "div+sel" in names:
        raise Wrong("DIV+SEL chooses its heads on labelled images of the target: you have none.")
    if "ldfs" not in names:
        raise Wrong(
            "LDFS needs labelled images of one domain and words for the target: you have both."
        )
    if "ha-lora+dig" not in names:
        raise Wrong(
            "HA-LoRA+DIG needs two source domains to compare: photos and paintings are two."
        )
    missing = sorted({*METHODS} - {"div+sel"} - names)
    if missing:
        raise Wrong(f"What would {missing[0]!r} need that you have not?")
    return "Each of these is told no more than you know."


@exercise
def comparison(answer) -> str:
    """answer: accuracies (n,) of two rows -> mean difference and standard error, in points."""
    ours = [0.52, 0.61, 0.43, 0.70]
    theirs = [0.50, 0.60, 0.44, 0.66]
    found = ask(answer, list(ours), list(theirs))
    if any(part is ... or part is None for part in np.ravel(np.array(found, dtype=object))):
        raise Wrong("There is no answer yet: put yours in place of `...`.")
    if as_array(found).shape != (2,):
        raise Wrong(f"Two numbers are needed, mean and standard error; this is {found!r}.")
    gains = 100 * np.subtract(ours, theirs)
    n = len(gains)
    mean, error = gains.mean(), gains.std(ddof=1) / n**0.5
    apart = 100 * np.hypot(np.std(ours, ddof=1), np.std(theirs, ddof=1)) / n**0.5
    mistakes = {
        "These are fractions: a percentage point is 0.01.": (mean / 100, error / 100),
        "The error is that of two unrelated groups. The same seeds made both rows: take "
        "differences within seeds first.": (mean, apart),
        "This is the standard deviation of one difference. The mean of n is surer: divide by the "
        "square root of n.": (mean, gains.std(ddof=1)),
        "The deviation of a sample divides by n - 1 (`ddof=1`): with few seeds it counts.": (
            mean,
            gains.std() / n**0.5,
        ),
        "You divide the standard deviation by n, not by its square root.": (
            mean,
            gains.std(ddof=1) / n,
        ),
        "This is theirs above ours.": (-mean, error),
    }
    expect(found, (mean, error), "Mean and standard error of the differences.", mistakes)
    return f"{mean:+.1f} points, standard error {error:.1f}: four seeds do not settle it."


@exercise
def combination(answer, load_task, others) -> str:
    """answer: task, seed -> an image tower; load_task: seed -> task; others: {seed: tower},
    to be beaten."""
    clip = common.load_clip("tiny")
    gains, names = [], []
    for seed, other in others.items():
        task = load_task(seed)
        class_features = clip.class_features(task.classes)
        tests = {"target": task.tests.pop("target")}  # which a training may not see
        tower = ask(answer, task, seed)
        if not isinstance(tower, torch.nn.Module):
            raise Wrong(
                f"An image tower is needed, an nn.Module; this is a {type(tower).__name__}."
            )
        found = []
        for visual in (tower, other):
            classify = common.clip_classifier(visual.eval(), class_features)
            try:
                found.append(common.evaluate(classify, tests)["target"])
            except Exception as error:  # whatever a student's tower may raise
                raise Wrong(f"Your tower stops with {type(error).__name__}: {error}") from None
        if clip_unchanged(tower, clip):
            raise Wrong("Your tower is CLIP as it came: nothing was learnt.")
        gains.append(100 * (found[0] - found[1]))
        names.append(f"seed {seed}: {gains[-1]:+.1f}")
    return f"Points above the purified tower on the target: {', '.join(names)}."


def clip_unchanged(tower, clip) -> bool:
    state, start = tower.state_dict(), clip.visual.state_dict()
    if state.keys() != start.keys():
        return False
    return all(torch.equal(state[name], start[name]) for name in start)


WRONG = {
    "exercise-1": [
        (
            """
my_methods = {"zero-shot", "clipood", "ldfs", "ha-lora+dig", "div+sel"}

check.allowed(my_methods)
""",
            "labelled images of the target",
        ),
        (
            """
my_methods = {"zero-shot", "clipood", "ha-lora+dig"}

check.allowed(my_methods)
""",
            "words for the target",
        ),
        (
            """
my_methods = {"zero-shot", "clipood", "ldfs"}

check.allowed(my_methods)
""",
            "two source domains",
        ),
    ],
    "exercise-2": [
        (
            """
def my_comparison(ours, theirs):
    ours, theirs = 100 * np.array(ours), 100 * np.array(theirs)
    error = (ours.var(ddof=1) + theirs.var(ddof=1)) ** 0.5 / len(ours) ** 0.5
    return ours.mean() - theirs.mean(), error

check.comparison(my_comparison)
""",
            "within seeds first",
        ),
        (
            """
def my_comparison(ours, theirs):
    gains = 100 * (np.array(ours) - np.array(theirs))
    return gains.mean(), gains.std(ddof=1)

check.comparison(my_comparison)
""",
            "square root of n",
        ),
        (
            """
def my_comparison(ours, theirs):
    gains = np.array(ours) - np.array(theirs)
    return gains.mean(), gains.std(ddof=1) / len(gains) ** 0.5

check.comparison(my_comparison)
""",
            "percentage point",
        ),
        (
            """
def my_comparison(ours, theirs):
    gains = 100 * (np.array(ours) - np.array(theirs))
    return gains.mean(), gains.std() / len(gains) ** 0.5

check.comparison(my_comparison)
""",
            "n - 1",
        ),
    ],
    "exercise-3": [
        (
            """
def my_tower(task, seed):
    return copy.deepcopy(clip.visual)

check.combination(my_tower, load_task, {0: towers[0]["purified"]})
""",
            "nothing was learnt",
        ),
        (
            """
def my_tower(task, seed):
    return train(task, seed, margin=0.0, steps=2)

check.combination(my_tower, load_task, {0: towers[0]["purified"]})
""",
            "An image tower is needed",
        ),
        (
            """
def my_tower(task, seed):
    last, average = train(task, seed, margin=0.0, steps=2)
    images = task.tests["target"]["sketch"]
    return last

check.combination(my_tower, load_task, {0: towers[0]["purified"]})
""",
            "KeyError: 'target'",
        ),
    ],
}
