"""Benchmarks in their real layouts, images of every kind, `python common.py data`.

Images are compared with numpy and with formulas, folders with torchvision's ImageFolder.
"""

import shutil

import numpy as np
import pytest
from conftest import NAMES, write_image
from PIL import Image
from torchvision.datasets import ImageFolder

from support import InputError, slug
from support.benchmarks import DATASETS, list_data_sets, read_dataset, read_image, read_own_folders

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY_16 = RNG.integers(0, 2**16, (6, 9), dtype=np.uint16)
IMAGENET_SHIFTS = ["imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r"]


def shade_of(file):
    return np.asarray(read_image(file))[0, 0, 0].item()


# ---------- Benchmarks in CoOp's layouts ---------------------------------------------------------
def test_split_file_reader(caltech):
    classes, parts = read_dataset("caltech101", caltech)
    assert {name: len(part) for name, part in parts.items()} == {"train": 83, "val": 25, "test": 20}
    assert tuple(classes) == NAMES[:5]
    for file, label in parts["test"]:
        assert file.parent.name == NAMES[label] and abs(shade_of(file) - 40 * label) < 8


def test_aircraft_reader(aircraft):
    classes, parts = read_dataset("fgvcaircraft", aircraft)
    assert classes == ["house", "art painting", "cup"]
    assert [label for _, label in parts["train"]] == [2, 2, 1, 1, 0, 0]
    assert parts["val"][0][0] == aircraft / "fgvc_aircraft" / "images" / "1007.jpg"


def test_imagenet_reader(imagenet):
    classes, parts = read_dataset("imagenet", imagenet)
    assert tuple(classes) == NAMES and len(parts["val"]) == 24
    assert "/val/" in parts["test"][0][0]


@pytest.mark.parametrize("name", IMAGENET_SHIFTS)
def test_imagenet_shift_readers(imagenet, name):
    classes, parts = read_dataset(name, imagenet)
    subset = name in ("imagenet-a", "imagenet-r")
    assert classes == [NAMES[i] for i in ((2, 5, 10, 11) if subset else range(12))]
    assert len(parts["test"]) == 2 * len(classes)
    for file, label in parts["test"]:
        assert abs(shade_of(file) - 20 * NAMES.index(classes[label])) < 8, file


@pytest.mark.parametrize(
    "name, words",
    [
        ("split_zhou_Caltech101.json", ("FileNotFoundError", "split_zhou", "CoOp")),
        ("101_ObjectCategories", ("no image", "101_ObjectCategories", "part train")),
        ("", ("'caltech101' is not in", "--data-root", "CoOp", "tiny-office")),
    ],
)
def test_what_is_missing_is_one_clear_error(caltech, name, words):
    (caltech / "caltech-101" / name).rename(caltech / "elsewhere")
    with pytest.raises(InputError) as error:
        read_dataset("caltech101", caltech)
    assert all(word in str(error.value) for word in words), error.value


def test_imagenet_with_a_class_missing_in_one_part(imagenet):
    (imagenet / "imagenet" / "images" / "val" / "n01440764").rename(imagenet / "elsewhere")
    with pytest.raises(InputError, match="train has folders of 12 classes, val of 11"):
        read_dataset("imagenet", imagenet)


# ---------- Waterbirds ---------------------------------------------------------------------------
def test_waterbirds_groups_are_bird_and_background(tmp_path):
    lines = ["img_filename,y,split,place", "a.png,0,0,0", "b.png,1,0,1", "c.png,1,0,0"]
    lines += ["d.png,0,1,1", "e.png,1,2,0"]
    folder = tmp_path / "waterbird_complete95_forest2water2"
    for i, name in enumerate("abcde"):
        write_image(folder / f"{name}.png", 40 * i)
    (folder / "metadata.csv").write_text("\n".join(lines))
    _, parts = read_dataset("waterbirds", tmp_path)
    assert [file.name for file, *_ in parts["train"]] == ["a.png", "b.png", "c.png"]
    assert [item[1:] for item in parts["train"]] == [(0, 0), (1, 3), (1, 2)]
    assert [item[1:] for item in parts["val"] + parts["test"]] == [(0, 1), (1, 2)]


# ---------- The user's own images ----------------------------------------------------------------
@pytest.fixture
def own_folder(tmp_path):
    """Two domains of two classes, with names as people give them."""
    for domain in ("Photos 2024", "эскизы"):
        for name in ("große Katze", "dog"):
            for file in ("1.png", "two.JPG", "Ω 3.Png"):
                write_image(tmp_path / "my pictures" / domain / name / file, len(file))
    return tmp_path / "my pictures"


def test_own_images_are_those_of_image_folder(own_folder):
    write_image(own_folder / "эскизы" / "dog" / "more" / "4.png", 9)
    write_image(own_folder / "эскизы" / "dog" / "a" / "b" / "5.png", 9)
    for name in ("эскизы", "эскизы/dog", "эскизы/dog/1.png"):  # links are followed
        elsewhere = own_folder.parent / name.replace("/", " ")
        (own_folder / name).rename(elsewhere)
        (own_folder / name).symlink_to(elsewhere)
    classes, domains = read_own_folders(own_folder)
    assert classes == ["dog", "große Katze"] and list(domains) == ["Photos 2024", "эскизы"]
    for domain, items in domains.items():
        assert items == ImageFolder(own_folder / domain).samples


def test_hidden_files_and_folders_are_ignored(own_folder):
    expected = read_own_folders(own_folder)
    for file in list(own_folder.rglob("*.png")):
        file.with_name(f"._{file.name}").write_bytes(b"Mac OS X")
        file.with_name(".DS_Store").write_text("Mac OS X")
        file.with_name("Thumbs.db").write_text("Windows")
        write_image(file.parent / ".ipynb_checkpoints" / "1-checkpoint.png", 3)
    write_image(own_folder / "эскизы" / ".thumbnails" / "1.png", 3)
    shutil.copytree(own_folder / "эскизы", own_folder / "__MACOSX" / "эскизы")
    (own_folder / ".git").mkdir()
    (own_folder / "notes.txt").write_text("no domain")
    (own_folder / "эскизы" / "notes.txt").write_text("no class")
    assert read_own_folders(own_folder) == expected


@pytest.mark.parametrize(
    "gone, words",
    [
        ("эскизы", "one domain folder only, 'Photos 2024'; .*<domain>/<class>/<image>"),
        ("*/dog", "one class only, 'große Katze'; .*<domain>/<class>/<image>"),
    ],
)
def test_wrong_own_folders_are_one_clear_error(own_folder, gone, words):
    for path in own_folder.glob(gone):
        shutil.rmtree(path)
    with pytest.raises(InputError, match=words):
        read_own_folders(own_folder)


def test_slug_keeps_letters_of_every_script():
    assert slug("Эскизы 2") == "эскизы_2" and slug("写真") == "写真"
    assert slug("_Real World (v1.0) - a/b_") == "real_world_v1.0_-_a_b"


# ---------- An image -----------------------------------------------------------------------------
def pixels(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def on_white(colors, alpha):
    """(h, w, 3) and (h, w), 0 ... 255."""
    opacity = alpha[..., None] / 255
    return opacity * colors.astype(float) + (1 - opacity) * 255


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_grey_and_black_and_white(tmp_path, name):
    values = COLORS[..., 0]
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), grey(values))
    Image.fromarray(values > 99).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), grey(255 * (values > 99)))


# by EXIF's definition: where the first row and the first column of the file are shown
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],  # top, right
    3: lambda x: x[::-1, ::-1],  # bottom, right
    4: lambda x: x[::-1],  # bottom, left
    5: lambda x: x.swapaxes(0, 1),  # left, top
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda x: x.swapaxes(0, 1)[::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", TURNS)
def test_an_image_is_turned_as_its_camera_noted(tmp_path, orientation):
    turn, exif = TURNS[orientation], Image.Exif()
    exif[0x0112] = orientation
    for kind in ("png", "jpg"):
        plain, noted = tmp_path / f"plain.{kind}", tmp_path / f"noted.{kind}"
        Image.fromarray(COLORS).save(plain)
        Image.fromarray(COLORS).save(noted, exif=exif)
        assert np.array_equal(pixels(noted), turn(pixels(plain)))
    Image.fromarray(COLORS).save(tmp_path / "noted.tif", tiffinfo={0x0112: orientation})
    assert np.array_equal(pixels(tmp_path / "noted.tif"), turn(COLORS))
    Image.fromarray(GREY_16).save(tmp_path / "grey.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "grey.png"), turn(grey(GREY_16 >> 8)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("data", [b"Exif\0\0no", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
def test_broken_exif_data_are_ignored(tmp_path, data):
    Image.fromarray(COLORS).save(tmp_path / "plain.jpg")
    Image.fromarray(COLORS).save(tmp_path / "noted.jpg", exif=data)
    assert np.array_equal(pixels(tmp_path / "noted.jpg"), pixels(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bits_are_scaled_to_8(tmp_path, name):
    Image.fromarray(GREY_16).save(tmp_path / name)
    assert np.abs(pixels(tmp_path / name) - grey(GREY_16) / 65535 * 255).max() <= 1
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), grey([[0, 255]]))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_white_are_an_error(tmp_path, dtype):
    Image.fromarray(GREY_16.astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="a.tif .*save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


ALPHA = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
ALPHA[0, :2] = 0, 255
KEY = tuple(COLORS[2, 3].tolist())  # the colour that means transparent
ONE_CLEAR = np.full((6, 9), 255)
ONE_CLEAR[2, 3] = 0
RGBA = Image.fromarray(np.dstack([COLORS, ALPHA]))
FIVE = [0, 51, 102, 255, 255]
STRIPES = np.tile(COLORS[0, :5], (6, 1, 1))  # five colours, one a column
PALETTE = Image.fromarray(np.tile(np.arange(5, dtype=np.uint8), (6, 1)), "P")
PALETTE.putpalette(COLORS[0, :5].flatten().tolist())


@pytest.mark.parametrize(
    "name, image, options, colors, alpha",
    [
        ("a.png", RGBA, {}, COLORS, ALPHA),
        ("a.webp", RGBA, {"lossless": True, "exact": True}, COLORS, ALPHA),
        ("a.png", RGBA.convert("LA"), {}, grey(RGBA.convert("L")), ALPHA),
        ("a.png", RGBA.convert("RGB"), {"transparency": KEY}, COLORS, ONE_CLEAR),
        ("a.gif", PALETTE, {"transparency": 2}, STRIPES, [255, 255, 0, 255, 255]),
        ("a.png", PALETTE, {"transparency": bytes(FIVE)}, STRIPES, FIVE),
    ],
)
def test_transparent_images_are_shown_on_white(tmp_path, name, image, options, colors, alpha):
    image.save(tmp_path / name, **options)
    alpha = np.broadcast_to(alpha, colors.shape[:2])
    shown, expected = pixels(tmp_path / name), on_white(colors, alpha)
    assert np.abs(shown - expected).max() <= 1
    extreme = (alpha == 0) | (alpha == 255)
    assert np.array_equal(shown[extreme], expected[extreme])


# ---------- python common.py data ----------------------------------------------------------------
DAMAGE = [
    ("a.jpg", lambda data: data[:900], "image file is truncated"),
    ("a.png", lambda data: b"", "cannot identify"),
    ("b.jpg", lambda data: b"<html>404</html>", "cannot identify"),
    ("c.png", lambda data: data[:300] + b"flip" + data[304:], "broken data stream"),
]


@pytest.fixture
def list_data(capsys, pacs_tree):
    """What the command prints."""

    def call(*arguments):
        list_data_sets(["--data-root", str(pacs_tree), *arguments])
        return capsys.readouterr().out

    return call


def line_of(name, text):
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
    return line


def test_every_data_set_is_listed(list_data, pacs_tree):
    count = len(list((pacs_tree / "PACS").rglob("*.jpg")))
    text = list_data()
    assert line_of("pacs", text).split()[1:] == [str(pacs_tree / "PACS"), str(count), "4", "7"]
    assert all("missing" in line_of(name, text) for name in DATASETS if name != "pacs")
    shutil.rmtree(pacs_tree / "PACS" / "sketch" / "dog")
    assert "not complete" in line_of("pacs", list_data())


def test_a_complete_data_set(list_data, pacs_tree, monkeypatch):
    count = len(list((pacs_tree / "PACS").rglob("*.jpg")))
    monkeypatch.setitem(DATASETS["pacs"], "counts", [count])
    assert "can be read; as published" in list_data("--check", "pacs")
    text = list_data("--check", f"folder:{pacs_tree / 'PACS'}")
    assert f"all {count} images of 7 classes can be read; no published count" in text


def test_every_unreadable_image_is_named(list_data, pacs_tree):
    folder = pacs_tree / "PACS" / "photo" / "dog"
    for name, damage, _ in DAMAGE:
        Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / name)
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
    for name in ("pacs", f"folder:{pacs_tree / 'PACS'}"):
        with pytest.raises(InputError) as error:
            list_data("--check", name)
        message = str(error.value)
        assert message.count("cannot be read") == len(DAMAGE)
        assert all(f"{folder / file} cannot be read ({why}" in message for file, _, why in DAMAGE)
        assert ("published are 9,991" in message) == (name == "pacs")
