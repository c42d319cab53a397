"""Stochastic gradient descent, with or without momentum."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import decay_weights, directed
from surefoot.rule import Slot, Sparse
from surefoot.rule.hyperparameters import WEIGHT_DECAY, LearningRate, Momentum, Number, finite

Dampening = Annotated[float, finite("dampening", low=-torch.inf), "dampening of the gradient in the buffer"]


def check_nesterov(group: Mapping[str, Any]) -> None:
    """Raise ValueError when a group asks for Nesterov momentum without momentum, or with dampening."""
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening, but got "
            f"momentum={group['momentum']}, dampening={group['dampening']}"
        )


class SGD(Optimizer):
    """Stochastic gradient descent with momentum and Nesterov's variant.

    With the gradient g (plus `weight_decay` * param) and the momentum buffer b, which starts as the first g::

        b = momentum * b + (1 - dampening) * g
        param -= lr * (g + momentum * b if nesterov else b)

    Without momentum b is g.  Sutskever et al. 2013, "On the importance of initialization and momentum in deep
    learning", with the learning rate outside the buffer as in torch.

    Sparse gradients update only the rows present; with momentum, whose buffer moves every row, they are made dense.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = surefoot.SGD([weight], lr=0.1, momentum=0.9)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> weight.tolist()
        [0.800000011920929, 1.600000023841858]
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        momentum: Momentum = 0,
        dampening: Dampening = 0,
        weight_decay: Annotated[Number, WEIGHT_DECAY, "L2 penalty, 0 with sparse gradients"] = 0,
        nesterov: Annotated[bool, "look ahead by one step; needs momentum > 0 and dampening 0"] = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    scalars = ()
    slots = (Slot("momentum_buffer", when="momentum"),)
    flags = ("momentum", "nesterov", "weight_decay", "cautious")
    sparse = Sparse.ROWS

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        check_nesterov(group)

    @classmethod
    def rows_suffice(cls, flags: Mapping[str, bool]) -> bool:
        return not flags["momentum"]

    @staticmethod
    def coefficients(h: SimpleNamespace) -> dict[str, Any]:
        return {"neg_lr": -h.lr, "weight": 1 - h.dampening}

    @staticmethod
    def update(param: Tensor, grad: Tensor, buffer: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        if flags.momentum:
            buffer = torch.where(c.fresh, grad, torch.add(buffer * c.momentum, grad, alpha=c.weight))
            ahead = torch.add(grad, buffer, alpha=c.momentum) if flags.nesterov else buffer
            param, grad = directed(param, ahead, grad, c, flags)
        return torch.add(param, grad, alpha=c.neg_lr), buffer
