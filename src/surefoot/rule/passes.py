"""The passes between a traced rule and the engines, listed once, in order.

After each of them the graph is checked as far as it has come; engines may rely on what `check_spec` says.
"""

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import Argument

from surefoot.errors import InternalError, RuleError
from surefoot.rule.ops import BY_METHOD, BY_NAME, BY_SPELLING, OPS, Op

Build = Callable[..., fx.Node]


def run_passes(graph: fx.Graph, stored: int) -> None:
    """Run every pass on a traced graph, in place; its first `stored` outputs are to be stored, others are measured."""
    next(iter(reversed(graph.nodes))).meta["stored"] = stored
    for step in PASSES:
        step(graph)
        graph.lint()
    check_spec(graph)


def to_operations(graph: fx.Graph) -> None:
    """Replace every call by operations of the table, and forms that the table does not have by those it has."""
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output"):
            continue
        with graph.inserting_before(node):
            replacement = _operation(graph, node)
        for made in graph.nodes:
            made.meta.setdefault("source", node.meta["source"])
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)


def mark_tensors(graph: fx.Graph) -> None:
    """Set `meta["tensor"]`: whether a value is a tensor or one number for the whole tensor."""
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["tensor"] = "coefficient" not in node.meta
        elif node.op == "call_function":
            tensors = any(argument.meta["tensor"] for argument in node.all_input_nodes)
            node.meta["tensor"] = tensors and not _op(node).reduces


def check_arguments(graph: fx.Graph) -> None:
    """Refuse numbers where an operation takes tensors, and tensors where it takes numbers."""
    for node in graph.nodes:
        if node.op != "call_function" or not node.target.takes:
            continue
        for place, (kind, argument) in enumerate(zip(node.target.takes, node.args, strict=True), 1):
            if kind != "." and _is_tensor(argument) != (kind == "t"):
                wanted = "a tensor" if kind == "t" else "a number, such as a coefficient"
                what = f"argument {place} of `{node.target.name}`"
                raise RuleError(f"{node.meta['source']}: {what} must be {wanted}, but is {argument}")


def divide_by_tensor(graph: fx.Graph) -> None:
    """Write number / tensor as torch computes it: the reciprocal times the number."""
    for node in list(graph.nodes):
        if node.target is BY_NAME["div"] and node.meta["tensor"] and not _is_tensor(node.args[0]):
            number, tensor = node.args
            with graph.inserting_before(node):
                inverse = _call(graph, "reciprocal", tensor)
            inverse.meta.update(node.meta)
            node.target, node.args = BY_NAME["mul"], (inverse, number)


def simple_powers(graph: fx.Graph) -> None:
    """Write powers that torch computes by simpler operations as these; the values at infinity and zero are theirs."""
    for node in graph.nodes:
        if node.target is BY_NAME["pow"] and node.meta["tensor"] and node.args[1] in _POWERS:
            name = _POWERS[node.args[1]]
            node.target = BY_NAME[name]
            node.args = (node.args[0],) * BY_NAME[name].arity


def select_tensors(graph: fx.Graph) -> None:
    """Return numbers that a selection chooses the parameter's shape and dtype, which its condition does not tell."""
    param = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.target is not BY_NAME["where"] or not node.meta["tensor"]:
            continue
        for position in (1, 2):
            if not _is_tensor(node.args[position]):
                with graph.inserting_before(node):
                    filled = _call(graph, "fill", param, node.args[position])
                filled.meta.update(node.meta)
                node.update_arg(position, filled)


def copy_outputs(graph: fx.Graph) -> None:
    """Return a copy where a rule returns an input as something else, so that outputs never alias other inputs."""
    output = next(iter(reversed(graph.nodes)))
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.meta["tensor"]]
    own = [inputs[0], *inputs[2:]]
    values = list(output.args[0])
    for position, (value, itself) in enumerate(zip(values[: output.meta["stored"]], own, strict=True)):
        if value.op == "placeholder" and value is not itself:
            with graph.inserting_before(output):
                values[position] = _call(graph, "copy", value)
            values[position].meta.update(tensor=value.meta["tensor"], source=output.meta["source"])
    output.args = (tuple(values),)


def remove_unused(graph: fx.Graph) -> None:
    """Drop operations whose value nobody reads."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def settle_selections(graph: fx.Graph, stored: int, name: str, *, value: bool) -> fx.Graph:
    """Return a copy of a graph where a coefficient is known, and selections by it are what they choose.

    Its first `stored` outputs are to be stored.
    """
    settled, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        nodes[node] = settled.node_copy(node, nodes.__getitem__)
    for node in list(settled.nodes):
        if node.target is not BY_NAME["where"]:
            continue
        condition, chosen = node.args[0], node.args[1 if value else 2]
        if all(isinstance(each, fx.Node) for each in (condition, chosen)) and condition.meta.get("coefficient") == name:
            node.replace_all_uses_with(chosen)
    next(iter(reversed(settled.nodes))).meta |= {"stored": stored, "source": "a selection"}
    copy_outputs(settled)
    remove_unused(settled)
    check_spec(settled)
    return settled


PASSES: tuple[Callable[[fx.Graph], None], ...] = (
    to_operations,
    mark_tensors,
    check_arguments,
    divide_by_tensor,
    simple_powers,
    select_tensors,
    copy_outputs,
    remove_unused,
)


def check_spec(graph: fx.Graph) -> None:
    """Raise InternalError unless the graph is what engines rely on."""
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op not in ("placeholder", "call_function"):
            raise InternalError(f"{node.format_node()}: neither an input nor an operation")
        if node.op == "call_function" and node.target not in OPS:
            raise InternalError(f"{node.format_node()}: not an operation of the table")
        if node.op == "call_function" and (node.kwargs or len(node.args) != node.target.arity):
            raise InternalError(f"{node.format_node()}: wrong number of arguments")
        if "tensor" not in node.meta or (node.op == "call_function" and "source" not in node.meta):
            raise InternalError(f"{node.format_node()}: unmarked")


def _op(node: fx.Node) -> Op:
    return cast("Op", node.target)


def _is_tensor(argument: Argument) -> bool:
    return isinstance(argument, fx.Node) and bool(argument.meta["tensor"])


def _call(graph: fx.Graph, name: str, *args: Argument) -> fx.Node:
    return graph.call_function(BY_NAME[name], args)


def _operation(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Make the operation, or operations, that `node` means."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    form = _FORMS.get(name)
    op = BY_METHOD.get(name) if node.op == "call_method" else BY_SPELLING.get(node.target)  # type: ignore[arg-type]
    try:
        if form is not None:
            return form(graph, *node.args, **node.kwargs)
        if op is not None and not node.kwargs and len(node.args) == op.arity:
            return graph.call_function(op, node.args)
    except TypeError as error:
        if name in _REDUCTIONS:
            raise RuleError(f"{node.meta['source']}: {_unsupported_reason(name, op, node)}") from None
        raise RuleError(f"{node.meta['source']}: `{name}` called with arguments a rule may not use: {error}") from None
    raise RuleError(f"{node.meta['source']}: {_unsupported_reason(name, op, node)}")


def _unsupported_reason(name: str, op: Op | None, node: fx.Node) -> str:
    if node.op in ("get_attr", "call_module") or node.target is getattr:
        return f"a rule sees values only, not `{node.args[-1] if node.args else name}` of a tensor"
    if name.endswith("_") and name.rstrip("_") in BY_METHOD:
        return f"`{name}` works in place; a rule is written out of place: use `{name.rstrip('_')}`"
    if name in _REDUCTIONS:
        return f"`{name}` takes a tensor and nothing else: a rule reduces all elements of a tensor to one number"
    if op is not None:
        return f"`{name}` takes {op.arity} arguments here, but got {len(node.args) + len(node.kwargs)}"
    known = ", ".join(sorted({*BY_NAME, *_FORMS} - {"copy", "linalg_vector_norm", "sum_of_squares"}))
    return f"`{name}` is not among the operations of a rule; these are: {known}"


def _add(graph: fx.Graph, input: Argument, other: Argument, *, alpha: Argument = 1) -> fx.Node:  # noqa: A002 (torch's name)
    return _call(graph, "add", input, other) if alpha == 1 else _call(graph, "add_scaled", input, other, alpha)


def _sub(graph: fx.Graph, input: Argument, other: Argument, *, alpha: Argument = 1) -> fx.Node:  # noqa: A002
    if alpha == 1:
        return _call(graph, "sub", input, other)
    negative = -alpha if isinstance(alpha, float | int) else _call(graph, "neg", alpha)
    return _call(graph, "add_scaled", input, other, negative)


def _with_value(name: str) -> Build:
    def build(
        graph: fx.Graph,
        input: Argument,  # noqa: A002
        tensor1: Argument,
        tensor2: Argument,
        *,
        value: Argument = 1,
    ) -> fx.Node:
        return _call(graph, name, input, tensor1, tensor2, value)

    return build


def _clamp(graph: fx.Graph, input: Argument, min: Argument = None, max: Argument = None) -> fx.Node:  # noqa: A002
    if min is None:
        return _call(graph, "minimum", input, max)
    lower = _call(graph, "maximum", input, min)
    return lower if max is None else _call(graph, "minimum", lower, max)


def _square(graph: fx.Graph, input: Argument) -> fx.Node:  # noqa: A002
    return _call(graph, "mul", input, input)


def _norm(graph: fx.Graph, x: Argument, p: Any = 2, *others: Any, **options: Any) -> fx.Node:
    """Make the Euclidean norm; torch's functions hand on all their options, of which none but `p` may ask for more."""
    p = options.pop("p", options.pop("ord", p))
    unasked = all(value is None or value is False for value in (*others, *options.values()))
    if p not in (2, "fro", None) or not unasked:
        raise TypeError("another norm")
    return _call(graph, "sqrt", _call(graph, "sum_of_squares", x))


_POWERS: dict[Any, str] = {2: "mul", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
_FORMS: dict[str, Build] = {
    torch.add.__name__: _add,
    operator.add.__name__: _add,
    "sub": _sub,
    "addcmul": _with_value("addcmul"),
    "addcdiv": _with_value("addcdiv"),
    "clamp": _clamp,
    "clip": _clamp,
    "square": _square,
    torch.linalg.vector_norm.__name__: _norm,
    "norm": _norm,
}
_REDUCTIONS = {op.name for op in OPS if op.reduces} | {name for name, form in _FORMS.items() if form is _norm}
