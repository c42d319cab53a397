"""LAMB: Adam whose step for each tensor is in proportion to the tensor's norm."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor
from torch.linalg import vector_norm

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import adam_weights, decay_weights, directed, ema, ema_of_square, trust_ratio
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import WEIGHT_DECAY, Betas, Eps, LearningRate, Number


class LAMB(Optimizer):
    """LAMB, layer-wise adaptive moments for large batches, in the form of NVLAMB.

    With the gradient g, clipped by the norm of all gradients together, and t the number of the step::

        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        u = (exp_avg / (1 - beta1**t)) / (sqrt(exp_avg_sq / (1 - beta2**t)) + eps) + weight_decay * param
        ratio = norm(param) / norm(u), or 1 where either is 0
        param -= lr * ratio * u

    The norms are those of each tensor.  Without weight decay, as groups of biases and norms have it, ratio is 1 unless
    `always_adapt`.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> optimizer = surefoot.LAMB([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in weight.tolist()]
        [2.648, -3.645]

    Paper: You et al. 2020, "Large batch optimization for deep learning: training BERT in 76 minutes", algorithm 2, with
    the norm itself as phi; the norm of all gradients is clipped as in NVIDIA's implementation.  Numbers, options and
    state are those of timm's `Lamb`, whose `decoupled_decay` is called as everywhere here.
    """

    def __init__(  # type: ignore[misc]  # `max_grad_norm`, one of the options, has another default here
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        bias_correction: Annotated[bool, "divide the averages by what their weights add up to"] = True,
        betas: Betas = (0.9, 0.999),
        eps: Eps = 1e-6,
        weight_decay: Annotated[Number, WEIGHT_DECAY, "multiple of the parameter in u"] = 0.01,
        grad_averaging: Annotated[bool, "weigh g by 1 - beta1 in exp_avg; by 1 if False"] = True,
        max_grad_norm: Annotated[
            float | None, "greatest norm of all gradients together, see `surefoot.StepOptions`; None for no clipping"
        ] = 1.0,
        trust_clip: Annotated[bool, "let the ratio be at most 1"] = False,
        always_adapt: Annotated[bool, "use the ratio in groups without weight decay too"] = False,
        *,
        decoupled_weight_decay: Annotated[
            bool, "shrink the parameter by lr * weight_decay before the step, and leave the decay out of u"
        ] = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("exp_avg"), Slot("exp_avg_sq", signed=False, slow=True))
    flags = ("weight_decay", "decoupled_weight_decay", "always_adapt", "trust_clip", *DIRECTED)

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        corrections = (1 - beta1**step, 1 - beta2**step) if h.bias_correction else (1.0, 1.0)
        return adam_weights(h) | {
            "weight1": 1 - beta1 if h.grad_averaging else 1.0,
            "bias_correction1": corrections[0],
            "bias2": corrections[1] ** 0.5,
            "neg_lr": -h.lr,
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        exp_avg = ema(exp_avg, grad, c.beta1, c.weight1)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        u = exp_avg / c.bias_correction1 / (torch.sqrt(exp_avg_sq) / c.bias2 + c.eps)
        if flags.decoupled_weight_decay:
            param, _ = decay_weights(param, grad, c, flags)
        param, u = directed(param, u, grad, c, flags)
        if flags.weight_decay and not flags.decoupled_weight_decay:
            u = torch.add(u, param, alpha=c.weight_decay)
        if flags.weight_decay or flags.always_adapt:
            norm, of_update = vector_norm(param), vector_norm(u)
            ratio = trust_ratio(norm, of_update, norm / of_update)
            u = u * (torch.clamp(ratio, max=1.0) if flags.trust_clip else ratio)
        return torch.add(param, u, alpha=c.neg_lr), exp_avg, exp_avg_sq
