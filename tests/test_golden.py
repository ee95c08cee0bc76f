"""A small run of every mode and every study gives the numbers it gave before the redesign.

golden.json holds commands and what the code printed for them when its line caps were lifted, made
on one machine with one thread. Accuracies must be these; real numbers may differ in the last digits
where another machine's kernels round differently. GOLDEN_EXACT=1 wants every digit.
"""

import functools
import importlib
import json
import os
from pathlib import Path

import pytest
import torch

import common

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
EXACT = bool(os.environ.get("GOLDEN_EXACT"))


@pytest.fixture
def small_world(monkeypatch):
    """Few images and one thread, as when the numbers were made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = {name: (row[0], 24, 8) for name, row in common.TINY_BENCHMARKS.items()}
    monkeypatch.setattr(common, "TINY_BENCHMARKS", small)
    for name in ("draw_waterbirds", "draw_digits_and_vehicles"):
        draw = functools.partial(getattr(common, name), sizes=(400, 80, 160))
        monkeypatch.setattr(common, name, draw)
    yield
    torch.set_num_threads(threads)


def compare(found, expected, where):
    """Walks through what was expected; found may hold more."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert key in found, f"{where} lacks {key!r}"
            compare(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            compare(found[i], value, f"{where}/{i}")
    elif EXACT:
        assert found == expected, where
    else:
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), where


@pytest.mark.slow
@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['script']} {c['arguments']}")
def test_numbers_are_those_of_before(case, small_world, call_main, tmp_path):
    main = importlib.import_module(case["script"]).main
    printed = call_main(main, case["arguments"])
    (result,) = tmp_path.glob("runs/**/result.json")
    record = json.loads(result.read_text())
    assert set(record["rows"]) == set(case["rows"])
    compare(record["rows"], case["rows"], "rows")
    compare(record["extra"], case["extra"], "extra")
    assert "Best " in printed
