"""RAdam: Adam with a rectified variance."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import adam_averages, adam_weights, decay_weights, directed, rectification
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import EPS, Betas, Decoupled, L2OrDecoupled, LearningRate


class RAdam(Optimizer):
    """Adam with a rectified variance: plain momentum until the second moment can be trusted.

    With the gradient g (plus `weight_decay` * param, unless that is decoupled), t the number of the step, and
    rho_inf = 2 / (1 - beta2) - 1::

        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        r = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        adaptive = r * sqrt(1 - beta2**t) / (sqrt(exp_avg_sq) + eps) if rho > 5 else 1
        param -= lr * exp_avg / (1 - beta1**t) * adaptive

    Where weight decay is decoupled, param *= 1 - lr * weight_decay comes first.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.RAdam([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.8, -1.6]

    Paper: Liu et al. 2020, "On the variance of the adaptive learning rate and beyond", algorithm 2; as in torch from
    rho > 5 rather than 4.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Annotated[float, EPS, "added to the root, before its bias is corrected"] = 1e-8,
        weight_decay: L2OrDecoupled = 0,
        decoupled_weight_decay: Decoupled = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("exp_avg"), Slot("exp_avg_sq", signed=False, slow=True))
    flags = ("weight_decay", "decoupled_weight_decay", *DIRECTED)

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        rho, factor = rectification(beta2, step)
        return adam_weights(h) | {
            "bias_correction1": 1 - beta1**step,
            "bias2": (1 - beta2**step) ** 0.5,
            "rectified": rho > 5,  # noqa: PLR2004 (torch's; the paper has 4)
            "rectification": factor,
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg, exp_avg_sq = adam_averages(grad, exp_avg, exp_avg_sq, c)
        param, direction = directed(param, exp_avg, grad, c, flags)
        plain = direction / c.bias_correction1 * c.lr
        adaptive = c.bias2 / (torch.sqrt(exp_avg_sq) + c.eps)
        change = torch.where(c.rectified, plain * adaptive * c.rectification, plain)
        return param - change, exp_avg, exp_avg_sq
