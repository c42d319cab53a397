"""NovoGrad: gradients divided by a running norm of their tensor, then averaged."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import adam_weights, amsgrad, decay_weights, directed
from surefoot.rule import DIRECTED, Slot, one_number
from surefoot.rule.hyperparameters import BETAS, WEIGHT_DECAY, Eps, LearningRate, Number


class NovoGrad(Optimizer):
    """NovoGrad, with one second moment for each tensor.

    With the gradient g::

        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * sum(g**2), or sum(g**2) where it was 0
        u = g / (sqrt(v) + eps) + weight_decay * param
        exp_avg = beta1 * exp_avg + u
        param -= lr * exp_avg

    v is exp_avg_sq, or with `amsgrad` the greatest exp_avg_sq so far; the sum is over each tensor, so that state is the
    size of the parameters once.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> optimizer = surefoot.NovoGrad([weight], lr=1.0)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [2.4, -3.2]

    Paper: Ginsburg et al. 2019, "Stochastic gradient methods with layer-wise adaptive moments for training of deep
    networks", algorithm 1.  Numbers, options and state are those of timm's `NvNovoGrad`, whose `decoupled_decay` is
    called as everywhere here.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: Annotated[
            tuple[float, float], BETAS, "(beta1, beta2), decay of the sum of u and of the average of sum(g**2)"
        ] = (0.95, 0.98),
        eps: Eps = 1e-8,
        weight_decay: Annotated[Number, WEIGHT_DECAY, "multiple of the parameter in u"] = 0,
        grad_averaging: Annotated[bool, "weigh u by 1 - beta1 in exp_avg"] = False,
        amsgrad: Annotated[bool, "divide by the greatest second moment so far"] = False,
        *,
        decoupled_weight_decay: Annotated[
            bool, "shrink the parameter by lr * weight_decay before the step, and leave the decay out of u"
        ] = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (
        Slot("exp_avg"),
        Slot("exp_avg_sq", shape=one_number, wide=True, signed=False),
        Slot("max_exp_avg_sq", when="amsgrad", shape=one_number, wide=True, signed=False),
    )
    flags = ("amsgrad", "weight_decay", "decoupled_weight_decay", *DIRECTED)

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:  # noqa: ARG004 (counted, not used)
        weights = adam_weights(h) | {"neg_lr": -h.lr}
        return weights if h.grad_averaging else weights | {"weight1": 1.0}

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, maxima: Tensor, c: Any, flags: SimpleNamespace
    ) -> Any:
        of_squares = torch.sum(grad * grad)
        averaged = exp_avg_sq * c.beta2 + of_squares * c.weight2
        exp_avg_sq = torch.where(exp_avg_sq == 0, of_squares, averaged)
        divisor, maxima = amsgrad(exp_avg_sq, maxima, flags)
        normalized = grad / (torch.sqrt(divisor) + c.eps)
        param, u = decay_weights(param, normalized, c, flags)
        exp_avg = torch.add(exp_avg * c.beta1, u, alpha=c.weight1)
        param, direction = directed(param, exp_avg, grad, c, flags)
        return torch.add(param, direction, alpha=c.neg_lr), exp_avg, exp_avg_sq, maxima
