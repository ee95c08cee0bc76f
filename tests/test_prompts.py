"""Prompts, captions and adapters of other papers against slow loops and their formulas."""

import copy
import dataclasses
import functools
import itertools
import json
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from support import adapters, captions, prompts, tiny_world

NAMES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


@pytest.fixture(scope="module")
def tiny():
    return common.load_clip("tiny")


@pytest.fixture(params=["tiny", "BPE, start token"])
def clip(request, tiny):
    if request.param == "tiny":
        return tiny
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 48, "layers": 1, "head_width": 4}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(32, vision, text).eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    towers = {"model": model, "visual": model.visual, "tokenizer": tokenizer}
    return dataclasses.replace(tiny, **towers, logit_scale=1.0, cache={})


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


# ---------- Class features -----------------------------------------------------------------------
def test_template_ensemble_is_the_mean_over_templates_of_known_words(clip):
    texts = [template("dog") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    if hasattr(clip.tokenizer, "words"):
        vocabulary = set(clip.tokenizer.words)
        texts = [text for text in texts if set(text.replace(".", "").split()) <= vocabulary]
        assert 5 < len(texts) < 40 and "a photo of a dog." in texts
    mean = clip.encode_text(texts).mean(0)
    features = clip.class_features(["dog"], ["ensemble"])[0]
    assert torch.allclose(features, mean / mean.norm(), atol=1e-6)


# ---------- CoOp and CoCoOp ----------------------------------------------------------------------
@torch.no_grad()
def test_learned_vectors_are_words_to_the_text_tower(clip):
    """The embeddings of other words, put in, give the features of the text with those words."""
    start = prompts.first_word(clip.tokenizer)
    texts = clip.tokenizer(["a red photo of a dog.", "the blue art of a dog."])
    words = clip.model.token_embedding(texts)[:, start : start + 3]
    placeholders = clip.tokenizer(["a a a of a dog."] * 2)
    features = prompts.encode_prompts(clip.model, placeholders, start, words)
    assert torch.allclose(features, clip.model.encode_text(texts, normalize=True), atol=1e-6)
    without = clip.model.encode_text(placeholders, normalize=True)
    assert not torch.allclose(features, without, atol=1e-2)


def test_coop_starts_at_the_zero_shot_prompt(clip):
    names = ("dog", "guitar", "house")
    coop = prompts.CoOp(clip, names, "a photo of a")
    assert torch.allclose(coop.of_classes(["cup"])(), clip.class_features(["cup"]), atol=1e-6)
    assert torch.allclose(coop(), clip.class_features(names), atol=1e-6)


def test_gradient_of_coop_by_finite_differences(clip):
    clip = copy.deepcopy(clip)
    clip.model.double()
    coop = prompts.CoOp(clip, ("dog", "house")).double()
    features = functools.partial(prompts.encode_prompts, clip.model, coop.tokens, coop.start)
    assert torch.autograd.gradcheck(features, coop.context, fast_mode=True)


@torch.no_grad()
def test_logits_of_cocoop_are_those_of_a_prompt_for_each_image(clip):
    """Image by image and class by class, with the context moved by h written out."""
    torch.manual_seed(0)
    names = ("dog", "guitar")
    cocoop = prompts.CoCoOp(clip, names, context=3)
    x = F.normalize(torch.randn(4, clip.encode_text(["a"]).shape[1]), dim=-1)
    logits = cocoop.logits(x)
    first, _, second = cocoop.h
    for i, image in enumerate(x):
        hidden = (first.weight @ image + first.bias).clamp(min=0)
        pi = second.weight @ hidden + second.bias
        for c, name in enumerate(names):
            alone = prompts.CoOp(clip, [name], context=3)
            alone.context.copy_(cocoop.context + pi)
            logit = clip.logit_scale * alone()[0] @ image
            assert logits[i, c].item() == pytest.approx(logit.item(), abs=1e-4)
    other = cocoop.of_classes(["house", "dog"])
    assert torch.allclose(other.logits(x)[:, 1], logits[:, 0], atol=1e-4)
    assert torch.equal(cocoop.logits(x), logits)  # its own classes stay


# ---------- PromptStyler -------------------------------------------------------------------------
def test_style_loss_by_a_loop():
    style, earlier = unit(6), unit(2, 6, seed=3)
    styled, content = unit(3, 6, seed=1), unit(3, 6, seed=2)
    earlier[1] *= -1
    products = [float(other @ style) for other in earlier]
    assert products[0] * products[1] < 0
    diversity = (abs(products[0]) + abs(products[1])) / 2
    consistency = 0.0
    for m in range(3):
        scores = [np.exp(float(styled[m] @ content[n])) for n in range(3)]
        consistency -= np.log(scores[m] / sum(scores)) / 3
    loss = prompts.style_loss(style, styled, content, earlier)
    assert loss.item() == pytest.approx(diversity + consistency)
    first = prompts.style_loss(style, styled, content, earlier[:0])
    assert first.item() == pytest.approx(consistency)


def test_promptstyler_stays_near_the_zero_shot_classifier(tiny):
    features = prompts.promptstyler(tiny, NAMES, seed=0, steps=2)
    assert (features @ tiny.class_features(NAMES).T).argmax(1).tolist() == list(range(7))


def test_classifier_of_promptstyler_is_trained_with_the_arcface_loss(tiny, monkeypatch):
    """Text by text, with cos(angle + 0.5) by the addition theorem."""
    styled = unit(2, 7, 64)
    monkeypatch.setattr(prompts, "learn_styles", lambda *_: styled)
    features = prompts.promptstyler(tiny, NAMES, seed=0, steps=1)
    W = styled.sum(0).requires_grad_()
    optimizer = torch.optim.SGD([W], lr=0.005, momentum=0.9)
    for _ in range(4):
        losses = []
        for style, label in itertools.product(styled, range(7)):
            cosines = style[label] @ F.normalize(W, dim=-1).T
            sine = (1 - cosines[label] ** 2).sqrt()
            with_margin = cosines[label] * np.cos(0.5) - sine * np.sin(0.5)
            logits = 5 * torch.where(torch.arange(7) == label, with_margin, cosines)
            losses.append(F.cross_entropy(logits, torch.tensor(label)))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    assert torch.allclose(features, F.normalize(W, dim=-1), atol=1e-6)
    assert not torch.allclose(features, F.normalize(styled.sum(0), dim=-1), atol=1e-4)


# ---------- Captions in descriptions, phrases, files ---------------------------------------------
SUBJECTS = [
    ("A black and white photo of a dog on a sofa.", "dog on a sofa"),
    ("a dog running on grass .", "dog running on grass"),
    ("There is a painting of the old house", "old house"),
    ("two dogs in a photograph of a lake", "two dogs in a photograph of a lake"),
    ("anchor of a ship", "anchor of a ship"),
    ("the", "old dog"),  # nothing remains: the class name
]


def test_subject_of_a_caption():
    for caption, subject in SUBJECTS:
        assert captions.subject(caption, "old_dog") == subject


def nearest_word(clip, feature, pattern, words):
    """Each word's similarity computed alone."""
    scores = {word: feature @ clip.encode_text([pattern.format(word)])[0] for word in words}
    return max(scores, key=scores.get)


def test_retrieved_captions_have_the_nearest_phrases(tiny):
    features, labels = unit(10, 64), torch.arange(10) % 7
    groups = captions.phrase_groups(tiny=True, dataset="tiny-pacs")
    texts = captions.retrieve_captions(tiny, features, labels, NAMES, "a photo of a {}", groups)
    for text, feature, label in zip(texts, features, labels):
        name = NAMES[label]
        color = nearest_word(tiny, feature, f"a photo of a {{}} {name}", tiny_world.COLORS)
        place = f"a photo of a {name} on {{}}"
        place = nearest_word(tiny, feature, place, tiny_world.BACKGROUNDS)
        assert text == f"{color} {name} on {place}"


def test_captions_from_a_file(tmp_path):
    file, paths = tmp_path / "captions.json", np.array(["data/PACS/2.jpg", "data/PACS/1.jpg"])
    file.write_text('{"PACS/1.jpg": "a photo of one", "PACS/2.jpg": "two"}')
    images = common.ImageSet(paths, torch.tensor([0, 0]), ("dog",))
    row = SimpleNamespace(captioner="file", caption_file=file, dataset="pacs", data_root="data")
    real = SimpleNamespace(images=images, labels=images.labels)
    subjects = functools.partial(captions.subjects, row, None, real, "a photo of a {}", {})
    assert subjects() == ["two", "one"]
    row.dataset = "folder:data/PACS"
    with pytest.raises(common.InputError, match="'2.jpg'"):
        subjects()


# ---------- CoCa ---------------------------------------------------------------------------------
@pytest.fixture
def coca(tmp_path):
    """A small CoCa under a name of its own, with random weights in a file."""
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    pooled = {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2}
    config = {"embed_dim": 32, "custom_text": True, "multimodal_cfg": text}
    config["text_cfg"] = {**text, "embed_cls": True, "output_tokens": True}
    config["vision_cfg"] = {**vision, **pooled}
    (tmp_path / "small-coca.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small-coca.json")
    torch.manual_seed(0)
    model = open_clip.create_model("small-coca").eval().requires_grad_(False)
    torch.nn.init.normal_(model.text_decoder.text_projection)  # which open_clip leaves undefined
    for parameter in model.text_decoder.parameters():
        parameter.data *= 4  # so that the words depend on the image
    model.text_decoder.text_projection[:, 49407] *= 3  # so that the last one comes
    torch.save(model.state_dict(), tmp_path / "coca.pt")
    return model


def likeliest_words(model, image):
    """One image and one word at a time."""
    words = [49406]
    while len(words) < 29 and words[-1] != 49407:
        text = torch.tensor([words])
        logits = model(image[None], text, output_labels=False)["logits"]
        words.append(logits[0, -1].argmax().item())
    return words


def test_captions_by_coca(coca, tmp_path):
    """Some end early."""
    rng = np.random.default_rng(1)
    *_, preprocess = open_clip.create_model_and_transforms("small-coca")
    files, lengths, expected = [], set(), []
    for name in "dacb":
        image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        files.append(tmp_path / f"{name}.png")
        image.save(files[-1])
        words = likeliest_words(coca, preprocess(image))
        lengths.add(len(words))
        text = open_clip.get_tokenizer("small-coca").decode(words[1:])
        expected.append(text.split("<end_of_text>")[0].strip())
    weights = str(tmp_path / "coca.pt")
    assert captions.coca_captions(files, "cpu", "small-coca", weights) == expected
    assert len(lengths) > 1 and len(set(expected)) == 4 and all(expected)


# ---------- Adapters -----------------------------------------------------------------------------
def toy():
    """Image features (12, 12), labels (12,), class features (3, 12)."""
    return unit(12, 12), torch.arange(12) % 3, unit(3, 12, seed=7)


def test_adapter_is_that_of_the_paper():
    features, _, T = toy()
    classify = adapters.Adapter(T, 5.0)
    down, up = classify.A[0].weight, classify.A[2].weight
    adapted = ((features @ down.T).clamp(min=0) @ up.T).clamp(min=0)
    mixed = 0.8 * features + 0.2 * adapted
    mixed = mixed / mixed.norm(dim=1, keepdim=True)
    assert down.shape == (3, 12)
    assert torch.allclose(classify(features), 5 * mixed @ T.T, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 3])
def test_tip_adapter_is_that_of_the_paper(monkeypatch, parts):
    """24 keys, 8 of each class, which count as 16; with many keys, features go in parts."""
    monkeypatch.setattr(adapters, "MAX_AFFINITIES", 12 * 24 // parts)
    features, labels, T = toy()
    keys, key_labels = torch.cat([features, unit(12, 12, seed=9)]), torch.cat([labels, labels])
    model = adapters.TipAdapter(T, 5.0, keys, key_labels)
    logits = model(features)
    K = keys.clone().requires_grad_()
    expected = torch.zeros(12, 3)
    for i in range(12):
        for c in range(3):
            affinity = torch.exp(-5.5 * (1 - K[key_labels == c] @ features[i])).sum()
            expected[i, c] = 5 * features[i] @ T[c] + 2 * affinity
    assert torch.allclose(logits, expected, rtol=1e-4)
    weights = unit(12, 3, seed=8)
    gradients = torch.autograd.grad((weights * logits).sum(), model.K)
    slow = torch.autograd.grad((weights * expected).sum(), K)
    assert torch.allclose(gradients[0], slow[0], rtol=1e-3, atol=1e-5)
