"""`python common.py data`: what is there, and is it whole?"""

import shutil
import sys
from pathlib import Path

import pytest

from support import InputError, data_sets
from support.benchmarks import DATASETS


@pytest.fixture
def say(monkeypatch, capsys):
    """What the command prints."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["common.py", "data", *map(str, arguments)])
        data_sets.main()
        return capsys.readouterr().out

    return call


def line(text, name):
    (found,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
    return found


def test_every_data_set_is_listed(say, pacs_tree):
    shutil.rmtree(pacs_tree / "PACS" / "sketch" / "dog")
    listed = say("--data-root", pacs_tree)
    for name in DATASETS:
        assert name == "pacs" or "missing" in line(listed, name)
    assert "not whole" in line(listed, "pacs")


def test_found_ones_with_their_sizes(say, pacs_tree):
    count = sum(1 for file in (pacs_tree / "PACS").rglob("*") if file.is_file())
    found = line(say("--data-root", pacs_tree), "pacs")
    assert str(pacs_tree / "PACS") in found and found.split()[-3:] == [str(count), "4", "7"]


def test_a_whole_one(say, pacs_tree, monkeypatch):
    count = sum(1 for file in (pacs_tree / "PACS").rglob("*") if file.is_file())
    monkeypatch.setitem(DATASETS["pacs"], "counts", [count])
    assert "can be read; as published" in say("--data-root", pacs_tree, "--check", "pacs")


def test_what_is_not_as_published_is_named(say, pacs_tree):
    (first, *_) = sorted((pacs_tree / "PACS" / "photo" / "dog").iterdir())
    Path(first).write_bytes(b"no picture")
    with pytest.raises(InputError, match="published are 9,991") as error:
        say("--data-root", pacs_tree, "--check", "pacs")
    assert str(first) in str(error.value)


def test_unknown_and_missing_ones(say, tmp_path):
    with pytest.raises(InputError, match="mean 'pacs'"):
        say("--check", "pcas")
    with pytest.raises(InputError, match="is not in"):
        say("--data-root", tmp_path, "--check", "vlcs")
