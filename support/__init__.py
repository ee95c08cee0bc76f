"""What is no method of the four papers: one reads the methods without opening this folder."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"  # weights, tables and pictures


class InputError(ValueError):
    """Something the user gave is wrong: the message names it, its value and what to do.

    Commands end with exit code 2.
    """
