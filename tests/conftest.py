"""Helpers of several test files: commands as a user runs them, trees in real layouts."""

import importlib
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def root():
    return ROOT


def call(arguments, cwd, **environment):
    arguments = arguments.split() if isinstance(arguments, str) else arguments
    options = {"cwd": cwd, "capture_output": True, "text": True}
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, **options)


@pytest.fixture
def checkout(root, tmp_path):
    """A copy of the scripts, to run as a user does after cloning."""
    others = shutil.ignore_patterns(".*", "data", "notebooks", "results", "runs", "tests")
    return shutil.copytree(root, tmp_path / "checkout", ignore=others)


@pytest.fixture
def call_main(tmp_path, monkeypatch, capsys):
    """Call a `main` in a folder that has results/; returns what it printed, or its error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()

    def call(main, arguments):
        from support import runs

        arguments = arguments.split() if isinstance(arguments, str) else arguments
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        try:
            runs.command(main)
        except SystemExit as stopped:
            assert stopped.code == 2
            return capsys.readouterr().err
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="session")
def small_vit(tmp_path_factory):
    """The name of a model of open_clip that is built in no time, with QuickGELU."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": 48, "layers": 3, "head_width": 12}
    config = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    file = tmp_path_factory.mktemp("open_clip") / "small-vit.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    return file.stem


@pytest.fixture
def small_world(monkeypatch):
    """tiny-pacs with 5 training and 4 balanced images of a class and domain."""
    import common

    classes, *_ = common.TINY_BENCHMARKS["tiny-pacs"]
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (classes, 5, 4))


class Code:
    """What a pickle may do to whoever loads it."""

    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


@pytest.fixture
def wrong_files(tmp_path, monkeypatch):
    """Files that are no tensors, in the folder of `call_main`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("hello, this is no checkpoint\n")
    (tmp_path / "nothing").touch()
    (tmp_path / "code").write_bytes(pickle.dumps(Code(), protocol=2))
    torch.save({"weight": Code()}, tmp_path / "zipped")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other")
    return tmp_path


@pytest.fixture
def settings_of(monkeypatch):
    """The settings that a command runs with, without running it; those of its rows are `.rows`."""

    def read(command):
        script, *arguments = shlex.split(command)[1:]
        monkeypatch.chdir(ROOT)
        args, rows = importlib.import_module(script.removesuffix(".py")).settings(arguments)
        args.rows = rows
        return args

    return read


@pytest.fixture
def pacs_tree(tmp_path):
    """A PACS folder in the real layout: a few JPEGs per class and domain. Returns the data root."""
    from support import tiny_world

    rng = tiny_world.tiny_rng(0, "pacs tree")
    names = np.repeat(tiny_world.PACS_CLASSES, 3)
    for domain in tiny_world.TINY_DOMAINS:
        colors = rng.choice(list(tiny_world.COLORS), len(names))
        grounds = rng.choice(list(tiny_world.BACKGROUNDS), len(names))
        drawn = tiny_world.draw(names, domain, grounds, colors, rng)
        for i, (name, pixels) in enumerate(zip(names, drawn)):
            folder = tmp_path / "data" / "PACS" / domain / name
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((64, 48))
            image.save(folder / f"pic_{i:03}.jpg")
    return tmp_path / "data"


# the first 12 things of the tiny world
NAMES = tuple("bird boat car cup dog elephant fish flower giraffe guitar horse house".split())


def write_image(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 36), (shade % 256, 90, 160)).save(path)


@pytest.fixture
def caltech(tmp_path):
    """Five classes, an odd number, in CoOp's layout; returns the data root."""
    parts = {"train": [], "val": [], "test": []}
    folder = tmp_path / "data" / "caltech-101"
    for part, count in (("train", 20), ("val", 5), ("test", 4)):
        for label, name in enumerate(NAMES[:5]):
            for i in range(count if name != "boat" or part != "train" else 3):
                file = f"{name}/image_{part}_{i}.jpg"
                parts[part].insert(0, [file, label, name])
                write_image(folder / "101_ObjectCategories" / file, 40 * label)
    (folder / "split_zhou_Caltech101.json").write_text(json.dumps(parts))
    return tmp_path / "data"


@pytest.fixture
def aircraft(tmp_path):
    folder, number = tmp_path / "data" / "fgvc_aircraft", 1000
    names = ["house", "art painting", "cup"]  # a name with a space
    for part in ("train", "val", "test"):
        lines = []
        for name in ["cup", "cup", "art painting", "art painting", "house", "house"]:
            number += 1
            lines.append(f"{number} {name}")
            write_image(folder / "images" / f"{number}.jpg", number)
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    (folder / "variants.txt").write_text("\n".join(names) + "\n")
    return tmp_path / "data"


@pytest.fixture
def imagenet(tmp_path):
    """Twelve classes, so that folders 10 and 11 of ImageNetV2 sort before 2; four in -A and -R."""
    data = tmp_path / "data"
    ids = [f"n{1440764 + 37 * i:08}" for i in range(12)]
    lists = "".join(f"{identity} {name}\n" for identity, name in zip(ids, NAMES))
    for base, parts, folders in (
        ("imagenet", ("images/train", "images/val"), ids),
        ("imagenetv2", ("imagenetv2-matched-frequency-format-val",), [str(i) for i in range(12)]),
        ("imagenet-sketch", ("images",), ids),
        ("imagenet-adversarial", ("imagenet-a",), ids),
        ("imagenet-rendition", ("imagenet-r",), ids),
    ):
        for part in parts:
            for label, folder in enumerate(folders):
                if part[-2:] not in ("-a", "-r") or label in (2, 5, 10, 11):
                    for i in range(2):
                        write_image(data / base / part / folder / f"{i}.JPEG", 20 * label)
        (data / base / "classnames.txt").write_text(lists)
    (data / "imagenet-rendition" / "imagenet-r" / "README.txt").write_text("not a class")
    (data / "imagenet-sketch" / "images" / ids[0] / ".DS_Store").write_text("not an image")
    return data
