"""Schedules from text: `warmup(100, cosine(1, 0, 900)) * 0.5`.

The text is parsed, never evaluated: only the calls, numbers, words and lists that a schedule is made of are understood,
so that it may come from a command line or a file.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from surefoot.lr_scheduler.curves import Curve, registry
from surefoot.lr_scheduler.schedules import BUILDERS

LONGEST = 10_000
"""Longer texts are refused: nesting without end would exhaust the stack."""

_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def names() -> Mapping[str, Callable[..., Curve]]:
    """Return all that an expression may call."""
    return {**registry(), **BUILDERS}


def parse(text: str) -> Curve:
    """Make a schedule of an expression.

    Args:
        text: calls of the functions in `schedules`, with numbers, `+ - * /` between numbers, `*` between schedules,
            lists, and strings for `shape`.

    Returns:
        The schedule.

    Raises:
        ValueError: it is no such expression; the message shows where.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a schedule has at most {LONGEST} characters, but got {len(text)}; put it into a JSON file")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no schedule: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ValueError("the schedule is nested too deeply; put it into a JSON file") from None
    curve = _Reader(text.strip()).read(tree.body)
    if not isinstance(curve, Curve):
        raise ValueError(f"{text!r} is no schedule but {curve!r}; write, for instance, constant({curve!r})")  # noqa: TRY004
    return curve


class _Reader:
    """Turns a syntax tree into values, node by node.

    Args:
        text: what was parsed, for messages.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.names = names()

    def read(self, node: ast.expr) -> Any:
        """Return what a node stands for."""
        match node:
            case ast.Constant(value=int() | float() | str() | None as value) if not isinstance(value, bool):
                return value
            case ast.Constant(value=bool() as flag):
                return flag
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return tuple(self.read(item) for item in items)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.number(operand)
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
                return self.operation(node, _OPERATORS[type(sign)], self.read(left), self.read(right))
            case ast.Call(func=ast.Name(id=name)):
                return self.call(node, name)
        raise self.mistake(node, "a schedule is made of calls, numbers, lists, `*`, and `+ - /` between numbers")

    def number(self, node: ast.expr) -> Any:
        """Return a number."""
        value = self.read(node)
        if not isinstance(value, int | float):
            raise self.mistake(node, "expected a number")
        return value

    def operation(self, node: ast.expr, sign: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        """Combine numbers, or schedules by `*`."""
        allowed = (Curve, int, float) if sign is operator.mul else (int, float)
        if not isinstance(left, allowed) or not isinstance(right, allowed):
            raise self.mistake(node, "`*` is for schedules and numbers, `+ - /` are for numbers")
        try:
            return sign(left, right)
        except (ZeroDivisionError, OverflowError) as error:
            raise self.mistake(node, str(error)) from None

    def call(self, node: ast.Call, name: str) -> Any:
        """Make a schedule."""
        if name not in self.names:
            raise self.mistake(node, f"there is no schedule {name!r}; there are: {', '.join(sorted(self.names))}")
        if any(keyword.arg is None for keyword in node.keywords):
            raise self.mistake(node, "`**` has no meaning in a schedule")
        arguments = [self.read(argument) for argument in node.args]
        keywords = {str(keyword.arg): self.read(keyword.value) for keyword in node.keywords}
        try:
            return self.names[name](*arguments, **keywords)
        except (TypeError, ValueError) as error:
            raise self.mistake(node, str(error)) from None

    def mistake(self, node: ast.expr, what: str) -> ValueError:
        """Return the error for a node, with a mark under it."""
        return ValueError(f"{what}\n  {self.text}\n  {' ' * node.col_offset}^")
