"""ADOPT: Adam that normalizes before it averages, by the second moment of the step before."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import decay_weights, directed, ema_of_square, smaller
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import EPS, Betas, Decoupled, Interval, L2OrDecoupled, LearningRate


class ADOPT(Optimizer):
    """ADOPT, which converges with any beta2.

    With the gradient g (plus `weight_decay` * param, unless that is decoupled) and t the number of the step, the first
    step is exp_avg_sq = g**2 and nothing else; then::

        n = clamp(g / max(sqrt(exp_avg_sq), eps), -limit, limit), limit = (t - 1)**clip_exp
        exp_avg = beta1 * exp_avg + (1 - beta1) * n
        param -= lr * exp_avg
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2

    Where weight decay is decoupled, param *= 1 - lr * weight_decay comes before these.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.ADOPT([weight], lr=0.1)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     (weight**2).sum().backward()
        ...     optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.99, -1.99]

    Paper: Taniguchi et al. 2024, "ADOPT: modified Adam can converge with any beta2 with the optimal rate", algorithm 2.
    Numbers, options and state are those of timm's `Adopt`, whose `decoupled` is called as everywhere here; the authors'
    implementation has `clip_exp=0.25`.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.9999),
        eps: Annotated[float, EPS, "least root that is divided by"] = 1e-6,
        clip_exp: Annotated[
            float | None,
            Interval("Invalid clip_exp: ", low_open=True, optional=True),
            "power of t - 1 to which normalized gradients are limited; they are not if None",
        ] = 0.333,
        weight_decay: L2OrDecoupled = 0.0,
        decoupled_weight_decay: Decoupled = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("exp_avg"), Slot("exp_avg_sq", signed=False, slow=True))
    flags = ("clip_exp", "weight_decay", "decoupled_weight_decay", *DIRECTED)

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        later = smaller(step - 1, 1.0)  # than the first step, in which it is 0
        beta1, beta2 = h.betas[0], h.betas[1] * later
        return {
            "later": later,
            "limit": 0.0 if h.clip_exp is None else (step - 1) ** h.clip_exp,
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "shrink": 1 - h.lr * h.weight_decay * later,
            "neg_lr": -h.lr,
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        normed = grad / torch.clamp(torch.sqrt(exp_avg_sq), min=c.eps)
        if flags.clip_exp:
            normed = torch.clamp(normed, -c.limit, c.limit)
        exp_avg = torch.lerp(exp_avg, torch.where(c.later, normed, 0.0), c.weight1)
        param, direction = directed(param, exp_avg, grad, c, flags)
        param = torch.add(param, direction, alpha=c.neg_lr)
        return param, exp_avg, ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
