"""Averaged stochastic gradient descent."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import KernelOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import decay_weights, larger
from surefoot.rule import STEP, Scalar, Slot
from surefoot.rule.hyperparameters import L2Penalty, LearningRate, finite, number


class ASGD(Optimizer):
    """Averaged stochastic gradient descent.

    With the gradient g (plus `weight_decay` * param) and t the number of the step::

        param = (1 - lambd * eta) * param - eta * g
        ax += mu * (param - ax)
        eta = lr / (1 + lambd * lr * t)**alpha
        mu = 1 / max(1, t - t0)

    eta starts as lr and mu as 1; a changed lr thus counts one step later.  The average stands in
    `optimizer.state[param]["ax"]`; copy it into the parameter when training ends.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.ASGD([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.8, -1.6]

    Papers: Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging"; Xu 2011, "Towards optimal
    one pass large scale learning with averaged stochastic gradient descent", section 4, for eta.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        lambd: Annotated[float, finite("lambd"), "decay of the parameter and of eta"] = 1e-4,
        alpha: Annotated[float, finite("alpha"), "power of the decay of eta"] = 0.75,
        t0: Annotated[float, number("t0"), "number of steps before the average begins"] = 1e6,
        weight_decay: L2Penalty = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[KernelOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("ax", float8=False),)
    scalars = (STEP, Scalar("eta", init="lr"), Scalar("mu", init=1.0))
    flags = ("weight_decay",)

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any, eta: Any, mu: Any) -> dict[str, Any]:
        return {
            "shrink": 1 - h.lambd * eta,
            "neg_eta": -eta,
            "averaging": mu != 1,
            "averaging_weight": mu,
            "eta": h.lr / (1 + h.lambd * h.lr * step) ** h.alpha,
            "mu": 1 / larger(1, step - h.t0),
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, ax: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        param = torch.add(param * c.shrink, grad, alpha=c.neg_eta)
        return param, torch.where(c.averaging, ax + (param - ax) * c.averaging_weight, param)
