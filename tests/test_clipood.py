"""CLIPood against explicit sums, slow loops, closed forms and finite differences; its data sets, its command, its resume."""

import argparse
import copy
import json
import math
import os
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
    for images, classes, margin in ((unit(2, 4), unit(3, 5), 0.3), (unit(2, 4), unit(3, 4), -0.1), (unit(4), unit(3, 4), 0)):
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
    for wrong in ("mmd", "ms@0.3", "mms@-1", "mms@nan", "mms+bma@0", "mms+ema@1.5", "zero-shot+bma", "mms+swa", "mms+ema@x", ""):
        with pytest.raises(common.InputError, match="cannot read"):
            clipood.read_mode(wrong, FLAGS)


def test_modes_of_one_loss_share_a_training_and_the_last_comes_last():
    names = ["mms", "linear", "ms", "ms+bma", "mms@0.3+ema", "mms@0.5", "ms+ema", "zero-shot", "mms+bma"]
    groups = clipood.trainings({name: clipood.read_mode(name, FLAGS) for name in names})
    assert [list(group) for group in groups] == [
        ["linear"], ["mms@0.5"], ["ms", "ms+bma", "ms+ema"], ["zero-shot"], ["mms", "mms@0.3+ema", "mms+bma"]]  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Data: few shots, base and new classes, readers
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, base, wild", [(2, 1, 1), (7, 4, 3), (8, 4, 4), (65, 33, 32)])
def test_base_and_new_classes(n, base, wild):
    assert common.base_and_new(n) == (range(base), range(base, n))
    assert common.base_and_new(n, odd_to_base=False) == (range(wild), range(wild, n))


def test_one_class_has_no_new_half():
    with pytest.raises(common.InputError, match="at least 2 classes"):
        common.base_and_new(1)


def toy_images(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return common.ImageSet(pixels, labels, tuple("abcdefgh"[: len(counts)]))


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
        ("caltech101", lambda f: (f / "split_zhou_Caltech101.json").write_text("{"), ("cannot read", "JSONDecodeError")),
        ("caltech101", lambda f: (f / "split_zhou_Caltech101.json").write_text('{"train": []}'), ("KeyError", "val")),
        ("caltech101", lambda f: (f / "101_ObjectCategories").rename(f / "other"), ("no image", "101_ObjectCategories")),
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
