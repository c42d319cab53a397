"""The learning-rate range test: train for a few steps at growing rates and look where the loss falls fastest.

Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3.  Model, optimizer and random numbers
are afterwards what they were before, bit for bit, whatever happened.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from surefoot.lr_scheduler.base import check_optimizer, put

__all__ = ["LRCurve", "find_lr"]

_FEWEST = 5


@dataclass(frozen=True)
class LRCurve:
    """What a range test has seen.

    Attributes:
        rates: the learning rates tried, growing; those of the group with the largest.
        losses: the loss at each, as the training function returned it.
        smoothed: their exponential average, corrected for its beginning.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    @property
    def steepest(self) -> float | None:
        """The rate at which the loss falls fastest over the logarithm of the rate; None if it never falls.

        Slopes are those of lines fitted to an eighth of the points at a time, since single steps are noise.
        """
        finite = self._finite()
        logs, smoothed = np.log(self.rates)[finite], np.array(self.smoothed)[finite]
        width = max(_FEWEST, len(finite) // 8)
        # What follows the lowest loss is noise on the way to divergence.
        last = int(np.argmin(smoothed)) + 1 if finite else 0
        windows = [slice(begin, begin + width) for begin in range(last - width + 1)]
        slopes = [np.polyfit(logs[window], smoothed[window], 1)[0] for window in windows]
        if not slopes or min(slopes) >= 0:
            return None
        return float(np.exp(logs[windows[int(np.argmin(slopes))]].mean()))

    @property
    def lowest(self) -> float | None:
        """The rate at which the loss is lowest; None if it never falls below the first."""
        finite = self._finite()
        if len(finite) < _FEWEST:
            return None
        best = min(finite, key=lambda index: self.smoothed[index])
        return self.rates[best] if self.smoothed[best] < self.smoothed[finite[0]] else None

    @property
    def suggestion(self) -> float | None:
        """A rate to start with: the steepest, but at most a third of the lowest; None if the loss never falls."""
        return None if self.steepest is None or self.lowest is None else min(self.steepest, self.lowest / 3)

    def _finite(self) -> list[int]:
        return [index for index, loss in enumerate(self.smoothed) if math.isfinite(loss)]

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the loss over the rate with matplotlib (extra `plot`), the suggestion marked.

        Args:
            path: a file to write, of any type that matplotlib writes.

        Returns:
            The matplotlib figure, which a notebook shows.
        """
        from surefoot.lr_scheduler.plot import COLORS, load_pyplot, save_figure, style  # noqa: PLC0415 (matplotlib is optional)

        pyplot = load_pyplot()
        figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
        axes.plot(self.rates, self.losses, color="#c4c4c4", linewidth=1, label="loss")
        axes.plot(self.rates, self.smoothed, color=COLORS[0], linewidth=1.8, label="smoothed")
        if self.suggestion is not None:
            label = f"suggestion {self.suggestion:.2g}"
            axes.axvline(self.suggestion, color=COLORS[1], linewidth=1.4, linestyle="--", label=label)
        axes.set_xscale("log")
        axes.set_ylim(*self._shown())
        style(axes, "learning rate", "loss")
        axes.legend(frameon=False)
        pyplot.close(figure)
        return save_figure(figure, path)

    def _shown(self) -> tuple[float, float]:
        """Return the range of losses to show: the end of a divergence would flatten all the rest."""
        seen = [self.smoothed[index] for index in self._finite()] or [0.0, 1.0]
        fall = (seen[0] - min(seen)) or 1.0
        return min(seen) - 0.2 * fall, seen[0] + 0.5 * fall


def find_lr(
    train_step: Callable[[], SupportsFloat],
    model: Module | Sequence[Module],
    optimizer: torch.optim.Optimizer,
    *,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    stop_at: float = 4.0,
) -> LRCurve:
    """Train at growing learning rates, then put everything back.

    Args:
        train_step: takes one step of training (batch, backward, `optimizer.step()`) and returns the loss.
        model: the module or modules that it changes.
        optimizer: the optimizer that it steps; groups keep the ratio of their rates.
        lowest: the first rate, > 0.
        highest: the last rate, > `lowest`; reached by a constant factor from step to step.
        steps: how many steps, >= 5.
        smoothing: weight of the past in the smoothed loss, in [0, 1).
        stop_at: stop when the smoothed loss is so many times its lowest value, > 1, or not finite.  (Where the lowest
            is close to 0, what the loss has fallen by is the measure.)

    Returns:
        The curve, with a suggestion.

    Raises:
        ValueError: an argument is out of range.
        TypeError: `optimizer` is not an optimizer.
        Exception: what `train_step` raises; everything has been put back then, too.

    Note:
        Put back are parameters, buffers, gradients and modes of the models, state and groups of the optimizer, and the
        random numbers of Python, numpy and torch.  A data loader's iterator is not: give the real run a new one.

    Example:
        >>> import torch, surefoot
        >>> from surefoot.lr_finder import find_lr
        >>> weight = torch.nn.Linear(1, 1)
        >>> optimizer = surefoot.SGD(weight.parameters(), lr=0.1)
        >>> def train_step():
        ...     optimizer.zero_grad()
        ...     loss = (weight(torch.ones(1)) - 3).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss
        >>> curve = find_lr(train_step, weight, optimizer)
        >>> 0.001 < curve.suggestion < 1
        True
    """
    _check_range(lowest, highest, steps, smoothing, stop_at)
    check_optimizer(optimizer)
    models = [model] if isinstance(model, Module) else list(model)
    rates = np.geomspace(lowest, highest, steps).tolist()
    with unchanged(models, optimizer):
        points = list(_until_divergence(_train(train_step, optimizer, rates, smoothing), stop_at))
    tried, losses, smoothed = zip(*points, strict=True)
    return LRCurve(tried, losses, smoothed)


def _check_range(lowest: float, highest: float, steps: int, smoothing: float, stop_at: float) -> None:
    if not 0 < lowest < highest < math.inf:
        raise ValueError(f"rates must be 0 < lowest < highest, but got lowest={lowest}, highest={highest}")
    if not steps >= _FEWEST or steps % 1:
        raise ValueError(f"`steps` must be at least {_FEWEST} and a whole number, but got {steps}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"`smoothing` must be in [0, 1), but got {smoothing}")
    if not stop_at > 1:
        raise ValueError(f"`stop_at` must be > 1, but got {stop_at}")


def _train(
    train_step: Callable[[], SupportsFloat], optimizer: torch.optim.Optimizer, rates: Sequence[float], smoothing: float
) -> Iterator[tuple[float, float, float]]:
    """Train at each rate and give it with its loss and its smoothed loss: an average whose weights add up to 1."""
    before = [float(group["lr"]) for group in optimizer.param_groups]
    largest = max(before)
    total, weight = 0.0, 0.0
    for rate in rates:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            put(group, "lr", rate * lr / largest if largest else rate)
        result = train_step()
        loss = float(result.detach() if isinstance(result, Tensor) else result)
        total = smoothing * total + (1 - smoothing) * loss
        weight = smoothing * weight + (1 - smoothing)
        yield rate, loss, total / weight


def _until_divergence(
    points: Iterator[tuple[float, float, float]], stop_at: float
) -> Iterator[tuple[float, float, float]]:
    """Return points up to the first that is far above the best."""
    first = best = math.inf
    for point in points:
        yield point
        smoothed = point[2]
        first = smoothed if first == math.inf else first
        best = min(best, smoothed)
        if not smoothed <= best + (stop_at - 1) * max(abs(best), first - best):
            return


# Putting everything back


@contextmanager
def unchanged(models: Sequence[Module], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put models, optimizer and random numbers back at the end, in place, also when there is an exception.

    Tensors stay the same objects; only what they hold is put back.
    """
    restore = [
        *(_remember_tensor(tensor) for module in models for tensor in chain(module.parameters(), module.buffers())),
        *(_remember_gradient(param) for group in optimizer.param_groups for param in group["params"]),
        *(_remember_gradient(param) for module in models for param in module.parameters()),
        *(_remember_mode(module) for parent in models for module in parent.modules()),
        *(_remember_tensor(param) for group in optimizer.param_groups for param in group["params"]),
        *(_remember(group) for group in optimizer.param_groups),
        _remember(optimizer.state),
        _remember_random(),
    ]
    try:
        yield
    finally:
        for back in restore:
            back()


def _remember(value: Any) -> Callable[[], Any]:
    """Return a function that puts a value's contents back, in place where it can be, and returns it."""
    if isinstance(value, Tensor):
        return _remember_tensor(value)
    if isinstance(value, dict):
        items = {key: _remember(item) for key, item in value.items() if key != "params"}
        kept = {key: item for key, item in value.items() if key == "params"}
        return lambda: _refill(
            value, value.clear, lambda: value.update(kept | {key: back() for key, back in items.items()})
        )
    if isinstance(value, list):
        parts = [_remember(item) for item in value]
        return lambda: _refill(value, value.clear, lambda: value.extend(back() for back in parts))
    if isinstance(value, tuple):
        parts = [_remember(item) for item in value]
        return lambda: tuple(back() for back in parts)
    copy = deepcopy(value)
    return lambda: copy


def _refill(value: Any, clear: Callable[[], None], fill: Callable[[], None]) -> Any:
    clear()
    fill()
    return value


def _remember_tensor(tensor: Tensor) -> Callable[[], Tensor]:
    copy = tensor.detach().clone()

    @torch.no_grad()
    def back() -> Tensor:
        tensor.detach().copy_(copy)
        return tensor

    return back


def _remember_gradient(param: Tensor) -> Callable[[], None]:
    grad = param.grad
    contents = None if grad is None else _remember_tensor(grad)

    def back() -> None:
        param.grad = None if contents is None else contents()

    return back


def _remember_mode(module: Module) -> Callable[[], None]:
    training = module.training

    def back() -> None:
        module.training = training

    return back


def _cuda_states() -> list[Tensor]:
    # Asking for the states would start CUDA in a process that has not used it.
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if in_use else []


def _remember_random() -> Callable[[], None]:
    python, numpys, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (users' legacy state)
    devices = _cuda_states()

    def back() -> None:
        random.setstate(python)
        np.random.set_state(numpys)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for device, state in enumerate(devices):
            torch.cuda.set_rng_state(state, device)

    return back
