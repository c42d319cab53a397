"""The parts of `surefoot run`, in this process: swapping, watching, and what the report says."""

import sys
from types import ModuleType

import pytest
import torch

from surefoot import optimizers
from surefoot.explain import choices
from surefoot.run import compare, report, swap, watch
from surefoot.run.settings import Settings


@pytest.fixture
def watched():
    """Watch steps for the time of a test."""
    watch._forget()
    watch.start()
    yield watch.found
    watch.stop()
    watch._forget()


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move on by hand."""
    now = [0.0]
    monkeypatch.setattr(watch, "perf_counter", lambda: now[0])
    return now


def weight(dtype=torch.float32):
    made = torch.nn.Parameter(torch.ones(2, 3, dtype=dtype))
    made.grad = torch.ones_like(made)
    return made


# Swapping


def test_modules_that_took_torchs_classes_before_are_served_too(monkeypatch):
    library = ModuleType("library")
    library.Best, library.Plan, library.ours = torch.optim.AdamW, torch.optim.lr_scheduler.StepLR, "untouched"
    monkeypatch.setitem(sys.modules, "library", library)
    before = torch.optim.AdamW
    try:
        swap.replace_classes(Settings("t.py"))
        assert library.Best is torch.optim.AdamW is optimizers.AdamW
        assert library.Plan.__module__.startswith("surefoot.")
        assert library.ours == "untouched"
        assert torch.optim.Optimizer.__module__ == "torch.optim.optimizer"
        assert torch.optim.lr_scheduler.LRScheduler.__module__ == "torch.optim.lr_scheduler"
    finally:
        swap.put_back()
    assert library.Best is torch.optim.AdamW is before
    assert library.Plan is torch.optim.lr_scheduler.StepLR
    assert library.Plan.__module__ == "torch.optim.lr_scheduler"


def test_constructors_are_put_back_too(tmp_path):
    before = optimizers.AdamW.__init__
    try:
        swap.replace_classes(Settings("t.py", telemetry=str(tmp_path)))
        assert optimizers.AdamW.__init__ is not before
    finally:
        swap.put_back()
    assert optimizers.AdamW.__init__ is before


def test_every_optimizer_of_torch_is_replaced():
    originals = {id(getattr(torch.optim, name)) for name in torch.optim.__all__ if name not in STAY}
    assert originals <= dict(swap.pairs()).keys()


STAY = {"Optimizer", "functional", "lr_scheduler", "swa_utils", "swap_in_optimizer_params_and_state"}


# Watching


def test_steps_are_timed_and_closures_are_not(watched, clock):
    def closure():
        clock[0] += 10
        return 1.0

    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            clock[0] += 2
            loss = super().step(closure)
            clock[0] += 1
            return loss

    optimizer = Slow([weight()], lr=0.1)
    assert optimizer.step(closure) == 1.0
    assert optimizer.step(closure=closure) == 1.0
    optimizer.step()
    (found,) = watched
    assert list(found.seconds) == [3, 3, 3]
    assert watch.total[0] == 9
    assert (found.algorithm, found.is_ours, found.elements) == (Slow, False, 6)


def test_an_optimizer_within_another_counts_once_in_the_total(watched, clock):
    class Outer(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})
            self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=0.1)

        def step(self):
            clock[0] += 1
            self.inner.step()

    Outer([weight()]).step()
    assert [(found.algorithm.__name__, list(found.seconds)) for found in watched] == [("SGD", [0]), ("Outer", [1])]
    assert watch.total[0] == 1


def test_a_step_that_raises_leaves_nothing_behind(watched, clock):
    optimizer = torch.optim.SGD([weight()], lr=0.1)

    def closure():
        clock[0] += 5
        raise ArithmeticError

    for _ in range(2):
        with pytest.raises(ArithmeticError):
            optimizer.step(closure)
    optimizer.step()
    assert [list(found.seconds) for found in watched] == [[0]]
    assert not watch._threads.running


def test_engines_are_asked_once_and_failures_to_ask_are_told(watched, monkeypatch):
    optimizer = optimizers.NAdam([weight(torch.float64)], foreach=True)
    optimizer.step()
    monkeypatch.setattr("surefoot.explain.choices", lambda _: 1 / 0)
    optimizer.step()
    optimizers.SGD([weight()], foreach=False).step()
    optimizers.Muon([weight()]).step()
    nadam, sgd, muon = watched
    assert [(choice.engine, choice.kind) for choice in nadam.engines] == [("foreach", "float64 on cpu")]
    assert sgd.custom_step == "not known: ZeroDivisionError: division by zero"
    assert muon.custom_step == "a custom step, in torch's operators"


# The report


def test_the_report_names_engines_refusals_and_the_rest(watched):
    for _ in range(10):
        optimizers.SGD([weight()], fused=False).step()
    watched[0].engines = choices(optimizers.SGD([weight()], differentiable=True))
    content = report.run_facts(Settings("train.py"), 4.0, watched, 0.5)
    lines = list(report.report_lines(content, " (process 7)"))
    assert lines[0] == "surefoot run: train.py (process 7) took 4 s, 12.5% of it in optimizer steps (500 ms)"
    assert "    engine   eager for 1 parameter of float32 on cpu" in lines
    assert "             not cpu: kernels carry no gradients through the step" in lines
    assert lines[-1] == "  and 2 more optimizers"
    assert content["optimizers"][0]["median_step_seconds"] > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 µs"),
        (1.234e-5, "12.3 µs"),
        (9.999e-4, "1e+03 µs"),
        (0.5, "500 ms"),
        (61.25, "61.2 s"),
        (5000, "5000 s"),
    ],
)
def test_times_have_three_digits(seconds, text):
    assert report._time(seconds) == text


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.optim.SGD([weight()], lr=0.1), "surefoot has no such optimizer"),
        (lambda: optimizers.Muon([weight()]), "it is not elementwise, so that its time depends on more than shapes"),
        (lambda: optimizers.LAMB([weight()]), "torch.optim has no such optimizer"),
        (lambda: type("Mine", (optimizers.SGD,), {})([weight()]), "it is a class of the script"),
        (
            lambda: optimizers.SGD([weight(), weight(torch.float64)]),
            "its parameters have several dtypes or devices",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(watched, make, reason):
    make().step()
    assert compare.compared(watched[0]) == {"reason": reason}


def test_a_comparison_that_fails_is_said(watched, monkeypatch):
    optimizers.SGD([weight()], lr=0.1).step()

    def too_large(*_, **__):
        raise MemoryError("measuring takes about 9 GB of memory")

    monkeypatch.setattr("surefoot.benchmark.measure", too_large)
    assert compare.compared(watched[0]) == {"reason": "measuring takes about 9 GB of memory"}


def test_after_a_failure_nothing_is_compared(watched, monkeypatch):
    optimizers.SGD([weight()], lr=0.1).step()
    monkeypatch.setattr(sys, "last_value", ValueError(), raising=False)
    content = report.run_facts(Settings("t.py", compare=True), 1.0, watched, 0.1)
    assert content["failed"] is True
    assert content["optimizers"][0]["compared"] is None
