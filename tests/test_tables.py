"""Tables, paired differences and pictures of records; `common.py table` on folders of runs."""

import argparse
import json
import math

import pytest

import common
import headpurify
from support import InputError, tables


def records(**rows):
    """Two targets x two seeds; rows: their accuracies in the order x0, x1, y0, y1."""
    runs = []
    for index, (target, seed) in enumerate((("x", 0), ("x", 1), ("y", 0), ("y", 1))):
        numbers = {}
        for row, accuracies in rows.items():
            numbers[row] = {"target": accuracies[index], "target/x": 0.0}
        runs.append({"target": target, "seed": seed, "rows": numbers, "extra": {}})
    return runs


A_AND_B = {"a": (0.1, 0.3, 0.5, 0.5), "b": (0.3, 0.3, 0.6, 0.6)}


# ---------- Numbers and text ---------------------------------------------------------------------
def test_tables():
    assert tables.percent([0.5]) == "50.0"
    assert tables.percent([0.5, 0.6]) == "55.0 ± 7.1"  # sample deviation: 10 / sqrt(2)
    runs = records(m=(0.1, 0.3, 0.5, 0.5))
    last = tables.target_table("T", runs).splitlines()[-1]
    assert last.split("  ") == ["m", "20.0 ± 14.1", "50.0 ± 0.0", "35.0 ± 7.1"]
    assert tables.table("T", runs).splitlines()[0].split() == ["T", "target"]


def test_a_paired_difference_by_hand():
    """Averaged over targets within a seed first: seeds gain 0.15 and 0.05, each from two runs."""
    runs = records(**A_AND_B)
    mean, error, seeds = tables.paired(runs, "b", "a", "target")
    deviation = math.sqrt((0.05**2 + 0.05**2) / 1)
    assert (mean, error, seeds) == (pytest.approx(0.1), pytest.approx(deviation / 2**0.5), 2)
    assert tables.gain(mean, error, seeds) == "+10.0 (se 5.0, 2 seeds)"
    assert "+10.0 (se 5.0, 2 seeds)" in tables.table("T", runs, "target")
    one = tables.paired(runs[::2], "b", "a", "target")
    assert tables.gain(*one) == "+15.0 (1 seed)"


def test_the_closing_line_reads_the_table():
    runs = records(**A_AND_B)
    text = tables.closing_line(runs)
    assert "b, 45.0 %" in text and "above a" in text and "less than two standard errors" in text
    runs = records(a=(0.5, 0.5, 0.5, 0.5), b=(0.1, 0.1, 0.2, 0.2))
    assert "a, 50.0 %" in tables.closing_line(runs)
    assert "above b: more than two standard errors" in tables.closing_line(runs)
    assert "one seed" in tables.closing_line(runs[:1])


def in_the_wild(**rows):
    """Two seeds x two targets; rows: {measure: numbers in the order of 3x, 3y, 4x, 4y}."""
    runs = []
    for index, (seed, target) in enumerate(((3, "x"), (3, "y"), (4, "x"), (4, "y"))):
        numbers = {}
        for row, measures in rows.items():
            numbers[row] = {measure: values[index] for measure, values in measures.items()}
        runs.append({"target": target, "seed": seed, "rows": numbers})
    return runs


def test_average_over_data_sets_by_hand():
    """Targets within a data set first, then data sets, a seed at a time; H of the averages."""
    base, new = [0.2, 0.4, 0.6, 0.8], [0.1, 0.1, 0.2, 0.2]
    a = in_the_wild(ms={"base": base, "new": new, "H": [0.0] * 4}, linear={"base": [0.5] * 4})
    b = in_the_wild(ms={"base": [0.9] * 4, "new": [0.3, 0.5, 0.8, 0.8], "H": [0.0] * 4})
    b += [{**b[0], "seed": 5}]  # a seed that the other set does not have, without its target y
    averaged = tables.average_records({"a": a, "b": b[::-1]})
    assert [record["seed"] for record in averaged] == [3, 4]
    for record, base, new in zip(averaged, ((0.3 + 0.9) / 2, 0.8), ((0.1 + 0.4) / 2, 0.5)):
        assert list(record["rows"]) == ["ms"]  # the other set has no linear
        numbers = record["rows"]["ms"]
        assert numbers["base"] == pytest.approx(base) and numbers["new"] == pytest.approx(new)
        assert numbers["H"] == pytest.approx(2 / (1 / base + 1 / new))


# ---------- The end of a command -----------------------------------------------------------------
def test_report_writes_what_it_says(tmp_path, capsys):
    runs = records(**A_AND_B)
    args = argparse.Namespace(dataset="d", script="toy", study="ranks", output=tmp_path)
    args.summary = tmp_path / "all.json"
    tables.report(args, runs)
    written = json.loads(args.summary.read_text())
    assert written["records"] == runs and written["settings"]["output"] == str(tmp_path)
    assert args.summary.with_suffix(".png").stat().st_size > 1000
    output = capsys.readouterr().out
    assert "last minus this" in output and "average" in output and "Best target" in output
    assert str(args.summary) in output and f"{tmp_path}/toy/ranks/" in output


@pytest.mark.parametrize(
    "rows, setting, scale",
    [
        (["plain", "ldfs/sigma=0", "ldfs/sigma=0.4"], "sigma", "symlog"),
        (["mms", "mms/margin=0.1", "mms/margin=3"], "margin", "log"),
        (["lora/rank=1", "lora/rank=4"], "rank", "linear"),
        (["lora", "lora/where=heads"], None, None),
        (["lora/rank=1", "lora/lr=2"], None, None),
    ],
)
def test_a_study_of_one_number_is_drawn_over_it(rows, setting, scale, tmp_path, monkeypatch):
    """The sweep's axis and its values; rows of any other study are drawn below each other."""
    drawn = {}

    def plot(panels, x_label, *_, xscale):
        (name,) = [label for label in panels["target"] if label != "plain"]
        x, _ = panels["target"][name]
        drawn.update(setting=x_label, scale=xscale, x=x)

    monkeypatch.setattr(tables, "plot_panels", plot)
    runs = records(**{row: (0.1, 0.2, 0.3, 0.4) for row in rows})
    args = {"dataset": "d", "script": "toy", "study": "s", "output": tmp_path}
    args |= {"summary": tmp_path / "s.json", "margin": 0.3, "sigma": 0.1, "rank": 2}
    tables.report(argparse.Namespace(**args), runs)
    if setting is None:
        assert not drawn and (tmp_path / "s.png").exists()
        return
    assert (drawn["setting"], drawn["scale"]) == (setting, scale)
    values = {"sigma": [0, 0.4], "margin": [0.1, 0.3, 3], "rank": [1, 4]}
    assert drawn["x"] == values[setting]


# ---------- python common.py table ---------------------------------------------------------------
@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """The lines that the command prints, in a folder that may have runs/."""
    monkeypatch.chdir(tmp_path)

    def call(*folders):
        tables.table_runs(folders)
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
    lines = table("runs")
    assert lines[0].split() == "pacs, target accuracy, % photo sketch average seeds".split()
    # seeds 0.35 and 0.55: deviations are 0.1 / sqrt(2) of 0.2; of 0.5, 0.7, 0.9 it is 0.2
    assert cells(lines, "clipood mms+bma") == ["70.0 ± 20.0", "30.0 ± 14.1", "45.0 ± 14.1", "2"]
    assert cells(lines, "headpurify lora") == ["30.0 ± 7.1", "15.0 ± 7.1", "22.5 ± 7.1", "2"]
    assert cells(lines, "CLIPood, published: zero-shot CLIP") == ["-", "-", "96.2", "-"]
    assert cells(lines, "Attention Head Purification, published: HA-LoRA + DIG")[2] == "98.1"
    assert lines[-1] == "Finished runs: 9. Not finished: 0."


def test_runs_with_other_settings_stand_apart(table, write):
    for seed, (lr, number) in enumerate(((0.1, 0.5), (0.2, 0.7))):
        for target in ("photo", "sketch"):
            write("runs/clipood", target, seed, {"mms": accuracy(number)}, lr=lr, epochs=3)
    rows = {"ms": accuracy(0.3), "mms": accuracy(0.6)}
    write("more/clipood", "photo", 2, rows, lr=0.1, epochs=3)
    write("more/clipood/study", "photo", 0, {"mms": accuracy(0.5)}, lr=0.1, epochs=3)  # once more
    lines = table("runs", "more")
    assert cells(lines, "clipood mms (lr 0.1)") == ["55.0 ± 7.1", "50.0", "50.0", "1"]
    assert cells(lines, "clipood mms (lr 0.2)") == ["70.0", "70.0", "70.0", "1"]
    assert cells(lines, "clipood ms (lr 0.1)") == ["30.0", "-", "-", "0"]


def test_tasks_and_sources_have_tables_of_their_own(table, write):
    for target, number in (("Art", 0.5), ("Clipart", 0.3)):
        rows = {"mms": {"total": number, "base": number + 0.1}}
        write("runs/clipood", target, 0, rows, "officehome")
    write("runs/ldfs", "from x", 0, {"ldfs": {"target": 0.3, "target/a": 0.2}}, "officehome")
    rows = {"erm": {"id": 0.5, "published ood": 0.4, "ood": 0.3}}
    write("runs/vit_diverse", "", 0, rows, "waterbirds")
    lines = table("runs")
    assert [line.split("  ")[0] for line in lines if ", %" in line] == [
        "officehome, total accuracy, %",
        "officehome from x, %",
        "waterbirds, %",
    ]
    assert cells(lines, "clipood mms") == ["50.0", "30.0", "40.0", "1"]
    assert cells(lines, "CLIPood, published: CoOp") == ["82.7", "67.2", "-", "-"]
    assert cells(lines, "ldfs ldfs") == ["30.0", "1"]
    assert cells(lines, "vit_diverse erm") == ["50.0", "40.0", "30.0", "1"]
    name = "Learning Diverse Features in Vision Transformers, published: DIV"
    assert cells(lines, name) == ["-", "83.87", "-", "-"]


def test_one_target_alone_is_not_put_beside_an_average(table, write):
    """A single target shows its measures; the papers' averages over all targets are left out."""
    write("runs/clipood", "sketch", 0, {"mms+bma": accuracy(0.5)})
    write("more/clipood", "Art", 0, {"mms+bma": {"base": 0.5, "new": 0.4, "total": 0.3}})
    lines = table("runs")
    assert lines[0].split() == "pacs sketch, % target hold-out seeds".split()
    assert not any("published" in line for line in lines)


def test_average_over_data_sets(table, write):
    """Of rows that ran on several sets with the same settings, over seeds that have all targets."""
    for seed in (0, 1):
        for target, number in (("photo", 0.2), ("sketch", 0.4)):
            rows = {"dig": accuracy(number + seed / 5), "lora": accuracy(0.1)}
            write("runs/headpurify", target, seed, rows, epochs=4)
        rows = {"dig": accuracy(0.5)}
        write("runs/headpurify", "sun", seed, rows, "vlcs", epochs=4)
        write("runs/clipood", "photo", seed, {"mms": accuracy(0.5)}, epochs=2)
        write("runs/clipood", "sun", seed, {"mms": accuracy(0.6)}, "vlcs", epochs=3)
    write("runs/headpurify", "photo", 2, {"dig": accuracy(0.9)}, epochs=4)  # its sketch is missing
    write("runs/headpurify", "sun", 2, {"dig": accuracy(0.9)}, "vlcs", epochs=4)
    lines = table("runs")
    start = lines.index(*[line for line in lines if line.startswith("pacs + vlcs average, %")])
    average = lines[start:]
    assert average[0].split() == "pacs + vlcs average, % target hold-out seeds".split()
    # seed 0: mean of 0.3 and 0.5; seed 1: mean of 0.5 and 0.5
    assert cells(average, "headpurify dig") == ["45.0 ± 7.1", "90.0 ± 0.0", "2"]
    assert not any("lora" in line or "clipood" in line for line in average)


def test_unfinished_runs_are_named(table, write, tmp_path):
    finished = write("runs/clipood", "photo", 0, {"mms": accuracy(0.5)})
    unfinished = finished.parent.with_name("pacs-photo-seed1")
    unfinished.mkdir()
    for folder in (finished.parent, unfinished):  # killed before the checkpoint was removed
        (folder / "checkpoint.pt").touch()
    *_, count, name = table("runs")
    assert count == "Finished runs: 1. Not finished: 1."
    assert name == f"  {unfinished}"


def test_folders_without_runs_and_other_results(table, tmp_path):
    with pytest.raises(InputError, match="no runs in nowhere"):
        table("nowhere")
    for text in ("{", "[]", '{"target": "photo"}', "null"):
        path = tmp_path / "runs" / "clipood" / "photo" / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        with pytest.raises(InputError, match=r"photo/result.json is not the result of a run"):
            table("runs")


def test_it_is_the_table_that_the_command_prints(table, call_main, small_world):
    output = call_main(headpurify.main, "--modes zero-shot --target all").splitlines()
    *_, of_targets = [line for line in output if line.startswith("zero-shot  ")]
    expected = [cell.strip() for cell in of_targets.split("  ")[1:] if cell]
    assert cells(table("runs"), "headpurify zero-shot") == [*expected, "1"]
    shown = call_main(common.main, "table runs").splitlines()
    assert shown == table("runs")
