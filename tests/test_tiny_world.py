"""The tiny world: the same seed draws the same images, cues are as frequent as asked, parts share nothing."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import common
from assets import tiny_world


def fingerprints(images):
    return {pixels.numpy().tobytes() for pixels in images}


def test_same_seed_same_images_other_seed_others():
    first, again, other = (common.tiny_domain("tiny-pacs", "sketch", seed, 0.4) for seed in (3, 3, 4))
    assert first.images.images.dtype == torch.uint8 and first.images.images.shape[1:] == (3, 32, 32)
    assert torch.equal(first.images.images, again.images.images) and torch.equal(
        first.balanced.images, again.balanced.images
    )
    assert not torch.equal(first.images.images, other.images.images)


def test_domains_and_parts_share_no_image():
    seen = set()
    for domain in common.load_domains("tiny-pacs", seed=5):
        for part in (domain.images, domain.balanced):
            prints = fingerprints(part.images)
            assert len(prints) == len(part) and not prints & seen
            seen |= prints


@pytest.mark.parametrize("cue", [0.0, 0.4, 0.9, 1.0])
def test_cue_goes_with_the_class_as_often_as_asked(cue):
    domain = common.tiny_domain("tiny-office", "cartoon", 6, cue)
    agreement = domain.images.groups.double().mean().item()
    assert abs(agreement - cue) <= 4 * np.sqrt(
        cue * (1 - cue) / len(domain.images)
    )  # four standard errors; exact at 0 and 1


@pytest.mark.parametrize("name", common.TINY_BENCHMARKS)
def test_balanced_part_has_every_background_equally_often(name):
    part = common.tiny_domain(name, "photo", 7, 0.9).balanced
    assert part.labels.bincount().unique().numel() == 1
    for label in part.labels.unique():  # one of eight backgrounds is the class's own
        assert part.groups[part.labels == label].double().mean().item() == 1 / len(tiny_world.BACKGROUNDS)


def test_waterbirds_groups():
    splits = common.load_tiny_waterbirds(seed=1)
    birds, places = splits["train"].groups // 2, splits["train"].groups % 2
    assert torch.equal(birds, splits["train"].labels)
    assert abs((birds == places).double().mean().item() - 0.95) < 0.02
    for name in ("val", "test"):
        assert splits[name].groups.bincount().unique().numel() == 1


def test_mnist_cifar_digit_agrees_in_id_and_not_in_ood():
    splits = common.load_tiny_mnist_cifar(seed=1)
    assert splits["train"].images.shape[1:] == (3, 32, 16)
    seen = set()
    for name, images in splits.items():
        vehicle, digit = images.groups // 2, images.groups % 2
        assert torch.equal(vehicle, images.labels) and images.labels.bincount().unique().numel() == 1
        expected = 0.5 if name.endswith("ood") else 0.9
        assert abs((vehicle == digit).double().mean().item() - expected) < 4 * np.sqrt(
            expected * (1 - expected) / len(images)
        )
        prints = fingerprints(images.images)
        assert not prints & seen
        seen |= prints


def test_cue_outside_a_probability_is_refused():
    with pytest.raises(common.InputError, match="--cue .* 1.5"):
        common.load_domains("tiny-pacs", cue=1.5)


def test_every_word_of_the_world_is_in_the_vocabulary():
    tokenizer = common.WordTokenizer(tiny_world.TINY_VOCABULARY, 20)
    for word in (*common.OFFICE_CLASSES, *common.WATERBIRD_CLASSES, *tiny_world.COLORS, *tiny_world.BACKGROUNDS):
        assert tokenizer(f"A photo of a {word}.").shape == (1, 20)
    with pytest.raises(common.InputError, match="does not know the word 'zebra'"):
        tokenizer("a photo of a zebra")
    with pytest.raises(common.InputError, match="at most 19"):
        tokenizer(" ".join(["photo"] * 20))


def test_tiny_clip_recognises_fresh_images_and_has_a_domain_gap():
    """The bounds the shipped model was made for, over 16 classes, on images of another seed."""
    model, preprocess, tokenizer = common.load_clip("tiny")
    features = common.class_features(model, tokenizer, common.OFFICE_CLASSES)
    rng, accuracy = common.tiny_rng(77, "test"), {}
    for domain in common.TINY_DOMAINS:
        labels = np.arange(800) % 16
        colors, grounds = rng.choice(list(tiny_world.COLORS), 800), rng.choice(list(tiny_world.BACKGROUNDS), 800)
        pixels = tiny_world.draw(
            [common.OFFICE_CLASSES[i] for i in labels], domain, grounds, colors, rng, tiny_world.PRETRAINING_POSE
        )
        images = common.ImageSet(pixels, torch.from_numpy(labels), common.OFFICE_CLASSES, transform=preprocess)
        accuracy[domain] = common.evaluate(common.clip_classifier(model.visual, features), {domain: images})["accuracy"]
    assert accuracy["photo"] >= 0.70
    assert min(accuracy.values()) >= 0.45
    assert accuracy["sketch"] <= accuracy["photo"] - 0.10


def test_tiny_clip_says_how_it_was_made():
    assert common.TINY_CLIP.stat().st_size < 6e6
    with safe_open(common.TINY_CLIP, framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
    assert metadata["training"]["device"] == "cpu" and metadata["training"]["seed"] >= 20_000
    assert len(metadata["curve"]) == metadata["training"]["epochs"]
    assert tuple(metadata["vocabulary"]) == tiny_world.TINY_VOCABULARY
    assert set(metadata["zero_shot"]["pretraining pose"]) == set(common.TINY_DOMAINS)


def test_a_brush_stroke_never_leaves_the_canvas():
    """Seed 1000 draws a jitter that float32 rounds up to the edge of its cell; for the last cell that is pixel 32."""
    domain = common.tiny_domain("tiny-office", "art_painting", 1000, 0.4)
    assert domain.images.images.shape == (1280, 3, 32, 32) and domain.balanced.images.shape == (640, 3, 32, 32)
