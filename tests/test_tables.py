"""Tables, paired differences and closing lines of records; `common.py table` on folders of runs."""

import json
import math
from pathlib import Path

import pytest

import common
import headpurify
from support import tables


def make_records(**rows):
    """Targets x and y, seeds 0 and 1; rows: their accuracies in the order x0, x1, y0, y1."""
    runs = []
    for index, (target, seed) in enumerate((("x", 0), ("x", 1), ("y", 0), ("y", 1))):
        numbers = {}
        for row, accuracies in rows.items():
            numbers[row] = {"target": accuracies[index], "target/x": 0.0}
        runs.append({"target": target, "seed": seed, "rows": numbers, "extra": {}})
    return runs


A_AND_B = {"a": (0.1, 0.3, 0.5, 0.5), "b": (0.3, 0.3, 0.6, 0.6)}


def test_a_paired_difference_by_hand():
    """Averaged over targets within a seed first: seeds gain 0.15 and 0.05, each from two runs."""
    runs = make_records(**A_AND_B)
    error = math.sqrt(0.05**2 + 0.05**2) / math.sqrt(2)
    assert tables.paired(runs, "b", "a", "target") == pytest.approx((0.1, error, 2))
    assert "+10.0 (se 5.0, 2 seeds)" in tables.table("T", runs, "target")
    assert tables.difference(runs[::2], "b", "a", "target") == "+15.0 (1 seed)"
    assert tables.difference(runs, "b", "a", "source") == "-"


def test_the_closing_line_reads_the_table():
    runs = make_records(**A_AND_B)
    text = tables.closing_line(runs)
    assert "b, 45.0 %" in text and "above a" in text and "less than two standard errors" in text
    runs = make_records(a=(0.5, 0.5, 0.5, 0.5), b=(0.1, 0.1, 0.2, 0.2))
    assert "a, 50.0 %" in tables.closing_line(runs)
    assert "above b: more than two standard errors" in tables.closing_line(runs)
    assert "one seed" in tables.closing_line(runs[:1])


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*folders):
        tables.table_runs(folders)
        return capsys.readouterr().out.splitlines()

    return call


def write(script, target, seed, rows, dataset="pacs", folder="runs", **settings):
    """The result of a finished run, as a method leaves it in the folder of `table`."""
    path = Path(folder) / script / f"{dataset}-{target}-seed{seed}" / "result.json"
    path.parent.mkdir(parents=True)
    settings |= {"script": script, "dataset": dataset, "target": target, "seed": seed}
    settings["modes"] = list(rows)
    record = {"settings": settings, "target": target, "seed": seed, "rows": rows, "extra": {}}
    path.write_text(json.dumps(record))
    return path


def cells(lines, start):
    (line,) = [line for line in lines if line.startswith(start + "  ")]
    return [cell.strip() for cell in line.removeprefix(start).split("  ") if cell]


def accuracy(number):
    return {"target": number, "hold-out": 0.9}


def test_methods_stand_together(table):
    """Deviations over seeds; an average of the seeds that have all targets, once each."""
    for target, numbers in {"photo": (0.5, 0.7), "sketch": (0.2, 0.4)}.items():
        for seed, number in enumerate(numbers):
            write("clipood", target, seed, {"mms+bma": accuracy(number)}, lr=1)
            write("headpurify", target, seed, {"lora": accuracy(number / 2)}, lr=2)
    write("clipood", "photo", 2, {"mms+bma": accuracy(0.9)}, lr=1)  # its sketch is not finished
    again = write("clipood", "photo", 0, {"mms+bma": accuracy(0.5)}, folder="runs/again", lr=1)
    again.with_name("checkpoint.pt").touch()  # killed before it was removed
    unfinished = write("clipood", "sketch", 2, {})
    unfinished.rename(unfinished.with_name("checkpoint.pt"))
    lines = table()
    assert lines[0].split() == "pacs, target accuracy, % photo sketch average seeds".split()
    # seeds 0.35 and 0.55: deviations are 0.1 / sqrt(2) of 0.2; of 0.5, 0.7, 0.9 it is 0.2
    assert cells(lines, "clipood mms+bma") == ["70.0 ± 20.0", "30.0 ± 14.1", "45.0 ± 14.1", "2"]
    assert cells(lines, "headpurify lora") == ["30.0 ± 7.1", "15.0 ± 7.1", "22.5 ± 7.1", "2"]
    assert lines[-2] == "Finished runs: 10. Not finished: 1."
    assert lines[-1] == "  runs/clipood/pacs-sketch-seed2"


def test_runs_with_other_settings_stand_apart(table):
    for seed, (lr, number) in enumerate(((0.1, 0.5), (0.2, 0.7))):
        for target in ("photo", "sketch"):
            write("clipood", target, seed, {"mms": accuracy(number)}, lr=lr, epochs=3)
    rows = {"ms": accuracy(0.3), "mms": accuracy(0.6)}
    write("clipood", "photo", 2, rows, folder="more", lr=0.1, epochs=3)
    lines = table("runs", "more")
    assert cells(lines, "clipood mms (lr 0.1)") == ["55.0 ± 7.1", "50.0", "50.0", "1"]
    assert cells(lines, "clipood mms (lr 0.2)") == ["70.0", "70.0", "70.0", "1"]
    assert cells(lines, "clipood ms (lr 0.1)") == ["30.0", "-", "-", "0"]


def test_tasks_and_sources_have_tables_of_their_own(table):
    for target, number in (("Art", 0.5), ("Clipart", 0.3)):
        rows = {"mms": {"total": number, "base": number + 0.1}}
        write("clipood", target, 0, rows, "officehome")
    write("ldfs", "from x", 0, {"ldfs": {"target": 0.3, "target/a": 0.2}}, "officehome")
    write("vit_diverse", "", 0, {"erm": {"id": 0.5, "ood": 0.3}}, "waterbirds")
    lines = table()
    titles = {line.split("  ")[0] for line in lines if ", %" in line}
    assert titles == {"officehome, total accuracy, %", "officehome from x, %", "waterbirds, %"}
    assert cells(lines, "clipood mms") == ["50.0", "30.0", "40.0", "1"]
    assert cells(lines, "ldfs ldfs") == ["30.0", "1"]
    assert cells(lines, "vit_diverse erm") == ["50.0", "30.0", "1"]


def test_average_over_data_sets_by_hand(table):
    """Targets within a data set first, then data sets, a seed at a time; H of the averages. Only
    rows that all sets have with the same settings, and seeds that have all targets."""
    for seed, base, new in ((3, (0.2, 0.4), (0.1, 0.1)), (4, (0.6, 0.8), (0.2, 0.2))):
        for target, x, y in zip(("photo", "sketch"), base, new):
            rows = {"ms": {"base": x, "new": y, "H": 0.0}, "linear": {"base": 0.5}}
            write("clipood", target, seed, rows, lr=1)
    for seed, new in ((3, 0.4), (4, 0.8), (5, 0.8)):  # there is no seed 5 of the other data set
        write("clipood", "sun", seed, {"ms": {"base": 0.9, "new": new, "H": 0.0}}, "vlcs", lr=1)
    rows = {"lora": {"base": 0.5, "new": 0.5, "H": 0.5}}
    for target, dataset, lr in (("photo", "pacs", 1), ("sketch", "pacs", 1), ("sun", "vlcs", 2)):
        write("headpurify", target, 3, rows, dataset, lr=lr)
    lines = table()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("pacs + vlcs average, %")]
    assert lines[start].split()[-4:] == ["base", "new", "H", "seeds"]
    base, new = ((0.3 + 0.9) / 2, (0.7 + 0.9) / 2), ((0.1 + 0.4) / 2, (0.2 + 0.8) / 2)
    H = [2 / (1 / x + 1 / y) for x, y in zip(base, new)]
    expected = [tables.percent(values) for values in (base, new, H)]
    assert cells(lines[start:], "clipood ms") == [*expected, "2"]
    assert not any("linear" in line or "headpurify" in line for line in lines[start:])


def test_it_is_the_table_that_the_command_prints(table, call_main, small_world):
    output = call_main(headpurify.main, "--modes zero-shot --target all").splitlines()
    *_, of_targets = [line for line in output if line.startswith("zero-shot  ")]
    expected = [cell.strip() for cell in of_targets.split("  ")[1:] if cell]
    assert cells(table(), "headpurify zero-shot") == [*expected, "1"]
    assert call_main(common.main, "table runs").splitlines() == table()
