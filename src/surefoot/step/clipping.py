"""Gradients measured before the update, and what follows from that: clip, skip, raise."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from surefoot.engines.bucket import reduce
from surefoot.errors import NonFiniteGradientError
from surefoot.rule import gradient_rule
from surefoot.state.check import format_param
from surefoot.step.inputs import StepInput
from surefoot.step.types import ParamSlice
from surefoot.tensors.shards import is_sharded, over_all_shards

_SHOWN, _MANY = 5, 16


def measure_gradients(params: Sequence[Tensor]) -> Tensor:
    """Return what is measured of gradients, of sharded ones of all shards: float64 of shape (parameters, 2)."""
    return torch.stack([_measured(param.grad) for param in params])


def _measured(grad: Any) -> Tensor:
    if is_sharded(grad):
        norm = over_all_shards(torch.linalg.vector_norm(grad, dtype=torch.float64))
        return torch.stack([norm.square(), over_all_shards(grad.abs().max())])
    values = gradient_values(grad)
    return reduce(gradient_rule().reductions, (values, values))


def gradient_values(grad: Any) -> Any:
    """Return the real numbers of a gradient."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def clip_or_skip(step: StepInput, slices: Sequence[ParamSlice]) -> bool:
    """Decide from what was measured of the gradients how they are clipped; return whether the step is to be made.

    Raises:
        NonFiniteGradientError: a gradient holds inf or NaN and `nonfinite="raise"`; it names the parameters.
        RuntimeError: gradients are to be looked at in a step with `capturable=True`.
    """
    options = step.stepping.options
    if meta := [part for part in slices if part.gradients is not None and part.gradients.is_meta]:
        raise RuntimeError(
            f"{format_param(meta[0].group, meta[0].params[0])} is on meta, where gradients cannot be measured; leave "
            f"out `max_grad_norm` and `nonfinite`"
        )
    if options.nonfinite != "ignore" and any(group.get("capturable") for group in step.groups):
        raise RuntimeError(
            f"nonfinite={options.nonfinite!r} looks at gradients on the host, which a step with capturable=True must "
            f"not; leave one of them out"
        )
    if options.nonfinite != "ignore" and (nonfinite := list(_nonfinite(step, slices))):
        if options.nonfinite == "raise":
            raise NonFiniteGradientError(
                f"the gradients of {listed(nonfinite)} hold inf or NaN; nothing was changed. Look at the loss and the "
                f'learning rate, or pass nonfinite="skip" to leave such steps out'
            )
        step.skip()
        _warn(step, nonfinite)
        return False
    scale = 1.0 if step.grad_scale is None else step.grad_scale
    own = [part for part in slices if part.group.get("max_grad_norm")]
    for part in own:
        same_group = [other for other in own if other.group is part.group]
        part.clip = _factor(part.group["max_grad_norm"], same_group, scale)
    others = [part for part in slices if part not in own]
    if options.max_grad_norm and others:
        clip = _factor(options.max_grad_norm, others, scale)
        for part in others:
            part.clip = clip
    return True


def _factor(limit: float, slices: Sequence[ParamSlice], scale: Any) -> Any:
    """Return what gradients are multiplied with so that their norm is at most `limit`; NaN where the norm is NaN.

    It is a number where the norm is on the host, and stays on the device otherwise.
    """
    squares = [part.gradients[:, 0] for part in slices if part.gradients is not None]
    norm = torch.cat([each.to(squares[0].device) for each in squares]).sum().sqrt() / scale
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    return factor.item() if factor.is_cpu else factor


def _nonfinite(step: StepInput, slices: Sequence[ParamSlice]) -> Iterator[str]:
    """Yield the names of parameters whose gradients hold inf or NaN."""
    names = step.names()
    for part in slices:
        if part.gradients is not None:
            for index in (~part.gradients[:, 1].isfinite()).nonzero().flatten().tolist():
                yield names[part.params[index]]


def listed(names: Sequence[str]) -> str:
    """Return the names of parameters for a message, the first few if there are many."""
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more parameters"


def _warn(step: StepInput, nonfinite: Sequence[str]) -> None:
    """Warn of the first skipped step, and again, each time they have doubled, while most steps are skipped."""
    skipped, steps = step.stepping.statistics.skipped, step.stepping.statistics.steps
    most = skipped >= _MANY and skipped & (skipped - 1) == 0 and 2 * skipped > steps
    if skipped == 1 or most:
        warnings.warn(
            f"step {steps} was skipped since the gradients of {listed(nonfinite)} hold inf or NaN; {skipped} of "
            f"{steps} steps were skipped so far",
            RuntimeWarning,
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """Return the `stacklevel` of the code that called `step`, outside torch and surefoot."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("surefoot", "torch"):
        frame, level = frame.f_back, level + 1
    return level
