"""Adagrad: per-element rates from the sum of squared gradients."""

from types import SimpleNamespace
from typing import Any, Unpack

import torch
from torch import Tensor

from surefoot.optimizer import Optimizer, Params, arguments
from surefoot.optimizers.verbs import decay_weights
from surefoot.rule import Slot, Sparse
from surefoot.rule.hyperparameters import EPS, LR, WEIGHT_DECAY, at_least_zero
from surefoot.whole_step import StepOptions


class Adagrad(Optimizer):
    """Adagrad: a rate for each element, from the sum of its squared gradients.

    With the gradient g (plus `weight_decay` * param) and t the number of the step::

        sum += g**2
        param -= lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)

    Sparse gradients update only the rows present.  State exists from the constructor on, so that `share_memory` can
    give it to several processes.

    Args:
        params: tensors, named tensors or groups; see `surefoot.Optimizer`.
        lr: learning rate, a number or a tensor of one element, >= 0.
        lr_decay: decay of the learning rate, per step, >= 0.
        weight_decay: L2 penalty, a number >= 0; 0 with sparse gradients.
        initial_accumulator_value: what `sum` starts from, in the units of g**2, >= 0.
        eps: added to the root, in its units, >= 0.
        {options}

    Raises:
        ValueError: a hyperparameter is out of range.
        TypeError: a hyperparameter is no number.
        RuntimeError: engine options contradict one another, or, in `step`, a gradient is sparse with weight decay.

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

    slots = (Slot("sum", init="initial_accumulator_value"),)
    flags = ("weight_decay",)
    ranges = {
        "lr": LR,
        "lr_decay": at_least_zero("lr_decay"),
        "weight_decay": WEIGHT_DECAY,
        "initial_accumulator_value": at_least_zero("initial_accumulator_value"),
        "eps": EPS,
    }
    sparse = Sparse.ROWS
    state_at_construction = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        capturable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

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
