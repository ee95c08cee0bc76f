"""Helpers of several test files: commands run as a user runs them, generated trees in the layouts of real data sets."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def root():
    return ROOT


def call(arguments, cwd, **environment):
    command = [sys.executable, *(arguments.split() if isinstance(arguments, str) else arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def checkout(root, tmp_path):
    """A copy of what a user has after cloning."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for file in (root / "README.md", *root.glob("*.py")):
        shutil.copy(file, copy)
    shutil.copytree(root / "assets", copy / "assets")
    return copy


@pytest.fixture
def call_main(tmp_path, monkeypatch, capsys):
    """A method's `main` in this process, in a folder of its own that has results/; returns what it printed, or the
    message it stopped with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()

    def call(main, arguments):
        import common

        arguments = arguments.split() if isinstance(arguments, str) else arguments
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        try:
            common.command(main)
        except SystemExit as stopped:
            assert stopped.code == 2
            return capsys.readouterr().err
        return capsys.readouterr().out

    return call


def readme_commands(root):
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (root / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def readme_script(root, command):
    """Arguments for `call` of a command that the README has word for word; CI has run its `pip install` part."""
    assert command in readme_commands(root)
    return command.split("python ")[-1]


@pytest.fixture
def pacs_tree(tmp_path):
    """A PACS folder in the real layout: a few small generated JPEGs per class and domain. Returns the data root."""
    from PIL import Image

    import common
    from assets import tiny_world

    rng = common.tiny_rng(0, "pacs tree")
    for domain in common.BENCHMARKS["pacs"].domains:
        names = [name for name in common.PACS_CLASSES for _ in range(3)]
        colors, grounds = (rng.choice(list(kinds), len(names)) for kinds in (tiny_world.COLORS, tiny_world.BACKGROUNDS))
        for i, (name, pixels) in enumerate(zip(names, tiny_world.draw(names, domain, grounds, colors, rng))):
            folder = tmp_path / "data" / "PACS" / domain / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((64, 48)).save(folder / f"pic_{i:03}.jpg")
    return tmp_path / "data"
