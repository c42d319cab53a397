"""A bucket: the parameters of a group that one call of an engine can serve."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

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


class _Column(NamedTuple):
    """The parameters of a bucket or one slot of theirs, as they are kept.

    Attributes:
        kept: the format.
        arrays: the tensors of elements, and those that stand beside them if there are any.
    """

    kept: Format
    arrays: tuple[list[Tensor], ...]

    def reader(self, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """Return a function that gives the values at a position in a dtype."""
        if self.kept == format_of(dtype):
            return self.arrays[0].__getitem__
        return lambda row: decode(self.kept, *(tensors[row] for tensors in self.arrays)).to(dtype)

    def store(self, row: int, value: Tensor, random: Tensor | None) -> None:
        """Write the values at a position, rounded by random bits where there are any."""
        stored = (value,) if self.kept.is_plain else encode(self.kept, value, random)
        for tensors, new in zip(self.arrays, stored, strict=True):
            if new is not tensors[row]:
                tensors[row].copy_(new)


@dataclass(eq=False)
class Bucket:
    """Parameters that share device, dtype and rule.

    Complex tensors appear as their real views, so that an engine meets real numbers only.  An engine writes the
    parameters and the slots, in place, and nothing else.

    Attributes:
        rule: the rule, its flags settled.
        params: the parameters.
        grads: their gradients, same shapes, any strides; never written.
        gradient_addresses: the addresses of the gradients' memory, as the gate (when the plan is made) or a guard has
            found them.
        slots: for each of `rule.slots`, the tensors that belong to the parameters.  While an engine is chosen, for each
            parameter those that it has already.
        coefficients: the numbers of an update, for each set of parameters that shares them.
        row: for each parameter the index of its numbers in `coefficients`.
        options: the group's engine options (`foreach`, `fused`, `capturable`, `differentiable`).
        row_name: what the parameter at a position is called in a message.
        plan: what the engine keeps of the bucket between steps.
        overwrites: whether the eager engine may overwrite values on the way to new ones, None until it has found out.
        measured: what the last run has measured, for each parameter and each of `rule.reductions`: float64, on the
            parameters' device.
        found_inf: on the device, a number that when not zero tells the GPU engine to change nothing.
        formats: those of the parameters and of each slot; none where they are the tensors' dtypes.
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
    overwrites: bool | None = None
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
        """Return parameters, gradients and slots as a kernel takes them.

        Raises:
            RuntimeError: a tensor's memory is not what a kernel would take it for; see `tensors.gate.admit`.
        """
        prefixes = ["", "the gradient of ", *(f"state `{slot.name}` of " for slot in self.rule.slots)]
        columns = [self.params, self.grads, *self.slots]
        param, *slots = self._stored()
        if param.kept.correction:
            columns.append(param.arrays[1])
            prefixes.append("the correction of ")
        arrays = admit(columns, prefixes, self.row_name)
        for slot, column in zip(self.rule.slots, slots, strict=True):
            if column.kept.code:
                prefix = f"the scale of state `{slot.name}` of "
                arrays = admit_scales(arrays, column.arrays[1], BLOCK, prefix, self.row_name)
        if any(kept.code for kept in self.formats):  # blocks are of elements in C order
            in_order = [all(tensor.is_contiguous() for tensor in row) for row in zip(*columns, strict=True)]
            return arrays._replace(flat=arrays.flat & np.array(in_order, dtype=bool))
        return arrays

    # Values, whatever format they are kept in

    def _stored(self) -> list[_Column]:
        """Return the columns of the parameters and of each slot."""
        parts = iter(self.parts)
        columns = zip(self.kept, (self.params, *self.slots), strict=True)
        return [_Column(kept, (tensors, next(parts)) if kept.part else (tensors,)) for kept, tensors in columns]

    def value(self, row: int, elements: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what a parameter's elements are, as values; `elements` picks them from a tensor of its shape."""
        column = self._stored()[0]
        return decode(column.kept, *(elements(tensors[row]) for tensors in column.arrays))

    def readers(self) -> list[Callable[[int], Tensor]]:
        """Return what gives the value at a position in the dtype of the arithmetic.

        Returns:
            Functions of a position: for the parameters, their gradients, and each slot.
        """
        dtype = self.compute_dtype
        param, *slots = (column.reader(dtype) for column in self._stored())
        return [param, lambda row: self.grads[row].to(dtype), *slots]

    def values(self, positions: Sequence[int]) -> list[list[Tensor]]:
        """Return the values at some positions in the dtype of the arithmetic, as `readers` give them one by one."""
        columns, dtype = (self.params, self.grads, *self.slots), self.compute_dtype
        if all(kept == format_of(dtype) for kept in self.kept) and all(grad.dtype is dtype for grad in self.grads):
            return [list(map(column.__getitem__, positions)) for column in columns]
        return [list(map(read, positions)) for read in self.readers()]

    def store(self, rows: Iterable[int], values: Iterable[Sequence[Tensor]]) -> None:
        """Write the new values of parameters and of their slots, each before the next is asked for.

        Args:
            rows: the parameters' positions.
            values: for each of them its new value and those of its slots.
        """
        columns, numbers = self._stored(), numbers_drawn(self.rule, self.kept)
        written, is_rounded = [position for position, new in enumerate(self.rule.written) if new], self.is_rounded
        for row, new in zip(rows, values, strict=True):
            elements = self.element_numbers(row) if is_rounded else None
            for position in written:
                number = numbers[position]
                random = None if number is None or elements is None else self._random_bits(row, elements, number)
                columns[position].store(row, new[position], random)

    def _random_bits(self, row: int, elements: Tensor, number: int) -> Tensor:
        step = self.coefficients[self.row[row]].get(ROUNDING_STEP.name)
        return random_bits(self.seed, self.identities[row].number, step, elements, number)

    def element_numbers(self, row: int) -> Tensor:
        """Return the numbers of a parameter's elements to random bits.

        They count in the order of memory where all tensors of the row have the same, so that kernels pass over them as
        they are, and in C order otherwise.
        """
        param, who = self.params[row], self.identities[row]
        numbers = who.numbers(param)
        corrections = [column.arrays[1] for column in self._stored() if column.kept.correction]
        columns = (self.params, self.grads, *self.slots, *corrections)
        tensors = [column[row] for column in columns]
        in_order = any(kept.code for kept in self.formats) or who.first is None or not same_dense_layout(tensors)
        return numbers if in_order else numbers.as_strided(param.shape, param.stride())

    def by_coefficients(self) -> Iterator[tuple[list[int], Coefficients]]:
        """Yield the positions of the parameters that share coefficients, and those."""
        if len(self.coefficients) == 1:
            yield list(range(len(self.params))), self.coefficients[0]
            return
        for row, coefficients in enumerate(self.coefficients):
            yield np.flatnonzero(self.row == row).tolist(), coefficients
