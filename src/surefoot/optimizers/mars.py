"""MARS: AdamW on gradients whose variance is reduced by those of the step before."""

import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor
from torch.linalg import vector_norm

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import amsgrad, directed, ema_of_square
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import BETAS, WEIGHT_DECAY, Betas, Eps, LearningRate, Number, at_least_zero


class MARS(Optimizer):
    """MARS-AdamW in its approximate form, which looks at each batch once.

    With the gradient g and t the number of the step, for matrices, and for all parameters with `optimize_1d`::

        c = g + gamma * beta1 / (1 - beta1) * (g - last_grad)
        c = c / max(1, norm(c))
        exp_avg = beta1 * exp_avg + (1 - beta1) * c
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * c**2
        u = (exp_avg / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)
        param -= lr * (u + weight_decay * param)
        last_grad = g

    v is exp_avg_sq, or with `amsgrad` the greatest exp_avg_sq so far.  Parameters of less than two dimensions are
    stepped by AdamW, c = g, with `betas_1d`, `weight_decay_1d` and lr * `lr_1d_factor`.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
        >>> optimizer = surefoot.MARS([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight[0].tolist()]
        [0.9, -1.9]

    Paper: Yuan et al. 2024, "MARS: unleashing the power of variance reduction for training large models", algorithm 2
    with the update of AdamW; the forms with Lion's and Shampoo's updates are not here.  `last_grad` is zero before the
    first step, as in the authors' implementation; it is a copy, so that what becomes of `p.grad` does not matter.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 3e-3,
        betas: Betas = (0.95, 0.99),
        eps: Eps = 1e-8,
        weight_decay: Annotated[
            Number, WEIGHT_DECAY, "shrinking of the parameter, in units of the learning rate"
        ] = 0.0,
        amsgrad: Annotated[bool, "divide by the greatest second moment so far"] = False,
        gamma: Annotated[float, at_least_zero("gamma"), "how much of the difference of two gradients is added"] = 0.025,
        optimize_1d: Annotated[bool, "treat parameters of less than two dimensions as matrices"] = False,
        lr_1d_factor: Annotated[
            float, at_least_zero("lr_1d_factor"), "learning rate of those parameters, in units of lr"
        ] = 1.0,
        betas_1d: Annotated[tuple[float, float], BETAS, "betas of those parameters"] = (0.9, 0.95),
        weight_decay_1d: Annotated[Number, WEIGHT_DECAY, "weight decay of those parameters"] = 0.1,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (
        Slot("exp_avg"),
        Slot("exp_avg_sq", signed=False, slow=True),
        Slot("max_exp_avg_sq", when="amsgrad", signed=False),
        # Differences of near values are taken of it.
        Slot("last_grad", float8=False),
    )
    flags = ("amsgrad", "vector", *DIRECTED)

    @staticmethod
    def flags_of(group: Mapping[str, Any], param: Tensor) -> dict[str, bool]:
        return {"vector": param.dim() <= 1 and not group["optimize_1d"]}

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"correction": h.gamma * h.betas[0] / (1 - h.betas[0])}
        for kind, lr, betas, decay in (
            ("", h.lr, h.betas, h.weight_decay),
            ("_1d", h.lr * h.lr_1d_factor, h.betas_1d, h.weight_decay_1d),
        ):
            beta1, beta2 = betas
            found |= {
                f"weight1{kind}": 1 - beta1,
                f"beta2{kind}": beta2,
                f"weight2{kind}": 1 - beta2,
                f"bias{kind}": (1 - beta2**step) ** 0.5,
                f"neg_step_size{kind}": -(lr / (1 - beta1**step)),
                f"shrink{kind}": 1 - lr * decay,
            }
        return found

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        maximum: Tensor,
        last_grad: Tensor,
        c: Any,
        flags: SimpleNamespace,
    ) -> Any:
        corrected, kind = grad, "_1d"
        if not flags.vector:
            corrected, kind = torch.add(grad, grad - last_grad, alpha=c.correction), ""
            corrected = corrected / torch.clamp(vector_norm(corrected), min=1.0)
            last_grad = grad
        of = functools.partial(_of_kind, c, kind)
        exp_avg = torch.lerp(exp_avg, corrected, of("weight1"))
        exp_avg_sq = ema_of_square(exp_avg_sq, corrected, of("beta2"), of("weight2"))
        divisor, maximum = amsgrad(exp_avg_sq, maximum, flags)
        denom = torch.sqrt(divisor) / of("bias") + c.eps
        if not flags.cautious_weight_decay:
            param = param * of("shrink")
        param, direction = directed(param, exp_avg, grad, c, flags, of("shrink"))
        param = torch.addcdiv(param, direction, denom, value=of("neg_step_size"))
        return param, exp_avg, exp_avg_sq, maximum, last_grad


def _of_kind(c: Any, kind: str, name: str) -> Any:
    """Return a coefficient of matrices or of vectors."""
    return getattr(c, name + kind)
