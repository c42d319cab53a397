"""docs/optimizers.md tells of every algorithm that is a rule, and its bytes are those of the rule."""

from pathlib import Path

import torch

import surefoot
from surefoot.rule import Sparse, bind

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"


def rows():
    """Return the cells of the first table by the optimizer's name."""
    lines = PAGE.read_text(encoding="utf-8").split("## Transforms")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {name.strip("`"): rest for name, *rest in cells}


def bytes_of(cls):
    """Return the bytes of state, and those that a step moves, for an element of a float32 matrix; see the page."""
    optimizer = cls([torch.zeros(2, 2, requires_grad=True)])
    flags = cls.spec.settle_flags(optimizer.param_groups[0])
    rule = bind(cls.spec, flags)
    traffic = 4 * (sum(rule.read) + sum(rule.written))
    measured = [read(stage.measures) for stage in rule.stages]
    return str(4 * len(rule.slots)), " + ".join(map(str, [traffic, *measured]))


def read(rule):
    """Return the bytes of an element that a rule reads to measure it."""
    results = next(iter(reversed(rule.graph.nodes))).args[0]
    tensors = [node for node in rule.graph.nodes if node.op == "placeholder" and node.meta["tensor"]]
    measured = results[1 + len(rule.slots) :]
    return 4 * sum(t in measured or any(user.op == "call_function" for user in t.users) for t in tensors)


def test_every_rule_has_its_row_with_its_bytes():
    found = rows()
    expected = {}
    for name in surefoot.optimizers.__all__:
        cls = getattr(surefoot, name)
        if cls.is_rule() and cls.sparse is not Sparse.ONLY:
            of_torch = "no" if name in surefoot.optimizers.NOT_IN_TORCH else "yes"
            expected[name] = [of_torch, *bytes_of(cls)]
    assert {name: cells[:3] for name, cells in found.items()} == expected
