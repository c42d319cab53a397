"""LaProp: Adam that averages normalized gradients rather than normalizing an average."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import adam_weights, directed, ema, ema_of_square, shrink_weights
from surefoot.rule import DIRECTED, STEP, Scalar, Slot
from surefoot.rule.hyperparameters import EPS, Betas, LearningRate, Shrinking


class LaProp(Optimizer):
    """LaProp: momentum and adaptivity apart.

    With the gradient g::

        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        exp_avg_lr_2 = beta2 * exp_avg_lr_2 + 1 - beta2
        n = g / (sqrt(exp_avg_sq / exp_avg_lr_2) + eps)
        exp_avg = beta1 * exp_avg + (1 - beta1) * lr * n
        exp_avg_lr_1 = beta1 * exp_avg_lr_1 + (1 - beta1) * lr
        param -= lr / exp_avg_lr_1 * exp_avg
        param *= 1 - lr * weight_decay

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.LaProp([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9, -1.9]

    Paper: Ziyin, Wang & Ueda 2020, "LaProp: separating momentum and adaptivity in Adam", algorithm 1.  Numbers and
    state are those of timm's `LaProp`, where learning rates are averaged with gradients, so that a schedule is felt at
    once.  `cautious_weight_decay` comes before the step.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 4e-4,
        betas: Betas = (0.9, 0.999),
        eps: Annotated[float, EPS, "added to the root, in its units"] = 1e-15,
        weight_decay: Shrinking = 0.0,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("exp_avg"), Slot("exp_avg_sq", signed=False, slow=True))
    scalars = (STEP, Scalar("exp_avg_lr_1"), Scalar("exp_avg_lr_2"))
    flags = ("weight_decay", *DIRECTED)

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any, exp_avg_lr_1: Any, exp_avg_lr_2: Any) -> dict[str, Any]:  # noqa: ARG004 (counted, not used)
        beta1, beta2 = h.betas
        exp_avg_lr_1 = exp_avg_lr_1 * beta1 + (1 - beta1) * h.lr
        exp_avg_lr_2 = exp_avg_lr_2 * beta2 + (1 - beta2)
        return adam_weights(h) | {
            "exp_avg_lr_1": exp_avg_lr_1,
            "exp_avg_lr_2": exp_avg_lr_2,
            "weight1": (1 - beta1) * h.lr,
            "neg_step_size": -_quotient(h.lr, exp_avg_lr_1),
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        normed = grad / (torch.sqrt(exp_avg_sq / c.exp_avg_lr_2) + c.eps)
        exp_avg = ema(exp_avg, normed, c.beta1, c.weight1)
        param, direction = directed(param, exp_avg, grad, c, flags)
        param = torch.add(param, direction, alpha=c.neg_step_size)
        return shrink_weights(param, c, flags), exp_avg, exp_avg_sq


def _quotient(lr: Any, average: Any) -> Any:
    """Return lr / average, 0 where all learning rates have been 0."""
    if isinstance(average, Tensor):
        return torch.where(average == 0, 0.0, lr / torch.where(average == 0, 1.0, average))
    return lr / average if average else 0.0
