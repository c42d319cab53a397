"""Prepared parameters: what optimizers with a custom step take theirs from, with everything done around an update."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from surefoot.engines.identity import identity_of
from surefoot.rule import EMA, ROUNDING_STEP, STEP
from surefoot.state.check import centralized, hyperparameters, validated_gradient
from surefoot.state.convert import plain_param
from surefoot.state.formats import CORRECTION, param_format
from surefoot.state.make import discard_state, ensure_state
from surefoot.step.cache import UNREAD, is_constant
from surefoot.step.clipping import measure_gradients
from surefoot.step.device import numbers_on, refuse_capture, refuse_new_buckets
from surefoot.step.inputs import StepInput
from surefoot.step.options import Stepping, check_changed
from surefoot.step.ranks import refuse_irregular
from surefoot.step.types import ParamSlice
from surefoot.storage import Format, encode, random_bits
from surefoot.tensors.guards import make_dict_guard, make_guard, same_objects
from surefoot.tensors.memory import has_address, is_plain, shared_memory
from surefoot.tensors.native.guards import DictGuard, LaunchSequence, TensorGuard, gradients_launch, lists_launch
from surefoot.tensors.shards import to_local

_OF_GRADIENTS = ("maximize", "max_grad_value", "gradient_centralization")
_OPTIONS, _FIRST_OF_TENSORS = 1, 5


class PreparedParam(NamedTuple):
    """A parameter to be stepped by a custom step; its state is there, its step counted."""

    h: SimpleNamespace
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    apart: bool = False
    """Return whether its memory is another's too, so that it must be stepped by itself, in its turn."""


class ValidatedParams(NamedTuple):
    """The parameters of custom steps in a step that is being made: checked, and not prepared yet.

    Attributes:
        known: what was found fit.
        slices: the parameters of each group that has some.
        grads: as many lists of their gradients.
        rows: the parameters, once they are prepared.
    """

    known: "_Validated"
    slices: list[ParamSlice]
    grads: list[list[Tensor]]
    rows: list[PreparedParam]

    def measure(self) -> None:
        """Measure the gradients."""
        for part, own in zip(self.slices, self.grads, strict=True):
            part.gradients = measure_gradients(own)

    def prepare(self, step: StepInput) -> None:
        """Make state, and prepare the parameters for what the gradients are multiplied with."""
        self.rows[:] = _rows(step, self.known, self.slices, self.grads)
        if step.grads is None:
            self.known.watch(step)
            step.stepping.validated = self.known

    def counted(self) -> list[PreparedParam]:
        """Count the step of every parameter and return the parameters."""
        return _counted(self.rows, self.known)


def validate_params(step: StepInput) -> ValidatedParams:
    """Return the parameters of custom steps that have a gradient, all of them checked; nothing is changed."""
    refuse_irregular(step)
    known = _validated(step)
    slices = [ParamSlice(part.group, part.params) for part in known.slices]
    return ValidatedParams(known, slices, known.take_gradients(), [])


def _validated(step: StepInput) -> "_Validated":
    """Return the parameters that are stepped, as the last step has found them fit or newly checked."""
    known, step.stepping.validated = step.stepping.validated, None
    if known is None or not known.holds(step):
        known = _Validated(step)
        if not all(step.state.get(param) for part in known.slices for param in part.params):
            refuse_new_buckets(step.spec.name)
    return known  # type: ignore[no-any-return]


Plan = Callable[[list[PreparedParam]], None]
"""Steps prepared parameters, those that it was made for and later ones that differ from them in values only."""


class UnchangedParams:
    """Parameters of a step before which nothing has changed but values, and that takes gradients as they are.

    Args:
        rows: hyperparameters, parameter and state of each.
        apart: whether parameters or their state share memory.
    """

    def __init__(self, rows: Sequence[tuple[SimpleNamespace, Tensor, dict[str, Any]]], *, apart: bool) -> None:
        self._rows, self._apart = rows, apart
        self._counts = [entry["step"] for *_, entry in rows if "step" in entry]
        self._plan: Plan | None = None

    def step(self, plan: Callable[[list[PreparedParam]], Plan]) -> None:
        """Count the step of each and make it, as the plan tells that is kept since the first time."""
        apart = self._apart
        found = [PreparedParam(h, param, param.grad, entry, apart) for h, param, entry in self._rows]  # type: ignore[arg-type]
        if self._counts:
            torch._foreach_add_(self._counts, 1)
        if self._plan is None:
            self._plan = plan(found)
        self._plan(found)


def unchanged_params(
    stepping: Stepping, groups: object, state: object, step: Callable[[], StepInput]
) -> UnchangedParams | None:
    """Return the parameters of a step before which nothing has changed, and that only counts; else None.

    The fast lane of custom steps: what it cannot do it leaves to the pipeline, with nothing changed.  To be called
    with the context's lock.

    Args:
        stepping: options and context.
        groups: the param groups of now.
        state: the state of now.
        step: return all that the step is about.
    """
    known = stepping.validated
    same = known is not None and known.common is not None and known.is_unchanged(groups, state, step)
    return known.common if same else None


def _rows(
    step: StepInput, known: "_Validated", slices: Sequence[ParamSlice], grads: Sequence[Sequence[Tensor]]
) -> list[PreparedParam]:
    """Make what is missing of the state and prepare all parameters; whatever goes wrong, no new state is left."""
    made: list[tuple[Tensor, dict[str, bool]]] = []
    try:
        for part in () if known.has_state else slices:
            spec = step.spec.of(part.group)
            flags = dict(spec.settle_flags(part.group)) | {"rounded": part.group.get("rounding") == "stochastic"}
            slots, scalars = spec.active_slots(flags), spec.active_scalars(flags)
            for param in part.params:
                names = ensure_state(scalars, part.group, param, step.state, slots)
                made.append((param, names))
        if made:
            known.entries = [[step.state.get(param, {}) for param in part.params] for part in slices]
        new = {param for param, names in made if EMA.name in names} if made else set()
        parts = zip(slices, grads, known.entries, known.options(step), strict=True)
        rows = [row for part in parts for row in _prepared(step, *part, new, apart=known.overlap)]
        if known.overlap:
            _refuse_short(rows)
    except BaseException:
        for param, names in made:
            discard_state(step.state, param, names)
        raise
    return rows


def _refuse_short(rows: Sequence[PreparedParam]) -> None:
    """Refuse parameters that are kept in short formats, where some share memory.

    Raises:
        RuntimeError: there is one.
    """
    if any(not param_format(vars(row.h), row.param, row.state).is_plain for row in rows):
        raise RuntimeError(
            "parameters or their state share memory, so that they cannot be kept with rounding='stochastic' or "
            "master_weight_bits; put them into a group without these options"
        )


def _counted(rows: list[PreparedParam], known: "_Validated") -> list[PreparedParam]:
    """Count the step of every parameter; one that is there twice has a count of its own each time."""
    for row in rows:
        if ROUNDING_STEP.name in row.state:
            row.state[ROUNDING_STEP.name] += 1
    counts = [row.state["step"] for row in rows if "step" in row.state]
    if not known.repeated and all(isinstance(count, Tensor) and is_plain(count) for count in counts):
        if counts:
            torch._foreach_add_(counts, 1)
        return rows
    found = []
    for row in rows:
        if "step" in row.state:
            row.state["step"] += 1
            if row.param in known.repeated:
                found.append(row._replace(state={**row.state, "step": deepcopy(row.state["step"])}))
                continue
        found.append(row)
    return found


@contextmanager
def full_precision_rows(step: StepInput, rows: Sequence[PreparedParam]) -> Iterator[list[PreparedParam]]:
    """Let a custom step see parameters that are kept in short formats as float32 copies; store these in the end."""
    copies: dict[Tensor, tuple[PreparedParam, Format, Tensor]] = {}
    for row in rows:
        kept = param_format(vars(row.h), row.param, row.state)
        if not kept.is_plain and row.param not in copies:
            copies[row.param] = row, kept, plain_param(vars(row.h), row.param, row.state).float()
    if not copies:
        yield list(rows)
        return
    yield [row._replace(param=copies[row.param][2]) if row.param in copies else row for row in rows]
    keys = step.keys()
    for param, (row, kept, value) in copies.items():
        random = None
        if kept.stochastic:
            who = identity_of(param, keys[param])
            counts = [row.state[name] for name in (STEP.name, ROUNDING_STEP.name) if name in row.state]
            count, local = counts[0], to_local(param)
            random = random_bits(vars(row.h).get("rounding_seed") or 0, who.number, count, who.numbers(local), 0)
        targets = (param, row.state[CORRECTION]) if kept.part else (param,)
        for target, stored in zip(targets, encode(kept, to_local(value), random), strict=True):
            to_local(target).copy_(stored)


class _Validated:
    """Parameters with gradients that were found fit, and whether they still are.

    Attributes:
        slices: the parameters of each group that has some.
        guards: what tells whether their tensors are as they were; None where that cannot be told.
        overlap: whether parameters or their state share memory.
        repeated: parameters that are there twice.
        entries: the state of the parameters of each group.
        common: the parameters, where a step only counts and takes gradients as they are.
    """

    def __init__(self, step: StepInput) -> None:
        self.slices, self._grads = [], []
        for group in [group for group in step.groups if step.spec.of(group).update is None]:
            spec = step.spec.of(group)
            found = [(param, step.gradient(param)) for param in group["params"]]
            params = [param for param, grad in found if grad is not None]
            if params:
                grads = [
                    validated_gradient(spec, group, p, grad, step.state.get(p, {}))
                    for p, grad in found
                    if grad is not None
                ]
                self.slices.append(ParamSlice(group, params))
                self._grads.append(grads)
        self.guards: list[Any] | None = None
        self._decided: list[Any] = []
        self._sequence: LaunchSequence | None = None
        self._options: list[SimpleNamespace] = []
        self.common: UnchangedParams | None = None
        self.entries = [[step.state.get(param, {}) for param in part.params] for part in self.slices]
        met = Counter(param for part in self.slices for param in part.params)
        self.repeated = {param for param, count in met.items() if count > 1}
        stored = [param for part in self.slices for param in part.params]
        for part, entries in zip(self.slices, self.entries, strict=True):
            slots = step.spec.of(part.group).slots
            stored += [entry[slot.name] for entry in entries for slot in slots if entry.get(slot.name) is not None]
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
        for part in self.slices:
            spec = step.spec.of(part.group)
            slots = [*(scalar.name for scalar in spec.scalars), *(slot.name for slot in spec.all_slots), CORRECTION]
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
        self._decided = _decided(step)
        self._params = [list(group["params"]) for group in step.groups]
        self._idle = [param for params in self._params for param in params if param.grad is None]
        self._groups, self._list, self._state = list(step.groups), step.groups, step.state
        _release(self.guards)
        self._compile(step)

    def _compile(self, step: StepInput) -> None:
        """Let one compiled call tell from now on, where that can be."""
        guards: list[Any] = self.guards or []
        if type(guards[0]) is not DictGuard or any(type(guard) is not TensorGuard for guard in guards[1:]):
            return
        lists, lists_kept = lists_launch([step.groups, *(group["params"] for group in step.groups)])
        idle, idle_kept = gradients_launch(self._idle)
        guarding, releasing = zip(*(guard.launches() for guard in guards[1:]), strict=True)
        self._kept, self._launches = (lists_kept, idle_kept), [lists, guards[0].launch, idle, *guarding, *releasing]
        self._guard_options(step)

    def _guard_options(self, step: StepInput) -> bool:
        """Take over the options; return whether they decide the same, and can change by being replaced only."""
        self._sequence, self._options, self.common = None, [], None
        named = (pair for group in step.groups for pair in group.items())
        if not all(name in UNREAD or is_constant(value) for name, value in named):
            return False
        if self._decided != _decided(step):
            return False
        self._options = [hyperparameters(part.group) for part in self.slices]
        self._guard = DictGuard([*step.groups, vars(step.stepping.options)])
        self._sequence = LaunchSequence([self._guard.launch, *self._launches])
        if any(group.get("capturable") for group in step.groups):
            return False
        self._find_common(step)
        return True

    def _find_common(self, step: StepInput) -> None:
        """Note what a step takes that only counts."""
        rows = [
            (h, param, entry)
            for h, part, entries in zip(self._options, self.slices, self.entries, strict=True)
            for param, entry in zip(part.params, entries, strict=True)
        ]
        around = (*_OF_GRADIENTS, "ema")
        asked = any(part.group.get(name) for part in self.slices for name in around)
        # What the state has decides, whatever options say by now.
        short = any(not param_format(vars(h), param, entry).is_plain for h, param, entry in rows)
        if (
            asked
            or short
            or any(ROUNDING_STEP.name in entry for *_, entry in rows)
            or step.stepping.options.requested()
            or step.needs_gradients()
            or self.repeated
            or not all(param.is_cpu for _, param, _ in rows)
        ):
            return
        if all(isinstance(entry["step"], Tensor) for *_, entry in rows if "step" in entry):
            self.common = UnchangedParams(rows, apart=self.overlap)

    def options(self, step: StepInput) -> list[SimpleNamespace]:  # noqa: ARG002
        """Return the hyperparameters of each group."""
        return self._options or [hyperparameters(part.group) for part in self.slices]

    def holds(self, step: StepInput) -> bool:
        """Return whether everything is as it was but for values."""
        if self._sequence is None or step.groups is not self._list or step.state is not self._state:
            self._options, self.common = [], None
            return self._hold(step)
        found = self._look()
        if found == _OPTIONS and self._guard_options(step):
            found = self._look()
        if found == _OPTIONS:
            self._options, self.common = [], None
            return self._hold(step)
        return not found

    def is_unchanged(self, groups: object, state: object, step: Callable[[], StepInput]) -> bool:
        """Return whether a compiled call finds everything as it was, but for options that decide the same."""
        if self._sequence is None or groups is not self._list or state is not self._state:
            return False
        found = self._look()
        if found == _OPTIONS:
            now = step()
            refuse_capture(now.spec.name, now.groups)
            check_changed(now.stepping, now.spec, now.groups)
            return self._guard_options(now) and self.common is not None and not self._look()
        return not found

    def _look(self) -> int:
        """Return the number of what has changed, from 1, or 0; gradients are held no longer."""
        found = self._sequence.run() if self._sequence else _OPTIONS
        if found:
            for guard in (self.guards or ())[1:]:
                guard.note(changed=found >= _FIRST_OF_TENSORS)
            _release(self.guards or ())
        if found >= _FIRST_OF_TENSORS:
            # For good: a guard that looks again compares with what it has seen now.
            self.guards, self._sequence, self.common = None, None, None
        return found

    def _hold(self, step: StepInput) -> bool:
        """Return what `holds` does, whatever is compiled."""
        if self.guards is None or self._state is not step.state or not same_objects(self._groups, step.groups):
            return False
        same = all(same_objects(own, group["params"]) for own, group in zip(self._params, step.groups, strict=True))
        if not same or any(param.grad is not None for param in self._idle):
            return False
        if any(group.get("capturable") for group in step.groups) or any(guard.changed() for guard in self.guards):
            _release(self.guards)
            return False
        _release(self.guards)
        return self._decided == _decided(step)

    @property
    def has_state(self) -> bool:
        """Return whether all state is there, so that none needs to be made."""
        return self.guards is not None


def _decided(step: StepInput) -> list[Any]:
    """Return what of the groups' options decides which parameters and state are fit: flags, and no real numbers."""
    found = []
    for group in step.groups:
        spec = step.spec.of(group)
        found.append((spec, spec.settle_flags(group), {n: value for n, value in group.items() if _is_discrete(value)}))
    return found


def _is_discrete(value: object) -> bool:
    return is_constant(value) and not any(type(each) is float for each in (value if type(value) is tuple else (value,)))


def _release(guards: Sequence[Any]) -> None:
    for guard in guards[1:]:
        guard.release_grads()


def _prepared(
    step: StepInput,
    part: ParamSlice,
    grads: Sequence[Tensor],
    entries: Sequence[dict[str, Any]],
    plain: SimpleNamespace,
    new: set[Tensor],
    *,
    apart: bool,
) -> list[PreparedParam]:
    """Return the parameters of a group; `new` are those whose average is newly initialized."""
    group = part.group
    part.fresh = [param in new for param in part.params] if group.get("ema") else None
    part.before = [param.detach().clone() for param in part.params] if step.stepping.context.wants_metrics else None
    if step.grad_scale is not None or step.is_clipped(group) or any(map(group.get, _OF_GRADIENTS)):
        grads = [_seen(step, part, grad, part.clip_of(position)) for position, grad in enumerate(grads)]
    rows = zip(part.params, grads, entries, strict=True)
    if not group.get("capturable") and all(param.is_cpu for param in part.params):
        return [PreparedParam(plain, *row, apart) for row in rows]
    moved = functools.cache(lambda place: numbers_on(place, hyperparameters(group)))
    on_host = not group.get("capturable")
    return [PreparedParam(plain if on_host and row[0].is_cpu else moved(row[0].device), *row, apart) for row in rows]


def _seen(step: StepInput, part: ParamSlice, grad: Tensor, clip: Any) -> Tensor:
    """Return a gradient as an algorithm is to see it, multiplied with `clip`."""
    group = part.group
    grad = grad if step.grad_scale is None else grad / step.grad_scale
    grad = grad * clip if step.is_clipped(group) else grad
    if group.get("gradient_centralization"):
        grad = centralized(grad)
    if limit := group.get("max_grad_value"):
        grad = grad.clamp(-limit, limit)
    return -grad if group.get("maximize") else grad
