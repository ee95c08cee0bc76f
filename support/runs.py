"""A run's folder: it appears when the run is complete, until then it can be continued.

`open_run` is the one place where runs touch the disk. A run leaves a *record* in its result.json:
{"target", "seed", "rows": {row: {measure: number in [0, 1]}}, "extra"}.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from support import InputError, parallel, reason, slug, stop
from support.files import PARTIAL, write_tensors
from support.locks import locked
from support.weights import why_not

NOT_OF_A_RUN = (  # what changes where and how a run goes, but none of its numbers
    "data_root device workers output resume seeds target source summary figures download study "
    "method more rows clip save_every share profile"
).split()


# ---------- Files --------------------------------------------------------------------------------
def write_file(path, save: Callable) -> None:
    """Write a file whole or not at all: `save` is given another name to write under, whose file
    then takes the place of `path`. Only rank 0 writes.

    Raises: InputError if it cannot be written, say on a full disk; the file before stays.
    """
    if parallel.rank():
        return
    path = Path(path)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch has its own
        raise InputError(f"cannot write {path}: {reason(error)}") from None
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, value) -> None:
    text = json.dumps(value, indent=1, default=str) + "\n"
    write_file(path, lambda partial: partial.write_text(text))


@dataclass
class Run:
    """One target and seed: the folder it writes, and what it has found so far."""

    folder: Path
    settings: dict
    record: dict  # {"target", "seed", "rows": {row: {measure: number}}, "extra"}
    complete: bool = False  # nothing is to be done: it is there, or in other hands
    state: dict | None = None  # of a row that was interrupted
    within_row: bool = False  # does the checkpoint hold a state?
    save_every: float = 0  # seconds between two states of a row
    saved_at: float = -math.inf

    @property
    def rows(self) -> dict[str, dict]:
        return self.record["rows"]

    @property
    def extra(self) -> dict:
        return self.record["extra"]

    def add(self, row: str, measures: dict[str, float], state: dict | None = None) -> None:
        """A row is finished: print its numbers and keep them, with what others go on from."""
        self.rows[row] = measures
        shown = [f"{name} {100 * x:.1f}" for name, x in measures.items() if "/" not in name]
        print(f"{row}: {', '.join(shown)} %", flush=True)
        self.write(state)

    def save(self, state: dict, trained: bool = False) -> None:
        """Keep the state of a row that trains: if the last time was long enough ago, if only its
        tests are left to do, or because a signal came. Raises: Stopped if one did."""
        due = time.monotonic() - self.saved_at >= self.save_every
        if due or trained or stop.was_asked():
            self.write(state)
        stop.stop_if_asked()

    def write(self, state: dict | None) -> None:
        """Replace the checkpoint in one go: a kill while it is written leaves the one before."""
        self.saved_at = time.monotonic()
        if parallel.rank():
            return
        self.within_row = bool(state)
        saved = {"settings": self.settings, "record": self.record, "state": state}
        write_tensors(self.folder / "checkpoint.pt", saved)

    def keep(self) -> str:
        """Of a run that does not end: keep its checkpoint, if it has one, and else nothing.

        Returns: what is kept, in words.
        """
        if not (self.folder / "checkpoint.pt").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            return ""
        rows = len(self.rows)
        kept = f"{rows} finished row{'s' * (rows != 1)}"
        if self.within_row:
            kept += " and the last checkpoint"
        return f"kept in {self.folder}: {kept}; --resume continues"


@contextlib.contextmanager
def open_run(args, target: str, seed: int, label: str = ""):
    """A run's folder, the one place where runs touch the disk.

    It appears as OUTPUT/<method>/<study>/<data set>-<label>-<target>-seed<seed> when the run is
    complete; until then it is called .<name>.partial. With --resume a complete run is read
    (`run.complete`) and an interrupted one continued, if its settings are these. A run that fails
    or is stopped leaves its checkpoint, if it has one, and else nothing.

    A run belongs to one process at a time, see `locked`. With --share one that another process is
    at is left to it: there is nothing to do, and its record has no rows.

    Raises: InputError if the place cannot be written, is another process's, or holds a run with
    other settings; Stopped if a signal came.
    """
    name = slug("-".join(part for part in (args.dataset, label, target, f"seed{seed}") if part))
    final = args.output / args.method.name / (args.study or "") / name
    settings = {k: v for k, v in vars(args).items() if k not in NOT_OF_A_RUN}
    settings = json.loads(json.dumps({**settings, "target": target, "seed": seed}, default=str))
    record = {"target": target, "seed": seed, "rows": {}, "extra": {}}
    folder = final.with_name(f".{name}.partial")
    run = Run(folder, settings, record, save_every=60 * args.save_every)
    if parallel.rank():
        yield from follow(args, run, final)
        return
    lock = final.with_name(f".{name}.lock")
    with stop.in_steps(), parents(final), locked(lock, "leave" if args.share else "refuse") as mine:
        if not mine:
            leave(run, final)
            parallel.from_first(run.record)
            yield run
            return
        old = final.with_name(f".{name}.old")
        if old.exists() and not final.exists():  # a kill came while the new run took its place
            old.rename(final)
        shutil.rmtree(old, ignore_errors=True)  # or just after that
        parallel.from_first(None)  # it is not in other hands
        if args.resume:
            resume(run, final)
        parallel.barrier()  # for all to read what this one may replace
        if run.complete:
            yield run
            return
        make_folder(run.folder, keep=bool(run.rows or run.state))
        try:
            yield run
            run.record = json.loads(json.dumps(run.record))
            write_json(run.folder / "result.json", {"settings": settings, **run.record})
        except BaseException as error:
            kept = run.keep()
            # a signal to all processes also ends readers, which is a RuntimeError here
            if stop.was_asked() and isinstance(error, (stop.Stopped, RuntimeError)):
                raise stop.Stopped(kept or stop.RUNS_ARE_KEPT) from None
            if kept:
                print(kept, flush=True)
            raise
        if final.exists():
            final.rename(old)
        run.folder.rename(final)
        (final / "checkpoint.pt").unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        run.folder = final


def follow(args, run: Run, final: Path):
    """A run in another process than the first: it writes where it is lost."""
    left = parallel.from_first(None)
    if left:
        run.record, run.complete = left, True
        yield run
        return
    if args.resume:
        resume(run, final)
    parallel.barrier()
    with stop.in_steps(), tempfile.TemporaryDirectory() as folder:
        run.folder = Path(folder)
        yield run


def leave(run: Run, final: Path) -> None:
    """Leave a run to the process that is at it, which may only be reading a complete one."""
    run.complete = True
    if (final / "result.json").exists() and not run.folder.exists():
        take_up(run, final, final / "result.json")
    else:
        print("left to the process that is at this run", flush=True)


@contextlib.contextmanager
def parents(folder: Path):
    """Make the folders above one. Those that a failure leaves empty go again.

    Raises: InputError if they cannot be made.
    """
    missing = [above for above in folder.parents if not above.exists()]
    make_folder(folder.parent, keep=True)
    try:
        yield
    except BaseException:
        for above in missing:  # the deepest first
            with contextlib.suppress(OSError):  # it holds other runs, or the checkpoint
                above.rmdir()
        raise


def make_folder(path: Path, keep: bool) -> None:
    """Make an empty folder; with `keep`, leave what it holds. Raises: InputError if that fails."""
    try:
        if path.exists() and not keep:
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise InputError(
            f"cannot write results to {path}: {why}; choose another --output"
        ) from None


def resume(run: Run, final: Path) -> None:
    """Fill a run with what an interrupted one left in its folder, or a complete one in `final`."""
    for found in (run.folder / "checkpoint.pt", final / "result.json"):
        if found.exists():
            take_up(run, final, found)
            return


def take_up(run: Run, final: Path, found: Path) -> None:
    """Fill a run with a checkpoint, or with a result. Raises: InputError if it is none, or has
    other settings."""
    complete = found.name == "result.json"
    try:
        if complete:
            record = json.loads(found.read_text())
            saved = {"settings": record.pop("settings"), "record": record, "state": None}
        else:
            saved = torch.load(found, map_location="cpu", weights_only=True)
            if not parallel.rank():
                for left in run.folder.rglob(f"{PARTIAL}*"):  # by a kill
                    left.unlink()
        record, before = saved["record"], saved["settings"]
    except Exception as error:  # whatever a file that is something else makes of its readers
        why = "no record of a run" if complete else why_not(error)
        hint = "remove it, or leave --resume out"
        raise InputError(f"--resume: cannot read {found}: {why}; {hint}") from None
    changed = []
    for key in run.settings:
        then, now = before.get(key), run.settings[key]
        if then != now:
            changed.append(f"{key} {then!r}, now {now!r}")
    if changed:
        raise InputError(
            f"--resume: {found} has other settings ({'; '.join(changed)}); give those, or leave "
            "--resume out to start anew"
        )
    run.record, run.state, run.complete = record, saved["state"], complete
    run.within_row = bool(run.state)
    if run.complete:
        run.folder = final
        if not parallel.rank():
            (final / "checkpoint.pt").unlink(missing_ok=True)
    print(f"--resume: found {found}", flush=True)
