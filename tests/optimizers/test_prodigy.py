"""Prodigy: the estimate of d, where it stands, what shares it, and what is refused; its steps stand in the table."""

import copy
import functools
import importlib
import importlib.util
import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import surefoot
import surefoot.functional
from conformance import ENGINES, ProdigyLoop, each_engine, normals

SHAPES = ((), (5,), (8, 3), (2, 3, 4), (20_011,))
NUMBERS = ("d", "d_max", "d_numerator", "k")
OPTIONS = (
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decouple": False, "betas": (0.0, 0.9)},
    {"use_bias_correction": True, "safeguard_warmup": True},
    {"d_coef": 2.0, "growth_rate": 1.05, "beta3": 0.9, "d0": 1e-4, "slice_p": 3},
)


class Problem:
    """Least squares with noise, so that estimates have something to find: the same for all who solve it."""

    def __init__(self, dtype=torch.float64, shapes=SHAPES):
        normal = normals(torch.float64, seed=0)
        self.params = [normal(*shape).to(dtype).requires_grad_() for shape in shapes]
        self.targets = [normal(*shape).to(dtype) for shape in shapes]
        self.noise = normals(torch.float64, seed=1)

    def give_gradients(self):
        for param, target in zip(self.params, self.targets, strict=True):
            param.grad = param.detach() - target + 0.3 * self.noise(*param.shape).to(param)

    def solve(self, optimizer, steps, *, zero_first=0):
        for step in range(steps):
            self.give_gradients()
            if step < zero_first:
                for param in self.params:
                    param.grad.zero_()
            optimizer.step()
        return optimizer

    def groups(self):
        return [{"params": self.params[:2]}, {"params": self.params[2:]}]


def numbers(optimizer, group=0):
    return {name: float(optimizer.param_groups[group][name]) for name in NUMBERS}


def assert_solved_alike(ours, theirs, optimizer, oracle, tolerance):
    for group in range(len(optimizer.param_groups)):
        assert numbers(optimizer, group) == pytest.approx(numbers(oracle, group), rel=tolerance)
    for one, other in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@functools.cache
def solved_by_the_loop(place, split):
    """Solve in forty steps with one of the options, once for all engines."""
    problem = Problem()
    return problem, problem.solve(ProdigyLoop(problem.groups(), **OPTIONS[place], split_groups=split), 40)


@pytest.mark.in_turn("split")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["one d", "split"])
@each_engine
def test_d_is_that_of_the_loop_over_forty_steps(engine, split, options):
    ours, (theirs, oracle) = Problem(), solved_by_the_loop(OPTIONS.index(options), split)
    optimizer = ours.solve(surefoot.Prodigy(ours.groups(), **options, split_groups=split, **ENGINES[engine]), 40)
    assert numbers(optimizer)["d"] > optimizer.param_groups[0]["d0"]
    assert (numbers(optimizer) == numbers(optimizer, 1)) is not split
    assert type(optimizer.param_groups[0]["k"]) is int
    assert_solved_alike(ours, theirs, optimizer, oracle, 1e-7)  # a rounding of p0 - w is large beside the first steps


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_d_is_that_of_the_reference_and_its_run_goes_on_here(dtype, options):
    if importlib.util.find_spec("prodigyopt") is None:
        pytest.skip("prodigyopt is not installed; the extra `references` has it")
    reference = importlib.import_module("prodigyopt.prodigy").Prodigy
    ours, theirs = Problem(dtype), Problem(dtype)
    tolerance = 1e-3 if dtype is torch.float32 else 1e-7
    oracle = theirs.solve(reference(theirs.groups(), **options), 30)
    optimizer = ours.solve(surefoot.Prodigy(ours.groups(), **options), 30)
    assert_solved_alike(ours, theirs, optimizer, oracle, tolerance)
    if "betas" in options:  # without momentum the reference has no average that could be loaded
        return
    loaded = surefoot.Prodigy(ours.groups())
    loaded.load_state_dict(oracle.state_dict())
    for one, other in zip(ours.params, theirs.params, strict=True):
        one.data.copy_(other.data)
    assert_solved_alike(ours, theirs, ours.solve(loaded, 10), theirs.solve(oracle, 10), tolerance)


def test_flattened_state_of_others_is_loaded_in_shape_and_other_shapes_are_refused():
    weight, bias = torch.ones(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)
    optimizer = surefoot.Prodigy([weight, bias])
    weight.grad, bias.grad = torch.ones(2, 3), torch.ones(4)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["s"] = torch.arange(6.0)
    saved["state"][1]["p0"] = torch.tensor(0.0)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[weight]["s"], torch.arange(6.0).view(2, 3))
    assert torch.equal(optimizer.state[bias]["p0"], torch.zeros(4))
    for wrong in (torch.arange(5.0), torch.ones(3, 2), torch.tensor(1.0)):
        saved["state"][0]["s"] = wrong
        with pytest.raises(ValueError, match=r"state `s` has shape .*, must be \(2, 3\)"):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("name", NUMBERS)
def test_loading_verifies_the_shared_numbers(name):
    param = torch.ones(3, requires_grad=True)
    optimizer = surefoot.Prodigy([param])
    saved = optimizer.state_dict()
    for wrong in (math.nan, "much", None):
        broken = copy.deepcopy(saved)
        broken["param_groups"][0][name] = wrong
        with pytest.raises((ValueError, TypeError), match=f"{name}"):
            optimizer.load_state_dict(broken)
    del saved["param_groups"][0][name]
    with pytest.raises(ValueError, match=f"missing: .*option `{name}`"):
        optimizer.load_state_dict(saved)


@each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_has_the_same_bits(engine, dtype, tmp_path):
    through, resumed = Problem(dtype), Problem(dtype)
    optimizer = through.solve(surefoot.Prodigy(through.groups(), **ENGINES[engine]), 8)
    first = resumed.solve(surefoot.Prodigy(resumed.groups(), **ENGINES[engine]), 4)
    surefoot.save(tmp_path / "saved", optimizer=first)
    second = surefoot.Prodigy(resumed.groups(), **ENGINES[engine])
    surefoot.load(tmp_path / "saved", optimizer=second)
    resumed.solve(second, 4)
    assert numbers(second) == numbers(optimizer)
    assert all(map(torch.equal, through.params, resumed.params))


@each_engine
def test_nothing_changes_while_gradients_are_zero(engine):
    problem = Problem()
    before = [param.detach().clone() for param in problem.params]
    optimizer = surefoot.Prodigy(problem.params, weight_decay=0.1, **ENGINES[engine])
    problem.solve(optimizer, 3, zero_first=3)
    assert all(map(torch.equal, problem.params, before))
    assert numbers(optimizer) == {"d": 1e-6, "d_max": 1e-6, "d_numerator": 0.0, "k": 0.0}


@each_engine
def test_a_group_with_lr_0_stays_and_does_not_count(engine):
    problem, alone = Problem(), Problem()
    optimizer = surefoot.Prodigy(problem.groups(), weight_decay=0.1, **ENGINES[engine])
    rest = surefoot.Prodigy(alone.params[2:], weight_decay=0.1, **ENGINES[engine])
    optimizer.param_groups[0]["lr"] = 0.0
    before = [param.detach().clone() for param in problem.params[:2]]
    problem.solve(optimizer, 10)
    alone.solve(rest, 10)
    assert all(map(torch.equal, problem.params[:2], before))
    assert not any(optimizer.state[param][name].any() for param in problem.params[:2] for name in ("exp_avg", "s"))
    assert numbers(optimizer) == pytest.approx(numbers(rest), rel=1e-12)


def test_all_rates_0_change_nothing_as_at_the_start_of_a_warm_up():
    problem = Problem()
    optimizer = problem.solve(surefoot.Prodigy(problem.params), 5)
    before = numbers(optimizer), [param.detach().clone() for param in problem.params]
    optimizer.param_groups[0]["lr"] = 0.0
    problem.solve(optimizer, 2)
    assert numbers(optimizer) == before[0]
    assert all(map(torch.equal, problem.params, before[1]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 0.5, r"groups have the learning rates 0.5, 1.0, but one d is estimated for all"),
        (
            "betas",
            (0.5, 0.9),
            r"groups have betas=\(0.9, 0.999\) and betas=\(0.5, 0.9\), but one d",
        ),
        ("d_coef", 2.0, r"groups have d_coef=1.0 and d_coef=2.0"),
        ("split_groups", True, r"groups have split_groups=False and split_groups=True"),
    ],
)
def test_groups_that_differ_in_what_d_follows_from_are_refused_unless_split(name, value, message):
    problem = Problem()
    optimizer = problem.solve(surefoot.Prodigy(problem.groups()), 2)
    before = numbers(optimizer), [param.detach().clone() for param in problem.params]
    optimizer.param_groups[1][name] = value
    with pytest.raises(RuntimeError, match=message):
        problem.solve(optimizer, 1)
    assert (numbers(optimizer), all(map(torch.equal, problem.params, before[1]))) == (before[0], True)
    for group in optimizer.param_groups:
        group["split_groups"] = True
    problem.solve(optimizer, 1)


def test_split_groups_are_optimizers_of_their_own():
    together, apart = Problem(), Problem()
    groups = together.groups()
    groups[1] |= {"lr": 0.5, "d0": 1e-5}
    optimizer = together.solve(surefoot.Prodigy(groups, split_groups=True), 20)
    first = surefoot.Prodigy(apart.params[:2])
    second = surefoot.Prodigy(apart.params[2:], lr=0.5, d0=1e-5)
    for _ in range(20):
        apart.give_gradients()
        first.step()
        second.step()
    assert numbers(optimizer) == numbers(first)
    assert numbers(optimizer, 1) == numbers(second)
    assert all(map(torch.equal, together.params, apart.params))


def test_a_new_group_shares_what_was_estimated_and_an_edit_counts_at_the_next_step():
    problem = Problem()
    optimizer = surefoot.Prodigy(problem.params[:3])
    problem.solve(optimizer, 5)
    optimizer.add_param_group({"params": problem.params[3:]})
    assert numbers(optimizer, 1) == numbers(optimizer)
    optimizer.param_groups[0] |= {"d": 0.25, "d_max": 0.25}
    problem.solve(optimizer, 1)
    assert numbers(optimizer)["d"] >= 0.25
    assert numbers(optimizer, 1) == numbers(optimizer)


@each_engine
def test_shared_numbers_that_are_tensors_are_updated_in_place(engine):
    problem, other = Problem(), Problem()
    optimizer = surefoot.Prodigy(problem.groups(), **ENGINES[engine])
    held = {name: torch.tensor(float(optimizer.param_groups[0][name]), dtype=torch.float64) for name in NUMBERS}
    optimizer.param_groups[0] |= held
    problem.solve(optimizer, 5)
    plain = other.solve(surefoot.Prodigy(other.groups(), **ENGINES[engine]), 5)
    assert all(optimizer.param_groups[1][name] is held[name] for name in NUMBERS)
    assert numbers(optimizer) == numbers(plain)
    assert all(map(torch.equal, problem.params, other.params))


@each_engine
def test_parameters_of_several_dtypes_share_one_d(engine):
    ours, theirs = Problem(torch.float32), Problem(torch.float32)
    for problem in (ours, theirs):
        for index in (1, 3):
            problem.params[index] = problem.params[index].detach().double().requires_grad_()
    optimizer = ours.solve(surefoot.Prodigy(ours.params, **ENGINES[engine]), 20)
    oracle = theirs.solve(ProdigyLoop(theirs.params), 20)
    assert numbers(optimizer) == pytest.approx(numbers(oracle), rel=1e-4)


def test_clipping_is_that_of_the_gradients_before():
    clipped, by_hand = Problem(), Problem()
    optimizer, other = surefoot.Prodigy(clipped.params, max_grad_norm=0.5), surefoot.Prodigy(by_hand.params)
    for _ in range(6):
        clipped.give_gradients()
        by_hand.give_gradients()
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(by_hand.params, 0.5)
        other.step()
    assert numbers(optimizer) == pytest.approx(numbers(other), rel=1e-9)
    for one, two in zip(clipped.params, by_hand.params, strict=True):
        torch.testing.assert_close(one, two)


def test_a_skipped_step_leaves_the_estimate():
    problem = Problem()
    optimizer = problem.solve(surefoot.Prodigy(problem.params, nonfinite="skip"), 3)
    before = numbers(optimizer)
    problem.give_gradients()
    problem.params[1].grad[0] = math.inf
    with pytest.warns(RuntimeWarning, match="was skipped"):
        optimizer.step()
    assert numbers(optimizer) == before


def test_p0_is_kept_as_the_parameter_and_s_never_in_8_bits():
    param = torch.randn(5000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    param.grad = torch.ones(5000)
    start = param.detach().clone()
    for state_dtype, kept in ((torch.bfloat16, torch.bfloat16), ("float8", torch.float32)):
        optimizer = surefoot.Prodigy([param], state_dtype=state_dtype)
        optimizer.step()
        state = optimizer.state[param]
        assert (state["p0"].dtype, state["s"].dtype) == (torch.float32, kept)
        assert (state["exp_avg"].dtype is torch.uint8) is (state_dtype == "float8")
    assert torch.equal(surefoot.Prodigy([start.requires_grad_()]).spec.slots[3].new(start, {}), start)


@functools.cache
def d_of_float32():
    """Return what is found in sixty steps."""
    problem = Problem(torch.float32)
    return numbers(problem.solve(surefoot.Prodigy(problem.params), 60))["d"]


@pytest.mark.in_turn("state_dtype")
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "float8"], ids=str)
@each_engine
def test_short_state_finds_the_d_of_float32(engine, state_dtype):
    problem = Problem(torch.float32)
    optimizer = problem.solve(surefoot.Prodigy(problem.params, state_dtype=state_dtype, **ENGINES[engine]), 60)
    assert numbers(optimizer)["d"] == pytest.approx(d_of_float32(), rel=0.05)


@each_engine
def test_16_bit_weights_with_corrections_find_the_d_of_float32(engine):
    """Steps of a millionth count, which bfloat16 alone would lose."""
    short, wide = Problem(torch.bfloat16), Problem(torch.float32)
    for one, other in zip(short.params, wide.params, strict=True):
        other.data.copy_(one.data)
    options = {"master_weight_bits": 32, "state_dtype": torch.float32}
    optimizer, plain = surefoot.Prodigy(short.params, **options, **ENGINES[engine]), surefoot.Prodigy(wide.params)
    for _ in range(40):
        wide.give_gradients()
        for one, other in zip(short.params, wide.params, strict=True):
            one.grad = other.grad.bfloat16()
            other.grad = one.grad.float()
        optimizer.step()
        plain.step()
    assert numbers(optimizer)["d"] == pytest.approx(numbers(plain)["d"], rel=1e-3)


@each_engine
@pytest.mark.parametrize(
    "more",
    [
        {"state_dtype": torch.bfloat16, "master_weight_bits": 32},
        {"ema": 0.9, "max_grad_norm": 1.0, "telemetry": True, "cautious": True},
    ],
    ids=str,
)
def test_a_slice_of_elements_is_kept_and_resumes(engine, more, tmp_path):
    options = {"slice_p": 11, **more, **ENGINES[engine]}
    through, resumed = Problem(torch.bfloat16), Problem(torch.bfloat16)
    optimizer = through.solve(surefoot.Prodigy(through.groups(), **options), 8)
    for param, shape in zip(through.params, SHAPES, strict=True):
        state, kept = optimizer.state[param], torch.ones(shape).flatten()[::11].shape
        assert (state["s"].shape, state["p0"].shape, state["exp_avg"].shape) == (kept, kept, shape)
        assert (state["s"].dtype, state["p0"].dtype) == (torch.float32, torch.bfloat16)
    surefoot.save(tmp_path / "saved", optimizer=resumed.solve(surefoot.Prodigy(resumed.groups(), **options), 4))
    second = surefoot.Prodigy(resumed.groups(), **options)
    surefoot.load(tmp_path / "saved", optimizer=second)
    resumed.solve(second, 4)
    assert numbers(second) == numbers(optimizer)
    assert all(map(torch.equal, through.params, resumed.params))


def test_a_slice_that_does_not_fit_is_refused_before_anything_changes():
    problem = Problem()
    optimizer = problem.solve(surefoot.Prodigy(problem.params, slice_p=3), 2)
    before = numbers(optimizer), [param.detach().clone() for param in problem.params]
    optimizer.param_groups[0]["slice_p"] = 2
    with pytest.raises(RuntimeError, match=r"state `s` of `params\[1\]` .* has shape \(2,\), must have \(3,\)"):
        problem.solve(optimizer, 1)
    optimizer.param_groups[0]["slice_p"] = 3
    optimizer.state[problem.params[1]]["s"] = optimizer.state[problem.params[1]]["p0"]
    with pytest.raises(RuntimeError, match="`s` and `p0` of .* share memory|`p0` and `s` of .* share memory"):
        problem.solve(optimizer, 1)
    assert (numbers(optimizer), all(map(torch.equal, problem.params, before[1]))) == (before[0], True)
    for wrong in (0, 1.5):
        with pytest.raises((ValueError, TypeError), match="slice_p"):
            surefoot.Prodigy([torch.ones(2, requires_grad=True)], slice_p=wrong)


def test_a_slice_of_sharded_parameters_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        param = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
        with pytest.raises(
            ValueError, match=r"^`slice_p` must be 1 for sharded parameters.*is 3 for one of size \(4, 2"
        ):
            surefoot.Prodigy([param], slice_p=3)
    finally:
        torch.distributed.destroy_process_group()


def test_a_slice_is_refused_under_a_transform():
    state = surefoot.functional.init(surefoot.Prodigy, [torch.ones(5)], slice_p=2)

    def stepped(grad):
        return surefoot.functional.update(surefoot.Prodigy, [torch.ones(5)], [grad], state, slice_p=2)[0][0]

    assert (stepped(torch.ones(5)) < 1).all()
    with pytest.raises(RuntimeError, match="with state of every n-th element cannot be transformed"):
        torch.func.vmap(stepped)(torch.ones(2, 5))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_stands_there_twice_is_refused():
    param = torch.ones(3, requires_grad=True)
    optimizer = surefoot.Prodigy([param, param])
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"Prodigy adds up over all parameters at once, but `params\[0\]`"):
        optimizer.step()
    assert not optimizer.state[param]
    assert param.tolist() == [1.0] * 3


def test_a_quadratic_is_solved_without_a_learning_rate():
    """What it is for: within a factor of two of the distance to the solution, whatever the units."""
    for scale in (1e-2, 1e2):
        param = torch.full((10,), scale, dtype=torch.float64, requires_grad=True)
        optimizer = surefoot.Prodigy([param])
        for _ in range(400):
            optimizer.zero_grad()
            param.abs().sum().backward()
            optimizer.step()
        assert scale / 10 < optimizer.param_groups[0]["d"] < scale * 10
        assert param.abs().max() < scale / 4
