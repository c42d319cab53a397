"""Rules with their flags settled, as engines take them."""

import functools
from dataclasses import dataclass

from torch import fx

from surefoot.rule.declare import GroupScalar, Reduction, Scalar, Slot
from surefoot.rule.spec import Flags


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule with its flags settled.

    Attributes:
        name: the algorithm's name.
        flags: the flags, as settled.
        slots: the slots that exist under these flags and are tensors, in the order in which the graph returns them.
        coefficients: names of the numbers that the graph takes, in the order of its placeholders.
        graph: the update as operations; it returns the parameter, the slots and then what is measured.
        reductions: what is measured.
        scalars: the numbers that a parameter has under these flags.
        number_slots: the slots that are one number for each parameter.
        stages: what must be measured before, in order, where numbers of the update depend on all elements of a tensor.
        given: names of the numbers that come from hyperparameters and scalars, for the graph and for stages.
        new_numbers: for each of `number_slots` the name of the number that is its new value.
        group_scalars: the numbers that parameters share.
        new_shared: for each of `group_scalars` the name of the number that is its new value.
        sampled: the rule of the slots that are kept of some elements only, where there are such: it takes those of the
            parameter and the gradient, and leaves the parameter as it is.
    """

    name: str
    flags: Flags
    slots: tuple[Slot, ...]
    coefficients: tuple[str, ...]
    graph: fx.Graph
    reductions: tuple[Reduction, ...] = ()
    scalars: tuple[Scalar, ...] = ()
    number_slots: tuple[Slot, ...] = ()
    stages: tuple["Stage", ...] = ()
    given: tuple[str, ...] = ()
    new_numbers: tuple[str, ...] = ()
    group_scalars: tuple[GroupScalar, ...] = ()
    new_shared: tuple[str, ...] = ()
    sampled: "Rule | None" = None

    @functools.cached_property
    def read(self) -> tuple[bool, ...]:
        """Of the parameter, the gradient and each slot, whether anything follows from its values."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"][: 2 + len(self.slots)]
        output = next(iter(reversed(self.graph.nodes)))
        measured = output.args[0][1 + len(self.slots) :]
        shaped = {node for node in self.graph.nodes if node.op == "call_function" and node.target.name == "fill"}
        return tuple(node in measured or bool(node.users.keys() - shaped - {output}) for node in inputs)

    @functools.cached_property
    def numbers(self) -> tuple[str, ...]:
        """Names of the numbers that engines take, for the update or for a stage."""
        measuring = (rule for stage in self.stages for rule in (stage.measures, stage.sampled))
        rules = (self, self.sampled, *measuring)
        return tuple(dict.fromkeys(name for rule in rules if rule is not None for name in rule.coefficients))

    @functools.cached_property
    def written(self) -> tuple[bool, ...]:
        """Of the parameter and of each slot, whether the update changes it."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        results = next(iter(reversed(self.graph.nodes))).args[0]
        own = (inputs[0], *inputs[2 : 2 + len(self.slots)])
        return tuple(result is not node for result, node in zip(results, own, strict=False))


@dataclass(frozen=True, eq=False)
class Stage:
    """What is measured of tensors before an update, and the numbers that follow from it.

    Attributes:
        measures: the rule that measures, and changes nothing.
        sums: names of the numbers that it measures; those that are not of one tensor first.
        means: for each of them whether it is to be divided by the number of elements.
        over: for each of them what is added up: a tensor, the tensors of a group, or those of all groups.
        takes: names of the numbers that `numbers` takes.
        numbers: a graph of numbers only.
        gives: names of the numbers that it returns.
        sampled: the rule that measures what follows from slots of some elements; its sums come before the others.
    """

    measures: Rule
    sums: tuple[str, ...]
    means: tuple[bool, ...]
    over: tuple[str, ...]
    takes: tuple[str, ...]
    numbers: fx.Graph
    gives: tuple[str, ...]
    sampled: Rule | None = None

    @property
    def measuring(self) -> list[Rule]:
        """Return the rules that measure, in the order of the sums."""
        return [rule for rule in (self.sampled, self.measures) if rule is not None and rule.reductions]

    @property
    def totals(self) -> int:
        """Return how many of the sums are of several tensors."""
        return len(self.over) - self.over.count("tensor")
