"""Scalars of many parameters as numbers of the host."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from surefoot.rule import STEP, Scalar


def read_scalars(states: Sequence[Mapping[str, Any]], scalars: Sequence[Scalar]) -> np.ndarray:
    """Return the scalars of several parameters: float64 of shape (scalars, parameters)."""
    rows = [[_value(scalar, state[scalar.name]) for state in states] for scalar in scalars]
    return np.array(rows, dtype=np.float64).reshape(len(scalars), len(states))


def write_scalars(states: Sequence[dict[str, Any]], scalars: Sequence[Scalar], values: np.ndarray) -> None:
    """Write the scalars of several parameters, in place where they are tensors.

    A step count in shared memory is not written but moved on by one: another process may have counted since it was
    read.

    Args:
        states: the parameters' state.
        scalars: what to write.
        values: of shape (scalars, parameters), or (scalars, 1) where parameters share them.
    """
    for scalar, row in zip(scalars, np.broadcast_to(values, (len(scalars), len(states))).tolist(), strict=True):
        for state, value in zip(states, row, strict=True):
            if isinstance(old := state[scalar.name], Tensor):
                if scalar.name == STEP.name and is_between_processes(old):
                    old.add_(1)
                else:
                    old.fill_(value)
            else:
                kind: Any = int if isinstance(old, int) else type(old) if isinstance(old, Real) else float
                state[scalar.name] = kind(value)


def is_between_processes(value: object) -> bool:
    """Return whether a scalar is a tensor that other processes may write, too."""
    if type(value) is not Tensor or not value.is_cpu:
        return False
    shared: bool = value.is_shared()  # type: ignore[no-untyped-call]
    return shared


def _value(scalar: Scalar, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if not isinstance(value, (Real, np.ndarray)):
        raise TypeError(f"state `{scalar.name}` must be a number or a tensor of one element, but is {value!r}")
    return float(value)
