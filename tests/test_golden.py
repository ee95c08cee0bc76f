"""Small runs of every row and every study give the numbers that they gave before the redesign.

golden.json holds commands with what the code before it printed, to the last digit on one machine
with one thread. Kernels of another machine round differently: there, accuracies are still the same
(none of these small runs is that close), numbers agree to three digits. GOLDEN_EXACT=1 asks for
every digit, as a change of the code on one machine should. A record may hold more than was kept.
"""

import functools
import importlib
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from support import tiny_world

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
EXACT = os.environ.get("GOLDEN_EXACT") == "1"


@pytest.fixture
def small_world(monkeypatch):
    """One thread, and few images: as when the numbers were made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = {name: (row[0], 16, 8) for name, row in common.TINY_BENCHMARKS.items()}
    monkeypatch.setattr(common, "TINY_BENCHMARKS", small)
    for name in ("draw_waterbirds", "draw_digits_and_vehicles"):
        draw = functools.partial(getattr(tiny_world, name), sizes=(320, 80, 80))
        monkeypatch.setattr(tiny_world, name, draw)
    yield
    torch.set_num_threads(threads)


def compare(found, golden, where: str, exact: bool) -> None:
    """Every number of `golden`, nested dictionaries and lists, stands at the same place."""
    if isinstance(golden, dict):
        for key, value in golden.items():
            assert key in found, f"{where} has no {key!r}, only {list(found)}"
            compare(found[key], value, f"{where}[{key!r}]", exact)
    elif isinstance(golden, list):
        assert len(found) == len(golden), where
        for place, value in enumerate(golden):
            compare(found[place], value, f"{where}[{place}]", exact)
    elif exact or golden is None:
        assert found == golden, where
    else:
        assert found == pytest.approx(golden, rel=1e-3, abs=1e-6), where


def name_of(case: dict) -> str:
    return f"{case['script']} {case['arguments']}"


@pytest.mark.slow
@pytest.mark.parametrize("case", GOLDEN, ids=name_of)
def test_numbers_are_those_of_before(case, small_world, call_main, request, tmp_path):
    if "--dataset pacs" in case["arguments"]:
        request.getfixturevalue("pacs_tree")  # JPEGs in data/
    features = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
    np.save(tmp_path / "features.npy", features)  # for --class-features
    main = importlib.import_module(case["script"]).main
    printed = call_main(main, shlex.split(case["arguments"]))
    results = list(tmp_path.glob("runs/**/result.json"))
    assert len(results) == 1, printed
    record = json.loads(results[0].read_text())
    assert record["target"] == case["target"]
    assert set(record["rows"]) == set(case["rows"])
    compare(record["rows"], case["rows"], "rows", exact=True)
    compare(record["extra"], case["extra"], "extra", EXACT)
