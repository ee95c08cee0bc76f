"""Prompts, captions and adapters of other papers against slow loops and their formulas."""

import copy
import itertools
import json

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
    return common.Clip(
        model, model.visual, None, None, tokenizer, 1.0, torch.device("cpu"), "fp32", {}
    )


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


# ---------- Class features -----------------------------------------------------------------------
def test_class_features_of_the_tiny_clip_are_those_of_each_class_alone(tiny):
    """To the last bit, on which the numbers in results/ depend."""
    names, ensemble = ("dog", "house", "guitar"), ["a photo of a {}.", "a {}", "the {}"]
    for templates in (ensemble, ensemble[:1]):
        features = tiny.class_features(names, templates)
        for name, feature in zip(names, features):
            tokens = tiny.tokenizer([template.format(name) for template in templates])
            mean = tiny.model.encode_text(tokens, normalize=True).mean(0)
            assert torch.equal(feature, F.normalize(mean, dim=0))


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
    width = clip.model.token_embedding.embedding_dim
    assert [p.shape for p in coop.parameters()] == [(4, width)]
    assert torch.allclose(coop.of_classes(["cup"])(), clip.class_features(["cup"]), atol=1e-6)
    assert torch.allclose(coop(), clip.class_features(names), atol=1e-6)


def test_coop_lowers_its_loss(tiny):
    torch.manual_seed(0)
    coop = prompts.CoOp(tiny, ("dog", "house"), context=4)
    labels = torch.arange(40) % 2
    features = tiny.class_features(["dog", "house"])[labels]  # (N, D)
    losses = []
    for class_features in (coop().detach(), coop.fit(features, labels, steps=20)):
        losses.append(F.cross_entropy(tiny.logit_scale * features @ class_features.T, labels))
    assert losses[1] < losses[0]
    assert not any(p.grad is not None for p in tiny.model.parameters())


def test_gradient_of_coop_by_finite_differences(clip):
    clip = copy.deepcopy(clip)
    clip.model.double()
    torch.manual_seed(3)
    coop = prompts.CoOp(clip, ("dog", "house"), context=2).double()
    direction = torch.randn(2, coop().shape[1], dtype=torch.float64)
    (coop() * direction).sum().backward()
    step = 1e-5 * torch.randn_like(coop.context)
    losses = []
    with torch.no_grad():
        for change in (step, -2 * step):
            coop.context += change
            losses.append((coop() * direction).sum().item())
    expected = 2 * (coop.context.grad * step).sum().item()
    assert losses[0] - losses[1] == pytest.approx(expected, rel=1e-5)


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
    shapes = [(6,), (3, 6), (3, 6), (2, 6)]
    style, styled, content, earlier = (unit(*shape, seed=i) for i, shape in enumerate(shapes))
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
    """It has seen no image. Its features are nearest to the text of their own class."""
    features = prompts.promptstyler(tiny, NAMES, seed=0, steps=2)
    assert features.shape == (7, 64)
    assert torch.equal(features, prompts.promptstyler(tiny, NAMES, seed=0, steps=2))
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
    ("an elephant", "elephant"),
    ("anchor of a ship", "anchor of a ship"),
    ("the", "old dog"),  # nothing remains: the class name
    (" . ", "old dog"),
]


def test_subject_of_a_caption():
    for caption, subject in SUBJECTS:
        assert captions.subject(caption, "old_dog") == subject


def nearest_word(clip, feature, pattern, words):
    """Each word's similarity computed alone."""
    scores = {word: feature @ clip.encode_text([pattern.format(word)])[0] for word in words}
    return max(scores, key=scores.get)


def test_retrieved_captions(tiny):
    """They have the nearest phrases, and these say what the image shows."""
    rng = tiny_world.tiny_rng(1, "captions")
    names = [NAMES[i % 7] for i in range(56)]
    colors = rng.choice(list(tiny_world.COLORS), 56)
    places = rng.choice(list(tiny_world.BACKGROUNDS), 56)
    pixels = tiny_world.draw(names, "photo", places, colors, rng)
    labels = torch.arange(56) % 7
    features = tiny.encode(common.ImageSet(pixels, labels, NAMES))
    groups = json.loads(captions.WORDS.read_text())["phrases of the tiny CLIP"]
    texts = captions.retrieve_captions(tiny, features, labels, NAMES, "a photo of a {}", groups)
    for i in range(0, 56, 9):
        color = f"a photo of a {{}} {names[i]}"
        place = f"a photo of a {names[i]} on {{}}"
        color = nearest_word(tiny, features[i], color, tiny_world.COLORS)
        place = nearest_word(tiny, features[i], place, tiny_world.BACKGROUNDS)
        assert texts[i] == f"{color} {names[i]} on {place}"
    for words in (colors, places):  # eight of each
        assert np.mean([word in text.split() for word, text in zip(words, texts)]) > 0.5


def test_descriptions_and_phrases_have_one_placeholder_and_the_tiny_clip_knows_its_own(tiny):
    words = json.loads(captions.WORDS.read_text())
    for name, texts in words.items():
        texts = texts.values() if name.startswith("descriptions") else sum(texts.values(), [])
        assert all(text.count("{}") == 1 for text in texts)
    phrases = words["phrases of the tiny CLIP"]
    tiny.tokenizer([phrase.format("dog") for phrase in sum(phrases.values(), [])])
    assert [text.split()[0] for text in phrases["color"]] == list(tiny_world.COLORS)
    assert [text.split()[-1] for text in phrases["place"]] == list(tiny_world.BACKGROUNDS)


def test_captions_from_a_file(tmp_path):
    file, images = tmp_path / "captions.json", [f"data/PACS/{i}.jpg" for i in (2, 1)]
    file.write_text('{"PACS/1.jpg": "one", "PACS/2.jpg": "two"}')
    assert captions.read_captions(file, images, "data") == ["two", "one"]
    with pytest.raises(common.InputError, match="PACS/2.jpg"):
        captions.read_captions(file, images, "elsewhere")


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
    torch.save(model.state_dict(), tmp_path / "coca.pt")
    return model


def likeliest_words(model, image, start, end, length):
    """One image and one word at a time."""
    words = [start]
    while len(words) < length - 1 and words[-1] != end:
        text = torch.tensor([words])
        logits = model(image[None], text, output_labels=False)["logits"]
        words.append(logits[0, -1].argmax().item())
    return words


def test_greedy_captions_are_those_of_one_image_and_one_word_at_a_time(coca):
    images, lengths = 3 * torch.randn(6, 3, 32, 32), set()
    start = 49406
    first = likeliest_words(coca, images[0], start, 49407, 9)[1]
    for end in (49407, first):  # hardly ever comes; comes at once for some images
        tokens = captions.greedy_captions(coca, images, start, end, length=9)
        for image, line in zip(images, tokens.tolist()):
            words = likeliest_words(coca, image, start, end, 9)
            assert line == words + [end] * (9 - len(words))
            lengths.add(len(words))
    assert len(lengths) > 1


def test_captions_by_coca(coca, tmp_path):
    rng = np.random.default_rng(0)
    config = open_clip.transform.PreprocessCfg(**coca.visual.preprocess_cfg)
    preprocess = open_clip.transform.image_transform_v2(config, is_train=False)
    files, expected = [], []
    for name in ("b.png", "a.png"):
        image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        image.save(tmp_path / name)
        files.append(tmp_path / name)
        words = likeliest_words(coca, preprocess(image), 49406, 49407, 30)
        text = open_clip.get_tokenizer("small-coca").decode(words[1:])
        expected.append(text.split("<end_of_text>")[0].strip())
    weights = str(tmp_path / "coca.pt")
    assert captions.coca_captions(files, "cpu", "small-coca", weights) == expected
    assert len(set(expected)) == 2 and all(expected)


def test_coca_whose_weights_cannot_be_had(caplog):
    with pytest.raises(common.InputError, match=r"cannot load coca_ViT-L-14 \(opneai\): .*opneai"):
        captions.coca_captions([], "cpu", pretrained="opneai")
    assert not caplog.records


# ---------- Adapters -----------------------------------------------------------------------------
def toy(n=12):
    """Image features (n, 12), labels (n,), class features (3, 12)."""
    return unit(n, 12), torch.arange(n) % 3, unit(3, 12, seed=7)


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
    with torch.no_grad():
        model.K += 1
    assert torch.equal(keys, K)  # the features themselves do not change
