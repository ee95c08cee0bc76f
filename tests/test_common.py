"""common.py against independent derivations: slow loops, worked-out cases, open_clip's own code."""

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


def test_domain_split_worked_out_cases():
    for index, held_out in ((0, [2, 3]), (1, [5, 0])):
        first, rest = common.domain_split(10, index)
        assert first.tolist() == held_out
        assert sorted([*first, *rest]) == list(range(10))


def slow_mmd2(x, y, bandwidths):
    def k(a, b):
        return sum(math.exp(-sum((p - q) ** 2 for p, q in zip(a, b)) / w) for w in bandwidths) / len(bandwidths)

    def mean(u, v):
        return sum(k(a, b) for a in u for b in v) / (len(u) * len(v))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_mmd2_equals_a_triple_loop():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 7))
    assert common.mmd2(x, y, [0.5, 2.0, 8.0]).item() == pytest.approx(
        slow_mmd2(x.tolist(), y.tolist(), [0.5, 2.0, 8.0]), rel=1e-12
    )
    squared = [
        sum((p - q) ** 2 for p, q in zip(a, b))
        for i, a in enumerate([*x.tolist(), *y.tolist()])
        for j, b in enumerate([*x.tolist(), *y.tolist()])
        if i != j
    ]
    median = sorted(squared)[(len(squared) - 1) // 2]
    bank = [median * factor for factor in (0.25, 0.5, 1, 2, 4)]
    assert common.mmd2(x, y).item() == pytest.approx(slow_mmd2(x.tolist(), y.tolist(), bank), rel=1e-10)


def test_mmd2_is_zero_on_equal_samples_and_grows_with_a_shift():
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    assert common.mmd2(x, x.clone()).item() <= 1e-7
    near, far = (common.mmd2(x, x + shift, [64.0]).item() for shift in (0.1, 1.0))
    assert 0 < near < far


def test_mmd2_gradient_where_points_coincide():
    x = torch.zeros(3, 2, dtype=torch.float64)
    y = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: common.mmd2(a, y, [1.0, 3.0]), x.requires_grad_())
    same = torch.ones(4, 3, requires_grad=True)
    common.mmd2(same, same.detach().clone()).backward()
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize(
    "x, y, bandwidths", [((2, 3), (2, 4), None), ((0, 3), (2, 3), None), ((2, 3), (2, 3), [0.0]), ((2, 3), (2, 3), [])]
)
def test_mmd2_refuses_bad_input(x, y, bandwidths):
    with pytest.raises(ValueError):
        common.mmd2(torch.zeros(x), torch.zeros(y), bandwidths)


def toy_set(labels, groups=None, classes=("a", "b")):
    pixels = torch.tensor(labels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return common.ImageSet(pixels, torch.tensor(labels), classes, None if groups is None else torch.tensor(groups))


def test_evaluate_by_hand():
    sets = {"one": toy_set([0, 0, 1, 1], [0, 1, 0, 1]), "two": toy_set([0, 1], [1, 1])}
    answers = iter([0, 1, 1, 1, 0, 0])  # right, wrong, right, right | right, wrong
    result = common.evaluate(lambda images: torch.eye(2)[[next(answers) for _ in images]], sets, batch_size=3)
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["per_domain"] == {"one": 0.75, "two": 0.5}
    assert result["per_class"] == {"a": pytest.approx(2 / 3), "b": pytest.approx(2 / 3)}
    assert result["worst_group"] == 0.5  # group 0: two of two, group 1: two of four


def test_checkpoints_are_chosen_without_the_target():
    history = [
        {"source_holdout": 0.8, "target": 0.3},
        {"source_holdout": 0.9, "target": 0.5},
        {"source_holdout": 0.7, "target": 0.6},
        {"source_holdout": 0.9, "target": 0.4},
    ]
    assert common.checkpoint_accuracies(history) == {"last": 0.4, "source_validated": 0.5, "oracle": 0.6}


def test_source_batches_are_balanced_endless_and_repeatable():
    sets = {"small": toy_set([0] * 3), "large": toy_set([1] * 50)}
    batches, again = (common.source_batches(sets, 4, seed=9) for _ in range(2))
    for _ in range(20):
        (images, labels, domain), (same, _, _) = next(batches), next(again)
        assert labels.tolist() == [0] * 4 + [1] * 4 and domain.tolist() == labels.tolist()
        assert torch.equal(images, same)


def test_source_batches_visit_every_image_equally_often():
    images = common.ImageSet(
        torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(-1, 3, 1, 1), torch.arange(5), tuple("abcde")
    )
    batches = common.source_batches({"only": images}, 2, seed=0)
    seen = torch.cat([next(batches)[1] for _ in range(10)])
    assert seen.bincount().tolist() == [4] * 5


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Real World", "Real World"),
        ("real_world", "Real World"),
        ("real", "Real World"),
        ("3", "Real World"),
        ("art", "Art"),
    ],
)
def test_target_names(text, expected):
    assert common.choose_targets(text, list(common.BENCHMARKS["officehome"].domains)) == [expected]


def test_target_names_of_terra_and_all():
    domains = list(common.BENCHMARKS["terra"].domains)
    assert common.choose_targets("L100", domains) == ["location_100"]
    assert common.choose_targets("l46", domains) == ["location_46"]
    assert common.choose_targets("all", domains) == domains
    with pytest.raises(common.InputError, match="unknown target 'location_4'"):  # the start of two names
        common.choose_targets("location_4", domains)


def test_preprocessing_is_open_clips_own(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    model, preprocess, _ = common.load_clip("tiny")
    config = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    theirs = open_clip.transform.image_transform_v2(config, is_train=False)
    assert torch.allclose(preprocess(image), theirs(image), atol=1e-6)
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    one_by_one = torch.stack([theirs(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pixels])
    assert torch.allclose(preprocess(pixels), one_by_one, atol=1e-6)
    assert common.image_transform(model, train=True)(image).shape == (3, 32, 32)


def test_class_features_are_averaged_unit_vectors():
    model, _, tokenizer = common.load_clip("tiny")
    templates = ["a photo of a {}.", "a picture of a {}"]
    features = common.class_features(model, tokenizer, ["dog", "house"], templates)
    expected = sum(model.encode_text(tokenizer([t.format("house")]), normalize=True)[0] for t in templates)
    assert torch.allclose(features[1], expected / expected.norm(), atol=1e-6)
    with pytest.raises(common.InputError, match="'a photo'"):
        common.class_features(model, tokenizer, ["dog"], ["a photo"])


@pytest.fixture
def small_open_clip(tmp_path, monkeypatch):
    """A small ViT under an open_clip name of its own, with an `openai` tag whose weights lie in a local file."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 48, "layers": 3, "head_width": 4},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "small-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small-vit.json")
    torch.manual_seed(0)
    weights = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("small-vit").state_dict(), weights)
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, "small-vit", {"openai": {"url": "", "quick_gelu": True}, "other": {"url": ""}}
    )
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: str(weights))
    return weights


def test_openai_weights_get_quickgelu(small_open_clip):
    for tag, activation in (
        ("openai", open_clip.transformer.QuickGELU),
        (None, open_clip.transformer.QuickGELU),
        ("other", nn.GELU),
        (str(small_open_clip), nn.GELU),
    ):
        model, _, _ = common.load_clip("small-vit", tag)
        for tower in (model.visual.transformer, model.transformer):
            assert type(tower.resblocks[0].mlp.gelu) is activation
        assert model.export_config["model_cfg"]["quick_gelu"] is (activation is open_clip.transformer.QuickGELU)
        assert not any(p.requires_grad for p in model.parameters())


def test_exported_quickgelu_model_keeps_its_activation(small_open_clip, tmp_path):
    model, _, tokenizer = common.load_clip("small-vit")
    features = common.class_features(model, tokenizer, ["dog", "cat"])
    common.export_clip(model, tmp_path / "export", features, ["dog", "cat"])
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'export'}").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(plain.encode_image(images), model.encode_image(images), atol=1e-5)
    again, _, tokenizer = common.load_clip(f"local-dir:{tmp_path / 'export'}")
    assert torch.allclose(common.class_features(again, tokenizer, ["dog", "cat"]), features)


@pytest.mark.parametrize(
    "name, pretrained, message",
    [
        ("ViT-B/16", None, "unknown model 'ViT-B/16' .did you mean 'ViT-B-16'"),
        ("ViT-B-32", "opneai", "neither a file nor a tag"),
        ("local-dir:nowhere", None, "nowhere"),
    ],
)
def test_model_that_cannot_be_had_is_one_clear_error(name, pretrained, message):
    with pytest.raises(common.InputError, match=message):
        common.load_clip(name, pretrained)


def test_run_folder_appears_only_when_complete(tmp_path):
    path = tmp_path / "runs" / "one"
    with pytest.raises(RuntimeError):
        with common.run_folder(path) as folder:
            (folder / "half").write_text("written")
            raise RuntimeError
    assert list((tmp_path / "runs").iterdir()) == []
    for text in ("first", "second"):
        with common.run_folder(path) as folder:
            (folder / "result").write_text(text)
            assert not path.exists() or (path / "result").read_text() == "first"
    assert (path / "result").read_text() == "second"
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["one"]


def test_tables():
    assert common.percent([0.5]) == "50.0"
    assert common.percent([0.5, 0.6]) == "55.0 ± 7.1"  # sample deviation: 10 / sqrt(2)
    runs = [
        {"target": t, "seed": s, "modes": {"m": {"target": {"accuracy": a}}}}
        for t, s, a in (("x", 0, 0.1), ("x", 1, 0.3), ("y", 0, 0.5), ("y", 1, 0.5))
    ]
    assert common.summary_table("T", ["m"], runs).splitlines()[-1].split("  ") == [
        "m",
        "20.0 ± 14.1",
        "50.0 ± 0.0",
        "35.0 ± 7.1",
    ]


@pytest.fixture(scope="module", params=["tiny", "BPE, start token"])
def clip(request):
    if request.param == "tiny":
        model, _, tokenizer = common.load_clip("tiny")
        return model, tokenizer
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(32, {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}, text)
    return model.eval().requires_grad_(False), open_clip.get_tokenizer("ViT-B-32")


def test_coop_starts_at_the_zero_shot_prompt(clip):
    model, tokenizer = clip
    names = ("dog", "guitar", "house")
    coop = common.CoOp(model, tokenizer, names, "a photo of a")
    assert [p.shape for p in coop.parameters()] == [(4, model.token_embedding.embedding_dim)]
    assert torch.allclose(coop(), common.class_features(model, tokenizer, names), atol=1e-6)


def test_learned_vectors_are_words_to_the_text_tower(clip):
    """The embeddings of other words, put in, give the features of the prompt that has those words."""
    model, tokenizer = clip
    start = common.first_word(tokenizer)
    with torch.no_grad():
        said = tokenizer(["a red photo of a dog.", "the blue art of a dog."])
        words = model.token_embedding(said)[:, start : start + 3]
        mute = tokenizer(["a a a of a dog."] * 2)
        found = common.encode_prompts(model, mute, start, words)
        assert torch.allclose(found, model.encode_text(said, normalize=True), atol=1e-6)
        assert not torch.allclose(found, model.encode_text(mute, normalize=True), atol=1e-2)


def test_gradient_of_coop_by_finite_differences(clip):
    model, tokenizer = (copy.deepcopy(part) for part in clip)
    torch.manual_seed(3)
    coop = common.CoOp(model.double(), tokenizer, ("dog", "house"), context=2)
    coop.double()
    direction = torch.randn(2, coop().shape[1], dtype=torch.float64)
    loss = lambda: (coop() * direction).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(), coop.parameters())
    step = torch.randn_like(gradient)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            coop.context += sign * 1e-5 * step
            values.append(loss().item())
            coop.context -= sign * 1e-5 * step
    assert (values[0] - values[1]) / 2e-5 == pytest.approx((gradient * step).sum().item(), rel=1e-5)


def test_template_ensemble_is_the_mean_over_known_templates(clip):
    model, tokenizer = clip
    every = [template("dog") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    if isinstance(tokenizer, common.WordTokenizer):
        every = [text for text in every if set(text.replace(".", "").split()) <= set(tokenizer.tokens)]
        assert 5 < len(every) < 40 and "a photo of a dog." in every
    mean = model.encode_text(tokenizer(every), normalize=True).mean(0)
    found = common.class_features(model, tokenizer, ["dog"], ["ensemble"])[0]
    assert torch.allclose(found, mean / mean.norm(), atol=1e-6)
