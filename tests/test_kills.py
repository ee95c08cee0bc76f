"""Runs that end before they are complete: by a signal, a kill, another process, a full disk.

Scripts run in processes of their own, on few images. They are forked from one that has imported
everything and computed nothing, so that a start costs nothing.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
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
from support.pictures import plot_panels

import common
from support import files, locks
from support.tiny_world import draw_digits_and_vehicles

SCRIPTS = {
    "headpurify": "--modes zero-shot lora ha-lora+dig --epochs 1 --batch-size 12",
    "clipood": "--modes ms mms mms+bma --epochs 3 --steps-per-epoch 2 --batch-size 4 --figures",
    "ldfs": "--modes plain ldfs --targets sketch cartoon --mapper-epochs 60 --epochs 60 --figures",
    "vit_diverse": "--modes erm erm+sel div --epochs 2 --batch-size 10 --figures",
}
RUNS, KILLS = 7, 3  # of each script, and random moments at which each of them is killed
PATIENCE = 60  # seconds that no step here takes
servers = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def forkserver():
    """Where processes are forked from: it imports what they need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        servers.set_forkserver_preload([__name__, *SCRIPTS])
        process = servers.Process(target=time.sleep, args=(0,))
        process.start()
        process.join()
        yield


def run_script(script: str, arguments: str, folder, file_size, stop_at) -> None:
    """In the new process, a group of its own: a command as a user gives it in a folder."""
    os.setsid()
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # as it would be without a server
    printed = os.open("printed.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    torch.set_num_threads(1)
    for name, (classes, *_) in list(common.TINY_BENCHMARKS.items()):
        common.TINY_BENCHMARKS[name] = classes, 8, 8
    common.draw_digits_and_vehicles = few_digits
    if stop_at:
        common.Steps.take = signalled(common.Steps.take, stop_at)
    sys.argv = [script, *arguments.split()]
    common.command(importlib.import_module(script).main)


def signalled(take, stop_at: str):
    """`Steps.take`, while which SIGTERM comes at some step."""

    def signalled_take(steps, loss, where):
        if where.startswith(f"{stop_at} "):
            os.kill(os.getpid(), signal.SIGTERM)
        take(steps, loss, where)

    return signalled_take


def few_digits(seed: int):
    return draw_digits_and_vehicles(seed, sizes=(60, 40, 50))


@pytest.fixture
def start(tmp_path):
    """Starts a script in a process; what is left of them is killed in the end."""
    processes = []

    def start(script, arguments, folder=None, file_size=None, stop_at=None):
        folder = folder or tmp_path / "own"
        folder.mkdir(exist_ok=True)
        (folder / "printed.txt").write_text("")
        arguments = script, f"{SCRIPTS[script]} {arguments}", folder, file_size, stop_at
        process = servers.Process(target=run_script, args=arguments)
        process.start()
        process.printed = folder / "printed.txt"
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(process, text: str) -> None:
    """Until a process has printed a text."""
    end = time.monotonic() + PATIENCE
    while text not in process.printed.read_text():
        assert process.is_alive() and time.monotonic() < end, process.printed.read_text()
        time.sleep(0.01)


def wait_for_file(folder, name: str) -> None:
    end = time.monotonic() + PATIENCE
    while not list(folder.rglob(name)):
        assert time.monotonic() < end, name
        time.sleep(0.01)


def end_of(process) -> tuple[int, list[str]]:
    """Its exit code and the lines it printed."""
    process.join(PATIENCE)
    text = process.printed.read_text()
    assert process.exitcode is not None, f"it still runs: {text}"
    assert "Traceback" not in text, text
    return process.exitcode, text.splitlines()


def contents(folder) -> dict[str, bytes]:
    """All files below `runs`, also hidden ones."""
    files = [path for path in (folder / "runs").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """{script: the files of an undisturbed run, the seconds it took}, filled by `whole`."""
    return {}


@pytest.fixture
def whole(start, wholes, tmp_path):
    """What an undisturbed run of a script leaves, and how long it takes."""

    def whole(script):
        if script not in wholes:
            before = time.monotonic()
            code, lines = end_of(start(script, "", tmp_path / "whole"))
            assert code == 0, lines
            wholes[script] = contents(tmp_path / "whole"), time.monotonic() - before
        return wholes[script]

    return whole


def assert_same(found: dict, expected: dict) -> None:
    assert sorted(found) == sorted(expected)
    for name, content in expected.items():
        assert found[name] == content, name


# ---------- Signals ------------------------------------------------------------------------------
def wait_for_path(pattern: str, folder) -> None:
    end = time.monotonic() + PATIENCE
    while not any((folder / "runs").rglob(pattern)):
        assert time.monotonic() < end, f"no {pattern}"
        time.sleep(0.002)


@pytest.mark.parametrize(
    "script, name",
    [
        pytest.param("headpurify", "SIGTERM", marks=pytest.mark.slow),
        ("clipood", "SIGINT"),
        pytest.param("ldfs", "SIGTERM", marks=pytest.mark.slow),
        ("vit_diverse", "SIGINT"),
    ],
)
def test_a_signal_keeps_what_is_finished_and_the_rest_follows(script, name, start, whole, tmp_path):
    expected, _ = whole(script)
    process = start(script, "")
    # ldfs tests its rows together at the end: it has begun, the others have finished something
    wait_for_path("*.partial" if script == "ldfs" else "checkpoint.pt", tmp_path / "own")
    number = signal.Signals[name]
    os.kill(process.pid, number)
    code, lines = end_of(process)
    assert code == 128 + number, lines
    assert lines[-1].startswith(f"stopped by {name}; kept") and "--resume" in lines[-1]
    assert sum("--resume" in line for line in lines) == 1, lines
    left = contents(tmp_path / "own")
    assert bool(left) == (script != "ldfs")
    assert all(".partial/" in name and name.endswith(".pt") for name in left), list(left)
    code, lines = end_of(start(script, "--resume"))
    assert code == 0, lines
    assert_same(contents(tmp_path / "own"), expected)


@pytest.mark.parametrize(
    "script, training, step, expected_state",
    [
        ("headpurify", "lora", 2, {"step": 2}),  # of 3 in its epoch
        ("clipood", "mms/mms+bma", 3, {"epoch": 1, "step": 1}),  # of 2
    ],
)
def test_a_signal_within_an_epoch_loses_no_step(
    script, training, step, expected_state, start, whole, tmp_path
):
    """Though it was not yet time for a checkpoint."""
    expected, _ = whole(script)
    stopped = start(script, "--save-every 1000", stop_at=f"{training}, step {step}")
    code, lines = end_of(stopped)
    assert code == 143 and "and the last checkpoint" in lines[-1], lines
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    state = torch.load(checkpoint, weights_only=True)["state"][training]
    assert {name: state[name] for name in expected_state} == expected_state
    code, lines = end_of(start(script, "--save-every 1000 --resume"))
    assert code == 0, lines
    assert_same(contents(tmp_path / "own"), expected)


def test_all_processes_of_a_terminal_get_its_signal(start, whole, tmp_path):
    """Those that read images too, and `timeout` sends its signal twice."""
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        process = start("clipood", "--workers 2 --epochs 1000 --steps-per-epoch 20", folder)
        wait_for_file(folder, "checkpoint.pt")
        time.sleep(0.5)
        os.kill(process.pid, number)
        os.killpg(process.pid, number)
        code, lines = end_of(process)
        assert code == 128 + number, lines
        assert "the last checkpoint" in lines[-1], lines


@pytest.mark.slow
def test_a_command_as_it_stands(tmp_path):
    """SIGTERM in a shell: the row that is finished is kept."""
    line = [sys.executable, ROOT / "headpurify.py", "--modes", "zero-shot", "lora"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=tmp_path, **options) as process:
        while not process.stdout.readline().startswith("zero-shot"):
            assert process.poll() is None
        process.terminate()
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    (kept,) = tmp_path.rglob("checkpoint.pt")
    folder = kept.parent.relative_to(tmp_path)
    assert error.startswith(f"stopped by SIGTERM; kept in {folder}: 1 finished row")
    assert error.endswith("; --resume continues\n") and error.count("\n") == 1


def test_a_second_signal_stops_at_once(tmp_path):
    program = """
import time
from support import stop
with stop.listening(), stop.in_steps():
    print("a long step", flush=True)
    time.sleep(60)
"""
    line = [sys.executable, "-c", program]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 143


# ---------- Two processes ------------------------------------------------------------------------
def test_one_process_has_a_run_until_it_is_dead(start, tmp_path):
    """A second one says so. Killed, the first one's readers are still there for seconds."""
    endless = "--workers 2 --epochs 1000"
    first = start("headpurify", endless, tmp_path / "first")
    wait_for(first, "zero-shot")
    time.sleep(1)
    os.kill(first.pid, signal.SIGSTOP)  # it would go on writing checkpoints
    where = f"--output {tmp_path / 'first' / 'runs'}"
    before = contents(tmp_path / "first")
    for resume in ("", "--resume"):
        code, lines = end_of(start("headpurify", f"{endless} {where} {resume}"))
        assert code == 2 and lines[-1].startswith("error: another process is at this run"), lines
    assert contents(tmp_path / "first") == before
    other = start("headpurify", f"{where} --target photo --modes zero-shot")
    assert end_of(other)[0] == 0  # another run has a folder of its own
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    third = start("headpurify", f"{endless} {where} --resume")
    wait_for(third, "--resume: found")
    third.terminate()
    code, lines = end_of(third)
    assert code == 143 and "1 finished row" in lines[-1], lines
    assert not list(tmp_path.rglob("*.lock"))


SWEEP = "--modes zero-shot --target all --seeds 0 1 --share --summary all.json"


def of_sweep(tmp_path, name: str) -> str:
    """Arguments of each of the processes that share the runs in a folder."""
    return f"{SWEEP} --output {tmp_path / name}"


@pytest.mark.slow
def test_processes_share_runs_and_none_is_done_twice(start, tmp_path):
    """Eight runs, three processes: every run is done once, and who finds all of them complete has
    the records that one process has."""
    code, lines = end_of(start("headpurify", of_sweep(tmp_path, "alone"), tmp_path / "one"))
    assert code == 0, lines
    expected = json.loads((tmp_path / "one" / "all.json").read_text())["records"]
    processes = []
    for number in range(3):
        processes.append(start("headpurify", of_sweep(tmp_path, "shared"), tmp_path / str(number)))
    done, complete = 0, 0
    for process in processes:
        code, lines = end_of(process)
        assert code == 0, lines
        done += sum(line.startswith("zero-shot: ") for line in lines)
        if not lines[-1].startswith("In the hands of other processes: tiny-pacs "):
            complete += 1
            summary = json.loads(process.printed.with_name("all.json").read_text())
            assert summary["records"] == expected
    assert done == 8 and complete
    alone, shared = (tmp_path / name / "headpurify" for name in ("alone", "shared"))
    assert sorted(os.listdir(shared)) == sorted(os.listdir(alone))


def test_a_run_whose_process_died_is_taken_over(start, tmp_path):
    arguments = of_sweep(tmp_path, "runs") + " --seeds 0"
    first = start("headpurify", arguments + " --modes ha-lora+dig --epochs 500", tmp_path / "1")
    wait_for_path("checkpoint.pt", tmp_path)
    os.kill(first.pid, signal.SIGSTOP)
    arguments += " --modes zero-shot"
    code, lines = end_of(start("headpurify", arguments, tmp_path / "2"))
    assert code == 0 and sum(line.startswith("zero-shot: ") for line in lines) == 3, lines
    assert lines[-1].startswith("In the hands of other processes: tiny-pacs art_painting seed 0.")
    assert not (tmp_path / "2" / "all.json").exists()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    shutil.rmtree(*tmp_path.rglob("*.partial"))  # of other settings
    code, lines = end_of(start("headpurify", arguments, tmp_path / "3"))
    assert code == 0 and sum(line.startswith("zero-shot: ") for line in lines) == 1, lines
    assert "tiny-pacs, 4 runs, %" in " ".join(lines)


def test_runs_are_not_shared_where_there_are_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with locks.locked(tmp_path / "lock") as mine:
        assert mine
    with pytest.raises(common.InputError, match="--share: .*lock cannot be locked"):
        with locks.locked(tmp_path / "lock", "leave"):
            pass


# ---------- A disk that is full ------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, file_size, written, kept",
    [
        ("headpurify", 1_000_000, "open_clip_model.safetensors", "2 finished rows and the last"),
        ("clipood", 9_500_000, "checkpoint.pt", "1 finished row and the last checkpoint;"),
        ("vit_diverse", 100_000, "erm.pt", ""),
    ],
)
def test_a_full_disk_is_one_line(script, file_size, written, kept, start, whole, tmp_path):
    """Here no file may grow beyond a size. What was kept is continued when there is room again."""
    expected, _ = whole(script)
    code, lines = end_of(start(script, "", file_size=file_size))
    assert code == 2 and lines[-1].startswith("error: cannot write"), lines
    assert f"{written}: " in lines[-1] and "make room, then --resume" in lines[-1], lines
    assert kept in lines[-2], lines
    left = [os.path.basename(name) for name in contents(tmp_path / "own")]
    assert left == ["checkpoint.pt"] * bool(kept)
    code, lines = end_of(start(script, "--resume"))
    assert code == 0 and ("found" in " ".join(lines)) == bool(kept), lines
    assert_same(contents(tmp_path / "own"), expected)


NUMBERS = np.arange(20_000.0)  # 160 kB
WRITERS = {
    "numbers.json": lambda path: files.write_json(path, NUMBERS.tolist()),
    "numbers.pt": lambda path: files.write_tensors(path, torch.from_numpy(NUMBERS)),
    "numbers.npz": lambda path: files.write_arrays(path, numbers=NUMBERS),
    "numbers.png": lambda path: plot_panels({"": {"": (NUMBERS, NUMBERS)}}, "", "", path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_is_there_whole_or_not_at_all(name, tmp_path):
    path = tmp_path / "folder" / name
    WRITERS[name](path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(common.InputError, match=f"cannot write .*{name}: File too large"):
            WRITERS[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == before


# ---------- Kills --------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_any_moment_the_rest_follows(script, start, whole, tmp_path):
    expected, seconds = whole(script)
    rng = random.Random(script)
    for number in range(RUNS):
        folder = tmp_path / f"killed-{number}"
        for _ in range(KILLS):
            process = start(script, "--resume", folder)
            process.join(rng.uniform(0, seconds))
            process.kill()
            process.join()
        code, lines = end_of(start(script, "--resume", folder))
        assert code == 0, lines
        assert_same(contents(folder), expected)
