"""Several processes train as one: `torchrun --nproc_per_node=8 clipood.py ...`

Every rank runs the whole script on its share of every batch and of every test; rank 0 prints and
writes. In one process nothing here does anything.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather as differentiable_all_gather
from torch.nn.parallel import DistributedDataParallel


def init_process_group() -> None:
    """Join the other ranks, if torchrun started this process. All but rank 0 print nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank())
    dist.init_process_group(backend)
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The rank among the processes of this machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def slice_of_rank(size: int) -> slice:
    """This rank's part of `size` items: equal parts, in the order of ranks."""
    part = size // world_size()
    return slice(rank() * part, (rank() + 1) * part)


def all_gather(x: torch.Tensor, domains: int) -> torch.Tensor:
    """Features (S b, D) of S domains, of all ranks, domain after domain: (S b world_size, D).

    Gradients flow back to every rank. Where all ranks compute the same loss from the result,
    `average_gradients` gives the gradient of that loss.
    """
    if world_size() == 1:
        return x
    parts = differentiable_all_gather(x.contiguous())
    parts = [part.unflatten(0, (domains, -1)) for part in parts]  # (S, b, D) each
    return torch.cat(parts, 1).flatten(0, 1)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average .grad over all ranks, in one message."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, average in zip(gradients, flat.split(sizes)):
        gradient.copy_(average.view_as(gradient))


def data_parallel(model: nn.Module) -> nn.Module:
    """The model, or DistributedDataParallel around it; its weights are the model's own."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False)


def gather_outputs(outputs: torch.Tensor, size: int) -> torch.Tensor:
    """All outputs (size, ...) on the CPU: rank r computed those of r, r + world_size, ..."""
    parts = [None] * world_size()
    dist.all_gather_object(parts, outputs)
    gathered = outputs.new_empty(size, *outputs.shape[1:])
    for first, part in enumerate(parts):
        gathered[first :: world_size()] = part
    return gathered


def mean_over_ranks(value: torch.Tensor) -> float:
    """The mean over ranks of a scalar."""
    if world_size() == 1:
        return value.item()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total.item() / world_size()
