"""StableAdamW: AdamW whose learning rate shrinks for a tensor whose second moment lags behind its gradient."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import EngineOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import directed, ema, ema_of_square, ema_weights
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import WEIGHT_DECAY, Betas, Eps, Interval, LearningRate, Number


class StableAdamW(Optimizer):
    """AdamW with Adafactor's clipping of the update, tensor by tensor.

    With the gradient g, t the number of the step, and b = (beta**t - beta) / (beta**t - 1) for both betas::

        exp_avg = b1 * exp_avg + (1 - b1) * g
        exp_avg_sq = b2 * exp_avg_sq + (1 - b2) * g**2
        rms = sqrt(mean(g**2 / max(exp_avg_sq, eps**2)))
        lr' = lr / max(1, rms)
        param *= 1 - lr' * weight_decay, or 1 - lr' / max_lr * weight_decay with `decouple_lr`
        param -= lr' * exp_avg / (sqrt(exp_avg_sq) + eps)

    The mean is over each tensor.  The averages are free of bias as they stand, other than those of `AdamW`.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.StableAdamW([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.899, -1.898]

    Paper: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models", algorithm
    2.  Numbers are those of optimi's `StableAdamW`.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.99),
        weight_decay: Annotated[
            Number, WEIGHT_DECAY, "shrinking of the parameter, in units of the learning rate"
        ] = 1e-2,
        eps: Eps = 1e-6,
        decouple_lr: Annotated[bool, "shrink the parameter in units of lr / max_lr instead"] = False,
        max_lr: Annotated[
            float | None,
            Interval("Invalid max_lr: ", low_open=True, optional=True),
            "greatest learning rate of the schedule, for `decouple_lr`; `lr` of the new group if None",
        ] = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its `max_lr` is the learning rate of now, unless it has one."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["max_lr"] is None and group["lr"] != 0:
            group["max_lr"] = float(group["lr"])

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        if group["decouple_lr"] and group["max_lr"] is None and group["lr"] == 0:
            raise ValueError(
                "`decouple_lr=True` with `lr=0` needs `max_lr`, the greatest learning rate of the schedule"
            )

    slots = (Slot("exp_avg"), Slot("exp_avg_sq", signed=False, slow=True))
    flags = ("weight_decay", *DIRECTED)

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = ((beta**step - beta) / (beta**step - 1) for beta in h.betas)
        max_lr = h.lr if h.max_lr is None else h.max_lr
        return ema_weights(beta1, beta2) | {
            "least": h.eps**2,
            "decay": h.weight_decay / max_lr if h.decouple_lr else h.weight_decay,
        }

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        exp_avg = ema(exp_avg, grad, c.beta1, c.weight1)
        exp_avg_sq = ema_of_square(exp_avg_sq, grad, c.beta2, c.weight2)
        rms = torch.sqrt(torch.mean(grad * grad / torch.clamp(exp_avg_sq, min=c.least)))
        lr = c.lr / torch.clamp(rms, min=1.0)
        shrink = 1 - lr * c.decay
        if flags.weight_decay and not flags.cautious_weight_decay:
            param = param * shrink
        param, direction = directed(param, exp_avg, grad, c, flags, shrink)
        return torch.addcdiv(param, direction, torch.sqrt(exp_avg_sq) + c.eps, value=-lr), exp_avg, exp_avg_sq
