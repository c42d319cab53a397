"""Adafactor: second moments of matrices kept as one row and one column."""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from surefoot.constructor import WeightOptions, arguments
from surefoot.distributed import PartialSum, sum_over_shards
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import add_scaled_, batches, in_turns, larger, local_row, readable, smaller
from surefoot.rule import Slot
from surefoot.rule.hyperparameters import Each, Interval, Number
from surefoot.rule.ops import BY_NAME
from surefoot.step.types import CustomStep, PreparedParam
from surefoot.tensors.memory import is_plain
from surefoot.tensors.shards import is_sharded

_SECOND_MOMENTS = ("row_var", "col_var", "variance")
_WIDE = (torch.float32, torch.float64)
_MANY = 16
"""Small tensors of one shape of which a stack is faster than a list."""
_JOINED, _MOST_JOINED = 1 << 18, 256
"""Elements, and tensors, that are at most put together."""


def _row_shape(param: Tensor, group: Mapping[str, Any]) -> torch.Size | None:  # noqa: ARG001
    return torch.Size((*param.shape[:-1], 1)) if param.dim() > 1 else None


def _col_shape(param: Tensor, group: Mapping[str, Any]) -> torch.Size | None:  # noqa: ARG001
    return torch.Size((*param.shape[:-2], 1, param.shape[-1])) if param.dim() > 1 else None


def _vector_shape(param: Tensor, group: Mapping[str, Any]) -> torch.Size | None:  # noqa: ARG001
    return param.shape if param.dim() <= 1 else None


class Adafactor(Optimizer):
    """Adafactor: second moments of matrices kept as one row and one column, steps relative to the parameter.

    With the gradient g, t the number of the step, w = t**beta2_decay and rms(x) the root mean square of all elements::

        row_var += w * (mean(g**2, over columns) - row_var)
        col_var += w * (mean(g**2, over rows) - col_var)
        v = row_var * col_var / max(mean(row_var), eps1)
        u = g / sqrt(max(v, eps1**2))
        size = max(eps2, rms(param)) * min(lr, 1 / sqrt(t))
        param = (1 - lr * weight_decay) * param - size * u / max(1, rms(u) / d)

    A vector, or a single number, keeps all of its second moment: variance += w * (g**2 - variance), which is v.  Of a
    tensor with more than two dimensions the last two make the matrices.

    {arguments}

    Raises:
        ValueError: a hyperparameter is out of range.
        TypeError: a hyperparameter is not a number.
        RuntimeError: in `step`, a gradient is sparse or a parameter complex.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = surefoot.Adafactor([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.8419, -1.8419]

    Paper: Shazeer & Stern 2018, "Adafactor: adaptive learning rates with sublinear memory cost", algorithms 4 and 5
    without first moment, with torch's lr and weight decay.

    Other than in torch, eps1 None is resolved for each parameter by itself, and empty parameters are taken.
    """

    def __init__(
        self,
        params: Params,
        lr: Annotated[
            Number,
            Interval("Learning rate should be >= 0 but is: "),
            "greatest step in units of the parameter, a number or a tensor of one element",
        ] = 1e-2,
        beta2_decay: Annotated[
            float,
            Interval("beta2_decay should be <= 0 but is: ", low=-torch.inf, high=0.0),
            "power at which old second moments fade",
        ] = -0.8,
        eps: Annotated[
            tuple[float | None, float],
            Each(
                (
                    Interval("epsilon1 should be >= 0 but is: ", optional=True),
                    Interval("epsilon2 should be >= 0 but is: "),
                )
            ),
            "(eps1, eps2), the least root of a second moment and the least size of a parameter; eps1 None is the "
            "machine epsilon of the parameter's dtype",
        ] = (None, 1e-3),
        d: Annotated[
            float,
            Interval("Clipping threshold d should be >= 1 but is: ", low=1.0),
            "greatest root mean square of an update before it is clipped",
        ] = 1.0,
        weight_decay: Annotated[
            Number,
            Interval("weight_decay should be >= 0 but is: ", high_open=True),
            "shrinking of the parameter, in units of the learning rate",
        ] = 0.0,
        *,
        foreach: Annotated[bool | None, "taken for torch's sake; there is one implementation"] = None,
        maximize: bool = False,
        capturable: Annotated[
            bool,
            "keep the step count on the parameters' device, so that steps can be captured in a graph; not on a CPU",
        ] = False,
        **options: Unpack[WeightOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (
        Slot("row_var", shape=_row_shape),
        Slot("col_var", shape=_col_shape),
        Slot("variance", shape=_vector_shape),
    )
    complex_params = False
    prepares_params = True
    whole_tensors = True

    def _make_custom_step(self, found: list[PreparedParam]) -> CustomStep:
        places = {id(row): place for place, row in enumerate(found)}
        sharded = [place for place, row in enumerate(found) if is_sharded(row.param)]
        lists: defaultdict[Any, list[PreparedParam]] = defaultdict(list)
        others: list[PreparedParam] = []
        for row in (row for row in found if not is_sharded(row.param)) if sharded else found:
            kind = _list_kind(row)
            (others if kind is None else lists[kind]).append(row)
        planned: list[_List | _Batch] = []
        for rows in lists.values():
            many = _many_of_a_shape(rows) if len(rows) >= _MANY else ()
            others += [row for row in rows if row.param.shape in many]
            if listed := [row for row in rows if row.param.shape not in many] if many else rows:
                planned.append(_List(listed, places))
        planned += [_Batch(rows, places) for rows in _batches(others)] if others else []

        def step(rows: list[PreparedParam]) -> None:
            for turn in in_turns(rows[place] for place in sharded) if sharded else ():
                _step_sharded(turn)
            for each in planned:
                each.step(rows)

        return step


class _Batch:
    """Parameters of one shape that are stepped as one tensor with a dimension more, or a single one as it is."""

    def __init__(self, rows: Sequence[PreparedParam], places: Mapping[int, int]) -> None:
        self._places = [places[id(row)] for row in rows]
        self._names = [name for name in _SECOND_MOMENTS if rows[0].state.get(name) is not None]

    def step(self, every: Sequence[PreparedParam]) -> None:
        """Step the parameters."""
        batch = [every[place] for place in self._places]
        h = batch[0].h
        steps = [readable(h, row.state["step"]) for row in batch]
        together = len(batch) > 1
        if together and not _is_tensor(steps[0]) and steps.count(steps[0]) < len(steps):  # somebody has changed some
            for row in batch:
                _Batch([row], {id(row): 0}).step([row])
            return
        stored = [[row.param for row in batch], *([row.state[name] for row in batch] for name in self._names)]
        param, *moments = map(_joined, stored)
        state = dict(zip(self._names, moments, strict=True))
        step = _joined(steps).view(-1, *(1,) * batch[0].param.dim()) if together and _is_tensor(steps[0]) else steps[0]
        _step_param(h, param, _joined([row.grad for row in batch]), state, step, together=together)
        if together:
            for tensors, joined in zip(stored, (param, *moments), strict=True):
                torch._foreach_copy_(tensors, list(joined.unbind()))


def _step_param(
    h: SimpleNamespace, param: Tensor, grad: Tensor, state: dict[str, Tensor], step: Any, *, together: bool
) -> None:
    compute = torch.promote_types(param.dtype, torch.float32)
    lr, grad = readable(h, h.lr), grad.to(compute)
    eps1 = torch.finfo(param.dtype).eps if h.eps[0] is None else h.eps[0]
    rms = _root_mean_squares if together else functools.partial(_root_mean_square, h)
    size = larger(h.eps[1], rms(param.to(compute))) * smaller(lr, step**-0.5)
    variance = _second_moment(grad, state, step**h.beta2_decay, eps1)
    update = _direction(variance, grad, eps1)
    size = size / larger(1.0, rms(update) / h.d)
    size = size.to(compute) if together else size
    _apply(h, param, update, size)


def _second_moment(grad: Tensor, state: dict[str, Tensor], weight: Any, eps1: float) -> Tensor:
    """Average the squared gradient into the state and return its estimate, in the gradient's dtype."""
    if "variance" in state:
        return _averaged(state["variance"], grad * grad, weight).clone()
    row = _averaged(state["row_var"], _mean_square(grad, -1), weight)
    col = _averaged(state["col_var"], _mean_square(grad, -2), weight)
    mean = row.mean(dim=-2, keepdim=True).clamp(min=eps1)
    return (row @ col).div_(mean)


def _apply(h: SimpleNamespace, param: Tensor, update: Tensor, size: Any) -> None:
    """Shrink a parameter by its weight decay and subtract `size * update`."""
    kept = 1 - readable(h, h.lr) * h.weight_decay if isinstance(h.weight_decay, Tensor) or h.weight_decay else None
    if param.dtype == update.dtype:
        if kept is not None:
            param.mul_(kept)
        add_scaled_(param, update, -size)
        return
    decayed = param.to(update.dtype) if kept is None else param.to(update.dtype) * kept
    param.copy_(BY_NAME["add_scaled"](decayed, update, -size))


# Sharded parameters: each rank computes with its shards, and what is a mean over more goes round twice for all together


def _step_sharded(rows: Sequence[PreparedParam]) -> None:
    """Step sharded parameters, none of them twice: `_step_param` with sums over ranks."""
    wholes, shards = [row.param for row in rows], [_wide_gradient(local_row(row)) for row in rows]
    means: list[_Means] = []
    partials: list[PartialSum] = []
    for whole, shard in zip(wholes, shards, strict=True):
        means.append(_Means.of(whole, shard, partials))
    known = sum_over_shards(partials)
    partials = []
    updates = []
    for whole, shard, own in zip(wholes, shards, means, strict=True):
        updates.append(own.direction(shard, known))
        partials.append(_square_sum(updates[-1], whole))
    for whole, shard, own, update, squares in zip(
        wholes, shards, means, updates, sum_over_shards(partials), strict=True
    ):
        h = shard.h
        longest = smaller(readable(h, h.lr), readable(h, shard.state["step"]) ** -0.5)
        size = larger(h.eps[1], _root(h, known[own.param], whole)) * longest
        size = size / larger(1.0, _root(h, squares, whole) / h.d)
        _apply(h, shard.param, update, size.to(update.dtype) if isinstance(size, Tensor) else size)


def _wide_gradient(row: PreparedParam) -> PreparedParam:
    return row._replace(grad=row.grad.to(torch.promote_types(row.param.dtype, torch.float32)))


class _Means(NamedTuple):
    """Where among partial sums those of a parameter stand, and what is needed to make them means.

    Attributes:
        param: the sum of its squares.
        rows, cols: the sums of its gradient's squares over columns, and over rows; None for vectors.
        total: their sum over both.
        row_var: the sum of the row averages before the step.
        height, width: of its matrices.
    """

    param: int
    rows: int | None = None
    cols: int = 0
    total: int = 0
    row_var: int = 0
    height: int = 1
    width: int = 1

    @classmethod
    def of(cls, whole: Tensor, shard: PreparedParam, partials: list[PartialSum]) -> "_Means":
        """Return where the sums stand that are appended to `partials`."""
        first, (_, param, grad, state, _) = len(partials), shard
        partials.append(_square_sum(param.to(grad.dtype), whole))
        if state.get("variance") is not None:
            return cls(first)
        height, width = whole.dim() - 2, whole.dim() - 1
        squares = grad.square()
        rows = torch.linalg.vector_norm(grad, dim=-1, keepdim=True).double().square()
        partials += (
            PartialSum(rows, whole, (width,)),
            PartialSum(squares.sum(-2, keepdim=True), whole, (height,)),
            PartialSum(rows.sum(-2, keepdim=True), whole, (height, width)),
            PartialSum(state["row_var"].sum(-2, keepdim=True, dtype=torch.float64), whole, (height,)),
        )
        sizes = (max(whole.size(height), 1), max(whole.size(width), 1))
        return cls(first, first + 1, first + 2, first + 3, first + 4, *sizes)

    def direction(self, shard: PreparedParam, sums: Sequence[Tensor]) -> Tensor:
        """Average the squared gradient into the state and return grad / sqrt(its estimate)."""
        h, param, grad, state, _ = shard
        weight, eps1 = readable(h, state["step"]) ** h.beta2_decay, readable(h, h.eps[0])
        eps1 = torch.finfo(param.dtype).eps if eps1 is None else eps1
        if self.rows is None:
            return _direction(_averaged(state["variance"], grad * grad, weight).clone(), grad, eps1)
        row, col = (
            _averaged(state[name], (sums[number] / size).to(grad.dtype), weight)
            for name, number, size in (("row_var", self.rows, self.width), ("col_var", self.cols, self.height))
        )
        now = sums[self.total] / (self.height * self.width)
        mean = BY_NAME["lerp"](sums[self.row_var] / self.height, now, weight).clamp(min=eps1).to(grad.dtype)
        return _direction((row * col).div_(mean), grad, eps1)


def _square_sum(shard: Tensor, whole: Tensor) -> PartialSum:
    return PartialSum(torch.linalg.vector_norm(shard).double().square(), whole, range(whole.dim()))


def _root(h: SimpleNamespace, squares: Tensor, whole: Tensor) -> Any:
    """Return the root mean square of a tensor from the sum of its squares."""
    mean = readable(h, squares) / max(whole.numel(), 1)
    return mean.sqrt() if isinstance(mean, Tensor) else math.sqrt(mean)


# On the CPU, where numbers can be read at once and the time of small tensors is in the calls


def _list_kind(row: PreparedParam) -> Any:
    """Return what rows share that are stepped as lists; None for others: short dtypes, devices, what is not plain."""
    h, param, grad, state, apart = row
    moments = [state[name] for name in _SECOND_MOMENTS if state.get(name) is not None]
    dtype = param.dtype
    if apart or not param.is_cpu or dtype not in _WIDE or not moments:
        return None
    if not all(tensor.dtype is dtype and is_plain(tensor) for tensor in (param, grad, *moments)):
        return None
    step = readable(h, state["step"])
    return (id(h), dtype, step) if isinstance(step, int | float) else None  # a captured step reads no number


def _many_of_a_shape(rows: Sequence[PreparedParam]) -> set[torch.Size]:
    counts = Counter(row.param.shape for row in rows)
    return {shape for shape, count in counts.items() if count >= _MANY and shape.numel() * _MANY <= _JOINED}


class _List:
    """Parameters of one dtype that have taken as many steps: `_step_param`, an operation for all of them.

    Args:
        rows: the parameters.
        places: where each row stands among all, by its id.
    """

    def __init__(self, rows: Sequence[PreparedParam], places: Mapping[int, int]) -> None:
        states = [row.state for row in rows]
        self._h, self._places = rows[0].h, [places[id(row)] for row in rows]
        self._params = [row.param for row in rows]
        self._roots = [math.sqrt(max(param.numel(), 1)) for param in self._params]
        self._vectors = [i for i, state in enumerate(states) if state.get("variance") is not None]
        self._matrices = [i for i, state in enumerate(states) if state.get("variance") is None]
        self._variances = [states[i]["variance"] for i in self._vectors]
        self._rows, self._cols = ([states[i][name] for i in self._matrices] for name in ("row_var", "col_var"))

    def step(self, every: Sequence[PreparedParam]) -> None:
        """Step the parameters."""
        found = [every[place] for place in self._places]
        steps = [float(row.state["step"]) for row in found]
        if steps.count(steps[0]) < len(steps):  # somebody has changed some
            for count in set(steps):
                own = [row for row, taken in zip(found, steps, strict=True) if taken == count]
                _List(own, {id(row): place for place, row in enumerate(own)}).step(own)
            return
        h, params, roots = self._h, self._params, self._roots
        lr, (eps1, eps2), d = readable(h, h.lr), [readable(h, eps) for eps in h.eps], readable(h, h.d)
        eps1 = torch.finfo(params[0].dtype).eps if eps1 is None else eps1
        longest = min(lr, steps[0] ** -0.5)
        norms = [norm.item() for norm in torch._foreach_norm(params)]
        sizes = [max(eps2, norm / root) * longest for norm, root in zip(norms, roots, strict=True)]
        updates = self._directions([row.grad for row in found], steps[0] ** h.beta2_decay, eps1)
        if h.weight_decay:
            torch._foreach_mul_(params, 1 - lr * h.weight_decay)
        for param, update, norm, root, size in zip(
            params, updates, torch._foreach_norm(updates), roots, sizes, strict=True
        ):
            param.add_(update, alpha=-size / max(1.0, norm.item() / root / d))

    def _directions(self, grads: list[Tensor], weight: float, eps1: float) -> list[Tensor]:
        """Average squared gradients into the state and return gradients over the roots of the estimates."""
        found = list(torch._foreach_mul(grads, grads))
        least = eps1 * eps1
        if self._vectors:
            torch._foreach_lerp_(self._variances, [found[i] for i in self._vectors], weight)
            for i, bounded in zip(self._vectors, torch._foreach_clamp_min(self._variances, least), strict=True):
                found[i] = bounded
        if self._matrices:
            matrices, squares = ([each[i] for i in self._matrices] for each in (grads, found))
            products = self._products(matrices, squares, weight, eps1)
            torch._foreach_clamp_min_(products, least)
            for i, product in zip(self._matrices, products, strict=True):
                found[i] = product
        torch._foreach_rsqrt_(found)
        torch._foreach_mul_(found, grads)
        return found

    def _products(self, grads: list[Tensor], squares: list[Tensor], weight: float, eps1: float) -> list[Tensor]:
        """Average the squared gradients of matrices by row and column, and return the estimates."""
        of_rows = [torch.linalg.vector_norm(grad, dim=-1, keepdim=True) for grad in grads]
        torch._foreach_mul_(of_rows, of_rows)
        torch._foreach_div_(of_rows, [float(grad.size(-1)) for grad in grads])
        torch._foreach_lerp_(self._rows, of_rows, weight)
        torch._foreach_lerp_(self._cols, [square.mean(-2, keepdim=True) for square in squares], weight)
        means = [average.mean(dim=-2, keepdim=True) for average in self._rows]
        torch._foreach_clamp_min_(means, eps1)
        products = [torch.matmul(*pair) for pair in zip(self._rows, self._cols, strict=True)]
        torch._foreach_div_(products, means)
        return products


# Elsewhere


def _batches(found: Sequence[PreparedParam]) -> Iterator[list[PreparedParam]]:
    """Put rows together that differ in their values only, as long as they are small: the time is in the calls then."""
    for alike in batches(found, _kind):
        most = min(_JOINED // max(alike[0].param.numel(), 1), _MOST_JOINED) or 1
        yield from (alike[start : start + most] for start in range(0, len(alike), most))


def _kind(row: PreparedParam) -> Any:
    step, moments = readable(row.h, row.state["step"]), [row.state.get(name) for name in _SECOND_MOMENTS]
    plain = [row.param, *(moment for moment in moments if moment is not None)]
    if not row.param.dim() or not all(map(is_plain, plain)) or not isinstance(step, int | float | Tensor):
        return None
    dtypes = (row.grad.dtype, *(moment if moment is None else moment.dtype for moment in moments))
    return id(row.h), row.param.shape, row.param.dtype, row.param.device, *dtypes, None if _is_tensor(step) else step


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0]


def _direction(variance: Tensor, grad: Tensor, eps1: float) -> Tensor:
    """Return grad / sqrt(variance), in the memory of `variance`."""
    return variance.clamp_(min=eps1 * eps1).rsqrt_().mul_(grad)


def _mean_square(grad: Tensor, dim: int) -> Tensor:
    if dim != -1:  # norms of columns take torch ten times as long as those of rows
        return grad.square().mean(dim, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(grad, dim=dim, keepdim=True)
    return norm.square_().div_(grad.size(dim))


def _averaged(average: Tensor, value: Tensor, weight: Any) -> Tensor:
    """Move a stored average towards `value` and give it in the dtype of `value`, before it is rounded; for reading."""
    if average.dtype == value.dtype and not isinstance(weight, Tensor):
        return average.lerp_(value, weight)
    new: Tensor = BY_NAME["lerp"](average.to(value.dtype), value, weight)
    average.copy_(new)
    return new


def _root_mean_square(h: SimpleNamespace, tensor: Tensor) -> Any:
    return readable(h, torch.linalg.vector_norm(tensor)) / math.sqrt(max(tensor.numel(), 1))


def _root_mean_squares(tensors: Tensor) -> Tensor:
    """Return the root mean square of each tensor of a stack, in float64 where the device has that."""
    norms = torch.linalg.vector_norm(tensors, dim=tuple(range(1, tensors.dim())), keepdim=True)
    wide: Tensor = norms if norms.device.type == "mps" else norms.double()
    return wide / math.sqrt(max(tensors[0].numel(), 1))
