"""A run's folder: it appears when the run is complete, until then it can be continued.

`open_run` is the one place where runs touch the disk. A run leaves a *record* in its result.json:
{"target", "seed", "rows": {row: {measure: number in [0, 1]}}, "extra"}.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from assets.settings import slug
from assets.tiny_world import InputError
from assets.weights import why_not

NOT_OF_A_RUN = (  # what changes where and how a run goes, but none of its numbers
    "data_root device workers output resume seeds target source summary figures download study "
    "method more rows clip"
).split()


@dataclass
class Run:
    """One target and seed: the folder it writes, and what it has found so far."""

    folder: Path
    settings: dict
    record: dict  # {"target", "seed", "rows": {row: {measure: number}}, "extra"}
    complete: bool = False
    state: dict | None = None  # of a row that was interrupted

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
        self.save(state)

    def save(self, state: dict | None = None) -> None:
        """Replace the checkpoint in one go: a kill while it is written leaves the one before."""
        saved = {"settings": self.settings, "record": self.record, "state": state}
        replace_file(self.folder / "checkpoint.pt", saved)


def replace_file(path: Path, value) -> None:
    """torch.save in one go. Raises: InputError if it cannot be written; the file before stays."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch.save
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}; make room, then --resume") from None


@contextlib.contextmanager
def open_run(args, target: str, seed: int, label: str = ""):
    """A run's folder, the one place where runs touch the disk.

    It appears as OUTPUT/<method>/<study>/<data set>-<label>-<target>-seed<seed> when the run is
    complete; until then it is called .<name>.partial. With --resume a complete run is read
    (`run.complete`) and an interrupted one continued, if its settings are these. A run that fails
    leaves its checkpoint, if it has one, and else nothing.

    Raises: InputError if the place cannot be written, or holds a run with other settings.
    """
    name = slug("-".join(part for part in (args.dataset, label, target, f"seed{seed}") if part))
    final = args.output / args.method.name / (args.study or "") / name
    settings = {k: v for k, v in vars(args).items() if k not in NOT_OF_A_RUN}
    settings = json.loads(json.dumps({**settings, "target": target, "seed": seed}, default=str))
    record = {"target": target, "seed": seed, "rows": {}, "extra": {}}
    run = Run(final.with_name(f".{name}.partial"), settings, record)
    old = final.with_name(f".{name}.old")
    if old.exists() and not final.exists():  # a kill came while the new run took its place
        old.rename(final)
    if args.resume:
        resume(run, final)
    if run.complete:
        yield run
        return
    made = make_folder(run.folder, keep=bool(run.rows or run.state))
    try:
        yield run
        run.record = json.loads(json.dumps(run.record))
        write_json(run.folder / "result.json", {"settings": settings, **run.record})
    except BaseException:
        if (run.folder / "checkpoint.pt").exists():
            print(f"{len(run.rows)} finished rows are kept: --resume continues", flush=True)
        else:
            shutil.rmtree(run.folder, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # it holds other runs, or the checkpoint
                folder.rmdir()
        raise
    if final.exists():
        final.rename(old)
    run.folder.rename(final)
    (final / "checkpoint.pt").unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    run.folder = final


def make_folder(path: Path, keep: bool) -> list[Path]:
    """Make an empty folder (with `keep`, leave what it holds). Returns: the folders above it that
    had to be made, the deepest first. Raises: InputError if it cannot be made."""
    missing_folders = [folder for folder in path.parents if not folder.exists()]
    try:
        if path.exists() and not keep:
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise InputError(
            f"cannot write results to {path.parent}: {why}; choose another --output"
        ) from None
    return missing_folders


def resume(run: Run, final: Path) -> None:
    """Fill a run with what an interrupted one left in its folder, or a complete one in `final`."""
    checkpoint, result = run.folder / "checkpoint.pt", final / "result.json"
    if not checkpoint.exists() and not result.exists():
        return
    found = checkpoint if checkpoint.exists() else result
    try:
        if found == checkpoint:
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        else:
            record = json.loads(result.read_text())
            saved = {"settings": record.pop("settings"), "record": record, "state": None}
        record, before = saved["record"], saved["settings"]
    except Exception as error:  # whatever a file that is something else makes of its readers
        why = why_not(error) if found == checkpoint else "no record of a run"
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
    run.record, run.state, run.complete = record, saved["state"], found == result
    if run.complete:
        run.folder = final
        (final / "checkpoint.pt").unlink(missing_ok=True)
    print(f"--resume: found {found}", flush=True)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, default=str) + "\n")
