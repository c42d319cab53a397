"""Adagrad: per-element rates from the sum of squared gradients."""

from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import ModeOptions, arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import decay_weights
from surefoot.rule import Slot, Sparse
from surefoot.rule.hyperparameters import WEIGHT_DECAY, Eps, LearningRate, Number, at_least_zero, finite


class Adagrad(Optimizer):
    """Adagrad: a rate for each element, from the sum of its squared gradients.

    With the gradient g (plus `weight_decay` * param) and t the number of the step::

        sum += g**2
        param -= lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)

    Sparse gradients update only the rows present.  State exists from the constructor on, so that `share_memory` can
    give it to several processes.

    {arguments}

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Adagrad([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9, -1.9]

    Paper: Duchi, Hazan & Singer 2011, "Adaptive subgradient methods for online learning and stochastic optimization",
    equation 1 with a diagonal matrix.

    Other than in torch, a group's own `initial_accumulator_value` counts.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        lr_decay: Annotated[float, finite("lr_decay"), "decay of the learning rate, per step"] = 0,
        weight_decay: Annotated[Number, WEIGHT_DECAY, "L2 penalty, 0 with sparse gradients"] = 0,
        initial_accumulator_value: Annotated[
            float, at_least_zero("initial_accumulator_value"), "what `sum` starts from, in the units of g**2"
        ] = 0,
        eps: Eps = 1e-10,
        foreach: bool | None = None,
        **options: Unpack[ModeOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("sum", init="initial_accumulator_value", signed=False, slow=True),)
    flags = ("weight_decay",)
    sparse = Sparse.ROWS
    state_at_construction = True

    def share_memory(self) -> None:
        """Move the accumulated sums to shared memory, for training by several processes at once."""
        for state in self.state.values():
            state["sum"].share_memory_()

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        return {"neg_step_size": -(h.lr / (1 + (step - 1) * h.lr_decay))}

    @staticmethod
    def update(param: Tensor, grad: Tensor, total: Tensor, c: Any, flags: SimpleNamespace) -> Any:
        param, grad = decay_weights(param, grad, c, flags)
        total = torch.addcmul(total, grad, grad)
        return torch.addcdiv(param, grad, torch.sqrt(total) + c.eps, value=c.neg_step_size), total
