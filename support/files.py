"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from support import InputError

PARTIAL = ".partial-"  # starts the name of a file until it is complete


@contextlib.contextmanager
def replacing(path):
    """Write a file in one go: gives the name to write under; its file then takes `path`'s place.

    Raises: InputError if it cannot be written, say on a full disk. The file before stays, and no
    part of the new one.
    """
    path = Path(path)
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    # a full disk is a RuntimeError of torch.save, and an error of its own in safetensors
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"cannot write {path}: {in_short(error)}; make room, then --resume"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def in_short(error: Exception) -> str:
    """What went wrong, in one line: the system's words, where torch only tells what followed."""
    while not isinstance(error, OSError) and error.__context__:
        error = error.__context__
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0]


def write_json(path, value) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, default=str) + "\n")


def write_tensors(path, value) -> None:
    """torch.save: a checkpoint, or the weights of a network."""
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(value, file)


def write_arrays(path, **arrays) -> None:
    """np.savez: numbers for pictures of your own."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
