"""What a step measures for telemetry, on every engine, against torch's own norms."""

import copy
import gc
import math
import warnings
import weakref

import pytest
import torch

import surefoot
from conformance import ENGINES, ROWS, gradients, groups, unclipped, zoo
from helpers import Noted
from surefoot.rule import Sparse
from surefoot.telemetry import Telemetry

COLUMNS = ("gradient", "parameter", "update", "largest", "nonfinite")
MEASURED = [row for row in ROWS if row.ours.supported_step_options() > {"ema"} and row.ours.sparse is not Sparse.ONLY]


def expected_of(params, before):
    found = {}
    for name, param in params.items():
        if param.grad is not None:
            grad, new = param.grad.double(), param.detach().double()
            largest = grad.abs().max().item() if grad.numel() else 0.0
            squares = [tensor.square().sum().item() for tensor in (grad, new, new - before[name].double())]
            found[name] = [*squares, largest, (~grad.isfinite()).sum().item()]
    return found


@pytest.mark.in_turn("engine")
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "ema": 0.9}], ids=["alone", "clipped"])
@pytest.mark.parametrize("engine", ["eager", "foreach", "cpu"])
@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row.name)
def test_a_step_measures_what_torch_does(row, engine, options):
    if engine not in row.engines([engine]) and engine != "eager":
        pytest.skip("a custom step has no engines")
    params = zoo(torch.float64, row.admits)
    optimizer = row.build(
        groups(params, named=True), unclipped(row) | options | {"telemetry": Noted()}, row.engines([engine])[0]
    )
    telemetry = optimizer.telemetry  # `build` copies its options
    for step in range(6):
        for name, grad in gradients(params, step, torch.float64).items():
            params[name].grad = grad
        before = {name: param.detach().clone() for name, param in params.items()}
        optimizer.step()
        raw, expected = telemetry.raw[step], expected_of(params, before)
        assert set(raw.names) == set(expected)
        for name, sums in zip(raw.names, raw.sums, strict=True):
            torch.testing.assert_close(sums, torch.tensor(expected[name], dtype=torch.float64), rtol=1e-7, atol=1e-12)
        norm = math.sqrt(sum(numbers[0] for numbers in expected.values()))
        clip = min(1.0, options.get("max_grad_norm", math.inf) / (norm + 1e-6))
        assert raw.clip == pytest.approx(clip)
        assert (raw.step, raw.skipped) == (step + 1, 0)
        assert raw.seconds > 0
        assert set(raw.lrs) == {optimizer.param_groups[0]["lr"]}


@pytest.mark.parametrize("engine", ["eager", "foreach", "cpu"])
def test_measuring_changes_nothing(engine):
    found = []
    for telemetry in (None, Telemetry(every=2)):
        params = zoo(torch.float32)
        optimizer = surefoot.AdamW(groups(params), telemetry=telemetry, **ENGINES[engine])
        for step in range(6):
            for name, grad in gradients(params, step, torch.float32).items():
                params[name].grad = grad
            optimizer.step()
        found.append([*params.values()])
    assert all(map(torch.equal, *found))


def test_strange_gradients_are_counted():
    params = [("a", torch.ones(5).requires_grad_()), ("b", torch.ones(3).requires_grad_())]
    telemetry = Noted()
    optimizer = surefoot.SGD(params, telemetry=telemetry, nonfinite="skip")
    for _, param in params:
        param.grad = torch.full_like(param, 2.0)
    params[0][1].grad[:2] = torch.tensor([math.nan, math.inf])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    (raw,) = telemetry.raw
    assert raw.sums[:, 4].tolist() == [2.0, 0.0]
    assert raw.sums[1].tolist() == [12.0, 3.0, 0.0, 2.0, 0.0]
    assert raw.skipped == 1


def test_sparse_gradients_are_measured():
    for cls in (surefoot.SGD, surefoot.SparseAdam):
        table, telemetry = torch.ones(5, 2, dtype=torch.float64).requires_grad_(), Noted()
        optimizer = cls([("table", table)], lr=0.5, telemetry=telemetry)
        table.grad = torch.sparse_coo_tensor([[0, 3, 3]], torch.ones(3, 2, dtype=torch.float64), (5, 2))
        before = table.detach().clone()
        optimizer.step()
        sums = telemetry.raw[0].sums[0]
        change, now = table.detach() - before, table.detach()
        expected = [2 * 1.0 + 2 * 4.0, now.square().sum(), change.square().sum(), 2.0, 0.0]
        torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64))


def test_only_what_is_wanted_is_measured():
    params = [("a.weight", torch.ones(5).requires_grad_()), ("b.weight", torch.ones(3).requires_grad_())]
    telemetry = Noted(parameters="b.*", every=3)
    optimizer = surefoot.AdamW(params, telemetry=telemetry)
    for _ in range(5):
        for _, param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert [raw.step for raw in telemetry.raw] == [1, 4]
    assert {raw.names for raw in telemetry.raw} == {("b.weight",)}
    assert "b.weight" in str(optimizer.telemetry.latest())


def test_learning_rates_are_those_of_the_groups():
    params = [torch.ones(3).requires_grad_() for _ in range(3)]
    groups = [{"params": [("a", params[0]), ("b", params[1])]}, {"params": [("c", params[2])], "lr": 0.5}]
    optimizer = surefoot.SGD(groups, lr=0.1, telemetry=Telemetry(parameters=["b", "c"]))
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.telemetry.latest().lrs.tolist() == [0.1, 0.5]
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert optimizer.telemetry.latest().lrs.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Muon])
def test_names_that_are_changed_later_count(cls):
    params = [(name, torch.ones(3, 3).requires_grad_()) for name in "ab"]
    optimizer = cls(params, telemetry=True)
    names = []
    for step in range(4):
        for _, param in params:
            param.grad = torch.ones(3, 3)
        if step == 2:
            optimizer.param_groups[0]["param_names"][1] = "new"
        optimizer.step()
        names.append(optimizer.telemetry.latest().names)
    assert names == [("a", "b"), ("a", "b"), ("a", "new"), ("a", "new")]
    assert names[0] is names[1]  # records share their names
    assert names[2] is names[3]


@pytest.mark.parametrize("cls", [surefoot.AdamW, surefoot.Muon])
def test_parameters_that_were_removed_are_let_go(cls):
    stays, goes = torch.ones(3, 3).requires_grad_(), torch.ones(3, 3).requires_grad_()
    optimizer = cls([("stays", stays), ("goes", goes)], telemetry=Telemetry(every=2), nonfinite="skip")
    stays.grad, goes.grad = torch.ones(3, 3), torch.full((3, 3), math.nan)
    with pytest.warns(RuntimeWarning, match="the gradients of `goes` hold inf or NaN"):
        optimizer.step()
    gone = weakref.ref(goes)
    group = optimizer.param_groups[0]
    group["params"], group["param_names"] = [stays], ["stays"]
    optimizer.state.pop(goes, None)
    del goes
    optimizer.step()
    gc.collect()
    assert gone() is None


def test_telemetry_is_checked_and_copied():
    param = torch.ones(2).requires_grad_()
    with pytest.raises(TypeError, match="`telemetry` must be True, False, None or a surefoot.telemetry.Telemetry, but"):
        surefoot.SGD([param], telemetry="yes")
    with pytest.raises(AttributeError, match="SGD measures nothing: make it with `telemetry=True`"):
        _ = surefoot.SGD([param]).telemetry
    optimizer = surefoot.SGD([param], telemetry=True)
    copied = copy.deepcopy(optimizer)
    assert isinstance(copied.telemetry, Telemetry)
    assert copied.telemetry is not optimizer.telemetry


def test_a_callback_that_raises_leaves_a_whole_step():
    def stop(record):
        raise StopIteration

    param = torch.ones(3).requires_grad_()
    optimizer = surefoot.SGD([param], lr=1.0, telemetry=Telemetry(callbacks=[stop]), zero_grad_after_step=True)
    param.grad = torch.ones(3)
    with pytest.raises(StopIteration):
        optimizer.step()
    assert param.tolist() == [0.0] * 3
    assert param.grad is None
    assert optimizer._stepping.context.slices == []
