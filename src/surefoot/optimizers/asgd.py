"""Averaged stochastic gradient descent."""

from types import SimpleNamespace
from typing import Any, Unpack

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import decay_weights, larger
from surefoot.rule import STEP, Scalar, Slot
from surefoot.rule.hyperparameters import LR, WEIGHT_DECAY, number
from surefoot.whole_step import StepOptions


class ASGD(Optimizer):
    """Averaged stochastic gradient descent.

    With the gradient g (plus `weight_decay` * param) and t the number of the step::

        param = (1 - lambd * eta) * param - eta * g
        ax += mu * (param - ax)
        eta = lr / (1 + lambd * lr * t)**alpha
        mu = 1 / max(1, t - t0)

    eta starts as lr and mu as 1; a changed lr thus counts one step later.  The average stands in
    `optimizer.state[param]["ax"]`; copy it into the parameter when training ends.

    Args:
        params: tensors, named tensors or groups; see `surefoot.Optimizer`.
        lr: learning rate, a number or a tensor of one element, >= 0.
        lambd: decay of the parameter and of eta, any number.
        alpha: power of the decay of eta, any number.
        t0: number of steps before the average begins, any number.
        weight_decay: L2 penalty, a number >= 0.
        {options}

    Raises:
        ValueError: a hyperparameter is out of range.
        TypeError: a hyperparameter is no number.
        RuntimeError: engine options contradict one another, or, in `step`, a gradient is sparse.

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

    slots = (Slot("ax"),)
    scalars = (STEP, Scalar("eta", init="lr"), Scalar("mu", init=1.0))
    flags = ("weight_decay",)
    ranges = {
        "lr": LR,
        "lambd": number("lambd"),
        "alpha": number("alpha"),
        "t0": number("t0"),
        "weight_decay": WEIGHT_DECAY,
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

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
