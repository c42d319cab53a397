"""Gradients measured before the update, and what follows from that: clip, skip, raise."""

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from surefoot.engines.bucket import reduce
from surefoot.errors import NonFiniteGradientError
from surefoot.rule import gradient_rule
from surefoot.state.check import format_param
from surefoot.step.inputs import StepInput
from surefoot.step.options import ReleaseOptions
from surefoot.step.ranks import RankSums, exchange_of, sums_over_ranks
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
    name, nonfinite = "nonfinite", step.stepping.options.nonfinite
    if step.released is not None:
        name, nonfinite = "nonfinite_params", step.released.nonfinite_params
    for group in step.groups:
        if meta := [param for param in group["params"] if param.is_meta and step.gradient(param) is not None]:
            raise RuntimeError(
                f"{format_param(group, meta[0])} is on meta, where gradients cannot be measured; leave out "
                f"`max_grad_norm` and `nonfinite`, or what release_gradients was asked for in their place"
            )
        if nonfinite != "ignore" and group.get("capturable"):
            raise RuntimeError(
                f"{name}={nonfinite!r} looks at gradients on the host, which a step with capturable=True must not; "
                f"leave one of them out"
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
    if step.released is not None:
        return _clip_or_leave_out(step, step.released, slices)
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
    scale = _scale(step)
    clips = {id(e.group): _factor(own, [e], scale) for e in measured if (own := step.own_norm(e.group))}
    others = [each for each in measured if id(each.group) not in clips]
    if options.max_grad_norm and others:
        clips |= dict.fromkeys((id(e.group) for e in others), _factor(options.max_grad_norm, others, scale))
    for part in slices:
        part.clip = clips.get(id(part.group), 1.0)
    return True


# Gradients that are never there all at once

PREVIOUS_NORM = "previous_grad_norm"
"""Key of the groups under which the norm of the last step's gradients stands, where the next is clipped by it."""


def _clip_or_leave_out(step: StepInput, options: ReleaseOptions, slices: Sequence[ParamSlice]) -> bool:
    """Decide how gradients of some of the parameters are clipped, or which of these are left out of the step.

    Returns:
        Whether the step is to be made, with all of them.

    Raises:
        NonFiniteGradientError: see `clip_or_skip`.
    """
    if options.nonfinite_params != "ignore" and (nonfinite := _nonfinite_params(slices)):
        if options.nonfinite_params == "raise":
            _raise_nonfinite(step, nonfinite)
        step.stepping.context.left_out = nonfinite
        return False
    previous = step.groups[0].get(PREVIOUS_NORM)
    clip: Any = 1.0
    if options.max_previous_grad_norm is not None and previous is not None:
        clip = _clip_coefficient(options.max_previous_grad_norm, previous)
    for part in slices:
        part.clip = clip
        if options.max_param_grad_norm is not None and part.gradients is not None:
            norms = part.gradients[:, 0].sqrt() / _scale(step)
            own = (options.max_param_grad_norm / (norms + _TINY)).clamp(max=1.0)
            part.clip = own * (clip.to(own.device) if isinstance(clip, Tensor) else clip)
    return True


def _nonfinite_params(slices: Sequence[ParamSlice]) -> list[Tensor]:
    """Return the parameters whose gradients hold inf or NaN."""
    return [
        param
        for part in slices
        if part.gradients is not None and not has_no_values(part.gradients)
        for param, suspect in zip(part.params, part.gradients[:, 1].tolist(), strict=True)
        if not math.isfinite(suspect)
    ]


def _raise_nonfinite(step: StepInput, params: Sequence[Tensor]) -> NoReturn:
    names = step.names()
    raise NonFiniteGradientError(
        f"the gradients of {listed([names[param] for param in params])} hold inf or NaN; these parameters were not "
        f"changed, those whose gradients came before were. Load the last checkpoint, or drop the gradients "
        f"(model.zero_grad()) and close the iteration with step(); nonfinite_params='skip' leaves such parameters out"
    )


def keep_norm(step: StepInput, slices: Sequence[ParamSlice]) -> None:
    """Keep the norm of a step's gradients in the groups, for the next one to be clipped by.

    One that is inf or NaN, and that of a step without gradients, leave the one before in its place.

    Args:
        step: the step.
        slices: all its parameters, their gradients measured.
    """
    measured, exchange = [part for part in slices if part.gradients is not None], exchange_of(step)
    if exchange is not None:
        sums = sums_over_ranks(step, exchange, measured)
        total = sums.rows[:, 0].sum() + sums.divided[:, 0].sum()
    elif measured:
        # In the order of the groups, so that the sum does not depend on how parameters were stepped together.
        rank = {param: number for number, param in enumerate(p for group in step.groups for p in group["params"])}
        order = torch.tensor([rank[param] for part in measured for param in part.params]).argsort()
        squares = [part.gradients[:, 0] for part in measured if part.gradients is not None]
        every = torch.cat([each.to(squares[0].device) for each in squares])
        total = every[order.to(every.device)].sum()
    else:
        return
    norm = total.sqrt() / _scale(step)
    if has_no_values(norm):
        return
    if norm.is_cpu:
        new: Any = norm.item() if norm.isfinite() else None
    else:
        before = step.groups[0].get(PREVIOUS_NORM)
        new = norm if before is None else torch.where(norm.isfinite(), norm, torch.as_tensor(before).to(norm))
    for group in () if new is None else step.groups:
        group[PREVIOUS_NORM] = new


def forget_norm(groups: Iterable[dict[str, Any]]) -> None:
    """Let the next step be clipped by no norm."""
    for group in groups:
        group.pop(PREVIOUS_NORM, None)


def _scale(step: StepInput) -> Any:
    return 1.0 if step.grad_scale is None else step.grad_scale


def _clip_coefficient(limit: Any, norm: Any) -> Any:
    """Return the factor that brings a norm to at most `limit`, NaN for a norm of NaN.

    It is a number where the host has both, and stays on the device otherwise.
    """
    limit, norm = _on_host(limit), _on_host(norm)
    factor = limit / ((norm.double() if isinstance(norm, Tensor) else norm) + _TINY)
    if isinstance(factor, Tensor):
        return factor.clamp(max=1.0)
    return min(factor, 1.0)


def _on_host(number: Any) -> Any:
    """Return a number that may stand in a tensor, as that only where the host does not have it."""
    is_read = isinstance(number, Tensor) and number.is_cpu and not has_no_values(number)
    return number.item() if is_read else number


_TINY = 1e-6


# Gradients that are there all at once


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
    """Return what gradients are multiplied with so that their norm is at most `limit`."""
    squares = [each for one in measured for each in one.squares]
    if all(each.is_cpu for each in squares) and not any(map(has_no_values, squares)):
        return _clip_coefficient(limit, math.sqrt(_sum(squares)) / _on_host(scale))
    return _clip_coefficient(limit, torch.cat([each.to(squares[0].device) for each in squares]).sum().sqrt() / scale)


def _sum(squares: Iterable[Tensor]) -> float:
    """Return the sum of numbers of the host, rounded once, so that their order does not matter."""
    try:
        return math.fsum(chain.from_iterable(each.tolist() for each in squares))
    except OverflowError:
        return math.inf


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


def warn_left_out(step: StepInput, params: Sequence[Tensor]) -> None:
    """Count parameters that are left out of a step, and warn of the first ones."""
    statistics = step.stepping.statistics
    if not statistics.skipped_params:
        names = step.names()
        warnings.warn(
            f"a step leaves out {listed([names[param] for param in params])}, whose gradients hold inf or NaN "
            f"(nonfinite_params='skip'); step_statistics.skipped_params counts what is left out from now on",
            RuntimeWarning,
            stacklevel=_callers_level(),
        )
    statistics.skipped_params += len(params)


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
