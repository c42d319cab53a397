"""Adam and AdamW."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import adam_weights, decay_weights, ema_of_square
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import BETAS, EPS, LR, WEIGHT_DECAY


class Adam(Optimizer):
    slots = (Slot("exp_avg"), Slot("exp_avg_sq"), Slot("max_exp_avg_sq", when="amsgrad"))
    flags = ("amsgrad", "weight_decay", "decoupled_weight_decay")
    ranges = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    instead_of_sparse = ", please consider SparseAdam instead"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        bias_correction1, bias_correction2 = 1 - beta1**step, 1 - beta2**step
        return adam_weights(h) | {"neg_step_size": -(h.lr / bias_correction1), "bias": bias_correction2**0.5}

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        maximum: Tensor,
        c: Any,
        flags: SimpleNamespace,
    ) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg = torch.lerp(exp_avg, grad, c.weight1)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        if flags.amsgrad:
            maximum = torch.maximum(maximum, exp_avg_sq)
        denom = torch.sqrt(maximum if flags.amsgrad else exp_avg_sq) / c.bias + c.eps
        return torch.addcdiv(param, exp_avg, denom, value=c.neg_step_size), exp_avg, exp_avg_sq, maximum


class AdamW(Adam):
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, decoupled_weight_decay=True, **arguments(locals()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
