"""Averaged stochastic gradient descent."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import decay_weights
from surefoot.rule import STEP, Scalar, Slot
from surefoot.rule.hyperparameters import LR, WEIGHT_DECAY, number


class ASGD(Optimizer):
    slots = (Slot("ax"),)
    scalars = (STEP, Scalar("eta", init="lr"), Scalar("mu", init=1.0))
    flags = ("weight_decay",)
    ranges = {
        "lr": LR,
        "lambd": number("lambd"),
        "alpha": number("alpha"),
        "t0": number("t0"),
        "weight_decay": WEIGHT_DECAY,
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any, eta: Any, mu: Any) -> dict[str, Any]:
        return {
            "shrink": 1 - h.lambd * eta,
            "neg_eta": -eta,
            "averaging": mu != 1,
            "averaging_weight": mu,
            "eta": h.lr / (1 + h.lambd * h.lr * step) ** h.alpha,
            "mu": 1 / max(1, step - h.t0),
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, ax: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        param = torch.add(param * c.shrink, grad, alpha=c.neg_eta)
        return param, torch.where(c.averaging, ax + (param - ax) * c.averaging_weight, param)
