"""Timing every optimizer's steps, whoever's the optimizer is, through torch's global hooks; closures do not count."""

import functools
import sys
import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from surefoot.locks import in_forked_children
from surefoot.optimizer import Optimizer
from surefoot.run import swap


@dataclass(eq=False)
class Watched:
    """What is known of an optimizer that took a step.

    Attributes:
        algorithm: its class.
        shapes: shape, dtype and device of its parameters, as its first step found them.
        options: its hyperparameters.
        groups: how many parameter groups there were.
        engines: who runs it and why, see `Engine`.
        custom_step: why there is no choice of an engine, or None.
        seconds: the time of each step.
        telemetry: the file of its telemetry, or None.
    """

    algorithm: type
    shapes: list[tuple[tuple[int, ...], torch.dtype, str]]
    options: dict[str, Any]
    groups: int
    engines: list[Any] = field(default_factory=list)
    custom_step: str | None = None
    seconds: "array[float]" = field(default_factory=lambda: array("d"))
    telemetry: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the algorithm is surefoot's, or made from it."""
        return issubclass(self.algorithm, Optimizer)

    @property
    def elements(self) -> int:
        """Elements of all parameters."""
        return sum(torch.Size(shape).numel() for shape, _, _ in self.shapes)


@dataclass(eq=False)
class _Running:
    """A step that has begun."""

    optimizer: Any
    caller: int
    start: float
    in_closure: float = 0.0


class _Threads(threading.local):
    """The steps that have begun in a thread, the outermost first."""

    def __init__(self) -> None:
        self.running: list[_Running] = []


found: list[Watched] = []
"""All optimizers that took a step, in the order of their first."""
total = array("d", [0.0])
"""Seconds in steps, those within another step not counted twice."""
_by_optimizer: WeakKeyDictionary[Any, Watched] = WeakKeyDictionary()
_threads = _Threads()
_hooks: list[RemovableHandle] = []


def start() -> None:
    """Watch every step of this process; a forked child starts from nothing."""
    _hooks.extend((register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)))
    in_forked_children(_forget)


def stop() -> None:
    """Watch no further steps; what was found stays."""
    while _hooks:
        _hooks.pop().remove()


def _forget() -> None:
    found.clear()
    _by_optimizer.clear()
    total[0] = 0.0


def _before(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():
        return None
    frame: Any = sys._getframe(1)
    running = _threads.running
    while running and not _is_within(frame.f_back, running[-1].caller):
        running.pop()  # it has raised
    running.append(_Running(optimizer, id(frame), perf_counter()))
    return _with_timed_closure(running[-1], args, kwargs)


def _is_within(frame: Any, caller: int) -> bool:
    while frame is not None:
        if id(frame) == caller:
            return True
        frame = frame.f_back
    return False


def _with_timed_closure(running: _Running, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments of a step with its closure, if it has one, wrapped in a clock."""
    if callable(kwargs.get("closure")):
        return args, kwargs | {"closure": _timed(kwargs["closure"], running)}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _timed(args[1], running), *args[2:]), kwargs
    return None


def _timed(closure: Callable[[], Any], running: _Running) -> Callable[[], Any]:
    @functools.wraps(closure)
    def timed() -> Any:
        start = perf_counter()
        try:
            return closure()
        finally:
            running.in_closure += perf_counter() - start

    return timed


def _after(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001 (torch's signature)
    end = perf_counter()
    running = _threads.running
    if not running or running[-1].optimizer is not optimizer:
        return
    step = running.pop()
    if any(outer.optimizer is optimizer for outer in running):  # a step that calls its base's
        return
    seconds = end - step.start - step.in_closure
    if not running:
        total[0] += seconds
    if optimizer not in _by_optimizer:
        _by_optimizer[optimizer] = _watched(optimizer)
        found.append(_by_optimizer[optimizer])
    _by_optimizer[optimizer].seconds.append(seconds)


def _watched(optimizer: Any) -> Watched:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    shapes = [(tuple(param.shape), param.dtype, param.device.type) for param in params]
    options = {name: value for name, value in optimizer.param_groups[0].items() if name in optimizer.defaults}
    watched = Watched(type(optimizer), shapes, options, len(optimizer.param_groups))
    watched.telemetry = swap.files.get(optimizer)
    if watched.is_ours:
        _ask_engines(watched, optimizer)
    return watched


def _ask_engines(watched: Watched, optimizer: Optimizer) -> None:
    from surefoot.explain import choices  # noqa: PLC0415 (on the first step)

    if not optimizer.is_rule():
        watched.custom_step = "a custom step, in torch's operators"
        return
    try:
        watched.engines = choices(optimizer)
    except Exception as error:  # noqa: BLE001 (what is only told must not end the script)
        watched.custom_step = f"not known: {type(error).__name__}: {error}"
