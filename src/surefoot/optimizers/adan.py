"""Adan: Nesterov momentum from differences of gradients."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import directed, ema, ema_of_square, ema_weights, shrink_weights
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import THREE_BETAS, Eps, LearningRate, Shrinking


class Adan(Optimizer):
    """Adan: averages of gradients, of their differences from step to step, and of squares of what both foretell.

    With the gradient g and t the number of the step::

        d = g + neg_pre_grad, 0 in the first step
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_diff = beta2 * exp_avg_diff + (1 - beta2) * d
        exp_avg_sq = beta3 * exp_avg_sq + (1 - beta3) * (g + beta2 * d)**2
        u = exp_avg / (1 - beta1**t) + beta2 * exp_avg_diff / (1 - beta2**t)
        param -= lr * u / (sqrt(exp_avg_sq / (1 - beta3**t)) + eps)
        param /= 1 + lr * weight_decay
        neg_pre_grad = -g

    With `no_prox` the decay is param *= 1 - lr * weight_decay, and comes before the step.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Adan([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9, -1.9]

    Paper: Xie et al. 2022, "Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models", algorithm 1,
    whose betas are 1 minus these.  Numbers, options and state are those of the authors' implementation, but that every
    parameter counts its own steps, so that one that joins late is corrected as it should be; its `max_grad_norm` is the
    option of every optimizer here.

    The previous gradient is never kept in 8 bits.  `cautious_weight_decay` comes before the step.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: Annotated[
            tuple[float, float, float],
            THREE_BETAS,
            "(beta1, beta2, beta3), decay of the averages of g, of its differences, and of squares",
        ] = (0.98, 0.92, 0.99),
        eps: Eps = 1e-8,
        weight_decay: Shrinking = 0.0,
        no_prox: Annotated[bool, "shrink the parameter before the step, as AdamW does"] = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (
        Slot("exp_avg"),
        Slot("exp_avg_diff"),
        Slot("exp_avg_sq", signed=False, slow=True),
        # Differences of near values are taken of it.
        Slot("neg_pre_grad", float8=False),
    )
    flags = ("no_prox", "weight_decay", *DIRECTED)

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2, beta3 = h.betas
        decay = h.lr * h.weight_decay
        return ema_weights(*h.betas) | {
            "first": step == 1,
            "bias3": (1 - beta3**step) ** 0.5,
            "step_size": h.lr / (1 - beta1**step),
            "step_size_diff": h.lr * beta2 / (1 - beta2**step),
            "shrink": 1 - decay if h.no_prox else 1 / (1 + decay),
        }

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_diff: Tensor,
        exp_avg_sq: Tensor,
        neg_pre_grad: Tensor,
        c: Any,
        flags: SimpleNamespace,
    ) -> Any:
        diff = torch.where(c.first, 0.0, neg_pre_grad + grad)
        exp_avg = ema(exp_avg, grad, c.beta1, c.weight1)
        exp_avg_diff = ema(exp_avg_diff, diff, c.beta2, c.weight2)
        exp_avg_sq = ema_of_square(exp_avg_sq, torch.add(grad, diff, alpha=c.beta2), c.beta3, c.weight3)
        denom = torch.sqrt(exp_avg_sq) / c.bias3 + c.eps
        direction = torch.add(exp_avg * c.step_size, exp_avg_diff, alpha=c.step_size_diff)
        if flags.no_prox:
            param = shrink_weights(param, c, flags)
        param, direction = directed(param, direction, grad, c, flags)
        param = param - direction / denom
        if not flags.no_prox:
            param = shrink_weights(param, c, flags)
        return param, exp_avg, exp_avg_diff, exp_avg_sq, -grad
