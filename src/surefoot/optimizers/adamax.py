"""Adamax: Adam in the infinity norm."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import ModeOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import decay_weights, directed
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import BETAS, EPS, L2Penalty, LearningRate


class Adamax(Optimizer):
    """Adam in the infinity norm.

    With the gradient g (plus `weight_decay` * param) and t the number of the step::

        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_inf = max(beta2 * exp_inf, |g| + eps)
        param -= lr / (1 - beta1**t) * exp_avg / exp_inf

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Adamax([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9, -1.9]

    Paper: Kingma & Ba 2015, "Adam: a method for stochastic optimization", algorithm 2, with torch's eps.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 2e-3,
        betas: Annotated[
            tuple[float, float], BETAS, "(beta1, beta2), decay of the average of g and of the greatest |g|"
        ] = (0.9, 0.999),
        eps: Annotated[float, EPS, "added to |g|, in its units"] = 1e-8,
        weight_decay: L2Penalty = 0,
        foreach: bool | None = None,
        **options: Unpack[ModeOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("exp_avg"), Slot("exp_inf", signed=False, slow=True))
    flags = ("weight_decay", "cautious")

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        return {"weight1": 1 - beta1, "beta2": beta2, "neg_step_size": -(h.lr / (1 - beta1**step))}

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_inf: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg = torch.lerp(exp_avg, grad, c.weight1)
        exp_inf = torch.maximum(exp_inf * c.beta2, torch.abs(grad) + c.eps)
        param, direction = directed(param, exp_avg, grad, c, flags)
        return torch.addcdiv(param, direction, exp_inf, value=c.neg_step_size), exp_avg, exp_inf
