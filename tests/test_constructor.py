"""Constructors: torch's signatures, and what a signature says of a hyperparameter in every place that repeats it."""

import inspect
import typing
from typing import Annotated, Unpack

import pytest
import torch

import surefoot
from helpers import ALGORITHMS, make_params, name_of, twin
from surefoot.constructor import EngineOptions, arguments
from surefoot.rule.hyperparameters import Interval, LearningRate, at_least_zero, number

each_algorithm = pytest.mark.parametrize("cls", ALGORITHMS, ids=name_of)
ENGINE = [
    "foreach",
    "maximize",
    "capturable",
    "differentiable",
    "fused",
    "state_dtype",
    "rounding",
    "master_weight_bits",
    "rounding_seed",
]


def parameters(cls, *kinds):
    """Return names and defaults of a constructor's parameters of some kinds, or of all but `**options`."""
    kinds = kinds or (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p.default for p in inspect.signature(cls).parameters.values() if p.kind in kinds}


@each_algorithm
def test_signatures_are_torchs_and_more(cls):
    positional = [list(parameters(kind, inspect.Parameter.POSITIONAL_OR_KEYWORD).items()) for kind in (cls, twin(cls))]
    assert positional[0] == positional[1]
    ours, theirs = parameters(cls), parameters(twin(cls))
    assert {name: ours[name] for name in theirs} == theirs
    assert ours.keys() - theirs.keys() <= {*ENGINE, *cls.spec.later_options}


@each_algorithm
def test_what_the_signature_says_is_what_the_optimizer_has(cls):
    said = {name: default for name, default in parameters(cls).items() if name != "params"}
    said |= {surefoot.LBFGS: {"max_eval": 25}, surefoot.AdamW: {"decoupled_weight_decay": True}}.get(cls, {})
    assert cls(make_params()).defaults == said


@each_algorithm
def test_rules_take_every_engine_option(cls):
    if cls.is_rule() and cls is not surefoot.SparseAdam:
        assert set(ENGINE) <= parameters(cls).keys()


@each_algorithm
def test_signatures_show_plain_types(cls):
    shown = inspect.signature(cls).parameters.values()
    assert [p.name for p in shown if typing.get_origin(p.annotation) is Annotated] == []
    assert inspect.signature(cls.__init__).parameters.keys() == {"self", *(p.name for p in shown)}


@each_algorithm
def test_every_argument_is_documented_once_and_in_order(cls):
    sections = inspect.getdoc(cls).split("Args:\n")
    assert len(sections) == 2
    lines = sections[1].partition("\n\n")[0].splitlines()
    assert [line.split(":")[0].strip() for line in lines if line[4] != " "] == list(inspect.signature(cls).parameters)
    assert all(len(line) <= 116 for line in lines)
    assert "{" not in sections[1].partition("Raises:")[0]


def test_a_range_stands_in_the_docstring_as_it_is_checked():
    text = inspect.getdoc(surefoot.Adadelta)
    assert "rho: decay of both averages, in [0, 1].\n" in text
    units = "the units of `g**2` and of `param**2`"
    assert f"eps: added under both roots, in {units}, >= 0; it starts the motion.\n" in text
    assert "betas: (beta1, beta2), decay of the averages of g and of g**2, each in [0, 1).\n" in surefoot.NAdam.__doc__
    assert "lr: learning rate, a number or a tensor of one element, > 0.\n" in surefoot.SparseAdam.__doc__


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (at_least_zero("x"), ">= 0"),
        (number("x"), "any number"),
        (Interval("", low=1, high=2, low_open=True), "in (1, 2]"),
        (Interval("", low=-torch.inf, high=0.0), "<= 0"),
        (Interval("", low=-torch.inf, high=0.0, high_open=True), "< 0"),
        (Interval("", low=1, whole=True), "a whole number >= 1"),
    ],
)
def test_ranges_in_words(check, words):
    assert check.words == words


class Mine(surefoot.Optimizer):
    """One of a user's own.

    {arguments}
    """

    def __init__(
        self,
        params: object,
        lr: LearningRate = 0.5,
        *,
        speed: Annotated[float, Interval("Bad speed: ", high=2.0), "how fast"] = 1.0,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(params, arguments(locals()))

    @staticmethod
    def update(param, grad, c, flags):
        return param - grad * c.lr * c.speed


class Faster(Mine):
    """The same, with a constructor that hides what it does not change."""

    def __init__(self, params):
        super().__init__(params, speed=2.0, fused=None)


def test_a_class_of_the_users_own_gets_all_of_it():
    assert list(parameters(Mine)) == ["params", "lr", "speed", *ENGINE]
    assert "    speed: how fast, in [0, 2].\n" in inspect.getdoc(Mine)
    assert Mine(make_params(), maximize=True).defaults["maximize"] is True
    assert list(parameters(Faster)) == ["params"]
    assert Faster(make_params()).defaults == Mine(make_params(), speed=2.0).defaults
    with pytest.raises(ValueError, match=r"^Bad speed: 3; `speed` must be a number in \[0, 2\]"):
        Mine(make_params(), speed=3)
    with pytest.raises(TypeError, match=r"Mine\(\) got an unexpected keyword argument 'sped'; there are: lr, speed, "):
        Mine(make_params(), sped=3)


def test_a_constructor_that_cannot_be_inspected_stays_as_it_is():
    class Odd(surefoot.SGD):
        __init__ = dict.__init__

    assert Odd.ranges == surefoot.SGD.ranges
