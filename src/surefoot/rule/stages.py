"""The graph of a rule that reduces tensors to numbers, divided: stages that measure, and an update that is elementwise.

A reduction of values that follow from another one belongs to a later stage: that of a direction which is scaled by a
mean, for instance.  All numbers that follow from reductions are computed between the passes over the tensors, for all
parameters at once; the graphs that engines run take them as coefficients.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

from torch import fx

from surefoot.errors import RuleError
from surefoot.rule.bound import Rule, Stage
from surefoot.rule.declare import Reduction
from surefoot.rule.ops import Op


def divide(rule: Rule) -> Rule:
    """Divide a rule whose graph returns, after all else, the new values of its slots that are numbers.

    Raises:
        RuleError: a slot that is a number is updated without looking at the tensor, as a scalar would be.
    """
    levels = _levels(rule.graph)
    count = max((level for node, level in levels.items() if _reduces(node)), default=0)
    if not count:
        if rule.number_slots:
            raise RuleError(f"{rule.name}: slot `{rule.number_slots[0].name}` is one number; declare it as a Scalar")
        return replace(rule, given=rule.coefficients)
    results = next(iter(reversed(rule.graph.nodes))).args[0]
    last = len(results) - len(rule.number_slots)
    tensors, numbers = results[:last], results[last:]
    late = {node: level for node, level in levels.items() if level and not node.meta["tensor"]}
    stages = tuple(_stage(rule, late, level, set(numbers)) for level in range(1, count + 1))
    idle = [node for node in rule.graph.nodes if "coefficient" in node.meta and not node.users]
    names, graph = _cut(rule.graph, tensors, late, idle)
    slots = {slot.name for slot in rule.number_slots}
    return replace(
        rule,
        graph=graph,
        coefficients=names,
        stages=stages,
        given=tuple(name for name in rule.coefficients if name not in slots),
        new_numbers=tuple(map(_name, numbers)),
    )


def _levels(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return for each node how many stages come before it is known."""
    levels: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            levels[node] = int("slot" in node.meta)
        elif node.op == "call_function":
            levels[node] = max((levels[each] for each in node.all_input_nodes), default=0) + _reduces(node)
    return levels


def _stage(rule: Rule, late: dict[fx.Node, int], level: int, kept: set[fx.Node]) -> Stage:
    """Make a stage of a rule.

    Args:
        rule: the rule, its graph whole.
        late: the numbers that follow from reductions, each with its stage from 1.
        level: which stage.
        kept: numbers that are state.
    """
    sums = [node for node in rule.graph.nodes if _reduces(node) and late[node] == level]
    own = [param for param in rule.graph.nodes if param.op == "placeholder" and param.meta["tensor"]]
    unchanged = (own[0], *own[2:])
    names, graph = _cut(rule.graph, (*unchanged, *(node.args[0] for node in sums)), late)
    kinds = [
        Reduction(_name(node), "sum" if _op(node).name == "mean" else _op(node).name, precise=True) for node in sums
    ]
    measures = Rule(f"{rule.name}_measures", rule.flags, rule.slots, names, graph, tuple(kinds))
    made = [node for node, at in late.items() if at == level and node.op == "call_function" and not _reduces(node)]
    wanted = [node for node in made if node in kept or any(late.get(user) != level for user in node.users)]
    takes, numbers = _cut(rule.graph, wanted, late.keys() - set(made), tensors=False)
    means = tuple(_op(node).name == "mean" for node in sums)
    return Stage(measures, tuple(map(_name, sums)), means, takes, numbers, tuple(map(_name, wanted)))


def _cut(
    graph: fx.Graph,
    results: Sequence[fx.Node],
    known: Iterable[fx.Node],
    idle: Sequence[fx.Node] = (),
    *,
    tensors: bool = True,
) -> tuple[tuple[str, ...], fx.Graph]:
    """Copy what gives some results.

    Args:
        graph: the graph.
        results: what the copy returns.
        known: nodes that become inputs, as numbers.
        idle: numbers that are inputs though nothing in the graph takes them.
        tensors: whether all tensors are inputs.

    Returns:
        The names of the numbers among the inputs, and the graph.
    """
    given = set(known)
    needed = _needed(results, given) | set(idle)
    cut, copies, names = fx.Graph(), {}, []
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["tensor"] and tensors:
            copies[node] = cut.node_copy(node)
    for node in graph.nodes:
        if node in needed and (node in given or "coefficient" in node.meta):
            names.append(_name(node))
            copies[node] = cut.placeholder(f"c_{names[-1]}")
            copies[node].meta = {"coefficient": names[-1], "tensor": False}
    for node in graph.nodes:
        if node in needed and node not in copies:
            copies[node] = cut.node_copy(node, copies.__getitem__)
    cut.output(tuple(copies[node] for node in results))
    return tuple(names), cut


def _needed(results: Iterable[fx.Node], given: set[fx.Node]) -> set[fx.Node]:
    """Return the results and all that they are computed from, as far as what is given."""
    needed: set[fx.Node] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += () if node in given else node.all_input_nodes
    return needed


def _reduces(node: fx.Node) -> bool:
    return node.op == "call_function" and _op(node).reduces


def _op(node: fx.Node) -> Op:
    return cast("Op", node.target)


def _name(node: fx.Node) -> str:
    """Return what a number is called among coefficients."""
    return str(node.meta.get("coefficient") or f"measured_{node.name}")
