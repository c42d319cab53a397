"""AdaBelief: Adam divided by how far gradients are from their average, rather than by how great they are."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import amsgrad, decay_weights, directed, ema, ema_of_square, ema_weights, rectification
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import EPS, Betas, Decoupled, L2OrDecoupled, LearningRate


class AdaBelief(Optimizer):
    """AdaBelief, with RAdam's rectification.

    With the gradient g (plus `weight_decay` * param, unless that is decoupled), t the number of the step, and rho and r
    as in `RAdam`::

        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_var = beta2 * exp_avg_var + (1 - beta2) * (g - exp_avg)**2 + eps
        adaptive = r * sqrt(1 - beta2**t) / (sqrt(v) + eps) if rho >= 5 else 1
        param -= lr * exp_avg / (1 - beta1**t) * adaptive

    v is exp_avg_var, or with `amsgrad` the greatest exp_avg_var so far.  Without `rectify`
    adaptive = 1 / (sqrt(v / (1 - beta2**t)) + eps) in every step.  Where weight decay is decoupled,
    param *= 1 - lr * weight_decay comes first, or param *= 1 - weight_decay with `fixed_decay`.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.AdaBelief([weight], lr=0.1, rectify=False)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.8889, -1.8889]

    Paper: Zhuang et al. 2020, "AdaBelief optimizer: adapting stepsizes by the belief in observed gradients", algorithm
    2.  Numbers, options and state are those of the authors' implementation (0.2), whose `weight_decouple` is called as
    everywhere here; other than there `amsgrad` counts with `rectify` too.  The authors take an eps of 1e-16 for
    transformers and 1e-8 for convolutional networks.

    Since eps is added to the state in each step, small ones are lost beside an exp_avg_var that is 1e7 times greater
    in float32, or 300 times in bfloat16.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Annotated[float, EPS, "added to the variance in each step, and to its root"] = 1e-16,
        weight_decay: L2OrDecoupled = 0,
        amsgrad: Annotated[bool, "divide by the greatest variance so far"] = False,
        decoupled_weight_decay: Decoupled = True,
        fixed_decay: Annotated[bool, "shrink the parameter by `weight_decay`, not by lr * weight_decay"] = False,
        rectify: Annotated[bool, "take smaller steps until the variance can be trusted"] = True,
        degenerated_to_sgd: Annotated[bool, "step by the average while it cannot; else not at all"] = True,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (
        Slot("exp_avg"),
        Slot("exp_avg_var", signed=False, slow=True),
        Slot("max_exp_avg_var", when="amsgrad", signed=False),
    )
    flags = ("amsgrad", "rectify", "weight_decay", "decoupled_weight_decay", *DIRECTED)

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        step_size, bias2 = h.lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
        rho, factor = rectification(beta2, step)
        return ema_weights(*h.betas) | {
            "shrink": 1 - (1 if h.fixed_decay else h.lr) * h.weight_decay,
            "bias2": bias2,
            "neg_step_size": -step_size,
            "rectified": rho >= 5,  # noqa: PLR2004 (the authors'; the paper has no rectification)
            "adaptive": step_size * factor * bias2,
            "plain": step_size if h.degenerated_to_sgd else 0.0,
        }

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_var: Tensor,
        maximum: Tensor,
        c: Any,
        flags: SimpleNamespace,
    ) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg = ema(exp_avg, grad, c.beta1, c.weight1)
        exp_avg_var = ema_of_square(exp_avg_var, grad - exp_avg, c.beta2, c.weight2) + c.eps
        divisor, maximum = amsgrad(exp_avg_var, maximum, flags)
        root = torch.sqrt(divisor)
        param, direction = directed(param, exp_avg, grad, c, flags)
        if flags.rectify:
            adaptive = direction / (root + c.eps) * c.adaptive
            param = param - torch.where(c.rectified, adaptive, direction * c.plain)
        else:
            param = torch.addcdiv(param, direction, root / c.bias2 + c.eps, value=c.neg_step_size)
        return param, exp_avg, exp_avg_var, maximum
