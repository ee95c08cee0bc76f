"""Diverse heads against slow loops, finite differences and networks put together in other ways."""

import argparse
import csv
import functools
import itertools
import json
import pickle

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import common
import vit_diverse
from support.tiny_world import draw_waterbirds
from vit_diverse import (
    DiverseViT,
    collect_heads,
    head_subsets,
    headwise,
    input_gradient_loss,
    input_gradients,
    select_heads,
    subset_hits,
)

ARGS = argparse.Namespace(workers=0, device=torch.device("cpu"), precision="fp32")
ARGS.select_by, ARGS.study, ARGS.selected = "accuracy", None, True


def small(heads=3, depth=2, dtype=torch.float32, dim=12, dim_head=5, seed=0):
    torch.manual_seed(seed)
    return DiverseViT((8, 12), 4, 3, dim, depth, heads, 16, dim_head=dim_head).to(dtype).eval()


def regulariser(model, images, **options):
    inputs = model.head_inputs(images)
    return input_gradient_loss(model.logits(model.head_outputs(inputs)), inputs, **options)


def full_attention_logits(model, x, own=None):
    """The network's end, written plainly: attention of all tokens to all tokens, head by head, from
    normalised tokens x (B, N, D). own: {i: tokens} that head i reads instead."""
    last, parts = model.last, []
    d = last.qkv.weight.shape[0] // (3 * last.heads)
    weights = last.qkv.weight.split(d)  # of q for all heads, then of k, then of v
    for i in range(last.heads):
        read = (own or {}).get(i, x)
        q, k, v = (F.linear(read, weight) for weight in weights[i :: last.heads])
        parts.append(torch.softmax(q @ k.mT / d**0.5, -1) @ v)
    x = last.out(torch.cat(parts, -1))
    x = x + last.mlp(last.mlp_norm(x))
    return model.classifier(x[:, 0])


def slow_loss(model, images, normalize, reduce):
    """One autograd call for every head, products pair by pair and token by token."""
    x = model.last.norm(model.trunk(images))
    H, B, N = model.last.heads, *x.shape[:2]
    gradients = []
    for i in range(H):
        copy = x.clone()
        score = full_attention_logits(model, x, {i: copy}).max(1).values.sum()
        gradients.append(torch.autograd.grad(score, copy, create_graph=True)[0])  # (B, N, D)
    total = 0.0
    for b, n, i, j in itertools.product(range(B), range(N), range(H), range(H)):
        if i != j:
            a, c = gradients[i][b, n], gradients[j][b, n]
            if normalize == "token":
                a, c = a / a.norm(), c / c.norm()
            total = total + (a @ c) ** 2 / N / B
    return total / H**2 if reduce == "mean" else total


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("normalize", ["token", "none"])
def test_regulariser_is_the_slow_loop_over_heads(normalize, reduce):
    model, images = small(dtype=torch.float64), torch.rand(2, 3, 8, 12, dtype=torch.float64)
    fast = regulariser(model, images, normalize=normalize, reduce=reduce)
    slow = slow_loss(model, images, normalize, reduce)
    assert slow.item() > 1e-8 and fast.item() == pytest.approx(slow.item(), rel=1e-9)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(x, parameters, allow_unused=True) for x in (fast, slow)]
    for got, expected in zip(*gradients):  # the keys' part of the last layer, ...
        assert (got is None) == (expected is None)
        assert got is None or torch.allclose(got, expected, rtol=1e-7, atol=1e-12)


def test_one_call_equals_one_call_for_every_head():
    model, images = small(heads=4), torch.rand(5, 3, 8, 12)
    inputs = model.head_inputs(images)
    together = input_gradients(model.logits(model.head_outputs(inputs)), inputs)
    x = model.last.norm(model.trunk(images))
    for i in range(4):
        copy = x.clone()
        score = full_attention_logits(model, x, {i: copy}).max(1).values.sum()
        assert torch.allclose(together[i], torch.autograd.grad(score, copy)[0], atol=1e-6)


def test_regulariser_gradient_against_finite_differences():
    model = small(heads=2, dtype=torch.float64, dim=6, dim_head=3)
    images = torch.rand(3, 3, 8, 12, dtype=torch.float64)
    regulariser(model, images).backward()
    embedding, block = model.trunk
    last = model.last
    for parameter in (last.qkv.weight, last.out.weight, block.qkv.weight, embedding.positions):
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in gradient.abs().topk(3).indices:
            value, losses = flat[index].item(), []
            for step in (1e-6, -1e-6):
                flat[index] = value + step
                losses.append(regulariser(model, images).item())
            flat[index] = value
            slope = (losses[0] - losses[1]) / 2e-6
            assert slope == pytest.approx(gradient[index].item(), rel=1e-4)


def test_regulariser_is_zero_when_heads_read_other_coordinates_and_largest_when_they_are_one():
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


def test_regulariser_refuses_other_options():
    model, images = small(), torch.rand(1, 3, 8, 12)
    with pytest.raises(ValueError, match="'tokens'"):
        regulariser(model, images, normalize="tokens")
    with pytest.raises(ValueError, match="'max'"):
        regulariser(model, images, reduce="max")


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
    plain = full_attention_logits(model, model.last.norm(model.trunk(images)))
    assert torch.allclose(model(images), plain, atol=1e-12)


def test_masks():
    model, images = small(heads=4), torch.rand(5, 3, 8, 12)
    heads = model.head_outputs(model.head_inputs(images))  # (B, H, d)
    assert torch.equal(model(images, torch.ones(4)), model(images))
    mask = torch.tensor([0.0, 1, 0, 1])
    scaled = heads * torch.tensor([0, 2, 0, 2])[:, None]  # 2 = 4 heads / 2 in use
    assert torch.allclose(model(images, mask), model.logits(scaled), atol=1e-6)
    every = [[1.0, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0]]
    every = torch.tensor(every)  # one for each image
    together = model(images, every)
    for i in range(5):
        assert torch.allclose(together[i], model(images[i : i + 1], every[i])[0], atol=1e-5)
    for empty in (torch.zeros(4), every * torch.tensor([1.0, 1, 1, 0, 1])[:, None]):
        with pytest.raises(ValueError, match="keeps no head"):
            model(images, empty)


def test_image_must_be_whole_patches():
    with pytest.raises(ValueError, match=r"\(30, 16\).*patch size 4"):
        DiverseViT((30, 16), 4, 2, 8, 1, 2, 8)


def test_torchvision_network_keeps_its_layers_but_for_the_residual_path():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(32, 8, 3, num_heads=4, hidden_dim=48, mlp_dim=64)
    vit.eval()
    # zero in a new network, not in a trained one
    nn.init.normal_(vit.encoder.layers[-1].self_attention.in_proj_bias)
    nn.init.normal_(vit.encoder.pos_embedding)
    changed, images = headwise(vit, 2), torch.rand(3, 3, 32, 32)
    x = torch.cat([vit.class_token.expand(3, -1, -1), vit._process_input(images)], 1)
    x = x + vit.encoder.pos_embedding
    for layer in vit.encoder.layers[:-1]:
        x = layer(x)
    last = vit.encoder.layers[-1]
    x = last.ln_1(x)
    x = last.self_attention(x, x, x)[0]
    x = vit.encoder.ln(x + last.mlp(last.ln_2(x)))[:, 0]
    assert torch.allclose(changed(images), changed.classifier[1](x), atol=1e-5)
    trained = {id(p) for p in changed.parameters()}
    assert len(trained) == len(list(vit.parameters()))  # a new classifier, nothing lost or doubled


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


def test_other_networks_are_refused():
    with pytest.raises(common.InputError, match="ModifiedResNet"):
        headwise(open_clip.create_model("RN50").visual, 2)


# ---------- Selection ----------------------------------------------------------------------------


def test_subsets_are_all_and_the_larger_ones_come_first():
    masks = head_subsets(5)
    assert len(masks) == 31 and len({tuple(mask.tolist()) for mask in masks}) == 31
    sizes = masks.sum(1).tolist()
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
    for heads in (0, 17):
        with pytest.raises(ValueError, match=str(heads)):
            head_subsets(heads)


def small_set(n=40):
    labels, places = torch.arange(n) % 2, torch.arange(n) // 2 % 2
    pixels = (255 * torch.rand(n, 3, 8, 12, generator=torch.Generator().manual_seed(1))).to(
        torch.uint8
    )
    return common.ImageSet(pixels, labels, ("a", "b"), 2 * labels + places)


def test_selection_equals_running_the_whole_network_with_every_mask():
    model, images = small(heads=4, seed=3), small_set()
    heads, masks = collect_heads(model, images, ARGS), head_subsets(4)
    hits = subset_hits(model, heads, images.labels, masks)
    accuracies = []
    with torch.no_grad():
        for mask, hit in zip(masks, hits):
            logits = model(images.images.float() / 255, mask)
            assert torch.allclose(model.logits(heads, mask), logits, atol=1e-5)
            accuracies.append((logits.argmax(1) == images.labels).double().mean().item())
            assert hit.double().mean().item() == accuracies[-1]
    chosen, scores = select_heads(model, heads, images.labels)
    assert scores.tolist() == accuracies
    best = [mask for mask, accuracy in zip(masks, accuracies) if accuracy == max(accuracies)]
    assert chosen.tolist() == best[0].tolist()
    assert chosen.sum() == max(mask.sum() for mask in best)
    by_group = [hits[:, images.groups == group].double().mean(1) for group in range(4)]
    per_group = torch.stack(by_group)
    chosen, scores = select_heads(model, heads, images.labels, images.groups)
    assert torch.equal(scores, per_group.amin(0))
    assert scores[(masks == chosen).all(1)] == scores.max()


def test_of_equal_subsets_the_larger_is_kept():
    model, images = small(heads=3), small_set()
    nn.init.zeros_(model.classifier[1].weight)  # every subset gives the same answer
    chosen, scores = select_heads(model, collect_heads(model, images, ARGS), images.labels)
    assert chosen.tolist() == [1, 1, 1] and len(scores.unique()) == 1


def test_published_rule_takes_the_best_epoch_and_head_for_each_kind():
    """In the authors' logs: 62.71 and 64.58 for ERM and DIV, the best epoch on OOD validation."""
    single = [
        {
            "val_id": [0.9, 0.6],
            "test_id": [0.1, 0.2],
            "val_ood": [0.5, 0.6],
            "test_ood": [0.3, 0.4],
        },
        {
            "val_id": [0.7, 0.8],
            "test_id": [0.5, 0.6],
            "val_ood": [0.95, 0.2],
            "test_ood": [0.7, 0.8],
        },
    ]
    together = [
        {"val_id": [0.5], "test_id": [0.11], "val_ood": [0.7], "test_ood": [0.12]},
        {"val_id": [0.6], "test_id": [0.13], "val_ood": [0.4], "test_ood": [0.14]},
    ]
    history = [{"single heads": a, "all heads": b} for a, b in zip(single, together)]
    selected = vit_diverse.published_rule(history, selected=True)
    assert selected == {"published id": 0.1, "published ood": 0.7}
    whole = vit_diverse.published_rule(history, selected=False)
    assert whole == {"published id": 0.13, "published ood": 0.12}


@pytest.fixture
def few_images(monkeypatch):
    """Few images in the tiny sets."""
    for name in ("draw_digits_and_vehicles", "draw_waterbirds"):
        draw = functools.partial(getattr(common, name), sizes=(60, 40, 50))
        monkeypatch.setattr(common, name, draw)


def fingerprints(images):
    return {pixels.numpy().tobytes() for pixels in images}


def test_heads_are_chosen_on_val_ood_alone_and_no_image_is_in_two_sets(few_images):
    sets = common.load_parts("tiny-mnist-cifar", seed=5)
    prints = [fingerprints(images.images) for images in sets.values()]
    assert [len(p) for p in prints] == [60, 40, 50, 40, 50]
    assert all(not a & b for a, b in itertools.combinations(prints, 2))
    torch.manual_seed(0)
    model = DiverseViT((32, 16), 4, 2, 16, 2, 4, 16, dim_head=4).eval()
    with torch.no_grad():  # an untrained network that does not answer the same to every image
        model.classifier[1].bias -= model(sets["val_ood"].images.float() / 255).mean(0)

    def tested():
        heads = {name: collect_heads(model, images, ARGS) for name, images in sets.items()}
        measures, extra = vit_diverse.evaluate_row(ARGS, model, heads, sets, None, 0)
        return measures["ood"], extra["heads"]

    ood, chosen = tested()
    for name in ("train", "val_id", "test_id", "test_ood"):  # none of these may have a say
        sets[name].labels = 1 - sets[name].labels
    turned, again = tested()
    assert again == chosen and turned == pytest.approx(1 - ood)
    sets["val_ood"].labels = 1 - sets["val_ood"].labels
    assert tested()[1] != chosen


# ---------- Data sets ----------------------------------------------------------------------------
def write_mnist(folder, part, numbers):
    """torchvision's raw files: images (n, 28, 28) of one grey each, the digit its number % 4."""
    n = len(numbers)
    pixels = np.broadcast_to(numbers.astype(np.uint8)[:, None, None], (n, 28, 28))
    header = bytes([0, 0, 8, 3])
    for size in (n, 28, 28):
        header += size.to_bytes(4, "big")
    (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    labels = bytes([0, 0, 8, 1]) + n.to_bytes(4, "big") + bytes(i % 4 for i in range(n))
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)


@pytest.fixture
def mnist_cifar_root(tmp_path, monkeypatch):
    """Small MNIST and CIFAR-10 files in torchvision's layouts, every image a number of its own."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    write_mnist(raw, "train", np.arange(1, 61))
    write_mnist(raw, "t10k", np.arange(61, 101))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for number, name in enumerate(names):
        greys = np.arange(40 * number, 40 * number + 40).astype(np.uint8)
        pixels = np.broadcast_to(greys[:, None], (40, 3072))
        labels = [(1, 9, 3, 5)[i % 4] for i in range(40)]
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    meta = {"label_names": list("abcdefghij")}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    # torchvision compares checksums with those of the real files
    cifar = torchvision.datasets.cifar
    monkeypatch.setattr(cifar.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
    return tmp_path


def test_mnist_cifar_from_torchvision_files(mnist_cifar_root):
    sets = common.load_parts("mnist-cifar", mnist_cifar_root, seed=3)
    assert list(sets) == ["train", "val_id", "test_id", "val_ood", "test_ood"]
    # 20 vehicles to test with, 20 / 80
    assert [len(images) for images in sets.values()] == [100, 4, 16, 4, 16]
    used = {}
    for part, images in sets.items():
        top, bottom = images.images[:, :, :32], images.images[:, :, 32:]
        assert images.images.shape[1:] == (3, 64, 32)
        assert top[:, :, :2].max() == 0 and top[:, :, :, 30:].max() == 0
        vehicle, digit = bottom[:, 0, 0, 0].long(), top[:, 0, 16, 16].long()
        # 0: automobile, 1: truck; the files hold others too
        assert torch.equal(vehicle % 4, images.labels)
        first = 1 if part == "train" else 61
        assert torch.equal((digit - first) % 4, images.groups % 2)
        assert torch.equal(images.groups // 2, images.labels)
        used[part] = {*vehicle.tolist()}, {*digit.tolist()}
    for kind in ("id", "ood"):
        for validation, test in zip(used[f"val_{kind}"], used[f"test_{kind}"]):
            assert not validation & test  # neither a vehicle nor a digit is in both
        for validation, test in zip(used["val_ood"], used[f"test_{kind}"]):
            assert not validation & test
    again = common.load_parts("mnist-cifar", mnist_cifar_root, seed=3)
    other = common.load_parts("mnist-cifar", mnist_cifar_root, seed=4)
    assert torch.equal(again["train"].images, sets["train"].images)
    assert not torch.equal(other["train"].images, sets["train"].images)


@pytest.fixture
def waterbirds_tree(tmp_path):
    """The released folder's layout with a few drawn birds; groups balanced in val and test."""
    folder = tmp_path / "data" / "waterbird_complete95_forest2water2"
    rows = []
    for number, (part, drawn) in enumerate(few_waterbirds().items()):
        for i, (pixels, group) in enumerate(zip(drawn[0], drawn[2].tolist())):
            name = f"{i % 3:03}.Bird/{part}_{i}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            image.resize((50, 40)).save(folder / name)
            rows.append([len(rows), name, group // 2, number, group % 2])
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["img_id", "img_filename", "y", "split", "place"])
        writer.writerows(rows)
    return tmp_path / "data"


def few_waterbirds():
    return draw_waterbirds(seed=2, cue=0.95, sizes=(24, 16, 16))


def test_waterbirds_folder(waterbirds_tree):
    parts = common.load_parts("waterbirds", waterbirds_tree)
    assert [len(part) for part in parts.values()] == [24, 16, 16]
    drawn = few_waterbirds()
    assert list(parts) == list(drawn)
    for name, part in parts.items():
        _, labels, groups = drawn[name]
        assert torch.equal(part.labels, labels) and torch.equal(part.groups, groups)
        assert all(f"{name}_" in file for file in part.images)


def drop_test_rows(text):
    return "\n".join(line for line in text.splitlines() if ",2," not in line)


DAMAGES = {
    "no metadata.csv": (None, "with columns img_filename"),
    "no column": (lambda text: text.replace("place", "location"), "place"),
    "no test images": (drop_test_rows, "no image"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_waterbirds_folder(waterbirds_tree, damage):
    change, words = DAMAGES[damage]
    file = waterbirds_tree / "waterbird_complete95_forest2water2" / "metadata.csv"
    if change:
        file.write_text(change(file.read_text()))
    else:
        file.unlink()
    with pytest.raises(common.InputError, match=words) as error:
        common.load_parts("waterbirds", waterbirds_tree)
    assert str(waterbirds_tree) in str(error.value)


def test_waterbirds_id_accuracy_counts_groups_as_training_does():
    args = argparse.Namespace(dataset="tiny-waterbirds", data_root="data", cue=0.9, download=False)
    sets, weights = common.load_id_and_ood(args.dataset, args.data_root)
    share = torch.bincount(sets["train"].groups) / len(sets["train"])
    groups = sets["test_id"].groups
    hits = torch.rand(len(groups), generator=torch.Generator().manual_seed(0)) < 0.7
    by_group = torch.stack([hits[groups == group].float().mean() for group in range(4)])
    expected = (share * by_group).sum().item()
    assert np.average(hits, weights=weights) == pytest.approx(expected, rel=1e-5)


# ---------- Commands -----------------------------------------------------------------------------
SMALL = "--epochs 1 --batch-size 20 --depth 2 --dim 16 --dim-head 4 --mlp-dim 16"


def result(folder):
    (file,) = folder.glob("runs/**/result.json")
    return json.loads(file.read_text()), file.parent


def test_the_stored_network_does_what_was_reported(few_images, call_main, tmp_path):
    call_main(vit_diverse.main, f"{SMALL} --seed 3")
    record, folder = result(tmp_path)
    assert list(record["rows"]) == ["erm", "div", "erm+sel", "div+sel"]
    history = {name: record["extra"][name]["history"][0] for name in ("erm", "div")}
    assert history["erm"]["loss_ig"] == 0 < history["div"]["loss_ig"]
    model = DiverseViT((32, 16), 4, 2, 16, 2, 4, 16, dim_head=4).eval()
    model.load_state_dict(torch.load(folder / "div.pt", weights_only=True))
    tests = {"test": {"ood": common.load_parts("tiny-mnist-cifar", seed=3)["test_ood"]}}
    for row in ("div", "div+sel"):
        heads = record["extra"][row]["heads"]
        mask = torch.tensor([float(head in heads) for head in (1, 2, 3, 4)])
        accuracy = common.evaluate(functools.partial(model, head_mask=mask), tests)
        assert accuracy["test"] == record["rows"][row]["ood"]


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("rows_before", [1, 2, 3])
def test_an_interrupted_run_continues_to_the_same_bytes(
    rows_before, few_images, call_main, tmp_path, monkeypatch
):
    arguments = f"{SMALL} --figures --protocol published --output"
    call_main(vit_diverse.main, f"{arguments} whole")
    evaluate_row, calls = vit_diverse.evaluate_row, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > rows_before:
            raise common.InputError("power cut")
        return evaluate_row(*arguments)

    monkeypatch.setattr(vit_diverse, "evaluate_row", interrupted)
    assert "power cut" in call_main(vit_diverse.main, f"{arguments} parts")
    monkeypatch.setattr(vit_diverse, "evaluate_row", evaluate_row)
    call_main(vit_diverse.main, f"{arguments} parts --resume")
    whole = files(tmp_path / "whole")
    assert len(whole) == 4  # result, two networks, numbers of heads
    assert files(tmp_path / "parts") == whole


def test_rows_share_a_training_where_they_differ_in_selection_alone():
    rows = ["erm", "div+sel/lambda=1", "erm+sel/select-by=worst-group", "div/lambda=1", "div"]
    groups = vit_diverse.trainings(dict.fromkeys(rows))
    assert {name: list(own) for name, own in groups.items()} == {
        "erm": ["erm", "erm+sel/select-by=worst-group"],
        "div/lambda=1": ["div+sel/lambda=1", "div/lambda=1"],
        "div": ["div"],
    }


def test_study_lambda_sweeps_around_the_lambda_of_the_data_set(few_images, call_main, tmp_path):
    call_main(vit_diverse.main, f"{SMALL} --study lambda --lambda 10")
    record, _ = result(tmp_path)
    weights = ["0", "0.1", "1", "10", "100"]
    assert [name for name in record["rows"] if "sel" not in name] == [
        f"div/lambda={weight}" for weight in weights
    ]
    curves = Image.open(tmp_path / "results" / "vit_diverse-lambda-tiny-mnist-cifar.png")
    assert curves.width > 600


def test_study_budget(monkeypatch, few_images, call_main, tmp_path):
    monkeypatch.setattr(vit_diverse, "BUDGETS", (4, 8))
    printed = call_main(vit_diverse.main, f"{SMALL} --seeds 0 1 --study budget")
    table = printed[printed.index("ood, %, heads chosen on n images:") :].splitlines()
    assert table[0].split()[-2:] == ["4", "8"] and table[2].startswith("erm+sel")
    stored = tmp_path / "results" / "vit_diverse-budget-tiny-mnist-cifar.json"
    for record in json.loads(stored.read_text())["records"]:
        for row in ("erm+sel", "div+sel"):
            draws = record["extra"][row]["budget"]
            assert {n: len(values) for n, values in draws.items()} == {"4": 50, "8": 50}


def test_waterbirds_with_a_clip_tower(waterbirds_tree, call_main, tmp_path):
    arguments = f"--dataset waterbirds --data-root {waterbirds_tree} --model tiny --epochs 1"
    call_main(vit_diverse.main, f"{arguments} --workers 0 --select-by worst-group")
    record, _ = result(tmp_path)
    assert all(0 <= row["worst group"] <= 1 for row in record["rows"].values())
    assert len(record["extra"]["erm"]["robust"]) == 6


@pytest.mark.parametrize("dataset, passes", [("tiny-waterbirds", 2), ("tiny-mnist-cifar", 3)])
def test_every_image_passes_once(dataset, passes, few_images, call_main, monkeypatch):
    """Waterbirds has one test set, in and out of distribution."""
    seen = []

    def counted(model, images, row):
        seen.append(images)
        return collect_heads(model, images, row)

    monkeypatch.setattr(vit_diverse, "collect_heads", counted)
    call_main(vit_diverse.main, f"--dataset {dataset} --modes erm erm+sel --epochs 1")
    assert len(seen) == passes


@pytest.mark.slow
def test_waterbirds_with_torchvision_from_a_file(waterbirds_tree, call_main, tmp_path):
    torch.manual_seed(0)
    torch.save(torchvision.models.vit_b_16().state_dict(), tmp_path / "vit.pt")
    arguments = f"--dataset waterbirds --data-root {waterbirds_tree} --epochs 1 --batch-size 8"
    call_main(vit_diverse.main, f"{arguments} --pretrained {tmp_path / 'vit.pt'} --workers 0")
    record, _ = result(tmp_path)
    assert len(record["extra"]["div"]["robust"]) == 12
