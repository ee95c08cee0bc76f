"""LDFS against slow loops and closed forms; who sees which images when; its runs."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import call, write_image

import common
import ldfs
from ldfs import global_direction_loss, local_direction_loss, pairwise_loss, perturb_text
from support import benchmarks, tiny_world


# ---------- Losses -------------------------------------------------------------------------------
def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return F.normalize(vectors, dim=-1).to(dtype)


def slow_direction_loss(features, mapped, source, target, reach):
    """Image by image, with the cosine written out."""
    losses = []
    for f, m, s, t in zip(features, mapped, source, target):
        move, text = m - f, t - s
        move_length = max(move.norm(), 0.01, reach * text.norm())
        losses.append(1 - move @ text / (move_length * text.norm()))
    return (sum(losses) / len(losses)).item()


@pytest.mark.parametrize("reach", [0.0, 0.6, 1.0, 3.0])
def test_local_direction_loss_equals_a_loop(reach):
    features, mapped, *texts = (unit(7, 6, seed=seed) for seed in range(4))
    loss = functools.partial(local_direction_loss, features, reach=reach)
    expected = slow_direction_loss(features, mapped, *texts, reach)
    assert loss(mapped, *texts).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(loss, (mapped.requires_grad_(), *texts))


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


@pytest.mark.parametrize("reach", [0.0, 3.0])
def test_global_direction_is_the_mean_of_the_class(reach):
    features, mapped, *texts = (unit(6, 5, seed=seed) for seed in range(4))
    labels = torch.tensor([2, 0, 2, 1, 0, 2])
    means = []
    for text in texts:
        means.append(torch.stack([text[labels == label].mean(0) for label in labels]))
    loss = global_direction_loss(features, mapped, *texts, labels, reach).item()
    assert loss == pytest.approx(slow_direction_loss(features, mapped, *means, reach), rel=1e-12)


def test_pairwise_loss_equals_a_loop():
    features, mapped = unit(6, 4), unit(6, 4, seed=1)
    expected = 0
    for i in range(6):
        for j in range(6):
            change = float(mapped[i] @ mapped[j]) - float(features[i] @ features[j])
            expected += (i != j) * change**2 / 30
    assert pairwise_loss(features, mapped).item() == pytest.approx(expected, rel=1e-12)
    assert pairwise_loss(features[:1], mapped[:1]).item() == 0


def test_noise_on_texts():
    """In D dimensions T + sigma * noise has length sqrt(1 + sigma^2 D), so its cosine with T is one
    over that."""
    text, sigma = unit(1, 4096, dtype=torch.float32).expand(400, -1), 0.02
    noisy = perturb_text(text, sigma, torch.Generator().manual_seed(1))
    assert torch.allclose(noisy.norm(dim=1), torch.ones(400), atol=1e-5)
    cosine = (noisy * text).sum(1)
    assert cosine.mean().item() == pytest.approx(1 / math.sqrt(1 + sigma**2 * 4096), abs=2e-3)
    noise = noisy / cosine[:, None] - text  # sigma * noise, but for the part along T
    assert noise.std().item() == pytest.approx(sigma, rel=0.05)
    directions = F.normalize(noise, dim=1)
    assert (directions[:50] @ directions[50:100].T).abs().max() < 0.1  # every text has another
    assert torch.equal(noisy, perturb_text(text, sigma, torch.Generator().manual_seed(1)))
    assert not torch.equal(perturb_text(text, sigma), perturb_text(text, sigma))


# ---------- Mapper -------------------------------------------------------------------------------
SMALL = "--hidden 32 --mapper-epochs 6 --batch-size 16 --sigma 0.05 --modes"


def row_of(text):
    """The settings of a row, as a command has them."""
    _, rows = ldfs.settings([*SMALL.split(), text])
    return rows[text]


def features_of(n, dim=12):
    """Features (n, D), labels (n,), text_source and text_target (n, D)."""
    features, source, target = (unit(n, dim, seed=seed, dtype=torch.float32) for seed in range(3))
    return features, torch.arange(n) % 3, source, target


CLASS_FEATURES = unit(3, 12, seed=7, dtype=torch.float32)


def test_mapper_starts_at_the_identity_and_stays_on_the_sphere():
    torch.manual_seed(0)
    features, mapper = unit(9, 12, dtype=torch.float32), ldfs.Mapper(12, 32)
    assert torch.allclose(mapper(features), features, atol=1e-6)
    torch.nn.init.normal_(mapper.layers[2].weight)
    first, _, second = mapper.layers
    hidden = (features @ first.weight.T + first.bias).clamp(min=0)
    raw = features + hidden @ second.weight.T + second.bias
    assert torch.allclose(mapper(features), raw / raw.norm(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("temperature", ["none", "clip"])
def test_loss_of_lads_is_that_of_its_code(temperature):
    """Image by image: its class's text direction against the raw mapper output minus the feature;
    cross-entropy of plain cosines (ours, if asked for: of logits), classes weighted alike."""
    torch.manual_seed(1)
    row, mapper = row_of(f"lads/temperature={temperature}"), ldfs.Mapper(12, 32, residual=False)
    features, _, source, target = features_of(20)
    labels = torch.tensor([0] * 12 + [1] * 5 + [2] * 3)
    batch, weights = (features, labels, source, target), ldfs.balanced(labels, 3)
    loss = ldfs.mapper_loss(row, mapper, batch, CLASS_FEATURES, 10.0, row.sigma, weights)
    raw = mapper.layers(features)
    assert (raw.norm(dim=1) - 1).abs().min() > 0.1
    expected = 0
    for i in range(20):
        same = labels == labels[i]
        text = (target - source)[same].mean(0)
        expected += (1 - F.cosine_similarity(raw[i] - features[i], text, dim=0)) / 20
        logits = CLASS_FEATURES @ raw[i] / raw[i].norm()
        if temperature == "clip":
            logits = 10 * logits
        expected += F.cross_entropy(logits, labels[i]) / same.sum() / 3  # each class counts alike
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(mapper(features), F.normalize(raw, dim=1))


def test_the_best_epoch_on_the_hold_out_is_kept(monkeypatch):
    """Held-out captions move the other way, so what is learnt makes the hold-out worse."""
    features, labels, source, target = features_of(64)
    row, holdout = row_of("ldfs/mapper-lr=3e-3"), (features, labels, target, source)
    losses, holdout_loss = [], ldfs.holdout_loss

    def spy(*arguments):
        losses.append(holdout_loss(*arguments))
        return losses[-1]

    monkeypatch.setattr(ldfs, "holdout_loss", spy)
    mapper = ldfs.train_mapper(row, features_of(64), holdout, CLASS_FEATURES, 10.0, seed=0)
    best = ldfs.mapper_loss(row, mapper, holdout, CLASS_FEATURES, 10.0, sigma=0).item()
    assert len(losses) == 6
    assert losses == sorted(losses)
    assert best == losses[0] < losses[1]


def test_a_large_hold_out_is_measured_in_batches():
    row, mapper, holdout = row_of("ldfs"), ldfs.Mapper(12, 32), features_of(1024 + 76)
    mapper.layers[2].weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    total = 0
    for start, end in ((0, 1024), (1024, 1100)):
        part = [values[start:end] for values in holdout]
        loss = ldfs.mapper_loss(row, mapper, part, CLASS_FEATURES, 10.0, sigma=0)
        total += (end - start) * loss.item()
    loss = ldfs.holdout_loss(row, mapper, holdout, CLASS_FEATURES, 10.0, None)
    assert loss == pytest.approx(total / 1100, rel=1e-6)


# ---------- What learns from the features --------------------------------------------------------
def test_synthesised_features_make_a_batch_larger_not_an_epoch_longer(monkeypatch):
    features, labels, *_ = features_of(40)
    clip = SimpleNamespace(logit_scale=5.0)
    sizes, cross_entropy = [], F.cross_entropy

    def spy(logits, labels):
        sizes.append(len(labels))
        return cross_entropy(logits, labels)

    monkeypatch.setattr(F, "cross_entropy", spy)
    for sets in ([(features, labels)], [(features, labels)] * 3):
        sizes.clear()
        ldfs.fine_tune(row_of("plain/epochs=2"), clip, "abc", CLASS_FEATURES, sets, seed=0)
        assert len(sizes) == 6  # 40 source features in batches of 16: 3 steps
        assert sum(sizes) == 2 * 40 * len(sets)


# ---------- Who sees what ------------------------------------------------------------------------
def test_no_target_image_is_read_before_everything_is_learnt(call_main, pacs_tree, monkeypatch):
    """All images pass through `read_image`, so a training that looks at a target is seen here."""
    events, read_image = [], benchmarks.read_image
    monkeypatch.setattr(benchmarks, "read_image", lambda x: events.append(str(x)) or read_image(x))

    def noted(train, *rest):
        result = train(*rest)
        events.append("trained")
        return result

    for name in ("train_mapper", "fine_tune"):
        monkeypatch.setattr(ldfs, name, functools.partial(noted, getattr(ldfs, name)))
    line = f"--dataset pacs --data-root {pacs_tree} --model tiny --workers 0 --study captions"
    call_main(ldfs.main, f"{line} --mapper-epochs 2 --epochs 2")
    assert events.count("trained") == 2 * 3 + 3  # two rows with a mapper a target, three rows

    def domains(part):
        return {Path(event).parts[-3] for event in part if event.endswith(".jpg")}

    end = len(events) - events[::-1].index("trained")
    assert domains(events[:end]) == {"photo"}
    assert domains(events[end:]) >= {"art_painting", "cartoon", "sketch"}


@pytest.mark.parametrize("classes", [range(7), [2, 5]])
def test_synthesised_features_keep_the_labels_of_their_images(small_world, classes):
    clip = common.load_clip()
    images = common.tiny_domain("tiny-pacs", "photo", seed=0, cue=0.4).images
    images = images.subset(np.random.default_rng(0).permutation(35))
    real, class_features = ldfs.encode(clip, images, 0, {}), clip.class_features(images.classes)
    targets = {"sketch": ("a photo of a {}", "a sketch of a {}", classes)}
    indices = [i for i in range(35) if images.labels[i] in classes]
    for direction in ("local", "global", "additive"):
        row = row_of(f"ldfs/captioner=template/direction={direction}")
        moved = ldfs.synthesise(row, clip, targets, real, real, class_features, 0)["sketch"]
        assert torch.equal(moved.labels, images.labels[indices])
        assert torch.equal(moved.images.images, images.images[indices])
        assert torch.equal(moved.start, real.features[indices])
        assert torch.allclose(moved.features.norm(dim=1), torch.ones(len(indices)), atol=1e-5)
    for i, feature in zip(indices, moved.features):  # the additive direction, image by image
        name = images.classes[images.labels[i]]
        target, source = clip.encode_text([f"a sketch of a {name}", f"a photo of a {name}"])
        expected = F.normalize(real.features[i] + target - source, dim=0)
        assert torch.allclose(feature, expected, atol=1e-5)


def test_source_and_targets_of_tiny_data(small_world):
    args, _ = ldfs.settings("--source cartoon --targets sketch photo".split())
    ((task, targets),) = ldfs.load_tasks(args, seed=0).values()
    _, cartoon, _, sketch = common.load_domains("tiny-pacs")
    held_out, rest = common.domain_split(35, 1)
    assert torch.equal(task.train["cartoon"].images, cartoon.images.images[rest])
    assert torch.equal(task.tests["hold-out"]["cartoon"].images, cartoon.images.images[held_out])
    assert torch.equal(task.tests["source"]["cartoon"].images, cartoon.balanced.images)
    assert torch.equal(task.tests["target"]["sketch"].images, sketch.balanced.images)
    assert targets == {
        "photo": ("a cartoon of a {}", "a photo of a {}", range(7)),
        "sketch": ("a cartoon of a {}", "a sketch of a {}", range(7)),
    }
    args, _ = ldfs.settings("--source all --targets sketch".split())
    assert list(ldfs.load_tasks(args, seed=0)) == ["art_painting", "cartoon", "photo"]


def test_waterbirds_swap_places(monkeypatch):
    few = functools.partial(tiny_world.draw_waterbirds, sizes=(60, 8, 40))
    monkeypatch.setattr(tiny_world, "draw_waterbirds", few)
    args, _ = ldfs.settings(["--dataset", "tiny-waterbirds"])
    ((task, targets),) = ldfs.load_tasks(args, seed=0).values()
    grass, water = "a photo of a {} on grass", "a photo of a {} on water"
    assert targets == {"water": (grass, water, [0]), "land": (water, grass, [1])}
    groups = {name: {*images.groups.tolist()} for name, images in task.tests["target"].items()}
    assert groups == {"water": {1}, "land": {2}}  # landbirds on water, waterbirds on land
    for sets in (task.train, task.tests["hold-out"], task.tests["source"]):
        assert {*sets["usual places"].groups.tolist()} == {0, 3}


# ---------- What is measured ---------------------------------------------------------------------
def toy(axes, start=None):
    """Features on four axes, of four images of two classes."""
    labels = torch.tensor([0, 0, 1, 1])
    start = torch.eye(4)[start] if start else None
    images = common.ImageSet(torch.zeros(4, 3, 2, 2), labels, ("a", "b"))
    return ldfs.Features(images, torch.eye(4)[axes], labels, start)


def test_rows_that_synthesise_nothing_have_no_picture(call_main, small_world, tmp_path):
    call_main(ldfs.main, "--modes zero-shot plain --epochs 1 --targets sketch")
    (folder,) = (tmp_path / "runs" / "ldfs").iterdir()
    assert [path.name for path in folder.iterdir()] == ["result.json"]


def test_measures_of_synthesised_features():
    """Two classes on four axes, a target domain at right angles."""
    source, targets = toy([0, 0, 1, 1]), {"t": toy([2, 2, 3, 3])}
    perfect = {"t": toy([2, 2, 3, 3], start=[0, 0, 1, 1])}
    expected = {"move": 2**0.5, "to real shift": 1, "spread": 0, "real spread": 0, "distinct": 0.5}
    expected |= {"right class": 1, "right domain": 1, "both": 1}
    assert ldfs.synthesis_quality(perfect, source, targets) == pytest.approx(expected, abs=1e-6)
    wrong = {"t": toy([3, 3, 1, 2], start=[0, 0, 1, 1])}
    expected = {"move": 0.75 * 2**0.5, "spread": 2**0.5 / 2, "real spread": 0, "distinct": 0.5}
    expected |= {"to real shift": 0.5}  # both classes move at 60 degrees to their shift
    expected |= {"right class": 0.25, "right domain": 0.75, "both": 0}
    assert ldfs.synthesis_quality(wrong, source, targets) == pytest.approx(expected, abs=1e-6)


# ---------- Real layouts and commands ------------------------------------------------------------
def test_domainnet_mini(tmp_path):
    data, names = tmp_path / "data", ("dog", "house", "person")
    for domain in ("clipart", "painting", "real", "sketch"):
        for part, numbers in (("train", range(5)), ("test", (5, 6))):
            lines = []
            for i in numbers:
                for label, name in enumerate(names):
                    lines.append(f"{domain}/{name}/{i}.png {label}\n")
                    write_image(data / "domain_net" / domain / name / f"{i}.png", 40 * label + i)
            (data / "domain_net" / f"{domain}_{part}_mini.txt").write_text("".join(lines))
    sketch = common.load_domains("domainnet-mini", data)[3]
    assert sketch.images.classes == names
    for images, count in ((sketch.images, 15), (sketch.balanced, 6)):
        folders = [Path(file).parts[-3:-1] for file in images.images]
        assert folders == [("sketch", names[label]) for label in images.labels]
        assert len({*images.images}) == count


def test_cub_paintings(tmp_path):
    """The number identifies a class: names may differ in capitals."""
    data = tmp_path / "data"
    photos, paintings = data / "CUB_200_2011" / "images", data / "CUB-200-Painting"
    for i in range(5):
        for name in ("001.Dog", "002.Boat", "010.Art_Painting"):
            write_image(photos / name / f"{i}.png", 30 * i)
            write_image(paintings / name.capitalize() / f"{i}.png", 30 * i + 9)
    (paintings / "002.boat" / "0.png").unlink()
    painting, photo = common.load_domains("cub-paintings", data)
    assert painting.images.classes == photo.images.classes == ("Dog", "Boat", "Art_Painting")
    assert photo.images.labels.bincount().tolist() == [5, 5, 5]
    assert painting.images.labels.bincount().tolist() == [5, 4, 5]
    (paintings / "001.dog").rename(paintings / "003.dog")
    with pytest.raises(common.InputError, match="differ in .*001.*003"):
        common.load_domains("cub-paintings", data)


def test_a_domain_without_words(call_main, pacs_tree):
    (pacs_tree / "PACS" / "sketch").rename(pacs_tree / "PACS" / "etching")
    error = call_main(ldfs.main, f"--dataset folder:{pacs_tree / 'PACS'} --model tiny")
    assert "no words describe domain 'etching'" in error and "--descriptions" in error


@pytest.mark.slow
def test_real_architecture_on_a_real_layout(checkout, pacs_tree, tmp_path):
    """ViT-B-32 with random weights from a file, open_clip's tokenizer, the general phrases."""
    model, weights = "ViT-B-32-quickgelu", tmp_path / "vit.pt"
    torch.save(open_clip.create_model(model).state_dict(), weights)
    line = f"--dataset pacs --data-root {pacs_tree} --model {model} --pretrained {weights}"
    line += " --study finetune --mapper-epochs 1 --epochs 1 --summary all.json"
    done = call(f"ldfs.py {line}", checkout)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((checkout / "all.json").read_text())["records"]
    assert len(record["rows"]) == 15
