"""Gradients measured before the update, and what follows from that: clip, skip, raise."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.engines.bucket import reduce
from surefoot.errors import NonFiniteGradientError
from surefoot.rule import gradient_rule
from surefoot.state.check import format_param
from surefoot.step.inputs import StepInput
from surefoot.step.ranks import RankSums
from surefoot.step.types import ParamSlice
from surefoot.tensors.modes import has_no_values
from surefoot.tensors.shards import to_local

_SHOWN, _MANY = 5, 16


def measure_gradients(grads: Sequence[Tensor]) -> Tensor:
    """Return what is measured of gradients, or of this process's shards of them: float64 of shape (gradients, 2)."""
    reductions = gradient_rule().reductions
    return torch.stack([reduce(reductions, (gradient_values(grad),) * len(reductions)) for grad in grads])


def gradient_values(grad: Any) -> Any:
    """Return the real numbers of a gradient, or of this process's shard of it."""
    values = to_local((grad.coalesce().values() if grad.is_sparse else grad).resolve_conj())
    return torch.view_as_real(values) if values.is_complex() else values


def refuse_unmeasurable(step: StepInput) -> None:
    """Refuse a step whose gradients are asked for and cannot be measured.

    Raises:
        RuntimeError: a parameter is on meta, or gradients are to be looked at in a step with `capturable=True`.
    """
    options = step.stepping.options
    for group in step.groups:
        if meta := [param for param in group["params"] if param.is_meta and step.gradient(param) is not None]:
            raise RuntimeError(
                f"{format_param(group, meta[0])} is on meta, where gradients cannot be measured; leave out "
                f"`max_grad_norm` and `nonfinite`"
            )
        if options.nonfinite != "ignore" and group.get("capturable"):
            raise RuntimeError(
                f"nonfinite={options.nonfinite!r} looks at gradients on the host, which a step with capturable=True "
                f"must not; leave one of them out"
            )


def clip_or_skip(step: StepInput, slices: Sequence[ParamSlice], sums: RankSums | None = None) -> bool:
    """Decide from what was measured of the gradients how they are clipped; return whether the step is to be made.

    Args:
        step: the step.
        slices: its parameters, their gradients measured.
        sums: what all ranks know together, where parameters are divided over ranks.

    Raises:
        NonFiniteGradientError: a gradient holds inf or NaN and `nonfinite="raise"`; it names the parameters.
    """
    options, measured = step.stepping.options, _by_group(step, slices, sums)
    if options.nonfinite != "ignore" and (nonfinite := list(_nonfinite(step, measured))):
        if options.nonfinite == "raise":
            raise NonFiniteGradientError(
                f"the gradients of {listed(nonfinite)} hold inf or NaN; nothing was changed. Look at the loss and the "
                f'learning rate, or pass nonfinite="skip" to leave such steps out'
            )
        step.skip()
        _warn(step, nonfinite)
        return False
    scale = 1.0 if step.grad_scale is None else step.grad_scale
    clips = {id(e.group): _factor(own, [e], scale) for e in measured if (own := step.own_norm(e.group))}
    others = [each for each in measured if id(each.group) not in clips]
    if options.max_grad_norm and others:
        clips |= dict.fromkeys((id(e.group) for e in others), _factor(options.max_grad_norm, others, scale))
    for part in slices:
        part.clip = clips.get(id(part.group), 1.0)
    return True


class _Measured(NamedTuple):
    """What was measured of the gradients of a group.

    Attributes:
        group: the group.
        squares: their sums of squares, in one or several tensors of float64.
        suspects: as many tensors, finite where gradients are.
        params: as many lists of the parameters; None for those that other ranks have.
    """

    group: dict[str, Any]
    squares: list[Tensor]
    suspects: list[Tensor]
    params: list[Sequence[Tensor | None]]


def _by_group(step: StepInput, slices: Sequence[ParamSlice], sums: RankSums | None) -> list[_Measured]:
    """Return what was measured, group by group; groups of which nothing was are left out."""
    found = {id(group): _Measured(group, [], [], []) for group in step.groups}
    if sums is None:
        for part in slices:
            if part.gradients is not None:
                _add(found[id(part.group)], part.gradients[:, 0], part.gradients[:, 1], part.params)
    else:
        first = 0
        for group, divided in zip(step.groups, sums.divided, strict=True):
            rows = sums.rows[first : first + len(group["params"])]
            first += len(group["params"])
            for known, params in ((rows, group["params"]), (divided[None], [None])):
                _add(found[id(group)], known[:, 0], torch.where(known[:, 1] > 0, torch.nan, 0.0), params)
    return [each for each in found.values() if each.squares]


def _add(measured: _Measured, squares: Tensor, suspects: Tensor, params: Sequence[Tensor | None]) -> None:
    measured.squares.append(squares)
    measured.suspects.append(suspects)
    measured.params.append(params)


def _factor(limit: float, measured: Sequence[_Measured], scale: Any) -> Any:
    """Return what gradients are multiplied with so that their norm is at most `limit`; NaN where the norm is NaN.

    It is a number where the norm is on the host, and stays on the device otherwise.
    """
    squares = [each for one in measured for each in one.squares]
    norm = torch.cat([each.to(squares[0].device) for each in squares]).sum().sqrt() / scale
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    return factor.item() if factor.is_cpu and not has_no_values(factor) else factor


def _nonfinite(step: StepInput, measured: Sequence[_Measured]) -> Iterator[str]:
    """Yield the names of parameters whose gradients hold inf or NaN."""
    names = step.names()
    for each in measured:
        for suspects, params in zip(each.suspects, each.params, strict=True):
            if has_no_values(suspects):
                continue
            for index in (~suspects.isfinite()).nonzero().flatten().tolist():
                param = params[index]
                yield "parameters of the process group" if param is None else names[param]


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
