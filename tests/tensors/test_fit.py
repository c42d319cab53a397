"""What does not fit its parameter is refused by name, on every engine, before anything has changed."""

import warnings

import numpy as np
import pytest
import torch

import surefoot
from conformance import DENSE, each_row
from helpers import assert_same, set_grads, snapshot, train
from surefoot.swa_utils import AveragedModel, get_ema_multi_avg_fn

SHAPES = ((3, 4), (5, 2))


def started(row, engine, options=None, dtype=torch.float32):
    """An optimizer that has taken two steps, so that its engine keeps what it can, and has gradients for the next."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]
    engine = row.engines([engine])[0]
    optimizer = row.build(params, row.all_flags() if options is None else options, engine)
    return prepared(train(optimizer, steps=2)), params


def prepared(optimizer):
    set_grads(optimizer, 7)
    return optimizer


def resized(tensor, size):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(size)
    return tensor


UNFIT = {
    "complex": lambda t: t.to(torch.complex64),
    "integer": lambda t: t.to(torch.int8),
    "broadcastable": lambda t: t[:1],
    "larger": lambda t: torch.cat([t, t]),
    "other order": lambda t: t.t(),
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "elsewhere": lambda t: t.to("meta"),
    "no memory": lambda t: resized(t, 0),
    "too little memory": lambda t: resized(t, 4),
}
UNFIT_STATE = UNFIT | {
    "expanded": lambda t: t[:1].expand(t.shape),
    "list": lambda t: t.tolist(),
    "array": lambda t: t.numpy().copy(),
}
engines = pytest.mark.parametrize("engine", ["eager", "foreach", "cpu"])


def assert_refused(optimizer, match, kind=RuntimeError):
    before = comparable_snapshot(optimizer)
    with pytest.raises(kind, match=match):
        optimizer.step()
    assert_same(comparable_snapshot(optimizer), before)


def comparable_snapshot(optimizer):
    """Copy parameters and state, but for what cannot be compared."""
    state = optimizer.state
    odd = {p: {k: v for k, v in entry.items() if not comparable(v)} for p, entry in state.items()}
    for param, entries in odd.items():
        for name in entries:
            del state[param][name]
    try:
        return snapshot(optimizer)
    finally:
        for param, entries in odd.items():
            state[param].update(entries)


def comparable(value):
    if not isinstance(value, torch.Tensor):
        return isinstance(value, (int, float))
    return (
        not value.is_nested
        and value.layout is torch.strided
        and not value.is_meta
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


@pytest.mark.in_turn("engine")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@each_row([row for row in DENSE if row.ours.slots])
@engines
def test_state_that_does_not_fit_its_parameter(engine, row):
    optimizer, params = started(row, engine)
    entry = optimizer.state[params[1]]
    names = [slot.name for slot in row.ours.slots if entry.get(slot.name) is not None]
    for name in names:
        value = entry[name]
        for kind, make in UNFIT_STATE.items():
            if value.dim() != 2 or (min(value.shape) == 1 and kind in ("broadcastable", "other order", "expanded")):
                continue
            if kind == "other order" and make(value).shape == value.shape:  # a square one
                continue
            entry[name] = make(value)
            assert_refused(optimizer, rf"^state `{name}` of `params\[1\]` of shape \(5, 2\)")
        entry[name] = value
    optimizer.step()


@pytest.mark.in_turn("engine")
@each_row(DENSE)
@engines
def test_gradients_that_do_not_fit_their_parameter(engine, row):
    optimizer, params = started(row, engine)
    for kind, make in UNFIT.items():
        if kind in ("sparse", "nested", "elsewhere"):  # the first has its own message, the others cannot be set
            continue
        set_grads(optimizer, 7)
        grad = make(params[1].grad)
        params[1].grad = None
        shape, dtype = params[1].shape, params[1].dtype
        # Torch checks a gradient when it is set; hooks and other libraries get past it by changing the parameter.
        data = params[1].data
        params[1].requires_grad_(False).data = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        params[1].grad = grad
        params[1].data = data
        params[1].requires_grad_()
        assert (params[1].shape, params[1].dtype) == (shape, dtype)
        assert_refused(optimizer, r"^the gradient of `params\[1\]` of shape \(5, 2\)")
    set_grads(optimizer, 7)
    optimizer.step()


@pytest.mark.in_turn("engine")
@each_row(DENSE)
@engines
@pytest.mark.parametrize("kind", ["complex", "integer", "expanded", "resized"])
def test_parameters_that_became_something_else(engine, row, kind):
    optimizer, params = started(row, engine)
    param, name = params[1], r"`params\[1\]` of shape \(5, 2\)"
    if kind == "complex":
        param.data = param.data.to(torch.complex64)
        what = rf"{name}"
    elif kind == "integer":
        param.requires_grad_(False)
        param.data = param.data.to(torch.int64)
        what = rf"^{name} is torch.int64; only floating point and complex"
    elif kind == "expanded":
        param.data = param.data[:1].expand(5, 2)
        what = rf"^{name} has several elements at a single memory location"
    else:
        param.data = param.data.clone()
        param.untyped_storage().resize_(20)
        what = rf"^{name} has lost memory: its storage has been resized to 20 bytes"
        with pytest.raises(RuntimeError, match=what):
            optimizer.step()
        return
    assert_refused(optimizer, what)


@pytest.mark.in_turn("engine")
@each_row([row for row in DENSE if row.ours.complex_params and row.ours.is_rule()])
@engines
def test_a_model_that_became_complex(engine, row):
    """Its state stays real, and was taken for twice as many elements."""
    optimizer, params = started(row, engine)
    module = torch.nn.ParameterList(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex modules are new, says torch
        module.to(torch.complex64)
    for param in params:
        param.grad = torch.ones_like(param)
    if any(row.ours.slots):
        assert_refused(optimizer, "must be complex as the parameter is torch.complex64|must be complex")
    optimizer.state.clear()
    optimizer.step()
    assert all(param.is_complex() for param in params)


@pytest.mark.parametrize("to", [0, 16, 4 * 8192 - 4])
@pytest.mark.parametrize("of", ["param", "state", "gradient", "average"])
@pytest.mark.parametrize("looking", ["compiled", "plain"])
def test_a_storage_that_came_back_smaller_at_the_same_address(of, to, looking, monkeypatch):
    if looking == "plain":
        monkeypatch.setattr("surefoot.tensors.native.guards.available", lambda: False)
    params = [torch.nn.Parameter(torch.ones(8192)) for _ in range(3)]
    optimizer = surefoot.Adam(params, ema=0.9)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones(8192)
        optimizer.step()
    for param in params:
        param.grad = torch.ones(8192)
    entry = optimizer.state[params[2]]
    lost = {"param": params[2], "state": entry["exp_avg"], "gradient": params[2].grad, "average": entry["ema"]}[of]
    storage, address = lost.untyped_storage(), lost.data_ptr()
    storage.resize_(to)
    if to:
        assert lost.data_ptr() == address or of, "a smaller storage may stand at the same address"
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"`params\[2\]` of shape \(8192,\).* has lost memory"):
        optimizer.step()
    assert torch.equal(params[0], before)


OVERLAPPING = {
    "shifted": lambda base: (base[:6], base[3:9]),
    "the same": lambda base: (base[:6], base[:6]),
    "interleaved": lambda base: (base[0:9:2], base[0:9:4]),
}


@pytest.mark.parametrize("views", OVERLAPPING)
def test_parameters_that_overlap_are_stepped_one_by_one(views):
    results = []
    eager = {"foreach": False}
    for kind, options in ((torch.optim.AdamW, eager), (surefoot.AdamW, {}), (surefoot.AdamW, eager)):
        base = torch.arange(10.0)
        params = [torch.nn.Parameter(view) for view in OVERLAPPING[views](base)]
        optimizer = kind(params, lr=0.1, **options)
        for number in range(4):
            for param in params:
                param.grad = torch.full_like(param, 1.0 + number)
            optimizer.step()
        results.append(base)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
def test_overlapping_parameters_are_refused_by_engines_that_update_all_at_once(options):
    base = torch.arange(10.0)
    params = [torch.nn.Parameter(base[:6]), torch.nn.Parameter(base[3:9])]
    for param in params:
        param.grad = torch.ones(6)
    with pytest.raises(RuntimeError, match="share memory"):
        surefoot.SGD(params, **options).step()
    assert torch.equal(base, torch.arange(10.0))


@engines
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("whose", [0, 1])
def test_gradients_that_a_step_would_write_are_refused(engine, late, whose):
    row = next(row for row in DENSE if row.name == "AdamW")
    params = [torch.nn.Parameter(torch.ones(6)) for _ in range(2)]
    optimizer = row.build(params, {}, engine)
    for _ in range(2 * late):
        train(optimizer, steps=1)
    set_grads(optimizer, 3)
    params[0].grad = params[whose].detach()
    assert_refused(optimizer, r"^the gradient of `params\[0\]` .* shares memory with parameters or state")


# Averages


AVERAGES = {
    "longer value": (lambda: [torch.zeros(4)], lambda: [torch.ones(5)]),
    "shorter value": (lambda: [torch.zeros(4)], lambda: [torch.ones(1)]),
    "complex value": (lambda: [torch.zeros(4)], lambda: [torch.ones(4, dtype=torch.complex64)]),
    "real value": (lambda: [torch.zeros(4, dtype=torch.complex64)], lambda: [torch.ones(4)]),
    "value without memory": (lambda: [torch.zeros(4)], lambda: [resized(torch.ones(4), 4)]),
    "average without memory": (lambda: [resized(torch.zeros(4), 4)], lambda: [torch.ones(4)]),
    "expanded average": (lambda: [torch.zeros(1).expand(4)], lambda: [torch.ones(4)]),
    "integers of another shape": (lambda: [torch.zeros(4, dtype=torch.int64)], lambda: [torch.ones(1)]),
}


@pytest.mark.parametrize("case", AVERAGES)
def test_averages_of_what_does_not_fit(case):
    averages, values = (make() for make in AVERAGES[case])
    first = torch.zeros(3)
    with pytest.raises((ValueError, RuntimeError), match="(value|average) 1 "):
        get_ema_multi_avg_fn()([first, *averages], [torch.ones(3), *values], 1)
    assert torch.equal(first, torch.zeros(3))


@pytest.mark.parametrize("of", ["average", "model"])
def test_an_averaged_model_whose_storage_has_shrunk(of):
    model = torch.nn.Linear(64, 64)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn())
    for _ in range(3):
        averaged.update_parameters(model)
    (averaged.module if of == "average" else model).weight.untyped_storage().resize_(1000)
    with pytest.raises(RuntimeError, match="(value|average) 0 .*has lost memory"):
        averaged.update_parameters(model)


def test_scalar_state_that_is_no_number():
    for value in (torch.ones(2), [1], None, torch.ones((), dtype=torch.complex64), "one"):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = surefoot.Adam([param])
        train(optimizer, steps=2)
        optimizer.state[param]["step"] = value
        set_grads(optimizer, 1)
        before = param.detach().clone()
        with pytest.raises(
            TypeError, match=r"state `step` must be a number or a tensor of one element, but is .*params\[0\]"
        ):
            optimizer.step()
        assert torch.equal(param, before)
    optimizer.state[param]["step"] = np.float64(3.0)
    optimizer.step()
    assert optimizer.state[param]["step"] == 4
