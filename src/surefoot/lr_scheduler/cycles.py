"""The schedulers of torch that cycle; their rates follow from the epoch alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch

from surefoot.dynamo import opaque
from surefoot.lr_scheduler.base import (
    LRScheduler,
    Rate,
    check_optimizer,
    copied,
    function_state,
    put,
    put_momentum,
    restore_function,
    separate,
)
from surefoot.lr_scheduler.ranges import (
    ANNEAL,
    GAMMA,
    LAST_EPOCH,
    MOMENTUM,
    PERIOD,
    RATE,
    OneOf,
    between,
)
from surefoot.rule.hyperparameters import BETAS

Values = float | Sequence[float]
_Rates = Annotated[Values, RATE]
_Momenta = Annotated[Values, MOMENTUM]
_LastEpoch = Annotated[int, LAST_EPOCH]


def _positive_integer(name: str, *, optional: bool = False) -> Any:
    return between(1, whole=True, optional=optional, words=f"Expected positive integer {name}, but got ")


_T_MULT = between(1, whole=True, words="Expected integer T_mult >= 1, but got ")
_ETA_MIN = between(words="Expected float or int eta_min, but got ")
_EPOCH = between(words="Expected non-negative epoch, but got ")


class CosineAnnealingWarmRestarts(LRScheduler):
    """Cosines from the initial rate to `eta_min`, begun again after `T_0`, `T_0 * T_mult`, ... epochs (SGDR).

    Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts".

    Args:
        optimizer: any optimizer.
        T_0: epochs of the first cycle, a whole number >= 1.
        T_mult: each cycle is this much longer than the one before, a whole number >= 1.
        eta_min: the lowest rate, >= 0.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        T_0: Annotated[int, _positive_integer("T_0")],  # noqa: N803 (torch's name)
        T_mult: Annotated[int, _T_MULT] = 1,  # noqa: N803
        eta_min: Annotated[float, _ETA_MIN] = 0.0,
        last_epoch: _LastEpoch = -1,
    ) -> None:
        self._check_values(locals())
        self.T_0 = int(T_0)
        self.T_mult = int(T_mult)
        self.eta_min = eta_min
        self.T_i: int = self.T_0
        self.T_cur: float = last_epoch
        super().__init__(optimizer, last_epoch)

    def _new_lrs(self) -> list[Rate]:
        height = 1 + math.cos(math.pi * self.T_cur / self.T_i)
        return [self.eta_min + (base - self.eta_min) * height / 2 for base in self.base_lrs]

    @opaque
    def step(self, epoch: float | None = None) -> None:
        """Move on by one, or to `epoch`, which may be a fraction: `step(epoch + batch / batches)`.

        Raises:
            ValueError: `epoch` is negative or not finite.
        """
        if epoch is not None:
            _EPOCH("epoch", epoch)
        self._update_lr(epoch)

    def _update_lr(self, epoch: float | None = None) -> None:
        self._take_up_groups()
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
        groups = self.optimizer.param_groups
        if not all({"momentum", "betas"} & group.keys() for group in groups):
            raise ValueError(
                "optimizer must support momentum or beta1 with `cycle_momentum` option enabled, but "
                f"{type(self.optimizer).__name__} has neither; give cycle_momentum=False"
            )
        self.use_beta1 = all("betas" in group for group in groups)
        base = self._spread("base_momentum", base_momentum)
        top = self._spread("max_momentum", max_momentum)
        for group, low, high in zip(groups, base, top, strict=True):
            if "betas" in group:
                BETAS.checks[0]("base_momentum", low)
                BETAS.checks[0]("max_momentum", high)
        self._separate_momenta()
        if fresh:
            for group, low, high in zip(groups, base, top, strict=True):
                put_momentum(group, high)
                group.update(max_momentum=copied(high), base_momentum=copied(low))
        return base, top

    def _separate_momenta(self) -> None:
        for name in ("betas", "momentum"):
            separate(self.optimizer, name)

    def _extend(self, count: int) -> None:
        known = self._known_groups()
        super()._extend(count)
        if self.cycle_momentum:
            self._separate_momenta()
            for group in self.optimizer.param_groups[known:count]:
                for name in ("max_momentum", "base_momentum"):
                    group.setdefault(name, copied(self._given[name]))

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


_MODE = OneOf("mode is invalid and scale_fn is None: got {!r}", tuple(_MODES))
_SCALE_MODE = OneOf("scale_mode is invalid: got {!r}", ("cycle", "iterations"))
_DOWN = between(optional=True)


class CyclicLR(CyclingMomentum):
    """Rates up and down between `base_lr` and `max_lr` in straight lines (Smith 2017).

    "Cyclical Learning Rates for Training Neural Networks"; step it after every batch.

    Args:
        optimizer: any optimizer.
        base_lr: the lower rate, or a list with one per param group.
        max_lr: the upper rate, or a list.
        step_size_up: steps from the lower to the upper rate, > 0.
        step_size_down: steps back, >= 0; as many by default.
        mode: `"triangular"`; `"triangular2"`, whose height halves from cycle to cycle; `"exp_range"`, whose height is
            `gamma ** steps`.
        gamma: for `"exp_range"`, >= 0.
        scale_fn: the height's factor, instead of `mode`.
        scale_mode: whether `scale_fn` is given the `"cycle"`, from 1 on, or the `"iterations"`.
        cycle_momentum: let momentum, or betas[0], fall from `max_momentum` to `base_momentum` while the rate rises.
        base_momentum: the lower momentum, or a list.
        max_momentum: the upper momentum, or a list.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: an argument is out of range, a list has another length than the param groups, or the optimizer has
            no momentum.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        base_lr: _Rates,
        max_lr: _Rates,
        step_size_up: Annotated[int, PERIOD] = 2000,
        step_size_down: Annotated[int | None, _DOWN] = None,
        mode: Annotated[str, _MODE] = "triangular",
        gamma: Annotated[float, GAMMA] = 1.0,
        scale_fn: Callable[[float], float] | None = None,
        scale_mode: Annotated[str, _SCALE_MODE] = "cycle",
        cycle_momentum: bool = True,
        base_momentum: _Momenta = 0.8,
        max_momentum: _Momenta = 0.9,
        last_epoch: _LastEpoch = -1,
    ) -> None:
        self.optimizer = check_optimizer(optimizer)
        self._scale_fn_custom = scale_fn
        self._check_values(locals())
        self.base_lrs = self._spread("base_lr", base_lr)
        self.max_lrs = self._spread("max_lr", max_lr)
        up = float(step_size_up)
        self.total_size = up + (up if step_size_down is None else float(step_size_down))
        self.step_ratio = up / self.total_size
        self.mode = mode
        self.gamma = gamma
        self.scale_mode = scale_mode if scale_fn is not None else _MODES[mode][1]
        fresh = last_epoch == -1
        momenta = self._start_momentum(cycle_momentum, base_momentum, max_momentum, fresh=fresh)
        if cycle_momentum:
            self.base_momentums, self.max_momentums = momenta
        if fresh:
            separate(optimizer, "lr")
            for lr, group in zip(self.base_lrs, optimizer.param_groups, strict=True):
                put(group, "lr", lr)
        super().__init__(optimizer, last_epoch)

    def _initial_lrs(self) -> list[Rate]:
        return self.base_lrs

    def _check_values(self, values: Mapping[str, Any]) -> None:
        # What a function scales needs no mode.
        free = self._scale_fn_custom is not None
        super()._check_values({name: value for name, value in values.items() if not (free and name == "mode")})

    def _extend(self, count: int) -> None:
        known = len(self.base_lrs)
        super()._extend(count)
        missing = range(known, count)
        self.base_lrs = [*self.base_lrs, *(copied(self._given["base_lr"]) for _ in missing)]
        self.max_lrs = [*self.max_lrs[:known], *(copied(self._given["max_lr"]) for _ in missing)]
        if self.cycle_momentum:
            groups = self.optimizer.param_groups
            self.base_momentums, self.max_momentums = (
                [*bounds[:known], *(copied(groups[index][name]) for index in missing)]
                for name, bounds in (("base_momentum", self.base_momentums), ("max_momentum", self.max_momentums))
            )

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


def _total_steps(total_steps: int | None, epochs: int | None, steps_per_epoch: int | None) -> int:
    if total_steps is not None:
        return int(total_steps)
    if epochs is None or steps_per_epoch is None:
        raise ValueError(
            "You must define either total_steps OR (epochs AND steps_per_epoch), but got total_steps=None, "
            f"epochs={epochs}, steps_per_epoch={steps_per_epoch}"
        )
    return int(epochs) * int(steps_per_epoch)


def _cosine_anneal(start: Rate, end: Rate, fraction: float) -> Rate:
    return end + (start - end) / 2.0 * (math.cos(math.pi * fraction) + 1)


def _linear_anneal(start: Rate, end: Rate, fraction: float) -> Rate:
    return (end - start) * fraction + start


_ANNEAL = {"cos": _cosine_anneal, "linear": _linear_anneal}


_PCT_START = between(0, 1, words="Expected float between 0 and 1 pct_start, but got ")
_DIVISOR = between(low_open=True, infinite=True)


class OneCycleLR(CyclingMomentum):
    """One rise to `max_lr` and one fall far below the beginning (Smith and Topin 2018).

    "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates"; step it after every batch.
    The groups' `initial_lr`, `max_lr` and `min_lr` hold the corners.

    Args:
        optimizer: any optimizer.
        max_lr: the upper rate, or a list with one per param group.
        total_steps: length of the cycle, a whole number >= 1; or give the two following.
        epochs: number of epochs, a whole number >= 1.
        steps_per_epoch: number of steps in each, a whole number >= 1.
        pct_start: the fraction of the steps that rises, in [0, 1].
        anneal_strategy: `"cos"` or `"linear"`.
        cycle_momentum: let momentum, or betas[0], fall from `max_momentum` to `base_momentum` while the rate rises.
        base_momentum: the lower momentum, or a list.
        max_momentum: the upper momentum, or a list.
        div_factor: the first rate is `max_lr / div_factor`; > 0.
        final_div_factor: the last is the first divided by this; > 0.
        three_phase: fall to the first rate as fast as it rose, then to the last; at most half of the steps may rise.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: an argument is out of range or missing, or, later, `step` is called more than `total_steps` times.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_lr: _Rates,
        total_steps: Annotated[int | None, _positive_integer("total_steps", optional=True)] = None,
        epochs: Annotated[int | None, _positive_integer("epochs", optional=True)] = None,
        steps_per_epoch: Annotated[int | None, _positive_integer("steps_per_epoch", optional=True)] = None,
        pct_start: Annotated[float, _PCT_START] = 0.3,
        anneal_strategy: Annotated[str, ANNEAL] = "cos",
        cycle_momentum: bool = True,
        base_momentum: _Momenta = 0.85,
        max_momentum: _Momenta = 0.95,
        div_factor: Annotated[float, _DIVISOR] = 25.0,
        final_div_factor: Annotated[float, _DIVISOR] = 1e4,
        three_phase: bool = False,
        last_epoch: _LastEpoch = -1,
    ) -> None:
        self.optimizer = check_optimizer(optimizer)
        self._check_values(locals())
        self.total_steps = _total_steps(total_steps, epochs, steps_per_epoch)
        self._anneal_func_type = anneal_strategy
        self._schedule_phases = _phases(self.total_steps, pct_start, three_phase=three_phase)
        fresh = last_epoch == -1
        max_lrs = self._spread("max_lr", max_lr)
        self._start_momentum(cycle_momentum, base_momentum, max_momentum, fresh=fresh)
        self._divisors = div_factor, final_div_factor
        if fresh:
            for group, top in zip(optimizer.param_groups, max_lrs, strict=True):
                self._put_corners(group, top)
        super().__init__(optimizer, last_epoch)

    _unsaved = CyclingMomentum._unsaved | {"_divisors"}

    def _put_corners(self, group: dict[str, Any], top: Rate) -> None:
        """Put the rates into a group between which its own moves."""
        first = top / self._divisors[0]
        group.update(initial_lr=first, max_lr=top, min_lr=first / self._divisors[1])

    def _extend(self, count: int) -> None:
        for group in self.optimizer.param_groups[self._known_groups() : count]:
            if "max_lr" not in group:
                self._put_corners(group, copied(self._given["max_lr"]))
        super()._extend(count)

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
        # The last step is total_steps - 1; what comes after it stays there, or a line would go on below 0.
        fraction = min((self.last_epoch - begin) / length, 1.0) if length else 1.0
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
    if three_phase and 2 * peak > total - 1:
        raise ValueError(
            f"three_phase=True falls as long as it rises, but pct_start={pct_start} of {total} steps leaves no room "
            "for that; give a pct_start of at most 0.5"
        )
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
