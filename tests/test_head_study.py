"""What heads carry, against PyTorch's own attention, hooks, slow loops and planted answers."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import headpurify
from support import head_study, heads


@pytest.fixture
def visual():
    return copy.deepcopy(common.load_clip("tiny").visual)


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_contributions_of_all_heads_are_what_attention_adds(visual, images):
    """At the CLS token, and averaged over tokens: with the bias, nn.MultiheadAttention's output."""
    outputs = head_study.head_outputs(visual, images)
    assert outputs.shape == (5, 6, 6, 2, 16)
    for layer, (attention, z) in enumerate(heads.attention_inputs(visual, images)):
        expected, _ = attention(z, z, z)  # (B, N, D)
        total = attention.out_proj.bias
        for head in range(6):
            own = outputs[:, layer, head]  # (B, 2, d)
            total = total + heads.contribution(visual, layer, head, own)
        assert torch.allclose(total[:, 0], expected[:, 0], atol=1e-5)
        assert torch.allclose(total[:, 1], expected.mean(1), atol=1e-5)


def hooked_tower(visual, layer, head, mean):
    """A copy in which a hook overwrites what a head says."""
    hooked, d = copy.deepcopy(visual), len(mean)
    (own,) = headpurify.purify(hooked, 0, 0, gated=False)[layer : layer + 1]

    def overwrite(module, arguments):
        tokens = arguments[0].clone()  # (B, N, D), heads side by side
        tokens[..., head * d : (head + 1) * d] = mean
        return (tokens,)

    own.mha.out_proj.register_forward_pre_hook(overwrite)
    return hooked


def test_an_ablated_head_says_the_same_whatever_it_sees(visual, images):
    """As a hook does that overwrites its output; afterwards the tower is, to the bit, as before."""
    mean = torch.randn(16, generator=torch.Generator().manual_seed(1))
    before = visual(images)
    for says in (mean, torch.zeros(16), None):
        hooked = hooked_tower(visual, 3, 2, torch.zeros(16) if says is None else says)
        with pytest.raises(KeyError), heads.ablated(visual, 3, 2, says):
            ablated = visual(images)
            raise KeyError
        assert torch.allclose(ablated, hooked(images), atol=1e-5)
        assert not torch.allclose(ablated, before, atol=1e-3)
        assert torch.equal(visual(images), before)


def test_gains_are_those_of_towers_with_a_head_less(visual, small_world):
    """Three heads of different layers, each in a copy of its own, tested as any tower is."""
    domain = common.load_domains("tiny-pacs", seed=1000)[0].balanced
    clip = common.load_clip("tiny")
    pixels = domain.transformed(clip.preprocess)
    class_features = clip.class_features(pixels.classes)
    mean = torch.randn(6, 6, 16, generator=torch.Generator().manual_seed(1))
    classify = common.clip_classifier(visual, class_features)
    answers = head_study.answers_without_each(visual, mean, classify)
    right = common.outputs(answers, pixels) == pixels.labels[:, None]
    found = head_study.gains(right, (6, 6))

    def accuracy(tower):
        tests = {"target": {"any": pixels}}
        return common.evaluate(common.clip_classifier(tower, class_features), tests)["target"]

    for layer, head in ((0, 5), (3, 2), (5, 0)):
        without = hooked_tower(visual, layer, head, mean[layer, head])
        assert found[layer][head] == pytest.approx(accuracy(without) - accuracy(visual))
    assert np.count_nonzero(found) > 10


def test_probe_is_least_squares_on_the_fitted_half():
    """With rows for the ridge below the data: numpy's own solver finds the same answers."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 300)
    x = rng.standard_normal((300, 5)) + 1.5 * np.eye(4, 5)[y]
    fitted = np.arange(300) % 3 > 0
    scaled = (x - x[fitted].mean(0)) / x[fitted].std(0, ddof=1)
    scaled = np.column_stack([scaled, np.ones(300)])
    ridge = np.sqrt(1e-3 * fitted.sum()) * np.eye(6)
    rows = np.vstack([scaled[fitted], ridge])
    wanted = np.vstack([np.eye(4)[y[fitted]], np.zeros((6, 4))])
    solution, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    right = (scaled[~fitted] @ solution).argmax(1) == y[~fitted]
    given = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(fitted)
    assert head_study.probe_accuracy(*given) == pytest.approx(right.mean())
    assert 0.4 < right.mean() < 0.9


def test_probe_finds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(800) % 4
    fitted = torch.rand(800, generator=generator) < 0.5
    x = torch.randn(800, 6, generator=generator)
    assert head_study.probe_accuracy(x, y, fitted) < 0.35  # chance: 0.25
    x[:, :4] += 20 * torch.eye(4)[y]
    assert head_study.probe_accuracy(x, y, fitted) == 1
    constant = torch.ones(800, 3)
    assert head_study.probe_accuracy(constant, y, fitted) < 0.35


def test_rank_correlation_by_its_definition():
    rng = np.random.default_rng(0)
    a, b = rng.permutation(20), rng.permutation(20)
    expected = 1 - 6 * ((a - b) ** 2).sum() / (20 * (20**2 - 1))  # of two permutations
    assert head_study.rank_correlation(a, b) == pytest.approx(expected)
    assert head_study.rank_correlation(np.exp(a), b.reshape(4, 5)) == pytest.approx(expected)
    assert head_study.rank_correlation(a, -(a**3)) == pytest.approx(-1)
    assert head_study.rank_correlation(a, np.ones(20)) == 0
    values = [3, 1, 3, 7]
    slow = []
    for value in values:  # the mean of all places that it could take
        below = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        slow.append(np.mean(range(below + 1, below + equal + 1)))
    assert head_study.ranks(values).tolist() == slow == [2.5, 1, 2.5, 4]


def test_a_planted_head_is_found(visual):
    """One head reads the brightness of an image, and the domains differ in nothing else."""
    classes, domains = ("a", "b"), {}
    generator = torch.Generator().manual_seed(0)
    for name, brightness in (("dark", 60), ("bright", 180), ("target", 120)):
        noise = torch.randint(0, 40, (60, 3, 32, 32), generator=generator)
        pixels = (brightness + noise).to(torch.uint8)
        domains[name] = common.ImageSet(pixels, torch.arange(60) % 2, classes)
    found, mean = head_study.what_heads_carry(
        visual,
        domains,
        seed=0,
        outputs=common.outputs,
        distance=lambda x, sources: common.mmd2(*x.chunk(sources)).item(),
    )
    assert mean.shape == (6, 6, 16)
    assert list(found) == ["probe class", "probe domain", "MMD"]  # real data say no more
    assert np.max(found["probe domain"]) == 1
    assert np.mean(found["probe class"]) < 0.65  # labels go with nothing
    assert np.max(found["MMD"]) > 0.9  # at most sqrt(2)


def test_clip_stays_as_it_was(visual):
    """It is asked for accuracies between its heads', and goes on being tested after them."""
    classes, *_ = common.TINY_BENCHMARKS["tiny-pacs"]
    images = common.ImageSet(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.zeros(3), classes)
    task = common.Task(classes, {}, {"hold-out": {"a": images}, "target": {"b": images}})
    row = SimpleNamespace(precision="fp32", device="cpu", workers=0)
    for training in (False, True):
        visual.train(training)
        headpurify.validate(visual, torch.eye(7, 64), task, row)
        assert visual.training == training


def test_study_heads(call_main, small_world, tmp_path):
    """A picture of every measure, their correlations, and numbers that can be had in other ways."""
    out = call_main(headpurify.main, "--study heads --epochs 1 --batch-size 28")
    (path,) = tmp_path.glob("runs/**/result.json")
    record = json.loads(path.read_text())
    found = record["extra"]["heads"]
    probes = [f"probe {what}" for what in ("class", "domain", "background", "color")]
    tests = ["without it, hold-out", "without it, target"]
    assert list(found) == [*probes, "MMD", *tests, "gate"]
    assert all(np.shape(values) == (6, 6) for values in found.values())
    assert found["gate"] == record["extra"]["ha-lora+dig"]["gates"]
    low, high = np.min(found["gate"]), np.max(found["gate"])
    assert f"gates from {low:.2f} to {high:.2f}" in out
    images = 7 * 4  # a gain is a number of images of the target
    counts = np.array(found["without it, target"]) * images
    assert np.allclose(counts, counts.round(), atol=1e-6) and np.abs(counts).max() >= 1
    rows = head_study.correlations(record)
    table = out[out.index("rank correlation over heads") :].splitlines()
    cells = [f"{value:+.2f}" for value in rows["gate"].values()]
    assert table[-2].split()[1:] == cells and cells[-1] == "+1.00"
    stem = "headpurify-heads-tiny-pacs"
    written = {file.name for file in (tmp_path / "results").iterdir()}
    assert {f"{stem}-carry.png", f"{stem}-correlation.png", f"{stem}.json"} <= written
