"""A bucket: the parameters of a group that one call of an engine can serve."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.rule import Reduction, Rule
from surefoot.storage import Format, format_of
from surefoot.tensors.gate import Arrays, admit
from surefoot.tensors.memory import PLAIN, is_plain, shared_memory
from surefoot.tensors.modes import mode_is_active

Coefficients = Mapping[str, Any]


def unsupported_reasons(bucket: "Bucket", stores: Callable[[Format], bool]) -> Iterator[str]:
    """Return the reasons why no engine that runs kernels can serve a bucket; `stores` tells which formats they know."""
    if bucket.options.get("differentiable"):
        yield "kernels carry no gradients through the step"
    if mode_is_active():
        yield "a mode or transform is active that must see torch's operations, which kernels do not show"
    if not stores(format_of(bucket.dtype)) or not stores(format_of(bucket.grads[0].dtype)):
        yield f"kernels do not know {bucket.dtype} parameters with {bucket.grads[0].dtype} gradients"
    stored = list(chain(bucket.params, *bucket.slots))
    if unknown := {t.dtype for t in stored if not stores(format_of(t.dtype))} - {bucket.dtype}:
        yield f"kernels do not know state of {min(map(str, unknown))}"
    unusual = next((t for t in (*stored, *bucket.grads) if type(t) not in PLAIN), None)
    if unusual is not None:
        yield f"{type(unusual).__name__} is not a plain tensor"
    elif not all(map(is_plain, stored)):
        yield "a parameter or its state is negated or conjugated lazily, or has no memory of its own"
    if len({id(param) for param in bucket.params}) < len(bucket.params):
        yield "a parameter stands in the group twice, and kernels update all at once"
    elif unusual is None and (reason := overlap(bucket, stored)) is not None:
        yield reason


def overlap(bucket: "Bucket", stored: Sequence[Tensor]) -> str | None:
    """Return which parameters must be stepped one after the other since they, or their state, share memory."""
    if (pair := shared_memory(stored)) is None:
        return None
    owners = [*range(len(bucket.params)), *(row for row, slots in enumerate(bucket.slots) for _ in slots)]
    first, second = (bucket.row_name(owners[position]) for position in pair)
    return f"{first} and {second}, or their state, share memory, so that they must be updated one after the other"


def reduce(reductions: Sequence[Reduction], tensors: Sequence[Tensor]) -> Tensor:
    """Measure tensors by torch's operations: a row of float64."""
    numbers = [_BY_TORCH[reduction.kind](tensor) for reduction, tensor in zip(reductions, tensors, strict=True)]
    return torch.stack([number.detach().double() for number in numbers])


def _largest(tensor: Tensor) -> Tensor:
    return tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())


_BY_TORCH: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum_of_squares": lambda tensor: tensor.double().square().sum(),
    "largest": _largest,
    "nonfinite": lambda tensor: (~tensor.isfinite()).sum(),
}


class EachParameter(Sequence[Coefficients]):
    """The numbers of an update where they are computed on the device: those of each parameter, as 0-d tensors.

    Attributes:
        numbers: for each number a tensor with one element for each parameter, or what all of them share.
    """

    def __init__(self, numbers: Mapping[str, Any], count: int) -> None:
        self.numbers, self._count = numbers, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < self._count:
            raise IndexError(position)
        return {
            name: value[position] if isinstance(value, Tensor) and value.dim() else value
            for name, value in self.numbers.items()
        }


@dataclass(eq=False)
class Bucket:
    """Parameters that share device, dtype and rule.

    Complex tensors appear as their real views, so that an engine meets real numbers only.  An engine writes the
    parameters and the slots, in place, and nothing else.

    Attributes:
        rule: the rule, its flags settled.
        params: the parameters.
        grads: their gradients, same shapes, any strides; never written.
        gradient_addresses: the addresses of the gradients' memory, as the gate or a guard has found them.
        slots: for each of `rule.slots`, the tensors that belong to the parameters.  While an engine is chosen these
            are what there is of them.
        coefficients: the numbers of an update, for each set of parameters that shares them.
        row: for each parameter the index of its numbers in `coefficients`.
        options: the group's engine options (`foreach`, `fused`, `capturable`, `differentiable`).
        row_name: what the parameter at a position is called in a message.
        plan: what the engine keeps of the bucket between steps.
        measured: what the last run has measured, for each parameter and each of `rule.reductions`: float64, on the
            parameters' device.
        found_inf: on the device, a number that when not zero tells the GPU engine to change nothing.
    """

    rule: Rule
    params: list[Tensor]
    grads: list[Tensor]
    options: Mapping[str, Any]
    slots: list[list[Tensor]] = field(default_factory=list)
    coefficients: Sequence[Coefficients] = field(default_factory=list)
    row: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    gradient_addresses: np.ndarray | None = None
    row_name: Callable[[int], str] = "tensor {}".format
    plan: Any = None
    measured: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Device of every parameter."""
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of every parameter."""
        return self.params[0].dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the update is computed: at least float32, rounded once when stored."""
        return torch.promote_types(self.dtype, torch.float32)

    def arrays(self) -> Arrays:
        """Return parameters, gradients and slots as a kernel takes them, and note where the gradients are.

        Raises:
            RuntimeError: a tensor's memory is not what a kernel would take it for; see `tensors.gate.admit`.
        """
        prefixes = ("", "the gradient of ", *(f"state `{slot.name}` of " for slot in self.rule.slots))
        arrays = admit((self.params, self.grads, *self.slots), prefixes, self.row_name)
        self.gradient_addresses = arrays.addresses[1]
        return arrays

    def tensors(self) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
        """Yield param, grad and slots of one parameter after the other."""
        slots = zip(*self.slots, strict=True) if self.slots else ((),) * len(self.params)
        return zip(self.params, self.grads, slots, strict=True)

    def rows(self) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...], Coefficients]]:
        """Yield param, grad, slots and coefficients of one parameter after the other."""
        for tensors, row in zip(self.tensors(), self.row, strict=True):
            yield *tensors, self.coefficients[row]

    def by_coefficients(self) -> Iterator[tuple[list[int], Coefficients]]:
        """Yield the positions of the parameters that share coefficients, and those."""
        for row, coefficients in enumerate(self.coefficients):
            yield np.flatnonzero(self.row == row).tolist(), coefficients
