"""Pixels of files as a browser shows them, and files that cannot be read. No code of ours is asked
what is right: turns are numpy's, transparency is a formula."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import common

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY_16 = RNG.integers(0, 2**16, (6, 9), dtype=np.uint16)


def pixels(path):
    image = common.read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def on_white(colors, alpha):
    """(h, w, 3) and (h, w), 0 ... 255."""
    share = alpha[..., None] / 255
    return share * colors.astype(float) + (1 - share) * 255


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


# ---------- Pictures that were read right stay as they were --------------------------------------
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.bmp", "a.webp", "a.tif", "a.ppm"])
def test_plain_colours_are_what_pillow_reads(tmp_path, name):
    Image.fromarray(COLORS).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels(tmp_path / name), expected)
    if name.endswith(("png", "bmp", "tif", "ppm")):
        assert np.array_equal(expected, COLORS)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_grey_and_black_and_white(tmp_path, name):
    values = COLORS[..., 0]
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), grey(values))
    Image.fromarray(values > 99).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), grey(255 * (values > 99)))


def test_palette_and_print_colours(tmp_path):
    palette = Image.fromarray(COLORS).quantize(5)
    palette.save(tmp_path / "palette.png")
    own = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
    assert np.array_equal(pixels(tmp_path / "palette.png"), own)
    ink = RNG.integers(0, 256, (6, 9, 4), dtype=np.uint8)  # cyan, magenta, yellow, black
    Image.fromarray(ink, "CMYK").save(tmp_path / "ink.tif")
    paper = 255 - ink.astype(float)
    expected = paper[..., :3] * paper[..., 3:] / 255
    assert np.abs(pixels(tmp_path / "ink.tif") - expected).max() <= 1
    flat = np.tile(ink[:1, :1], (16, 16, 1))
    Image.fromarray(flat, "CMYK").save(tmp_path / "ink.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "ink.jpg") - expected[0, 0]).max() <= 3


# ---------- Upright, 8 bits, on white ------------------------------------------------------------
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
def test_a_picture_is_turned_as_its_camera_noted(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("png", "jpg"):
        plain, noted = tmp_path / f"plain.{kind}", tmp_path / f"noted.{kind}"
        Image.fromarray(COLORS).save(plain)
        Image.fromarray(COLORS).save(noted, exif=exif)
        assert np.array_equal(pixels(noted), TURNS[orientation](pixels(plain)))
    tiff = tmp_path / "noted.tif"
    Image.fromarray(COLORS).save(tiff, tiffinfo={0x0112: orientation})
    assert np.array_equal(pixels(tiff), TURNS[orientation](COLORS))


def test_grey_of_16_bits_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY_16).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), TURNS[6](grey(GREY_16 >> 8)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("data", [b"Exif\0\0no", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
def test_broken_exif_data_say_nothing(tmp_path, data):
    Image.fromarray(COLORS).save(tmp_path / "plain.jpg")
    Image.fromarray(COLORS).save(tmp_path / "noted.jpg", exif=data)
    assert np.array_equal(pixels(tmp_path / "noted.jpg"), pixels(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bits_are_scaled_to_8(tmp_path, name):
    Image.fromarray(GREY_16).save(tmp_path / name)
    found = pixels(tmp_path / name)
    assert np.abs(found - grey(GREY_16) / 65535 * 255).max() <= 1
    ends = np.array([[0, 65535]], np.uint16)
    Image.fromarray(ends).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), grey([[0, 255]]))


def test_a_grey_of_16_bits_that_means_transparent(tmp_path):
    Image.fromarray(GREY_16).save(tmp_path / "a.png", transparency=int(GREY_16[2, 3]))
    expected = grey(GREY_16 >> 8)
    expected[2, 3] = 255
    assert np.array_equal(pixels(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_white_are_an_error(tmp_path, dtype):
    Image.fromarray(GREY_16.astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(common.InputError, match="a.tif .*save it with 8 or 16 bits"):
        common.read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_transparency_lies_on_white(tmp_path, name):
    alpha = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    alpha[0, :2] = 0, 255
    Image.fromarray(np.dstack([COLORS, alpha])).save(tmp_path / name, lossless=True, exact=True)
    found = pixels(tmp_path / name)
    assert np.abs(found - on_white(COLORS, alpha)).max() <= 1
    assert (found[0, 0] == 255).all() and np.array_equal(found[0, 1], COLORS[0, 1])


def test_opaque_pictures_with_transparency_are_as_without(tmp_path):
    opaque = np.full((6, 9), 255, np.uint8)
    Image.fromarray(np.dstack([COLORS, opaque])).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), COLORS)


def test_transparent_grey(tmp_path):
    alpha = COLORS[..., 1]
    Image.fromarray(COLORS[..., :2], "LA").save(tmp_path / "a.png")
    expected = on_white(grey(COLORS[..., 0]), alpha)
    assert np.abs(pixels(tmp_path / "a.png") - expected).max() <= 1


def palette_picture():
    """Five colours, a column each."""
    places = np.tile(np.arange(5, dtype=np.uint8), (6, 1))
    picture = Image.fromarray(places, "P")
    picture.putpalette(COLORS[0, :5].flatten().tolist())
    return picture, np.tile(COLORS[0, :5], (6, 1, 1))


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_a_palette_with_one_transparent_colour(tmp_path, name):
    picture, colors = palette_picture()
    picture.save(tmp_path / name, transparency=2)
    colors[:, 2] = 255
    assert np.array_equal(pixels(tmp_path / name), colors)


def test_a_palette_with_many(tmp_path):
    picture, colors = palette_picture()
    picture.save(tmp_path / "a.png", transparency=bytes([0, 51, 102, 255, 255]))
    alpha = np.tile([0, 51, 102, 255, 255], (6, 1))
    assert np.abs(pixels(tmp_path / "a.png") - on_white(colors, alpha)).max() <= 1


def test_one_colour_that_means_transparent(tmp_path):
    key = tuple(COLORS[2, 3].tolist())
    Image.fromarray(COLORS).save(tmp_path / "a.png", transparency=key)
    expected = COLORS.copy()
    expected[2, 3] = 255
    assert np.array_equal(pixels(tmp_path / "a.png"), expected)
    bits = COLORS[..., 0] > 99
    for value, shown in ((0, np.full((6, 9), 255)), (1, 255 * bits)):  # black, white on white
        Image.fromarray(bits).save(tmp_path / "a.png", transparency=value)
        assert np.array_equal(pixels(tmp_path / "a.png"), grey(shown))


# ---------- Files that cannot be read ------------------------------------------------------------
def damage(path, how):
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:900])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>404</html>")
    elif how == "bits":
        data = bytearray(path.read_bytes())
        data[300] ^= 255
        path.write_bytes(data)
    elif how == "gone":
        path.unlink()
        path.symlink_to("nowhere.png")


@pytest.mark.parametrize(
    "name, how, words",
    [
        ("a.jpg", "truncated", "image file is truncated"),
        ("a.png", "truncated", "image file is truncated"),
        ("a.png", "empty", "cannot identify"),
        ("a.jpg", "text", "cannot identify"),
        ("a.png", "bits", "broken data stream"),
        ("a.png", "gone", "No such file or directory; it is a link to nowhere.png"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, name, how, words):
    damage(tmp_path / name, how)
    with pytest.raises(common.InputError) as error:
        common.read_image(tmp_path / name)
    message = str(error.value)
    assert message.startswith(f"cannot read image {tmp_path / name} ({words}")
    assert "mend it, remove it, or give --skip-broken" in message and "\n" not in message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_pictures_are_read_and_gigantic_ones_refused(tmp_path, monkeypatch):
    Image.fromarray(COLORS).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # of 54: Pillow warns
    assert np.array_equal(pixels(tmp_path / "a.png"), COLORS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(common.InputError, match="a.png .*54 pixels.* exceeds limit"):
        common.read_image(tmp_path / "a.png")


# ---------- Cropped and mirrored at random -------------------------------------------------------
def test_training_images_are_cropped_as_pillow_would():
    """8-bit tensors take a third of Pillow's time. The difference is a rounding."""
    tiny = common.load_clip()
    picture = Image.fromarray(COLORS).resize((500, 400), Image.Resampling.BICUBIC)
    for seed in range(8):
        torch.manual_seed(seed)
        found = tiny.augment.crop(picture)
        assert found.dtype == torch.uint8 and found.shape == (3, 32, 32)
        torch.manual_seed(seed)
        expected = v2.RandomResizedCrop(32, (0.7, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
        expected = np.asarray(v2.RandomHorizontalFlip()(expected(picture)))
        difference = found.permute(1, 2, 0).numpy().astype(int) - expected
        assert abs(difference).max() <= 2
        torch.manual_seed(seed)
        assert torch.allclose(tiny.augment(picture), (found / 255 - 0.5) / 0.25, atol=1e-6)
