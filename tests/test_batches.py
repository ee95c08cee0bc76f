"""Splits of domains, names of targets, and batches of all sources, cropped and mirrored."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import common
from support import InputError, benchmarks, parallel


def numbered(size: int):
    """Images of 2 x 2 pixels whose label is their number."""
    labels = torch.arange(size)
    pixels = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return common.ImageSet(pixels, labels, tuple("abcdefghij"))


def labels_of(batches, steps: int) -> list[list[int]]:
    return [labels.tolist() for _, labels in itertools.islice(batches, steps)]


# ---------- Splits and targets -------------------------------------------------------------------
def test_domain_split_worked_out_cases():
    for index, held_out in ((0, [2, 3]), (1, [5, 0])):
        first, rest = common.domain_split(10, index)
        assert first.tolist() == held_out
        assert sorted([*first, *rest]) == list(range(10))


def test_leave_one_out_and_balanced_parts_of_tiny_domains():
    domains = [common.Domain(name, numbered(20)) for name in ("a", "b", "c")]
    task = common.leave_one_out(domains, "b")
    assert list(task.train) == list(task.tests["hold-out"]) == ["a", "c"]
    assert list(task.tests) == ["hold-out", "target"]  # real data have no balanced part
    for name in ("a", "c"):
        held_out, rest = task.tests["hold-out"][name].labels, task.train[name].labels
        assert len(held_out) == 4
        assert sorted([*held_out.tolist(), *rest.tolist()]) == list(range(20))
    assert len(task.tests["target"]["b"]) == 20
    domains = [common.Domain(name, numbered(20), numbered(3)) for name in ("a", "b")]
    task = common.leave_one_out(domains, "b")
    assert len(task.tests["source"]["a"]) == len(task.tests["target"]["b"]) == 3


def test_target_names():
    homes = ["Art", "Clipart", "Product", "Real World"]
    for text in ("Real World", "real_world", "real", "3"):
        assert common.choose_targets(text, homes) == ["Real World"]
    places = ["location_100", "location_38", "location_43", "location_46"]
    assert common.choose_targets("L100", places) == ["location_100"]
    assert common.choose_targets("all", places) == places
    with pytest.raises(InputError, match="unknown target 'location_4'"):  # starts two names
        common.choose_targets("location_4", places)


# ---------- Batches ------------------------------------------------------------------------------
SETS = {"small": numbered(3), "large": numbered(7)}


def test_order_and_seeds_are_those_that_results_were_made_with():
    """Two images of each source in a batch; the small one is cycled through."""
    order = [[2, 1, 6, 5], [0, 1, 4, 2], [0, 2, 0, 3], [0, 2, 1, 1]]
    assert labels_of(common.source_batches(SETS, 2, seed=4), 4) == order
    assert labels_of(common.source_batches(SETS, 2, seed=4, start=2, stop=4), 9) == order[2:]


def test_every_image_is_visited_equally_often_also_in_a_batch_larger_than_its_source():
    batches = common.source_batches(SETS, 6, seed=9)
    for images, labels in itertools.islice(batches, 7):
        assert torch.equal(images, (labels / 255).view(-1, 1, 1, 1).expand(-1, 3, 2, 2))
        assert labels[:6].bincount().tolist() == [2, 2, 2]
    visits = torch.tensor(labels_of(batches, 7))[:, 6:].flatten().bincount()
    assert visits.tolist() == [6] * 7


def test_ranks_share_every_batch_equally(monkeypatch):
    """One after the other, source by source, their parts are the batch of one process."""
    whole = torch.tensor(labels_of(common.source_batches(SETS, 4, seed=1), 5))
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        labels = torch.tensor(labels_of(common.source_batches(SETS, 4, seed=1), 5))
        parts.append(labels.unflatten(1, (2, 2)))  # (steps, S, b)
    assert torch.equal(torch.cat(parts, 2).flatten(1), whole)
    with pytest.raises(InputError, match="--batch-size 3 .* by 2 processes: give a multiple of 2"):
        next(common.source_batches(SETS, 3, seed=1))


# ---------- Cropped and mirrored -----------------------------------------------------------------
def test_files_are_augmented_alike_whoever_reads_them_and_wherever_one_starts(tmp_path):
    """By the seed that each image of a batch has, also where crops travel as 8 bits."""
    augment, rng, sets = common.load_clip().augment, np.random.default_rng(0), {}
    for domain, widths in {"a": [50, 64, 33], "b": [40, 60]}.items():
        files = np.array([str(tmp_path / f"{domain}{width}.png") for width in widths])
        for file, width in zip(files, widths):
            colors = rng.integers(0, 256, (40, width, 3), dtype=np.uint8)
            Image.fromarray(colors).save(file)
        labels = torch.arange(len(files))
        sets[domain] = common.ImageSet(files, labels, ("x", "y", "z"), transform=augment)
    images, labels = [], []
    for batch in itertools.islice(common.endless_batches([3, 2], 3, seed=4), 2, 5):
        for source, chosen in zip(sets.values(), batch):
            for index, seed in chosen:
                torch.manual_seed(seed)
                images.append(augment(benchmarks.read_image(source.images[index])))
                labels.append(index)
    next_random = []
    for workers in (0, 2):
        torch.manual_seed(0)
        batches = [*common.source_batches(sets, 3, 4, start=2, stop=5, workers=workers)]
        assert torch.equal(torch.cat([x for x, _ in batches]), torch.stack(images))
        assert torch.cat([y for _, y in batches]).tolist() == labels
        next_random.append(torch.rand(()))
    assert next_random[0] == next_random[1]  # of the training, whoever read


def test_training_images_are_cropped_as_pillow_would():
    """8-bit tensors take a third of Pillow's time. The difference is a rounding."""
    augment = common.load_clip().augment
    colors = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(colors).resize((500, 400), Image.Resampling.BICUBIC)
    for seed in range(8):
        torch.manual_seed(seed)
        crop = augment.crop(picture)
        assert crop.dtype == torch.uint8 and crop.shape == (3, 32, 32)
        torch.manual_seed(seed)
        resized = v2.RandomResizedCrop(32, (0.7, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
        expected = np.asarray(v2.RandomHorizontalFlip()(resized(picture)))
        difference = crop.permute(1, 2, 0).numpy().astype(int) - expected
        assert abs(difference).max() <= 2
        torch.manual_seed(seed)
        assert torch.allclose(augment(picture), (crop / 255 - 0.5) / 0.25, atol=1e-6)
