"""surefoot.functional: what lists may hold, scalers, gradients through steps, and the pure form under torch.func."""

import copy

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call, grad, vmap

import surefoot
from conformance import ELEMENTWISE, ENGINES, ROWS, assert_close, cases, normals
from surefoot import functional

SGD = {"weight_decay": 0, "momentum": 0.9, "lr": 0.1, "dampening": 0.5, "nesterov": False, "maximize": False}
ADAM = {"amsgrad": False, "beta1": 0.9, "beta2": 0.99, "lr": 0.1, "weight_decay": 0.0, "eps": 1e-8, "maximize": False}


def tensors(count=2, shape=(3,)):
    normal = normals(torch.float32, seed=5)
    return [normal(*shape) for _ in range(count)]


def adam_state(params):
    return [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params], [], counts(params)


def counts(params):
    return [torch.tensor(0.0) for _ in params]


# Lists


def test_missing_momentum_buffers_are_put_into_the_list():
    params, buffers = tensors(), [None, None]
    first = [torch.ones(3), torch.full((3,), 2.0)]
    functional.sgd(params, first, buffers, **SGD)
    assert [buffer.tolist() for buffer in buffers] == [[1.0] * 3, [2.0] * 3]
    held = list(buffers)
    functional.sgd(params, first, buffers, **SGD)
    assert all(map(lambda one, other: one is other, buffers, held))
    assert buffers[0].tolist() == pytest.approx([0.9 + 0.5] * 3)


def test_a_parameter_without_gradient_stays():
    params, state = tensors(), adam_state(tensors())
    before = params[0].clone()
    functional.adam(params, [None, torch.ones(3)], *state, **ADAM)
    assert torch.equal(params[0], before)
    assert [step.item() for step in state[3]] == [0.0, 1.0]


def test_a_parameter_that_stands_there_twice_is_stepped_twice():
    param = torch.zeros(3)
    functional.sgd([param, param], [torch.ones(3)] * 2, [None, None], **{**SGD, "momentum": 0.0})
    assert param.tolist() == pytest.approx([-0.2] * 3)


def test_gradients_and_the_parameters_own_stay_as_they_are():
    param, given = torch.ones(3, requires_grad=True), torch.ones(3)
    param.grad = torch.full((3,), 7.0)
    functional.sgd([param], [given], [None], **{**SGD, "maximize": True})
    assert (param.grad.tolist(), given.tolist()) == ([7.0] * 3, [1.0] * 3)
    assert param.tolist() == pytest.approx([1.1] * 3)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_a_scaler_scales_and_skips(engine):
    plain, scaled = tensors(), tensors()
    states = adam_state(plain), adam_state(scaled)
    options = {**ADAM, **engine}
    functional.adam(plain, [torch.ones(3)] * 2, *states[0], **options)
    more = {**options, "grad_scale": torch.tensor(4.0)}
    functional.adam(scaled, [torch.full((3,), 4.0)] * 2, *states[1], **more, found_inf=torch.tensor(0.0))
    torch.testing.assert_close(scaled, plain)
    before = copy.deepcopy((scaled, states[1]))
    functional.adam(scaled, [torch.full((3,), torch.inf)] * 2, *states[1], **more, found_inf=torch.tensor(1.0))
    torch.testing.assert_close((scaled, states[1]), before, rtol=0, atol=0)


def test_a_skipped_first_step_leaves_no_buffer():
    params, buffers = tensors(), [None, None]
    functional.sgd(params, [torch.full((3,), torch.inf)] * 2, buffers, found_inf=torch.tensor(1.0), **SGD)
    assert buffers == [None, None]


def test_a_custom_step_is_scaled_and_skipped_too():
    options = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "nesterov": True, "ns_steps": 5, "eps": 1e-7}
    options |= {"ns_coefficients": (3.4445, -4.775, 2.0315), "adjust_lr_fn": None, "has_complex": False}
    [param] = tensors(1, (3, 4))
    functional.muon([param], [torch.ones(3, 4)], [torch.zeros(3, 4)], **options)
    factors = {"d": 1.0, "lr": 0.1, "beta2_decay": -0.8, "weight_decay": 0.0, "eps1": None, "eps2": 1e-3}
    results = []
    for scale in (1.0, 8.0):
        [param], state = tensors(1), ([None], [None], [torch.zeros(3)], [torch.tensor(0.0)])
        scaling = {"grad_scale": torch.tensor(scale), "found_inf": torch.tensor(0.0)}
        functional.adafactor([param], [torch.ones(3) * scale], *state, **scaling, **factors, maximize=False)
        results.append(param)
        before = param.clone()
        scaling["found_inf"] = torch.tensor(1.0)
        functional.adafactor([param], [torch.ones(3)], *state, **scaling, **factors, maximize=False)
        assert torch.equal(param, before)
        assert state[3][0].item() == 1.0
    torch.testing.assert_close(*results)


def test_sparse_gradients():
    options = {"lr": 0.1, "weight_decay": 0.0, "lr_decay": 0.0, "eps": 1e-10, "maximize": False}
    dense, sparse = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]).to_sparse(1)
    functional.adagrad([dense], [sparse], [torch.zeros(3, 2)], counts([dense]), has_sparse_grad=True, **options)
    assert dense.tolist() == [[0.0, 0.0], [pytest.approx(-0.1)] * 2, [0.0, 0.0]]
    ours, theirs = ([torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)] for _ in range(2))
    numbers = {"eps": 1e-8, "beta1": 0.9, "beta2": 0.99, "lr": 0.1, "maximize": False}
    for count in (1, 2):
        for function, (param, *state) in (
            (functional.sparse_adam, ours),
            (torch.optim._functional.sparse_adam, theirs),
        ):
            function([param], [sparse], *([each] for each in state), [count], **numbers)
    torch.testing.assert_close(ours, theirs)


def test_complex_parameters():
    param, state = torch.zeros(2, dtype=torch.complex64), [torch.zeros(2, dtype=torch.complex64) for _ in range(2)]
    functional.adam([param], [torch.full((2,), 1 - 1j)], *([each] for each in state), [], counts([param]), **ADAM)
    assert param.tolist() == pytest.approx([-0.1 + 0.1j] * 2)


def test_gradients_flow_through_steps_of_lists():
    def last(param, first, second):
        moved = param.clone()
        state = adam_state([moved])
        for gradient in (first, second):
            functional.adam([moved], [gradient], *state, differentiable=True, **{**ADAM, "lr": 0.01})
        return moved

    normal = normals(torch.float64, seed=2)
    assert gradcheck(last, [normal(3).requires_grad_() for _ in range(3)])


def test_a_step_under_autograd_records_nothing():
    param = torch.ones(3, requires_grad=True)
    functional.sgd([param], [torch.ones(3)], [None], foreach=False, **SGD)
    assert param.is_leaf
    assert param.tolist() == pytest.approx([0.9] * 3)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"grads": [torch.ones(3)]}, ValueError, "`grads` must have one entry for each of 2 params, but has 1"),
    ({"exp_avgs": []}, ValueError, "`exp_avgs` must have one entry for each of 2 params, but has 0"),
    ({"amsgrad": True}, ValueError, "`max_exp_avg_sqs` must have one entry for each of 2 params, but has 0"),
    ({"exp_avgs": [torch.zeros(3), None]}, ValueError, "`exp_avgs[1]` must be a tensor of shape (3,), but is None"),
    ({"state_steps": [0, 0]}, TypeError, "`state_steps[0]` must be a 0-d tensor, which the step updates in place, but"),
    ({"exp_avgs": [torch.zeros(3), torch.zeros(4)]}, RuntimeError, "state `exp_avg` of `params[1]` of shape (3,)"),
    ({"grads": [torch.ones(3), torch.ones(4)]}, RuntimeError, "the gradient of `params[1]` of shape (3,) has shape"),
    ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"foreach": True, "fused": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
])  # fmt: skip
def test_what_cannot_be_stepped_is_named_and_nothing_changes(change, error, message):
    params = tensors()
    names = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")
    given = dict(zip(names, adam_state(params), strict=True)) | {"grads": [torch.ones(3)] * 2} | ADAM | change
    before = copy.deepcopy(params)
    with pytest.raises(error) as raised:
        functional.adam(params, **given)
    assert message in str(raised.value)
    torch.testing.assert_close(params, before, rtol=0, atol=0)


def test_muon_refuses_what_is_no_matrix():
    options = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "nesterov": True, "ns_steps": 5, "eps": 1e-7}
    options |= {"ns_coefficients": (3.4445, -4.775, 2.0315), "adjust_lr_fn": None, "has_complex": False}
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        functional.muon(tensors(1), tensors(1), tensors(1), **options)


def test_sparse_adams_steps_are_counted_by_the_caller():
    sparse = torch.ones(3, 2).to_sparse(1)
    lists = [[torch.zeros(3, 2)] for _ in range(2)]
    numbers = {"eps": 1e-8, "beta1": 0.9, "beta2": 0.99, "lr": 0.1, "maximize": False}
    with pytest.raises(TypeError, match="`state_steps\\[0\\]` must be an int >= 1, the number of this step, but is 0"):
        functional.sparse_adam([torch.zeros(3, 2)], [sparse], *lists, [0], **numbers)


# The pure form

ONES = torch.ones(2)
CUSTOM = [row for row in ROWS if row.name in ("Adafactor", "Muon")]


def pure(row, options, params, steps, **more):
    """Take steps with the gradients given; return parameters and state."""
    state = functional.init(row.ours, params, **options)
    for grads in steps:
        params, state = functional.update(row.ours, params, grads, state, **options, **more)
    return params, state


@cases([*ELEMENTWISE, *CUSTOM], engines=["cpu"], only_flags=True)
def test_pure_steps_are_those_of_the_class(engine, row, options, record_property):
    normal = normals(torch.float32, seed=3)
    start = {"one": normal(3, 4), "other": normal(2, 2)}
    steps = [{name: normal(*param.shape) for name, param in start.items()} for _ in range(3)]
    before = copy.deepcopy((start, steps))
    params = {name: param.clone().requires_grad_() for name, param in start.items()}
    optimizer = row.ours(params.values(), **options)
    for grads in steps:
        for name, param in params.items():
            param.grad = grads[name]
        optimizer.step()
    for more in ({}, {"differentiable": True})[: 1 + row.elementwise]:
        found, state = pure(row, options, start, steps, **more)
        assert_close(found, {name: param.detach() for name, param in params.items()})
        for name, param in params.items():
            shared = {each.name: state[name].pop(each.name) for each in row.ours.group_scalars}
            assert {key: float(value) for key, value in shared.items()} == pytest.approx(
                {key: float(optimizer.param_groups[0][key]) for key in shared}, rel=1e-6
            )
            assert_close(state[name], dict(optimizer.state[param]))
    torch.testing.assert_close((start, steps), before, rtol=0, atol=0)
    record_property("compared", "functional: pure steps, to rounding with the class")


@cases(ELEMENTWISE, only_flags=True)
def test_pure_steps_can_be_transformed(row, options, record_property):
    """Mapped over models they are the steps of each; their derivative is that of autograd."""
    normal = normals(torch.float64, seed=3)
    params, steps = normal(3, 4), [normal(3, 4) for _ in range(3)]
    options = {**options, "foreach": False}  # what kernels make of it, the test above tells

    def last(param, *grads):
        return pure(row, options, [param], [[each] for each in grads])[0][0]

    mapped = vmap(last)(params, *steps)
    each = [last(param, *grads) for param, *grads in zip(params, *steps, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(each))
    ours = grad(lambda *given: last(*given).sum(), argnums=(0, 1))(params[0], *(g[0] for g in steps))
    leaves = [params[0].clone().requires_grad_(), steps[0][0].clone().requires_grad_()]
    through = pure(row, options, leaves[:1], [leaves[1:], *([g[0]] for g in steps[1:])], differentiable=True)[0][0]
    torch.testing.assert_close(
        ours, torch.autograd.grad(through.sum(), leaves, allow_unused=True, materialize_grads=True)
    )
    record_property("compared", "functional: pure steps under vmap and grad")


def test_a_learning_rate_is_searched_by_vmap_and_learnt_by_grad():
    model = torch.nn.Linear(3, 1)
    params = {name: param.detach() for name, param in model.named_parameters()}
    batch = torch.ones(4, 3)

    def loss_of(params):
        return functional_call(model, params, (batch,)).square().mean()

    def loss_after(lr):
        params_, state = params, functional.init(surefoot.Adam, params)
        for _ in range(3):
            params_, state = functional.update(surefoot.Adam, params_, grad(loss_of)(params_), state, lr=lr)
        return loss_of(params_)

    rates = torch.tensor([1e-4, 1e-3, 1e-2])
    losses = vmap(loss_after)(rates)
    torch.testing.assert_close(losses, torch.stack([loss_after(float(rate)) for rate in rates]))
    slope = grad(loss_after)(torch.tensor(1e-2, dtype=torch.float64))
    assert slope.item() == pytest.approx((loss_after(0.0101) - loss_after(0.0099)).item() / 2e-4, rel=0.02)


def test_options_around_the_update():
    params, grads = [torch.zeros(4)], [torch.full((4,), 5.0)]
    found, state = functional.update(surefoot.SGD, params, grads, [{}], lr=1.0, max_grad_norm=1.0, ema=0.9)
    assert found[0].tolist() == pytest.approx([-0.5] * 4)
    torch.testing.assert_close(state[0]["ema"], found[0])
    with pytest.warns(RuntimeWarning, match="was skipped since the gradients of `params\\[0\\]` hold inf or NaN"):
        found, state = functional.update(surefoot.SGD, params, [torch.full((4,), torch.nan)], [{}], nonfinite="skip")
    assert (found[0].tolist(), state) == ([0.0] * 4, [{}])


def test_what_is_missing_or_not_asked_for_stays():
    params = (torch.zeros(2), torch.ones(2, requires_grad=True))
    found, state = functional.update(surefoot.RMSprop, params, [None, torch.ones(2)], [{}, {}])
    assert isinstance(found, tuple)
    assert found[0] is params[0]
    assert found[1].requires_grad
    assert [sorted(entry) for entry in state] == [[], ["square_avg", "step"]]
    assert functional.init(surefoot.SGD, params, momentum=0.9) == ({}, {})


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: functional.init(surefoot.LBFGS, [torch.ones(2)]), TypeError, "`optimizer_class` must be a class of"),
    (lambda: functional.init(torch.optim.Adam, [torch.ones(2)]), TypeError, "`optimizer_class` must be a class of"),
    (lambda: functional.init(surefoot.Adam, torch.ones(2)), TypeError, "`params` must be a dict or a sequence of"),
    (lambda: functional.init(surefoot.Adam, [torch.ones(2)], lr=-1.0), ValueError, "Invalid learning rate: -1.0"),
    (lambda: functional.init(surefoot.Adam, [torch.ones(2)], telemetry=True), TypeError, "`telemetry` has no place"),
    (lambda: functional.init(surefoot.Adam, [torch.ones(2)], rate=1), TypeError, "unexpected keyword argument 'rate'"),
    (lambda: functional.update(surefoot.Adam, {"a": torch.ones(2)}, {"b": torch.ones(2)}, {"a": {}}), ValueError,
     "`grads` must be a dict with the names of `params`, but differs in a, b"),
    (lambda: functional.update(surefoot.Adam, [torch.ones(2)], [torch.ones(2)], {}), ValueError,
     "`state` must be a sequence with one entry for each of `params`, but is dict"),
    (lambda: functional.update(surefoot.Adam, {"a": torch.ones(2)}, {"a": torch.ones(3)}, {"a": {}}), RuntimeError,
     "the gradient of `a` of shape (2,) has shape (3,)"),
    (lambda: vmap(lambda p: functional.update(surefoot.Muon, [p], [p], [{}])[0][0])(torch.ones(2, 3, 3)), RuntimeError,
     "Muon cannot be transformed by torch.func: it has a custom step"),
    (lambda: vmap(lambda lr: functional.update(surefoot.Adafactor, [ONES], [ONES], [{}], lr=lr)[0][0])(ONES),
     RuntimeError, "Adafactor cannot be transformed by torch.func: it has a custom step"),
])  # fmt: skip
def test_what_the_pure_form_refuses(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
