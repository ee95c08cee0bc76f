"""CLIPood against explicit sums, slow loops, closed forms, finite differences; its command."""

import copy
import hashlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
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
def test_margin_metric_softmax_equals_a_loop_and_has_its_slope(margin):
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

    def of_free(x):
        return margin_metric_softmax(F.normalize(x, dim=-1), classes, labels, 1 / tau, margin)

    assert torch.autograd.gradcheck(of_free, unit(6, 8, seed=2).requires_grad_(True))


def test_margin_of_float32_features_is_symmetric_and_zero_for_the_class_itself():
    features = unit(50, 512).float()
    features[7] = features[3]  # two names with the same meaning
    distances = class_distances(features)
    assert torch.equal(distances, distances.T) and torch.equal(distances.diag(), torch.zeros(50))
    assert distances.min() >= 0 and distances.max() <= 2 and distances[3, 7] < 1e-6
    exact = 1 - float(features[0].double() @ features[1].double())
    assert distances[0, 1].item() == pytest.approx(exact, abs=1e-6)


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
    for running, trajectory, _ in walk(40, beta=beta):
        t = len(trajectory)
        expected = alpha[:t] @ trajectory / alpha[:t].sum()
        assert torch.allclose(flat(running.model), expected, rtol=1e-10, atol=0)
        if beta == 1:
            assert torch.allclose(expected, trajectory.mean(0), rtol=1e-12, atol=0)
        assert running.model.layers[1].num_batches_tracked == t - 1
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


def test_half_precision_models_are_averaged_in_float32():
    *_, (running, trajectory, model) = walk(200, torch.bfloat16)
    weights = beta_weights(200, 0.5)
    expected = weights @ trajectory / weights.sum()
    assert all(parameter.dtype == torch.float32 for parameter in running.model.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert torch.allclose(flat(running.model), expected, rtol=1e-5, atol=1e-5)


# ---------- Published settings -------------------------------------------------------------------
def settings(arguments=""):
    """The command's settings and {row: its settings}."""
    return clipood.settings(arguments.split())


def rows_of(*names, arguments=""):
    _, rows = settings(f"{arguments} --modes {' '.join(names)}")
    return rows


# batch size, learning rate, epochs, lambda, beta; also of what the paper does not publish
SETTINGS = [
    ("domain-shift", "pacs vlcs terra folder:x", (12, 5e-6, 10, 0.3, 0.5)),
    ("domain-shift", "officehome", (12, 1e-5, 10, 0.3, 0.5)),
    ("domain-shift", "domainnet", (12, 1e-5, 20, 0.3, 0.5)),
    ("domain-shift", "imagenet", (36, 5e-6, 10, 0.3, 0.5)),
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


def toy_images(counts, classes="abcdefgh"):
    """Every pixel of an image is its number."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    numbers = torch.arange(len(labels), dtype=torch.uint8)
    pixels = numbers.view(-1, 1, 1, 1).repeat(1, 3, 2, 2)
    return common.ImageSet(pixels, labels, tuple(classes[: len(counts)]))


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
def toy_domains():
    """Domains whose every pixel tells domain, class and place: 64 * domain + 10 * class + place."""
    domains = []
    for index, name in enumerate("abc"):
        images = toy_images([10] * 5, "vwxyz")
        images.images += 64 * index
        domains.append(common.Domain(name, images))
    return domains


def toy_task(arguments, target, seed=0):
    """The task of a command line on toy domains."""
    args, _ = settings(arguments)
    return clipood.make_task(args, toy_domains(), target, seed)


def values(images):
    return images.images[:, 0, 0, 0].tolist()


def test_official_domain_shift_tests_a_fifth_of_the_target():
    official = toy_task("--dataset pacs --protocol official", "b").tests["target"]["b"]
    assert values(official) == [64 + i for i in common.domain_split(50, 1)[0]]
    assert len(official) == 10


def test_in_the_wild_task():
    """Five classes: two base, three new. Nothing new and nothing of the target is trained on."""
    task = toy_task("--dataset officehome --task in-the-wild", "c")
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
    official = toy_task("--dataset officehome --task in-the-wild --protocol official", "c").tests
    assert values(official["total"]["new"]) == values(total["new"])


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
    """A CLIP, a task of two domains of noise that are augmented at random, rows, class features."""
    rows = rows_of(*names, arguments=f"--batch-size 4 --steps-per-epoch 3 {arguments}")
    clip, classes, train = common.load_clip("tiny"), tiny_world.PACS_CLASSES, {}
    generator = torch.Generator().manual_seed(0)
    for domain in ("photo", "cartoon"):
        pixels = torch.randint(256, (56, 3, 32, 32), generator=generator, dtype=torch.uint8)
        labels = torch.arange(7).repeat_interleave(8)
        train[domain] = common.ImageSet(pixels, labels, classes, transform=clip.augment)
    return clip, common.Task(classes, train, {}), rows, clip.class_features(classes)


@pytest.mark.parametrize(
    "storage, rtol, least, most",  # 1e-3: a last digit of float16
    [("float16", 1e-3, 0, 0.3), ("float32", 1e-5, 0.99, 1)],
)
def test_training_is_the_authors_loop(storage, rtol, least, most):
    """Their step written out: float16 weights are float32 for AdamW, and 5e-6 moves few of them."""
    arguments = f"--epochs 2 --lr 5e-6 --storage {storage}"
    clip, task, rows, features = small_run("mms+bma", "mms", arguments=arguments)
    models = clipood.train(clip, task, rows, features, seed=2)
    stored = copy.deepcopy(clip.visual)
    if storage == "float16":
        open_clip.model.convert_weights_to_lp(stored)  # theirs: OpenAI's function of this name
    stored, mean = list(stored.parameters()), [p.clone() for p in stored.parameters()]
    assert {str(weight.dtype)[6:] for weight in stored} == {storage, "float32"}
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
        assert torch.allclose(found, own.float(), rtol=rtol, atol=1e-7)
    assert least < clipood.share_moved(models["mms"], clip.visual) <= most


def test_norms_with_statistics_keep_those_of_clip():
    clip, task, rows, features = small_run("mms", arguments="--epochs 1")
    layers = [nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 64)]
    clip = replace(clip, visual=nn.Sequential(*layers).eval())
    models = clipood.train(clip, task, rows, features, seed=0)
    norm = models["mms"][1]
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(8))
    assert not torch.equal(norm.weight, torch.ones(8))


def test_the_official_protocol_resizes_bilinearly():
    for interpolation in (None, "bilinear"):
        clip = common.load_clip("tiny", interpolation=interpolation)
        expected = interpolation or "bicubic"
        assert clip.config["preprocess_cfg"]["interpolation"] == expected
        for transform in (clip.preprocess.transforms[0], clip.augment):
            assert transform.interpolation.value == expected


def test_training_goes_on_exactly_from_a_checkpoint():
    small = small_run("linear", "linear+bma", "linear+ema", arguments="--epochs 2")
    saved = []
    run = SimpleNamespace(state={}, extra={}, save=lambda now: saved.append(copy.deepcopy(now)))
    models = clipood.train(*small, seed=1, run=run)
    torch.randn(3)  # whatever happened to the random state
    run.state = saved[0]
    again = clipood.train(*small, seed=1, run=run)
    assert len(saved) == 3  # two epochs, then one
    for name, model in models.items():
        assert torch.equal(flat(again[name]), flat(model))


# ---------- The command --------------------------------------------------------------------------
def test_exported_model_has_the_reported_accuracy(call_main, small_world, tmp_path):
    call_main(clipood.main, "--epochs 1 --steps-per-epoch 2 --lr 3e-3")
    folder = tmp_path / "runs" / "clipood" / "tiny-pacs-sketch-seed0"
    plain = open_clip.create_model(f"local-dir:{folder / 'model'}").eval()
    clip, target = common.load_clip("tiny"), common.tiny_domain("tiny-pacs", "sketch", 0, 0.4)
    features = torch.from_numpy(np.load(folder / "model" / "class_features.npy"))
    images = clip.preprocess(target.balanced.images)
    scores = plain.encode_image(images, normalize=True) @ features.T
    accuracy = (scores.argmax(1) == target.balanced.labels).double().mean().item()
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert rows["mms+bma"]["target"] == accuracy != rows["zero-shot"]["target"]


def test_shifts_of_imagenet(call_main, imagenet, tmp_path):
    line = "--dataset imagenet --model tiny --templates {} --modes linear mms+bma --workers 0"
    training = f"--data-root {imagenet} --epochs 1 --steps-per-epoch 2 --batch-size 4"
    call_main(clipood.main, f"{line} {training}")
    file = tmp_path / "runs" / "clipood" / "imagenet-imagenet-seed0" / "result.json"
    rows = json.loads(file.read_text())["rows"]
    assert list(rows["mms+bma"]) == ["imagenet", *common.IMAGENET_SHIFTS, "average OOD"]
    shifts = [rows["linear"][name] for name in common.IMAGENET_SHIFTS]
    assert rows["linear"]["average OOD"] == pytest.approx(sum(shifts) / 4)
