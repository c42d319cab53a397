"""Adadelta: steps in the units of the parameter."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import decay_weights, ema_of_square
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import EPS, LR, WEIGHT_DECAY, Interval


class Adadelta(Optimizer):
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
