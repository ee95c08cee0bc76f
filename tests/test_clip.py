"""CLIP, MMD and evaluation of common.py against slow loops, finite differences and open_clip."""

import itertools
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

import common


# ---------- MMD ----------------------------------------------------------------------------------
def slow_mmd2(x, y, bandwidths):
    def kernel(a, b):
        distance = sum((p - q) ** 2 for p, q in zip(a, b))
        return sum(math.exp(-distance / width) for width in bandwidths) / len(bandwidths)

    def mean(first, second):
        total = sum(kernel(a, b) for a in first for b in second)
        return total / (len(first) * len(second))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_mmd2_equals_a_triple_loop():
    """With given bandwidths, and with those around the median distance."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 7))
    expected = slow_mmd2(x.tolist(), y.tolist(), [0.5, 2.0, 8.0])
    assert common.mmd2(x, y, [0.5, 2.0, 8.0]).item() == pytest.approx(expected, rel=1e-12)
    points = torch.cat([x, y])
    distances = [(a - b).square().sum().item() for a, b in itertools.permutations(points, 2)]
    median = sorted(distances)[(len(distances) - 1) // 2]
    bandwidths = [median * factor for factor in (0.25, 0.5, 1, 2, 4)]
    expected = slow_mmd2(x.tolist(), y.tolist(), bandwidths)
    assert common.mmd2(x, y).item() == pytest.approx(expected, rel=1e-10)


def test_mmd2_gradient_where_points_coincide():
    x = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: common.mmd2(a, y, [1.0, 3.0]), x)
    same = torch.ones(4, 3, requires_grad=True)
    common.mmd2(same, same.detach().clone()).backward()
    assert torch.isfinite(same.grad).all()


BAD = [((2, 3), (2, 4), None), ((0, 3), (2, 3), None), ((2, 3), (2, 3), [0.0])]


@pytest.mark.parametrize("x, y, bandwidths", BAD)
def test_mmd2_refuses_bad_input(x, y, bandwidths):
    with pytest.raises(ValueError):
        common.mmd2(torch.zeros(x), torch.zeros(y), bandwidths)


# ---------- Evaluation ---------------------------------------------------------------------------
def images_of(labels):
    return common.ImageSet(torch.zeros(len(labels), 3, 2, 2), torch.tensor(labels), ("a", "b"))


def test_evaluate_by_hand():
    first, second = images_of([0, 0, 1, 1]), images_of([0, 1])
    tests = {"hold-out": {"one": first}, "source": {"one": first, "two": second}}
    # right, wrong, right, right; the same again, and right, wrong
    answers = iter([0, 1, 1, 1, 0, 1, 1, 1, 0, 0])

    def classify(images):
        return torch.eye(2)[[next(answers) for _ in images]]

    metrics = common.evaluate(classify, tests, batch_size=3)
    assert metrics == {
        "hold-out": 0.75,
        "source": pytest.approx(4 / 6),  # of all images, not the mean of domains
        "source/one": 0.75,
        "source/two": 0.5,
    }


# ---------- The tiny CLIP, class features --------------------------------------------------------
@pytest.fixture(scope="module")
def tiny():
    return common.load_clip("tiny")


def test_preprocessing_is_open_clips_own(tiny):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    config = open_clip.transform.PreprocessCfg(**tiny.visual.preprocess_cfg)
    theirs = open_clip.transform.image_transform_v2(config, is_train=False)
    assert torch.allclose(tiny.preprocess(image), theirs(image), atol=1e-6)
    pixels = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    one_by_one = torch.stack([theirs(Image.fromarray(picture)) for picture in pixels])
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.allclose(tiny.preprocess(batch), one_by_one, atol=1e-6)
    assert tiny.augment(image).shape == (3, 32, 32)


def test_tiny_clip_is_an_ordinary_open_clip_folder(tiny):
    plain = open_clip.create_model(f"local-dir:{common.TINY_CLIP}", require_pretrained=True)
    for ours, theirs in zip(tiny.model.parameters(), plain.parameters()):
        assert ours.dtype == torch.float32 and not ours.requires_grad
        assert torch.equal(ours, theirs)


def test_encode_by_hand(tiny):
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    images = common.ImageSet(pixels, torch.zeros(5, dtype=torch.long), ("a",))
    with torch.no_grad():
        normalized = (pixels / 255 - 0.5) / 0.25
        expected = tiny.model.encode_image(normalized, normalize=True)
    assert torch.allclose(tiny.encode(images, batch_size=2), expected, atol=1e-5)


# ---------- Any open_clip model ------------------------------------------------------------------
SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
SMALL_VISION = {"image_size": 32, "patch_size": 16, "width": 48, "layers": 3, "head_width": 4}
SMALL = {"embed_dim": 32, "vision_cfg": SMALL_VISION, "text_cfg": SMALL_TEXT}


@pytest.fixture
def small_open_clip(tmp_path, monkeypatch):
    """A small ViT under an open_clip name of its own, with an `openai` tag whose weights lie in a
    local file."""
    (tmp_path / "small-vit.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(tmp_path / "small-vit.json")
    torch.manual_seed(0)
    weights = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("small-vit").state_dict(), weights)
    tags = {"openai": {"url": "", "quick_gelu": True}, "other": {"url": ""}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-vit", tags)

    def download(*arguments, **options):
        return str(weights)

    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    return weights


@pytest.mark.parametrize("tag", ["openai", None, "other", "a file"])
def test_openai_weights_get_quickgelu(small_open_clip, tag):
    clip = common.load_clip("small-vit", str(small_open_clip) if tag == "a file" else tag)
    quick = tag in ("openai", None)
    activation = open_clip.transformer.QuickGELU if quick else nn.GELU
    for tower in (clip.visual.transformer, clip.model.transformer):
        assert type(tower.resblocks[0].mlp.gelu) is activation
    assert clip.config["model_cfg"]["quick_gelu"] is quick
    assert not any(p.requires_grad for p in clip.model.parameters())


def test_exported_quickgelu_model_keeps_its_activation(small_open_clip, tmp_path):
    clip = common.load_clip("small-vit")
    features = clip.class_features(["dog", "cat"])
    common.export_clip(clip, tmp_path / "export", features, ["dog", "cat"])
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'export'}").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(plain.encode_image(images), clip.model.encode_image(images), atol=1e-5)
    again = common.load_clip(f"local-dir:{tmp_path / 'export'}")
    assert torch.allclose(again.class_features(["dog", "cat"]), features)
