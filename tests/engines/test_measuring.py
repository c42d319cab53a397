"""Engines measure what any rule asks for, of slots and by coefficients too, and change nothing."""

import numpy as np
import pytest
import torch
from torch import fx

from surefoot.engines import Bucket, cpu, eager, foreach
from surefoot.rule import Reduction, Rule, Slot
from surefoot.rule.ops import BY_NAME
from surefoot.rule.passes import run_passes

REDUCTIONS = (Reduction("direction", "sum_of_squares", precise=True), Reduction("direction", "largest"))


def direction_rule():
    """Return a rule that measures `scale * exp_avg + param`."""
    graph = fx.Graph()
    param, _, exp_avg, scale = map(graph.placeholder, ("param", "grad", "exp_avg", "c_scale"))
    scale.meta["coefficient"] = "scale"
    product = graph.call_function(torch.mul, (exp_avg, scale))
    direction = graph.call_function(torch.add, (product, param))
    for node in graph.nodes:
        node.meta["source"] = __file__
    graph.output((param, exp_avg, direction, direction))
    run_passes(graph, 2)
    assert BY_NAME["mul"] in {node.target for node in graph.nodes}
    return Rule("Direction", (), (Slot("exp_avg"),), ("scale",), graph, REDUCTIONS)


@pytest.mark.parametrize("engine", [cpu, eager, foreach], ids=lambda engine: engine.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_slots_are_measured_by_coefficients(engine, dtype):
    torch.manual_seed(0)
    shapes = [(3, 4), (70_000,), (0,), (5, 6)]
    params, grads, slots = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(3))
    params[3], rule = params[3].t(), direction_rule()
    grads[3], slots[3] = grads[3].t(), slots[3].t().contiguous()
    bucket = Bucket(rule, params, grads, {}, slots=[slots])
    bucket.coefficients, bucket.row = [{"scale": 0.5}, {"scale": -2.0}], np.array([0, 1, 0, 1])
    before = [tensor.clone() for tensor in (*params, *slots)]
    engine.prepare(bucket)
    versions = [tensor._version for tensor in (*params, *slots)]
    found = engine.measure(bucket, rule)
    assert all(map(torch.equal, (*params, *slots), before))
    assert [tensor._version for tensor in (*params, *slots)] == versions
    for row, (param, slot, scale) in enumerate(zip(params, slots, (0.5, -2.0, 0.5, -2.0), strict=True)):
        exact = slot.double() * scale + param.double()
        assert found[row, 0].item() == pytest.approx(exact.square().sum().item(), rel=1e-5)
        assert found[row, 1].item() == pytest.approx(exact.abs().max().item() if exact.numel() else 0.0, rel=1e-5)
