"""A bucket: the parameters of a group that one call of an engine can serve."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.engines.draws import numbers_drawn
from surefoot.engines.identity import Identity
from surefoot.rule import ROUNDING_STEP, Reduction, Rule
from surefoot.storage import BLOCK, Format, decode, encode, format_of, random_bits
from surefoot.tensors.gate import Arrays, admit, admit_scales
from surefoot.tensors.memory import PLAIN, is_plain, same_dense_layout, shared_memory
from surefoot.tensors.modes import mode_is_active

Coefficients = Mapping[str, Any]


def unsupported_reasons(bucket: "Bucket", stores: Callable[[Format], bool]) -> Iterator[str]:
    """Return the reasons why no engine that runs kernels can serve a bucket; `stores` tells which formats they know."""
    if bucket.options.get("differentiable"):
        yield "kernels carry no gradients through the step"
    if mode_is_active():
        yield "a mode or transform is active that must see torch's operations, which kernels do not show"
    param, *slots = bucket.kept
    if not stores(param) or not stores(format_of(bucket.grads[0].dtype)):
        yield f"kernels do not know {param.name} parameters with {bucket.grads[0].dtype} gradients"
    stored = list(chain(bucket.params, *bucket.slots))
    if unknown := {kept.name for kept in slots if not stores(kept)}:
        yield f"kernels do not know state of {min(unknown)}"
    if bucket.is_rounded and any(who.first is None for who in bucket.identities):
        yield "parameters are divided over ranks within their rows, whose elements rounding numbers one by one"
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
    """Measure tensors by torch's operations: a row of float64; gradients flow through it."""
    numbers = [_BY_TORCH[reduction.kind](tensor) for reduction, tensor in zip(reductions, tensors, strict=True)]
    return torch.stack([number.double() for number in numbers])


def _largest(tensor: Tensor) -> Tensor:
    return tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())


_BY_TORCH: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda tensor: tensor.double().sum(),
    "sum_of_squares": lambda tensor: tensor.double().square().sum(),
    "largest": _largest,
    "nonfinite": lambda tensor: (~tensor.isfinite()).sum(),
}


class EachParameter(Sequence[Coefficients]):
    """The numbers of an update where each parameter has its own, or only the device knows them.

    As items they are 0-d tensors, or numbers that all parameters share.

    Attributes:
        numbers: for each number a tensor with one element for each parameter, or what all of them share.
    """

    def __init__(self, numbers: Mapping[str, Any], count: int) -> None:
        self.numbers, self._count = numbers, count

    def __len__(self) -> int:
        return self._count

    def table(self, names: Sequence[str]) -> np.ndarray:
        """Return numbers that the host has: float64 of shape (parameters, numbers)."""
        table = np.empty((self._count, len(names)))
        for column, name in enumerate(names):
            value = self.numbers[name]
            table[:, column] = value.numpy() if isinstance(value, Tensor) else value
        return table

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
        formats: those of the parameters and of each slot, if they are not the tensors' dtypes.
        parts: what stands beside the tensors of these formats that have a second one, in their order, format by format.
        identities: who the parameters are to random bits, where values are rounded by them.
        seed: what random bits begin from.
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
    formats: tuple[Format, ...] = ()
    parts: list[list[Tensor]] = field(default_factory=list)
    identities: Sequence[Identity] = ()
    seed: int = 0

    @property
    def kept(self) -> tuple[Format, ...]:
        """Formats of the parameters and of each slot."""
        return self.formats or tuple(format_of(column[0].dtype) for column in (self.params, *self.slots) if column)

    @property
    def is_rounded(self) -> bool:
        """Return whether values are rounded by random bits."""
        return any(kept.stochastic for kept in self.formats)

    @property
    def is_plain(self) -> bool:
        """Return whether all tensors are their values, rounded to nearest."""
        return all(kept.is_plain for kept in self.formats)

    def columns(self) -> tuple[list[Tensor], ...]:
        """Return the tensors that a step writes: parameters, slots, and what stands beside them."""
        return (self.params, *self.slots, *self.parts)

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
        prefixes = ["", "the gradient of ", *(f"state `{slot.name}` of " for slot in self.rule.slots)]
        columns = [self.params, self.grads, *self.slots]
        for kept, part in self._parted():
            if kept.correction:
                columns.append(part)
                prefixes.append("the correction of ")
        arrays = admit(columns, prefixes, self.row_name)
        self.gradient_addresses = arrays.addresses[1]
        for position, (slot, kept) in enumerate(zip(self.rule.slots, self.kept[1:], strict=False), 1):
            if kept.code:
                prefix = f"the scale of state `{slot.name}` of "
                arrays = admit_scales(arrays, self.part_of(position) or [], BLOCK, prefix, self.row_name)
        if any(kept.code for kept in self.formats):  # blocks are of elements in C order
            in_order = [all(tensor.is_contiguous() for tensor in row) for row in zip(*columns, strict=True)]
            return arrays._replace(flat=arrays.flat & np.array(in_order, dtype=bool))
        return arrays

    def _parted(self) -> Iterator[tuple[Format, list[Tensor]]]:
        """Yield the formats that have a second tensor, each with these tensors."""
        return zip((kept for kept in self.formats if kept.part), self.parts, strict=True)

    # Values, whatever format they are kept in

    def part_of(self, position: int) -> list[Tensor] | None:
        """Return what stands beside the parameters (position 0) or a slot (its number from 1), if anything does."""
        before = sum(kept.part is not None for kept in self.formats[:position])
        return self.parts[before] if self.formats and self.formats[position].part else None

    def load(self, row: int) -> list[Tensor]:
        """Return the values of a parameter, its gradient and its slots in the dtype of the arithmetic."""
        loaded = []
        for position, (kept, column) in enumerate(zip(self.kept, (self.params, *self.slots), strict=True)):
            part = self.part_of(position)
            loaded.append(decode(kept, column[row], None if part is None else part[row]).to(self.compute_dtype))
        return [loaded[0], self.grads[row].to(self.compute_dtype), *loaded[1:]]

    def encode(self, row: int, values: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the tensors that a step writes of a parameter, each beside what it is to become.

        Args:
            row: the parameter's position.
            values: its new value and those of its slots.
        """
        step = self.coefficients[self.row[row]].get(ROUNDING_STEP.name)
        elements = self.element_numbers(row) if self.is_rounded else None
        numbers = numbers_drawn(self.rule, self.kept)
        for position, (kept, value, number) in enumerate(zip(self.kept, values, numbers, strict=False)):
            if not self.rule.written[position]:
                continue
            random = None
            if number is not None and elements is not None:
                random = random_bits(self.seed, self.identities[row].number, step, elements, number)
            part = self.part_of(position)
            targets = [(self.params, *self.slots)[position], *([] if part is None else [part])]
            yield from zip((column[row] for column in targets), encode(kept, value, random), strict=True)

    def store(self, row: int, values: Sequence[Tensor]) -> None:
        """Write the new value of a parameter and those of its slots."""
        for target, value in self.encode(row, values):
            if value is not target:
                target.copy_(value)

    def element_numbers(self, row: int) -> Tensor:
        """Return the numbers of a parameter's elements to random bits.

        They count in the order of memory where all tensors of the row have the same, so that kernels pass over them as
        they are, and in C order otherwise.
        """
        param, who = self.params[row], self.identities[row]
        numbers = who.numbers(param)
        corrections = [part for kept, part in self._parted() if kept.correction]
        tensors = [column[row] for column in (self.params, self.grads, *self.slots, *corrections)]
        in_order = any(kept.code for kept in self.formats) or who.first is None or not same_dense_layout(tensors)
        return numbers if in_order else numbers.as_strided(param.shape, param.stride())

    def by_coefficients(self) -> Iterator[tuple[list[int], Coefficients]]:
        """Yield the positions of the parameters that share coefficients, and those."""
        for row, coefficients in enumerate(self.coefficients):
            yield np.flatnonzero(self.row == row).tolist(), coefficients
