"""SparseAdam: Adam on the rows that have a gradient."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import arguments
from surefoot.optimizer import Optimizer, Params
from surefoot.rule import Scalar, Slot, Sparse
from surefoot.rule.hyperparameters import Betas, Interval, Number
from surefoot.step.options import StepOptions


class SparseAdam(Optimizer):
    """Adam on the rows that have a gradient, such as those of an embedding that were looked up.

    In the rows present in the sparse gradient g, and with t the number of the parameter's step::

        exp_avg += (1 - beta1) * (g - exp_avg)
        exp_avg_sq += (1 - beta2) * (g**2 - exp_avg_sq)
        param -= lr * sqrt(1 - beta2**t) / (1 - beta1**t) * exp_avg / (sqrt(exp_avg_sq) + eps)

    Other rows and their moments stay as they are.  Repeated indices are summed first.

    {arguments}

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter is sparse or complex.
        TypeError: a hyperparameter is not a number.
        RuntimeError: in `step`, a gradient is dense.

    Example:
        >>> embedding = torch.nn.Embedding.from_pretrained(torch.ones(3, 2), freeze=False, sparse=True)
        >>> optimizer = surefoot.SparseAdam(embedding.parameters(), lr=0.1)
        >>> embedding(torch.tensor([2])).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in embedding.weight[:, 0].tolist()]
        [1.0, 1.0, 0.9]

    Paper: Kingma & Ba 2015, "Adam: a method for stochastic optimization", algorithm 1, in the form of its section 2.
    """

    def __init__(
        self,
        params: Annotated[Params, "dense real tensors, named tensors or groups; see `surefoot.Optimizer`"],
        lr: Annotated[
            Number,
            Interval("Invalid learning rate: ", low_open=True, high_open=True),
            "learning rate, a number or a tensor of one element",
        ] = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Annotated[
            float,
            Interval("Invalid epsilon value: ", low_open=True),
            "added to the root, before its bias is corrected",
        ] = 1e-8,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("exp_avg"), Slot("exp_avg_sq"))
    scalars = (Scalar("step", integer=True),)
    sparse = Sparse.ONLY
    complex_params = False

    def check_params(self, params: list[Tensor], group: Mapping[str, Any]) -> None:  # noqa: ARG002
        place = len(self.param_groups)
        for kind, indices in (
            ("Sparse", [i for i, param in enumerate(params) if param.is_sparse]),
            ("Complex", [i for i, param in enumerate(params) if param.is_complex()]),
        ):
            if indices:
                positions = [[place, index] for index in indices]
                raise ValueError(f"{kind} params at indices {positions}: SparseAdam {_REFUSALS[kind]}")

    @staticmethod
    def coefficients(h: SimpleNamespace, step: Any) -> dict[str, Any]:
        beta1, beta2 = h.betas
        step_size = h.lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        return {"weight1": 1 - beta1, "weight2": 1 - beta2, "neg_step_size": -step_size}

    @staticmethod
    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, c: Any, flags: SimpleNamespace) -> Any:  # noqa: ARG004
        exp_avg = exp_avg + (grad - exp_avg) * c.weight1
        exp_avg_sq = exp_avg_sq + (grad * grad - exp_avg_sq) * c.weight2
        return param + exp_avg / (torch.sqrt(exp_avg_sq) + c.eps) * c.neg_step_size, exp_avg, exp_avg_sq


_REFUSALS = {"Sparse": "requires dense parameter tensors", "Complex": "does not support complex parameters"}
