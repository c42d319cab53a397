"""Numbers of an update that depend on whole tensors: measured by engines, put together over ranks, stage by stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.distributed import Exchange
from surefoot.engines import cpu, eager
from surefoot.engines.bucket import EachParameter
from surefoot.rule import Stage
from surefoot.step.inputs import StepInput
from surefoot.step.types import BucketRun
from surefoot.tensors.shards import to_local


def measure_tensors(step: StepInput, runs: Sequence[BucketRun], exchange: Exchange | None) -> None:
    """Measure what rules need to know of whole tensors, and put the numbers that follow among the coefficients.

    Args:
        step: the step.
        runs: its buckets, which have their coefficients.
        exchange: what puts numbers together over ranks, None where one process knows all tensors.
    """
    measured = [run for run in runs if run.bucket.rule.stages]
    known = [_known(run) for run in measured]
    for number, width in enumerate(_widths(step, measured, exchange)):
        due = [
            (run, numbers, run.bucket.rule.stages[number])
            for run, numbers in zip(measured, known, strict=True)
            if number < len(run.bucket.rule.stages)
        ]
        sums = [_measure(run, stage) for run, _, stage in due]
        if exchange is not None:
            sums = _over_ranks(exchange, [run for run, *_ in due], sums, width)
        for (run, numbers, stage), found in zip(due, sums, strict=True):
            _add_numbers(run, numbers, stage, found)
    for run, numbers in zip(measured, known, strict=True):
        run.new_numbers = [numbers[name] for name in run.bucket.rule.new_numbers]


def store_numbers(run: BucketRun) -> None:
    """Write the new values of slots that are numbers, unless the device has found infinities."""
    found_inf = run.bucket.found_inf
    for slot, new in zip(run.bucket.rule.number_slots, run.new_numbers, strict=True):
        kept = [to_local(entry[slot.name]) for entry in run.entries]
        values = new if found_inf is None else torch.where(found_inf != 0, torch.stack(kept).to(new), new)
        if not values.requires_grad:
            torch._foreach_copy_(kept, values.unbind())
            continue
        for old, value in zip(kept, values, strict=True):  # a list has no derivative
            old.copy_(value)
    run.new_numbers = []


def _widths(step: StepInput, runs: Sequence[BucketRun], exchange: Exchange | None) -> list[int]:
    """Return for each stage how many numbers of a parameter it measures at most; all ranks find the same."""
    known = [run.bucket.rule.stages for run in runs] if exchange is None else step.stages()
    longest = max(map(len, known), default=0)
    return [max(len(stages[i].sums) for stages in known if i < len(stages)) for i in range(longest)]


def _known(run: BucketRun) -> dict[str, Any]:
    """Return the numbers of an update that are known before anything is measured.

    Each is the same for all parameters, or a tensor with one element for each.
    """
    bucket, rule = run.bucket, run.bucket.rule
    if isinstance(bucket.coefficients, EachParameter):
        known = dict(bucket.coefficients.numbers)
    else:
        known = {name: _column([row[name] for row in bucket.coefficients], bucket.row) for name in rule.given}
    for slot in rule.number_slots:
        known[slot.name] = torch.stack([to_local(entry[slot.name]) for entry in run.entries]).double()
    _share(run, known)
    return known


def _column(values: Sequence[Any], row: np.ndarray) -> Any:
    """Return the number of each parameter, of which `row` tells where it stands in `values`."""
    if any(isinstance(value, Tensor) for value in values):
        if len(values) == 1:
            return values[0]
        return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])[row]
    if values.count(values[0]) == len(values):
        return values[0]
    of_truth = all(isinstance(value, bool) for value in values)
    return torch.tensor(values, dtype=torch.bool if of_truth else torch.float64)[row]


def _share(run: BucketRun, known: Mapping[str, Any]) -> None:
    """Give a bucket numbers of each parameter."""
    run.bucket.coefficients = EachParameter(known, len(run.params))
    run.bucket.row = np.arange(len(run.params))


def _measure(run: BucketRun, stage: Stage) -> Tensor:
    """Return what a stage measures of a bucket: float64 of shape (parameters, sums)."""
    if not stage.sums:
        return torch.empty((len(run.params), 0), dtype=torch.float64, device=run.bucket.device)
    return run.engine.measure(run.bucket, stage.measures)


def _over_ranks(exchange: Exchange, runs: Sequence[BucketRun], sums: Sequence[Tensor], width: int) -> list[Tensor]:
    """Return sums over ranks, in one all-reduce for all tensors, in which every rank takes part."""
    place = exchange.device
    rows = torch.zeros(len(exchange.params), width, dtype=torch.float64, device=place)
    position = {param: row for row, param in enumerate(exchange.params)}
    indices = [torch.tensor([position[param] for param in run.params], device=place) for run in runs]
    for index, found in zip(indices, sums, strict=True):
        rows[index, : found.shape[1]] = found.to(place)
    rows, _ = exchange.sum(rows, rows.new_zeros(0))
    return [rows[index, : found.shape[1]].to(found.device) for index, found in zip(indices, sums, strict=True)]


def _add_numbers(run: BucketRun, known: dict[str, Any], stage: Stage, sums: Tensor) -> None:
    """Add the numbers that follow from what a stage has measured, for all parameters at once."""
    for name, mean, found in zip(stage.sums, stage.means, sums.unbind(1), strict=True):
        known[name] = found / _elements(run).to(found.device) if mean else found
    known |= zip(stage.gives, eager.evaluate(stage.numbers, [known[name] for name in stage.takes]), strict=True)
    # Kernels of the CPU take them in float64, as those that all parameters share, and some of them reciprocal.
    wanted = torch.float64 if run.engine is cpu else run.bucket.compute_dtype
    numbers = {name: value.to(wanted) if _is_float(value) else value for name, value in known.items()}
    _share(run, numbers)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _elements(run: BucketRun) -> Tensor:
    """Return how many real numbers each parameter has, those of other ranks' shards too."""
    if run.elements is None:
        counts = [param.numel() * (1 + param.is_complex()) for param in run.params]
        run.elements = torch.tensor(counts, dtype=torch.float64)
    return run.elements
