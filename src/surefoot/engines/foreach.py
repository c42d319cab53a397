"""The foreach engine: the graph interpreted over lists of tensors with `torch._foreach_*`, in place where it may."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from surefoot.engines.bucket import Bucket, Coefficients, overlap, reduce
from surefoot.engines.eager import measure
from surefoot.engines.in_place import Call, graph_of, inputs, outputs, schedule
from surefoot.rule.ops import Op
from surefoot.tensors.memory import PLAIN, has_address

__all__ = ["measure", "prepare", "run", "supports"]

Tensors = list[Tensor]


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
    graph = graph_of(bucket.rule, coefficients)
    working = bucket.values(positions)
    numbers = [coefficients[name] for name in bucket.rule.coefficients]
    values: dict[fx.Node, Any] = dict(zip(inputs(graph), [*working, *numbers], strict=True))
    for call in schedule(graph):
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


def _apply(call: Call, args: list[Any]) -> Any:
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
