"""Resuming equals running through, bit for bit: one test for each thread in which users found that it does not."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.optim.lr_scheduler as torchs
from hypothesis import given
from hypothesis import strategies as st
from lr_scheduler_helpers import rates, run, sgd, values
from test_scheduler_parity import ALL, quick, settings

import surefoot
from surefoot import lr_scheduler as ours
from surefoot.lr_scheduler import Schedule, schedules
from surefoot.swa_utils import SWALR

EPOCHS = 200


def fresh_with_initial_lr(like):
    """An optimizer with the groups' entries of a checkpoint but the learning rates of the beginning."""
    optimizer = sgd(momentum=0.9)
    for group, saved in zip(optimizer.param_groups, like.param_groups, strict=True):
        group.update({key: value for key, value in saved.items() if key not in ("params", "lr")})
    return optimizer


def loaded(like):
    optimizer = sgd(momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(like.state_dict()))
    return optimizer


@pytest.mark.parametrize("resume", [loaded, fresh_with_initial_lr])
@pytest.mark.parametrize("name", ALL)
def test_last_epoch_resumes_any_scheduler(name, resume):
    """pytorch#102261, pytorch#60265, speculators#900: `last_epoch=k - 1` is where k steps lead."""

    @settings(quick, max_examples=8)
    @given(ALL[name], st.integers(1, EPOCHS - 1))
    def check(arguments, at):
        make = getattr(ours, name)
        before = make(sgd(momentum=0.9), **arguments)
        run(before, at)
        after = make(resume(before.optimizer), last_epoch=at - 1, **arguments)
        assert after.last_epoch == before.last_epoch == at
        assert run(after, EPOCHS - at, values) == run(before, EPOCHS - at, values)

    check()


def test_torch_decays_twice_where_step_lr_resumes_at_a_multiple():
    """What the test above is about: torch's constructor takes the step at epoch 10 again."""
    seen = []
    for library in (torchs, ours):
        before = library.StepLR(sgd(), 10)
        run(before, 10)
        after = library.StepLR(loaded(before.optimizer), 10, last_epoch=9)
        seen.append(rates(after.optimizer) == rates(before.optimizer))
    assert seen == [False, True]


@pytest.mark.parametrize("at", [1, 30, 31, 62, 63, 100])
def test_restarts_resume_in_the_right_cycle(at):
    whole = run(ours.CosineAnnealingWarmRestarts(sgd(), 10, 2), 150)
    assert (
        run(ours.CosineAnnealingWarmRestarts(fresh_with_initial_lr(initial()), 10, 2, last_epoch=at - 1), 20)
        == (whole[at : at + 21])
    )


def initial():
    optimizer = sgd()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


@pytest.mark.parametrize("mult", [2, 3, 5])
def test_restarts_by_epoch_are_those_by_stepping(mult):
    """torch takes a logarithm, which rounds to the cycle before at some restarts (243 = 3 ** 5 is one)."""
    stepped = run(ours.CosineAnnealingWarmRestarts(sgd(), 1, mult), 800)
    jumping = ours.CosineAnnealingWarmRestarts(sgd(), 1, mult)
    for epoch, expected in enumerate(stepped):
        jumping.step(epoch)
        assert rates(jumping.optimizer) == expected


def test_a_state_dict_alone_restores_the_rate():
    """pytorch#29697: MultiStepLR after load_state_dict stayed at the initial rate."""
    before = ours.MultiStepLR(sgd(1.0), gamma=0.1, milestones=[5])
    expected = run(before, 15)
    before = ours.MultiStepLR(sgd(1.0), gamma=0.1, milestones=[5])
    run(before, 10)
    after = ours.MultiStepLR(sgd(1.0), gamma=0.1, milestones=[5])
    after.load_state_dict(before.state_dict())
    assert run(after, 5) == expected[10:]


@pytest.mark.parametrize("order", ["optimizer first", "scheduler first", "scheduler only"])
@pytest.mark.parametrize("name", ALL)
def test_state_dicts_resume_in_any_order_and_survive_a_manual_change(name, order):
    """pytorch#29697, for all; the rate was changed by hand before the checkpoint."""

    @settings(quick, max_examples=4)
    @given(ALL[name], st.integers(1, EPOCHS - 1))
    def check(arguments, at):
        before = getattr(ours, name)(sgd(momentum=0.9), **arguments)
        run(before, at)
        if order != "scheduler only":
            before.optimizer.param_groups[0]["lr"] = 0.0123
        after = getattr(ours, name)(sgd(momentum=0.9), **arguments)
        loads = [
            lambda: after.optimizer.load_state_dict(before.optimizer.state_dict()),
            lambda: after.load_state_dict(before.state_dict()),
        ]
        for load in {"optimizer first": loads, "scheduler first": loads[::-1], "scheduler only": loads[1:]}[order]:
            load()
        assert run(after, EPOCHS - at, values) == run(before, EPOCHS - at, values)

    check()


def warm_up_then_decay(library, optimizer, last_epoch=-1):
    """The schedulers of pytorch#162591."""
    parts = [
        library.ConstantLR(optimizer, factor=0.1, total_iters=20),
        library.ExponentialLR(optimizer, gamma=0.9),
        library.CosineAnnealingLR(optimizer, T_max=7),
    ]
    return library.SequentialLR(optimizer, parts, [3, 20], last_epoch)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 19, 20, 21, 40])
@pytest.mark.parametrize("resume", [loaded, fresh_with_initial_lr])
def test_sequential_lr_resumes_by_last_epoch(at, resume):
    """pytorch#162591: last_epoch=N began with the first scheduler's first rate."""
    before = warm_up_then_decay(ours, sgd())
    run(before, at)
    after = warm_up_then_decay(ours, resume(before.optimizer), at - 1)
    assert after.last_epoch == at
    assert [part.last_epoch for part in after._schedulers] == [part.last_epoch for part in before._schedulers]
    assert run(after, 60) == run(before, 60)


def test_torchs_sequential_lr_does_not_resume_by_last_epoch():
    before = warm_up_then_decay(torchs, sgd())
    run(before, 10)
    assert rates(warm_up_then_decay(torchs, loaded(before.optimizer), 9).optimizer) != rates(before.optimizer)


def test_resuming_sequential_lr_does_not_warn_or_forget_the_order_check():
    scheduler = warm_up_then_decay(ours, initial(), 30)
    with pytest.warns(UserWarning, match=r"Detected call of `lr_scheduler.step\(\)` before"):
        ours.ExponentialLR(scheduler.optimizer, 0.9).step()


def test_exponential_after_linear_has_no_jump():
    """pytorch#67586: the second scheduler began at a wrong rate."""
    optimizer = sgd()
    parts = [ours.LinearLR(optimizer, total_iters=5), ours.ExponentialLR(optimizer, gamma=0.9)]
    seen = [rate for rate, _ in run(ours.SequentialLR(optimizer, parts, [5]), 20)]
    expected = [0.1 * (1 + 2 * e / 5) / 3 for e in range(5)] + [0.1 * 0.9**e for e in range(16)]
    assert seen == pytest.approx(expected, rel=1e-14)


def nested(optimizer, last_epoch=-1):
    """Sequences within a sequence, first and later, and a chain in each place."""
    inner = ours.SequentialLR(
        optimizer, [ours.LinearLR(optimizer, 0.1, 1.0, 4), ours.CosineAnnealingLR(optimizer, 20)], [4]
    )
    chain = ours.ChainedScheduler([ours.ExponentialLR(optimizer, 0.95), ours.LinearLR(optimizer, 0.5, 1.0, 3)])
    later = ours.SequentialLR(optimizer, [chain, ours.StepLR(optimizer, 2, 0.5)], [7])
    return ours.SequentialLR(optimizer, [inner, later, ours.PolynomialLR(optimizer, 10)], [9, 25], last_epoch)


def nested_by_formula(epoch):
    """The same as one function."""
    if epoch < 4:
        return 0.1 + 0.9 * epoch / 4
    if epoch < 9:
        return (1 + math.cos(math.pi * (epoch - 4) / 20)) / 2
    if epoch < 16:
        return 0.95 ** (epoch - 9) * min(1, 0.5 + 0.5 * (epoch - 9) / 3)
    if epoch < 25:
        return 0.5 ** ((epoch - 16) // 2)
    return max(0, 1 - (epoch - 25) / 10)


def test_nested_sequences_are_what_they_say():
    """Torch's composites do not: see `test_torchs_composites_do_not_nest`."""
    seen = [rate for rate, _ in run(nested(sgd()), 40)]
    assert seen == pytest.approx([0.1 * nested_by_formula(epoch) for epoch in range(41)], rel=1e-13, abs=1e-17)


@pytest.mark.parametrize("at", [1, 3, 4, 8, 9, 10, 15, 16, 20, 24, 25, 30])
def test_nested_sequences_resume(at):
    whole = nested(sgd())
    expected = run(whole, 40)
    before = nested(sgd())
    run(before, at)
    by_epoch = nested(loaded(before.optimizer), at - 1)
    by_state = nested(sgd())
    by_state.load_state_dict(copy.deepcopy(before.state_dict()))
    by_pickle = pickle.loads(pickle.dumps(before))
    for after in (by_epoch, by_state, by_pickle):
        assert run(after, 40 - at) == expected[at:]


def test_chained_schedulers_resume_by_last_epoch_on_a_loaded_optimizer():
    def parts(optimizer, last_epoch=-1):
        linear = ours.LinearLR(optimizer, 0.1, 1.0, 30, last_epoch)
        return ours.ChainedScheduler([linear, ours.StepLR(optimizer, 7, 0.5, last_epoch)])

    before = parts(sgd())
    run(before, 14)
    assert run(parts(loaded(before.optimizer), 13), 30) == run(before, 30)


def test_torchs_composites_do_not_nest():
    """What ours repair; the day torch does, this test says so."""
    optimizer = sgd()
    inner = torchs.SequentialLR(
        optimizer, [torchs.LinearLR(optimizer, 0.1, 1.0, 4), torchs.ExponentialLR(optimizer, 0.9)], [4]
    )
    outer = torchs.SequentialLR(optimizer, [torchs.ExponentialLR(optimizer, 0.9), inner], [3])
    with pytest.raises(NotImplementedError):
        run(outer, 3)


def test_torchs_schedulers_can_be_parts_of_ours():
    runs = []
    for library in (torchs, ours):
        optimizer = sgd()
        parts = [library.LinearLR(optimizer, 0.1, 1.0, 4), library.ExponentialLR(optimizer, 0.9)]
        scheduler = ours.SequentialLR(optimizer, parts, [4])
        again = ours.SequentialLR(optimizer, parts, [4])
        again.load_state_dict(scheduler.state_dict())
        runs.append(run(again, 20))
    assert runs[0] == runs[1]


def test_ours_can_be_parts_of_torchs():
    runs = []
    for library in (torchs, ours):
        optimizer = sgd()
        parts = [library.LinearLR(optimizer, 0.1, 1.0, 4), library.CosineAnnealingLR(optimizer, 9)]
        runs.append(run(torchs.SequentialLR(optimizer, parts, [4]), 30))
    assert runs[0] == runs[1]


def test_a_schedule_resumes_without_initial_lr():
    """speculators#900 and #1048: the loaded optimizer state had no initial_lr, and the seed was the epoch."""
    curve = schedules.linear_with_warmup(10, 100)
    whole = run(Schedule(sgd(), lr=curve), 100)
    after = Schedule(sgd(), lr=curve)
    after.set_step(37)
    assert run(after, 63) == whole[37:]


def test_a_missing_initial_lr_is_a_key_error_that_says_what_to_do():
    with pytest.raises(KeyError, match=r"param_groups\[0\].*load the optimizer's state dict first"):
        ours.StepLR(sgd(), 10, last_epoch=4)


def test_a_cosine_composes_with_other_schedules():
    """pytorch#180594: a cosine that multiplies."""
    curve = schedules.cosine(1.0, 0.1, 100) * schedules.step(30, 0.5)
    seen = [rate for rate, _ in run(Schedule(sgd(), lr=curve), 120)]
    expected = [
        0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * min(e, 100) / 100)) / 2) * 0.5 ** (e // 30) for e in range(121)
    ]
    assert seen == pytest.approx(expected, rel=1e-14)


def test_a_schedule_jumps_in_the_closed_form():
    """pytorch#184517 and #152081, closed forms and correct resume: any step is reached from any other."""
    curve = schedules.one_cycle(100) * schedules.multi_step([20, 20, 50], 0.3)
    schedule = Schedule(sgd(), lr=curve)
    seen = run(schedule, 99)
    for step in (99, 3, 50, 0, 98):
        schedule.set_step(step)
        assert rates(schedule.optimizer) == seen[step]


@pytest.mark.parametrize("at", [0, 1, 5, 9, 10, 11])
def test_swalr_resumes(at):
    before = SWALR(sgd(), 0.01)
    run(before, at)
    after = SWALR(loaded(before.optimizer), 0.01, last_epoch=at - 1)
    by_state = SWALR(sgd(), 0.01)
    by_state.load_state_dict(before.state_dict())
    expected = run(before, 20)
    assert run(after, 20) == run(by_state, 20) == expected


def test_schedulers_of_torch_drive_our_optimizers():
    runs = [run(torchs.CosineAnnealingLR(sgd(optimizer=cls), 30), 100) for cls in (torch.optim.Adam, surefoot.Adam)]
    runs += [run(ours.CosineAnnealingLR(sgd(optimizer=cls), 30), 100) for cls in (torch.optim.Adam, surefoot.Adam)]
    assert runs[0] == runs[1] == runs[2] == runs[3]


@pytest.mark.parametrize("library", [torchs, ours])
def test_momentum_cycles_in_our_optimizers(library):
    runs = [
        run(library.OneCycleLR(sgd(optimizer=cls), 0.5, 50), 49, values) for cls in (torch.optim.Adam, surefoot.Adam)
    ]
    assert runs[0] == runs[1]


def test_a_scheduler_survives_our_optimizers_state_dict():
    optimizer = sgd(optimizer=surefoot.AdamW)
    scheduler = ours.StepLR(optimizer, 3)
    run(scheduler, 5)
    other = sgd(optimizer=surefoot.AdamW)
    resumed = ours.StepLR(other, 3)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert run(resumed, 9) == run(scheduler, 9)


def test_a_refused_state_dict_changes_nothing():
    one = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    for make in (lambda o: ours.StepLR(o, 3), lambda o: ours.ChainedScheduler([ours.StepLR(o, 3)])):
        scheduler, other = make(sgd()), make(one)
        run(other, 7)
        before = copy.deepcopy(scheduler.state_dict())
        with pytest.raises(ValueError, match="has learning rates for 1 param groups, but the optimizer has 2"):
            scheduler.load_state_dict(other.state_dict())
        assert scheduler.state_dict() == before
    two = ours.ChainedScheduler([ours.StepLR(one, 3), ours.StepLR(one, 4)])
    with pytest.raises(ValueError, match="is of 1 schedulers, but it has 2"):
        two.load_state_dict(ours.ChainedScheduler([ours.StepLR(one, 3)]).state_dict())


def test_no_warning_when_all_is_in_order():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(nested(sgd()), 40)
