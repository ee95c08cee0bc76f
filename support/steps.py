"""Steps of training, with an eye on the numbers that does not make a GPU wait."""

from __future__ import annotations

import math

import torch

from support import InputError
from support.profiling import profile

EVERY = 50  # steps between two looks at a GPU's numbers: each look waits for all it was told to do


class Steps:
    """Steps of an optimizer along the gradients that are there, none of which may be followed by
    numbers that are not finite.

    On a CPU a step is looked at as soon as it is taken. A GPU works through a queue, and asking it
    for a number waits until the queue is empty: there, numbers are looked at every 50 steps, and
    when `check` is called, which must be before anything is made of the weights. Either way the
    message names the step where it began.

    Args: optimizer; batches: a `SourceBatches`, to name images; scaler: of fp16, which leaves out a
    step whose gradient is not finite.
    """

    def __init__(self, optimizer, batches=None, scaler=None):
        self.optimizer, self.batches, self.scaler = optimizer, batches, scaler
        self.weights = []
        for group in optimizer.param_groups:
            self.weights += group["params"]
        self.every = 1 if self.weights[0].device.type == "cpu" else EVERY
        self.unseen = []  # (where, step of the batches, (loss, norm of its gradient))
        self.last = ()  # where, step of the batches

    def take(self, loss: torch.Tensor, where: str) -> None:
        """A step. `where` the training is, for a message. Raises: as `check`, if it is time to."""
        norm = total_norm([weight.grad for weight in self.weights if weight.grad is not None])
        rate = self.optimizer.param_groups[0]["lr"]
        step = self.batches.step if self.batches else None
        self.last = f"{where}, learning rate {rate:.3g}", step
        self.unseen.append((*self.last, torch.stack([loss.detach().to(norm), norm])))
        due = len(self.unseen) >= self.every
        if due:
            self.look()  # on a CPU before any weights become what their gradient is
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if due:
            self.check_weights()
        profile.step(self.weights[0].device)

    def look(self) -> None:
        """Raises: InputError that names the first step whose loss or gradient is not finite."""
        unseen, self.unseen = self.unseen, []
        if not unseen:
            return
        left_out = self.scaler is not None and self.scaler.is_enabled()
        numbers = torch.stack([numbers for *_, numbers in unseen]).tolist()  # waits for a GPU
        for (where, step, _), (loss, norm) in zip(unseen, numbers):
            if not (math.isfinite(loss) and (math.isfinite(norm) or left_out)):
                raise self.broken(where, step, f"the loss is {loss}, its gradient's norm {norm}")

    def check(self) -> None:
        """Raises: as `look`; InputError if numbers of the weights are not finite."""
        self.look()
        self.check_weights()
        profile.say(self.weights[0].device)

    def check_weights(self) -> None:
        size = total_norm([weight.detach() for weight in self.weights]).item()
        if not math.isfinite(size):
            raise self.broken(*self.last, f"the norm of the weights is {size}")

    def broken(self, where: str, step: int | None, what: str) -> InputError:
        hint = "try a lower learning rate"
        if self.batches:
            hint += f", or look at this batch: {', '.join(self.batches.names(step))}"
        return InputError(f"{where}: {what}; {hint}")


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """A scalar, not finite if a number of any of them is not."""
    return torch.stack(torch._foreach_norm(tensors)).norm()
