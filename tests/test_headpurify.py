"""Head purification against explicit loops, finite differences and the equality of two ways."""

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
    """The paper's formulas, one gated head at a time; row vectors, z @ W. Returns: (B, N, H d)."""
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
    return torch.cat(outputs, -1)


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
    expected = layer.mha.out_proj(loop_over_heads(layer, z))
    assert torch.allclose(layer(z)[0], expected, atol=1e-12)


@pytest.mark.parametrize("heads, width", [(6, 96), (12, 768)])
def test_parameters_of_adapters(heads, width):
    """A projection has r (H D + D) numbers in HA-LoRA and r (D + D) in LoRA."""
    mha = nn.MultiheadAttention(width, heads, batch_first=True)
    counts = {}
    for adapter, lora_rank in (("ha-lora", "same"), ("lora", "match"), ("lora", "double")):
        row = SimpleNamespace(adapter=adapter, lora_rank=lora_rank, rank=2, last_rank=8)
        count = 0
        for rank in headpurify.lora_ranks(row, heads):
            layer = HeadPurifiedAttention(mha, rank, adapter == "ha-lora")
            count += sum(p.numel() for p in layer.lora_parameters())
        counts[lora_rank] = count
    assert counts["same"] == 2 * (2 + 8) * (heads * width + width)
    assert counts["match"] == counts["same"]
    assert counts["double"] == 2 * 2 * (2 + 8) * (width + width)


def test_other_towers_are_refused():
    resnet = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(common.InputError, match="Sequential"):
        purify(resnet)


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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.02), (torch.bfloat16, 0.15)])
def test_bf16_sees_what_gates_learn_at_first(dtype, tolerance):
    """In bf16 a gate of 1.001 changes the output as much as it does in float32; tokens that come
    in bf16 go on in bf16, half the memory, and carry the change on average."""
    layer = HeadPurifiedAttention(attention().float(), rank=0)
    torch.manual_seed(0)
    z = torch.randn(512, 17, 24)
    changes = []
    for precision, tokens in (("fp32", z), ("bf16", z.to(dtype))):
        outputs = []
        for gate in (1.0, 1.001):
            layer.gates = torch.full((6,), gate).clone
            with torch.no_grad(), common.autocast("cpu", precision):
                output, _ = layer(tokens)
            assert output.dtype == tokens.dtype
            outputs.append(output.float())
        changes.append(outputs[1] - outputs[0])
    expected, found = changes
    share = (found * expected).sum() / expected.square().sum()
    assert share.item() == pytest.approx(1, abs=tolerance)


# ---------- Which loss trains what ---------------------------------------------------------------
PAIRS = ((0, 1), (0, 2), (1, 2))
BANDWIDTHS = [0.3, 1.0]


@pytest.fixture
def batch():
    """Images of three domains, one after another, their labels, and class features."""
    generator = torch.Generator().manual_seed(5)
    options = {"generator": generator, "dtype": torch.float64}
    images = torch.randn(9, 3, 32, 32, **options)
    class_features = F.normalize(torch.randn(4, 32, **options), dim=-1)
    return images, torch.arange(9) % 4, class_features


@pytest.fixture
def visual():
    """A small purified tower in float64."""
    visual = small_clip(heads=3, width=12, layers=2).double().visual
    randomize(purify(visual, rank=2, last_rank=2))
    return visual


def slow_losses(visual, images, labels, class_features, where):
    """L_cls, and MMD^2 averaged over every pair of three domains and every layer, one by one."""
    with headpurify.recorded(visual, where) as record:
        embedding = visual(images)
    logits = 10 * F.normalize(embedding, dim=-1) @ class_features.T
    distances = []
    for feature in [tokens[:, 0] for tokens in record] or [embedding]:
        domains = F.normalize(feature, dim=-1).split(3)
        for a, b in PAIRS:
            distances.append(common.mmd2(domains[a], domains[b], BANDWIDTHS))
    return F.cross_entropy(logits, labels), torch.stack(distances).mean()


@pytest.mark.parametrize("where", ["output", "layers", "heads"])
def test_losses_of_a_batch(visual, batch, where):
    expected = slow_losses(visual, *batch, where)
    found = headpurify.losses(visual, *batch[:2], batch[2].float(), 10, 3, where, BANDWIDTHS)
    for loss, slow in zip(found, expected):
        assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    loss_cls, none = headpurify.losses(visual, *batch[:2], batch[2].float(), 10, 3, None)
    assert loss_cls == found[0] and none == 0


def test_heads_that_mmd_compares_are_those_of_the_loop(visual, batch):
    inputs, layers = [], []
    for block in visual.transformer.resblocks:
        block.ln_1.register_forward_hook(lambda module, args, output: inputs.append(output))
        layers.append(block.attn)
    with headpurify.recorded(visual, "heads") as record:
        visual(batch[0])
    assert len(record) == 2
    for layer, z, heads in zip(layers, inputs, record):
        assert torch.allclose(heads, loop_over_heads(layer, z), atol=1e-12)


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
def test_gradient_routing(visual, batch, where, mmd_grad):
    """What L_MMD reaches has the gradient of L_cls + alpha L_MMD, the rest that of L_cls."""
    layers = [block.attn for block in visual.transformer.resblocks]
    lora = [p for layer in layers for p in layer.lora_parameters()]
    gates = [layer.gate_logits for layer in layers]
    trained = lora + gates
    reached = {"none": [], "lora": lora, "gates": gates, "both": trained}[mmd_grad]
    loss_cls, loss_mmd = slow_losses(visual, *batch, where)
    headpurify.route_gradients(loss_cls, loss_mmd, trained, reached, alpha=0.7)
    found = [p.grad.clone() for p in trained]
    loss_cls, _ = slow_losses(visual, *batch, where)
    headpurify.route_gradients(loss_cls, None, trained, [], alpha=0.7)
    generator = torch.Generator().manual_seed(3)
    for parameter, gradient in zip(trained, found):
        weight = 0.7 * any(parameter is other for other in reached)
        if weight:
            assert not torch.allclose(parameter.grad, gradient, rtol=1e-3)
        else:  # L_MMD goes nowhere else
            assert torch.equal(parameter.grad, gradient)

        def both(weight=weight):
            loss_cls, loss_mmd = slow_losses(visual, *batch, where)
            return loss_cls + weight * loss_mmd

        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = directional_slope(parameter, direction, both)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_mmd_needs_two_domains():
    with pytest.raises(common.InputError, match="two are needed"):
        headpurify.mmd_loss([torch.ones(6, 5)], sources=1)


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


@pytest.mark.parametrize("model, tests", [("tiny", ["hold-out", "target"]), ("RN", ["hold-out"])])
def test_validation_watches_the_target_only_with_the_tiny_clip(model, tests):
    visual = tower("tiny")
    images = common.ImageSet(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.zeros(3), ("a",))
    task = common.Task(("a",), {}, {"hold-out": {"a": images}, "target": {"b": images}})
    row = SimpleNamespace(model=model, precision="fp32", device="cpu", workers=0)
    for training in (False, True):
        visual.train(training)
        assert list(headpurify.validate(visual, torch.eye(1, 64), task, row)) == tests
        assert visual.training == training  # it goes on in the mode it was in


# ---------- The command --------------------------------------------------------------------------
def test_the_target_never_chooses(call_main, monkeypatch, tmp_path):
    """What was first best on the source hold-outs is kept; what L_MMD trains changes the gates."""
    classes, *_ = common.TINY_BENCHMARKS["tiny-pacs"]
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (classes, 3, 2))
    rows = "ha-lora+dig/mmd-grad=none", "ha-lora+dig/mmd-grad=both", "ha-lora+dig"
    arguments = "--epochs 2 --batch-size 8 --lr 0.01 --gate-lr 0.5 --modes"
    call_main(headpurify.main, f"{arguments} {' '.join(rows)}")
    (path,) = tmp_path.glob("runs/**/result.json")
    record = json.loads(path.read_text())
    earlier = 0
    for row in rows:
        found, history = record["rows"][row], record["extra"][row]["history"]
        targets = [point["target"] for point in history]
        assert [point["step"] for point in history] == [2, 4]
        assert found["target, last"] == targets[-1]
        assert found["target, oracle"] == max(targets)
        best = max(history, key=lambda point: point["hold-out"])
        earlier += best["target"] != targets[-1]
        assert found["hold-out"] == pytest.approx(best["hold-out"])
        assert found["target"] == pytest.approx(best["target"])
    assert earlier
    gates = {json.dumps(record["extra"][row]["gates"]) for row in rows}
    assert len(gates) == len(rows)
