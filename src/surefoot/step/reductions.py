"""Numbers of an update that depend on whole tensors: measured by engines, put together over ranks, stage by stage."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from surefoot.distributed import Exchange
from surefoot.engines import cpu, eager
from surefoot.engines.bucket import EachParameter
from surefoot.errors import RuleError
from surefoot.rule import AlgorithmSpec, Stage
from surefoot.step.group_scalars import new_group_scalars
from surefoot.step.inputs import StepInput
from surefoot.step.types import BucketRun
from surefoot.tensors.modes import has_no_values
from surefoot.tensors.shards import to_local


def measure_tensors(step: StepInput, runs: Sequence[BucketRun], exchange: Exchange | None) -> None:
    """Measure what rules need to know of whole tensors, and put the numbers that follow among the coefficients.

    So are the factors by which gradients are clipped, where each parameter has its own.

    Args:
        step: the step.
        runs: its buckets, which have their coefficients.
        exchange: what puts numbers together over ranks, None where one process knows all tensors.
    """
    for run in runs:
        if run.slice.clips_each and "step_clip" in run.bucket.rule.given:
            _share(run, {**_known(run), "step_clip": _in_dtype(run.slice.clip, _dtype_of_numbers(run))})
    measured = [run for run in runs if run.bucket.rule.stages]
    known = [_known(run) for run in measured]
    for number, stages in enumerate(_stages(step, measured, exchange)):
        due = [
            (run, numbers, run.bucket.rule.stages[number])
            for run, numbers in zip(measured, known, strict=True)
            if number < len(run.bucket.rule.stages)
        ]
        sums = [_Sums(run, stage, _measure(run, stage)) for run, _, stage in due]
        columns = _columns(step, sums, exchange, stages)
        for (run, numbers, stage), found in zip(due, columns, strict=True):
            _add_numbers(run, numbers, stage, found)
    for run, numbers in zip(measured, known, strict=True):
        run.new_numbers = [_of_each(numbers[name], run) for name in run.bucket.rule.new_numbers]
    step.stepping.context.group_scalars = new_group_scalars(step, measured, known, exchange)


class _Sums(NamedTuple):
    """What a stage has measured of a bucket: float64 of shape (parameters, sums)."""

    run: BucketRun
    stage: Stage
    found: Tensor


def _of_each(value: Any, run: BucketRun) -> Tensor:
    """Return a number for each parameter, of shape (parameters,), where all may share it."""
    number: Tensor = torch.as_tensor(value, dtype=torch.float64, device=run.bucket.device)
    return number if number.dim() else number.expand(len(run.params))


def store_numbers(run: BucketRun) -> None:
    """Write the new values of slots that are numbers, unless the device has found infinities."""
    found_inf = run.bucket.found_inf
    for slot, new in zip(run.bucket.rule.number_slots, run.new_numbers, strict=True):
        values = new if found_inf is None else torch.where(found_inf != 0, _kept_numbers(run, slot.name).to(new), new)
        compiled = run.guard.kept_numbers(slot.name) if run.guard and not values.requires_grad else None
        if compiled is not None:
            compiled.write(values)
            continue
        kept = [to_local(entry[slot.name]) for entry in run.entries]
        if not values.requires_grad:
            torch._foreach_copy_(kept, values.unbind())
            continue
        for old, value in zip(kept, values, strict=True):  # a list has no derivative
            old.copy_(value)
    run.new_numbers = []


def _stages(
    step: StepInput, runs: Sequence[BucketRun], exchange: Exchange | None
) -> list[list[tuple[AlgorithmSpec, Stage]]]:
    """Return the stages that are due together, each with its algorithm, list by list; all ranks find as many."""
    known = [(run.spec, run.bucket.rule.stages) for run in runs] if exchange is None else step.stages()
    longest = max((len(stages) for _, stages in known), default=0)
    return [[(spec, stages[i]) for spec, stages in known if i < len(stages)] for i in range(longest)]


def _known(run: BucketRun) -> dict[str, Any]:
    """Return the numbers of an update that are known before anything is measured.

    Each is the same for all parameters, or a tensor with one element for each.
    """
    bucket, rule = run.bucket, run.bucket.rule
    if isinstance(bucket.coefficients, EachParameter):
        known = dict(bucket.coefficients.numbers)
    elif len(bucket.coefficients) == 1:
        known = dict(bucket.coefficients[0])
    else:
        known = {name: _column([row[name] for row in bucket.coefficients], bucket.row) for name in rule.given}
    for slot in rule.number_slots:
        known[slot.name] = _kept_numbers(run, slot.name)
    _share(run, known)
    return known


def _kept_numbers(run: BucketRun, name: str) -> Tensor:
    """Return the numbers that parameters keep in a slot: float64 of shape (parameters,)."""
    compiled = run.guard.kept_numbers(name) if run.guard else None
    if compiled is not None:
        found: Tensor = compiled.read()
        return found
    return torch.stack([to_local(entry[name]) for entry in run.entries]).double()


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
    """Give a bucket its numbers, one set of them where no parameter has another number than the rest."""
    count = len(run.params)
    if not any(isinstance(value, Tensor) and value.dim() for value in known.values()):
        run.bucket.coefficients, run.bucket.row = EachParameter(known, 1), np.zeros(count, dtype=np.int64)
        return
    run.bucket.coefficients, run.bucket.row = EachParameter(known, count), np.arange(count)


def _dtype_of_numbers(run: BucketRun) -> torch.dtype:
    """Return the dtype of numbers that each parameter has its own of.

    Kernels of the CPU take them in float64, as those that all parameters share, and some of them reciprocal.
    """
    return torch.float64 if run.engine is cpu else run.bucket.compute_dtype


def _measure(run: BucketRun, stage: Stage) -> Tensor:
    """Return what a stage measures of a bucket: float64 of shape (parameters, sums)."""
    found = []
    if run.sampled is not None and stage.sampled is not None:
        bucket = run.sampled.bucket
        bucket.coefficients, bucket.row = run.bucket.coefficients, run.bucket.row
        found.append(run.sampled.engine.measure(bucket, stage.sampled))
    if stage.measures.reductions:
        found.append(run.engine.measure(run.bucket, stage.measures))
    if len(found) == 1:
        return found[0]
    return torch.cat([torch.empty((len(run.params), 0), dtype=torch.float64, device=run.bucket.device), *found], 1)


def _columns(
    step: StepInput, sums: Sequence[_Sums], exchange: Exchange | None, stages: Sequence[tuple[AlgorithmSpec, Stage]]
) -> list[list[Tensor]]:
    """Return for each bucket what a stage's sums come to: of shape (parameters,), or () of several tensors.

    Args:
        step: the step.
        sums: what was measured of this process's shards.
        exchange: what puts numbers together over ranks, if there are any.
        stages: the stages that are due, each with its algorithm.

    Raises:
        RuleError: parameters of an algorithm ask for another number of sums over several tensors.
    """
    totals = _count_totals([*stages, *((each.run.spec, each.stage) for each in sums)])
    if exchange is None:
        own = [each.found[:, each.stage.totals :] for each in sums]
        table = _group_sums(step, sums, totals) if totals else None
    else:
        own, rows = _over_ranks(exchange, sums, totals, max(len(stage.sums) for _, stage in stages))
        sizes = [len(group["params"]) for group in step.groups]
        table = exchange.sum_groups(rows[:, :totals], sizes) if totals else None
    found = [list(of_each.unbind(1)) for of_each in own]
    if table is None:
        return found
    index = {id(group): row for row, group in enumerate(step.groups)}
    for each, columns in zip(sums, found, strict=True):
        kinds = each.stage.over[: each.stage.totals]
        of_group = table[index[id(each.run.group)]]
        every = table[[index[id(group)] for group in step.groups_with(each.run.group)]].sum(dim=0)
        columns[:0] = [
            (every if over == "all" else of_group)[column].to(each.found.device) for column, over in enumerate(kinds)
        ]
    return found


def _count_totals(stages: Iterable[tuple[AlgorithmSpec, Stage]]) -> int:
    """Return how many sums over several tensors stages ask for at most; those of one algorithm ask for as many."""
    counts: dict[AlgorithmSpec, int] = {}
    for spec, stage in stages:
        known = counts.setdefault(spec, stage.totals) if stage.totals else 0
        if known != stage.totals:
            raise RuleError(
                f"{spec.name}.update sums {min(known, stage.totals)} tensors over parameters under some flags and "
                f"{max(known, stage.totals)} under others; all groups must ask for the same sums"
            )
    return max(counts.values(), default=0)


def _group_sums(step: StepInput, sums: Sequence[_Sums], totals: int) -> Tensor:
    """Return the sums over the parameters of each group: float64 of shape (groups, totals)."""
    parts: list[list[Tensor]] = [[] for _ in step.groups]
    index = {id(group): row for row, group in enumerate(step.groups)}
    place = sums[0].found.device
    for run, stage, found in sums:
        if stage.totals:
            own = found[:, : stage.totals].sum(dim=0).to(place)
            parts[index[id(run.group)]].append(pad(own, (0, totals - stage.totals)))
    zeros = torch.zeros_like(next(part[0] for part in parts if part))
    return torch.stack([torch.stack(part).sum(dim=0) if part else zeros for part in parts])


def _over_ranks(exchange: Exchange, sums: Sequence[_Sums], totals: int, width: int) -> tuple[list[Tensor], Tensor]:
    """Add up over ranks, in one all-reduce for all tensors, in which every rank takes part.

    Args:
        exchange: what puts numbers together over ranks.
        sums: what was measured of this process's shards.
        totals: how many sums over several tensors there are, which come first in a row.
        width: how many sums of a parameter there are at most.

    Returns:
        For each bucket its other sums, of shape (parameters, sums); and the rows of all parameters.
    """
    place = exchange.device
    rows = torch.zeros(len(exchange.params), totals + width, dtype=torch.float64, device=place)
    position = {param: row for row, param in enumerate(exchange.params)}
    indices = [torch.tensor([position[param] for param in each.run.params], device=place) for each in sums]
    ends = [totals + len(each.stage.sums) - each.stage.totals for each in sums]
    for index, end, (_, stage, found) in zip(indices, ends, sums, strict=True):
        rows[index, : stage.totals] = found[:, : stage.totals].to(place)
        rows[index, totals:end] = found[:, stage.totals :].to(place)
    rows, _ = exchange.sum(rows, rows.new_zeros(0))
    own = [rows[index, totals:end].to(e.found.device) for index, end, e in zip(indices, ends, sums, strict=True)]
    return own, rows


def _add_numbers(run: BucketRun, known: dict[str, Any], stage: Stage, sums: Sequence[Tensor]) -> None:
    """Add the numbers that follow from what a stage has measured, for all parameters at once."""
    for name, mean, found in zip(stage.sums, stage.means, sums, strict=True):
        known[name] = found / _elements(run).to(found.device) if mean else found
    read = _unchanged if run.is_unread else _read
    takes = [known[name] for name in stage.takes]
    known |= zip(stage.gives, _evaluated(stage.numbers, takes, list(map(read, takes))), strict=True)
    dtype, names = _dtype_of_numbers(run), run.bucket.rule.numbers
    _share(run, {name: _in_dtype(read(known[name]), dtype) for name in names if name in known})


def _evaluated(graph: fx.Graph, numbers: Sequence[Any], plain: Sequence[Any]) -> Sequence[Any]:
    """Compute numbers from numbers: as Python's where they are, unless that has no answer, as division by zero."""
    if not any(isinstance(value, Tensor) for value in plain):
        with suppress(ArithmeticError, ValueError):
            return eager.evaluate(graph, plain)
    return eager.evaluate(graph, numbers)


def _unchanged(value: Any) -> Any:
    return value


def _read(value: Any) -> Any:
    """Return a number as one of Python's where all parameters share it."""
    if isinstance(value, Tensor) and value.is_cpu and not value.dim():
        return value if value.requires_grad or has_no_values(value) else value.item()
    return value


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _elements(run: BucketRun) -> Tensor:
    """Return how many real numbers each parameter has, those of other ranks' shards too."""
    if run.elements is None:
        counts = [param.numel() * (1 + param.is_complex()) for param in run.params]
        run.elements = torch.tensor(counts, dtype=torch.float64)
    return run.elements
