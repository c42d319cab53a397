"""The eager engine writes values where their first argument stands if nobody reads that later, with the same bits."""

import pytest
import torch

import surefoot
from conformance import DENSE, Row, assert_same, each_row, gradients, groups, results, zoo
from surefoot.engines import eager
from surefoot.engines.in_place import graph_of, schedule, update_of
from surefoot.rule import bind

RULES = [row for row in DENSE if row.ours.is_rule()]


def trained(row: Row, dtype: torch.dtype, steps: int = 3) -> dict[str, object]:
    """Train by the eager engine; return parameters and state."""
    params = zoo(dtype, row.admits)
    optimizer = row.build(groups(params), {}, "eager")
    for step in range(steps):
        given = gradients(params, step, dtype)
        for name, param in params.items():
            param.grad = given[name]
        before = {name: grad.clone() for name, grad in given.items() if grad is not None}
        optimizer.step()
        assert_same({name: params[name].grad for name in before}, before)
    return results(optimizer, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@each_row(RULES)
def test_overwriting_has_the_bits_of_new_values(row, dtype, monkeypatch):
    ours = trained(row, dtype)
    monkeypatch.setattr(eager, "_may_overwrite", lambda bucket: False)
    assert_same(ours, trained(row, dtype))


@pytest.mark.parametrize("fresh", [True, False])
def test_where_it_is_known_whether_slots_are_new_nothing_is_selected(fresh):
    optimizer = surefoot.SGD([torch.nn.Parameter(torch.ones(2))], momentum=0.9, nesterov=True)
    rule = bind(optimizer.spec, optimizer.spec.settle_flags(optimizer.param_groups[0]))
    calls = schedule(graph_of(rule, {"fresh": fresh}))
    assert "where" in {call.op.name for call in schedule(graph_of(rule, {}))} - {call.op.name for call in calls}
    param, grad, buffer = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]), torch.tensor([4.0, 8.0])
    numbers = {"fresh": fresh, "momentum": 0.9, "weight": 1.0, "neg_lr": -0.1}
    new = grad.clone() if fresh else buffer * 0.9 + grad
    moved, kept = update_of(graph_of(rule, numbers))(
        param, grad, buffer, *(numbers[name] for name in rule.coefficients)
    )
    assert moved is param
    assert (kept is buffer) == (not fresh)
    assert kept is not grad
    torch.testing.assert_close(kept, new, rtol=0, atol=0)
    torch.testing.assert_close(grad, torch.tensor([0.5, 0.25]), rtol=0, atol=0)


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.SGD])
def test_tensors_that_share_memory_are_stepped_one_after_the_other(cls, monkeypatch):
    found = []
    for overwrites in (True, False):
        if not overwrites:
            monkeypatch.setattr(eager, "_may_overwrite", lambda bucket: False)
        flat = torch.linspace(-1, 1, 8)
        params = [torch.nn.Parameter(flat[:5]), torch.nn.Parameter(flat[3:])]
        optimizer = cls(params, lr=0.1, foreach=False)
        for _ in range(4):
            for param in params:
                param.grad = torch.linspace(1, 2, 5)
            optimizer.step()
        found.append(flat)
    assert torch.equal(*found)
