"""Rprop: steps whose size follows the sign of the gradient only."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import LR, Each, Number, number


class Rprop(Optimizer):
    """Resilient propagation: a step size for each element, which follows the sign of the gradient only.

    With the gradient g and prev, the gradient of the step before::

        factor = eta_minus if g * prev < 0 else eta_plus if g * prev > 0 else 1
        step_size = min(max(step_size * factor, least), most)
        prev = g = 0 if g * prev < 0 else g
        param -= sign(g) * step_size

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Rprop([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9, -1.9]

    Papers: Riedmiller & Braun 1993, "A direct adaptive method for faster backpropagation learning: the RPROP
    algorithm"; Igel & Huesken 2000, "Improving the Rprop learning algorithm", the variant iRprop- of section 3.
    """

    def __init__(
        self,
        params: Params,
        lr: Annotated[
            Number, LR, "the first step size, a number or a tensor of one element; later changes have no effect"
        ] = 1e-2,
        etas: Annotated[
            tuple[float, float],
            Each((number("eta"),) * 2),
            "(eta_minus, eta_plus), factors of the step size with 0 < eta_minus < 1 < eta_plus",
        ] = (0.5, 1.2),
        step_sizes: Annotated[
            tuple[float, float],
            Each((number("step size"),) * 2),
            "(least, most), bounds of the step size, in the units of the parameter",
        ] = (1e-6, 50),
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("prev"), Slot("step_size", init="lr", signed=False, float8=False))

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
        factor = torch.where(agreement > 0, c.grow, torch.where(agreement < 0, c.shrink, 1.0))
        step_size = torch.clamp(step_size * factor, c.least, c.most)
        grad = torch.where(agreement < 0, 0.0, grad)
        return torch.addcmul(param, torch.sign(grad), step_size, value=-1), grad, step_size
