"""CLIPood against explicit sums, slow loops, closed forms, finite differences; its command."""

import copy
import functools
import hashlib
import json
import math
import re
import shutil

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import call, readme_script
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

# ---------- Margin metric softmax ---------------------------------------------------------------


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
def test_margin_metric_softmax_equals_a_loop(margin):
    images, classes, tau = unit(6, 8), unit(4, 8, seed=1), 0.07
    labels = torch.tensor([0, 3, 1, 1, 2, 0])
    losses = []
    for x, y in zip(images, labels.tolist()):
        cosine = [sum(float(a) * float(b) for a, b in zip(x, t)) for t in classes]
        distance = [1 - sum(float(a) * float(b) for a, b in zip(classes[y], t)) for t in classes]
        denominator = sum(math.exp((s + margin * d) / tau) for s, d in zip(cosine, distance))
        losses.append(-math.log(math.exp(cosine[y] / tau) / denominator))
    loss = margin_metric_softmax(images, classes, labels, 1 / tau, margin)
    assert loss.shape == () and loss.item() == pytest.approx(sum(losses) / 6, rel=1e-12)


def test_without_margin_it_is_cross_entropy():
    images, classes, labels = unit(5, 8), unit(3, 8, seed=1), torch.tensor([0, 2, 1, 1, 0])
    expected = F.cross_entropy(20 * images @ classes.T, labels)
    without = margin_metric_softmax(images, classes, labels, 20, 0)
    assert without.item() == pytest.approx(expected.item(), rel=1e-14)
    assert margin_metric_softmax(images, classes, labels, 20, 0.3) > expected  # all D > 0 here


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


# ---------- Averages ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "beta, density",
    [
        (0.5, lambda x: 1 / (math.pi * math.sqrt(x * (1 - x)))),
        (1.0, lambda x: 1.0),
        (2.0, lambda x: 6 * x * (1 - x)),
    ],
)
def test_beta_weights_closed_forms(beta, density):
    weights = beta_weights(7, beta)
    assert weights.shape == (8,) and weights.dtype == torch.float64
    assert weights.tolist() == pytest.approx([density((t + 0.5) / 8) for t in range(8)], rel=1e-12)


def test_beta_weights_of_the_published_beta_favour_both_ends():
    weights = beta_weights(5000, 0.1)
    beta = math.gamma(0.1) ** 2 / math.gamma(0.2)
    x = 0.5 / 5001
    assert weights[0].item() == pytest.approx((x * (1 - x)) ** -0.9 / beta, rel=1e-12)
    assert torch.allclose(weights, weights.flip(0), rtol=1e-9) and weights[0] > 1000 * weights[2500]
    for steps, wrong in ((0, 0.5), (3, 0.0), (3, -1.0), (3, math.nan), (3, math.inf)):
        with pytest.raises(ValueError, match="beta"):
            beta_weights(steps, wrong)


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


def walk(steps, average, dtype=torch.float64):
    """A random trajectory: its `average` on the way, and theta_0 ... theta_T in float64."""
    torch.manual_seed(0)
    model = Toy().to(dtype)
    running, trajectory = average(model), [flat(model)]
    for _ in range(steps):
        model.walk()
        running.update(model)
        trajectory.append(flat(model))
    return running, torch.stack(trajectory).detach(), model


def bma(*args, **options):
    return lambda model: BetaMovingAverage(model, *args, **options)


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).double()


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_running_average_is_the_weighted_sum_of_the_trajectory(beta):
    running, trajectory, model = walk(40, bma(40, beta))
    weights = beta_weights(40, beta)
    expected = (weights[:, None] * trajectory).sum(0) / weights.sum()
    assert torch.allclose(flat(running.model), expected, rtol=1e-10, atol=0)
    assert running.model.layers[1].num_batches_tracked == model.layers[1].num_batches_tracked == 40
    with pytest.raises(IndexError):
        running.update(model)


def test_running_average_on_the_way():
    """theta_t^BMA of Eq. 7, in the paper's own words, after every step."""
    torch.manual_seed(0)
    model, alpha = Toy().double(), beta_weights(9, 0.5)
    running, theta = BetaMovingAverage(model, 9, 0.5), flat(model)
    for t in range(1, 10):
        model.walk()
        running.update(model)
        theta = (alpha[:t].sum() * theta + alpha[t] * flat(model)) / alpha[: t + 1].sum()
        assert torch.allclose(flat(running.model), theta, rtol=1e-12)


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
    running, trajectory, _ = walk(12, bma(12, shares=shares))
    expected = (torch.tensor(weights, dtype=torch.float64)[:, None] * trajectory).sum(0)
    assert torch.allclose(flat(running.model), expected, rtol=1e-10, atol=1e-12)
    if average != "uniform":
        with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
            average_shares(average, 1.5, 12)


@pytest.mark.parametrize("average, value", [("bma", 0.5), ("ema", 0.9), ("wise-ft", 0.3)])
def test_weights_in_an_average_are_those_of_the_trajectory(average, value):
    """Averages of one number: theta_t is 1 for one t alone, so the average is its weight."""
    weights, of_start = clipood.weights_in_average(average, value, 6)
    shares = average_shares(average, value, 6)
    for t in range(7):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(model.weight, float(t == 0))
        running = BetaMovingAverage(model, 6, shares=shares)
        for step in range(1, 7):
            nn.init.constant_(model.weight, float(step == t))
            running.update(model)
            if t == 0:
                assert running.model.weight.item() == pytest.approx(of_start[step], abs=1e-12)
        assert running.model.weight.item() == pytest.approx(weights[t].item(), abs=1e-12)


def test_half_precision_models_are_averaged_in_float32():
    running, trajectory, model = walk(200, bma(200, 0.5), torch.bfloat16)
    weights = beta_weights(200, 0.5)
    expected = (weights[:, None] * trajectory).sum(0) / weights.sum()
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
    again = BetaMovingAverage(Toy(), 3, 0.5)
    again.load_state_dict(running.state_dict())
    assert again.step == 1 and torch.equal(flat(again.model), flat(running.model))


# ---------- Rows ---------------------------------------------------------------------------------
def settings(arguments=""):
    more = clipood.OF_ALL_ROWS
    names = common.dataset_names("domains") + clipood.WITH_PARTS
    args = common.flags(clipood.METHOD, "", clipood.MODES, names, more, arguments.split())
    return common.settle(args, clipood.preset(args))


def rows_of(*names, arguments=""):
    return settings(f"{arguments} --modes {' '.join(names)}").rows


def test_rows_are_a_loss_and_an_average_with_numbers():
    rows = rows_of("zero-shot", "ms+bma/beta=0.1", "mms/margin=0.5", "linear+ema/ema=0.9", "mms")
    found = [(row.loss, row.margin, row.average) for row in rows.values()]
    assert found == [
        ("zero-shot", 0.3, ""),
        ("ms", 0.0, "bma"),
        ("mms", 0.5, ""),
        ("linear", 0.3, "ema"),
        ("mms", 0.3, ""),
    ]
    assert rows["ms+bma/beta=0.1"].beta == 0.1 and rows["linear+ema/ema=0.9"].ema == 0.9


def test_rows_of_one_loss_share_a_training():
    names = ["mms", "linear", "ms", "ms+bma", "mms/margin=0.5", "ms+ema", "zero-shot", "mms+bma"]
    groups = clipood.trainings(rows_of(*names))
    expected = "mms mms+bma, linear, ms ms+bma ms+ema, mms/margin=0.5, zero-shot"
    assert ", ".join(" ".join(group) for group in groups) == expected


def test_published_settings_by_task_and_data_set():
    for arguments, expected in (
        ("--dataset officehome", (12, 1e-5, 10, 0.3, 0.5)),
        ("--dataset domainnet --task in-the-wild", (12, 5e-6, 20, 0.1, 0.5)),
        ("--dataset ucf101", (36, 5e-6, 2, 0.3, 0.1)),
        ("--dataset imagenet", (36, 5e-6, 10, 0.3, 0.5)),
        ("--dataset folder:x", (12, 5e-6, 10, 0.3, 0.5)),
        ("--dataset tiny-office --task open-class", (36, 4e-4, 2, 0.3, 0.1)),
    ):
        args = settings(arguments)
        assert (args.batch_size, args.lr, args.epochs, args.margin, args.beta) == expected


# ---------- Few shots, base and new classes ------------------------------------------------------
@pytest.mark.parametrize("n, base, wild", [(2, 1, 1), (7, 4, 3), (8, 4, 4), (65, 33, 32)])
def test_base_and_new_classes(n, base, wild):
    assert common.base_and_new(n) == (range(base), range(base, n))
    assert common.base_and_new(n, odd_to_base=False) == (range(wild), range(wild, n))


def test_one_class_has_no_new_half():
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


def test_classes_are_numbered_anew():
    part = toy_images([2, 3, 1, 4]).of_classes(range(1, 3))
    assert part.classes == ("b", "c") and part.labels.tolist() == [0, 0, 0, 1]
    assert part.images[:, 0, 0, 0].tolist() == [2, 3, 4, 5]


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
    domains = toy_domains(balanced=balanced)
    return clipood.make_task(settings(arguments), domains, target, seed).transformed(
        "train", "test"
    )


def values(images):
    return images.images[:, 0, 0, 0].tolist()


def test_domain_shift_task():
    task = toy_task("--dataset pacs", "b")
    assert list(task.train) == ["a", "c"]
    assert all(images.transform == "train" for images in task.train.values())
    assert list(task.tests) == ["hold-out", "target"]
    target = task.tests["target"]["b"]
    assert values(target) == list(range(64, 114)) and target.transform == "test"
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
def test_learned_prompts_also_name_classes_that_were_not_trained(loss):
    clip, task, rows, features = small_run(loss, arguments="--epochs 1 --prompt-lr 0.1")
    models, _ = trained(clip, task, rows, features, seed=0)
    images, _ = task.train["photo"].__getitems__(range(3))
    trained_names = task.classes
    for names in (trained_names, ("house", "tree", "dog")):
        scores = clipood.classifier(clip, models[loss], rows[loss], trained_names, names)(images)
        assert scores.shape == (3, len(names)) and scores.isfinite().all()
        start = clip.logit_scale * clip.encode(task.train["photo"].subset(range(3)))
        start = start @ clip.class_features(names).T
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


class Poison:
    """A transform that makes one image not a number."""

    def __init__(self, transform, image):
        self.transform, self.image = transform, image

    def __call__(self, pixels):
        bad = (pixels == self.image).all((1, 2, 3), keepdim=True)
        return self.transform(pixels).masked_fill(bad, torch.nan)


def small_run(*names, arguments="", poison=None):
    """Rows, a CLIP, a task of two tiny domains, augmented at random, and class features."""
    rows = rows_of(*names, arguments=f"--batch-size 4 --steps-per-epoch 3 {arguments}")
    clip, rng = common.load_clip("tiny"), common.tiny_rng(0, "small run")
    classes, train = tiny_world.PACS_CLASSES, {}
    for domain in ("photo", "cartoon"):
        things = [name for name in classes for _ in range(8)]
        grounds, colors = ["grass"] * len(things), ["red"] * len(things)
        pixels = tiny_world.draw(things, domain, grounds, colors, rng)
        labels = torch.arange(7).repeat_interleave(8)
        train[domain] = common.ImageSet(pixels, labels, classes, transform=clip.augment)
    if poison is not None:
        train["cartoon"].transform = Poison(clip.augment, train["cartoon"].images[poison])
    task = common.Task(classes, train, {})
    return clip, task, rows, clip.class_features(classes)


def trained(*args, **options):
    """The models and the state at the end of `clipood.train`."""
    *_, last = clipood.train(*args, **options)
    return last


def test_training_moves_the_tower_by_the_gradient_of_the_loss():
    """One step without decay or momentum yet: AdamW's first is -lr * sign of the gradient."""
    arguments = "--epochs 1 --steps-per-epoch 1 --weight-decay 0 --lr 1e-4"
    clip, task, rows, features = small_run("mms", arguments=arguments)
    tower_after = trained(clip, task, rows, features, seed=5)[0]["mms"]
    images, labels, _ = next(common.SourceBatches(task.train, 4, 5000))
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
    models, _ = trained(clip, task, rows, features, seed=2)
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
            batches = common.SourceBatches(task.train, 4, 2000 + t // 4)
        images, labels, _ = next(batches)
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
    full = small_run("mms", arguments="--epochs 2 --lr 5e-6")
    towers, _ = trained(*full, seed=2)
    assert clipood.share_moved(towers["mms"], clip.visual) > 0.99


def test_norms_with_statistics_keep_those_of_clip():
    clip, task, rows, features = small_run("mms", arguments="--epochs 1")
    layers = [nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 64)]
    clip.model.visual = nn.Sequential(*layers).eval()
    models, _ = trained(clip, task, rows, features, seed=0)
    norm = models["mms"][1]
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(8))
    assert not torch.equal(norm.weight, torch.ones(8))


def test_official_protocol_resizes_bilinearly_and_stores_float16():
    assert settings("--protocol official").storage == "float16"
    assert settings("").storage == "float32"
    for interpolation in (None, "bilinear"):
        clip = common.load_clip("tiny", interpolation=interpolation)
        expected = interpolation or "bicubic"
        assert clip.config["preprocess_cfg"]["interpolation"] == expected
        for transform in (clip.preprocess.transforms[0], clip.augment):
            assert transform.interpolation.value == expected


def test_averages_do_not_change_the_trajectory_and_wise_ft_is_the_middle():
    towers = {}
    for names in (["mms"], ["mms", "mms+bma/beta=1", "mms+wise-ft", "mms+uniform"]):
        clip, task, rows, features = small_run(*names, arguments="--epochs 2")
        models, _ = trained(clip, task, rows, features, seed=0)
        towers[len(names)] = {name: flat(tower) for name, tower in models.items()}
    end, start = towers[4], flat(clip.visual)
    assert torch.equal(towers[1]["mms"], end["mms"])
    assert torch.allclose(end["mms+wise-ft"], (start + end["mms"]) / 2, atol=1e-7)
    # beta = 1 weighs theta_0 ... theta_6 alike, uniform theta_1 ... theta_6
    assert torch.allclose(7 * end["mms+bma/beta=1"], start + 6 * end["mms+uniform"], atol=1e-5)


def last_models_before_an_error(run, match):
    models = {}
    with pytest.raises(common.InputError, match=match) as error:
        for models, _ in run:  # noqa: B007
            pass
    assert all(torch.isfinite(flat(tower)).all() for tower in models.values())
    return str(error.value)


def test_loss_that_is_not_finite_stops_before_it_poisons_anything():
    run = small_run("mms", "mms+bma", arguments="--epochs 20", poison=13)
    message = last_models_before_an_error(clipood.train(*run, seed=0), "the loss is nan")
    assert "learning rate" in message and "step " in message and "cartoon number 13" in message
    assert message.count("photo ") == message.count("cartoon ") == 4


def test_gradient_that_is_not_finite_stops_before_it_poisons_anything(monkeypatch):
    class Poisoned(torch.optim.AdamW):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            weight = self.param_groups[0]["params"][0]
            weight.register_hook(lambda gradient: gradient * torch.nan)

    monkeypatch.setattr(torch.optim, "AdamW", Poisoned)
    run = small_run("mms", "mms+bma", arguments="--epochs 1")
    match = "step 1 of seed 0.*gradient's norm nan"
    last_models_before_an_error(clipood.train(*run, seed=0), match)


@pytest.mark.parametrize("loss, workers", [("linear", 0), ("mms", 0), ("mms", 2)])
def test_training_continues_exactly_from_every_epoch(loss, workers, tmp_path):
    names = (loss, f"{loss}+bma", f"{loss}+ema")
    run = small_run(*names, arguments=f"--epochs 3 --workers {workers}")
    for models, state in clipood.train(*run, seed=1):
        torch.save(state, tmp_path / f"{state['epoch']}")
        end = {name: flat(tower) for name, tower in models.items()}
    for epoch in range(3):
        torch.randn(epoch + 1)  # whatever happened to the random state
        saved = torch.load(tmp_path / f"{epoch}", weights_only=True)
        models, state = trained(*run, 1, saved)
        assert state["epoch"] == 3
        assert all(torch.equal(flat(models[name]), end[name]) for name in names)


# ---------- The command --------------------------------------------------------------------------
QUICK = "--model tiny --templates {} --epochs 2 --steps-per-epoch 2 --batch-size 4 --workers 0"


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture
def command(call_main):
    return functools.partial(call_main, clipood.main)


@pytest.fixture
def two_domains(pacs_tree):
    """Two domains with two classes of three images each: --dataset folder:..."""
    for domain in (pacs_tree / "PACS").iterdir():
        for folder in domain.iterdir():
            if domain.name in ("cartoon", "sketch") or folder.name not in ("dog", "house"):
                shutil.rmtree(folder)
        if domain.name in ("cartoon", "sketch"):
            domain.rmdir()
    return pacs_tree / "PACS"


def test_run_on_tiny_data(command, tmp_path, monkeypatch):
    """Table, files, and a model that open_clip loads with the reported accuracy."""
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (tiny_world.PACS_CLASSES, 16, 16))
    output = command("--epochs 1 --steps-per-epoch 4 --lr 3e-3")
    rows = re.findall(r"^(\S+) +\d\d\.\d +\d\d\.\d +\d\d\.\d$", output, re.M)
    assert rows == ["zero-shot", "mms", "mms+wise-ft", "mms+bma"]
    folder = tmp_path / "runs" / "clipood" / "tiny-pacs-sketch-seed0"
    assert {file.name for file in folder.iterdir()} == {"result.json", "model"}
    assert len(list(folder.parent.iterdir())) == 1
    plain = open_clip.create_model(f"local-dir:{folder / 'model'}").eval()
    clip, target = common.load_clip("tiny"), common.tiny_domain("tiny-pacs", "sketch", 0, 0.4)
    tests = {"target": {"sketch": target.balanced.transformed(clip.preprocess)}}
    features = torch.from_numpy(np.load(folder / "model" / "class_features.npy"))
    classify = common.clip_classifier(plain.visual, features)
    accuracy = common.evaluate(classify, tests, batch_size=64)["target"]
    assert accuracy == result(folder)["rows"]["mms+bma"]["target"]
    assert result(folder)["rows"]["zero-shot"]["target"] != accuracy


@pytest.mark.slow
def test_main_job(checkout, root):
    done = call(readme_script(root, "python clipood.py"), checkout)
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr  # no progress bars where nobody watches
    rows = result(checkout / "runs" / "clipood" / "tiny-pacs-sketch-seed0")["rows"]
    assert rows["mms"]["source"] > rows["zero-shot"]["source"] + 0.1


def test_all_targets_and_seeds(command, two_domains, tmp_path):
    """Tables over targets and seeds; a run gives the same numbers again, whatever ran before."""
    line = f"--dataset folder:{two_domains} --study components {QUICK} --epochs 1"
    output = command(f"{line} --target all --seeds 0 1 --summary all.json")
    assert "4 runs, %" in output and "±" in output
    records = json.loads((tmp_path / "all.json").read_text())["records"]
    order = [(target, seed) for seed in (0, 1) for target in ("art_painting", "photo")]
    assert [(record["target"], record["seed"]) for record in records] == order
    assert set(records[0]["rows"]) == set(clipood.STUDIES["components"])
    command(f"{line} --target photo --seed 1 --summary again.json")
    assert json.loads((tmp_path / "again.json").read_text())["records"] == records[3:]


@pytest.mark.parametrize("study", ["margin", "average"])
def test_studies_that_sweep(command, two_domains, tmp_path, study):
    output = command(f"--dataset folder:{two_domains} --target photo --study {study} {QUICK}")
    (name,) = (file.stem for file in (tmp_path / "results").glob("*.json"))
    assert name.startswith(f"clipood-{study}-folder") and name.endswith("domain-shift")
    assert (tmp_path / "results" / f"{name}.png").stat().st_size > 1000
    for row in clipood.STUDIES[study]:
        assert re.search(rf"^{re.escape(row)} +\d", output, re.M), row
    (folder,) = (tmp_path / "runs" / "clipood" / study).iterdir()
    steps = {}
    for row, own in result(folder)["extra"].items():
        if "history" in own:
            steps[row] = [point["step"] for point in own["history"]]
    trained = clipood.STUDIES[study][1:]
    assert steps == ({} if study == "margin" else dict.fromkeys(trained, [0, 2, 4]))


OPEN = ["validation", "base", "new", "H"]
SHIFTS = ["imagenet", *common.IMAGENET_SHIFTS, "average OOD"]


@pytest.mark.parametrize(
    "name, task, measures, line",
    [
        ("caltech101", "open-class", OPEN, "class 'boat' has only 3 images, fewer than 16"),
        ("fgvcaircraft", "open-class", OPEN, "open-class on fgvcaircraft"),
        ("imagenet", "domain-shift", SHIFTS, "domain-shift on imagenet"),
        ("imagenet", "open-class", OPEN, "open-class on imagenet"),
    ],
)
def test_data_sets_without_domains(
    command, caltech, aircraft, imagenet, tmp_path, name, task, measures, line
):
    where = f"--dataset {name} --task {task} --data-root {caltech}"
    assert line in command(f"{where} --modes zero-shot linear mms+bma {QUICK}")
    kind = name if task == "domain-shift" else f"{name}-{task}"
    rows = result(tmp_path / "runs" / "clipood" / f"{kind}-{name}-seed0")["rows"]
    assert list(rows["mms+bma"]) == measures
    if task == "open-class":
        base, new, h = (rows["mms+bma"][measure] for measure in ("base", "new", "H"))
        assert h == pytest.approx(2 * base * new / (base + new) if base + new else 0)
        assert list(rows["linear"]) == ["validation", "base"]
    else:
        shifts = [rows["linear"][name] for name in common.IMAGENET_SHIFTS]
        assert rows["linear"]["average OOD"] == pytest.approx(sum(shifts) / 4)


def test_in_the_wild(command, pacs_tree, tmp_path):
    where = f"--dataset pacs --data-root {pacs_tree} --target photo --task in-the-wild"
    assert "in-the-wild on pacs" in command(f"{where} --study loss --eval-every 1 {QUICK}")
    folder = tmp_path / "runs" / "clipood" / "loss" / "pacs-in-the-wild-photo-seed0"
    rows = result(folder)["rows"]
    assert list(rows["mms"]) == ["hold-out", "base", "new", "total", "H"]
    assert rows["linear"]["new"] == rows["linear"]["H"] == 0
    # three and four classes of three images
    total = (9 * rows["ms"]["base"] + 12 * rows["ms"]["new"]) / 21
    assert rows["ms"]["total"] == pytest.approx(total)


def test_killed_run_is_resumed_exactly(command, two_domains, tmp_path, monkeypatch):
    """Stopped in the second epoch of the second training, then continued: the same bytes."""
    line = (
        f"--dataset folder:{two_domains} --target photo --modes zero-shot ms mms mms+bma "
        f"--eval-every 1 --figures {QUICK}"
    )
    command(f"{line} --output quiet")
    (quiet,) = (tmp_path / "quiet" / "clipood").iterdir()
    own, calls = common.Steps.take, []

    def power_cut(*args):
        calls.append(args)
        if len(calls) == 7:
            raise common.InputError("power cut")
        own(*args)

    monkeypatch.setattr(common.Steps, "take", power_cut)
    assert "power cut" in command(f"{line} --output killed")
    killed = tmp_path / "killed" / "clipood" / quiet.name
    assert not killed.exists()
    output = command(f"{line} --output killed --resume")
    assert "zero-shot: " not in output and "\nmms: " in output  # the first rows were done
    files = [path for path in sorted(quiet.rglob("*")) if path.is_file()]
    for file in files:
        assert (killed / file.relative_to(quiet)).read_bytes() == file.read_bytes(), file
    assert len(files) == len([path for path in killed.rglob("*") if path.is_file()])
    assert "found" in command(f"{line} --output killed --resume")
    assert "lr 0.0004, now 1e-05" in command(f"{line} --output killed --resume --lr 1e-5")


@pytest.mark.slow
def test_real_architecture_on_a_real_layout(checkout, pacs_tree, tmp_path):
    """ViT-B-32, random weights from a file: trained, averaged, exported, loaded as it was."""
    torch.manual_seed(0)
    weights = tmp_path / "vit.pt"
    torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), weights)
    done = call(
        f"clipood.py --dataset pacs --data-root {pacs_tree} --model ViT-B-32-quickgelu --epochs 1 "
        f"--pretrained {weights} --steps-per-epoch 2 --batch-size 2 --lr 1e-3 --modes mms+bma",
        checkout,
    )
    assert done.returncode == 0, done.stderr
    folder = checkout / "runs" / "clipood" / "pacs-sketch-seed0"
    clip = common.load_clip(f"local-dir:{folder / 'model'}")
    gelu = clip.visual.transformer.resblocks[0].mlp.gelu
    assert type(gelu) is open_clip.transformer.QuickGELU
    assert not torch.equal(clip.visual.proj, torch.load(weights)["visual.proj"])
    domains = common.load_domains("pacs", pacs_tree)
    task = common.leave_one_out(domains, "sketch")
    task = task.transformed(clip.preprocess, clip.preprocess)
    classify = common.clip_classifier(clip.visual, clip.class_features(task.classes))
    found = common.evaluate(classify, {"target": task.tests["target"]})["target"]
    assert found == result(folder)["rows"]["mms+bma"]["target"]
