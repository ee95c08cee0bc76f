"""A small CLIP's words, each one token of open_clip's own tokenizer, by a merge file of its own.

Byte pair encoding joins two neighbouring symbols, again and again, the earliest listed pair first.
Every word gets a chain of merges that ends in the whole word: `d o g</w>`, `do g</w>`, `dog</w>`.
Any program reads such a folder:

    open_clip.get_tokenizer("local-dir:FOLDER", bpe_path="FOLDER/merges.txt.gz")
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from support import InputError
from support.tiny_world import WordTokenizer, refuse_unknown

FILE = "merges.txt.gz"
BYTES, SPECIAL = 2 * 256, 2  # tokens beside the merges: bytes, also at a word's end; start and end


def apply_merges(word: str, merges: list[tuple]) -> list[str]:
    """The symbols of a word after all merges that apply; `</w>` ends a word."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = list(zip(symbols, symbols[1:]))
        listed = [merges.index(pair) for pair in pairs if pair in merges]
        if not listed:
            return symbols
        first, second = merges[min(listed)]
        joined = []
        for symbol in symbols:
            if joined and (joined[-1], symbol) == (first, second):
                joined[-1] += symbol
            else:
                joined.append(symbol)
        symbols = joined


def learn_merges(words) -> list[tuple]:
    """Merges that make one token of every word. What a later word adds comes last, so it changes
    nothing for those before it."""
    merges = []
    for word in words:
        whole, *rest = apply_merges(word, merges)
        for symbol in rest:
            merges.append((whole, symbol))
            whole += symbol
    return merges


def write_merges(folder: Path, words) -> None:
    """`FILE`, whose first line, which tokenizers pass over, lists the words."""
    lines = [" ".join(words)] + [" ".join(pair) for pair in learn_merges(words)]
    packed = gzip.compress("\n".join(lines).encode(), mtime=0)  # the same bytes every time
    (Path(folder) / FILE).write_bytes(packed)


class TinyTokenizer(SimpleTokenizer):
    """open_clip's tokenizer, which also refuses what the small CLIP never saw: a text or n texts ->
    (n, context_length) int64. Raises: InputError that names the word, or says how many are read."""

    def __init__(self, file: Path, context_length: int):
        super().__init__(str(file), context_length=context_length)
        self.file = Path(file)
        header, _, _ = gzip.decompress(self.file.read_bytes()).decode().partition("\n")
        self.words = header.split()

    def __call__(self, texts, context_length: int | None = None) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        most = (context_length or self.context_length) - SPECIAL
        for text in texts:
            refuse_unknown(text, self.words)
            tokens = len(self.encode(text))
            if tokens > most:
                raise InputError(
                    f"{text!r} has {tokens} tokens, the tiny CLIP reads at most {most}"
                )
        return super().__call__(texts, context_length)


def tokenizer_of(name: str, model: nn.Module) -> Callable:
    """open_clip's; of a folder with words or merges of its own, theirs."""
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if (folder / FILE).is_file():
            return TinyTokenizer(folder / FILE, model.context_length)
        config = json.loads((folder / "open_clip_config.json").read_text())
        if config.get("vocabulary"):
            return WordTokenizer(config["vocabulary"], model.context_length)
    return open_clip.get_tokenizer(name)
