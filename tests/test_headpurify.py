"""Head purification against explicit loops, finite differences and the equality of two ways."""

import copy
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
from support import heads


def small_clip(heads=12, width=48, layers=4):
    """A random open_clip CLIP whose image tower has 12 heads, as ViT-B has."""
    torch.manual_seed(0)
    image = {"image_size": 32, "patch_size": 8, "width": width, "layers": layers}
    image["head_width"] = width // heads
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(32, image, text).eval().requires_grad_(False)


def tower(name):
    return (common.load_clip("tiny") if name == "tiny" else small_clip()).visual


def randomize(layers):
    """Give all that is learnt other values than those of the start."""
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        for parameter in [*layer.lora_parameters(), layer.gate_logits]:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data += 0.3 * noise


# ---------- Purified attention -------------------------------------------------------------------
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
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 32, 32, generator=generator)
        loss = F.normalize(visual(images), dim=-1)[:, :3].square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = torch.randn(4, 3, 32, 32)
    unmerged = F.normalize(visual(images), dim=-1)
    start = F.normalize(tower(name)(images), dim=-1)
    assert (unmerged - start).abs().max() > 1e-3  # the steps did something
    gates = torch.stack([layer.gates() for layer in layers])  # (layers, heads)
    assert torch.allclose(gates.mean(1), torch.ones(len(layers)), atol=1e-5)
    assert gated == bool((gates - 1).abs().max() > 1e-3)
    merged = merge(visual)
    for block in merged.transformer.resblocks:
        assert type(block.attn) is nn.MultiheadAttention
    assert torch.allclose(F.normalize(merged(images), dim=-1), unmerged, atol=1e-5)


def loop_over_heads(layer: HeadPurifiedAttention, z):
    """The paper's formulas, one head at a time; row vectors, z @ W."""
    mha, H, d = layer.mha, layer.mha.num_heads, layer.mha.head_dim
    w_q, w_k, w_v = mha.in_proj_weight.T.split(H * d, dim=1)  # (D, D), y = z @ W
    b_q, b_k, b_v = mha.in_proj_bias.split(H * d)
    gates = H * torch.exp(layer.gate_logits) / torch.exp(layer.gate_logits).sum()
    outputs = []
    for i in range(H):
        own = slice(i * d, (i + 1) * d)
        shared = 0 if len(layer.down_q) == 1 else i
        update_q = layer.scale * layer.down_q[shared] @ layer.up_q[i]
        update_v = layer.scale * layer.down_v[shared] @ layer.up_v[i]
        q = z @ (w_q[:, own] + update_q) + b_q[own]
        k = z @ w_k[:, own] + b_k[own]
        v = z @ (w_v[:, own] + update_v) + b_v[own]
        attention = torch.softmax(q @ k.transpose(1, 2) / d**0.5, dim=-1)
        outputs.append(gates[i] * (attention @ v))
    return torch.cat(outputs, -1) @ mha.out_proj.weight.T + mha.out_proj.bias


def attention(seed=1):
    torch.manual_seed(seed)
    return nn.MultiheadAttention(24, 6, batch_first=True).double()


@pytest.mark.parametrize("head_aware", [True, False])
def test_against_a_loop_over_heads(head_aware):
    layer = HeadPurifiedAttention(attention(), rank=3, head_aware=head_aware, scale=0.7)
    randomize([layer])
    z = torch.randn(2, 5, 24, dtype=torch.float64)
    assert layer.down_q.shape == (6 if head_aware else 1, 24, 3)
    assert layer.up_q.shape == (6, 3, 4)
    assert torch.allclose(layer(z)[0], loop_over_heads(layer, z), atol=1e-12)


def test_conventional_lora_is_one_shared_matrix_product():
    mha = attention()
    layer = HeadPurifiedAttention(mha, rank=3, head_aware=False, gated=False, scale=0.5)
    randomize([layer])
    layer.gate_logits.data.zero_()
    plain = copy.deepcopy(mha)
    update_q = 0.5 * layer.down_q[0] @ torch.cat(list(layer.up_q), dim=1)  # B A, with A (r, D)
    update_v = 0.5 * layer.down_v[0] @ torch.cat(list(layer.up_v), dim=1)
    plain.in_proj_weight.data[:24] += update_q.T
    plain.in_proj_weight.data[48:] += update_v.T
    z = torch.randn(2, 5, 24, dtype=torch.float64)
    expected = plain(z, z, z, need_weights=False)[0]
    assert torch.allclose(layer(z)[0], expected, atol=1e-12)


def test_ha_lora_with_equal_down_projections_is_lora():
    mha = attention()
    aware = HeadPurifiedAttention(mha, 2, head_aware=True)
    shared = HeadPurifiedAttention(mha, 2, head_aware=False)
    randomize([shared])
    for name, value in shared.named_parameters():
        own = aware.get_parameter(name)
        own.data.copy_(value.expand_as(own))
    z = torch.randn(2, 5, 24, dtype=torch.float64)
    assert torch.allclose(aware(z)[0], shared(z)[0], atol=1e-12)


def test_parameter_count_of_vit_b16_by_hand():
    """12 heads, D = 768, d = 64: a layer has 2 (12 * 768 r + 12 r 64) numbers and 12 gates."""
    mha = nn.MultiheadAttention(768, 12, batch_first=True)
    count = 0
    for rank in [2] * 10 + [8] * 2:
        layer = HeadPurifiedAttention(mha, rank)
        count += sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert count == (10 * 2 + 2 * 8) * 2 * (12 * 768 + 12 * 64) + 12 * 12
    shared = HeadPurifiedAttention(mha, 8, head_aware=False, gated=False)
    count = sum(p.numel() for p in shared.parameters() if p.requires_grad)
    assert count == 8 * 2 * (768 + 768)


def test_other_towers_are_refused():
    resnet = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(common.InputError, match="Sequential"):
        purify(resnet)
    with pytest.raises(ValueError, match="rank"):
        HeadPurifiedAttention(nn.MultiheadAttention(8, 2, batch_first=True), -1)
    with pytest.raises(ValueError, match="batch_first"):
        HeadPurifiedAttention(nn.MultiheadAttention(8, 2), 1)


def test_export_is_a_plain_open_clip_model(tmp_path, small_world):
    """Loaded with open_clip and numpy alone, it has the accuracy that the purified tower had."""
    clip = common.load_clip("tiny")
    images = common.load_domains("tiny-pacs", seed=11)[1].balanced
    pixels = clip.preprocess(images.images)
    class_features = clip.class_features(images.classes)
    randomize(purify(clip.visual))
    purified = (clip.visual(pixels) @ class_features.T).argmax(1)
    merge(clip.visual)
    folder = tmp_path / "model"
    common.export_clip(clip, folder, class_features, images.classes)

    plain = open_clip.create_model(f"local-dir:{folder}").eval()
    features = plain.encode_image(pixels, normalize=True).detach().numpy()
    scores = features @ np.load(folder / "class_features.npy").T
    assert json.loads((folder / "classes.json").read_text()) == list(images.classes)
    assert np.array_equal(scores.argmax(1), purified.numpy())


def test_interference_is_the_cosine_of_updates():
    layers = [HeadPurifiedAttention(attention(), 2, aware) for aware in (True, False)]
    randomize(layers)
    for layer, found in zip(layers, headpurify.interference(layers)):
        cosines = []
        for down, up in ((layer.down_q, layer.up_q), (layer.down_v, layer.up_v)):
            updates = (down @ up).flatten(1)  # (6, D d)
            for i, j in itertools.combinations(range(6), 2):
                cosine = F.cosine_similarity(updates[i], updates[j], dim=0)
                cosines.append(cosine.abs().item())
        assert found == pytest.approx(np.mean(cosines), rel=1e-5)


def test_bf16_sees_what_gates_learn_at_first():
    """A gate of 1.001 changes the output of a layer in bf16 as much as it does in float32."""
    layer = small_clip(heads=3, width=12, layers=2).visual.transformer.resblocks[0].attn
    layer = HeadPurifiedAttention(layer, rank=0)
    torch.manual_seed(0)
    z = torch.randn(4, 17, 12)
    changes = {}
    for precision in ("fp32", "bf16"):
        outputs = []
        for gate in (1.0, 1.001):
            layer.gates = torch.tensor([gate, 1.0, 1.0]).clone
            with torch.no_grad(), common.autocast("cpu", precision):
                outputs.append(layer(z)[0].float())
        changes[precision] = (outputs[1] - outputs[0]).norm().item()
    assert changes["fp32"] > 0
    assert changes["bf16"] == pytest.approx(changes["fp32"], rel=0.1)


def test_tokens_in_bf16_stay_so_and_carry_small_gates_on_average():
    """A purified layer hands on what a plain one does: half the memory of float32."""
    layer = HeadPurifiedAttention(attention().float(), rank=0)
    torch.manual_seed(0)
    z = torch.randn(512, 17, 24)
    changes = {}
    for dtype in (torch.float32, torch.bfloat16):
        outputs = []
        for gate in (1.0, 1.001):
            layer.gates = torch.full((6,), gate).clone
            with torch.no_grad(), torch.autocast("cpu", enabled=dtype == torch.bfloat16):
                out, _ = layer(z.to(dtype))
            assert out.dtype == dtype
            outputs.append(out.float())
        changes[dtype] = outputs[1] - outputs[0]
    expected, found = changes.values()
    share = (found * expected).sum() / expected.square().sum()
    assert share.item() == pytest.approx(1, abs=0.15)


# ---------- Which loss trains what ---------------------------------------------------------------
PAIRS = ((0, 1), (0, 2), (1, 2))


@pytest.fixture
def purified_batch():
    """A small purified tower in float64 and a batch of three domains.

    Returns: its low-rank factors, its gates, and a function that computes both losses.
    """
    visual = small_clip(heads=3, width=12, layers=2).double().visual
    layers = purify(visual, rank=2, last_rank=2)
    randomize(layers)
    generator = torch.Generator().manual_seed(5)
    options = {"generator": generator, "dtype": torch.float64}
    images = torch.randn(9, 3, 32, 32, **options)
    class_features = F.normalize(torch.randn(4, 32, **options), dim=-1)
    labels, domain = torch.arange(9) % 4, torch.arange(3).repeat_interleave(3)

    def losses(where="output"):
        with headpurify.recorded(visual, where) as record:
            embedding = visual(images)
        logits = 10 * F.normalize(embedding, dim=-1) @ class_features.T
        distances = []
        for feature in [tokens[:, 0] for tokens in record] or [embedding]:
            x = F.normalize(feature, dim=-1)
            for a, b in PAIRS:
                distances.append(common.mmd2(x[domain == a], x[domain == b], [0.3, 1.0]))
        return F.cross_entropy(logits, labels), torch.stack(distances).mean()

    lora = [p for layer in layers for p in layer.lora_parameters()]
    return lora, [layer.gate_logits for layer in layers], losses


def directional_slope(parameter, direction, function, eps=1e-6):
    """Derivative of `function()` along a direction of a parameter, by central differences."""
    start = parameter.detach().clone()
    values = []
    for sign in (1, -1):
        parameter.data.copy_(start + sign * eps * direction)
        values.append(function().item())
    parameter.data.copy_(start)
    return (values[0] - values[1]) / (2 * eps)


@pytest.mark.parametrize("where", ["output", "layers", "heads"])
@pytest.mark.parametrize("mmd_grad", ["none", "lora", "gates", "both"])
def test_gradient_routing(purified_batch, where, mmd_grad):
    """What L_MMD reaches has the gradient of L_cls + alpha L_MMD, the rest that of L_cls."""
    lora, gates, losses = purified_batch
    trained = lora + gates
    reached = {"none": [], "lora": lora, "gates": gates, "both": trained}[mmd_grad]
    headpurify.route_gradients(*losses(where), trained, reached, alpha=0.7)
    found = [p.grad.clone() for p in trained]
    headpurify.route_gradients(losses(where)[0], None, trained, [], alpha=0.7)
    generator = torch.Generator().manual_seed(3)
    for parameter, gradient in zip(trained, found):
        weight = 0.7 * any(parameter is other for other in reached)
        if weight:
            assert not torch.allclose(parameter.grad, gradient, rtol=1e-3)
        else:  # L_MMD goes nowhere else
            assert torch.equal(parameter.grad, gradient)

        def both(weight=weight):
            loss_cls, loss_mmd = losses(where)
            return loss_cls + weight * loss_mmd

        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = directional_slope(parameter, direction, both)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_mmd_loss_averages_over_pairs_and_features():
    generator = torch.Generator().manual_seed(8)
    features = [torch.randn(6, 5, generator=generator) for _ in range(2)]
    expected = []
    for feature in features:
        one, two, three = F.normalize(feature, dim=-1).split(2)
        for a, b in ((one, two), (one, three), (two, three)):
            expected.append(common.mmd2(a, b).item())
    found = headpurify.mmd_loss(features, sources=3).item()
    assert found == pytest.approx(np.mean(expected), rel=1e-6)
    with pytest.raises(common.InputError, match="two are needed"):
        headpurify.mmd_loss(features, sources=1)


STRATEGIES = {
    "joint": "wg wg wg wg wg wg",
    "alternating": "w g w g w g",
    "two-stage": "w w w g g g",
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies(strategy):
    trained = []
    for step in range(1, 7):
        trained.append("".join(headpurify.trained_now(strategy, step, 6, ["w"], ["g"])))
    assert trained == STRATEGIES[strategy].split()
    # gates alone are always trained
    assert headpurify.trained_now(strategy, 4, 6, [], ["g"]) == ["g"]


@pytest.mark.parametrize("heads, width", [(6, 96), (12, 768)])
def test_matched_lora_has_as_many_parameters(heads, width):
    mha = nn.MultiheadAttention(width, heads, batch_first=True)
    counts = {}
    for adapter, lora_rank in (("ha-lora", "same"), ("lora", "match"), ("lora", "double")):
        row = SimpleNamespace(adapter=adapter, lora_rank=lora_rank, rank=2, last_rank=8)
        count = 0
        for rank in headpurify.lora_ranks(row, heads):
            layer = HeadPurifiedAttention(mha, rank, adapter == "ha-lora")
            count += sum(p.numel() for p in layer.lora_parameters())
        counts[lora_rank] = count
    assert counts["match"] == counts["same"]
    assert counts["double"] == 2 * 2 * (2 + 8) * 2 * width < counts["match"]


# ---------- What heads do ------------------------------------------------------------------------
def test_silenced_heads_and_their_importance():
    """A silenced head is one whose gate is 0; importance by hand."""
    visual = small_clip(heads=3, width=12, layers=2).visual
    class_features = F.normalize(torch.randn(4, 32), dim=-1)
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0])

    def loss(tower):
        logits = 10 * F.normalize(tower(images), dim=-1) @ class_features.T
        return F.cross_entropy(logits, labels).item()

    found = heads.head_importance(visual, class_features, 10, images, labels)
    for layer, head in np.ndindex(2, 3):
        silenced, gated = copy.deepcopy(visual), copy.deepcopy(visual)
        heads.silence(silenced, layer, head)
        gates = torch.ones(3)
        gates[head] = 0
        purify(gated, 0, 0)[layer].gates = gates.clone
        assert torch.allclose(silenced(images), gated(images), atol=1e-6)
        expected = loss(gated) - loss(visual)
        assert found[layer, head].item() == pytest.approx(expected, abs=1e-5)


def test_greedy_order_drops_what_is_best_to_drop_each_time():
    """Beside a loop that drops every head left in turn, with gates of 0 as the drop."""
    visual = small_clip(heads=3, width=12, layers=2).visual
    torch.manual_seed(2)
    class_features = F.normalize(torch.randn(4, 32), dim=-1)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 4
    found = heads.greedy_order(visual, 4, class_features, 10, images, labels).tolist()
    dropped = []
    for _ in range(4):
        losses = {}
        for place in set(range(6)) - set(dropped):
            gated = copy.deepcopy(visual)
            layers = purify(gated, 0, 0)
            for layer in range(2):
                gates = torch.ones(3)
                for other in [*dropped, place]:
                    if other // 3 == layer:
                        gates[other % 3] = 0
                layers[layer].gates = gates.clone
            logits = 10 * F.normalize(gated(images), dim=-1) @ class_features.T
            losses[place] = F.cross_entropy(logits, labels).item()
        dropped.append(min(losses, key=losses.get))
    assert found == dropped


def test_cls_attention_is_softmax_of_query_and_key():
    visual, images = small_clip(heads=3, width=12, layers=2).visual, torch.randn(2, 3, 32, 32)
    seen = []
    for block in visual.transformer.resblocks:
        block.ln_1.register_forward_hook(lambda module, args, output: seen.append(output))
    visual(images)
    inputs = tuple(seen)  # of this pass alone
    found = heads.cls_attention(visual, images)  # (layers, B, H, patches)
    for layer, z in enumerate(inputs):
        mha = visual.transformer.resblocks[layer].attn
        qkv = F.linear(z, mha.in_proj_weight, mha.in_proj_bias)
        q, k, _ = qkv.unflatten(-1, (3, 3, 4)).unbind(2)  # (B, N, H, d)
        scores = torch.einsum("bhd,bnhd->bhn", q[:, 0], k) / 4**0.5
        assert torch.allclose(found[layer], scores.softmax(-1)[..., 1:], atol=1e-6)


# ---------- Commands -----------------------------------------------------------------------------
def record_of(folder):
    (path,) = folder.glob("runs/**/result.json")
    return json.loads(path.read_text())


def test_learned_prompt_classifies(small_world):
    """CoOp fits the sources better than the template, and learns the same from the same seed."""
    clip = common.load_clip("tiny")
    domains = common.load_domains("tiny-pacs", seed=1001)
    task = common.leave_one_out(domains, "sketch")
    task = task.transformed(clip.preprocess, clip.preprocess)
    row = SimpleNamespace(workers=0, batch_size=12, context=4, templates=["a {}."])
    accuracy = {}
    for row.prompt in ("templates", "coop"):
        class_features = headpurify.prompt_features(clip, task, row, seed=0)
        assert class_features.shape == (7, 64)
        assert torch.allclose(class_features.norm(dim=-1), torch.ones(7))
        again = headpurify.prompt_features(clip, task, row, seed=0)
        assert torch.equal(class_features, again)
        classify = common.clip_classifier(clip.visual, class_features)
        accuracy[row.prompt] = common.evaluate(classify, {"train": task.train})["train"]
    assert accuracy["coop"] > accuracy["templates"] + 0.03


def files(folder):
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    """As from a signal."""


@pytest.fixture
def small_samples(monkeypatch):
    """What heads are worth is looked up on a few images."""
    sample = headpurify.source_sample
    monkeypatch.setattr(headpurify, "source_sample", lambda *rest: sample(*rest[:-1], 2))


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes(
    call_main, small_world, small_samples, tmp_path, monkeypatch
):
    """Killed after its second row and again inside the last: every file is that of a whole run."""
    arguments = "--modes zero-shot lora ha-lora+dig --epochs 1 --batch-size 28 --figures --output"
    call_main(headpurify.main, f"{arguments} whole")
    train, add, save = headpurify.train, common.Run.add, np.savez

    def kill_after_lora(run, row, measures):
        add(run, row, measures)
        if row == "lora":
            raise Killed

    def kill(*_, **numbers):
        raise Killed

    def no_lora(clip, class_features, task, row, *more):
        assert row.name != "lora"
        return train(clip, class_features, task, row, *more)

    monkeypatch.setattr(common.Run, "add", kill_after_lora)
    with pytest.raises(Killed):
        call_main(headpurify.main, f"{arguments} parts")
    monkeypatch.setattr(common.Run, "add", add)
    monkeypatch.setattr(headpurify, "train", no_lora)
    monkeypatch.setattr(np, "savez", kill)
    with pytest.raises(Killed):
        call_main(headpurify.main, f"{arguments} parts --resume")
    monkeypatch.setattr(np, "savez", save)
    call_main(headpurify.main, f"{arguments} parts --resume")

    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert set(whole) == set(parts)
    for name in whole:
        assert whole[name].read_bytes() == parts[name].read_bytes(), name
    names = {path.name for path in whole}
    assert names >= {"gates.png", "analysis.npz", "result.json"}
    (path,) = [path for name, path in whole.items() if name.name == "analysis.npz"]
    numbers = np.load(path)
    assert numbers["importance"].shape == numbers["gates"].shape == (6, 6)
    assert numbers["attention CLIP"].shape[:3] == (6, 8, 6)


def test_study_writes_tables_and_figures(call_main, small_world, tmp_path):
    """Every row of a study goes through one training; what L_MMD reaches changes what is learnt."""
    arguments = "--study mmd-target --epochs 1 --batch-size 14 --lr 0.03 --gate-lr 0.5"
    out = call_main(headpurify.main, arguments)
    rows = headpurify.STUDIES["mmd-target"]
    record = record_of(tmp_path)
    assert list(record["rows"]) == rows
    stem = "headpurify-mmd-target-tiny-pacs"
    written = {file.name for file in (tmp_path / "results").iterdir()}
    assert written == {f"{stem}.json", f"{stem}.png", f"{stem}-interference.png"}
    for row in rows[1:]:
        targets = [found["target"] for found in record["extra"][row]["history"]]
        assert record["rows"][row]["target, last"] == targets[-1]
        assert record["rows"][row]["target, oracle"] == max(targets)
    gates = {json.dumps(record["extra"][row]["gates"]) for row in rows[1:]}
    assert len(gates) == len(rows) - 1
    assert all(out.count(row) >= 2 for row in rows)

    again = call_main(headpurify.main, arguments + " --resume")
    assert "--resume: found" in again and "ms a step" not in again  # nothing was trained
    table = out[out.index("tiny-pacs, 1 run") :]
    assert table == again[again.index("tiny-pacs, 1 run") :]
    error = call_main(headpurify.main, arguments + " --resume --alpha 3")
    assert "other settings" in error and "alpha" in error


@pytest.mark.slow
def test_drop_heads(call_main, small_world, small_samples, tmp_path):
    """Every order starts at the undisturbed model, and stops also where the hand stopped."""
    out = call_main(headpurify.main, "--study drop-heads --epochs 1 --batch-size 40 --drop 6.2 1.1")
    record = record_of(tmp_path)
    drop = record["extra"]["drop"]
    assert list(drop) == [
        "random",
        "by hand",
        "ranked on sources",
        "greedy on sources",
        "gates on frozen CLIP",
        "adapt and drop",
    ]
    assert drop["greedy on sources"]["dropped"] == [0, 2, 3, 7]
    # both begin with the head whose loss the sources miss least
    assert drop["ranked on sources"]["hold-out"][0] == drop["greedy on sources"]["hold-out"][0]
    assert drop["by hand"]["dropped"] == [0, 2]
    assert drop["random"]["dropped"] == [0, 2, 3, 7, 10, 14, 17, 20, 24, 27]
    for test in ("hold-out", "target"):
        table = out[out.index(f"{test}, %, heads dropped:") :].split("\n\n")[0]
        lines = {line[:20].strip(): line[20:].split() for line in table.splitlines()}
        assert lines["by hand"][2:] == ["-"] * 8
        for order, row in (("random", "zero-shot"), ("adapt and drop", "ha-lora+dig")):
            accuracies = drop[order][test]
            assert accuracies[0] == pytest.approx(record["rows"][row][test])
            assert lines[order] == [f"{100 * accuracy:.1f}" for accuracy in accuracies]


def test_class_features_from_a_file(call_main, small_world, tmp_path):
    """Those of the default prompt, scaled and from a file, give its accuracies."""
    classes, *_ = common.TINY_BENCHMARKS["tiny-pacs"]
    class_features = common.load_clip("tiny").class_features(classes)
    np.save(tmp_path / "own.npy", 3 * class_features.numpy())
    rows = "zero-shot/prompt=file zero-shot"
    call_main(headpurify.main, f"--modes {rows} --class-features own.npy")
    found = record_of(tmp_path)["rows"]
    assert found["zero-shot/prompt=file"] == found["zero-shot"]


def test_prompt_study_takes_a_file_where_one_is_given(call_main, monkeypatch):
    rows = {}
    for more in ("", " --class-features features.npy"):
        arguments = f"headpurify.py --study prompts{more}"
        monkeypatch.setattr("sys.argv", arguments.split())
        rows[more] = list(headpurify.settings().rows)
    without, given = rows.values()
    assert given == ["zero-shot/prompt=file", "ha-lora+dig/prompt=file", *without]
    assert len(without) == 6


def test_a_training_that_was_cut_off_goes_on_exactly(call_main, small_world, tmp_path, monkeypatch):
    """In the middle of its second epoch: it goes on after the first, and ends with the same bytes.

    With other processes that read, and augmented files, see test_clipood.py.
    """
    line = "--modes zero-shot ha-lora+dig --epochs 3 --batch-size 7"
    call_main(headpurify.main, f"{line} --output quiet")
    own, calls = common.Steps.take, []

    def power_cut(*args):
        calls.append(args)
        if len(calls) == 6:
            raise common.InputError("power cut")
        own(*args)

    with monkeypatch.context() as patched:
        patched.setattr(common.Steps, "take", power_cut)
        assert "power cut" in call_main(headpurify.main, f"{line} --output cut")
    calls.clear()
    monkeypatch.setattr(common.Steps, "take", lambda *args: (calls.append(args), own(*args)))
    call_main(headpurify.main, f"{line} --output cut --resume")
    assert len(calls) == 8  # of 12 steps
    (folder,) = (tmp_path / "quiet" / "headpurify").iterdir()
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert files
    for file in files:
        again = tmp_path / "cut" / "headpurify" / folder.name / file
        assert again.read_bytes() == (folder / file).read_bytes(), file
