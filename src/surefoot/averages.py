"""Averages of tensors over time: a rule like any other.

The average takes the place of the parameter, the present value that of the gradient.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.dynamo import opaque
from surefoot.engines import Bucket, Engine, choose, cpu, gpu, proved
from surefoot.rule import AlgorithmSpec, bind
from surefoot.tensors.fit import unfit, unfit_memory
from surefoot.tensors.guards import make_dict_guard, make_guard
from surefoot.tensors.memory import PLAIN
from surefoot.tensors.shards import to_local

Tensors = Sequence[Tensor]


def _move(param: Tensor, grad: Tensor, c: Any, flags: Any) -> Any:  # noqa: ARG001 (a rule's arguments)
    """Move the average `param` towards the present value `grad`."""
    return torch.lerp(param, grad, c.weight)


AVERAGE = AlgorithmSpec("Average", update=_move)
"""Moves averages towards present values: `average += weight * (value - average)`."""


class Averager:
    """Averages many tensors in place: `averager(averages, values, updates)`.

    Args:
        weight: returns the weight of the present values, in [0, 1], for the number of updates so far.
    """

    def __init__(self, weight: Callable[[Any], float]) -> None:
        self.weight = weight

    @opaque
    def __call__(self, averages: Tensors, values: Tensors, updates: Any) -> None:
        """Move averages towards values; see `Averaging`."""
        Averaging(averages, values).move(self.weight(updates))


class Averaging:
    """Tensors made ready to be averaged, as often as one likes while `holds()`.

    Args:
        averages: tensors of any devices and dtypes; those of integers are averaged as real numbers and cut off.
        values: as many, of the same shapes and devices, of dtypes of their own.

    Raises:
        ValueError: a value does not fit its average.
        RuntimeError: the memory of a tensor is not there, or is shared by several averages.
    """

    def __init__(self, averages: Tensors, values: Tensors) -> None:
        pairs = list(zip(averages, values, strict=True))
        for position, (average, value) in enumerate(pairs):
            _refuse_unfit(position, average, value)
        self._others = [pair for pair in pairs if not (_is_real(pair[0]) and _is_real(pair[1]))]
        kinds: defaultdict[Any, Bucket] = defaultdict(lambda: Bucket(bind(AVERAGE, _FLAGS), [], [], {}))
        for average, value in pairs:
            if _is_real(average) and _is_real(value):
                bucket = kinds[average.device, average.dtype, value.dtype]
                bucket.params.append(to_local(average))
                bucket.grads.append(to_local(value))
        self._plain = all(type(tensor) in PLAIN and not tensor.is_complex() for pair in pairs for tensor in pair)
        for bucket in kinds.values():
            bucket.row_name = "average {}".format
            bucket.row = np.zeros(len(bucket.params), dtype=np.int64)
        chosen = ((proved(choose(bucket), bucket, bucket.rule), bucket) for bucket in kinds.values())
        self._runs: list[tuple[Engine, Bucket]] = list(chosen)
        for engine, bucket in self._runs:
            engine.prepare(bucket)
        self._guards: list[Any] | None = None

    def holds(self) -> bool:
        """Return whether the tensors are where and what they were at the last `move`, as far as that can be known."""
        return self._guards is not None and not any(guard.changed() for guard in self._guards)

    @torch.no_grad()
    def move(self, weight: float) -> None:
        """Move the averages by `weight`, in [0, 1], of the way to the values."""
        for engine, bucket in self._runs:
            bucket.coefficients = [{"weight": weight}]
            engine.run(bucket)
        for average, value in self._others:
            average.copy_(average * (1 - weight) + value * weight)

    def watch(self) -> None:
        """Let `holds` tell from now on; where the tensors cannot be watched, it stays false."""
        if self._plain and all(engine in (cpu, gpu) for engine, _ in self._runs):
            self._guards = [make_guard((bucket.params, bucket.grads)) for _, bucket in self._runs]


def _refuse_unfit(position: int, average: Tensor, value: Tensor) -> None:
    """Raise when a value cannot be averaged with an average as both are."""
    if (reason := unfit_memory(average)) is not None:
        raise RuntimeError(f"average {position} of shape {tuple(average.shape)} {reason}")
    if average._is_zerotensor() or average.is_conj() or average.layout is not torch.strided:
        raise ValueError(f"average {position} of shape {tuple(average.shape)} has no memory of its own; clone it")
    # Of integers and truth values there is no kind to disagree about, but that they are real.
    reason = unfit(value, average, average.shape, kinds=_is_real(average) and _is_real(value))
    if reason is None and value.is_complex() != average.is_complex():
        kind = "complex" if average.is_complex() else "real"
        reason = f"is {value.dtype}, must be {kind} as the average is {average.dtype}"
    if reason is not None:
        raise ValueError(f"value {position} {reason}")
    if (reason := unfit_memory(value, written=False)) is not None:
        raise RuntimeError(f"value {position} {reason}")


def watch_modules(*modules: nn.Module) -> Any:
    """Watch which tensors and submodules modules have: what is returned tells whether they have `changed`."""
    owners = [(part, name) for module in modules for part in module.modules() for name in _CONTENTS]
    return make_dict_guard([getattr(part, name) for part, name in owners], owners)


_CONTENTS = ("_parameters", "_buffers", "_modules")
_FLAGS = (("maximize", False),)


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
