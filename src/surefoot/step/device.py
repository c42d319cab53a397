"""Steps whose numbers never reach the host: scalars read, and coefficients computed, on the device.

So it is with `capturable=True`, where a graph replays the step, and with `fused=True` on an accelerator, where a
GradScaler's `found_inf` may undo it; in both cases only the device knows how many steps have been taken.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surefoot.rule import Scalar

_cuda_is_initialized: Callable[[], bool] = torch.cuda.is_initialized


def capturing() -> bool:
    """Return whether a graph is being captured on the current device."""
    return _cuda_is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(name: str, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise when a step that reads numbers on the host would be captured in a graph.

    Raises:
        RuntimeError: a group's `capturable` is not set.
    """
    if capturing() and not all(group.get("capturable") for group in groups):
        raise RuntimeError(
            f"Attempting CUDA graph capture of step() for an instance of {name} but param_groups' "
            f"capturable is False. Set capturable=True before the steps that warm up"
        )


def refuse_new_buckets(name: str) -> None:
    """Raise when a step would be captured that makes state or tables: each replay would make them anew.

    Raises:
        RuntimeError: a graph is being captured.
    """
    if capturing():
        raise RuntimeError(
            f"the step of {name} that is captured in a graph must be like the one before it; take "
            f"a step outside of the capture first, with the same parameters and gradients of the same layout"
        )


class DeviceScalars:
    """The scalars of some parameters, on their device: 0-d tensors in the state, read and written without waiting.

    Attributes:
        fresh: whether slots are newly initialized, and whether averages are, until a step is made: for each False, or
            bool of shape (parameters,).
    """

    def __init__(
        self,
        states: Sequence[dict[str, Any]],
        scalars: Sequence[Scalar],
        device: torch.device,
        fresh: Sequence[tuple[bool, bool]],
        *,
        by_kernel: bool,
    ) -> None:
        if whole := [scalar.name for scalar in scalars if scalar.integer]:
            raise RuntimeError(
                f"`{whole[0]}` is declared as an integer, which is kept on the host; steps that are captured, or "
                f"skipped by a GradScaler, need it as a tensor: declare it without `integer`"
            )
        self._device, self._shape = device, (len(scalars), len(states))
        slots, averages = (_flags_on(device, [each[i] for each in fresh]) for i in (0, 1))
        self.fresh: tuple[Any, Any] = slots, averages
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
        """Return the scalars: float64 of shape (scalars, parameters)."""
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

    def settle_fresh(self, found_inf: Tensor | None) -> None:
        """Let what is newly initialized be so no longer, unless the device has found infinities."""
        if found_inf is None:
            self.fresh = False, False
            return
        for flags in self.fresh:
            if isinstance(flags, Tensor):
                flags.logical_and_(found_inf != 0)

    def _row(self, value: Any) -> Tensor:
        count = self._shape[1]
        if isinstance(value, Tensor):
            return value.double().expand(count)
        return torch.full((count,), value, dtype=torch.float64, device=self._device)


def _flags_on(device: torch.device, flags: list[bool]) -> Tensor | bool:
    """Put flags on a device; what all of them share is not copied, which would wait."""
    if len(set(flags)) == 1:
        return flags[0] and torch.full((len(flags),), True, device=device)
    return torch.tensor(flags, device=device) if flags else False


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    return value.to(device) if isinstance(value, Tensor) else torch.full((), value, device=device)


# Hyperparameters


def numbers_on(device: torch.device, h: SimpleNamespace) -> SimpleNamespace:
    """Return hyperparameters for arithmetic on a device; see `number_on`."""
    return SimpleNamespace(**{name: number_on(device, value) for name, value in vars(h).items()})


def number_on(device: torch.device, value: Any) -> Any:
    """Return a hyperparameter, or a tuple of them, for arithmetic on a device: tensors there, and in float64."""
    if isinstance(value, tuple):
        return tuple(number_on(device, item) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.is_cpu and device.type != "cpu":
        return value.item()  # as a constant: what is on the host cannot be read by a replay
    return value.detach().to(device, torch.float64, non_blocking=True)


_NUMBERS = (torch.float32, torch.float64)
