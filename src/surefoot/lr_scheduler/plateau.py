"""The scheduler that follows a metric instead of the epoch."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, SupportsFloat

import torch
from torch.optim import lr_scheduler as torch_schedulers

from surefoot.dynamo import opaque
from surefoot.lr_scheduler.base import (
    EPOCH_DEPRECATION_WARNING,
    LRScheduler,
    check_optimizer,
    copied,
    put,
    separate,
    warn,
)
from surefoot.lr_scheduler.ranges import ANY, NOT_NEGATIVE, PATIENCE, RATE, OneOf, between

_FACTOR = between(0, 1, high_open=True, words="Factor should be < 1.0, but got factor=")
_MODE = OneOf("mode {} is unknown! It must be 'min' or 'max'", ("min", "max"))
_THRESHOLD_MODE = OneOf("threshold mode {} is unknown! It must be 'rel' or 'abs'", ("rel", "abs"))


class ReduceLROnPlateau(LRScheduler, torch_schedulers.ReduceLROnPlateau):
    """The rate times `factor` when a metric has not improved for more than `patience` epochs.

    Args:
        optimizer: any optimizer.
        mode: `"min"` if less is better, `"max"` if more is.
        factor: >= 0 and < 1.
        patience: how many epochs without improvement are let pass, a whole number >= 0.
        threshold: how much better counts as better, >= 0.
        threshold_mode: `"rel"`: by this fraction of the best; `"abs"`: by this amount.
        cooldown: epochs after a reduction in which nothing counts, a whole number >= 0.
        min_lr: the lowest rate, >= 0, or a list with one per param group.
        eps: a smaller reduction is not made; >= 0.

    Raises:
        TypeError: `optimizer` is not an optimizer.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        mode: Annotated[str, _MODE] = "min",
        factor: Annotated[float, _FACTOR] = 0.1,
        patience: Annotated[int, PATIENCE] = 10,
        threshold: Annotated[float, NOT_NEGATIVE] = 1e-4,
        threshold_mode: Annotated[str, _THRESHOLD_MODE] = "rel",
        cooldown: Annotated[int, PATIENCE] = 0,
        min_lr: Annotated[float | Sequence[float], RATE] = 0,
        eps: Annotated[float, NOT_NEGATIVE] = 1e-8,
    ) -> None:
        self._check_values(locals())
        self.optimizer = check_optimizer(optimizer)
        self.mode = mode
        self.factor = factor
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.cooldown = cooldown
        self.eps = eps
        self._set_min_lrs(min_lr)
        self.mode_worse = math.inf if mode == "min" else -math.inf
        self.last_epoch = 0
        separate(optimizer, "lr")
        self._last_lr = self._read()
        self._reset()

    def _set_min_lrs(self, min_lr: float | Sequence[float]) -> None:
        count = len(self.optimizer.param_groups)
        several = isinstance(min_lr, list | tuple)
        self.default_min_lr: Any = None if several else copied(min_lr)
        self.min_lrs: list[Any] = list(map(copied, min_lr if isinstance(min_lr, list | tuple) else [min_lr] * count))
        if len(self.min_lrs) != count:
            raise ValueError(f"expected {count} min_lrs, got {len(self.min_lrs)}; give one, or one per param group")

    def _reset(self) -> None:
        """Forget the best metric and both counters."""
        self.best: float = self.mode_worse
        self.cooldown_counter = 0
        self.num_bad_epochs = 0

    @opaque
    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Take an epoch's metric into account.

        Args:
            metrics: the metric, a number or a tensor of one element.
            epoch: deprecated: the number of the epoch.

        Raises:
            RuntimeError: `min_lr` was a list, and groups have been added; nothing has changed then.
        """
        current = float(metrics)
        self._match_min_lrs()
        if epoch is not None:
            ANY("epoch", epoch)
            warn(EPOCH_DEPRECATION_WARNING)
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        better = self._is_better(current, self.best)
        self.best = current if better else self.best
        self.num_bad_epochs = 0 if better or self.in_cooldown else self.num_bad_epochs + 1
        if self.in_cooldown:
            self.cooldown_counter -= 1
        if self.num_bad_epochs > self.patience:
            self._reduce_lr(self.last_epoch)
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0
        self._last_lr = self._read()

    def _match_min_lrs(self) -> None:
        """Have a lowest rate for each group; those that were added start from their own rates."""
        groups = self.optimizer.param_groups
        if len(groups) == len(self.min_lrs):
            return
        if self.default_min_lr is None:
            raise RuntimeError(
                f"The number of param groups in the `optimizer` ({len(groups)}) differs from when "
                f"`ReduceLROnPlateau` was initialized ({len(self.min_lrs)}), and the list given as min_lr is for "
                "those; append to the scheduler's `min_lrs` when you add a param group"
            )
        self.min_lrs = [self.default_min_lr] * len(groups)
        separate(self.optimizer, "lr")

    def _reduce_lr(self, epoch: int) -> None:  # noqa: ARG002 (torch's signature)
        for group, least in zip(self.optimizer.param_groups, self.min_lrs, strict=True):
            old = float(group["lr"])
            new = max(old * self.factor, least)
            if old - new > self.eps:
                put(group, "lr", new)

    @property
    def in_cooldown(self) -> bool:
        """Whether the last reduction is so recent that nothing counts."""
        return self.cooldown_counter > 0

    def _is_better(self, a: float, best: float) -> bool:
        margin = self.threshold if self.mode == "max" else -self.threshold
        bound: float = best * (1.0 + margin) if self.threshold_mode == "rel" else best + margin
        return a > bound if self.mode == "max" else a < bound

    def _check_groups(self, state_dict: Any) -> None:
        """Nothing: the rates do not come from the state, and groups may be added at any time."""

    def _known_groups(self) -> int:
        return len(self.optimizer.param_groups)

    def _untouched(self) -> list[bool]:
        # A group added since the last step has no rate noted.
        noted = [*self._last_lr, *([None] * len(self.optimizer.param_groups))]
        return [bool(now == last) for now, last in zip(self._read(), noted, strict=False)]

    def _go_on(self, untouched: Sequence[bool]) -> None:
        if len(self._last_lr) == len(untouched):
            super()._go_on(untouched)
