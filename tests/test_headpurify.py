"""Head purification against explicit loops, finite differences and the equality of two ways."""

import copy
import functools
import itertools
import json
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import headpurify
from headpurify import HeadPurifiedAttention, merge, purify


def small_vit(heads=12, width=48, layers=4):
    """A random open_clip CLIP whose image tower has 12 heads, as ViT-B has."""
    torch.manual_seed(0)
    return (
        open_clip.CLIP(
            32,
            {"image_size": 32, "patch_size": 8, "width": width, "layers": layers, "head_width": width // heads},
            {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
        )
        .eval()
        .requires_grad_(False)
    )


def tower(name):
    return copy.deepcopy((common.load_clip("tiny")[0] if name == "tiny" else small_vit()).visual)


def randomize(layers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            for parameter in [*layer.lora_parameters(), layer.gate_logits]:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("name", ["tiny", "12 heads"])
def test_purified_starts_as_the_pretrained_tower(name):
    visual, images = tower(name), torch.randn(3, 3, 32, 32)
    before = visual(images)
    layers = purify(visual)
    assert [layer.rank for layer in layers] == [2] * (len(layers) - 2) + [8, 8]
    assert torch.allclose(visual(images), before, atol=1e-6)
    for layer in layers:
        assert torch.equal(layer.gates(), torch.ones(layer.mha.num_heads))


@pytest.mark.parametrize("name", ["tiny", "12 heads"])
@pytest.mark.parametrize("head_aware, gated", [(True, True), (False, True), (True, False)])
def test_merged_equals_unmerged_after_training_steps(name, head_aware, gated):
    visual = tower(name)
    layers = purify(visual, head_aware=head_aware, gated=gated)
    trained = [p for p in visual.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step in range(5):
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        loss = F.normalize(visual(images), dim=-1)[:, :3].square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = torch.randn(4, 3, 32, 32)
    unmerged = F.normalize(visual(images), dim=-1)
    moved = (unmerged - F.normalize(tower(name)(images), dim=-1)).abs().max()
    assert moved > 1e-3  # the steps did something
    if gated:
        assert all(layer.gates().sum().item() == pytest.approx(layer.mha.num_heads, rel=1e-5) for layer in layers)
        assert any((layer.gates() - 1).abs().max() > 1e-3 for layer in layers)
    merged = merge(visual)
    assert all(type(block.attn) is nn.MultiheadAttention for block in merged.transformer.resblocks)
    assert torch.allclose(F.normalize(merged(images), dim=-1), unmerged, atol=1e-5)


def loop_over_heads(layer: HeadPurifiedAttention, z):
    """The paper's formulas, one head and one token row at a time; row vectors, z @ W."""
    mha, H, d = layer.mha, layer.mha.num_heads, layer.mha.head_dim
    D = H * d
    w_q, w_k, w_v = (w.T for w in mha.in_proj_weight.split(D))  # (D, D), y = z @ W
    b_q, b_k, b_v = mha.in_proj_bias.split(D)
    gates = H * torch.exp(layer.gate_logits) / torch.exp(layer.gate_logits).sum()
    outputs = []
    for i in range(H):
        own = slice(i * d, (i + 1) * d)
        down_q, down_v = (down[i if len(down) > 1 else 0] for down in (layer.down_q, layer.down_v))
        q = z @ (w_q[:, own] + layer.scale * down_q @ layer.up_q[i]) + b_q[own]
        k = z @ w_k[:, own] + b_k[own]
        v = z @ (w_v[:, own] + layer.scale * down_v @ layer.up_v[i]) + b_v[own]
        attention = torch.softmax(q @ k.transpose(1, 2) / d**0.5, dim=-1)
        outputs.append(gates[i] * (attention @ v))
    return torch.cat(outputs, -1) @ mha.out_proj.weight.T + mha.out_proj.bias


@pytest.mark.parametrize("head_aware", [True, False])
def test_against_a_loop_over_heads(head_aware):
    torch.manual_seed(1)
    layer = HeadPurifiedAttention(
        nn.MultiheadAttention(24, 6, batch_first=True).double(), rank=3, head_aware=head_aware, scale=0.7
    )
    randomize([layer])
    z = torch.randn(2, 5, 24, dtype=torch.float64)
    assert layer.down_q.shape == (6 if head_aware else 1, 24, 3) and layer.up_q.shape == (6, 3, 4)
    assert torch.allclose(layer(z)[0], loop_over_heads(layer, z), atol=1e-12)


def test_conventional_lora_is_one_shared_matrix_product():
    torch.manual_seed(2)
    mha = nn.MultiheadAttention(24, 6, batch_first=True).double()
    layer = HeadPurifiedAttention(mha, rank=3, head_aware=False, gated=False, scale=0.5)
    randomize([layer])
    layer.gate_logits.data.zero_()
    plain = copy.deepcopy(mha)
    with torch.no_grad():
        for block, (down, up) in zip((0, 2), ((layer.down_q, layer.up_q), (layer.down_v, layer.up_v))):
            shared_a = torch.cat(list(up), dim=1)  # A (r, D)
            plain.in_proj_weight[block * 24 : (block + 1) * 24] += 0.5 * (down[0] @ shared_a).T
    z = torch.randn(2, 5, 24, dtype=torch.float64)
    assert torch.allclose(layer(z)[0], plain(z, z, z, need_weights=False)[0], atol=1e-12)


def test_ha_lora_with_equal_down_projections_is_lora():
    torch.manual_seed(3)
    mha = nn.MultiheadAttention(24, 6, batch_first=True).double()
    aware, shared = (HeadPurifiedAttention(mha, 2, head_aware=value) for value in (True, False))
    randomize([shared])
    with torch.no_grad():
        for name in ("q", "v"):
            getattr(aware, f"down_{name}").copy_(getattr(shared, f"down_{name}").expand(6, -1, -1))
            getattr(aware, f"up_{name}").copy_(getattr(shared, f"up_{name}"))
        aware.gate_logits.copy_(shared.gate_logits)
    z = torch.randn(2, 5, 24, dtype=torch.float64)
    assert torch.allclose(aware(z)[0], shared(z)[0], atol=1e-12)


@pytest.fixture
def purified_batch():
    """A small purified tower in float64 with a batch of three domains; returns a function that computes both losses."""
    model = small_vit(heads=3, width=12, layers=2).double()
    visual = model.visual
    layers = purify(visual, rank=2, last_rank=2)
    randomize(layers)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(9, 3, 32, 32, generator=generator, dtype=torch.float64)
    features = F.normalize(torch.randn(4, 32, generator=generator, dtype=torch.float64), dim=-1)
    labels, domain = torch.arange(9) % 4, torch.arange(3).repeat_interleave(3)

    def losses(where="output"):
        with headpurify.recorded(visual, where) as record:
            embedding = visual(images)
        logits = 10 * F.normalize(embedding, dim=-1) @ features.T
        compared = [F.normalize(f, dim=-1) for f in ([tokens[:, 0] for tokens in record] or [embedding])]
        mmd = torch.stack(
            [
                common.mmd2(f[domain == a], f[domain == b], [0.3, 1.0])
                for f in compared
                for a, b in ((0, 1), (0, 2), (1, 2))
            ]
        ).mean()
        return F.cross_entropy(logits, labels), mmd

    return [p for layer in layers for p in layer.lora_parameters()], [layer.gate_logits for layer in layers], losses


@pytest.mark.parametrize("where", ["output", "layers", "heads"])
@pytest.mark.parametrize("mmd_grad", ["none", "lora", "gates", "both"])
def test_gradient_routing(purified_batch, where, mmd_grad):
    """What L_MMD reaches has the gradient of L_cls + alpha L_MMD, the rest that of L_cls: central differences."""
    lora, gates, losses = purified_batch
    reached = {"none": [], "lora": lora, "gates": gates, "both": lora + gates}[mmd_grad]
    headpurify.route_gradients(*losses(where), lora + gates, reached, alpha=0.7)
    found = [p.grad.clone() for p in lora + gates]
    headpurify.route_gradients(losses(where)[0], None, lora + gates, [], alpha=0.7)
    for parameter, gradient in zip(lora + gates, found):
        felt = any(parameter is other for other in reached)
        assert torch.equal(parameter.grad, gradient) or felt  # L_MMD goes nowhere else
        if felt:
            assert not torch.allclose(parameter.grad, gradient, rtol=1e-3)

    eps, generator = 1e-6, torch.Generator().manual_seed(3)
    for parameter, gradient in zip(lora + gates, found):
        direction, values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64), []
        for sign in (1, -2, 1):
            with torch.no_grad():
                parameter += sign * eps * direction
                classification, mmd = losses(where)
                weight = 0.7 * any(parameter is other for other in reached)
                values.append((classification + weight * mmd).item())
        slope = (values[0] - values[1]) / (2 * eps)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_mmd_loss_averages_over_pairs_and_features():
    generator = torch.Generator().manual_seed(8)
    first, second = (torch.randn(6, 5, generator=generator) for _ in range(2))
    domain = torch.tensor([0, 0, 1, 1, 2, 2])
    unit = [F.normalize(f, dim=-1) for f in (first, second)]
    expected = (
        sum(common.mmd2(f[2 * a : 2 * a + 2], f[2 * b : 2 * b + 2]) for f in unit for a, b in ((0, 1), (0, 2), (1, 2)))
        / 6
    )
    assert headpurify.mmd_loss([first, second], domain).item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(common.InputError, match="two are needed"):
        headpurify.mmd_loss([first], torch.zeros(6, dtype=torch.long))


def test_parameter_count_of_vit_b16_by_hand():
    """12 heads, D = 768, d = 64: per layer 2 (12 * 768 r + 12 r 64) low-rank numbers and 12 gates."""
    mha = nn.MultiheadAttention(768, 12, batch_first=True)
    layers = [HeadPurifiedAttention(copy.deepcopy(mha), rank) for rank in [2] * 10 + [8] * 2]
    count = sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)
    assert count == (10 * 2 + 2 * 8) * 2 * (12 * 768 + 12 * 64) + 12 * 12
    shared = HeadPurifiedAttention(mha, 8, head_aware=False, gated=False)
    assert sum(p.numel() for p in shared.parameters() if p.requires_grad) == 8 * 2 * (768 + 768)


def test_other_towers_are_refused():
    resnet = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(common.InputError, match="Sequential"):
        purify(resnet)
    with pytest.raises(ValueError, match="rank"):
        HeadPurifiedAttention(nn.MultiheadAttention(8, 2, batch_first=True), -1)
    with pytest.raises(ValueError, match="batch_first"):
        HeadPurifiedAttention(nn.MultiheadAttention(8, 2), 1)


def test_export_is_a_plain_open_clip_model(tmp_path):
    """Loaded with open_clip and numpy alone, the exported tiny CLIP has the accuracy that the purified one had."""
    model, preprocess, tokenizer = common.load_clip("tiny")
    domain = common.tiny_domain("tiny-pacs", "cartoon", 11, 0.4).balanced
    images, labels = preprocess(domain.images[::4]), domain.labels[::4]
    features = common.class_features(model, tokenizer, domain.classes)
    randomize(purify(model.visual))
    purified = (F.normalize(model.visual(images), dim=-1) @ features.T).argmax(1)
    merge(model.visual)
    common.export_clip(model, tmp_path / "model", features, domain.classes)

    plain = open_clip.create_model(f"local-dir:{tmp_path / 'model'}").eval()
    scores = (
        plain.encode_image(images, normalize=True).detach().numpy()
        @ np.load(tmp_path / "model" / "class_features.npy").T
    )
    assert json.loads((tmp_path / "model" / "classes.json").read_text()) == list(domain.classes)
    assert (scores.argmax(1) == labels.numpy()).mean() == (purified == labels).double().mean().item()


def test_interference_is_the_cosine_of_updates():
    torch.manual_seed(4)
    layers = [
        HeadPurifiedAttention(nn.MultiheadAttention(24, 6, batch_first=True), 2, aware) for aware in (True, False)
    ]
    randomize(layers)
    for layer, found in zip(layers, headpurify.interference(layers)):
        cosines = []
        for down, up in ((layer.down_q, layer.up_q), (layer.down_v, layer.up_v)):
            updates = [(down[i if len(down) > 1 else 0] @ up[i]).flatten() for i in range(6)]
            for i, j in itertools.combinations(range(6), 2):
                cosines.append(F.cosine_similarity(updates[i], updates[j], dim=0).abs().item())
        assert found == pytest.approx(np.mean(cosines), rel=1e-5)


def flags(monkeypatch, arguments):
    monkeypatch.setattr("sys.argv", ["headpurify.py", *arguments.split()])
    return headpurify.settings()


@pytest.mark.parametrize("model, heads, width", [("tiny", 6, 96), ("ViT-B-16", 12, 768)])
def test_matched_lora_has_as_many_parameters(monkeypatch, model, heads, width):
    names = "ha-lora lora/lora-rank=match lora/lora-rank=double lora"
    counts = {}
    for name, mode in flags(monkeypatch, f"--model {model} --modes {names}").modes.items():
        ranks, aware = headpurify.lora_ranks(mode, heads), mode.adapter == "ha-lora"
        mha = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [HeadPurifiedAttention(copy.deepcopy(mha), rank, aware) for rank in ranks]
        counts[name] = sum(p.numel() for layer in layers for p in layer.lora_parameters())
    assert counts["lora/lora-rank=match"] == counts["ha-lora"]
    assert counts["lora/lora-rank=double"] == 2 * counts["lora"] < counts["ha-lora"]


@pytest.mark.parametrize(
    "strategy, expected",
    [
        ("joint", "wg wg wg wg wg wg"),
        ("alternating", "w g w g w g"),
        ("two-stage", "w w w g g g"),
    ],
)
def test_strategies(strategy, expected):
    trained = [headpurify.trained_now(strategy, step, 6, ["w"], ["g"]) for step in range(1, 7)]
    assert ["".join(step) for step in trained] == expected.split()
    assert headpurify.trained_now(strategy, 4, 6, [], ["g"]) == ["g"]  # gates alone are always trained


def test_silenced_heads_and_their_importance():
    """Without a head the layer computes what it computes when the gate of that head is 0; importance by hand."""
    torch.manual_seed(6)
    model, features = small_vit(heads=3, width=12, layers=2), F.normalize(torch.randn(4, 32), dim=-1)
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0])
    loss = lambda visual: F.cross_entropy(10 * F.normalize(visual(images), dim=-1) @ features.T, labels).item()  # noqa: E731
    before = {name: value.clone() for name, value in model.visual.state_dict().items()}
    found = headpurify.head_importance(model.visual, features, 10, images, labels)
    assert all(torch.equal(value, before[name]) for name, value in model.visual.state_dict().items())
    for layer, head in itertools.product(range(2), range(3)):
        gated, silenced = copy.deepcopy(model.visual), copy.deepcopy(model.visual)
        purified = purify(gated, 0, 0)[layer]
        purified.gates = lambda head=head: torch.tensor([float(i != head) for i in range(3)])
        headpurify.silence(silenced, layer, head)
        assert torch.allclose(silenced(images), gated(images), atol=1e-6)
        assert found[layer, head].item() == pytest.approx(loss(gated) - loss(model.visual), abs=1e-5)


def test_cls_attention_is_that_of_the_layer():
    visual, images = small_vit(heads=3, width=12, layers=2).visual, torch.randn(2, 3, 32, 32)
    with headpurify.recorded(visual, "inputs") as inputs:
        visual(images)
    for block, z, found in zip(visual.transformer.resblocks, inputs, headpurify.cls_attention(visual, images)):
        weights = block.attn(z, z, z, need_weights=True, average_attn_weights=False)[1]  # (B, H, N, N)
        assert torch.allclose(found, weights[:, :, 0, 1:], atol=1e-6)


def test_style_loss_by_a_loop():
    generator = torch.Generator().manual_seed(7)
    unit = lambda *shape: F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)  # noqa: E731
    style, styled, content, earlier = unit(6), unit(3, 6), unit(3, 6), unit(2, 6)
    diversity = sum(abs(float(e @ style)) for e in earlier) / 2
    consistency = 0.0
    for m in range(3):
        scores = [np.exp(float(styled[m] @ content[n])) for n in range(3)]
        consistency -= np.log(scores[m] / sum(scores)) / 3
    assert headpurify.style_loss(style, styled, content, earlier).item() == pytest.approx(diversity + consistency)
    assert headpurify.style_loss(style, styled, content, earlier[:0]).item() == pytest.approx(consistency)


@pytest.fixture
def small_world(monkeypatch):
    """tiny-pacs with 10 training and 8 balanced images of a class and domain."""
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (common.PACS_CLASSES, 10, 8))


def test_learned_prompts_classify(small_world, monkeypatch):
    """Both start near the zero-shot classifier; CoOp fits the sources better, PromptStyler never sees an image."""
    model, preprocess, tokenizer = common.load_clip("tiny")
    split = common.leave_one_out(common.load_domains("tiny-pacs", seed=1001), "sketch", preprocess, preprocess)
    mode = SimpleNamespace(device="cpu", precision="fp32", workers=0, batch_size=12, context=4, templates=["a {}."])
    accuracy = {}
    monkeypatch.setattr(headpurify, "promptstyler", functools.partial(headpurify.promptstyler, steps=5))
    for mode.prompt in ("templates", "coop", "promptstyler"):
        features = headpurify.prompt_features(model, tokenizer, common.PACS_CLASSES, split, mode, seed=0)
        assert features.shape == (7, 64) and torch.allclose(features.norm(dim=-1), torch.ones(7))
        again = headpurify.prompt_features(model, tokenizer, common.PACS_CLASSES, split, mode, seed=0)
        assert torch.equal(features, again)
        classify = common.clip_classifier(model.visual, features)
        accuracy[mode.prompt] = common.evaluate(classify, split.train)["accuracy"]
    assert accuracy["coop"] > accuracy["templates"] + 0.03
    assert accuracy["promptstyler"] > 2 / 7


def test_study_writes_tables_and_figures(call_main, small_world, tmp_path):
    """Every mode of a study goes through one training; what L_MMD reaches changes what is learnt."""
    arguments = "--study mmd-target --epochs 1 --lr 0.03 --gate-lr 0.5"
    out = call_main(headpurify.main, arguments)
    modes = headpurify.STUDIES["mmd-target"].split()
    assert all(out.count(mode) >= 3 for mode in modes)
    files = {file.name for file in (tmp_path / "results").iterdir()}
    stem = "headpurify-mmd-target-tiny-pacs"
    assert files == {f"{stem}.json", f"{stem}.png", f"{stem}-interference.png"}
    (run,) = json.loads((tmp_path / "results" / f"{stem}.json").read_text())["runs"]
    gates = {json.dumps(run["modes"][mode]["gates"]) for mode in modes[1:]}
    assert len(gates) == len(modes) - 1
    again = call_main(headpurify.main, arguments + " --resume")
    assert "--resume: found" in again and "holdout" not in again  # nothing was trained
    assert out.split("\n\n")[-1].strip() == again.split("\n\n")[-1].strip()
    error = call_main(headpurify.main, arguments + " --resume --alpha 3")
    assert "other settings" in error and "alpha" in error


def test_drop_heads(call_main, small_world, tmp_path):
    """Every order starts at the undisturbed model, and stops also at as many heads as were dropped by hand."""
    out = call_main(headpurify.main, "--study drop-heads --epochs 1 --drop 6.2 1.1")
    (run,) = json.loads((tmp_path / "results" / "headpurify-drop-heads-tiny-pacs.json").read_text())["runs"]
    assert set(run["drop"]) == {"random", "by hand", "gates on frozen CLIP", "adapt and drop"}
    assert run["drop"]["by hand"]["dropped"] == [0, 2]
    assert run["drop"]["random"]["dropped"] == [0, 2, 3, 7, 10, 14, 17, 20, 24, 27]
    tables = out[out.index("source hold-out, %, dropped:") :].split("\n\n")
    for part, table in zip(("holdout", "target"), tables):
        rows = {line[:20].strip(): line[20:].split() for line in table.splitlines()[2:]}
        for order, mode in (("random", "zero-shot"), ("adapt and drop", "ha-lora+dig")):
            curve = run["drop"][order][part]
            assert curve[0] == pytest.approx(run["modes"][mode][part]["accuracy"])
            assert rows[order] == [f"{100 * accuracy:.1f}" for accuracy in curve]
        assert rows["by hand"][2:] == ["-"] * 8


@pytest.mark.slow
def test_figures(call_main, small_world, tmp_path):
    call_main(headpurify.main, "--modes ha-lora+dig --epochs 1 --figures")
    folder = tmp_path / "runs" / "headpurify" / "tiny-pacs-sketch-seed0"
    for name in ("gates", "attention", "features", "importance"):
        assert (folder / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--modes lroa", ("'lroa'", "did you mean 'lora'")),
        ("--modes lora/seeds=3", ("'lora/seeds=3'", "it may set")),
        ("--modes lora/lora-rank=four", ("--lora-rank", "'four'")),
        ("--modes lora --figures", ("--figures", "lora")),
        ("--study drop-heads --drop 7.2", ("--drop 7.2", "1.1 ... 6.6")),
        ("--study drop-heads --drop two", ("--drop two", "1.1 ... 6.6")),
        ("--modes zero-shot --prompt file", ("--class-features", "(7, 64)", "dog")),
        ("--modes zero-shot --prompt file --class-features wrong.npy", ("wrong.npy", "(7, 64)", "dog")),
        ("--modes lora/rank=0", ("--rank", "got 0")),
    ],
)
def test_wrong_settings_are_one_clear_error(call_main, small_world, tmp_path, arguments, words):
    np.save(tmp_path / "wrong.npy", np.zeros((3, 64)))
    error = call_main(headpurify.main, arguments)
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("runs/**/*.json")) and not list((tmp_path / "results").iterdir())


def test_class_features_from_a_file(call_main, small_world, tmp_path):
    """Any prompt method's features: those of the default prompt, from a file and scaled, give its accuracies."""
    model, _, tokenizer = common.load_clip("tiny")
    np.save(tmp_path / "own.npy", 3 * common.class_features(model, tokenizer, common.PACS_CLASSES).numpy())
    arguments = "--modes zero-shot/prompt=file zero-shot --class-features own.npy --summary results/both.json"
    call_main(headpurify.main, arguments)
    (run,) = json.loads((tmp_path / "results" / "both.json").read_text())["runs"]
    assert run["modes"]["zero-shot/prompt=file"] == run["modes"]["zero-shot"]


def test_prompt_study_takes_a_file_where_one_is_given(monkeypatch):
    without, given = (
        flags(monkeypatch, f"--study prompts --summary x.json {more}").modes for more in ("", "--class-features f.npy")
    )
    assert [*given] == ["zero-shot/prompt=file", "ha-lora+dig/prompt=file", *without]
    assert {mode.prompt for mode in without.values()} == {"templates", "ensemble", "coop", "promptstyler"}


def test_resume_clears_what_a_killed_run_left(call_main, small_world, tmp_path):
    left = tmp_path / "runs" / "headpurify" / ".tiny-pacs-sketch-seed0-killed"
    left.mkdir(parents=True)
    call_main(headpurify.main, "--modes zero-shot --resume")
    assert [entry.name for entry in left.parent.iterdir()] == ["tiny-pacs-sketch-seed0"]


def test_accuracies_say_what_the_last_mode_gains_within_a_run():
    part = lambda accuracy: {name: {"accuracy": accuracy} for name in ("holdout", "source", "target")}  # noqa: E731
    runs = [{"seed": seed, "modes": {"one": part(0.1 * seed), "two": part(0.1 * seed + 0.2)}} for seed in (0, 5)]
    flat = headpurify.accuracies(runs)
    assert [run["modes"]["one"]["last minus this"] for run in flat] == pytest.approx([0.2, 0.2])
    assert "last minus this" not in flat[0]["modes"]["two"] and "20.0 ± 0.0" in common.measures_table("", flat)
    assert set(runs[0]["modes"]["one"]) == {"holdout", "source", "target"}  # what was given stays as it is
