"""`python common.py table`: runs of all methods, beside what the papers print."""

import json
import sys

import pytest

import common
import headpurify
from support import InputError


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """The lines that the command prints, in a folder that may have runs/."""
    monkeypatch.chdir(tmp_path)

    def call(*folders):
        monkeypatch.setattr(sys, "argv", ["common.py", "table", *folders])
        common.main()
        return capsys.readouterr().out.splitlines()

    return call


@pytest.fixture
def write(tmp_path):
    """A finished run, as a method leaves it."""

    def write(folder, target, seed, rows, dataset="pacs", **settings):
        path = tmp_path / folder / f"{dataset}-{target}-seed{seed}" / "result.json"
        path.parent.mkdir(parents=True)
        settings |= {"dataset": dataset, "target": target, "seed": seed, "modes": list(rows)}
        record = {"settings": settings, "target": target, "seed": seed, "rows": rows, "extra": {}}
        path.write_text(json.dumps(record))
        return path

    return write


def cells(lines, start):
    (line,) = [line for line in lines if line.startswith(start + "  ")]
    return [cell.strip() for cell in line.removeprefix(start).split("  ") if cell]


def accuracy(number):
    return {"target": number, "hold-out": 0.9}


def test_methods_stand_together_beside_their_papers(table, write):
    for target, numbers in {"photo": (0.5, 0.7), "sketch": (0.2, 0.4)}.items():
        for seed, number in enumerate(numbers):
            write("runs/clipood", target, seed, {"mms+bma": accuracy(number)}, lr=1)
            write("runs/headpurify/components", target, seed, {"lora": accuracy(number / 2)}, lr=2)
    write("runs/clipood", "photo", 2, {"mms+bma": accuracy(0.9)}, lr=1)  # its sketch is not there
    lines = table()
    assert lines[0].split() == "pacs, target accuracy, % photo sketch average seeds".split()
    # seeds 0.35 and 0.55: deviations are 0.1 / sqrt(2) of 0.2; of 0.5, 0.7, 0.9 it is 0.2
    assert cells(lines, "clipood mms+bma") == ["70.0 ± 20.0", "30.0 ± 14.1", "45.0 ± 14.1", "2"]
    assert cells(lines, "headpurify lora") == ["30.0 ± 7.1", "15.0 ± 7.1", "22.5 ± 7.1", "2"]
    assert cells(lines, "CLIPood, published: zero-shot CLIP") == ["-", "-", "96.2", "-"]
    assert cells(lines, "Attention Head Purification, published: HA-LoRA + DIG")[2] == "98.1"
    assert lines[-1] == "Finished runs: 9. Not finished: 0."


def test_runs_with_other_settings_stand_apart(table, write):
    write("runs/clipood", "photo", 0, {"mms": accuracy(0.5)}, lr=0.1, epochs=3)
    write("runs/clipood", "photo", 1, {"mms": accuracy(0.7)}, lr=0.2, epochs=3)
    write("more/clipood", "photo", 2, {"ms": accuracy(0.3), "mms": accuracy(0.6)}, lr=0.1, epochs=3)
    write("more/clipood/study", "photo", 0, {"mms": accuracy(0.5)}, lr=0.1, epochs=3)  # once more
    lines = table("runs", "more")
    assert cells(lines, "clipood mms [1]") == ["55.0 ± 7.1", "55.0 ± 7.1", "2"]
    assert cells(lines, "clipood mms [2]") == ["70.0", "70.0", "1"]
    assert cells(lines, "clipood ms [1]") == ["30.0", "30.0", "1"]
    assert "clipood [1]: lr 0.1" in lines and "clipood [2]: lr 0.2" in lines


def test_tasks_and_sources_have_tables_of_their_own(table, write):
    write("runs/clipood", "Art", 0, {"mms": {"total": 0.5, "base": 0.6}}, "officehome")
    write("runs/clipood", "Clipart", 0, {"mms": {"total": 0.3, "base": 0.4}}, "officehome")
    parts = {"target": 0.3, "target/a": 0.2, "target/b": 0.4}
    write("runs/ldfs", "from x", 0, {"ldfs": parts}, "officehome")
    write(
        "runs/vit_diverse",
        "",
        0,
        {"erm": {"id": 0.5, "published ood": 0.4, "ood": 0.3}},
        "waterbirds",
    )
    lines = table()
    titles = [line.split("  ")[0] for line in lines if "accuracy, %" in line]
    assert titles == [
        "officehome from x, target accuracy, %",
        "officehome, total accuracy, %",
        "waterbirds, ood accuracy, %",
    ]
    assert cells(lines, "clipood mms") == ["50.0", "30.0", "40.0", "1"]
    assert cells(lines, "CLIPood, published: CoOp") == ["82.7", "67.2", "-", "-"]
    assert cells(lines, "ldfs ldfs") == ["20.0", "40.0", "30.0", "1"]
    assert cells(lines, "vit_diverse erm") == ["50.0", "40.0", "30.0", "1"]
    assert cells(lines, "Learning Diverse Features in Vision Transformers, published: DIV") == [
        *("-", "83.87", "-", "-")
    ]


def test_unfinished_runs_are_named(table, write, tmp_path):
    finished = write("runs/clipood", "photo", 0, {"mms": accuracy(0.5)})
    for ending in ("partial", "old"):  # in the middle of taking its place
        left = finished.parent.with_name(f".pacs-photo-seed1.{ending}")
        left.mkdir()
        (left / "result.json").write_text(finished.read_text())
    *_, count, name = table()
    assert count == "Finished runs: 1. Not finished: 1."
    assert name == f"  {tmp_path}/runs/clipood/.pacs-photo-seed1.partial"


def test_folders_without_runs_and_other_results(table, tmp_path):
    with pytest.raises(InputError, match="no runs in nowhere"):
        table("nowhere")
    for text in ("{", "[]", '{"target": "photo"}', "null"):
        path = tmp_path / "runs" / "clipood" / "photo" / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        with pytest.raises(InputError, match=r"photo/result.json is no result of a run"):
            table()


def test_it_is_the_table_that_the_command_prints(table, call_main, monkeypatch, tmp_path):
    classes, *_ = common.TINY_BENCHMARKS["tiny-pacs"]
    monkeypatch.setitem(common.TINY_BENCHMARKS, "tiny-pacs", (classes, 8, 4))
    arguments = "--modes zero-shot --target all"
    own = call_main(headpurify.main, arguments).splitlines()
    *_, of_targets = [line for line in own if line.startswith("zero-shot  ")]
    expected = [cell.strip() for cell in of_targets.split("  ")[1:] if cell]
    assert cells(table(), "headpurify zero-shot") == [*expected, "1"]
