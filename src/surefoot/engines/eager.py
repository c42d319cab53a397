"""The eager engine: the graph's operations called on tensors, one parameter at a time.

It is the reference for the other engines, takes whatever torch's operators take, and carries gradients through the
step when `differentiable=True`.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from surefoot.engines.bucket import Bucket, reduce
from surefoot.engines.in_place import graph_of, update_of
from surefoot.rule import Rule
from surefoot.tensors.memory import PLAIN, is_plain, shared_memory
from surefoot.tensors.modes import mode_is_active

__all__ = ["evaluate", "evaluate_rows", "measure", "prepare", "run", "supports"]


def supports(bucket: Bucket) -> str | None:  # noqa: ARG001 (every engine is asked the same question)
    """Return the reason why a bucket cannot be served; there is none."""
    return None


def prepare(bucket: Bucket) -> None:
    """Find out whether values may be overwritten on the way to new ones; operations look at tensors themselves."""
    if bucket.overwrites is None:
        bucket.overwrites = _may_overwrite(bucket)


def _may_overwrite(bucket: Bucket) -> bool:
    """Return whether tensors of a bucket are values of the dtype of the arithmetic, each in memory of its own."""
    stored = list(chain(bucket.params, *bucket.slots))
    if not bucket.is_plain or bucket.options.get("differentiable") or mode_is_active():
        return False
    if any(type(tensor) not in PLAIN or tensor.dtype != bucket.compute_dtype for tensor in (*stored, *bucket.grads)):
        return False
    once = len(set(map(id, bucket.params))) == len(bucket.params)
    return once and all(map(is_plain, stored)) and shared_memory(stored) is None


def run(bucket: Bucket) -> None:
    """Update every parameter of the bucket and its slots in place."""
    numbers = [[row[name] for name in bucket.rule.coefficients] for row in bucket.coefficients]
    measures = bool(bucket.rule.reductions)  # which telemetry may ask for in some steps
    on_host = not any(isinstance(number, Tensor) for number in chain.from_iterable(numbers))
    if bucket.overwrites and on_host and not measures:
        _run_overwriting(bucket, numbers)
    else:
        _run_and_store(bucket)


def _run_overwriting(bucket: Bucket, numbers: Sequence[Sequence[Any]]) -> None:
    """Update every parameter by operations that write where their first argument stands, as soon as nobody reads it."""
    updates = [update_of(graph_of(bucket.rule, coefficients)) for coefficients in bucket.coefficients]
    for row, grad, *stored in zip(bucket.row.tolist(), bucket.grads, bucket.params, *bucket.slots, strict=True):
        results = updates[row](stored[0], grad, *stored[1:], *numbers[row])
        for target, new in zip(stored, results, strict=True):
            if new is not target:
                target.copy_(new)


def _run_and_store(bucket: Bucket) -> None:
    """Evaluate the update of every parameter, store it before that of the next, and measure what the rule measures."""
    measured: list[Tensor] = []

    def measured_rows() -> Iterator[Sequence[Tensor]]:
        for results in evaluate_rows(bucket):
            if bucket.rule.reductions:
                measured.append(reduce(bucket.rule.reductions, results[1 + len(bucket.slots) :]))
            yield results

    bucket.store(range(len(bucket.params)), measured_rows())
    bucket.measured = torch.stack(measured).detach() if measured else None


def measure(bucket: Bucket, rule: Rule) -> Tensor:
    """Return what a rule measures of the bucket, which stays as it is: float64 of shape (parameters, reductions)."""
    stored = 1 + len(rule.slots)
    rows = _evaluate(bucket, rule, 1 + stored)
    return torch.stack([reduce(rule.reductions, results[stored:]) for results in rows])


def evaluate_rows(bucket: Bucket) -> Iterator[tuple[Tensor, ...]]:
    """Yield what the rule gives for each parameter of the bucket, and change nothing."""
    yield from _evaluate(bucket, bucket.rule, 2 + len(bucket.slots))


def _evaluate(bucket: Bucket, rule: Rule, columns: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield what a rule gives for each parameter of the first columns of a bucket.

    With `differentiable` it works on clones: what autograd keeps for the backward pass is then never overwritten by the
    results.
    """
    readers, differentiable = bucket.readers()[:columns], bool(bucket.options.get("differentiable"))
    for row in range(len(bucket.params)):
        inputs = [read(row) for read in readers]
        if differentiable:
            inputs = [tensor.clone() for tensor in inputs]
        numbers = [bucket.coefficients[bucket.row[row]][name] for name in rule.coefficients]
        yield evaluate(rule.graph, [*inputs, *numbers])


def evaluate(graph: fx.Graph, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Interpret a graph: `inputs` in the order of its placeholders; returns its outputs."""
    values: dict[fx.Node, Any] = {}
    remaining = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "call_function":
            values[node] = node.target(*[values[a] if isinstance(a, fx.Node) else a for a in node.args])
        else:
            return tuple(values[result] for result in node.args[0])
    raise AssertionError("a graph ends with its output")
