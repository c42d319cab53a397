"""Matrices made orthogonal: the iteration, its polynomials, and how parameters are divided into matrices."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
LARGEST_STACKED, MOST_STACKED, _IN_CACHE = 1 << 16, 256, 1 << 18
"""Elements of matrices that are stacked on the CPU, how many are stacked at most, and of how many elements there.

A product of small matrices takes as long to start as to compute: 64 matrices of 64 rows and columns take an eighth of
the time that they take one by one, 8 of 192 two thirds.  Results are the same, bit for bit, but of matrices of 16 rows
and columns or less, where one in a hundred is rounded otherwise.
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
        dtype: that of the products.  With None the matrix and the result are rounded to bfloat16, and the products too
            unless they are slow there: on processors that do not multiply bfloat16 they are in float32.

    Returns:
        A new tensor of the same shape in that dtype, bfloat16 with None.
    """
    multiply_add = torch.addmm if matrix.dim() == _MATRIX else torch.baddbmm
    x = matrix.to(dtype or torch.bfloat16)
    x = x.float() if dtype is None and x.is_cpu and not multiplies_bfloat16() else x
    wide = x.mT if x.size(-2) > x.size(-1) else x
    norms = _norms(wide).clamp(min=eps)
    wide = wide / (norms * _SAFETY if isinstance(coefficients, str) else norms)
    for a, b, c in polynomials(coefficients, steps):
        gram = wide @ wide.mT
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        wide = multiply_add(wide, polynomial, wide, beta=a)
    return (wide.mT if x.size(-2) > x.size(-1) else wide).to(dtype or torch.bfloat16)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this processor has instructions that multiply bfloat16; True where torch cannot tell."""
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found.get("architecture") != "x86_64" or bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def polynomials(coefficients: Polynomials, steps: int) -> list[Coefficients]:
    """Return the coefficients of each iteration."""
    every: Any = SCHEDULES[coefficients] if isinstance(coefficients, str) else coefficients
    every = every if isinstance(every[0], Sequence) else (every,)
    return [tuple(every[min(step, len(every) - 1)]) for step in range(steps)]


def check_polynomials(name: str, value: Any) -> None:
    """Allow 3 numbers, 3 numbers for each iteration, or the name of a schedule.

    Raises:
        ValueError: it is no schedule that is known, or does not have three numbers for each iteration.
        TypeError: one of them is no number.
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


def _norms(x: Tensor) -> Tensor:
    """Return the Frobenius norm of a matrix, or of each of a stack."""
    if x.dim() == _MATRIX:
        norm: Tensor = x.norm()
        return norm
    norms: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return norms


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


def orthogonal(h: Any, updates: Sequence[Tensor]) -> list[Tensor]:
    """Return what is made of updates when each of their matrices is made orthogonal, in `h.ns_dtype` or bfloat16."""
    make = functools.partial(
        newton_schulz, coefficients=h.ns_coefficients, steps=h.ns_steps, eps=h.eps, dtype=h.ns_dtype
    )
    shape = updates[0].shape
    if len(shape) == len(blocks_of(shape, h).rows) + 1 == _MATRIX and all(update.shape == shape for update in updates):
        return list(_together(make, updates))
    parts = [_matrices(update, blocks_of(update.shape, h)) for update in updates]
    made = dict(_made_orthogonal(make, [stack for own in parts for stack in own]))
    found, first = [], 0
    for update, own in zip(updates, parts, strict=True):
        last = first + len(own)
        if len(own) == 1 and own[0] is update:
            found.append(made[first])
        else:
            rows = [made[number].flatten(0, -2) for number in range(first, last)]
            found.append((torch.cat(rows) if len(own) > 1 else rows[0]).reshape(update.shape))
        first = last
    return found


def _matrices(update: Tensor, blocks: Blocks) -> list[Tensor]:
    """Return the matrices of an update, those that stand together and have one shape as one stack."""
    count = len(blocks.rows)
    if count == 1 and update.dim() == _MATRIX:
        return [update]
    if blocks.shape is not None:
        return [update.reshape(*(() if count == 1 else (count,)), *blocks.shape)]
    return list(torch.split(update.reshape(sum(blocks.rows), blocks.columns), list(blocks.rows)))


def _made_orthogonal(make: Callable[[Tensor], Tensor], stacks: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield numbers of matrices, or of stacks, and what becomes of each; those of one shape are computed together."""
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for index, stack in enumerate(stacks):
        alike[index if _most_together(stack) == 1 else stack.shape[-2:]].append(index)
    for numbers in alike.values():
        yield from zip(numbers, _together(make, [stacks[index] for index in numbers]), strict=True)


def _most_together(stack: Tensor) -> int:
    """Return how many matrices are multiplied at once: on the CPU as many as its caches hold."""
    elements = math.prod(stack.shape[-2:])
    if not stack.is_cpu:
        return MOST_STACKED
    return min(MOST_STACKED, _IN_CACHE // elements) if elements <= LARGEST_STACKED else 1


def _together(make: Callable[[Tensor], Tensor], stacks: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield what becomes of matrices, or of stacks, of one shape."""
    single = all(stack.dim() == _MATRIX for stack in stacks)
    if single and len(stacks) == 1:
        yield make(stacks[0])
        return
    joined = torch.stack(list(stacks)) if single else _joined(stacks)
    made = [
        make(some) if len(some) > 1 else make(some[0]).unsqueeze(0)
        for some in torch.split(joined, _most_together(joined))
    ]
    whole = torch.cat(made) if len(made) > 1 else made[0]
    if single:
        yield from whole.unbind()
        return
    counts = [math.prod(stack.shape[:-2]) for stack in stacks]
    for stack, each in zip(stacks, torch.split(whole, counts), strict=True):
        yield each.view(stack.shape)


def _joined(stacks: Sequence[Tensor]) -> Tensor:
    every = [stack.reshape(-1, *stack.shape[-2:]) for stack in stacks]
    return torch.cat(every) if len(every) > 1 else every[0]
