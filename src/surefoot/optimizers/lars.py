"""LARS: SGD whose step for each tensor is in proportion to the tensor's norm."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor
from torch.linalg import vector_norm

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import directed, trust_ratio
from surefoot.optimizers.sgd import Dampening, check_nesterov
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import WEIGHT_DECAY, Eps, LearningRate, Momentum, Number, at_least_zero


class LARS(Optimizer):
    """LARS, layer-wise adaptive rate scaling, and LARC.

    With the gradient g, and the momentum buffer b, which starts as the first g::

        ratio = trust_coeff * norm(param) / (norm(g) + weight_decay * norm(param) + eps), or 1 where a norm is 0
        g = ratio * (g + weight_decay * param)
        b = momentum * b + (1 - dampening) * g
        param -= lr * (g + momentum * b if nesterov else b)

    The norms are those of each tensor.  Without weight decay, as groups of biases and norms have it, ratio is 1 unless
    `always_adapt`.  Without momentum b is g.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> optimizer = surefoot.LARS([weight], lr=10.0, weight_decay=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in weight.tolist()]
        [2.97, -3.96]

    Paper: You, Gitman & Ginsburg 2017, "Large batch training of convolutional networks", algorithm 1, where lr stands
    inside of the buffer.  Numbers, options and state are those of timm's `Lars`.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1.0,
        momentum: Momentum = 0,
        dampening: Dampening = 0,
        weight_decay: Annotated[Number, WEIGHT_DECAY, "multiple of the parameter that is added to g"] = 0,
        nesterov: Annotated[bool, "look ahead by one step; needs momentum > 0 and dampening 0"] = False,
        trust_coeff: Annotated[float, at_least_zero("trust_coeff"), "trust coefficient"] = 0.001,
        eps: Eps = 1e-8,
        trust_clip: Annotated[bool, "let lr * ratio be at most lr (LARC): ratio is min(ratio / lr, 1)"] = False,
        always_adapt: Annotated[bool, "use the ratio in groups without weight decay too"] = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    scalars = ()
    slots = (Slot("momentum_buffer", when="momentum"),)
    flags = ("momentum", "nesterov", "weight_decay", "trust_clip", "always_adapt", "cautious")

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        check_nesterov(group)

    @staticmethod
    def coefficients(h: SimpleNamespace) -> dict[str, Any]:
        return {"neg_lr": -h.lr, "weight": 1 - h.dampening}

    @staticmethod
    def update(param: Tensor, grad: Tensor, buffer: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        if flags.weight_decay or flags.always_adapt:
            norm, of_grad = vector_norm(param), vector_norm(grad)
            ratio = c.trust_coeff * norm / (of_grad + norm * c.weight_decay + c.eps)
            ratio = trust_ratio(norm, of_grad, ratio)
            if flags.trust_clip:
                ratio = torch.where(ratio >= c.lr, 1.0, ratio / c.lr)  # both may be 0
            grad = torch.add(grad, param, alpha=c.weight_decay) * ratio
        if flags.momentum:
            buffer = torch.where(c.fresh, grad, torch.add(buffer * c.momentum, grad, alpha=c.weight))
            ahead = torch.add(grad, buffer, alpha=c.momentum) if flags.nesterov else buffer
            param, grad = directed(param, ahead, grad, c, flags)
        return torch.add(param, grad, alpha=c.neg_lr), buffer
