"""Single heads, against PyTorch's own attention, hooks, slow loops and planted answers."""

import copy
import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import headpurify
from notebooks import head_study


@pytest.fixture
def visual():
    return copy.deepcopy(common.load_clip("tiny").visual)


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ---------- One head -----------------------------------------------------------------------------
def test_contributions_of_all_heads_are_what_attention_adds(visual, images):
    outputs = head_study.head_outputs(visual, images)
    assert outputs.shape == (5, 6, 6, 2, 16)
    for layer, (attention, z) in enumerate(head_study.attention_inputs(visual, images)):
        expected, _ = attention(z, z, z)  # (B, N, D)
        total = attention.out_proj.bias
        for head in range(6):
            total = total + head_study.contribution(visual, layer, head, outputs[:, layer, head])
        assert torch.allclose(total[:, 0], expected[:, 0], atol=1e-5)
        assert torch.allclose(total[:, 1], expected.mean(1), atol=1e-5)


def test_cls_attention_is_softmax_of_query_and_key(visual, images):
    inputs = head_study.attention_inputs(visual, images)
    maps = head_study.cls_attention(visual, images)  # (layers, B, H, patches)
    for layer, (mha, z) in enumerate(inputs):
        qkv = F.linear(z, mha.in_proj_weight, mha.in_proj_bias)
        q, k, _ = qkv.unflatten(-1, (3, 6, 16)).unbind(2)  # (B, N, H, d)
        scores = torch.einsum("bhd,bnhd->bhn", q[:, 0], k) / 16**0.5
        assert torch.allclose(maps[layer], scores.softmax(-1)[..., 1:], atol=1e-5)


def hooked_tower(visual, layer, head, mean):
    """A copy in which a hook overwrites the output of a head."""
    hooked, d = copy.deepcopy(visual), len(mean)
    attention = headpurify.purify(hooked, 0, 0, gated=False)[layer]

    def overwrite(module, arguments):
        tokens = arguments[0].clone()  # (B, N, D), heads side by side
        tokens[..., head * d : (head + 1) * d] = mean
        return (tokens,)

    attention.mha.out_proj.register_forward_pre_hook(overwrite)
    return hooked


def test_an_ablated_head_has_the_same_output_for_every_image(visual, images):
    """As a hook does that overwrites it; afterwards the tower is, to the bit, as before."""
    means = torch.randn(6, 6, 16, generator=torch.Generator().manual_seed(1))
    before = visual(images)
    for mean in (means[3, 2], None):
        hooked = hooked_tower(visual, 3, 2, torch.zeros(16) if mean is None else mean)
        with pytest.raises(KeyError), head_study.ablated(visual, 3, 2, mean):
            ablated = visual(images)
            raise KeyError
        assert torch.allclose(ablated, hooked(images), atol=1e-5)
        assert not torch.allclose(ablated, before, atol=1e-3)
        assert torch.equal(visual(images), before)

    directions = torch.randn(64, 1000, generator=torch.Generator().manual_seed(2))  # of classes

    def classify(tower, images):
        return (tower(images) - before.mean(0)) @ directions

    classify_it = functools.partial(classify, visual)
    predictions = head_study.predictions_without_each(visual, means, classify_it)(images)
    assert (predictions != predictions[:, :1]).any(0).sum() > 30
    for layer, head in ((0, 5), (3, 2), (5, 0)):
        hooked = hooked_tower(visual, layer, head, means[layer, head])
        expected = classify(hooked, images).argmax(1)
        assert torch.equal(predictions[:, 1 + 6 * layer + head], expected)


# ---------- Importance, and orders in which heads are dropped ------------------------------------
def loss_with_gates(visual, off, class_features, scale, images, labels):
    """Cross-entropy of a copy whose gates of some heads [(layer, head)] are 0."""
    gated = copy.deepcopy(visual)
    layers = headpurify.purify(gated, 0, 0)
    gates = torch.ones(len(layers), 6)
    for layer, head in off:
        gates[layer, head] = 0
    for layer, row in zip(layers, gates):
        layer.gates = row.clone
    logits = scale * F.normalize(gated(images), dim=-1) @ class_features.T
    return F.cross_entropy(logits, labels).item()


def test_importance_and_greedy_order_are_those_of_a_loop_over_gates(visual, images):
    """A head that is taken out is one whose gate is 0."""
    visual.transformer.resblocks = visual.transformer.resblocks[:2]
    class_features = F.normalize(torch.randn(4, 64), dim=-1)
    sample = class_features, 10, images, torch.tensor([0, 1, 2, 3, 0])
    importance = head_study.head_importance(visual, *sample)
    before = loss_with_gates(visual, [], *sample)
    for layer, head in np.ndindex(2, 6):
        expected = loss_with_gates(visual, [(layer, head)], *sample) - before
        assert importance[layer, head].item() == pytest.approx(expected, abs=1e-5)
    dropped = []
    for _ in range(3):
        losses = {}
        for head in set(np.ndindex(2, 6)) - set(dropped):
            losses[head] = loss_with_gates(visual, [*dropped, head], *sample)
        dropped.append(min(losses, key=losses.get))
    order = head_study.greedy_order(visual, 3, *sample).tolist()
    assert order == [layer * 6 + head for layer, head in dropped]
    names = [f"{layer + 1}.{head + 1}" for layer, head in dropped]
    assert head_study.head_indices(visual, names) == order


# ---------- Probes and rank correlation ----------------------------------------------------------
def test_probe_is_least_squares_on_the_fitted_half():
    """With rows for the ridge below the data: numpy's own solver finds the same answers."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 300)
    x = rng.standard_normal((300, 5)) + 1.5 * np.eye(4, 5)[y]
    fitted = np.arange(300) % 3 > 0
    scaled = (x - x[fitted].mean(0)) / x[fitted].std(0, ddof=1)
    scaled = np.column_stack([scaled, np.ones(300)])
    ridge = np.sqrt(2 * fitted.sum()) * np.eye(6)
    rows = np.vstack([scaled[fitted], ridge])
    wanted = np.vstack([np.eye(4)[y[fitted]], np.zeros((6, 4))])
    solution, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    correct = (scaled[~fitted] @ solution).argmax(1) == y[~fitted]
    arguments = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(fitted)
    assert head_study.probe_accuracy(*arguments, ridge=2) == pytest.approx(correct.mean())
    assert 0.4 < correct.mean() < head_study.probe_accuracy(*arguments)
    constant = torch.ones(300, 3)
    assert head_study.probe_accuracy(constant, *arguments[1:]) < 0.35  # chance: 0.25


def test_rank_correlation_by_its_definition():
    rng = np.random.default_rng(0)
    a, b = rng.permutation(20), rng.permutation(20)
    expected = 1 - 6 * ((a - b) ** 2).sum() / (20 * (20**2 - 1))  # of two permutations
    assert head_study.rank_correlation(a, b) == pytest.approx(expected)
    assert head_study.rank_correlation(np.exp(a), b.reshape(4, 5)) == pytest.approx(expected)
    assert head_study.rank_correlation(a, -(a**3)) == pytest.approx(-1)
    assert head_study.rank_correlation(a, np.ones(20)) == 0
    assert head_study.ranks([3, 1, 3, 7]).tolist() == [2.5, 1, 2.5, 4]


def test_a_planted_head_is_found(visual):
    """One head reads the brightness of an image, and the domains differ in nothing else."""
    classes, domains = ("a", "b"), {}
    generator = torch.Generator().manual_seed(0)
    for name, brightness in (("dark", 60), ("bright", 180), ("target", 120)):
        noise = torch.randint(0, 40, (60, 3, 32, 32), generator=generator)
        pixels = (brightness + noise).to(torch.uint8)
        domains[name] = common.ImageSet(pixels, torch.arange(60) % 2, classes)
    measures, mean = head_study.what_heads_carry(visual, domains, seed=0)
    assert mean.shape == (6, 6, 16)
    assert list(measures) == ["probe class", "probe domain", "MMD"]  # real data have no attributes
    assert np.max(measures["probe domain"]) == 1
    assert np.mean(measures["probe class"]) < 0.65  # labels go with nothing
    assert np.max(measures["MMD"]) > 0.9  # at most sqrt(2)
    added = []
    for name in ("dark", "bright"):
        outputs = head_study.head_outputs(visual, domains[name].images / 255)[:, 2, 1, 0]  # (60, d)
        added.append(F.normalize(head_study.contribution(visual, 2, 1, outputs), dim=-1))
    assert measures["MMD"][2][1] == pytest.approx(common.mmd2(*added).sqrt().item(), rel=1e-4)


# ---------- The command --------------------------------------------------------------------------
def test_probes_then_attention_of_the_exported_tower(call_main, small_world, monkeypatch, tmp_path):
    sample = head_study.source_sample
    monkeypatch.setattr(head_study, "source_sample", lambda *rest: sample(*rest[:-1], 2))
    flags = "--only probes --epochs 1 --batch-size 28 --target photo --summary heads.json"
    call_main(head_study.main, flags)
    (path,) = tmp_path.glob("runs/head_study/*/result.json")
    record = json.loads(path.read_text())
    carried = record["extra"]["heads"]
    probes = [f"probe {name}" for name in ("class", "domain", "background", "color")]
    tests = ["without it, hold-out", "without it, target"]
    assert list(carried) == [*probes, "MMD", *tests, "gate"]
    assert all(np.shape(values) == (6, 6) for values in carried.values())
    assert carried["gate"] == record["extra"]["ha-lora+dig"]["gates"]
    counts = np.array(carried["without it, target"]) * 7 * 4  # a gain is a number of images
    assert np.allclose(counts, counts.round(), atol=1e-6) and np.abs(counts).max() >= 1
    for name in ("heads.json", "heads-carry.png", "heads-correlation.png"):
        assert (tmp_path / name).is_file()

    flags = f"--only attention --output again --model local-dir:{path.parent / 'model'}"
    call_main(head_study.main, flags)
    (path,) = tmp_path.glob("again/head_study/*/result.json")
    again = json.loads(path.read_text())
    assert again["target"] == "photo" and again["rows"] == record["rows"]
    assert again["extra"]["ha-lora+dig"] == record["extra"]["ha-lora+dig"]
    assert np.shape(again["extra"]["attention"]["last layer, CLIP"]) == (6, 8, 8)
    for name in ("attention.png", "importance.png"):
        assert (path.parent / name).is_file()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--drop 7.2", "--drop 7.2: heads are 1.1 ... 6.6"),
        ("--modes lora", "the last row needs gates"),
    ],
)
def test_wrong_flags_are_one_line(call_main, flags, words):
    error = call_main(head_study.main, flags)
    assert error.startswith("error: ") and words in error
    assert error.count("\n") == 1
