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
from surefoot.rule.ops import BY_NAME, Op


def divide(rule: Rule) -> Rule:
    """Divide a rule whose graph returns, after all else, the new values of its slots and state that are numbers.

    Raises:
        RuleError: a slot that is a number is updated without looking at the tensor, as a scalar would be; or a number
            that parameters share depends on what one of them has.
    """
    shared = _shared(rule)
    levels = _levels(rule.graph)
    count = max((level for node, level in levels.items() if _reduces(node)), default=0)
    if not count:
        if rule.number_slots:
            raise RuleError(f"{rule.name}: slot `{rule.number_slots[0].name}` is one number; declare it as a Scalar")
        if shared:
            raise RuleError(f"{rule.name}: `{rule.group_scalars[0].name}` is shared, but nothing is summed over groups")
        return replace(rule, given=rule.coefficients)
    results = next(iter(reversed(rule.graph.nodes))).args[0]
    last = len(results) - len(rule.number_slots) - len(shared)
    tensors, numbers = results[:last], results[last:]
    late = {node: level for node, level in levels.items() if level and not node.meta["tensor"]}
    stages = tuple(_stage(rule, late, level, set(numbers)) for level in range(1, count + 1))
    idle = [node for node in rule.graph.nodes if "coefficient" in node.meta and not node.users]
    names, graph = cut_graph(rule.graph, tensors, late, idle)
    slots = {slot.name for slot in rule.number_slots}
    return replace(
        rule,
        graph=graph,
        coefficients=names,
        stages=stages,
        given=tuple(name for name in rule.coefficients if name not in slots),
        new_numbers=tuple(map(_name, numbers[: len(rule.number_slots)])),
        new_shared=tuple(map(_name, shared)),
    )


def _shared(rule: Rule) -> list[fx.Node]:
    """Return the new values of numbers that parameters share, each known after a stage, not before."""
    output = next(iter(reversed(rule.graph.nodes)))
    results = list(output.args[0])
    first = len(results) - len(rule.group_scalars)
    own = _of_one_parameter(rule.graph)
    levels = _levels(rule.graph)
    for index, scalar in enumerate(rule.group_scalars, first):
        node = results[index]
        if node in own:
            raise RuleError(
                f"{node.meta['source']}: `{scalar.name}` is one number for all parameters, but follows from what one "
                f"of them has; sum it with `total_sum` or `group_sum`"
            )
        if not levels[node]:
            with rule.graph.inserting_before(output):
                results[index] = rule.graph.call_function(BY_NAME["add"], (node, 0))
            results[index].meta = {"tensor": False, "source": output.meta["source"], "late": True}
    output.args = (tuple(results),)
    return results[first:]


def _of_one_parameter(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that differ from parameter to parameter: tensors, and what follows from them unsummed."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            own = node.meta["tensor"] or "slot" in node.meta
        else:
            total = node.op == "call_function" and _op(node).over != "tensor"
            own = not total and any(each in found for each in node.all_input_nodes)
        if own:
            found.add(node)
    return found


def _levels(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return for each node how many stages come before it is known."""
    levels: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            levels[node] = int("slot" in node.meta)
        elif node.op == "call_function":
            before = max((levels[each] for each in node.all_input_nodes), default=0)
            levels[node] = max(before, int("late" in node.meta)) + _reduces(node)
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
    sums.sort(key=lambda node: _op(node).over == "tensor")
    own = [param for param in rule.graph.nodes if param.op == "placeholder" and param.meta["tensor"]]
    unchanged = (own[0], *own[2:])
    names, graph = cut_graph(rule.graph, (*unchanged, *(node.args[0] for node in sums)), late)
    kinds = [Reduction(_name(node), _KINDS.get(_op(node).name, _op(node).name), precise=True) for node in sums]
    measures = Rule(f"{rule.name}_measures", rule.flags, rule.slots, names, graph, tuple(kinds))
    made = [node for node, at in late.items() if at == level and node.op == "call_function" and not _reduces(node)]
    wanted = [node for node in made if node in kept or any(late.get(user) != level for user in node.users)]
    takes, numbers = cut_graph(rule.graph, wanted, late.keys() - set(made), tensors=False)
    means = tuple(_op(node).name == "mean" for node in sums)
    over = tuple(_op(node).over for node in sums)
    return Stage(measures, tuple(map(_name, sums)), means, over, takes, numbers, tuple(map(_name, wanted)))


_KINDS = {"mean": "sum", "group_sum": "sum", "total_sum": "sum"}
"""What is measured of a tensor for a reduction, where it is not called like that."""


def cut_graph(
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
    needed = needed_nodes(results, given) | set(idle)
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


def needed_nodes(results: Iterable[fx.Node], given: set[fx.Node]) -> set[fx.Node]:
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
