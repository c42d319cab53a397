"""Muon: orthogonalised momentum for the matrices of hidden layers."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import WeightOptions, arguments
from surefoot.distributed import MatrixExchange
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import add_scaled_, batches, in_turns, local_row, readable
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import Each, Interval, Number, at_least_zero, number
from surefoot.step.prepared import PreparedParam
from surefoot.tensors.memory import is_plain
from surefoot.tensors.shards import is_sharded

_ADJUSTMENTS = (None, "original", "match_rms_adamw", "spectral_unclamped")
_MOST_NS_STEPS = 99
_LARGEST_STACKED, _MOST_STACKED = 1 << 14, 256
"""Elements of matrices that are stacked on the CPU, and how many are stacked at most."""


def newton_schulz(matrix: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrix, by a quintic Newton-Schulz iteration in bfloat16.

    With X = matrix / max(its Frobenius norm, eps) and coefficients (a, b, c), `steps` times::

        A = X X^T
        X = a X + (b A + c A A) X

    Args:
        matrix: a matrix, or a stack of matrices of one shape along a first dimension; any floating dtype.
        coefficients: a, b, c of the polynomial.
        steps: number of iterations.
        eps: least norm to divide by.

    Returns:
        A new bfloat16 tensor of the same shape.
    """
    a, b, c = coefficients
    multiply_add = torch.addmm if matrix.dim() == 2 else torch.baddbmm  # noqa: PLR2004 (one matrix)
    x = matrix.bfloat16()
    wide = x.mT if x.size(-2) > x.size(-1) else x
    wide = wide / _norms(wide).clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        wide = multiply_add(wide, polynomial, wide, beta=a)
    return wide.mT if x.size(-2) > x.size(-1) else wide


def _norms(x: Tensor) -> Tensor:
    """Return the Frobenius norm of a matrix, or of each of a stack."""
    if x.dim() == 2:  # noqa: PLR2004 (one matrix)
        norm: Tensor = x.norm()
        return norm
    norms: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return norms


class Muon(Optimizer):
    """Muon: momentum, made orthogonal, for the matrices of hidden layers.

    With the gradient g and orthogonal(u), the nearest semi-orthogonal matrix (see `newton_schulz`)::

        momentum_buffer = momentum * momentum_buffer + (1 - momentum) * g
        u = momentum * momentum_buffer + (1 - momentum) * g if nesterov else momentum_buffer
        param = (1 - lr * weight_decay) * param - lr * scale * orthogonal(u)

    For a matrix of A rows and B columns scale is sqrt(max(1, A / B)), or 0.2 * sqrt(max(A, B)) with
    `adjust_lr_fn="match_rms_adamw"`, which lets a learning rate of AdamW serve, or sqrt(A / B) with
    `"spectral_unclamped"`, by which the spectral norm of a step follows the matrix's shape both ways.

    {arguments}

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter is no matrix.
        TypeError: a hyperparameter is no number.
        RuntimeError: in `step`, a gradient is sparse or a parameter complex.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = surefoot.Muon([weight], lr=1.0)
        >>> weight.grad = torch.tensor([[3.0, 0.0], [0.0, -3.0]])
        >>> optimizer.step()
        >>> weight.diagonal().sign().tolist()
        [-1.0, 1.0]

    Papers: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is
    scalable for LLM training", section 2.2, for `"match_rms_adamw"`; Bernstein 2025, "Deriving Muon", for
    `"spectral_unclamped"`.

    Other than in torch, parameters that are no matrices are refused in later groups too, and with bfloat16 parameters
    and nesterov=False the buffer keeps its norm.
    """

    def __init__(
        self,
        params: Annotated[
            Params,
            "matrices, named matrices or groups; see `surefoot.Optimizer`.  Embeddings, output layers, biases and "
            "norms are better left to AdamW",
        ],
        lr: Annotated[
            Number,
            Interval("Learning rate should be >= 0 but is: ", high_open=True),
            "learning rate, a number or a tensor of one element",
        ] = 1e-3,
        weight_decay: Annotated[
            Number,
            Interval("weight decay should be >= 0 but is: ", high_open=True),
            "shrinking of the parameter, in units of the learning rate",
        ] = 0.1,
        momentum: Annotated[
            float,
            Interval("momentum should be >= 0 but is: ", high_open=True),
            "decay of the average of g, sensibly below 1",
        ] = 0.95,
        nesterov: Annotated[bool, "look ahead by one step"] = True,
        ns_coefficients: Annotated[
            tuple[float, float, float],
            Each((number("ns_coefficients"),) * 3),
            "(a, b, c) of the Newton-Schulz iteration, any numbers",
        ] = (3.4445, -4.775, 2.0315),
        eps: Annotated[float, at_least_zero("epsilon"), "least norm by which a matrix is divided"] = 1e-7,
        ns_steps: Annotated[
            int,
            Interval(
                "Number of steps must be less than 100 for computational efficiency, but is: ",
                high=_MOST_NS_STEPS,
                whole=True,
            ),
            "number of iterations",
        ] = 5,
        adjust_lr_fn: Annotated[
            str | None, '`"original"`, which None means too, `"match_rms_adamw"` or `"spectral_unclamped"`'
        ] = None,
        *,
        capturable: Annotated[bool, "allow steps to be captured in a graph; not on a CPU"] = False,
        **options: Unpack[WeightOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (Slot("momentum_buffer"),)
    scalars = ()
    complex_params = False
    prepares_params = True
    whole_tensors = True

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        if group["adjust_lr_fn"] not in _ADJUSTMENTS:
            raise ValueError(
                f"Adjust learning rate function {group['adjust_lr_fn']} is not supported; `adjust_lr_fn` must be one "
                f"of {', '.join(map(repr, _ADJUSTMENTS))}"
            )

    def check_params(self, params: list[Tensor]) -> None:
        for param in params:
            if param.dim() != 2:  # noqa: PLR2004 (matrices)
                raise ValueError(
                    f"Muon only supports 2D parameters whereas we found a parameter with size: {param.size()}; give "
                    f"such parameters to another optimizer, AdamW for instance"
                )

    step = Optimizer._prepared_step

    def _step_prepared(self, found: list[PreparedParam]) -> None:
        for batch in _batches([row for row in found if not is_sharded(row.param)]):
            self._step_batch(batch)
        for rows in in_turns(row for row in found if is_sharded(row.param)):
            by_mesh: defaultdict[Any, list[PreparedParam]] = defaultdict(list)
            for row in rows:
                by_mesh[row.param.device_mesh].append(row)  # type: ignore[attr-defined]
            for alike in by_mesh.values():
                self._step_sharded(alike)

    def _step_batch(self, batch: list[PreparedParam]) -> None:
        """Step parameters whose directions are computed together."""
        h, params, together = batch[0].h, [row.param for row in batch], len(batch) > 1
        directions = _orthogonal(h, _momenta(batch))
        shrink, factor = 1 - h.lr * h.weight_decay, self._factor(h, params[0])
        if not together:
            add_scaled_(params[0].mul_(shrink), directions, factor)
            return
        torch._foreach_mul_(params, shrink)
        if not isinstance(factor, Tensor):
            torch._foreach_add_(params, list(directions.unbind()), alpha=factor)
            return
        for param, direction in zip(params, directions, strict=True):
            add_scaled_(param, direction, factor)

    def _step_sharded(self, rows: list[PreparedParam]) -> None:
        """Step sharded parameters of one mesh: each direction is computed on one rank, all else on the shards."""
        exchange, shards = MatrixExchange([row.param for row in rows]), list(map(local_row, rows))
        updates: dict[int, Tensor] = {}
        numbers = {id(row): number for number, row in enumerate(shards)}
        for batch in batches(shards, _dtypes):
            # What is made orthogonal is rounded to bfloat16 first.
            updates |= {numbers[id(row)]: u.bfloat16() for row, u in zip(batch, _momenta(batch), strict=True)}
        wholes = exchange.collect([updates[number] for number in range(len(rows))])
        directions: dict[int, Tensor] = {}
        for alike in _stacks(rows, wholes):
            found = _orthogonal(rows[alike[0]].h, [wholes[number] for number in alike])
            directions |= zip(alike, found.unbind() if len(alike) > 1 else [found], strict=True)
        for row, (h, param, *_), direction in zip(rows, shards, exchange.divide(directions, updates[0]), strict=True):
            add_scaled_(param.mul_(1 - h.lr * h.weight_decay), direction, self._factor(h, row.param))

    def _factor(self, h: SimpleNamespace, param: Tensor) -> Any:
        """Return what a direction is multiplied with before it is added."""
        return readable(h, -h.lr * self._scale(h, param))

    @staticmethod
    def _scale(h: SimpleNamespace, param: Tensor) -> float:
        """Return the factor by which the learning rate follows the shape of a matrix."""
        height, width = param.shape
        if h.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(height, width))
        if h.adjust_lr_fn == "spectral_unclamped":
            return math.sqrt(height / max(width, 1))
        return math.sqrt(max(1.0, height / max(width, 1)))


def _kind(row: PreparedParam) -> Any:
    """What rows share whose directions are computed together; on the CPU nothing where a stack is no faster."""
    h, param, grad, state, _ = row
    listed = is_plain(param) and is_plain(state["momentum_buffer"])  # torch's lists take no negated ones
    if not listed or (param.is_cpu and param.numel() > _LARGEST_STACKED):
        return None
    return id(h), param.device, param.shape, param.dtype, grad.dtype, state["momentum_buffer"].dtype


def _dtypes(row: PreparedParam) -> Any:
    h, param, grad, state, _ = row
    if not is_plain(state["momentum_buffer"]):
        return None
    return id(h), param.device, grad.dtype, state["momentum_buffer"].dtype


def _stacks(rows: Sequence[PreparedParam], wholes: Mapping[int, Tensor]) -> Iterator[list[int]]:
    """Yield numbers of matrices whose directions are computed together."""
    found: defaultdict[Any, list[int]] = defaultdict(list)
    for place, matrix in wholes.items():
        apart = matrix.is_cpu and matrix.numel() > _LARGEST_STACKED
        found[place if apart else (id(rows[place].h), matrix.shape)].append(place)
    for numbers in found.values():
        yield from (numbers[start : start + _MOST_STACKED] for start in range(0, len(numbers), _MOST_STACKED))


def _orthogonal(h: SimpleNamespace, matrices: Sequence[Tensor]) -> Tensor:
    """Return the direction of a matrix, or of several of one shape as a stack."""
    stack = torch.stack(list(matrices)) if len(matrices) > 1 else matrices[0]
    return newton_schulz(stack, h.ns_coefficients, h.ns_steps, h.eps)


def _batches(found: Sequence[PreparedParam]) -> Iterator[list[PreparedParam]]:
    for alike in batches(found, _kind):
        yield from (alike[start : start + _MOST_STACKED] for start in range(0, len(alike), _MOST_STACKED))


def _momenta(batch: Sequence[PreparedParam]) -> list[Tensor]:
    """Average gradients into the buffers and return what is to be made orthogonal."""
    h, buffers = batch[0].h, [row.state["momentum_buffer"] for row in batch]
    grads = [row.grad.to(buffer.dtype) for row, buffer in zip(batch, buffers, strict=True)]
    if len(batch) == 1:
        buffers[0].lerp_(grads[0], 1 - h.momentum)
        return [torch.lerp(grads[0], buffers[0], h.momentum)] if h.nesterov else buffers
    torch._foreach_lerp_(buffers, grads, 1 - h.momentum)
    return list(torch._foreach_lerp(grads, buffers, h.momentum)) if h.nesterov else buffers
