"""CLIP, MMD and evaluation of common.py against slow loops, finite differences and open_clip."""

import copy
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

import common
from support import prompts


# ---------- MMD ----------------------------------------------------------------------------------
def slow_mmd2(x, y, bandwidths):
    def kernel(a, b):
        distance = sum((p - q) ** 2 for p, q in zip(a, b))
        return sum(math.exp(-distance / width) for width in bandwidths) / len(bandwidths)

    def mean(first, second):
        total = sum(kernel(a, b) for a in first for b in second)
        return total / (len(first) * len(second))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def two_samples():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 7))


def test_mmd2_equals_a_triple_loop():
    x, y = two_samples()
    expected = slow_mmd2(x.tolist(), y.tolist(), [0.5, 2.0, 8.0])
    assert common.mmd2(x, y, [0.5, 2.0, 8.0]).item() == pytest.approx(expected, rel=1e-12)


def test_default_bandwidths_are_around_the_median_distance():
    x, y = two_samples()
    points = torch.cat([x, y])
    distances = []
    for i, a in enumerate(points):
        for j, b in enumerate(points):
            if i != j:
                distances.append((a - b).square().sum().item())
    distances.sort()
    median = distances[(len(distances) - 1) // 2]
    bandwidths = [median * factor for factor in (0.25, 0.5, 1, 2, 4)]
    expected = slow_mmd2(x.tolist(), y.tolist(), bandwidths)
    assert common.mmd2(x, y).item() == pytest.approx(expected, rel=1e-10)


def test_mmd2_is_zero_on_equal_samples_and_grows_with_a_shift():
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    assert common.mmd2(x, x.clone()).item() <= 1e-7
    near = common.mmd2(x, x + 0.1, [64.0])
    far = common.mmd2(x, x + 1.0, [64.0])
    assert 0 < near < far


def test_mmd2_gradient_where_points_coincide():
    x = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: common.mmd2(a, y, [1.0, 3.0]), x)
    same = torch.ones(4, 3, requires_grad=True)
    common.mmd2(same, same.detach().clone()).backward()
    assert torch.isfinite(same.grad).all()


BAD = [
    ((2, 3), (2, 4), None),
    ((0, 3), (2, 3), None),
    ((2, 3), (2, 3), [0.0]),
    ((2, 3), (2, 3), []),
]


@pytest.mark.parametrize("x, y, bandwidths", BAD)
def test_mmd2_refuses_bad_input(x, y, bandwidths):
    with pytest.raises(ValueError):
        common.mmd2(torch.zeros(x), torch.zeros(y), bandwidths)


# ---------- Evaluation ---------------------------------------------------------------------------
def toy_set(labels):
    """Images of 2 x 2 pixels that show their label."""
    pixels = torch.tensor(labels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return common.ImageSet(pixels, torch.tensor(labels), ("a", "b"))


def test_evaluate_by_hand():
    first, second = toy_set([0, 0, 1, 1]), toy_set([0, 1])
    tests = {"hold-out": {"one": first}, "source": {"one": first, "two": second}}
    # right, wrong, right, right; the same again, and right, wrong
    answers = iter([0, 1, 1, 1, 0, 1, 1, 1, 0, 0])

    def classify(images):
        return torch.eye(2)[[next(answers) for _ in images]]

    measures = common.evaluate(classify, tests, batch_size=3)
    assert measures == {
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


def test_class_features_are_averaged_unit_vectors(tiny):
    features = tiny.class_features(["dog", "house"], ["a photo of a {}.", "a picture of a {}"])
    photo, picture = tiny.encode_text(["a photo of a house.", "a picture of a house"])
    expected = photo + picture
    assert torch.allclose(features[1], expected / expected.norm(), atol=1e-6)
    with pytest.raises(common.InputError, match="'a photo'"):
        tiny.class_features(["dog"], ["a photo"])


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


def test_exported_tiny_clip_has_the_new_image_tower_and_its_words(tiny, tmp_path):
    visual = copy.deepcopy(tiny.visual)
    visual.proj.data += 1
    features = tiny.class_features(["dog", "cup"])
    common.export_clip(tiny, tmp_path, features, ["dog", "cup"], visual)
    again = common.load_clip(f"local-dir:{tmp_path}")
    assert torch.equal(again.visual.proj, visual.proj)
    assert torch.equal(again.class_features(["dog", "cup"]), features)
    assert np.array_equal(np.load(tmp_path / "class_features.npy"), features.numpy())
    assert json.loads((tmp_path / "classes.json").read_text()) == ["dog", "cup"]


NOT_THERE = [
    ("ViT-B/16", None, "unknown model 'ViT-B/16' .did you mean 'ViT-B-16'"),
    ("ViT-B-32", "opneai", "neither a file nor a tag"),
    ("local-dir:nowhere", None, "nowhere"),
]


@pytest.mark.parametrize("name, pretrained, message", NOT_THERE)
def test_model_that_cannot_be_had_is_one_clear_error(name, pretrained, message):
    with pytest.raises(common.InputError, match=message):
        common.load_clip(name, pretrained)


# ---------- Many texts ---------------------------------------------------------------------------
TEXT = {**SMALL_TEXT, "width": 32, "layers": 2}
THINGS = ("dog", "black and white colobus monkey", "a", "fire truck")
TEXTS = [template(thing) for thing in THINGS for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def encode_and_watch(model, texts):
    """Features of texts by two functions, ours and open_clip's at full length, and how many places
    the text tower read in each batch of ours."""
    read, tokens = [], open_clip.tokenize(texts)
    embedding = prompts.text_tower(model).token_embedding
    handle = embedding.register_forward_hook(lambda *args: read.append(args[2].shape[1]))
    features = prompts.encode_all(model, tokens)
    handle.remove()
    with torch.no_grad():
        return features, model.encode_text(tokens, normalize=True), read


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_texts_are_read_up_to_their_end(kind):
    torch.manual_seed(0)
    model = kind(32, SMALL_VISION, TEXT).eval()
    features, whole, read = encode_and_watch(model, TEXTS)
    lengths = [2 + len(open_clip.tokenizer._tokenizer.encode(text)) for text in TEXTS]
    assert read == [sorted(lengths)[255], max(lengths)]
    assert torch.allclose(features, whole, atol=1e-6)


OTHER_TOWERS = [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}]


@pytest.mark.parametrize("other", OTHER_TOWERS)
def test_texts_are_read_whole_where_what_follows_counts(other):
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(32, SMALL_VISION, {**TEXT, **other}).eval()
    features, whole, read = encode_and_watch(model, TEXTS[:20])
    assert read == [77]
    assert torch.allclose(features, whole, atol=1e-6)


def test_class_features_of_the_tiny_clip_are_those_of_each_class_alone(tiny):
    """To the last bit: numbers in results/ hang on it."""
    names, templates = ("dog", "house", "guitar"), ["a photo of a {}.", "a {}", "the {}"]
    for some in (templates, templates[:1]):
        features = tiny.class_features(names, some)
        for name, found in zip(names, features):
            tokens = tiny.tokenizer([template.format(name) for template in some])
            mean = tiny.model.encode_text(tokens, normalize=True).mean(0)
            assert torch.equal(found, nn.functional.normalize(mean, dim=0))


def test_class_features_are_encoded_once(tiny, monkeypatch):
    first = tiny.class_features(["cup", "car"])
    monkeypatch.setattr(tiny.model, "encode_text", None)
    assert tiny.class_features(("cup", "car")) is first


# ---------- Learned prompts ----------------------------------------------------------------------
@pytest.fixture(params=["tiny", "BPE, start token"])
def clip(request, tiny):
    if request.param == "tiny":
        return tiny
    torch.manual_seed(0)
    model = open_clip.CLIP(32, SMALL_VISION, {**SMALL_TEXT, "width": 32, "layers": 2})
    model = model.eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return common.Clip(model, None, None, tokenizer, 1.0, torch.device("cpu"), "fp32", {})


def test_coop_starts_at_the_zero_shot_prompt(clip):
    names = ("dog", "guitar", "house")
    coop = common.CoOp(clip, names, "a photo of a")
    width = clip.model.token_embedding.embedding_dim
    assert [p.shape for p in coop.parameters()] == [(4, width)]
    assert torch.allclose(coop(), clip.class_features(names), atol=1e-6)


def test_coop_lowers_its_loss(tiny):
    torch.manual_seed(0)
    coop = common.CoOp(tiny, ("dog", "house"), context=4)
    y = torch.arange(40) % 2
    x = tiny.class_features(["dog", "house"])[y]  # (N, D)
    losses = []
    for class_features in (coop().detach(), coop.fit(x, y, steps=20)):
        losses.append(nn.functional.cross_entropy(tiny.logit_scale * x @ class_features.T, y))
    assert losses[1] < losses[0]
    assert not any(p.grad is not None for p in tiny.model.parameters())


@torch.no_grad()
def test_logits_of_cocoop_are_those_of_a_prompt_for_each_image(clip):
    """Image by image and class by class, with the context moved by h written out."""
    torch.manual_seed(0)
    names = ("dog", "guitar")
    cocoop = common.CoCoOp(clip, names, context=3)
    x = nn.functional.normalize(torch.randn(4, clip.encode_text(["a"]).shape[1]), dim=-1)
    found = cocoop.logits(x)
    first, _, second = cocoop.h
    for i, image in enumerate(x):
        hidden = (first.weight @ image + first.bias).clamp(min=0)
        pi = second.weight @ hidden + second.bias
        for c, name in enumerate(names):
            alone = common.CoOp(clip, [name], context=3)
            alone.context.copy_(cocoop.context + pi)
            logit = clip.logit_scale * alone()[0] @ image
            assert found[i, c].item() == pytest.approx(logit.item(), abs=1e-4)
    other = cocoop.of_classes(["house", "dog"])
    assert torch.allclose(other.logits(x)[:, 1], found[:, 0], atol=1e-4)
    assert torch.equal(cocoop.logits(x), found)  # of its own classes as before


@torch.no_grad()
def test_learned_vectors_are_words_to_the_text_tower(clip):
    """Embeddings of other words, put in, give the features of the prompt that has those words."""
    start = common.first_word(clip.tokenizer)
    spoken = clip.tokenizer(["a red photo of a dog.", "the blue art of a dog."])
    words = clip.model.token_embedding(spoken)[:, start : start + 3]
    mute = clip.tokenizer(["a a a of a dog."] * 2)
    features = common.encode_prompts(clip.model, mute, start, words)
    assert torch.allclose(features, clip.model.encode_text(spoken, normalize=True), atol=1e-6)
    without = clip.model.encode_text(mute, normalize=True)
    assert not torch.allclose(features, without, atol=1e-2)


def test_gradient_of_coop_by_finite_differences(clip):
    clip = copy.deepcopy(clip)
    clip.model.double()
    torch.manual_seed(3)
    coop = common.CoOp(clip, ("dog", "house"), context=2).double()
    direction = torch.randn(2, coop().shape[1], dtype=torch.float64)

    def loss():
        return (coop() * direction).sum()

    (gradient,) = torch.autograd.grad(loss(), coop.parameters())
    step = 1e-5 * torch.randn_like(gradient)
    with torch.no_grad():
        coop.context += step
        above = loss().item()
        coop.context -= 2 * step
        below = loss().item()
    assert above - below == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-5)


def test_template_ensemble_is_the_mean_over_known_templates(clip):
    texts = [template("dog") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    if isinstance(clip.tokenizer, common.WordTokenizer):
        vocabulary = set(clip.tokenizer.tokens)
        texts = [text for text in texts if set(text.replace(".", "").split()) <= vocabulary]
        assert 5 < len(texts) < 40 and "a photo of a dog." in texts
    mean = clip.encode_text(texts).mean(0)
    features = clip.class_features(["dog"], ["ensemble"])[0]
    assert torch.allclose(features, mean / mean.norm(), atol=1e-6)
