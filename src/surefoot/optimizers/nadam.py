"""NAdam: Adam with Nesterov momentum."""

from types import SimpleNamespace
from typing import Any, Unpack

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import adam_weights, decay_weights, ema_of_square
from surefoot.rule import STEP, Scalar, Slot, narrow
from surefoot.rule.hyperparameters import BETAS, EPS, LR, WEIGHT_DECAY, at_least_zero
from surefoot.whole_step import StepOptions


class NAdam(Optimizer):
    """Adam with Nesterov's momentum.

    With the gradient g (plus `weight_decay` * param, unless that is decoupled), t the number of the step, and
    mu(t) = beta1 * (1 - 0.96**(t * momentum_decay) / 2)::

        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        mu_product *= mu(t)
        denom = sqrt(exp_avg_sq / (1 - beta2**t)) + eps
        param -= lr * (1 - mu(t)) / (1 - mu_product) * g / denom
        param -= lr * mu(t + 1) / (1 - mu_product * mu(t + 1)) * exp_avg / denom

    Where weight decay is decoupled, param *= 1 - lr * weight_decay comes first.

    Args:
        params: tensors, named tensors or groups; see `surefoot.Optimizer`.
        lr: learning rate, a number or a tensor of one element, >= 0.
        betas: (beta1, beta2), decay of the averages of g and of g**2, numbers in [0, 1).
        eps: added to the root, in its units, >= 0.
        weight_decay: L2 penalty, or shrinking of the parameter where decoupled, a number >= 0.
        momentum_decay: how fast the momentum grows to beta1, per step, >= 0.
        decoupled_weight_decay: shrink the parameter by lr * weight_decay (AdamW) rather than adding to the gradient.
        {options}

    Raises:
        ValueError: a hyperparameter is out of range.
        TypeError: a hyperparameter is no number.
        RuntimeError: engine options contradict one another, or, in `step`, a gradient is sparse.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.NAdam([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.8944, -1.8944]

    Paper: Dozat 2016, "Incorporating Nesterov momentum into Adam", with the momentum schedule of its section 3; as in
    torch the average of g decays by beta1, not by mu(t).
    """

    slots = (Slot("exp_avg"), Slot("exp_avg_sq"))
    scalars = (STEP, Scalar("mu_product", init=1.0))
    flags = ("weight_decay", "decoupled_weight_decay")
    ranges = {
        "lr": LR,
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
        "momentum_decay": at_least_zero("momentum_decay"),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any, mu_product: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        mu = beta1 * (1.0 - 0.5 * 0.96 ** (step * h.momentum_decay))
        mu_next = beta1 * (1.0 - 0.5 * 0.96 ** ((step + 1) * h.momentum_decay))
        # Rounded as the state is, since the product is carried from step to step.
        mu_product = narrow(mu_product * narrow(mu))
        return adam_weights(h) | {
            "mu_product": mu_product,
            "bias_correction2": 1 - beta2**step,
            "grad_scale": -h.lr * (1.0 - mu) / (1.0 - mu_product),
            "momentum_scale": -h.lr * mu_next / (1.0 - mu_product * mu_next),
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        exp_avg = torch.lerp(exp_avg, grad, c.weight1)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        denom = torch.sqrt(exp_avg_sq / c.bias_correction2) + c.eps
        param = torch.addcdiv(param, grad, denom, value=c.grad_scale)
        return torch.addcdiv(param, exp_avg, denom, value=c.momentum_scale), exp_avg, exp_avg_sq
