"""LDFS against slow loops and closed forms; its captions, its cache, who sees which images when, its command."""

import argparse
import functools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import call, readme_script
from matplotlib.colors import to_rgba
from PIL import Image

import common
import ldfs
from assets import tiny_world
from ldfs import Mapper, global_direction_loss, local_direction_loss, pairwise_loss, perturb_text

# ---------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """The command takes one thread for the tiny CLIP; this process has other tests to do."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def slow_direction_loss(features, mapped, source, target, reach=0.0):
    """Sample by sample, coordinate by coordinate."""
    losses = []
    for f, m, s, t in zip(*(x.tolist() for x in (features, mapped, source, target))):
        move, text = [b - a for a, b in zip(f, m)], [b - a for a, b in zip(s, t)]
        dot = sum(a * b for a, b in zip(move, text))
        long = math.sqrt(sum(a * a for a in text))
        least = max(0.01, reach * long)
        losses.append(1 - dot / (max(math.sqrt(sum(a * a for a in move)), least) * long))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("reach", [0.0, 0.6, 1.0, 3.0])
def test_local_direction_loss_equals_a_loop(reach):
    vectors = [unit(7, 6, seed=seed) for seed in range(4)]
    loss = local_direction_loss(*vectors, reach)
    assert loss.item() == pytest.approx(slow_direction_loss(*vectors, reach), rel=1e-12)


def test_local_direction_loss_at_its_ends():
    features, source, target = (unit(5, 6, seed=seed) for seed in range(3))
    text = target - source
    for step, loss in ((0.3, 0), (2.0, 0), (-0.3, 2)):
        assert local_direction_loss(features, features + step * text, source, target).item() == pytest.approx(loss)
    for step, loss in (
        (0.25, 0.75),
        (1.0, 0),
        (1.7, 0),
        (-0.25, 1.25),
        (-1.0, 2),
    ):  # shorter than its caption's: in part
        assert local_direction_loss(features, features + step * text, source, target, 1.0).item() == pytest.approx(loss)
    sideways = torch.linalg.svd(text[:, None]).Vh[:, -1]  # orthogonal to each text
    assert local_direction_loss(features, features + sideways, source, target).item() == pytest.approx(1)


@pytest.mark.parametrize("reach", [0.0, 1.0])
def test_gradient_at_the_start_points_along_the_text(reach):
    """At M(f) = f, where the plain cosine has no gradient, it is -dT / (|dT| max(0.01, reach |dT|)), shared by B."""
    features, source, target = (unit(5, 6, seed=seed) for seed in range(3))
    mapped = features.clone().requires_grad_()
    local_direction_loss(features, mapped, source, target, reach).backward()
    text = target - source
    length = text.norm(dim=1, keepdim=True)
    assert torch.allclose(mapped.grad, -text / length / (reach * length).clamp(min=0.01) / 5, rtol=1e-10)
    plain = torch.autograd.functional.jacobian(
        lambda m: (1 - F.cosine_similarity(m - features, text, eps=1e-300)).mean(), features
    )
    assert not plain.isfinite().all() or plain.abs().max() > 1e6


@pytest.mark.parametrize("reach", [0.0, 1.0])
def test_gradients_are_finite_differences(reach):
    features, mapped, source, target = (unit(4, 5, seed=seed).requires_grad_(seed == 1) for seed in range(4))
    labels = torch.tensor([0, 1, 0, 1])
    for loss in (
        lambda m: local_direction_loss(features, m, source, target, reach),
        lambda m: global_direction_loss(features, m, source, target, labels, reach),
        lambda m: pairwise_loss(features, m),
    ):
        assert torch.autograd.gradcheck(loss, mapped)


def test_global_direction_is_the_mean_of_the_class():
    features, mapped, source, target = (unit(6, 5, seed=seed) for seed in range(4))
    labels = torch.tensor([2, 0, 2, 1, 0, 2])
    for groups, given in ((labels.tolist(), labels), ([0] * 6, None)):
        means = [sum(source[j] for j in range(6) if groups[j] == g) / groups.count(g) for g in groups]
        moved = [sum(target[j] for j in range(6) if groups[j] == g) / groups.count(g) for g in groups]
        expected = slow_direction_loss(features, mapped, torch.stack(means), torch.stack(moved))
        assert global_direction_loss(features, mapped, source, target, given).item() == pytest.approx(
            expected, rel=1e-12
        )
    of_class = [source[:3][labels], target[:3][labels]]  # nothing but the class name: no difference to local
    both = [
        loss(features, mapped, *of_class)
        for loss in (local_direction_loss, lambda *x: global_direction_loss(*x, labels))
    ]
    assert both[0].item() == pytest.approx(both[1].item(), rel=1e-12)


def test_pairwise_loss_equals_a_loop():
    features, mapped = unit(6, 4), unit(6, 4, seed=1)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = sum((float(mapped[i] @ mapped[j]) - float(features[i] @ features[j])) ** 2 for i, j in pairs) / 30
    assert pairwise_loss(features, mapped).item() == pytest.approx(expected, rel=1e-12)
    assert pairwise_loss(features[:1], mapped[:1]).item() == 0


def test_pairwise_loss_does_not_see_rotations():
    features, mapped = unit(6, 4), unit(6, 4, seed=1)
    rotation, other = (torch.linalg.qr(unit(4, 4, seed=seed))[0] for seed in (2, 3))
    loss = pairwise_loss(features, mapped).item()
    assert loss > 0.01 and pairwise_loss(features @ rotation, mapped @ other).item() == pytest.approx(loss, rel=1e-10)
    assert pairwise_loss(features, features @ rotation).item() == pytest.approx(0, abs=1e-28)


def test_noise_on_texts():
    """In D dimensions T + sigma * noise has length sqrt(1 + sigma^2 D), so its cosine with T is one over that."""
    text, sigma = unit(1, 4096).expand(400, -1).float(), 0.02
    generator = torch.Generator().manual_seed(1)
    noisy = perturb_text(text, sigma, generator)
    assert torch.allclose(noisy.norm(dim=1), torch.ones(400), atol=1e-5)
    cosine = (noisy * text).sum(1)
    assert cosine.mean().item() == pytest.approx(1 / math.sqrt(1 + sigma**2 * 4096), abs=2e-3)
    away = noisy / cosine[:, None] - text  # = sigma * noise, but for the part along T
    assert away.std().item() == pytest.approx(sigma, rel=0.05) and away.mean().abs() < 1e-4
    assert (F.normalize(away[:50], dim=1) @ F.normalize(away[50:100], dim=1).T).abs().max() < 0.1  # each its own
    assert not torch.equal(noisy, perturb_text(text, sigma, generator))  # and anew in every call
    assert torch.equal(noisy, perturb_text(text, sigma, torch.Generator().manual_seed(1)))
    assert torch.allclose(perturb_text(text, 0.0), text, atol=1e-6)


# ---------------------------------------------------------------------------------------------------
# Mapper and classifiers
# ---------------------------------------------------------------------------------------------------


def row_of(**changes):
    row = {"direction": "local", "sigma": 0.05, "pairwise": 1.0, "consistency": 0.0, "reach": 1.0, "hidden": 32}
    row |= {
        "mapper_epochs": 8,
        "mapper_lr": 1e-3,
        "weight_decay": 0.005,
        "batch_size": 16,
        "finetune": "probe",
        "lr": None,
    }
    return argparse.Namespace(**{**row, "model": "tiny", "epochs": 6, "device": torch.device("cpu"), **changes})


def batch_of(n=64, dim=12, classes=3, seed=0):
    features, source, target = (unit(n, dim, seed=seed + i).float() for i in range(3))
    return features, torch.arange(n) % classes, source, target


def test_mapper_starts_at_the_identity_and_stays_on_the_sphere():
    torch.manual_seed(0)
    features, mapper = unit(9, 12).float(), Mapper(12, 32)
    assert torch.allclose(mapper(features), features, atol=1e-6)
    torch.nn.init.normal_(mapper.layers[2].weight)
    moved = mapper(features)
    assert torch.allclose(moved.norm(dim=1), torch.ones(9), atol=1e-5) and not torch.allclose(moved, features, atol=0.1)
    first, _, second = mapper.layers
    hidden = (features @ first.weight.T + first.bias).clamp(min=0)
    slow = features + hidden @ second.weight.T + second.bias
    assert torch.allclose(moved, slow / slow.norm(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"reach": 0.0}, {"direction": "global"}, {"consistency": 1.0}])
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


def test_best_epoch_of_the_hold_out_is_kept(monkeypatch):
    """Held-out captions move the other way here, so what is learnt makes the hold-out worse, epoch by epoch."""
    row, train, names = row_of(mapper_epochs=6, mapper_lr=3e-3), batch_of(), unit(3, 12).float()
    holdout = [train[0], train[1], train[3], train[2]]
    losses, own = [], ldfs.mapper_loss

    def spy(row, mapper, batch, *rest, **options):
        loss = own(row, mapper, batch, *rest, **options)
        losses.extend([loss.item()] if batch is holdout else [])
        return loss

    monkeypatch.setattr(ldfs, "mapper_loss", spy)
    mapper = ldfs.train_mapper(row, train, holdout, names, 10.0, seed=0)
    kept = own(row, mapper, holdout, names, 10.0, sigma=0).item()
    assert len(losses) == 6 and losses == sorted(losses) and kept == losses[0] < losses[1]
    with pytest.raises(common.InputError, match="mapper's loss is nan; try a lower --mapper-lr, now 0.003"):
        ldfs.train_mapper(row, train, [x * math.nan if x.is_floating_point() else x for x in holdout], names, 10.0, 0)


class Toy:
    """Stands for ldfs.Clip where only its scale is needed."""

    scale = 5.0


def test_classifiers_start_where_their_papers_say():
    features, labels, *_ = batch_of(12)
    names, sets = unit(3, 12, seed=7).float(), [(features, labels), (unit(12, 12, seed=9).float(), labels)]
    logits = {}
    for method in ("zero-shot", "probe", "probe-random", "adapter", "tip-adapter"):
        torch.manual_seed(0)
        parameters, classify = ldfs.make_classifier(row_of(finetune=method), Toy, "abc", names, sets)
        logits[method] = classify(features)
        if method == "adapter":
            down, up = parameters
            adapted = ((features @ down.T).clamp(min=0) @ up.T).clamp(min=0)
            mixed = torch.stack([(0.8 * f + 0.2 * a) / (0.8 * f + 0.2 * a).norm() for f, a in zip(features, adapted)])
            assert down.shape == (3, 12) and torch.allclose(logits[method], 5 * mixed @ names.T, atol=1e-5)
    zero_shot = 5 * features @ names.T
    assert torch.allclose(logits["zero-shot"], zero_shot) and torch.allclose(logits["probe"], zero_shot)
    assert not torch.allclose(logits["probe-random"], zero_shot, atol=0.5)
    every, of = torch.cat([own for own, _ in sets]), torch.cat([labels, labels])
    for i in (0, 5):  # Tip-Adapter-F: 24 keys, 8 of each class, which weigh as much as 16
        for c in range(3):
            near = sum(math.exp(-5.5 * (1 - float(features[i] @ k))) for k, y in zip(every, of) if y == c)
            assert logits["tip-adapter"][i, c].item() == pytest.approx(zero_shot[i, c].item() + 2 * near, rel=1e-4)


@pytest.mark.parametrize("method", ["probe", "probe-random", "adapter", "tip-adapter"])
def test_fine_tuning_learns_and_repeats(method):
    features, labels, *_ = batch_of(90)
    names, row = unit(3, 12, seed=7).float(), row_of(finetune=method, lr=0.03, epochs=40)
    before = features.clone()
    first, again = (ldfs.fine_tune(row, Toy, "abc", names, [(features, labels)], seed=3) for _ in range(2))
    with torch.no_grad():
        assert torch.equal(first(features), again(features)) and torch.equal(features, before)
        loss, zero_shot = (F.cross_entropy(x, labels).item() for x in (first(features), 5 * features @ names.T))
    assert loss < zero_shot - 0.2


def test_rows_take_equally_many_steps(monkeypatch):
    """Synthesised features make a batch larger, not an epoch longer."""
    features, labels, *_ = batch_of(40)
    sizes, own = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, y: sizes.append(len(y)) or own(x, y))
    for sets in ([(features, labels)], [(features, labels)] * 3):
        sizes.clear()
        ldfs.fine_tune(row_of(epochs=2), Toy, "abc", unit(3, 12).float(), sets, seed=0)
        assert len(sizes) == 6 and sum(sizes) == 2 * 40 * len(sets)  # 40 source features in batches of 16: 3 steps


def test_loss_that_is_not_finite_is_said():
    features, labels, *_ = batch_of(40)
    with pytest.raises(common.InputError, match="loss of probe is nan; try a lower --lr, now 0.003"):
        ldfs.fine_tune(row_of(), Toy, "abc", unit(3, 12).float(), [(features * math.nan, labels)], seed=0)


# ---------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------


def flags(arguments=""):
    """The settings of a command line."""
    argv, sys.argv = sys.argv, ["ldfs.py", *arguments.split()]
    try:
        return ldfs.settings()
    finally:
        sys.argv = argv


def tiny_set(n, domain="photo", classes=common.PACS_CLASSES, seed=1):
    """n drawn images and the words for their color and place."""
    rng = common.tiny_rng(seed, "ldfs test", domain)
    labels = np.arange(n) % len(classes)
    colors, places = (rng.choice(list(kinds), n) for kinds in (tiny_world.COLORS, tiny_world.BACKGROUNDS))
    pixels = tiny_world.draw([classes[i] for i in labels], domain, places, colors, rng)
    return common.ImageSet(pixels, torch.from_numpy(labels), classes), colors, places


def test_retrieved_captions(tmp_path):
    """They are the nearest texts, found one by one, and they say what is to be seen."""
    args = flags(f"--output {tmp_path}")
    clip, (images, colors, places) = ldfs.Clip(args), tiny_set(56)
    seen = clip.look(images)
    said = ldfs.subjects(args, clip, seen, "a photo of a {}")
    words = [(color, place) for color in tiny_world.COLORS for place in tiny_world.BACKGROUNDS]
    for i in range(0, 56, 9):
        name, nearest = images.classes[images.labels[i]], {}
        for k, pattern in enumerate(("a photo of a {} NAME", "a photo of a NAME on {}")):
            texts = [pattern.format(w).replace("NAME", name) for w in dict.fromkeys(pair[k] for pair in words)]
            with torch.no_grad():
                scores = [
                    seen.features[i] @ clip.model.encode_text(clip.tokenizer(t), normalize=True)[0] for t in texts
                ]
            nearest[k] = texts[int(torch.tensor(scores).argmax())]
        color, place = nearest[0].split()[4], nearest[1].split()[-1]
        assert said[i] == f"{color} {name} on {place}"
    right = [np.mean([word in text.split() for word, text in zip(truth, said)]) for truth in (colors, places)]
    assert min(right) > 0.5, right  # of eight colors and eight places
    assert ldfs.subjects(argparse.Namespace(**{**vars(args), "captioner": "template"}), clip, seen, "")[8] == "elephant"


def test_place_is_no_part_of_a_waterbirds_caption(tmp_path):
    args = flags(f"--dataset tiny-waterbirds --output {tmp_path}")
    clip, (images, *_) = ldfs.Clip(args), tiny_set(6, classes=common.WATERBIRD_CLASSES)
    said = ldfs.subjects(args, clip, clip.look(images), "a photo of a {} on grass")
    assert all(re.fullmatch(r"\w+ (land|water)bird", text) for text in said)


@pytest.mark.parametrize(
    "caption, subject",
    [
        ("A black and white photo of a dog on a sofa.", "dog on a sofa"),
        ("a dog running on grass .", "dog running on grass"),
        ("There is a painting of the old house", "old house"),
        ("two dogs in a photograph of a lake", "two dogs in a photograph of a lake"),
        ("an elephant", "elephant"),
        ("anchor of a ship", "anchor of a ship"),
        ("the", ""),
        (" . ", ""),
    ],
)
def test_what_a_caption_says(caption, subject, monkeypatch):
    images = common.ImageSet(np.array(["data/x.jpg"]), torch.tensor([0]), ("dog",))
    seen, row = ldfs.Seen(images, "", None, images.labels), argparse.Namespace(captioner="file")
    monkeypatch.setattr(ldfs, "read_captions", lambda *_: [caption])
    if subject:
        assert ldfs.subjects(row, None, seen, "") == [subject]
    else:
        with pytest.raises(common.InputError, match="--captioner file says .* of data/x.jpg: it names nothing"):
            ldfs.subjects(row, None, seen, "")


TEXT = {"context_length": 32, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "output_tokens": True}
COCA = {
    "embed_dim": 32,
    "multimodal_cfg": TEXT,
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2},
}


def small_coca():
    torch.manual_seed(0)
    model = open_clip.CoCa(**COCA).eval()
    torch.nn.init.normal_(model.text_decoder.text_projection)  # open_clip leaves it as it finds the memory
    for parameter in model.text_decoder.parameters():
        parameter.data *= 4  # so that images matter for the words
    return model


def test_greedy_captions_are_those_of_one_image_and_one_word_at_a_time():
    model, images, lengths = small_coca(), 3 * torch.randn(6, 3, 32, 32), set()
    with torch.no_grad():
        first = model(images[:1], torch.tensor([[38]]), output_labels=False)["logits"][0, -1].argmax().item()
        for end in (39, first):  # an end that hardly comes, and one that comes at once for some
            tokens = ldfs.greedy_captions(model, images, 38, end, length=9)
            assert tokens.shape == (6, 9)
            for image, line in zip(images, tokens.tolist()):
                words = [38]
                while len(words) < 8 and words[-1] != end:
                    words.append(
                        model(image[None], torch.tensor([words]), output_labels=False)["logits"][0, -1].argmax().item()
                    )
                assert line == words + [end] * (9 - len(words))
                lengths.add(len(words))
    assert len(lengths) > 1


def test_coca_captions_become_text(monkeypatch, tmp_path):
    model, loaded = small_coca(), []

    class Words:
        sot_token_id, eot_token_id = 38, 39

        @staticmethod
        def decode(tokens):
            return " ".join(f"w{token}" for token in tokens)

    preprocess = common.load_clip("tiny")[1]
    own = common.load_clip
    fake = lambda name, tag, device: loaded.append((name, tag)) or (model, preprocess, Words)  # noqa: E731
    args = flags(f"--captioner coca --output {tmp_path}")
    clip, (images, *_) = ldfs.Clip(args), tiny_set(5)
    monkeypatch.setattr(
        common, "load_clip", lambda name, *rest: own(name, *rest) if name == "tiny" else fake(name, *rest)
    )
    said = ldfs.subjects(args, clip, clip.look(images), "a photo of a {}")
    assert loaded == [("coca_ViT-L-14", "mscoco_finetuned_laion2b_s13b_b90k")]
    assert all(re.fullmatch(r"w\d+( w\d+)*", text) and "w38" not in text and "w39" not in text for text in said)
    assert ldfs.subjects(args, clip, clip.look(images), "a photo of a {}") == said and len(loaded) == 1  # kept


# ---------------------------------------------------------------------------------------------------
# Cache, and who sees what
# ---------------------------------------------------------------------------------------------------


def test_features_are_computed_once_and_never_stale(tmp_path, monkeypatch, pacs_tree):
    args, calls, own = flags(f"--output {tmp_path}"), [], common.outputs
    monkeypatch.setattr(common, "outputs", lambda *rest: calls.append(1) or own(*rest))
    clip = ldfs.Clip(args)
    images = common.load_domains("pacs", pacs_tree)[2].images
    first = clip.look(images).features
    with torch.no_grad():
        pixels = torch.stack([clip.preprocess(Image.open(file)) for file in images.images])
        assert torch.allclose(first, clip.model.encode_image(pixels, normalize=True), atol=1e-6)
    assert torch.equal(clip.look(images).features, first) and torch.equal(ldfs.Clip(args).look(images).features, first)
    assert len(calls) == 1
    file = Path(images.images[4])
    times = file.stat()
    data = bytearray(file.read_bytes())
    Image.open(images.images[9]).save(file)
    shorter = file.read_bytes()
    assert bytes(data) != shorter
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # a changed image that looks as old as before
    changed = clip.look(images).features
    assert len(calls) == 2 and not torch.allclose(changed[4], first[4], atol=1e-3)
    assert torch.equal(changed[5:], first[5:])
    with torch.no_grad():
        load = common.load_clip
        monkeypatch.setattr(
            common, "load_clip", lambda *rest: (m := load(*rest))[0].visual.proj.mul_(1.01) is None or m
        )
    other = ldfs.Clip(args)
    assert other.identity != clip.identity
    other.look(images)
    assert len(calls) == 3
    assert not list(tmp_path.rglob("*.partial"))


QUICK = "--mapper-epochs 2 --epochs 2 --hidden 16"


@pytest.fixture
def command(call_main, monkeypatch):
    """`call_main` of ldfs. Figures take seconds, so they are drawn only where a test asks for them."""
    drawing = {name: getattr(ldfs, name) for name in ("plot_neighbours", "plot_features")}

    def run(*arguments, figures=False):
        for name, draw in drawing.items():
            monkeypatch.setattr(ldfs, name, draw if figures else lambda *_: None)
        return call_main(ldfs.main, [*arguments[0].split(), *arguments[1:]])

    return run


def test_no_target_image_is_read_before_everything_is_learnt(command, pacs_tree, monkeypatch):
    """Every way to a pixel is watched; a training that looks at a target would be seen here."""
    events, read_bytes, read_image = [], Path.read_bytes, common.read_image
    train, fine_tune = ldfs.train_mapper, ldfs.fine_tune
    monkeypatch.setattr(Path, "read_bytes", lambda path: events.append(str(path)) or read_bytes(path))
    monkeypatch.setattr(common, "read_image", lambda path: events.append(str(path)) or read_image(path))
    monkeypatch.setattr(ldfs, "train_mapper", lambda *a, **k: (train(*a, **k), events.append("trained"))[0])
    monkeypatch.setattr(ldfs, "fine_tune", lambda *a, **k: (fine_tune(*a, **k), events.append("trained"))[0])
    command(f"--dataset pacs --data-root {pacs_tree} --model tiny --workers 0 {QUICK}")
    last = len(events) - events[::-1].index("trained")
    of = lambda part: {Path(e).parts[-3] for e in part if e.endswith(".jpg")}  # noqa: E731
    assert events.count("trained") == 2 * 3 + 5 and of(events[:last]) == {"photo"}
    assert of(events[last:]) >= {"art_painting", "cartoon", "sketch"}


def test_targets_have_no_say_in_what_is_learnt(command, pacs_tree, tmp_path):
    """Other images in the target folders change nothing but the targets' numbers."""
    line = f"--dataset pacs --data-root {pacs_tree} --model tiny --workers 0 {QUICK} --summary results/x.json"
    line += " --targets sketch"
    runs = []
    for _ in range(2):
        command(line)
        runs.append(json.loads((tmp_path / "results" / "x.json").read_text())["runs"][0]["modes"])
        for folder in (pacs_tree / "PACS" / "sketch").iterdir():
            for file in folder.iterdir():
                Image.new("RGB", (40, 40), (9, 200, 9)).save(file)
    for row in runs[0]:
        assert runs[0][row]["hold-out"] == runs[1][row]["hold-out"] and runs[0][row]["source"] == runs[1][row]["source"]
        assert runs[1][row]["target"] == pytest.approx(1 / 7)  # all images are alike


def test_synthesised_features_keep_the_labels_of_their_images(tmp_path):
    args = flags(f"--output {tmp_path} {QUICK} --captioner template")
    clip, (images, *_) = ldfs.Clip(args), tiny_set(28)
    shuffled = images.subset(np.random.default_rng(0).permutation(28))
    seen = clip.look(shuffled)
    names = common.class_features(clip.model, clip.tokenizer, images.classes)
    for labels in (range(7), [2, 5]):
        target = ldfs.Target("sketch", "a sketch of a {}", "a photo of a {}", [*labels], None)
        for direction in ("local", "global", "additive"):
            row = argparse.Namespace(**{**vars(args), "direction": direction})
            features, own, rows = ldfs.synthesise(row, clip, target, seen, seen, names, seed=0)
            assert rows.tolist() == [i for i in range(28) if shuffled.labels[i] in labels]
            assert torch.equal(own, shuffled.labels[rows])
            assert torch.allclose(features.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
        with torch.no_grad():  # the additive direction, image by image
            for i, feature in zip(rows, features):
                texts = [f"a {medium} of a {images.classes[shuffled.labels[i]]}" for medium in ("sketch", "photo")]
                to, since = clip.model.encode_text(clip.tokenizer(texts), normalize=True)
                moved = seen.features[i] + to - since
                assert torch.allclose(feature, moved / moved.norm(), atol=1e-5)


def test_source_and_targets_of_tiny_data(monkeypatch):
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (common.PACS_CLASSES, 8, 8))
    args = flags("--source cartoon --targets sketch photo")
    (task,) = ldfs.load_tasks(args, seed=0)
    cartoon = common.tiny_domain("tiny-pacs", "cartoon", 0, 0.4)
    held_out, rest = common.domain_split(56, 1)
    assert torch.equal(task.train.images, cartoon.images.images[rest])
    assert torch.equal(task.holdout.images, cartoon.images.images[held_out])
    assert torch.equal(task.test.images, cartoon.balanced.images)
    assert [(t.name, t.description, t.origin) for t in task.targets] == [
        ("photo", "a photo of a {}", "a cartoon of a {}"),
        ("sketch", "a sketch of a {}", "a cartoon of a {}"),
    ]
    assert torch.equal(task.targets[1].images.images, common.tiny_domain("tiny-pacs", "sketch", 0, 0.4).balanced.images)


@pytest.fixture
def few_birds(monkeypatch):
    few = functools.partial(common.load_tiny_waterbirds, sizes=(60, 8, 40))
    monkeypatch.setattr(common, "load_tiny_waterbirds", few)
    return few


def test_waterbirds_swap_places(few_birds):
    (task,) = ldfs.load_tasks(flags("--dataset tiny-waterbirds"), seed=0)
    water, land = task.targets
    assert {*task.train.groups.tolist(), *task.holdout.groups.tolist()} == {0, 3} == {*task.test.groups.tolist()}
    assert (water.origin, water.description) == ("a photo of a {} on grass", "a photo of a {} on water")
    assert (land.origin, land.description) == ("a photo of a {} on water", "a photo of a {} on grass")
    assert water.labels == [0] and {*water.images.groups.tolist()} == {1}  # landbirds on water
    assert land.labels == [1] and {*land.images.groups.tolist()} == {2}  # waterbirds on land


def test_measures_of_synthesised_features():
    """A case that can be worked out: two classes on four axes, a target domain at right angles."""
    axes = torch.eye(4)
    images = common.ImageSet(torch.zeros(4, 3, 2, 2), torch.tensor([0, 0, 1, 1]), ("a", "b"))
    seen = lambda rows: ldfs.Seen(images, "", axes[rows], images.labels)  # noqa: E731
    source, target = seen([0, 0, 1, 1]), seen([2, 2, 3, 3])
    perfect = {"t": (axes[[2, 2, 3, 3]], images.labels, torch.arange(4))}
    found = ldfs.judge(perfect, source, source, {"t": target})
    assert found == pytest.approx({"move": 2**0.5, "to real shift": 1, "spread": 0, "real spread": 0, "distinct": 0.5,
                                   "right class": 1, "right domain": 1, "both": 1}, abs=1e-6)  # fmt: skip
    wrong = {"t": (axes[[3, 3, 1, 2]], images.labels, torch.arange(4))}
    found = ldfs.judge(wrong, source, source, {"t": target})
    assert found["right class"] == 0.25 and found["right domain"] == 0.75 and found["both"] == 0
    assert found["spread"] == pytest.approx(2**0.5 / 2) and found["move"] == pytest.approx(0.75 * 2**0.5)
    assert found["to real shift"] == pytest.approx(0.5)  # class a moves at 60 degrees to its shift, so does b


def test_neighbours_of_each_target_stand_below_their_own_source_images(monkeypatch, tmp_path):
    """Every image has a brightness of its own; real features lie on the axes, synthesised ones on some of them."""
    shown, own = [], ldfs.plt.Axes.imshow
    bright = lambda start: common.ImageSet(  # noqa: E731
        (torch.arange(4) + start).to(torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2),
        torch.tensor([0, 0, 1, 1]),
        ("a", "b"),
    )
    seen = lambda start: ldfs.Seen(bright(start), "", torch.eye(4), torch.tensor([0, 0, 1, 1]))  # noqa: E731
    targets = {"t": seen(100), "u": seen(200)}
    labels = torch.tensor([0, 0, 1, 1])
    made = {"t": (torch.eye(4)[[0, 0]], labels[:2], torch.tensor([0, 1]))}
    made |= {"u": (torch.eye(4)[[2, 1]], labels[2:], torch.tensor([2, 3]))}
    monkeypatch.setattr(
        ldfs.plt.Axes, "imshow", lambda axes, x: (shown.append((int(x[0, 0, 0]), axes)), own(axes, x))[1]
    )
    monkeypatch.setattr(ldfs.plt, "close", lambda figure: None)
    ldfs.plot_neighbours(seen(0), {"probe + LDFS": made}, targets, tmp_path / "n.png", columns=2)
    assert [value for value, _ in shown] == [0, 1, 100, 100, 2, 3, 202, 201]
    frames = [axes.spines["top"].get_edgecolor() for _, axes in shown]
    red, blue, none = (to_rgba(color) for color in ("tab:red", "tab:blue", "none"))
    assert frames == [none, none, none, blue, none, none, none, red]


# ---------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------


def test_run_on_tiny_data(command, tmp_path, monkeypatch):
    """Tables and files; a second run elsewhere, and a third from the cache, give the same numbers."""
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (common.PACS_CLASSES, 8, 8))
    output = command(f"{QUICK} --summary one.json", figures=True)
    rows = re.findall(
        r"^([^\d\n]+?) +\d\d\.\d +\d\d\.\d +\d\d\.\d +\d\d\.\d +\d\d\.\d +\d\d\.\d +\d\d\.\d$", output, re.M
    )
    assert rows == ["zero-shot", "probe", "probe + text", "probe + LADS", "probe + LDFS"]
    folder = tmp_path / "runs" / "ldfs" / "tiny-pacs-photo-seed0"
    assert {file.name for file in folder.iterdir()} == {"result.json", "neighbours.png", "features.png"}
    with Image.open(folder / "neighbours.png") as grid, Image.open(folder / "features.png") as panels:
        assert grid.width > 1000 and grid.height > 700 and panels.width > panels.height
    command(f"{QUICK} --summary two.json --output elsewhere")
    command(f"{QUICK} --summary three.json")
    one, two, three = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two", "three"))
    assert one["runs"] == two["runs"] == three["runs"]
    numbers = json.loads((folder / "result.json").read_text())["modes"]["probe + LDFS"]
    assert numbers == one["runs"][0]["modes"]["probe + LDFS"]
    assert one["runs"][0]["synthesised"]["probe + LDFS"] != one["runs"][0]["synthesised"]["probe + LADS"]
    assert numbers["target"] == pytest.approx((numbers["art_painting"] + numbers["cartoon"] + numbers["sketch"]) / 3)
    assert numbers["average"] == pytest.approx((numbers["source"] + numbers["target"]) / 2)
    assert str(tmp_path) not in (tmp_path / "one.json").read_text()


def test_all_sources_and_seeds(command, tmp_path, monkeypatch):
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (common.PACS_CLASSES, 8, 8))
    output = command(f"{QUICK} --source all --targets photo sketch --seeds 0 1 --study captions --finetune coop")
    runs = json.loads((tmp_path / "results" / "ldfs-captions-tiny-pacs.json").read_text())["runs"]
    order = [(source, seed) for seed in (0, 1) for source in common.TINY_DOMAINS]
    assert [(run["source"], run["seed"]) for run in runs] == order
    assert list(runs[0]["modes"]["coop + LDFS"])[4:] == ["photo", "sketch"]
    assert list(runs[2]["modes"]["coop"])[4:] == ["sketch"]  # photo is its own source there
    assert "8 runs" in output and all(table in output for table in ldfs.tables("tiny-pacs", runs))


@pytest.mark.parametrize("study", ldfs.STUDIES)
def test_studies(command, tmp_path, monkeypatch, study):
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (common.PACS_CLASSES, 8, 8))
    output = command(f"--study {study} --targets sketch {QUICK}")
    (run,) = json.loads((tmp_path / "results" / f"ldfs-{study}-tiny-pacs.json").read_text())["runs"]
    assert [*run["modes"]] == [name.replace("{}", "probe") for name in ldfs.STUDIES[study]]
    assert all(re.search(rf"^{re.escape(name)} +\d", output, re.M) for name in run["modes"])
    made = list(run["synthesised"].values())
    if study != "finetune":  # every row with another step 1
        assert all(a != b for i, a in enumerate(made) for b in made[:i])
    else:
        assert made[0] == made[2] and {*run["modes"]} >= {f"{method} + LDFS" for method in ldfs.FINETUNE}


def write_tree(folder, names, domain="photo", count=4):
    """`count` drawn images in `<folder>/<name>/` for every {folder name: thing}."""
    for place, thing in names.items():
        images, *_ = tiny_set(count, domain, (thing,), seed=len(place))
        (folder / place).mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(images.images):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / place / f"{thing}_{i}.png")


MINI = ("dog", "house", "person")


@pytest.fixture
def mini(tmp_path):
    """DomainNet-mini: three classes, two images of each on every domain's train list and two on its test list."""
    base = tmp_path / "data" / "domain_net"
    for domain in ("clipart", "painting", "real", "sketch"):
        write_tree(base / domain, {name: name for name in MINI}, {"real": "photo"}.get(domain, "cartoon"), 7)
        for part, numbers in (("train", range(5)), ("test", (5, 6))):
            lines = [f"{domain}/{name}/{name}_{i}.png {k}" for k, name in enumerate(MINI) for i in numbers]
            (base / f"{domain}_{part}_mini.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


@pytest.fixture
def cub(tmp_path):
    """CUB-Paintings: the same numbers, names with other capitals, classes that sort by number."""
    data = tmp_path / "data"
    write_tree(
        data / "CUB_200_2011" / "images", {"001.Dog": "dog", "002.Boat": "boat", "010.Art_Painting": "house"}, count=6
    )
    write_tree(
        data / "CUB-200-Painting", {"001.dog": "dog", "002.Boat": "boat", "010.Art_painting": "house"}, "art_painting"
    )
    return data


@pytest.fixture
def birds(few_birds, tmp_path):
    folder = tmp_path / "data" / "waterbird_complete95_forest2water2"
    rows = ["img_id,img_filename,y,split,place"]
    for part, images in enumerate(few_birds().values()):
        for i, (pixels, group) in enumerate(zip(images.images, images.groups.tolist())):
            rows.append(f"{len(rows)},birds/{part}_{i}.png,{group // 2},{part},{group % 2}")
            (folder / "birds").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / "birds" / f"{part}_{i}.png")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "data"


def test_domainnet_mini_reader(mini):
    domains = common.load_domains("domainnet-mini", mini)
    assert [domain.name for domain in domains] == ["clipart", "painting", "real", "sketch"]
    for domain in domains:
        assert domain.images.classes == domain.balanced.classes == MINI
        assert len(domain.images) == 15 and len(domain.balanced) == 6
        for images in (domain.images, domain.balanced):
            for file, label in zip(images.images, images.labels):
                assert Path(file).is_file() and Path(file).parts[-3:-1] == (domain.name, MINI[label])
    assert not {*domains[0].images.images} & {*domains[0].balanced.images}


def test_cub_paintings_reader(cub):
    painting, photo = common.load_domains("cub-paintings", cub)
    assert (painting.name, photo.name) == ("painting", "photo")
    assert painting.images.classes == photo.images.classes == ("Dog", "Boat", "Art_Painting")
    assert photo.images.labels.bincount().tolist() == [6, 6, 6] and len(painting.images) == 12
    assert all("CUB-200-Painting" in file for file in painting.images.images)
    (cub / "CUB-200-Painting" / "001.dog").rename(cub / "CUB-200-Painting" / "003.dog")
    with pytest.raises(common.InputError, match="different numbers: ..001., .003.."):
        common.load_domains("cub-paintings", cub)


# words that the tiny CLIP knows, for domains whose own words it does not
WORDS = [f"{name}=a cartoon of a {{}}" for name in ("clipart", "product")]
WORDS = ["--descriptions", *WORDS, "land=a photo of a {} on grass", "water=a photo of a {} on water"]


@pytest.mark.parametrize(
    "tree, arguments, source, targets",
    [
        (
            "mini",
            "--dataset domainnet-mini --source sketch --targets real painting clipart",
            "sketch",
            "clipart painting real",
        ),
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
        for old, new in zip(
            ("art_painting", "cartoon", "sketch", "photo"), ("Art", "Clipart", "Product", "Real World")
        ):
            shutil.move(data / "PACS" / old, data / "office_home" / new)
    line = f"{arguments} --data-root {data} --model tiny --workers 0 {QUICK} --summary results/x.json"
    output = command(line, *WORDS, figures=tree == "mini")
    assert "error" not in output
    run = json.loads((tmp_path / "results" / "x.json").read_text())["runs"][0]
    assert run["source"] == source and [*run["modes"]["probe + LDFS"]][4:] == targets.split()
    assert len(list((tmp_path / "runs" / "ldfs").glob("*/neighbours.png"))) == (tree == "mini")
    assert len(list((tmp_path / "runs" / "ldfs").glob("*/result.json"))) == (3 if "all" in arguments else 1)


def test_command_of_the_readme_with_coop(command, mini, root):
    line = "python ldfs.py --dataset domainnet-mini --source sketch --targets real painting clipart --finetune coop"
    arguments = readme_script(root, line).removeprefix("ldfs.py ")
    output = command(f"{arguments} --data-root {mini} --model tiny --workers 0 {QUICK}", *WORDS)
    assert re.search(r"^coop \+ LDFS +\d", output, re.M)


def test_caption_file(command, pacs_tree, tmp_path, monkeypatch):
    """Captions by path below the data root; lacking and empty ones are named."""
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (common.PACS_CLASSES, 8, 8))
    photos = sorted((pacs_tree / "PACS" / "photo").rglob("*.jpg"))
    captions = {
        file.relative_to(pacs_tree).as_posix(): f"A photo of a red {file.parent.name} on grass." for file in photos
    }
    line = f"--dataset pacs --data-root {pacs_tree} --model tiny --workers 0 --targets sketch {QUICK}"
    line += " --study captions --captioner file --caption-file said.json"
    write = lambda: (tmp_path / "said.json").write_text(json.dumps(captions))  # noqa: E731
    write()
    assert "probe + LDFS" in command(line)
    (data,) = (domain.images for domain in common.load_domains("pacs", pacs_tree) if domain.name == "photo")
    row = argparse.Namespace(captioner="file", caption_file=tmp_path / "said.json", dataset="pacs", data_root=pacs_tree)
    said = ldfs.subjects(row, None, ldfs.Seen(data, "", None, data.labels), "")
    assert said == [f"red {data.classes[label]} on grass" for label in data.labels]
    first = next(iter(captions))
    captions[first] = "a photo of a "
    write()
    error = command(line)
    assert first in error and "'a photo of a '" in error and "names nothing" in error
    for path in list(captions)[:3]:
        del captions[path]
    write()
    error = command(line)
    assert re.search(r"lacks \d of \d+ images, first 'PACS/photo/dog/pic_00\d.jpg'", error), error
    (tmp_path / "said.json").write_text("not JSON")
    assert "no JSON {path: caption} in --caption-file said.json" in command(line)
    assert "drawn in memory" in command(f"--captioner file --caption-file said.json {QUICK}")
    assert not list((tmp_path / "runs" / "ldfs").glob(".*"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--dataset tiny-pac", ("unknown data set 'tiny-pac'", "did you mean 'tiny-pacs'", "waterbirds")),
        ("--source phto", ("unknown source 'phto'", "did you mean 'photo'")),
        ("--targets skech", ("unknown target 'skech'", "did you mean 'sketch'")),
        ("--targets sketch photo", ("--targets names 'photo', which is the source",)),
        ("--descriptions sketch=pencil", ("--descriptions", "sketch='pencil'", "{}")),
        ("--descriptions sketch", ("--descriptions", "sketch=''", "{}")),
        ("--captioner file", ("--captioner file needs --caption-file",)),
        ("--sigma -1", ("--sigma must be at least 0, got -1.0",)),
        ("--hidden 0", ("--hidden must be at least 1, got 0",)),
        ("--lr nan", ("--lr must be at least 0, got nan",)),
        ("--summary nowhere/x.json", ("--summary", "nowhere")),
        ("--study losses --output x", ("--summary", "no folder results")),
        ("--cue 2", ("--cue", "2.0")),
        ("--output taken", ("cannot write results to", "--output")),
        ("--dataset domainnet-mini", ("'domainnet-mini' is not in data/domain_net", "tiny-office")),
        ("--dataset cub-paintings", ("data/CUB-200-Painting", "CUB_200_2011", "tiny-pacs")),
        ("--dataset waterbirds", ("metadata.csv", "tiny-waterbirds")),
        ("--dataset waterbirds --targets air", ("data/waterbird_complete95",)),
        ("--dataset tiny-waterbirds --targets air", ("unknown target 'air'", "water, land")),
        ("--templates zebra{}", ("zebra",)),
    ],
)
def test_wrong_flag_is_one_clear_error(command, monkeypatch, few_birds, tmp_path, arguments, words):
    (tmp_path / "taken").write_text("a file where a folder should be")
    (tmp_path / "results").rmdir()
    (tmp_path / "data").mkdir()
    if "--templates" in arguments or "--output" in arguments:
        monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (common.PACS_CLASSES, 8, 8))
    elif "--cue" not in arguments:
        monkeypatch.setattr(common, "draw_domain", quick_draw_domain)
    error = command(arguments)
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert not list((tmp_path / "runs").glob("ldfs/tiny*")) and not list((tmp_path / "runs").glob("ldfs/.*"))


def quick_draw_domain(name, classes, domain, seed, cue, sizes):
    """Grey in place of drawings, where a test ends before it looks at an image."""
    for labels in (torch.arange(len(classes)).repeat_interleave(size) for size in sizes):
        yield torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8), labels, torch.zeros_like(labels)


def test_bad_folders_are_one_clear_error(command, mini, cub, pacs_tree):
    base = mini / "domain_net"
    line = f"--dataset domainnet-mini --data-root {mini} --model tiny"
    (base / "real" / "dog" / "dog_5.png").unlink()
    error = command(line)
    assert "real_test_mini.txt" in error and "real/dog/dog_5.png" in error and "images that are there" in error
    (base / "clipart_train_mini.txt").write_text("clipart/dog/dog_0.png\n")
    error = command(line)
    assert "cannot read" in error and "clipart_train_mini.txt" in error
    for file in (cub / "CUB_200_2011" / "images" / "002.Boat").iterdir():
        file.unlink()
    error = command(f"--dataset cub-paintings --data-root {cub} --model tiny")
    assert "source 'photo'" in error and "none of class 'Boat'" in error
    (pacs_tree / "PACS" / "sketch").rename(pacs_tree / "PACS" / "etching")
    error = command(f"--dataset folder:{pacs_tree / 'PACS'} --model tiny")
    assert "no words describe domain 'etching'" in error and "--descriptions" in error


@pytest.mark.slow
def test_main_job(checkout, root):
    done = call(readme_script(root, "python ldfs.py"), checkout)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((checkout / "runs" / "ldfs" / "tiny-pacs-photo-seed0" / "result.json").read_text())["modes"]
    assert numbers["probe"]["source"] > numbers["zero-shot"]["source"] + 0.05
    assert numbers["probe + LDFS"]["target"] > numbers["probe"]["target"]


@pytest.mark.slow
def test_real_architecture_on_a_real_layout(checkout, pacs_tree, tmp_path):
    """ViT-B-32 with random weights from a file, open_clip's tokenizer, the general phrases."""
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), tmp_path / "vit.pt")
    done = call(
        f"ldfs.py --dataset pacs --data-root {pacs_tree} --model ViT-B-32-quickgelu --pretrained {tmp_path / 'vit.pt'} "
        "--study finetune --mapper-epochs 1 --epochs 1 --summary all.json",
        checkout,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads((checkout / "all.json").read_text())["runs"][0]["modes"]) == 15


COMMITTED = {  # results/ldfs-NAME.json: the study, which of its tables the README shows
    "tiny-pacs": ("", (0, 2)),
    "tiny-waterbirds": ("", (0,)),
    "losses-tiny-pacs": ("losses", (0, 1)),
    "losses-tiny-waterbirds": ("losses", (0,)),
    "captions-tiny-pacs": ("captions", (0,)),
    "finetune-tiny-pacs": ("finetune", (0,)),
    "sigma-tiny-pacs": ("sigma", (0,)),
}


@pytest.mark.parametrize("name", COMMITTED)
def test_readme_tables_are_the_committed_runs(root, name):
    committed, (study, shown) = json.loads((root / "results" / f"ldfs-{name}.json").read_text()), COMMITTED[name]
    dataset, runs = "tiny-" + name.rpartition("tiny-")[2], committed["runs"]
    now = vars(flags(f"--dataset {dataset} --summary x.json" + (f" --study {study}" if study else "")))
    sources = ["usual places"] if dataset == "tiny-waterbirds" else common.TINY_DOMAINS
    assert {(run["source"], run["seed"]) for run in runs} == {(s, seed) for s in sources for seed in range(5)}
    rows = ldfs.STUDIES[study] if study else ldfs.ROWS
    assert all([*run["modes"]] == [row.replace("{}", "probe") for row in rows] for run in runs)
    chosen = (
        "direction",
        "sigma",
        "pairwise",
        "consistency",
        "reach",
        "hidden",
        "mapper_epochs",
        "mapper_lr",
        "captioner",
    )
    for setting in (
        *chosen,
        "batch_size",
        "weight_decay",
        "finetune",
        "epochs",
        "lr",
        "cue",
        "templates",
        "descriptions",
    ):
        assert committed["settings"][setting] == now[setting], f"results were made with another {setting}"
    readme, tables = (root / "README.md").read_text(), ldfs.tables(dataset, runs)
    assert all(f"```text\n{tables[i]}\n```" in readme for i in shown)


def test_readme_claims(root):
    """What the README says in words about the numbers of its tables."""
    runs = {
        name: json.loads((root / "results" / f"ldfs-{name}tiny-pacs.json").read_text())["runs"]
        for name in ("", "losses-")
    }
    mean = lambda name, row, measure: np.mean(common.seed_means(runs[name], row, measure))  # noqa: E731
    assert mean("", "probe + LDFS", "target") - mean("", "probe", "target") == pytest.approx(0.036, abs=5e-4)
    assert abs(mean("", "probe + LDFS", "source") - mean("", "probe", "source")) < 0.005
    assert mean("", "probe + LADS", "target") > mean("", "zero-shot", "target")
    more = mean("losses-", "probe + LDFS, consistency", "target") - mean("", "probe + LADS", "target")
    assert abs(more) < 0.005
    made = [{"seed": run["seed"], "modes": run["synthesised"]} for run in runs["losses-"]]
    of = lambda row, measure: np.mean(common.seed_means(made, row, measure))  # noqa: E731
    assert of("probe + local, noise", "spread") < of("probe + LDFS", "spread") - 0.15
    assert of("probe + LDFS, consistency", "right class") > of("probe + LDFS", "right class") + 0.08


def test_every_setting_of_help_has_a_default_and_the_words_a_place(root, capsys):
    with pytest.raises(SystemExit):
        flags("--help")
    assert "our choice" in capsys.readouterr().out
    words = json.loads((root / "assets" / "words.json").read_text())
    for name, texts in words.items():
        for text in texts.values() if name.startswith("descriptions") else sum(texts.values(), []):
            assert text.count("{}") == 1, text
    _, _, tokenizer = common.load_clip("tiny")
    tiny = words["phrases of the tiny CLIP"]
    tokenizer([phrase.format("dog") for group in tiny.values() for phrase in group])  # it knows every word
    assert [text.split()[0] for text in tiny["color"]] == [*tiny_world.COLORS]
    assert [text.split()[-1] for text in tiny["place"]] == [*tiny_world.BACKGROUNDS]
