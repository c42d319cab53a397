"""The schedulers of torch that cycle; their rates follow from the epoch alone."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from surefoot.lr_scheduler.base import (
    LRScheduler,
    Rate,
    check_optimizer,
    function_state,
    per_group,
    put,
    put_momentum,
    restore_function,
)

Values = float | Sequence[float]


class CosineAnnealingWarmRestarts(LRScheduler):
    """Cosines from the initial rate to `eta_min`, begun again after `T_0`, `T_0 * T_mult`, ... epochs (SGDR).

    Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts".

    Args:
        optimizer: any optimizer.
        T_0: epochs of the first cycle, an integer > 0.
        T_mult: each cycle is this much longer than the one before, an integer >= 1.
        eta_min: the lowest rate.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: `T_0`, `T_mult` or `eta_min` is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        T_0: int,  # noqa: N803 (torch's name)
        T_mult: int = 1,  # noqa: N803
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(T_0, int) or T_0 <= 0:
            raise ValueError(f"Expected positive integer T_0, but got {T_0}")
        if not isinstance(T_mult, int) or T_mult < 1:
            raise ValueError(f"Expected integer T_mult >= 1, but got {T_mult}")
        if not isinstance(eta_min, float | int):
            raise ValueError(f"Expected float or int eta_min, but got {eta_min} of type {type(eta_min)}")  # noqa: TRY004
        self.T_0 = T_0
        self.T_mult = T_mult
        self.eta_min = eta_min
        self.T_i: int = T_0
        self.T_cur: float = last_epoch
        super().__init__(optimizer, last_epoch)

    def _new_lrs(self) -> list[Rate]:
        height = 1 + math.cos(math.pi * self.T_cur / self.T_i)
        return [self.eta_min + (base - self.eta_min) * height / 2 for base in self.base_lrs]

    def step(self, epoch: float | None = None) -> None:
        """Move on by one, or to `epoch`, which may be a fraction: `step(epoch + batch / batches)`.

        Raises:
            ValueError: `epoch` is negative.
        """
        if epoch is not None and epoch < 0:
            raise ValueError(f"Expected non-negative epoch, but got {epoch}")
        self._update_lr(epoch)

    def _update_lr(self, epoch: float | None = None) -> None:
        if epoch is None and not self._is_initial:
            self.T_cur += 1
            if self.T_cur >= self.T_i:
                self.T_cur %= self.T_i
                self.T_i *= self.T_mult
        else:
            self._find_cycle(self.last_epoch + 1 if epoch is None else epoch)
        super()._update_lr(None if epoch is None else math.floor(epoch))

    def _find_cycle(self, epoch: float) -> None:
        """Set `T_cur` and `T_i`, in integers: a logarithm rounds to the wrong cycle at some restarts."""
        begin, self.T_i = 0, self.T_0
        if self.T_mult == 1:
            self.T_cur = epoch % self.T_0
            return
        while epoch >= begin + self.T_i:
            begin += self.T_i
            self.T_i *= self.T_mult
        self.T_cur = epoch - begin


class CyclingMomentum(LRScheduler):
    """What `CyclicLR` and `OneCycleLR` share: momentum that falls while the rate rises; abstract."""

    cycle_momentum: bool

    def _start_momentum(
        self, cycle_momentum: bool, base_momentum: Values, max_momentum: Values, *, fresh: bool
    ) -> tuple[list[Any], list[Any]]:
        """Check that there is a momentum to cycle, and put its bounds into the groups."""
        self.cycle_momentum = cycle_momentum
        if not cycle_momentum:
            return [], []
        if not {"momentum", "betas"} & set(self.optimizer.defaults):
            raise ValueError(
                "optimizer must support momentum or beta1 with `cycle_momentum` option enabled, but "
                f"{type(self.optimizer).__name__} has neither; give cycle_momentum=False"
            )
        self.use_beta1 = "betas" in self.optimizer.defaults
        base = per_group("base_momentum", self.optimizer, base_momentum)
        top = per_group("max_momentum", self.optimizer, max_momentum)
        if fresh:
            for group, low, high in zip(self.optimizer.param_groups, base, top, strict=True):
                put_momentum(group, high)
                group.update(max_momentum=high, base_momentum=low)
        return base, top

    def _momenta(self) -> list[Rate]:
        """Return each group's momentum at `last_epoch`."""
        raise NotImplementedError

    def _write(self, lrs: Sequence[Rate]) -> None:
        super()._write(lrs)
        self._write_momenta([True] * len(lrs))

    def _go_on(self, untouched: Sequence[bool]) -> None:
        super()._go_on(untouched)
        self._write_momenta(untouched)

    def _write_momenta(self, chosen: Sequence[bool]) -> None:
        if self.cycle_momentum:
            for group, momentum, mine in zip(self.optimizer.param_groups, self._momenta(), chosen, strict=True):
                if mine:
                    put_momentum(group, momentum)


# The height's factor from gamma and what is counted, and what that is.
_MODES: dict[str, tuple[Callable[[float, float], float], str]] = {
    "triangular": (lambda _, __: 1.0, "cycle"),
    "triangular2": (lambda _, cycle: 0.5 ** (cycle - 1), "cycle"),
    "exp_range": (lambda gamma, step: gamma**step, "iterations"),
}


class CyclicLR(CyclingMomentum):
    """Rates up and down between `base_lr` and `max_lr` in straight lines (Smith 2017).

    "Cyclical Learning Rates for Training Neural Networks"; step it after every batch.

    Args:
        optimizer: any optimizer.
        base_lr: the lower rate, or a list with one per param group.
        max_lr: the upper rate, or a list.
        step_size_up: steps from the lower to the upper rate.
        step_size_down: steps back; as many by default.
        mode: `"triangular"`; `"triangular2"`, whose height halves from cycle to cycle; `"exp_range"`, whose height is
            `gamma ** steps`.
        gamma: for `"exp_range"`.
        scale_fn: the height's factor, instead of `mode`.
        scale_mode: whether `scale_fn` is given the `"cycle"`, from 1 on, or the `"iterations"`.
        cycle_momentum: let momentum, or betas[0], fall from `max_momentum` to `base_momentum` while the rate rises.
        base_momentum: the lower momentum, or a list.
        max_momentum: the upper momentum, or a list.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: a list has another length than the param groups, `mode` is unknown, or the optimizer has no
            momentum.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        base_lr: Values,
        max_lr: Values,
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: str = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[float], float] | None = None,
        scale_mode: str = "cycle",
        cycle_momentum: bool = True,
        base_momentum: Values = 0.8,
        max_momentum: Values = 0.9,
        last_epoch: int = -1,
    ) -> None:
        self.optimizer = check_optimizer(optimizer)
        if mode not in _MODES and scale_fn is None:
            raise ValueError(
                f"mode is invalid and scale_fn is None: got mode={mode!r}; give one of {', '.join(map(repr, _MODES))}, "
                "or a function as scale_fn"
            )
        base_lrs = per_group("base_lr", optimizer, base_lr)
        self.max_lrs = per_group("max_lr", optimizer, max_lr)
        up = float(step_size_up)
        self.total_size = up + (up if step_size_down is None else float(step_size_down))
        self.step_ratio = up / self.total_size
        self.mode = mode
        self.gamma = gamma
        self._scale_fn_custom = scale_fn
        self.scale_mode = scale_mode if scale_fn is not None else _MODES[mode][1]
        fresh = last_epoch == -1
        momenta = self._start_momentum(cycle_momentum, base_momentum, max_momentum, fresh=fresh)
        if cycle_momentum:
            self.base_momentums, self.max_momentums = momenta
        if fresh:
            for lr, group in zip(base_lrs, optimizer.param_groups, strict=True):
                put(group, "lr", lr)
        super().__init__(optimizer, last_epoch)
        self.base_lrs = base_lrs

    def scale_fn(self, x: float) -> float:
        """Return the height's factor for a cycle or, with `scale_mode="iterations"`, for a step."""
        return self._scale_fn_custom(x) if self._scale_fn_custom is not None else _MODES[self.mode][0](self.gamma, x)

    def _heights(self, low: Sequence[Rate], high: Sequence[Rate]) -> list[Rate]:
        """Return each group's height above `low`."""
        cycle = math.floor(1 + self.last_epoch / self.total_size)
        position = 1.0 + self.last_epoch / self.total_size - cycle
        rising = position <= self.step_ratio
        height = position / self.step_ratio if rising else (position - 1) / (self.step_ratio - 1)
        scale = self.scale_fn(cycle if self.scale_mode == "cycle" else self.last_epoch)
        return [(b - a) * height * scale for a, b in zip(low, high, strict=True)]

    def _new_lrs(self) -> list[Rate]:
        heights = self._heights(self.base_lrs, self.max_lrs)
        return [base + height for base, height in zip(self.base_lrs, heights, strict=True)]

    def _momenta(self) -> list[Rate]:
        heights = self._heights(self.base_momentums, self.max_momentums)
        return [top - height for top, height in zip(self.max_momentums, heights, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return all attributes but the optimizer; of a function nothing, of a callable object its attributes."""
        return {**super().state_dict(), "_scale_fn_custom": function_state(self._scale_fn_custom)}

    def _take(self, state: dict[str, Any]) -> None:
        restore_function(self._scale_fn_custom, state.pop("_scale_fn_custom"))
        super()._take(state)


def _positive_int(name: str, value: Any) -> int:
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"Expected positive integer {name}, but got {value}")
    return value


def _total_steps(total_steps: int | None, epochs: int | None, steps_per_epoch: int | None) -> int:
    if total_steps is not None:
        return _positive_int("total_steps", total_steps)
    if epochs is None or steps_per_epoch is None:
        raise ValueError(
            "You must define either total_steps OR (epochs AND steps_per_epoch), but got total_steps=None, "
            f"epochs={epochs}, steps_per_epoch={steps_per_epoch}"
        )
    return _positive_int("epochs", epochs) * _positive_int("steps_per_epoch", steps_per_epoch)


def _cosine_anneal(start: Rate, end: Rate, fraction: float) -> Rate:
    return end + (start - end) / 2.0 * (math.cos(math.pi * fraction) + 1)


def _linear_anneal(start: Rate, end: Rate, fraction: float) -> Rate:
    return (end - start) * fraction + start


_ANNEAL = {"cos": _cosine_anneal, "linear": _linear_anneal}


class OneCycleLR(CyclingMomentum):
    """One rise to `max_lr` and one fall far below the beginning (Smith and Topin 2018).

    "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates"; step it after every batch.
    The groups' `initial_lr`, `max_lr` and `min_lr` hold the corners.

    Args:
        optimizer: any optimizer.
        max_lr: the upper rate, or a list with one per param group.
        total_steps: length of the cycle; or give the two following.
        epochs: number of epochs.
        steps_per_epoch: number of steps in each.
        pct_start: the fraction of the steps that rises, a float in [0, 1].
        anneal_strategy: `"cos"` or `"linear"`.
        cycle_momentum: let momentum, or betas[0], fall from `max_momentum` to `base_momentum` while the rate rises.
        base_momentum: the lower momentum, or a list.
        max_momentum: the upper momentum, or a list.
        div_factor: the first rate is `max_lr / div_factor`.
        final_div_factor: the last is the first divided by this.
        three_phase: fall to the first rate as fast as it rose, then to the last.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: an argument is out of range or missing, or, later, `step` is called more than `total_steps` times.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_lr: Values,
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        cycle_momentum: bool = True,
        base_momentum: Values = 0.85,
        max_momentum: Values = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        self.optimizer = check_optimizer(optimizer)
        self.total_steps = _total_steps(total_steps, epochs, steps_per_epoch)
        if not isinstance(pct_start, float) or not 0 <= pct_start <= 1:
            raise ValueError(f"Expected float between 0 and 1 pct_start, but got {pct_start}")
        if anneal_strategy not in _ANNEAL:
            raise ValueError(f"anneal_strategy must be one of 'cos' or 'linear', instead got {anneal_strategy}")
        self._anneal_func_type = anneal_strategy
        self._schedule_phases = _phases(self.total_steps, pct_start, three_phase=three_phase)
        fresh = last_epoch == -1
        max_lrs = per_group("max_lr", optimizer, max_lr)
        self._start_momentum(cycle_momentum, base_momentum, max_momentum, fresh=fresh)
        if fresh:
            for group, top in zip(optimizer.param_groups, max_lrs, strict=True):
                first = top / div_factor
                group.update(initial_lr=first, max_lr=top, min_lr=first / final_div_factor)
        super().__init__(optimizer, last_epoch)

    def _between(self, start: str, end: str) -> list[Rate]:
        """Return each group's value between the corners that the present phase has under these keys."""
        begin = 0.0
        for phase in self._schedule_phases[:-1]:
            if self.last_epoch <= phase["end_step"]:
                break
            begin = phase["end_step"]
        else:
            phase = self._schedule_phases[-1]
        length = phase["end_step"] - begin
        fraction = (self.last_epoch - begin) / length if length else 1.0
        anneal = _ANNEAL[self._anneal_func_type]
        return [anneal(group[phase[start]], group[phase[end]], fraction) for group in self.optimizer.param_groups]

    def _new_lrs(self) -> list[Rate]:
        if self.last_epoch > self.total_steps:
            raise ValueError(
                f"Tried to step {self.last_epoch} times. The specified number of total steps is {self.total_steps}; "
                "give a larger total_steps"
            )
        return self._between("start_lr", "end_lr")

    def _momenta(self) -> list[Rate]:
        return self._between("start_momentum", "end_momentum")


def _phases(total: int, pct_start: float, *, three_phase: bool) -> list[dict[str, Any]]:
    """Return the phases: their last steps, and the groups' keys for what they start from and end at."""
    peak = float(pct_start * total) - 1
    corners: list[tuple[float, str, str]] = [
        (0.0, "initial_lr", "max_momentum"),
        (peak, "max_lr", "base_momentum"),
    ]
    if three_phase:
        corners.append((float(2 * pct_start * total) - 2, "initial_lr", "max_momentum"))
    corners.append((total - 1, "min_lr", "max_momentum"))
    names = ("start_lr", "end_lr", "start_momentum", "end_momentum")
    return [
        {"end_step": end, **dict(zip(names, (lr_a, lr_b, momentum_a, momentum_b), strict=True))}
        for (_, lr_a, momentum_a), (end, lr_b, momentum_b) in pairwise(corners)
    ]
