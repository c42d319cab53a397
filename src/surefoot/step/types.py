"""The values that stages of a step hand on, beside `StepInput`, `StepContext` and `CustomRun`."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from surefoot.engines import Bucket, Engine
from surefoot.rule import AlgorithmSpec
from surefoot.state.formats import part_names
from surefoot.state.make import is_on_device
from surefoot.step.device import DeviceScalars
from surefoot.tensors.shards import to_local

Fresh = tuple[bool, bool]
"""Of a parameter: whether a slot of its algorithm was newly initialized, and whether its average was."""


class Transfers(Protocol):
    """Copies gradients to where parameters are stepped, and stepped parameters back, beside the step."""

    def bucket(self, param: Tensor) -> int:
        """Return the number of the bucket in which a parameter is copied."""

    def order(self, param: Tensor) -> int:
        """Return a rank by which parameters are stepped, the smaller the earlier their gradients have come."""

    def wait(self, params: Iterable[Tensor] | None = None) -> None:
        """Wait until gradients of parameters, of all by default, are there, and these may be written."""

    def send(self, params: Iterable[Tensor]) -> None:
        """Copy back parameters that have been stepped."""


@dataclass(eq=False)
class ParamSlice:
    """Parameters of one group in a step, and what was measured of them.

    Attributes:
        group: the param group.
        params: the parameters, n of them.
        gradients: sum of squares and largest absolute value of each gradient: float64 of shape (n, 2).
        clip: what the gradients are multiplied with: a number, a 0-d tensor, or float64 of shape (n,).
        sums: what `rule.TELEMETRY` names, of each parameter: float64 of shape (n, 5).
        before: copies of the parameters before the step, where updates cannot be measured while they are made.
        fresh: for each parameter whether its average is new, where averages are no part of the update.
    """

    group: dict[str, Any]
    params: list[Tensor]
    gradients: Tensor | None = None
    clip: Any = 1.0
    sums: Tensor | None = None
    before: list[Tensor] | None = None
    fresh: list[bool] | None = None

    @property
    def clips_each(self) -> bool:
        """Whether each gradient is multiplied with a number of its own."""
        return isinstance(self.clip, Tensor) and self.clip.dim() > 0

    def clip_of(self, position: int) -> Any:
        """Return what the gradient at a position is multiplied with."""
        return self.clip[position] if self.clips_each else self.clip


class PreparedParam(NamedTuple):
    """A parameter to be stepped by a custom step; its state is there, and its step counted when it is handed over."""

    h: SimpleNamespace
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    apart: bool = False
    """Whether its memory is another's too, so that it must be stepped by itself, in its turn."""


CustomStep = Callable[[list[PreparedParam]], None]
"""Steps prepared parameters."""


@dataclass(eq=False)
class Sampled:
    """Every n-th element of the parameters of a bucket, with the slots that are kept of these only.

    Attributes:
        bucket: copies of the elements of parameters, as values, and of gradients; and the slots.
        engine: the engine that runs it.
        every: n.
    """

    bucket: Bucket
    engine: Engine
    every: int

    def renew(self, run: "BucketRun") -> None:
        """Copy the elements once more from the bucket that they are of."""
        params, grads = sampled_elements(run, self.every)
        torch._foreach_copy_(self.bucket.params, params)
        torch._foreach_copy_(self.bucket.grads, grads)


def sampled_elements(run: "BucketRun", every: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return every n-th element of the parameters of a bucket, as values, and of their gradients."""
    grads = run.bucket.grads or list(map(to_local, run.grads()))
    takes = [functools.partial(_elements, every, param.is_complex()) for param in run.params]
    params = [run.bucket.value(row, take) for row, take in enumerate(takes)]
    return params, [take(grad) for take, grad in zip(takes, grads, strict=True)]


def _elements(every: int, in_pairs: bool, tensor: Tensor) -> Tensor:
    """Return every n-th element of a flattened tensor, of one of complex numbers as pairs."""
    return (tensor.flatten(0, -2) if in_pairs else tensor.flatten())[::every]


@dataclass(eq=False)
class BucketRun:
    """A bucket, what it comes from, and the engine that will run it.

    Attributes:
        spec: the algorithm.
        slice: its parameters.
        bucket: what the engine is handed.
        engine: the engine.
        sparse: whether the gradients are sparse.
        repeats: whether a bucket before it steps its parameters, or counts their steps, too.
        entries: the parameters' state.
        made: for each parameter the names of the state that was made for this step, and whether it was None before.
        scalars: the new scalars, not written yet.
        guard: what tells whether it can be used again.
        device_scalars: scalars that only the parameters' device knows.
        options: the group's hyperparameters as attributes, kept while they cannot have changed.
        shared_row: rows of coefficients where all parameters share one.
        new_numbers: the new values of slots that are numbers, not written yet: each of shape (n,).
        elements: how many real numbers each parameter has, once that was needed.
        sampled: the slots that are kept of some elements only, where there are such.
    """

    spec: AlgorithmSpec
    slice: ParamSlice
    bucket: Bucket
    engine: Engine
    sparse: bool = False
    repeats: bool = False
    entries: list[dict[str, Any]] = field(default_factory=list)
    made: list[dict[str, bool]] = field(default_factory=list)
    scalars: Any = None
    guard: Any = None
    device_scalars: DeviceScalars | None = None
    options: SimpleNamespace | None = None
    shared_row: np.ndarray | None = None
    new_numbers: list[Tensor] = field(default_factory=list)
    elements: Tensor | None = None
    sampled: Sampled | None = None

    @property
    def group(self) -> dict[str, Any]:
        """The param group."""
        return self.slice.group

    @property
    def params(self) -> list[Tensor]:
        """The parameters."""
        return self.slice.params

    @property
    def has_device_scalars(self) -> bool:
        """Return whether only the parameters' device knows their scalars."""
        return is_on_device(self.group, self.params[0]) and not self.group.get("differentiable")

    @property
    def is_unread(self) -> bool:
        """Return whether a step reads none of its numbers: they are on an accelerator, or steps may be captured."""
        return self.has_device_scalars or self.bucket.device.type not in ("cpu", "meta")

    def stored_names(self) -> list[str]:
        """Return the keys of what of the state an engine writes, in the order of the bucket's columns."""
        slots = self.bucket.rule.slots
        return [*(slot.name for slot in slots), *part_names(slots, self.bucket.formats)]

    def grads(self) -> list[Any]:
        """Return the gradients of now."""
        return [param.grad for param in self.slice.params]

    def derives_grads(self) -> bool:
        """Return whether it steps by other gradients than parameters hold: centralized, or dense instead of sparse."""
        sparse = not self.sparse and any(getattr(grad, "is_sparse", False) for grad in self.grads())
        return sparse or bool(self.group.get("gradient_centralization"))
