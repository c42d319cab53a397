"""The closed list of operations that a rule may use, each with its meaning for every engine, in one table.

Arguments of an operation are tensors (all of the parameter's shape) or numbers (coefficients and constants).  A
reduction makes one number out of all elements of a tensor, or of those of several.
An engine reads its own column and nothing else; an operation that is not here is an error that names the rule's line.
"""

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

Number = float | int | bool


@dataclass(frozen=True, eq=False)
class Op:
    """One operation.

    Attributes:
        name: its name in graphs and generated sources.
        arity: how many arguments it takes.
        spellings: the functions that mean it in a rule.  Methods are spelled by `name` or `methods`.
        eager: its value for tensors, numbers and 0-d tensors that may require gradients.
        foreach: name of the `torch._foreach_*` function (without the prefix), or None where torch has none;
            the in-place form has the same name with an underscore at the end.
        methods: further method names of tensors that mean it.
        reduces: whether its value is one number for the whole tensor.
        over: of what it is a number if it reduces: of a tensor, of the tensors of a group, or of those of all groups.
        takes: for each argument t where it must be a tensor, n where it must be a number, a dot where it may be either.
    """

    name: str
    arity: int
    spellings: tuple[Callable[..., Any], ...]
    eager: Callable[..., Any]
    foreach: str | None = None
    methods: tuple[str, ...] = ()
    reduces: bool = False
    over: Literal["tensor", "group", "all"] = "tensor"
    takes: str = ""

    @property
    def __name__(self) -> str:
        """The name that torch.fx gives to nodes of this operation."""
        return self.name

    def __call__(self, *args: Any) -> Any:
        """Evaluate eagerly."""
        return self.eager(*args)


def _unary(tensors: Callable[[Tensor], Tensor], numbers: Callable[[float], float]) -> Callable[[Any], Any]:
    """Make one function out of the one for tensors and the one for Python numbers."""
    return lambda x: tensors(x) if isinstance(x, Tensor) else numbers(x)


def _sign(x: float) -> float:
    return math.copysign(1.0, x) if x else 0.0


def _pick(
    of_tensors: Callable[[Tensor, Tensor], Tensor], of_numbers: Callable[[float, float], float]
) -> Callable[[Any, Any], Any]:
    """Maximum or minimum of tensors, of a tensor and a number, or of two numbers; NaN wins."""

    def pick(x: Any, y: Any) -> Any:
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            return math.nan if math.isnan(x) or math.isnan(y) else of_numbers(x, y)
        like = x if isinstance(x, Tensor) else y
        # Filled where it is needed: copying a number to a device would wait, and cannot be captured in a graph.
        number = functools.partial(torch.full, (), dtype=like.dtype, device=like.device)
        return of_tensors(*(z.to(like) if isinstance(z, Tensor) else number(z) for z in (x, y)))

    return pick


def _pow(x: Any, y: Any) -> Any:
    value = operator.pow(x, y)
    return math.pow(x, y) if isinstance(value, complex) else value  # which raises ValueError


def _add_scaled(x: Any, y: Any, alpha: Any) -> Any:
    if isinstance(alpha, Tensor) or not isinstance(x, Tensor):
        return x + y * alpha
    return torch.add(x, y, alpha=alpha)


def _lerp(x: Tensor, y: Tensor, weight: Any) -> Tensor:
    return torch.lerp(x, y, weight.to(x) if isinstance(weight, Tensor) else weight)


def _addcmul(x: Tensor, y: Tensor, z: Tensor, value: Any) -> Tensor:
    return x + y * z * value if isinstance(value, Tensor) else torch.addcmul(x, y, z, value=value)


def _addcdiv(x: Tensor, y: Tensor, z: Tensor, value: Any) -> Tensor:
    return x + y / z * value if isinstance(value, Tensor) else torch.addcdiv(x, y, z, value=value)


def _fill(x: Tensor, number: Any) -> Tensor:
    return torch.zeros_like(x) + number if isinstance(number, Tensor) else torch.full_like(x, number)


def _where(condition: Any, x: Any, y: Any) -> Any:
    """Select; a new tensor, never one of the arguments, so that no engine writes through an alias."""
    if isinstance(condition, Tensor):
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):  # which torch would round to its default dtype
            x = torch.full((), x, dtype=torch.float64, device=condition.device)
        return torch.where(condition if condition.dtype is torch.bool else condition != 0, x, y)
    chosen = x if condition else y
    return chosen.clone() if isinstance(chosen, Tensor) else chosen


def total_sum(values: Any) -> Any:
    """Return the sum of the elements of `values`, over all parameters that the algorithm steps, whatever their group.

    A rule's `update` calls it as it calls `torch.sum`, which is over the tensor of one parameter; the sum is taken over
    the ranks of a sharded training as well.  It is a number, the same for all parameters: see `GroupScalar`, which is
    made of such numbers.

    Raises:
        TypeError: called with anything but a value of a rule.
    """
    return _traced(total_sum, values)


def group_sum(values: Any) -> Any:
    """Return the sum of the elements of `values`, over all parameters of a group; see `total_sum`."""
    return _traced(group_sum, values)


def _traced(function: Callable[..., Any], values: Any) -> fx.Proxy:
    """Record the call of a function that only a graph can mean."""
    if not isinstance(values, fx.Proxy):
        raise TypeError(
            f"`{function.__name__}` is a sum over all parameters, which the `update` of a rule may ask for; it cannot "
            f"be called with {type(values).__name__}"
        )
    return values.tracer.create_proxy("call_function", function, (values,), {})


OPS: tuple[Op, ...] = (
    Op("add", 2, (operator.add, torch.add), operator.add, "add"),
    Op("sub", 2, (operator.sub, torch.sub), operator.sub, "sub", ("subtract",)),
    Op("mul", 2, (operator.mul, torch.mul), operator.mul, "mul", ("multiply",)),
    Op("div", 2, (operator.truediv, torch.div), operator.truediv, "div", ("true_divide",)),
    Op("pow", 2, (operator.pow, torch.pow), _pow, "pow"),
    Op("neg", 1, (operator.neg, torch.neg), operator.neg, "neg", ("negative",)),
    Op("abs", 1, (abs, operator.abs, torch.abs), abs, "abs"),
    Op("sign", 1, (torch.sign,), _unary(torch.sign, _sign), "sign"),
    Op("sqrt", 1, (torch.sqrt,), _unary(torch.sqrt, math.sqrt), "sqrt"),
    Op("rsqrt", 1, (torch.rsqrt,), _unary(torch.rsqrt, lambda x: 1 / math.sqrt(x)), "rsqrt"),
    Op("reciprocal", 1, (torch.reciprocal,), _unary(torch.reciprocal, lambda x: 1 / x), "reciprocal"),
    Op("exp", 1, (torch.exp,), _unary(torch.exp, math.exp), "exp"),
    Op("log", 1, (torch.log,), _unary(torch.log, math.log), "log"),
    Op("tanh", 1, (torch.tanh,), _unary(torch.tanh, math.tanh), "tanh"),
    Op("atan2", 2, (torch.atan2,), torch.atan2, methods=("arctan2",), takes="tt"),
    Op("maximum", 2, (torch.maximum,), _pick(torch.maximum, max), "maximum"),
    Op("minimum", 2, (torch.minimum,), _pick(torch.minimum, min), "minimum"),
    Op("add_scaled", 3, (), _add_scaled, "add"),
    Op("lerp", 3, (torch.lerp,), _lerp, "lerp", takes="tt."),
    Op("addcmul", 4, (), _addcmul, "addcmul", takes="tttn"),
    Op("addcdiv", 4, (), _addcdiv, "addcdiv", takes="tttn"),
    Op("where", 3, (torch.where,), _where),
    Op("gt", 2, (operator.gt, torch.gt), operator.gt, methods=("greater",)),
    Op("ge", 2, (operator.ge, torch.ge), operator.ge),
    Op("lt", 2, (operator.lt, torch.lt), operator.lt, methods=("less",)),
    Op("le", 2, (operator.le, torch.le), operator.le),
    Op("eq", 2, (operator.eq, torch.eq), operator.eq),
    Op("ne", 2, (operator.ne, torch.ne), operator.ne),
    Op("sum", 1, (torch.sum,), torch.sum, reduces=True, takes="t"),
    Op("mean", 1, (torch.mean,), torch.mean, reduces=True, takes="t"),
    Op("sum_of_squares", 1, (), lambda x: x.square().sum(), reduces=True, takes="t"),
    Op("group_sum", 1, (group_sum,), torch.sum, reduces=True, over="group", takes="t"),
    Op("total_sum", 1, (total_sum,), torch.sum, reduces=True, over="all", takes="t"),
    Op("fill", 2, (torch.full_like,), _fill),
    Op("copy", 1, (torch.clone,), lambda x: x.clone(), methods=("clone",)),
)

BY_NAME: dict[str, Op] = {op.name: op for op in OPS}
BY_SPELLING: dict[Callable[..., Any], Op] = {spelling: op for op in OPS for spelling in op.spellings}
BY_METHOD: dict[str, Op] = BY_NAME | {method: op for op in OPS for method in op.methods}
