"""Param groups that are added to an optimizer after its schedulers were made: the right value, or a refusal."""

import copy
import pickle

import pytest
import torch
import torch.optim.lr_scheduler as torchs
from lr_scheduler_helpers import rates, run, sgd, values

from surefoot import lr_scheduler as ours
from surefoot.lr_scheduler import schedules
from surefoot.swa_utils import SWALR

MAKERS = {
    "LambdaLR": lambda o: ours.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: ours.MultiplicativeLR(o, lambda epoch: 1 - 0.5**epoch),
    "StepLR": lambda o: ours.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: ours.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: ours.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: ours.LinearLR(o, 0.25, 1.0, 8),
    "ExponentialLR": lambda o: ours.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: ours.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: ours.CosineAnnealingLR(o, 5, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: ours.CosineAnnealingWarmRestarts(o, 5, eta_min=0.01),
    "CyclicLR": lambda o: ours.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda o: ours.OneCycleLR(o, 0.1, 15),
    "SWALR": lambda o: SWALR(o, 0.01, 6),
    "Schedule": lambda o: ours.Schedule(o, lr=schedules.linear(1, 0, 10), momentum=schedules.cosine(1, 0, 9)),
    "SequentialLR": lambda o: ours.SequentialLR(o, [ours.LinearLR(o, 0.1, 1, 4), ours.CosineAnnealingLR(o, 9)], [4]),
    "ChainedScheduler": lambda o: ours.ChainedScheduler([ours.CosineAnnealingLR(o, 9, 0.01), ours.LinearLR(o, 0.5)]),
    "nested": lambda o: ours.SequentialLR(
        o,
        [
            ours.ChainedScheduler([ours.MultiplicativeLR(o, lambda e: 0.9), ours.LinearLR(o, 0.1, 1, 4)]),
            ours.SequentialLR(o, [ours.ExponentialLR(o, 0.9), ours.StepLR(o, 2)], [3]),
        ],
        [4],
    ),
    "with a closed form inside": lambda o: ours.ChainedScheduler(
        [ours.LambdaLR(o, lambda epoch: 0.9**epoch), ours.LinearLR(o, 0.5)]
    ),
}


def another(lr=1.0, **more):
    return {"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr, **more}


def three():
    optimizer = sgd(momentum=0.9)
    optimizer.add_param_group(another())
    return optimizer


@pytest.mark.parametrize("copied", [False, True], ids=["", "of a copy"])
@pytest.mark.parametrize("at", [0, 1, 3, 4, 5, 8])
@pytest.mark.parametrize("name", MAKERS)
def test_an_added_group_is_where_it_would_be_from_the_beginning(name, at, copied):
    expected = run(MAKERS[name](three()), 14, values)
    scheduler = MAKERS[name](sgd(momentum=0.9))
    run(scheduler, at)
    if copied and name in ("StepLR", "SequentialLR", "Schedule", "CyclicLR"):
        scheduler = pickle.loads(pickle.dumps(scheduler))
    scheduler.optimizer.add_param_group(another())
    for seen, right in zip(run(scheduler, 14 - at, values)[1:], expected[at + 1 :], strict=True):
        for a, b in zip(seen, right, strict=True):
            assert a == pytest.approx(b, rel=1e-12)
    assert len(scheduler.get_last_lr()) == 3


def test_a_group_added_in_a_warm_up_ends_at_its_own_rate():
    """It ended at 3.08: the factors that are left, from the whole rate on."""
    scheduler = ours.LinearLR(sgd(), 1 / 3, 1.0, 5)
    run(scheduler, 1)
    scheduler.optimizer.add_param_group(another())
    run(scheduler, 10)
    assert rates(scheduler.optimizer) == pytest.approx([0.1, 0.1 / 3, 1.0])


def test_two_schedulers_of_one_optimizer_take_a_group_up_one_after_the_other():
    def make(optimizer):
        return ours.LinearLR(optimizer, 0.25, 1.0, 8), ours.ExponentialLR(optimizer, 0.9)

    def go_on(schedulers, epochs):
        schedulers[0].optimizer.step()
        for _ in range(epochs):
            for scheduler in schedulers:
                scheduler.step()
        return rates(schedulers[0].optimizer)

    expected = go_on(make(three()), 10)
    schedulers = make(sgd())
    go_on(schedulers, 3)
    schedulers[0].optimizer.add_param_group(another())
    assert go_on(schedulers, 7) == pytest.approx(expected)


@pytest.mark.parametrize("sequence", [True, False])
def test_a_group_may_come_between_the_parts_and_their_composite(sequence):
    def make(optimizer, added):
        parts = [ours.LinearLR(optimizer, 0.25, 1.0, 8), ours.MultiplicativeLR(optimizer, lambda epoch: 0.9)]
        if added:
            optimizer.add_param_group(another())
        return ours.SequentialLR(optimizer, parts, [4]) if sequence else ours.ChainedScheduler(parts)

    assert run(make(sgd(), added=True), 9) == run(make(three(), added=False), 9)


def test_a_group_that_says_where_it_began_keeps_its_rate():
    scheduler = ours.ExponentialLR(sgd(), 0.5)
    run(scheduler, 2)
    scheduler.optimizer.add_param_group(another(0.3, initial_lr=1.0))
    run(scheduler, 1)
    assert rates(scheduler.optimizer)[2] == 0.15
    assert scheduler.base_lrs[2] == 1.0


def test_a_users_scheduler_takes_groups_up():
    class Halving(ours.LRScheduler):
        def get_lr(self):
            return [base * 0.5**self.last_epoch for base in self.base_lrs]

    scheduler = Halving(sgd())
    run(scheduler, 2)
    scheduler.optimizer.add_param_group(another())
    run(scheduler, 1)
    assert rates(scheduler.optimizer)[2] == 0.125


REFUSED = {
    "LambdaLR": (
        lambda o: ours.LambdaLR(o, [lambda epoch: 0.9**epoch] * 2),
        "which has a list for lr_lambda, without a value for them; give one for all groups; or make a new scheduler",
    ),
    "MultiplicativeLR": (lambda o: ours.MultiplicativeLR(o, [lambda epoch: 0.9] * 2), "has a list for lr_lambda"),
    "CyclicLR": (lambda o: ours.CyclicLR(o, [0.1, 0.2], 1.0), "has a list for base_lr, without"),
    "CyclicLR momentum": (lambda o: ours.CyclicLR(o, 0.1, 1.0, max_momentum=[0.9, 0.9]), "has a list for max_momentum"),
    "OneCycleLR": (lambda o: ours.OneCycleLR(o, [0.1, 0.2], 20), "has a list for max_lr, without"),
    "SWALR": (lambda o: SWALR(o, [0.1, 0.2]), "has a list for swa_lr, without"),
    "Schedule": (
        lambda o: ours.Schedule(o, lr=[schedules.linear(1, 0, 9)] * 2),
        "has a list of schedules for lr, without one for them; give one for all groups",
    ),
    "SequentialLR": (
        lambda o: ours.SequentialLR(o, [ours.StepLR(o, 2), ours.LambdaLR(o, [lambda epoch: 0.9] * 2)], [3]),
        "has a LambdaLR at index 1 that has a list for lr_lambda",
    ),
    "torch's": (
        lambda o: ours.ChainedScheduler([torchs.StepLR(o, 2)]),
        "has torch's StepLR at index 0, which takes up no group; give the class of surefoot.lr_scheduler",
    ),
    "from where the one before ended": (
        lambda o: ours.SequentialLR(o, [ours.StepLR(o, 2), SWALR(o, 0.1)], [1]),
        "runs its SWALR from the rate at which the one before it ended; use a scheduler that begins at the initial",
    ),
    "chained composites": (
        lambda o: ours.ChainedScheduler([ours.SequentialLR(o, [ours.StepLR(o, 2)], [])]),
        "has schedulers of schedulers inside, whose past cannot be run through; chain simple ones",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_value_is_refused_before_anything_changes(case):
    make, words = REFUSED[case]
    scheduler = make(sgd(momentum=0.9))
    run(scheduler, 2)
    optimizer = scheduler.optimizer
    for _ in range(2):
        optimizer.add_param_group(another())
    before, groups = copy.deepcopy(scheduler.state_dict()), [dict(group) for group in optimizer.param_groups]
    for _ in range(2):
        with pytest.raises(ValueError, match="param groups 2, 3 came after this") as raised:
            scheduler.step()
        assert words in str(raised.value)
        assert optimizer.param_groups == groups
        assert repr(scheduler.state_dict()) == repr(before)


def test_chained_schedulers_at_different_epochs_take_no_group_up():
    optimizer = sgd()
    first = ours.StepLR(optimizer, 2)
    run(first, 1)
    chain = ours.ChainedScheduler([first, ours.LinearLR(optimizer)])
    optimizer.add_param_group(another())
    with pytest.raises(ValueError, match="has schedulers at different epochs; make them together"):
        chain.step()


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "Schedule"])
def test_groups_that_are_gone_are_refused(name):
    scheduler = MAKERS[name](three())
    run(scheduler, 1)
    del scheduler.optimizer.param_groups[1]
    before = rates(scheduler.optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match="was made for 3 param groups, but the optimizer has 2; make a new sched"):
            scheduler.step()
    assert rates(scheduler.optimizer) == before


@pytest.mark.parametrize("order", ["optimizer first", "scheduler first", "scheduler only"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_run_with_an_added_group_resumes(name, order):
    """The new run makes the scheduler, adds the group, and loads."""
    before = MAKERS[name](sgd(momentum=0.9))
    run(before, 3)
    before.optimizer.add_param_group(another())
    run(before, 2)
    after = MAKERS[name](sgd(momentum=0.9))
    after.optimizer.add_param_group(another())
    loads = [
        lambda: after.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict())),
        lambda: after.load_state_dict(copy.deepcopy(before.state_dict())),
    ]
    for load in {"optimizer first": loads, "scheduler first": loads[::-1], "scheduler only": loads[1:]}[order]:
        load()
    assert run(after, 8, values) == run(before, 8, values)


def test_a_get_lr_of_another_length_is_refused_before_anything_changes():
    class First(ours.LRScheduler):
        def get_lr(self):
            return [base * 0.5 for base in self.base_lrs][: 2 if self.last_epoch == 0 else 1]

    scheduler = First(sgd())
    before = rates(scheduler.optimizer)
    scheduler.optimizer.step()
    with pytest.raises(ValueError, match="First.get_lr gave 1 learning rates, but the optimizer has 2 param groups"):
        scheduler.step()
    assert rates(scheduler.optimizer) == before


def test_an_exception_in_a_users_function_leaves_the_position():
    def factor(epoch):
        if epoch == 2:
            raise ZeroDivisionError
        return 0.5

    for make in (
        lambda o: ours.LambdaLR(o, factor),
        lambda o: ours.SequentialLR(o, [ours.LambdaLR(o, factor)], []),
        lambda o: ours.Schedule(o, lr=factor),
    ):
        scheduler = make(sgd())
        run(scheduler, 1)
        before = repr(scheduler.state_dict())
        with pytest.raises(ZeroDivisionError):
            scheduler.step()
        assert repr(scheduler.state_dict()) == before
