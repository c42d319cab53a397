"""The learning-rate range test: what it finds, and that nothing is left of it."""

import copy
import math
import random

import numpy as np
import pytest
import torch

import surefoot
from surefoot.lr_finder import LRCurve, find_lr


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors as small as these are done before a second thread wakes up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Task:
    """A small regression with everything that training changes: dropout, running statistics, random numbers."""

    def __init__(self, optimizer=surefoot.SGD, **options):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1)]
        self.model = torch.nn.Sequential(*layers)
        groups = [{"params": list(self.model[0].parameters()), "lr": 0.1}, {"params": list(self.model[3].parameters())}]
        self.optimizer = optimizer(groups, **{"lr": 0.01, **options})
        self.rates = []

    def step(self):
        inputs = torch.randn(32, 8) + random.random() / 9 + np.random.rand() / 9  # noqa: NPY002, S311
        loss = (self.model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.rates.append([float(group["lr"]) for group in self.optimizer.param_groups])
        return loss

    def everything(self):
        """Model, gradients, modes, optimizer and random numbers, copied."""
        return copy.deepcopy(
            (
                {name: tensor.tolist() for name, tensor in self.model.state_dict().items()},
                [None if param.grad is None else param.grad.tolist() for param in self.model.parameters()],
                [module.training for module in self.model.modules()],
                [{key: str(value) for key, value in state.items()} for state in self.optimizer.state.values()],
                [{k: str(v) for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups],
                (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),  # noqa: NPY002
            )
        )


OPTIMIZERS = [surefoot.SGD, surefoot.AdamW, surefoot.NAdam, torch.optim.AdamW, torch.optim.LBFGS]


@pytest.mark.parametrize("stepped", [0, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS[:-1])
def test_everything_is_put_back(optimizer, stepped):
    task = Task(optimizer)
    for _ in range(stepped):
        task.step()
    task.model[2].eval()
    before, tensors = task.everything(), [id(tensor) for tensor in task.model.state_dict(keep_vars=True).values()]
    find_lr(task.step, task.model, task.optimizer, steps=20)
    assert task.everything() == before
    assert tensors == [id(tensor) for tensor in task.model.state_dict(keep_vars=True).values()]


def test_training_goes_on_as_if_nothing_had_been():
    with_test, without = Task(surefoot.AdamW), Task(surefoot.AdamW)
    losses = []
    for task in (without, with_test):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        first = [task.step().item() for _ in range(3)]
        if task is with_test:
            find_lr(task.step, task.model, task.optimizer, steps=20)
        losses.append(first + [task.step().item() for _ in range(5)])
    assert losses[0] == losses[1]


def test_lists_in_the_state_are_put_back():
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum() + weight.sum().cos()
        loss.backward()
        return loss

    def step():
        return optimizer.step(closure)

    step()
    before = str(optimizer.state_dict())
    old_dirs = optimizer.state[weight]["old_dirs"]
    find_lr(step, [], optimizer, steps=5)
    assert str(optimizer.state_dict()) == before
    assert optimizer.state[weight]["old_dirs"] is old_dirs
    assert weight.tolist() != [3.0, -2.0]


def test_everything_is_put_back_after_an_exception():
    task = Task()
    task.step()
    before, count = task.everything(), len(task.rates)

    def failing():
        loss = task.step()
        if len(task.rates) == count + 4:
            task.model.eval()
            task.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        find_lr(failing, task.model, task.optimizer)
    del task.optimizer.param_groups[2:]
    assert task.everything() == before


def test_a_tensor_lr_is_filled_and_put_back_in_place():
    task = Task(surefoot.AdamW)
    lr = torch.tensor(0.25)
    task.optimizer.param_groups[0]["lr"] = lr
    find_lr(task.step, task.model, task.optimizer, steps=6)
    assert task.optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_rates_grow_by_a_factor_and_groups_keep_their_ratio():
    task = Task()
    curve = find_lr(task.step, task.model, task.optimizer, lowest=1e-4, highest=1e-2, steps=21)
    first = np.array([rates[0] for rates in task.rates])
    assert first == pytest.approx(curve.rates)
    assert first == pytest.approx(1e-4 * 10 ** (np.arange(21) / 10))
    assert [rates[1] / rates[0] for rates in task.rates] == pytest.approx([0.1] * 21)


def test_the_suggestion_trains_and_the_test_stops_at_divergence():
    task = Task(momentum=0.9)
    curve = find_lr(task.step, task.model, task.optimizer, lowest=1e-5, highest=1e4, steps=150)
    assert len(curve.rates) < 150
    assert 1e-4 < curve.suggestion < 1.0
    assert curve.suggestion <= curve.steepest < curve.lowest
    for group in task.optimizer.param_groups:
        group["lr"] = curve.suggestion
    first = task.step().item()
    assert np.mean([task.step().item() for _ in range(100)][-20:]) < first / 2


def test_a_loss_that_is_not_finite_ends_the_test():
    losses = iter([3.0, 2.0, float("nan"), 1.0])
    task = Task()
    curve = find_lr(lambda: next(losses), task.model, task.optimizer, smoothing=0.0)
    assert len(curve.rates) == 3
    assert curve.losses[:2] == (3.0, 2.0)
    assert curve.suggestion is None


@pytest.mark.parametrize("losses", [(1.0,) * 9, tuple(range(1, 10)), (1.0, 0.5)])
def test_no_suggestion_where_nothing_falls_or_too_little_was_seen(losses):
    curve = LRCurve(tuple(10.0**i for i in range(len(losses))), losses, losses)
    assert curve.suggestion is None


def test_smoothing_corrects_its_beginning():
    task = Task()
    curve = find_lr(lambda: 2.0, task.model, task.optimizer, steps=5)
    assert curve.smoothed == pytest.approx([2.0] * 5)


def test_zero_rates_are_replaced():
    task = Task(lr=0.0)
    task.optimizer.param_groups[0]["lr"] = 0.0
    find_lr(task.step, task.model, task.optimizer, lowest=0.5, highest=1.0, steps=5)
    assert task.rates[0] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest": 0.0}, "rates must be 0 < lowest < highest, but got lowest=0.0, highest=10.0"),
        ({"highest": 1e-9}, "rates must be 0 < lowest < highest"),
        ({"steps": 4}, "`steps` must be at least 5 and a whole number, but got 4"),
        ({"steps": math.nan}, "`steps` must be at least 5 and a whole number, but got nan"),
        ({"steps": 5.5}, "`steps` must be at least 5 and a whole number, but got 5.5"),
        ({"smoothing": 1.0}, r"`smoothing` must be in \[0, 1\), but got 1.0"),
        ({"stop_at": 1.0}, "`stop_at` must be > 1, but got 1.0"),
    ],
)
def test_mistakes_are_named(options, message):
    task = Task()
    with pytest.raises(ValueError, match=message):
        find_lr(task.step, task.model, task.optimizer, **options)


def test_an_optimizer_is_needed():
    with pytest.raises(TypeError, match="int is not an Optimizer"):
        find_lr(lambda: 0, [], 3)


def test_the_picture(tmp_path):
    task = Task(momentum=0.9)
    curve = find_lr(task.step, task.model, task.optimizer, lowest=1e-5, highest=1e4)
    assert curve.plot(tmp_path / "curve.png").axes[0].get_xscale() == "log"
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    LRCurve((1.0, 2.0), (float("nan"),) * 2, (float("nan"),) * 2).plot()
