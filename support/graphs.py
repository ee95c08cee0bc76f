"""--compile: a tower's training pass as one graph, where single operations keep a GPU waiting."""

from __future__ import annotations

import torch
from torch import nn

from support import InputError


def compiled(module: nn.Module, row) -> nn.Module:
    """With --compile a module that computes the same from the same weights; else the module itself.

    Only calls of what is returned are compiled: the module's own names, hooks and copies stay as
    they are. No hook may be set while it is called, and its gradient has no gradient.
    """
    if not row.compile:
        return module
    torch.compiler.reset()  # what was compiled before counts towards a limit
    # a pass backwards may be made twice (two losses), so it keeps what it has read
    torch._functorch.config.donated_buffer = False
    return torch.compile(module)


def check_compiler(device: torch.device) -> None:
    """Raises: InputError where PyTorch cannot compile: no C++ compiler, no Triton, an old GPU."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # each of them fails in a way of its own
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--compile: PyTorch cannot for {device} here: {why[0]}") from None
