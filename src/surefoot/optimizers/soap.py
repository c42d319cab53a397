"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Annotated, Any, Unpack

import torch
from torch import Tensor

from surefoot.constructor import WeightOptions, arguments
from surefoot.distributed import MatrixExchange
from surefoot.locks import Lock
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import batches, in_turns, local_row, readable
from surefoot.rule import Scalar, Slot
from surefoot.rule.hyperparameters import Betas, Eps, Interval, LearningRate, Shrinking
from surefoot.step.types import CustomStep, PreparedParam
from surefoot.tensors.memory import is_plain
from surefoot.tensors.shards import is_sharded

_MOST_AXES = 6
_LEAST = 1e-30
_SMALL, _STACKED, _MOST_TOGETHER = 1 << 10, 1 << 22, 256
"""Elements of parameters that are stepped together on the CPU; and how many elements, and parameters, at most."""
_MOST_STACKED = 1 << 24
"""Elements of matrices that are decomposed together."""
_MOST_EXCHANGED = 1 << 25
"""Elements of sharded state that are made whole at once, for each rank."""
_GRAD = "grad"


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
        ValueError: a hyperparameter is out of range, or a parameter has more than 6 axes.
        TypeError: a hyperparameter is not a number, or an option that it does not have.
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
            if len(_seen_as(param, group)) > _MOST_AXES:
                raise ValueError(
                    f"SOAP takes parameters of at most {_MOST_AXES} axes, but got one of size {tuple(param.shape)}; "
                    f"pass merge_dims=True, or give such parameters to another optimizer"
                )

    def _make_custom_step(self, found: list[PreparedParam]) -> CustomStep:  # noqa: ARG002
        return _step_all


def _step_all(found: Sequence[PreparedParam]) -> None:
    """Step prepared parameters, each as often as it is there."""
    for rows in in_turns(row for row in found if row.param.numel()):
        with _full_precision({row.param.device.type for row in rows}):
            here = [local_row(row) if is_sharded(row.param) else row for row in rows if not _needs_ranks(row)]
            _step([row for row in here if row.param.numel()], _add_batch)
            alike: defaultdict[Any, list[PreparedParam]] = defaultdict(list)
            for row in filter(_needs_ranks, rows):
                alike[row.param.device_mesh, _dtype_for(row.param)].append(row)  # type: ignore[attr-defined]
            for some in alike.values():
                for part in _rounds(some):
                    _step_sharded(part)


_Finish = Callable[["_Batch", Tensor], None]


def _step(rows: Sequence[PreparedParam], finish: _Finish) -> None:
    """Make a step of parameters, of which none is there twice; `finish` is handed the update of each batch."""
    batches = [_Batch(batch) for batch in _batches(rows)]
    first, later = ([batch for batch in batches if (batch.calls == 1) == begins] for begins in (True, False))
    for batch in first:
        batch.average_products()
    for batch, bases in zip(first, _decomposed([batch.factors for batch in first], _eigenvectors), strict=True):
        batch.bases = bases
    for batch in later:
        update = batch.update()
        batch.average_products()
        finish(batch, update)
    due = [batch for batch in later if _renews(batch.h, batch.calls)]
    for batch, bases in zip(due, _decomposed([batch.iterates() for batch in due], _orthonormal), strict=True):
        exp_avg = batch.projected(batch.exp_avg, back=True)
        batch.bases = bases
        batch.exp_avg.copy_(batch.projected(exp_avg))
    for batch in batches:
        batch.store()


def _renews(h: SimpleNamespace, calls: int) -> bool:
    """Return whether a step, by the number of steps with it, gives new bases."""
    return calls == 1 or not (calls - 1) % h.precondition_frequency


def _calls(row: PreparedParam) -> int:
    return int(readable(row.h, row.state["step"]))


def _dtype_for(param: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic."""
    return torch.promote_types(param.dtype, torch.float32)


def _add_batch(batch: "_Batch", update: Tensor) -> None:
    _add(batch.h, batch.calls, [row.param for row in batch.rows], batch.each(update))


def _add(h: SimpleNamespace, calls: int, params: list[Tensor], updates: list[Tensor]) -> None:
    """Move parameters, which have taken as many steps, by their updates, and let them decay."""
    beta1, beta2, lr, decay = (float(readable(h, number)) for number in (*h.betas, h.lr, h.weight_decay))
    size = lr * (1 - beta2 ** (calls - 1)) ** 0.5 / (1 - beta1 ** (calls - 1)) if h.correct_bias else lr
    if len(params) > 1:
        torch._foreach_add_(params, updates, alpha=-size)
        torch._foreach_mul_(params, 1 - lr * decay)
    else:  # torch's lists take no lazily negated ones
        params[0].add_(updates[0], alpha=-size).mul_(1 - lr * decay)


# Sharded parameters: gradient and state are made whole on one rank, which makes the step but for adding it


def _needs_ranks(row: PreparedParam) -> bool:
    """Return whether a parameter is sharded, and its step more than one of its elements each."""
    return is_sharded(row.param) and (bool(_axes_in(row.state)) or row.h.normalize_grads)


def _rounds(rows: Sequence[PreparedParam]) -> Iterator[list[PreparedParam]]:
    """Yield sharded parameters of one mesh that are made whole together, by their shapes alone, the largest first."""
    most = _MOST_EXCHANGED * rows[0].param.device_mesh.size()  # type: ignore[attr-defined]
    sizes = [sum(row.state[name].numel() for name in _names_in(row.state)) for row in rows]
    some: list[PreparedParam] = []
    left = most
    for number in sorted(range(len(rows)), key=lambda number: -sizes[number]):
        if some and sizes[number] > left:
            yield some
            some, left = [], most
        some.append(rows[number])
        left -= sizes[number]
    yield some


def _step_sharded(rows: Sequence[PreparedParam]) -> None:
    """Make a step of sharded parameters of one mesh and one dtype of the arithmetic."""
    shards, calls, dtype = list(map(local_row, rows)), list(map(_calls, rows)), _dtype_for(rows[0].param)
    held = [(number, name) for number, row in enumerate(rows) for name in (_GRAD, *_names_in(row.state))]
    layouts = [rows[number].param if name == _GRAD else rows[number].state[name] for number, name in held]
    here = [shards[number].grad if name == _GRAD else shards[number].state[name] for number, name in held]
    exchange = MatrixExchange(layouts, [number for number, _ in held])
    wholes = exchange.collect([tensor.to(dtype) for tensor in here])
    mine: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for place, whole in wholes.items():
        number, name = held[place]
        mine[number][name] = whole
    # The gradient stands for its parameter, of which only shape and dtype count, and takes its update.
    _step(
        [
            PreparedParam(rows[number].h, state[_GRAD], state[_GRAD], state | {"step": rows[number].state["step"]})
            for number, state in mine.items()
        ],
        _put_update,
    )
    kept = {place for place, (number, name) in enumerate(held) if not _changes(name, rows[number].h, calls[number])}
    for place, shard in exchange.divide(wholes, here[0].new_empty(0, dtype=dtype), kept).items():
        number, name = held[place]
        if name == _GRAD:
            _add(rows[number].h, calls[number], [shards[number].param], [shard])
        else:
            here[place].copy_(shard)


def _put_update(batch: "_Batch", update: Tensor) -> None:
    for row, own in zip(batch.rows, batch.each(update), strict=True):
        row.grad.copy_(own)


def _changes(name: str, h: SimpleNamespace, calls: int) -> bool:
    """Return whether a step changes a tensor of state, or gives an update for the gradient."""
    if name.startswith("Q_"):
        return _renews(h, calls)
    return name.startswith("GG_") or calls > 1


# What is stepped together


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
    return id(h), param.device, param.shape, dtypes, _calls(row)


def _axes_in(state: Mapping[str, Any]) -> list[int]:
    """Return the axes that have a factor."""
    return [axis for axis in range(_MOST_AXES) if state.get(f"GG_{axis}") is not None]


def _names_in(state: Mapping[str, Any]) -> list[str]:
    """Return the names of a parameter's tensors of state: averages, factors, bases."""
    return ["exp_avg", "exp_avg_sq", *(f"{kind}_{axis}" for kind in ("GG", "Q") for axis in _axes_in(state))]


class _Batch:
    """Parameters of one shape that have taken as many steps, and what is done to them.

    Several are stacked along a first dimension; one is as it is.  Tensors have the shape of the parameter, whichever
    axes it is seen as, and the dtype of the arithmetic; `store` puts back what is not a tensor of the state for that.

    Attributes:
        rows: the parameters.
        h: their hyperparameters.
        calls: which call of `step` this is for them.
        exp_avg, exp_avg_sq, factors, bases: their state, the last two of the axes that have some.
    """

    def __init__(self, rows: Sequence[PreparedParam]) -> None:
        self.rows, (self.h, param, *_) = rows, rows[0]
        self.calls, self._dtype, self._stacked = _calls(rows[0]), _dtype_for(param), int(len(rows) > 1)
        self._axes, self._held = _axes_in(rows[0].state), _names_in(rows[0].state)
        self._sizes = _seen_as(param, vars(self.h)) if self._axes else param.shape
        self._grad = self._joined([row.grad for row in rows])
        self.exp_avg, self.exp_avg_sq, *matrices = (
            self._joined([row.state[name] for row in rows]) for name in self._held
        )
        self.factors, self._bases = matrices[: len(self._axes)], matrices[len(self._axes) :]

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        return (torch.stack(tensors) if self._stacked else tensors[0]).to(self._dtype)

    def each(self, tensor: Tensor) -> list[Tensor]:
        """Return the part of each parameter of a tensor of all."""
        return list(tensor.unbind()) if self._stacked else [tensor]

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
                torch._foreach_copy_([row.state[name] for row in self.rows], self.each(value))
            elif value is not self.rows[0].state[name]:
                self.rows[0].state[name].copy_(value)

    def _as_axes(self, tensor: Tensor) -> Tensor:
        return tensor.reshape((*tensor.shape[: self._stacked], *self._sizes))

    def projected(self, tensor: Tensor, *, back: bool = False) -> Tensor:
        """Return a tensor projected into the eigenbasis, or back from it."""
        found = self._as_axes(tensor)
        for axis, basis in zip(self._axes, self._bases, strict=True):
            matrix = basis.mT if back else basis
            last = found.movedim(axis + self._stacked, -1)
            rows = last.flatten(self._stacked, -2) if last.dim() > 1 + self._stacked else last.unsqueeze(-2)
            found = (rows @ matrix).view(last.shape).movedim(-1, axis + self._stacked)
        return found.reshape(tensor.shape)

    def update(self) -> Tensor:
        """Move the averages and return the direction that Adam takes in the basis, back from it."""
        beta1, beta2 = (float(readable(self.h, beta)) for beta in self.h.betas)
        grad = self.projected(self._grad)
        self.exp_avg.lerp_(grad, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        found = self.projected(self.exp_avg / self.exp_avg_sq.sqrt().add_(self.h.eps), back=True)
        if not self.h.normalize_grads:
            return found
        own, squares = tuple(range(self._stacked, found.dim())), found.square()
        return found / (_LEAST + (squares.mean(own, keepdim=True) if own else squares).sqrt())

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
