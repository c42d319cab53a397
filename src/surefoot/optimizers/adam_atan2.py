"""Adam-atan2: Adam whose quotient is an angle, which needs no eps."""

from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import adam_averages, adam_weights, directed, shrink_weights
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import Betas, Interval, LearningRate, Shrinking


class AdamAtan2(Optimizer):
    """Adam-atan2: a step does not depend on the scale of gradients, and no element moves farther than a * pi/2 * lr.

    With the gradient g and t the number of the step, after param *= 1 - lr * weight_decay::

        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        param -= lr * a * atan2(exp_avg / (1 - beta1**t), b * sqrt(exp_avg_sq / (1 - beta2**t)))

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.AdamAtan2([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9003, -1.9003]

    Paper: Everett et al. 2024, "Scaling exponents across parameterizations and optimizers", section 5.  Numbers and
    defaults are those of adam-atan2-pytorch, where a second moment of 0 under a first that is not moves as far as any.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: Shrinking = 0.0,
        a: Annotated[float, Interval("Invalid a: ", low_open=True), "factor of the angle"] = 1.27,
        b: Annotated[float, Interval("Invalid b: ", low_open=True), "factor of the root inside the angle"] = 1.0,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("exp_avg"), Slot("exp_avg_sq", signed=False, slow=True))
    flags = ("weight_decay", *DIRECTED)
    also_called = MappingProxyType({"steps": ("step",)})

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        return adam_weights(h) | {
            "scale1": 1 / (1 - beta1**step),
            "scale2": h.b * h.b / (1 - beta2**step),
            "neg_lr": -h.lr * h.a,
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param = shrink_weights(param, c, flags)
        exp_avg, exp_avg_sq = adam_averages(grad, exp_avg, exp_avg_sq, c)
        angle = torch.atan2(exp_avg * c.scale1, torch.sqrt(exp_avg_sq * c.scale2))
        param, direction = directed(param, angle, grad, c, flags)
        return torch.add(param, direction, alpha=c.neg_lr), exp_avg, exp_avg_sq
