"""The step that a thread is making; threads that step one optimizer take turns."""

import threading
from time import perf_counter
from typing import Any

from torch import Tensor

from surefoot.locks import Lock
from surefoot.step.types import ParamSlice


class StepContext(threading.local):
    """The step that a thread is making: each sees its own, and they take turns, so that none undoes another's.

    A turn begins when the closure, which may wait for other threads, has been called; it ends before callbacks and
    hooks are called.

    Attributes:
        lock: what they take turns by; an interrupted turn does not shut its own thread out.
        inside: whether the algorithm runs, so that a call of `step` is one of its base's.
        fast_lane_declined: whether the fast lane has declined this step.
        step: the step's number.
        slices: its parameters.
        wants_metrics: whether telemetry is to get something of it.
        skips: whether it changes nothing.
        left_out: parameters whose gradients hold inf or NaN, for which it has not been made: it is to be made without.
        group_scalars: for each group the new values of numbers that its parameters share.
        start: when it began.
    """

    def __init__(self, lock: Any) -> None:
        self.lock, self._holds = lock, False
        self.inside = self.fast_lane_declined = self.wants_metrics = self.skips = False
        self.slices: list[ParamSlice] = []
        self.left_out: list[Tensor] = []
        self.group_scalars: list[dict[str, Any]] = []
        self.step, self.start = 0, 0.0

    def begin(self) -> None:
        """Begin a step of which nothing is known yet."""
        self.slices, self.left_out, self.start = [], [], perf_counter()
        self.skips = self.wants_metrics = False

    def acquire(self) -> None:
        """Wait until no other thread is at the parameters."""
        if not self._holds:
            self.lock.acquire()
            self._holds = True

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False
        if self._holds:
            self._holds = False
            self.lock.release()

    def __reduce__(self) -> Any:
        return new_context, ()


def new_context() -> StepContext:
    """Return the context of an optimizer that makes no step."""
    return StepContext(Lock())
