"""Hyperparameters of schedulers: every declared range at every entrance, and lengths that are odd but make sense."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from lr_scheduler_helpers import rates, run, sgd

from surefoot import lr_scheduler as ours
from surefoot.lr_scheduler import schedules
from surefoot.lr_scheduler.ranges import OneOf, Range, Steps, between
from surefoot.swa_utils import SWALR

NAN, INF = math.nan, math.inf
CLASSES = [*(getattr(ours, name) for name in ours.__all__ if name.endswith(("LR", "Restarts", "Plateau"))), SWALR]

# What a constructor needs beside the optimizer.
NEEDED = {
    "LambdaLR": {"lr_lambda": lambda epoch: 1.0},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 1.0},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2]},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 5},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 9},
    "SWALR": {"swa_lr": 0.1},
}


def make(cls, **arguments):
    optimizer = sgd(momentum=0.9)
    if cls is ours.SequentialLR:
        arguments = {"schedulers": [ours.StepLR(optimizer, 1) for _ in range(3)], "milestones": [1, 2], **arguments}
    return cls(optimizer, **(NEEDED.get(cls.__name__, {}) | arguments))


def outside(check):
    """Return values that a check must refuse."""
    if isinstance(check, OneOf):
        return ["x", 3]
    if isinstance(check, Steps):
        return [[-1], [2.5], [NAN], ["3"], *[[3, 2]] * check.rising]
    values = [NAN, "1", torch.ones(2), 1j]
    values += [math.nextafter(check.low, -INF)] if math.isfinite(check.low) else [-INF]
    values += [check.low] * check.low_open + [check.high] * check.high_open
    values += [math.nextafter(check.high, INF)] * (math.isfinite(check.high) and not check.high_open)
    return values + [2.5, torch.tensor(2.5)] * check.whole


BAD = [
    pytest.param(cls, name, value, id=f"{cls.__name__}-{name}-{value}")
    for cls in CLASSES
    for name, check in cls.ranges.items()
    if name in inspect.signature(cls).parameters
    for value in outside(check)
]


@pytest.mark.parametrize(("cls", "name", "value"), BAD)
def test_a_value_out_of_range_is_refused_by_name(cls, name, value):
    several = isinstance(value, list)
    with pytest.raises(ValueError, match=f"`{name}(\\[0\\])?` must") as raised:
        make(cls, **{name: (value * 2)[:2] if several and cls is ours.SequentialLR else value})
    assert f"{value[0] if several else value}" in str(raised.value)


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [case for case in BAD if case.values[1] in vars(make(case.values[0])) and case.values[1] != "last_epoch"],
)
def test_a_state_dict_with_a_value_out_of_range_is_refused(cls, name, value):
    scheduler = make(cls)
    before = repr(scheduler.state_dict())
    with pytest.raises(ValueError, match=f"`{name}(\\[0\\])?` must"):
        scheduler.load_state_dict({**copy.deepcopy(scheduler.state_dict()), name: value})
    assert repr(scheduler.state_dict()) == before


def test_a_position_that_was_set_by_an_epoch_may_be_a_fraction():
    scheduler = make(ours.StepLR)
    state = copy.deepcopy(scheduler.state_dict())
    scheduler.load_state_dict({**state, "last_epoch": 2.5})
    for wrong in (-2, "3", NAN):
        with pytest.raises(ValueError, match="`last_epoch` must be a number"):
            scheduler.load_state_dict({**state, "last_epoch": wrong})


def test_a_part_of_a_composites_state_is_checked_too():
    scheduler = make(ours.SequentialLR)
    state = copy.deepcopy(scheduler.state_dict())
    state["_schedulers"][2]["step_size"] = 0
    with pytest.raises(ValueError, match="got 0; `step_size` must be a whole number >= 1"):
        scheduler.load_state_dict(state)


def test_a_schedules_state_is_checked_too():
    schedule = ours.Schedule(sgd(), lr=schedules.linear(1, 0, 9))
    state = copy.deepcopy(schedule.state_dict())
    state["scheduled"][1]["base"] = NAN
    with pytest.raises(ValueError, match="got nan; `base of lr` must be a number"):
        schedule.load_state_dict(state)
    with pytest.raises(ValueError, match="got 0.5; `last_epoch` must be a whole number >= -1"):
        ours.Schedule(sgd(), lr=schedules.linear(1, 0, 9), last_epoch=0.5)


def test_lists_are_checked_value_by_value():
    with pytest.raises(ValueError, match=r"got -1; `max_lr\[1\]` must be a number in \[0, inf\)"):
        make(ours.OneCycleLR, max_lr=[1.0, -1])
    with pytest.raises(ValueError, match=r"Invalid beta parameter at index 0: 1.0; `max_momentum` must be"):
        ours.OneCycleLR(sgd(optimizer=torch.optim.Adam), 1.0, 9, max_momentum=1.0)
    make(ours.OneCycleLR, max_momentum=1.0)  # SGD's may be any number


def test_every_number_has_a_range():
    """What has none is a function, a list of schedulers, or a flag."""
    free = {"optimizer", "self", "lr_lambda", "scale_fn", "schedulers", "cycle_momentum", "three_phase", "verbose"}
    for cls in CLASSES:
        assert set(inspect.signature(cls).parameters) - free <= set(cls.ranges), cls


# What came to torch's attention, or should


def test_a_linear_of_no_length_is_at_its_end():
    """pytorch#193682: it stayed at the first factor for ever."""
    for scheduler in (ours.LinearLR(sgd(), 0.5, 1.0, 0), ours.LinearLR(sgd(), 0.5, 1.0, 0.0)):
        assert [rate for rate, _ in run(scheduler, 3)] == [0.1] * 4
    assert [rate for rate, _ in run(ours.LinearLR(sgd(), 0.5, 0.25, 0), 3)] == [0.025] * 4


def test_a_constant_of_no_length_is_over():
    assert [rate for rate, _ in run(ours.ConstantLR(sgd(), 0.5, 0), 3)] == [0.1] * 4


def test_no_annealing_is_swa_lr_from_the_beginning():
    assert [rate for rate, _ in run(SWALR(sgd(), 0.05, 0), 3)] == [0.05] * 4


def test_a_warm_up_of_no_length_in_a_sequence():
    optimizer = sgd()
    parts = [ours.LinearLR(optimizer, 0.1, 1.0, 0), ours.StepLR(optimizer, 1, 0.5)]
    assert [rate for rate, _ in run(ours.SequentialLR(optimizer, parts, [0]), 2)] == [0.1, 0.05, 0.025]


@pytest.mark.parametrize("kind", [int, float, np.int64, np.float32, torch.tensor], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_whole_number_may_be_of_any_type(cls, kind):
    """Milestones that are tensors were never reached, as tensors are counted by identity."""
    wanted = NEEDED.get(cls.__name__, {})
    whole = {name for name, check in cls.ranges.items() if isinstance(check, Range) and check.whole}
    given = {
        name: [kind(value[0])] if isinstance(value, list) else kind(value)
        for name, value in wanted.items()
        if name in whole or isinstance(value, list)
    }
    seen, expected = make(cls, **given), make(cls)
    if cls is not ours.ReduceLROnPlateau:
        assert run(seen, 7) == run(expected, 7)


@pytest.mark.parametrize("length", [2.5, 3.0000000000000004, 7.1, 1.5, 0.4])
def test_a_cosine_may_have_a_fraction_as_length(length):
    """Where it is within rounding of a whole number, torch divides by zero or goes far off."""
    scheduler = ours.CosineAnnealingLR(sgd(), length, 0.01)
    seen = [rate for rate, _ in run(scheduler, 40)]
    expected = [0.01 + 0.09 * (1 + math.cos(math.pi * epoch / length)) / 2 for epoch in range(41)]
    assert seen == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_one_cycle_stays_at_its_end(strategy):
    """torch's line goes on below 0 in the one step more that it allows, and its cosine rises."""
    scheduler = ours.OneCycleLR(sgd(momentum=0.9), 1.0, 10, anneal_strategy=strategy)
    seen = [rate for rate, _ in run(scheduler, 10)]
    assert seen[10] == seen[9] == pytest.approx(1.0 / 25 / 1e4)
    before = repr(scheduler.state_dict())
    with pytest.raises(ValueError, match="Tried to step 11 times. The specified number of total steps is 10"):
        scheduler.step()
    assert repr(scheduler.state_dict()) == before


def test_three_phases_need_room():
    with pytest.raises(ValueError, match=r"three_phase=True .* but pct_start=0.6 of 100 steps leaves no room"):
        ours.OneCycleLR(sgd(momentum=0.9), 1.0, 100, pct_start=0.6, three_phase=True)
    last = [rate for rate, _ in run(ours.OneCycleLR(sgd(momentum=0.9), 1.0, 99, pct_start=0.5, three_phase=True), 98)]
    assert last[-1] == pytest.approx(1.0 / 25 / 1e4)


def test_a_saw_tooth():
    scheduler = ours.CyclicLR(sgd(), 0.0, 1.0, 4, 0, cycle_momentum=False)
    assert [rate for rate, _ in run(scheduler, 8)] == [0.0, 0.25, 0.5, 0.75, 0.0, 0.25, 0.5, 0.75, 0.0]


@pytest.mark.parametrize("epoch", [NAN, INF, -1])
def test_restarts_go_to_no_epoch_that_is_none(epoch):
    """Infinity never came back from the search for its cycle."""
    for mult in (1, 2):
        scheduler = ours.CosineAnnealingWarmRestarts(sgd(), 5, mult)
        before = repr(scheduler.state_dict())
        with pytest.raises(ValueError, match=f"Expected non-negative epoch, but got {epoch}"):
            scheduler.step(epoch)
        assert repr(scheduler.state_dict()) == before


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls not in (ours.SequentialLR, ours.ReduceLROnPlateau)])
def test_an_epoch_that_is_no_number_is_refused(cls):
    scheduler = make(cls)
    before = rates(scheduler.optimizer)
    with pytest.raises(ValueError, match="got nan; `epoch` must be a number"):
        scheduler.step(NAN)
    assert rates(scheduler.optimizer) == before
    assert scheduler.last_epoch == 0


def test_a_bad_metric_changes_nothing():
    scheduler = ours.ReduceLROnPlateau(sgd())
    before = repr(scheduler.state_dict())
    with pytest.raises(ValueError, match="only one element tensors can be converted"):
        scheduler.step(torch.ones(2))
    assert repr(scheduler.state_dict()) == before


def test_patience_may_be_infinite():
    run_out = ours.ReduceLROnPlateau(sgd(), patience=INF)
    for _ in range(30):
        run_out.step(1.0)
    assert rates(run_out.optimizer)[0] == 0.1
    assert make(ours.OneCycleLR, final_div_factor=INF).optimizer.param_groups[0]["min_lr"] == 0.0


def test_a_cyclic_with_a_function_needs_no_mode():
    ours.CyclicLR(sgd(momentum=0.9), 0.1, 1.0, mode="mine", scale_fn=lambda x: 1.0)
    with pytest.raises(ValueError, match="`scale_mode` must be"):
        ours.CyclicLR(sgd(momentum=0.9), 0.1, 1.0, scale_fn=lambda x: 1.0, scale_mode="x")


def test_ranges_say_what_is_allowed():
    assert between(1, whole=True).words == "a whole number >= 1"
    assert between(optional=True).words == ">= 0, or None"
    assert between(0, 1, low_open=True).words == "in (0, 1]"
    with pytest.raises(ValueError, match=r"^got x of type <class 'str'>; `gamma` must be a number in \[0, inf\)$"):
        between()("gamma", "x")
    with pytest.raises(ValueError, match=r"^`milestones` must not fall, but got \[3, 2\]; sort them$"):
        Steps(rising=True)("milestones", [3, 2])


BUILDERS = {
    "cycles": (lambda: schedules.cosine_with_restarts(10, 60, 0), "cosine_with_restarts: got 0; `cycles` must be"),
    "total": (
        lambda: schedules.linear_with_warmup(10, 5),
        r"linear_with_warmup: got 5; `total_steps` must be a number in \[10, inf\)",
    ),
    "restarts total": (lambda: schedules.cosine_with_restarts(10, 10), "cosine_with_restarts: got 10; `total_steps`"),
    "one cycle": (lambda: schedules.one_cycle(0), "one_cycle: got 0; `steps` must be a number in"),
    "div": (lambda: schedules.one_cycle(9, div_factor=0), "one_cycle: got 0; `div_factor` must be"),
    "final": (lambda: schedules.one_cycle(9, final_div_factor=0), "one_cycle: got 0; `final_div_factor` must be"),
    "pct": (lambda: schedules.one_cycle(9, pct_start=2), "one_cycle: got 2; `pct_start` must be"),
    "three": (lambda: schedules.one_cycle(90, 0.7, three_phase=True), "one_cycle: three_phase=True falls as long"),
    "warm-up": (lambda: schedules.constant_with_warmup(-1), "got -1; `steps` must be"),
}


@pytest.mark.parametrize("case", BUILDERS)
def test_ready_made_schedules_name_their_own_arguments(case):
    make, words = BUILDERS[case]
    with pytest.raises(ValueError, match=words):
        make()
