"""Rules that reduce tensors to numbers: each reduction, stages that build on one another, numbers as state."""

import copy
import inspect

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


def test_a_number_that_no_tensor_is_needed_for_is_a_scalar():
    param = torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    with pytest.raises(RuleError, match="slot `total` is one number; declare it as a Scalar"):
        rule(lambda param, grad, total, c, flags: (param - grad, total * 0.5), slots=NUMBER)([param]).step()


# Transforms of every rule that tells its direction

DIRECTED_ROWS = [row for row in ROWS if "cautious" in row.ours.flags]


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
        params = zoo(torch.float64)
        optimizer = row.build(params.values(), options, engine)
        train(optimizer, params, torch.float64)
        results[engine] = {name: param.detach() for name, param in params.items()}
    params = zoo(torch.float64)
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
        (surefoot.Muon, {"cautious": True}, ValueError, "Muon takes no `cautious`: it has a custom step"),
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
    with pytest.raises(RuntimeError, match="is sparse, which gradient_centralization=True cannot do with"):
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
