"""Lion: steps of one size, in the direction of a momentum's sign."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import adam_weights, directed, ema, shrink_weights
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import BETAS, LearningRate, Shrinking


class Lion(Optimizer):
    """Lion: every element moves by the learning rate, along the sign of an average of gradients.

    With the gradient g, after param *= 1 - lr * weight_decay::

        param -= lr * sign(beta1 * exp_avg + (1 - beta1) * g)
        exp_avg = beta2 * exp_avg + (1 - beta2) * g

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Lion([weight], lr=0.1, weight_decay=0.5)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.85, -1.8]

    Paper: Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2.  Learning rates are three to
    ten times smaller than AdamW's, and weight decay as much greater.

    The sign of 0 is 0, and so is that of NaN, as in torch: after a gradient of NaN an element stands still for good,
    which the option `nonfinite` prevents.  Of a complex number the real and the imaginary part have signs of their own.
    Numbers and state are those of the authors' implementation.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-4,
        betas: Annotated[
            tuple[float, float], BETAS, "(beta1, beta2), decay of the average in the step and in the state"
        ] = (0.9, 0.99),
        weight_decay: Shrinking = 0.0,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("exp_avg"),)
    scalars = ()
    flags = ("weight_decay", *DIRECTED)

    @staticmethod
    def coefficients(h: SimpleNamespace) -> dict[str, Any]:
        return adam_weights(h) | {"neg_lr": -h.lr}

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param = shrink_weights(param, c, flags)
        direction = torch.sign(ema(exp_avg, grad, c.beta1, c.weight1))
        param, direction = directed(param, direction, grad, c, flags)
        return torch.add(param, direction, alpha=c.neg_lr), ema(exp_avg, grad, c.beta2, c.weight2)
