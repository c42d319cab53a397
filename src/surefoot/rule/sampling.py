"""Rules with sampled slots, kept of every n-th element: these slots and the sums that follow are split off."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx

from surefoot.errors import RuleError
from surefoot.rule.bound import Rule, Stage
from surefoot.rule.declare import Slot
from surefoot.rule.stages import cut_graph, needed_nodes


def divide_sampled(rule: Rule) -> Rule:
    """Return a rule without its sampled slots; these, and the sums that follow from them, become `sampled` rules.

    Raises:
        RuleError: something else follows from such a slot, it follows from others, or sums that follow from them
            are asked for after others.
    """
    sampled = [slot for slot in rule.slots if slot.sampled]
    others = [slot for slot in rule.slots if not slot.sampled]
    param, slots, measured = _results(rule)
    idle = [node for node in rule.graph.nodes if "coefficient" in node.meta and not node.users]
    own = _restricted(rule, others, (param, *(slots[slot] for slot in others), *measured), idle)
    values = next(iter(rule.graph.nodes))
    return replace(
        own,
        sampled=_restricted(replace(rule, reductions=()), sampled, (values, *(slots[slot] for slot in sampled))),
        stages=tuple(_divided(stage, sampled, others) for stage in rule.stages),
    )


def _results(rule: Rule) -> tuple[fx.Node, dict[Slot, fx.Node], tuple[fx.Node, ...]]:
    """Return the nodes of the new parameter, of each new slot, and of what is measured."""
    results = next(iter(reversed(rule.graph.nodes))).args[0]
    count = 1 + len(rule.slots)
    return results[0], dict(zip(rule.slots, results[1:count], strict=True)), results[count:]


def _divided(stage: Stage, sampled: Sequence[Slot], others: Sequence[Slot]) -> Stage:
    """Return a stage whose sums of sampled slots are measured by a rule of their own."""
    rule = stage.measures
    param, slots, measured = _results(rule)
    names = {slot.name for slot in sampled}
    follows = [any(node.target in names for node in needed_nodes([each], set())) for each in measured]
    count = sum(follows)
    if not all(follows[:count]):
        raise RuleError(f"{rule.name}: what follows from slots of every n-th element must be summed before all else")
    first, rest = replace(rule, reductions=rule.reductions[:count]), replace(rule, reductions=rule.reductions[count:])
    own = (param, *(slots[slot] for slot in others), *measured[count:])
    apart = (param, *(slots[slot] for slot in sampled), *measured[:count])
    return replace(
        stage,
        measures=_restricted(rest, others, own),
        sampled=_restricted(first, sampled, apart) if count else None,
    )


def _restricted(rule: Rule, slots: Sequence[Slot], results: Sequence[fx.Node], idle: Sequence[fx.Node] = ()) -> Rule:
    """Return a rule of some slots that gives some of the results."""
    names, graph = cut_graph(rule.graph, results, (), idle)
    _drop(rule.name, graph, {"param", "grad", *(slot.name for slot in slots)})
    return replace(rule, slots=tuple(slots), coefficients=names, graph=graph, stages=(), sampled=None)


def _drop(name: str, graph: fx.Graph, kept: Collection[str]) -> None:
    """Take away the inputs that are tensors and not kept."""
    for node in [node for node in graph.nodes if node.op == "placeholder" and node.meta["tensor"]]:
        if node.target not in kept:
            if node.users:
                raise RuleError(
                    f"{name}: what follows from slot `{node.target}` may be itself or a sum over parameters, where "
                    f"slots are of every n-th element; and such a slot follows from no others"
                )
            graph.erase_node(node)
