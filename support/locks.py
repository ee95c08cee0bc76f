"""Who may write somewhere: of several processes, also of several machines with one disk."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from support import InputError, stop

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Held(InputError):
    """Another process has a run."""


@contextlib.contextmanager
def locked(path: Path, if_held: str = "refuse"):
    """Keep other processes out of a run: by a lock on a file beside its folder, while it lasts.

    The kernel takes the lock back when its process ends, also by a kill, and processes that read
    images do not inherit it. On a disk that several machines share it is the file server that keeps
    locks (NFSv4, Lustre with `-o flock`, GPFS), and takes back those of a machine that is gone.
    Where there are no such locks, as on Windows and on some network file systems, nothing keeps
    others out.

    Args: if_held: by another process: "refuse", "wait", or "leave" it there.
    Gives: does this process have it? It is False only with "leave".
    Raises: Held with "refuse"; with "leave" InputError where there are no locks.
    """
    try:
        file = take_lock(path, if_held == "wait")
    except Held:
        if if_held == "refuse":
            raise
        yield False
        return
    if if_held == "leave" and not file:
        raise InputError(
            f"--share: {path} cannot be locked: choose an --output on a disk with locks, or give "
            "every process --seeds or targets of its own"
        )
    try:
        yield True
    finally:
        if file:
            path.unlink(missing_ok=True)  # before the lock is free, see `take_lock`
            file.close()


def take_lock(path: Path, wait: bool):
    """An open file and a lock on it; None where that cannot be had."""
    while fcntl:
        try:
            file = path.open("a")
        except OSError:  # nothing can be written here: `make_folder` says so, if anything shall
            return None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            if wait:
                stop.stop_if_asked()
                time.sleep(0.1)
                continue
            raise Held(
                f"another process is at this run ({path}): wait for it, or choose another --output"
            ) from None
        except OSError:  # a file system without locks
            file.close()
            path.unlink()
            return None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # of a run that ended just now, and removed it
    return None
