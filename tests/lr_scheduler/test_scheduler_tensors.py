"""Tensors: a group, a bound and a scheduler never hold the same one, whatever the arguments are."""

import copy
import functools

import pytest
import torch
from lr_scheduler_helpers import rates, run, sgd, values
from test_scheduler_parity import Decay
from torch import tensor

from surefoot import lr_scheduler as ours
from surefoot.lr_scheduler import schedules
from surefoot.swa_utils import SWALR

EPOCHS = 12

# Each scheduler, with its arguments as tensors if that is asked for.
MAKERS = {
    "LambdaLR": lambda o, t: ours.LambdaLR(o, lambda epoch: t(0.9**epoch)),
    "MultiplicativeLR": lambda o, t: ours.MultiplicativeLR(o, lambda epoch: t(0.9)),
    "StepLR": lambda o, t: ours.StepLR(o, 2, t(0.5)),
    "MultiStepLR": lambda o, t: ours.MultiStepLR(o, [2, 5], t(0.5)),
    "ConstantLR": lambda o, t: ours.ConstantLR(o, t(0.5), 4),
    "LinearLR": lambda o, t: ours.LinearLR(o, t(0.5), t(1.0), 4),
    "ExponentialLR": lambda o, t: ours.ExponentialLR(o, t(0.5)),
    "PolynomialLR": lambda o, t: ours.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o, t: ours.CosineAnnealingLR(o, 5, t(0.01)),
    "CosineAnnealingWarmRestarts": lambda o, t: ours.CosineAnnealingWarmRestarts(o, 5, eta_min=t(0.01)),
    "CyclicLR": lambda o, t: ours.CyclicLR(o, t(0.01), t(0.1), 3, base_momentum=t(0.8), max_momentum=t(0.9)),
    "OneCycleLR": lambda o, t: ours.OneCycleLR(o, t(0.1), 15, base_momentum=t(0.85), max_momentum=t(0.95)),
    "SWALR": lambda o, t: SWALR(o, t(0.01), 4),
    "ReduceLROnPlateau": lambda o, t: ours.ReduceLROnPlateau(o, patience=0, min_lr=t(0.05)),
    "SequentialLR": lambda o, t: ours.SequentialLR(
        o, [ours.LinearLR(o, t(0.5), 1.0, 4), ours.CyclicLR(o, t(0.01), t(0.1), 3)], [4]
    ),
    "ChainedScheduler": lambda o, t: ours.ChainedScheduler([ours.StepLR(o, 2, t(0.5)), ours.LinearLR(o, t(0.5))]),
    "Schedule": lambda o, t: ours.Schedule(o, lr=lambda step: t(1 / (step + 1)), momentum=schedules.cosine(1, 0, 9)),
}


def sgd_of(*, group, initial):
    """Two groups whose rates and momenta are tensors or numbers, and whose initial rates are."""
    optimizer = sgd(tensor=group, momentum=0.9)
    for entry in optimizer.param_groups:
        if group:
            entry["momentum"] = tensor(0.9)
        if initial:
            entry["initial_lr"] = tensor(float(entry["lr"]))
    return optimizer


def followed(scheduler, epochs=EPOCHS):
    if isinstance(scheduler, ours.ReduceLROnPlateau):
        scheduler.step = functools.partial(scheduler.step, 1.0)
    return run(scheduler, epochs, lambda optimizer: [tuple(map(float, group)) for group in values(optimizer)])


def tensors_in(value, seen):
    """Yield every tensor within plain containers, groups and schedulers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("params", "_given"):
                yield from tensors_in(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item, seen)
    elif isinstance(value, ours.LRScheduler) and id(value) not in seen:
        seen.add(id(value))
        yield from tensors_in({k: v for k, v in vars(value).items() if k != "optimizer"}, seen)


@pytest.mark.parametrize("initial", [False, True], ids=["", "tensor initial_lr"])
@pytest.mark.parametrize("group", [False, True], ids=["numbers in groups", "tensors in groups"])
@pytest.mark.parametrize("name", MAKERS)
def test_arguments_that_are_tensors_mean_what_their_numbers_mean(name, group, initial):
    """torch's CyclicLR goes wrong with tensor rates and a group of numbers; OneCycleLR's momentum stood still."""
    expected = followed(MAKERS[name](sgd(momentum=0.9), float))
    scheduler = MAKERS[name](sgd_of(group=group, initial=initial), tensor)
    for seen, right in zip(followed(scheduler), expected, strict=True):
        for a, b in zip(seen, right, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    held = [*tensors_in(scheduler, set()), *tensors_in(scheduler.optimizer.param_groups, set())]
    held += tensors_in(scheduler.optimizer.defaults, set())
    storages = [one.untyped_storage().data_ptr() for one in held]
    assert len(storages) == len(set(storages))
    for entry in scheduler.optimizer.param_groups:
        assert all(isinstance(entry[key], torch.Tensor) == group for key in ("lr", "momentum"))


def test_one_cycle_with_tensor_momenta_comes_back():
    scheduler = ours.OneCycleLR(sgd(momentum=0.9), 0.1, 10, base_momentum=tensor(0.85), max_momentum=tensor(0.95))
    seen = [momentum for _, momentum in (group[0] for group in followed(scheduler, 9))]
    assert seen[0] == pytest.approx(0.95)
    assert min(seen) == pytest.approx(0.85)
    assert seen[-1] == pytest.approx(0.95)


def adam(optimizer=torch.optim.Adam):
    """Two groups that share the tensors of the constructor, as torch's groups do."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    return optimizer(groups, tensor(0.1), (tensor(0.9), tensor(0.99)), capturable=True)


def test_groups_that_share_the_constructors_tensor_are_set_apart():
    """Each group wrote into the same tensor, so that the last one's rate was that of all."""
    optimizer = adam()
    first = optimizer.param_groups[0]["lr"]
    scheduler = ours.LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: 0.5])
    assert rates(optimizer) == pytest.approx([0.1, 0.05])
    assert optimizer.param_groups[0]["lr"] is first
    assert optimizer.defaults["lr"].item() == pytest.approx(0.1)
    ours.Schedule(optimizer, betas=[(schedules.constant(0.5), None), None])
    assert [group["betas"][0].item() for group in optimizer.param_groups] == pytest.approx([0.45, 0.9])
    cyclic = ours.CyclicLR(adam(), [0.1, 0.2], 0.3, base_momentum=[0.5, 0.6], max_momentum=[0.7, 0.8])
    assert rates(cyclic.optimizer) == pytest.approx([0.1, 0.2])
    assert [group["betas"][0].item() for group in cyclic.optimizer.param_groups] == pytest.approx([0.7, 0.8])
    plateau = ours.ReduceLROnPlateau(adam(), patience=0, min_lr=[0.05, 0.0])
    for _ in range(2):
        plateau.step(1.0)
    assert rates(plateau.optimizer) == pytest.approx([0.05, 0.01])
    assert scheduler.get_last_lr() == pytest.approx([0.1, 0.05])


def test_a_group_that_is_added_has_the_default_and_not_the_scheduled_rate():
    optimizer = adam()
    scheduler = ours.StepLR(optimizer, 1, 0.5)
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert rates(optimizer) == pytest.approx([0.05, 0.05, 0.1])


def test_a_rate_that_takes_gradients_stays_shared():
    rate = tensor(0.1, requires_grad=True)
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, rate)
    ours.StepLR(optimizer, 3)
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    copy.deepcopy(optimizer)


def test_callable_objects_may_give_tensors():
    seen = followed(ours.LambdaLR(sgd(), lambda epoch: tensor(Decay(0.5)(epoch))), 3)
    assert [group[0][0] for group in seen] == pytest.approx([0.1, 0.05, 0.025, 0.0125])
