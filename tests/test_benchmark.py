"""The benchmark: what is measured, that contenders and bound are what they claim, and the arithmetic of ratios."""

import csv
import importlib.util
import inspect
import math
import re
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

import surefoot
from helpers import ALGORITHMS
from surefoot import benchmark, explain
from surefoot.benchmark import (
    COMPILED,
    DTYPES,
    EAGER,
    FOR_LOOP,
    FOREACH,
    FUSED,
    MEMORY_BOUND,
    OURS,
    SHAPE_LISTS,
    SMALL_MODELS,
    SMALL_VARIANTS,
    TORCH_VARIANTS,
    VARIANTS,
    Case,
    Measurement,
    Quartiles,
    Result,
    ShapeList,
    SmallMeasurement,
    contenders,
    contenders_of,
    has_work,
    implementations_of,
    memory_bound_of,
    rounds,
    small,
)
from surefoot.engines.cpu.source import print_kernel
from surefoot.errors import InternalError

FEW = ShapeList("few", "3 x 5", ((5,),) * 3)
ADAMW = Case(VARIANTS["AdamW"], SHAPE_LISTS["large"], torch.float32)


def a_measurement(case=ADAMW, **changes):
    """Make a measurement of four rounds, in which torch's fused implementation is the best."""
    times = {FOR_LOOP: 30.0, FOREACH: 40.0, FUSED: 9.0, OURS: 6.0, MEMORY_BOUND: 5.0} | changes
    drift = np.array([1.0, 1.0, 2.0, 2.0])
    return Measurement(case, {name: 1e-3 * value * drift for name, value in times.items() if value}, compile_seconds=7)


def script(name):
    """Import a script of the folder `benchmarks`."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Cases


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("overhead", 1000, 1000),
        ("tiny", 1000, 1_000_000),
        ("medium", 200, 20_000_000),
        ("large", 8, 32_000_000),
        ("mlp1000", 2000, 4_160_000),
        ("resnet50", 161, 25_557_032),
        ("gpt2-small", 148, 124_439_808),
    ],
)
def test_shapes_are_those_of_the_models(name, tensors, elements):
    assert len(SHAPE_LISTS[name].shapes) == tensors
    assert SHAPE_LISTS[name].elements == elements
    assert len(SHAPE_LISTS) == 7


def test_variants():
    rules = {cls.__name__ for cls in ALGORITHMS if cls.is_rule() and cls is not surefoot.SparseAdam}
    assert {variant.optimizer for variant in TORCH_VARIANTS.values()} == rules
    ours = {name for name in surefoot.optimizers.NOT_IN_TORCH if getattr(surefoot, name).is_rule()}
    assert {variant.optimizer for variant in VARIANTS.values()} == rules | ours
    with_options = {"SGD+momentum", "Adam+amsgrad", "RMSprop+centered", "LARS+momentum+weight_decay"}
    assert VARIANTS.keys() - rules - ours == with_options


def test_cases_are_all_combinations_each_once():
    found = benchmark.cases(["AdamW", "SGD", "AdamW"], ["tiny"], ["float32", "bfloat16"])
    assert [str(case) for case in found] == [
        "AdamW, 1000 x 1 k, float32",
        "SGD, 1000 x 1 k, float32",
        "AdamW, 1000 x 1 k, bfloat16",
        "SGD, 1000 x 1 k, bfloat16",
    ]


# The bound


def _group_of(optimizer, param):
    (group,) = (group for group in optimizer.param_groups if any(param is each for each in group["params"]))
    return group


def loads_and_stores(optimizer, param):
    """Count what the loop of an optimizer's kernel loads and stores."""
    source = explain.sources(optimizer, param)[-1]
    return len(re.findall(r"^ +\w+ = .*\w_\[i\]", source, re.MULTILINE)), len(
        re.findall(r"^ +\w+_\[i\] =", source, re.MULTILINE)
    )


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_memory_bound_moves_the_same_bytes_by_the_same_engine(variant, dtype):
    params = [torch.nn.Parameter(torch.zeros(1, 3, dtype=dtype))]
    optimizer = getattr(surefoot, variant.optimizer)(params, **variant.options)
    bound = memory_bound_of(optimizer)
    rule = explain.rule_of(optimizer, optimizer.param_groups[0])
    expected = 2 + len(rule.slots), sum(rule.written)
    assert loads_and_stores(bound, *params) == loads_and_stores(optimizer, *params) == expected
    ours, least = (explain.layout_of(o, o.param_groups[0], *params) for o in (optimizer, bound))
    assert ours.compute == least.compute
    traffic = [explain.traffic_of(o, _group_of(o, *params), *params) for o in (optimizer, bound)]
    assert traffic[0] == traffic[1]
    assert [choice.engine for o in (optimizer, bound) for choice in explain.choices(o)] == ["cpu", "cpu"]


def test_the_memory_bound_adds_the_gradient_to_everything():
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    bound = memory_bound_of(surefoot.Adam([param]))
    param.grad = torch.tensor([0.5, 0.25])
    bound.step()
    assert param.tolist() == [1.5, 2.25]
    assert {name: slot.tolist() for name, slot in bound.state[param].items()} == {
        "slot0": [0.5, 0.25],
        "slot1": [0.5, 0.25],
    }


REDUCING = {
    "LAMB": {},
    "LARS": {"weight_decay": 0.1, "momentum": 0.9},
    "StableAdamW": {},
    "NovoGrad": {"amsgrad": True},
    "MARS": {},
    "Lion": {"cautious": True},
    "Prodigy": {},
}


def read_by_stages(optimizer, param):
    """Tell which arrays the kernel of each stage loads, and count what it stores."""
    group = _group_of(optimizer, param)
    layout = explain.layout_of(optimizer, group, param)
    found = []
    for stage in explain.rule_of(optimizer, group, param).stages:
        loop = print_kernel(stage.measures, layout).partition("for i in range(n):")[2].partition("def kernel")[0]
        names = [node.name for node in stage.measures.graph.nodes if node.op == "placeholder" and node.meta["tensor"]]
        used = [len(re.findall(rf"\b{name}\b", loop)) > 1 for name in names]  # more than its own load
        found.append((used, len(re.findall(r"^ +\w+_\[i\] =", loop, re.MULTILINE))))
    return found


@pytest.mark.parametrize("name", REDUCING)
def test_the_memory_bound_of_a_rule_that_reduces_reads_in_each_stage_what_the_rule_reads(name):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (3,))]
    optimizer = getattr(surefoot, name)(params, **REDUCING[name])
    bound = memory_bound_of(optimizer)
    stages = [read_by_stages(optimizer, param) for param in params]
    assert [read_by_stages(bound, param) for param in params] == stages
    assert all(stored == 0 for stage in stages for _, stored in stage)
    assert [len(stage) for stage in stages] == [1, 0 if name == "MARS" else 1]  # whose vectors AdamW steps


def test_the_memory_bound_clips_where_the_rule_does():
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([30.0, 40.0])
    bound = memory_bound_of(surefoot.LAMB([param]))
    bound.step()
    torch.testing.assert_close(param.detach(), torch.tensor([0.6, 0.8]))


def test_the_memory_bound_of_a_rule_that_reduces_sums_and_adds_the_gradient():
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    bound = memory_bound_of(surefoot.LAMB([param], max_grad_norm=None))
    param.grad = torch.tensor([0.5, 0.25])
    bound.step()
    assert param.tolist() == [1.5, 2.25]
    assert bound.state[param]["slot1"].tolist() == [0.5, 0.25]
    param.grad = torch.tensor([torch.inf, 0.0])
    bound.step()
    assert param.isnan().all()  # by the sum, which is none of a finite number


# Contenders


def test_contenders():
    assert list(contenders_of(VARIANTS["AdamW"])) == [FOR_LOOP, FOREACH, FUSED, OURS, MEMORY_BOUND]
    assert list(contenders_of(VARIANTS["Lion"], compiled=True)) == [EAGER, OURS, MEMORY_BOUND]
    assert list(contenders_of(VARIANTS["NAdam"], compiled=True)) == [FOR_LOOP, FOREACH, COMPILED, OURS, MEMORY_BOUND]


@pytest.mark.parametrize("variant", TORCH_VARIANTS.values(), ids=TORCH_VARIANTS)
def test_contenders_of_torch_leave_the_shared_gradients_alone(variant):
    grads = benchmark.gradients(Case(variant, FEW, torch.float32))
    before = [grad.clone() for grad in grads]
    for name, make in contenders_of(variant).items():
        if name not in (EAGER, OURS, MEMORY_BOUND):  # of ours that is promised, and tested elsewhere
            rounds._prepare(Case(variant, FEW, torch.float32), make, grads)
    assert all(map(torch.equal, grads, before))


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="a defect of torch 2.13")
def test_an_implementation_that_computes_something_else_is_left_out():
    assert benchmark.wrong_contenders(VARIANTS["SGD"], torch.bfloat16) == [FUSED]
    assert benchmark.wrong_contenders(VARIANTS["SGD"], torch.float32) == []


def test_a_step_that_does_nothing_is_wrong():
    grads = benchmark.gradients(Case(VARIANTS["SGD"], FEW, torch.float32))
    case = Case(VARIANTS["SGD"], FEW, torch.float32)
    makers = {FOR_LOOP: contenders_of(case.variant)[FOR_LOOP], "idle": lambda _: lambda: None}
    assert rounds._wrong({name: rounds._prepare(case, make, grads) for name, make in makers.items()}) == ["idle"]


def test_gradients_are_the_same_every_time_and_own_their_memory():
    case = Case(VARIANTS["SGD"], ShapeList("two", "two", ((3, 2), (2**20 + 3,))), torch.bfloat16)
    small, big = benchmark.gradients(case)
    assert (small.shape, big.shape, big.dtype) == ((3, 2), (2**20 + 3,), torch.bfloat16)
    assert torch.equal(big[:3], big[2**20 :])
    assert small.untyped_storage().nbytes() == 12
    assert all(map(torch.equal, benchmark.gradients(case), (small, big)))


# Measuring


def test_measuring():
    measurement = benchmark.measure(Case(VARIANTS["AdamW"], FEW, torch.float32), seconds=0)
    assert set(measurement.seconds) == {FOR_LOOP, FOREACH, FUSED, OURS, MEMORY_BOUND}
    assert {len(values) for values in measurement.seconds.values()} == {rounds.FEWEST_ROUNDS}
    assert all((values > 0).all() for values in measurement.seconds.values())
    assert (measurement.wrong, measurement.compile_seconds) == ([], 0)


@pytest.mark.in_turn("variant")
@pytest.mark.parametrize("variant", ["Lion", "LAMB", "AdamWScheduleFree"])
def test_measuring_what_torch_does_not_have(variant, tmp_path):
    measurement = benchmark.measure(Case(VARIANTS[variant], FEW, torch.bfloat16), seconds=0, compiled=True)
    assert (list(measurement.seconds), measurement.compile_seconds) == ([EAGER, OURS, MEMORY_BOUND], 0)
    assert measurement.best_of_torch is None
    assert all(map(math.isnan, measurement.speedup()))
    benchmark.write_csv(tmp_path / "x.csv", benchmark.results(measurement))
    back = benchmark.read_csv(tmp_path / "x.csv")
    assert all(math.isnan(line.speedup) and line.over_memory_bound > 0 for line in back)


def test_our_step_must_compute_what_the_rule_says(monkeypatch):
    case = Case(VARIANTS["Lion"], FEW, torch.float32)
    makers = implementations_of(case.variant)
    broken = {**makers, OURS: lambda params: makers[OURS](params, maximize=True)}
    monkeypatch.setattr(contenders, "implementations_of", lambda _: dict(broken))
    with pytest.raises(InternalError, match=r"^Lion, 3 x 5, float32: .* computes something else than surefoot eager$"):
        benchmark.measure(case, seconds=0)


def test_contenders_get_the_same_time_in_a_round(monkeypatch):
    durations = iter([9.0, 1.0, 3.0, 1.5, 1.0, 99.0])
    monkeypatch.setattr(rounds, "_timed", lambda step: step())
    assert rounds._block(lambda: next(durations), share=6.0) == 1.25
    assert next(durations) == 99.0


def test_what_does_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr(rounds, "_free_memory", lambda: 1e9)
    with pytest.raises(MemoryError) as caught:
        benchmark.measure(ADAMW)
    # 32 million elements of 4 bytes: a gradient, 3 arrays of each of 5 contenders, 3 temporaries
    assert str(caught.value) == (
        "AdamW, 8 x 4 M, float32: measuring takes about 2.4 GB of memory, but only 1.0 GB are free; "
        "choose smaller parameters or bfloat16"
    )
    monkeypatch.setattr(rounds, "_free_memory", lambda: 3e9)
    benchmark.check_memory(ADAMW)


# Arithmetic


def test_ratios_are_taken_within_a_round():
    measurement = a_measurement()
    assert measurement.best_of_torch == FUSED
    assert measurement.milliseconds() == pytest.approx((9.0, 6.0, 12.0))
    assert measurement.speedup() == pytest.approx((1.5, 1.5, 1.5))
    assert measurement.over_memory_bound() == pytest.approx((1.2, 1.2, 1.2))
    assert measurement.speedup(FOR_LOOP).median == pytest.approx(0.3)


def test_compiling_does_not_count_as_torchs_best():
    assert a_measurement(**{COMPILED: 1.0}).best_of_torch == FUSED
    assert a_measurement(**{FUSED: None}).best_of_torch == FOR_LOOP


def test_quartiles_and_means():
    assert Quartiles.of(np.arange(5.0)) == (2.0, 1.0, 3.0)
    assert benchmark.geometric_mean([1, 10, 100]) == pytest.approx(10)
    with pytest.raises(ValueError, match="no geometric mean of nothing"):
        benchmark.geometric_mean([])


def test_lines_of_the_csv_file_come_back(tmp_path):
    measurement = a_measurement(**{COMPILED: 3.0, FUSED: None})
    left_out = Measurement(measurement.case, measurement.seconds, [FUSED], 7.0)
    lines = benchmark.results(left_out)
    benchmark.write_csv(tmp_path / "x.csv", lines)
    header = (tmp_path / "x.csv").read_text().splitlines()[0]
    assert header == (
        "machine,date,torch,threads,variant,shapes,dtype,contender,ms,ms_q1,ms_q3,speedup,speedup_q1,speedup_q3,"
        "over_memory_bound,over_memory_bound_q1,over_memory_bound_q3,ms_min,rounds,compile_s,note"
    )
    back = {line.contender: line for line in benchmark.read_csv(tmp_path / "x.csv")}
    assert list(back) == [FOR_LOOP, FOREACH, OURS, MEMORY_BOUND, COMPILED, FUSED]
    ours = back[OURS]
    assert ours[2:8] == (torch.__version__, torch.get_num_threads(), "AdamW", "large", "float32", OURS)
    assert (ours.ms, ours.ms_min, ours.speedup, ours.over_memory_bound, ours.rounds, ours.note) == (
        9.0,
        6.0,
        5.0,
        1.2,
        4,
        "",
    )
    assert (back[COMPILED].compile_s, back[MEMORY_BOUND].over_memory_bound, back[FOR_LOOP].speedup) == (7.0, 1.0, 1.0)
    assert math.isnan(ours.compile_s)
    assert math.isnan(back[FUSED].ms)
    assert (back[FUSED].rounds, back[FUSED].note) == (0, "left out: its step computes something else")


# Small models


@pytest.mark.parametrize(("name", "tensors"), [("one", 1), ("mlp4", 4), ("mlp6", 6), ("mlp16", 16), ("lora64", 64)])
def test_small_models_have_as_many_tensors_as_they_say(name, tensors):
    params = small.trained(SMALL_VARIANTS["AdamW"], SMALL_MODELS[name].make())
    assert len(params) == tensors
    assert max(param.numel() for param in params) <= 64 * 64


@pytest.mark.parametrize(("name", "tables", "rows"), [("rows32", 1, 32), ("rows32x4", 4, 32), ("rows4kx4", 4, 4000)])
def test_models_of_tables_have_sparse_gradients_of_as_many_rows_as_they_say(name, tables, rows):
    model, (index, target) = SMALL_MODELS[name].make(), next(small._batches(SMALL_MODELS[name]))
    torch.nn.functional.mse_loss(model(index), target).backward()
    params = small.trained(SMALL_VARIANTS["SGD"], model)
    assert len(params) == tables
    assert all(param.grad.is_sparse and param.grad._nnz() == rows for param in params)


def test_there_are_nine_small_models():
    assert len(SMALL_MODELS) == 9


def test_every_optimizer_steps_small_models():
    assert {variant.optimizer for variant in SMALL_VARIANTS.values()} == {cls.__name__ for cls in ALGORITHMS}
    dense = [name for name, model in SMALL_MODELS.items() if not model.rows]
    idle = {(v, m) for v in SMALL_VARIANTS for m in dense if not has_work(SMALL_VARIANTS[v], SMALL_MODELS[m])}
    assert idle == {("Muon", "one")}  # which has no matrix
    of_rows = {v for v in SMALL_VARIANTS if has_work(SMALL_VARIANTS[v], SMALL_MODELS["rows32"])}
    assert of_rows == {"SGD", "Adagrad", "SparseAdam"}


def test_measuring_rows():
    measured = benchmark.measure_small(SMALL_VARIANTS["SGD"], SMALL_MODELS["rows32"], rounds=4)
    assert list(measured.seconds) == [FOR_LOOP, FOREACH, OURS]


@pytest.mark.parametrize(
    ("variant", "theirs"),
    [
        ("AdamW", [FOR_LOOP, FOREACH, FUSED]),
        ("Rprop", [FOR_LOOP, FOREACH]),
        ("Muon", [FOR_LOOP]),
        ("LBFGS", [FOR_LOOP]),
        ("SparseAdam", [FOR_LOOP]),
    ],
)
def test_measuring_small_models(variant, theirs):
    measured = benchmark.measure_small(SMALL_VARIANTS[variant], SMALL_MODELS["mlp4"], rounds=2)
    assert list(measured.seconds) == list(measured.calls) == [*theirs, OURS]
    assert all(values.shape == (2,) and (values > 0).all() for values in measured.seconds.values())
    assert all(0 < calls < 1000 for calls in measured.calls.values())
    assert measured.speedup(measured.best_of_torch) == (1, 1, 1)
    assert sys.getprofile() is None


def test_evaluations_of_a_closure_do_not_count(monkeypatch):
    model = SMALL_MODELS["one"].make()
    training = small._Training(SMALL_VARIANTS["LBFGS"], model, Evaluating)
    batch = next(small._batches(SMALL_MODELS["one"]))
    monkeypatch.setattr(small, "perf_counter", count().__next__)
    assert training.step(batch) == 2  # of three ticks
    assert training.calls(batch) == 3  # step, closure, and a function of the step's own


class Evaluating:
    """An optimizer that evaluates in its step, and does nothing else."""

    def __init__(self, params):
        self.params = params

    def step(self, closure):
        closure()
        self.rest()

    def rest(self):
        pass


def test_a_small_step_that_computes_something_else_is_an_error(monkeypatch):
    makers = implementations_of(SMALL_VARIANTS["SGD"])
    broken = {**makers, OURS: lambda params: makers[OURS](params, maximize=True, lr=1.0)}
    monkeypatch.setattr(small, "implementations_of", lambda _: broken)
    with pytest.raises(InternalError, match="^SGD, 1 tensor of 10: surefoot's step computes something else"):
        benchmark.measure_small(SMALL_VARIANTS["SGD"], SMALL_MODELS["one"], rounds=1)


def test_the_small_benchmark_from_end_to_end(tmp_path, monkeypatch, capsys):
    def measure(variant, model, rounds):
        times = {FOR_LOOP: 40e-6, FUSED: 30e-6, OURS: 20e-6 if variant.name == "AdamW" else 60e-6}
        seconds = {name: np.array([value] * rounds) for name, value in times.items()}
        return SmallMeasurement(variant, model, seconds, {FOR_LOOP: 90, FUSED: 60, OURS: 40})

    small_script = script("small")
    monkeypatch.setattr(small_script, "measure_small", measure)
    monkeypatch.setattr(small_script, "PAGE", tmp_path / "page.md")
    small_script.PAGE.write_text(f"before\n{small_script.BEGIN}\nold\n{small_script.END}\nafter\n")
    asked = ["--only", "AdamW,Muon", "--models", "one,mlp4", "--record", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["small.py", *asked])
    small_script.main()
    page = small_script.PAGE.read_text()
    assert page.startswith(f"before\n{small_script.BEGIN}\n\nSpeed-up, ")
    assert "| MLP, 4 tensors | **1.50** (1.50 to 1.50) | 0.50 |" in page
    assert page.endswith(f"\n{small_script.END}\nafter\n")
    assert "old" not in page
    printed = capsys.readouterr().out
    text = (tmp_path / "cpu-small.md").read_text()
    assert text in printed
    assert "| AdamW | 1.50 (1.50 to 1.50) | 1.50 (1.50 to 1.50) |" in text
    assert "| Muon |  | **0.50** (0.50 to 0.50) |" in text
    assert f"| all (geometric mean) | 1.50 | {math.sqrt(0.75):.2f} |" in text
    assert "| AdamW | 20 / 30 (fused) | 20 / 30 (fused) |" in text
    assert "| AdamW | 40 / 60 | 40 / 60 |" in text
    assert len((tmp_path / "cpu-small.csv").read_text().splitlines()) == 1 + 3 * 3


# Scripts


@pytest.fixture(scope="module")
def cpu():
    return script("cpu")


@pytest.fixture
def found():
    """Lines of two optimizers, two lists of parameters and two dtypes; the speed-up is 1.5, and 4.5 for NAdam."""
    selected = benchmark.cases(["AdamW", "NAdam"], ["tiny", "large"], ["float32", "bfloat16"])
    changes = {"AdamW": {}, "NAdam": {FUSED: None, FOR_LOOP: 27.0}}
    return [line for case in selected for line in benchmark.results(a_measurement(case, **changes[case.variant.name]))]


def test_tables(cpu, found):
    lines = cpu.markdown(found).splitlines()
    mean = f"**{math.sqrt(1.5 * 4.5):.2f}** (1.50 to 4.50)"
    assert f"| 1000 x 1 k | {mean} | {mean} |" in lines
    assert "| 8 x 4 M: our time / memory bound | **1.20** (1.20 to 1.20) | **1.20** (1.20 to 1.20) |" in lines
    assert "| NAdam | bfloat16 | 4.50 (4.50-4.50) | 4.50 (4.50-4.50) | 1.20 (1.20-1.20) |" in lines


def test_the_picture_shows_every_median(cpu, found):
    figure = cpu.draw(found)
    titles = ["1000 x 1 k", "8 x 4 M", "8 x 4 M: over the memory bound"]
    assert [axes.get_title() for axes in figure.axes] == titles
    for axes, values in zip(figure.axes, ([1.5, 4.5], [1.5, 4.5], [1.2, 1.2]), strict=True):
        dots = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "o"]
        assert [sorted(each) for each in dots] == [pytest.approx(values)] * 2
        low, high = axes.get_xlim()
        assert low < 1 < max(values) < high


def test_the_matrix_from_end_to_end(cpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "measure", lambda case, **_: a_measurement(case))
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--optimizer", "AdamW", "--dtype", "float32", "--out", str(tmp_path)])
    cpu.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.csv", "cpu.md", "cpu.png"]
    assert len(benchmark.read_csv(tmp_path / "cpu.csv")) == 5 * len(SHAPE_LISTS)
    printed = capsys.readouterr().out
    assert "  1/7  AdamW, 1000 x 1, float32" in printed
    assert (tmp_path / "cpu.md").read_text() in printed


def test_what_was_measured_before_an_interruption_is_kept(cpu, tmp_path, monkeypatch):
    def interrupt_on_large(case, **_):
        if case.shapes.name == "large":
            raise KeyboardInterrupt
        return a_measurement(case)

    monkeypatch.setattr(cpu, "measure", interrupt_on_large)
    monkeypatch.setattr(
        sys, "argv", ["cpu.py", "--optimizer", "AdamW", "--model", "tiny", "large", "--out", str(tmp_path)]
    )
    with pytest.raises(KeyboardInterrupt):
        cpu.main()
    assert {line.shapes for line in benchmark.read_csv(tmp_path / "cpu.csv")} == {"tiny"}


def test_overheads_are_judged_by_their_limits():
    overheads = script("overheads")
    lines = [
        overheads._line("import", "surefoot", "after torch", [0.05, 0.07, 0.09], "s", 0.1),
        overheads._line("import", "surefoot", "after torch", [0.2], "s", 0.1),
        overheads._line("a tensor in a step", "Adam, torch fused", "1000 x 1", [7.0], "us"),
    ]
    assert overheads.markdown(lines).splitlines()[2:] == [
        "| import | surefoot | after torch | 0.07 (0.06 to 0.08) s | at most 0.1 |",
        "| import | surefoot | after torch | 0.2 (0.2 to 0.2) s | **over** 0.1 |",
        "| a tensor in a step | Adam, torch fused | 1000 x 1 | 7 (7 to 7) us |  |",
    ]


def test_the_columns_are_documented():
    documented = inspect.getdoc(Result)  # from Python 3.13 on a docstring is kept without its indentation
    assert [name for name in Result._fields if f"    {name.split('_q')[0]}:" not in documented] == []


def test_history_keeps_a_file_for_each_version_and_machine_and_draws_them_in_order(tmp_path, monkeypatch):
    history = script("history")
    monkeypatch.setattr(history, "measure", lambda case, **_: a_measurement(case))
    monkeypatch.setattr(history, "circumstances", lambda: ("AMD EPYC(TM) 9", "2026-11-29", "2.13", 2))
    for version in ("0.10.0", "0.2.0"):
        paths = ["--out", str(tmp_path), "--picture", str(tmp_path / "history.png")]
        monkeypatch.setattr(sys, "argv", ["history.py", "--version", version, *paths])
        history.main()
    names = ["0.10.0_amd-epyc-tm-9_2.csv", "0.2.0_amd-epyc-tm-9_2.csv", "history.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    ((machine, releases),) = history.read(tmp_path).items()
    assert [release.version for release in releases] == ["0.2.0", "0.10.0"]
    speedups, over_bound = history.draw({machine: releases}).axes
    assert [tick.get_text() for tick in speedups.get_xticklabels()] == ["0.2.0", "0.10.0"]
    drawn = [
        line.get_ydata() for line in over_bound.lines if len(line.get_xdata()) == 2 and line.get_marker() != "None"
    ]
    assert drawn == [pytest.approx([1.2, 1.2])] * len(history.CASES)


def test_a_difference_between_commits_is_one_that_all_pairs_of_processes_show():
    of = script("commits").Comparison.of
    same, faster, slower = (np.array([[1.0, new], [2.0, 2 * new]]) for new in (1.0, 0.5, 2.0))
    seldom_faster = np.concatenate([faster, same, same])
    found = [of(pairs).verdict() for pairs in ([faster] * 2, [slower] * 2, [faster, same], [seldom_faster] * 2)]
    assert found == ["faster", "slower", *["no difference beyond the spread"] * 2]
    text = "old 1250 ms, new 1000 ms, old / new 2.000 (1.625 to 2.000; pairs 1.250 to 2.000): faster"
    assert str(of([faster, np.array([[1.25, 1.0]])])) == text


def test_training_loops_are_compared_with_torchs(monkeypatch, capsys, tmp_path):
    loops = script("training_loops")
    monkeypatch.setattr(loops, "TABLE", tmp_path / "loops.csv")
    monkeypatch.setattr(loops, "WARM_UP", 2)
    monkeypatch.setattr(loops, "OPTIMIZERS", {"SGD": {}, "Muon": {}})
    monkeypatch.setattr(sys, "argv", ["training_loops.py", "--rounds", "2"])
    loops.main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * len(loops.LOOPS) - 2
    with loops.TABLE.open(newline="") as file:
        assert [(line["optimizer"], line["loop"]) for line in csv.DictReader(file)] == [
            (line.split()[0], " ".join(line.split()[1:-4])) for line in printed
        ]


def test_a_commit_that_is_slower_is_found_and_one_without_the_optimizer_said(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")

    def git(*arguments):
        command = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path), *arguments]
        subprocess.run(command, check=True)  # noqa: S603 - our own command

    git("init", "-q", "-b", "main")
    package = tmp_path / "src" / "surefoot" / "__init__.py"
    package.parent.mkdir(parents=True)
    for tag, classes in {"empty": "", "quick": "class AdamW(Resting): time = 1e-3", "slow": SLOW}.items():
        package.write_text(f"{RESTING}\n{classes}\n")
        git("add", ".")
        git("commit", "-q", "-m", tag)
        git("tag", tag)
    few = ["--optimizer", "AdamW", "--model", "overhead", "--seconds", "0", "--pairs", "1", "--threads", "1"]
    commits = script("commits")
    for old, new, expected in (
        ("quick", ".", "): slower"),
        ("slow", "empty", "left out, empty: module 'surefoot' has no attribute 'AdamW'"),
    ):
        monkeypatch.setattr(sys, "argv", ["commits.py", old, new, *few, "--repository", str(tmp_path)])
        commits.main()
        assert expected in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(sys, "argv", ["commits.py", "none", "slow", *few, "--repository", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"git has no src/ of 'none' in .*: fatal: not a valid object name"):
        commits.main()


RESTING = """import time
class Resting:
    def __init__(self, params): pass
    def step(self): time.sleep(self.time)
"""
SLOW = "class AdamW(Resting): time = 8e-3"
