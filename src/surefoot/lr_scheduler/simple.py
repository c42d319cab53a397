"""The schedulers of torch that are one formula: a factor of the initial rate, or a step from the rate before."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from surefoot.lr_scheduler import curves
from surefoot.lr_scheduler.base import LRScheduler, Rate, Recursive, function_state, restore_function

Factor = Callable[[int], float]


class PerGroupFunctions(LRScheduler):
    """What `LambdaLR` and `MultiplicativeLR` share: one function for each group; abstract."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, lr_lambda: Factor | Sequence[Factor], last_epoch: int = -1
    ) -> None:
        count = len(optimizer.param_groups)
        self.lr_lambdas: list[Factor] = list(lr_lambda) if isinstance(lr_lambda, Sequence) else [lr_lambda] * count
        if len(self.lr_lambdas) != count:
            raise ValueError(
                f"Expected {count} lr_lambdas, but got {len(self.lr_lambdas)}; give one, or one per param group"
            )
        for function in self.lr_lambdas:
            if not callable(function):
                raise TypeError(f"lr_lambda should be a function, but got {type(function).__name__}")
        super().__init__(optimizer, last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return all attributes but the optimizer; of a function nothing, of a callable object its attributes."""
        return {
            **super().state_dict(),
            "lr_lambdas": [function_state(function) for function in self.lr_lambdas],
        }

    def _take(self, state: dict[str, Any]) -> None:
        for function, attributes in zip(self.lr_lambdas, state.pop("lr_lambdas"), strict=True):
            restore_function(function, attributes)
        super()._take(state)


class LambdaLR(PerGroupFunctions):
    """The initial rate times a function of the epoch: `initial_lr * lr_lambda(epoch)`.

    Args:
        optimizer: any optimizer.
        lr_lambda: gives the factor for an epoch from 0 on; or a list of such functions, one per param group.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: the list has another length than the param groups.
        TypeError: what stands in it cannot be called.
    """

    def _new_lrs(self) -> list[Rate]:
        pairs = zip(self.base_lrs, self.lr_lambdas, strict=True)
        return [base * function(self.last_epoch) for base, function in pairs]


class MultiplicativeLR(PerGroupFunctions, Recursive):
    """The rate before times a function of the epoch: `lr * lr_lambda(epoch)`, from epoch 1 on.

    Args:
        optimizer: any optimizer.
        lr_lambda: gives the factor for an epoch from 1 on; or a list of such functions, one per param group.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: the list has another length than the param groups.
        TypeError: what stands in it cannot be called.
    """

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:
        return lr if self._is_initial and epoch == 0 else lr * self.lr_lambdas[index](epoch)

    def _get_closed_form_lr(self) -> list[Rate]:
        return self.get_lr()


class StepLR(Recursive):
    """The rate times `gamma` at every `step_size` epochs.

    Args:
        optimizer: any optimizer.
        step_size: in epochs, > 0.
        gamma: the factor.
        last_epoch: see `LRScheduler`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:  # noqa: ARG002
        return lr if epoch == 0 or epoch % self.step_size else lr * self.gamma

    def _factor(self) -> float:
        return curves.Step(self.step_size, self.gamma)(self.last_epoch)


class MultiStepLR(Recursive):
    """The rate times `gamma` at each milestone.

    Args:
        optimizer: any optimizer.
        milestones: epochs; one that occurs twice counts twice.
        gamma: the factor.
        last_epoch: see `LRScheduler`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        milestones: Iterable[int],
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        self.milestones = Counter(milestones)
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:  # noqa: ARG002
        return lr * self.gamma ** self.milestones[epoch] if epoch in self.milestones else lr

    def _factor(self) -> float:
        return curves.MultiStep(tuple(sorted(self.milestones.elements())), self.gamma)(self.last_epoch)


class ConstantLR(Recursive):
    """The rate times `factor` for `total_iters` epochs.

    Args:
        optimizer: any optimizer.
        factor: in [0, 1].  (With 0 the rate comes back as the initial one; torch divides by zero.)
        total_iters: how many epochs.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: `factor` is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: float = 1 / 3,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        if not 0 <= factor <= 1:
            raise ValueError(f"Constant multiplicative factor expected to be between 0 and 1, but got factor={factor}")
        self.factor = factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:
        if epoch == 0:
            return lr * self.factor
        if epoch != self.total_iters:
            return lr
        return lr * (1.0 / self.factor) if self.factor else self.base_lrs[index]

    def _factor(self) -> float:
        return self.factor if self.last_epoch < self.total_iters else 1.0


class LinearLR(Recursive):
    """The rate times a factor that goes in a straight line from `start_factor` to `end_factor`.

    Args:
        optimizer: any optimizer.
        start_factor: the factor at epoch 0, in (0, 1].
        end_factor: the factor from epoch `total_iters` on, in [0, 1].
        total_iters: how many epochs it takes.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: a factor is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        start_factor: float = 1 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        if not 0 < start_factor <= 1:
            raise ValueError(
                "Starting multiplicative factor expected to be greater than 0 and less or equal to 1, but got "
                f"start_factor={start_factor}; for a warm-up from 0 use Schedule(optimizer, lr=warmup(steps))"
            )
        if not 0 <= end_factor <= 1:
            raise ValueError(
                f"Ending multiplicative factor expected to be between 0 and 1, but got end_factor={end_factor}"
            )
        self.start_factor = start_factor
        self.end_factor = end_factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:  # noqa: ARG002
        if epoch == 0:
            return lr * self.start_factor
        if epoch > self.total_iters:
            return lr
        rise = self.end_factor - self.start_factor
        return lr * (1.0 + rise / (self.total_iters * self.start_factor + (epoch - 1) * rise))

    def _factor(self) -> float:
        return curves.Linear(self.start_factor, self.end_factor, self.total_iters)(self.last_epoch)


class ExponentialLR(Recursive):
    """The rate times `gamma` at each epoch.

    Args:
        optimizer: any optimizer.
        gamma: the factor.
        last_epoch: see `LRScheduler`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:  # noqa: ARG002
        return lr if epoch == 0 else lr * self.gamma

    def _factor(self) -> float:
        return curves.Exponential(self.gamma)(self.last_epoch)


class PolynomialLR(Recursive):
    """`initial_lr * (1 - epoch / total_iters) ** power` until `total_iters`, 0 from there on.

    Args:
        optimizer: any optimizer.
        total_iters: how many epochs it takes.
        power: of the polynomial.
        last_epoch: see `LRScheduler`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1
    ) -> None:
        self.total_iters = total_iters
        self.power = power
        super().__init__(optimizer, last_epoch)

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:  # noqa: ARG002
        if epoch == 0 or epoch > self.total_iters:
            return lr
        left, left_before = 1.0 - epoch / self.total_iters, 1.0 - (epoch - 1) / self.total_iters
        ratio: float = (left / left_before) ** self.power
        return lr * ratio

    def _factor(self) -> float:
        return curves.Polynomial(1.0, 0.0, self.total_iters, self.power)(self.last_epoch)


class CosineAnnealingLR(Recursive):
    """Half a cosine from the initial rate to `eta_min` at `T_max`, and up again (Loshchilov and Hutter 2017, eq. 5).

    With e the epoch, each rate follows from the one before::

        lr = eta_min + (lr - eta_min) * (1 + cos(pi e / T_max)) / (1 + cos(pi (e - 1) / T_max))

    Args:
        optimizer: any optimizer.
        T_max: epochs of the half period, > 0.
        eta_min: the lowest rate.
        last_epoch: see `LRScheduler`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        T_max: int,  # noqa: N803 (torch's name)
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:
        if epoch == 0:
            return lr
        if (epoch - 1 - self.T_max) % (2 * self.T_max) == 0:
            # The rate is eta_min here and no ratio leads away from it.
            return lr + (self.base_lrs[index] - self.eta_min) * (1 - math.cos(math.pi / self.T_max)) / 2
        now, before = (1 + math.cos(math.pi * e / self.T_max) for e in (epoch, epoch - 1))
        return now / before * (lr - self.eta_min) + self.eta_min

    def _get_closed_form_lr(self) -> list[Rate]:
        height = 1 + math.cos(math.pi * self.last_epoch / self.T_max)
        return [self.eta_min + (base - self.eta_min) * height / 2 for base in self.base_lrs]
