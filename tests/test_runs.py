"""Settings, rows, runs that are killed and continued, tables: what the four scripts share."""

import argparse
import json
import math
import os

import pytest
import torch

import common

SETTINGS = [
    ("lr", common.positive, 5e-4, 3e-3, "learning rate"),
    ("rank", common.at_least(1), 2, 2, "rank"),
    ("decay", common.share, 0.5, 0.5, "a share"),
    ("where", ("output", "heads"), "output", "output", "a choice"),
    ("widths", [common.positive], None, None, "several numbers"),
]
ROWS = {"zero-shot": {}, "lora": {"adapter": "lora"}, "ms": {"rank": 9}}
STUDIES = {"ranks": ["zero-shot", "lora/rank=1", "lora/rank=4"]}
METHOD = common.Method("toy", SETTINGS, ROWS, STUDIES)


def read(text="", preset=None):
    argv = text.split()
    args = common.flags(METHOD, "doc", ["zero-shot", "lora"], ["tiny-pacs"], [common.TARGET], argv)
    return common.settle(args, preset)


def test_defaults_depend_on_the_model_and_a_preset_comes_first():
    assert read().lr == 3e-3 and read("--model ViT-B-32").lr == 5e-4
    assert read(preset={"lr": 1.0}).lr == 1.0 and read("--lr 7", preset={"lr": 1.0}).lr == 7
    assert read().cue == 0.4 and read("--cue 0.9").cue == 0.9
    cores = len(os.sched_getaffinity(0))
    assert read().workers == 0 and read("--dataset pacs").workers == min(16, cores)


def test_a_row_has_the_settings_of_its_name_and_its_own_on_top():
    rows = read("--lr 7 --modes zero-shot lora lora/rank=4/lr=1e-3/widths=2 ms ms/rank=3").rows
    assert rows["zero-shot"].lr == rows["lora"].lr == 7 and rows["lora"].adapter == "lora"
    own = rows["lora/rank=4/lr=1e-3/widths=2"]
    assert (own.rank, own.lr, own.widths, own.adapter) == (4, 1e-3, [2.0], "lora")
    assert rows["ms"].rank == 9 and rows["ms/rank=3"].rank == 3


def test_a_study_is_a_list_of_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    args = read("--study ranks")
    assert list(args.rows) == STUDIES["ranks"]
    assert str(args.summary) == "results/toy-ranks-tiny-pacs.json"


@pytest.mark.parametrize(
    "text, words",
    [
        ("--lr nan", ("--lr", "a number", "nan")),
        ("--lr -1", ("--lr", "-1")),
        ("--lr 0", ("--lr", "above 0")),
        ("--lr 1e999", ("--lr", "1e999")),
        ("--lr abc", ("--lr", "abc")),
        ("--rank 0", ("--rank", "at least 1", "0")),
        ("--rank 1.5", ("--rank", "whole number", "1.5")),
        ("--decay 2", ("--decay", "between 0 and 1", "2")),
        ("--where there", ("--where", "'there'", "output")),
        ("--workers -1", ("--workers", "-1")),
        ("--seeds -3", ("--seed", "-3")),
        ("--cue 2", ("--cue", "between 0 and 1")),
        ("--rnk 3", ("--rnk",)),
        ("--modes lara", ("'lara'", "did you mean 'lora'")),
        ("--modes lora/rnk=3", ("'rnk=3'", "did you mean 'rank'")),
        ("--modes lora/lr=abc", ("lora/lr=abc", "--lr", "abc")),
        ("--modes lora/seeds=3", ("seeds=3", "A row may set")),
        ("--study rank", ("--study", "ranks")),
        ("--study ranks --modes lora", ("--study and --modes",)),
        ("--device gpu", ("--device", "gpu")),
        ("--summary nowhere/all.json", ("--summary", "nowhere")),
        ("--model tiny --pretrained openai", ("--pretrained", "no effect")),
        ("--dataset pacs --cue 0.3", ("--cue", "pacs")),
        ("--device cpu --precision fp16", ("--precision fp16", "fp32")),
    ],
)
def test_what_is_wrong_is_named(text, words):
    with pytest.raises(common.InputError) as error:
        read(text)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == 1


@pytest.fixture
def args(tmp_path):
    return read(f"--output {tmp_path / 'runs'}")


def folders(tmp_path):
    return sorted(entry.name for entry in (tmp_path / "runs" / "toy").iterdir())


def write_run(args, text, stop_after=2):
    """A run of two rows that write a file each, stopped after some of them."""
    with common.open_run(args, "sketch", 0) as run:
        for number, row in enumerate(("one", "two")):
            if row in run.rows:
                continue
            if number == stop_after:
                raise RuntimeError
            (run.folder / f"{row}.txt").write_text(text)
            run.extra[row] = {"text": text}
            run.add(row, {"target": (number + 1) / 4})
    return run


def test_a_run_appears_only_when_complete(args, tmp_path):
    with pytest.raises(RuntimeError):
        write_run(args, "first", stop_after=0)
    assert not (tmp_path / "runs").exists()  # no empty folder is left
    for text in ("first", "second"):
        run = write_run(args, text)
        assert folders(tmp_path) == ["tiny-pacs-sketch-seed0"]
        assert (run.folder / "two.txt").read_text() == text
    result = json.loads((run.folder / "result.json").read_text())
    assert result["rows"] == {"one": {"target": 0.25}, "two": {"target": 0.5}}
    assert (result["target"], result["seed"], result["settings"]["rank"]) == ("sketch", 0, 2)


def test_a_failed_run_leaves_the_old_result(args, tmp_path):
    write_run(args, "first")
    with pytest.raises(RuntimeError):
        write_run(args, "second", stop_after=1)
    assert (tmp_path / "runs/toy/tiny-pacs-sketch-seed0/two.txt").read_text() == "first"


def test_an_interrupted_run_is_continued_to_the_same_bytes(args, tmp_path):
    whole = {path.name: path.read_bytes() for path in write_run(args, "a").folder.iterdir()}
    with pytest.raises(RuntimeError):
        write_run(args, "a", stop_after=1)
    args.resume = True
    continued = write_run(args, "a")
    assert {path.name: path.read_bytes() for path in continued.folder.iterdir()} == whole
    again = write_run(args, "b")  # complete: read, not written
    assert again.complete and again.record == continued.record
    assert (again.folder / "one.txt").read_text() == "a"


def test_a_run_with_other_settings_is_not_continued(args):
    write_run(args, "a")
    args.resume, args.rank = True, 5
    with pytest.raises(common.InputError, match="rank 2, now 5"):
        write_run(args, "b")


def test_a_kill_between_the_two_renames_loses_nothing(args, tmp_path):
    final = write_run(args, "first").folder
    final.rename(final.with_name(f".{final.name}.old"))
    with pytest.raises(RuntimeError):
        write_run(args, "second", stop_after=0)
    assert (final / "two.txt").read_text() == "first"


def test_a_kill_after_the_two_renames_leaves_nothing_in_the_way(args, tmp_path):
    final = write_run(args, "first").folder
    old = final.with_name(f".{final.name}.old")
    old.mkdir()
    (old / "two.txt").write_text("before the first")
    assert (write_run(args, "second").folder / "two.txt").read_text() == "second"
    assert folders(tmp_path) == [final.name]


def test_what_a_kill_left_of_a_file_goes(args, tmp_path):
    with pytest.raises(RuntimeError):
        write_run(args, "a", stop_after=1)
    (left,) = (tmp_path / "runs" / "toy").iterdir()
    (left / ".partial-two.txt").write_text("h")
    args.resume = True
    names = {path.name for path in write_run(args, "a").folder.iterdir()}
    assert names == {"one.txt", "two.txt", "result.json"}


def test_state_of_an_interrupted_row_comes_back(args):
    with pytest.raises(RuntimeError):
        with common.open_run(args, "sketch", 0) as run:
            run.save({"epoch": 3, "weights": torch.arange(3)})
            raise RuntimeError
    args.resume = True
    with common.open_run(args, "sketch", 0) as run:
        assert run.state["epoch"] == 3 and run.state["weights"].tolist() == [0, 1, 2]


def test_a_full_disk_keeps_the_checkpoint_before(args, monkeypatch):
    with pytest.raises(common.InputError, match="checkpoint.pt.*make room"):
        with common.open_run(args, "sketch", 0) as run:
            run.save({"epoch": 1})
            before = (run.folder / "checkpoint.pt").read_bytes()

            def full(*_):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(torch, "save", full)
            run.save({"epoch": 2})
    assert (run.folder / "checkpoint.pt").read_bytes() == before
    assert {entry.name for entry in run.folder.iterdir()} == {"checkpoint.pt"}


def test_a_place_that_cannot_be_written_is_named(args, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(common.InputError, match="cannot write results to .*--output"):
        write_run(args, "a")


def records(**rows):
    """Two targets x two seeds; rows: their accuracies in the order x0, x1, y0, y1."""
    runs = []
    for i, (target, seed) in enumerate((("x", 0), ("x", 1), ("y", 0), ("y", 1))):
        own = {row: {"target": values[i], "target/x": 0.0} for row, values in rows.items()}
        runs.append({"target": target, "seed": seed, "rows": own, "extra": {}})
    return runs


def test_tables():
    assert common.percent([0.5]) == "50.0"
    assert common.percent([0.5, 0.6]) == "55.0 ± 7.1"  # sample deviation: 10 / sqrt(2)
    runs = records(m=(0.1, 0.3, 0.5, 0.5))
    last = common.target_table("T", runs).splitlines()[-1]
    assert last.split("  ") == ["m", "20.0 ± 14.1", "50.0 ± 0.0", "35.0 ± 7.1"]
    assert common.table("T", runs).splitlines()[0].split() == ["T", "target"]


def test_a_paired_difference_by_hand():
    """Averaged over targets within a seed first: seeds gain 0.15 and 0.05, each from two runs."""
    runs = records(a=(0.1, 0.3, 0.5, 0.5), b=(0.3, 0.3, 0.6, 0.6))
    mean, error, seeds = common.paired(runs, "b", "a", "target")
    deviation = math.sqrt((0.05**2 + 0.05**2) / 1)
    assert (mean, error, seeds) == (pytest.approx(0.1), pytest.approx(deviation / 2**0.5), 2)
    assert common.gain(mean, error, seeds) == "+10.0 (se 5.0, 2 seeds)"
    assert "+10.0 (se 5.0, 2 seeds)" in common.table("T", runs, "target")
    one = common.paired(runs[::2], "b", "a", "target")
    assert common.gain(*one) == "+15.0 (1 seed)"


def test_the_closing_line_reads_the_table():
    runs = records(a=(0.1, 0.3, 0.5, 0.5), b=(0.3, 0.3, 0.6, 0.6))
    text = common.closing_line(runs)
    assert "b, 45.0 %" in text and "above a" in text and "less than two standard errors" in text
    runs = records(a=(0.5, 0.5, 0.5, 0.5), b=(0.1, 0.1, 0.2, 0.2))
    assert "a, 50.0 %" in common.closing_line(runs)
    assert "above b: more than two standard errors" in common.closing_line(runs)
    assert "one seed" in common.closing_line(runs[:1])


def test_report_writes_what_it_says(tmp_path, capsys):
    runs = records(a=(0.1, 0.3, 0.5, 0.5), b=(0.3, 0.3, 0.6, 0.6))
    summary = tmp_path / "all.json"
    args = argparse.Namespace(dataset="d", method=METHOD, study="ranks", output=tmp_path)
    args.summary = summary
    common.report(args, runs)
    assert json.loads(summary.read_text())["records"] == runs
    assert summary.with_suffix(".png").stat().st_size > 1000
    assert str(summary) in capsys.readouterr().out
