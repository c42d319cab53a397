"""Promise 1, same answers: every row of the conformance table against its oracle, engine by engine.

Not tested here, because it needs a GPU: `capturable=True`; see engines/test_gpu.py.  The flag sets that torch's
database has for it are tried without it.
"""

import inspect

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import surefoot
from conformance import (
    DENSE,
    ELEMENTWISE,
    ENGINES,
    FLAGS,
    ROWS,
    SPARSE,
    STEADY,
    Options,
    Params,
    Row,
    assert_close,
    assert_same,
    cases,
    each_engine,
    each_row,
    groups,
    normals,
    once,
    results,
    train,
    unclipped,
    zoo,
)
from surefoot.rule import DIRECTED

OTHERS = [name for name in ENGINES if name != "eager"]
LISTED = ["eager", "foreach"]
"""Engines that go by torch's operations: what these make of a dtype does not depend on which of two flags is set."""


def dtypes(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", [pytest.param(getattr(torch, name), id=name) for name in names])


def with_lr(row: Row, options: Options, kind: str) -> Options:
    """Return the learning rate as a number or as a tensor."""
    lr = float(options.get("lr", row.defaults["lr"]))
    return {**options, "lr": torch.tensor(lr) if kind == "tensor" else lr}


def in_numbers(value):
    """Replace hyperparameters that are tensors by numbers."""
    if isinstance(value, dict):
        return {name: in_numbers(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(in_numbers, value))
    return value.item() if isinstance(value, Tensor) else value


FEW = ("0-d", "matrix", "long", "channels_last", "offset view", "late")
"""Parameters that what lies between no flags and all of them is tried with."""


def zoo_for(row: Row, options: Options, dtype: torch.dtype) -> Params:
    """Make parameters of every kind for the defaults and for all flags, of a few kinds for what lies between."""
    params = zoo(dtype, row.admits)
    whole = row.completed(options) in map(row.completed, ({}, row.all_flags()))
    return {name: param for name, param in params.items() if whole or name in FEW}


OWN_FLAGS = {"Muon": ("normuon",)}
"""Those that the oracle has not: the algorithm's own tests try them."""


def test_every_optimizer_has_one_row():
    assert sorted(row.name for row in ROWS) == sorted(surefoot.optimizers.__all__)


@each_row(ROWS)
def test_every_flag_of_a_class_is_tried(row):
    by_group = {flag for flag in row.ours.flags if flag in row.defaults}
    assert by_group <= {*FLAGS, *OWN_FLAGS.get(row.name, ())}
    # Others are options of the step, or settled by a parameter.
    assert set(row.ours.flags) - by_group <= {*DIRECTED, "vector"}


# The eager engine: the bits of torch's for-loop


@pytest.mark.in_turn("dtype")
@pytest.mark.parametrize(
    ("dtype", "lr"),
    [
        pytest.param(torch.float32, "number", id="float32-number"),
        pytest.param(torch.float32, "tensor", id="float32-tensor"),
        pytest.param(torch.float64, "number", id="float64-number"),
        pytest.param(torch.float64, "tensor", id="float64-tensor"),
    ],
)
@cases(DENSE)
def test_eager_has_the_bits_of_the_for_loop(row, options, dtype, lr, record_property):
    ours, theirs = (zoo_for(row, options, dtype) for _ in range(2))
    options = with_lr(row, options, lr)
    optimizer, oracle = (
        row.build(groups(ours), options, row.engines(["eager"])[0]),
        row.build_oracle(groups(theirs), options),
    )
    train(optimizer, ours, dtype)
    train(oracle, theirs, dtype)
    equal = assert_same if row.exact else assert_close
    equal(results(optimizer, ours), results(oracle, theirs))
    record_property("compared", f"eager: {'same bits as' if equal is assert_same else 'to rounding with'} the for-loop")


# What evaluates the model itself


@cases([row for row in ROWS if row.needs_closure])
def test_with_a_closure_it_goes_the_way_of_torch(row, options, record_property):
    ways = []
    for build in (row.build, row.build_oracle):
        params = {
            name: param for name, param in zoo(torch.float64).items() if name in ("0-d", "odd", "matrix", "never")
        }
        optimizer = build(params.values(), options)

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum(((1 - param) ** 2 + (param**2 - param.detach().mean()) ** 2).sum() for param in params.values())
            loss = -loss if options.get("maximize") else loss  # it has a minimum only
            loss.backward()
            params["never"].grad = None
            return loss

        losses = {f"loss {step}": optimizer.step(closure).detach() for step in range(3)}
        ways.append({name: param.detach() for name, param in params.items()} | losses)
    assert_close(*ways, rtol=1e-6, atol=1e-8)
    record_property("compared", "default: with a closure, to rounding with torch")


# The other engines: no farther from float64 than torch's own


@cases(ELEMENTWISE, engines=OTHERS, in_turn=OTHERS)
def test_an_engine_is_no_farther_from_float64_than_torch(engine, row, options, record_property):
    """The slack is for chance.

    Over the 22 000 elements that are compared, equally good orders of operations differ by less than 5 % in the root
    mean square of their distances; the maximum hangs on one element.
    """
    options = in_numbers(options)
    ours = zoo_for(row, options, torch.float32)
    optimizer = row.build(groups(ours), options, engine)
    train(optimizer, ours, torch.float32)
    truth, allowed = once(truth_and_rival, row, options)
    distance = flat(results(optimizer, ours)) - truth
    assert torch.equal(distance.isnan(), allowed.isnan())
    distance, allowed = distance.nan_to_num(), allowed.nan_to_num()
    # Kernels round at other places, which is better or worse by chance.
    mean_slack, worst_slack = (1.1, 1.5) if engine == "cpu" else (1.05, 1.25)
    if row.reduces:  # one number that is rounded moves a whole tensor
        mean_slack, worst_slack = 1.3, 1.6
    assert distance.square().mean().sqrt() <= mean_slack * allowed.square().mean().sqrt()
    assert distance.abs().max() <= worst_slack * allowed.abs().max()
    record_property("compared", f"{engine}: no farther from float64 than torch's foreach (ASGD: for-loop)")


def truth_and_rival(row, options):
    """Return what the for-loop makes in float64, as one vector, and how far from it torch's foreach is in float32."""
    theirs = zoo_for(row, options, torch.float32)
    exact = {name: param.detach().double().requires_grad_() for name, param in theirs.items()}
    oracle = row.build_oracle(groups(exact), options)
    # torch's foreach ASGD keeps part of its state in the wrong precision, so its for-loop is the measure.
    rival = row.build_oracle(groups(theirs), options, foreach=row.oracle is not torch.optim.ASGD)
    train(rival, theirs, torch.float32, plain=True)
    train(oracle, exact, torch.float32)
    truth = flat(results(oracle, exact))
    return truth, flat(results(rival, theirs)) - truth


def by_the_loop(row, options, dtype):
    """Return what the for-loop makes of parameters of every kind."""
    params = zoo(dtype, row.admits)
    oracle = row.build_oracle(groups(params), options)
    train(oracle, params, dtype)
    return results(oracle, params)


def flat(found):
    """Return all parameters and state as one vector."""
    return torch.cat([value.detach().double().flatten() for _, value in sorted(found.items())])


WITH_OTHERS = [row for row in DENSE if row.engines(OTHERS) != ["default"]]


@cases(WITH_OTHERS, engines=OTHERS, only_flags=True, ends=True, in_turn=OTHERS)
def test_an_engine_agrees_with_the_for_loop_in_float64(engine, row, options, record_property):
    """And with a learning rate that is a tensor, which torch's foreach mostly does not take."""
    options = with_lr(row, options, "tensor")
    ours = zoo(torch.float64, row.admits)
    optimizer = row.build(groups(ours), options, engine)
    train(optimizer, ours, torch.float64)
    tolerance = 1e-6 if row.ours is surefoot.Adafactor else 1e-11  # torch computes its sizes in the dtype of the tensor
    expected = once(by_the_loop, row, options, torch.float64)
    assert_close(results(optimizer, ours), expected, rtol=tolerance, atol=tolerance)
    record_property("compared", f"{engine}: to rounding with the for-loop, float64")


# Numbers that are no ordinary numbers


def special_values(dtype):
    info = torch.finfo(dtype)
    finite = [0.0, -0.0, 1.0, -1.5, 1e-20, info.tiny, -info.tiny / 4, info.tiny * info.eps, info.max, -info.max / 3]
    return torch.tensor([*finite, torch.inf, -torch.inf, torch.nan], dtype=dtype)


@pytest.mark.in_turn("dtype")
@dtypes("float32", "float64")
@cases(ELEMENTWISE, engines=ENGINES, only_flags=True, in_turn=LISTED)
def test_nan_inf_denormals_and_signed_zero(engine, row, options, dtype, record_property):
    """Every special value as a parameter meets every special value as a gradient, and others in the steps after."""
    values = special_values(dtype)
    ours, theirs = ({"all": values.repeat_interleave(len(values)).requires_grad_()} for _ in range(2))
    optimizer, oracle = row.build(groups(ours), options, engine), row.build_oracle(groups(theirs), options)
    # Fused multiplication and addition rounds a sum of denormals once, and may so find a zero of the other sign.
    normal = ~((values != 0) & (values.abs() < torch.finfo(dtype).tiny)) | torch.tensor(engine != "cpu")
    signed = normal.repeat_interleave(len(values))
    for step in range(4):
        signed = signed & normal.roll(3 * step).repeat(len(values))
        for params in (ours, theirs):
            params["all"].grad = values.roll(3 * step).repeat(len(values))
        optimizer.step()
        oracle.step()
        actual, expected = results(optimizer, ours), results(oracle, theirs)
        if engine == "eager" and row.exact:
            assert_same(actual, expected)
        else:
            assert_close(actual, expected)
            zeros = {
                n: (value == 0) & (actual[n] == 0) & (signed if value.dim() else True) for n, value in expected.items()
            }
            signs = [{name: found[name][zeros[name]] for name in zeros} for found in (actual, expected)]
            (assert_same if row.exact else assert_close)(*signs)  # of what cancels the sign depends on the order
    record_property("compared", f"{engine}: NaN, inf, denormals and signed zero, with the for-loop")


# 16-bit and complex parameters


@pytest.mark.in_turn("dtype")
@dtypes("float16", "bfloat16")
@cases(ELEMENTWISE, engines=ENGINES, only_flags=True, ends=True, in_turn=LISTED)
def test_16_bit_parameters_are_computed_in_float32_and_rounded_once(engine, row, options, dtype, record_property):
    # State starts at numbers that 16 bits hold.
    begins = {name: 0.125 for name in row.defaults if name.startswith("initial_accumulator")}
    options = {**options, "lr": 2**-8} | begins
    ours = zoo(dtype)
    wide = {name: param.detach().float().requires_grad_() for name, param in ours.items()}
    optimizer, oracle = row.build(groups(ours), options, engine), row.build_oracle(groups(wide), options)
    for step in (1, 2, STEADY, STEADY + 1):
        train(optimizer, ours, dtype, steps=[step])
        train(oracle, wide, dtype, steps=[step])
        actual, computed = row.slots_of(results(optimizer, ours)), row.slots_of(results(oracle, wide))
        slow = {
            name for slot in row.ours.slots if slot.slow for name in computed if name.startswith(f"{slot.name} of ")
        }
        expected = {n: value.to(actual[n].dtype) for n, value in computed.items() if n not in slow}
        nearest = {name: value for name, value in actual.items() if name not in slow}
        if engine == "eager" and row.exact:
            assert_same(nearest, expected)
        else:  # what differs in the last bit of float32 may round to either neighbour
            assert_close(nearest, expected, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
            assert (flat(nearest) == flat(expected)).double().mean() > 0.99
        for name in slow:  # rounded to one of two neighbours at random
            found, sizes = actual[name].float(), computed[name].abs()
            between = sizes * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
            if engine == "cpu" or not row.exact:  # which fuses operations: of terms that cancel another rest is left
                between += torch.finfo(torch.float32).eps * torch.cat([sizes.flatten(), torch.zeros(1)]).max()
            overflows = (found == computed[name].to(dtype).float()) | (found.isnan() & computed[name].isnan())
            assert (overflows | ((found - computed[name]).abs() <= between)).all()
        for name, value in actual.items():
            computed[name].copy_(value)
    record_property("compared", f"{engine}: 16-bit parameters, with float32 rounded once a step")


@pytest.mark.in_turn("dtype")
@dtypes("complex64", "complex128")
@cases(ELEMENTWISE, engines=ENGINES, only_flags=True, ends=True, in_turn=LISTED)
def test_complex_parameters(engine, row, options, dtype, record_property):
    ours = zoo(dtype)
    optimizer = row.build(groups(ours), options, engine)
    train(optimizer, ours, dtype)
    tolerance = (64 if row.exact else 1e5) * torch.finfo(dtype).eps  # numbers of an update round at other places
    assert_close(results(optimizer, ours), once(by_the_loop, row, options, dtype), rtol=tolerance, atol=tolerance)
    record_property("compared", f"{engine}: complex parameters, to rounding with the for-loop")


@each_row(DENSE)
def test_complex_parameters_are_refused_by_those_that_cannot_take_them(row):
    param = torch.ones(2, 2, dtype=torch.complex64, requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = row.build([param], {})
    if row.ours.complex_params:
        optimizer.step()
    else:
        with pytest.raises(RuntimeError, match=f"{row.name} does not support complex parameters"):
            optimizer.step()


# Steps that carry gradients


def differentiable(row, options, param, *grads):
    """Take a step for each gradient; give the parameter and its state."""
    param = param.clone()
    optimizer = row.ours([param], **options, differentiable=True)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return {"param": param, **optimizer.state[param]}


@cases(ELEMENTWISE)
def test_differentiable_has_the_same_bits(row, options, record_property):
    options = in_numbers(
        options
    )  # tensors take part in the arithmetic, in their own dtype, so that gradients reach them
    normal = normals(torch.float32, seed=1)
    param, *grads = (normal(40) for _ in range(4))
    plain = param.clone().requires_grad_()
    optimizer = row.build([plain], options, "eager")
    for grad in grads:
        plain.grad = grad
        optimizer.step()
    actual = differentiable(row, options, param.requires_grad_(), *grads)
    equal = assert_close if row.ours.group_scalars else assert_same  # a number that carries gradients is a tensor here
    equal({name: value.detach() for name, value in actual.items()}, {"param": plain, **optimizer.state[plain]})
    assert actual["param"].requires_grad
    record_property("compared", "differentiable: same bits as eager")


RANDOMLY = {"fast_mode": True, "check_undefined_grad": False}
"""How to check gradients in random directions, not element by element."""


def carried(found):
    """Return what gradients may flow to."""
    return tuple(value for value in found.values() if value.requires_grad)


@cases(ELEMENTWISE, only_flags=True)
def test_gradients_flow_through_steps(row, options, record_property):
    """From the first parameter and the gradients of three steps to the last parameter and its state."""
    normal = normals(torch.float64, seed=2)
    inputs = [normal(3).requires_grad_() for _ in range(4)]
    options = options | unclipped(row)
    assert gradcheck(lambda *tensors: carried(differentiable(row, options, *tensors)), inputs, **RANDOMLY)
    record_property("compared", "differentiable: gradcheck through three steps")


TUNED = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "momentum": 0.8,
    "betas": (0.8, 0.9, 0.7),
    "rho": 0.8,
    "alpha": 0.8,
    "eps": 1e-3,
}


def tunable():
    for row in ELEMENTWISE:
        for name in sorted(TUNED.keys() & row.defaults.keys()):
            yield row, name


@pytest.mark.parametrize("cls", [surefoot.SGD, surefoot.Adam])
def test_tensors_that_require_gradients_are_checked_in_silence(cls):
    """Torch warns, as a rule once, when such a tensor is read as a number."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        cls([torch.ones(2, requires_grad=True)], lr=torch.tensor(0.1, requires_grad=True))
    finally:
        torch.set_warn_always(always)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # the test above looks at this
@pytest.mark.parametrize(("row", "name"), [pytest.param(row, name, id=f"{row.name}-{name}") for row, name in tunable()])
def test_gradients_flow_to_hyperparameters(row, name):
    """As far as a hyperparameter acts at once, not through a number that is kept in the state."""
    normal = normals(torch.float64, seed=3)
    start, *grads = (normal(3) for _ in range(4))
    default = row.defaults[name]
    values = TUNED[name][: len(default)] if isinstance(default, tuple) else (TUNED[name],)
    options = {
        other: TUNED[other] for other in ("momentum", "weight_decay") if other in inspect.signature(row.ours).parameters
    } | unclipped(row)

    def last(*tensors):
        value = tensors if isinstance(default, tuple) else tensors[0]
        return differentiable(row, {**options, name: value}, start.clone().requires_grad_(), *grads)["param"]

    inputs = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]
    assert gradcheck(last, inputs, **RANDOMLY)


# Sparse gradients

LAYOUTS = {
    "rows": ((10, 3), 1, 6),
    "elements": ((5, 7), 2, 20),
    "hybrid": ((4, 5, 3), 2, 12),
    "vector": ((50,), 1, 9),
    "nothing": ((10, 3), 1, 0),
}


def sparse_gradient(shape, sparse_dims, count, seed, dtype):
    """Make a gradient whose indices recur and are not sorted."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randint(0, size, (count,), generator=generator) for size in shape[:sparse_dims]])
    values = torch.randn((count, *shape[sparse_dims:]), dtype=dtype, generator=generator)
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@cases(SPARSE, engines=ENGINES, only_flags=True)
def test_sparse_gradients(engine, row, options, layout, record_property):
    """Repeated indices in some steps, sorted ones in others."""
    options = {name: value for name, value in options.items() if name != "weight_decay"}
    shape, sparse_dims, count = LAYOUTS[layout]
    ours, theirs = ({"sparse": normals(torch.float32, seed=4)(*shape).requires_grad_()} for _ in range(2))
    optimizer, oracle = row.build(groups(ours), options, engine), row.build_oracle(groups(theirs), options)
    for step in range(4):
        for params in (ours, theirs):
            grad = sparse_gradient(shape, sparse_dims, count, step, torch.float32)
            params["sparse"].grad = grad.coalesce() if step % 2 else grad
        optimizer.step()
        oracle.step()
    expected = {name: dense(value) for name, value in results(oracle, theirs).items()}
    assert_close(results(optimizer, ours), expected, rtol=1e-5, atol=1e-6)
    record_property("compared", f"{engine}: sparse gradients, to rounding with torch")


def dense(value):
    return value.to_dense() if isinstance(value, Tensor) and value.is_sparse else value


@each_row([row for row in ROWS if not row.needs_closure])
def test_sparse_gradients_are_refused_by_those_that_cannot_take_them(row):
    param = torch.ones(4, 3, requires_grad=True)
    param.grad = sparse_gradient((4, 3), 1, 2, 0, torch.float32)
    optimizer = row.build([param], {})
    if row in SPARSE:
        optimizer.step()
        return
    advice = ", please consider SparseAdam instead" if issubclass(row.ours, surefoot.Adam) else ""
    with pytest.raises(RuntimeError, match=f"^{row.name} does not support sparse gradients{advice}"):
        optimizer.step()


def test_sparse_adam_refuses_dense_gradients():
    param = torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    with pytest.raises(
        RuntimeError, match="^SparseAdam does not support dense gradients, please consider Adam instead"
    ):
        surefoot.SparseAdam([param]).step()


@each_engine
@pytest.mark.parametrize("cls", [surefoot.SGD, surefoot.Adagrad])
def test_sparse_gradients_with_weight_decay_are_refused(cls, engine):
    param = torch.ones(4, 3, requires_grad=True)
    param.grad = sparse_gradient((4, 3), 1, 2, 0, torch.float32)
    with pytest.raises(RuntimeError, match="^weight_decay option is not compatible with sparse gradients"):
        cls([param], weight_decay=0.1, **ENGINES[engine]).step()
