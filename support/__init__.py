"""What is no method of the four papers: one reads the methods without opening this folder."""

import difflib
import pickle
import re
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"  # weights, tables and pictures


class InputError(ValueError):
    """Something the user gave is wrong: the message names it, its value and what to do.

    Commands end with exit code 2.
    """


def did_you_mean(wrong: str, names) -> str:
    """A hint for the end of a message about a wrong name: its nearest neighbour, or a full stop."""
    names = {name.lower(): name for name in names}
    close = difflib.get_close_matches(wrong.lower(), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)." if close else "."


def slug(text: str) -> str:
    """A name as a file name: lower case letters of any script, anything unusual becomes `_`."""
    return re.sub(r"(?:[^\w.-]|_)+", "_", text.lower()).strip("_")


def reason(error: Exception) -> str:
    """Why something failed, in one line: the system's words where an OSError is at the bottom."""
    while not isinstance(error, OSError) and error.__context__:
        error = error.__context__
    text = getattr(error, "strerror", None) or str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# what readers of tensors raise for a file that is something else
NO_TENSORS = (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError)


def why_not_loaded(error: Exception) -> str:
    """`reason` for weights and checkpoints, without PyTorch's advice to load them unsafely."""
    if isinstance(error, NO_TENSORS) or "weights_only" in str(error):
        return "no file of tensors alone; a pickle that could run code is not loaded"
    if "loading state_dict" in str(error):
        return "its weights are not those of this model"
    return reason(error)
