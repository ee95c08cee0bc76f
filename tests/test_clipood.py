"""CLIPood against explicit sums, slow loops, closed forms, finite differences; its data, its command, its resume."""

import argparse
import copy
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import call, readme_script
from PIL import Image
from torch import nn

import clipood
import common
from assets import tiny_world
from clipood import BetaMovingAverage, average_shares, beta_weights, class_distances, margin_metric_softmax

# ---------------------------------------------------------------------------------------------------
# Margin metric softmax
# ---------------------------------------------------------------------------------------------------


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
def test_margin_metric_softmax_equals_a_loop(margin):
    images, classes, labels, tau = unit(6, 8), unit(4, 8, seed=1), torch.tensor([0, 3, 1, 1, 2, 0]), 0.07
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
    assert margin_metric_softmax(images, classes, labels, 20, 0).item() == pytest.approx(expected.item(), rel=1e-14)
    assert margin_metric_softmax(images, classes, labels, 20, 0.3) > expected  # all D > 0 here


def test_margin_metric_softmax_gradient():
    free, classes = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), unit(3, 5)
    labels = torch.tensor([0, 1, 2, 1])
    loss = lambda x: margin_metric_softmax(F.normalize(x, dim=-1), classes, labels, 5.0, 0.4)  # noqa: E731
    assert torch.autograd.gradcheck(loss, free)


def test_margin_of_float32_features_is_symmetric_and_zero_for_the_class_itself():
    features = unit(50, 512).float()
    features[7] = features[3]  # two names with the same meaning
    distances = class_distances(features)
    assert torch.equal(distances, distances.T) and torch.equal(distances.diag(), torch.zeros(50))
    assert distances.min() >= 0 and distances.max() <= 2 and distances[3, 7] < 1e-6
    assert distances[0, 1].item() == pytest.approx(1 - float(features[0].double() @ features[1].double()), abs=1e-6)


def test_margin_metric_softmax_refuses_bad_input():
    for images, classes, margin in (
        (unit(2, 4), unit(3, 5), 0.3),
        (unit(2, 4), unit(3, 4), -0.1),
        (unit(4), unit(3, 4), 0),
    ):
        with pytest.raises(ValueError, match="margin"):
            margin_metric_softmax(images, classes, torch.zeros(2, dtype=torch.long), 10, margin)


# ---------------------------------------------------------------------------------------------------
# Averages
# ---------------------------------------------------------------------------------------------------


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
    """Averages of a random trajectory: by `average` on the way, and the trajectory theta_0 ... theta_T in float64."""
    torch.manual_seed(0)
    model = Toy().to(dtype)
    running, trajectory = average(model), [nn.utils.parameters_to_vector(model.parameters()).double()]
    for _ in range(steps):
        model.walk()
        running.update(model)
        trajectory.append(nn.utils.parameters_to_vector(model.parameters()).double())
    return running, torch.stack(trajectory).detach(), model


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).double()


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_running_average_is_the_weighted_sum_of_the_trajectory(beta):
    running, trajectory, model = walk(40, lambda model: BetaMovingAverage(model, 40, beta))
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
    running, trajectory, _ = walk(12, lambda model: BetaMovingAverage(model, 12, shares=shares))
    expected = (torch.tensor(weights, dtype=torch.float64)[:, None] * trajectory).sum(0)
    assert torch.allclose(flat(running.model), expected, rtol=1e-10, atol=1e-12)
    if average != "uniform":
        with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
            average_shares(average, 1.5, 12)


def test_half_precision_models_are_averaged_in_float32():
    running, trajectory, model = walk(200, lambda model: BetaMovingAverage(model, 200, 0.5), torch.bfloat16)
    weights = beta_weights(200, 0.5)
    expected = (weights[:, None] * trajectory).sum(0) / weights.sum()
    assert all(parameter.dtype == torch.float32 for parameter in running.model.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert torch.allclose(flat(running.model), expected, rtol=1e-5, atol=1e-5)  # bfloat16 keeps 3 digits


def test_average_is_one_copy_changed_in_place():
    model = Toy()
    running = BetaMovingAverage(model, 3, 0.5)
    places = [parameter.data_ptr() for parameter in running.parameters()]
    assert not set(places) & {parameter.data_ptr() for parameter in model.parameters()}
    assert sum(p.numel() for p in running.parameters()) == sum(p.numel() for p in model.parameters())
    model.walk()
    running.update(model)
    assert [parameter.data_ptr() for parameter in running.parameters()] == places
    assert not any(parameter.requires_grad for parameter in running.parameters())
    again = BetaMovingAverage(Toy(), 3, 0.5)
    again.load_state_dict(running.state_dict())
    assert again.step == 1 and torch.equal(flat(again.model), flat(running.model))


# ---------------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------------

FLAGS = argparse.Namespace(margin=0.3, beta=0.5, ema=0.99, wise_ft=0.5)


def test_modes_are_read():
    for text, mode in {
        "zero-shot": ("zero-shot", 0, "", 0),
        "linear": ("linear", 0, "", 0),
        "mms": ("mms", 0.3, "", 0),
        "mms@0.5+bma": ("mms", 0.5, "bma", 0.5),
        "ms+bma@0.1": ("ms", 0, "bma", 0.1),
        "mms@0+ema@0.9": ("mms", 0, "ema", 0.9),
        "mms+wise-ft@0": ("mms", 0.3, "wise-ft", 0),
        "mms+uniform": ("mms", 0.3, "uniform", 0),
    }.items():
        assert clipood.read_mode(text, FLAGS) == mode
    for wrong in (
        "mmd",
        "ms@0.3",
        "mms@-1",
        "mms@nan",
        "mms+bma@0",
        "mms+ema@1.5",
        "zero-shot+bma",
        "mms+swa",
        "mms+ema@x",
        "",
    ):
        with pytest.raises(common.InputError, match="cannot read"):
            clipood.read_mode(wrong, FLAGS)


def test_modes_of_one_loss_share_a_training_and_the_last_comes_last():
    names = ["mms", "linear", "ms", "ms+bma", "mms@0.3+ema", "mms@0.5", "ms+ema", "zero-shot", "mms+bma"]
    groups = clipood.trainings({name: clipood.read_mode(name, FLAGS) for name in names})
    expected = "linear, mms@0.5, ms ms+bma ms+ema, zero-shot, mms mms@0.3+ema mms+bma"
    assert ", ".join(" ".join(group) for group in groups) == expected


# ---------------------------------------------------------------------------------------------------
# Data: few shots, base and new classes, readers
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, base, wild", [(2, 1, 1), (7, 4, 3), (8, 4, 4), (65, 33, 32)])
def test_base_and_new_classes(n, base, wild):
    assert clipood.base_and_new(n) == (range(base), range(base, n))
    assert clipood.base_and_new(n, odd_to_base=False) == (range(wild), range(wild, n))


def test_one_class_has_no_new_half():
    with pytest.raises(common.InputError, match="at least 2 classes"):
        clipood.base_and_new(1)


def toy_images(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return common.ImageSet(pixels, labels, tuple("abcdefgh"[: len(counts)]))


def test_harmonic_mean():
    assert clipood.harmonic_mean(0.6, 0.3) == pytest.approx(2 / (1 / 0.6 + 1 / 0.3))
    assert clipood.harmonic_mean(0, 0) == 0


def test_few_shots(capsys):
    images = toy_images([20, 30, 5])
    chosen = clipood.few_shot(images, 16, seed=3)
    assert chosen.labels.bincount().tolist() == [16, 16, 5]
    assert len(set(chosen.images[:, 0, 0, 0].tolist())) == 37  # nothing twice
    assert "class 'c' has only 5 images, fewer than 16 shots" in capsys.readouterr().out
    assert torch.equal(chosen.images, clipood.few_shot(images, 16, seed=3).images)
    assert not torch.equal(chosen.images, clipood.few_shot(images, 16, seed=4).images)
    with pytest.raises(common.InputError, match="no image of class 'b'"):
        clipood.few_shot(toy_images([2, 0, 3]), 1, seed=0)


def test_classes_are_numbered_anew():
    part = toy_images([2, 3, 1, 4]).of_classes(range(1, 3))
    assert part.classes == ("b", "c") and part.labels.tolist() == [0, 0, 0, 1]
    assert part.images[:, 0, 0, 0].tolist() == [2, 3, 4, 5]


def test_underscores_in_class_names_are_spaces():
    model, _, tokenizer = common.load_clip("tiny")
    assert torch.equal(*(common.class_features(model, tokenizer, [name]) for name in ("art_painting", "art painting")))


def write_image(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 36), (shade % 256, 90, 160)).save(path)


NAMES = common.OFFICE_CLASSES[:12]


@pytest.fixture
def caltech(tmp_path):
    """Five classes, an odd number, in CoOp's layout; returns the data root."""
    parts, folder = {"train": [], "val": [], "test": []}, tmp_path / "data" / "caltech-101"
    for part, count in (("train", 20), ("val", 5), ("test", 4)):
        for label, name in enumerate(NAMES[:5]):
            for i in range(count if name != "boat" or part != "train" else 3):
                parts[part].append([f"{name}/image_{part}_{i}.jpg", label, name])
                write_image(folder / "101_ObjectCategories" / name / f"image_{part}_{i}.jpg", 40 * label)
    (folder / "split_zhou_Caltech101.json").write_text(json.dumps({part: items[::-1] for part, items in parts.items()}))
    return tmp_path / "data"


@pytest.fixture
def aircraft(tmp_path):
    folder, number = tmp_path / "data" / "fgvc_aircraft", 1000
    names = ["house", "art painting", "cup"]  # a name with a space
    for part in ("train", "val", "test"):
        lines = []
        for name in names[::-1]:
            for _ in range(2):
                number += 1
                lines.append(f"{number} {name}")
                write_image(folder / "images" / f"{number}.jpg", number)
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    (folder / "variants.txt").write_text("\n".join(names) + "\n")
    return tmp_path / "data"


@pytest.fixture
def imagenet(tmp_path):
    """Twelve classes, so that the folders 10 and 11 of ImageNetV2 sort before 2; four of them in ImageNet-A and -R."""
    data, ids = tmp_path / "data", [f"n{1440764 + 37 * i:08}" for i in range(12)]
    lists = "".join(f"{identity} {name}\n" for identity, name in zip(ids, NAMES))
    for base, parts, folders in (
        ("imagenet", ("images/train", "images/val"), ids),
        ("imagenetv2", ("imagenetv2-matched-frequency-format-val",), [str(i) for i in range(12)]),
        ("imagenet-sketch", ("images",), ids),
        ("imagenet-adversarial", ("imagenet-a",), ids),
        ("imagenet-rendition", ("imagenet-r",), ids),
    ):
        for part in parts:
            for label, folder in enumerate(folders):
                if part[-2:] not in ("-a", "-r") or label in (2, 5, 10, 11):
                    for i in range(2):
                        write_image(data / base / part / folder / f"{i}.JPEG", 20 * label)
        (data / base / "classnames.txt").write_text(lists)
    (data / "imagenet-rendition" / "imagenet-r" / "README.txt").write_text("not a class")
    (data / "imagenet-sketch" / "images" / ids[0] / ".DS_Store").write_text("not an image")
    return data


def shade_of(file):
    return np.asarray(common.read_image(file))[0, 0, 0].item()


def test_split_file_reader(caltech):
    parts = common.load_parts("caltech101", caltech)
    assert {name: len(part) for name, part in parts.items()} == {"train": 83, "val": 25, "test": 20}
    assert all(part.classes == NAMES[:5] for part in parts.values())
    for file, label in zip(parts["test"].images, parts["test"].labels.tolist()):
        assert f"/{NAMES[label]}/" in file and abs(shade_of(file) - 40 * label) < 8


def test_aircraft_reader(aircraft):
    parts = common.load_parts("fgvcaircraft", aircraft)
    assert parts["train"].classes == ("house", "art painting", "cup")
    assert parts["train"].labels.tolist() == [2, 2, 1, 1, 0, 0]
    assert parts["val"].images[0].endswith("images/1007.jpg")


def test_imagenet_readers(imagenet):
    parts = common.load_parts("imagenet", imagenet)
    assert parts["train"].classes == NAMES and len(parts["val"]) == 24 and parts["val"] is not parts["train"]
    assert "/val/" in parts["test"].images[0]
    for name in common.IMAGENET_SHIFTS:
        (images,) = common.load_parts(name, imagenet).values()
        subset = name in ("imagenet-a", "imagenet-r")
        assert images.classes == (tuple(NAMES[i] for i in (2, 5, 10, 11)) if subset else NAMES)
        for file, label in zip(images.images, images.labels.tolist()):
            assert abs(shade_of(file) - 20 * NAMES.index(images.classes[label])) < 8, (name, file)


@pytest.mark.parametrize(
    "name, harm, words",
    [
        ("dtd", None, ("'dtd' is not in", "DescribableTextures", "CoOp", "--data-root", "tiny-office")),
        ("caltech101", lambda f: (f / "split_zhou_Caltech101.json").unlink(), ("FileNotFoundError", "split_zhou")),
        (
            "caltech101",
            lambda f: (f / "split_zhou_Caltech101.json").write_text("{"),
            ("cannot read", "JSONDecodeError"),
        ),
        ("caltech101", lambda f: (f / "split_zhou_Caltech101.json").write_text('{"train": []}'), ("KeyError", "val")),
        (
            "caltech101",
            lambda f: (f / "101_ObjectCategories").rename(f / "other"),
            ("no image", "101_ObjectCategories"),
        ),
    ],
)
def test_damaged_open_class_set_is_one_clear_error(caltech, name, harm, words):
    if harm:
        harm(caltech / "caltech-101")
    with pytest.raises(common.InputError) as error:
        common.load_parts(name, caltech)
    assert all(word in str(error.value) for word in words), error.value


def test_damaged_imagenet_is_one_clear_error(imagenet):
    (imagenet / "imagenet" / "images" / "val" / "n01440764").rename(imagenet / "gone")
    with pytest.raises(common.InputError, match="train has folders of 12 classes, val of 11"):
        common.load_parts("imagenet", imagenet)


# ---------------------------------------------------------------------------------------------------
# Tasks, training, testing
# ---------------------------------------------------------------------------------------------------


def flags(arguments=""):
    """The settings of a command line."""
    argv, sys.argv = sys.argv, ["clipood.py", *arguments.split()]
    try:
        return clipood.settings()
    finally:
        sys.argv = argv


def toy_domains(names=("a", "b", "c"), classes=5, per_class=10, balanced=False):
    """Domains whose every pixel tells its domain, class and place: value = 64 * domain + 10 * class + place."""
    domains = []
    for index, name in enumerate(names):
        labels = torch.arange(classes).repeat_interleave(per_class)
        values = (64 * index + per_class * labels + torch.arange(per_class).repeat(classes)).to(torch.uint8)
        pixels = values.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        images = common.ImageSet(pixels, labels, tuple("vwxyz"[:classes]))
        domains.append(common.Domain(name, images, images.subset(range(0, len(labels), 2)) if balanced else None))
    return domains


def values(images):
    return images.images[:, 0, 0, 0].tolist()


def test_domain_shift_task():
    args, domains = flags("--dataset pacs"), toy_domains()
    task = clipood.make_task(args, domains, "b", 0, "test", "train")
    assert list(task.train) == ["a", "c"] and all(images.transform == "train" for images in task.train.values())
    assert list(task.tests) == ["hold-out", "target"] and values(task.tests["target"]["b"]) == list(range(64, 114))
    assert task.tests["target"]["b"].transform == "test"
    assert sorted(values(task.train["c"]) + values(task.tests["hold-out"]["c"])) == list(range(128, 178))
    official = clipood.make_task(flags("--dataset pacs --protocol official"), domains, "b", 0, None, None)
    held_out = common.domain_split(50, 1)[0]
    assert values(official.tests["target"]["b"]) == [64 + i for i in held_out] and len(held_out) == 10
    tiny = clipood.make_task(args, toy_domains(balanced=True), "b", 0, None, None)
    assert list(tiny.tests) == ["hold-out", "source", "target"] and len(tiny.tests["target"]["b"]) == 25


def test_in_the_wild_task():
    """Five classes: two base, three new. Nothing new and nothing of the target is trained on."""
    task = clipood.make_task(flags("--dataset officehome --task in-the-wild"), toy_domains(), "c", 0, None, None)
    assert list(task.train) == ["a", "b"] and task.train["a"].classes == ("v", "w")
    held_out, rest = common.domain_split(20, 1, part="base")
    assert values(task.train["b"]) == [64 + i for i in rest]
    assert values(task.tests["hold-out"]["b"]) == [64 + i for i in held_out]
    assert list(task.tests) == ["hold-out", "total"] and list(task.tests["total"]) == ["base", "new"]
    assert values(task.tests["total"]["base"]) == list(range(128, 148))
    assert values(task.tests["total"]["new"]) == list(range(148, 178))
    assert task.tests["total"]["new"].labels.min() == 2  # scored over the names of all classes
    assert {images.classes for images in task.tests["total"].values()} == {tuple("vwxyz")}
    official = flags("--dataset officehome --task in-the-wild --protocol official")
    task = clipood.make_task(official, toy_domains(), "c", 0, None, None)
    assert values(task.tests["total"]["new"]) == [148 + i for i in common.domain_split(30, 2, part="open")[0]]


def test_base_and_open_parts_have_splits_of_their_own():
    first, second, plain = (common.domain_split(30, 2, part=part)[0].tolist() for part in ("base", "open", ""))
    assert first != second != plain != first
    seed = int(hashlib.md5(b"(0, 2, 'open')").hexdigest(), 16) % 2**31
    order = list(range(30))
    np.random.RandomState(seed).shuffle(order)
    assert second == order[:6]


def test_open_class_task():
    """Five classes: three base, two new; four validation images of each."""
    args = flags("--dataset folder:nowhere --task open-class --shots 5")
    task = clipood.make_task(args, toy_domains(), "b", 7, None, None)
    assert list(task.train) == ["b"] and task.train["b"].classes == ("v", "w", "x")
    assert task.train["b"].labels.bincount().tolist() == [5, 5, 5]
    tests = {name: sets["b"] for name, sets in task.tests.items()}
    assert tests["base"].classes == ("v", "w", "x") and tests["new"].classes == ("y", "z")
    assert tests["new"].labels.min() == 0 and set(values(tests["new"])) < set(range(94, 114))
    assert not set(values(task.train["b"])) & set(values(tests["base"]))
    assert tests["validation"].labels.bincount().max() <= 4


def test_linear_classifier_names_only_what_it_was_trained_on():
    args, mode = flags(), clipood.Mode("linear", 0, "", 0)
    classify = clipood.classifier(lambda x: x, mode, ("a", "b"), ("b", "new", "a"), None, args)
    assert classify(torch.tensor([[1.0, 2.0], [4.0, 3.0]])).tolist() == [[2, -math.inf, 1], [3, -math.inf, 4]]
    assert clipood.classifier(lambda x: x, mode, ("a", "b"), ("c", "d"), None, args) is None


def small_run(arguments, images_per_class=8, poison=None):
    """A CLIP, a task of two tiny domains (augmented at random) and what `train` needs, small enough for a test."""
    args = flags(f"--batch-size 4 --steps-per-epoch 3 {arguments}")
    model, _, tokenizer = common.load_clip("tiny")
    augment, rng = common.image_transform(model, train=True), common.tiny_rng(0, "small run")
    train = {}
    for domain in ("photo", "cartoon"):
        names = [name for name in common.PACS_CLASSES for _ in range(images_per_class)]
        pixels = tiny_world.draw(names, domain, ["grass"] * len(names), ["red"] * len(names), rng)
        labels = torch.arange(7).repeat_interleave(images_per_class)
        train[domain] = common.ImageSet(pixels, labels, common.PACS_CLASSES, transform=augment)
    if poison is not None:
        bad = train["cartoon"].images[poison]
        train["cartoon"].transform = lambda pixels: augment(pixels).masked_fill(
            (pixels == bad).all((1, 2, 3), keepdim=True), torch.nan
        )
    features = common.class_features(model, tokenizer, common.PACS_CLASSES)
    return args, model, clipood.Task(common.PACS_CLASSES, train, {}), features


def trained(*args, **options):
    """The models and the state at the end of `clipood.train`."""
    *_, last = clipood.train(*args, **options)
    return last


def test_training_moves_the_tower_by_the_gradient_of_the_loss():
    """One step without weight decay or momentum yet: AdamW's first step is -lr * sign of the gradient."""
    args, model, task, features = small_run("--epochs 1 --steps-per-epoch 1 --weight-decay 0 --lr 1e-4")
    modes = {"mms": clipood.read_mode("mms@0.3", args)}
    tower_after = trained(model, task, modes, features, args, seed=5)[0]["mms"]
    torch.manual_seed(5000)  # of augmentation in epoch 0
    batch = next(common.source_batches(task.train, 4, 5000))
    tower = copy.deepcopy(model.visual).requires_grad_(True)
    image_features = F.normalize(tower(batch[0]), dim=-1)
    margin_metric_softmax(image_features, features, batch[1], model.logit_scale.exp(), 0.3).backward()
    for before, after in zip(tower.parameters(), tower_after.parameters()):
        large = before.grad.abs() > 1e-5
        assert torch.allclose((after - before)[large], -1e-4 * before.grad.sign()[large], rtol=5e-2, atol=1e-7)
    assert not any(torch.equal(a, b) for a, b in zip(tower_after.parameters(), model.visual.parameters()))


def test_averages_do_not_change_the_trajectory_and_wise_ft_is_the_middle():
    args, model, task, features = small_run("--epochs 2")
    towers = {}
    for names in (["mms"], ["mms", "mms+bma@1", "mms+wise-ft@0.5", "mms+uniform"]):
        modes = {name: clipood.read_mode(name, args) for name in names}
        models, _ = trained(model, task, modes, features, args, seed=0)
        towers[len(names)] = {name: flat(tower) for name, tower in models.items()}
    assert torch.equal(towers[1]["mms"], towers[4]["mms"])
    start = flat(model.visual)
    assert torch.allclose(towers[4]["mms+wise-ft@0.5"], (start + towers[4]["mms"]) / 2, atol=1e-7)
    # beta = 1 weighs theta_0 ... theta_6 alike, uniform theta_1 ... theta_6
    assert torch.allclose(7 * towers[4]["mms+bma@1"], start + 6 * towers[4]["mms+uniform"], atol=1e-5)


def test_loss_that_is_not_finite_stops_before_it_poisons_anything():
    args, model, task, features = small_run("--epochs 20", poison=13)
    modes = {name: clipood.read_mode(name, args) for name in ("mms", "mms+bma")}
    with pytest.raises(common.InputError) as error:
        for models, _ in clipood.train(model, task, modes, features, args, seed=0):  # noqa: B007
            pass
    message = str(error.value)
    assert "the loss is nan" in message and "learning rate" in message and "step " in message
    assert "cartoon 13" in message and message.count("photo ") == message.count("cartoon ") == 4
    assert all(torch.isfinite(flat(tower)).all() for tower in models.values())


def test_gradient_that_is_not_finite_stops_before_it_poisons_anything(monkeypatch):
    args, model, task, features = small_run("--epochs 1")

    class Poisoned(torch.optim.AdamW):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            self.param_groups[0]["params"][0].register_hook(lambda gradient: gradient * torch.nan)

    monkeypatch.setattr(torch.optim, "AdamW", Poisoned)
    modes = {name: clipood.read_mode(name, args) for name in ("mms", "mms+bma")}
    with pytest.raises(common.InputError, match="step 1 of seed 0.*gradient's norm nan"):
        for models, _ in clipood.train(model, task, modes, features, args, seed=0):  # noqa: B007
            pass
    assert all(torch.isfinite(flat(tower)).all() for tower in models.values())


@pytest.mark.parametrize("loss, workers", [("linear", 0), ("mms", 0), ("mms", 2)])
def test_training_continues_exactly_from_every_epoch(loss, workers, tmp_path):
    args, model, task, features = small_run(f"--epochs 3 --workers {workers}")
    modes = {name: clipood.read_mode(name, args) for name in (loss, f"{loss}+bma", f"{loss}+ema")}
    for models, state in clipood.train(model, task, modes, features, args, seed=1):  # noqa: B007
        common.save_checkpoint(tmp_path / f"{state['epoch']}", state)
    end = {name: flat(tower) for name, tower in models.items()}
    for epoch in range(3):
        torch.randn(epoch + 1)  # whatever happened to the random state
        saved = torch.load(tmp_path / f"{epoch}", weights_only=True)
        models, state = trained(model, task, modes, features, args, 1, saved)
        assert state["epoch"] == 3 and all(torch.equal(flat(models[name]), end[name]) for name in modes)


# ---------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------

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
    """Table, files, and a model that open_clip loads with the accuracy that was reported."""
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (common.PACS_CLASSES, 16, 16))
    output = command("--epochs 1 --steps-per-epoch 4 --lr 3e-3")
    rows = re.findall(r"^(\S+) +\d\d\.\d +\d\d\.\d +\d\d\.\d$", output, re.M)
    assert rows == ["zero-shot", "mms", "mms+wise-ft", "mms+bma"]
    folder = tmp_path / "runs" / "clipood" / "tiny-pacs-sketch-seed0"
    assert {file.name for file in folder.iterdir()} == {"result.json", "model", "averages.png", "distances.png"}
    assert len(list(folder.parent.iterdir())) == 1  # the checkpoint is gone
    plain = open_clip.create_model(f"local-dir:{folder / 'model'}").eval()
    target = common.tiny_domain("tiny-pacs", "sketch", 0, 0.4).balanced
    target.transform = common.load_clip("tiny")[1]
    features = torch.from_numpy(np.load(folder / "model" / "class_features.npy"))
    classify = common.clip_classifier(plain.visual, features)
    accuracy = common.evaluate(classify, {"sketch": target}, "cpu", 64)["accuracy"]
    assert accuracy == result(folder)["modes"]["mms+bma"]["target"]
    assert result(folder)["modes"]["zero-shot"]["target"] != accuracy


@pytest.mark.slow
def test_main_job(checkout, root):
    done = call(readme_script(root, "python clipood.py"), checkout)
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr  # no progress bars where nobody watches
    numbers = result(checkout / "runs" / "clipood" / "tiny-pacs-sketch-seed0")["modes"]
    assert numbers["mms"]["source"] > numbers["zero-shot"]["source"] + 0.1


def test_all_targets_and_seeds(command, two_domains, tmp_path):
    """Tables over targets and seeds; the same run gives the same numbers again, whatever ran before it."""
    line = f"--dataset folder:{two_domains} --study components {QUICK} --epochs 1"
    output = command(f"{line} --target all --seeds 0 1 --summary all.json")
    assert "2 targets, %" in output and "±" in output
    runs = json.loads((tmp_path / "all.json").read_text())["runs"]
    order = [(target, seed) for seed in (0, 1) for target in ("art_painting", "photo")]
    assert [(run["target"], run["seed"]) for run in runs] == order
    modes = clipood.STUDIES["components"].split()
    assert set(runs[0]["modes"]) == set(modes)
    assert common.summary_table("target accuracy, %", modes, runs, lambda row: row["target"]) in output
    command(f"{line} --target photo --seed 1 --summary again.json")
    assert json.loads((tmp_path / "again.json").read_text())["runs"] == runs[3:]


@pytest.mark.parametrize("study", ["margin", "average"])
def test_studies_that_sweep(command, two_domains, tmp_path, study):
    output = command(f"--dataset folder:{two_domains} --target photo --study {study} {QUICK}")
    (name,) = (file.stem for file in (tmp_path / "results").glob("*.json"))
    assert name.startswith(f"clipood-{study}-folder") and name.endswith("domain-shift")
    with Image.open(tmp_path / "results" / f"{name}.png") as sweep:
        assert sweep.width > 2 * sweep.height  # two panels
    modes = clipood.STUDIES[study].split()
    assert all(re.search(rf"^{re.escape(mode)} +\d", output, re.M) for mode in modes)
    (folder,) = (tmp_path / "runs" / "clipood" / study).iterdir()
    steps = [(row["mode"], row["step"]) for row in result(folder)["history"]]
    along = ("mms", "mms+ema", "mms+uniform", "mms+bma")
    assert steps == ([] if study == "margin" else [(mode, step) for step in (0, 2, 4) for mode in along])
    assert (folder / "trajectory.png").exists() == (study == "average")


@pytest.mark.parametrize(
    "name, task, measures, line",
    [
        ("caltech101", "open-class", "validation base new H", "class 'boat' has only 3 images, fewer than 16"),
        ("fgvcaircraft", "open-class", "validation base new H", "training images fgvcaircraft 4"),
        ("imagenet", "domain-shift", f"imagenet {' '.join(common.IMAGENET_SHIFTS)} average OOD", "images imagenet 24"),
        ("imagenet", "open-class", "validation base new H", "training images imagenet 12"),
    ],
)
def test_data_sets_without_domains(command, caltech, aircraft, imagenet, tmp_path, name, task, measures, line):
    output = command(f"--dataset {name} --task {task} --data-root {caltech} --modes zero-shot linear mms+bma {QUICK}")
    assert line in output
    kind = name if task == "domain-shift" else f"{name}-{task}"
    numbers = result(tmp_path / "runs" / "clipood" / f"{kind}-{name}-seed0")["modes"]
    assert " ".join(numbers["mms+bma"]) == measures
    if task == "open-class":
        base, new, h = (numbers["mms+bma"][measure] for measure in ("base", "new", "H"))
        assert h == pytest.approx(2 * base * new / (base + new) if base + new else 0)
        assert list(numbers["linear"]) == ["validation", "base"]
    else:
        shifts = [numbers["linear"][name] for name in common.IMAGENET_SHIFTS]
        assert numbers["linear"]["average OOD"] == pytest.approx(sum(shifts) / 4)


def test_in_the_wild_and_open_class_of_a_domain(command, pacs_tree, tmp_path):
    line = f"--dataset pacs --data-root {pacs_tree} --target photo --study loss --eval-every 1 {QUICK}"
    for task in ("in-the-wild", "open-class"):
        assert "training images" in command(f"{line} --task {task}")
        folder = tmp_path / "runs" / "clipood" / "loss" / f"pacs-{task}-photo-seed0"
        assert {"images.png", "trajectory.png", "averages.png", "distances.png"} <= {f.name for f in folder.iterdir()}
        for row in result(folder)["history"]:
            assert row["mode"] in ("linear", "ms", "mms") and (row["loss"] is None) == (row["step"] == 0)
    numbers = result(folder.with_name("pacs-in-the-wild-photo-seed0"))["modes"]
    assert list(numbers["mms"]) == ["hold-out", "base", "new", "total", "H"]
    assert numbers["linear"]["new"] == numbers["linear"]["H"] == 0
    total = (9 * numbers["ms"]["base"] + 12 * numbers["ms"]["new"]) / 21  # three and four classes of three images
    assert numbers["ms"]["total"] == pytest.approx(total)


def test_text_features_are_computed_once(command, two_domains, monkeypatch):
    calls, own = [], common.class_features
    monkeypatch.setattr(common, "class_features", lambda *args: calls.append(args) or own(*args))
    command(f"--dataset folder:{two_domains} --target all --modes zero-shot ms mms+bma --eval-every 1 {QUICK}")
    assert len(calls) == 1


def test_killed_run_is_resumed_exactly(root, command, two_domains, tmp_path):
    """SIGKILL while it trains; with --resume it ends with the numbers, the history and the model of a quiet run."""
    line = (
        f"--dataset folder:{two_domains} --target photo --model tiny --epochs 3 --steps-per-epoch 8 "
        "--batch-size 4 --workers 0 --modes zero-shot ms mms mms+ema mms+bma --eval-every 1"
    )
    command(f"{line} --output quiet")
    (quiet,) = (tmp_path / "quiet" / "clipood").iterdir()
    killed = tmp_path / "killed" / "clipood" / quiet.name
    checkpoint = killed.with_name(f"{killed.name}.checkpoint")
    arguments = [sys.executable, str(root / "clipood.py"), *f"{line} --output killed".split()]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    saved = {"training": {}}
    while not (saved["training"].get("mms/mms+ema/mms+bma") or {"epoch": 0})["epoch"]:
        time.sleep(0.05)
        assert process.poll() is None, "ended before it could be killed"
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)  # complete at every moment
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    output = command(f"{line} --output killed --resume")
    assert "zero-shot:" not in output and "\nms:" not in output and "\nmms:" in output  # two trainings were done
    assert result(quiet) == result(killed)
    weights = [(folder / "model" / "open_clip_model.safetensors").read_bytes() for folder in (quiet, killed)]
    assert weights[0] == weights[1]
    assert list(killed.parent.iterdir()) == [killed]  # neither checkpoint nor orphans
    assert "is complete" in command(f"{line} --output killed --resume")
    assert "lr 0.0004, now 1e-05" in command(f"{line} --output killed --resume --lr 1e-5")


def test_checkpoint_survives_a_kill_while_it_is_written(root, tmp_path):
    code = (
        "import torch, common, pathlib\n"
        "for k in range(10**6):\n"
        "    common.save_checkpoint(pathlib.Path('state'), {'k': k, 'tensor': torch.full((400_000,), k)})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    while not (tmp_path / "state").exists():
        time.sleep(0.05)
    for _ in range(20):
        saved = torch.load(tmp_path / "state", weights_only=True)
        assert (saved["tensor"] == saved["k"]).all()
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = torch.load(tmp_path / "state", weights_only=True)
    assert (saved["tensor"] == saved["k"]).all()


@pytest.mark.slow
def test_real_architecture_on_a_real_layout(checkout, pacs_tree, tmp_path):
    """ViT-B-32, random weights from a file: trained, averaged, exported, loaded by open_clip with its activation."""
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), tmp_path / "vit.pt")
    done = call(
        f"clipood.py --dataset pacs --data-root {pacs_tree} --model ViT-B-32-quickgelu "
        f"--pretrained {tmp_path / 'vit.pt'} --epochs 1 --steps-per-epoch 2 --batch-size 2 --lr 1e-3 --modes mms+bma",
        checkout,
    )
    assert done.returncode == 0, done.stderr
    folder = checkout / "runs" / "clipood" / "pacs-sketch-seed0"
    plain, preprocess, tokenizer = common.load_clip(f"local-dir:{folder / 'model'}")
    assert type(plain.visual.transformer.resblocks[0].mlp.gelu) is open_clip.transformer.QuickGELU
    assert not torch.equal(plain.visual.proj, torch.load(tmp_path / "vit.pt")["visual.proj"])
    split = common.leave_one_out(common.load_domains("pacs", pacs_tree), "sketch", preprocess, preprocess)
    features = common.class_features(plain, tokenizer, common.PACS_CLASSES)
    classify = common.clip_classifier(plain.visual, features)
    assert common.evaluate(classify, split.target)["accuracy"] == result(folder)["modes"]["mms+bma"]["target"]


@pytest.mark.parametrize(
    "task, dataset, seeds",
    [("domain-shift", "tiny-pacs", 5), ("open-class", "tiny-office", 5), ("in-the-wild", "tiny-office", 5)],
)
def test_readme_tables_are_the_committed_runs(root, task, dataset, seeds):
    committed = json.loads((root / "results" / f"clipood-components-{dataset}-{task}.json").read_text())
    runs, now = committed["runs"], vars(flags(f"--dataset {dataset} --task {task}"))
    assert {(run["target"], run["seed"]) for run in runs} == {(t, s) for t in common.TINY_DOMAINS for s in range(seeds)}
    for name in (
        "batch_size",
        "lr",
        "head_lr",
        "epochs",
        "steps_per_epoch",
        "margin",
        "beta",
        "wise_ft",
        "weight_decay",
        "cue",
    ):
        assert committed["settings"][name] == now[name], f"results were made with another {name}"
    readme = (root / "README.md").read_text()
    assert f"```text\n{common.measures_table(f'{dataset}, {task}, %', runs)}\n```" in readme
    if task == "domain-shift":
        by_target = common.summary_table(
            "target accuracy, %", clipood.STUDIES["components"].split(), runs, lambda row: row["target"]
        )
        assert f"```text\n{by_target}\n```" in readme


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--dataset caltech102", ("unknown data set 'caltech102'", "did you mean 'caltech101'")),
        ("--dataset caltech101 --task in-the-wild", ("--task in-the-wild", "caltech101", "--task open-class")),
        ("--dataset ucf101", ("'ucf101' is not in data/ucf101", "split_zhou_UCF101.json", "CoOp", "tiny-office")),
        ("--dataset imagenet", ("'imagenet' is not in data/imagenet", "classnames.txt")),
        ("--dataset officehome", ("data/office_home", "tiny-office")),
        ("--target skech", ("skech", "did you mean 'sketch'")),
        ("--modes zero-shot mmd", ("--modes", "'mmd'", "linear, ms or mms[@LAMBDA]")),
        ("--margin -1", ("mms", "lambda")),
        ("--beta 0", ("beta > 0", "beta=0.0")),
        ("--shots 0", ("--shots must be at least 1, got 0",)),
        ("--lr nan", ("--lr must be at least 0, got nan",)),
        ("--steps-per-epoch 0", ("--steps-per-epoch must be at least 1",)),
        ("--study loss", ("--summary", "no folder results")),
        ("--templates photo", ("{}", "'photo'")),
        ("--output taken", ("cannot write results to", "--output")),
    ],
)
def test_wrong_flag_is_one_clear_error(command, monkeypatch, tmp_path, arguments, words):
    (tmp_path / "taken").write_text("a file where a folder should be")
    (tmp_path / "results").rmdir()
    monkeypatch.setattr(common, "draw_domain", quick_draw_domain)
    error = command(arguments)
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert not list(tmp_path.glob("runs/**/*"))[1:]


def quick_draw_domain(name, classes, domain, seed, cue, sizes):
    """Grey in place of drawings, where a test ends before it looks at an image."""
    for labels in (torch.arange(len(classes)).repeat_interleave(size) for size in sizes):
        yield torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8), labels, torch.zeros_like(labels)
