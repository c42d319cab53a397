"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import WeightOptions, arguments
from surefoot.locks import Lock
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import add_scaled_, readable
from surefoot.rule import Scalar, Slot
from surefoot.rule.hyperparameters import Betas, Eps, Interval, LearningRate, Shrinking
from surefoot.step.prepared import PreparedParam
from surefoot.tensors.shards import is_sharded

_MOST_AXES = 6
_LEAST = 1e-30
_MOST_STACKED = 1 << 24
"""Elements of matrices that are decomposed together."""


@functools.lru_cache(maxsize=1024)
def _axes_of(shape: torch.Size, merge_dims: bool, max_precond_dim: int) -> torch.Size:
    """Return the sizes of the axes as which a parameter is seen; neighbours are put together up to a size."""
    if not merge_dims or len(shape) <= 1:
        return shape
    sizes: list[int] = []
    for size in shape:
        if sizes and (sizes[-1] == 1 or sizes[-1] * size <= max_precond_dim):
            sizes[-1] *= size
        elif size != 1 or not sizes:
            sizes.append(size)
    return torch.Size(sizes)


def _seen_as(param: Tensor, group: Mapping[str, Any]) -> torch.Size:
    return _axes_of(param.shape, bool(group["merge_dims"]), group["max_precond_dim"])


def _factor_shape(axis: int, param: Tensor, group: Mapping[str, Any]) -> torch.Size | None:
    """Return the shape of the factor of an axis, None where it has none."""
    sizes = _seen_as(param, group)
    skipped = axis >= len(sizes) or sizes[axis] > group["max_precond_dim"]
    if skipped or (param.dim() == 1 and not group["precondition_1d"]):
        return None
    return torch.Size((sizes[axis], sizes[axis]))


def _slots() -> Iterator[Slot]:
    yield Slot("exp_avg", wide=True, float8=False)
    yield Slot("exp_avg_sq", wide=True, signed=False, float8=False)
    for axis in range(_MOST_AXES):
        shape = functools.partial(_factor_shape, axis)
        yield Slot(f"GG_{axis}", shape=shape, wide=True, float8=False)
        yield Slot(f"Q_{axis}", shape=shape, wide=True, float8=False)


class SOAP(Optimizer):
    """SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

    With the gradient g of a matrix, and t the number of its steps before this one; the first makes bases only::

        first:  GG_0 = (1 - shampoo_beta) * g g^T,  GG_1 = (1 - shampoo_beta) * g^T g
                Q_i = eigenvectors of GG_i, the greatest eigenvalues first; the parameter stays

        p = Q_0^T g Q_1
        exp_avg = beta1 * exp_avg + (1 - beta1) * p
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * p**2
        u = Q_0 (exp_avg / (sqrt(exp_avg_sq) + eps)) Q_1^T
        param = (1 - lr * weight_decay) * (param - lr * sqrt(1 - beta2**t) / (1 - beta1**t) * u)
        GG_0 = shampoo_beta * GG_0 + (1 - shampoo_beta) * g g^T,  GG_1 alike

    and in each `precondition_frequency`-th of these steps, exp_avg going with the basis, and exp_avg_sq in its order::

        Q_i = the orthogonal factor of GG_i Q_i, whose columns are put in the order of diag(Q_i^T GG_i Q_i)

    Of a tensor of more dimensions each is an axis with a factor of its own.  Axes longer than `max_precond_dim` have
    none, nor have vectors unless `precondition_1d`: without any it is Adam, with its eps in units of the uncorrected
    root.  State is float32 or better: `exp_avg` and `exp_avg_sq` like the parameter, `GG_i` and `Q_i` of the size of
    the axis squared, `step`, which counts the first step too.

    {arguments}

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter is sharded or has more than 6 axes.
        TypeError: a hyperparameter is no number, or an option that it does not have.
        RuntimeError: in `step`, a gradient is sparse or a parameter complex.

    Example:
        >>> weight = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = surefoot.SOAP([weight], lr=0.1, weight_decay=0.0)
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
        ...     optimizer.step()
        >>> [round(value, 4) for value in weight.diagonal().tolist()]
        [0.9, 1.1]

    Paper: Vyas et al. 2024, "SOAP: improving and stabilizing Shampoo using Adam", arXiv 2409.11321, algorithm 3, as its
    authors' implementation has it; of that there is no `data_format`, and parameters that are single numbers are taken.

    Products are in full precision, whatever `torch.set_float32_matmul_precision` or autocast say.
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 3e-3,
        betas: Betas = (0.95, 0.95),
        shampoo_beta: Annotated[
            float,
            Interval("Invalid shampoo_beta value: ", low=-torch.inf, high=1.0, high_open=True),
            "decay of the averages GG, beta2 if negative",
        ] = -1,
        eps: Eps = 1e-8,
        weight_decay: Shrinking = 0.01,
        precondition_frequency: Annotated[
            int, Interval("Invalid precondition_frequency value: ", low=1, whole=True), "steps between new bases"
        ] = 10,
        max_precond_dim: Annotated[
            int, Interval("Invalid max_precond_dim value: ", whole=True), "size of the longest axis that has a factor"
        ] = 10000,
        merge_dims: Annotated[bool, "take neighbouring axes for one, as long as that has a factor"] = False,
        precondition_1d: Annotated[bool, "let vectors have factors too"] = False,
        normalize_grads: Annotated[bool, "bring u to a root mean square of 1"] = False,
        correct_bias: Annotated[bool, "divide averages by what they have of their weights so far"] = True,
        *,
        maximize: bool = False,
        **options: Unpack[WeightOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = tuple(_slots())
    scalars = (Scalar("step"),)
    complex_params = False
    prepares_params = True
    whole_tensors = True

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        if group.get("capturable"):
            raise ValueError(
                "SOAP takes no `capturable=True`: whether a step renews its bases is decided on the host; leave it out"
            )

    def check_params(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        for param in params:
            if is_sharded(param):
                raise ValueError(
                    f"SOAP takes no sharded parameters, since its bases are of whole ones, but got one of size "
                    f"{tuple(param.shape)}; give such parameters to Muon, Adafactor or AdamW"
                )
            if len(_seen_as(param, group)) > _MOST_AXES:
                raise ValueError(
                    f"SOAP takes parameters of at most {_MOST_AXES} axes, but got one of size {tuple(param.shape)}; "
                    f"pass merge_dims=True, or give such parameters to another optimizer"
                )

    step = Optimizer._prepared_step

    def _step_prepared(self, found: list[PreparedParam]) -> None:
        rows = [_Row(*row) for row in found if row.param.numel()]
        with _full_precision({row.param.device.type for row in rows}):
            first, later = ([row for row in rows if (row.calls == 1) == begins] for begins in (True, False))
            for row in first:
                row.average_products()
            for row, bases in zip(first, _decomposed([row.factors() for row in first], _eigenvectors), strict=True):
                row.put(bases)
            for row in later:
                row.step()
                row.average_products()
            due = [row for row in later if not (row.calls - 1) % row.h.precondition_frequency]
            for row, bases in zip(due, _decomposed([row.iterates() for row in due], _orthonormal), strict=True):
                exp_avg = row.turned_back(row.average("exp_avg"))
                row.put(bases)
                row.average("exp_avg").copy_(row.turned(exp_avg))


class _Row(PreparedParam):
    """A parameter, with the state that it has, and what is done to it.

    Tensors are turned into the basis of the factors as the axes that the options say, and have the shape of the
    parameter otherwise.
    """

    @property
    def calls(self) -> int:
        """Return which call of `step` this is for the parameter."""
        return int(readable(self.h, self.state["step"]))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the arithmetic."""
        return torch.promote_types(self.param.dtype, torch.float32)

    def average(self, name: str) -> Tensor:
        """Return one of the two averages of Adam."""
        found: Tensor = self.state[name]
        return found

    def as_axes(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as one of its axes."""
        return tensor.to(self.dtype).reshape(_seen_as(self.param, vars(self.h)))

    def factors(self, kind: str = "GG") -> list[Tensor]:
        """Return the factors of the axes that have one, or their bases."""
        return [self.state[f"{kind}_{axis}"] for axis in self.axes()]

    def axes(self) -> list[int]:
        """Return the axes that have factors."""
        return [axis for axis in range(_MOST_AXES) if self.state.get(f"GG_{axis}") is not None]

    def turned(self, tensor: Tensor, *, back: bool = False) -> Tensor:
        """Return a tensor in the basis, or back from it."""
        found = self.as_axes(tensor)
        for axis, basis in zip(self.axes(), self.factors("Q"), strict=True):
            matrix = basis.to(self.dtype)
            found = (found.movedim(axis, -1) @ (matrix.mT if back else matrix)).movedim(-1, axis)
        return found.reshape(self.param.shape)

    def turned_back(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is in the basis as it is in the parameter's."""
        return self.turned(tensor, back=True)

    def step(self) -> None:
        """Take a step of Adam in the basis, and let the parameter decay."""
        h, param, steps = self.h, self.param, self.calls - 1
        beta1, beta2, lr = (readable(h, number) for number in (*h.betas, h.lr))
        grad, exp_avg, exp_avg_sq = self.turned(self.grad), self.average("exp_avg"), self.average("exp_avg_sq")
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = self.turned_back(exp_avg / exp_avg_sq.sqrt().add_(h.eps))
        if h.normalize_grads:
            update = update / (_LEAST + update.square().mean().sqrt())
        size = lr * (1 - beta2**steps) ** 0.5 / (1 - beta1**steps) if h.correct_bias else lr
        add_scaled_(param, update, -size)
        if isinstance(h.weight_decay, Tensor) or h.weight_decay:
            param.mul_(1 - lr * readable(h, h.weight_decay))

    def average_products(self) -> None:
        """Move each factor towards the product of the gradient, along its axis, with itself."""
        beta = readable(self.h, self.h.betas[1] if self.h.shampoo_beta < 0 else self.h.shampoo_beta)
        grad = self.as_axes(self.grad)
        for axis, factor in zip(self.axes(), self.factors(), strict=True):
            matrix = grad.movedim(axis, 0).flatten(1) if grad.dim() > 1 else grad[:, None]
            factor.lerp_((matrix @ matrix.mT).to(factor.dtype), 1 - beta)

    def iterates(self) -> list[Tensor]:
        """Return what power iteration makes of the bases, their columns in the order of what they have of the factors.

        The average of squares is put into that order.
        """
        squares, found = self.as_axes(self.average("exp_avg_sq")), []
        for axis, factor, basis in zip(self.axes(), self.factors(), self.factors("Q"), strict=True):
            product = factor @ basis
            order = (basis * product).sum(0).argsort(descending=True, stable=True)
            squares = squares.index_select(axis, order)
            found.append(product.index_select(1, order))
        self.average("exp_avg_sq").copy_(squares.reshape(self.param.shape))
        return found

    def put(self, bases: Sequence[Tensor]) -> None:
        """Let the bases be others."""
        for basis, new in zip(self.factors("Q"), bases, strict=True):
            basis.copy_(new)


def _decomposed(matrices: Sequence[Sequence[Tensor]], decompose: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    """Return what a function makes of stacks of matrices, those of one size together, in the order that they came."""
    alike: defaultdict[Any, list[tuple[int, int]]] = defaultdict(list)
    for row, own in enumerate(matrices):
        for place, matrix in enumerate(own):
            alike[matrix.shape, matrix.dtype, matrix.device].append((row, place))
    found: list[list[Tensor]] = [list(own) for own in matrices]
    for (shape, *_), places in alike.items():
        most = max(1, _MOST_STACKED // shape.numel())
        for first in range(0, len(places), most):
            some = places[first : first + most]
            made = decompose(torch.stack([matrices[row][place] for row, place in some]))
            for (row, place), each in zip(some, made.unbind(), strict=True):
                found[row][place] = each
    return found


def _orthonormal(matrices: Tensor) -> Tensor:
    factor: Tensor = torch.linalg.qr(matrices).Q
    return factor


def _eigenvectors(matrices: Tensor) -> Tensor:
    """Return the eigenvectors of symmetric matrices, greatest eigenvalues first; NaN where a matrix is not finite."""
    finite = matrices.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    safe = torch.where(finite, matrices, 0) + _LEAST * torch.eye(matrices.size(-1)).to(matrices)
    try:
        vectors = torch.linalg.eigh(safe).eigenvectors
    except RuntimeError:  # it does not converge in float32
        vectors = torch.linalg.eigh(safe.double()).eigenvectors.to(matrices.dtype)
    return torch.where(finite, vectors.flip(-1), torch.nan)


_BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_precision = Lock()


@contextmanager
def _full_precision(devices: Iterable[str]) -> Iterator[None]:
    """Let products of float32 be in float32, whatever is allowed elsewhere."""
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        if any(backend.fp32_precision not in ("none", "ieee") for backend in _BACKENDS):
            stack.enter_context(_precision)  # or another thread would put back what this one has set
            for backend in _BACKENDS:
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        yield
