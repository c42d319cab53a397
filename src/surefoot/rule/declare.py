"""What an optimizer declares: the state it keeps for each parameter, and how sparse gradients are met."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from surefoot.storage import BLOCK
from surefoot.tensors.shards import full_for, has_whole_blocks, is_sharded


def sample(tensor: Tensor, every: int) -> Tensor:
    """Return every n-th element of a flattened tensor."""
    return tensor.flatten()[::every]


def one_number(param: Tensor, group: Mapping[str, Any]) -> torch.Size:  # noqa: ARG001 (of every parameter)
    """Return the shape of a slot that is one number for each parameter, whatever the parameter's shape."""
    return torch.Size()


@dataclass(frozen=True)
class Slot:
    """A tensor of state that belongs to one parameter and, unless `shape` says otherwise, looks like it.

    Attributes:
        name: its key in `optimizer.state[param]`.
        when: the flag that must be true for the slot to exist; always, if None.
        init: the initial value of every element: a number, or the name of a hyperparameter.  A complex
            slot starts with it as real and as imaginary part, as in torch.
        shape: shape of the slot for a parameter of a group, None where this parameter does not have the slot;
            the parameter's own shape by default.  Of a rule's slots only `one_number` has another.
        copies_param: whether it starts as a copy of the parameter, and in its dtype, whatever `state_dtype` says.
        wide: whether it is kept in at least float32, whatever the parameter's dtype.
        signed: whether its values may be negative.
        slow: whether a step may change it by less than half the distance of two 16-bit numbers, as a moving average of
            squares: such slots are rounded stochastically in 16 bits, or they would stand still.
        float8: whether an algorithm works with it in 8 bits; or the name of a flag that must be off for that.
        flat_elsewhere: whether other implementations keep it flattened, and where all elements are zero as one number.
        begun: whether only a parameter's first step can begin it: then it is refused that it is missing later.
        sampled: the hyperparameter n of which it is kept for every n-th element of the flattened parameter only, as a
            vector; None for all elements.  What follows from such slots is themselves, and sums.
    """

    name: str
    when: str | None = None
    init: float | str = 0.0
    shape: Callable[[Tensor, Mapping[str, Any]], torch.Size | None] | None = None
    copies_param: bool = False
    wide: bool = False
    signed: bool = True
    slow: bool = False
    float8: bool | str = True
    flat_elsewhere: bool = False
    begun: bool = False
    sampled: str | None = None

    @property
    def is_number(self) -> bool:
        """Whether it is one number for each parameter, which a rule makes from reductions."""
        return self.shape is one_number

    def shape_for(self, param: Tensor, group: Mapping[str, Any]) -> torch.Size | None:
        """Return the shape of this slot for a parameter of a group."""
        if self.is_sampled(group):
            return torch.Size((-(-param.numel() // group[str(self.sampled)]),))
        return param.shape if self.shape is None else self.shape(param, group)

    def is_sampled(self, group: Mapping[str, Any]) -> bool:
        """Return whether it is kept for some elements only."""
        return self.sampled is not None and group.get(self.sampled, 1) > 1

    def is_complex_for(self, param: Tensor) -> bool:
        """Return whether this slot for `param` is complex; reductions of complex values are real."""
        return param.is_complex() and not self.is_number

    def takes_float8(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Return whether the slot of a parameter is made in 8 bits where the group asks for that.

        It is not where the algorithm could not work with it; where there is little to save, in tensors of at most 4096
        elements, which are norms and biases, sensitive to rounding; and where the ranks that share a parameter would
        cut through blocks.
        """
        if isinstance(self.float8, str) and group.get(self.float8):
            return False
        own = self.wide or self.copies_param
        whole = self.float8 and not own and self.shape is None and not param.is_complex()
        return bool(whole) and param.numel() > SMALL and (not is_sharded(param) or has_whole_blocks(param, BLOCK))

    def dtype_for(self, param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
        """Return the dtype in which a new slot of a parameter is kept if it is a plain tensor."""
        if self.copies_param:
            return param.dtype
        asked: Any = group.get("state_dtype")
        dtype: torch.dtype = torch.float32 if asked == FLOAT8 else asked or param.dtype
        wide = self.wide or self.is_sampled(group)  # there is little to save
        dtype = torch.promote_types(dtype, torch.float32) if wide else dtype
        if self.is_number:
            return dtype.to_real()
        return dtype.to_complex() if self.is_complex_for(param) and not dtype.is_complex else dtype

    def new(self, param: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Make the slot for `param`, on its device and in its memory format, as a plain tensor.

        Its dtype is the parameter's, or the group's `state_dtype`; float32 where that is `"float8"`.
        """
        if self.copies_param:
            source = param if group.get("differentiable") else param.detach()
            if self.is_sampled(group):
                return sample(source, group[str(self.sampled)]).clone(memory_format=torch.contiguous_format)
            return source.resolve_conj().resolve_neg().clone(memory_format=torch.preserve_format)
        start = float(_start(self.init, group))
        dtype = self.dtype_for(param, group)
        value = complex(start, start) if dtype.is_complex else start
        if self.shape is None and not self.is_sampled(group):
            made = torch.full_like(param, value, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
            return made if (carried := _carrying_gradients(self.init, group)) is None else made.zero_() + carried
        shape = self.shape_for(param, group) or torch.Size()
        if is_sharded(param):
            divided: Tensor = full_for(shape, param, value, dtype)
            return divided
        return param.new_full(shape, value, dtype=dtype, requires_grad=False)


@dataclass(frozen=True)
class Scalar:
    """A number of state that belongs to one parameter: a 0-d tensor in `optimizer.state[param]`.

    Attributes:
        name: its key.
        init: its initial value: a number, the name of a hyperparameter, or a function of the group.  What a function
            gives is also what state without this scalar means: such state can be loaded.
        integer: kept as a Python int rather than as a tensor.
        when: the flag that must be true for the scalar to exist; always, if None.
    """

    name: str
    init: float | str | Callable[[Mapping[str, Any]], float] = 0.0
    integer: bool = False
    when: str | None = None

    def new(self, group: Mapping[str, Any], device: torch.device) -> Tensor | int:
        """Make the scalar with its initial value."""
        start = float(self.init(group) if callable(self.init) else _start(self.init, group))
        made = self.stored(start, device, torch.float32 if group.get("fused") else scalar_dtype())
        carried = None if callable(self.init) else _carrying_gradients(self.init, group)
        return made if carried is None or isinstance(made, int) else carried.to(made, copy=True).reshape(())

    def stored(self, value: float, device: torch.device, dtype: torch.dtype) -> Tensor | int:
        """Put `value` in the form in which the state holds it."""
        return int(value) if self.integer else torch.full((), value, dtype=dtype, device=device)


@dataclass(frozen=True)
class GroupScalar:
    """A number of state that all parameters share: it stands in every param group, beside the hyperparameters.

    `coefficients` and `update` read it as they read those.  `update` returns its new value after those of the slots; it
    follows from sums over parameters, `total_sum` and `group_sum`, and not from what one of them has.  On a CPU it is
    one of Python's numbers, elsewhere a 0-d tensor on the parameters' device; one that is a tensor is updated in place.

    Attributes:
        name: its key in a param group.
        init: its initial value: a number, or the name of a hyperparameter.
        integer: kept as a Python int where it is one of Python's numbers.
        split: the hyperparameter that, when true, gives each group a number of its own; else, or if None, all groups
            share one, which is that of the first group if somebody has made them differ.
    """

    name: str
    init: float | str = 0.0
    integer: bool = False
    split: str | None = None

    def new(self, group: Mapping[str, Any]) -> Any:
        """Return the number with which a group begins."""
        return group[self.init] if isinstance(self.init, str) else self.stored(self.init)

    def stored(self, value: float) -> float | int:
        """Put `value` in the form of Python's in which a group holds it."""
        return int(value) if self.integer else float(value)

    def is_split(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether each of these groups has a number of its own."""
        return self.split is not None and bool(groups[0].get(self.split))


def _start(init: float | str, group: Mapping[str, Any]) -> Any:
    """Return what state starts from: a number, or the hyperparameter of a name."""
    return group[init] if isinstance(init, str) else init


def _carrying_gradients(init: float | str, group: Mapping[str, Any]) -> Tensor | None:
    """Return the hyperparameter that state starts from if gradients are to flow through it, else None."""
    start = group[init] if isinstance(init, str) and group.get("differentiable") else None
    return start if isinstance(start, Tensor) and start.requires_grad else None


@dataclass(frozen=True)
class Reduction:
    """A number for each parameter that an update gives beside its tensors.

    Attributes:
        of: what is measured, for messages.
        kind: `"sum"`, `"sum_of_squares"`, `"largest"`, which is the greatest absolute value and NaN where there is one,
            or `"nonfinite"`, which is the count of inf and NaN.
        precise: whether it is summed in float64 rather than in the dtype of the arithmetic.
    """

    of: str
    kind: str
    precise: bool = False


STEP = Scalar("step")
ROUNDING_STEP = Scalar("rounding_step", when="rounded")
"""Counts the steps of algorithms that do not count them, where values are rounded stochastically."""
FLOAT8 = "float8"
"""The `state_dtype` of floats of 8 bits."""
SMALL = 4096
"""Elements of a tensor up to which its state is not kept in 8 bits."""
EMA = Slot("ema", when="ema", wide=True)
"""The exponential moving average of a parameter, which every optimizer keeps in its pass where `ema=` asks for it."""


class Sparse(Enum):
    """What an optimizer does with sparse (COO) gradients."""

    REFUSED = "refused"
    ROWS = "updates the rows that are present"
    ONLY = "takes no other"


def scalar_dtype() -> torch.dtype:
    """Dtype of new scalar state: float32, or float64 where that is torch's default dtype."""
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32


def narrow(value: Any) -> Any:
    """Round a Python number as scalar state would (see `scalar_dtype`); tensors pass unchanged."""
    if isinstance(value, Tensor) or scalar_dtype() is torch.float64:
        return value
    return ctypes.c_float(value).value  # a tensor would take fifty times as long
