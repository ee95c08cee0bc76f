"""Weights from a file or from the hub: what goes wrong is said at once, and in one line.

Nothing in a file of weights is ever run: all are read with torch.load's weights_only=True, or are
safetensors.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
import warnings
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

# said of a file that is then refused
warnings.filterwarnings("ignore", "Detected pickle protocol")
# what unpicklers and those who look into the result say of a file that is something else
NO_WEIGHTS = (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError)
OFFLINE = (
    "Offline? Give a checkpoint file with --pretrained FILE, copy the hub's folder "
    "models--ORG--NAME from the cache of a machine that has it, or use --model tiny."
)


def why_not(error: Exception) -> str:
    """Why weights could not be loaded, in one line, without PyTorch's advice to load unsafely."""
    text = str(error).strip()
    if isinstance(error, NO_WEIGHTS) or "weights_only" in text:
        return "no file of tensors alone; a pickle that could run code is not loaded"
    if "loading state_dict" in text:
        return "its weights are not those of this model"
    return text.splitlines()[0] if text else type(error).__name__


def answers(url: str, seconds: float = 3) -> bool:
    """Can a connection to this address be had within the time? Behind a proxy: perhaps, so yes.

    Only the connection counts: what comes over it may be as slow as it likes. The attempt has a
    thread of its own, for a look-up of a host's name obeys no time limit.
    """
    if getproxies():
        return True
    address = urlsplit(url)
    port = address.port or (80 if address.scheme == "http" else 443)
    found = []

    def knock():
        with contextlib.suppress(OSError):
            socket.create_connection((address.hostname, port)).close()
            found.append(True)

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(found)


@contextlib.contextmanager
def hub_or_cache(name: str, pretrained: str | None = None):
    """Inside, weights of the hub come from its cache on this machine alone if the hub does not
    answer: it would be asked again and again for a minute.

    Args: as of `load_clip` in common.py; weights in a folder or file are none of the hub's.
    Raises: ConnectionError if they are not in the cache.
    """
    here = name.startswith("local-dir:") or (pretrained and Path(pretrained).is_file())
    before = constants.HF_HUB_OFFLINE
    offline = not here and (before or not answers(constants.ENDPOINT))
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    except Exception as error:
        if not offline:
            raise
        why = f"no connection to {constants.ENDPOINT}, and not in {constants.HF_HUB_CACHE}"
        raise ConnectionError(why) from error
    finally:
        constants.HF_HUB_OFFLINE = before
