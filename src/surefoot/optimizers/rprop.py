"""Rprop: steps whose size follows the sign of the gradient only."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import LR, Each, number


class Rprop(Optimizer):
    slots = (Slot("prev"), Slot("step_size", init="lr"))
    ranges = {"lr": LR, "step_sizes": Each((number("step size"), number("step size")))}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, arguments(locals()))

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        low, high = group["etas"]
        if not 0.0 < low < 1.0 < high:
            raise ValueError(f"Invalid eta values: {low}, {high}; `etas` must be (a, b) with 0 < a < 1 < b")

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:  # noqa: ARG004 (counted, not used)
        return dict(zip(("shrink", "grow", "least", "most"), (*h.etas, *h.step_sizes), strict=True))

    @staticmethod
    def update(param: Tensor, grad: Tensor, prev: Tensor, step_size: Tensor, c: Any, flags: SimpleNamespace) -> Any:  # noqa: ARG004
        agreement = grad * prev
        # What is neither is zero, or NaN, which stays.
        unsigned = torch.where(agreement == 0, 1.0, agreement)
        factor = torch.where(agreement > 0, c.grow, torch.where(agreement < 0, c.shrink, unsigned))
        step_size = torch.clamp(step_size * factor, c.least, c.most)
        grad = torch.where(agreement < 0, 0.0, grad)
        return torch.addcmul(param, torch.sign(grad), step_size, value=-1), grad, step_size
