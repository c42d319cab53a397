"""QHAdam: Adam whose step is a mixture of averages and of the gradient at hand."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import decay_weights, directed, ema, ema_of_square
from surefoot.rule import DIRECTED, Scalar, Slot
from surefoot.rule.hyperparameters import Betas, Decoupled, Each, Eps, Interval, L2OrDecoupled, LearningRate, number


class QHAdam(Optimizer):
    """Quasi-hyperbolic Adam.

    With the gradient g (plus `weight_decay` * param, unless that is decoupled)::

        beta1_weight = 1 + beta1 * beta1_weight, beta2_weight = 1 + beta2 * beta2_weight
        exp_avg += (g - exp_avg) / beta1_weight
        exp_avg_sq += (g**2 - exp_avg_sq) / beta2_weight
        m = nu1 * exp_avg + (1 - nu1) * g
        v = nu2 * exp_avg_sq + (1 - nu2) * g**2
        param -= lr * m / (sqrt(v) + eps)

    The averages are free of bias as they stand, other than those of `Adam`, which this is with `nus` of 1.  Where
    weight decay is decoupled, param *= 1 - lr * weight_decay comes first.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.QHAdam([weight], lr=0.1, betas=(0.995, 0.999), nus=(0.7, 1.0))
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9, -1.9]

    Paper: Ma & Yarats 2019, "Quasi-hyperbolic momentum and Adam for deep learning", algorithm 2; it recommends the
    `betas` and `nus` of the example.  Numbers, options and state are those of the authors' qhoptim, whose
    `decouple_weight_decay` is called as everywhere here.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        nus: Annotated[
            tuple[float, float],
            Each((number("nus"), Interval("Invalid nus value: ", high=1.0))),
            "(nu1, nu2), weights of the averages of g, any number, and of g**2, from 0 to 1",
        ] = (1.0, 1.0),
        weight_decay: L2OrDecoupled = 0.0,
        decoupled_weight_decay: Decoupled = False,
        eps: Eps = 1e-8,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("exp_avg"), Slot("exp_avg_sq", signed=False, slow=True))
    scalars = (Scalar("beta1_weight"), Scalar("beta2_weight"))
    flags = ("weight_decay", "decoupled_weight_decay", *DIRECTED)

    @staticmethod
    def coefficients(h: SimpleNamespace, beta1_weight: Any, beta2_weight: Any) -> dict[str, Any]:
        (beta1, beta2), (nu1, nu2) = h.betas, h.nus
        beta1_weight, beta2_weight = 1 + beta1 * beta1_weight, 1 + beta2 * beta2_weight
        return {
            "beta1_weight": beta1_weight,
            "beta2_weight": beta2_weight,
            "weight1": 1 / beta1_weight,
            "decay1": 1 - 1 / beta1_weight,
            "weight2": 1 / beta2_weight,
            "decay2": 1 - 1 / beta2_weight,
            "nu1": nu1,
            "nu2": nu2,
            "rest1": 1 - nu1,
            "rest2": 1 - nu2,
            "shrink": 1 - h.lr * h.weight_decay,
            "neg_lr": -h.lr,
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg = ema(exp_avg, grad, c.decay1, c.weight1)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.decay2, c.weight2)
        denom = torch.sqrt(ema_of_square(exp_avg_sq, grad, c.nu2, c.rest2)) + c.eps
        param, direction = directed(param, ema(exp_avg, grad, c.nu1, c.rest1), grad, c, flags)
        return torch.addcdiv(param, direction, denom, value=c.neg_lr), exp_avg, exp_avg_sq
