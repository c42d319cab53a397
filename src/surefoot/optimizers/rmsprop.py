"""RMSprop: gradients divided by a running root mean square."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import KernelOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import decay_weights, directed, ema_of_square
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import Eps, Interval, L2Penalty, LearningRate, Momentum


class RMSprop(Optimizer):
    """RMSprop: gradients divided by a running root mean square, or by a running standard deviation.

    With the gradient g (plus `weight_decay` * param)::

        square_avg = alpha * square_avg + (1 - alpha) * g**2
        grad_avg = alpha * grad_avg + (1 - alpha) * g                     (if centered)
        v = square_avg - grad_avg**2 if centered else square_avg
        momentum_buffer = momentum * momentum_buffer + g / (sqrt(v) + eps)
        param -= lr * momentum_buffer

    Without momentum the buffer is g / (sqrt(v) + eps).

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.RMSprop([weight], lr=0.01)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9, -1.9]

    Papers: Tieleman & Hinton 2012, "Neural networks for machine learning", lecture 6.5; Graves 2013, "Generating
    sequences with recurrent neural networks", equations 38 to 45, for the centered form.  Eps stands outside the root,
    as in torch.

    Other than in torch, `momentum` and `centered` may be switched on later.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        alpha: Annotated[
            float, Interval("Invalid alpha value: ", high=1.0), "decay of the averages, sensibly below 1"
        ] = 0.99,
        eps: Eps = 1e-8,
        weight_decay: L2Penalty = 0,
        momentum: Momentum = 0,
        centered: Annotated[
            bool,
            "divide by the standard deviation; v then may come out below zero by rounding, which gives NaN as in torch",
        ] = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[KernelOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (
        # Centered, the square of one is taken from the other, of which 8 bits leave nothing.
        Slot("square_avg", signed=False, slow=True, float8="centered"),
        Slot("momentum_buffer", when="momentum"),
        Slot("grad_avg", when="centered", float8=False),
    )
    flags = ("momentum", "centered", "weight_decay", "cautious")

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:  # noqa: ARG004 (counted, not used)
        return {"weight": 1 - h.alpha, "neg_lr": -h.lr}

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        square_avg: Tensor,
        buffer: Tensor,
        grad_avg: Tensor,
        c: Any,
        flags: SimpleNamespace,
    ) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        square_avg = variance = ema_of_square(square_avg, grad, c.alpha, c.weight)
        if flags.centered:
            grad_avg = torch.lerp(grad_avg, grad, c.weight)
            variance = torch.addcmul(square_avg, grad_avg, grad_avg, value=-1)
        root = torch.sqrt(variance) + c.eps
        if flags.momentum:
            buffer = torch.addcdiv(buffer * c.momentum, grad, root)
            param, direction = directed(param, buffer, grad, c, flags)
            param = torch.add(param, direction, alpha=c.neg_lr)
        else:
            param = torch.addcdiv(param, grad, root, value=c.neg_lr)
        return param, square_avg, buffer, grad_avg
