"""Signum and SignSGD: steps of one size, along the sign of a momentum or of the gradient."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import directed, shrink_weights
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import Interval, LearningRate, Shrinking


class Signum(Optimizer):
    """Signum; with `momentum=0` SignSGD: every element moves by the learning rate.

    With the gradient g, after param *= 1 - lr * weight_decay::

        momentum_buffer = momentum * momentum_buffer + (1 - momentum) * g
        param -= lr * sign(momentum_buffer)

    Without momentum the sign is that of g.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Signum([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9, -1.9]

    Paper: Bernstein et al. 2018, "signSGD: compressed optimisation for non-convex problems", algorithms 1 and 2, with
    decoupled weight decay.  Numbers and state are those of pytorch_optimizer's `SignSGD`.

    The sign of 0 is 0, and so is that of NaN, as in torch: after a gradient of NaN an element stands still for good,
    which the option `nonfinite` prevents.  Of a complex number the real and the imaginary part have signs of their own.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        momentum: Annotated[
            float, Interval("Invalid momentum value: ", high=1.0, high_open=True), "decay of the average of g"
        ] = 0.9,
        weight_decay: Shrinking = 0.0,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    scalars = ()
    slots = (Slot("momentum_buffer", when="momentum"),)
    flags = ("momentum", "weight_decay", *DIRECTED)

    @staticmethod
    def coefficients(h: SimpleNamespace) -> dict[str, Any]:
        return {"weight": 1 - h.momentum, "shrink": 1 - h.lr * h.weight_decay, "neg_lr": -h.lr}

    @staticmethod
    def update(param: Tensor, grad: Tensor, buffer: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param = shrink_weights(param, c, flags)
        if flags.momentum:
            buffer = torch.lerp(buffer, grad, c.weight)
        param, direction = directed(param, torch.sign(buffer if flags.momentum else grad), grad, c, flags)
        return torch.add(param, direction, alpha=c.neg_lr), buffer
