"""A step of a rule: from param groups to buckets, and from buckets through an engine.

Everything that can be refused is refused while buckets are made, before any state exists or changes.  Buckets of the
CPU engine are kept until the next step, which uses them again if nothing has changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from torch import Tensor

from surefoot.engines import Bucket, Coefficients, Engine, choose, cpu, eager
from surefoot.errors import RuleError
from surefoot.kept import Kept, Watch
from surefoot.rule import EMA, Flags, bind
from surefoot.state import (
    active_slots,
    admissible_gradient,
    ensure_state,
    flags_of,
    hyperparameters,
    local,
    read_scalars,
    sharded_type,
    slots_of,
    write_scalars,
)
from surefoot.whole_step import Part, guard, is_clipped, needs_reading, read_gradients, skip

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer

Fresh = tuple[bool, bool]
"""Of a parameter: whether a slot of its algorithm has just been made, and whether its average has."""
_NOT_FRESH = (False, False)
ENGINE_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


class Row(NamedTuple):
    """A parameter to be stepped by an optimizer that is no rule; its state is there, its step counted."""

    h: SimpleNamespace
    param: Tensor
    grad: Tensor
    state: dict[str, Any]


def rows(optimizer: "Optimizer") -> list[Row]:
    """Give every parameter that has a gradient, clipped and negated under `maximize`, with its state.

    All are checked first.  There are none in a step that is to be skipped.
    """
    whole, found = optimizer.whole_step, []
    for group in optimizer.param_groups:
        params = [param for param in group["params"] if param.grad is not None]
        found.append((Part(group, params), [admissible_gradient(optimizer, group, param) for param in params]))
    parts = [part for part, _ in found if part.params]
    whole.parts = parts
    if needs_reading(optimizer):
        for part in parts:
            part.gradients = read_gradients(part.params)
        if parts and not guard(optimizer, parts):
            return []
    return [row for part, grads in found for row in _rows(optimizer, part, grads)]


def _rows(optimizer: "Optimizer", part: Part, grads: Sequence[Tensor]) -> Iterator[Row]:
    """Make the rows of a group."""
    group, slots = part.group, active_slots(optimizer, dict(flags_of(optimizer, part.group)))
    made = [ensure_state(optimizer, group, param, slots) for param in part.params]
    part.fresh = [EMA.name in names for names in made] if group.get("ema") else None
    part.before = [param.detach().clone() for param in part.params] if optimizer.whole_step.measures else None
    for param, grad in zip(part.params, grads, strict=True):
        state = optimizer.state.get(param, {})
        if "step" in state:
            state["step"] += 1
        yield Row(hyperparameters(group), param, _seen(optimizer, part, grad), state)


def _seen(optimizer: "Optimizer", part: Part, grad: Tensor) -> Tensor:
    """Give a gradient as an algorithm is to see it."""
    group = part.group
    grad = grad * part.clip if is_clipped(optimizer, group) else grad
    if limit := group.get("max_grad_value"):
        grad = grad.clamp(-limit, limit)
    return -grad if group.get("maximize") else grad


@dataclass(eq=False)
class Work:
    """A bucket together with what it comes from and the engine that will run it."""

    optimizer: "Optimizer"
    group: dict[str, Any]
    params: list[Tensor]
    bucket: Bucket
    engine: Engine
    part: Part
    states: list[dict[str, Any]] = field(default_factory=list)
    made: list[list[str]] = field(default_factory=list)
    scalars: Any = None
    watch: Watch | None = None

    def grads(self) -> list[Any]:
        """Give the gradients of now."""
        return [param.grad for param in self.params]

    def attach_state(self) -> None:
        """Make what is missing of the state and put the slots into the bucket."""
        slots = self.bucket.rule.slots
        needed = (*slots, EMA) if self.group.get("ema") else slots
        self.made = [ensure_state(self.optimizer, self.group, param, needed) for param in self.params]
        self.states = [self.optimizer.state.get(param, {}) for param in self.params]
        self.bucket.slots = [[local(state[slot.name]) for state in self.states] for slot in slots]

    def detach_state(self) -> None:
        """Take away what `attach_state` has made."""
        for param, names in zip(self.params, self.made, strict=False):
            for name in names:
                del self.optimizer.state[param][name]
            if not self.optimizer.state.get(param, True):
                del self.optimizer.state[param]

    def read(self) -> None:
        """Measure the gradients."""
        if isinstance(self.params[0].grad, sharded_type() or ()) or self._is_sparse():
            self.part.gradients = read_gradients(self.params)
        else:
            self.part.gradients = self.engine.read(self.bucket)

    def _is_sparse(self) -> bool:
        return self.watch is None and self.bucket.grads[0].is_sparse

    def measure(self, wanted: bool) -> None:
        """Let the update measure, or not, what telemetry wants to know."""
        if not self._is_sparse():
            self.bucket.rule = bind(
                cast("Any", type(self.optimizer)), (("measured", wanted), *self.bucket.rule.flags[1:])
            )
        elif wanted:
            self.part.before = [param.detach().clone() for param in self.params]

    def compute_numbers(self) -> None:
        """Put the numbers of this step into the bucket, and compute the new scalars."""
        slots = {slot.name for slot in self.optimizer.slots}
        fresh = [(not slots.isdisjoint(names), EMA.name in names) for names in self.made]
        if self.group.get("ema") and EMA not in self.bucket.rule.slots:
            self.part.fresh = [new for _, new in fresh]
        scalars = self.optimizer.scalars
        values = self.watch.read() if self.watch else read_scalars(self.states, scalars)
        distinct, row = _distinct(values, fresh)
        numbers = [_coefficients(self, column, fresh) for column, fresh in distinct]
        self.bucket.coefficients, self.bucket.row = [number for number, _ in numbers], row
        new = np.array([values for _, values in numbers], dtype=np.float64).T.reshape(len(scalars), len(numbers))
        self.scalars = new[:, row]

    def run(self) -> None:
        """Count the step, update the bucket's parameters, and forget their gradients."""
        if self.watch:
            self.watch.write(self.scalars)
        else:
            write_scalars(self.states, self.optimizer.scalars, self.scalars)
        if self._is_sparse():
            _run_rows(self.engine, self.bucket)
        else:
            self.engine.run(self.bucket)
        self.part.sums, self.bucket.measured = self.bucket.measured, None
        self.bucket.grads, self.bucket.gradient_addresses, self.made, self.scalars = [], None, [], None


def run_rule(optimizer: "Optimizer") -> None:
    """Step every parameter that has a gradient; a GradScaler's `found_inf` leaves everything as it is."""
    if (found_inf := getattr(optimizer, "found_inf", None)) is not None and float(found_inf):
        skip(optimizer)
        return
    signatures = [signature(optimizer, group) for group in optimizer.param_groups]
    kept: Kept = optimizer.__dict__.pop("_kept", None) or Kept()
    known = kept.works(optimizer, signatures)
    works = _new_works(optimizer) if known is None else known
    try:
        made = _prepare(optimizer, works)
    except BaseException:
        _undo(works)
        raise
    if not made:
        _undo(works)
    elif known is None:
        kept = Kept.of(optimizer, signatures, works)
    for work in works if made else ():
        work.run()
    optimizer.__dict__["_kept"] = kept


def _new_works(optimizer: "Optimizer") -> list[Work]:
    """Make works with their state; whatever goes wrong, no state is left that was not there."""
    works = [work for group in optimizer.param_groups for work in _divide(optimizer, group)]
    try:
        for work in works:
            work.attach_state()
    except BaseException:
        _undo(works)
        raise
    return works


def _prepare(optimizer: "Optimizer", works: "Sequence[Work]") -> bool:
    """Look at the gradients where that is asked for, and compute the numbers; tell whether the step is to be made."""
    whole = optimizer.whole_step
    whole.parts = [work.part for work in works]
    for work in works:
        work.part.gradients, work.part.clip, work.part.before, work.part.fresh = None, 1.0, None, None
        work.measure(whole.measures)
    if works and needs_reading(optimizer):
        for work in works:
            work.read()
        if not guard(optimizer, whole.parts):
            return False
    for work in works:
        work.compute_numbers()
    return True


def _undo(works: "Sequence[Work]") -> None:
    """Take away the state that was made for a step that is not made."""
    for work in works:
        work.detach_state()


def signature(optimizer: "Optimizer", group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a group decides its buckets, beside its tensors."""
    return (_all_flags(optimizer, group), *map(group.get, ENGINE_OPTIONS))


def _all_flags(optimizer: "Optimizer", group: Mapping[str, Any]) -> Flags:
    """Settle a group's flags, and those of the step.

    These are: whether telemetry is measured, decided later; whether a GradScaler left the gradients for the step to
    unscale; whether they are clipped by norm.
    """
    scaled = getattr(optimizer, "grad_scale", None) is not None
    step = (("measured", False), ("scaled", scaled), ("clipped", is_clipped(optimizer, group)))
    return (*step, *flags_of(optimizer, group))


def _divide(optimizer: "Optimizer", group: dict[str, Any]) -> Iterator[Work]:
    """Make the buckets of a group, refusing what the rule or the chosen engine cannot do."""
    flags, algorithm = _all_flags(optimizer, group), cast("Any", type(optimizer))
    of_rows = tuple((name, value and name != "ema") for name, value in flags)  # averages are of all rows
    works: dict[tuple[Any, ...], Work] = {}
    for param in group["params"]:
        if param.grad is None:
            continue
        grad = admissible_gradient(optimizer, group, param, flags)
        state = optimizer.state.get(param, {})
        dtypes = tuple(
            state[slot.name].dtype if state.get(slot.name) is not None else None for slot in slots_of(optimizer)
        )
        key = (param.device, param.dtype, grad.dtype, grad.layout, dtypes)
        if key not in works:
            rule = bind(algorithm, of_rows if grad.is_sparse else flags)
            bucket = Bucket(rule, [], [], {name: group.get(name) for name in ENGINE_OPTIONS})
            works[key] = Work(optimizer, group, [], bucket, eager, Part(group, []))
        works[key].params.append(param)
        works[key].part.params.append(param)
        works[key].bucket.params.append(local(param))
        works[key].bucket.grads.append(grad if grad.is_sparse else local(grad))
    for work in works.values():
        work.engine = choose(work.bucket)
        yield work


def _distinct(values: np.ndarray, fresh: list[Fresh]) -> tuple[list[tuple[tuple[float, ...], Fresh]], np.ndarray]:
    """Find the distinct columns of scalars, told apart by `fresh`, and for each parameter the index of its own."""
    count = values.shape[1]
    fresh = fresh or [_NOT_FRESH] * count
    if fresh.count(fresh[0]) == count and (values == values[:, :1]).all():
        return [(tuple(values[:, 0].tolist()), fresh[0])], np.zeros(count, dtype=np.int64)
    columns = list(zip(map(tuple, values.T.tolist()), fresh, strict=True))
    index = {column: position for position, column in enumerate(dict.fromkeys(columns))}
    return list(index), np.array([index[column] for column in columns], dtype=np.int64)


def _coefficients(work: Work, values: tuple[float, ...], fresh: Fresh) -> tuple[Coefficients, list[float]]:
    """Compute the numbers of an update and the new scalars from the present scalars."""
    optimizer, h = work.optimizer, hyperparameters(work.group)
    scalars: dict[str, Any] = {s.name: value for s, value in zip(optimizer.scalars, values, strict=True)}
    if "step" in scalars:
        scalars["step"] += 1
    derived = optimizer.coefficients(h, **scalars)
    numbers: dict[str, Any] = {
        name: value for name, value in vars(h).items() if isinstance(value, float | int | Tensor)
    }
    numbers |= {"fresh": fresh[0], "loss_scale": getattr(optimizer, "grad_scale", None), "clip": work.part.clip}
    numbers |= {"ema_weight": 1.0 if fresh[1] else 1 - (work.group.get("ema") or 0.0), **derived}
    if missing := [name for name in work.bucket.rule.coefficients if name not in numbers]:
        raise RuleError(
            f"{work.bucket.rule.name}.update reads c.{missing[0]}, which is neither a hyperparameter nor given by "
            f"`coefficients`; there are: {', '.join(sorted(numbers))}"
        )
    keep = bool(work.group.get("differentiable"))
    new = [float(_number(derived.get(name, value), keep_tensors=False)) for name, value in scalars.items()]
    return {name: _number(numbers[name], keep_tensors=keep) for name in work.bucket.rule.coefficients}, new


def _number(value: Any, *, keep_tensors: bool) -> Any:
    return value.detach().item() if isinstance(value, Tensor) and not keep_tensors else value


def _run_rows(engine: Engine, bucket: Bucket) -> None:
    """Run an engine on the rows at which coalesced sparse gradients have values."""
    if engine is cpu and cpu.run_rows(bucket):
        return
    index = [tuple(grad.indices()) for grad in bucket.grads]
    whole = [bucket.params, *bucket.slots]
    params, *slots = [[t[i] for t, i in zip(tensors, index, strict=True)] for tensors in whole]
    values = [local(grad.values()) for grad in bucket.grads]
    engine.run(replace(bucket, params=params, grads=values, slots=slots))
    for tensors, parts in zip(whole, (params, *slots), strict=True):
        for tensor, part, i in zip(tensors, parts, index, strict=True):
            tensor[i] = part
