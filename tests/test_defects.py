"""Defects of torch.optim 2.13 on CPU, of its specification (2.5) and of the design (8): here they are none.

Each test names the defect; what torch does is not asserted.  That loading verifies is tested with loading.
"""

import itertools

import pytest
import torch
import torch.distributed
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import surefoot
from conformance import (
    DENSE,
    ELEMENTWISE,
    ENGINES,
    ROWS,
    assert_close,
    each_engine,
    each_row,
    normals,
    unclipped,
    with_third,
)
from surefoot.explain import choices

each_16_bit = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def step(optimizer, param, grad):
    param.grad = grad
    optimizer.step()


# Fused SGD


@each_16_bit
@each_engine
def test_sgd_updates_every_element_of_16_bit_parameters(engine, dtype):
    """Torch's fused SGD leaves all full SIMD blocks as they are."""
    param = torch.ones(4099, dtype=dtype, requires_grad=True)
    optimizer = surefoot.SGD([param], lr=0.25, momentum=0.5, **ENGINES[engine])
    step(optimizer, param, torch.ones_like(param))
    assert param.unique().tolist() == [0.75]


@pytest.mark.in_turn("engine")
@each_row(ELEMENTWISE)
@each_engine
def test_a_first_step_that_a_grad_scaler_skips_leaves_no_trace(engine, row):
    """Torch's fused SGD keeps a momentum buffer that was never initialised."""
    scaled, plain = (torch.ones(50, requires_grad=True) for _ in range(2))
    optimizer, twin = (row.build([param], row.all_flags(), engine) for param in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (torch.inf, 1.0, 2.0):
        optimizer.zero_grad()
        scaler.scale((scaled * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor < torch.inf:
            step(twin, plain, torch.full_like(plain, factor))
    assert torch.equal(scaled, plain)


@pytest.mark.in_turn("engine")
@each_row(ELEMENTWISE)
@each_engine
def test_a_parameter_that_joins_late_starts_as_a_new_one(engine, row):
    """Torch's fused SGD raises TypeError."""
    early, late, alone = (normals(torch.float32, seed=1)(9).requires_grad_() for _ in range(3))
    options = row.all_flags() | unclipped(row)
    optimizer, twin = row.build([early, late], options, engine), row.build([alone], options, engine)
    for number in range(4):
        grad = normals(torch.float32, seed=number)(9)
        early.grad = grad
        late.grad = grad if number > 1 else None
        optimizer.step()
        if number > 1:
            step(twin, alone, grad)
    assert torch.equal(late, alone)


# Views and strides


@pytest.mark.in_turn("engine")
@pytest.mark.parametrize("layout", ["channels_last", "strided view"])
@each_row(ELEMENTWISE)
@each_engine
def test_a_gradient_may_have_other_strides_than_its_parameter(engine, row, layout):
    """Torch's fused kernels pair the wrong elements, and overwrite a view's neighbours."""
    values, grad = normals(torch.float32, seed=1)(2, 3, 4, 6), normals(torch.float32, seed=2)(2, 3, 4, 6)
    storage = torch.zeros(2, 3, 4, 12)
    param = (
        values.to(memory_format=torch.channels_last) if layout == "channels_last" else storage[..., ::2].copy_(values)
    )
    plain = values.clone().requires_grad_()
    optimizer, twin = row.build([param.requires_grad_()], {}, engine), row.build([plain], {}, engine)
    for _ in range(2):
        step(optimizer, param, grad)
        step(twin, plain, grad)
    assert torch.equal(param, plain)
    assert storage[..., 1::2].count_nonzero() == 0


@each_engine
def test_sgd_with_nesterov_leaves_the_gradient_alone(engine):
    """Torch's foreach SGD adds the momentum to p.grad."""
    param, grad = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    optimizer = surefoot.SGD([param], lr=0.1, momentum=0.9, nesterov=True, **ENGINES[engine])
    for _ in range(2):
        step(optimizer, param, grad)
    assert grad.tolist() == [2.0, 2.0, 2.0]


# Precision


@pytest.mark.in_turn("engine")
@each_row(DENSE)
@each_engine
def test_zero_gradients_of_float16_parameters_give_no_nan(engine, row):
    """Torch's eps of 1e-8 is zero in float16."""
    param = torch.ones(3, 4, dtype=torch.float16, requires_grad=True)
    optimizer = row.build([param], {}, row.engines([engine])[0])
    for _ in range(3):
        step(optimizer, param, torch.zeros_like(param))
    assert param.isfinite().all()


@each_engine
def test_asgd_keeps_inf_and_the_precision_of_its_state(engine):
    """Torch's foreach ASGD turns inf into NaN, and differs from its for-loop."""
    ours, theirs = (torch.tensor([1.0, -2.0, 3.0], requires_grad=True) for _ in range(2))
    optimizer = surefoot.ASGD([ours], lr=0.1, t0=0, **ENGINES[engine])
    oracle = torch.optim.ASGD([theirs], lr=0.1, t0=0, foreach=False)
    for number in range(4):
        grad = torch.tensor([torch.inf if number == 2 else 0.5, -torch.inf if number == 1 else 0.25, 1.0])
        step(optimizer, ours, grad.clone())
        step(oracle, theirs, grad.clone())
    assert_close({"param": ours, **optimizer.state[ours]}, {"param": theirs, **oracle.state[theirs]})


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # tested with conformance
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("cls", [surefoot.Adam, surefoot.AdamW])
def test_differentiable_adam_takes_a_learning_rate_of_zero(cls, decay):
    """Torch divides by it: 0/0 where the second moment is zero."""
    start = torch.tensor([1.0, 2.0], requires_grad=True)
    param = start.clone()
    optimizer = cls([param], lr=torch.tensor(0.0, requires_grad=True), weight_decay=decay, differentiable=True)
    step(optimizer, param, torch.tensor([0.0, 1.0]))
    assert param.tolist() == [1.0, 2.0]
    param.sum().backward()
    assert start.grad.isfinite().all()


def test_gradients_flow_through_the_first_momentum_of_sgd():
    """Torch detaches the first gradient."""
    grad = torch.tensor([0.5, 2.0], requires_grad=True)
    param = torch.ones(2, requires_grad=True).clone()
    optimizer = surefoot.SGD([param], lr=0.1, momentum=0.9, differentiable=True)
    step(optimizer, param, grad)
    param.sum().backward()
    assert grad.grad.tolist() == pytest.approx([-0.1, -0.1])


@pytest.mark.in_turn("engine")
@each_16_bit
@each_row([row for row in ROWS if row.ours.slots])
@each_engine
def test_loaded_state_keeps_its_dtype(engine, row, dtype):
    """Torch casts float32 moments, and scalars such as NAdam's mu_product, to the dtype of 16-bit parameters."""
    wide = normals(torch.float32, seed=1)(4, 3).requires_grad_()
    giver = row.build([wide], row.all_flags(), row.engines([engine])[0])
    grad = torch.ones(4, 3)
    step(giver, wide, grad.to_sparse() if row.ours is surefoot.SparseAdam else grad)
    narrow = wide.detach().to(dtype).requires_grad_()
    taker = row.build([narrow], row.all_flags(), row.engines([engine])[0])
    taker.load_state_dict(giver.state_dict())
    assert_close(taker.state[narrow], giver.state[wide], rtol=0, atol=0)


# Algorithms


@pytest.mark.parametrize("order", [*itertools.permutations((torch.bfloat16, torch.float32, torch.float64))], ids=str)
def test_adafactor_takes_its_epsilon_from_each_parameter(order):
    """Torch uses that of the first parameter for all."""

    def trained(dtypes):
        params = {dtype: torch.full((3, 4), 0.5, dtype=dtype, requires_grad=True) for dtype in dtypes}
        optimizer = surefoot.Adafactor(params.values(), lr=0.1)
        for dtype, param in params.items():
            param.grad = torch.full((3, 4), 1e-6, dtype=dtype)
        optimizer.step()
        return params

    together = trained(order)
    assert all(torch.equal(together[dtype], trained([dtype])[dtype]) for dtype in order)


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_keeps_the_norm_of_its_momentum_in_bfloat16(nesterov):
    """Torch normalises the buffer in place."""
    param = torch.ones(4, 3, dtype=torch.bfloat16, requires_grad=True)
    optimizer = surefoot.Muon([param], momentum=0.5, nesterov=nesterov)
    step(optimizer, param, torch.full((4, 3), 8.0, dtype=torch.bfloat16))
    assert optimizer.state[param]["momentum_buffer"].unique().tolist() == [4.0]


# Hyperparameters


@pytest.mark.parametrize("betas", [(0, 0.99), (0.9, 0), (0, 0)])
@each_row([row for row in ROWS if "betas" in row.defaults and not row.ours.has_modes])  # where beta1 cannot be 0
def test_betas_may_be_integers(row, betas):
    """Torch wants floats."""
    betas = with_third(row, betas)
    ours, theirs = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer, twin = row.build([ours], {"betas": betas}), row.build([theirs], {"betas": tuple(map(float, betas))})
    for param, taker in ((ours, optimizer), (theirs, twin)):
        grad = torch.tensor([1.0, -2.0, 3.0])
        step(taker, param, grad.to_sparse() if row.ours is surefoot.SparseAdam else grad)
    assert torch.equal(ours, theirs)


@each_row(ROWS)
def test_a_learning_rate_that_is_nan_is_refused(row):
    """Torch's SGD takes it."""
    for options in ({"lr": torch.nan}, {"lr": torch.tensor(torch.nan)}):
        with pytest.raises(ValueError, match="nan"):
            row.build([torch.ones(2, 2, requires_grad=True)], options)


@each_row(ROWS)
def test_the_hyperparameters_of_a_group_are_validated(row):
    """Torch looks at those of the constructor only."""
    group = {"params": [torch.ones(2, 2, requires_grad=True)], "lr": -5}
    with pytest.raises(ValueError, match="-5"):
        row.ours([group])


def test_adagrad_starts_each_group_at_its_own_value():
    """Torch takes the constructor's for all."""
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    groups = [{"params": [first]}, {"params": [second], "initial_accumulator_value": 0.5}]
    optimizer = surefoot.Adagrad(groups, initial_accumulator_value=0.25)
    assert [optimizer.state[param]["sum"].tolist() for param in (first, second)] == [[0.25, 0.25], [0.5, 0.5]]


def test_muon_refuses_vectors_in_a_group_added_later():
    """Torch looks at the constructor's parameters only, and fails in the step."""
    optimizer = surefoot.Muon([torch.ones(2, 2, requires_grad=True)])
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1


# DTensor


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("mesh") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.in_turn("engine")
@each_row([row for row in DENSE if row.name != "SOAP"])  # which refuses them
@pytest.mark.parametrize("engine", ["default", "eager", "foreach"])
def test_sharded_parameters(engine, row, mesh):
    """Torch's Rprop, Adafactor and fused SGD and Adagrad fail.  (Kernels run on local shards.)"""
    values = normals(torch.float32, seed=1)(8, 4)
    sharded, plain = (
        distribute_tensor(values.clone(), mesh, [Shard(0)]).requires_grad_(),
        values.clone().requires_grad_(),
    )
    engine = row.engines([engine])[0] if engine in ENGINES else engine
    optimizer, twin = (row.build([param], row.all_flags(), engine) for param in (sharded, plain))
    for number in range(2):
        grad = normals(torch.float32, seed=2 + number)(8, 4)
        step(optimizer, sharded, distribute_tensor(grad, mesh, [Shard(0)]))
        step(twin, plain, grad)
    assert_close({"param": sharded.full_tensor()}, {"param": plain})


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_explain_tells_who_gets_sharded_parameters(options, mesh):
    param = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]).requires_grad_()
    optimizer = surefoot.AdamW([param], **options)
    (choice,) = choices(optimizer)
    step(optimizer, param, distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
    assert choice.engine == ("foreach" if "foreach" in options else "cpu")
    kept = optimizer._step_cache.runs
    assert [run.engine.__name__.rpartition(".")[2] for run in kept] in ([choice.engine], [])


@each_row([row for row in ROWS if row.name in ("AdamW", "Adafactor")])
def test_the_whole_step_of_sharded_parameters(row, mesh):
    options = {"max_grad_norm": 1.0, "ema": 0.9, "telemetry": True}
    values = normals(torch.float64, seed=1)(8, 4)
    sharded = distribute_tensor(values.clone(), mesh, [Shard(0)]).requires_grad_()
    plain = values.clone().requires_grad_()
    optimizer, twin = (row.build([param], options) for param in (sharded, plain))
    for number in range(3):
        grad = normals(torch.float64, seed=2 + number)(8, 4)
        if number == 2:
            grad[0, 0] = torch.nan
        step(optimizer, sharded, distribute_tensor(grad, mesh, [Shard(0)]))
        step(twin, plain, grad)
        assert_close(*({"numbers": torch.tensor(numbers(each))} for each in (optimizer, twin)))
    averages = [each.state[param]["ema"] for each, param in ((optimizer, sharded), (twin, plain))]
    assert_close({"ema": averages[0].full_tensor()}, {"ema": averages[1]})


def numbers(optimizer):
    total = optimizer.telemetry.latest().total
    return [total.grad_norm, total.param_norm, total.update_norm, total.max_grad, total.nonfinite]
