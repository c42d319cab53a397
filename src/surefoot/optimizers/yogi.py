"""Yogi: Adam whose second moment grows and shrinks by sums, not by factors."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import adam_weights, decay_weights, directed, ema
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import Betas, Eps, L2Penalty, LearningRate, at_least_zero


class Yogi(Optimizer):
    """Yogi: learning rates that cannot grow fast.

    With the gradient g (plus `weight_decay` * param) and t the number of the step::

        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq -= (1 - beta2) * sign(exp_avg_sq - g**2) * g**2
        param -= lr * (exp_avg / (1 - beta1**t)) / (sqrt(exp_avg_sq / (1 - beta2**t)) + eps)

    Both averages begin as `initial_accumulator`.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Yogi([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9001, -1.9]

    Paper: Zaheer et al. 2018, "Adaptive methods for nonconvex optimization", algorithm 2, with Adam's corrections of
    bias.  Numbers, options and state are those of torch_optimizer's `Yogi`, as those of TensorFlow Addons are.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-3,
        initial_accumulator: Annotated[
            float, at_least_zero("initial_accumulator"), "what both averages begin from"
        ] = 1e-6,
        weight_decay: L2Penalty = 0,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (
        Slot("exp_avg", init="initial_accumulator"),
        Slot("exp_avg_sq", init="initial_accumulator", signed=False, slow=True),
    )
    flags = ("weight_decay", "cautious")

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        return adam_weights(h) | {
            "neg_weight2": beta2 - 1,
            "neg_step_size": -(h.lr / (1 - beta1**step)),
            "bias2": (1 - beta2**step) ** 0.5,
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg = ema(exp_avg, grad, c.beta1, c.weight1)
        square = grad * grad
        exp_avg_sq = torch.addcmul(exp_avg_sq, torch.sign(exp_avg_sq - square), square, value=c.neg_weight2)
        denom = torch.sqrt(exp_avg_sq) / c.bias2 + c.eps
        param, direction = directed(param, exp_avg, grad, c, flags)
        return torch.addcdiv(param, direction, denom, value=c.neg_step_size), exp_avg, exp_avg_sq
