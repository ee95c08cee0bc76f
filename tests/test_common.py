"""Data of common.py: worked-out splits, balanced batches, names of targets."""

import pytest
import torch

import common


def test_domain_split_worked_out_cases():
    for index, held_out in ((0, [2, 3]), (1, [5, 0])):
        first, rest = common.domain_split(10, index)
        assert first.tolist() == held_out
        assert sorted([*first, *rest]) == list(range(10))


def toy_set(labels, classes=("a", "b")):
    """Images of 2 x 2 pixels that show their label."""
    pixels = torch.tensor(labels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return common.ImageSet(pixels, torch.tensor(labels), classes)


def test_leave_one_out():
    domains = [common.Domain(name, toy_set([0, 1] * 10)) for name in ("a", "b", "c")]
    task = common.leave_one_out(domains, "b")
    assert list(task.train) == list(task.tests["hold-out"]) == ["a", "c"]
    assert list(task.tests) == ["hold-out", "target"]  # real data have no balanced part
    assert [len(images) for images in task.train.values()] == [16, 16]
    assert [len(images) for images in task.tests["hold-out"].values()] == [4, 4]
    assert len(task.tests["target"]["b"]) == 20


def test_tiny_domains_are_reported_on_balanced_parts():
    parts = toy_set([0, 1] * 10), toy_set([1, 0, 1])
    domains = [common.Domain(name, *parts) for name in ("a", "b")]
    task = common.leave_one_out(domains, "b")
    assert list(task.tests) == ["hold-out", "source", "target"]
    assert task.tests["source"]["a"].labels.tolist() == [1, 0, 1]
    assert task.tests["target"]["b"].labels.tolist() == [1, 0, 1]


def test_too_few_images_to_hold_out_are_an_error():
    domains = [common.Domain(name, toy_set([0, 1])) for name in ("a", "b")]
    with pytest.raises(common.InputError, match="'a' has only 2 images"):
        common.leave_one_out(domains, "b")


def test_source_batches_are_balanced_endless_and_repeatable():
    sets = {"small": toy_set([0] * 3), "large": toy_set([1] * 50)}
    batches, again = (common.SourceBatches(sets, 4, seed=9) for _ in range(2))
    for _ in range(20):
        (images, labels, domain), (same, _, _) = next(batches), next(again)
        assert labels.tolist() == [0] * 4 + [1] * 4
        assert domain.tolist() == labels.tolist()
        assert torch.equal(images, same)


def test_source_batches_visit_every_image_equally_often():
    images = toy_set(list(range(5)), tuple("abcde"))
    batches = common.SourceBatches({"only": images}, 2, seed=0)
    drawn = torch.cat([next(batches)[1] for _ in range(10)])
    assert drawn.bincount().tolist() == [4] * 5


OFFICE_HOME = ["Art", "Clipart", "Product", "Real World"]
TERRA = ["location_100", "location_38", "location_43", "location_46"]


@pytest.mark.parametrize("text", ["Real World", "real_world", "real", "3"])
def test_target_names(text):
    assert common.choose_targets(text, OFFICE_HOME) == ["Real World"]


def test_target_names_of_terra_and_all():
    assert common.choose_targets("L100", TERRA) == ["location_100"]
    assert common.choose_targets("l46", TERRA) == ["location_46"]
    assert common.choose_targets("all", TERRA) == TERRA
    with pytest.raises(common.InputError, match="unknown target 'location_4'"):  # starts two names
        common.choose_targets("location_4", TERRA)


def test_names_of_a_batch_are_those_of_its_images():
    """Images of two pixels that show their own number; also where processes read ahead."""
    sets = {"a": toy_set(list(range(7)), tuple("abcdefg")), "b": toy_set([4] * 3, tuple("abcde"))}
    for workers in (0, 1):
        batches = common.SourceBatches(sets, 3, seed=1, workers=workers)
        for _ in range(5):
            _, labels, _ = next(batches)
            names = batches.names()
            assert names[:3] == [f"a number {label}" for label in labels[:3]]
            assert [name[:-1] for name in names[3:]] == ["b number "] * 3
