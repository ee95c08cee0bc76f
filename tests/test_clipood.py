"""CLIPood against explicit sums, slow loops, closed forms, finite differences; its command."""

import copy
import functools
import hashlib
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import write_image
from torch import nn

import clipood
import common
from clipood import (
    BetaMovingAverage,
    average_shares,
    beta_weights,
    class_distances,
    margin_metric_softmax,
)
from support import tiny_world


# ---------- Margin metric softmax ----------------------------------------------------------------
def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
def test_margin_metric_softmax_equals_a_loop(margin):
    images, classes, tau = unit(6, 8), unit(4, 8, seed=1), 0.07
    labels = torch.tensor([0, 3, 1, 1, 2, 0])
    losses = []
    for x, y in zip(images, labels):
        denominator = 0
        for text in classes:
            similarity = float(x @ text)
            distance = 1 - float(classes[y] @ text)
            denominator += math.exp((similarity + margin * distance) / tau)
        losses.append(-math.log(math.exp(float(x @ classes[y]) / tau) / denominator))
    loss = margin_metric_softmax(images, classes, labels, 1 / tau, margin)
    assert loss.shape == () and loss.item() == pytest.approx(np.mean(losses), rel=1e-12)


def test_margin_metric_softmax_gradient():
    free = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    classes, labels = unit(3, 5), torch.tensor([0, 1, 2, 1])

    def loss(x):
        return margin_metric_softmax(F.normalize(x, dim=-1), classes, labels, 5.0, 0.4)

    assert torch.autograd.gradcheck(loss, free)


def test_margin_of_float32_features_is_symmetric_and_zero_for_the_class_itself():
    features = unit(50, 512).float()
    features[7] = features[3]  # two names with the same meaning
    distances = class_distances(features)
    assert torch.equal(distances, distances.T) and torch.equal(distances.diag(), torch.zeros(50))
    assert distances.min() >= 0 and distances.max() <= 2 and distances[3, 7] < 1e-6
    exact = 1 - float(features[0].double() @ features[1].double())
    assert distances[0, 1].item() == pytest.approx(exact, abs=1e-6)


def test_margin_metric_softmax_refuses_bad_input():
    for images, classes, margin in (
        (unit(2, 4), unit(3, 5), 0.3),
        (unit(2, 4), unit(3, 4), -0.1),
        (unit(4), unit(3, 4), 0),
    ):
        with pytest.raises(ValueError, match="margin"):
            margin_metric_softmax(images, classes, torch.zeros(2, dtype=torch.long), 10, margin)


# ---------- Averages -----------------------------------------------------------------------------
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_beta_weights_are_the_density(beta):
    scale = math.gamma(2 * beta) / math.gamma(beta) ** 2
    for steps in (7, 5000):
        x = (np.arange(steps + 1) + 0.5) / (steps + 1)
        weights = beta_weights(steps, beta)
        assert weights.dtype == torch.float64
        expected = scale * (x * (1 - x)) ** (beta - 1)
        assert weights.numpy() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps, beta", [(0, 0.5), (3, 0), (3, -1), (3, math.nan), (3, math.inf)])
def test_beta_weights_refuse_bad_input(steps, beta):
    with pytest.raises(ValueError, match="beta"):
        beta_weights(steps, beta)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def walk(self, scale=0.3):
        """A step of training, as far as an average can see."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += scale * torch.randn_like(parameter)
            self.layers[1].num_batches_tracked += 1


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


def walk(steps, dtype=torch.float64, **average):
    """Yield, on a random trajectory: the average so far, theta_0 ... theta_t, and the model."""
    torch.manual_seed(0)
    model = Toy().to(dtype)
    running, trajectory = BetaMovingAverage(model, steps, **average), [flat(model)]
    for _ in range(steps):
        model.walk()
        running.update(model)
        trajectory.append(flat(model))
        yield running, torch.stack(trajectory), model


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_running_average_is_the_weighted_mean_of_the_trajectory(beta):
    """Eq. 5 after every step; beta = 1 is the plain mean."""
    alpha = beta_weights(40, beta)
    for running, trajectory, model in walk(40, beta=beta):  # noqa: B007
        t = len(trajectory)
        expected = alpha[:t] @ trajectory / alpha[:t].sum()
        assert torch.allclose(flat(running.model), expected, rtol=1e-10, atol=0)
        if beta == 1:
            assert torch.allclose(expected, trajectory.mean(0), rtol=1e-12, atol=0)
        assert running.model.layers[1].num_batches_tracked == t - 1
    with pytest.raises(IndexError):
        running.update(model)
    weights, of_start = clipood.weights_in_average("bma", beta, 40)
    assert torch.allclose(weights, alpha / alpha.sum(), rtol=1e-12)
    assert of_start == pytest.approx((alpha[0] / alpha.cumsum(0)).tolist(), rel=1e-12)


@pytest.mark.parametrize(
    "average, value, weights",
    [
        ("ema", 0.9, [0.9**12] + [0.1 * 0.9 ** (12 - t) for t in range(1, 13)]),
        ("uniform", 0, [0] + [1 / 12] * 12),
        ("wise-ft", 0.3, [0.7] + [0] * 11 + [0.3]),
    ],
)
def test_other_averages(average, value, weights):
    shares = average_shares(average, value, 12)
    *_, (running, trajectory, _) = walk(12, shares=shares)
    expected = torch.tensor(weights, dtype=torch.float64)
    assert torch.allclose(flat(running.model), expected @ trajectory, rtol=1e-10, atol=1e-12)
    found, of_start = clipood.weights_in_average(average, value, 12)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert len(of_start) == 13 and of_start[-1] == pytest.approx(weights[0])
    if average != "uniform":
        with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
            average_shares(average, 1.5, 12)


def test_half_precision_models_are_averaged_in_float32():
    *_, (running, trajectory, model) = walk(200, torch.bfloat16)
    weights = beta_weights(200, 0.5)
    expected = weights @ trajectory / weights.sum()
    assert all(parameter.dtype == torch.float32 for parameter in running.model.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert torch.allclose(flat(running.model), expected, rtol=1e-5, atol=1e-5)


def test_average_is_one_copy_changed_in_place():
    model = Toy()
    running = BetaMovingAverage(model, 3, 0.5)
    places = [parameter.data_ptr() for parameter in running.parameters()]
    assert not set(places) & {parameter.data_ptr() for parameter in model.parameters()}
    assert flat(running).numel() == flat(model).numel()
    model.walk()
    running.update(model)
    assert [parameter.data_ptr() for parameter in running.parameters()] == places
    assert not any(parameter.requires_grad for parameter in running.parameters())


# ---------- Rows ---------------------------------------------------------------------------------
def settings(arguments=""):
    """The command's settings and {row: its settings}."""
    return clipood.settings(arguments.split())


def rows_of(*names, arguments=""):
    _, rows = settings(f"{arguments} --modes {' '.join(names)}")
    return rows


def test_rows_are_a_loss_and_an_average_with_numbers():
    rows = rows_of("zero-shot", "ms+bma/beta=0.1", "mms/margin=0.5", "linear+ema/ema=0.9", "mms")
    found = [(row.loss, row.margin, row.average) for row in rows.values()]
    assert found == [
        ("zero-shot", 0.3, None),
        ("ms", 0.0, "bma"),
        ("mms", 0.5, None),
        ("linear", 0.3, "ema"),
        ("mms", 0.3, None),
    ]
    assert rows["ms+bma/beta=0.1"].beta == 0.1 and rows["linear+ema/ema=0.9"].ema == 0.9


def test_rows_of_one_loss_share_a_training():
    names = ["mms", "linear", "ms", "ms+bma", "mms/margin=0.5", "ms+ema", "zero-shot", "mms+bma"]
    groups = clipood.trainings(rows_of(*names))
    expected = "mms mms+bma, linear, ms ms+bma ms+ema, mms/margin=0.5, zero-shot"
    assert ", ".join(" ".join(group) for group in groups) == expected


# batch size, learning rate, epochs, lambda, beta; also of what the paper does not publish
SETTINGS = [
    ("domain-shift", "pacs vlcs terra", (12, 5e-6, 10, 0.3, 0.5)),
    ("domain-shift", "officehome", (12, 1e-5, 10, 0.3, 0.5)),
    ("domain-shift", "domainnet", (12, 1e-5, 20, 0.3, 0.5)),
    ("domain-shift", "imagenet", (36, 5e-6, 10, 0.3, 0.5)),
    ("domain-shift", "folder:x", (12, 5e-6, 10, 0.3, 0.5)),
    ("open-class", "imagenet fgvcaircraft", (36, 5e-6, 10, 0.3, 0.1)),
    ("open-class", "stanfordcars sun397", (36, 5e-6, 5, 0.3, 0.1)),
    ("open-class", "ucf101", (36, 5e-6, 2, 0.3, 0.1)),
    ("open-class", "caltech101 oxfordpets oxfordflowers", (36, 5e-6, 1, 0.3, 0.1)),
    ("open-class", "food101 dtd eurosat folder:x", (36, 5e-6, 1, 0.3, 0.1)),
    ("open-class", "tiny-office", (36, 4e-4, 2, 0.3, 0.1)),
    ("in-the-wild", "officehome", (12, 3e-6, 10, 0.1, 0.1)),
    ("in-the-wild", "domainnet", (12, 5e-6, 20, 0.1, 0.5)),
]


@pytest.mark.parametrize("task, names, expected", SETTINGS)
def test_settings_by_task_and_data_set(task, names, expected):
    for name in names.split():
        args, _ = settings(f"--dataset {name} --task {task}")
        assert (args.batch_size, args.lr, args.epochs, args.margin, args.beta) == expected
        assert args.weight_decay == 0.1 and args.shots == 16
        assert args.steps_per_epoch == (20 if args.model == "tiny" else 500)


# ---------- Few shots, base and new classes ------------------------------------------------------
@pytest.mark.parametrize("n, base, wild", [(2, 1, 1), (7, 4, 3), (8, 4, 4), (65, 33, 32)])
def test_base_and_new_classes(n, base, wild):
    assert common.base_and_new(n) == (range(base), range(base, n))
    assert common.base_and_new(n, odd_to_base=False) == (range(wild), range(wild, n))
    with pytest.raises(common.InputError, match="at least 2 classes"):
        common.base_and_new(1)


def toy_images(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    numbers = torch.arange(len(labels), dtype=torch.uint8)
    pixels = numbers.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return common.ImageSet(pixels, labels, tuple("abcdefgh"[: len(counts)]))


def test_harmonic_mean():
    assert clipood.harmonic_mean(0.6, 0.3) == pytest.approx(2 / (1 / 0.6 + 1 / 0.3))
    assert clipood.harmonic_mean(0, 0) == 0


def test_few_shots(capsys):
    images = toy_images([20, 30, 5])
    chosen = common.few_shot(images, 16, seed=3)
    assert chosen.labels.bincount().tolist() == [16, 16, 5]
    assert len(set(chosen.images[:, 0, 0, 0].tolist())) == 37  # nothing twice
    assert "class 'c' has only 5 images, fewer than 16 shots" in capsys.readouterr().out
    assert torch.equal(chosen.images, common.few_shot(images, 16, seed=3).images)
    assert not torch.equal(chosen.images, common.few_shot(images, 16, seed=4).images)
    with pytest.raises(common.InputError, match="no image of class 'b'"):
        common.few_shot(toy_images([2, 0, 3]), 1, seed=0)


# ---------- Tasks, training, testing -------------------------------------------------------------
def toy_domains(names=("a", "b", "c"), balanced=False):
    """Domains whose every pixel tells domain, class and place: 64 * domain + 10 * class + place."""
    domains = []
    for index, name in enumerate(names):
        labels = torch.arange(5).repeat_interleave(10)
        numbers = (64 * index + torch.arange(50)).to(torch.uint8)
        pixels = numbers.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        images = common.ImageSet(pixels, labels, tuple("vwxyz"))
        half = images.subset(range(0, 50, 2)) if balanced else None
        domains.append(common.Domain(name, images, half))
    return domains


def toy_task(arguments, target, seed=0, balanced=False):
    """The task of a command line on toy domains."""
    args, _ = settings(arguments)
    return clipood.make_task(args, toy_domains(balanced=balanced), target, seed)


def values(images):
    return images.images[:, 0, 0, 0].tolist()


def test_domain_shift_task():
    task = toy_task("--dataset pacs", "b")
    assert list(task.train) == ["a", "c"]
    assert list(task.tests) == ["hold-out", "target"]
    target = task.tests["target"]["b"]
    assert values(target) == list(range(64, 114))
    held_out = values(task.tests["hold-out"]["c"])
    assert sorted(values(task.train["c"]) + held_out) == list(range(128, 178))
    official = toy_task("--dataset pacs --protocol official", "b").tests["target"]["b"]
    assert values(official) == [64 + i for i in common.domain_split(50, 1)[0]]
    assert len(official) == 10
    tiny = toy_task("--dataset tiny-pacs", "b", balanced=True)
    assert list(tiny.tests) == ["hold-out", "source", "target"]
    assert len(tiny.tests["target"]["b"]) == 25


def test_in_the_wild_task():
    """Five classes: two base, three new. Nothing new and nothing of the target is trained on."""
    line = "--dataset officehome --task in-the-wild"
    task = toy_task(line, "c")
    assert list(task.train) == ["a", "b"] and task.train["a"].classes == ("v", "w")
    held_out, rest = common.domain_split(20, 1, part="base")
    assert values(task.train["b"]) == [64 + i for i in rest]
    assert values(task.tests["hold-out"]["b"]) == [64 + i for i in held_out]
    total = task.tests["total"]
    assert list(task.tests) == ["hold-out", "total"] and list(total) == ["base", "new"]
    assert values(total["base"]) == list(range(128, 148))
    assert values(total["new"]) == list(range(148, 178))
    assert total["new"].labels.min() == 2  # scored over the names of all classes
    assert {images.classes for images in total.values()} == {tuple("vwxyz")}
    # the authors' converter puts in- and out-splits together again: the whole target
    official = toy_task(f"{line} --protocol official", "c").tests["total"]
    assert values(official["new"]) == values(total["new"])


def test_base_and_open_parts_have_splits_of_their_own():
    splits = [common.domain_split(30, 2, part=part)[0].tolist() for part in ("base", "open", "")]
    first, second, plain = splits
    assert first != second != plain != first
    seed = int(hashlib.md5(b"(0, 2, 'open')").hexdigest(), 16) % 2**31
    order = list(range(30))
    np.random.RandomState(seed).shuffle(order)
    assert second == order[:6]


def test_open_class_task():
    """Five classes: three base, two new; four validation images of each."""
    task = toy_task("--dataset folder:nowhere --task open-class --shots 5", "b", seed=7)
    train = task.train["b"]
    assert list(task.train) == ["b"] and train.classes == ("v", "w", "x")
    assert train.labels.bincount().tolist() == [5, 5, 5]
    tests = {name: sets["b"] for name, sets in task.tests.items()}
    assert tests["base"].classes == ("v", "w", "x") and tests["new"].classes == ("y", "z")
    assert tests["new"].labels.min() == 0
    assert set(values(tests["new"])) < set(range(94, 114))
    assert not set(values(train)) & set(values(tests["base"]))
    assert tests["validation"].labels.bincount().max() <= 4


def test_validation_images_of_imagenet_are_all_its_test_images():
    parts = {"train": toy_images([9, 9, 9, 9]), "val": toy_images([9, 9, 9, 9])}
    parts["test"] = parts["val"]
    for name, images in (("imagenet", 18), ("sun397", 8)):
        task = common.open_class(parts, name, 5, seed=0)
        assert len(task.tests["validation"][name]) == images
        assert len(task.tests["base"][name]) == 18


@pytest.mark.parametrize("loss", ["coop", "cocoop"])
def test_learned_prompts_also_name_classes_that_were_not_trained(loss, monkeypatch):
    monkeypatch.setitem(clipood.PROMPT_SGD, "lr", 0.1)
    clip, task, rows, features = small_run(loss, arguments="--epochs 1")
    models = clipood.train(clip, task, rows, features, seed=0)
    images = task.train["photo"].subset(range(3))
    for names in (task.classes, ("house", "tree", "dog")):
        classify = clipood.classifier(clip, models[loss], rows[loss], task.classes, names)
        scores = classify(clip.preprocess(images.images))
        assert scores.shape == (3, len(names)) and scores.isfinite().all()
        start = clip.logit_scale * clip.encode(images) @ clip.class_features(names).T
        assert not torch.allclose(scores, start, atol=1e-2)
    own = dict(models[loss].named_parameters())
    assert all(name.startswith("prompts.") for name in own)  # of the tower nothing is trained


def test_linear_classifier_names_only_what_it_was_trained_on():
    row = rows_of("linear")["linear"]
    clip, model = common.load_clip("tiny"), nn.Identity()
    classify = clipood.classifier(clip, model, row, ("a", "b"), ("b", "new", "a"))
    found = classify(torch.tensor([[1.0, 2.0], [4.0, 3.0]])).tolist()
    assert found == [[2, -math.inf, 1], [3, -math.inf, 4]]
    assert clipood.classifier(clip, model, row, ("a", "b"), ("c", "d")) is None


def small_run(*names, arguments=""):
    """A CLIP, a task of two tiny domains that are augmented at random, rows, class features."""
    rows = rows_of(*names, arguments=f"--batch-size 4 --steps-per-epoch 3 {arguments}")
    clip, rng = common.load_clip("tiny"), tiny_world.tiny_rng(0, "small run")
    classes, train = tiny_world.PACS_CLASSES, {}
    for domain in ("photo", "cartoon"):
        things = [name for name in classes for _ in range(8)]
        grounds, colors = ["grass"] * len(things), ["red"] * len(things)
        pixels = tiny_world.draw(things, domain, grounds, colors, rng)
        labels = torch.arange(7).repeat_interleave(8)
        train[domain] = common.ImageSet(pixels, labels, classes, transform=clip.augment)
    return clip, common.Task(classes, train, {}), rows, clip.class_features(classes)


def test_training_moves_the_tower_by_the_gradient_of_the_loss():
    """One step without decay or momentum yet: AdamW's first is -lr * sign of the gradient."""
    arguments = "--epochs 1 --steps-per-epoch 1 --weight-decay 0 --lr 1e-4"
    clip, task, rows, features = small_run("mms", arguments=arguments)
    tower_after = clipood.train(clip, task, rows, features, seed=5)["mms"]
    images, labels = next(common.source_batches(task.train, 4, 5000))
    tower = copy.deepcopy(clip.visual).requires_grad_(True)
    image_features = F.normalize(tower(images), dim=-1)
    margin_metric_softmax(image_features, features, labels, clip.logit_scale, 0.3).backward()
    for before, after in zip(tower.parameters(), tower_after.parameters()):
        large = before.grad.abs() > 1e-5
        expected = -1e-4 * before.grad.sign()[large]
        assert torch.allclose((after - before)[large], expected, rtol=5e-2, atol=1e-7)
    assert not torch.equal(flat(tower_after), flat(clip.visual))


def test_float16_storage_is_the_authors_loop():
    """Their step written out: weights are float16; they become float32 for AdamW, and back."""
    arguments = "--epochs 2 --lr 5e-6 --storage float16"
    clip, task, rows, features = small_run("mms+bma", "mms", arguments=arguments)
    models = clipood.train(clip, task, rows, features, seed=2)
    stored = copy.deepcopy(clip.visual)
    open_clip.model.convert_weights_to_lp(stored)  # theirs: OpenAI's function of this name
    stored, mean = list(stored.parameters()), [p.clone() for p in stored.parameters()]
    assert {weight.dtype for weight in stored} == {torch.float16, torch.float32}
    tower = copy.deepcopy(clip.visual).requires_grad_(True)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=5e-6, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    alpha = beta_weights(6, 0.5)
    for t in range(1, 7):
        if t in (1, 4):  # an epoch of three steps
            batches = common.source_batches(task.train, 4, 2000 + t // 4)
        images, labels = next(batches)
        for weight, own in zip(tower.parameters(), stored):
            weight.data = own.float()
        image_features = F.normalize(tower(images), dim=-1)
        loss = margin_metric_softmax(image_features, features, labels, clip.logit_scale, 0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        share = (alpha[t] / alpha[: t + 1].sum()).item()
        for i, weight in enumerate(tower.parameters()):
            stored[i] = weight.data.to(stored[i].dtype)
            lerp = mean[i].float() + share * (stored[i].float() - mean[i].float())
            mean[i] = lerp.to(mean[i].dtype)
    for found, own in zip(models["mms"].parameters(), stored):
        assert torch.equal(found, own.float())
    for found, own in zip(models["mms+bma"].parameters(), mean):
        assert torch.allclose(found, own.float(), rtol=1e-3, atol=1e-7)  # a last digit of float16
    moved = clipood.share_moved(models["mms"], clip.visual)
    assert 0 < moved < 0.3  # the published rate moves few such weights
    full = small_run("mms", arguments="--epochs 1 --lr 5e-6")
    towers = clipood.train(*full, seed=2)
    assert clipood.share_moved(towers["mms"], clip.visual) > 0.99


def test_norms_with_statistics_keep_those_of_clip():
    clip, task, rows, features = small_run("mms", arguments="--epochs 1")
    layers = [nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 64)]
    clip = replace(clip, visual=nn.Sequential(*layers).eval())
    models = clipood.train(clip, task, rows, features, seed=0)
    norm = models["mms"][1]
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(8))
    assert not torch.equal(norm.weight, torch.ones(8))


def test_official_protocol_resizes_bilinearly_and_stores_float16():
    assert settings("--protocol official")[0].storage == "float16"
    assert settings()[0].storage == "float32"
    for interpolation in (None, "bilinear"):
        clip = common.load_clip("tiny", interpolation=interpolation)
        expected = interpolation or "bicubic"
        assert clip.config["preprocess_cfg"]["interpolation"] == expected
        for transform in (clip.preprocess.transforms[0], clip.augment):
            assert transform.interpolation.value == expected


def test_averages_do_not_change_the_trajectory_and_wise_ft_is_the_middle():
    towers = {}
    for names in (["mms"], ["mms", "mms+bma/beta=1", "mms+wise-ft", "mms+uniform"]):
        clip, task, rows, features = small_run(*names, arguments="--epochs 1")
        models = clipood.train(clip, task, rows, features, seed=0)
        towers[len(names)] = {name: flat(tower) for name, tower in models.items()}
    end, start = towers[4], flat(clip.visual)
    assert torch.equal(towers[1]["mms"], end["mms"])
    assert torch.allclose(end["mms+wise-ft"], (start + end["mms"]) / 2, atol=1e-7)
    # beta = 1 weighs theta_0 ... theta_3 alike, uniform theta_1 ... theta_3
    assert torch.allclose(4 * end["mms+bma/beta=1"], start + 3 * end["mms+uniform"], atol=1e-5)


class Checkpoints(SimpleNamespace):
    """In place of a run: keeps every checkpoint, as a file would."""

    def __init__(self, state=None):
        super().__init__(state=state or {}, extra={}, saved=[])

    def save(self, state):
        self.saved.append(copy.deepcopy(state))


def test_training_goes_on_exactly_from_a_checkpoint():
    small = small_run("linear", "linear+bma", "linear+ema", arguments="--epochs 2")
    run = Checkpoints()
    models = clipood.train(*small, seed=1, run=run)
    torch.randn(3)  # whatever happened to the random state
    again = clipood.train(*small, seed=1, run=Checkpoints(run.saved[0]))
    for name, model in models.items():
        assert torch.equal(flat(again[name]), flat(model))


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint_has_it():
    small, run = small_run("mms", "mms+bma", arguments="--epochs 4 --lr 1e20"), Checkpoints()
    with pytest.raises(common.InputError, match="epoch 1: the loss is nan.*lower it"):
        clipood.train(*small, seed=0, run=run)
    assert not run.saved


# ---------- The command --------------------------------------------------------------------------
QUICK = "--model tiny --templates {} --epochs 1 --steps-per-epoch 2 --batch-size 4 --workers 0"


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture
def command(call_main):
    return functools.partial(call_main, clipood.main)


@pytest.fixture
def two_domains(tmp_path):
    """Two domains with two classes of three images each. Returns: --dataset folder:..."""
    for shade, domain in enumerate(("art", "photo")):
        for name in ("dog", "house"):
            for i in range(3):
                write_image(tmp_path / "own" / domain / name / f"{i}.jpg", 90 * shade + 30 * i)
    return f"--dataset folder:{tmp_path / 'own'}"


def test_run_on_tiny_data(command, small_world, tmp_path):
    """Table, files, and a model that open_clip loads with the reported accuracy."""
    output = command("--epochs 1 --steps-per-epoch 2 --lr 3e-3")
    rows = re.findall(r"^(\S+) +\d\d\.\d +\d\d\.\d +\d\d\.\d$", output, re.M)
    assert rows == ["zero-shot", "mms", "mms+wise-ft", "mms+bma"]
    folder = tmp_path / "runs" / "clipood" / "tiny-pacs-sketch-seed0"
    assert {file.name for file in folder.iterdir()} == {"result.json", "model"}
    plain = open_clip.create_model(f"local-dir:{folder / 'model'}").eval()
    clip, target = common.load_clip("tiny"), common.tiny_domain("tiny-pacs", "sketch", 0, 0.4)
    features = torch.from_numpy(np.load(folder / "model" / "class_features.npy"))
    images = clip.preprocess(target.balanced.images)
    scores = plain.encode_image(images, normalize=True) @ features.T
    accuracy = (scores.argmax(1) == target.balanced.labels).double().mean().item()
    assert accuracy == result(folder)["rows"]["mms+bma"]["target"]
    assert result(folder)["rows"]["zero-shot"]["target"] != accuracy


def test_all_targets_and_seeds(command, two_domains, tmp_path):
    """Tables over targets and seeds; a run gives the same numbers again, whatever ran before."""
    line = f"{two_domains} --modes mms mms+bma --eval-every 1 {QUICK} --seeds 0 1 --summary"
    output = command(f"{line} all.json --target all")
    assert "4 runs, %" in output and "±" in output
    records = json.loads((tmp_path / "all.json").read_text())["records"]
    order = [(target, seed) for seed in (0, 1) for target in ("art", "photo")]
    assert [(record["target"], record["seed"]) for record in records] == order
    command(f"{line} again.json --target photo")
    assert json.loads((tmp_path / "again.json").read_text())["records"] == records[1::2]


def test_study_of_averages_follows_every_row(command, two_domains, tmp_path):
    output = command(f"{two_domains} --target photo --study average {QUICK}")
    (name,) = (file.stem for file in (tmp_path / "results").glob("*.json"))
    assert name.startswith("clipood-average-folder") and name.endswith("domain-shift")
    assert (tmp_path / "results" / f"{name}.png").stat().st_size > 1000
    for row in clipood.STUDIES["average"]:
        assert re.search(rf"^{re.escape(row)} +\d", output, re.M), row
    (folder,) = (tmp_path / "runs" / "clipood" / "average").iterdir()
    steps = {}
    for row, extra in result(folder)["extra"].items():
        if "history" in extra:
            steps[row] = [point["step"] for point in extra["history"]]
    assert steps == dict.fromkeys(clipood.STUDIES["average"][1:], [0, 2])


def test_open_class(command, caltech, tmp_path):
    where = f"--dataset caltech101 --data-root {caltech}"
    output = command(f"{where} --modes zero-shot linear mms+bma {QUICK}")
    assert "class 'boat' has only 3 images, fewer than 16" in output
    rows = result(tmp_path / "runs" / "clipood" / "caltech101-open-class-caltech101-seed0")["rows"]
    assert list(rows["mms+bma"]) == ["validation", "base", "new", "H"]
    base, new, h = (rows["mms+bma"][measure] for measure in ("base", "new", "H"))
    assert h == pytest.approx(2 * base * new / (base + new) if base + new else 0)
    assert list(rows["linear"]) == ["validation", "base"]


def test_shifts_of_imagenet(command, imagenet, tmp_path):
    command(f"--dataset imagenet --data-root {imagenet} --modes linear mms+bma {QUICK}")
    rows = result(tmp_path / "runs" / "clipood" / "imagenet-imagenet-seed0")["rows"]
    assert list(rows["mms+bma"]) == ["imagenet", *common.IMAGENET_SHIFTS, "average OOD"]
    shifts = [rows["linear"][name] for name in common.IMAGENET_SHIFTS]
    assert rows["linear"]["average OOD"] == pytest.approx(sum(shifts) / 4)


def test_in_the_wild(command, pacs_tree, tmp_path):
    where = f"--dataset pacs --data-root {pacs_tree} --target photo --task in-the-wild"
    command(f"{where} --modes linear ms {QUICK}")
    rows = result(tmp_path / "runs" / "clipood" / "pacs-in-the-wild-photo-seed0")["rows"]
    assert list(rows["ms"]) == ["hold-out", "base", "new", "total", "H"]
    assert rows["linear"]["new"] == rows["linear"]["H"] == 0
    # three and four classes of three images
    total = (9 * rows["ms"]["base"] + 12 * rows["ms"]["new"]) / 21
    assert rows["ms"]["total"] == pytest.approx(total)
