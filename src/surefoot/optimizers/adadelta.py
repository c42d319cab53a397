"""Adadelta: steps in the units of the parameter."""

from types import SimpleNamespace
from typing import Any, Unpack

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import decay_weights, ema_of_square
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import EPS, LR, WEIGHT_DECAY, Interval
from surefoot.whole_step import StepOptions


class Adadelta(Optimizer):
    """Adadelta: steps in the units of the parameter, from the ratio of two running root mean squares.

    With the gradient g (plus `weight_decay` * param)::

        square_avg = rho * square_avg + (1 - rho) * g**2
        delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
        acc_delta = rho * acc_delta + (1 - rho) * delta**2
        param -= lr * delta

    Args:
        params: tensors, named tensors or groups; see `surefoot.Optimizer`.
        lr: factor of the step, a number or a tensor of one element, >= 0.
        rho: decay of both averages, in [0, 1].
        eps: added under both roots, in the units of g**2 and of param**2, >= 0; it starts the motion.
        weight_decay: L2 penalty, a number >= 0.
        {options}

    Raises:
        ValueError: a hyperparameter is out of range.
        TypeError: a hyperparameter is no number.
        RuntimeError: engine options contradict one another, or, in `step`, a gradient is sparse.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Adadelta([weight], lr=100.0)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.6838, -1.6838]

    Paper: Zeiler 2012, "ADADELTA: an adaptive learning rate method", algorithm 1, times lr.
    """

    slots = (Slot("square_avg"), Slot("acc_delta"))
    flags = ("weight_decay",)
    ranges = {
        "lr": LR,
        "rho": Interval("Invalid rho value: ", high=1.0),
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:  # noqa: ARG004 (counted, not used)
        return {"weight": 1 - h.rho, "neg_lr": -h.lr}

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, square_avg: Tensor, acc_delta: Tensor, c: Any, flags: SimpleNamespace
    ) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        square_avg = ema_of_square(square_avg, grad, c.rho, c.weight)
        delta = torch.sqrt(acc_delta + c.eps) / torch.sqrt(square_avg + c.eps) * grad
        acc_delta = ema_of_square(acc_delta, delta, c.rho, c.weight)
        return torch.add(param, delta, alpha=c.neg_lr), square_avg, acc_delta
