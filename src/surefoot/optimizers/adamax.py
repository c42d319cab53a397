"""Adamax: Adam in the infinity norm."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import decay_weights
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import BETAS, EPS, LR, WEIGHT_DECAY


class Adamax(Optimizer):
    slots = (Slot("exp_avg"), Slot("exp_inf"))
    flags = ("weight_decay",)
    ranges = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        return {"weight1": 1 - beta1, "beta2": beta2, "neg_step_size": -(h.lr / (1 - beta1**step))}

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_inf: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg = torch.lerp(exp_avg, grad, c.weight1)
        exp_inf = torch.maximum(exp_inf * c.beta2, torch.abs(grad) + c.eps)
        return torch.addcdiv(param, exp_avg, exp_inf, value=c.neg_step_size), exp_avg, exp_inf
