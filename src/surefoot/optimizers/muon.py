"""Muon: orthogonalised momentum for the matrices of hidden layers."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from surefoot.constructor import WeightOptions, arguments
from surefoot.distributed import MatrixExchange, PartialSum, sum_over_shards
from surefoot.optimizer import Optimizer, Params
from surefoot.optimizers.common import add_scaled_, batches, in_turns, local_row, readable
from surefoot.optimizers.orthogonal import (
    MOST_STACKED,
    Blocks,
    Polynomials,
    blocks_of,
    check_polynomials,
    orthogonal,
    orthogonal_matrix,
    row_dims_of,
)
from surefoot.optimizers.workspace import WORKSPACE, Workspace
from surefoot.rule import DIRECTED, Slot
from surefoot.rule.hyperparameters import Interval, Number, at_least_zero, one_of
from surefoot.step.types import CustomStep, PreparedParam
from surefoot.tensors.memory import is_plain
from surefoot.tensors.modes import mode_is_active
from surefoot.tensors.shards import is_sharded

_MOST_NS_STEPS = 99
_SCALES: Mapping[str | None, Callable[[float, float], float]] = {
    None: lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}
"""How learning rates follow the shape of a matrix."""
_PRODUCTS = (None, torch.bfloat16, torch.float32, torch.float64)
_NORMUON_EPS = 1e-10
_LEAST_SHARE = 1e-3
_LEAST_AT_ONCE, _MOST_AT_ONCE = 1 << 14, 1 << 20
"""Elements of what is made orthogonal at once on the CPU, of several parameters, in memory that is kept."""
_SMALL, _MOST_FINISHED = 1 << 12, 1 << 22
"""Elements of a parameter whose direction is finished in a stack on the CPU, and of all in one."""


def _row_shape(param: Tensor, group: Mapping[str, Any]) -> torch.Size | None:
    """Return the shape of one number for each row of a parameter's matrices, None where it has none."""
    rows = row_dims_of(param.shape, group.get("flatten"))
    return torch.Size((*param.shape[:rows], *(1,) * (param.dim() - rows))) if rows else None


_Rate = Annotated[
    Number,
    Interval("Learning rate should be >= 0 but is: ", high_open=True),
    "learning rate, a number or a tensor of one element",
]
_Decay = Annotated[
    Number,
    Interval("weight decay should be >= 0 but is: ", high_open=True),
    "shrinking of the parameter, in units of the learning rate",
]
_Momentum = Annotated[
    float,
    Interval("momentum should be >= 0 but is: ", high_open=True),
    "decay of the average of g, sensibly below 1",
]
_Coefficients = Annotated[
    Polynomials,
    check_polynomials,
    "(a, b, c) of the Newton-Schulz iteration, any numbers; a tuple of such triples, one for an iteration and "
    "the last for all that follow; or "
    '`"polar_express"`, triples of which each is optimal after those before, by which the iteration converges; '
    "by the default it stays within about 30 percent",
]
_Steps = Annotated[
    int,
    Interval(
        "Number of steps must be less than 100 for computational efficiency, but is: ",
        high=_MOST_NS_STEPS,
        whole=True,
    ),
    "number of iterations",
]
_Flatten = Annotated[
    bool | None,
    "what parameters of more than two dimensions are: with True, matrices of their first dimension's rows, as "
    "convolutions; with False, stacks of matrices along their first dimensions, as experts; refused if None",
]
_Heads = Annotated[
    int | None,
    Interval("num_heads should be >= 1 but is: ", low=1, whole=True, optional=True),
    "into how many matrices the rows of each are divided, as those of the heads of an attention",
]
_Sizes = Annotated[
    tuple[int, ...] | None,
    "rows of the matrices that each is made of, as of fused queries, keys and values; not with num_heads",
]
_ProductDtype = Annotated[
    torch.dtype | None,
    "dtype of the products: torch.bfloat16, torch.float32, which is nearer, or torch.float64.  With None they "
    "are rounded to bfloat16, as in torch, and computed in float32 where that is faster: tiny matrices, and "
    "processors that do not multiply bfloat16",
]


class Muon(Optimizer):
    """Muon: momentum, made orthogonal, for the matrices of hidden layers.

    With the gradient g and orthogonal(u), the nearest semi-orthogonal matrix (see `orthogonal.newton_schulz`)::

        momentum_buffer = momentum * momentum_buffer + (1 - momentum) * g
        u = momentum * momentum_buffer + (1 - momentum) * g if nesterov else momentum_buffer
        o = orthogonal(u)
        param = (1 - lr * weight_decay) * param - lr * scale * o

    For a matrix of A rows and B columns scale is sqrt(max(1, A / B)), or 0.2 * sqrt(max(A, B)) with
    `adjust_lr_fn="match_rms_adamw"`, which lets a learning rate of AdamW serve, or sqrt(A / B) with
    `"spectral_unclamped"`, by which the spectral norm of a step follows the matrix's shape both ways.

    With `normuon=True` rows are brought to one length, by an average of their mean squares, before that::

        second_momentum_buffer = beta2 * second_momentum_buffer + (1 - beta2) * mean(o**2, over columns)
        v = o / (sqrt(second_momentum_buffer) + 1e-10)
        o = v * norm(o) / (norm(v) + 1e-10)

    A parameter may be several matrices: heads, fused weights, experts.  Each is stepped as if it were a parameter by
    itself: made orthogonal alone, with the scale of its own shape, with norms and shares of its own.

    {arguments}

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter is not a matrix, or cannot be divided as asked.
        TypeError: a hyperparameter is not a number.
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
    `"spectral_unclamped"`; Amsel et al. 2025, "The Polar Express", for `"polar_express"`; Li et al. 2025, "NorMuon",
    for `normuon`.

    Other than in torch, parameters that are not matrices are refused in later groups too, and with bfloat16 parameters
    and nesterov=False the buffer keeps its norm.
    """

    def __init__(
        self,
        params: Annotated[
            Params,
            "matrices, named matrices or groups; see `surefoot.Optimizer`.  Embeddings, output layers, biases and "
            "norms are better left to AdamW",
        ],
        lr: _Rate = 1e-3,
        weight_decay: _Decay = 0.1,
        momentum: _Momentum = 0.95,
        nesterov: Annotated[bool, "look ahead by one step"] = True,
        ns_coefficients: _Coefficients = (3.4445, -4.775, 2.0315),
        eps: Annotated[float, at_least_zero("epsilon"), "least norm by which a matrix is divided"] = 1e-7,
        ns_steps: _Steps = 5,
        adjust_lr_fn: Annotated[
            str | None,
            '`"original"`, which None and `"spectral"` mean too, `"match_rms_adamw"` or `"spectral_unclamped"`',
        ] = None,
        *,
        normuon: Annotated[bool, "bring rows to one length, as NorMuon does"] = False,
        beta2: Annotated[
            float,
            Interval("beta2 should be in [0, 1) but is: ", high=1.0, high_open=True),
            "with normuon, decay of the average of the rows' mean squares",
        ] = 0.95,
        flatten: _Flatten = None,
        num_heads: _Heads = None,
        split_sizes: _Sizes = None,
        ns_dtype: _ProductDtype = None,
        state_dtype: Annotated[
            torch.dtype | None,
            "dtype in which new momentum is stored, torch.bfloat16 beside float32 parameters for instance; the "
            "parameter's own if None.  It is averaged in float32 or better either way",
        ] = None,
        capturable: Annotated[bool, "allow steps to be captured in a graph; not on a CPU"] = False,
        **options: Unpack[WeightOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    slots = (
        Slot("momentum_buffer", float8=False),
        Slot("second_momentum_buffer", when="normuon", shape=_row_shape, wide=True, signed=False, float8=False),
    )
    scalars = ()
    flags = ("normuon", *DIRECTED)
    complex_params = False
    prepares_params = True
    whole_tensors = True

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        if group["adjust_lr_fn"] not in _SCALES:
            raise ValueError(
                f"Adjust learning rate function {group['adjust_lr_fn']} is not supported; `adjust_lr_fn` must be one "
                f"of {', '.join(map(repr, _SCALES))}"
            )
        one_of("flatten", group["flatten"], (None, True, False))
        one_of("ns_dtype", group["ns_dtype"], _PRODUCTS)
        sizes = group["split_sizes"]
        if sizes is not None:
            if group["num_heads"] is not None:
                raise ValueError("`num_heads` and `split_sizes` both divide rows; give one of them")
            if not isinstance(sizes, list | tuple) or not sizes or not all(map(_is_size, sizes)):
                raise ValueError(f"`split_sizes` must be a tuple of whole numbers > 0, or None, but got {sizes!r}")

    def check_params(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        for param in params:
            blocks_of(param.shape, group)

    def _make_custom_step(self, found: list[PreparedParam]) -> CustomStep:
        places = {id(row): place for place, row in enumerate(found)}
        found = [row for row in found if row.param.numel()]
        every = [
            _Joint(some, places) for some in _joint_batches(_batches(row for row in found if not is_sharded(row.param)))
        ]
        sharded = [places[id(row)] for row in found if is_sharded(row.param)]

        in_workspace = any(joint.in_workspace for joint in every)

        def step(rows: list[PreparedParam]) -> None:
            for joint in every:
                joint.step(rows)
            if in_workspace:
                WORKSPACE.shrink()
            if sharded:
                _step_meshes([rows[place] for place in sharded])

        return step


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class _Joint:
    """Batches that are stepped at once: where their rows stand, and what of them is the same at each step.

    Args:
        some: the batches.
        places: where each row stands, by its id.
    """

    def __init__(self, some: Sequence[list[PreparedParam]], places: Mapping[int, int]) -> None:
        self._h = some[0][0].h
        self._batches = [_Batch.of(batch, places) for batch in some]
        self.in_workspace = not mode_is_active() and _gain_by_workspace(some)

    def step(self, every: Sequence[PreparedParam]) -> None:
        """Step the rows of the batches."""
        pairs = [(batch, [every[place] for place in batch.places]) for batch in self._batches]
        if not self.in_workspace:
            for batch, rows in pairs:
                momenta = _momenta(rows)
                if batch.is_matrix:
                    batch.apply(rows, [orthogonal_matrix(self._h, momenta[0])])
                else:
                    batch.apply(rows, orthogonal(self._h, [_stack(momenta)])[0].unbind())
            return
        with WORKSPACE.turn():
            stacks = [_momenta_in(WORKSPACE, rows) for _, rows in pairs]
            for (batch, rows), directions in zip(pairs, orthogonal(self._h, stacks, WORKSPACE), strict=True):
                batch.apply(rows, directions.unbind())


def _joint_batches(every: Iterable[list[PreparedParam]]) -> Iterator[list[list[PreparedParam]]]:
    """Yield batches that are computed at once: on the CPU those of one group, of so many elements together."""
    some: list[list[PreparedParam]] = []
    elements = 0
    for batch in every:
        first, own = batch[0], len(batch) * batch[0].param.numel()
        joins = first.param.is_cpu and not first.apart and some and first.h is some[0][0].h
        if not joins or elements + own > _MOST_AT_ONCE:
            if some:
                yield some
            some, elements = [], 0
        some.append(batch)
        elements += own
    if some:
        yield some


def _gain_by_workspace(some: Sequence[list[PreparedParam]]) -> bool:
    elements = sum(len(batch) * batch[0].param.numel() for batch in some)
    return some[0][0].param.is_cpu and elements >= _LEAST_AT_ONCE and all(_kind(batch[0]) for batch in some)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


class _Batch(NamedTuple):
    """Parameters of one shape, of which one is like another.

    Attributes:
        places: where their rows stand among all.
        blocks: how each is divided into matrices.
        is_matrix: whether it is one parameter that is one matrix.
        apart: whether directions are normalised, masked or scaled by block before they are added.
        scale: how the learning rate follows their shape, if all blocks have one.
    """

    places: tuple[int, ...]
    blocks: Blocks
    is_matrix: bool
    apart: bool
    scale: float

    @classmethod
    def of(cls, rows: Sequence[PreparedParam], places: Mapping[int, int]) -> "_Batch":
        """Return the batch of some rows, by their places."""
        h = rows[0].h
        blocks = blocks_of(rows[0].param.shape, h)
        found, single = tuple(places[id(row)] for row in rows), len(rows) == len(blocks.rows) == 1
        is_matrix, apart = single and rows[0].param.shape == blocks.shape, _is_finished_apart(h, blocks)
        return cls(found, blocks, is_matrix, apart, _scale_of(h, blocks))

    def apply(self, rows: Sequence[PreparedParam], directions: Sequence[Tensor]) -> None:
        """Step the parameters, of which the directions are known."""
        if self.apart:
            _finish_batch(rows, self.blocks, directions)
            return
        h = rows[0].h
        shrink, factor = 1 - h.lr * h.weight_decay, readable(h, -h.lr * self.scale)
        if len(rows) == 1:
            add_scaled_(rows[0].param.mul_(shrink), directions[0], factor)
            return
        params = [row.param for row in rows]
        torch._foreach_mul_(params, shrink)
        if not isinstance(factor, Tensor):
            torch._foreach_add_(params, list(directions), alpha=factor)
            return
        for param, direction in zip(params, directions, strict=True):
            add_scaled_(param, direction, factor)


def _step_meshes(rows: Sequence[PreparedParam]) -> None:
    """Step sharded parameters, each as often as it is there."""
    for turn in in_turns(rows):
        alike: defaultdict[Any, list[PreparedParam]] = defaultdict(list)
        for row in turn:
            alike[row.param.device_mesh, row.h.ns_dtype or torch.bfloat16].append(row)  # type: ignore[attr-defined]
        for some in alike.values():
            _step_sharded(some)


def _step_sharded(rows: list[PreparedParam]) -> None:
    """Step sharded parameters of one mesh: each direction is computed on one rank, all else on the shards."""
    exchange, shards = MatrixExchange([row.param for row in rows]), list(map(local_row, rows))
    updates: dict[int, Tensor] = {}
    numbers = {id(row): number for number, row in enumerate(shards)}
    for batch in batches(shards, _dtypes):
        # What is made orthogonal is rounded to the dtype of the products first.
        momenta = zip(batch, _momenta(batch), strict=True)
        updates |= {numbers[id(row)]: u.to(row.h.ns_dtype or torch.bfloat16) for row, u in momenta}
    wholes = exchange.collect([updates[number] for number in range(len(rows))])
    directions: dict[int, Tensor] = {}
    for own in _of_one_group(rows, wholes):
        made = orthogonal(rows[own[0]].h, [wholes[number].unsqueeze(0) for number in own])
        directions |= {number: direction.squeeze(0) for number, direction in zip(own, made, strict=True)}
    finished = []
    for number, direction in exchange.divide(directions, updates[0]).items():
        row, shard, blocks = rows[number], shards[number], blocks_of(rows[number].param.shape, rows[number].h)
        if _is_finished_apart(row.h, blocks):
            lengths = _lengths_here(blocks, row.param.shape, exchange.indices(number))
            finished.append(_Update(shard, row.param, blocks, lengths, direction))
        else:
            add_scaled_(shard.param.mul_(1 - row.h.lr * row.h.weight_decay), direction, _factor(row.h, blocks))
    _finish(finished, sum_over_shards)


def _of_one_group(rows: Sequence[PreparedParam], numbers: Iterable[int]) -> Iterable[list[int]]:
    found: defaultdict[int, list[int]] = defaultdict(list)
    for number in numbers:
        found[id(rows[number].h)].append(number)
    return found.values()


def _factor(h: SimpleNamespace, blocks: Blocks) -> Any:
    """Return what a direction is multiplied with before it is added; the scales of unlike blocks are not in it."""
    return readable(h, -h.lr * _scale_of(h, blocks))


def _scale_of(h: SimpleNamespace, blocks: Blocks) -> float:
    """Return how the learning rate follows the shape of all blocks, 1 where they differ."""
    return 1.0 if blocks.shape is None else _scale(h, *blocks.shape)


def _scale(h: SimpleNamespace, rows: int, columns: int) -> float:
    return _SCALES[h.adjust_lr_fn](rows, max(columns, 1))


def _momenta(batch: Sequence[PreparedParam]) -> list[Tensor]:
    """Average gradients into the buffers and return what is to be made orthogonal."""
    h, buffers = batch[0].h, [row.state["momentum_buffer"] for row in batch]
    wide = torch.promote_types(buffers[0].dtype, batch[0].grad.dtype)
    if wide != buffers[0].dtype:
        return [_stored_momentum(row, wide) for row in batch]
    if len(batch) == 1:
        grad, (buffer,) = batch[0].grad.to(wide), buffers
        buffer.lerp_(grad, 1 - h.momentum)
        return [torch.lerp(grad, buffer, h.momentum)] if h.nesterov else buffers
    grads = [row.grad.to(wide) for row in batch]
    torch._foreach_lerp_(buffers, grads, 1 - h.momentum)
    return list(torch._foreach_lerp(grads, buffers, h.momentum)) if h.nesterov else buffers


def _momenta_in(workspace: Workspace, batch: Sequence[PreparedParam]) -> Tensor:
    """Average gradients of one shape into the buffers; return what is made orthogonal, stacked in a workspace."""
    h, shape, buffers = batch[0].h, (len(batch), *batch[0].param.shape), [row.state["momentum_buffer"] for row in batch]
    found = workspace.take(shape, h.ns_dtype or torch.bfloat16)
    wide = torch.promote_types(buffers[0].dtype, batch[0].grad.dtype)
    if wide != buffers[0].dtype or not h.nesterov:
        return found.copy_(_stack(_momenta(batch)))
    grads = [row.grad.to(wide) for row in batch]
    with workspace.scope():
        if len(batch) > 1 and batch[0].param.numel() <= _SMALL:
            torch._foreach_lerp_(buffers, grads, 1 - h.momentum)
            momenta = torch.stack(grads, out=workspace.take(shape, wide))
            torch._foreach_lerp_(list(momenta.unbind()), buffers, h.momentum)
            return found.copy_(momenta)
        momentum = workspace.take(shape[1:], wide)
        for grad, buffer, rounded in zip(grads, buffers, found.unbind(), strict=True):
            torch.lerp(grad, buffer.lerp_(grad, 1 - h.momentum), h.momentum, out=momentum)
            rounded.copy_(momentum)
    return found


def _stored_momentum(row: PreparedParam, wide: torch.dtype) -> Tensor:
    """Average a gradient into a buffer of a shorter dtype than the arithmetic has; return what is made orthogonal."""
    h, grad, buffer = row.h, row.grad.to(wide), row.state["momentum_buffer"]
    average = torch.lerp(buffer.to(wide), grad, 1 - h.momentum)
    buffer.copy_(average)
    return torch.lerp(grad, average, h.momentum) if h.nesterov else average


# What is computed together


def _kind(row: PreparedParam) -> Any:
    """Return what rows share whose directions are computed together; None for one that is by itself."""
    h, param, grad, state, _ = row
    buffer = state["momentum_buffer"]
    if not (is_plain(param) and is_plain(grad) and is_plain(buffer)):  # torch's lists take no negated ones
        return None
    return id(h), param.device, param.shape, param.dtype, grad.dtype, buffer.dtype


def _dtypes(row: PreparedParam) -> Any:
    h, param, grad, state, _ = row
    if not is_plain(state["momentum_buffer"]):
        return None
    return id(h), param.device, grad.dtype, state["momentum_buffer"].dtype


def _batches(found: Iterable[PreparedParam]) -> Iterator[list[PreparedParam]]:
    for alike in batches(found, _kind):
        first = alike[0].param
        most = MOST_STACKED // max(1, len(blocks_of(first.shape, alike[0].h).rows)) if len(alike) > 1 else 1
        most = max(1, min(most, _MOST_AT_ONCE // first.numel()) if first.is_cpu else most)
        yield from (alike[start : start + most] for start in range(0, len(alike), most))


# Steps that ask for more than a factor


class _Update(NamedTuple):
    """A direction on its way into its parameter.

    Attributes:
        row: the parameter, gradient and state; of a sharded one what is here.
        whole: the parameter itself.
        blocks: how it is divided into matrices.
        lengths: how many rows of each of them are here.
        direction: the direction, of the shape of what is here.
    """

    row: PreparedParam
    whole: Tensor
    blocks: Blocks
    lengths: tuple[int, ...]
    direction: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the arithmetic."""
        return torch.promote_types(self.row.param.dtype, torch.float32)

    @property
    def columns(self) -> tuple[int, ...]:
        """Return the dimensions that are columns."""
        return tuple(range(self.blocks.row_dims, self.whole.dim()))

    def block_sums(self, values: Tensor) -> Tensor:
        """Return the sum of numbers of rows over each block's."""
        if len(self.lengths) == 1:
            return values.sum().view(1)
        lengths = _on_device(self.lengths, values.device)
        # They add up; to check that torch would wait for a device.
        found: Tensor = torch.segment_reduce(values.reshape(-1), "sum", lengths=lengths, axis=0, unsafe=True)
        return found

    def of_rows(self, values: Tensor) -> Tensor:
        """Return numbers of blocks as those of their rows, to multiply the direction with."""
        shape = (*self.direction.shape[: self.blocks.row_dims], *(1 for _ in self.columns))
        if len(self.lengths) == 1:
            return values.expand(shape)
        lengths = _on_device(self.lengths, values.device)
        return values.repeat_interleave(lengths, output_size=sum(self.lengths)).view(shape)


_AddUp = Callable[[Sequence[PartialSum]], list[Tensor]]


def _sums_of_wholes(sums: Sequence[PartialSum]) -> list[Tensor]:
    """Return sums over tensors that are whole."""
    return [each.values for each in sums]


def _is_finished_apart(h: SimpleNamespace, blocks: Blocks) -> bool:
    """Return whether a direction is normalised, masked or scaled by block before it is added."""
    return h.normuon or blocks.shape is None or any(getattr(h, name, False) for name in DIRECTED)


@functools.lru_cache(maxsize=256)
def _on_device(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return numbers as a tensor, which is kept: it could not be made while steps are captured."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def _lengths_here(blocks: Blocks, shape: torch.Size, indices: Sequence[Any]) -> tuple[int, ...]:
    """Return how many rows of each block are among some of a parameter's rows, given by dimension."""
    owners = torch.arange(len(blocks.rows)).repeat_interleave(torch.tensor(blocks.rows))
    here = owners.view(shape[: blocks.row_dims])
    for dim, index in enumerate(indices[: blocks.row_dims]):
        here = here.index_select(dim, torch.arange(shape[dim])[index])
    return tuple(here.flatten().bincount(minlength=len(blocks.rows)).tolist())


def _finish_batch(batch: Sequence[PreparedParam], blocks: Blocks, directions: Sequence[Tensor]) -> None:
    """Finish the directions of parameters of one shape, as a stack where there are several small ones."""
    first, count = batch[0], len(batch)
    large = first.param.is_cpu and first.param.numel() > _SMALL
    if count == 1 or large or count * first.param.numel() > _MOST_FINISHED:
        for row, direction in zip(batch, directions, strict=True):
            _finish([_Update(row, row.param, blocks, blocks.rows, direction)], _sums_of_wholes)
        return
    held = {"second_momentum_buffer": [row.state["second_momentum_buffer"] for row in batch]} if first.h.normuon else {}
    state = {name: torch.stack(values) for name, values in held.items()}
    params = [row.param for row in batch]
    row = PreparedParam(first.h, torch.stack(params), torch.stack([row.grad for row in batch]), state)
    rows = blocks.rows * count
    stacked = blocks._replace(rows=rows, row_dims=blocks.row_dims + 1)
    _finish([_Update(row, row.param, stacked, rows, torch.stack(list(directions)))], _sums_of_wholes)
    for name, values in held.items():
        for value, new in zip(values, state[name].unbind(), strict=True):
            value.copy_(new)
    torch._foreach_copy_(params, list(row.param.unbind()))


def _finish(updates: Sequence[_Update], add_up: _AddUp) -> None:
    """Normalise and mask directions, let parameters decay, and add; sums over tensors are put together by `add_up`."""
    normalized = [_normalized(*pair) for pair in zip(updates, _row_factors(updates, add_up), strict=True)]
    for update, share in zip(normalized, _shares(normalized, add_up), strict=True):
        h, param, direction = update.row.h, update.row.param, update.direction
        shrink = readable(h, 1 - h.lr * h.weight_decay)
        if getattr(h, "cautious_weight_decay", False):
            param.copy_(torch.where(direction * param >= 0, param * shrink, param))
        else:
            param.mul_(shrink)
        if share is not None:
            direction = direction * ((direction * update.row.grad > 0) / share)
        add_scaled_(param, direction, _factor(h, update.blocks))


def _normalized(update: _Update, factor: Tensor | None) -> _Update:
    """Return an update with its rows multiplied by their factors, and by their blocks' scales where these differ."""
    h, blocks, direction = update.row.h, update.blocks, update.direction
    if blocks.shape is None:
        scales = tuple(_scale(h, rows, blocks.columns) for rows in blocks.rows)
        scale = update.of_rows(_on_device(scales, direction.device, update.dtype))
        factor = scale if factor is None else factor * scale
    return update if factor is None else update._replace(direction=direction.to(update.dtype) * factor)


def _row_factors(updates: Sequence[_Update], add_up: _AddUp) -> list[Tensor | None]:
    """Average the mean squares of rows into the state and return what rows are multiplied with, None without normuon.

    Norms follow from the squares of rows: none is read twice.
    """
    asked = [update for update in updates if update.row.h.normuon]
    squares = add_up([PartialSum(_row_squares(update), update.whole, update.columns) for update in asked])
    sizes, partials = [], []
    for update, own in zip(asked, squares, strict=True):
        sizes.append(_row_sizes(update, own.to(update.dtype)))
        sums = [update.block_sums(own), update.block_sums(own * sizes[-1].square())]
        partials.append(PartialSum(torch.stack(sums), update.whole, range(update.blocks.row_dims)))
    found: dict[int, Tensor] = {}
    for update, size, (before, after) in zip(asked, sizes, add_up(partials), strict=True):
        ratio = before.sqrt() / (after.sqrt() + _NORMUON_EPS)
        found[id(update)] = size * update.of_rows(ratio.to(update.dtype))
    return [found.get(id(update)) for update in updates]


def _row_squares(update: _Update) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(update.direction.to(update.dtype), dim=update.columns, keepdim=True)
    return norms.square()


def _row_sizes(update: _Update, squares: Tensor) -> Tensor:
    """Average the mean squares of rows into the state; return one by its root."""
    h, average = update.row.h, update.row.state["second_momentum_buffer"]
    if average.shape != squares.shape:  # the shard has no columns
        return torch.zeros_like(squares)
    average.lerp_((squares / update.blocks.columns).to(average.dtype), 1 - h.beta2)
    return torch.reciprocal(average.to(update.dtype).sqrt() + _NORMUON_EPS)


def _shares(updates: Sequence[_Update], add_up: _AddUp) -> list[Tensor | None]:
    """Return for the rows of each the share of their block's elements that go with the gradient, None if not asked."""
    asked = [update for update in updates if getattr(update.row.h, "cautious", False)]
    partials = []
    for update in asked:
        along = (update.direction * update.row.grad > 0).sum(update.columns, dtype=update.dtype)
        partials.append(PartialSum(update.block_sums(along), update.whole, range(update.whole.dim())))
    found: dict[int, Tensor] = {}
    for update, along in zip(asked, add_up(partials), strict=True):
        elements = tuple(rows * update.blocks.columns for rows in update.blocks.rows)
        share = along / _on_device(elements, along.device, along.dtype)
        found[id(update)] = update.of_rows(share.clamp(min=_LEAST_SHARE).to(update.dtype))
    return [found.get(id(update)) for update in updates]
