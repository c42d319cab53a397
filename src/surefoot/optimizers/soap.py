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
from surefoot.optimizers.common import batches, in_turns, readable
from surefoot.rule import Scalar, Slot
from surefoot.rule.hyperparameters import Betas, Eps, Interval, LearningRate, Shrinking
from surefoot.step.prepared import PreparedParam
from surefoot.tensors.memory import is_plain
from surefoot.tensors.shards import is_sharded

_MOST_AXES = 6
_LEAST = 1e-30
_SMALL, _STACKED, _MOST_TOGETHER = 1 << 10, 1 << 22, 256
"""Elements of parameters that are stepped together on the CPU; and how many elements, and parameters, at most."""
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
        yield Slot(f"GG_{axis}", shape=shape, wide=True, float8=False, begun=True)
        yield Slot(f"Q_{axis}", shape=shape, wide=True, float8=False, begun=True)


_SLOTS = tuple(_slots())
_SLOT_NAMES = frozenset(slot.name for slot in _SLOTS)


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
    the axis squared, `step`, which counts the first step too.  Which axes have factors is settled by the first step.

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

    slots = _SLOTS
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
        for rows in in_turns(row for row in found if row.param.numel()):
            with _full_precision({row.param.device.type for row in rows}):
                _step([_Batch(batch) for batch in _batches(rows)])


def _step(batches: Sequence["_Batch"]) -> None:
    """Make a step of parameters, of which none is there twice."""
    first, later = ([batch for batch in batches if (batch.calls == 1) == begins] for begins in (True, False))
    for batch in first:
        batch.average_products()
    for batch, bases in zip(first, _decomposed([batch.factors for batch in first], _eigenvectors), strict=True):
        batch.bases = bases
    for batch in later:
        batch.step()
        batch.average_products()
    due = [batch for batch in later if not (batch.calls - 1) % batch.h.precondition_frequency]
    for batch, bases in zip(due, _decomposed([batch.iterates() for batch in due], _orthonormal), strict=True):
        exp_avg = batch.turned(batch.exp_avg, back=True)
        batch.bases = bases
        batch.exp_avg.copy_(batch.turned(exp_avg))
    for batch in batches:
        batch.store()


def _batches(rows: Sequence[PreparedParam]) -> Iterator[list[PreparedParam]]:
    """Yield parameters that are stepped together: small ones of a shape, of which the time is in the calls."""
    for alike in batches(rows, _kind):
        most = min(_MOST_TOGETHER, max(1, _STACKED // alike[0].param.numel()))
        yield from (alike[start : start + most] for start in range(0, len(alike), most))


def _kind(row: PreparedParam) -> Any:
    h, param, grad, state, _ = row
    tensors = (param, *(value for name, value in state.items() if name in _SLOT_NAMES and value is not None))
    if (param.is_cpu and param.numel() > _SMALL) or not all(map(is_plain, tensors)):
        return None
    dtypes = tuple(tensor.dtype for tensor in (*tensors, grad))
    return id(h), param.device, param.shape, dtypes, int(readable(h, state["step"]))


class _Batch:
    """Parameters of one shape that have taken as many steps, and what is done to them.

    Several are stacked along a first dimension; one is as it is.  Tensors have the shape of the parameter, whichever
    axes it is seen as, and the dtype of the arithmetic; `store` puts back what is no tensor of the state for that.

    Attributes:
        h: their hyperparameters.
        calls: which call of `step` this is for them.
        exp_avg, exp_avg_sq, factors, bases: their state, the last two of the axes that have some.
    """

    def __init__(self, rows: Sequence[PreparedParam]) -> None:
        self._rows, (self.h, self._param, *_) = rows, rows[0]
        self.calls = int(readable(self.h, rows[0].state["step"]))
        self._dtype = torch.promote_types(self._param.dtype, torch.float32)
        self._stacked = int(len(rows) > 1)
        self._axes = [axis for axis in range(_MOST_AXES) if rows[0].state.get(f"GG_{axis}") is not None]
        self._sizes = _seen_as(self._param, vars(self.h))
        self._grad = self._joined([row.grad for row in rows])
        self._held = ("exp_avg", "exp_avg_sq", *(f"{kind}_{axis}" for kind in ("GG", "Q") for axis in self._axes))
        self.exp_avg, self.exp_avg_sq, *matrices = (
            self._joined([row.state[name] for row in rows]) for name in self._held
        )
        self.factors, self._bases = matrices[: len(self._axes)], matrices[len(self._axes) :]

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        return (torch.stack(tensors) if self._stacked else tensors[0]).to(self._dtype)

    @property
    def bases(self) -> list[Tensor]:
        """Return the bases of the axes that have one."""
        return self._bases

    @bases.setter
    def bases(self, new: Sequence[Tensor]) -> None:
        for basis, each in zip(self._bases, new, strict=True):
            basis.copy_(each)

    def store(self) -> None:
        """Put the state back where it is from, as far as it is elsewhere."""
        now = (self.exp_avg, self.exp_avg_sq, *self.factors, *self._bases)
        for name, value in zip(self._held, now, strict=True):
            if self._stacked:
                torch._foreach_copy_([row.state[name] for row in self._rows], list(value.unbind()))
            elif value is not self._rows[0].state[name]:
                self._rows[0].state[name].copy_(value)

    def _as_axes(self, tensor: Tensor) -> Tensor:
        return tensor.reshape((*tensor.shape[: self._stacked], *self._sizes))

    def turned(self, tensor: Tensor, *, back: bool = False) -> Tensor:
        """Return a tensor in the basis, or back from it."""
        found = self._as_axes(tensor)
        for axis, basis in zip(self._axes, self._bases, strict=True):
            matrix = basis.mT if back else basis
            last = found.movedim(axis + self._stacked, -1)
            rows = last.flatten(self._stacked, -2) if last.dim() > 1 + self._stacked else last.unsqueeze(-2)
            found = (rows @ matrix).view(last.shape).movedim(-1, axis + self._stacked)
        return found.reshape(tensor.shape)

    def step(self) -> None:
        """Take a step of Adam in the basis, and let the parameters decay."""
        h, steps, params = self.h, self.calls - 1, [row.param for row in self._rows]
        beta1, beta2, lr, decay = (float(readable(h, number)) for number in (*h.betas, h.lr, h.weight_decay))
        grad = self.turned(self._grad)
        self.exp_avg.lerp_(grad, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = self.turned(self.exp_avg / self.exp_avg_sq.sqrt().add_(h.eps), back=True)
        if h.normalize_grads:
            own = tuple(range(self._stacked, update.dim()))
            squares = update.square()
            update = update / (_LEAST + (squares.mean(own, keepdim=True) if own else squares).sqrt())
        size = lr * (1 - beta2**steps) ** 0.5 / (1 - beta1**steps) if h.correct_bias else lr
        if self._stacked:
            torch._foreach_add_(params, list(update.unbind()), alpha=-size)
            torch._foreach_mul_(params, 1 - lr * decay)
        else:  # torch's lists take no lazily negated ones
            params[0].add_(update, alpha=-size).mul_(1 - lr * decay)

    def average_products(self) -> None:
        """Move each factor towards the product of the gradient, along its axis, with itself."""
        beta = float(readable(self.h, self.h.betas[1] if self.h.shampoo_beta < 0 else self.h.shampoo_beta))
        grad = self._as_axes(self._grad)
        for axis, factor in zip(self._axes, self.factors, strict=True):
            first = grad.movedim(axis + self._stacked, self._stacked)
            matrix = first.flatten(1 + self._stacked) if first.dim() > 1 + self._stacked else first.unsqueeze(-1)
            factor.lerp_(matrix @ matrix.mT, 1 - beta)

    def iterates(self) -> list[Tensor]:
        """Return what power iteration makes of the bases, their columns in the order of what they have of the factors.

        The average of squares is put into that order.
        """
        squares, found = self._as_axes(self.exp_avg_sq), []
        for axis, factor, basis in zip(self._axes, self.factors, self._bases, strict=True):
            product = factor @ basis
            order = (basis * product).sum(-2).argsort(descending=True, stable=True)
            shape = [1] * squares.dim()
            shape[: self._stacked] = order.shape[: self._stacked]
            shape[axis + self._stacked] = -1
            squares = squares.take_along_dim(order.view(shape), axis + self._stacked)
            found.append(product.take_along_dim(order.unsqueeze(-2), -1))
        self.exp_avg_sq.copy_(squares.reshape(self.exp_avg_sq.shape))
        return found


def _decomposed(matrices: Sequence[Sequence[Tensor]], decompose: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    """Return what a function makes of square matrices, or stacks of them: those of one size are decomposed together."""
    alike: defaultdict[Any, list[tuple[int, int]]] = defaultdict(list)
    for row, own in enumerate(matrices):
        for place, matrix in enumerate(own):
            alike[matrix.shape[-1], matrix.dtype, matrix.device].append((row, place))
    found: list[list[Tensor]] = [list(own) for own in matrices]
    for (size, *_), places in alike.items():
        every = [matrices[row][place].reshape(-1, size, size) for row, place in places]
        joined = torch.cat(every) if len(every) > 1 else every[0]
        made = [decompose(some) for some in torch.split(joined, max(1, _MOST_STACKED // size**2))]
        whole = torch.cat(made) if len(made) > 1 else made[0]
        for (row, place), each in zip(places, torch.split(whole, list(map(len, every))), strict=True):
            found[row][place] = each.view(matrices[row][place].shape)
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
