"""Adagrad: per-element rates from the sum of squared gradients."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import decay_weights
from surefoot.rule import Slot, Sparse
from surefoot.rule.hyperparameters import EPS, LR, WEIGHT_DECAY, at_least_zero


class Adagrad(Optimizer):
    slots = (Slot("sum", init="initial_accumulator_value"),)
    flags = ("weight_decay",)
    ranges = {
        "lr": LR,
        "lr_decay": at_least_zero("lr_decay"),
        "weight_decay": WEIGHT_DECAY,
        "initial_accumulator_value": at_least_zero("initial_accumulator_value"),
        "eps": EPS,
    }
    sparse = Sparse.ROWS
    state_at_construction = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def share_memory(self) -> None:
        """Move the accumulated sums to shared memory, for training by several processes at once."""
        for state in self.state.values():
            state["sum"].share_memory_()

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        return {"neg_step_size": -(h.lr / (1 + (step - 1) * h.lr_decay))}

    @staticmethod
    def update(param: Tensor, grad: Tensor, total: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        total = torch.addcmul(total, grad, grad)
        return torch.addcdiv(param, grad, torch.sqrt(total) + c.eps, value=c.neg_step_size), total
