"""The tiny world: the same seed draws the same images, cues are as frequent as asked, parts share
nothing, and the tiny CLIP knows this world as well as it should."""

import json

import numpy as np
import pytest
import torch

import common
from support import tiny_world

BACKGROUNDS = list(tiny_world.BACKGROUNDS)
COLORS = list(tiny_world.COLORS)


def fingerprints(images):
    return {pixels.numpy().tobytes() for pixels in images}


def assert_share_no_image(sets):
    """No image twice, neither within a set nor in two of them."""
    found = set()
    for images in sets:
        prints = fingerprints(images.images)
        assert not prints & found
        found |= prints


def agreement_with_class(images):
    """How often the second attribute of groups 2 * class + attribute equals the class."""
    labels, attribute = images.groups // 2, images.groups % 2
    assert torch.equal(labels, images.labels)
    return (labels == attribute).double().mean().item()


def four_standard_errors(share, n):
    return 4 * np.sqrt(share * (1 - share) / n)  # 0 where the share is 0 or 1


def test_same_seed_same_images_other_seed_others():
    first = common.tiny_domain("tiny-pacs", "sketch", 3, 0.4)
    again = common.tiny_domain("tiny-pacs", "sketch", 3, 0.4)
    other = common.tiny_domain("tiny-pacs", "sketch", 4, 0.4)
    assert first.images.images.dtype == torch.uint8
    assert first.images.images.shape[1:] == (3, 32, 32)
    assert torch.equal(first.images.images, again.images.images)
    assert torch.equal(first.balanced.images, again.balanced.images)
    assert not torch.equal(first.images.images, other.images.images)


def test_attributes_say_how_images_were_drawn():
    """Snow is brighter than night, a red thing redder than a blue one; a subset keeps its own."""
    domain = common.tiny_domain("tiny-pacs", "photo", 3, 0.4)
    for images in (domain.images, domain.balanced):
        ground, color = images.attributes["background"], images.attributes["color"]
        assert torch.equal(ground == images.labels % 8, images.groups == 1)
        pixels = images.images.float()  # (N, 3, 32, 32)
        edge = pixels[:, :, :3].mean((1, 2, 3))  # where no thing stands
        snow, night = BACKGROUNDS.index("snow"), BACKGROUNDS.index("night")
        assert edge[ground == snow].min() > edge[ground == night].max()
        redness = (pixels[:, 0] - pixels[:, 2])[:, 12:20, 12:20].mean((1, 2))
        red, blue = COLORS.index("red"), COLORS.index("blue")
        assert redness[color == red].mean() > redness[color == blue].mean() + 50
        few = images.subset([4, 2])
        assert few.attributes["background"].tolist() == [ground[4], ground[2]]


def test_domains_and_parts_share_no_image():
    parts = []
    for domain in common.load_domains("tiny-pacs", seed=5):
        parts += [domain.images, domain.balanced]
    for part in parts:
        assert len(fingerprints(part.images)) == len(part)
    assert_share_no_image(parts)


@pytest.mark.parametrize("cue", [0.0, 0.4, 0.9, 1.0])
def test_cue_goes_with_the_class_as_often_as_asked(cue):
    images = common.tiny_domain("tiny-office", "cartoon", 6, cue).images
    agreement = images.groups.double().mean().item()
    assert abs(agreement - cue) <= four_standard_errors(cue, len(images))


@pytest.mark.parametrize("name", common.TINY_BENCHMARKS)
def test_balanced_part_has_every_background_equally_often(name):
    part = common.tiny_domain(name, "photo", 7, 0.9).balanced
    assert part.labels.bincount().unique().numel() == 1
    for label in part.labels.unique():  # one of eight backgrounds is the class's own
        own_background = part.groups[part.labels == label].double()
        assert own_background.mean().item() == 1 / len(BACKGROUNDS)


def test_waterbirds_groups():
    parts = common.load_parts("tiny-waterbirds", seed=1)
    assert list(parts) == ["train", "val", "test"]
    assert abs(agreement_with_class(parts["train"]) - 0.95) < 0.02
    for name in ("val", "test"):
        assert parts[name].groups.bincount().unique().numel() == 1


def test_mnist_cifar_digit_agrees_in_id_and_not_in_ood():
    parts = common.load_parts("tiny-mnist-cifar", seed=1)
    assert list(parts) == ["train", "val_id", "test_id", "val_ood", "test_ood"]
    assert parts["train"].images.shape[1:] == (3, 32, 16)
    for name, images in parts.items():
        assert images.labels.bincount().unique().numel() == 1
        expected = 0.5 if name.endswith("ood") else 0.9
        error = abs(agreement_with_class(images) - expected)
        assert error < four_standard_errors(expected, len(images))
    assert_share_no_image(parts.values())


def test_cue_outside_a_probability_is_refused():
    with pytest.raises(common.InputError, match="--cue .* 1.5"):
        common.load_domains("tiny-pacs", cue=1.5)
    with pytest.raises(common.InputError, match="--cue .* -0.1"):
        common.load_parts("tiny-waterbirds", cue=-0.1)


def test_every_word_of_the_world_is_in_the_vocabulary():
    tokenizer = tiny_world.WordTokenizer(tiny_world.TINY_VOCABULARY, 20)
    things = (*tiny_world.OFFICE_CLASSES, *tiny_world.WATERBIRD_CLASSES)
    for word in (*things, *COLORS, *BACKGROUNDS):
        assert tokenizer(f"A photo of a {word}.").shape == (1, 20)
    with pytest.raises(common.InputError, match="does not know the word 'zebra'"):
        tokenizer("a photo of a zebra")
    with pytest.raises(common.InputError, match="at most 19"):
        tokenizer(" ".join(["photo"] * 20))


def fresh_images(domain, rng, transform):
    """800 images of 16 classes, as the tiny CLIP was pretrained on them, but of another seed."""
    labels = np.arange(800) % 16
    names = [tiny_world.OFFICE_CLASSES[label] for label in labels]
    colors = rng.choice(COLORS, 800)
    grounds = rng.choice(BACKGROUNDS, 800)
    pose = tiny_world.PRETRAINING_POSE
    pixels = tiny_world.draw(names, domain, grounds, colors, rng, pose)
    images = common.ImageSet(pixels, torch.from_numpy(labels), tiny_world.OFFICE_CLASSES)
    return images.transformed(transform)


OTHER_CLIP = f"local-dir:{common.ASSETS / 'tiny_clip_16_heads'}"


@pytest.mark.parametrize("name", ["tiny", pytest.param(OTHER_CLIP, marks=pytest.mark.slow)])
def test_tiny_clip_recognises_fresh_images_and_has_a_domain_gap(name):
    """The bounds the shipped models were made for."""
    clip = common.load_clip(name)
    class_features = clip.class_features(tiny_world.OFFICE_CLASSES)
    classify = common.clip_classifier(clip.visual, class_features)
    rng = tiny_world.tiny_rng(77, "test")
    tests = {}
    for domain in tiny_world.TINY_DOMAINS:
        tests[domain] = {domain: fresh_images(domain, rng, clip.preprocess)}
    accuracy = common.evaluate(classify, tests)
    assert accuracy["photo"] >= 0.70
    assert min(accuracy.values()) >= 0.45
    assert accuracy["sketch"] <= accuracy["photo"] - 0.10


def test_tiny_clip_says_how_it_was_made():
    config = json.loads((common.TINY_CLIP / "open_clip_config.json").read_text())
    assert tuple(config["vocabulary"]) == tiny_world.TINY_VOCABULARY
    assert (common.TINY_CLIP / "open_clip_model.safetensors").stat().st_size < 6e6
    made = json.loads((common.TINY_CLIP / "training.json").read_text())
    settings = made["training"]
    assert settings["device"] == "cpu"
    assert settings["seed"] >= 20_000  # no seed of an evaluation set
    assert len(made["curve"]) == settings["epochs"]
    assert set(made["zero_shot"]["pretraining pose"]) == set(tiny_world.TINY_DOMAINS)


def test_a_brush_stroke_never_leaves_the_canvas():
    """Seed 1000 draws a jitter that float32 rounds up to the edge of its cell: in the last cell
    that is pixel 32, and images have 0 to 31."""
    domain = common.tiny_domain("tiny-office", "art_painting", 1000, 0.4)
    assert domain.images.images.shape == (1280, 3, 32, 32)
    assert domain.balanced.images.shape == (640, 3, 32, 32)
