"""How a function that steps lists of tensors is made from an algorithm: what each of its arguments is.

A function is declared by its arguments alone, and where torch has no such function they follow from the class.  Which
of them are slots, scalars and hyperparameters is read from the class, and a call hands them to the step that the class
would make.  What a call keeps for the next is in `launch_cache`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import torch
from torch import Tensor

from surefoot import optimizers
from surefoot.dynamo import opaque
from surefoot.functional.call import Stored, active, begins_with_nothing, rounds, run, step_input
from surefoot.functional.launch_cache import LaunchCache
from surefoot.optimizer import Optimizer
from surefoot.rule import Scalar, Slot
from surefoot.rule.spec import ENGINE_OPTIONS, STORAGE_OPTIONS
from surefoot.state.make import is_on_device
from surefoot.step.options import StepOptions

Given = ParamSpec("Given")

_LISTS: Mapping[str, tuple[str, ...]] = {
    "step": ("state_steps",),
    "sum": ("state_sums",),
    "variance": ("variances",),
    "momentum_buffer": ("momentum_buffer_list", "muon_momentum_bufs"),
}
"""What the list of a slot or scalar may be called, where that is not its name with an s."""
_TUPLES: Mapping[str, tuple[str, ...]] = {
    "betas": ("beta1", "beta2", "beta3"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
    "eps": ("eps1", "eps2"),
}
"""The hyperparameters that come number by number."""
_ENGINE_OPTIONS: Mapping[str, Any] = {
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "grad_scale": None,
    "found_inf": None,
    "has_complex": False,
}
"""What functions take by position after the lists, and what that is if it is not given."""


def steps_lists(name: str) -> Callable[[Callable[Given, dict[str, Any]]], Callable[Given, None]]:
    """Return a decorator that makes a step on lists of a declaration, which returns its arguments by name."""

    def made(declared: Callable[Given, dict[str, Any]]) -> Callable[Given, None]:
        @functools.cache
        def arguments() -> Arguments:
            return Arguments.of(getattr(optimizers, name), list(inspect.signature(declared).parameters))

        @functools.wraps(declared)
        @opaque
        def step_lists(*args: Given.args, **kwargs: Given.kwargs) -> None:
            arguments().step(declared(*args, **kwargs))

        return step_lists

    return made


def function_of(name: str) -> Callable[..., None]:
    """Return the function of an algorithm that torch does not have, with arguments that follow from its class."""
    signature = inspect.Signature(list(_parameters(getattr(optimizers, name))))

    def declared(*args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    declared.__name__ = declared.__qualname__ = optimizers.function_name(name)
    declared.__doc__ = _documentation(name)
    declared.__module__ = "surefoot.functional"
    declared.__signature__ = signature  # type: ignore[attr-defined]
    return steps_lists(name)(declared)


def _documentation(name: str) -> str:
    """Return the docstring of an algorithm's function, with what its lists begin as where that is not zeros."""
    optimizer = getattr(optimizers, name)([torch.zeros(1, 1)])
    spec, group = optimizer.spec, optimizer.param_groups[0]
    stored, none_at_first = active(spec, group), begins_with_nothing(spec, group)
    text = [f"Take a step of `surefoot.{name}` on lists, in place, with the gradients as they are."]
    if none_at_first:
        slots = " and ".join(f"`{_list_names(each)[0]}`" for each in stored if isinstance(each, Slot))
        text += [f"At a parameter's first step its entry in {slots} is None, and is replaced by what the step makes."]
    known = [each for each in stored if each.init != 0 and not (none_at_first and isinstance(each, Slot))]
    if begin := [f"`{_list_names(each)[0]}` begin as {_beginning(each, group)}" for each in known]:
        text += [f"{', '.join(begin)}; all others as zeros."]
    return "\n\n    ".join(text)


def _beginning(stored: Stored, group: Mapping[str, Any]) -> str:
    """Return what an entry of state begins as, for documentation."""
    if callable(stored.init):
        return f"the class has it ({stored.init(group)} by default)"
    return f"`{stored.init}`" if isinstance(stored.init, str) else f"{stored.init:g}"


def _list_names(stored: Stored) -> tuple[str, ...]:
    """Return what the list of a slot or scalar may be called."""
    return _LISTS.get(stored.name, (f"{stored.name}s",))


def _parameters(kind: type[Optimizer]) -> Iterator[inspect.Parameter]:
    """Yield the arguments of an algorithm's function: lists, options of engines, and by keyword hyperparameters."""
    spec, given = kind.spec, inspect.Parameter.POSITIONAL_OR_KEYWORD
    stored: tuple[Stored, ...] = (*spec.slots, *spec.active_scalars({}))
    for name in ("params", "grads", *(_list_names(each)[0] for each in stored)):
        yield inspect.Parameter(name, given)
    for name, default in _ENGINE_OPTIONS.items():
        yield inspect.Parameter(name, given, default=default)
    around = {*ENGINE_OPTIONS, *STORAGE_OPTIONS, *StepOptions.__annotations__}
    for name, default in spec.constructor.items():
        for part in () if name in around else _names_of(name, default) or (name,):
            yield inspect.Parameter(part, inspect.Parameter.KEYWORD_ONLY)
    for scalar in spec.group_scalars:
        yield inspect.Parameter(scalar.name, inspect.Parameter.KEYWORD_ONLY)


def _names_of(whole: str, value: Any) -> tuple[str, ...]:
    """Return what the numbers of a hyperparameter are called if it is a tuple that comes number by number."""
    return _TUPLES.get(whole, ())[: len(value)] if isinstance(value, tuple) else ()


@dataclass(frozen=True)
class Arguments:
    """What the arguments of a function are.

    Attributes:
        optimizer: one of the algorithm's class, for its defaults, its checks and a custom step.
        grads: the name of the list of gradients.
        lists: for each slot and scalar the name of its list.
        tuples: for each hyperparameter that is a tuple the names of its numbers.
        options: the names of the other hyperparameters and of engine options.
        launches: what calls keep.
    """

    optimizer: Optimizer
    grads: str
    lists: Mapping[Stored, str]
    tuples: Mapping[str, tuple[str, ...]]
    options: tuple[str, ...]
    launches: LaunchCache = field(default_factory=LaunchCache)

    @classmethod
    def of(cls, kind: Callable[..., Optimizer], names: Sequence[str]) -> "Arguments":
        """Return what arguments of these names are to an algorithm."""
        optimizer = kind([torch.zeros(1, 1)])
        stored: tuple[Stored, ...] = (*optimizer.spec.slots, *optimizer.spec.active_scalars({}))
        candidates = {each: [name for name in _list_names(each) if name in names] for each in stored}
        # A slot that exists only by an option that the function does not take has no list.
        lists = {e: found[0] for e, found in candidates.items() if found or e.when in (None, *names)}
        found = {whole: _names_of(whole, value) for whole, value in optimizer.defaults.items()}
        tuples = {whole: parts for whole, parts in found.items() if parts and set(parts) <= set(names)}
        known = {*optimizer.defaults, *(scalar.name for scalar in optimizer.spec.group_scalars)} - {*lists.values()}
        return cls(optimizer, names[1], lists, tuples, tuple(name for name in names if name in known))

    def step(self, given: Mapping[str, Any]) -> None:
        """Step the parameters of a call."""
        group = self._group(given)
        stored = active(self.optimizer.spec, group)
        scale, found_inf = given.get("grad_scale"), given.get("found_inf")
        known = step_input(self.optimizer, group, (), {})._replace(grad_scale=scale, found_inf=found_inf)
        if self.launches.step(known, self._columns(given, stored)):
            return
        self._check_lists(given, group, stored)
        with torch.set_grad_enabled(bool(group.get("differentiable")) and torch.is_grad_enabled()):
            grads = given[self.grads]
            if found_inf is not None and self._must_know(given, stored) and float(found_inf):
                return
            if scale is not None and not self.optimizer.is_rule():
                grads, scale = [None if grad is None else grad / scale for grad in grads], None
            for rows in self._rounds(given["params"]):
                self._step_rows(given, group, stored, rows, [grads[row] for row in rows], (scale, found_inf))

    def _columns(self, given: Mapping[str, Any], stored: Sequence[Stored]) -> list[Sequence[Any]]:
        """Return the lists of a call: parameters, gradients, slots and scalars."""
        return [given["params"], given[self.grads], *(given[self.lists[each]] for each in stored)]

    def _group(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters of a call as those of a param group, checked."""
        group = self.optimizer.defaults | {name: given[name] for name in self.options}
        group |= {whole: tuple(given[part] for part in parts) for whole, parts in self.tuples.items()}
        self.optimizer.check_group(group)
        return group

    def _check_lists(self, given: Mapping[str, Any], group: Mapping[str, Any], stored: Sequence[Stored]) -> None:
        """Refuse lists of another length than `params`, and entries that a step cannot update.

        Raises:
            ValueError: a list is too long or too short, a slot is None that the algorithm cannot begin without, or a
                parameter is none that it can optimize.
            TypeError: a scalar is not of the type that the function takes.
            RuntimeError: a scalar is not on the device where the step needs it.
        """
        params = given["params"]
        for name in (self.grads, *(self.lists[each] for each in stored)):
            if len(given[name]) != len(params):
                raise ValueError(
                    f"`{name}` must have one entry for each of {len(params)} params, but has {len(given[name])}"
                )
        self.optimizer.check_params(params, group)
        for scalar in self.optimizer.spec.group_scalars:
            if not isinstance(value := group[scalar.name], Tensor) or value.dim():
                raise TypeError(
                    f"`{scalar.name}` must be a 0-d tensor, which the step updates in place, but is {value!r}"
                )
        for each in stored:
            for row, value in enumerate(given[self.lists[each]]):
                if value is None and isinstance(each, Slot):
                    self._check_missing(each, params[row], group, row)
                elif isinstance(each, Scalar):
                    self._check_scalar(each, value, params[row], group, row)

    def _check_missing(self, slot: Slot, param: Tensor, group: Mapping[str, Any], row: int) -> None:
        shape = slot.shape_for(param, group)
        if shape is not None and not begins_with_nothing(self.optimizer.spec, group):
            raise ValueError(
                f"`{self.lists[slot]}[{row}]` must be a tensor of shape {tuple(shape)}, but is "
                f"None; give what the first step begins from, such as zeros"
            )

    def _check_scalar(self, scalar: Scalar, value: Any, param: Tensor, group: Mapping[str, Any], row: int) -> None:
        name = f"{self.lists[scalar]}[{row}]"
        if scalar.integer:
            if not isinstance(value, int) or value < 1:
                raise TypeError(f"`{name}` must be an int >= 1, the number of this step, but is {value!r}")
        elif not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a 0-d tensor, which the step updates in place, but is {value!r}")
        elif value.device != param.device and is_on_device(group, param):
            raise RuntimeError(
                f"`{name}` must be on {param.device} with capturable=True or fused=True, but is on {value.device}"
            )

    def _rounds(self, params: Sequence[Tensor]) -> Iterator[list[int]]:
        found = list(rounds(params))
        if len(found) > 1 and self.optimizer.spec.group_scalars:
            raise ValueError(
                f"`params` has a tensor twice, but {self.optimizer.spec.name} adds up over all at once; leave one out"
            )
        yield from found

    def _must_know(self, given: Mapping[str, Any], stored: Sequence[Stored]) -> bool:
        """Return whether the host must know of infinities: where slots begin in this step, or the step is custom."""
        slots = [given[self.lists[each]] for each in stored if isinstance(each, Slot)]
        return not self.optimizer.is_rule() or any(value is None for slot in slots for value in slot)

    def _step_rows(
        self,
        given: Mapping[str, Any],
        group: dict[str, Any],
        stored: Sequence[Stored],
        rows: Sequence[int],
        grads: Sequence[Tensor | None],
        scaling: tuple[Any, Any],
    ) -> None:
        """Step parameters of which none stands there twice, and put what was made into the lists."""
        params = [given["params"][row] for row in rows]
        state: dict[Tensor, dict[str, Any]] = {}
        for row, param in zip(rows, params, strict=True):
            entry = {each.name: given[self.lists[each]][row] for each in stored}
            state[param] = {name: value for name, value in entry.items() if value is not None}
        for scalar in self.optimizer.spec.scalars:
            if scalar.integer:  # the caller counts these
                for entry in state.values():
                    entry[scalar.name] -= 1
        inside = {**group, "params": params, "param_names": [f"params[{row}]" for row in rows]}
        step = step_input(self.optimizer, inside, grads, state)
        step = step._replace(grad_scale=scaling[0], found_inf=scaling[1])
        run(step, functools.partial(self.launches.keep, step, self._columns(given, stored)))
        for slot in (each for each in stored if isinstance(each, Slot)):
            for row, param in zip(rows, params, strict=True):
                if given[self.lists[slot]][row] is None and slot.name in state[param]:
                    given[self.lists[slot]][row] = state[param][slot.name]
