"""Steps whose numbers never reach the host: scalars read, and coefficients computed, on the device.

So it is with `capturable=True`, where a graph replays the step, and with `fused=True` on an accelerator, where a
GradScaler's `found_inf` may undo it; in both cases only the device knows how many steps have been taken.
"""

from collections.abc import Sequence
from itertools import chain, product
from operator import is_, itemgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surefoot.engines.bucket import addresses
from surefoot.errors import InternalError
from surefoot.rule import Scalar, scalar_dtype
from surefoot.state import local

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer
    from surefoot.step import Work


def capturing() -> bool:
    """Whether a graph is being captured on the current device."""
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return in_use and torch.cuda.is_current_stream_capturing()


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


class DeviceScalars:
    """The scalars of some parameters, on their device: 0-d tensors in the state, read and written without waiting."""

    def __init__(
        self, states: Sequence[dict[str, Any]], scalars: Sequence[Scalar], device: torch.device, *, by_kernel: bool
    ) -> None:
        if whole := [scalar.name for scalar in scalars if scalar.integer]:
            raise RuntimeError(
                f"`{whole[0]}` is declared as an integer, which is kept on the host; steps that are captured, or "
                f"skipped by a GradScaler, need it as a tensor: declare it without `integer`"
            )
        self._device, self._shape = device, (len(scalars), len(states))
        for state, scalar in product(states, scalars):
            if not isinstance(value := state[scalar.name], Tensor) or value.device != device:
                state[scalar.name] = _as_tensor(value, device)
        self._tensors = [state[scalar.name] for scalar in scalars for state in states]
        dtypes = {tensor.dtype for tensor in self._tensors}
        self._scattered = None
        if by_kernel and len(dtypes) == 1 and dtypes <= {*_NUMBERS}:
            from surefoot.engines.gpu.scalars import Scattered  # noqa: PLC0415 (Triton, on first use)

            self._scattered = Scattered(self._tensors)

    def read(self) -> Tensor:
        """Give the scalars: float64 of shape (scalars, parameters)."""
        if not self._tensors:
            return torch.empty(self._shape, dtype=torch.float64, device=self._device)
        values = self._scattered.read() if self._scattered else torch.stack(self._tensors).double()
        return values.view(self._shape)

    def write(self, new: Sequence[Any], found_inf: Tensor | None) -> None:
        """Set the scalars, unless `found_inf` is there and not zero; `new` has for each its values or their value."""
        if not self._tensors:
            return
        values = torch.cat([self._row(value) for value in new])
        if self._scattered:
            self._scattered.write(values, found_inf)
        elif found_inf is None:
            torch._foreach_copy_(self._tensors, list(values))
        else:
            kept = torch.where(found_inf != 0, torch.stack(self._tensors).double(), values)
            torch._foreach_copy_(self._tensors, list(kept))

    def _row(self, value: Any) -> Tensor:
        count = self._shape[1]
        if isinstance(value, Tensor):
            return value.double().expand(count)
        return torch.full((count,), value, dtype=torch.float64, device=self._device)


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    return value.to(device) if isinstance(value, Tensor) else torch.full((), value, device=device)


# Hyperparameters


def numbers_on(device: torch.device, h: SimpleNamespace) -> SimpleNamespace:
    """Give hyperparameters for arithmetic on a device; see `number_on`."""
    return SimpleNamespace(**{name: number_on(device, value) for name, value in vars(h).items()})


def number_on(device: torch.device, value: Any) -> Any:
    """Give a hyperparameter, or a tuple of them, for arithmetic on a device: tensors there, and in float64."""
    if isinstance(value, tuple):
        return tuple(number_on(device, item) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.is_cpu and device.type != "cpu":
        return value.item()  # as a constant: what is on the host cannot be read by a replay
    return value.detach().to(device, torch.float64, non_blocking=True)


class Metadata:
    """The types, dtypes, sizes and strides of gradients, to compare others with."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._guards = _guards(tensors)
        self._facts = _facts(tensors) if self._guards is None else []

    def same(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are alike, one by one."""
        if self._guards is not None:
            return bool(self._guards.check(*tensors))
        return self._facts == _facts(tensors)


def _facts(tensors: Sequence[Tensor | None]) -> list[object]:
    return [
        t
        if t is None
        else (
            type(t),
            t.layout,
            t.dtype,
            t.shape,
            t.layout is torch.strided and t.stride(),
            t.is_neg(),
            t.is_conj(),
            t._is_zerotensor(),
        )
        for t in tensors
    ]


def _guards(tensors: Sequence[Tensor]) -> Any:
    """Make torch's own comparison of many tensors in one call, in releases in which it is known to be safe."""
    if not torch.__version__.startswith(_GUARDED_RELEASES) or any(t.layout is not torch.strided for t in tensors):
        return None
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    guards: Any = torch._C._dynamo.guards
    return guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


class Watch:
    """Watches the tensors of a bucket on a device, and reads and writes its scalars where the host has them."""

    def __init__(self, work: "Work") -> None:
        names = [scalar.name for scalar in work.optimizer.scalars]
        self._scalars = None if work.on_device else _HostScalars(work.states, names)
        names += [slot.name for slot in work.bucket.rule.slots]
        self._entries = [(itemgetter(name), [state[name] for state in work.states]) for name in names]
        self._state = list(chain.from_iterable(tensors for _, tensors in self._entries))
        # Parameters are looked at from outside: a reference held here would keep them from being swapped.
        watched = (work.params, work.grads(), self._state)
        self.sound = True
        self._facts = [Metadata(tensors) if tensors else None for tensors in watched]
        self._pointers = [addresses(work.params), addresses(self._state)]

    def renew(self, work: "Work") -> bool:
        """Give the bucket this step's gradients; tell whether all else is as it was."""
        grads = work.grads()
        watched = (work.params, grads, self._state)
        if not all(facts is None or facts.same(now) for facts, now in zip(self._facts, watched, strict=True)):
            return False
        pointers = (addresses(work.params), addresses(self._state))
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
        """Read the scalars of the host: float64 of shape (scalars, parameters)."""
        return self._host().read()

    def write(self, values: np.ndarray) -> None:
        """Write the scalars of the host."""
        self._host().write(values)

    def _host(self) -> "_HostScalars":
        if self._scalars is None:
            raise InternalError("scalars on a device are not read on the host")
        return self._scalars


class _HostScalars:
    """Scalars on the host, each a 0-d tensor of its own, seen through NumPy: that is quick and needs no compiler."""

    def __init__(self, states: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
        for state, name in product(states, names):
            if not isinstance(value := state[name], Tensor) or not value.is_cpu or value.dtype not in _NUMBERS:
                state[name] = torch.as_tensor(value, dtype=scalar_dtype(), device="cpu")
        self._tensors = [state[name] for name in names for state in states]
        self._arrays = [tensor.numpy() for tensor in self._tensors]
        self._shape = (len(names), len(states))

    def read(self) -> np.ndarray:
        return np.fromiter(map(np.ndarray.item, self._arrays), np.float64, len(self._arrays)).reshape(self._shape)

    def write(self, values: np.ndarray) -> None:
        for array, value in zip(self._arrays, values.ravel().tolist(), strict=True):
            array.fill(value)
        torch.autograd.graph.increment_version(self._tensors)


_GUARDED_RELEASES = ("2.13.",)
_NUMBERS = (torch.float32, torch.float64)
