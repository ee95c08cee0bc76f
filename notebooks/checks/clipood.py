"""Checks of the exercises in 02_clipood, and wrong answers that they must tell from right ones.

A check's argument is what the student wrote.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import vector_to_parameters

import clipood
import common
from notebooks.classroom import Wrong, as_array, ask, exercise, expect


@exercise
def margin_loss(answer) -> str:
    """answer: image (D,), class_features (C, D), y, tau, margin -> the loss of Eq. 3."""
    generator = torch.Generator().manual_seed(2)
    image = F.normalize(torch.randn(3, generator=generator), dim=0)
    features = F.normalize(torch.randn(5, 3, generator=generator), dim=1)
    y, tau, margin = 1, 0.2, 0.4
    found = ask(answer, image, features, y, tau, margin)
    S = features @ image
    D = 1 - features @ features[y]
    other = torch.arange(5) != y

    def loss(logits):
        return logits.logsumexp(0) - logits[y]

    right = loss((S + margin * D) / tau)
    mistakes = {
        "The sign: a probability's logarithm is negative, and the loss is minus it.": -right,
        "A far name looks worse in this, and should look better. Either you take margin * D off, "
        "or you use the similarity of two names in place of their distance: both give the same "
        "loss, since a number that all classes get cancels.": loss((S - margin * D) / tau),
        "The temperature divides the margin too: (S + margin * D) / tau.": loss(
            S / tau + margin * D
        ),
        "Nothing is divided by tau.": loss(S + margin * D),
        "You multiply by tau; divide by it.": loss((S + margin * D) * tau),
        "There is no margin in this: it is the metric softmax of Eq. 2. (A margin that all classes "
        "get, the right one too, cancels.)": loss(S / tau),
        "This margin is the same for all wrong classes. Eq. 3 multiplies it by how far their names "
        "are from the right one.": loss((S + margin * other) / tau),
        "The margin is not multiplied by lambda (`margin`).": loss((S + D) / tau),
        "This is the distance of the image to each name, 1 - S(I, T_c). Eq. 4 takes two names.": (
            loss((S + margin * (1 - S)) / tau)
        ),
        "The sum in the denominator goes over all classes, the right one too.": (
            ((S + margin * D) / tau)[other].logsumexp(0) - S[y] / tau
        ),
        "This is the probability of the right class; its logarithm is missing.": (-right).exp(),
        "These are the logits of all classes; the loss is one number.": (S + margin * D) / tau,
    }
    hint = "Go through Eq. 3 with the four names of section 2.3."
    expect(found, right, hint, mistakes)
    return "A wrong class counts as more similar than it is, the more the further its name."


@exercise
def one_step(answer) -> str:
    """answer: average, theta, t, T, beta -> the average after step t. Its share of theta is what it
    makes of an average of 0 and a theta of 1."""
    T, beta = 6, 0.3
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    shares, rests = [], []
    for t in range(1, T + 1):
        shares.append(number(ask(answer, zero.clone(), one.clone(), t, T, beta)))
        rests.append(number(ask(answer, one.clone(), zero.clone(), t, T, beta)))
    shares, rests = np.array(shares), np.array(rests)
    if not (np.isfinite(shares).all() and np.isfinite(rests).all()):
        raise Wrong(
            "You get numbers that are not finite. For beta < 1 the density is infinite at x = 0 "
            "and at x = 1. Eq. 6 takes the middle of each step, (t + 0.5) / (T + 1), and not t / T."
        )
    if not np.allclose(shares + rests, 1, atol=1e-4):
        raise Wrong(
            f"At t = 1 the average keeps {rests[0]:.3g} and theta gets {shares[0]:.3g}: not 1 "
            "together. Divide both terms by the sum over k <= t."
        )
    t = np.arange(T + 1)
    x = (t + 0.5) / (T + 1)
    alpha = (x * (1 - x)) ** (beta - 1)

    def shares_of(alpha):
        return alpha[1:] / np.cumsum(alpha)[1:]

    later = (t + 1) / (T + 2)
    right = shares_of(alpha)
    mistakes = {
        "The weight of theta_0 is infinite in this: its place is x = 0. Eq. 6 takes "
        "(t + 0.5) / (T + 1).": np.zeros(T),
        "This share is the same in every step: that is an exponential moving average, in which "
        "theta_0 fades away.": np.full(T, shares[0]),
        "You divide by the sum of all weights. Models after step t have not joined yet: sum over "
        "k <= t.": alpha[1:] / alpha.sum(),
        "You divide by the sum over k < t. Theta_t joins now, so its weight is in the sum: "
        "k <= t.": alpha[1:] / np.cumsum(alpha)[:-1],
        "The two are exchanged: theta gets what the average should keep.": 1 - right,
        "Theta_0 is left out: the sum over k <= t begins at 0.": (alpha[1:] / np.cumsum(alpha[1:])),
        "All models count alike in this, whatever beta is.": 1 / (t[1:] + 1),
        "The powers are beta - 1, not beta.": shares_of((x * (1 - x)) ** beta),
        "The places are (t + 0.5) / (T + 1), the middle of each step; yours are "
        "(t + 1) / (T + 2).": shares_of((later * (1 - later)) ** (beta - 1)),
        "You take alpha_t itself as the share: divide by the sum over k <= t.": (
            clipood.beta_weights(T, beta)[1:]
        ),
    }
    hint = "These are your shares s_1 ... s_T of theta_t. Compare s_1 with the table of 2.4."
    expect(shares, right, hint, mistakes)
    return "One copy of the weights, however long the training, and both ends stay in it."


def number(value) -> float:
    value = as_array(value)
    if value.size != 1:
        raise Wrong(f"The new average has the shape of the old one; yours has {value.shape}.")
    return float(value.reshape(()))


def own_average(trajectory, clip, row, task):
    """A check of answers to exercise 3: T, score -> weights (T + 1,) of the models on a trajectory
    (T + 1, number of weights). It says how good their average is."""
    T = len(trajectory) - 1
    validation = common.Task(task.classes, task.train, {"validation": task.tests["validation"]})

    def tower(weights):
        weights = as_array(weights)
        if weights.shape != (T + 1,):
            raise Wrong(
                f"One weight for each of the T + 1 = {T + 1} models from theta_0 to theta_T is "
                f"needed; yours have the shape {weights.shape}."
            )
        if not np.isfinite(weights).all():
            raise Wrong(
                "Some weights are not finite. (The Beta density is infinite at 0 and at 1.)"
            )
        if abs(weights.sum()) < 1e-6:
            raise Wrong("These weights add up to 0, so they cannot be scaled to add up to 1.")
        weights = torch.tensor(weights / weights.sum(), dtype=torch.float32)
        model = copy.deepcopy(clip.visual)
        vector_to_parameters(weights @ trajectory, model.parameters())
        return model

    def score(weights) -> float:
        return clipood.test(clip, tower(weights), row, validation)["validation"]

    def harmonic(weights) -> str:
        found = clipood.test(clip, tower(weights), row, task)
        base, new, H = (100 * found[measure] for measure in ("base", "new", "H"))
        return f"H {H:.1f} (base {base:.1f}, new {new:.1f})"

    @exercise
    def check(answer) -> str:
        weights = ask(answer, T, score)
        own = harmonic(weights)
        ends = torch.eye(T + 1)
        bma = harmonic(clipood.beta_weights(T, row.beta))
        zero_shot, last = harmonic(ends[0]), harmonic(ends[T])
        return (
            f"Your average, in %: {own}. The beta average: {bma}; zero-shot: {zero_shot}; the last "
            f"model: {last}."
        )

    return check


WRONG = {
    "exercise-1": [
        (
            """
def my_loss(image, class_features, y, tau, margin):
    S = class_features @ image
    logits = (S + margin * class_features @ class_features[y]) / tau
    return -logits.log_softmax(0)[y]

check.margin_loss(my_loss)
""",
            "in place of their distance",
        ),
        (
            """
def my_loss(image, class_features, y, tau, margin):
    S = class_features @ image
    logits = (S + margin) / tau
    return -logits.log_softmax(0)[y]

check.margin_loss(my_loss)
""",
            "the right one too, cancels",
        ),
        (
            """
def my_loss(image, class_features, y, tau, margin):
    logits = class_features @ image / tau
    logits = logits + margin * (1 - class_features @ class_features[y])
    return torch.nn.functional.cross_entropy(logits[None], torch.tensor([y]))

check.margin_loss(my_loss)
""",
            "temperature divides the margin too",
        ),
        (
            """
def my_loss(image, class_features, y, tau, margin):
    S = class_features @ image
    D = 1 - class_features @ class_features[y]
    return ((S - margin * D) / tau).exp().sum().log() - S[y] / tau

check.margin_loss(my_loss)
""",
            "take margin * D off",
        ),
        (
            """
def my_loss(image, class_features, y, tau, margin):
    total = 0
    for c in range(len(class_features)):
        if c != y:
            D = 1 - class_features[y] @ class_features[c]
            total += torch.exp((image @ class_features[c] + margin * D) / tau)
    return -torch.log(torch.exp(image @ class_features[y] / tau) / total)

check.margin_loss(my_loss)
""",
            "goes over all classes",
        ),
    ],
    "exercise-2": [
        (
            """
def my_update(average, theta, t, T, beta):
    return (1 - beta) * average + beta * theta

check.one_step(my_update)
""",
            "exponential moving average",
        ),
        (
            """
def my_update(average, theta, t, T, beta):
    x = torch.arange(t + 1, dtype=torch.float64) / T
    alpha = (x * (1 - x)) ** (beta - 1)
    share = alpha[t] / alpha.sum()
    return (1 - share) * average + share * theta

check.one_step(my_update)
""",
            "not finite",
        ),
        (
            """
def my_update(average, theta, t, T, beta):
    x = (torch.arange(T + 1) + 0.5) / (T + 1)
    alpha = torch.distributions.Beta(beta, beta).log_prob(x).exp()
    share = alpha[t] / alpha.sum()
    return (1 - share) * average + share * theta

check.one_step(my_update)
""",
            "have not joined yet",
        ),
        (
            """
def my_update(average, theta, t, T, beta):
    x = (torch.arange(t + 1) + 0.5) / (T + 1)
    alpha = torch.distributions.Beta(beta, beta).log_prob(x).exp()
    return (alpha[:t].sum() * average + alpha[t] * theta) / alpha[:t].sum()

check.one_step(my_update)
""",
            "not 1 together",
        ),
        (
            """
def my_update(average, theta, t, T, beta):
    return (t * average + theta) / (t + 1)

check.one_step(my_update)
""",
            "whatever beta is",
        ),
    ],
    "exercise-3": [
        (
            """
def my_weights(T, score):
    return clipood.average_shares("bma", 0.5, T)

check.own_average(trajectory, clip, settings["mms"], task)(my_weights)
""",
            "One weight for each",
        ),
        (
            """
def my_weights(T, score):
    x = np.arange(T + 1) / T
    with np.errstate(divide="ignore"):
        return (x * (1 - x)) ** -0.5

check.own_average(trajectory, clip, settings["mms"], task)(my_weights)
""",
            "not finite",
        ),
        (
            """
def my_weights(T, score):
    weights = torch.zeros(T + 1)
    weights[0], weights[T] = -1, 1
    return weights

check.own_average(trajectory, clip, settings["mms"], task)(my_weights)
""",
            "add up to 0",
        ),
    ],
}
