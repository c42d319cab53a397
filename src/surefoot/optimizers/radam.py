"""RAdam: Adam with a rectified variance."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import adam_weights, decay_weights, ema_of_square
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import BETAS, EPS, LR, WEIGHT_DECAY


class RAdam(Optimizer):
    slots = (Slot("exp_avg"), Slot("exp_avg_sq"))
    flags = ("weight_decay", "decoupled_weight_decay")
    ranges = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        bias_correction2 = 1 - beta2**step
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * beta2**step / bias_correction2
        # Below the threshold the rectification is not used, and its radicand may be negative.
        tractable = max(rho, _TRACTABLE)
        radicand = (tractable - 4) * (tractable - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * tractable)
        return adam_weights(h) | {
            "bias_correction1": 1 - beta1**step,
            "bias2": bias_correction2**0.5,
            "rectified": rho > _TRACTABLE,
            "rectification": abs(radicand) ** 0.5,
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg = torch.lerp(exp_avg, grad, c.weight1)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        plain = exp_avg / c.bias_correction1 * c.lr
        adaptive = c.bias2 / (torch.sqrt(exp_avg_sq) + c.eps)
        change = torch.where(c.rectified, plain * adaptive * c.rectification, plain)
        return param - change, exp_avg, exp_avg_sq


_TRACTABLE = 5.0
