"""Diverse heads against slow loops, finite differences and networks put together in other ways."""

import argparse
import csv
import itertools
import json
import re

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import call, readme_script
from PIL import Image
from torch import nn

import common
import vit_diverse
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

ARGS = argparse.Namespace(workers=0, device=torch.device("cpu"), precision="fp32", select_by="accuracy", study=None)


def small(heads=3, depth=2, dtype=torch.float32, dim=12, dim_head=5, seed=0):
    torch.manual_seed(seed)
    return DiverseViT((8, 12), 4, 3, dim, depth, heads, 16, dim_head=dim_head).to(dtype).eval()


def regulariser(model, images, **options):
    inputs = model.head_inputs(images)
    return input_gradient_loss(model.logits(model.head_outputs(inputs)), inputs, **options)


def full_attention_logits(model, x, own=None):
    """The network's end, written plainly: attention of all tokens to all tokens, head by head, from normalised tokens x
    (B, N, D). own: {i: tokens} that head i reads instead."""
    last, parts = model.last, []
    H, d = last.heads, last.qkv.weight.shape[0] // (3 * last.heads)
    for i in range(H):
        seen = (own or {}).get(i, x)
        q, k, v = (F.linear(seen, last.qkv.weight[rows : rows + d]) for rows in (i * d, (H + i) * d, (2 * H + i) * d))
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


@pytest.mark.parametrize("normalize, reduce", list(itertools.product(("token", "none"), ("mean", "sum"))))
def test_regulariser_is_the_slow_loop_over_heads(normalize, reduce):
    model, images = small(dtype=torch.float64), torch.rand(2, 3, 8, 12, dtype=torch.float64)
    fast = regulariser(model, images, normalize=normalize, reduce=reduce)
    slow = slow_loss(model, images, normalize, reduce)
    assert slow.item() > 1e-8 and fast.item() == pytest.approx(slow.item(), rel=1e-9)
    parameters = list(model.parameters())
    pairs = zip(*(torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (fast, slow)))
    for got, expected in pairs:  # the keys' part of the last layer, the class token's bias, ...
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
    for parameter in (model.last.qkv.weight, model.last.out.weight, block.qkv.weight, embedding.positions):
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in gradient.abs().topk(3).indices:
            kept, values = flat[index].item(), []
            for step in (1e-6, -1e-6):
                flat[index] = kept + step
                values.append(regulariser(model, images).item())
            flat[index] = kept
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient[index].item(), rel=1e-4)


def test_regulariser_is_zero_when_heads_read_disjoint_coordinates_and_largest_when_they_are_one():
    model, images = small(heads=3, dim_head=4), torch.rand(2, 3, 8, 12)
    weight = model.last.qkv.weight.data.view(3, 3, 4, 12)  # (q k v, H, d, D)
    for i in range(3):
        weight[:, i, :, [c for c in range(12) if c // 4 != i]] = 0
    assert regulariser(model, images).item() == 0
    assert vit_diverse.head_cosine(model, images) == 0
    weight[:] = weight[:, :1].clone()
    model.last.out.weight.data = model.last.out.weight.data[:, :4].repeat(1, 3)
    assert regulariser(model, images).item() == pytest.approx(6 / 9, rel=1e-5)  # all cosines of 3 x 2 pairs are 1
    assert vit_diverse.head_cosine(model, images) == pytest.approx(1, rel=1e-5)


def test_regulariser_refuses_other_options():
    model, images = small(), torch.rand(1, 3, 8, 12)
    with pytest.raises(ValueError, match="'tokens'"):
        regulariser(model, images, normalize="tokens")
    with pytest.raises(ValueError, match="'max'"):
        regulariser(model, images, reduce="max")


# ------------------------------------------------------------------------------------------ the network


def test_published_network_has_129_tokens_and_506306_parameters():
    model = DiverseViT((64, 32), 4, 2, dim=64, depth=6, heads=4, mlp_dim=128)
    norm = 2 * 64
    layer = norm + 64 * 3 * 4 * 64 + (4 * 64 * 64 + 64) + norm + (64 * 128 + 128) + (128 * 64 + 64)
    assert sum(p.numel() for p in model.parameters()) == (
        (4 * 4 * 3 * 64 + 64) + 64 + 129 * 64 + 6 * layer + norm + (64 * 2 + 2)
    )
    assert sum(p.numel() for p in model.parameters()) == 506_306
    assert model.head_inputs(torch.rand(2, 3, 64, 32)).shape == (4, 2, 129, 64)


def test_class_token_query_is_full_attention():
    model, images = small(heads=4, dtype=torch.float64), torch.rand(5, 3, 8, 12, dtype=torch.float64)
    assert torch.allclose(model(images), full_attention_logits(model, model.last.norm(model.trunk(images))), atol=1e-12)


def test_masks():
    model, images = small(heads=4), torch.rand(5, 3, 8, 12)
    heads = model.head_outputs(model.head_inputs(images))  # (B, H, d)
    assert torch.equal(model(images, torch.ones(4)), model(images))
    mask = torch.tensor([0.0, 1, 0, 1])
    kept = torch.stack([0 * heads[:, 0], 2 * heads[:, 1], 0 * heads[:, 2], 2 * heads[:, 3]], 1)  # 4 heads / 2 kept
    assert torch.allclose(model(images, mask), model.logits(kept), atol=1e-6)
    every = torch.tensor([[1.0, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0]])  # one for each image
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
    vit = torchvision.models.VisionTransformer(32, 8, num_layers=3, num_heads=4, hidden_dim=48, mlp_dim=64).eval()
    nn.init.normal_(vit.encoder.layers[-1].self_attention.in_proj_bias)  # zero in a new network, not in a trained one
    changed, images = headwise(vit, 2), torch.rand(3, 3, 32, 32)
    x = torch.cat([vit.class_token.expand(3, -1, -1), vit._process_input(images)], 1) + vit.encoder.pos_embedding
    for layer in vit.encoder.layers[:-1]:
        x = layer(x)
    last = vit.encoder.layers[-1]
    x = last.ln_1(x)
    x = last.self_attention(x, x, x)[0]
    x = vit.encoder.ln(x + last.mlp(last.ln_2(x)))[:, 0]
    assert torch.allclose(changed(images), changed.classifier[1](x), atol=1e-5)
    trained = {id(p) for p in changed.parameters()}
    assert len(trained) == len(list(vit.parameters()))  # a new classifier for the old one, and nothing lost or doubled


def test_clip_tower_keeps_its_layers_but_for_the_residual_path():
    visual = common.load_clip("tiny")[0].visual
    changed, images = headwise(visual, 2), torch.rand(3, 3, 32, 32)
    record = {}
    hook = visual.transformer.resblocks[-1].register_forward_pre_hook(lambda module, args: record.update(x=args[0]))
    visual(images)
    hook.remove()
    last = visual.transformer.resblocks[-1]
    x = last.ln_1(record["x"])
    x = last.attn(x, x, x)[0]
    x = visual.ln_post((x + last.mlp(last.ln_2(x)))[:, 0])
    assert torch.allclose(changed(images), changed.classifier[1](x), atol=1e-5)
    assert not any(p.requires_grad for p in visual.parameters()) and all(p.requires_grad for p in changed.parameters())


def test_other_networks_are_refused():
    with pytest.raises(common.InputError, match="ModifiedResNet"):
        headwise(open_clip.create_model("RN50").visual, 2)


# ------------------------------------------------------------------------------------------ selection


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
    pixels = (255 * torch.rand(n, 3, 8, 12, generator=torch.Generator().manual_seed(1))).to(torch.uint8)
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
    assert chosen.tolist() == best[0].tolist() and chosen.sum() == max(mask.sum() for mask in best)
    per_group = torch.stack([hits[:, images.groups == group].double().mean(1) for group in range(4)])
    chosen, scores = select_heads(model, heads, images.labels, images.groups)
    assert torch.equal(scores, per_group.amin(0)) and scores[(masks == chosen).all(1)] == scores.max()


def test_of_equal_subsets_the_larger_is_kept():
    model, images = small(heads=3), small_set()
    nn.init.zeros_(model.classifier[1].weight)  # every subset gives the same answer
    chosen, scores = select_heads(model, collect_heads(model, images, ARGS), images.labels)
    assert chosen.tolist() == [1, 1, 1] and len(scores.unique()) == 1


def test_published_rule_takes_the_best_epoch_and_head_for_each_kind():
    first = {"val_id": [0.9, 0.6], "test_id": [0.1, 0.2], "val_ood": [0.5, 0.6], "test_ood": [0.3, 0.4]}
    second = {"val_id": [0.7, 0.8], "test_id": [0.5, 0.6], "val_ood": [0.95, 0.2], "test_ood": [0.7, 0.8]}
    assert vit_diverse.published_rule([first, second]) == {"id": 0.1, "ood": 0.7}


def fingerprints(images):
    return {pixels.numpy().tobytes() for pixels in images}


def test_heads_are_chosen_on_val_ood_alone_and_no_image_is_in_two_sets():
    splits = common.load_tiny_mnist_cifar(seed=5, sizes=(60, 40, 50))
    prints = [fingerprints(images.images) for images in splits.values()]
    assert [len(p) for p in prints] == [60, 40, 50, 40, 50]
    assert all(not a & b for a, b in itertools.combinations(prints, 2))
    torch.manual_seed(0)
    model = DiverseViT((32, 16), 4, 2, 16, 2, 4, 16, dim_head=4).eval()
    with torch.no_grad():  # an untrained network that does not answer the same to every image
        model.classifier[1].bias -= model(splits["val_ood"].images.float() / 255).mean(0)
    before = vit_diverse.evaluate(model, splits, {}, ARGS, 0)["selected"]
    for part in ("train", "val_id", "test_id", "test_ood"):  # none of these may have a say
        splits[part].labels = 1 - splits[part].labels
    after = vit_diverse.evaluate(model, splits, {}, ARGS, 0)["selected"]
    assert after["heads"] == before["heads"] and after["ood"] == pytest.approx(1 - before["ood"])
    splits["val_ood"].labels = 1 - splits["val_ood"].labels
    assert vit_diverse.evaluate(model, splits, {}, ARGS, 0)["selected"]["heads"] != before["heads"]


# ------------------------------------------------------------------------------------------ data sets


def test_tiny_digit_agrees_with_the_vehicle_as_often_as_said():
    for split, images in common.load_tiny_mnist_cifar(seed=1).items():
        agreement = (images.groups % 2 == images.labels).double().mean().item()
        expected = 0.9 if split in ("train", "val_id", "test_id") else 0.5
        assert abs(agreement - expected) < 4 * (expected * (1 - expected) / len(images)) ** 0.5
        assert torch.equal(images.groups // 2, images.labels) and images.images.shape[1:] == (3, 32, 16)


@pytest.fixture
def mnist_cifar_root(tmp_path, monkeypatch):
    """Small MNIST and CIFAR-10 files in torchvision's layouts, every image a number of its own."""
    import pickle

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n, offset in (("train", 60, 0), ("t10k", 40, 60)):
        labels = np.arange(n, dtype=np.uint8) % 4
        pixels = np.broadcast_to((np.arange(n, dtype=np.uint8) + offset + 1)[:, None, None], (n, 28, 28))
        header = bytes([0, 0, 8, 3]) + b"".join(int(x).to_bytes(4, "big") for x in (n, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + n.to_bytes(4, "big") + labels.tobytes())
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for number, name in enumerate(names):
        n = 40
        pixels = np.broadcast_to((np.arange(n) + n * number).astype(np.uint8)[:, None], (n, 3072))
        with (folder / name).open("wb") as file:
            pickle.dump({"data": pixels, "labels": [(1, 9, 3, 5)[i % 4] for i in range(n)]}, file)
    with (folder / "batches.meta").open("wb") as file:
        pickle.dump({"label_names": list("abcdefghij")}, file)
    # torchvision compares checksums with those of the real files
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    return tmp_path


def test_mnist_cifar_from_torchvision_files(mnist_cifar_root):
    splits = common.load_mnist_cifar(mnist_cifar_root, seed=3)
    assert list(splits) == ["train", "val_id", "test_id", "val_ood", "test_ood"]
    assert [len(images) for images in splits.values()] == [100, 4, 16, 4, 16]  # 20 vehicles to test with, 20 / 80
    seen = {}
    for split, images in splits.items():
        top, bottom = images.images[:, :, :32], images.images[:, :, 32:]
        assert images.images.shape[1:] == (3, 64, 32) and top[:, :, :2].max() == 0 and top[:, :, :, 30:].max() == 0
        number = bottom[:, 0, 0, 0].long()
        assert torch.equal(number % 4, images.labels)  # 0: automobile, 1: truck, the files hold others too
        digit = (top[:, 0, 16, 16].long() - 1) % 60 % 4 if split == "train" else (top[:, 0, 16, 16].long() - 61) % 4
        assert torch.equal(digit, images.groups % 2) and torch.equal(images.groups // 2, images.labels)
        seen[split] = ({*number.tolist()}, {*top[:, 0, 16, 16].tolist()})
    for kind, vehicles in itertools.product(("id", "ood"), (0, 1)):  # neither a vehicle nor a digit is in both
        assert not seen[f"val_{kind}"][vehicles] & seen[f"test_{kind}"][vehicles]
        assert not seen["val_ood"][vehicles] & seen[f"test_{kind}"][vehicles]
    again, other = common.load_mnist_cifar(mnist_cifar_root, seed=3), common.load_mnist_cifar(mnist_cifar_root, seed=4)
    assert torch.equal(again["train"].images, splits["train"].images)
    assert not torch.equal(other["train"].images, splits["train"].images)


@pytest.fixture
def waterbirds_tree(tmp_path):
    """The released folder's layout with a few drawn birds; groups balanced in val and test, not in train."""
    folder = tmp_path / "data" / "waterbird_complete95_forest2water2"
    rows = []
    splits = common.load_tiny_waterbirds(seed=2, sizes=(24, 16, 16))
    for number, (split, images) in enumerate(splits.items()):
        for i, pixels in enumerate(images.images):
            name = f"{i % 3:03}.Bird/{split}_{i}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((50, 40)).save(folder / name)
            bird, place = divmod(images.groups[i].item(), 2)
            rows.append({"img_id": len(rows), "img_filename": name, "y": bird, "split": number, "place": place})
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path / "data"


def test_waterbirds_folder(waterbirds_tree):
    parts = common.load_waterbirds(waterbirds_tree)
    assert {name: len(part) for name, part in parts.items()} == {"train": 24, "val": 16, "test": 16}
    drawn = common.load_tiny_waterbirds(seed=2, sizes=(24, 16, 16))
    for name, part in parts.items():
        assert torch.equal(part.labels, drawn[name].labels) and torch.equal(part.groups, drawn[name].groups)
        assert all(f"{name}_" in file for file in part.images)


@pytest.mark.parametrize("damage, words", [("missing", "tiny-waterbirds"), ("column", "place"), ("empty", "no image")])
def test_damaged_waterbirds_folder(waterbirds_tree, damage, words):
    file = waterbirds_tree / "waterbird_complete95_forest2water2" / "metadata.csv"
    if damage == "missing":
        file.unlink()
    elif damage == "column":
        file.write_text(file.read_text().replace("place", "location"))
    else:
        file.write_text("\n".join(line for line in file.read_text().splitlines() if ",2," not in line))
    with pytest.raises(common.InputError, match=words) as error:
        common.load_waterbirds(waterbirds_tree)
    assert str(waterbirds_tree) in str(error.value)


def test_waterbirds_id_accuracy_counts_groups_as_training_does():
    args = argparse.Namespace(**vars(ARGS), dataset="tiny-waterbirds", data_root="data", cue=0.9)
    splits, weights = vit_diverse.load_splits(args, 0, None, None)
    share = torch.bincount(splits["train"].groups) / len(splits["train"])
    hits = torch.rand(len(splits["test_id"]), generator=torch.Generator().manual_seed(0)) < 0.7
    by_group = torch.stack([hits[splits["test_id"].groups == group].float().mean() for group in range(4)])
    assert np.average(hits, weights=weights["test_id"]) == pytest.approx((share * by_group).sum().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------ commands


def test_readme_tables_are_the_committed_runs(root):
    readme = (root / "README.md").read_text()
    tables = {
        "tiny-mnist-cifar": [vit_diverse.result_table, vit_diverse.heads_table, vit_diverse.budget_table],
        "lambda-tiny-mnist-cifar": [vit_diverse.result_table],
        "lambda-token-tiny-mnist-cifar": [vit_diverse.result_table],
        "tiny-waterbirds": [vit_diverse.result_table],
    }
    for name, makers in tables.items():
        stored = json.loads((root / "results" / f"vit_diverse-{name}.json").read_text())
        title = f"{stored['settings']['dataset']}, {len(stored['runs'])} seeds"
        for make in makers:
            assert f"```text\n{make(title, stored['runs'])}\n```" in readme
        if name == "tiny-mnist-cifar":
            assert [run["seed"] for run in stored["runs"]] == list(range(10))


QUICK = "vit_diverse.py --epochs 1 --batch-size 200 --depth 2 --dim 16 --dim-head 4 --mlp-dim 16"


@pytest.mark.slow
def test_main_job(checkout, root):
    """The README's command, its network made small: four rows, the files, the same numbers twice."""
    readme_script(root, "python vit_diverse.py")
    results = []
    for folder in ("one", "two"):
        done = call(f"{QUICK} --seed 3 --protocol published --output {folder}", checkout)
        assert done.returncode == 0, done.stderr
        for row in ("ERM", "DIV", "ERM+SEL", "DIV+SEL", "ERM+SEL, published rule*", "DIV+SEL, published rule*"):
            assert re.search(rf"^{re.escape(row)} +\d\d\.\d +\d\d\.\d", done.stdout, re.M), done.stdout
        assert "it/s" not in done.stderr
        run = checkout / folder / "vit_diverse" / "tiny-mnist-cifar-seed3"
        files = {"config.json", "metrics.jsonl", "result.json", "erm.pt", "div.pt"}
        assert {file.name for file in run.iterdir()} == files
        results.append(json.loads((run / "result.json").read_text())["methods"])
        for method in results[-1].values():
            method["seconds"] = None
    assert results[0] == results[1]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["ERM", "DIV"] and rows[0]["loss_ig"] == 0 < rows[1]["loss_ig"]

    model = DiverseViT((32, 16), 4, 2, 16, 2, 4, 16, dim_head=4).eval()  # the stored network does what was reported
    model.load_state_dict(torch.load(run / "div.pt", weights_only=True))
    test = common.load_tiny_mnist_cifar(3)["test_ood"]
    for row in (results[1]["DIV"]["all"], results[1]["DIV"]["selected"]):
        mask = torch.tensor([float(head in row["heads"]) for head in (1, 2, 3, 4)])
        accuracy = common.evaluate(lambda images, mask=mask: model(images, mask), {"test": test})
        assert (accuracy["accuracy"], accuracy["worst_group"]) == (row["ood"], row["worst_group"])


@pytest.mark.parametrize("study", ["budget", "lambda"])
def test_studies(checkout, study):
    seeds = (0, 1) if study == "budget" else (0,)
    done = call(f"{QUICK} --seeds {' '.join(map(str, seeds))} --study {study} --lambdas 0 10 --figures "
                "--summary all.json", checkout)  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = checkout / "runs" / "vit_diverse" / "tiny-mnist-cifar-figures"
    assert {file.name for file in figures.iterdir()} == {"heads.png", f"{study}.png"}
    for file in figures.iterdir():
        with Image.open(file) as image:
            assert image.width > 600
    runs = json.loads((checkout / "all.json").read_text())["runs"]
    assert tuple(run["seed"] for run in runs) == seeds
    if study == "budget":
        assert re.search(r"n = 8 +n = 16 +n = 32 +n = 64", done.stdout)
        draws = runs[0]["methods"]["DIV"]["budget"]
        assert {n: len(values) for n, values in draws.items()} == dict.fromkeys(
            ("8", "16", "32", "64"), vit_diverse.DRAWS
        )
    else:
        assert list(runs[0]["methods"]) == ["lambda 0", "lambda 10"]


def test_waterbirds_with_a_clip_tower(checkout, waterbirds_tree):
    done = call(f"vit_diverse.py --dataset waterbirds --data-root {waterbirds_tree} --model tiny --epochs 1 "
                "--workers 0 --select-by worst-group", checkout)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((checkout / "runs" / "vit_diverse" / "waterbirds-seed0" / "result.json").read_text())
    assert all(0 <= result["methods"][name]["selected"]["worst_group"] <= 1 for name in ("ERM", "DIV"))
    assert len(result["methods"]["ERM"]["robust"]) == 6


@pytest.mark.slow
def test_tiny_waterbirds(checkout, root):
    done = call(readme_script(root, "python vit_diverse.py --dataset tiny-waterbirds") + " --epochs 1", checkout)
    assert done.returncode == 0 and re.search(r"^DIV\+SEL +\d\d\.\d", done.stdout, re.M), done.stderr


@pytest.mark.slow
def test_waterbirds_with_torchvision_from_a_file(checkout, waterbirds_tree, tmp_path):
    torch.manual_seed(0)
    torch.save(torchvision.models.vit_b_16().state_dict(), tmp_path / "vit.pt")
    done = call(f"vit_diverse.py --dataset waterbirds --data-root {waterbirds_tree} --pretrained {tmp_path / 'vit.pt'} "
                "--epochs 1 --batch-size 8", checkout)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((checkout / "runs" / "vit_diverse" / "waterbirds-seed0" / "result.json").read_text())
    assert len(result["methods"]["DIV"]["robust"]) == 12


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--dataset tiny-mnist", ("tiny-mnist", "did you mean 'tiny-mnist-cifar'")),
        ("--dataset mnist-cifar", ("MNIST/raw", "cifar-10-batches-py", "--download", "tiny-mnist-cifar")),
        ("--dataset waterbirds --model tiny", ("metadata.csv", "img_filename, y, split, place", "tiny-waterbirds")),
        ("--dataset waterbirds --model scratch", ("--model scratch", "waterbirds")),
        ("--dataset waterbirds --pretrained nothing.pt", ("vit_b_16", "nothing.pt", "--pretrained FILE")),
        ("--dataset tiny-waterbirds --cue 3", ("--cue", "3.0")),
        ("--heads 0", ("--heads must be at least 1", "got 0")),
        ("--heads 17", ("17 heads",)),
        ("--lambda -1", ("lambda must be 0 or more", "-1")),
        ("--summary nowhere/all.json", ("--summary", "nowhere")),
        ("--model ViT-B-33", ("ViT-B-33", "did you mean")),
    ],
)
def test_wrong_flag_is_one_clear_error(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vit_diverse.py", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        common.command(vit_diverse.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert not list(tmp_path.glob("runs/**/*"))[1:]
