"""RMSprop: gradients divided by a running root mean square."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import decay_weights, ema_of_square
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import EPS, LR, MOMENTUM, WEIGHT_DECAY, at_least_zero


class RMSprop(Optimizer):
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
