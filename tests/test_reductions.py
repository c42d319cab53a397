"""Rules that reduce tensors to numbers: each reduction, stages that build on one another, numbers as state."""

import copy
import inspect
import math

import pytest
import torch
from torch.linalg import vector_norm

import surefoot
from conformance import ENGINES, ROWS, assert_close, each_engine, normals, train, zoo
from helpers import assert_same, snapshot
from surefoot.errors import RuleError
from surefoot.rule import DIRECTED, STEP, bind, one_number

DTYPES = (torch.float32, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rule(update, *, slots=(), lr=0.1, name="Rule", **attributes):
    """Make an optimizer class out of an update."""

    def build(self, params, **options):
        surefoot.Optimizer.__init__(self, params, {"lr": lr, **options})

    members = {"__init__": build, "update": staticmethod(update), "slots": slots, "scalars": (STEP,), **attributes}
    return type(name, (surefoot.Optimizer,), members)


SPELLINGS = {
    "torch.sum": (torch.sum, lambda x: x.sum()),
    "method sum": (lambda x: x.sum(), lambda x: x.sum()),
    "torch.mean": (torch.mean, lambda x: x.mean()),
    "method mean": (lambda x: x.mean(), lambda x: x.mean()),
    "vector_norm": (vector_norm, lambda x: x.norm()),
    "method norm": (lambda x: x.norm(), lambda x: x.norm()),
    "torch.norm": (torch.norm, lambda x: x.norm()),
    "norm of 2": (lambda x: torch.norm(x, 2), lambda x: x.norm()),
    "vector_norm of 2": (lambda x: vector_norm(x, ord=2), lambda x: x.norm()),
    "of a product": (lambda x: torch.sum(x * x * 0.5), lambda x: (x * x * 0.5).sum()),
    "of a comparison": (lambda x: torch.mean(torch.where(x > 0, 1.0, 0.0)), lambda x: (x > 0).to(x).mean()),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@each_engine
@each_dtype
def test_a_reduction_is_of_the_whole_tensor(engine, dtype, spelling):
    ours, expected = SPELLINGS[spelling]
    cls = rule(lambda param, grad, c, flags: param - c.lr * ours(grad) * grad)
    params = zoo(dtype)
    optimizer = cls([{"params": list(params.values())[:5]}, {"params": list(params.values())[5:]}], **ENGINES[engine])
    exact = {name: param.detach().double() for name, param in params.items()}
    for step in range(3):
        normal = normals(dtype, seed=step)
        for name, param in params.items():
            param.grad = normal(*param.shape)
            grad = param.grad.double()
            exact[name] = exact[name] - 0.1 * expected(grad) * grad
        optimizer.step()
    tolerance = 32 * torch.finfo(dtype).eps
    for name, param in params.items():
        if param.numel():
            scale = exact[name].abs().max().item()
            torch.testing.assert_close(param.double(), exact[name], rtol=tolerance, atol=tolerance * scale, msg=name)


def test_of_complex_tensors_real_and_imaginary_parts_are_elements():
    cls = rule(lambda param, grad, c, flags: param - torch.mean(grad) * grad / vector_norm(grad))
    start, grad = torch.tensor([1 + 2j, 3 - 1j]), torch.tensor([2 + 1j, -1 + 4j])
    parts = torch.view_as_real(grad)
    expected = start - parts.mean() * grad / parts.norm()
    for options in ENGINES.values():
        param = start.clone().requires_grad_()
        optimizer = cls([param], **options)
        param.grad = grad
        optimizer.step()
        torch.testing.assert_close(param.detach(), expected)


def chain(param, grad, total, c, flags):
    """Reduce three times, each time what the reduction before has scaled, and keep a number."""
    one = grad / vector_norm(grad)
    two = one * torch.mean(one * one)
    three = two / (1 + torch.sum(torch.abs(two)))
    total = total * 0.5 + vector_norm(three)
    return param - c.lr * three * total, total


def chained(param, grad, total):
    one = grad / grad.norm()
    two = one * (one * one).mean()
    three = two / (1 + two.abs().sum())
    total = total * 0.5 + three.norm()
    return param - 0.1 * three * total, total


NUMBER = (surefoot.Slot("total", shape=one_number, wide=True),)


@each_engine
@each_dtype
def test_reductions_of_what_depends_on_others_come_in_stages(engine, dtype):
    cls = rule(chain, slots=NUMBER)
    assert [len(stage.sums) for stage in bind(cls.spec, cls.spec.settle_flags({})).stages] == [1, 1, 1, 1]
    normal = normals(dtype, seed=4)
    params = [normal(*shape).requires_grad_() for shape in ((), (5,), (40_000,), (3, 7))]
    exact, totals = [p.detach().double() for p in params], [torch.zeros(()).double() for _ in params]
    optimizer = cls(params, **ENGINES[engine])
    for _ in range(4):
        for index, param in enumerate(params):
            param.grad = normal(*param.shape)
            exact[index], totals[index] = chained(exact[index], param.grad.double(), totals[index])
        optimizer.step()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    for param, value, total in zip(params, exact, totals, strict=True):
        torch.testing.assert_close(param.detach().double(), value, **tolerance)
        number = optimizer.state[param]["total"]
        assert number.shape == ()
        assert number.dtype is dtype
        torch.testing.assert_close(number.double(), total, **tolerance)


def test_measuring_changes_nothing():
    """Neither elements nor version counters, of tensors that kernels copy tile by tile either."""
    counts = []
    for cls in (rule(chain, slots=NUMBER), rule(lambda param, grad, c, flags: param - c.lr * grad)):
        params = [torch.ones(6, 4)[:, ::2].requires_grad_(), torch.ones(8).requires_grad_()]
        optimizer = cls(params, fused=True)
        for param in params:
            param.grad = torch.arange(param.numel(), dtype=param.dtype).view(param.shape)
        grads = [(param.grad, param.grad.clone(), param.grad._version) for param in params]
        before = [param._version for param in params]
        optimizer.step()
        counts.append([param._version - old for param, old in zip(params, before, strict=True)])
        for grad, copied, version in grads:
            assert torch.equal(grad, copied)
            assert grad._version == version
    assert counts[0] == counts[1]


def test_a_number_of_state_is_saved_loaded_and_goes_on():
    cls = rule(chain, slots=NUMBER)

    def run(optimizer, params, steps):
        for step in steps:
            for param in params:
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    params = [torch.ones(5, 3, requires_grad=True), torch.ones(9, requires_grad=True)]
    optimizer = cls(params)
    run(optimizer, params, range(3))
    others = [param.detach().clone().requires_grad_() for param in params]
    resumed = cls(others)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, range(3, 6))
    run(resumed, others, range(3, 6))
    for one, other in zip(params, others, strict=True):
        assert torch.equal(one, other)
        assert_same(optimizer.state[one], resumed.state[other])


def test_a_step_that_is_skipped_changes_no_number():
    params = [torch.ones(4, requires_grad=True), torch.ones(3, 2, requires_grad=True)]
    optimizer = surefoot.NovoGrad(params, nonfinite="skip")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = snapshot(optimizer)
    params[0].grad[1] = torch.nan
    with pytest.warns(RuntimeWarning, match="was skipped"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_a_parameter_that_is_there_twice_is_measured_as_its_turn_comes(engine):
    param, twin = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)
    given = {} if engine == "cpu" else {"foreach": False}
    cls = rule(lambda param, grad, c, flags: param - grad / vector_norm(param))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = cls([param, param], **given)
    once = cls([twin], **given)
    param.grad = twin.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    once.step()
    once.step()
    assert torch.equal(param, twin)


# Errors


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda param, grad, c, flags: param - torch.sum(grad, dim=0), "`sum` takes a tensor and nothing else"),
        (lambda param, grad, c, flags: param - grad.mean(0), "`mean` takes a tensor and nothing else"),
        (lambda param, grad, c, flags: param - vector_norm(grad, 1), "takes a tensor and nothing else"),
        (lambda param, grad, c, flags: param - vector_norm(grad, dim=0), "takes a tensor and nothing else"),
        (lambda param, grad, c, flags: param - torch.norm(grad, 2, 0), "takes a tensor and nothing else"),
        (lambda param, grad, c, flags: param - torch.norm(grad, 1), "takes a tensor and nothing else"),
        (lambda param, grad, c, flags: param - torch.sum(c.lr) * grad, "argument 1 of `sum` must be a tensor"),
        (lambda param, grad, c, flags: param - grad.amax() * grad, "`amax` is not among the operations of a rule"),
    ],
)
def test_what_is_no_reduction_is_refused_with_its_line(update, message):
    param = torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    with pytest.raises(RuleError, match=message) as caught:
        rule(update)([param]).step()
    assert f"{__file__}:{update.__code__.co_firstlineno}" in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "returned", "message"),
    [
        (None, lambda grad, c: torch.mean(grad), "must return a tensor for `s`, but returned one number"),
        (None, lambda grad, c: c.lr, "must return a tensor for `s`, but returned one number"),
        (one_number, lambda grad, c: grad, "must return one number for `s`, but returned a tensor"),
        (one_number, lambda grad, c: grad * torch.mean(grad), "must return one number for `s`, but returned a tensor"),
    ],
)
@each_engine
def test_a_slot_gets_what_it_is(engine, shape, returned, message):
    cls = rule(
        lambda param, grad, s, c, flags: (param - c.lr * grad, returned(grad, c)),
        slots=(surefoot.Slot("s", shape=shape),),
    )
    param = torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    optimizer = cls([param], **ENGINES[engine])
    with pytest.raises(RuleError, match=message) as caught:
        optimizer.step()
    assert __file__ in str(caught.value)
    assert torch.equal(param.detach(), torch.ones(2))
    assert not optimizer.state


@pytest.mark.parametrize("value", [3.0, torch.ones(1), torch.ones(2), torch.tensor(3)], ids=str)
@each_engine
def test_state_of_one_number_is_looked_at_before_every_step(engine, value):
    params = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = surefoot.NovoGrad(params, **ENGINES[engine])
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(4):
        optimizer.step()
    optimizer.state[params[0]]["exp_avg_sq"] = value
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"state `exp_avg_sq` of `params\[0\]`.* must be|must have"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_autograd_knows_that_numbers_of_state_are_written():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = surefoot.NovoGrad(params)
    for _ in range(4):
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()
        versions = [optimizer.state[param]["exp_avg_sq"]._version for param in params]
    optimizer.step()
    assert all(optimizer.state[p]["exp_avg_sq"]._version > v for p, v in zip(params, versions, strict=True))


@each_engine
def test_state_of_one_number_that_is_gone_is_made_anew(engine):
    params = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = surefoot.NovoGrad(params, **ENGINES[engine])
    for step in range(6):
        for param in params:
            param.grad = torch.full_like(param, step + 1.0)
        if step == 4:
            del optimizer.state[params[0]]["exp_avg_sq"]
        optimizer.step()
    assert optimizer.state[params[0]]["exp_avg_sq"] == pytest.approx(0.98 * 50 + 0.02 * 72)


@each_engine
def test_parameters_that_share_a_number_are_stepped_one_after_the_other(engine):
    params = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = surefoot.NovoGrad(params, **ENGINES[engine])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg_sq"] = optimizer.state[params[0]]["exp_avg_sq"]
    params[0].grad, params[1].grad = torch.full((2,), 2.0), torch.full((2,), 3.0)
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg_sq"] == pytest.approx(0.98 * (0.98 * 2 + 0.02 * 8) + 0.02 * 18)


def test_a_number_that_no_tensor_is_needed_for_is_a_scalar():
    param = torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    with pytest.raises(RuleError, match="slot `total` is one number; declare it as a Scalar"):
        rule(lambda param, grad, total, c, flags: (param - grad, total * 0.5), slots=NUMBER)([param]).step()


# Sums over parameters


def clipped_by_all(param, grad, norm, c, flags):
    """SGD whose gradients are divided by the norm of all of them, counted."""
    squares = (surefoot.group_sum if flags.split else surefoot.total_sum)(grad * grad)
    return param - c.lr * grad / torch.sqrt(squares), norm, torch.sqrt(squares), c.count + 1, squares * 0.5 + c.mixed


SHARED = (
    surefoot.GroupScalar("norm", split="split"),
    surefoot.GroupScalar("count", init=3, integer=True),
    surefoot.GroupScalar("mixed", init="lr", split="split"),
)


def total_rule(update=clipped_by_all, **attributes):
    known = {"flags": ("split",), "group_scalars": SHARED, "slots": (surefoot.Slot("kept"),), **attributes}
    return rule(update, name="Total", **known)


@pytest.mark.parametrize("split", [False, True], ids=["total", "by group"])
@each_engine
@each_dtype
def test_a_sum_is_over_all_parameters_or_those_of_a_group(engine, dtype, split):
    params = [normals(dtype, seed=1)(*shape).requires_grad_() for shape in ((), (5,), (40_000,), (3, 7), (0,))]
    params.append(normals(torch.float64, seed=2)(6).requires_grad_())  # another bucket
    params.append(torch.ones(4, dtype=dtype, requires_grad=True))  # never stepped
    exact = [param.detach().double() for param in params]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = total_rule()(groups, split=split, **ENGINES[engine])
    for step in range(4):
        normal = normals(torch.float64, seed=step + 5)
        for param in params[:-1]:
            param.grad = normal(*param.shape).to(param.dtype)
        squares = [param.grad.double().square().sum() for param in params[:-1]]
        sums = [sum(squares[:2]), sum(squares[2:])] if split else [sum(squares)] * 2
        for index, param in enumerate(params[:-1]):
            exact[index] -= 0.1 * param.grad.double() / sums[index >= 2].sqrt()
        optimizer.step()
        for group, total in zip(optimizer.param_groups, sums, strict=True):
            assert group["norm"] == pytest.approx(total.sqrt().item(), rel=1e-6)
            assert group["count"] == 4 + step
            assert type(group["count"]) is int
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    for param, value in zip(params, exact, strict=True):
        torch.testing.assert_close(param.detach().double(), value, **tolerance)


def test_shared_numbers_are_hyperparameters_to_the_next_step_and_are_saved():
    param, other = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer, loaded = total_rule()([param]), total_rule()([other])
    for each in (param, other):
        each.grad = torch.ones(3)
    for _ in range(2):
        optimizer.step()
    assert optimizer.param_groups[0]["mixed"] == pytest.approx(0.1 + 2 * 1.5)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.data.copy_(param.data)
    for each in (optimizer, loaded):
        each.step()
    assert torch.equal(param, other)
    names = ("norm", "count", "mixed")
    assert [optimizer.param_groups[0][n] for n in names] == [loaded.param_groups[0][n] for n in names]


def test_a_step_without_gradients_and_a_skipped_one_leave_shared_numbers():
    param = torch.ones(3, requires_grad=True)
    optimizer = total_rule()([param], nonfinite="skip")
    optimizer.step()
    param.grad = torch.tensor([1.0, torch.nan, 0.0])
    with pytest.warns(RuntimeWarning, match="was skipped"):
        optimizer.step()
    assert (optimizer.param_groups[0]["norm"], optimizer.param_groups[0]["count"]) == (0.0, 3)


def refusal(update, **attributes):
    param = torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    with pytest.raises(RuleError) as caught:
        total_rule(update, **attributes)([param]).step()
    assert param.tolist() == [1.0, 1.0]
    return str(caught.value)


def test_a_shared_number_that_is_not_one_for_all_is_refused():
    def own(param, grad, kept, c, flags):
        return param - surefoot.total_sum(grad) * grad, kept, torch.sum(grad), c.count, c.mixed

    def missing(param, grad, kept, c, flags):
        return param - surefoot.total_sum(grad) * grad, kept

    def unsummed(param, grad, kept, c, flags):
        return param - grad, kept, c.norm, c.count, c.mixed

    def python(param, grad, kept, c, flags):
        return param - surefoot.total_sum(grad) * grad, kept, 1.0, c.count, c.mixed

    assert "`norm` is one number for all parameters, but follows from what one of them has" in refusal(own)
    assert "must return (param, kept, norm, count, mixed), but returned 2 values" in refusal(missing)
    assert "`norm` is shared, but nothing is summed over groups" in refusal(unsummed)
    assert "must return a number that follows from coefficients for `norm`, but returned 1.0" in refusal(python)


def test_a_shared_number_that_follows_from_the_steps_of_a_parameter_is_refused():
    def stepwise(param, grad, kept, c, flags):
        return param - surefoot.total_sum(grad) * grad, kept, c.count * c.steps, c.count, c.mixed

    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizer = total_rule(stepwise, coefficients=staticmethod(lambda h, step: {"steps": step}))(params)
    params[0].grad = torch.zeros(2)
    optimizer.step()
    params[1].grad = torch.ones(2)
    with pytest.raises(RuleError, match="returns `norm`, which all parameters share, with different values for them"):
        optimizer.step()
    assert params[1].tolist() == [1.0, 1.0]


@each_engine
def test_what_python_has_no_answer_for_is_what_tensors_give(engine):
    def odd(param, grad, kept, c, flags):
        total = surefoot.total_sum(grad)
        finite = torch.where(total > 0, 1 / total, 0.0)
        return param - finite * grad, kept, 1 / total, torch.sqrt(total - 1), torch.pow(total - 1, 0.5) + c.mixed

    shared = (surefoot.GroupScalar("norm"), surefoot.GroupScalar("count"), surefoot.GroupScalar("mixed"))
    param = torch.ones(2, requires_grad=True)
    optimizer = total_rule(odd, group_scalars=shared)([param], **ENGINES[engine])
    param.grad = torch.zeros(2)
    optimizer.step()
    numbers = [optimizer.param_groups[0][name] for name in ("norm", "count", "mixed")]
    assert numbers[0] == math.inf
    assert all(map(math.isnan, numbers[1:]))
    assert param.tolist() == [1.0, 1.0]


def test_groups_that_ask_for_different_sums_are_refused():
    def uneven(param, grad, kept, c, flags):
        more = surefoot.total_sum(torch.abs(grad)) if flags.split else 1.0
        return param - surefoot.total_sum(grad) * grad * more, kept, c.norm, c.count, c.mixed

    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(2)
    cls = total_rule(uneven)
    optimizer = cls([{"params": params[:1]}, {"params": params[1:], "split": True}], split=False)
    with pytest.raises(RuleError, match="sums 1 tensors over parameters under some flags and 2 under others"):
        optimizer.step()
    assert params[0].tolist() == params[1].tolist() == [1.0, 1.0]


def _moved_by_a_sample(param, grad, kept, whole, c, flags):
    return param - surefoot.total_sum(kept) * kept, kept, whole, c.norm, c.count, c.mixed


def _sampled_from_a_whole(param, grad, kept, whole, c, flags):
    return param - surefoot.total_sum(kept) * grad, kept + whole, whole, c.norm, c.count, c.mixed


def _summed_late(param, grad, kept, whole, c, flags):
    total = surefoot.total_sum(grad) * surefoot.total_sum(kept)
    return param - total * grad, kept, whole, c.norm, c.count, c.mixed


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (_moved_by_a_sample, "what follows from slot `kept` may be itself or a sum over parameters"),
        (_sampled_from_a_whole, "what follows from slot `whole` .* such a slot follows from no others"),
        (_summed_late, "follows from slots of every n-th element must be summed before all else"),
    ],
)
def test_what_slots_of_some_elements_cannot_give_is_refused(update, message):
    param = torch.ones(4, requires_grad=True)
    slots = (surefoot.Slot("kept", sampled="every"), surefoot.Slot("whole"))
    optimizer = total_rule(update, slots=slots)([{"params": [param], "every": 2}], split=False)
    param.grad = torch.ones(4)
    with pytest.raises(RuleError, match=message):
        optimizer.step()
    assert param.tolist() == [1.0] * 4
    assert not optimizer.state[param]


def test_a_sum_over_parameters_is_for_rules_only():
    for function in (surefoot.total_sum, surefoot.group_sum):
        with pytest.raises(TypeError, match=f"`{function.__name__}` is a sum over all parameters"):
            function(torch.ones(2))


# Transforms of every rule that tells its direction

DIRECTED_ROWS = [row for row in ROWS if "cautious" in row.ours.flags and row.ours.is_rule()]


def test_every_algorithm_with_a_memory_of_gradients_tells_its_direction():
    told = {row.name for row in DIRECTED_ROWS}
    assert {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "LAMB", "NovoGrad", "MARS"} <= told


def adamw_by_hand(params, grads_of, *, cautious, decay_cautiously, center, steps=4):
    """AdamW of lr 0.1, betas (0.9, 0.99) and weight decay 0.5, in float64."""
    first, second = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for t in range(1, steps + 1):
        for index, grad in enumerate(grads_of(t)):
            g = grad - grad.mean(tuple(range(1, grad.dim())), keepdim=True) if center and grad.dim() > 1 else grad
            m, v = first[index].lerp_(g, 0.1), second[index].mul_(0.99).add_(0.01 * g * g)
            u = m / (1 - 0.9**t) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
            decay = 0.5 * (m * params[index] >= 0).double() if decay_cautiously else 0.5
            params[index] = params[index] * (1 - 0.1 * decay)
            if cautious:
                mask = (m * g > 0).double()
                u = u * mask / mask.mean().clamp(min=1e-3)
            params[index] = params[index] - 0.1 * u
    return params


@pytest.mark.parametrize("center", [False, True], ids=["", "centralized"])
@pytest.mark.parametrize("decay_cautiously", [False, True], ids=["", "cautious decay"])
@pytest.mark.parametrize("cautious", [False, True], ids=["", "cautious"])
@each_engine
def test_adamw_transformed_is_adamw_by_hand(engine, cautious, decay_cautiously, center):
    shapes = ((7,), (5, 30_000), (3, 4, 2, 2), ())
    start = [normals(torch.float64, seed=9)(*shape) for shape in shapes]

    def grads_of(step):
        normal = normals(torch.float64, seed=step)
        return [normal(*shape) for shape in shapes]

    params = [value.clone().requires_grad_() for value in start]
    options = {"cautious": cautious, "cautious_weight_decay": decay_cautiously, "gradient_centralization": center}
    optimizer = surefoot.AdamW(params, lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, **options, **ENGINES[engine])
    for step in range(1, 5):
        for param, grad in zip(params, grads_of(step), strict=True):
            param.grad = grad
        optimizer.step()
    by_hand = adamw_by_hand(start, grads_of, cautious=cautious, decay_cautiously=decay_cautiously, center=center)
    for param, expected in zip(params, by_hand, strict=True):
        torch.testing.assert_close(param.detach(), expected, rtol=1e-10, atol=1e-12)


def few(row):
    """Return parameters of each number of dimensions, one of which begins late."""
    names = ("0-d", "odd", "matrix", "channels_last", "late")
    return {name: param for name, param in zoo(torch.float64, row.admits).items() if name in names}


@pytest.mark.parametrize("row", DIRECTED_ROWS, ids=lambda row: row.name)
def test_engines_agree_on_every_transformed_algorithm(row):
    options = {"momentum": 0.9} if "momentum" in row.defaults else {}
    options |= (
        {"decoupled_weight_decay": True} if "decoupled_weight_decay" in inspect.signature(row.ours).parameters else {}
    )
    options |= {"weight_decay": 0.1} if "weight_decay" in row.defaults else {}
    options |= {name: True for name in DIRECTED if name in row.ours.flags} | {"gradient_centralization": True}
    plain = {name: value for name, value in options.items() if name not in {*DIRECTED, "gradient_centralization"}}
    results = {}
    for engine in ENGINES:
        params = few(row)
        optimizer = row.build(params.values(), options, engine)
        train(optimizer, params, torch.float64)
        results[engine] = {name: param.detach() for name, param in params.items()}
    params = few(row)
    train(row.build(params.values(), plain, "eager"), params, torch.float64)
    assert not torch.equal(params["matrix"], results["eager"]["matrix"])  # they do something
    for engine in ("foreach", "cpu"):
        assert_close(results[engine], results["eager"], rtol=1e-9, atol=1e-11)


def test_caution_leaves_out_what_opposes_the_gradient():
    param = torch.zeros(4, requires_grad=True)
    optimizer = surefoot.SGD([param], lr=1.0, momentum=0.5, cautious=True)
    param.grad = torch.tensor([1.0, 1.0, 1.0, 1.0])
    optimizer.step()
    assert param.tolist() == [-1.0] * 4
    param.grad = torch.tensor([1.0, -0.25, 1.0, 0.0])  # the buffer becomes 1.5, 0.25, 1.5, 0.5
    optimizer.step()
    assert param.tolist() == [-4.0, -1.0, -4.0, -1.0]


def test_centralized_gradients_are_clipped_by_the_norm_that_parameters_hold():
    param, plain = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    grad = torch.tensor([[1.0, 2.0, 6.0], [0.0, 3.0, 3.0]])
    param.grad, plain.grad = grad.clone(), grad.clone()
    surefoot.SGD([param], lr=1.0, gradient_centralization=True, max_grad_norm=1.0).step()
    torch.nn.utils.clip_grad_norm_([plain], 1.0)
    expected = -(plain.grad - plain.grad.mean(1, keepdim=True))
    torch.testing.assert_close(param.detach(), expected)
    assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_engine
def test_gradients_of_16_bits_are_centralized_in_32(engine, dtype):
    grad = torch.tensor([[100.0, 100.5, 101.0, 101.5], [6e4, 6e4, -6e4, 6e4]]).to(dtype)
    param = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    param.grad = grad
    surefoot.SGD([param], lr=0.5, gradient_centralization=True, **ENGINES[engine]).step()
    wide = grad.float()
    assert torch.equal(param.detach(), (-0.5 * (wide - wide.mean(1, keepdim=True))).to(dtype))


@pytest.mark.parametrize("options", [{"cautious": True}, {"gradient_centralization": True}], ids=str)
def test_options_may_change_between_steps_and_differ_between_groups(options):
    (name,) = options
    shapes = ((3, 4), (3, 4))

    def params():
        return [normals(torch.float32, seed=s)(*shape).requires_grad_() for s, shape in enumerate(shapes)]

    ours, theirs = params(), params()
    together = surefoot.AdamW([{"params": ours[:1], **options}, {"params": ours[1:]}], lr=0.1)
    apart = [surefoot.AdamW(theirs[:1], lr=0.1, **options), surefoot.AdamW(theirs[1:], lr=0.1)]
    for step in range(6):
        if step == 3:
            together.param_groups[0][name] = False
            together.param_groups[1][name] = True
            apart[0].param_groups[0][name] = False
            apart[1].param_groups[0][name] = True
        normal = normals(torch.float32, seed=step + 10)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = normal(3, 4)
            other.grad = one.grad.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (surefoot.Adagrad, {"cautious": True}, ValueError, "Adagrad takes no `cautious`: its step goes where"),
        (surefoot.SGD, {"cautious_weight_decay": True}, ValueError, "SGD takes no `cautious_weight_decay`: its weight"),
        (surefoot.Adam, {"cautious_weight_decay": True}, ValueError, "pass decoupled_weight_decay=True as well"),
        (surefoot.AdamW, {"cautious": 1}, TypeError, "`cautious` must be True or False, but is 1"),
        (surefoot.Adafactor, {"cautious": True}, ValueError, "Adafactor takes no `cautious`: it has a custom step"),
        (surefoot.LBFGS, {"gradient_centralization": True}, ValueError, "LBFGS takes no `gradient_centralization`"),
    ],
)
def test_options_that_have_no_place_are_refused(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls([torch.ones(2, 2, requires_grad=True)], **options)


def test_a_sparse_gradient_is_not_centralized():
    param = torch.ones(4, 2, requires_grad=True)
    param.grad = torch.sparse_coo_tensor([[1]], [[1.0, 3.0]], (4, 2), check_invariants=True)
    optimizer = surefoot.SGD([param], gradient_centralization=True)
    with pytest.raises(RuntimeError, match="is sparse, which gradient_centralization=True cannot take"):
        optimizer.step()
    assert torch.equal(param, torch.ones(4, 2))


def test_numbers_do_not_depend_on_the_steps_of_neighbours():
    """Step counts that differ make a row of numbers for each parameter, which must not be rounded otherwise."""

    def train(*, together):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(64, 65)) for _ in range(2)]
        groups = [params] if together else [params[:1], params[1:]]
        optimizer = surefoot.AdamW([{"params": group} for group in groups], lr=0.01, cautious=True)
        for step in range(20):
            params[0].grad = torch.randn(64, 65)
            params[1].grad = torch.randn(64, 65) if step % 2 else None
            optimizer.step()
        return params

    for ours, theirs in zip(train(together=True), train(together=False), strict=True):
        assert torch.equal(ours, theirs)
