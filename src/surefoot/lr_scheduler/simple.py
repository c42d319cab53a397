"""The schedulers of torch that are one formula: a factor of the initial rate, or a step from the rate before."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import torch

from surefoot.lr_scheduler import curves
from surefoot.lr_scheduler.base import LRScheduler, Rate, Recursive, function_state, restore_function
from surefoot.lr_scheduler.ranges import (
    AT_LEAST_ONE_EPOCH,
    EPOCHS,
    GAMMA,
    LAST_EPOCH,
    NOT_NEGATIVE,
    PERIOD,
    RATE,
    Steps,
    between,
)

Factor = Callable[[int], float]
_Gamma = Annotated[float, GAMMA]
_LastEpoch = Annotated[int, LAST_EPOCH]


class PerGroupFunctions(LRScheduler):
    """What `LambdaLR` and `MultiplicativeLR` share: one function for each group; abstract."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, lr_lambda: Factor | Sequence[Factor], last_epoch: _LastEpoch = -1
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
        self._note_given("lr_lambda", list(lr_lambda) if isinstance(lr_lambda, Sequence) else lr_lambda)
        super().__init__(optimizer, last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return all attributes but the optimizer; of a function nothing, of a callable object its attributes."""
        return {
            **super().state_dict(),
            "lr_lambdas": [function_state(function) for function in self.lr_lambdas],
        }

    def _extend(self, count: int) -> None:
        super()._extend(count)
        self.lr_lambdas = [*self.lr_lambdas, *[self.lr_lambdas[0]] * (count - len(self.lr_lambdas))]

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

    has_closed_form = False

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:
        return lr if self._is_initial and epoch == 0 else lr * self.lr_lambdas[index](epoch)

    def _first_lr(self, index: int, lr: Rate) -> Rate:  # noqa: ARG002
        return lr

    def _get_closed_form_lr(self) -> list[Rate]:
        return self.get_lr()


_FACTOR = between(0, 1, words="Constant multiplicative factor expected to be between 0 and 1, but got factor=")
_START = between(
    0,
    1,
    low_open=True,
    words="Starting multiplicative factor expected to be greater than 0 and less or equal to 1 (for a warm-up from 0 "
    "use Schedule(optimizer, lr=warmup(steps))), but got start_factor=",
)
_END = between(0, 1, words="Ending multiplicative factor expected to be between 0 and 1, but got end_factor=")


class StepLR(Recursive):
    """The rate times `gamma` at every `step_size` epochs.

    Args:
        optimizer: any optimizer.
        step_size: in epochs, a whole number >= 1.
        gamma: the factor, >= 0.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        step_size: Annotated[int, AT_LEAST_ONE_EPOCH],
        gamma: _Gamma = 0.1,
        last_epoch: _LastEpoch = -1,
    ) -> None:
        self._check_values(locals())
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
        milestones: epochs, whole numbers >= 0 in any order; one that occurs twice counts twice.
        gamma: the factor, >= 0.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        milestones: Annotated[Iterable[int], Steps()],
        gamma: _Gamma = 0.1,
        last_epoch: _LastEpoch = -1,
    ) -> None:
        milestones = list(milestones)
        self._check_values(locals())
        # A tensor is equal to no other when it is counted.
        self.milestones = Counter(map(int, milestones))
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
        total_iters: how many epochs, a whole number >= 0.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: `factor` is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: Annotated[float, _FACTOR] = 1 / 3,
        total_iters: Annotated[int, EPOCHS] = 5,
        last_epoch: _LastEpoch = -1,
    ) -> None:
        self._check_values(locals())
        self.factor = factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:
        if epoch == 0:
            return lr * self.factor if self.total_iters else lr
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
        total_iters: how many epochs it takes, a whole number >= 0; with 0 it is `end_factor` from the beginning.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: a factor is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        start_factor: Annotated[float, _START] = 1 / 3,
        end_factor: Annotated[float, _END] = 1.0,
        total_iters: Annotated[int, EPOCHS] = 5,
        last_epoch: _LastEpoch = -1,
    ) -> None:
        self._check_values(locals())
        self.start_factor = start_factor
        self.end_factor = end_factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:  # noqa: ARG002
        if epoch == 0:
            return lr * (self.start_factor if self.total_iters else self.end_factor)
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
        gamma: the factor, >= 0.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, gamma: _Gamma, last_epoch: _LastEpoch = -1) -> None:
        self._check_values(locals())
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
        total_iters: how many epochs it takes, a whole number >= 1.
        power: of the polynomial, >= 0.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_iters: Annotated[int, AT_LEAST_ONE_EPOCH] = 5,
        power: Annotated[float, NOT_NEGATIVE] = 1.0,
        last_epoch: _LastEpoch = -1,
    ) -> None:
        self._check_values(locals())
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


_NEAR = 0.01
"""How far from the lowest point, in epochs, a cosine is taken to be there."""


class CosineAnnealingLR(Recursive):
    """Half a cosine from the initial rate to `eta_min` at `T_max`, and up again (Loshchilov and Hutter 2017, eq. 5).

    With e the epoch, each rate follows from the one before::

        lr = eta_min + (lr - eta_min) * (1 + cos(pi e / T_max)) / (1 + cos(pi (e - 1) / T_max))

    Args:
        optimizer: any optimizer.
        T_max: epochs of the half period, > 0; it may be a fraction.
        eta_min: the lowest rate, >= 0.
        last_epoch: see `LRScheduler`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        T_max: Annotated[int, PERIOD],  # noqa: N803 (torch's name)
        eta_min: Annotated[float, RATE] = 0.0,
        last_epoch: _LastEpoch = -1,
    ) -> None:
        self._check_values(locals())
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def _next_lr(self, epoch: int, lr: Rate, index: int) -> Rate:
        if epoch == 0:
            return lr
        if abs((epoch - 1) % (2 * self.T_max) - self.T_max) < _NEAR:
            # The rate was eta_min, but for its last bits where T_max is a fraction, and no ratio leads away from it.
            return lr + (self.base_lrs[index] - self.eta_min) * (1 - math.cos(math.pi / self.T_max)) / 2
        now, before = (1 + math.cos(math.pi * e / self.T_max) for e in (epoch, epoch - 1))
        return now / before * (lr - self.eta_min) + self.eta_min

    def _get_closed_form_lr(self) -> list[Rate]:
        height = 1 + math.cos(math.pi * self.last_epoch / self.T_max)
        return [self.eta_min + (base - self.eta_min) * height / 2 for base in self.base_lrs]
