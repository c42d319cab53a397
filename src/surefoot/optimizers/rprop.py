"""Rprop: steps whose size follows the sign of the gradient only."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Unpack

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import LR, Each, number
from surefoot.whole_step import StepOptions


class Rprop(Optimizer):
    """Resilient propagation: a step size for each element, which follows the sign of the gradient only.

    With the gradient g and prev, the gradient of the step before::

        factor = eta_minus if g * prev < 0 else eta_plus if g * prev > 0 else 1
        step_size = min(max(step_size * factor, least), most)
        prev = g = 0 if g * prev < 0 else g
        param -= sign(g) * step_size

    Args:
        params: tensors, named tensors or groups; see `surefoot.Optimizer`.
        lr: the first step size, a number or a tensor of one element, >= 0; later changes have no effect.
        etas: (eta_minus, eta_plus), factors of the step size with 0 < eta_minus < 1 < eta_plus.
        step_sizes: (least, most), bounds of the step size, in the units of the parameter.
        {options}

    Raises:
        ValueError: a hyperparameter is out of range.
        TypeError: a hyperparameter is no number.
        RuntimeError: engine options contradict one another, or, in `step`, a gradient is sparse.

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

    slots = (Slot("prev"), Slot("step_size", init="lr"))
    ranges = {"lr": LR, "etas": Each((number("eta"),) * 2), "step_sizes": Each((number("step size"),) * 2)}

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
        state_dtype: torch.dtype | None = None,
        **options: Unpack[StepOptions],
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
        factor = torch.where(agreement > 0, c.grow, torch.where(agreement < 0, c.shrink, 1.0))
        step_size = torch.clamp(step_size * factor, c.least, c.most)
        grad = torch.where(agreement < 0, 0.0, grad)
        return torch.addcmul(param, torch.sign(grad), step_size, value=-1), grad, step_size
