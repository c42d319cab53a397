"""The foreach engine: the graph interpreted over lists of tensors with `torch._foreach_*`.

A schedule, made once per graph, says which operation may overwrite its first argument: a value computed in this step,
or a slot on the way to its own new value, when nobody reads it later.  Gradients are never overwritten.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, fx

from surefoot.engines.bucket import Bucket, Coefficients, overlap, reduce
from surefoot.engines.eager import measure
from surefoot.rule import Rule
from surefoot.rule.ops import Op
from surefoot.tensors.memory import PLAIN, has_address

__all__ = ["measure", "outputs", "prepare", "run", "schedule", "supports"]

Tensors = list[Tensor]


@dataclass(frozen=True)
class _Call:
    """One operation of a schedule: where its arguments stand, and whether it overwrites the first."""

    node: fx.Node
    op: Op
    in_place: bool
    last_read: tuple[fx.Node, ...]


def supports(bucket: Bucket) -> str | None:
    """Return the reason why a bucket cannot be served, if there is one."""
    if bucket.options.get("differentiable"):
        return "foreach operations carry no gradients through the step"
    stored = list(chain(bucket.params, *bucket.slots))
    if any(type(tensor) in PLAIN and tensor.is_neg() for tensor in stored):
        return f"a parameter or its state is negated lazily, among {bucket.row_name(0)} and others"
    if len(set(map(id, bucket.params))) == len(bucket.params) and all(map(has_address, stored)):
        return overlap(bucket, stored)
    return None


def prepare(bucket: Bucket) -> None:
    """Do nothing: torch's operations look at every tensor themselves."""


def run(bucket: Bucket) -> None:
    """Update every parameter of the bucket and its slots in place."""
    rows: dict[int, Tensor] = {}
    for positions, coefficients in bucket.by_coefficients():
        rows.update(zip(positions, _run_list(bucket, positions, coefficients), strict=False))
    bucket.measured = torch.stack([rows[i] for i in range(len(bucket.params))]) if rows else None


def _run_list(bucket: Bucket, positions: Sequence[int], coefficients: Coefficients) -> list[Tensor]:
    """Run the schedule over the tensors at some positions, which share their coefficients; return what is measured."""
    graph = bucket.rule.graph
    working = [list(map(read, positions)) for read in bucket.readers()]
    numbers = [coefficients[name] for name in bucket.rule.coefficients]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(inputs, [*working, *numbers], strict=True))
    for call in schedule(bucket.rule):
        values[call.node] = _apply(call, [values[a] if isinstance(a, fx.Node) else a for a in call.node.args])
        for node in call.last_read:
            del values[node]
    targets, results = [[column[i] for i in positions] for column in (bucket.params, *bucket.slots)], outputs(graph)
    extra = zip(*(values[result] for result in results[len(targets) :]), strict=True)
    measured = [reduce(bucket.rule.reductions, tensors) for tensors in extra]
    if not bucket.is_plain:
        bucket.store(positions, zip(*(values[result] for result in results[: len(targets)]), strict=True))
        return measured
    for target, result in zip(targets, results, strict=False):
        if any(kept is not new for kept, new in zip(target, values[result], strict=True)):
            torch._foreach_copy_(target, values[result])
    return measured


def outputs(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Nodes of the new param, the new slots, and what is measured."""
    results: tuple[fx.Node, ...] = next(iter(reversed(graph.nodes))).args[0]
    return results


@functools.cache
def schedule(rule: Rule) -> tuple[_Call, ...]:
    """Decide for every operation of a rule whether it works in place, and which values end with it."""
    graph, results = rule.graph, outputs(rule.graph)
    order: dict[fx.Node, int] = {node: position for position, node in enumerate(graph.nodes)}
    last_reader = {node: max(node.users, key=order.__getitem__, default=None) for node in order}
    inputs = [node for node in order if node.op == "placeholder" and node.meta["tensor"]]
    lineage = _lineages([inputs[0], *inputs[2:]], results)
    calls = []
    for node in order:
        if node.op == "call_function":
            ended = tuple(argument for argument in node.all_input_nodes if last_reader[argument] is node)
            calls.append(_Call(node, _op(node), _may_overwrite(node, ended, lineage), ended))
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


def _apply(call: _Call, args: list[Any]) -> Any:
    """Evaluate one operation over lists; numbers stay numbers."""
    if not call.node.meta["tensor"]:
        return call.op(*args)
    lists = args[: max(1, len(args) - 1)] if call.op.arity > 2 else args[:1]  # noqa: PLR2004 (the last is a number)
    on_device = any(isinstance(argument, Tensor) for argument in args)  # torch's lists take numbers of the host only
    if call.op.foreach is not None and not on_device and all(isinstance(argument, list) for argument in lists):
        return _foreach(call.op, args, in_place=call.in_place)
    if call.op.name in ("add", "mul") and isinstance(args[1], list):
        return _foreach(call.op, [args[1], args[0]], in_place=False)
    size = next(len(a) for a in args if isinstance(a, list))
    return [call.op(*(a[i] if isinstance(a, list) else a for a in args)) for i in range(size)]


def _foreach(op: Op, args: list[Any], *, in_place: bool) -> Tensors:
    function: Callable[..., Any] = getattr(torch, f"_foreach_{op.foreach}{'_' if in_place else ''}")
    if op.name == "add_scaled":
        result = function(args[0], args[1], alpha=args[2])
    elif op.arity == 4:  # noqa: PLR2004 (addcmul and addcdiv)
        result = function(*args[:3], value=args[3])
    else:
        result = function(*args)
    return args[0] if in_place else list(result)
