"""RAdam: Adam with a rectified variance."""

from types import SimpleNamespace
from typing import Any, Unpack

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import adam_weights, decay_weights, ema_of_square, larger
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import BETAS, EPS, LR, WEIGHT_DECAY
from surefoot.whole_step import StepOptions


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

    Args:
        params: tensors, named tensors or groups; see `surefoot.Optimizer`.
        lr: learning rate, a number or a tensor of one element, >= 0.
        betas: (beta1, beta2), decay of the averages of g and of g**2, numbers in [0, 1).
        eps: added to the root, before its bias is corrected, >= 0.
        weight_decay: L2 penalty, or shrinking of the parameter where decoupled, a number >= 0.
        decoupled_weight_decay: shrink the parameter by lr * weight_decay (AdamW) rather than adding to the gradient.
        {options}

    Raises:
        ValueError: a hyperparameter is out of range.
        TypeError: a hyperparameter is no number.
        RuntimeError: engine options contradict one another, or, in `step`, a gradient is sparse.

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

    slots = (Slot("exp_avg"), Slot("exp_avg_sq"))
    flags = ("weight_decay", "decoupled_weight_decay")
    ranges = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        bias_correction2 = 1 - beta2**step
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * beta2**step / bias_correction2
        # Below the threshold the rectification is not used, and its radicand may be negative or infinite.
        tractable, limit = larger(rho, _TRACTABLE), larger(rho_inf, _TRACTABLE)
        radicand = (tractable - 4) * (tractable - 2) * limit / ((limit - 4) * (limit - 2) * tractable)
        return adam_weights(h) | {
            "bias_correction1": 1 - beta1**step,
            "bias2": bias_correction2**0.5,
            "rectified": rho > _TRACTABLE,
            "rectification": radicand**0.5,
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg = torch.lerp(exp_avg, grad, c.weight1)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        plain = exp_avg / c.bias_correction1 * c.lr
        adaptive = c.bias2 / (torch.sqrt(exp_avg_sq) + c.eps)
        change = torch.where(c.rectified, plain * adaptive * c.rectification, plain)
        return param - change, exp_avg, exp_avg_sq


_TRACTABLE = 5.0
