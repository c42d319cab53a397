"""Steps as pure functions: parameters and state in, new ones out, and nothing is changed, as `torch.func` needs it.

Where a transform is active, or gradients are to flow, the rule is evaluated by torch's operations; otherwise copies are
stepped by the engine that a class would choose.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from surefoot.dynamo import opaque
from surefoot.functional.call import active, begins_with_nothing, rounds, run, step_input
from surefoot.functional.launch_cache import LaunchCache
from surefoot.optimizer import Optimizer
from surefoot.rule import EMA, AlgorithmSpec, Scalar
from surefoot.state.make import scalar_device
from surefoot.step.cache import is_constant
from surefoot.step.inputs import StepInput
from surefoot.step.pipeline import evaluate_step
from surefoot.step.types import BucketRun
from surefoot.tensors.modes import is_stand_in, mode_is_active
from surefoot.tensors.shards import is_sharded

Tensors = TypeVar("Tensors", Mapping[str, Tensor], Sequence[Tensor])
_AROUND = ("telemetry", "process_group", "zero_grad_after_step")


def init(optimizer_class: type[Optimizer], params: Any, **hyperparameters: Any) -> Any:
    """Return the state in which an optimizer of a class begins.

    Args:
        optimizer_class: a class of surefoot, or your own rule.
        params: a dict of tensors by name, or a sequence of tensors.
        hyperparameters: those of the class.

    Returns:
        For each parameter, in a dict or a sequence as `params` are, a dict of its state under the names that
        `optimizer.state[param]` has.  What begins as the first gradient, SGD's momentum buffer, or as
        the parameter, z of the schedule-free algorithms, is not there yet, and no other slot of these.
        What parameters share, and a class keeps in its groups, is there for each of them.

    Raises:
        ValueError: a hyperparameter is out of range, or the algorithm cannot optimize one of the tensors.

    Example:
        >>> state = surefoot.functional.init(surefoot.Adam, {"weight": torch.zeros(2)})
        >>> sorted(state["weight"])
        ['exp_avg', 'exp_avg_sq', 'step']
    """
    optimizer, group = _optimizer_and_group(optimizer_class, hyperparameters)
    tensors = _values(params)
    optimizer.check_params(tensors, group)
    made = [dict(_new_state(optimizer, group, param)) for param in tensors]
    return _as(params, made)


@opaque
def update(
    optimizer_class: type[Optimizer], params: Tensors, grads: Any, state: Any, **hyperparameters: Any
) -> tuple[Tensors, Any]:
    """Return the parameters after a step, and the state; what was given stays as it is.

    Under a transform of `torch.func` (`grad`, `vmap`, ...) every rule is differentiable and can be mapped, over
    parameters, gradients, state and hyperparameters that are tensors alike.  Elsewhere gradients flow if
    `differentiable=True`, and the step is made by the fastest engine.

    Args:
        optimizer_class: a class of surefoot that is a rule, Adafactor, Muon or SOAP, or your own rule.
        params: a dict of tensors by name, or a sequence of tensors.
        grads: the same of gradients; None leaves a parameter and its state as they are.
        state: what `init` or the last `update` has returned; what is missing of it begins with this step.
        hyperparameters: those of the class, and the options of `surefoot.StepOptions` that are about gradients and
            averages.

    Returns:
        `(params, state)`, in dicts or sequences as given.

    Raises:
        ValueError: a hyperparameter is out of range; or `grads` or `state` are not for the same parameters.
        TypeError: an option that has no place here.
        RuntimeError: a gradient or state does not fit its parameter; or a custom step is asked for under a transform.

    Example:
        >>> params, grads = {"weight": torch.ones(2)}, {"weight": torch.tensor([0.5, -0.5])}
        >>> state = surefoot.functional.init(surefoot.SGD, params)
        >>> params, state = surefoot.functional.update(surefoot.SGD, params, grads, state, lr=1.0)
        >>> params["weight"].tolist()
        [0.5, 1.5]
    """
    optimizer, group = _optimizer_and_group(optimizer_class, hyperparameters)
    given, named = _values(params), isinstance(params, Mapping)
    keys = list(params) if named else list(range(len(given)))
    optimizer.check_params(given, group)
    entries = [dict(entry) for entry in _in_order("state", state, keys, named=named)]
    names = [key if isinstance(key, str) else f"params[{key}]" for key in keys]
    every = _Rows(optimizer, group, given, _in_order("grads", grads, keys, named=named), entries, names)
    new_params, new_state = list(given), list(entries)
    for rows in rounds(given):
        step = every.at(rows)
        made = step.evaluated() if step.is_evaluated() else step.copied()
        for row, (param, entry) in zip(rows, made, strict=True):
            new_params[row], new_state[row] = param, entry
    return _as(params, new_params), _as(state, new_state)


def _optimizer_and_group(kind: type[Optimizer], hyperparameters: Mapping[str, Any]) -> tuple[Optimizer, dict[str, Any]]:
    """Return what lends its checks and its custom step, and the hyperparameters as those of a param group.

    Numbers that a transform hides are not checked.
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer) and (kind.is_rule() or kind.prepares_params)):
        raise TypeError(
            f"`optimizer_class` must be a class of surefoot that is a rule, Adafactor, Muon or SOAP, but is {kind!r}; "
            f"others have a custom step that changes their parameters in place"
        )
    if misplaced := sorted(set(_AROUND) & set(hyperparameters)):
        raise TypeError(f"`{misplaced[0]}` has no place in a pure function; give it to an optimizer, or leave it out")
    hidden = {name: value for name, value in hyperparameters.items() if any(map(_is_hidden, _parts(value)))}
    read = {name: value for name, value in hyperparameters.items() if name not in hidden}
    made: Callable[..., Optimizer] = kind
    known = all(map(is_constant, read.values()))
    optimizer = _made(made, tuple(read.items())) if known else made([{"params": []}], **read)
    # What a group takes from other options when it is made, it would take from options that are hidden here.
    return optimizer, {**optimizer.param_groups[0], **optimizer.defaults, **hidden}


@functools.lru_cache(maxsize=64)
def _made(kind: Callable[..., Optimizer], hyperparameters: tuple[tuple[str, Any], ...]) -> Optimizer:
    """Return an optimizer of constant hyperparameters, which says the same of them each time."""
    return kind([{"params": []}], **dict(hyperparameters))


@functools.lru_cache(maxsize=64)
def _launches(_: AlgorithmSpec) -> LaunchCache:
    """Return the launch cache of an algorithm."""
    return LaunchCache()


def _parts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and is_stand_in(value)


def _new_state(optimizer: Optimizer, group: Mapping[str, Any], param: Tensor) -> Iterator[tuple[str, Any]]:
    spec = optimizer.spec
    later = begins_with_nothing(spec, group)
    for shared in spec.group_scalars:
        yield shared.name, torch.as_tensor(group[shared.name], dtype=torch.float64, device=param.device)
    for each in active(spec, group):
        if isinstance(each, Scalar):
            yield each.name, each.new(group, scalar_device(group, param))
        elif each is not EMA and not later and each.shape_for(param, group) is not None:
            yield each.name, each.new(param, group)


# Parameters and what belongs to them


def _values(tensors: Any) -> list[Tensor]:
    """Return the tensors of a dict or a sequence.

    Raises:
        TypeError: it is neither.
    """
    found = list(tensors.values()) if isinstance(tensors, Mapping) else tensors
    if not isinstance(found, list | tuple) or not all(isinstance(each, Tensor) for each in found):
        raise TypeError(f"`params` must be a dict or a sequence of tensors, but is {type(tensors).__name__}")
    return list(found)


def _in_order(name: str, given: Any, keys: Sequence[Any], *, named: bool) -> list[Any]:
    """Return what belongs to each parameter, in their order.

    Raises:
        ValueError: `given` is not for the same parameters.
    """
    of_same_kind = isinstance(given, Mapping) if named else isinstance(given, list | tuple)
    known = set(given) if named and of_same_kind else set(range(len(given))) if of_same_kind else set()
    if not of_same_kind or known != set(keys):
        kind = "dict with the names" if named else "sequence with one entry for each"
        odd = ", ".join(sorted(map(str, known ^ set(keys))))
        shown = f"differs in {odd}" if of_same_kind else f"is {type(given).__name__}"
        raise ValueError(f"`{name}` must be a {kind} of `params`, but {shown}")
    return [given[key] for key in keys]


def _as(model: Any, values: Sequence[Any]) -> Any:
    """Return values in a dict or a sequence as that of the parameters is."""
    if isinstance(model, Mapping):
        return dict(zip(model, values, strict=True))
    return tuple(values) if isinstance(model, tuple) else list(values)


# Steps


class _Rows(NamedTuple):
    """Parameters of a step, with what belongs to them."""

    optimizer: Optimizer
    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor | None]
    entries: list[dict[str, Any]]
    names: list[str]

    def at(self, rows: Sequence[int]) -> "_Rows":
        """Return some of them."""
        params, grads = [self.params[row] for row in rows], [self.grads[row] for row in rows]
        entries, names = [self.entries[row] for row in rows], [self.names[row] for row in rows]
        return self._replace(params=params, grads=grads, entries=entries, names=names)

    def is_evaluated(self) -> bool:
        """Return whether the rule is evaluated rather than run on copies by an engine."""
        asked = mode_is_active() or bool(self.group.get("differentiable"))
        dense = all(grad is None or grad.layout is torch.strided for grad in self.grads)
        return self.optimizer.is_rule() and asked and dense and not any(map(is_sharded, self.params))

    def copied(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Step copies by an engine.

        Raises:
            RuntimeError: a transform hides the tensors, which only the operations of a rule can do with.
        """
        numbers = (part for value in self.group.values() for part in _parts(value))
        if any(map(_is_hidden, (*self.params, *self.grads, *numbers))):
            raise RuntimeError(
                f"{self.optimizer.spec.name} cannot be transformed by torch.func: it has a custom step, or a gradient "
                f"is sparse; call `update` outside of the transform, or take an elementwise algorithm"
            )
        carries = mode_is_active() or bool(self.group.get("differentiable"))
        params = [_copy(param, carries=carries) for param in self.params]
        entries = [{name: _copy(value, carries=carries) for name, value in entry.items()} for entry in self.entries]
        step = self._step(params, entries, self.group)
        with torch.set_grad_enabled(carries and torch.is_grad_enabled()):
            self._run(step, params, entries)
        shared = {scalar.name: step.groups[0][scalar.name] for scalar in step.spec.group_scalars}
        for grad, old, param, before in zip(self.grads, self.params, params, self.entries, strict=True):
            if grad is None:
                yield old, before | shared
            else:
                new = step.state.get(param, {}) | shared
                yield param if carries else param.requires_grad_(old.requires_grad), new

    def _run(self, step: StepInput, params: list[Tensor], entries: list[dict[str, Any]]) -> None:
        """Make a step in place, by a cached launch if one fits."""
        stored = active(step.spec, self.group) if self.optimizer.is_rule() else ()
        columns: list[list[Any]] = [[entry.get(each.name) for entry in entries] for each in stored]
        columns[:0] = params, self.grads
        launches = _launches(self.optimizer.spec)
        if not launches.step(step, columns):
            run(step, functools.partial(launches.keep, step, columns))

    def evaluated(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Evaluate the rule by torch's operations."""
        eager = {"differentiable": True, "foreach": False, "fused": None}
        step = self._step(self.params, [dict(entry) for entry in self.entries], self.group | eager)
        with step.stepping.context:
            found = {param: new for made, rows in evaluate_step(step) for param, new in _evaluated(made, rows)}
            told = {name: new for numbers in step.stepping.context.group_scalars for name, new in numbers.items()}
        for param, entry in zip(self.params, self.entries, strict=True):
            new_param, new = found.get(param, (param, entry))
            yield new_param, new | {name: _stored_scalar(value, entry.get(name, value)) for name, value in told.items()}

    def _step(self, params: list[Tensor], entries: list[dict[str, Any]], group: dict[str, Any]) -> StepInput:
        known = entries[0] if entries else {}
        shared = {each.name: known[each.name] for each in self.optimizer.spec.group_scalars if each.name in known}
        inside = {**group, **shared, "params": params, "param_names": self.names}
        state = dict(zip(params, entries, strict=True))
        return step_input(self.optimizer, inside, self.grads, state, self.optimizer.step_options)


def _copy(value: Any, *, carries: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if carries else value.detach().clone()


def _evaluated(
    made: BucketRun, rows: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Tensor, tuple[Tensor, dict[str, Any]]]]:
    """Yield each parameter of a bucket with its new value and its new state."""
    names = [slot.name for slot in made.bucket.rule.slots]
    numbers = list(zip(made.bucket.rule.number_slots, made.new_numbers, strict=True))
    for row, (param, entry, values, scalars) in enumerate(
        zip(made.params, made.entries, rows, made.scalars, strict=True)
    ):
        new = dict(entry) | {slot.name: found[row].to(entry[slot.name].dtype) for slot, found in numbers}
        for name, value in zip(names, values[1:], strict=False):
            new[name] = _stored(value, entry[name])
        for scalar, value in zip(made.bucket.rule.scalars, scalars, strict=True):
            new[scalar.name] = _stored_scalar(value, entry[scalar.name])
        yield param, (_stored(values[0], param), new)


def _stored(value: Tensor, old: Tensor) -> Tensor:
    """Return a new value in the dtype of the old one, complex where that is."""
    if old.is_complex():
        return torch.view_as_complex(value.to(old.dtype.to_real()).contiguous())
    return value.to(old.dtype)


def _stored_scalar(value: Any, old: Any) -> Any:
    if not isinstance(old, Tensor):
        return type(old)(value)
    return value.to(old.dtype) if isinstance(value, Tensor) else torch.full_like(old.detach(), value)
