"""A step of a rule: from param groups to buckets, and from buckets through an engine.

Everything that can be refused is refused while buckets are made, before any state exists or changes.  Buckets of
engines that run kernels are kept until the next step, which uses them again if nothing has changed.
"""

import functools
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from surefoot import device
from surefoot.engines import Bucket, Coefficients, Engine, choose, cpu, eager, gpu
from surefoot.engines.bucket import EachParameter
from surefoot.errors import InternalError, RuleError
from surefoot.kept import ENGINE_OPTIONS, Kept, Options, Watch, all_flags
from surefoot.rule import EMA, bind
from surefoot.state import (
    active_slots,
    admissible_gradient,
    describe,
    ensure_state,
    flags_of,
    hyperparameters,
    is_on_device,
    read_scalars,
    slots_of,
    write_scalars,
)
from surefoot.tensors.memory import is_plain, shared_memory
from surefoot.tensors.shards import is_sharded, to_local
from surefoot.whole_step import Part, guard, is_clipped, needs_reading, read_gradients, skip

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer

Fresh = tuple[bool, bool]
"""Of a parameter: whether a slot of its algorithm has just been made, and whether its average has."""
_NOT_FRESH = (False, False)
_NUMBER = (float, int, Tensor)


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
    device.refuse_capture(optimizer)
    optimizer.whole_step.now.take_turn()
    found = []
    for group in optimizer.param_groups:
        params = [param for param in group["params"] if param.grad is not None]
        found.append((Part(group, params), [admissible_gradient(optimizer, group, param) for param in params]))
    if not all(optimizer.state.get(param) for part, _ in found for param in part.params):
        device.refuse_new_work(optimizer)
    parts = [part for part, _ in found if part.params]
    optimizer.whole_step.now.parts = parts
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
    part.before = [param.detach().clone() for param in part.params] if optimizer.whole_step.now.measures else None
    plain, moved = (
        hyperparameters(group),
        functools.cache(lambda place: device.numbers_on(place, hyperparameters(group))),
    )
    for param, grad in zip(part.params, grads, strict=True):
        state = optimizer.state.get(param, {})
        if "step" in state:
            state["step"] += 1
        h = moved(param.device) if is_on_device(group, param) or not param.is_cpu else plain
        yield Row(h, param, _seen(optimizer, part, grad), state)


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

    owner: "weakref.ref[Optimizer]"
    group: dict[str, Any]
    params: list[Tensor]
    bucket: Bucket
    engine: Engine
    part: Part
    sparse: bool = False
    states: list[dict[str, Any]] = field(default_factory=list)
    made: list[list[str]] = field(default_factory=list)
    scalars: Any = None
    watch: Watch | None = None
    device_scalars: device.DeviceScalars | None = None
    options: SimpleNamespace | None = None
    first: np.ndarray | None = None
    fresh: Any = False
    fresh_average: Any = False

    @property
    def optimizer(self) -> "Optimizer":
        """The optimizer, which keeps its works and is not kept by them."""
        optimizer = self.owner()
        if optimizer is None:
            raise InternalError("an optimizer's work outlived it")
        return optimizer

    @property
    def on_device(self) -> bool:
        """Whether only the parameters' device knows their scalars."""
        return is_on_device(self.group, self.params[0]) and not self.group.get("differentiable")

    def grads(self) -> list[Any]:
        """Give the gradients of now."""
        return [param.grad for param in self.params]

    def attach_state(self) -> None:
        """Make what is missing of the state and put the slots into the bucket."""
        slots = self.bucket.rule.slots
        needed = (*slots, EMA) if self.group.get("ema") else slots
        self.made = [ensure_state(self.optimizer, self.group, param, needed) for param in self.params]
        self.states = [self.optimizer.state.get(param, {}) for param in self.params]
        self.bucket.slots = [[to_local(state[slot.name]) for state in self.states] for slot in slots]

    def detach_state(self) -> None:
        """Take away what `attach_state` has made."""
        for param, names in zip(self.params, self.made, strict=False):
            for name in names:
                del self.optimizer.state[param][name]
            if not self.optimizer.state.get(param, True):
                del self.optimizer.state[param]

    def read(self) -> None:
        """Measure the gradients."""
        if self._is_sharded() or self.sparse:
            self.part.gradients = read_gradients(self.params)
        else:
            self.part.gradients = self.engine.read(self.bucket)

    def _is_sharded(self) -> bool:
        return is_sharded(self.params[0])

    def measure(self, wanted: bool) -> None:
        """Let the update measure, or not, what telemetry wants to know."""
        if not self.sparse and not self._is_sharded():
            flags = self.bucket.rule.flags
            if flags[0] != ("measured", wanted):
                self.bucket.rule = bind(cast("Any", type(self.optimizer)), (("measured", wanted), *flags[1:]))
        elif wanted:
            self.part.before = [param.detach().clone() for param in self.params]

    def compute_numbers(self) -> None:
        """Put the numbers of this step into the bucket, and compute the new scalars."""
        fresh = self._fresh() if self.made else []
        if self.group.get("ema") and EMA not in self.bucket.rule.slots:
            self.part.fresh = [new for _, new in fresh]
        if self.on_device:
            self._compute_on_device(fresh)
            return
        scalars = self.optimizer.scalars
        values = self.watch.read() if self.watch else read_scalars(self.states, scalars)
        distinct, row = _distinct(values, fresh)
        if self.first is None:
            self.first = np.zeros(len(self.params), dtype=np.int64)
        numbers = [_coefficients(self, column, fresh) for column, fresh in distinct]
        self.bucket.coefficients = [number for number, _ in numbers]
        self.bucket.row = self.first if row is None else row
        new = np.array([values for _, values in numbers], dtype=np.float64).T.reshape(len(scalars), len(numbers))
        self.scalars = new if row is None else new[:, row]

    def _fresh(self) -> list[Fresh]:
        slots = {slot.name for slot in self.optimizer.slots}
        return [(not slots.isdisjoint(names), EMA.name in names) for names in self.made]

    def _compute_on_device(self, fresh: list[Fresh]) -> None:
        """Do so on the parameters' device, without reading anything from it."""
        optimizer, place = self.optimizer, self.bucket.device
        if self.device_scalars is None:
            device.refuse_new_work(optimizer)
            kernels = self.engine is gpu
            self.device_scalars = device.DeviceScalars(self.states, optimizer.scalars, place, by_kernel=kernels)
            self.fresh, self.fresh_average = (_flags_on(place, [each[i] for each in fresh]) for i in (0, 1))
        h = device.numbers_on(place, hyperparameters(self.group))
        scalars = dict(zip((s.name for s in optimizer.scalars), self.device_scalars.read(), strict=True))
        numbers, self.scalars = _numbers(self, h, scalars, (self.fresh, self.fresh_average))
        numbers |= {name: device.number_on(place, numbers[name]) for name in ("loss_scale", "step_clip")}
        self.bucket.coefficients = EachParameter(
            {name: numbers[name] for name in self.bucket.rule.coefficients}, len(self.params)
        )
        self.bucket.row = np.arange(len(self.params))
        found_inf = getattr(optimizer, "found_inf", None)
        self.bucket.found_inf = None if found_inf is None else found_inf.to(place, non_blocking=True)

    def forget_fresh(self) -> None:
        """Drop slots that were made for steps that have all been skipped, so that they are made anew."""
        for fresh, slots in ((self.fresh, self.optimizer.slots), (self.fresh_average, (EMA,))):
            if isinstance(fresh, Tensor):
                for state in compress(self.states, fresh.tolist()):
                    for slot in slots:
                        state.pop(slot.name, None)

    def _run_on_device(self, scalars: device.DeviceScalars) -> None:
        """Run, and count the step if it was taken."""
        found_inf = self.bucket.found_inf
        if self.engine is gpu or found_inf is None or not float(found_inf):
            self._run_engine()
            scalars.write(self.scalars, found_inf)
        if found_inf is None:
            self.fresh = self.fresh_average = False
        for fresh in (self.fresh, self.fresh_average):
            if isinstance(fresh, Tensor):
                fresh.logical_and_(cast("Tensor", found_inf != 0))

    def _run_engine(self) -> None:
        if self.sparse:
            _run_rows(self.engine, self.bucket)
        else:
            self.engine.run(self.bucket)

    def run(self) -> None:
        """Update the bucket's parameters and count the step."""
        if self.device_scalars:
            self._run_on_device(self.device_scalars)
        else:
            self._run_engine()
            self._count()
        self.part.sums, self.bucket.measured = self.bucket.measured, None
        self.made, self.scalars = [], None

    def let_go(self) -> None:
        """Forget the gradients."""
        self.bucket.grads, self.bucket.gradient_addresses = [], None
        if self.watch:
            self.watch.let_go()

    def _count(self) -> None:
        if self.watch:
            self.watch.write(self.scalars)
        else:
            write_scalars(self.states, self.optimizer.scalars, self.scalars)


def run_rule(optimizer: "Optimizer") -> None:
    """Step every parameter that has a gradient; a GradScaler's `found_inf` leaves everything as it is."""
    device.refuse_capture(optimizer)
    optimizer.whole_step.now.take_turn()
    if _is_skipped(optimizer):
        skip(optimizer)
        return
    kept: Kept = optimizer.__dict__.pop("_kept", None) or Kept()
    known = kept.works(optimizer)
    if known is None:
        for work in kept.found:
            work.forget_fresh()
            work.let_go()
    options = Options(optimizer) if known is None else None
    works = _new_works(optimizer) if known is None else known
    try:
        if not _prepare(optimizer, works):
            kept = kept if known is not None else Kept()  # what was kept has been found not to hold
        else:
            kept = kept if options is None else Kept.of(optimizer, options, works)
            for work in works:
                work.run()
    finally:
        for work in works:
            work.let_go()
    optimizer.__dict__["_kept"] = kept


def _is_skipped(optimizer: "Optimizer") -> bool:
    """Whether a GradScaler has found infinities, as far as the host is to know."""
    if (found_inf := getattr(optimizer, "found_inf", None)) is None:
        return False
    params = ((group, param) for group in optimizer.param_groups for param in group["params"])
    return not all(is_on_device(group, param) for group, param in params) and bool(found_inf)


def _new_works(optimizer: "Optimizer") -> list[Work]:
    """Make works with their state; whatever goes wrong, no state is left that was not there."""
    works = [work for group in optimizer.param_groups for work in _divide(optimizer, group)]
    try:
        for work in works:
            work.attach_state()
        _refuse_written_gradients(works)
    except BaseException:
        _undo(works)
        raise
    return works


def _prepare(optimizer: "Optimizer", works: "Sequence[Work]") -> bool:
    """Prepare a step and tell whether it is to be made; if not, for whatever reason, no state is left."""
    made = False
    try:
        made = _look_and_compute(optimizer, works)
    finally:
        if not made:
            _undo(works)
    return made


def _look_and_compute(optimizer: "Optimizer", works: "Sequence[Work]") -> bool:
    """Look at the gradients where that is asked for, and compute the numbers; tell whether the step is to be made."""
    now = optimizer.whole_step.now
    now.parts = [work.part for work in works]
    for work in works:
        work.part.gradients, work.part.clip, work.part.before, work.part.fresh = None, 1.0, None, None
        work.measure(now.measures)
        if work.engine is not gpu or not work.sparse:  # rows are gathered for it
            work.engine.prepare(work.bucket)
    if works and needs_reading(optimizer):
        for work in works:
            work.read()
        if not guard(optimizer, now.parts):
            return False
    for work in works:
        work.compute_numbers()
    return True


def _undo(works: "Sequence[Work]") -> None:
    """Take away the state that was made for a step that is not made."""
    for work in works:
        work.detach_state()


def _divide(optimizer: "Optimizer", group: dict[str, Any]) -> Iterator[Work]:
    """Make the buckets of a group, refusing what the rule or the chosen engine cannot do."""
    flags, algorithm = all_flags(optimizer, group), cast("Any", type(optimizer))
    of_rows = tuple((name, value and name != "ema") for name, value in flags)  # averages are of all rows
    works: dict[tuple[Any, ...], Work] = {}
    for param in group["params"]:
        if param.grad is None:
            continue
        grad = admissible_gradient(optimizer, group, param, flags)
        state = optimizer.state.get(param, {})
        held = [state.get(slot.name) for slot in slots_of(optimizer)]
        dtypes = tuple(None if slot is None else slot.dtype for slot in held)
        key = (param.device, param.dtype, grad.dtype, grad.layout, dtypes)
        if key not in works:
            rule = bind(algorithm, of_rows if grad.is_sparse else flags)
            params: list[Tensor] = []
            options = {name: group.get(name) for name in ENGINE_OPTIONS}
            bucket = Bucket(rule, [], [], options, row_name=functools.partial(_describe_row, group, params))
            part, sparse = Part(group, params), grad.is_sparse
            works[key] = Work(weakref.ref(optimizer), group, params, bucket, eager, part, sparse=sparse)
        works[key].params.append(param)
        works[key].bucket.params.append(to_local(param))
        works[key].bucket.slots.append([to_local(slot) for slot in held if slot is not None])
        works[key].bucket.grads.append(grad if grad.is_sparse else to_local(grad))
    for work in works.values():
        work.engine = choose(work.bucket)
        yield work


def _refuse_written_gradients(works: Sequence[Work]) -> None:
    """Refuse gradients that a step would change, since they share memory with what it writes.

    Raises:
        RuntimeError: a gradient does; the message names its parameter.
    """
    tensors: defaultdict[torch.device, list[tuple[Tensor, Work, int, bool]]] = defaultdict(list)
    for work in works:
        bucket = work.bucket
        columns = (bucket.params, *bucket.slots, *(() if work.sparse else (bucket.grads,)))
        for number, column in enumerate(columns):
            is_gradient = number > len(bucket.slots)
            rows = enumerate(column)
            tensors[bucket.device] += [(t, work, row, is_gradient) for row, t in rows if is_plain(t)]
    for found in tensors.values():
        of_gradient = [is_gradient for _, _, _, is_gradient in found]
        if (pair := shared_memory([tensor for tensor, *_ in found], of_gradient)) is not None:
            work, row = next(found[position][1:3] for position in pair if of_gradient[position])
            raise RuntimeError(
                f"the gradient of {work.bucket.row_name(row)} shares memory with parameters or state that the step "
                f"writes; give it memory of its own: p.grad = p.grad.clone()"
            )


def _describe_row(group: Mapping[str, Any], params: Sequence[Tensor], row: int) -> str:
    return describe(group, params[row])


def _distinct(
    values: np.ndarray, fresh: list[Fresh]
) -> tuple[list[tuple[tuple[float, ...], Fresh]], np.ndarray | None]:
    """Find the distinct columns of scalars, told apart by `fresh`, and where there are several, which a parameter has.

    An empty `fresh` means that nothing is.
    """
    first = fresh[0] if fresh else _NOT_FRESH
    if fresh.count(first) == len(fresh) and (not len(values) or (values == values[:, :1]).all()):
        return [(tuple(values[:, 0].tolist()), first)], None
    columns = list(zip(map(tuple, values.T.tolist()), fresh or [_NOT_FRESH] * values.shape[1], strict=True))
    index = {column: position for position, column in enumerate(dict.fromkeys(columns))}
    return list(index), np.array([index[column] for column in columns], dtype=np.int64)


def _coefficients(work: Work, values: tuple[float, ...], fresh: Fresh) -> tuple[Coefficients, list[float]]:
    """Compute the numbers of an update and the new scalars from the present scalars."""
    scalars = {s.name: value for s, value in zip(work.optimizer.scalars, values, strict=True)}
    if work.options is None:
        work.options = hyperparameters(work.group)
    numbers, new = _numbers(work, SimpleNamespace(**vars(work.options)), scalars, fresh)
    keep = bool(work.group.get("differentiable"))
    # What clips is computed on the device, which kernels there need not wait for.
    kept = work.bucket.rule.coefficients if keep else ("step_clip",) * (work.engine is gpu)
    coefficients = {name: _number(numbers[name], keep_tensors=name in kept) for name in work.bucket.rule.coefficients}
    return coefficients, [float(_number(value, keep_tensors=False)) for value in new]


def _numbers(
    work: Work, h: SimpleNamespace, scalars: dict[str, Any], fresh: tuple[Any, Any]
) -> tuple[dict[str, Any], list[Any]]:
    """Give every number that an update may read, and the new scalars: Python's numbers, or tensors if scalars are."""
    optimizer = work.optimizer
    if "step" in scalars:
        scalars["step"] = scalars["step"] + 1
    derived = optimizer.coefficients(h, **scalars)
    numbers = {"fresh": fresh[0], "loss_scale": getattr(optimizer, "grad_scale", None), **derived}
    numbers |= {"step_clip": work.part.clip, "step_ema_weight": _weight_of_average(work.group, fresh[1])}
    for name in work.bucket.rule.coefficients:
        if name not in numbers:
            numbers[name] = _given(work, h, name, numbers)
    return numbers, [derived.get(name, value) for name, value in scalars.items()]


def _given(work: Work, h: SimpleNamespace, name: str, numbers: Mapping[str, Any]) -> Any:
    """Give a hyperparameter that an update reads.

    Raises:
        RuleError: there is none of that name that is a number.
    """
    if not isinstance(value := getattr(h, name, None), _NUMBER):
        given = {known for known, value in vars(h).items() if isinstance(value, _NUMBER)}
        raise RuleError(
            f"{work.bucket.rule.name}.update reads c.{name}, which is neither a hyperparameter nor given by "
            f"`coefficients`; there are: {', '.join(sorted({*numbers, *given}))}"
        )
    return value


def _weight_of_average(group: Mapping[str, Any], fresh: Any) -> Any:
    """Give the weight of the stepped parameter in its average: all of it at first."""
    weight = 1 - (group.get("ema") or 0.0)
    return torch.where(fresh, 1.0, weight) if isinstance(fresh, Tensor) else 1.0 if fresh else weight


def _flags_on(place: torch.device, flags: list[bool]) -> Tensor | bool:
    """Put flags on a device; what all of them share is not copied, which would wait."""
    if len(set(flags)) == 1:
        return flags[0] and torch.full((len(flags),), True, device=place)
    return torch.tensor(flags, device=place) if flags else False


def _number(value: Any, *, keep_tensors: bool) -> Any:
    return value.detach().item() if isinstance(value, Tensor) and not keep_tensors else value


def _run_rows(engine: Engine, bucket: Bucket) -> None:
    """Run an engine on the rows at which coalesced sparse gradients have values."""
    if engine is cpu and cpu.run_rows(bucket):
        return
    # A gradient without sparse dimensions is its only row.
    index = [tuple(grad.indices()) or (torch.zeros(len(grad.values()), dtype=torch.long),) for grad in bucket.grads]
    whole = [
        [t if grad.sparse_dim() else t[None] for t, grad in zip(tensors, bucket.grads, strict=True)]
        for tensors in (bucket.params, *bucket.slots)
    ]
    params, *slots = [[t[i] for t, i in zip(tensors, index, strict=True)] for tensors in whole]
    values = [to_local(grad.values()) for grad in bucket.grads]
    engine.run(replace(bucket, params=params, grads=values, slots=slots, plan=None))
    for tensors, parts in zip(whole, (params, *slots), strict=True):
        for tensor, part, i in zip(tensors, parts, index, strict=True):
            tensor[i] = part
