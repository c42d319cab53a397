"""Updates by torch's operations in place: which operation may overwrite its first argument, and functions of them.

It may if that is a value computed in this step, or a slot on the way to its own new value, and nobody reads it later.
Gradients are never overwritten.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, fx, nn

from surefoot.engines.bucket import Coefficients
from surefoot.rule import Rule
from surefoot.rule.ops import Op
from surefoot.rule.passes import settle_selections

_FRESH = "fresh"


@dataclass(frozen=True)
class Call:
    """One operation of a schedule: where its arguments stand, and whether it overwrites the first."""

    node: fx.Node
    op: Op
    in_place: bool
    last_read: tuple[fx.Node, ...]


def graph_of(rule: Rule, coefficients: Coefficients) -> fx.Graph:
    """Return the graph of a rule: the part that is about slots that have just been made or others, if one knows."""
    fresh = coefficients.get(_FRESH)
    return rule.graph if fresh is None or isinstance(fresh, Tensor) else _settled(rule, fresh=bool(fresh))


@functools.cache
def _settled(rule: Rule, *, fresh: bool) -> fx.Graph:
    return settle_selections(rule.graph, 1 + len(rule.slots), _FRESH, value=fresh)


@functools.cache
def inputs(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Return the nodes of the parameter, the gradient, the slots, and the numbers."""
    return tuple(node for node in graph.nodes if node.op == "placeholder")


@functools.cache
def outputs(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Return the nodes of the new parameter, the new slots, and what is measured."""
    results: tuple[fx.Node, ...] = next(iter(reversed(graph.nodes))).args[0]
    return results


@functools.cache
def schedule(graph: fx.Graph) -> tuple[Call, ...]:
    """Decide for every operation of a rule's graph whether it works in place, and which values end with it."""
    order: dict[fx.Node, int] = {node: position for position, node in enumerate(graph.nodes)}
    last_reader = {node: max(node.users, key=order.__getitem__, default=None) for node in order}
    param, _, *slots = (node for node in inputs(graph) if node.meta["tensor"])
    lineage = _lineages([param, *slots], outputs(graph))
    calls = []
    for node in order:
        if node.op == "call_function":
            ended = tuple(argument for argument in node.all_input_nodes if last_reader[argument] is node)
            calls.append(Call(node, _op(node), _may_overwrite(node, ended, lineage), ended))
    return tuple(calls)


def _may_overwrite(node: fx.Node, ended: tuple[fx.Node, ...], lineage: dict[fx.Node, fx.Node]) -> bool:
    """Return whether an operation may put its value where its first argument stands."""
    first = node.args[0]
    if not isinstance(first, fx.Node) or first not in ended or not first.meta["tensor"]:
        return False
    read_once = node.args.count(first) == 1
    ours = first.op == "call_function" or first in lineage
    return read_once and ours and lineage.get(first) in (None, lineage.get(node)) and _op(node).foreach is not None


def _op(node: fx.Node) -> Op:
    return cast("Op", node.target)


def _lineages(owners: list[fx.Node], results: tuple[fx.Node, ...]) -> dict[fx.Node, fx.Node]:
    """Map every value on the way from a stored tensor to its own new value, along first arguments, to the tensor.

    Only such a value may stand in the stored tensor's memory: whatever else stood there would be lost, or be taken
    for the new value of another slot.
    """
    lineage: dict[fx.Node, fx.Node] = {}
    for owner, result in zip(owners, results, strict=False):
        path = [result]
        while path[-1].op == "call_function" and isinstance(path[-1].args[0], fx.Node):
            path.append(path[-1].args[0])
        if path[-1] is owner:
            lineage.update(dict.fromkeys(path, owner))
    return lineage


@functools.cache
def update_of(graph: fx.Graph) -> Callable[..., tuple[Tensor, ...]]:
    """Return the update of one parameter as a function that overwrites what it may.

    It takes tensors of the dtype of the arithmetic in the order of the graph, and then numbers of the host.  What it
    returns stands in the parameter and the slots, where these are overwritten, or must be copied there.
    """
    in_place = {call.node for call in schedule(graph) if call.in_place}
    made, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        nodes[node] = copy = made.node_copy(node, nodes.__getitem__)
        if node.op == "call_function":
            _spell(copy, _op(node), overwrites=node in in_place)
    return cast("Callable[..., tuple[Tensor, ...]]", fx.GraphModule(nn.Module(), made).forward)


_LAST = {"add_scaled": "alpha", "addcmul": "value", "addcdiv": "value"}
"""How torch calls the last argument of operations that have a number there."""


def _spell(node: fx.Node, op: Op, *, overwrites: bool) -> None:
    """Let a node call torch's method that overwrites its first argument, or what has the operation's value."""
    method = f"{op.foreach}_"
    tensors = all(isinstance(between, fx.Node) and between.meta["tensor"] for between in node.args[1:-1])
    if overwrites and tensors and hasattr(Tensor, method):
        node.op, node.target = "call_method", method
        if op.name in _LAST:
            node.kwargs, node.args = {_LAST[op.name]: node.args[-1]}, node.args[:-1]
    elif op.eager.__module__ == operator.__name__:
        node.target = op.eager
