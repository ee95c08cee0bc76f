"""--cache: training images that are decoded once. Its pixels are compared with Pillow's."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipood
import common
import headpurify
from support import cache, stop

RNG = np.random.default_rng(0)
SHAPES = [(400, 300), (300, 520), (256, 256), (90, 40), (700, 257)]  # (h, w)


@pytest.fixture
def photos(tmp_path):
    """Pictures of many shapes; the last is turned by its EXIF data. Returns their names."""
    files = []
    for number, (height, width) in enumerate(SHAPES):
        coarse = RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        files.append(str(tmp_path / f"{number}.jpg"))
        Image.fromarray(coarse).resize((width, height)).save(files[-1])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(files[-1]).save(files[-1], exif=exif)
    return files


def opened(files, folder):
    return cache.open_cache(files, folder, "Photos", 256)


def image_set(files):
    labels = torch.arange(len(files))
    return common.ImageSet(np.array(files), labels, ("a",), transform=common.load_clip().augment)


def test_its_images_are_those_of_the_files(photos, tmp_path, capsys):
    found = opened(photos, tmp_path / "cache")
    total = 0
    for number, file in enumerate(photos):
        picture = common.read_image(file)
        scale = min(1, 256 / min(picture.size))
        width, height = (int(scale * side) for side in picture.size)
        expected = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        assert np.array_equal(found[number].permute(1, 2, 0), expected)
        total += expected.size
    assert found.file.stat().st_size == total
    assert f"Photos: 5 images, about {total / 1e9:.2g} GB" in capsys.readouterr().out
    assert found.subset([3, 0])[1].shape == found[0].shape
    again = opened(photos, tmp_path / "cache")
    assert np.array_equal(again.places, found.places) and not capsys.readouterr().out


def test_changed_images_have_another_cache_and_the_old_one_goes(photos, tmp_path):
    folder = tmp_path / "cache"
    before = opened(photos, folder)
    (folder / ".partial-of-others").write_text("")
    killed = folder / f".partial-{before.file.name}"  # by a kill that nothing could tidy up after
    killed.write_bytes(b"half")
    Image.new("RGB", (30, 20), "red").save(photos[0])
    after = opened(photos, folder)
    assert after[0].shape == (3, 20, 30) and after[0].float().mean() < 86
    assert not before.file.exists() and not killed.exists()
    file = Path(photos[1])
    os.utime(file, ns=(0, 0))  # as when another picture of this size takes its place
    assert opened(photos, folder).file != after.file
    opened(photos[:2], folder)
    assert len(list(folder.glob("*.npy"))) == len(list(folder.glob("*.pixels"))) == 2


@pytest.mark.parametrize("how", ["broken", "gone", "stopped", "full"])
def test_nothing_half_written_stays(photos, tmp_path, monkeypatch, how):
    folder, expected, words = tmp_path / "cache", common.InputError, "cannot read image .*4.jpg"
    monkeypatch.setattr(cache, "make_room", lambda *_: folder.mkdir(exist_ok=True))
    if how == "broken":
        Path(photos[4]).write_bytes(Path(photos[4]).read_bytes()[:900])
    elif how == "gone":
        Path(photos[4]).unlink()
    elif how == "stopped":
        expected, words = stop.Stopped, "kept"
        monkeypatch.setattr(stop.heard, "number", 15)
    elif how == "full":
        words = "cannot write .*pixels: No space left"
        monkeypatch.setattr(cache, "small", no_space)
    with pytest.raises(expected, match=words):
        opened(photos, folder)
    assert not folder.exists() or not list(folder.iterdir())


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_two_at_once_make_one(photos, tmp_path, monkeypatch):
    written, write_pixels = [], cache.write_pixels
    monkeypatch.setattr(cache, "write_pixels", lambda *a: written.append(1) or write_pixels(*a))
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()

    def other():
        places = opened(photos, tmp_path / "cache").places
        results.put((len(written), places.tolist()))

    processes = [context.Process(target=other) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(times for times, _ in found) == 1  # one of them wrote
    assert all(places == found[0][1] for _, places in found)


def test_no_room_is_said_before_anything_is_written(photos, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(common.InputError, match="Photos: 5 images, about .* 1e-06 GB are free"):
        opened(photos, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(common.InputError, match="--cache: cannot write .*file"):
        opened(photos, tmp_path / "file")


def test_batches_do_not_depend_on_who_reads(photos, tmp_path):
    """And are those of the files, where these are small enough to be kept as they are."""
    small = {"files": image_set(photos[2:4])}
    small["cache"] = small["files"].cached(tmp_path / "cache", "photos")
    found = []
    for images in small.values():
        for workers in (0, 2):
            batches = common.SourceBatches({"photos": images}, 3, seed=4, workers=workers)
            found.append(torch.stack([next(batches)[0] for _ in range(3)]))
    assert found[0].dtype == torch.float32 and all(torch.equal(found[0], own) for own in found)
    halves = small["cache"].subset([1])
    assert torch.equal(halves.read(0), small["cache"].read(1))


SCRIPTS = [
    (headpurify, "--modes lora --epochs 1"),
    pytest.param(clipood, "--modes ms --epochs 1", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("script, modes", SCRIPTS)
def test_scripts_train_from_it_and_test_from_files(
    script, modes, call_main, pacs_tree, monkeypatch
):
    line = f"--dataset pacs --data-root {pacs_tree} --model tiny --workers 0"
    output = call_main(script.main, f"{line} {modes} --batch-size 4 --cache")
    assert output.count("--cache: ") == 3  # source domains
    kept = [len(np.load(file)) for file in (pacs_tree / ".cache").glob("*.npy")]
    assert kept == [17, 17, 17]  # 80 % of 21
    result = json.loads(next(Path("runs").rglob("result.json")).read_text())
    assert result["settings"]["cache"] is True

    read, read_image = set(), common.read_image
    monkeypatch.setattr(common, "read_image", lambda x: read.add(str(x)) or read_image(x))
    assert "--cache: " not in call_main(script.main, f"{line} {modes} --batch-size 4 --cache")
    assert len(read) == 3 * 4 + 21  # the hold-out and the target
    error = call_main(script.main, f"{line} {modes} --batch-size 4 --resume")
    assert "other settings (cache True, now None)" in error
    error = call_main(script.main, f"{line} --modes zero-shot --cache")
    assert error.startswith("error: --cache has no effect on any row: zero-shot")
