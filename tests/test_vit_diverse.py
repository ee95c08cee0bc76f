"""Diverse heads against slow loops, finite differences and networks put together in other ways."""

import functools
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import write_image
from torch import nn

import common
import vit_diverse
from support import tiny_world
from vit_diverse import DiverseViT, collect_heads, head_subsets, headwise, select_heads


def small(heads=3, dtype=torch.float32, dim=12, dim_head=5, seed=0):
    torch.manual_seed(seed)
    return DiverseViT((8, 12), 4, 3, dim, 2, heads, 16, dim_head=dim_head).to(dtype).eval()


def row_of(line="--modes div+sel"):
    """The settings of the last row of a command."""
    *_, row = vit_diverse.settings(line.split())[1].values()
    return row


# ---------- The regulariser ----------------------------------------------------------------------
def regulariser(model, images, **options):
    inputs = model.head_inputs(images)
    logits = model.logits(model.head_outputs(inputs))
    return vit_diverse.input_gradient_loss(logits, inputs, **options)


def full_attention_logits(model, x, inputs_of_head=None):
    """The network's end, written plainly: attention of all tokens to all tokens, head by head, from
    normalised tokens x (B, N, D). inputs_of_head: {i: tokens} that head i reads instead."""
    last, parts = model.last, []
    d = last.qkv.weight.shape[0] // (3 * last.heads)
    weights = last.qkv.weight.split(d)  # of q for all heads, then of k, then of v
    for i in range(last.heads):
        tokens = (inputs_of_head or {}).get(i, x)
        q, k, v = (F.linear(tokens, weight) for weight in weights[i :: last.heads])
        parts.append(torch.softmax(q @ k.mT / d**0.5, -1) @ v)
    x = last.out(torch.cat(parts, -1))
    x = x + last.mlp(last.mlp_norm(x))
    return model.classifier(x[:, 0])


def slow_gradients(model, images):
    """One autograd call for every head: (H, B, N, D)."""
    x = model.last.norm(model.trunk(images))
    gradients = []
    for i in range(model.last.heads):
        copy = x.clone()
        score = full_attention_logits(model, x, {i: copy}).max(1).values.sum()
        gradients += torch.autograd.grad(score, copy, create_graph=True)
    return torch.stack(gradients)


def slow_loss(model, images, normalize, reduce):
    """Products pair by pair and token by token."""
    gradients = slow_gradients(model, images)
    H, B, N, _ = gradients.shape
    total = 0.0
    for b, n, i, j in itertools.product(range(B), range(N), range(H), range(H)):
        if i != j:
            a, c = gradients[i, b, n], gradients[j, b, n]
            if normalize == "token":
                a, c = a / a.norm(), c / c.norm()
            total = total + (a @ c) ** 2 / N / B
    return total / H**2 if reduce == "mean" else total


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("normalize", ["token", "none"])
def test_regulariser_is_the_slow_loop_over_heads(normalize, reduce):
    """So are the heads' input gradients, and its own gradient in every parameter."""
    model, images = small(dtype=torch.float64), torch.rand(2, 3, 8, 12, dtype=torch.float64)
    inputs = model.head_inputs(images)
    logits = model.logits(model.head_outputs(inputs))
    together = vit_diverse.input_gradients(logits, inputs)
    assert torch.allclose(together, slow_gradients(model, images), atol=1e-12)
    fast = regulariser(model, images, normalize=normalize, reduce=reduce)
    slow = slow_loss(model, images, normalize, reduce)
    assert slow.item() > 1e-8 and fast.item() == pytest.approx(slow.item(), rel=1e-9)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(x, parameters, materialize_grads=True) for x in (fast, slow)]
    for gradient, expected in zip(*gradients):
        assert torch.allclose(gradient, expected, rtol=1e-7, atol=1e-12)


def test_regulariser_is_zero_for_separate_coordinates_and_largest_for_equal_heads():
    model, images = small(heads=3, dim_head=4), torch.rand(2, 3, 8, 12)
    weight = model.last.qkv.weight.data.view(3, 3, 4, 12)  # (q k v, H, d, D)
    for i in range(3):
        weight[:, i, :, [c for c in range(12) if c // 4 != i]] = 0
    assert regulariser(model, images).item() == 0
    assert vit_diverse.head_cosine(model, images) == 0
    weight[:] = weight[:, :1].clone()
    model.last.out.weight.data = model.last.out.weight.data[:, :4].repeat(1, 3)
    largest = 6 / 9  # all cosines of 3 x 2 pairs are 1
    assert regulariser(model, images).item() == pytest.approx(largest, rel=1e-5)
    assert vit_diverse.head_cosine(model, images) == pytest.approx(1, rel=1e-5)


# ---------- The network --------------------------------------------------------------------------
def test_published_network_has_129_tokens_and_506306_parameters():
    model = DiverseViT((64, 32), 4, 2, dim=64, depth=6, heads=4, mlp_dim=128)
    norm = 2 * 64
    layer = norm + 64 * 3 * 4 * 64 + (4 * 64 * 64 + 64) + norm + (64 * 128 + 128) + (128 * 64 + 64)
    embedding = (4 * 4 * 3 * 64 + 64) + 64 + 129 * 64
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == embedding + 6 * layer + norm + (64 * 2 + 2) == 506_306
    assert model.head_inputs(torch.rand(2, 3, 64, 32)).shape == (4, 2, 129, 64)


def test_class_token_query_is_full_attention():
    model = small(heads=4, dtype=torch.float64)
    images = torch.rand(5, 3, 8, 12, dtype=torch.float64)
    expected = full_attention_logits(model, model.last.norm(model.trunk(images)))
    assert torch.allclose(model(images), expected, atol=1e-12)


def test_masks():
    model, images = small(heads=4), torch.rand(2, 3, 8, 12)
    heads = model.head_outputs(model.head_inputs(images))  # (B, H, d)
    assert torch.equal(model(images, torch.ones(4)), model(images))
    masks = torch.tensor([[0.0, 1, 0, 1], [1, 1, 0, 1]])  # one for each image
    scales = torch.tensor([[0, 2, 0, 2], [4 / 3, 4 / 3, 0, 4 / 3]])  # 4 heads / heads in use
    expected = model.logits(heads * scales[..., None])
    assert torch.allclose(model(images, masks), expected, atol=1e-6)
    assert torch.allclose(model(images[:1], masks[0]), expected[:1], atol=1e-6)


def test_torchvision_network_keeps_its_layers_but_for_the_residual_path():
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(32, 8, 3, num_heads=4, hidden_dim=48, mlp_dim=64)
    network.eval()
    # zero in a new network, not in a trained one
    nn.init.normal_(network.encoder.layers[-1].self_attention.in_proj_bias)
    nn.init.normal_(network.encoder.pos_embedding)
    changed, images = headwise(network, 2), torch.rand(3, 3, 32, 32)
    x = torch.cat([network.class_token.expand(3, -1, -1), network._process_input(images)], 1)
    x = x + network.encoder.pos_embedding
    *layers, last = network.encoder.layers
    for layer in layers:
        x = layer(x)
    x = last.ln_1(x)
    x = last.self_attention(x, x, x)[0]
    x = network.encoder.ln(x + last.mlp(last.ln_2(x)))[:, 0]
    assert torch.allclose(changed(images), changed.classifier[1](x), atol=1e-5)
    assert len(list(changed.parameters())) == len(list(network.parameters()))  # nothing doubled


def test_clip_tower_keeps_its_layers_but_for_the_residual_path():
    visual = common.load_clip("tiny").visual
    changed, images = headwise(visual, 2), torch.rand(3, 3, 32, 32)
    *layers, last = visual.transformer.resblocks
    x = visual._embeds(images)
    for layer in layers:
        x = layer(x)
    x = last.ln_1(x)
    x = last.attn(x, x, x)[0]
    x = visual.ln_post((x + last.mlp(last.ln_2(x)))[:, 0])
    assert torch.allclose(changed(images), changed.classifier[1](x), atol=1e-5)
    assert not any(p.requires_grad for p in visual.parameters())
    assert all(p.requires_grad for p in changed.parameters())
    with pytest.raises(common.InputError, match="needs a ViT with a class token, not a Identity"):
        headwise(nn.Identity(), 2)


# ---------- Selection ----------------------------------------------------------------------------
def test_subsets_are_all_and_the_larger_ones_come_first():
    masks = head_subsets(5)
    assert len(masks) == 31 and len({tuple(mask.tolist()) for mask in masks}) == 31
    sizes = masks.sum(1).tolist()
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1


def small_set():
    labels, places = torch.arange(40) % 2, torch.arange(40) // 2 % 2
    pixels = 255 * torch.rand(40, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    return common.ImageSet(pixels.to(torch.uint8), labels, ("a", "b"), 2 * labels + places)


def test_selection_equals_running_the_whole_network_with_every_mask():
    model, images = small(heads=4, seed=3), small_set()
    heads, masks = collect_heads(model, images, row_of()), head_subsets(4)
    hits = vit_diverse.subset_hits(model, heads, images.labels, masks)
    accuracies = []
    with torch.no_grad():
        for mask, correct in zip(masks, hits):
            logits = model(images.images.float() / 255, mask)
            assert torch.equal(logits.argmax(1) == images.labels, correct)
            accuracies.append(correct.double().mean().item())
    chosen, scores = select_heads(model, heads, images.labels)
    assert scores.tolist() == accuracies
    assert torch.equal(chosen, masks[np.argmax(accuracies)])
    by_group = [hits[:, images.groups == group].double().mean(1) for group in range(4)]
    chosen, scores = select_heads(model, heads, images.labels, images.groups)
    assert torch.equal(scores, torch.stack(by_group).amin(0))
    assert scores[(masks == chosen).all(1)] == scores.max()


def test_published_rule_takes_the_best_epoch_and_head_for_each_kind():
    """In the authors' logs: 62.71 and 64.58 for ERM and DIV, the best epoch on OOD validation."""

    def accuracies(*values):
        return dict(zip(("val_id", "test_id", "val_ood", "test_ood"), values))

    first = {"all heads": accuracies([0.5], [0.11], [0.7], [0.12])}
    first["single heads"] = accuracies([0.9, 0.6], [0.1, 0.2], [0.5, 0.6], [0.3, 0.4])
    second = {"all heads": accuracies([0.6], [0.13], [0.4], [0.14])}
    second["single heads"] = accuracies([0.7, 0.8], [0.5, 0.6], [0.95, 0.2], [0.7, 0.8])
    selected = vit_diverse.published_rule([first, second], selected=True)
    assert selected == {"published id": 0.1, "published ood": 0.7}
    all_heads = vit_diverse.published_rule([first, second], selected=False)
    assert all_heads == {"published id": 0.13, "published ood": 0.12}


@pytest.fixture
def few_images(monkeypatch):
    for name in ("draw_digits_and_vehicles", "draw_waterbirds"):
        draw = functools.partial(getattr(tiny_world, name), sizes=(60, 40, 50))
        monkeypatch.setattr(tiny_world, name, draw)


def test_heads_are_chosen_on_val_ood_alone(few_images):
    sets, row = common.load_parts("tiny-mnist-cifar", seed=5), row_of()
    torch.manual_seed(0)
    model = DiverseViT((32, 16), 4, 2, 16, 2, 4, 16, dim_head=4).eval()
    with torch.no_grad():  # an untrained network that does not answer the same to every image
        model.classifier[1].bias -= model(sets["val_ood"].images.float() / 255).mean(0)

    def evaluate():
        heads = {name: collect_heads(model, images, row) for name, images in sets.items()}
        metrics, extra = vit_diverse.evaluate_row(row, model, heads, sets, None, 0)
        return metrics["ood"], extra["heads"]

    ood, chosen = evaluate()
    for name in ("train", "val_id", "test_id", "test_ood"):  # wrong labels change no choice
        sets[name].labels = 1 - sets[name].labels
    turned, again = evaluate()
    assert again == chosen and turned == pytest.approx(1 - ood)
    sets["val_ood"].labels = 1 - sets["val_ood"].labels
    assert evaluate()[1] != chosen


# ---------- Data sets ----------------------------------------------------------------------------
def write_idx(path, values):
    """MNIST's raw format."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(header + values.tobytes())


@pytest.fixture
def mnist_and_cifar(tmp_path, monkeypatch):
    """A few images in torchvision's layouts, each a grey of its own, whose digit is grey % 4."""
    raw, folder = tmp_path / "MNIST" / "raw", tmp_path / "cifar-10-batches-py"
    raw.mkdir(parents=True)
    folder.mkdir()
    for part, numbers in (("train", range(60)), ("t10k", range(60, 100))):
        greys = np.array(numbers, np.uint8)
        write_idx(raw / f"{part}-images-idx3-ubyte", np.tile(greys[:, None, None], (28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", greys % 4)
    labels = [(1, 9, 3, 5)[i % 4] for i in range(40)]  # 1: automobile, 9: truck
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        greys = np.arange(40 * number, 40 * number + 40, dtype=np.uint8)
        pixels = np.broadcast_to(greys[:, None], (40, 3072))
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    # torchvision compares checksums with those of the real files
    cifar = torchvision.datasets.cifar
    monkeypatch.setattr(cifar.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
    return tmp_path


def test_mnist_cifar_from_torchvision_files(mnist_and_cifar):
    sets = common.load_parts("mnist-cifar", mnist_and_cifar, seed=3)
    sizes = {name: len(images) for name, images in sets.items()}
    # 20 vehicles to test with, 20 / 80
    assert sizes == {"train": 100, "val_id": 4, "test_id": 16, "val_ood": 4, "test_ood": 16}
    greys = {}
    for part, images in sets.items():
        top, bottom = images.images[:, :, :32], images.images[:, :, 32:]
        assert images.images.shape[1:] == (3, 64, 32)
        assert top[:, :, :2].max() == 0 and top[:, :, :, 30:].max() == 0
        vehicles, digits = bottom[:, 0, 0, 0].long(), top[:, 0, 16, 16].long()
        assert torch.equal(vehicles % 4, images.labels)
        assert torch.equal(digits % 4, images.groups % 2)
        assert torch.equal(images.groups // 2, images.labels)
        greys[part] = {*vehicles.tolist()}, {*digits.tolist()}
    for validation, test in itertools.product(("val_id", "val_ood"), ("test_id", "test_ood")):
        for kind in (0, 1):  # neither a vehicle nor a digit is in both
            assert not greys[validation][kind] & greys[test][kind]


def test_waterbirds_id_accuracy_counts_groups_as_training_does(few_images):
    sets, weights = common.load_id_and_ood("tiny-waterbirds", cue=0.8)
    share = torch.bincount(sets["train"].groups) / len(sets["train"])
    groups = sets["test_id"].groups
    hits = torch.rand(len(groups), generator=torch.Generator().manual_seed(0)) < 0.7
    by_group = torch.stack([hits[groups == group].float().mean() for group in range(4)])
    expected = (share * by_group).sum().item()
    assert np.average(hits, weights=weights) == pytest.approx(expected, rel=1e-5)


# ---------- Commands -----------------------------------------------------------------------------
@pytest.fixture
def record_of(call_main, tmp_path):
    """The record that a command leaves."""

    def run(line):
        call_main(vit_diverse.main, f"{line} --summary all.json")
        (record,) = json.loads((tmp_path / "all.json").read_text())["records"]
        return record

    return run


def test_the_stored_network_does_what_was_reported(few_images, record_of, tmp_path):
    line = "--dataset tiny-waterbirds --modes div div+sel --epochs 3 --batch-size 10 --div-lr 1e-3"
    record = record_of(f"{line} --seed 3")
    folder = tmp_path / "runs" / "vit_diverse" / "tiny-waterbirds-seed3"
    model, _, preprocess = vit_diverse.build(row_of("--dataset tiny-waterbirds"))
    model.load_state_dict(torch.load(folder / "div.pt", weights_only=True))
    images = common.load_parts("tiny-waterbirds", seed=3)["test"].transformed(preprocess)
    for row in ("div", "div+sel"):
        heads = record["extra"][row]["heads"]
        mask = torch.tensor([float(head in heads) for head in (1, 2, 3, 4, 5, 6)])
        classify = functools.partial(model.eval(), head_mask=mask)
        metrics = common.evaluate(classify, {"test": {"ood": images}})
        assert metrics["test"] == record["rows"][row]["ood"]


@pytest.mark.slow
def test_waterbirds_with_torchvision_from_a_file(record_of, tmp_path):
    folder = tmp_path / "data" / "waterbird_complete95_forest2water2"
    rows = ["img_filename,y,split,place"]
    for split, bird, place, i in itertools.product(range(3), range(2), range(2), range(2)):
        name = f"{split}/{bird}{place}{i}.jpg"
        rows.append(f"{name},{bird},{split},{place}")
        write_image(folder / name, 100 * bird + 50 * place + i)
    (folder / "metadata.csv").write_text("\n".join(rows))
    torch.save(torchvision.models.vit_b_16().state_dict(), tmp_path / "vit.pt")
    line = "--dataset waterbirds --workers 0 --pretrained vit.pt --epochs 1 --batch-size 6"
    record = record_of(f"{line} --modes div")
    assert len(record["extra"]["div"]["robust"]) == 12
