"""Short numbers through optimizers: what is kept, that engines agree, and that training is as with long ones."""

import copy
import io
import re
from itertools import product

import pytest
import torch
from torch import nn

import surefoot
from surefoot.engines.cpu import launch

BF16, F16 = torch.bfloat16, torch.float16
ELEMENTWISE = {
    "SGD": {"momentum": 0.9},
    "AdamW": {},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adadelta": {"lr": 0.1},
    "Adagrad": {},
    "RMSprop": {"momentum": 0.9},
    "ASGD": {},
    "Rprop": {},
}
STORAGE = {
    "bf16 stochastic": (BF16, {"rounding": "stochastic"}),
    "bf16 + 8": (BF16, {"master_weight_bits": 24}),
    "bf16 + 8 stochastic": (BF16, {"master_weight_bits": 24, "rounding": "stochastic"}),
    "bf16 + 16": (BF16, {"master_weight_bits": 32}),
    "fp16 + 16": (F16, {"master_weight_bits": 32}),
    "float8": (torch.float32, {"state_dtype": "float8"}),
    "bf16 stochastic float8": (BF16, {"rounding": "stochastic", "state_dtype": "float8"}),
    "bf16 + 8 float8": (BF16, {"master_weight_bits": 24, "state_dtype": "float8"}),
}
SHAPES = ((65, 128), (41, 101), (7,), (0,), ())


def each_storage(test):
    return pytest.mark.parametrize(("dtype", "options"), STORAGE.values(), ids=STORAGE)(test)


def make(cls="AdamW", dtype=BF16, shapes=SHAPES, **options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    named = [(f"p{number}", param) for number, param in enumerate(params)]
    return params, getattr(surefoot, cls)(named, **({"lr": 1e-2} | ELEMENTWISE[cls] | options))


def train(params, optimizer, steps=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = torch.empty_like(param).copy_(grad)
        optimizer.step()


def everything(params, optimizer):
    """All bytes that training has changed, by name."""
    found = {}
    for number, param in enumerate(params):
        tensors = {"param": param.detach()} | optimizer.state[param]
        found |= {f"{name} of {number}": value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    return {name: value.clone() for name, value in found.items()}


def differing(one, other):
    """The share of numbers in which two lots differ."""
    assert list(one) == list(other)
    assert all(a.dtype == other[name].dtype and a.shape == other[name].shape for name, a in one.items())
    unequal = sum((a.float() != other[name].float()).sum().item() for name, a in one.items())
    return unequal / sum(a.numel() for a in one.values())


def assert_same(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# Engines


def assert_alike(one, other):
    """Engines round arithmetic differently, so that few 16-bit numbers and codes differ; float32 ones are close."""
    assert list(one) == list(other)
    short = {
        name for name, value in one.items() if value.dtype is not torch.float32 and "int16" not in str(value.dtype)
    }
    assert differing({name: one[name] for name in short}, {name: other[name] for name in short}) < 0.01
    for name in one.keys() - short:
        if one[name].dtype is torch.float32:
            torch.testing.assert_close(one[name], other[name], rtol=2e-3, atol=2e-5)


@each_storage
@pytest.mark.parametrize("cls", ["AdamW", "SGD"])
def test_foreach_is_eager_and_kernels_differ_in_the_last_bit_of_arithmetic_only(cls, dtype, options):
    results = []
    for engine in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        params, optimizer = make(cls, dtype, **options, **engine)
        train(params, optimizer)
        results.append(everything(params, optimizer))
    assert_same(results[0], results[1])
    assert_alike(results[0], results[2])


@pytest.mark.parametrize("cls", [name for name in ELEMENTWISE if name not in ("AdamW", "SGD")])
def test_every_rule_takes_short_numbers(cls):
    results = []
    for engine in ({"foreach": False}, {"fused": True}):
        params, optimizer = make(cls, BF16, master_weight_bits=24, state_dtype="float8", **engine)
        train(params, optimizer)
        results.append(everything(params, optimizer))
        codes = {
            slot.name: optimizer.state[params[0]][slot.name].dtype for slot in optimizer.spec.slots if slot.when is None
        }
        in_8_bits = {slot.name for slot in optimizer.spec.slots if slot.float8 is not False}
        assert all((dtype is torch.uint8) == (name in in_8_bits) for name, dtype in codes.items())
        assert optimizer.state[params[2]].keys() <= optimizer.state[params[0]].keys()  # small: no scales
    assert_alike(*results)


@each_storage
def test_threads_and_chunks_change_no_bit(dtype, options, monkeypatch):
    shapes, results = ((300, 128), (211, 101)), []
    for count, chunk in ((1, 16384), (2, 1024)):
        monkeypatch.setattr(launch, "CHUNK", chunk)
        monkeypatch.setattr(launch, "ONE_THREAD", 0)
        monkeypatch.setattr(launch, "thread_count", lambda count=count: count)
        params, optimizer = make("AdamW", dtype, shapes, **options)
        train(params, optimizer)
        results.append(everything(params, optimizer))
    assert_same(*results)


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def transposed(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def strided(tensor):
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@each_storage
@pytest.mark.parametrize("layout", [channels_last, transposed, strided])
def test_engines_agree_for_any_strides_and_neighbours_stay(layout, dtype, options):
    results = []
    for engine in ({"foreach": False}, {"fused": True}):
        value = torch.randn(6, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        param = nn.Parameter(layout(value))
        optimizer = surefoot.AdamW([param], lr=1e-2, **options, **engine)
        train([param], optimizer)
        results.append(everything([param], optimizer))
        if layout is strided:
            neighbours = torch.as_strided(param.detach(), (param.numel(),), (2,), 1)
            assert not neighbours.any()
    assert_alike(*results)


def test_float8_is_of_elements_in_c_order_whatever_the_strides():
    results = []
    for layout in (torch.Tensor.contiguous, channels_last):
        param = nn.Parameter(layout(torch.randn(6, 16, 8, 8, generator=torch.Generator().manual_seed(0))))
        optimizer = surefoot.AdamW([param], state_dtype="float8")
        train([param], optimizer)
        results.append(everything([param], optimizer))
    assert_same(*results)


@each_storage
def test_checked_kernels_do_the_same(dtype, options, monkeypatch):
    results = []
    for checked in ("", "1"):
        monkeypatch.setenv("SUREFOOT_CHECKED", checked)
        params, optimizer = make("AdamW", dtype, **options)
        train(params, optimizer)
        results.append(everything(params, optimizer))
    assert_same(*results)


# Bytes


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"rounding": "stochastic", "state_dtype": "float8"}, 4.1),
        ({"master_weight_bits": 24, "state_dtype": "float8"}, 5.1),
    ],
)
def test_bytes_per_parameter(options, most):
    param = nn.Parameter(torch.zeros(1024, 1024, dtype=BF16))
    optimizer = surefoot.AdamW([param], **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    held = (param, *optimizer.state[param].values())
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) / param.numel() <= most


def test_small_tensors_have_float32_state():
    param = nn.Parameter(torch.zeros(4096, dtype=BF16))
    optimizer = surefoot.AdamW([param], state_dtype="float8")
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype is torch.float32


# What short numbers must not do


def largest_step(ratio, **options):
    """The largest step in units of lr, where the gradients of a block are one large and many small ones."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.full((32, 256), ratio)
    sizes[:, 0] = 1
    param = nn.Parameter(torch.zeros(sizes.numel()))
    optimizer, largest = surefoot.AdamW([param], lr=1e-3, weight_decay=0, **options), 0.0
    for _ in range(50):
        param.grad = sizes.flatten() * (1 + 0.5 * torch.randn(sizes.numel(), generator=generator))
        before = param.detach().clone()
        optimizer.step()
        largest = max(largest, (param.detach() - before).abs().max().item() / 1e-3)
    return largest


@pytest.mark.parametrize("exponent", range(6))
def test_no_step_is_long_where_the_gradients_of_a_block_are_unequal(exponent):
    assert largest_step(10.0**-exponent, state_dtype="float8") <= 2


@pytest.mark.parametrize(("dtype", "options"), [(BF16, {}), (torch.float32, {"state_dtype": "float8"})])
def test_second_moments_follow_when_gradients_become_small(dtype, options):
    generator, short = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(8192, dtype=dtype))
    exact = nn.Parameter(torch.zeros(8192))
    optimizers = surefoot.AdamW([short], lr=1e-4, **options), surefoot.AdamW([exact], lr=1e-4)
    for step in range(1300):
        grad = torch.randn(8192, generator=generator) * (1.0 if step < 300 else 0.1)
        short.grad = grad.to(dtype)
        exact.grad = short.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    ratio = surefoot.full_precision(optimizers[0], short, "exp_avg_sq") / optimizers[1].state[exact]["exp_avg_sq"]
    assert 0.9 <= ratio.median().item() <= 1.1


@each_storage
@pytest.mark.parametrize("cls", ["AdamW", "SGD"])
def test_elements_without_gradient_stay_where_they_are(cls, dtype, options):
    param = nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = getattr(surefoot, cls)([param], weight_decay=0, lr=1e-2, **ELEMENTWISE[cls], **options)
    before = param.detach().clone()
    for step in range(10):
        param.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step)).to(dtype)
        param.grad[::2] = 0
        optimizer.step()
    assert torch.equal(param.detach()[::2], before[::2])
    assert not torch.equal(param.detach()[1::2], before[1::2])


@pytest.mark.parametrize(
    "options", [{"rounding": "stochastic"}, {"master_weight_bits": 24}, {"master_weight_bits": 32}]
)
def test_small_steps_of_bfloat16_weights_are_not_lost(options):
    param = nn.Parameter(torch.ones(4096, dtype=BF16))
    optimizer = surefoot.SGD([param], lr=1e-4, **options)
    for _ in range(100):
        param.grad = torch.ones_like(param)
        optimizer.step()
    held = surefoot.full_precision(optimizer, param)
    assert held.mean().item() == pytest.approx(0.99, abs=1e-3)
    lost = nn.Parameter(torch.ones(4096, dtype=BF16))
    lost.grad = torch.ones_like(lost)
    surefoot.SGD([lost], lr=1e-4).step()
    assert (lost == 1).all()


def test_32_bits_train_bit_for_bit_as_float32():
    short, exact = nn.Parameter(torch.ones(64, 128, dtype=BF16)), nn.Parameter(torch.ones(64, 128))
    optimizers = (
        surefoot.AdamW([short], master_weight_bits=32, state_dtype=torch.float32, foreach=False),
        surefoot.AdamW([exact], foreach=False),
    )
    for step in range(20):
        short.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step)).to(BF16)
        exact.grad = short.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(surefoot.full_precision(optimizers[0], short), exact.detach())
    assert (short.float() - exact).abs().max() <= 2.0**-8


CUSTOM = {"Muon": {"lr": 1e-3}, "Adafactor": {"lr": 1e-3}}


@pytest.mark.parametrize("cls", CUSTOM)
@pytest.mark.parametrize(
    "options", [{"rounding": "stochastic"}, {"master_weight_bits": 24}, {"master_weight_bits": 32}]
)
def test_custom_steps_do_not_lose_small_steps_either(cls, options):
    def trained(dtype, **given):
        param = nn.Parameter(torch.ones(64, 32, dtype=dtype))
        optimizer = getattr(surefoot, cls)([param], weight_decay=0, **CUSTOM[cls], **given)
        for step in range(30):
            optimizer.param_groups[0]["lr"] = 1e-4
            param.grad = torch.rand(64, 32, generator=torch.Generator().manual_seed(step)).to(BF16).to(dtype)
            optimizer.step()
        return surefoot.full_precision(optimizer, param), param, optimizer

    held, param, optimizer = trained(BF16, **options)
    exact, _, _ = trained(torch.float32)
    assert (held - exact).mean().abs() <= (exact - 1).mean().abs() * 0.2
    again, _, _ = trained(BF16, **options)
    assert torch.equal(held, again)
    copied, other = copy.deepcopy((param, optimizer))
    for each, with_ in ((param, optimizer), (copied, other)):
        each.grad = torch.ones_like(each)
        with_.step()
    assert torch.equal(param, copied)
    lost, _, _ = trained(BF16)
    assert (lost - exact).mean().abs() > (held - exact).mean().abs()


def test_what_a_custom_step_does_not_take_is_refused():
    for cls, options in (("Muon", {"state_dtype": "float8"}), ("LBFGS", {"rounding": "stochastic"})):
        param = nn.Parameter(torch.ones(4, 4))
        optimizer = getattr(surefoot, cls)([param])
        with pytest.raises(ValueError, match=f"{cls} has a custom step, which takes no"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))], **options})


# Checkpoints


@each_storage
@pytest.mark.parametrize("cls", ["AdamW", "SGD"])
def test_a_resume_gives_the_same_bits(cls, dtype, options):
    params, optimizer = make(cls, dtype, rounding_seed=3, **options)
    train(params, optimizer)
    buffer = io.BytesIO()
    torch.save({"model": [param.detach() for param in params], "optimizer": optimizer.state_dict()}, buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    train(params, optimizer, seed=2)
    for given in (options, {}):  # without, the options of the state dict come back, and the report says so
        resumed, other = make(cls, dtype, **given)
        with torch.no_grad():
            for param, value in zip(resumed, saved["model"], strict=True):
                param.copy_(value)
        report = other.load_state_dict(saved["optimizer"])
        restored = {re.search("`(.+?)`", line)[1] for line in report.restored}
        assert restored == {*options, "rounding_seed"} - given.keys()
        train(resumed, other, seed=2)
        assert_same(everything(params, optimizer), everything(resumed, other))


def test_deepcopy_and_pickle_go_on_the_same():
    params, optimizer = make("AdamW", state_dtype="float8", master_weight_bits=24)
    train(params, optimizer)
    copied, other = copy.deepcopy((params, optimizer))
    train(params, optimizer, seed=2)
    train(copied, other, seed=2)
    assert_same(everything(params, optimizer), everything(copied, other))


def test_torchs_checkpoint_is_taken_into_8_bits_and_brought_back():
    theirs = nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    torchs = torch.optim.AdamW([theirs])
    train([theirs], torchs)
    ours = nn.Parameter(theirs.detach().clone())
    short = surefoot.AdamW([ours], state_dtype="float8")
    short.load_state_dict(torchs.state_dict())
    assert short.state[ours]["exp_avg"].dtype is torch.uint8
    for slot in ("exp_avg", "exp_avg_sq"):
        ratio = surefoot.full_precision(short, ours, slot) / torchs.state[theirs][slot]
        assert (ratio - 1).abs().quantile(0.99) <= 1 / 16
    wide = surefoot.AdamW([ours], state_dtype=torch.float32)
    report = wide.load_state_dict(short.state_dict())
    assert "stays torch.float32" in report.kept[0]
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(wide.state[ours][slot], surefoot.full_precision(short, ours, slot))
    again = torch.optim.AdamW([theirs])
    again.load_state_dict(wide.state_dict())
    train([theirs], again)


@pytest.mark.parametrize(("before", "after"), list(product((None, 24, 32), repeat=2)))
def test_corrections_are_converted(before, after):
    params, optimizer = make("AdamW", shapes=((8, 16),), master_weight_bits=before)
    train(params, optimizer)
    value = surefoot.full_precision(optimizer, params[0])
    other = surefoot.AdamW([("p0", params[0])], master_weight_bits=after)
    other.load_state_dict(optimizer.state_dict())
    held = surefoot.full_precision(other, params[0])
    assert (held - value).abs().max() <= value.abs().max() * 2.0**-15
    if after == 32 or before is None:
        assert torch.equal(held, value)


def test_a_correction_that_fits_no_parameter_is_refused():
    params, optimizer = make("AdamW", shapes=((8, 16),), master_weight_bits=24)
    train(params, optimizer)
    wide = surefoot.AdamW([("p0", nn.Parameter(torch.zeros(8, 16)))])
    with pytest.raises(ValueError, match="`weight_correction` belongs to a bfloat16 or float16 parameter"):
        wide.load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    del state["state"][0]["weight_correction"]
    surefoot.AdamW([("p0", params[0])], master_weight_bits=24).load_state_dict(state)


def test_a_model_is_exported_in_float32():
    model = nn.Sequential(nn.Linear(128, 64), nn.BatchNorm1d(64)).to(BF16)
    optimizer = surefoot.AdamW(model.parameters(), lr=1e-4, master_weight_bits=32)
    train(list(model.parameters()), optimizer)
    found = surefoot.full_precision_state_dict(model, optimizer)
    nn.Sequential(nn.Linear(128, 64), nn.BatchNorm1d(64)).load_state_dict(found)
    assert all(value.dtype is torch.float32 for value in found.values() if value.is_floating_point())
    assert torch.equal(found["0.weight"].to(BF16), model[0].weight)
    assert not torch.equal(found["0.weight"], model[0].weight.float())


# Refusals and changes between steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "`rounding` must be None, 'nearest' or 'stochastic', but got 'up'"),
        ({"master_weight_bits": 16}, "`master_weight_bits` must be None, 24 or 32, but got 16"),
        ({"state_dtype": "fp8"}, "`state_dtype` must be None"),
        ({"rounding_seed": -1}, "`rounding_seed` must be a whole number"),
        ({"rounding": "stochastic", "differentiable": True}, "gradients cannot flow through `rounding='stochastic'`"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make("AdamW", **options)


@pytest.mark.parametrize("options", [{"rounding": "stochastic"}, {"master_weight_bits": 24}])
def test_sparse_gradients_are_refused_by_name_with_nothing_changed(options):
    weight = nn.Parameter(torch.ones(100, 128, dtype=BF16))
    optimizer = surefoot.SGD([("embedding", weight)], lr=0.1, **options)
    weight.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 128, dtype=BF16), weight.shape)
    with pytest.raises(RuntimeError, match="`embedding` of shape .100, 128. is sparse, and the parameter is kept as"):
        optimizer.step()
    assert (weight == 1).all()
    assert not optimizer.state


def test_complex_parameters_have_plain_state():
    param = nn.Parameter(torch.zeros(64, 128, dtype=torch.complex64))
    optimizer = surefoot.AdamW([param], state_dtype="float8")
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype is torch.complex64


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda entry: entry.pop("exp_avg_scale"), "`exp_avg_scale` .* is NoneType, must be a float32 tensor"),
        (
            lambda entry: entry.update(exp_avg_scale=torch.ones(3)),
            "`exp_avg_scale` .* has shape .3,., must have .64, 1.",
        ),
        (lambda entry: entry.update(exp_avg=torch.zeros(3, dtype=torch.uint8)), "`exp_avg` .* has shape .3,."),
        (lambda entry: entry.update(weight_correction=torch.zeros(64, 128)), "`weight_correction` .* is torch.float32"),
    ],
)
def test_state_that_does_not_fit_is_refused_by_name(edit, message):
    params, optimizer = make("AdamW", shapes=((64, 128),), state_dtype="float8", master_weight_bits=24)
    train(params, optimizer)
    edit(optimizer.state[params[0]])
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=message):
        train(params, optimizer)
    assert torch.equal(params[0].detach(), before)


def test_options_that_are_changed_count_at_the_next_step():
    params = [nn.Parameter(torch.ones(8, 16, dtype=BF16))]
    optimizer = surefoot.SGD(params, lr=1e-4)
    before = params[0].detach().clone()
    train(params, optimizer)
    assert torch.equal(params[0].detach(), before)
    optimizer.param_groups[0]["rounding"] = "stochastic"
    train(params, optimizer, steps=50)
    assert not torch.equal(params[0].detach(), before)
    optimizer.param_groups[0]["rounding"] = "nearest"
    optimizer.param_groups[0]["master_weight_bits"] = 32
    train(params, optimizer)
    assert optimizer.state[params[0]]["weight_correction"].any()


def test_a_parameter_has_random_bits_of_its_own_whatever_stands_around_it():
    alone, beside = (
        make("AdamW", shapes=((40, 128),), rounding="stochastic"),
        make("AdamW", shapes=((40, 128), (3, 3)), rounding="stochastic"),
    )
    train(*alone)
    for step in range(3):
        generator = torch.Generator().manual_seed(1)
        for _ in range(step + 1):
            grad = torch.randn(40, 128, generator=generator).to(BF16)
        beside[0][0].grad, beside[0][1].grad = grad, torch.ones(3, 3, dtype=BF16)
        beside[1].step()
    assert torch.equal(alone[0][0], beside[0][0])
    other = make("AdamW", shapes=((40, 128),), rounding="stochastic", rounding_seed=1)
    train(*other)
    assert not torch.equal(alone[0][0], other[0][0])
