"""Matrices made orthogonal: the iteration, its polynomials, and how parameters are divided into matrices."""

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from surefoot.optimizers.workspace import Workspace
from surefoot.rule.hyperparameters import number

Coefficients = tuple[float, float, float]
Polynomials = Coefficients | tuple[Coefficients, ...] | str
"""What `ns_coefficients` may be: of every iteration, of one after the other, or the name of a schedule."""

_SAFETY = 1.01
"""By how much a singular value may be greater than the one that a polynomial was made for: products are rounded."""
_OPTIMAL = (
    (8.287212018145624, -23.59588651909883, 17.300387312530926),
    (4.1070591115422, -2.94784991673791, 0.5448431082926602),
    (3.9486908534822938, -2.9089021159629462, 0.551819139437013),
    (3.318419657370601, -2.488488024314875, 0.5100489401237203),
    (2.300652019954818, -1.6689039845747498, 0.418807311952567),
    (1.891301407787398, -1.267995827194587, 0.3768040894852484),
    (1.8750014808655846, -1.250001645424251, 0.3750001645595907),
)
"""Odd quintic polynomials, of which each brings the singular values that those before leave of 1e-3 to 1 nearest to 1.

Values under 0.02407 of the greatest are taken for that, so that they grow fast; tests compute the numbers.
"""
_LIMIT = (1.875, -1.25, 0.375)
"""What these come to."""
SCHEDULES: Mapping[str, tuple[Coefficients, ...]] = {
    "polar_express": (*((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _OPTIMAL), _LIMIT)
}
_MATRIX = 2
_LARGEST_STACKED, MOST_STACKED, _IN_CACHE = 1 << 18, 256, 1 << 20
"""Elements of matrices that are stacked on the CPU, how many are stacked at most, and of how many elements there.

A product of small matrices takes as long to start as to compute: 64 matrices of 64 rows and columns take an eighth of
the time that they take one by one, 8 of 192 two thirds.  Results are the same, bit for bit, but of matrices of 16 rows
and columns or less, where one in a hundred is rounded otherwise.
"""
_TINY, _AT_ONCE = 16, 16**3
"""Rows and columns up to which a product in float32, rounded, takes a fraction of the time of one in bfloat16, and how
many multiplications torch makes without oneDNN, which takes long to start; so few are as fast in bfloat16.

Sums of so few have the same bits, whatever their order, but for one matrix in some dozens.
"""


def newton_schulz(
    matrix: Tensor, coefficients: Polynomials, steps: int, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrix, by a quintic Newton-Schulz iteration.

    With X = matrix / max(its Frobenius norm, eps) and coefficients (a, b, c), `steps` times::

        A = X X^T
        X = a X + (b A + c A A) X

    Args:
        matrix: a matrix, or a stack of matrices of one shape along a first dimension; any floating dtype.
        coefficients: a, b, c of the polynomial; those of each iteration, of which the last go on; or
            `"polar_express"` (Amsel et al. 2025, arXiv 2505.16932), before which X is divided by another 1.01.
        steps: number of iterations.
        eps: least norm to divide by.
        dtype: that of the products.  With None they are rounded to bfloat16, wherever they are computed: see
            `product_dtype`.

    Returns:
        A new tensor of the same shape in that dtype, bfloat16 with None.
    """
    x = matrix.to(dtype or torch.bfloat16, copy=True)
    wide = x.mT if x.size(-2) > x.size(-1) else x
    wide.div_(_divisors(wide, coefficients, eps))
    computed = product_dtype(dtype, matrix)
    made, rounded = wide if computed == x.dtype else wide.to(computed), computed != x.dtype
    multiply, multiply_add = (torch.mm, torch.addmm) if x.dim() == _MATRIX else (torch.bmm, torch.baddbmm)
    for a, b, c in polynomials(coefficients, steps):
        gram = multiply(made, made.mT)
        if rounded:
            _round(gram)
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        if rounded:
            _round(polynomial)
        made = multiply_add(made, polynomial, made, beta=a)
        if rounded:
            _round(made)
    made = made if made.dtype == x.dtype else made.to(x.dtype)
    return made.mT if wide is not x else made


def _divisors(x: Tensor, coefficients: Polynomials, eps: float) -> Tensor:
    """Return what a matrix, or each of a stack, is divided by, so that no singular value is greater than 1."""
    own: Tensor = vector_norm(x) if x.dim() == _MATRIX else vector_norm(x, dim=(-2, -1), keepdim=True)
    norms = own.clamp(min=eps)
    return norms * _SAFETY if isinstance(coefficients, str) else norms


def _iterate(
    wide: list[Tensor],
    spare: list[Tensor],
    coefficients: Sequence[Coefficients],
    workspace: Workspace,
    *,
    rounded: bool,
) -> None:
    """Overwrite matrices, or stacks of them, by turns in their own and in spare memory; the last turn has the results.

    They have as many rows each, and are not tall: the polynomials of all are computed together.
    """
    rows, dtype = wide[0].size(-2), wide[0].dtype
    shape = (sum(map(_count, wide)), rows, rows) if len(wide) > 1 else (*wide[0].shape[:-1], rows)
    gram, polynomial = workspace.take(shape, dtype), workspace.take(shape, dtype)
    grams, ways = _divided(gram, wide), _divided(polynomial, wide)
    for x, own in zip(wide, grams, strict=True):
        _multiply(x, x.mT, own, rounded=rounded)
    for left, (a, b, c) in zip(reversed(range(len(coefficients))), coefficients, strict=True):
        _multiply_add(gram, gram, gram, polynomial, beta=b, alpha=c, rounded=rounded)
        for x, way, other, own in zip(wide, ways, spare, grams, strict=True):
            _multiply_add(x, way, x, other, beta=a, rounded=rounded)
            if left:
                _multiply(other, other.mT, own, rounded=rounded)
        wide, spare = spare, list(map(_contiguous, wide))


def _count(x: Tensor) -> int:
    return 1 if x.dim() == _MATRIX else x.size(0)


def _divided(joint: Tensor, wide: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of a joint stack that belongs to each, a matrix for a matrix."""
    if len(wide) == 1:
        return [joint]
    parts = torch.split(joint, [_count(x) for x in wide])
    return [part if x.dim() == part.dim() else part[0] for part, x in zip(parts, wide, strict=True)]


def _contiguous(x: Tensor) -> Tensor:
    """Return the memory of a matrix, or a stack, that may be that of a tall one, for another of the same shape."""
    return x if x.is_contiguous() else x.mT.view(x.shape)


def _multiply(x: Tensor, y: Tensor, out: Tensor | None = None, *, rounded: bool) -> Tensor:
    multiply = torch.mm if x.dim() == _MATRIX else torch.bmm
    made = multiply(x, y, out=out)
    return _round(made) if rounded else made


def _multiply_add(
    x: Tensor, y: Tensor, z: Tensor, out: Tensor | None = None, *, beta: float, alpha: float = 1.0, rounded: bool
) -> Tensor:
    multiply_add = torch.addmm if x.dim() == _MATRIX else torch.baddbmm
    made = multiply_add(x, y, z, beta=beta, alpha=alpha, out=out)
    return _round(made) if rounded else made


def _round(product: Tensor) -> Tensor:
    """Round to bfloat16 in place what was computed in float32: products in bfloat16 are summed in float32, too."""
    return product.copy_(product.to(torch.bfloat16))


def product_dtype(asked: torch.dtype | None, matrix: Tensor) -> torch.dtype:
    """Return the dtype in which products of matrices of a shape are computed: the one asked for, or the fastest.

    Without one it is bfloat16, but float32, rounded to bfloat16, on processors that do not multiply bfloat16 and for
    small matrices of which a product in bfloat16 takes longer to start.
    """
    if asked is not None or not matrix.is_cpu:
        return asked or torch.bfloat16
    rows, columns = matrix.size(-2), matrix.size(-1)
    starts_slowly = max(rows, columns) <= _TINY and matrix.numel() * min(rows, columns) > _AT_ONCE
    return torch.float32 if starts_slowly or not multiplies_bfloat16() else torch.bfloat16


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this processor has instructions that multiply bfloat16; True where torch cannot tell."""
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found.get("architecture") != "x86_64" or bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def polynomials(coefficients: Polynomials, steps: int) -> list[Coefficients]:
    """Return the coefficients of each iteration."""
    every: Any = SCHEDULES[coefficients] if isinstance(coefficients, str) else coefficients
    every = (every,) if isinstance(every[0], (float, int)) or not isinstance(every[0], Sequence) else every
    return [*every[:steps], *[every[-1]] * (steps - len(every))]


def check_polynomials(name: str, value: Any) -> None:
    """Allow 3 numbers, 3 numbers for each iteration, or the name of a schedule.

    Raises:
        ValueError: it is no schedule that is known, or does not have three numbers for each iteration.
        TypeError: one of them is not a number.
    """
    if isinstance(value, str) and value in SCHEDULES:
        return
    several = isinstance(value, Sequence) and value and all(isinstance(each, Sequence) for each in value)
    for coefficients in value if several else (value,):
        if isinstance(coefficients, str) or not isinstance(coefficients, Sequence) or len(coefficients) != len(_LIMIT):
            raise ValueError(
                f"`{name}` must be 3 numbers, a sequence of 3 numbers for each iteration, or "
                f"{' or '.join(map(repr, SCHEDULES))}, but got {value!r}"
            )
        for index, each in enumerate(coefficients):
            number(name)(f"{name}[{index}]", each)


# Parameters as matrices


class Blocks(NamedTuple):
    """How a parameter, seen as rows, is divided into matrices.

    Attributes:
        rows: of each matrix, one after the other.
        columns: of all of them.
        row_dims: how many of the parameter's first dimensions are rows; the others are columns.
        shape: the shape that all matrices have, None if they differ.
    """

    rows: tuple[int, ...]
    columns: int
    row_dims: int
    shape: tuple[int, int] | None


def blocks_of(shape: torch.Size, group: Any) -> Blocks:
    """Return how parameters of a shape are divided into matrices.

    Args:
        shape: the shape.
        group: a mapping, or an object, with the options `flatten`, `num_heads` and `split_sizes`.

    Raises:
        ValueError: they cannot be so; the message names the option.
    """
    named = group if isinstance(group, Mapping) else vars(group)
    sizes = named["split_sizes"]
    return _blocks_of(shape, named["flatten"], named["num_heads"], sizes if sizes is None else tuple(sizes))


@functools.lru_cache(maxsize=1024)
def _blocks_of(
    shape: torch.Size, flatten: bool | None, num_heads: int | None, split_sizes: tuple[int, ...] | None
) -> Blocks:
    if len(shape) < _MATRIX or (flatten is None and len(shape) > _MATRIX):
        ways = "pass flatten=True to take the first dimension for rows and all others for columns, or flatten=False "
        ways += "for a stack of matrices; or "
        raise ValueError(
            f"Muon only supports 2D parameters whereas we found a parameter with size: {shape}; "
            f"{ways * (len(shape) > _MATRIX)}give such parameters to another optimizer, AdamW for instance"
        )
    row_dims = row_dims_of(shape, flatten)
    height = shape[row_dims - 1]
    if split_sizes is not None and sum(split_sizes) != height:
        raise ValueError(
            f"`split_sizes` must add up to the rows of each matrix, but are {split_sizes} for a parameter with size: "
            f"{shape}; give parameters that are divided in another way a group of their own"
        )
    if num_heads is not None and height % num_heads:
        raise ValueError(
            f"`num_heads` must divide the rows of each matrix, but is {num_heads} for a parameter with size: {shape}; "
            f"give parameters that are divided in another way a group of their own"
        )
    rows = split_sizes or (height // (num_heads or 1),) * (num_heads or 1)
    columns, same = math.prod(shape[row_dims:]), (rows[0], math.prod(shape[row_dims:]))
    return Blocks(rows * math.prod(shape[: row_dims - 1]), columns, row_dims, same if len(set(rows)) == 1 else None)


def row_dims_of(shape: torch.Size, flatten: bool | None) -> int:
    """Return how many of a parameter's first dimensions are rows of its matrices."""
    rows = max(len(shape) - 1, 0)
    return min(1, rows) if flatten else rows


def orthogonal_matrix(h: Any, matrix: Tensor) -> Tensor:
    """Return what is made of an update that is one matrix when it is made orthogonal."""
    return newton_schulz(matrix, h.ns_coefficients, h.ns_steps, h.eps, h.ns_dtype)


def orthogonal(h: Any, stacks: Sequence[Tensor], workspace: Workspace | None = None) -> list[Tensor]:
    """Return what is made of updates when each of their matrices is made orthogonal, in `h.ns_dtype` or bfloat16.

    Args:
        h: the hyperparameters.
        stacks: updates, those of one shape along a first dimension.
        workspace: where to compute all of them at once; updates stand there, rounded to that dtype, and so may results.
    """
    parts = [_matrices(stack, blocks_of(stack.shape[1:], h)) for stack in stacks]
    matrices = [each for own in parts for each in own]
    made = iter(
        _orthogonal_by_shape(h, matrices) if workspace is None else _orthogonal_in_workspace(h, matrices, workspace)
    )
    found = []
    for stack, own in zip(stacks, parts, strict=True):
        rows = [next(made).reshape(len(stack), -1, each.size(-1)) for each in own]
        found.append(_joined(rows, 1).reshape(stack.shape))
    return found


def _matrices(stack: Tensor, blocks: Blocks) -> list[Tensor]:
    """Return the matrices of updates, those that have one shape as one stack."""
    if blocks.shape is not None:
        return [stack.reshape(-1, *blocks.shape)]
    return list(torch.split(stack.reshape(len(stack), sum(blocks.rows), blocks.columns), list(blocks.rows), 1))


def _orthogonal_by_shape(h: Any, stacks: Sequence[Tensor]) -> list[Tensor]:
    """Return stacks of matrices made orthogonal, those of one shape together."""
    alike: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for index, stack in enumerate(stacks):
        alike[stack.shape[1:]].append(index)
    found: dict[int, Tensor] = {}
    for numbers in alike.values():
        own = [stacks[index] for index in numbers]
        found |= zip(numbers, torch.split(_orthogonal_stack(h, _joined(own)), list(map(len, own))), strict=True)
    return [found[index] for index in range(len(stacks))]


def _orthogonal_stack(h: Any, stack: Tensor) -> Tensor:
    """Return a stack of matrices of one shape, made orthogonal."""
    made = [orthogonal_matrix(h, each) for each in _pieces(stack)]
    return _joined([each if each.dim() == stack.dim() else each.unsqueeze(0) for each in made])


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(tensors), dim) if len(tensors) > 1 else tensors[0]


def _pieces(stack: Tensor) -> list[Tensor]:
    """Return the pieces of a stack that are multiplied at once, on the CPU as much as caches hold; one is a matrix."""
    most, elements = MOST_STACKED, math.prod(stack.shape[1:])
    if stack.is_cpu:
        most = min(most, _IN_CACHE // elements) if elements <= _LARGEST_STACKED else 1
    pieces = torch.split(stack, most) if stack.size(0) > most else (stack,)
    return [piece if piece.size(0) > 1 else piece[0] for piece in pieces]


def _orthogonal_in_workspace(h: Any, stacks: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
    """Return stacks of matrices, which are overwritten, made orthogonal in a workspace.

    A product of small matrices takes as long to start as to compute, so that polynomials of as many rows are computed
    together whatever they are multiplied with.
    """
    coefficients = polynomials(h.ns_coefficients, h.ns_steps)
    alike: defaultdict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    found = []
    for index, stack in enumerate(stacks):
        dtype = product_dtype(h.ns_dtype, stack)
        tall = stack.size(1) > stack.size(2)
        for piece in _pieces(stack.mT if tall else stack):
            piece.div_(_divisors(piece, h.ns_coefficients, h.eps))
        fits = stack.dtype == dtype and stack.is_contiguous()
        x = stack if fits else workspace.take(stack.shape, dtype).copy_(stack)
        wide = x.mT if tall else x
        spare = workspace.take(wide.shape, dtype)
        made = spare if len(coefficients) % 2 else _contiguous(wide) if coefficients else wide
        found.append(made.mT if tall else made)
        for piece, other in zip(_pieces(wide), _pieces(spare), strict=True):
            rows = piece.size(-2)
            alike[dtype, dtype != stack.dtype, rows, index if rows <= _TINY else None].append((piece, other))
    for (_, rounded, *_), pairs in alike.items() if coefficients else ():
        wides, spares = ([pair[number] for pair in pairs] for number in (0, 1))
        _iterate(wides, spares, coefficients, workspace, rounded=rounded)
    return [made if made.dtype == stack.dtype else stack.copy_(made) for stack, made in zip(stacks, found, strict=True)]
