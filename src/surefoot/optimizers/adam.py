"""Adam and AdamW."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import adam_averages, adam_weights, amsgrad, decay_weights, directed
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import BETAS, WEIGHT_DECAY, Decoupled, Eps, L2OrDecoupled, LearningRate, Number

_Betas = Annotated[
    tuple[Number, Number],
    BETAS,
    "(beta1, beta2), decay of the averages of g and of g**2, numbers or tensors of one element",
]
_AMSGrad = Annotated[bool, "divide by the greatest second moment so far"]


class Adam(Optimizer):
    """Adam, and AMSGrad.

    With the gradient g (plus `weight_decay` * param, unless that is decoupled) and t the number of the step::

        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        param -= lr * (exp_avg / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    v is exp_avg_sq, or with `amsgrad` the greatest exp_avg_sq so far.  Where weight decay is decoupled,
    param *= 1 - lr * weight_decay comes first.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Adam([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9, -1.9]

    Papers: Kingma & Ba 2015, "Adam: a method for stochastic optimization", algorithm 1; Reddi, Kale & Kumar 2018, "On
    the convergence of Adam and beyond", algorithm 2, with the bias corrected after the maximum, as in torch.

    Other than in torch, betas may be integers, tensors are taken by every engine, `amsgrad` may be switched on later,
    and `differentiable` takes a learning rate of 0.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: _Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: L2OrDecoupled = 0,
        amsgrad: _AMSGrad = False,
        *,
        decoupled_weight_decay: Decoupled = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (
        Slot("exp_avg"),
        Slot("exp_avg_sq", signed=False, slow=True),
        Slot("max_exp_avg_sq", when="amsgrad", signed=False),
    )
    flags = ("amsgrad", "weight_decay", "decoupled_weight_decay", *DIRECTED)
    instead_of_sparse = ", please consider SparseAdam instead"

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        bias_correction1, bias_correction2 = 1 - beta1**step, 1 - beta2**step
        return adam_weights(h) | {"neg_step_size": -(h.lr / bias_correction1), "bias": bias_correction2**0.5}

    @staticmethod
    def update(
        param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, maxima: Tensor, c: Any, flags: SimpleNamespace
    ) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg, exp_avg_sq = adam_averages(grad, exp_avg, exp_avg_sq, c)
        divisor, maxima = amsgrad(exp_avg_sq, maxima, flags)
        denom = torch.sqrt(divisor) / c.bias + c.eps
        param, direction = directed(param, exp_avg, grad, c, flags)
        return torch.addcdiv(param, direction, denom, value=c.neg_step_size), exp_avg, exp_avg_sq, maxima


class AdamW(Adam):
    """Adam with decoupled weight decay.

    As `Adam` with `decoupled_weight_decay`: first param *= 1 - lr * weight_decay, then with the gradient g::

        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        param -= lr * (exp_avg / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    v is exp_avg_sq, or with `amsgrad` the greatest exp_avg_sq so far.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.AdamW([weight], lr=0.1, weight_decay=0.5)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.85, -1.8]

    Paper: Loshchilov & Hutter 2019, "Decoupled weight decay regularization", algorithm 2, where the decay is not
    multiplied by lr, but by a schedule of its own.

    It differs from torch as `Adam` does.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: _Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: Annotated[
            Number, WEIGHT_DECAY, "shrinking of the parameter, in units of the learning rate"
        ] = 1e-2,
        amsgrad: _AMSGrad = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, decoupled_weight_decay=True, **arguments(locals()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
