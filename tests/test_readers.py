"""Readers of benchmarks on trees in their layouts; lists and folders as people have them."""

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, write_image
from PIL import Image
from torchvision.datasets import ImageFolder

import clipood
import common
import headpurify
import ldfs
import vit_diverse
from support import images

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


def contents(parts):
    """What a reader found: {part: (classes, files, labels)}."""
    found = {}
    for part, own in parts.items():
        found[part] = own.classes, own.images.tolist(), own.labels.tolist()
    return found


# ---------- Lists as people have them ------------------------------------------------------------
STYLES = {
    "blank lines": lambda text: "\n" + text.replace("\n", "\n\n") + "  \n",
    "trailing spaces": lambda text: text.replace("\n", "  \n"),
    "of Windows": lambda text: "\ufeff" + text.replace("\n", "\r\n"),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "name, file",
    [
        ("imagenet", "imagenet/classnames.txt"),
        ("imagenetv2", "imagenetv2/classnames.txt"),
        ("fgvcaircraft", "fgvc_aircraft/variants.txt"),
        ("fgvcaircraft", "fgvc_aircraft/images_variant_val.txt"),
    ],
)
def test_lists_in_every_style_say_the_same(request, name, file, style):
    data = request.getfixturevalue("aircraft" if name == "fgvcaircraft" else "imagenet")
    expected = contents(common.load_parts(name, data))
    text = (data / file).read_text()
    (data / file).write_bytes(STYLES[style](text).encode())
    assert contents(common.load_parts(name, data)) == expected


def of_split(data, change):
    """Rewrite CoOp's JSON."""
    file = data / "caltech-101" / "split_zhou_Caltech101.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def each(change):
    """A change of every item of a split."""
    return lambda lists: {part: [change(*item) for item in lists[part]] for part in lists}


def test_labels_of_a_split_may_be_texts(caltech):
    expected = contents(common.load_parts("caltech101", caltech))
    of_split(caltech, each(lambda file, label, name: [file, str(label), f"{name} "]))
    assert contents(common.load_parts("caltech101", caltech)) == expected


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda lists: lists["train"], ("holds one list", '{"train": [["image.jpg", 0')),
        (each(lambda file, label, name: [file, name, name]), ("'dog'", "expected", "image.jpg")),
        (each(lambda file, label, name: [file, label]), ("cannot read ['dog/image", "image.jpg")),
        (each(lambda file, label, name: [file, label, 3]), ("cannot read", "image.jpg")),
        (each(lambda file, label, name: [file, label + (label > 2), name]), ("label 3", "0 to 4")),
        (each(lambda file, label, name: [file, 0, name]), ("label 0", "'dog' and 'cup'")),
    ],
)
def test_a_wrong_split_is_one_clear_error(caltech, change, words):
    of_split(caltech, change)
    with pytest.raises(common.InputError) as error:
        common.load_parts("caltech101", caltech)
    words = *words, "split_zhou_Caltech101.json"
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "name, file, line, words",
    [
        ("imagenet", "imagenet/classnames.txt", "n123", "`n01440764 tench`"),
        ("fgvcaircraft", "fgvc_aircraft/images_variant_val.txt", "12", "`1025794 707-320`"),
        ("fgvcaircraft", "fgvc_aircraft/images_variant_val.txt", "12 zebra", "variants.txt"),
    ],
)
def test_a_wrong_line_is_one_clear_error(request, name, file, line, words):
    data = request.getfixturevalue("aircraft" if name == "fgvcaircraft" else "imagenet")
    with (data / file).open("a") as lines:
        lines.write(f"{line}\n")
    with pytest.raises(common.InputError) as error:
        common.load_parts(name, data)
    words = words, str(data / file), line.split()[-1]
    assert all(word in str(error.value) for word in words), error.value


def litter(folder):
    """What macOS and Windows leave beside pictures."""
    for file in list(folder.iterdir()):
        file.with_name(f"._{file.name}").write_bytes(b"Mac OS X")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_text("no image")


@pytest.mark.parametrize("name", ["imagenet", *IMAGENET_SHIFTS])
def test_what_lies_beside_images_is_none(imagenet, name):
    expected = contents(common.load_parts(name, imagenet))
    for folder in {file.parent for file in imagenet.rglob("*.JPEG")}:
        litter(folder)
    assert contents(common.load_parts(name, imagenet)) == expected


@pytest.mark.parametrize("name", ["nothing", "pacs", "imagnet"])
def test_an_unknown_set_with_parts(name, tmp_path):
    with pytest.raises(common.InputError, match=f"unknown data set '{name}'.*waterbirds") as error:
        common.load_parts(name, tmp_path)
    assert ("did you mean 'imagenet'" in str(error.value)) == (name == "imagnet")


# ---------- Waterbirds ---------------------------------------------------------------------------
BIRDS = ["a.png,0,0,0", "b.png,1,0,1", "c.png,1,0,0", "d.png,0,1,1", "e.png,1,2,0"]


@pytest.fixture
def birds(tmp_path):
    """A function that writes a Waterbirds folder with these lines; returns the data root."""
    folder = tmp_path / "data" / "waterbird_complete95_forest2water2"

    def write(lines):
        for i, name in enumerate("abcde"):
            write_image(folder / f"{name}.png", 40 * i)
        text = "\n".join(["img_filename,y,split,place", *lines])
        (folder / "metadata.csv").write_text(f"\ufeff{text}\n")
        return tmp_path / "data"

    return write


def test_waterbirds_groups_are_bird_and_place(birds):
    parts = common.load_parts("waterbirds", birds(BIRDS))
    assert [Path(file).name for file in parts["train"].images] == ["a.png", "b.png", "c.png"]
    assert parts["train"].labels.tolist() == [0, 1, 1]
    assert [part.groups.tolist() for part in parts.values()] == [[0, 3, 2], [1], [2]]


@pytest.mark.parametrize(
    "line, words",
    [
        ("a.png,2,0,0", "gives a.png y 2; it must be 0 to 1"),
        ("a.png,0,3,0", "gives a.png split 3; it must be 0 to 2"),
        ("a.png,0,0,-1", "gives a.png place -1; it must be 0 to 1"),
        ("a.png,0,0", "needs columns img_filename and, as whole numbers, y, split, place"),
    ],
)
def test_wrong_numbers_of_waterbirds(birds, line, words):
    with pytest.raises(common.InputError, match=f"metadata.csv {re.escape(words)}"):
        common.load_parts("waterbirds", birds([*BIRDS, line]))


def test_waterbirds_without_its_list_says_where_it_comes_from(birds):
    data = birds(BIRDS)
    (data / "waterbird_complete95_forest2water2" / "metadata.csv").unlink()
    with pytest.raises(common.InputError) as error:
        common.load_parts("waterbirds", data)
    words = "metadata.csv with columns", "get it:", "group_DRO"
    assert all(word in str(error.value) for word in words), error.value


# ---------- Your own pictures --------------------------------------------------------------------
@pytest.fixture
def own(tmp_path):
    """Two domains of two classes, named as people name them."""
    for domain in ("Photos 2024", "эскизы"):
        for name in ("große Katze", "dog"):
            for file in ("1.png", "two.JPG", "Ω 3.Png"):
                write_image(tmp_path / "my pictures" / domain / name / file, len(file))
    return tmp_path / "my pictures"


def load_own(folder):
    return {domain.name: domain.images for domain in common.load_domains(f"folder:{folder}")}


def test_own_pictures_are_those_of_image_folder(own):
    write_image(own / "эскизы" / "dog" / "more" / "4.png", 9)
    write_image(own / "эскизы" / "dog" / "a" / "b" / "5.png", 9)
    found = load_own(own)
    assert list(found) == ["Photos 2024", "эскизы"]
    for domain, part in found.items():
        expected = ImageFolder(own / domain)
        assert part.classes == ("dog", "große Katze") == tuple(expected.classes)
        items = list(zip(part.images.tolist(), part.labels.tolist()))
        assert items == expected.samples


def test_hidden_files_and_folders_are_no_pictures(own):
    expected = contents(load_own(own))
    for folder in {file.parent for file in own.rglob("*.png")}:
        litter(folder)
        write_image(folder / ".ipynb_checkpoints" / "1-checkpoint.png", 3)
    write_image(own / "эскизы" / ".thumbnails" / "1.png", 3)
    shutil.copytree(own / "эскизы", own / "__MACOSX" / "эскизы")
    (own / ".git").mkdir()
    (own / "notes.txt").write_text("no domain")
    (own / "эскизы" / "notes.txt").write_text("no class")
    assert contents(load_own(own)) == expected


def test_links_are_followed(own, tmp_path):
    (own / "эскизы").rename(tmp_path / "elsewhere")
    (own / "эскизы").symlink_to(tmp_path / "elsewhere")  # a domain
    (own / "эскизы" / "dog").rename(tmp_path / "dogs")
    (own / "эскизы" / "dog").symlink_to(tmp_path / "dogs")  # a class
    (tmp_path / "dogs" / "4.png").symlink_to(tmp_path / "dogs" / "1.png")  # a file
    (tmp_path / "dogs" / "loop").symlink_to(tmp_path / "dogs")
    sketches = load_own(own)["эскизы"]
    names = [Path(file).name for file in sketches.labelled(range(1)).images]
    assert names == ["1.png", "4.png", "two.JPG", "Ω 3.Png"]
    assert shade_of(sketches.images[1]) == shade_of(sketches.images[0])


def test_ten_thousand_links(own, tmp_path):
    dogs = own / "эскизы" / "dog"
    for i in range(10_000):
        (dogs / f"{i:05}.jpg").symlink_to(dogs / "two.JPG")
    sketches = load_own(own)["эскизы"]
    assert sketches.labels.bincount().tolist() == [10_003, 3]


def change_own(own, how):
    sketch = own / "эскизы"
    if how == "dangling domain":
        (own / "paintings").symlink_to("nowhere")
    elif how == "dangling class":
        (sketch / "cow").symlink_to("nowhere")
    elif how == "empty class":
        (sketch / "cow").mkdir()
    elif how == "class in one domain":
        write_image(sketch / "cow" / "1.png", 1)
    elif how == "class in capitals":
        (sketch / "dog").rename(sketch / "Dog")
    elif how == "class in both":
        write_image(sketch / "Große_Katze" / "1.png", 1)
    elif how == "one class":
        for domain in (sketch, own / "Photos 2024"):
            shutil.rmtree(domain / "dog")
    elif how == "one domain":
        shutil.rmtree(sketch)
    elif how == "domains alike":
        shutil.copytree(own / "Photos 2024", own / "photos_2024")
    elif how == "no classes":
        shutil.rmtree(sketch)
        write_image(sketch / "1.png", 1)


@pytest.mark.parametrize(
    "how, words",
    [
        ("dangling domain", ("paintings is a link to nowhere", "mend or remove it")),
        ("dangling class", ("cow is a link to nowhere", "mend or remove it")),
        ("empty class", ("no image of class 'cow'", "Photos 2024/cow", "remove 'cow'")),
        ("class in one domain", ("'Photos 2024' has no image of class 'cow'", "remove 'cow'")),
        ("class in capitals", ("'Dog' and 'dog'", "CLIP reads both names alike", "rename")),
        ("class in both", ("'Große_Katze' and 'große Katze'", "CLIP reads both names alike")),
        ("one class", ("one class only, 'große Katze'", "<domain>/<class>/<image>")),
        ("one domain", ("one domain only, 'Photos 2024'", "<domain>/<class>/<image>")),
        ("domains alike", ("'Photos 2024' and 'photos_2024'", "same name", "rename")),
        ("no classes", ("эскизы has no class folders", "<domain>/<class>/<image>")),
    ],
)
def test_what_cannot_be_compared_is_one_clear_error(own, how, words):
    change_own(own, how)
    with pytest.raises(common.InputError) as error:
        load_own(own)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_small_and_grey_pictures_become_batches(own):
    folder, clip = own / "эскизы" / "dog", common.load_clip()
    Image.new("RGB", (1, 1), "red").save(folder / "0.png")
    Image.new("L", (5, 40), 99).save(folder / "00.png")
    sketches = load_own(own)["эскизы"]
    for transform in (clip.preprocess, clip.augment):
        pixels, _ = sketches.transformed(transform).__getitems__([0, 1, 2])
        assert pixels.shape == (3, 3, 32, 32) and pixels.isfinite().all()


def test_file_names_of_runs():
    """As before for ASCII; other scripts' letters stay, so that runs do not share a folder."""
    text = "".join(map(chr, range(32, 127)))
    for start in range(len(text)):
        part = text[start:] + text[:start] + "__ _a"
        assert common.slug(part) == re.sub(r"[^a-z0-9.-]+", "_", part.lower()).strip("_")
    assert common.slug("Эскизы 2") == "эскизы_2" and common.slug("写真") == "写真"


# ---------- --skip-broken ------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(images, "KNOWN", {})


def break_some(data):
    """Three pictures of PACS that cannot be read."""
    dogs, horses = data / "PACS" / "photo" / "dog", data / "PACS" / "sketch" / "horse"
    (dogs / "pic_000.jpg").write_bytes(b"")
    file = dogs / "pic_001.jpg"
    file.write_bytes(file.read_bytes()[:300])
    (horses / "zz.png").symlink_to("nowhere")
    return [dogs / "pic_000.jpg", file, horses / "zz.png"]


def test_broken_images_are_left_out_and_counted(pacs_tree, capsys):
    whole = common.load_domains("pacs", pacs_tree)
    broken = {str(file) for file in break_some(pacs_tree)}
    for repeat in range(2):
        found = common.load_domains("pacs", pacs_tree, skip_broken=True)
        for domain, before in zip(found, whole):
            expected = [file for file in before.images.images if file not in broken]
            assert domain.images.images.tolist() == expected
            for file, label in zip(domain.images.images, domain.images.labels.tolist()):
                assert Path(file).parent.name == domain.images.classes[label]
        output = capsys.readouterr().out
        assert output.count("3 of 85 images are left out") == 1 - repeat  # nothing is read again
    assert all(file in images.left_out() for file in broken)
    (pacs_tree / "PACS" / "cartoon" / "guitar" / "bad.png").write_text("a fourth")
    common.load_domains("pacs", pacs_tree, skip_broken=True)
    assert "4 of 86" in images.left_out() and images.left_out().endswith("), ...")


def test_all_can_be_read(pacs_tree, capsys):
    common.load_domains("pacs", pacs_tree, skip_broken=True)
    assert "all can be read" in capsys.readouterr().out and not images.left_out()


def test_groups_stay_with_their_images(birds):
    more = ["b.png,0,0,0", "e.png,0,0,1", "d.png,1,0,0"]
    data = birds([*more, *BIRDS])
    for name in ("a.png", "b.png"):
        (data / "waterbird_complete95_forest2water2" / name).write_bytes(b"")
    sets, weights = common.load_id_and_ood("waterbirds", data, skip_broken=True)
    assert [Path(file).name for file in sets["train"].images] == ["e.png", "d.png", "c.png"]
    assert sets["train"].groups.tolist() == [1, 2, 2] and sets["train"].labels.tolist() == [0, 1, 1]
    assert torch.allclose(weights, torch.tensor([2 / 3]))  # one test image, in group 2


def test_a_class_without_a_readable_image_is_an_error(pacs_tree):
    for file in (pacs_tree / "PACS" / "photo" / "dog").iterdir():
        file.write_bytes(b"")
    with pytest.raises(common.InputError) as error:
        common.load_domains("pacs", pacs_tree, skip_broken=True)
    words = "--skip-broken: no image of class 'dog' in photo can be read", "photo/dog/pic_00"
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("script", [headpurify, clipood, ldfs])
def test_scripts_leave_broken_images_out(script, call_main, pacs_tree):
    first, *_ = break_some(pacs_tree)
    line = f"--dataset pacs --data-root {pacs_tree} --model tiny --workers 0 --modes zero-shot"
    error = call_main(script.main, line)
    assert error.startswith("error: cannot read image") and "--skip-broken" in error
    output = call_main(script.main, f"{line} --skip-broken")
    assert output.count("3 of 85 images are left out") == 2  # when they are found, and at the end
    assert str(first) in output
    result = next(Path("runs").rglob("result.json"))
    assert json.loads(result.read_text())["settings"]["skip_broken"] is True


@pytest.mark.filterwarnings("ignore:cov")
def test_vit_diverse_leaves_broken_images_out(call_main, birds):
    data = birds(BIRDS)
    (data / "waterbird_complete95_forest2water2" / "b.png").write_bytes(b"")
    line = f"--dataset waterbirds --data-root {data} --model tiny --workers 0"
    output = call_main(vit_diverse.main, f"{line} --skip-broken --cache")
    assert output.count("1 of 5 images are left out") == 2 and "b.png" in output
    assert "--cache: waterbirds: 2 images" in output


NO_FILES = [
    (headpurify, "tiny-pacs"),
    (clipood, "tiny-office"),
    (ldfs, "tiny-waterbirds"),
    (vit_diverse, "tiny-waterbirds"),
    (vit_diverse, "mnist-cifar"),
]
OF_FILES = [("--skip-broken", *case) for case in NO_FILES]
OF_FILES += [("--cache", *case) for case in NO_FILES if case[0] is not ldfs]  # which has none


@pytest.mark.parametrize("flag, script, dataset", OF_FILES)
def test_flags_of_files_are_refused_where_no_file_is_read(flag, script, dataset, call_main):
    error = call_main(script.main, f"--dataset {dataset} {flag}")
    assert error.startswith(f"error: {flag}") and f"no effect on {dataset}" in error
    assert len(error.splitlines()) == 1


def test_skip_broken_is_one_of_a_runs_settings(call_main, pacs_tree):
    """A run from before there was the flag is one without it."""
    line = f"--dataset pacs --data-root {pacs_tree} --model tiny --workers 0 --modes zero-shot"
    call_main(headpurify.main, line)
    file = next(Path("runs").rglob("result.json"))
    result = json.loads(file.read_text())
    del result["settings"]["skip_broken"]
    file.write_text(json.dumps(result))
    assert "--resume: found" in call_main(headpurify.main, f"{line} --resume")
    error = call_main(headpurify.main, f"{line} --resume --skip-broken")
    assert "other settings (skip_broken None, now True)" in error


def test_sets_with_parts_are_tried_too(imagenet, birds):
    args = argparse.Namespace(data_root=birds(BIRDS), cue=None, skip_broken=True)
    args.dataset, args.task = "imagenet", "domain-shift"
    folder = imagenet / "imagenet" / "images" / "train" / "n01440764"
    (folder / "0.JPEG").write_bytes(b"")
    folder = imagenet / "imagenetv2" / "imagenetv2-matched-frequency-format-val" / "3"
    (folder / "1.JPEG").write_bytes(b"")
    parts = clipood.load_data(args, 0)
    sizes = {"train": 23, "val": 24, "test": 24, "imagenetv2": 23, "imagenet-sketch": 24}
    sizes |= {"imagenet-a": 8, "imagenet-r": 8}
    assert {part: len(own) for part, own in parts.items()} == sizes
    args.dataset = "waterbirds"
    (imagenet / "waterbird_complete95_forest2water2" / "b.png").write_bytes(b"")
    usual, water, _ = ldfs.read_domains(args, 0)
    assert [Path(file).name for file in usual.images.images] == ["a.png"]
