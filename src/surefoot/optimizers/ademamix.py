"""AdEMAMix: Adam with a second, much slower average of gradients."""

import math
from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import directed, ema, ema_of_square, ema_weights, shrink_weights, smaller
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import THREE_BETAS, Eps, Interval, LearningRate, Shrinking, at_least_zero

_WarmUp = Interval("Invalid warm-up: ", low_open=True, optional=True)


class AdEMAMix(Optimizer):
    """AdEMAMix: the step of Adam, and `alpha` times that of an average over tens of thousands of gradients.

    With the gradient g and t the number of the step, after param *= 1 - lr * weight_decay::

        exp_avg_fast = beta1 * exp_avg_fast + (1 - beta1) * g
        exp_avg_slow = beta3(t) * exp_avg_slow + (1 - beta3(t)) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        u = exp_avg_fast / (1 - beta1**t) + alpha(t) * exp_avg_slow
        param -= lr * u / (sqrt(exp_avg_sq / (1 - beta2**t)) + eps)

    alpha(t) = alpha * min(1, t / `alpha_warmup`).  With `beta3_warmup` the half-life of the slow average grows linearly
    from that of beta1 to that of beta3: 1 / log(beta3(t)) = (1 - a) / log(beta1) + a / log(beta3), where
    a = min(1, t / `beta3_warmup`).

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.AdEMAMix([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9, -1.9]

    Paper: Pagliardini, Ablin & Grangier 2024, "The AdEMAMix optimizer: better, faster, older", algorithm 1; there alpha
    is 4 to 10, and both warm-ups last as long as the training.  Numbers, options and state are those of the authors'
    implementation, but that beta1 = 0 has a state for the fast average too, which then is the gradient.

    The slow average is never kept in 8 bits.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: Annotated[
            tuple[float, float, float],
            THREE_BETAS,
            "(beta1, beta2, beta3), decay of the fast average of g, of the average of g**2, of the slow average of g",
        ] = (0.9, 0.999, 0.9999),
        alpha: Annotated[float, at_least_zero("alpha"), "weight of the slow average in the step"] = 2.0,
        beta3_warmup: Annotated[float | None, _WarmUp, "steps in which beta3 is reached; at once if None"] = None,
        alpha_warmup: Annotated[float | None, _WarmUp, "steps in which alpha is reached; at once if None"] = None,
        eps: Eps = 1e-8,
        weight_decay: Shrinking = 0.0,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (
        Slot("exp_avg_fast"),
        # A step adds a ten thousandth of a gradient to it: what 8 bits round at random would outweigh that.
        Slot("exp_avg_slow", slow=True, float8=False),
        Slot("exp_avg_sq", signed=False, slow=True),
    )
    flags = ("weight_decay", *DIRECTED)
    also_called = MappingProxyType(
        {
            "exp_avg": ("exp_avg_fast",),
            "t_alpha_beta3": ("alpha_warmup", "beta3_warmup"),
            "t_alpha": ("alpha_warmup",),
            "t_beta3": ("beta3_warmup",),
        }
    )

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2, beta3 = h.betas
        if h.beta3_warmup is not None:
            beta3 = _between(beta1, beta3, smaller(step / h.beta3_warmup, 1.0))
        alpha = h.alpha if h.alpha_warmup is None else h.alpha * smaller(step / h.alpha_warmup, 1.0)
        return ema_weights(beta1, beta2, beta3) | {
            "bias1": 1 - beta1**step,
            "bias2": (1 - beta2**step) ** 0.5,
            "alpha": alpha,
            "shrink": 1 - h.lr * h.weight_decay,
            "neg_lr": -h.lr,
        }

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, fast: Tensor, slow: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace
    ) -> Any:
        param = shrink_weights(param, c, flags)
        fast = ema(fast, grad, c.beta1, c.weight1)
        slow = ema(slow, grad, c.beta3, c.weight3)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        denom = torch.sqrt(exp_avg_sq) / c.bias2 + c.eps
        param, direction = directed(param, torch.add(fast / c.bias1, slow, alpha=c.alpha), grad, c, flags)
        return torch.addcdiv(param, direction, denom, value=c.neg_lr), fast, slow, exp_avg_sq


def _between(start: Any, end: Any, progress: Any) -> Any:
    """Return the decay whose half-life lies between those of two decays, at a fraction of the way."""
    inverse = (1 - progress) * _inverse_log(start) + progress * _inverse_log(end)
    return math.e ** (1 / smaller(inverse, -1e-30))


def _inverse_log(decay: Any) -> Any:
    """Return 1 / log(decay), which is 0 for a decay of 0."""
    if isinstance(decay, Tensor):
        return 1 / torch.log(decay)
    return 1 / math.log(decay) if decay else 0.0
