"""The parameters of custom steps in the fast lane, where a step only counts and takes gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surefoot.rule import ROUNDING_STEP
from surefoot.state.check import hyperparameters
from surefoot.state.formats import param_format
from surefoot.step.custom_params import CustomParams, are_transformed, transformed
from surefoot.step.inputs import StepInput
from surefoot.step.types import CustomStep, ParamSlice, PreparedParam
from surefoot.tensors.native.guards import TensorGuard


class CustomLane:
    """Parameters of custom steps in the fast lane, such as `is_fit` takes.

    Attributes:
        guards: what guards their tensors.
        guarding: the launches of that.
        slices: the parameters of each group, and how their gradients are clipped.
        measures: what measures these by their addresses, if they are to be clipped.
    """

    def __init__(self, step: StepInput, params: CustomParams) -> None:
        self._params = params
        self.slices = [ParamSlice(part.group, part.params) for part in params.slices]
        self.measures = params.measures() if step.needs_gradients() else []
        self.guards: list[TensorGuard] = params.guards or []
        launches = [guard.launches() for guard in self.guards]
        self.guarding, self._releasing = [one for one, _ in launches], [other for _, other in launches if other]
        self._counts = [entry["step"] for own in params.entries for entry in own if "step" in entry]
        self.settle()

    def settle(self) -> None:
        """Take over the groups' options."""
        self._custom_step: CustomStep | None = None
        self._moves = self._params.moves
        self._hyperparameters = [hyperparameters(part.group) for part in self.slices]

    def take_numbers(self, numbers: Mapping[int, Mapping[str, Any]]) -> None:
        """Take over numbers among the options of groups, each by the id of its group, where these are settled."""
        for h, part in zip(self._hyperparameters, self.slices, strict=True):
            vars(h).update(numbers[id(part.group)])

    def launches_before(self) -> list[Any]:
        """Return what guards the tensors."""
        return self.guarding

    def launches_after(self, *, with_kernel: bool) -> list[Any]:  # noqa: ARG002 (there is none)
        """Return what is done before the step, which holds the gradients itself."""
        return self._releasing

    def release_grads(self) -> None:
        """Hold gradients no longer."""
        self._params.release_grads()

    def measure(self) -> None:
        """Measure the gradients."""
        for part, measure, addresses in zip(self.slices, self.measures, self._params.addresses(), strict=True):
            part.gradients = torch.from_numpy(measure(addresses))

    def step(self, make_step: Callable[[], Callable[[list[PreparedParam]], CustomStep]]) -> None:
        """Count the step of each parameter and make it; `make_step` is asked for the custom step at first only."""
        apart = self._params.overlap
        found = [
            PreparedParam(h, param, grad, entry, apart)
            for h, part, entries in zip(self._hyperparameters, self.slices, self._params.entries, strict=True)
            for param, grad, entry in zip(part.params, _gradients(part), entries, strict=True)
        ]
        if self._counts:
            torch._foreach_add_(self._counts, 1)
        if self._custom_step is None or self._moves != self._params.moves:
            self._custom_step, self._moves = make_step()(found), self._params.moves
        self._custom_step(found)


def _gradients(part: ParamSlice) -> Sequence[Tensor]:
    """Return gradients as they are handed over: the parameters' own unless they are clipped or transformed."""
    grads: Any = [param.grad for param in part.params]
    if part.clip != 1.0:
        grads = torch._foreach_mul(grads, part.clip)
    return [transformed(part.group, grad) for grad in grads] if are_transformed(part.group) else grads


def is_fit(step: StepInput, params: CustomParams) -> bool:
    """Return whether a step only counts and takes gradients, and compiled code guards and measures these."""
    if step.needs_gradients() and not params.measures():
        return False
    if params.repeated or any(part.group.get("ema") for part in params.slices):
        return False
    pairs = zip(params.slices, params.entries, strict=True)
    rows = ((part.group, *row) for part, entries in pairs for row in zip(part.params, entries, strict=True))
    native = bool(params.guards) and all(type(guard) is TensorGuard for guard in params.guards or ())
    return native and all(_only_counts(*row) for row in rows)


def _only_counts(group: Mapping[str, Any], param: Tensor, entry: Mapping[str, Any]) -> bool:
    """Return whether a step needs of a parameter's state no more than its count, on the host."""
    # Whether it is kept in a short format is decided by the state, whatever options say by now.
    plain = param.is_cpu and param_format(group, param, entry).is_plain and ROUNDING_STEP.name not in entry
    return plain and ("step" not in entry or isinstance(entry["step"], Tensor))
