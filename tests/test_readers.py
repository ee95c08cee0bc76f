"""Readers of the open-class sets and of ImageNet with its shifts, on trees in their layouts."""

import numpy as np
import pytest
from conftest import NAMES

import common

IMAGENET_SHIFTS = ["imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r"]


def shade_of(file):
    return np.asarray(common.read_image(file))[0, 0, 0].item()


def test_split_file_reader(caltech):
    parts = common.load_parts("caltech101", caltech)
    assert {name: len(part) for name, part in parts.items()} == {"train": 83, "val": 25, "test": 20}
    assert all(part.classes == NAMES[:5] for part in parts.values())
    for file, label in zip(parts["test"].images, parts["test"].labels.tolist()):
        assert f"/{NAMES[label]}/" in file and abs(shade_of(file) - 40 * label) < 8


def test_aircraft_reader(aircraft):
    parts = common.load_parts("fgvcaircraft", aircraft)
    assert parts["train"].classes == ("house", "art painting", "cup")
    assert parts["train"].labels.tolist() == [2, 2, 1, 1, 0, 0]
    assert parts["val"].images[0].endswith("images/1007.jpg")


def test_imagenet_readers(imagenet):
    parts = common.load_parts("imagenet", imagenet)
    assert parts["train"].classes == NAMES and len(parts["val"]) == 24
    assert "/val/" in parts["test"].images[0]
    for name in IMAGENET_SHIFTS:
        (images,) = common.load_parts(name, imagenet).values()
        subset = name in ("imagenet-a", "imagenet-r")
        four = tuple(NAMES[i] for i in (2, 5, 10, 11))
        assert images.classes == (four if subset else NAMES)
        for file, label in zip(images.images, images.labels.tolist()):
            assert abs(shade_of(file) - 20 * NAMES.index(images.classes[label])) < 8, (name, file)


def damage(folder, how):
    file = folder / "split_zhou_Caltech101.json"
    if how == "no list":
        file.unlink()
    elif how == "half a list":
        file.write_text("{")
    elif how == "no part":
        file.write_text('{"train": []}')
    elif how == "no images":
        (folder / "101_ObjectCategories").rename(folder / "other")


@pytest.mark.parametrize(
    "how, words",
    [
        ("no list", ("FileNotFoundError", "split_zhou")),
        ("half a list", ("cannot read", "JSONDecodeError")),
        ("no part", ("KeyError", "val")),
        ("no images", ("no image", "101_ObjectCategories")),
    ],
)
def test_damaged_open_class_set_is_one_clear_error(caltech, how, words):
    damage(caltech / "caltech-101", how)
    with pytest.raises(common.InputError) as error:
        common.load_parts("caltech101", caltech)
    assert all(word in str(error.value) for word in words), error.value


def test_missing_open_class_set_is_one_clear_error(caltech):
    with pytest.raises(common.InputError) as error:
        common.load_parts("dtd", caltech)
    words = ("'dtd' is not in", "DescribableTextures", "CoOp", "--data-root", "tiny-office")
    assert all(word in str(error.value) for word in words), error.value


def test_damaged_imagenet_is_one_clear_error(imagenet):
    (imagenet / "imagenet" / "images" / "val" / "n01440764").rename(imagenet / "gone")
    with pytest.raises(common.InputError, match="train has folders of 12 classes, val of 11"):
        common.load_parts("imagenet", imagenet)
