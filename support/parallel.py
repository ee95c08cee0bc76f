"""Several processes, a GPU each, as one: `torchrun --nproc_per_node=8 clipood.py ...`

Every process runs the whole script. It trains on its share of every batch and tests on its share of
every test; the first one prints and writes. What a script must say is which numbers of all
processes belong together: `gathered`, `average_gradients`, `replica`. In one process they do
nothing.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel


# ---------- Who is there -------------------------------------------------------------------------
def launched() -> bool:
    """Was this process started by torchrun?"""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start() -> None:
    """Meet the other processes. All but the first are silent from here on."""
    if not launched() or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(on_this_machine())
    dist.init_process_group(backend)
    if number():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Of this process: 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_this_machine() -> int:
    """Of this process among those of its machine, and so of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def count_on_this_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()


def from_first(value):
    """What the first process gives, for all; it may be anything that can be pickled."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


# ---------- What is shared -----------------------------------------------------------------------
def share(size: int) -> slice:
    """This process's part of `size` things: one of equal parts, in the order of processes."""
    part = size // count()
    return slice(number() * part, (number() + 1) * part)


def gathered(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Features (S b, D) of all processes, group after group: (S b P, D), P processes.

    Gradients flow back to each. Where all processes make the same loss of it, the average of their
    gradients (`average_gradients`) is that of the loss.
    """
    if count() == 1:
        return x
    parts = [part.unflatten(0, (groups, -1)) for part in all_gather(x.contiguous())]
    return torch.cat(parts, 1).flatten(0, 1)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Over all processes, in one message."""
    if count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= count()
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, part in zip(gradients, flat.split(sizes)):
        gradient.copy_(part.view_as(gradient))


def replica(model: nn.Module) -> nn.Module:
    """A model whose gradients are averaged over all processes while they are computed. It shares
    its weights with the given one."""
    if count() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False)


def whole(part: torch.Tensor, size: int) -> torch.Tensor:
    """What all processes found about `size` things, each about every P-th, beginning with its own
    number; on the CPU."""
    parts = [None] * count()
    dist.all_gather_object(parts, part)
    found = part.new_empty(size, *part.shape[1:])
    for first, own in enumerate(parts):
        found[first :: count()] = own
    return found


def mean_of_processes(number: torch.Tensor) -> float:
    """Of a number of every process."""
    if count() == 1:
        return number.item()
    total = number.detach().clone()
    dist.all_reduce(total)
    return total.item() / count()
