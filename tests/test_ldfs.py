"""LDFS against slow loops and closed forms; who sees which images when; its runs."""

import argparse
import functools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import call, readme_script
from PIL import Image

import common
import ldfs
from ldfs import (
    Mapper,
    global_direction_loss,
    local_direction_loss,
    pairwise_loss,
    perturb_text,
    synthesis_quality,
)
from support import tiny_world


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """The command takes one thread for the tiny CLIP; this process has other tests to do."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


# ---------- Losses -------------------------------------------------------------------------------
def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def length(vector):
    return math.sqrt(sum(x * x for x in vector))


def slow_direction_loss(features, mapped, source, target, reach=0.0):
    """Sample by sample, coordinate by coordinate."""
    losses = []
    for f, m, s, t in zip(*(x.tolist() for x in (features, mapped, source, target))):
        move = [b - a for a, b in zip(f, m)]
        text = [b - a for a, b in zip(s, t)]
        dot = sum(a * b for a, b in zip(move, text))
        least = max(0.01, reach * length(text))
        losses.append(1 - dot / (max(length(move), least) * length(text)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("reach", [0.0, 0.6, 1.0, 3.0])
def test_local_direction_loss_equals_a_loop(reach):
    vectors = [unit(7, 6, seed=seed) for seed in range(4)]
    loss = local_direction_loss(*vectors, reach)
    assert loss.item() == pytest.approx(slow_direction_loss(*vectors, reach), rel=1e-12)


def test_local_direction_loss_at_its_ends():
    features, source, target = (unit(5, 6, seed=seed) for seed in range(3))
    text = target - source

    def loss(move, reach=0.0):
        return local_direction_loss(features, features + move, source, target, reach).item()

    for step, expected in ((0.3, 0), (2.0, 0), (-0.3, 2)):
        assert loss(step * text) == pytest.approx(expected)
    # shorter than its caption's: in part
    for step, expected in ((0.25, 0.75), (1.0, 0), (1.7, 0), (-0.25, 1.25), (-1.0, 2)):
        assert loss(step * text, reach=1.0) == pytest.approx(expected)
    sideways = torch.linalg.svd(text[:, None]).Vh[:, -1]  # orthogonal to each text
    assert loss(sideways) == pytest.approx(1)


@pytest.mark.parametrize("reach", [0.0, 1.0])
def test_gradient_at_the_start_points_along_the_text(reach):
    """At M(f) = f, where the plain cosine has none: -dT / (B |dT| max(0.01, reach |dT|))."""
    features, source, target = (unit(5, 6, seed=seed) for seed in range(3))
    mapped = features.clone().requires_grad_()
    local_direction_loss(features, mapped, source, target, reach).backward()
    text = target - source
    norm = text.norm(dim=1, keepdim=True)
    expected = -text / norm / (reach * norm).clamp(min=0.01) / 5
    assert torch.allclose(mapped.grad, expected, rtol=1e-10)

    def plain(m):
        return (1 - F.cosine_similarity(m - features, text, eps=1e-300)).mean()

    gradient = torch.autograd.functional.jacobian(plain, features)
    assert not gradient.isfinite().all() or gradient.abs().max() > 1e6


@pytest.mark.parametrize("reach", [0.0, 1.0])
def test_gradients_are_finite_differences(reach):
    features, mapped, *texts = (unit(4, 5, seed=seed) for seed in range(4))
    mapped.requires_grad_()
    labels = torch.tensor([0, 1, 0, 1])
    for loss in (
        lambda m: local_direction_loss(features, m, *texts, reach),
        lambda m: global_direction_loss(features, m, *texts, labels, reach),
        lambda m: pairwise_loss(features, m),
    ):
        assert torch.autograd.gradcheck(loss, mapped)


def test_global_direction_is_the_mean_of_the_class():
    features, mapped, *texts = (unit(6, 5, seed=seed) for seed in range(4))
    labels = torch.tensor([2, 0, 2, 1, 0, 2])
    means = []
    for text in texts:
        means.append(torch.stack([text[labels == label].mean(0) for label in labels]))
    loss = global_direction_loss(features, mapped, *texts, labels).item()
    assert loss == pytest.approx(slow_direction_loss(features, mapped, *means), rel=1e-12)
    names = [text[:3][labels] for text in texts]  # nothing but the class name: the same as local
    local = local_direction_loss(features, mapped, *names).item()
    both = global_direction_loss(features, mapped, *names, labels).item()
    assert local == pytest.approx(both, rel=1e-12)


def test_pairwise_loss_equals_a_loop():
    features, mapped = unit(6, 4), unit(6, 4, seed=1)
    expected = 0
    for i in range(6):
        for j in range(6):
            change = float(mapped[i] @ mapped[j]) - float(features[i] @ features[j])
            expected += (i != j) * change**2 / 30
    assert pairwise_loss(features, mapped).item() == pytest.approx(expected, rel=1e-12)
    assert pairwise_loss(features[:1], mapped[:1]).item() == 0


def test_pairwise_loss_does_not_see_rotations():
    features, mapped = unit(6, 4), unit(6, 4, seed=1)
    rotation, other = (torch.linalg.qr(unit(4, 4, seed=seed))[0] for seed in (2, 3))
    loss = pairwise_loss(features, mapped).item()
    assert loss > 0.01
    turned = pairwise_loss(features @ rotation, mapped @ other).item()
    assert turned == pytest.approx(loss, rel=1e-10)
    assert pairwise_loss(features, features @ rotation).item() == pytest.approx(0, abs=1e-28)


def test_noise_on_texts():
    """In D dimensions T + sigma * noise has length sqrt(1 + sigma^2 D), so its cosine with T is one
    over that."""
    text, sigma = unit(1, 4096).expand(400, -1).float(), 0.02
    generator = torch.Generator().manual_seed(1)
    noisy = perturb_text(text, sigma, generator)
    assert torch.allclose(noisy.norm(dim=1), torch.ones(400), atol=1e-5)
    cosine = (noisy * text).sum(1)
    assert cosine.mean().item() == pytest.approx(1 / math.sqrt(1 + sigma**2 * 4096), abs=2e-3)
    away = noisy / cosine[:, None] - text  # = sigma * noise, but for the part along T
    assert away.std().item() == pytest.approx(sigma, rel=0.05)
    assert away.mean().abs() < 1e-4
    directions = F.normalize(away, dim=1)
    assert (directions[:50] @ directions[50:100].T).abs().max() < 0.1  # each its own
    assert not torch.equal(noisy, perturb_text(text, sigma, generator))  # and anew in every call
    assert torch.equal(noisy, perturb_text(text, sigma, torch.Generator().manual_seed(1)))
    assert torch.allclose(perturb_text(text, 0.0), text, atol=1e-6)


# ---------- Mapper and classifiers ---------------------------------------------------------------
def row_of(**changes):
    row = {"direction": "local", "sigma": 0.05, "pairwise": 1.0, "consistency": 0.0, "reach": 1.0}
    row |= {"temperature": "none", "mapper": "residual"}
    row |= {"hidden": 32, "mapper_epochs": 8, "mapper_lr": 1e-3, "weight_decay": 0.005}
    row |= {"batch_size": 16, "finetune": "probe", "epochs": 6, "lr": None, "model": "tiny"}
    return argparse.Namespace(**{**row, **changes})


def batch_of(n=64, dim=12, classes=3, seed=0):
    features, source, target = (unit(n, dim, seed=seed + i).float() for i in range(3))
    return features, torch.arange(n) % classes, source, target


def test_mapper_starts_at_the_identity_and_stays_on_the_sphere():
    torch.manual_seed(0)
    features, mapper = unit(9, 12).float(), Mapper(12, 32)
    assert torch.allclose(mapper(features), features, atol=1e-6)
    torch.nn.init.normal_(mapper.layers[2].weight)
    moved = mapper(features)
    assert torch.allclose(moved.norm(dim=1), torch.ones(9), atol=1e-5)
    assert not torch.allclose(moved, features, atol=0.1)
    first, _, second = mapper.layers
    hidden = (features @ first.weight.T + first.bias).clamp(min=0)
    slow = features + hidden @ second.weight.T + second.bias
    assert torch.allclose(moved, slow / slow.norm(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"reach": 0.0}, {"direction": "global"}, {"consistency": 1.0}]
)
def test_first_ten_steps_from_the_identity_lower_the_loss(changes):
    torch.manual_seed(0)
    row, batch, mapper = row_of(**changes), batch_of(), Mapper(12, 32)
    optimizer, losses = torch.optim.AdamW(mapper.parameters(), lr=1e-3), []
    for _ in range(11):
        loss = ldfs.mapper_loss(row, mapper, batch, unit(3, 12).float(), 10.0, sigma=0)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in mapper.parameters())
        optimizer.step()
    assert all(later < earlier for earlier, later in zip(losses, losses[1:])), losses


LADS = {"direction": "global", "pairwise": 0.0, "consistency": 1.0, "reach": 0.0, "mapper": "lads"}


@pytest.mark.parametrize("temperature", ["none", "clip"])
def test_loss_of_lads_is_that_of_its_code(temperature):
    """Image by image: its class's text direction against the raw mapper output minus the feature;
    cross-entropy of plain cosines (ours, if asked for: of logits), classes weighted alike."""
    torch.manual_seed(1)
    row, mapper, names = row_of(**LADS, temperature=temperature), Mapper(12, 32, False), unit(3, 12)
    features, _, source, target = batch_of(20)
    labels = torch.tensor([0] * 12 + [1] * 5 + [2] * 3)
    batch, weights = (features, labels, source, target), ldfs.balanced(labels, 3)
    found = ldfs.mapper_loss(row, mapper, batch, names.float(), 10.0, 0, weights).item()
    directions, entropies, total = [], [], 0
    raw = mapper.layers(features)
    assert (raw.norm(dim=1) - 1).abs().min() > 0.1
    for i in range(20):
        own = labels == labels[i]
        text = target[own].mean(0) - source[own].mean(0)
        directions.append(1 - F.cosine_similarity(raw[i] - features[i], text, dim=0).item())
        cosines = names.float() @ (raw[i] / raw[i].norm())
        logits = cosines * (10 if temperature == "clip" else 1)
        weight = 1 / own.sum().item()  # so that every class counts alike
        total += weight
        entropies.append(weight * -logits.log_softmax(0)[labels[i]].item())
    assert found == pytest.approx(sum(directions) / 20 + sum(entropies) / total, rel=1e-5)
    assert torch.allclose(mapper(features), F.normalize(raw, dim=1))  # only then


def test_best_epoch_of_the_hold_out_is_taken(monkeypatch):
    """Held-out captions move the other way, so what is learnt makes the hold-out worse."""
    row, train, names = row_of(mapper_epochs=6, mapper_lr=3e-3), batch_of(), unit(3, 12).float()
    holdout = [train[0], train[1], train[3], train[2]]
    losses, own = [], ldfs.holdout_loss

    def spy(*arguments):
        losses.append(own(*arguments))
        return losses[-1]

    monkeypatch.setattr(ldfs, "holdout_loss", spy)
    mapper = ldfs.train_mapper(row, train, holdout, names, 10.0, seed=0)
    best = ldfs.mapper_loss(row, mapper, holdout, names, 10.0, 0).item()
    assert len(losses) == 6
    assert losses == sorted(losses)
    assert best == losses[0] < losses[1]


def test_a_large_hold_out_is_measured_in_batches():
    row, names = row_of(), unit(3, 12).float()
    mapper, holdout = Mapper(12, 32), batch_of(1024 + 76)
    mapper.layers[2].weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    weights = ldfs.balanced(holdout[1], 3)
    parts = []
    for start, end in ((0, 1024), (1024, 1100)):
        part = [values[start:end] for values in holdout]
        loss = ldfs.mapper_loss(row, mapper, part, names, 10.0, 0, weights)
        parts.append((end - start) * loss.item())
    found = ldfs.holdout_loss(row, mapper, holdout, names, 10.0, weights)
    assert found == pytest.approx(sum(parts) / 1100, rel=1e-6)


def test_losses_that_are_not_finite_are_said():
    train, names = batch_of(40), unit(3, 12).float()
    holdout = [train[0] * math.nan, *train[1:]]
    with pytest.raises(common.InputError, match="mapper's loss is nan; try a lower --mapper-lr"):
        ldfs.train_mapper(row_of(), train, holdout, names, 10.0, seed=0)
    match = r"probe's \(--lr\) epoch 1, batch 1 of seed 0, learning rate 0.003: the loss is nan"
    with pytest.raises(common.InputError, match=match):
        ldfs.fine_tune(row_of(), Toy, "abc", names, [holdout[:2]], seed=0)


class Toy:
    """Stands for a Clip where only its scale is needed."""

    logit_scale = 5.0


def classifier(method, names, features, labels):
    torch.manual_seed(0)
    return ldfs.make_classifier(row_of(finetune=method), Toy, "abc", names, features, labels)


def test_probes_start_at_zero_shot_or_at_random():
    features, labels, *_ = batch_of(12)
    names = unit(3, 12, seed=7).float()
    zero_shot = 5 * features @ names.T
    logits = {}
    for method in ("zero-shot", "probe", "probe-random"):
        logits[method] = classifier(method, names, features, labels)(features)
    assert torch.allclose(logits["zero-shot"], zero_shot)
    assert torch.allclose(logits["probe"], zero_shot)
    assert not torch.allclose(logits["probe-random"], zero_shot, atol=0.5)


def test_what_learns_does_not_change_what_it_learns_from():
    """Tip-Adapter's keys start as the training features, and are none of them."""
    features, labels, *_ = batch_of(12)
    names, before = unit(3, 12, seed=7).float(), features.clone()
    for method in ("probe", "adapter", "tip-adapter"):
        model = classifier(method, names, features, labels)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        assert torch.equal(features, before)
        assert torch.equal(names, unit(3, 12, seed=7).float())


@pytest.mark.parametrize("method", ["probe", "probe-random", "adapter", "tip-adapter"])
def test_fine_tuning_learns_and_repeats(method):
    features, labels, *_ = batch_of(90)
    names, row = unit(3, 12, seed=7).float(), row_of(finetune=method, lr=0.03, epochs=40)
    before, sets = features.clone(), [(features, labels)]
    first, again = (ldfs.fine_tune(row, Toy, "abc", names, sets, seed=3) for _ in range(2))
    with torch.no_grad():
        assert torch.equal(first(features), again(features))
        assert torch.equal(features, before)
        loss = F.cross_entropy(first(features), labels)
        zero_shot = F.cross_entropy(5 * features @ names.T, labels)
    assert loss < zero_shot - 0.2


def test_rows_take_equally_many_steps(monkeypatch):
    """Synthesised features make a batch larger, not an epoch longer."""
    features, labels, *_ = batch_of(40)
    sizes, own = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, y: sizes.append(len(y)) or own(x, y))
    for sets in ([(features, labels)], [(features, labels)] * 3):
        sizes.clear()
        ldfs.fine_tune(row_of(epochs=2), Toy, "abc", unit(3, 12).float(), sets, seed=0)
        assert len(sizes) == 6  # 40 source features in batches of 16: 3 steps
        assert sum(sizes) == 2 * 40 * len(sets)


# ---------- Settings, images ---------------------------------------------------------------------
def settings(text=""):
    return ldfs.settings(text.split())


def tiny_set(n, domain="photo", classes=tiny_world.PACS_CLASSES, seed=1):
    """n drawn images and the words for their color and place."""
    rng = tiny_world.tiny_rng(seed, "ldfs test", domain)
    labels = np.arange(n) % len(classes)
    colors = rng.choice(list(tiny_world.COLORS), n)
    places = rng.choice(list(tiny_world.BACKGROUNDS), n)
    pixels = tiny_world.draw([classes[i] for i in labels], domain, places, colors, rng)
    return common.ImageSet(pixels, torch.from_numpy(labels), classes), colors, places


def look(images, clip=None):
    return ldfs.encode(clip or common.load_clip(), images, 0, {})


# ---------- Who sees what ------------------------------------------------------------------------
QUICK = "--mapper-epochs 2 --epochs 2 --hidden 16"


@pytest.fixture
def command(call_main, monkeypatch):
    """`call_main` of ldfs. Pictures take seconds: only where a test asks for them."""
    draw = ldfs.plot_neighbours

    def run(line, *more, pictures=False):
        monkeypatch.setattr(ldfs, "plot_neighbours", draw if pictures else lambda *_: None)
        return call_main(ldfs.main, [*line.split(), *more])

    return run


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (tiny_world.PACS_CLASSES, 8, 8))


@pytest.fixture
def few_birds(monkeypatch):
    few = functools.partial(common.draw_waterbirds, sizes=(60, 8, 40))
    monkeypatch.setattr(common, "draw_waterbirds", few)


def records_of(path):
    return json.loads(path.read_text())["records"]


def test_features_are_computed_once(pacs_tree, monkeypatch):
    clip, cache, calls, own = common.load_clip(), {}, [], common.outputs
    monkeypatch.setattr(common, "outputs", lambda *rest: calls.append(1) or own(*rest))
    first, again = (common.load_domains("pacs", pacs_tree)[2].images for _ in range(2))
    features = ldfs.encode(clip, first, 0, cache).features
    pixels = torch.stack([clip.preprocess(Image.open(file)) for file in first.images])
    with torch.no_grad():
        expected = clip.model.encode_image(pixels, normalize=True)
    assert torch.allclose(features, expected, atol=1e-6)
    assert torch.equal(ldfs.encode(clip, again, 0, cache).features, features)
    assert len(calls) == 1
    part = ldfs.encode(clip, first.subset(range(4)), 0, cache)
    assert torch.allclose(part.features, features[:4], atol=1e-6)
    assert len(calls) == 2


def test_no_target_image_is_read_before_everything_is_learnt(command, pacs_tree, monkeypatch):
    """Every way to a pixel is watched; a training that looks at a target would be seen here."""
    events, read_image = [], common.read_image
    monkeypatch.setattr(common, "read_image", lambda x: events.append(str(x)) or read_image(x))

    def noted(train, *rest):
        result = train(*rest)
        events.append("trained")
        return result

    for name in ("train_mapper", "fine_tune"):
        monkeypatch.setattr(ldfs, name, functools.partial(noted, getattr(ldfs, name)))
    command(f"--dataset pacs --data-root {pacs_tree} --model tiny --workers 0 {QUICK}")
    last = len(events) - events[::-1].index("trained")
    assert events.count("trained") == 2 * 3 + 5

    def domains(part):
        return {Path(event).parts[-3] for event in part if event.endswith(".jpg")}

    assert domains(events[:last]) == {"photo"}
    assert domains(events[last:]) >= {"art_painting", "cartoon", "sketch"}


def test_targets_have_no_say_in_what_is_learnt(command, pacs_tree, tmp_path):
    """Other images in the target folders change nothing but the targets' numbers."""
    line = f"--dataset pacs --data-root {pacs_tree} --model tiny --workers 0 {QUICK}"
    found = []
    for _ in range(2):
        command(f"{line} --targets sketch --summary x.json")
        found.append(records_of(tmp_path / "x.json")[0]["rows"])
        for file in (pacs_tree / "PACS" / "sketch").rglob("*.jpg"):
            Image.new("RGB", (40, 40), (9, 200, 9)).save(file)
    for before, after in zip(found[0].values(), found[1].values()):
        assert before["hold-out"] == after["hold-out"]
        assert before["source"] == after["source"]
        assert after["target"] == pytest.approx(1 / 7)  # all images are alike


@pytest.mark.parametrize("classes", [range(7), [2, 5]])
def test_synthesised_features_keep_the_labels_of_their_images(classes):
    args, clip = settings(f"{QUICK} --captioner template"), common.load_clip()
    images, *_ = tiny_set(28)
    images = images.subset(np.random.default_rng(0).permutation(28))
    own, names = look(images, clip), clip.class_features(images.classes)
    targets = {"sketch": ("a photo of a {}", "a sketch of a {}", classes)}
    places = [i for i in range(28) if images.labels[i] in classes]
    for args.direction in ("local", "global", "additive"):
        made = ldfs.synthesise(args, clip, targets, own, own, names, 0)["sketch"]
        assert torch.equal(made.labels, images.labels[places])
        assert torch.equal(made.images.images, images.images[places])
        assert torch.equal(made.start, own.features[places])
        assert torch.allclose(made.features.norm(dim=1), torch.ones(len(places)), atol=1e-5)
    for i, feature in zip(places, made.features):  # the additive direction, image by image
        name = images.classes[images.labels[i]]
        to, since = clip.encode_text([f"a sketch of a {name}", f"a photo of a {name}"])
        moved = own.features[i] + to - since
        assert torch.allclose(feature, moved / moved.norm(), atol=1e-5)


def test_source_and_targets_of_tiny_data(few_images):
    args = settings("--source cartoon --targets sketch photo")
    ((task, targets),) = ldfs.load_tasks(args, seed=0).values()
    _, cartoon, _, sketch = common.load_domains("tiny-pacs")
    held_out, rest = common.domain_split(56, 1)
    parts = task.train, task.tests["hold-out"], task.tests["source"]
    train, holdout, source = (part["cartoon"].images for part in parts)
    assert torch.equal(train, cartoon.images.images[rest])
    assert torch.equal(holdout, cartoon.images.images[held_out])
    assert torch.equal(source, cartoon.balanced.images)
    assert targets == {
        "photo": ("a cartoon of a {}", "a photo of a {}", range(7)),
        "sketch": ("a cartoon of a {}", "a sketch of a {}", range(7)),
    }
    assert torch.equal(task.tests["target"]["sketch"].images, sketch.balanced.images)


def test_waterbirds_swap_places(few_birds):
    ((task, targets),) = ldfs.load_tasks(settings("--dataset tiny-waterbirds"), 0).values()
    grass, water = "a photo of a {} on grass", "a photo of a {} on water"
    assert targets == {"water": (grass, water, [0]), "land": (water, grass, [1])}
    groups = {"water": {1}, "land": {2}}  # landbirds on water, waterbirds on land
    for name, images in task.tests["target"].items():
        assert set(images.groups.tolist()) == groups[name]
    for sets in (task.train, task.tests["hold-out"], task.tests["source"]):
        assert set(sets["usual places"].groups.tolist()) == {0, 3}


# ---------- What is measured ---------------------------------------------------------------------
AXES = torch.eye(4)
TWO = torch.tensor([0, 0, 1, 1])


def toy(axes, start=None, shade=0):
    """Features on some of four axes, of images that each have a brightness of their own."""
    pixels = (torch.arange(4) + shade).to(torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    start = AXES[start] if start else None
    return ldfs.Features(common.ImageSet(pixels, TWO, ("a", "b")), AXES[axes], TWO, start)


def test_measures_of_synthesised_features():
    """Two classes on four axes, a target domain at right angles."""
    source, target = toy([0, 0, 1, 1]), toy([2, 2, 3, 3])
    perfect = {"t": toy([2, 2, 3, 3], start=[0, 0, 1, 1])}
    found = synthesis_quality(perfect, source, {"t": target})
    expected = {"move": 2**0.5, "to real shift": 1, "spread": 0, "real spread": 0, "distinct": 0.5}
    expected |= {"right class": 1, "right domain": 1, "both": 1}
    assert found == pytest.approx(expected, abs=1e-6)
    wrong = {"t": toy([3, 3, 1, 2], start=[0, 0, 1, 1])}
    found = synthesis_quality(wrong, source, {"t": target})
    expected = {"move": 0.75 * 2**0.5, "spread": 2**0.5 / 2, "real spread": 0}
    expected |= {"to real shift": 0.5}  # class a moves at 60 degrees to its shift, so does b
    expected |= {"right class": 0.25, "right domain": 0.75, "both": 0, "distinct": 0.5}
    assert found == pytest.approx({**found, **expected}, abs=1e-6)


def test_neighbours_stand_below_their_own_source_images(monkeypatch, tmp_path):
    shown = {}

    def spy(rows, path, titles=None, frames=None):
        shown.update(frames=frames)
        for row, pictures in rows.items():
            shown[row] = [int(picture[0, 0, 0]) for picture in pictures]

    monkeypatch.setattr(common, "plot_images", spy)
    made = {"lads": toy([0, 1, 0, 3]), "ldfs": toy([2, 3, 2, 2])}
    ldfs.plot_neighbours(made, toy([0, 1, 2, 3], shade=100), tmp_path / "n.png", columns=4)
    red, blue = "tab:red", "tab:blue"
    frames = {"lads": [None, None, red, None], "ldfs": [red, red, blue, blue]}
    assert shown.pop("frames") == frames
    rows = {"source": [0, 1, 2, 3], "lads": [100, 101, 100, 103], "ldfs": [102, 103, 102, 102]}
    assert shown == rows


# ---------- The command --------------------------------------------------------------------------
def test_run_on_tiny_data(command, tmp_path, few_images):
    """Tables and files; a second run elsewhere gives the same numbers."""
    line = f"{QUICK} --targets cartoon sketch"
    output = command(f"{line} --summary one.json --figures", pictures=True)
    for row in ("zero-shot", "plain", "text", "lads", "ldfs"):
        assert re.search(rf"^{row}( +\d\d\.\d){{4}}$", output, re.M), output
    folder = tmp_path / "runs" / "ldfs" / "tiny-pacs-from_photo-seed0"
    files = {file.name for file in folder.iterdir()}
    pictures = {"neighbours-cartoon.png", "neighbours-sketch.png"}
    assert files == {"result.json", "analysis.npz", *pictures}
    with np.load(folder / "analysis.npz") as arrays:
        assert arrays["sketch, ldfs"].shape == arrays["source"].shape == (45, 64)
        assert arrays["sketch"].shape == (56, 64)
    command(f"{line} --summary two.json --output elsewhere")
    (record,) = records_of(tmp_path / "one.json")
    assert [record] == records_of(tmp_path / "two.json")
    found = json.loads((folder / "result.json").read_text())
    assert found["rows"] == record["rows"]
    quality = record["extra"]["synthesised"]
    assert list(quality) == ["text", "lads", "ldfs"]
    assert quality["ldfs"] != quality["lads"]
    numbers = record["rows"]["ldfs"]
    targets = [numbers[f"target/{name}"] for name in ("cartoon", "sketch")]
    assert numbers["target"] == pytest.approx(np.mean(targets))
    assert numbers["average"] == pytest.approx((numbers["source"] + numbers["target"]) / 2)
    assert str(tmp_path) not in (tmp_path / "one.json").read_text()


@pytest.mark.parametrize("at", ["fine_tune", "accuracies"])
def test_interrupted_run_continued_leaves_the_same_bytes(command, tmp_path, few_images, at):
    line = f"{QUICK} --modes plain text ldfs --targets sketch --figures"
    command(f"{line} --output whole", pictures=True)
    own, calls = getattr(ldfs, at), []

    def killed(*rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(*rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt, AssertionError)):
        patch.setattr(ldfs, at, killed)
        command(f"{line} --output cut", pictures=True)
    assert not list((tmp_path / "cut").rglob("result.json"))
    command(f"{line} --output cut --resume", pictures=True)
    contents = []
    for name in ("whole", "cut"):
        folder = tmp_path / name
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        contents.append({file.relative_to(folder): file.read_bytes() for file in files})
    assert contents[0] == contents[1]
    assert "found" in command(f"{line} --output whole --resume")  # nothing to do


def test_all_sources_and_seeds(command, tmp_path, few_images):
    command(f"{QUICK} --source all --targets sketch --seeds 0 1 --study captions")
    records = records_of(tmp_path / "results" / "ldfs-captions-tiny-pacs.json")
    order = [(f"from {name}", seed) for seed in (0, 1) for name in tiny_world.TINY_DOMAINS[:3]]
    assert [(record["target"], record["seed"]) for record in records] == order
    assert list(records[0]["rows"]["ldfs"])[4:] == ["target/sketch"]


@pytest.mark.parametrize("study", ldfs.STUDIES)
def test_studies(command, tmp_path, few_images, study):
    output = command(f"--study {study} --targets sketch {QUICK}")
    (record,) = records_of(tmp_path / "results" / f"ldfs-{study}-tiny-pacs.json")
    assert list(record["rows"]) == ldfs.STUDIES[study]
    for name in record["rows"]:
        assert re.search(rf"^{re.escape(name)} +\d", output, re.M)
    quality = list(record["extra"]["synthesised"].values())
    if study == "finetune":
        assert quality[0] == quality[2]
    else:  # every row with another step 1
        different = {json.dumps(values) for values in quality}
        assert len(different) == len(quality)


def write_tree(folder, names, domain="photo", count=4):
    """`count` drawn images in `<folder>/<name>/` for every {folder name: thing}."""
    for place, thing in names.items():
        images, *_ = tiny_set(count, domain, (thing,), seed=len(place))
        (folder / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(images.picture(i)).save(folder / place / f"{thing}_{i}.png")


MINI = ("dog", "house", "person")


@pytest.fixture
def mini(tmp_path):
    """DomainNet-mini: three classes, five images of each on a train list, two on a test list."""
    base = tmp_path / "data" / "domain_net"
    for domain in ("clipart", "painting", "real", "sketch"):
        kind = "photo" if domain == "real" else "cartoon"
        write_tree(base / domain, {name: name for name in MINI}, kind, 7)
        for part, numbers in (("train", range(5)), ("test", (5, 6))):
            lines = [
                f"{domain}/{name}/{name}_{i}.png {MINI.index(name)}"
                for name in MINI
                for i in numbers
            ]
            (base / f"{domain}_{part}_mini.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


@pytest.fixture
def cub(tmp_path):
    """CUB-Paintings: the same numbers, names with other capitals, classes that sort by number."""
    data = tmp_path / "data"
    photos = {"001.Dog": "dog", "002.Boat": "boat", "010.Art_Painting": "house"}
    paintings = {"001.dog": "dog", "002.Boat": "boat", "010.Art_painting": "house"}
    write_tree(data / "CUB_200_2011" / "images", photos, count=6)
    write_tree(data / "CUB-200-Painting", paintings, "art_painting")
    return data


@pytest.fixture
def birds(few_birds, tmp_path):
    folder = tmp_path / "data" / "waterbird_complete95_forest2water2"
    (folder / "birds").mkdir(parents=True)
    rows = ["img_id,img_filename,y,split,place"]
    for part, images in enumerate(common.load_parts("tiny-waterbirds").values()):
        for i, group in enumerate(images.groups.tolist()):
            name = f"birds/{part}_{i}.png"
            rows.append(f"{len(rows)},{name},{group // 2},{part},{group % 2}")
            Image.fromarray(images.picture(i)).save(folder / name)
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "data"


def test_domainnet_mini_reader(mini):
    domains = common.load_domains("domainnet-mini", mini)
    assert [domain.name for domain in domains] == ["clipart", "painting", "real", "sketch"]
    for domain in domains:
        assert domain.images.classes == domain.balanced.classes == MINI
        assert (len(domain.images), len(domain.balanced)) == (15, 6)
        for images in (domain.images, domain.balanced):
            for file, label in zip(images.images, images.labels):
                assert Path(file).is_file()
                assert Path(file).parts[-3:-1] == (domain.name, MINI[label])
    assert not {*domains[0].images.images} & {*domains[0].balanced.images}


def test_cub_paintings_reader(cub):
    painting, photo = common.load_domains("cub-paintings", cub)
    assert (painting.name, photo.name) == ("painting", "photo")
    assert painting.images.classes == photo.images.classes == ("Dog", "Boat", "Art_Painting")
    assert photo.images.labels.bincount().tolist() == [6, 6, 6]
    assert len(painting.images) == 12
    assert all("CUB-200-Painting" in file for file in painting.images.images)
    (cub / "CUB-200-Painting" / "001.dog").rename(cub / "CUB-200-Painting" / "003.dog")
    with pytest.raises(common.InputError, match="differ in .*001.*003"):
        common.load_domains("cub-paintings", cub)


# words that the tiny CLIP knows, for domains whose own words it does not
WORDS = [f"{name}=a cartoon of a {{}}" for name in ("clipart", "product")]
PLACES = ["land=a photo of a {} on grass", "water=a photo of a {} on water"]
WORDS = ["--descriptions", *WORDS, *PLACES]
MINI_LINE = "--dataset domainnet-mini --source sketch --targets real painting clipart"


@pytest.mark.parametrize(
    "tree, arguments, source, targets",
    [
        ("mini", MINI_LINE, "sketch", "clipart painting real"),
        ("cub", "--dataset cub-paintings", "photo", "painting"),
        ("birds", "--dataset waterbirds", "usual places", "water land"),
        ("birds", "--dataset waterbirds --targets land", "usual places", "land"),
        ("pacs_tree", "--dataset pacs --source all --targets sketch", "art_painting", "sketch"),
        ("pacs_tree", "--dataset officehome", "Real World", "Art Clipart Product"),
    ],
)
def test_real_layouts(command, request, tmp_path, tree, arguments, source, targets):
    """The real readers, sources and targets, with the tiny CLIP in place of a large one."""
    data = request.getfixturevalue(tree)
    if "officehome" in arguments:
        names = "Art", "Clipart", "Real World", "Product"
        for old, new in zip(tiny_world.TINY_DOMAINS, names):
            shutil.move(data / "PACS" / old, data / "office_home" / new)
    line = f"{arguments} --data-root {data} --model tiny --workers 0 {QUICK} --summary x.json"
    output = command(line, *WORDS)
    assert "error" not in output
    record = records_of(tmp_path / "x.json")[0]
    assert record["target"] == f"from {source}"
    found = list(record["rows"]["ldfs"])[4:]
    assert found == [f"target/{name}" for name in targets.split()]
    runs = tmp_path / "runs" / "ldfs"
    assert len(list(runs.glob("*/result.json"))) == (3 if "all" in arguments else 1)


def test_command_of_the_docstring_with_coop(command, mini):
    lines = [line for line in ldfs.__doc__.splitlines() if "--finetune coop" in line]
    arguments = lines[0].split("ldfs.py ")[1]
    line = f"{arguments} --data-root {mini} --model tiny --workers 0 {QUICK}"
    output = command(line, *WORDS)
    assert re.search(r"^ldfs +\d", output, re.M), output


def test_caption_file(command, pacs_tree, tmp_path, few_images):
    """Captions by path below the data root; a lacking one is named."""
    captions = {}
    for file in sorted((pacs_tree / "PACS" / "photo").rglob("*.jpg")):
        name = file.relative_to(pacs_tree).as_posix()
        captions[name] = f"A photo of a red {file.parent.name} on grass."
    said = tmp_path / "said.json"
    said.write_text(json.dumps(captions))
    line = f"--dataset pacs --data-root {pacs_tree} --model tiny --workers 0 --targets sketch"
    line += f" {QUICK} --study captions --captioner file --caption-file said.json"
    assert "ldfs/captioner=template" in command(line)
    del captions["PACS/photo/dog/pic_000.jpg"]
    said.write_text(json.dumps(captions))
    error = command(line)
    assert "PACS/photo/dog/pic_000.jpg" in error and "--caption-file said.json" in error
    said.write_text("not JSON")
    assert "--caption-file said.json: no JSON {path below" in command(line)
    error = command(f"--captioner file --caption-file said.json {QUICK}")
    assert error.startswith("error: --caption-file")
    assert not list((tmp_path / "runs" / "ldfs").glob(".*"))


def test_bad_folders_are_one_clear_error(command, mini, cub, pacs_tree):
    base = mini / "domain_net"
    line = f"--dataset domainnet-mini --data-root {mini} --model tiny"
    (base / "clipart_train_mini.txt").write_text("clipart/dog/dog_0.png\n")
    error = command(line)
    assert error.startswith("error: cannot read 'clipart/dog/dog_0.png' in ")
    (pacs_tree / "PACS" / "sketch").rename(pacs_tree / "PACS" / "etching")
    error = command(f"--dataset folder:{pacs_tree / 'PACS'} --model tiny")
    assert "no words describe domain 'etching'" in error and "--descriptions" in error
    few = pacs_tree / "few"
    for domain in ("photo", "sketch"):
        write_tree(few / domain, {"dog": "dog", "house": "house"}, count=1)
    assert "domain 'photo' has only 2 images: too few" in command(
        f"--dataset folder:{few} --model tiny"
    )


@pytest.mark.slow
def test_main_job(checkout, root):
    done = call(readme_script(root, "python ldfs.py"), checkout)
    assert done.returncode == 0, done.stderr
    folder = checkout / "runs" / "ldfs" / "tiny-pacs-from_photo-seed0"
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert rows["plain"]["source"] > rows["zero-shot"]["source"] + 0.05
    assert rows["ldfs"]["target"] > rows["plain"]["target"]


@pytest.mark.slow
def test_real_architecture_on_a_real_layout(checkout, pacs_tree, tmp_path):
    """ViT-B-32 with random weights from a file, open_clip's tokenizer, the general phrases."""
    torch.manual_seed(0)
    weights = tmp_path / "vit.pt"
    torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), weights)
    done = call(
        f"ldfs.py --dataset pacs --data-root {pacs_tree} --model ViT-B-32-quickgelu "
        f"--pretrained {weights} --study finetune --mapper-epochs 1 --epochs 1 --summary all.json",
        checkout,
    )
    assert done.returncode == 0, done.stderr
    assert len(records_of(checkout / "all.json")[0]["rows"]) == 15
