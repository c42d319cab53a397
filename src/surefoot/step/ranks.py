"""What ranks tell one another before a step of sharded parameters changes anything, in one all-reduce.

They tell what their gradients add up to, whether a GradScaler has found infinities, and whether a rank fails; where an
algorithm needs more of a tensor than a shard, also which parameters have a gradient.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from surefoot.distributed import Exchange, irregular_shard, make_exchange, refuse_flattened
from surefoot.state.check import format_param
from surefoot.step.inputs import StepInput
from surefoot.step.types import ParamSlice
from surefoot.tensors.shards import is_sharded, sharded_type, to_local


class RankSums(NamedTuple):
    """What all ranks know together.

    Attributes:
        rows: of each parameter of the groups the sum of squares of its gradient, how many ranks found inf or NaN, and
            on how many it has a gradient, of those that hold different shards of it: float64 of shape (parameters, 3).
        divided: the same of the plain parameters of each group, where `process_group` divides them over ranks; else
            zeros: float64 of shape (groups, 3).
        found_inf: how many ranks have found infinities, None if no GradScaler looks for them.
    """

    rows: Tensor
    divided: Tensor
    found_inf: Tensor | None


def due_exchange(step: StepInput) -> Exchange | None:
    """Return what ranks tell one another by in this step, None if there is nothing to tell.

    A part of a step, made while backward runs, is made without: what it would need is told when the step is closed.
    """
    if step.whole is not None:
        return None
    stages = [stage for _, own in step.stages() for stage in own]
    totals = any(stage.totals for stage in stages)
    whole = step.whole_params() if stages or any(step.spec.of(g).whole_tensors for g in step.groups) else []
    if whole and (alone := step.whole_params(alone=True)):
        refuse_flattened(alone, step.spec.name, whole_tensors=True)
    asked = totals or step.needs_gradients() or step.stepping.context.wants_metrics or step.found_inf is not None
    if not asked and not any_sharded(whole):
        return None
    exchange = exchange_of(step)
    if exchange is None and (totals or step.needs_gradients()):
        refuse_flattened(step.params(), step.spec.name)
    return exchange


def any_sharded(params: Iterable[Tensor]) -> bool:
    """Return whether one of several parameters is sharded."""
    return sharded_type() is not None and any(map(is_sharded, params))


def exchange_of(step: StepInput) -> Exchange | None:
    """Return what puts numbers of the parameters together over ranks; kept for steps of the same parameters."""
    params = step.params()
    known, process_group = step.stepping.exchange, step.stepping.options.process_group
    if known is not None and known.process_group is process_group and known.is_of(params):
        return known  # type: ignore[no-any-return]
    step.stepping.exchange = made = make_exchange(params, process_group)
    return made


@contextmanager
def report_failure(step: StepInput, exchange: Exchange | None) -> Iterator[None]:
    """Tell the other ranks, which wait in the same exchange, when this one fails inside of the `with` block."""
    try:
        yield
    except Exception:
        if exchange is not None:
            _exchange_sums(step, exchange, (), failed=True)
        raise


def refuse_irregular(step: StepInput) -> None:
    """Refuse parameters whose shards are not what their placements say, where an algorithm needs whole tensors.

    Raises:
        RuntimeError: there is one; the message names it.
    """
    whole = set(step.whole_params())
    if not any_sharded(whole):
        return
    for group in step.groups:
        for param in whole.intersection(group["params"]):
            if is_sharded(param) and (reason := irregular_shard(param)) is not None:
                raise RuntimeError(f"{format_param(group, param)} {reason}; lay it out with `distribute_tensor`")


def sums_over_ranks(step: StepInput, exchange: Exchange, slices: Sequence[ParamSlice]) -> RankSums:
    """Return what all ranks know together; each tells what stands in `gradients` of its slices.

    Raises:
        RuntimeError: another rank has failed in this step, so that this one must not make it either; or the algorithm
            needs whole tensors, and some ranks have no gradient of a parameter of which others have one.
    """
    return _exchange_sums(step, exchange, slices, failed=False)


def _exchange_sums(step: StepInput, exchange: Exchange, slices: Sequence[ParamSlice], *, failed: bool) -> RankSums:
    place = exchange.device
    rows = torch.zeros(len(exchange.params), _COLUMNS, dtype=torch.float64, device=place)
    divided = torch.zeros(len(step.groups), _COLUMNS, dtype=torch.float64, device=place)
    position = {param: row for row, param in enumerate(exchange.params)}
    for part in slices:
        own = torch.tensor([position[param] for param in part.params], device=place)
        if part.gradients is not None:
            known = torch.stack([part.gradients[:, 0], (~part.gradients[:, 1].isfinite()).double()], dim=1)
            rows[own, :_WITH_GRADIENT] = known.to(place)
        rows[own, _WITH_GRADIENT] = 1.0
    if exchange.process_group is not None:
        first = 0
        for index, group in enumerate(step.groups):
            plain = [first + i for i, param in enumerate(group["params"]) if not is_sharded(param)]
            divided[index], first = rows[plain].sum(dim=0), first + len(group["params"])
            rows[plain] = 0.0
    found = 0.0 if step.found_inf is None else to_local(step.found_inf).to(place).double().reshape(())
    flags = torch.zeros(2, dtype=torch.float64, device=place)
    flags[0], flags[1] = float(failed), found
    rows, shared = exchange.sum(rows, torch.cat([flags, divided.flatten()]))
    captured = any(group.get("capturable") for group in step.groups)
    # On an accelerator this waits, so that there a rank that fails ends its own step only, unless others wait for it.
    whole = set(step.whole_params())
    if (place.type == "cpu" or (whole and not captured)) and not failed and shared[0]:
        raise RuntimeError(
            f"{step.spec.name}'s step was refused on another rank, which tells why; nothing was changed on this one"
        )
    if whole and not failed and not captured:
        _refuse_missing(step, exchange, rows[:, _WITH_GRADIENT], whole)
    found_inf = None if step.found_inf is None else shared[1].float()
    return RankSums(rows, shared[2:].view_as(divided), found_inf)


def _refuse_missing(step: StepInput, exchange: Exchange, present: Tensor, whole: Collection[Tensor]) -> None:
    """Refuse a step of whole tensors for which some ranks lack a gradient, on all ranks alike.

    Args:
        step: the step.
        exchange: what ranks tell one another by.
        present: on how many ranks each parameter has a gradient.
        whole: the parameters of which more than a shard is needed.
    """
    shards = exchange.shards.to(present.device)
    missing = (present > _ALMOST) & (present < shards - _ALMOST)
    for row in missing.nonzero().flatten().tolist():
        if is_sharded(param := exchange.params[row]) and param in whole:
            raise RuntimeError(
                f"{step.spec.name} needs the gradient of `{step.names()[param]}` on every rank that holds a shard of "
                f"it, and some have none; give them one of zeros"
            )


def metrics_over_ranks(step: StepInput, slices: Sequence[ParamSlice], blocks: Sequence[Tensor]) -> list[Tensor]:
    """Return what was measured of the parameters of slices, put together over ranks.

    Args:
        step: the step.
        slices: the slices.
        blocks: for each of them what `rule.TELEMETRY` names, of each parameter: float64 of shape (n, 5).
    """
    exchange = exchange_of(step)
    if exchange is None:
        return list(blocks)
    place = blocks[0].device if blocks else torch.device("cpu")
    rows = torch.zeros(len(exchange.params), 5, dtype=torch.float64, device=place)
    position = {param: row for row, param in enumerate(exchange.params)}
    indices = [torch.tensor([position[param] for param in part.params], device=place) for part in slices]
    for index, block in zip(indices, blocks, strict=True):
        rows[index] = block.to(place)
    rows = exchange.combine(rows, largest=(_LARGEST,))
    return [rows[index] for index in indices]


_LARGEST = 3
_COLUMNS, _WITH_GRADIENT = 3, 2
_ALMOST = 1e-6
