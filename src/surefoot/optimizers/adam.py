"""Adam and AdamW."""

from types import SimpleNamespace
from typing import Any, Unpack

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import adam_weights, decay_weights, ema_of_square
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import BETAS, EPS, LR, WEIGHT_DECAY
from surefoot.whole_step import StepOptions


class Adam(Optimizer):
    """Adam, and AMSGrad.

    With the gradient g (plus `weight_decay` * param, unless that is decoupled) and t the number of the step::

        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        param -= lr * (exp_avg / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    v is exp_avg_sq, or with `amsgrad` the greatest exp_avg_sq so far.  Where weight decay is decoupled,
    param *= 1 - lr * weight_decay comes first.

    Args:
        params: tensors, named tensors or groups; see `surefoot.Optimizer`.
        lr: learning rate, a number or a tensor of one element, >= 0.
        betas: (beta1, beta2), decay of the averages of g and of g**2, numbers or tensors of one element in [0, 1).
        eps: added to the root, in its units, >= 0.
        weight_decay: L2 penalty, or shrinking of the parameter where decoupled, a number >= 0.
        amsgrad: divide by the greatest second moment so far.
        decoupled_weight_decay: shrink the parameter by lr * weight_decay (AdamW) rather than adding to the gradient.
        {options}

    Raises:
        ValueError: a hyperparameter is out of range.
        TypeError: a hyperparameter is no number.
        RuntimeError: engine options contradict one another, or, in `step`, a gradient is sparse.

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

    slots = (Slot("exp_avg"), Slot("exp_avg_sq"), Slot("max_exp_avg_sq", when="amsgrad"))
    flags = ("amsgrad", "weight_decay", "decoupled_weight_decay")
    ranges = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    instead_of_sparse = ", please consider SparseAdam instead"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        bias_correction1, bias_correction2 = 1 - beta1**step, 1 - beta2**step
        return adam_weights(h) | {"neg_step_size": -(h.lr / bias_correction1), "bias": bias_correction2**0.5}

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        maximum: Tensor,
        c: Any,
        flags: SimpleNamespace,
    ) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg = torch.lerp(exp_avg, grad, c.weight1)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        if flags.amsgrad:
            maximum = torch.maximum(maximum, exp_avg_sq)
        denom = torch.sqrt(maximum if flags.amsgrad else exp_avg_sq) / c.bias + c.eps
        return torch.addcdiv(param, exp_avg, denom, value=c.neg_step_size), exp_avg, exp_avg_sq, maximum


class AdamW(Adam):
    """Adam with decoupled weight decay.

    As `Adam` with `decoupled_weight_decay`: first param *= 1 - lr * weight_decay, then with the gradient g::

        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        param -= lr * (exp_avg / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    v is exp_avg_sq, or with `amsgrad` the greatest exp_avg_sq so far.

    Args:
        params: tensors, named tensors or groups; see `surefoot.Optimizer`.
        lr: learning rate, a number or a tensor of one element, >= 0.
        betas: (beta1, beta2), decay of the averages of g and of g**2, numbers or tensors of one element in [0, 1).
        eps: added to the root, in its units, >= 0.
        weight_decay: shrinking of the parameter, in units of the learning rate, a number >= 0.
        amsgrad: divide by the greatest second moment so far.
        {options}

    Raises:
        ValueError: a hyperparameter is out of range.
        TypeError: a hyperparameter is no number.
        RuntimeError: engine options contradict one another, or, in `step`, a gradient is sparse.

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
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, decoupled_weight_decay=True, **arguments(locals()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
