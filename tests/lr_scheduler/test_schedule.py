"""`Schedule`: any hyperparameter, any step, changes from outside, and state dicts."""

import copy
import json
import math

import pytest
import torch
import torch.optim.lr_scheduler as torchs
from hypothesis import given
from hypothesis import strategies as st
from lr_scheduler_helpers import rates, run, sgd
from test_curves import curves
from test_scheduler_parity import quick, settings

from surefoot.lr_scheduler import Schedule, StepLR
from surefoot.lr_scheduler.schedules import absolute, cosine, exponential, linear, step, warmup

STEPS = 40


def everything(optimizer):
    return [(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups]


def adam():
    # torch's does not check loaded values, and curves give any.
    return sgd(optimizer=torch.optim.AdamW)


def make(optimizer, first, second, third, last_epoch=-1):
    return Schedule(
        optimizer, last_epoch=last_epoch, lr=first, weight_decay=[second, first], betas=(None, absolute(third))
    )


@settings(quick, max_examples=30)
@given(curves, curves, curves, st.integers(0, STEPS), st.integers(0, STEPS))
def test_any_way_to_a_step_gives_the_same_bits(first, second, third, at, other):
    """Run through; jump; jump there and back; resume by last_epoch; resume by state dict, through JSON."""
    whole = make(adam(), first, second, third)
    seen = run(whole, STEPS, everything)
    for index, schedule in enumerate((make(adam(), first, second, third), whole)):
        schedule.set_step(at)
        assert everything(schedule.optimizer) == seen[at], index
        schedule.set_step(other)
        assert everything(schedule.optimizer) == seen[other]
        schedule.set_step(at)
    state, of_optimizer = json.loads(json.dumps(whole.state_dict())), copy.deepcopy(whole.optimizer.state_dict())
    alone = make(adam(), first, second, third)
    alone.load_state_dict(state)
    both = make(adam(), first, second, third)
    both.optimizer.load_state_dict(of_optimizer)
    both.load_state_dict(state)
    optimizer = adam()
    optimizer.load_state_dict(of_optimizer)
    resumed = [alone, both]
    if at:
        resumed.append(make(optimizer, first, second, third, last_epoch=at - 1))
    for schedule in resumed:
        assert schedule.last_epoch == at
        assert run(schedule, STEPS - at, everything) == seen[at:]


@settings(quick, max_examples=30)
@given(curves, st.integers(1, STEPS), st.integers(0, STEPS))
def test_values_are_the_initial_one_times_the_curve(curve, now, start):
    schedule = Schedule(sgd(), lr=curve)
    schedule.set_step(start)
    schedule.set_step(now)
    assert schedule.get_last_lr() == [0.1 * curve(now), 0.1 / 3 * curve(now)]


def test_a_tensor_lr_is_filled_in_place():
    optimizer = sgd(tensor=True)
    tensors = [group["lr"] for group in optimizer.param_groups]
    schedule = Schedule(optimizer, lr=warmup(10, cosine(1, 0, 50)))
    seen = run(schedule, STEPS)
    assert all(a is group["lr"] for a, group in zip(tensors, optimizer.param_groups, strict=True))
    assert schedule.get_last_lr()[0] is not tensors[0]
    for now in (7, 3, 40):
        schedule.set_step(now)
        assert rates(optimizer) == seen[now]


def test_tensor_betas_are_filled_in_place():
    beta = torch.tensor(0.9)
    optimizer = torch.optim.AdamW(
        [torch.nn.Parameter(torch.ones(1))], torch.tensor(0.1), (beta, torch.tensor(0.99)), capturable=True
    )
    Schedule(optimizer, betas=(linear(1.0, 0.5, 10), None)).set_step(10)
    assert optimizer.param_groups[0]["betas"][0] is beta
    assert beta.item() == torch.tensor(0.45).item()


def test_a_manual_change_is_respected_as_in_torchs_chainable_form():
    ours, theirs = Schedule(sgd(), lr=exponential(0.9)), torchs.ExponentialLR(sgd(), 0.9)
    seen = []
    for scheduler in (ours, theirs):
        run(scheduler, 5)
        scheduler.optimizer.param_groups[0]["lr"] = 5.0
        run(scheduler, 5)
        seen.append(rates(scheduler.optimizer))
    assert seen[0] == pytest.approx(seen[1], rel=1e-14)
    assert seen[0][0] == pytest.approx(5.0 * 0.9**5)


def test_a_manual_change_survives_a_resume():
    whole = Schedule(sgd(), lr=cosine(1, 0, 50))
    run(whole, 5)
    whole.optimizer.param_groups[0]["lr"] = 5.0
    state, of_optimizer = copy.deepcopy((whole.state_dict(), whole.optimizer.state_dict()))
    for order in ((0, 1), (1, 0)):
        resumed = Schedule(sgd(), lr=cosine(1, 0, 50))
        loads = [
            lambda r=resumed: r.optimizer.load_state_dict(of_optimizer),
            lambda r=resumed: r.load_state_dict(state),
        ]
        for index in order:
            loads[index]()
        assert rates(resumed.optimizer)[0] == 5.0
        assert run(resumed, 30) == run(copy.deepcopy(whole), 30)


def test_a_change_where_the_factor_is_zero_becomes_the_measure():
    schedule = Schedule(sgd(), lr=linear(0.0, 1.0, 10))
    schedule.optimizer.param_groups[0]["lr"] = 2.0
    run(schedule, 10)
    assert rates(schedule.optimizer)[0] == 2.0


def test_absolute_values_override_changes():
    optimizer = sgd(momentum=0.5)
    schedule = Schedule(optimizer, momentum=absolute(linear(0.85, 0.95, 10)))
    assert optimizer.param_groups[0]["momentum"] == 0.85
    optimizer.param_groups[0]["momentum"] = 0.1
    schedule.set_step(20)
    assert optimizer.param_groups[0]["momentum"] == 0.95


def test_functions_and_none_are_schedules_too():
    schedule = Schedule(sgd(), lr=[lambda now: 1 / (now + 1), None])
    run(schedule, 4)
    assert rates(schedule.optimizer) == [0.1 * (1 / 5), 0.1 / 3]
    assert schedule.state_dict()["scheduled"][0]["schedule"] is None


def test_a_longer_schedule_prolongs_a_run():
    short = Schedule(sgd(), lr=warmup(10, linear(1, 0, 20)))
    run(short, 15)
    longer = Schedule(sgd(), lr=warmup(10, linear(1, 0, 200)))
    longer.load_state_dict(short.state_dict())
    longer.step()
    assert rates(longer.optimizer)[0] == pytest.approx(0.1 * (1 - 6 / 200))


def test_it_works_with_other_schedulers_and_compiles_no_history():
    schedule = Schedule(sgd(), lr=step(3, 0.5))
    assert isinstance(schedule, torchs.LRScheduler)
    with pytest.warns(UserWarning, match=r"Detected call of `lr_scheduler.step\(\)`"):
        schedule.step()
    decay = StepLR(schedule.optimizer, 1, 0.5)
    decay.optimizer.step()
    decay.step()
    schedule.step()
    # The rate that the other one halved is this one's new measure.
    assert rates(schedule.optimizer)[0] == 0.05


def test_it_copies_with_its_optimizer():
    schedule = Schedule(sgd(), lr=cosine(1, 0, 50))
    run(schedule, 5)
    twin = copy.deepcopy(schedule)
    assert run(twin, 20) == run(schedule, 20)
    assert twin.optimizer is not schedule.optimizer


def test_loading_is_all_or_nothing():
    schedule, other = Schedule(sgd(), lr=cosine(1, 0, 50)), Schedule(adam(), weight_decay=cosine(1, 0, 50))
    before = copy.deepcopy(schedule.state_dict())
    message = (
        "the state dict schedules weight_decay of group 0, weight_decay of group 1, but this Schedule has lr of gro"
    )
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(other.state_dict())
    assert schedule.state_dict() == before


BAD = {
    "nothing": ({}, ValueError, "needs a schedule for at least one hyperparameter"),
    "unknown": (
        {"eps": cosine(1, 0, 5)},
        ValueError,
        "param group 0 has no hyperparameter 'eps' to schedule; it has: .*lr",
    ),
    "list": ({"lr": [cosine(1, 0, 5)]}, ValueError, "lr has 1 schedules, but the optimizer has 2 param groups"),
    "tuple": ({"lr": (cosine(1, 0, 5),)}, ValueError, "lr is 0.1 and needs one schedule, but got"),
    "number": ({"lr": 0.1}, TypeError, "the schedule of lr must be a curve or a function, but got 0.1"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case):
    schedules, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        Schedule(sgd(), **schedules)


def test_more_mistakes_are_named():
    with pytest.raises(
        ValueError, match=r"betas is \(0.9, 0.999\) and needs a tuple of 2 schedules, None for what stays, but got"
    ):
        Schedule(adam(), betas=cosine(1, 0, 5))
    with pytest.raises(TypeError, match="int is not an Optimizer"):
        Schedule(3, lr=cosine(1, 0, 5))
    schedule = Schedule(sgd(), lr=cosine(1, 0, 5))
    for wrong in (-1, 0.5, math.nan):
        with pytest.raises(ValueError, match=r"set_step takes a whole number >= 0, but got"):
            schedule.set_step(wrong)
