"""Adadelta: steps in the units of the parameter."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import ModeOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import decay_weights, ema_of_square
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import EPS, LR, Interval, L2Penalty, Number


class Adadelta(Optimizer):
    """Adadelta: steps in the units of the parameter, from the ratio of two running root mean squares.

    With the gradient g (plus `weight_decay` * param)::

        square_avg = rho * square_avg + (1 - rho) * g**2
        delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
        acc_delta = rho * acc_delta + (1 - rho) * delta**2
        param -= lr * delta

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Adadelta([weight], lr=100.0)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.6838, -1.6838]

    Paper: Zeiler 2012, "ADADELTA: an adaptive learning rate method", algorithm 1, times lr.
    """

    def __init__(
        self,
        params: Params,
        lr: Annotated[Number, LR, "factor of the step, a number or a tensor of one element"] = 1.0,
        rho: Annotated[float, Interval("Invalid rho value: ", high=1.0), "decay of both averages"] = 0.9,
        eps: Annotated[
            float, EPS, "added under both roots, in the units of `g**2` and of `param**2`; it starts the motion"
        ] = 1e-6,
        weight_decay: L2Penalty = 0,
        foreach: bool | None = None,
        **options: Unpack[ModeOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("square_avg", signed=False, slow=True), Slot("acc_delta", signed=False, slow=True))
    flags = ("weight_decay",)

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
