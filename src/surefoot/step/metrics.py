"""What telemetry is to get of a step, put together from what was measured while it was made."""

import math
import weakref
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.engines.bucket import reduce
from surefoot.rule import TELEMETRY
from surefoot.step.clipping import gradient_values, measure_gradients
from surefoot.step.inputs import StepInput
from surefoot.step.ranks import metrics_over_ranks
from surefoot.step.types import ParamSlice
from surefoot.tensors.modes import has_no_values
from surefoot.tensors.shards import match_layout, to_local


def step_metrics(step: StepInput) -> Any:
    """Return what telemetry is to get of this step."""
    from surefoot.telemetry import RawStep  # noqa: PLC0415 (on first use)

    context, slices = step.stepping.context, step.slices
    measured = _metric_names(step, slices)
    blocks = metrics_over_ranks(step, slices, [measured_sums(step, part) for part in slices])
    blocks = blocks or [torch.zeros(0, 5, dtype=torch.float64)]
    sums = blocks[0] if len(blocks) == 1 else torch.cat([block.to(blocks[0].device) for block in blocks])
    return RawStep(
        step=context.step,
        names=measured.names,
        sums=sums if measured.chosen is None else sums[measured.chosen],
        lrs=_rates(slices, measured.chosen),
        clip=_least([part.clip for part in slices]),
        skipped=step.stepping.statistics.skipped,
        seconds=perf_counter() - context.start,
    )


def _rates(slices: Sequence[ParamSlice], chosen: Tensor | None) -> tuple[float, ...]:
    """Return the learning rates of those who are measured; one if all slices share it."""
    rates = [float(part.group.get("lr", math.nan)) for part in slices]
    if len(set(rates)) <= 1:
        return tuple(rates[:1]) or (math.nan,)
    each = [rate for rate, part in zip(rates, slices, strict=True) for _ in part.params]
    return tuple(each) if chosen is None else tuple(each[index] for index in chosen.tolist())


class MetricNames(NamedTuple):
    """Who is measured of the parameters of some slices.

    Attributes:
        slices: the slices, not held.
        given: the names that the groups gave.
        chosen: positions of those that telemetry selects, None if it selects all.
        names: their names.
    """

    slices: list["weakref.ref[ParamSlice]"]
    given: list[list[str] | None]
    chosen: Tensor | None
    names: tuple[str, ...]


def _metric_names(step: StepInput, slices: Sequence[ParamSlice]) -> MetricNames:
    """Return who is measured in this step; kept for steps of the same slices and names."""
    stepping, old = step.stepping, step.stepping.metric_names
    given = [group.get("param_names") for group in step.groups]
    if old is not None and given == old.given and [part() for part in old.slices] == slices:
        known: MetricNames = old
        return known
    named = step.names()
    names = [named[param] for part in slices for param in part.params]
    chosen = [index for index, name in enumerate(names) if stepping.options.telemetry.selects(name)]
    measured = tuple(names[index] for index in chosen)
    stepping.metric_names = new = MetricNames(
        slices=list(map(weakref.ref, slices)),
        given=[None if each is None else list(each) for each in given],
        chosen=None if len(chosen) == len(names) else torch.tensor(chosen, dtype=torch.int64),
        names=old.names if old is not None and measured == old.names else measured,
    )
    return new


def _least(clips: Sequence[Any]) -> Any:
    on_device = [clip.reshape(-1) for clip in clips if isinstance(clip, Tensor)]
    least = min((clip for clip in clips if not isinstance(clip, Tensor)), default=1.0)
    if not on_device:
        return least
    return torch.cat([clip.to(on_device[0].device) for clip in on_device]).min().clamp(max=least)


def measured_sums(step: StepInput, part: ParamSlice) -> Tensor:
    """Return a row for each parameter: squares of gradient, parameter, update, largest gradient, how many nonfinite."""
    skips = step.stepping.context.skips
    return part.sums if part.sums is not None and not skips else _sums_afterwards(step, part)


@torch.no_grad()
def _sums_afterwards(step: StepInput, part: ParamSlice) -> Tensor:
    """Measure by torch's operations what the update has not measured; of shards those of this process."""
    grads = [match_layout(param, param.grad) for param in part.params]
    gradients = measure_gradients(grads) if part.gradients is None else part.gradients
    if step.grad_scale is not None:
        scale = torch.as_tensor(step.grad_scale).to(gradients).reshape(())
        gradients = gradients / torch.stack([scale * scale, scale], dim=-1)
    params = [to_local(param) for param in part.params]
    unchanged = part.before is None or step.stepping.context.skips
    before = params if unchanged else [to_local(param) for param in part.before or ()]
    squares = [torch.stack([_square(p), _square(p - q)]) for p, q in zip(params, before, strict=True)]
    counts = torch.zeros(len(gradients), 1, dtype=torch.float64, device=gradients.device)
    suspects = ~gradients[:, 1].isfinite() if gradients.is_cpu else torch.ones(len(gradients))
    for index in () if has_no_values(gradients) else suspects.nonzero().flatten().tolist():
        counts[index] = (~gradient_values(grads[index]).isfinite()).sum()
    return torch.cat([gradients[:, :1], torch.stack(squares), gradients[:, 1:], counts], dim=1)


def _square(tensor: Tensor) -> Tensor:
    return reduce(TELEMETRY[1:2], (tensor,))[0]
