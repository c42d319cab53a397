"""Showing what an algorithm does and how it is run: operations, generated source, traffic, the choice of engine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from surefoot.engines import ENGINES, Bucket, choose
from surefoot.engines.cpu import source as native
from surefoot.engines.cpu.source import Layout
from surefoot.engines.gpu import source as triton
from surefoot.rule import Rule, Stage, bind
from surefoot.state.formats import param_format, slot_format
from surefoot.storage import BLOCK, Format, format_of
from surefoot.tensors.shards import to_local

if TYPE_CHECKING:
    from surefoot.optimizer import Optimizer


@dataclass(frozen=True)
class Traffic:
    """Bytes that one step moves for each element of a parameter.

    Attributes:
        read: bytes read, in all passes.
        written: bytes written.
        passes: how often a step goes through the tensors: once for the update, and before once for each stage that
            measures tensors, and once if gradients are measured to be clipped.
    """

    read: float
    written: float
    passes: int = 1

    def __str__(self) -> str:
        """Write the sum and its parts."""
        parts = f"{self.read:.4g} read, {self.written:.4g} written" + f", in {self.passes} passes" * (self.passes > 1)
        return f"{self.read + self.written:.4g} bytes per element ({parts})"


@dataclass(frozen=True)
class Choice:
    """What becomes of some parameters of a group: the engine that gets them, and why those before it do not."""

    parameters: int
    elements: int
    kind: str
    engine: str
    refusals: tuple[str, ...]


def rule_of(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor | None = None) -> Rule:
    """Return the rule of an optimizer under a group's flags, and as a parameter is kept if one is given.

    Raises:
        ValueError: the algorithm is not a rule.
    """
    spec = optimizer.spec.of(group)
    if spec.update is None:
        raise ValueError(
            f"{spec.name} is not elementwise: it has a custom step, which torch's operators run, and "
            f"neither a graph nor a kernel"
        )
    formats = () if param is None else formats_of(optimizer, group, param).values()
    rounded = (("rounded", True),) if any(kept.stochastic for kept in formats) else ()
    own = {} if param is None or spec.flags_of is None else spec.flags_of(group, param)
    settled = ((name, own.get(name, value)) for name, value in spec.settle_flags(group))
    return bind(spec, (("scaled", False), *settled, *rounded))


def formats_of(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor) -> dict[str, Format]:
    """Return the formats of a parameter, under `param`, and of its slots that are tensors, as they are or will be."""
    spec = optimizer.spec.of(group)
    slots = (slot for slot in spec.active_slots(dict(spec.settle_flags(group))) if not slot.is_number)
    entry = optimizer.state.get(param, {})
    found = {slot.name: slot_format(slot, group, param, entry.get(slot.name)) for slot in slots}
    return {"param": param_format(group, param, entry), **found}


def layout_of(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor) -> Layout:
    """Return the layout of a parameter's kernel; its gradient is of its dtype."""
    found = formats_of(optimizer, group, param)
    own, slots = found["param"], [found[slot.name] for slot in rule_of(optimizer, group, param).slots]
    return Layout(torch.promote_types(own.dtype, torch.float32), (own, format_of(own.dtype), *slots))


def operations(graph: fx.Graph) -> Iterator[str]:
    """Yield a graph's operations, one a line, each with the line of the rule it comes from."""
    for node in graph.nodes:
        if node.op == "call_function":
            arguments = ", ".join(str(argument) for argument in node.args)
            place = str(node.meta["source"]).rsplit("/", 1)[-1]
            yield f"{node.name} = {node.target.name}({arguments})".ljust(60) + f"  # {place}"
        elif node.op == "output":
            yield f"return {', '.join(str(value) for value in node.args[0])}"


def measured_operations(stage: Stage) -> Iterator[str]:
    """Yield the operations of a stage: of tensors, what is measured of them, and the numbers that follow.

    What is called `x` here, `c_measured_x` stands for later.
    """
    sums = zip(stage.sums, stage.means, stage.over, strict=True)
    for rule in stage.measuring:
        yield from (
            f"{line}{', of sampled elements' * (rule is stage.sampled)}" for line in _without_return(rule.graph)
        )
        values = next(iter(reversed(rule.graph.nodes))).args[0][-len(rule.reductions) :]
        for kind, value in zip(rule.reductions, values, strict=True):
            name, mean, over = next(sums)
            called = "mean" if mean else kind.kind if over == "tensor" else _SUMS[over]
            yield f"{name.removeprefix('measured_')} = {called}({value})"
    yield from _without_return(stage.numbers)


_SUMS = {"group": "group_sum", "all": "total_sum"}


def _without_return(graph: fx.Graph) -> list[str]:
    return list(operations(graph))[:-1]


def traffic_of(optimizer: "Optimizer", group: Mapping[str, Any], param: Tensor) -> Traffic:
    """Count the bytes that a step of a parameter moves for each of its elements.

    Raises:
        ValueError: the algorithm is not a rule.
    """
    clipped = bool(group.get("max_grad_norm") or optimizer.step_options.max_grad_norm)
    return traffic(rule_of(optimizer, group, param), layout_of(optimizer, group, param), clipped=clipped)


def traffic(rule: Rule, layout: Layout, *, clipped: bool = False) -> Traffic:
    """Count the bytes that the kernels of a rule move for each element.

    Args:
        rule: the rule.
        layout: how its arrays are kept.
        clipped: whether gradients are measured before, to be clipped by their norm.
    """
    sizes = [kept.itemsize + _part_size(kept) for kept in layout.stored]
    own = (sizes[0], *sizes[2:])
    passes = (*(stage.measures.read for stage in rule.stages if stage.measures.reductions), rule.read)
    read = sum(size for one in passes for size, reads in zip(sizes, one, strict=True) if reads)
    written = sum(size for size, writes in zip(own, rule.written, strict=True) if writes)
    return Traffic(read + clipped * sizes[1], written, len(passes) + clipped)


def _part_size(kept: Format) -> float:
    """Return the bytes, for each element, of what stands beside a tensor."""
    return kept.correction.itemsize if kept.correction else torch.float32.itemsize / BLOCK if kept.code else 0


def sources(optimizer: "Optimizer", param: Tensor, *, gpu: bool = False) -> list[str]:
    """Print the kernels that would be generated for a parameter, under the first group's options, for CPU or GPU.

    Returns:
        The kernel of each stage that measures whole tensors, then that of the update.

    Raises:
        ValueError: there are no such kernels.
    """
    group = optimizer.param_groups[0]
    rule, layout = rule_of(optimizer, group, param), layout_of(optimizer, group, param)
    printer = triton if gpu else native
    if unknown := [kept.name for kept in layout.stored if not printer.stores(kept)]:
        raise ValueError(f"there are no kernels of the {'GPU' if gpu else 'CPU'} engine for {unknown[0]}")
    rules = [*(stage.measures for stage in rule.stages if stage.measures.reductions), rule]
    if gpu:
        return [triton.print_kernel(one, layout.compute, layout.stored, triton.Dialect.PTX) for one in rules]
    return [native.print_kernel(one, layout) for one in rules]


def choices(optimizer: "Optimizer") -> list[Choice]:
    """Tell which engine the parameters of an optimizer would get, as if each had a gradient of its own layout."""
    return [choice for group in optimizer.param_groups for choice in _choices_of_group(optimizer, group)]


def _choices_of_group(optimizer: "Optimizer", group: Mapping[str, Any]) -> Iterator[Choice]:
    kinds: dict[tuple[torch.device, torch.dtype, tuple[tuple[str, Format], ...]], list[Tensor]] = {}
    for param in group["params"]:
        formats = tuple(formats_of(optimizer, group, param).items())
        kinds.setdefault((param.device, param.dtype, formats), []).append(param)
    for (device, dtype, named), params in kinds.items():
        real = list(map(to_local, params))
        rule = rule_of(optimizer, group, params[0])
        bucket = Bucket(rule, real, real, dict(group), formats=tuple(kept for _, kept in named))
        engine = choose(bucket)
        before = ENGINES[: ENGINES.index(engine)]
        refusals = tuple(f"{_name(other)}: {reason}" for other in before if (reason := other.supports(bucket)))
        unusual = [f"{name} {kept.name}" for name, kept in named if kept != format_of(dtype)]
        kind = f"{str(dtype).removeprefix('torch.')} on {device}" + f" ({'; '.join(unusual)})" * bool(unusual)
        yield Choice(len(params), sum(p.numel() for p in params), kind, _name(engine), refusals)


def _name(engine: Any) -> str:
    name: str = engine.__name__
    return name.rsplit(".", 1)[-1]
