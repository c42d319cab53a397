"""Showing what an algorithm does and how it is run: operations, generated source, traffic, the choice of engine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from surefoot.engines import ENGINES, Bucket, choose
from surefoot.engines.cpu.source import Layout, print_kernel
from surefoot.engines.gpu import source as triton
from surefoot.rule import Rule, bind
from surefoot.storage import format_of
from surefoot.tensors.shards import to_local

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer


@dataclass(frozen=True)
class Traffic:
    """Bytes that one step moves for each element of a parameter, read and written once."""

    read: int
    written: int

    def __str__(self) -> str:
        """Write the sum and its parts."""
        return f"{self.read + self.written} bytes per element ({self.read} read, {self.written} written)"


@dataclass(frozen=True)
class Choice:
    """What becomes of some parameters of a group: the engine that gets them, and why those before it do not."""

    parameters: int
    elements: int
    kind: str
    engine: str
    refusals: tuple[str, ...]


def rule_of(optimizer: "Optimizer", group: Mapping[str, Any]) -> Rule:
    """Return the rule of an optimizer under a group's flags.

    Raises:
        ValueError: the algorithm is no rule.
    """
    spec = optimizer.spec
    if spec.update is None:
        raise ValueError(
            f"{spec.name} is not elementwise: it has a custom step, which torch's operators run, and "
            f"neither a graph nor a kernel"
        )
    return bind(spec, (("scaled", False), *spec.settle_flags(group)))


def layout_of(rule: Rule, dtype: torch.dtype, state_dtype: torch.dtype | None = None) -> Layout:
    """Return the layout of a rule's kernel for parameters of a dtype."""
    stored = map(format_of, (dtype, dtype, *(state_dtype or dtype for _ in rule.slots)))
    return Layout(torch.promote_types(dtype, torch.float32), tuple(stored))


def operations(graph: fx.Graph) -> Iterator[str]:
    """Yield a graph's operations, one a line, each with the line of the rule it comes from."""
    for node in graph.nodes:
        if node.op == "call_function":
            arguments = ", ".join(str(argument) for argument in node.args)
            place = str(node.meta["source"]).rsplit("/", 1)[-1]
            yield f"{node.name} = {node.target.name}({arguments})".ljust(60) + f"  # {place}"
        elif node.op == "output":
            yield f"return {', '.join(str(value) for value in node.args[0])}"


def traffic(layout: Layout) -> Traffic:
    """Count the bytes that a kernel moves for each element: everything read, all but the gradient written."""
    sizes = [kept.itemsize for kept in layout.stored]
    return Traffic(sum(sizes), sum(sizes) - sizes[1])


def source(optimizer: "Optimizer", dtype: torch.dtype, *, gpu: bool = False) -> str:
    """Print the kernel that would be generated for a dtype, for the first group's options, for CPU or GPU."""
    group = optimizer.param_groups[0]
    rule = rule_of(optimizer, group)
    layout = layout_of(rule, dtype, group.get("state_dtype"))
    if gpu:
        return triton.print_kernel(rule, layout.compute, layout.stored, triton.Dialect.PTX)
    return print_kernel(rule, layout)


def choices(optimizer: "Optimizer") -> list[Choice]:
    """Tell which engine the parameters of an optimizer would get, as if each had a gradient of its own layout."""
    return [choice for group in optimizer.param_groups for choice in _choices_of_group(optimizer, group)]


def _choices_of_group(optimizer: "Optimizer", group: Mapping[str, Any]) -> Iterator[Choice]:
    rule = rule_of(optimizer, group)
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in group["params"]:
        kinds.setdefault((param.device, param.dtype), []).append(param)
    for (device, dtype), params in kinds.items():
        real = list(map(to_local, params))
        bucket = Bucket(rule, real, real, dict(group))
        engine = choose(bucket)
        before = ENGINES[: ENGINES.index(engine)]
        refusals = tuple(f"{_name(other)}: {reason}" for other in before if (reason := other.supports(bucket)))
        kind = f"{str(dtype).removeprefix('torch.')} on {device}"
        yield Choice(len(params), sum(p.numel() for p in params), kind, _name(engine), refusals)


def _name(engine: Any) -> str:
    name: str = engine.__name__
    return name.rsplit(".", 1)[-1]
