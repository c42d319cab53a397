"""Steps whose numbers never reach the host: scalars as rows of a tensor, coefficients computed on the device.

So it is with `capturable=True`, where a graph replays the step, and with `fused=True` on an accelerator, where a
GradScaler's `found_inf` may undo it; in both cases only the device knows how many steps have been taken.
"""

from collections.abc import Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surefoot.engines.bucket import addresses
from surefoot.engines.cpu.tensors import Metadata
from surefoot.rule import Scalar
from surefoot.state import local

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer
    from surefoot.step import Work


def capturing() -> bool:
    """Whether a graph is being captured on the current device."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(optimizer: "Optimizer") -> None:
    """Raise when a step that reads numbers on the host would be captured in a graph.

    Raises:
        RuntimeError: a group's `capturable` is not set.
    """
    if capturing() and not all(group.get("capturable") for group in optimizer.param_groups):
        raise RuntimeError(
            f"Attempting CUDA graph capture of step() for an instance of {type(optimizer).__name__} but param_groups' "
            f"capturable is False. Set capturable=True before the steps that warm up"
        )


def refuse_new_work(optimizer: "Optimizer") -> None:
    """Raise when a step would be captured that makes state or tables: each replay would make them anew.

    Raises:
        RuntimeError: a graph is being captured.
    """
    if capturing():
        raise RuntimeError(
            f"the step of {type(optimizer).__name__} that is captured in a graph must be like the one before it; take "
            f"a step outside of the capture first, with the same parameters and gradients of the same layout"
        )


class Rows:
    """Scalars of some parameters as the rows of one tensor, of which the state holds 0-d views.

    Attributes:
        values: tensor of shape (scalars, parameters).
    """

    def __init__(self, states: Sequence[dict[str, Any]], scalars: Sequence[Scalar], device: torch.device) -> None:
        names = [scalar.name for scalar in scalars]
        if whole := [scalar.name for scalar in scalars if scalar.integer]:
            raise RuntimeError(
                f"`{whole[0]}` is declared as an integer, which is kept on the host; steps that are captured, or "
                f"skipped by a GradScaler, need it as a tensor: declare it without `integer`"
            )
        found = [[_as_tensor(state[name], device) for state in states] for name in names]
        self.values = torch.stack([torch.stack(row) for row in found]) if names else torch.empty(0, len(states))
        for name, row in zip(names, self.values, strict=True):
            for state, view in zip(states, row, strict=True):
                state[name] = view

    def write(self, new: Sequence[Any], found_inf: Tensor | None) -> None:
        """Set the rows, unless `found_inf` is there and not zero."""
        for row, value in zip(self.values, new, strict=True):
            if found_inf is None:
                row.copy_(value)
            else:
                row.copy_(torch.where(found_inf != 0, row, value))


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    return value.to(device) if isinstance(value, Tensor) else torch.full((), value, device=device)


# Hyperparameters


def number_on(device: torch.device, value: Any) -> Any:
    """Give a hyperparameter, or a tuple of them, for arithmetic on a device: tensors there in float64, others as they are."""
    if isinstance(value, tuple):
        return tuple(number_on(device, item) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.is_cpu and device.type != "cpu":
        return value.item()  # as a constant: what is on the host cannot be read by a replay
    return value.detach().to(device, torch.float64, non_blocking=True)


class Watch:
    """Watches the tensors of a bucket on a device, and reads and writes its scalars on the host if they are there."""

    def __init__(self, work: "Work") -> None:
        self._rows = work.rows or Rows(work.states, work.optimizer.scalars, torch.device("cpu"))
        names = [*(scalar.name for scalar in work.optimizer.scalars), *(slot.name for slot in work.bucket.rule.slots)]
        self._entries = [(itemgetter(name), [state[name] for state in work.states]) for name in names]
        slots = self._entries[len(work.optimizer.scalars) :]
        self._slots = list(chain.from_iterable(tensors for _, tensors in slots))
        # Parameters are looked at from outside: a reference held here would keep them from being swapped.
        self._facts = [Metadata(tensors) for tensors in (work.params, work.grads(), self._slots)]
        self._pointers = [addresses(work.params), addresses(self._slots)]

    def renew(self, work: "Work") -> bool:
        """Give the bucket this step's gradients; tell whether all else is as it was."""
        grads = work.grads()
        tensors = (work.params, grads, self._slots)
        if not all(facts.same(now) for facts, now in zip(self._facts, tensors, strict=True)):
            return False
        pointers = (addresses(work.params), addresses(self._slots))
        if not all(map(np.array_equal, self._pointers, pointers)):
            return False
        try:
            if not all(all(map(is_, map(entry, work.states), tensors)) for entry, tensors in self._entries):
                return False
        except KeyError:
            return False
        work.bucket.grads = [local(grad) for grad in grads] if work.params[0].is_complex() else grads
        return True

    def read(self) -> np.ndarray:
        """Read the scalars: float64 of shape (scalars, parameters)."""
        return self._rows.values.numpy().astype(np.float64)

    def write(self, values: np.ndarray) -> None:
        """Write the scalars."""
        self._rows.values.copy_(torch.from_numpy(values))
