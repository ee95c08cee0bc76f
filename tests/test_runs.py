"""Flags and rows, and what a run leaves on disk: finished, interrupted, killed, on a full disk."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import clipood
import headpurify
import vit_diverse
from support import InputError, runs, tables


# ---------- Flags and rows -----------------------------------------------------------------------
def read(script, text=""):
    return script.settings(text.split())


def test_defaults_depend_on_the_data_and_the_command_line_beats_them():
    tiny, _ = read(headpurify)
    assert (tiny.model, tiny.lr, tiny.epochs, tiny.workers, tiny.cue) == ("tiny", 3e-3, 4, 0, 0.4)
    real, _ = read(headpurify, "--dataset pacs")
    assert (real.model, real.lr, real.epochs) == ("ViT-B-16", 5e-4, 40)
    assert real.workers == min(16, len(os.sched_getaffinity(0)))
    given, _ = read(headpurify, "--dataset pacs --lr 7 --workers 0")
    assert (given.lr, given.epochs, given.workers) == (7, 40, 0)
    assert read(vit_diverse, "--dataset tiny-waterbirds")[0].cue == 0.95


def test_a_row_is_the_command_then_its_name_then_its_own_settings():
    line = "--lr 7 --modes zero-shot lora lora/lora-rank=match/lr=1e-3/bandwidths=2 ha-lora+dig"
    _, rows = read(headpurify, line)
    assert (rows["zero-shot"].adapter, rows["zero-shot"].lr) == (None, 7)
    assert (rows["lora"].adapter, rows["lora"].gated, rows["lora"].lr) == ("lora", False, 7)
    own = rows["lora/lora-rank=match/lr=1e-3/bandwidths=2"]
    assert (own.adapter, own.lora_rank, own.lr, own.bandwidths) == ("lora", "match", 1e-3, [2.0])
    assert (rows["ha-lora+dig"].adapter, rows["ha-lora+dig"].gated) == ("ha-lora", True)
    assert all(row.name == name for name, row in rows.items())
    _, rows = read(clipood, "--margin 0.7 --batch-size 9 --modes mms ms ms/margin=0.2 cocoop")
    margins = [row.margin for row in rows.values()]
    assert margins == [0.7, 0, 0.2, 0.7]  # a metric softmax without margin is what `ms` means
    assert [row.batch_size for row in rows.values()] == [9, 9, 9, 1]


@pytest.mark.parametrize(
    "modes, words",
    [
        ("lroa", "no row 'lroa' (did you mean 'lora'?). Choose from zero-shot, full"),
        ("lora/rnk=3", "--modes lora/rnk=3: unrecognized arguments: --rnk=3"),
        ("lora/lr=abc", "--modes lora/lr=abc: --lr: must be a number, at least 0, got abc"),
    ],
)
def test_a_row_that_is_none_is_named_in_one_line(modes, words):
    with pytest.raises(InputError) as error:
        read(headpurify, f"--modes zero-shot {modes}")
    assert words in str(error.value) and "\n" not in str(error.value)


# ---------- A run's folder -----------------------------------------------------------------------
@pytest.fixture
def args(tmp_path):
    return read(headpurify, f"--output {tmp_path / 'runs'}")[0]


def write_run(args, rows=("one", "two")) -> runs.Run:
    """A run of two rows, or of the first of them and an epoch of the second."""
    run = runs.Run(args, "sketch", 0)
    for number, row in enumerate(rows):
        if row not in run.rows:
            run.add(row, {"target": (number + 1) / 4}, {"gates": [number]})
    if len(rows) == 2:
        run.finish()
    else:
        run.save({"two": {"epoch": 1, "weights": torch.arange(3)}})
    return run


def test_a_finished_run_is_read_again(args, capsys):
    run = write_run(args)
    assert [path.name for path in run.folder.iterdir()] == ["result.json"]
    result = json.loads((run.folder / "result.json").read_text())
    assert result["rows"] == {"one": {"target": 0.25}, "two": {"target": 0.5}}
    assert (result["target"], result["seed"], result["settings"]["rank"]) == ("sketch", 0, 2)
    assert result["extra"]["two"] == {"gates": [1]}
    args.resume = True
    again = runs.Run(args, "sketch", 0)
    assert again.finished and again.record == run.record
    assert f"--resume: found {again.result}" in capsys.readouterr().out
    args.resume = False
    assert not runs.Run(args, "sketch", 0).finished and not run.result.exists()


def test_an_interrupted_run_goes_on_to_the_same_bytes(args):
    whole = write_run(args).result.read_bytes()
    write_run(args, rows=["one"])
    args.resume = True
    run = runs.Run(args, "sketch", 0)
    assert not run.finished and list(run.rows) == ["one"]
    assert run.state["two"]["epoch"] == 1 and run.state["two"]["weights"].tolist() == [0, 1, 2]
    assert write_run(args).result.read_bytes() == whole
    assert [path.name for path in run.folder.iterdir()] == ["result.json"]


def test_a_run_with_other_settings_is_refused_and_they_are_named(args):
    folder = write_run(args, rows=["one"]).folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    args.resume, args.rank, args.lr = True, 5, 1.0
    with pytest.raises(InputError, match="other settings .rank 2, now 5; lr 0.003, now 1.0.; give"):
        runs.Run(args, "sketch", 0)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "name, content",
    [
        ("result.json", "text"),
        *(("checkpoint.pt", name) for name in ("text", "code", "zipped")),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(args, wrong_files, name, content):
    file = runs.Run(args, "sketch", 0).folder / name
    file.parent.mkdir(parents=True)
    shutil.copy(wrong_files / content, file)
    before = file.read_bytes()
    args.resume = True
    with pytest.raises(InputError) as error:
        runs.Run(args, "sketch", 0)
    assert str(error.value).startswith(f"--resume: cannot read {file}: ")
    assert str(error.value).endswith("; remove it, or leave --resume out")
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert file.read_bytes() == before and not (wrong_files / "code-was-run").exists()


# ---------- A disk that is full ------------------------------------------------------------------
@contextlib.contextmanager
def full_disk():
    """Inside no file may grow beyond a size; pytest itself may be writing to one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NUMBERS = np.arange(20_000.0)  # 160 kB
TENSORS = {"numbers": torch.from_numpy(NUMBERS)}
PANELS = {"": {"": (NUMBERS, NUMBERS)}}
WRITERS = {
    "numbers.json": lambda path: runs.write_json(path, NUMBERS.tolist()),
    "numbers.pt": lambda path: runs.write_tensors(path, TENSORS),
    "n.safetensors": lambda path: runs.write_file(path, lambda file: save_file(TENSORS, file)),
    "numbers.png": lambda path: tables.plot_panels(PANELS, "", "", path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_replaced_whole_or_not_at_all(name, tmp_path):
    path = tmp_path / "folder" / name
    WRITERS[name](path)
    before = path.read_bytes()
    assert len(before) > 5_000
    expected = f"^cannot write .*{name}: .*(too large|written)"
    with pytest.raises(InputError, match=expected), full_disk():
        WRITERS[name](path)
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == before


# ---------- Processes ----------------------------------------------------------------------------
SCRIPTS = {
    "headpurify": "--modes zero-shot lora ha-lora+dig --epochs 2 --batch-size 12",
    "clipood": "--modes ms mms mms+bma --epochs 3 --steps-per-epoch 2 --batch-size 4 --figures",
    "ldfs": "--modes plain ldfs --targets sketch cartoon --mapper-epochs 60 --epochs 60 --figures",
    "vit_diverse": "--modes erm erm+sel div --epochs 2 --batch-size 10 --figures",
}
KILLS = 3  # of each script, at random moments


def start(script: str, arguments: str, folder) -> subprocess.Popen:
    """A script on few images, in a process that has begun to work."""
    folder.mkdir(exist_ok=True)
    program = ROOT / "tests" / "in_small_world.py"
    line = [sys.executable, program, script, *SCRIPTS[script].split(), *arguments.split()]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(line, cwd=folder, start_new_session=True, **options)
    process.first_line = process.stdout.readline()
    return process


def end_of(process) -> tuple[int, str]:
    """Its exit code, and what it printed."""
    text, _ = process.communicate(timeout=120)
    return process.returncode, process.first_line + text


def contents(folder) -> dict:
    """All files below `runs`, but for what a kill left of a file that was being written."""
    files = [path for path in (folder / "runs").rglob("*") if path.is_file()]
    files = [path for path in files if not re.match(r"\.\d+-", path.name)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_any_moment_and_continued_it_gives_the_same_bytes(script, tmp_path):
    process = start(script, "", tmp_path / "whole")
    begin = time.monotonic()
    code, text = end_of(process)
    seconds = time.monotonic() - begin
    assert code == 0, text
    rng = random.Random(script)
    for _ in range(KILLS):
        process = start(script, "--resume", tmp_path / "killed")
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        end_of(process)
    code, text = end_of(start(script, "--resume", tmp_path / "killed"))
    assert code == 0, text
    files, expected = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    assert sorted(files) == sorted(expected)
    for name, content in expected.items():
        assert files[name] == content, name


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(tmp_path):
    """Its signal goes to all processes, also to those that read images."""
    process = start("clipood", "--steps-per-epoch 1000000 --workers 2", tmp_path)
    time.sleep(5)  # readers start once an epoch: a signal while they are forked can be lost
    os.killpg(process.pid, signal.SIGINT)
    code, text = end_of(process)
    assert code == 130 and "Traceback" not in text, text
    assert text.endswith("\nstopped; --resume goes on from the last checkpoint\n")
