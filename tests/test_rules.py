"""The rule language: a user's own algorithm on every engine, each operation of the table, and the errors of a rule."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import surefoot
from conformance import COMPILED, ENGINES, STEADY, STEPS, assert_close, assert_same, each_engine, gradients, train, zoo
from surefoot.errors import RuleError
from surefoot.rule.ops import OPS


class Lion(surefoot.Optimizer):
    """Chen et al. 2023, algorithm 2."""

    slots = (surefoot.Slot("exp_avg"),)
    flags = ("weight_decay",)

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **options):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, **options))

    @staticmethod
    def coefficients(h, step):
        return {"weight1": 1 - h.betas[0], "weight2": 1 - h.betas[1], "shrink": 1 - h.lr * h.weight_decay}

    @staticmethod
    def update(param, grad, exp_avg, c, flags):
        direction = torch.sign(torch.lerp(exp_avg, grad, c.weight1))
        param = param * c.shrink if flags.weight_decay else param
        return torch.add(param, direction, alpha=-c.lr), torch.lerp(exp_avg, grad, c.weight2)


def lion_by_hand(params, dtype, lr=1e-4, weight_decay=0.0, sign=1):
    momenta = {name: torch.zeros_like(param) for name, param in params.items()}
    with torch.no_grad():
        for step in range(STEPS):
            lr = lr / 2 if step == STEADY + 1 else lr
            for name, grad in gradients(params, step, dtype).items():
                if grad is not None:
                    direction = momenta[name].lerp(sign * grad, 1 - 0.9).sign()
                    params[name].mul_(1 - lr * weight_decay).sub_(lr * direction)
                    momenta[name].lerp_(sign * grad, 1 - 0.99)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "lr": 0.01}, {"maximize": True}], ids=str)
@each_engine
def test_an_algorithm_of_a_user_runs_on_every_engine(engine, options):
    ours, by_hand = zoo(torch.float64), zoo(torch.float64)
    optimizer = Lion(ours.values(), **options, **ENGINES[engine])
    train(optimizer, ours, torch.float64)
    plain = {name: value for name, value in options.items() if name != "maximize"}
    lion_by_hand(by_hand, torch.float64, sign=-1 if options.get("maximize") else 1, **plain)
    assert_close(ours, by_hand, rtol=1e-14, atol=1e-14)
    assert set(optimizer.state[ours["matrix"]]) == {"step", "exp_avg"}


# Every operation, with every mixture of tensors and numbers

WITH_KEYWORDS: dict[str, Callable[..., Any]] = {
    "add_scaled": lambda x, y, alpha: torch.add(x, y, alpha=alpha),
    "addcmul": lambda x, y, z, value: torch.addcmul(x, y, z, value=value),
    "addcdiv": lambda x, y, z, value: torch.addcdiv(x, y, z, value=value),
    "where": lambda condition, x, y: torch.where(condition > 0, x, y),
}
ELEMENTWISE = [op for op in OPS if not op.reduces]  # test_reductions.py has the others
# What is written so in torch, where that is not every mixture: t for a tensor, n for a number.
MIXTURES = {
    "add_scaled": ("ttn", "tnn", "ntn", "nnn"),
    "lerp": ("ttt", "ttn"),
    "addcmul": ("tttn",),
    "addcdiv": ("tttn",),
    "fill": ("tn",),
    "copy": ("t",),
    "atan2": ("tt",),
    "torch.div": ("tt", "tn", "nn"),
    **dict.fromkeys(("math.sqrt", "math.exp", "math.log", "math.tanh"), ("n",)),
}
SPECIAL = (0.0, -0.0, 1.0, -1.5, 0.3, 1e-40, -1e30, torch.inf, -torch.inf, torch.nan)
NUMBERS = (0.1, 0.5, -0.5, 1.0, 2.0, -2.0, 3.0, 0.0, -0.0, torch.inf, torch.nan)


def method(name):
    return lambda first, *others: getattr(first, name)(*others)


def spellings(op):
    """Return every way in which a rule may write an operation."""
    if op.name in WITH_KEYWORDS:
        return {"torch": WITH_KEYWORDS[op.name]}
    functions = {f"{function.__module__}.{function.__name__}".lstrip("_"): function for function in op.spellings}
    return functions | {f".{name}": method(name) for name in op.methods}


def mixtures(*ops):
    """Return every way to write operations with every mixture of tensors and numbers that torch takes there."""
    return [
        (op, name, spelling, kinds)
        for op in ops
        for kinds in map("".join, itertools.product("tn", repeat=op.arity))
        for name, spelling in spellings(op).items()
        if kinds in MIXTURES.get(name, MIXTURES.get(op.name, (kinds,))) and not (name[0] == "." and kinds[0] == "n")
    ]


def rule_of_mixtures(mixed):
    """Make a rule with a slot for the value of each mixture."""

    class Operations(surefoot.Optimizer):
        slots = (*map(surefoot.Slot, "xyz"), *(surefoot.Slot(f"out{index}") for index in range(len(mixed))))
        scalars = ()

        @staticmethod
        def update(param, grad, *slots_coefficients_flags):
            x, y, z, *_, c, _ = slots_coefficients_flags
            tensors_and_numbers = ((x, c.a), (y, c.b), (z, c.d), (param, c.e))
            outputs = []
            for op, _, spelling, kinds in mixed:
                value = spelling(*(pair[kind == "n"] for pair, kind in zip(tensors_and_numbers, kinds, strict=False)))
                value = torch.where(value, 1.0, 0.0) if op.name in COMPARISONS else value
                outputs.append(value if "t" in kinds else torch.full_like(x, value))
            return param, x, y, z, *outputs

    return Operations


COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")


def in_torch(spelling, arguments):
    """Evaluate as torch does; a number where torch takes only tensors as a 0-d tensor."""
    try:
        return spelling(*arguments)
    except TypeError:
        return spelling(*(torch.as_tensor(argument, dtype=torch.float64) for argument in arguments))


def assert_operations_are_torchs(engine, mixed, numbers):
    rule = rule_of_mixtures(mixed)
    dtypes = (torch.float32,) if engine in COMPILED else (torch.float32, torch.float64)
    for dtype, number in itertools.product(dtypes, numbers):
        x = torch.tensor(SPECIAL, dtype=dtype).repeat_interleave(len(SPECIAL))
        y = torch.tensor(SPECIAL, dtype=dtype).repeat(len(SPECIAL))
        tensors = (x, y, y.roll(3), x.roll(7))
        param = tensors[3].clone().requires_grad_()
        param.grad = torch.zeros_like(param)
        optimizer = rule([param], {"a": number, "b": number, "d": number, "e": number, **ENGINES[engine]})
        optimizer.state[param] = {slot.name: torch.zeros_like(x) for slot in rule.slots}
        optimizer.state[param] |= {name: tensor.clone() for name, tensor in zip("xyz", tensors, strict=False)}
        optimizer.step()
        tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).tiny}
        for index, (op, name, spelling, kinds) in enumerate(mixed):
            # From numbers alone torch.where makes a tensor of the default dtype.
            plain = torch.tensor(number, dtype=dtype) if op.name == "where" else number
            arguments = [tensor if kind == "t" else plain for tensor, kind in zip(tensors, kinds, strict=False)]
            expected = torch.as_tensor(in_torch(spelling, arguments), dtype=dtype).expand(x.shape)
            what = f"{name} for {op.name} of {kinds} with {number}, {dtype}"
            actual, expected = {what: optimizer.state[param][f"out{index}"]}, {what: expected}
            if engine == "eager" and kinds[0] == "t":
                assert_same(actual, expected)
            else:
                assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("op", ELEMENTWISE, ids=lambda op: op.name)
@each_engine
def test_operations_are_those_of_torch(engine, op):
    mixed = [mixture for mixture in mixtures(op) if "t" in mixture[-1]]
    assert_operations_are_torchs(engine, mixed, NUMBERS if any("n" in kinds for *_, kinds in mixed) else (1.0,))


@pytest.mark.parametrize("module", ["operator", "torch", "math"])
@each_engine
def test_operations_on_numbers_alone(engine, module):
    mixed = [mixture for mixture in mixtures(*ELEMENTWISE) if "t" not in mixture[-1] and mixture[1].startswith(module)]
    assert_operations_are_torchs(engine, mixed, (0.5,))


# Errors of a rule


def rule_of(update_function, **attributes):
    """Make an optimizer with one slot out of an update."""
    return type(
        "Rule",
        (surefoot.Optimizer,),
        {
            "slots": (surefoot.Slot("first"), surefoot.Slot("second")),
            "update": staticmethod(update_function),
            **attributes,
        },
    )


def step_once(rule, engine="eager", **options):
    param = torch.tensor([1.0, -2.0, 3.0]).requires_grad_()
    param.grad = torch.tensor([0.5, 0.25, -1.0])
    optimizer = rule([param], {"lr": 0.1, **options, **ENGINES[engine]})
    optimizer.step()
    return optimizer


def sums(param, grad, first, second, c, flags):
    return param, first, torch.cumsum(grad, 0)  # WRONG


def shapes(param, grad, first, second, c, flags):
    return param, first, second * param.shape[0]  # WRONG


def in_place(param, grad, first, second, c, flags):
    param.add_(grad)  # WRONG
    return param, first, second


def branch(param, grad, first, second, c, flags):
    if c.lr > 0:  # WRONG
        param = param - grad
    return param, first, second


def branch_on_elements(param, grad, first, second, c, flags):
    if (grad > 0).all():  # WRONG
        param = param - grad
    return param, first, second


def unpacked(param, grad, first, second, c, flags):
    left, right = grad  # WRONG
    return param, left, right


def iterated(param, grad, first, second, c, flags):
    return param, *grad  # WRONG


def indexed(param, grad, first, second, c, flags):
    return param, first, second * grad[0]  # WRONG


def keyword(param, grad, first, second, c, flags):
    return param, first, torch.sqrt(grad, out=second)  # WRONG


def rounding_mode(param, grad, first, second, c, flags):
    return param, first, torch.div(grad, first, rounding_mode="floor")  # WRONG


def number_for_tensor(param, grad, first, second, c, flags):
    return param, first, torch.lerp(grad, 0.5, c.lr)  # WRONG


def tensor_for_number(param, grad, first, second, c, flags):
    return param, first, torch.addcmul(grad, grad, grad, value=second)  # WRONG


def listed(param, grad, first, second, c, flags):
    return param, first, torch.stack([grad, second])  # WRONG


def inside_a_helper(param, grad, first, second, c, flags):
    return param, first, helper(grad)


def helper(grad):
    return torch.sin(grad)  # WRONG


WRONG = {
    sums: "`cumsum` is not among the operations of a rule; these are: .*addcdiv",
    shapes: "a rule sees values only, not `shape` of a tensor",
    in_place: "`add_` works in place; a rule is written out of place: use `add`",
    branch: "a rule may branch on flags only, not on the value of `gt`; use torch.where, or declare a flag",
    branch_on_elements: "",
    unpacked: "`getitem` is not among the operations of a rule",
    iterated: "a rule works on whole tensors; `grad` cannot be iterated or unpacked",
    indexed: "`getitem` is not among the operations of a rule",
    keyword: "",
    rounding_mode: "",
    number_for_tensor: r"lerp\(\) received an invalid combination of arguments",
    tensor_for_number: "`addcmul`",
    listed: "`stack` is not among the operations of a rule",
    inside_a_helper: "`sin` is not among the operations of a rule",
}


def wrong_line(function):
    lines, start = inspect.getsourcelines(helper if function is inside_a_helper else function)
    return start + next(number for number, line in enumerate(lines) if "# WRONG" in line)


@pytest.mark.parametrize("update", WRONG, ids=lambda update: update.__name__)
@each_engine
def test_an_error_in_a_rule_names_file_and_line(engine, update):
    with pytest.raises(RuleError, match=rf"{__file__}:{wrong_line(update)}: .*{WRONG[update]}"):
        step_once(rule_of(update), engine)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda param, first, second: (param, first), r"must return \(param, first, second\), but returned 2 values"),
        (lambda param, first, second: param, r"must return \(param, first, second\), but returned 1 values"),
        (lambda param, first, second: (param, first, None), "must return a tensor for `second`, but returned None"),
        (lambda param, first, second: (param, 0.0, second), "must return a tensor for `first`, but returned 0.0"),
        (lambda param, first, second: None, r"must return \(param, first, second\), but returned 1 values"),
    ],
)
def test_what_an_update_returns_is_checked(returned, message):
    with pytest.raises(RuleError, match=f"^Rule.update {message}"):
        step_once(rule_of(lambda param, grad, first, second, c, flags: returned(param, first, second)))


@each_engine
def test_a_missing_coefficient_is_named(engine):
    rule = rule_of(lambda param, grad, first, second, c, flags: (param - grad * c.rate, first, second))
    with pytest.raises(RuleError, match=r"^Rule.update reads c.rate, which is neither .* there are: .*fresh"):
        step_once(rule, engine)


def test_an_undeclared_flag_is_named():
    rule = rule_of(lambda param, grad, first, second, c, flags: (param if flags.nesterov else grad, first, second))
    with pytest.raises((RuleError, AttributeError), match="nesterov"):
        step_once(rule)


def test_an_optimizer_without_rule_and_step_says_so():
    class Empty(surefoot.Optimizer):
        pass

    with pytest.raises(NotImplementedError, match="^Empty defines neither `update` nor `step`"):
        Empty([torch.ones(1, requires_grad=True)], {}).step()


@pytest.mark.parametrize("update", [sums, lambda param, grad, first, second, c, flags: (param - c.rate, first, second)])
@each_engine
def test_a_wrong_rule_changes_nothing(engine, update):
    param = torch.tensor([1.0, 2.0], requires_grad=True)
    param.grad = torch.ones(2)
    optimizer = rule_of(update)([param], ENGINES[engine])
    with pytest.raises(RuleError):
        optimizer.step()
    assert param.tolist() == [1.0, 2.0]
    assert not optimizer.state


# What an update may return


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (lambda p, g, a, b, c, flags: (p, b, a), ("p", "b", "a")),
        (lambda p, g, a, b, c, flags: (a, b, p), ("a", "b", "p")),
        (lambda p, g, a, b, c, flags: (b, g, g), ("b", "g", "g")),
        (lambda p, g, a, b, c, flags: (p - g, p, a), ("p-g", "p", "a")),
        (lambda p, g, a, b, c, flags: (p - g, p - g, b), ("p-g", "p-g", "b")),
        (lambda p, g, a, b, c, flags: (g, g, g), ("g", "g", "g")),
        (lambda p, g, a, b, c, flags: ((a + b) * a, a, b - (a + b)), ("(a+b)*a", "a", "b-(a+b)")),
        (lambda p, g, a, b, c, flags: (p, b + g, a + g), ("p", "b+g", "a+g")),
        (lambda p, g, a, b, c, flags: (a + p, p + a, b), ("a+p", "p+a", "b")),
        (lambda p, g, a, b, c, flags: (p + a, a + p, a * p), ("p+a", "a+p", "a*p")),
        (
            lambda p, g, a, b, c, flags: (torch.full_like(p, 2), g * 0 + c.lr, torch.where(c.lr > 1, a, b)),
            ("p*0+2", "g*0+0.5", "b"),
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else "",
)
@each_engine
def test_inputs_may_be_returned_as_other_outputs(engine, update, expected):
    values = {
        name: torch.tensor(numbers)
        for name, numbers in zip("pgab", ([1.0, 2], [3.0, 4], [5.0, 6], [7.0, 8]), strict=True)
    }
    param, grad = values["p"].clone().requires_grad_(), values["g"].clone()
    optimizer = rule_of(update)([param], {"lr": 0.5, **ENGINES[engine]})
    optimizer.state[param] = {"step": torch.tensor(0.0), "first": values["a"].clone(), "second": values["b"].clone()}
    for _ in range(2):
        values |= dict(zip("pab", [eval(text, {}, values) for text in expected], strict=True))  # noqa: S307 (our own text)
        param.grad = grad
        optimizer.step()
        state = optimizer.state[param]
        assert [t.tolist() for t in (param, state["first"], state["second"], grad)] == [
            values[n].tolist() for n in "pabg"
        ]
    pointers = {tensor.data_ptr() for tensor in (param, grad, state["first"], state["second"])}
    assert len(pointers) == 4
