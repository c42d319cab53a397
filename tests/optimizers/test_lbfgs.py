"""L-BFGS against torch's, bit for bit, and against what the mathematics promises."""

import contextlib
import functools
import itertools
import math
import pickle
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from helpers import assert_same, snapshot, torchs_database
from surefoot.optimizers.lbfgs import LBFGS
from surefoot.optimizers.line_search import StrongWolfe, Trial
from surefoot.tensors.native.guards import available

Theirs = torch.optim.LBFGS
Loss = Callable[[list[Tensor]], Tensor]
WOLFE = {"line_search_fn": "strong_wolfe"}
INFO = next(info for info in torchs_database().optim_db if info.optim_cls is Theirs)

# With a budget that no search uses up: torch may evaluate once more than it allows.
each_search = pytest.mark.parametrize("search", [{}, WOLFE | {"max_eval": 500}], ids=["fixed", "strong_wolfe"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


# Problems


def normals(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def rosenbrock(params: list[Tensor]) -> Tensor:
    x = torch.cat([param.reshape(-1) for param in params])
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@functools.cache
def data(dtype: torch.dtype) -> list[Tensor]:
    return normals((20, 4), (20, 2), dtype=dtype, seed=3)


def network(params: list[Tensor]) -> Tensor:
    weight, bias, out, shift = params
    inputs, targets = data(weight.dtype)
    return ((torch.tanh(inputs @ weight + bias) @ out + shift - targets) ** 2).mean()


def quadratic(n: int = 6, condition: float = 100.0, seed: int = 1) -> tuple[Loss, Tensor]:
    """Return a strictly convex quadratic of all elements, and its Hessian."""
    basis = torch.linalg.qr(normals((n, n), seed=seed)[0]).Q
    hessian = basis @ torch.diag(torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)) @ basis.T

    def loss(params: list[Tensor]) -> Tensor:
        x = torch.cat([param.reshape(-1) for param in params])
        return 0.5 * x @ hessian @ x

    return loss, hessian


PROBLEMS: dict[Loss, tuple[tuple[int, ...], ...]] = {
    rosenbrock: ((3,), (2, 2), ()),
    network: ((4, 5), (5,), (5, 2), (2,)),
}
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda loss: loss.__name__)


def start(problem: Loss, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(tensor) for tensor in normals(*PROBLEMS[problem], dtype=dtype, seed=1)]


def closure_of(optimizer: torch.optim.Optimizer, loss: Loss) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(params_of(optimizer))
        value.backward()
        return value

    return closure


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def minimize(optimizer: torch.optim.Optimizer, loss: Loss, steps: int = 3) -> list[Tensor]:
    """Step, and give the losses and iterates."""
    trace = []
    for _ in range(steps):
        trace.append(optimizer.step(closure_of(optimizer, loss)).detach())
        trace += [param.detach().clone() for param in params_of(optimizer)]
    return trace


def assert_twins(ours: LBFGS, theirs: torch.optim.Optimizer, loss: Loss, steps: int = 3) -> None:
    """Assert that both take the same steps to the same state, bit for bit."""
    assert_same(minimize(ours, loss, steps), minimize(theirs, loss, steps))
    assert_same(ours.state_dict()["state"], theirs.state_dict()["state"])


# As torch, bit for bit


@each_dtype
@each_problem
@each_search
@pytest.mark.parametrize("case", INFO.optim_inputs_func(device="cpu"), ids=lambda case: case.desc.replace(" ", "-"))
def test_same_bits_as_torch_for_its_own_cases(case, search, problem, dtype, record_property):
    options = {"max_iter": 12, **case.kwargs, **search}
    # Maximized are functions that have a maximum; torch knows of it from 2.14 on.
    loss = (lambda params: -problem(params)) if options.get("maximize") else problem
    assert_twins(LBFGS(start(problem, dtype), **options), Theirs(start(problem, dtype), **options), loss, steps=2)
    record_property("compared", "LBFGS")


@each_problem
@each_search
@pytest.mark.parametrize("max_iter", [1, 7])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1, "history_size": 1, "max_eval": 5, "tolerance_change": 0},
        {"lr": torch.tensor(0.1, dtype=torch.float64), "history_size": 3, "tolerance_change": 1e-3},
        {"lr": torch.tensor([0.3]), "max_eval": 60, "tolerance_grad": 0},
    ],
    ids=["short memory", "0-d lr", "1-d lr"],
)
def test_same_bits_as_torch(options, max_iter, search, problem, record_property):
    options = {**options, "max_iter": max_iter, **search}
    pair = [kind(start(problem, torch.float32), **options) for kind in (LBFGS, Theirs)]
    assert_twins(*pair, problem, steps=5)
    record_property("compared", "LBFGS")


def test_max_iter_0_only_evaluates():
    optimizer = LBFGS(start(rosenbrock), max_iter=0)
    assert_same(minimize(optimizer, rosenbrock), minimize(Theirs(start(rosenbrock), max_iter=0), rosenbrock))
    assert optimizer.state_dict()["state"] == {0: {"func_evals": 3, "n_iter": 0}}


@each_search
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_numbers_are_computed_in_float32(dtype, search):
    """A quadratic whose products vanish in 16 bits."""
    param = nn.Parameter(torch.tensor([-1.0, 3.0, 0.5], dtype=dtype))
    optimizer = LBFGS([param], max_iter=10, tolerance_grad=0, tolerance_change=0, **search)

    def closure():
        optimizer.zero_grad()
        loss = ((param.float() - 1) ** 2).mean() * 0.01
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    torch.testing.assert_close(param.detach().float(), torch.ones(3), rtol=0.01, atol=0)
    state = optimizer.state[param]
    vectors = [state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"], *state["ro"]]
    assert {vector.dtype for vector in vectors} == {torch.float32}


@pytest.mark.parametrize("most", [1, 2, 3, 5])
@each_search
def test_no_more_evaluations_than_allowed(most, search):
    optimizer = LBFGS(start(rosenbrock), max_iter=20, **{**search, "max_eval": most})
    for _ in range(3):
        before = optimizer.state_dict()["state"].get(0, {}).get("func_evals", 0)
        minimize(optimizer, rosenbrock, 1)
        made = optimizer.state_dict()["state"][0]["func_evals"] - before
        assert made <= max(most, 2 if search else 1)  # a search tries one point at least


@each_search
def test_tolerances_below_zero_never_stop(search):
    param = nn.Parameter(torch.zeros(3))
    optimizer = LBFGS([param], max_iter=4, tolerance_grad=-math.inf, tolerance_change=-math.inf, **search)

    def closure():
        optimizer.zero_grad()
        loss = ((param - 1) ** 2).sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.state[param]["n_iter"] == 12


@pytest.mark.parametrize("loss", [lambda x: -x.sum(), lambda x: (x**2).sum() * 1e38], ids=["no end", "infinite slope"])
def test_a_search_that_leaves_the_range_of_float16_says_so_and_changes_nothing(loss):
    param = nn.Parameter(torch.tensor([0.5, 3.0], dtype=torch.float16))
    optimizer = LBFGS([param], **WOLFE)

    def closure():
        optimizer.zero_grad()
        value = loss(param)
        value.backward()
        return value

    befores = []

    def steps():
        for _ in range(3):
            befores.append(param.detach().clone())
            optimizer.step(closure)

    with pytest.raises(RuntimeError, match="overflow"):
        steps()
    assert torch.equal(param, befores[-1])


@each_search
def test_maximize_is_minimizing_the_negative(search):
    params = [start(rosenbrock) for _ in range(2)]
    upward, downward = LBFGS(params[0], max_iter=5, maximize=True, **search), LBFGS(params[1], max_iter=5, **search)
    for _ in range(3):
        found = upward.step(closure_of(upward, lambda params: -rosenbrock(params)))
        expected = downward.step(closure_of(downward, rosenbrock))
        assert torch.equal(found, -expected)
        assert_same(params_of(upward), params_of(downward))


@each_search
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_numbers_are_two_real_ones(dtype, search):
    values = torch.complex(*normals((2, 3), (2, 3))).to(dtype)

    def loss(params):
        return rosenbrock([torch.view_as_real(param) for param in params])

    pair = [
        kind([nn.Parameter(values.clone()), nn.Parameter(values[0, 0].clone())], **search) for kind in (LBFGS, Theirs)
    ]
    assert_twins(*pair, loss)
    assert pair[0].state[params_of(pair[0])[0]]["d"].shape == (14,)


@each_search
def test_missing_gradients_are_zero_and_sparse_ones_made_dense(search):
    def loss(params):
        table, _, bias, _ = params
        rows = nn.functional.embedding(torch.tensor([0, 2, 2]), table, sparse=True)
        return ((rows + bias - 1) ** 2).sum() + (rows**4).sum()

    def params():
        return [nn.Parameter(tensor) for tensor in normals((4, 3), (2, 2), (), (0, 5))]

    pair = [kind(params(), lr=0.1, **search) for kind in (LBFGS, Theirs)]
    assert_twins(*pair, loss)
    assert torch.equal(params_of(pair[0])[1], params()[1])
    assert torch.equal(params_of(pair[0])[0][1], params()[0][1])


def test_conjugated_and_expanded_gradients():
    loss, grad = torch.tensor(1.0), torch.tensor([1 + 2j, 3 - 1j])
    results = []
    for view in (grad.conj(), grad.conj().resolve_conj()):
        param = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        param.grad = view
        LBFGS([param], max_iter=1).step(lambda: loss)
        results.append(param.detach())
    assert_same(*results)
    param = nn.Parameter(torch.zeros(2, 3))
    param.grad = torch.ones(1, 1).expand(2, 3)
    LBFGS([param], max_iter=1).step(lambda: loss)
    assert torch.equal(param, torch.full((2, 3), -1 / 6))


STRIDED = {
    "channels_last": lambda values: values.to(memory_format=torch.channels_last),
    "transposed": lambda values: values.transpose(1, 3).contiguous().transpose(1, 3),
    "every other": lambda values: values.repeat_interleave(2, dim=3)[..., ::2],
}


@each_search
@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED.keys())
def test_any_strides_give_what_contiguous_memory_gives(layout, search):
    (values,) = normals((2, 3, 4, 5), dtype=torch.float32)
    strided = layout(values.clone())
    memory = torch.as_strided(strided, (strided.untyped_storage().nbytes() // 4,), (1,), 0)
    before, own = memory.clone(), torch.zeros_like(memory, dtype=torch.bool)
    torch.as_strided(own, strided.size(), strided.stride()).fill_(True)
    optimizers = [LBFGS([nn.Parameter(strided)], **search), Theirs([nn.Parameter(values)], **search)]
    for optimizer in optimizers:

        def closure(optimizer=optimizer):
            (param,) = params_of(optimizer)
            optimizer.zero_grad()
            loss = rosenbrock([param])
            loss.backward()
            if optimizer is optimizers[0]:
                param.grad = layout(param.grad)
            return loss

        for _ in range(3):
            optimizer.step(closure)
    assert torch.equal(*(params_of(optimizer)[0] for optimizer in optimizers))
    assert torch.equal(memory[~own], before[~own])


@each_search
def test_state_crosses_to_torch_and_back(search):
    kinds = [LBFGS, Theirs, LBFGS, Theirs, Theirs, LBFGS]
    optimizer, reference = (Theirs(start(rosenbrock), lr=0.5, max_iter=4, **search) for _ in range(2))
    for kind in kinds:
        successor = kind([param.detach().clone().requires_grad_() for param in params_of(optimizer)], max_iter=1)
        successor.load_state_dict(deepcopy(optimizer.state_dict()))
        optimizer = successor
        assert_same(minimize(optimizer, rosenbrock, 1), minimize(reference, rosenbrock, 1))
    found = optimizer.state_dict()
    found["param_groups"][0].setdefault("maximize", False)
    expected = reference.state_dict()
    expected["param_groups"][0].setdefault("maximize", False)  # torch has it from 2.14 on
    assert_same(found, expected)


def test_closure_may_return_a_number_and_step_gives_it_back():
    param = nn.Parameter(torch.tensor([3.0]))

    def closure():
        param.grad = 2 * param.detach()
        return 9.0

    assert LBFGS([param], max_iter=1).step(closure) == 9.0
    assert param.item() == 2.0
    value = torch.tensor([4.0], requires_grad=True)
    assert LBFGS([param]).step(lambda: value) is value


def test_closure_runs_with_gradients_enabled_and_step_without():
    optimizer, modes = LBFGS(start(rosenbrock)), []
    optimizer.register_step_post_hook(lambda *_: modes.append(torch.is_grad_enabled()))

    def closure():
        modes.append(torch.is_grad_enabled())
        return closure_of(optimizer, rosenbrock)()

    with torch.no_grad():
        optimizer.step(closure)
    assert modes == [True] * (len(modes) - 1) + [False]


# What the mathematics promises


@pytest.mark.parametrize("lrs", [(1.0, 1.0), (0.5, 0.125), (0.25, 1.0)], ids=str)
@pytest.mark.parametrize("history_size", [2, 100])
def test_iterates_are_those_of_the_papers_recursion(history_size, lrs):
    loss, hessian = quadratic()
    parts = normals((2,), (4,))
    groups = [{"params": [nn.Parameter(part.clone())], "lr": lr} for part, lr in zip(parts, lrs, strict=True)]
    optimizer = LBFGS(groups, max_iter=1, history_size=history_size)
    units = torch.tensor([lrs[0]] * 2 + [lrs[1]] * 4, dtype=torch.float64) / max(lrs)
    x, pairs = torch.cat(parts), []
    for iteration in range(8):
        minimize(optimizer, loss, 1)
        grad = hessian @ x
        step = max(lrs) * -inverse_hessian(pairs[-history_size:], units) @ grad
        if iteration == 0:
            torch.testing.assert_close(step, -torch.tensor([lrs[0]] * 2 + [lrs[1]] * 4, dtype=torch.float64) * grad)
            step *= min(1, 1 / grad.abs().sum())
        pairs.append((step, hessian @ step))
        x = x + step
        torch.testing.assert_close(torch.cat(params_of(optimizer)), x, rtol=1e-9, atol=1e-12)


def inverse_hessian(pairs: list[tuple[Tensor, Tensor]], units: Tensor) -> Tensor:
    """Apply the recursion of the docstring to dense matrices."""
    inverse, identity = torch.diag(units), torch.eye(len(units), dtype=units.dtype)
    if pairs:
        step, change = pairs[-1]
        inverse = (change @ step) / (change @ inverse @ change) * inverse
    for step, change in pairs:
        rho = 1 / (change @ step)
        left = identity - rho * torch.outer(step, change)
        inverse = left @ inverse @ left.T + rho * torch.outer(step, step)
    return inverse


@each_search
@pytest.mark.parametrize("lrs", [(1.0, 0.1), (0.02, 0.5)], ids=str)
def test_groups_of_different_lr_are_one_group_of_torch_in_other_units(lrs, search):
    loss, _ = quadratic()
    units = torch.tensor([lrs[0]] * 2 + [lrs[1]] * 4, dtype=torch.float64).div(max(lrs)).sqrt()
    (begin,) = normals((6,))
    begin *= 0.1  # the first step is shorter where |g|_1 > 1, which depends on units
    parts = begin.split((2, 4))
    groups = [{"params": [nn.Parameter(part.clone())], "lr": lr} for part, lr in zip(parts, lrs, strict=True)]
    ours = LBFGS(groups, max_iter=8, tolerance_grad=0, tolerance_change=0, **search)
    theirs = Theirs(
        [nn.Parameter(begin / units)], lr=max(lrs), max_iter=8, tolerance_grad=0, tolerance_change=0, **search
    )
    for _ in range(2):
        minimize(ours, loss, 1)
        minimize(theirs, lambda params: loss([params[0] * units]), 1)
        torch.testing.assert_close(torch.cat(params_of(ours)), params_of(theirs)[0] * units, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("lrs", [(1,), (1.0, 0.1), (0.01, 1.0)], ids=str)
def test_gradient_of_a_strictly_convex_quadratic_vanishes(lrs, condition):
    loss, _ = quadratic(12, condition)
    values = torch.tensor_split(normals((12,))[0], len(lrs))
    groups = [{"params": [nn.Parameter(value)], "lr": lr} for value, lr in zip(values, lrs, strict=True)]
    optimizer = LBFGS(groups, tolerance_grad=1e-10, tolerance_change=0, **WOLFE)
    trace = minimize(optimizer, loss, 25)
    assert max(param.grad.abs().max() for param in params_of(optimizer)) <= 1e-10
    losses = trace[:: 1 + len(lrs)]
    assert losses == sorted(losses, reverse=True)


@each_search
def test_a_rotation_of_coordinates_rotates_the_iterates(search):
    loss, _ = quadratic()
    rotation = torch.linalg.qr(normals((6, 6), seed=7)[0]).Q
    (begin,) = normals((6,))
    begin *= 0.1  # the first step is shorter where |g|_1 > 1, which depends on coordinates
    plain, turned = (LBFGS([nn.Parameter(x.clone())], max_iter=10, **search) for x in (begin, rotation @ begin))
    minimize(plain, loss, 1)
    minimize(turned, lambda params: loss([rotation.T @ params[0]]), 1)
    assert params_of(plain)[0].norm() < 0.5 * begin.norm()
    torch.testing.assert_close(rotation.T @ params_of(turned)[0], params_of(plain)[0], rtol=1e-6, atol=1e-9)


def line(function: Callable[[Tensor], Tensor]) -> Callable[[float | Tensor], Trial]:
    def evaluate(step):
        t = torch.as_tensor(float(step), dtype=torch.float64).requires_grad_()
        loss = function(t)
        (slope,) = torch.autograd.grad(loss, t)
        return Trial(step, math.inf if loss.isnan() else loss.item(), slope, slope)

    return evaluate


LINES = {
    "quadratic": lambda t: (t - 1) ** 2,
    "More and Thuente 5.1": lambda t: -t / (t**2 + 2),
    "More and Thuente 5.2": lambda t: (t + 0.004) ** 5 - 2 * (t + 0.004) ** 4,
    "wavy": lambda t: t**2 / 50 - t + torch.sin(3 * t) / 6,
    "barrier": lambda t: -2 * t - torch.log(5 - t),
}


@pytest.mark.parametrize("function", LINES.values(), ids=LINES.keys())
@pytest.mark.parametrize("first", [1e-3, 0.1, 1, 10, 100])
def test_line_search_ends_where_both_wolfe_conditions_hold(first, function):
    evaluate = line(function)
    begin = evaluate(0)
    assert begin.slope < 0
    end = StrongWolfe(evaluate, begin, lambda: torch.tensor(1.0), 25).search(first)
    assert end.loss <= begin.loss + 1e-4 * float(end.step) * begin.slope
    assert abs(end.slope) <= 0.9 * abs(begin.slope)


@pytest.mark.parametrize("budget", [-1, 0, 1, 2, 5])
def test_line_search_never_ends_higher_than_it_began_however_small_the_budget(budget):
    evaluate = line(lambda t: torch.cosh(30 * (t - 0.01)))
    wolfe = StrongWolfe(evaluate, evaluate(0), lambda: torch.tensor(1.0), budget)
    assert wolfe.search(1.0).loss <= evaluate(0).loss
    assert wolfe.trials == max(budget, 1)


@pytest.mark.parametrize(
    ("loss", "begin", "least"),
    [
        (lambda params: params[0] - torch.log(params[0]), 10.0, 1.0),
        (lambda params: torch.exp((params[0] - 2) ** 2), 1.0, 2.0),
    ],
    ids=["NaN", "inf"],
)
def test_line_search_steps_back_from_where_the_loss_does_not_exist(loss, begin, least):
    ours, theirs = (kind([nn.Parameter(torch.tensor(begin))], lr=100, **WOLFE) for kind in (LBFGS, Theirs))
    minimize(ours, loss, 5)
    assert params_of(ours)[0].item() == pytest.approx(least, rel=1e-3)
    minimize(theirs, loss, 5)
    assert not math.isclose(params_of(theirs)[0].item(), least, rel_tol=0.5)


# Groups


@each_search
@each_dtype
def test_groups_of_equal_lr_are_one_group(dtype, search):
    whole, parts = start(network, dtype), start(network, dtype)
    one = Theirs(whole, lr=0.5, **search)
    two = LBFGS([{"params": parts[:1]}, {"params": parts[1:]}], lr=0.5, **search)
    assert_twins(two, one, network)


@each_search
def test_a_group_of_lr_0_stays_and_counts_as_constant(search):
    moving, still = (start(network) for _ in range(2))
    two = LBFGS([{"params": moving[:2], "lr": 0.0}, {"params": moving[2:], "lr": 0.5}], **search)
    alone = LBFGS(still[2:], lr=0.5, **search)
    minimize(two, network, 4)
    minimize(alone, lambda params: network([*still[:2], *params]), 4)
    assert_same(moving[:2], start(network)[:2])
    torch.testing.assert_close(moving[2:], still[2:], rtol=1e-6, atol=1e-9)
    assert moving[2].norm() != start(network)[2].norm()


@each_search
def test_a_group_may_wake_up_and_sleep_again(search):
    params = start(network)
    optimizer = LBFGS([{"params": params[:2], "lr": 0.0}, {"params": params[2:], "lr": 0.5}], max_iter=5, **search)
    for lrs in ((0.0, 0.5), (0.5, 0.5), (0.5, 0.0), (0.0, 0.0), (0.5, 0.5)):
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        before = deepcopy(optimizer.param_groups)
        minimize(optimizer, network, 1)
        for old, new in zip(before, optimizer.param_groups, strict=True):
            assert all(map(torch.equal, old["params"], new["params"])) == (new["lr"] == 0)
    minimize(optimizer, network, 8)
    assert network(params) < 0.5 * network(start(network))


@each_search
def test_lr_0_everywhere_moves_nothing(search):
    optimizer = LBFGS(start(rosenbrock), lr=0, **search)
    minimize(optimizer, rosenbrock)
    assert_same(params_of(optimizer), start(rosenbrock))


def test_options_come_from_the_first_group():
    first, second = start(network)[:2], start(network)[2:]
    optimizer = LBFGS([{"params": first, "max_iter": 3}, {"params": second, "lr": 0.5}], **WOLFE)
    assert [group["max_iter"] for group in optimizer.param_groups] == [3, 3]
    assert [group["lr"] for group in optimizer.param_groups] == [1, 0.5]
    before = snapshot(optimizer)
    refused = {"params": [nn.Parameter(torch.ones(2))], "history_size": 5}
    with pytest.raises(ValueError, match="per-parameter options") as error:
        optimizer.add_param_group(refused)
    assert str(error.value) == (
        "LBFGS doesn't support per-parameter options (parameter groups) except `lr`, but param_groups[2] has "
        "history_size=5 and param_groups[0] history_size=100; give all groups the same"
    )
    assert refused.keys() == {"params", "history_size"}
    assert_same(snapshot(optimizer), before)
    optimizer.param_groups[1]["max_iter"] = 4
    with pytest.raises(ValueError, match=r"param_groups\[1\] has max_iter=4 and param_groups\[0\] max_iter=3"):
        minimize(optimizer, network)


# Whatever is changed between steps counts


@each_search
def test_a_tensor_lr_that_a_scheduler_changes_in_place_does_not_change_the_past(search):
    number, tensor = (LBFGS(start(rosenbrock), lr=lr, max_iter=3, **search) for lr in (0.5, torch.tensor(0.5)))
    for _ in range(3):
        minimize(number, rosenbrock, 1)
        minimize(tensor, rosenbrock, 1)
        number.param_groups[0]["lr"] *= 0.5
        tensor.param_groups[0]["lr"].mul_(0.5)
    torch.testing.assert_close(params_of(tensor), params_of(number), rtol=1e-6, atol=1e-9)


def test_a_shorter_history_forgets_the_oldest_and_options_may_grow():
    optimizer = LBFGS(start(rosenbrock), max_iter=8, **WOLFE)
    minimize(optimizer, rosenbrock, 1)
    state = optimizer.state[params_of(optimizer)[0]]
    newest = state["old_dirs"][-2:]
    optimizer.param_groups[0].update(history_size=3, max_iter=1)
    minimize(optimizer, rosenbrock, 1)
    assert_same(state["old_dirs"][:2], newest)
    assert [len(state[name]) for name in ("old_dirs", "old_stps", "ro", "al")] == [3] * 4
    optimizer.param_groups[0]["history_size"] = 50
    minimize(optimizer, rosenbrock, 4)
    assert len(state["al"]) == 50


@each_search
def test_parameters_may_change_dtype_and_memory(search):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    inputs, targets = normals((10, 3), (10, 1))
    optimizer = LBFGS(model.parameters(), max_iter=4, **search)

    def loss(params):
        return ((model(inputs.to(params[0])) - targets.to(params[0])) ** 2).mean()

    minimize(optimizer, loss, 2)
    before = loss(params_of(optimizer)).item()
    model.double()
    for param in model.parameters():
        param.data = param.data.clone()
    minimize(optimizer, loss, 2)
    state = optimizer.state[params_of(optimizer)[0]]
    assert {value.dtype for value in (state["d"], *state["old_dirs"], *state["ro"])} == {torch.float64}
    assert len(state["old_dirs"]) > 4
    assert loss(params_of(optimizer)).item() < before


def test_a_new_group_starts_afresh():
    params = start(network)
    optimizer = LBFGS(params[2:], **WOLFE)

    def loss(_):
        return network(params)

    minimize(optimizer, loss, 2)
    optimizer.add_param_group({"params": params[:2], "lr": 0.1})
    assert not optimizer.state
    before = loss(params)
    minimize(optimizer, loss, 2)
    assert loss(params) < before


def test_a_new_shape_is_refused_until_state_is_cleared():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2))]
    optimizer = LBFGS(params)
    minimize(optimizer, rosenbrock, 1)
    params[1].data = torch.zeros(4)
    with pytest.raises(RuntimeError) as error:
        minimize(optimizer, rosenbrock, 1)
    assert str(error.value) == (
        "state `d` has shape (5,), but the parameters have 7 real elements in all; after changing a parameter's shape "
        "start afresh with `optimizer.state.clear()`"
    )
    optimizer.state.clear()
    minimize(optimizer, rosenbrock, 1)


@each_search
@pytest.mark.parametrize("copy", [deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_alike_and_apart(copy, search):
    optimizer = LBFGS(start(rosenbrock), lr=torch.tensor(0.5), max_iter=4, **search)
    minimize(optimizer, rosenbrock, 2)
    twin, before = copy(optimizer), snapshot(optimizer)
    future = minimize(twin, rosenbrock, 2)
    assert_same(snapshot(optimizer), before)
    assert_same(minimize(optimizer, rosenbrock, 2), future)


def test_what_state_dict_gave_is_not_changed_by_later_steps():
    optimizer = LBFGS(start(rosenbrock), max_iter=4)
    minimize(optimizer, rosenbrock, 1)
    state = dict(optimizer.state_dict()["state"][0])
    copy = deepcopy(state)
    minimize(optimizer, rosenbrock, 1)
    assert_same(state, copy)


# All or nothing


class Interruption(BaseException):
    """Neither an Exception nor expected."""


@each_search
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_closure_that_raises_leaves_everything_as_it_was(steps_before, search):
    optimizer = LBFGS(start(network), lr=0.5, max_iter=4, **{**search, "max_eval": 12})
    minimize(optimizer, network, steps_before)
    before, undisturbed = snapshot(optimizer), minimize(deepcopy(optimizer), network, 1)
    for k in itertools.count(1):
        calls = itertools.count(1)

        def closure(k=k, calls=calls):
            if next(calls) == k:
                raise Interruption
            return closure_of(optimizer, network)()

        with contextlib.suppress(Interruption):
            optimizer.step(closure)
            break
        assert_same(snapshot(optimizer), before)
    assert k == next(calls)
    assert k > 4
    assert_same([param.detach() for param in params_of(optimizer)], undisturbed[1:])


def test_a_gradient_that_does_not_fit_leaves_everything_as_it_was():
    optimizer = LBFGS(start(rosenbrock), max_iter=4)
    minimize(optimizer, rosenbrock, 1)
    before, calls = snapshot(optimizer), itertools.count(1)

    def closure():
        loss = closure_of(optimizer, rosenbrock)()
        if next(calls) == 3:
            params_of(optimizer)[1].data = torch.zeros(3)
            params_of(optimizer)[1].grad = torch.zeros(3)
            params_of(optimizer)[1].data = values
        return loss

    values = params_of(optimizer)[1].data
    with pytest.raises(RuntimeError, match=r"the gradient of `params\[1\]` of shape \(2, 2\) has shape \(3,\)"):
        optimizer.step(closure)
    assert_same(snapshot(optimizer), before)


# Loading


def test_loading_verifies_the_length_of_flat_vectors():
    big = LBFGS([nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(5))])
    minimize(big, rosenbrock, 1)
    saved = big.state_dict() | {"state": {0: dict(big.state_dict()["state"][0])}}
    saved["state"][0] |= {
        "d": torch.ones(5),
        "old_stps": [torch.ones(8), torch.ones(3, 2)],
        "old_dirs": [torch.ones(8)],
    }
    before = snapshot(big)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        big.load_state_dict(saved)
    assert str(error.value).splitlines() == [
        "the state dict does not fit this LBFGS; nothing was loaded.",
        "  state `d` has shape (5,), but the parameters have 8 real elements in all",
        "  state `old_stps[1]` has shape (3, 2), but the parameters have 8 real elements in all",
        f"  state `old_dirs` has length 1, `old_stps` has length 2, `ro` has length {len(before['state'][0]['ro'])}",
    ]
    assert_same(snapshot(big), before)
    saved["param_groups"][0]["max_iter"] = 7
    report = big.load_state_dict(saved, strict=False)
    assert report.mismatched == [text.strip() for text in str(error.value).splitlines()[1:]]
    assert big.param_groups[0]["max_iter"] == 7
    assert_same(snapshot(big)["state"], before["state"])
    assert not big._optimizer_load_state_dict_pre_hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": {0: {"old_dirs": 5}}}, "state `old_dirs` is int, must be a list"),
        ({"state": {0: {"d": [1.0]}}}, "state `d` is list, must be a tensor"),
        (
            {"state": {1: {"func_evals": 3}}},
            "state of parameter number 1: LBFGS keeps its state with the first parameter",
        ),
        ({"state": {0: 5}}, "not an optimizer's state dict"),
        ({"state": None}, "not an optimizer's state dict"),
        ({"param_groups": None}, "not an optimizer's state dict"),
        ({"param_groups": [{}]}, "not an optimizer's state dict"),
    ],
    ids=str,
)
def test_loading_refuses_what_is_no_state(change, message):
    optimizer = LBFGS([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(optimizer.state_dict() | change)
    assert_same(snapshot(optimizer), before)


def test_loading_refuses_groups_that_disagree():
    optimizer = LBFGS([{"params": [nn.Parameter(torch.ones(3))]}, {"params": [nn.Parameter(torch.ones(5))]}])
    before, saved = snapshot(optimizer), deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["tolerance_grad"] = 0.5
    with pytest.raises(ValueError, match=r"param_groups\[1\] has tolerance_grad=0\.5 and param_groups\[0\]"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


def test_loading_by_name_refuses_another_order():
    params = {"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.zeros(5))}
    one, other = LBFGS(params.items()), LBFGS(reversed(params.items()))
    minimize(one, rosenbrock, 1)
    with pytest.raises(ValueError, match="the same names in another order, and flat vectors follow the order"):
        other.load_state_dict(one.state_dict())
    regrouped = LBFGS([{"params": [("a", params["a"])]}, {"params": [("b", params["b"])]}])
    assert not regrouped.load_state_dict(one.state_dict())
    assert_same(regrouped.state_dict()["state"], one.state_dict()["state"])


def test_pre_hooks_may_make_a_state_dict_fit():
    optimizer = LBFGS([nn.Parameter(torch.zeros(5))])
    minimize(optimizer, rosenbrock, 1)
    saved = deepcopy(optimizer.state_dict())
    broken = saved | {"state": {0: saved["state"][0] | {"d": torch.ones(9)}}}
    optimizer.register_load_state_dict_pre_hook(lambda *_: saved)
    assert not optimizer.load_state_dict(broken)
    assert_same(optimizer.state_dict(), saved)


# Errors


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0; `lr` must be a number in [0, inf)"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element, but its shape is (2,)"),
        ({"max_iter": -1}, ValueError, "Invalid max_iter value: -1; `max_iter` must be a number in [0, inf)"),
        ({"max_iter": "20"}, TypeError, "`max_iter` must be a number, but got '20' (str)"),
        ({"max_eval": math.nan}, ValueError, "Invalid max_eval value: nan"),
        ({"tolerance_grad": math.nan}, ValueError, "Invalid tolerance_grad value: nan"),
        ({"tolerance_change": math.nan}, ValueError, "Invalid tolerance_change value: nan"),
        ({"history_size": 0}, ValueError, "Invalid history_size value: 0; `history_size` must be a number in [1, inf)"),
        ({"history_size": 2.5}, TypeError, "`history_size` must be a whole number, but got 2.5"),
        (
            {"line_search_fn": "armijo"},
            RuntimeError,
            "only 'strong_wolfe' is supported as `line_search_fn`, or None for steps of fixed length, but got 'armijo'",
        ),
    ],
    ids=str,
)
def test_hyperparameters_are_checked(options, kind, message):
    params = [nn.Parameter(torch.ones(2))]
    for groups, defaults in ((params, options), ([{"params": params, **options}], {})):
        with pytest.raises(kind) as error:
            LBFGS(groups, **defaults)
        assert str(error.value).startswith(message)


def test_options_that_work_in_torch_work_here():
    options = {"max_iter": math.inf, "tolerance_grad": 0, "tolerance_change": 1e-12}
    optimizer = LBFGS(start(rosenbrock), **options, **WOLFE)
    assert optimizer.defaults["max_eval"] == math.inf
    minimize(optimizer, rosenbrock, 1)
    assert max(param.grad.abs().max() for param in params_of(optimizer)) < 1e-5


def test_step_needs_a_closure_that_gives_the_loss():
    optimizer = LBFGS(start(rosenbrock))
    minimize(optimizer, rosenbrock, 1)
    before = snapshot(optimizer)
    with pytest.raises(TypeError) as error:
        optimizer.step()
    assert str(error.value) == "LBFGS evaluates the model several times in a step: call step(closure), not step()"
    with pytest.raises(TypeError) as error:
        optimizer.step(lambda: None)
    assert str(error.value) == "the closure given to LBFGS must return the loss, but it returned None"
    assert_same(snapshot(optimizer), before)


def test_nothing_to_optimize_is_no_error():
    assert LBFGS([{"params": []}]).step(lambda: 3.0) == 3.0
    assert LBFGS([nn.Parameter(torch.ones(0))]).step(lambda: 3.0) == 3.0


# Reads of the device


class Far(Tensor):
    """A tensor as on another device: its values stand in a tensor nearby, and each read of them is counted."""

    reads = 0

    @staticmethod
    def __new__(cls, near):
        far = Tensor._make_wrapper_subclass(cls, near.shape, strides=near.stride(), dtype=near.dtype, device="meta")
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, dict(kwargs or {})))
        device = torch.device(kwargs.pop("device", None) or "meta")
        to_host = func is torch.ops.aten._local_scalar_dense.default or device.type == "cpu"
        Far.reads += to_host
        result = func(*args, **kwargs)
        return result if to_host else tree_map(lambda x: Far(x) if isinstance(x, Tensor) else x, result)


@each_search
def test_a_device_is_read_less_often_than_by_torch(search):
    reads, results = [], []
    for kind, far in itertools.product((LBFGS, Theirs), (True, False)):
        (values,) = normals((9,), dtype=torch.float32)
        param = (Far(values) if far else values).requires_grad_()

        def closure(values=values, param=param, far=far):
            x = values.detach().clone().requires_grad_()
            loss = rosenbrock([x])
            loss.backward()
            param.grad = Far(x.grad) if far else x.grad
            return Far(loss.detach()) if far else loss.detach()

        optimizer, Far.reads = kind([param], max_iter=6, **search), 0
        for _ in range(2):
            optimizer.step(closure)
        evaluations = optimizer.state[param]["func_evals"]
        reads.append((Far.reads, evaluations, optimizer.state[param]["n_iter"]))
        results.append(values.detach())
    (ours, evaluations, iterations), _, (theirs, *_), _ = reads
    assert ours <= 2 * evaluations + 5 * iterations + 2 < theirs
    for result in results[1:]:
        torch.testing.assert_close(results[0], result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["d", "old_dirs", "old_stps", "ro"])
@pytest.mark.parametrize("change", ["without memory", "resized", "whole numbers", "same"])
def test_state_that_changes_where_it_stands_is_noticed(name, change):
    """When the history is full, a compiled look tells whether state is like that of the last step."""
    optimizer = LBFGS(start(rosenbrock, torch.float32), max_iter=3, history_size=2, tolerance_change=0)
    minimize(optimizer, rosenbrock, steps=5)
    if available():
        assert optimizer._guard.state._alike
    (params,) = (group["params"] for group in optimizer.param_groups)
    state, before = optimizer.state[params[0]], [param.detach().clone() for param in params]
    vector = state[name] if name == "d" else state[name][-1]
    if change == "without memory":
        vector.untyped_storage().resize_(0)
    elif change == "resized":
        vector.resize_(3, 5)
    elif change == "whole numbers":
        vector.data = vector.to(torch.int32)
    else:
        vector.data = vector.clone()
        minimize(optimizer, rosenbrock, steps=2)
        return
    with pytest.raises(RuntimeError, match=f"state `{name}"):
        minimize(optimizer, rosenbrock, steps=1)
    assert all(map(torch.equal, params, before))
