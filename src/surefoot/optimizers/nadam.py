"""NAdam: Adam with Nesterov momentum."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import adam_averages, adam_weights, decay_weights, directed
from surefoot.rule import DIRECTED, STEP, Scalar, Slot, narrow
from surefoot.rule.hyperparameters import Betas, Decoupled, Eps, L2OrDecoupled, LearningRate, at_least_zero


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

    {arguments}

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

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: L2OrDecoupled = 0,
        momentum_decay: Annotated[
            float, at_least_zero("momentum_decay"), "how fast the momentum grows to beta1, per step"
        ] = 4e-3,
        decoupled_weight_decay: Decoupled = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    scalars = (STEP, Scalar("mu_product", init=1.0))
    slots = (Slot("exp_avg"), Slot("exp_avg_sq", signed=False, slow=True))
    flags = ("weight_decay", "decoupled_weight_decay", *DIRECTED)

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
        exp_avg, exp_avg_sq = adam_averages(grad, exp_avg, exp_avg_sq, c)
        denom = torch.sqrt(exp_avg_sq / c.bias_correction2) + c.eps
        if flags.cautious or flags.cautious_weight_decay:
            ahead = -torch.add(grad * c.grad_scale, exp_avg, alpha=c.momentum_scale)
            param, direction = directed(param, ahead, grad, c, flags)
            return param - direction / denom, exp_avg, exp_avg_sq
        param = torch.addcdiv(param, grad, denom, value=c.grad_scale)
        return torch.addcdiv(param, exp_avg, denom, value=c.momentum_scale), exp_avg, exp_avg_sq
