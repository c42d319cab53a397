"""Warnings, errors and habits of torch's schedulers, which users rely on."""

import copy
import gc
import math
import types
import weakref

import pytest
import torch
import torch.optim.lr_scheduler as torchs
from lr_scheduler_helpers import rates, run, sgd

from surefoot import lr_scheduler as ours

OPTIMIZERS_STEP = r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`"


def error(library, make):
    with pytest.raises(Exception) as raised:  # noqa: PT011 (both libraries' errors are compared)
        make(library)
    return type(raised.value), str(raised.value)


OPTIMIZER = sgd()
REFUSED = {
    "no optimizer": (lambda lib: lib.StepLR(3, 1), "int is not an Optimizer"),
    "cyclic no optimizer": (lambda lib: lib.CyclicLR(3, 0.1, 1), "int is not an Optimizer"),
    "one cycle no optimizer": (lambda lib: lib.OneCycleLR(3, 0.1, 1), "int is not an Optimizer"),
    "plateau no optimizer": (lambda lib: lib.ReduceLROnPlateau(3), "int is not an Optimizer"),
    "no initial_lr": (lambda lib: lib.StepLR(sgd(), 1, last_epoch=3), "param 'initial_lr' is not specified in"),
    "lambdas": (lambda lib: lib.LambdaLR(sgd(), [math.sin]), "Expected 2 lr_lambdas, but got 1"),
    "multiplicative": (lambda lib: lib.MultiplicativeLR(sgd(), [1, 2]), "lr_lambda should be a function, but got int"),
    "constant": (lambda lib: lib.ConstantLR(sgd(), 1.5), "Constant multiplicative factor expected to be between 0 and"),
    "linear start": (lambda lib: lib.LinearLR(sgd(), 0.0), "Starting multiplicative factor expected to be greater tha"),
    "linear end": (lambda lib: lib.LinearLR(sgd(), 0.1, -1), "Ending multiplicative factor expected to be between 0"),
    "T_0": (lambda lib: lib.CosineAnnealingWarmRestarts(sgd(), 0), "Expected positive integer T_0, but got 0"),
    "T_mult": (lambda lib: lib.CosineAnnealingWarmRestarts(sgd(), 1, 0.5), "Expected integer T_mult >= 1, but got 0.5"),
    "eta_min": (
        lambda lib: lib.CosineAnnealingWarmRestarts(sgd(), 1, 1, "0"),
        "Expected float or int eta_min, but got 0 of type",
    ),
    "negative epoch": (
        lambda lib: lib.CosineAnnealingWarmRestarts(sgd(), 1).step(-1),
        "Expected non-negative epoch, but got -1",
    ),
    "cyclic mode": (lambda lib: lib.CyclicLR(sgd(), 0.1, 1, mode="x"), "mode is invalid and scale_fn is None"),
    "cyclic list": (
        lambda lib: lib.CyclicLR(sgd(), [0.1], 1),
        "base_lr must have the same length as optimizer.param_groups. base_lr has 1 values, param_groups has 2.",
    ),
    "no momentum": (
        lambda lib: lib.CyclicLR(sgd(optimizer=torch.optim.Adagrad), 0.1, 1),
        "optimizer must support momentum or beta1 with `cycle_momentum` option enabled",
    ),
    "total_steps": (lambda lib: lib.OneCycleLR(sgd(), 1, 0), "Expected positive integer total_steps, but got 0"),
    "epochs": (lambda lib: lib.OneCycleLR(sgd(), 1, None, 0, 5), "Expected positive integer epochs, but got 0"),
    "per epoch": (lambda lib: lib.OneCycleLR(sgd(), 1, None, 5, 0), "Expected positive integer steps_per_epoch, but"),
    "no length": (lambda lib: lib.OneCycleLR(sgd(), 1, epochs=3), "You must define either total_steps OR (epochs AND"),
    "pct_start": (lambda lib: lib.OneCycleLR(sgd(), 1, 9, pct_start=2.0), "Expected float between 0 and 1 pct_start"),
    "anneal": (lambda lib: lib.OneCycleLR(sgd(), 1, 9, anneal_strategy="x"), "anneal_strategy must be one of 'cos' or"),
    "too many steps": (
        lambda lib: run(lib.OneCycleLR(sgd(momentum=0.9), 1, 9), 10),
        "Tried to step 10 times. The specified number of total steps is 9",
    ),
    "no schedulers": (
        lambda lib: lib.SequentialLR(sgd(), [], []),
        "SequentialLR expects at least one scheduler, but got no scheduler.",
    ),
    "nothing chained": (
        lambda lib: lib.ChainedScheduler([]),
        "ChainedScheduler expects at least one scheduler to be chained, but got no scheduler.",
    ),
    "no scheduler": (
        lambda lib: lib.ChainedScheduler([3], sgd()),
        "ChainedScheduler at index 0 should have `optimizer` as its attribute",
    ),
    "plateau in a sequence": (
        lambda lib: lib.SequentialLR(OPTIMIZER, [lib.ReduceLROnPlateau(OPTIMIZER)], []),
        "SequentialLR does not support `ReduceLROnPlateau` scheduler as it requires additional kwargs",
    ),
    "another optimizer": (
        lambda lib: lib.SequentialLR(sgd(), [lib.StepLR(sgd(), 1)], []),
        "SequentialLR expects all schedulers to belong to the same optimizer, but got scheduler StepLR at index 0",
    ),
    "milestones": (
        lambda lib: lib.SequentialLR(OPTIMIZER, [lib.StepLR(OPTIMIZER, 1)], [3]),
        "Sequential Schedulers expects number of schedulers provided to be one more than the number of milestone po",
    ),
    "factor": (lambda lib: lib.ReduceLROnPlateau(sgd(), factor=1.0), "Factor should be < 1.0"),
    "mode": (lambda lib: lib.ReduceLROnPlateau(sgd(), mode="x"), "mode x is unknown!"),
    "threshold mode": (lambda lib: lib.ReduceLROnPlateau(sgd(), threshold_mode="x"), "threshold mode x is unknown!"),
    "min_lr": (lambda lib: lib.ReduceLROnPlateau(sgd(), min_lr=[0]), "expected 2 min_lrs, got 1"),
    "no get_lr": (lambda lib: lib.LRScheduler(sgd()), ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_have_torchs_type_and_begin_with_its_words(case):
    make, words = REFUSED[case]
    (ours_type, ours_text), (torchs_type, torchs_text) = error(ours, make), error(torchs, make)
    assert ours_type is torchs_type
    assert words in ours_text
    assert words in torchs_text


def test_composites_do_not_take_a_schedule():
    schedule = ours.Schedule(OPTIMIZER, lr=ours.schedules.constant())
    with pytest.raises(
        ValueError, match=r"SequentialLR does not take a Schedule, but got one at index 0; combine its val"
    ):
        ours.SequentialLR(OPTIMIZER, [schedule], [])


def test_errors_show_what_came():
    for case in ("constant", "linear start", "linear end", "factor", "no length", "anneal"):
        _, text = error(ours, REFUSED[case][0])
        assert any(value in text for value in ("1.5", "0.0", "-1", "1.0", "epochs=3", "x")), text
    _, text = error(ours, REFUSED["no momentum"][0])
    assert "Adagrad" in text
    assert "cycle_momentum=False" in text


def test_added_groups_and_a_list_of_min_lr():
    optimizer = sgd()
    scheduler = ours.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.0, 0.0])
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    before = copy.deepcopy(scheduler.state_dict())
    with pytest.raises(RuntimeError, match=r"The number of param groups in the `optimizer` \(3\) differs"):
        scheduler.step(2.0)
    assert scheduler.state_dict() == before
    scheduler = ours.ReduceLROnPlateau(optimizer, patience=0)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    before = rates(optimizer)
    scheduler.load_state_dict(scheduler.state_dict())
    for metric in (1.0, 2.0):
        scheduler.step(metric)
    assert rates(optimizer) == [rate * 0.1 for rate in before]


def test_stepping_before_the_optimizer_warns_once():
    scheduler = ours.StepLR(sgd(), 3)
    with pytest.warns(UserWarning, match=OPTIMIZERS_STEP):
        scheduler.step()
    scheduler.step()


def test_a_replaced_step_warns():
    optimizer = sgd()
    scheduler = ours.StepLR(optimizer, 3)
    optimizer.step = types.MethodType(lambda self: None, optimizer)
    optimizer.step()
    with pytest.warns(UserWarning, match=r"Seems like `optimizer.step\(\)` has been overridden after learning rate"):
        scheduler.step()


def test_schedulers_of_both_libraries_share_the_notice_of_steps():
    for first, second in ((ours, torchs), (torchs, ours)):
        optimizer = sgd()
        schedulers = [first.StepLR(optimizer, 3), second.ExponentialLR(optimizer, 0.9)]
        step = optimizer.step
        assert step._wrapped_by_lr_sched
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def test_the_warning_points_at_the_user():
    scheduler = ours.StepLR(sgd(), 3)
    with pytest.warns(UserWarning, match="Detected") as seen:
        scheduler.step()
    assert seen[0].filename == __file__


def test_get_lr_warns():
    scheduler = ours.StepLR(sgd(), 3)
    with pytest.warns(UserWarning, match=r"please use `get_last_lr\(\)`"):
        assert scheduler.get_lr() == rates(scheduler.optimizer)


def test_the_text_of_the_warning_is_to_be_had_as_in_torch():
    assert torchs.EPOCH_DEPRECATION_WARNING.startswith(ours.EPOCH_DEPRECATION_WARNING[:90])


@pytest.mark.filterwarnings("ignore")  # torch warns of what it does not compile
@pytest.mark.parametrize(
    "make",
    [
        lambda o: ours.OneCycleLR(o, 0.1, 30),
        lambda o: ours.SequentialLR(o, [ours.LinearLR(o), ours.StepLR(o, 2)], [2]),
        lambda o: ours.Schedule(o, lr=ours.schedules.linear(1, 0, 30)),
    ],
)
def test_schedulers_step_inside_compiled_functions(make):
    runs = []
    for compiled in (True, False):
        torch._dynamo.reset()
        scheduler = make(sgd(tensor=True, momentum=0.9))

        def train(scheduler=scheduler):
            scheduler.optimizer.step()
            scheduler.step()

        function = torch.compile(train, backend="eager") if compiled else train
        for _ in range(12):
            function()
        runs.append((rates(scheduler.optimizer), scheduler.last_epoch))
    assert runs[0] == runs[1]


def test_step_with_an_epoch_warns():
    for scheduler in (ours.StepLR(sgd(), 3), ours.ReduceLROnPlateau(sgd())):
        scheduler.optimizer.step()
        arguments = (7,) if isinstance(scheduler, ours.StepLR) else (1.0, 7)
        with pytest.warns(UserWarning, match="The epoch parameter in `scheduler.step"):
            scheduler.step(*arguments)
        assert scheduler.last_epoch == 7


def test_a_step_that_was_replaced_by_a_function_is_kept():
    optimizer, calls = sgd(), []
    optimizer.step = lambda: calls.append(1)
    scheduler = ours.StepLR(optimizer, 3)
    optimizer.step()
    scheduler.step()
    assert calls == [1]


def test_a_manual_change_survives():
    for library in (ours, torchs):
        scheduler = library.StepLR(sgd(), 10)
        run(scheduler, 5)
        scheduler.optimizer.param_groups[0]["lr"] = 5.0
        run(scheduler, 5)
        assert rates(scheduler.optimizer)[0] == 0.5


def test_a_user_writes_a_scheduler_as_with_torch():
    class Halving(ours.LRScheduler):
        def get_lr(self):
            return [base * 0.5**self.last_epoch for base in self.base_lrs]

    class HalvingRecursively(ours.Recursive):
        def _next_lr(self, epoch, lr, index):
            return lr * 0.5 if epoch else lr

        def _factor(self):
            return 0.5**self.last_epoch

    assert run(Halving(sgd()), 9) == run(HalvingRecursively(sgd()), 9)


def test_a_scheduler_does_not_keep_its_optimizer_alive():
    optimizer = sgd()
    ours.StepLR(optimizer, 3)
    alive = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()


def test_schedulers_copy_with_their_optimizer():
    scheduler = ours.CyclicLR(sgd(momentum=0.9), 0.01, 0.1, 5)
    run(scheduler, 3)
    twin = copy.deepcopy(scheduler)
    assert twin.optimizer is not scheduler.optimizer
    assert run(twin, 9) == run(scheduler, 9)


def test_tensor_betas_are_filled_in_place():
    betas = (torch.tensor(0.9), torch.tensor(0.99))
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], torch.tensor(0.1), betas, capturable=True)
    scheduler = ours.OneCycleLR(optimizer, 0.1, 10)
    assert betas[0].item() == pytest.approx(0.95)
    assert optimizer.param_groups[0]["betas"][0] is betas[0]
    assert scheduler.get_last_lr()[0] is not optimizer.param_groups[0]["lr"]


def test_repaired_edges_of_torch():
    """torch divides by zero in each of these."""
    constant = ours.ConstantLR(sgd(), 0.0, 3)
    assert [rate for rate, _ in run(constant, 4)] == [0.0, 0.0, 0.0, 0.1, 0.1]
    one_cycle = ours.OneCycleLR(sgd(momentum=0.9), 1.0, 10, pct_start=0.1)
    assert rates(one_cycle.optimizer)[0] == 1.0
    linear = ours.LinearLR(sgd(), 0.5, 1.0, 0)
    linear.optimizer.step()
    with pytest.warns(UserWarning, match="epoch"):
        linear.step(4)
    assert rates(linear.optimizer)[0] == 0.1


def test_a_custom_scale_function():
    class Scale:
        def __init__(self):
            self.power = 0.5

        def __call__(self, x):
            return self.power**x

    for mode in ("cycle", "iterations"):
        runs = []
        for library in (ours, torchs):
            scheduler = library.CyclicLR(sgd(momentum=0.9), 0.01, 0.1, 5, scale_fn=Scale(), scale_mode=mode)
            other = library.CyclicLR(sgd(momentum=0.9), 0.01, 0.1, 5, scale_fn=Scale(), scale_mode=mode)
            scheduler._scale_fn_custom.power = 0.7
            other.load_state_dict(scheduler.state_dict())
            runs.append(run(other, 30))
        assert runs[0] == runs[1]
