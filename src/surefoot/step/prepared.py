"""Prepared parameters: what optimizers with a custom step take theirs from, with everything done around an update."""

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from torch import Tensor

from surefoot.rule import EMA
from surefoot.state.check import hyperparameters, validated_gradient
from surefoot.state.make import discard_state, ensure_state, is_on_device
from surefoot.step.clipping import clip_or_skip, measure_gradients, refuse_unmeasurable
from surefoot.step.device import numbers_on, refuse_capture, refuse_new_buckets
from surefoot.step.inputs import StepInput
from surefoot.step.ranks import due_exchange, failures_told, sums_over_ranks
from surefoot.step.types import ParamSlice
from surefoot.tensors.guards import make_dict_guard, make_guard, same_objects
from surefoot.tensors.memory import has_address, is_plain, shared_memory
from surefoot.tensors.shards import to_local


class PreparedParam(NamedTuple):
    """A parameter to be stepped by a custom step; its state is there, its step counted."""

    h: SimpleNamespace
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    apart: bool = False
    """Return whether its memory is another's too, so that it must be stepped by itself, in its turn."""


def prepare_params(step: StepInput) -> list[PreparedParam]:
    """Return every parameter that has a gradient, clipped and negated under `maximize`, with its state.

    All are checked first.  There are none in a step that is to be skipped.
    """
    refuse_capture(step.spec.name, step.groups)
    context = step.stepping.context
    context.acquire()
    exchange = due_exchange(step)
    with failures_told(step, exchange):
        known = _validated(step)
        context.slices = slices = [ParamSlice(part.group, part.params) for part in known.slices]
        grads = known.take_gradients()
        if step.needs_gradients():
            refuse_unmeasurable(step)
            for part, own in zip(slices, grads, strict=True):
                part.gradients = measure_gradients(own)
    sums = None if exchange is None else sums_over_ranks(step, exchange, slices)
    if step.needs_gradients() and (slices or sums) and not clip_or_skip(step, slices, sums):
        return []
    rows = _rows(step, known, slices, grads)
    known.watch(step)
    step.stepping.validated = known
    return _counted(rows)


def _validated(step: StepInput) -> "_Validated":
    """Return the parameters that are stepped, as the last step has found them fit or newly checked."""
    known, step.stepping.validated = step.stepping.validated, None
    if known is None or not known.holds(step):
        known = _Validated(step)
        if not all(step.state.get(param) for part in known.slices for param in part.params):
            refuse_new_buckets(step.spec.name)
    return known  # type: ignore[no-any-return]


def _rows(
    step: StepInput, known: "_Validated", slices: Sequence[ParamSlice], grads: Sequence[Sequence[Tensor]]
) -> list[PreparedParam]:
    """Make what is missing of the state and prepare all parameters; whatever goes wrong, no new state is left."""
    made: list[tuple[Tensor, dict[str, bool]]] = []
    try:
        for part in () if known.has_state else slices:
            slots = step.spec.active_slots(dict(step.spec.settle_flags(part.group)))
            for param in part.params:
                names = ensure_state(step.spec, part.group, param, step.state, slots)
                made.append((param, names))
        new = {param for param, names in made if EMA.name in names}
        return [row for part, own in zip(slices, grads, strict=True) for row in _prepared(step, known, part, own, new)]
    except BaseException:
        for param, names in made:
            discard_state(step.state, param, names)
        raise


def _counted(rows: Sequence[PreparedParam]) -> list[PreparedParam]:
    """Count the step of every parameter; one that is there twice has a count of its own each time."""
    repeated = {param for param, count in Counter(row.param for row in rows).items() if count > 1}
    found = []
    for row in rows:
        if "step" in row.state:
            row.state["step"] += 1
            if row.param in repeated:
                found.append(row._replace(state={**row.state, "step": deepcopy(row.state["step"])}))
                continue
        found.append(row)
    return found


class _Validated:
    """Parameters with gradients that were found fit, and whether they still are.

    Attributes:
        slices: the parameters of each group that has some.
        guards: what tells whether their tensors are as they were; None where that cannot be told.
        overlap: whether parameters or their state share memory.
    """

    def __init__(self, step: StepInput) -> None:
        self.slices, self._grads = [], []
        for group in step.groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                grads = [validated_gradient(step.spec, group, p, step.state.get(p, {})) for p in params]
                self.slices.append(ParamSlice(group, params))
                self._grads.append(grads)
        self.guards: list[Any] | None = None
        self._flags: list[Any] = []
        entries = [(p, step.state.get(p, {})) for part in self.slices for p in part.params]
        stored = [p for p, _ in entries]
        stored += [e[slot.name] for _, e in entries for slot in step.spec.slots if e.get(slot.name) is not None]
        self.overlap = (
            shared_memory([to_local(tensor) for tensor in stored if has_address(to_local(tensor))]) is not None
        )

    def take_gradients(self) -> list[list[Tensor]]:
        """Return the gradients of this step, and keep none."""
        grads: list[Any] = self._grads or [[p.grad for p in part.params] for part in self.slices]
        self._grads = []
        return grads

    def watch(self, step: StepInput) -> None:
        """Let `holds` tell from now on, where the memory of all tensors is what they mean."""
        if self.guards is not None:
            return
        rows: defaultdict[Any, list[tuple[Tensor, dict[str, Any]]]] = defaultdict(list)
        slots = [*(scalar.name for scalar in step.spec.scalars), *(slot.name for slot in step.spec.all_slots)]
        for part in self.slices:
            for param in part.params:
                entry = step.state.get(param, {})
                names = tuple(name for name in slots if entry.get(name) is not None)
                tensors: list[Any] = [param, param.grad, *(entry[name] for name in names)]
                if type(entry) is not dict or not all(isinstance(t, Tensor) and is_plain(t) for t in tensors):
                    return
                rows[names].append((param, entry))
        captured = any(group.get("capturable") for group in step.groups)
        if not rows or captured or type(step.state) not in (dict, defaultdict):
            return
        self.guards = [make_dict_guard([cast("dict[Any, Any]", step.state)])]
        for names, found in rows.items():
            entries = [entry for _, entry in found]
            columns = ([param for param, _ in found], *([entry[name] for entry in entries] for name in names))
            self.guards.append(make_guard(columns, entries, names, gradients=True))
        self._flags = [step.spec.settle_flags(group) for group in step.groups]
        self._params = [list(group["params"]) for group in step.groups]
        self._idle = [param for params in self._params for param in params if param.grad is None]
        self._groups, self._state = list(step.groups), step.state
        _release(self.guards)

    def holds(self, step: StepInput) -> bool:
        """Return whether everything is as it was but for values."""
        if self.guards is None or self._state is not step.state or not same_objects(self._groups, step.groups):
            return False
        same = all(same_objects(own, group["params"]) for own, group in zip(self._params, step.groups, strict=True))
        if not same or any(param.grad is not None for param in self._idle):
            return False
        if any(group.get("capturable") for group in step.groups) or any(guard.changed() for guard in self.guards):
            _release(self.guards)
            return False
        _release(self.guards)
        return self._flags == [step.spec.settle_flags(group) for group in step.groups]

    @property
    def has_state(self) -> bool:
        """Return whether all state is there, so that none needs to be made."""
        return self.guards is not None


def _release(guards: Sequence[Any]) -> None:
    for guard in guards[1:]:
        guard.release_grads()


def _prepared(
    step: StepInput, known: _Validated, part: ParamSlice, grads: Sequence[Tensor], new: set[Tensor]
) -> Iterator[PreparedParam]:
    """Yield the parameters of a group; `new` are those whose average is newly initialized."""
    group = part.group
    part.fresh = [param in new for param in part.params] if group.get("ema") else None
    part.before = [param.detach().clone() for param in part.params] if step.stepping.context.wants_metrics else None
    plain = hyperparameters(group)
    moved = functools.cache(lambda place: numbers_on(place, hyperparameters(group)))
    for param, grad in zip(part.params, grads, strict=True):
        h = moved(param.device) if is_on_device(group, param) or not param.is_cpu else plain
        yield PreparedParam(h, param, _seen(step, part, grad), step.state.get(param, {}), known.overlap)


def _seen(step: StepInput, part: ParamSlice, grad: Tensor) -> Tensor:
    """Return a gradient as an algorithm is to see it."""
    group = part.group
    grad = grad * part.clip if step.is_clipped(group) else grad
    if limit := group.get("max_grad_value"):
        grad = grad.clamp(-limit, limit)
    return -grad if group.get("maximize") else grad
