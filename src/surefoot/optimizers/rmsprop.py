"""RMSprop: gradients divided by a running root mean square."""

from types import SimpleNamespace
from typing import Any, Unpack

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import decay_weights, ema_of_square
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import EPS, LR, MOMENTUM, WEIGHT_DECAY, at_least_zero
from surefoot.whole_step import StepOptions


class RMSprop(Optimizer):
    """RMSprop: gradients divided by a running root mean square, or by a running standard deviation.

    With the gradient g (plus `weight_decay` * param)::

        square_avg = alpha * square_avg + (1 - alpha) * g**2
        grad_avg = alpha * grad_avg + (1 - alpha) * g                     (if centered)
        v = square_avg - grad_avg**2 if centered else square_avg
        momentum_buffer = momentum * momentum_buffer + g / (sqrt(v) + eps)
        param -= lr * momentum_buffer

    Without momentum the buffer is g / (sqrt(v) + eps).

    Args:
        params: tensors, named tensors or groups; see `surefoot.Optimizer`.
        lr: learning rate, a number or a tensor of one element, >= 0.
        alpha: decay of the averages, >= 0, sensibly below 1.
        eps: added to the root, in its units, >= 0.
        weight_decay: L2 penalty, a number >= 0.
        momentum: momentum factor, >= 0.
        centered: divide by the standard deviation; v then may come out below zero by rounding, which gives NaN as in
            torch.
        {options}

    Raises:
        ValueError: a hyperparameter is out of range.
        TypeError: a hyperparameter is no number.
        RuntimeError: engine options contradict one another, or, in `step`, a gradient is sparse.

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

    slots = (Slot("square_avg"), Slot("momentum_buffer", when="momentum"), Slot("grad_avg", when="centered"))
    flags = ("momentum", "centered", "weight_decay")
    ranges = {
        "lr": LR,
        "alpha": at_least_zero("alpha"),
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
        "momentum": MOMENTUM,
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

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
            param = torch.add(param, buffer, alpha=c.neg_lr)
        else:
            param = torch.addcdiv(param, grad, root, value=c.neg_lr)
        return param, square_avg, buffer, grad_avg
