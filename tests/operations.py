"""What PyTorch is asked to do, counted without a GPU: operations, and those for which a GPU would
have to be waited for."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# they give a number, or a size that depends on numbers
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2}
FREE = {aten.view, aten.t, aten.transpose, aten.expand, aten.permute, aten.slice, aten.select}
FREE |= {aten.detach, aten.unsqueeze, aten.squeeze, aten.split, aten._unsafe_view, aten.alias}
FREE |= {aten.as_strided, aten.unbind, aten.split_with_sizes, aten.empty_like, aten.empty}


class Operations(TorchDispatchMode):
    """Counts while it is entered: `launched`, what a GPU would run, and `waits`."""

    def __init__(self):
        super().__init__()
        self.launched = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operation = function.overloadpacket
        self.launched += operation not in FREE
        self.waits += operation in WAITING or picks_by_truth(operation, args)
        return function(*args, **(kwargs or {}))


def picks_by_truth(operation, args) -> bool:
    """x[mask], whose size depends on the mask."""
    if operation is not aten.index:
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])
