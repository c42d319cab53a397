"""Every elementwise optimizer on a GPU, against torch.optim, a launch for each parameter, and the bandwidth of a copy.

    python benchmarks/gpu.py            # everything, in less than eight minutes on an H200
    python benchmarks/gpu.py --quick    # a third of the optimizers
    python benchmarks/gpu.py --tune     # the kernels with other blocks and warps, to choose `LAUNCH` in plan.py by

It needs PyTorch for CUDA with Triton and nothing else, and runs from a checkout that is not installed.  It writes
`gpu.csv` and `gpu.md`, or `gpu_tune.csv`, into `benchmarks/results`, and prints them.
"""

import argparse
import gc
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import surefoot
from surefoot.benchmark import DTYPES, SHAPE_LISTS, TORCH_VARIANTS, ShapeList, Variant, geometric_mean, write_csv
from surefoot.explain import rule_of

QUICK = ("SGD+momentum", "AdamW", "RMSprop+centered", "ASGD")
OURS, FOREACH, FUSED, EACH = "surefoot", "torch foreach", "torch fused", "a launch each"
HUGE = "huge"
MODEST = ("gpt2-small", "resnet50", "many")
COPY = 2**30
"""Bytes of the copy whose bandwidth is the measure; twice as many are moved."""
_WARM_UP, _BLOCKS = 3, 3

Step = Callable[[], object]


class Line(NamedTuple):
    """A contender in a case.

    Attributes:
        device: the GPU.
        torch: version of PyTorch.
        optimizer: name of the variant.
        shapes: the list of parameters.
        tensors: how many they are.
        dtype: their dtype.
        contender: the implementation.
        ms: milliseconds of a step, host and device together.
        host_us: microseconds until the host may go on, for each tensor.
        gb_per_s: bytes that a step must move, read and written once, over the time.
        of_copy: that bandwidth over that of a copy on the device.
        note: why there are no numbers.
    """

    device: str
    torch: str
    optimizer: str
    shapes: str
    tensors: int
    dtype: str
    contender: str
    ms: float
    host_us: float
    gb_per_s: float
    of_copy: float
    note: str = ""


class Case(NamedTuple):
    """What contenders compete in."""

    variant: Variant
    shapes: ShapeList
    dtype: torch.dtype

    def names(self) -> tuple[str, str, str, str, int, str]:
        """Give what a line says of the case."""
        device = torch.cuda.get_device_name()
        dtype = str(self.dtype).removeprefix("torch.")
        count = len(self.shapes.shapes)
        return device, torch.__version__, self.variant.name, self.shapes.title, count, dtype

    def bytes(self) -> int:
        """Count what a step must move: everything is read, all but the gradient is written."""
        arrays = 2 + len(_rule(self.variant).slots)
        return self.shapes.elements * self.dtype.itemsize * (2 * arrays - 1)


def _rule(variant: Variant) -> Any:
    optimizer = getattr(surefoot, variant.optimizer)([torch.zeros(1)], **variant.options)
    return rule_of(optimizer, optimizer.param_groups[0])


def main() -> None:
    """Measure, write and print."""
    options = _parser().parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device, and there is none: nothing was measured")
    options.out.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a copy moves {bandwidth / 1e9:.0f} GB/s")
    if options.tune:
        write_csv(options.out / "gpu_tune.csv", list(tune(options.elements, bandwidth)), Tuned._fields)
        return
    lines = []
    for case in selected(options):
        lines += compete(case, bandwidth, options.seconds)
    write_csv(options.out / "gpu.csv", lines, Line._fields)
    text = markdown(lines, bandwidth)
    (options.out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time optimizers on a GPU.")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--tune", action="store_true", help="try other launches of the kernels instead")
    parser.add_argument("--elements", type=int, default=2**30, help="elements of the largest case")
    parser.add_argument("--seconds", type=float, default=0.3, help="time to spend on a contender")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder to write to")
    return parser


def selected(options: argparse.Namespace) -> Iterator[Case]:
    """Give the cases to measure."""
    for dtype in DTYPES.values():
        for shapes in (huge(options.elements), *(shape_list(name) for name in MODEST)):
            for name, variant in TORCH_VARIANTS.items():
                if not options.quick or name in QUICK:
                    yield Case(variant, shapes, dtype)


def huge(elements: int) -> ShapeList:
    """Give eight tensors of so many elements together."""
    return ShapeList(HUGE, f"8 x {elements // 8 / 1e6:.0f} M", ((elements // 8,),) * 8)


def shape_list(name: str) -> ShapeList:
    """Give a list of parameters by its name."""
    return ShapeList(name, "5000 x 1 k", ((1000,),) * 5000) if name == "many" else SHAPE_LISTS[name]


# Measuring


def copy_bandwidth() -> float:
    """Measure the bytes, read and written, that a copy on the device moves in a second."""
    source = torch.empty(COPY, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds, _ = timed(lambda: target.copy_(source), 0.5)
    return 2 * COPY / seconds


def timed(step: Step, seconds: float) -> tuple[float, float]:
    """Give the time of a step, and of the host's part of it, in seconds; medians of blocks that fill the time."""
    for _ in range(_WARM_UP):
        step()
    torch.cuda.synchronize()
    host = [_host(step) for _ in range(5)]
    once = _block(step, 1)
    count = max(1, min(200, math.ceil(seconds / _BLOCKS / once)))
    return median(_block(step, count) for _ in range(_BLOCKS)), median(host)


def _host(step: Step) -> float:
    """Time the host alone; the device is idle before, so that nothing makes the host wait."""
    start = perf_counter()
    step()
    taken = perf_counter() - start
    torch.cuda.synchronize()
    return taken


def _block(step: Step, count: int) -> float:
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (perf_counter() - start) / count


def compete(case: Case, bandwidth: float, seconds: float) -> list[Line]:
    """Time every contender of a case."""
    lines = []
    for name, make in contenders(case.variant).items():
        if name == EACH and case.shapes.name == HUGE:
            continue
        lines.append(_line(case, name, make, bandwidth, seconds))
        print(f"{case.variant.name:18} {case.shapes.title:14} {lines[-1].dtype:9} {name:14}", _result(lines[-1]))
    return lines


def _line(case: Case, name: str, make: Callable[[list[Parameter]], Step], bandwidth: float, seconds: float) -> Line:
    nothing = (math.nan,) * 4
    try:
        step = make(parameters(case))
        taken, host = timed(step, seconds)
    except torch.OutOfMemoryError:
        return Line(*case.names(), name, *nothing, note="not enough memory")
    finally:
        step = None
        gc.collect()
        torch.cuda.empty_cache()
    rate = case.bytes() / taken
    per_tensor = 1e6 * host / len(case.shapes.shapes)
    return Line(*case.names(), name, 1e3 * taken, per_tensor, rate / 1e9, rate / bandwidth)


def _result(line: Line) -> str:
    if line.note:
        return line.note
    return f"{line.ms:9.3f} ms  {line.host_us:7.2f} us/tensor  {line.gb_per_s:6.0f} GB/s  {line.of_copy:6.1%} of a copy"


def parameters(case: Case) -> list[Parameter]:
    """Make parameters and gradients that are no zeros."""
    params = [Parameter(torch.empty(shape, dtype=case.dtype, device="cuda").normal_()) for shape in case.shapes.shapes]
    for param in params:
        param.grad = torch.empty_like(param).normal_(std=0.01)
    return params


def contenders(variant: Variant) -> dict[str, Callable[[list[Parameter]], Step]]:
    """Give by name what makes a contender's step for some parameters."""
    ours, theirs = getattr(surefoot, variant.optimizer), getattr(torch.optim, variant.optimizer)
    found: dict[str, Callable[[list[Parameter]], Step]] = {
        OURS: lambda params: ours(params, **variant.options).step,
        FOREACH: lambda params: theirs(params, **variant.options, foreach=True).step,
    }
    if "fused" in inspect.signature(theirs).parameters:
        found[FUSED] = lambda params: theirs(params, **variant.options, fused=True).step
    found[EACH] = lambda params: launch_each(ours(params, **variant.options))
    return found


def launch_each(optimizer: surefoot.Optimizer) -> Step:
    """Give a step that launches our kernel once for each parameter, and does nothing else on the host."""
    plan, rule = plan_of(optimizer)
    tensor = plan._chunks & 0xFFFFFFFF
    chunks = [plan._chunks[tensor == index] for index in range(plan._entries.shape[1])]
    numbers = plan._numbers.there

    def step() -> None:
        whole = plan._chunks
        for plan._chunks in chunks:
            plan._start(rule, numbers, None)
        plan._chunks = whole

    return step


def plan_of(optimizer: surefoot.Optimizer) -> tuple[Any, Any]:
    """Take two steps and give the plan that they have left, and the rule."""
    optimizer.step()
    optimizer.step()
    (work,) = optimizer._step_cache.runs
    return work.bucket.plan, work.bucket.rule


# Tables


def markdown(lines: Sequence[Line], bandwidth: float) -> str:
    """Write the tables of the results, and what is to be judged by them."""
    text = [f"{lines[0].device}, torch {lines[0].torch}; a copy on the device moves {bandwidth / 1e9:.0f} GB/s.", ""]
    for shapes, dtype in dict.fromkeys((line.shapes, line.dtype) for line in lines):
        some = [line for line in lines if (line.shapes, line.dtype) == (shapes, dtype)]
        text += [f"## {shapes}, {dtype}", "", *_table(some), "", *_summary(some), ""]
    return "\n".join(text)


def _table(lines: Sequence[Line]) -> Iterator[str]:
    names = dict.fromkeys(line.contender for line in lines)
    yield f"| ms of a step | {' | '.join(names)} | of a copy | host, us/tensor |"
    yield f"|---|{'---|' * (len(names) + 2)}"
    for optimizer in dict.fromkeys(line.optimizer for line in lines):
        found = {line.contender: line for line in lines if line.optimizer == optimizer}
        times = (f"{found[name].ms:.3f}" if name in found else "-" for name in names)
        yield f"| {optimizer} | {' | '.join(times)} | {found[OURS].of_copy:.1%} | {found[OURS].host_us:.2f} |"


def _summary(lines: Sequence[Line]) -> Iterator[str]:
    """Compare with each contender: the geometric mean, least and greatest of the times over ours."""
    ours = {line.optimizer: line.ms for line in lines if line.contender == OURS}
    yield f"Least share of a copy's bandwidth: {min(line.of_copy for line in lines if line.contender == OURS):.1%}."
    for name in (FOREACH, FUSED, EACH):
        ratios = [line.ms / ours[line.optimizer] for line in lines if line.contender == name and not line.note]
        if ratios:
            yield f"{name} / surefoot: {geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})."


# Tuning


class Tuned(NamedTuple):
    """A kernel with some launch: elements of a block, warps, blocks of a chunk, and the share of a copy's bandwidth."""

    optimizer: str
    dtype: str
    block: int
    warps: int
    repeat: int
    of_copy: float


def tune(elements: int, bandwidth: float) -> Iterator[Tuned]:
    """Try launches; the best for each dtype, by the least favourable optimizer, belongs into `LAUNCH` of plan.py."""
    from surefoot.engines.gpu.plan import LAUNCH, Launch  # noqa: PLC0415 (Triton)

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        worst: dict[Launch, float] = {}
        for name in ("SGD+momentum", "AdamW", "Adam+amsgrad"):
            case = Case(TORCH_VARIANTS[name], huge(elements * 2 // dtype.itemsize // 4), dtype)
            for line in _try_launches(case, bandwidth):
                yield line
                launch = Launch(line.block, line.warps, line.repeat)
                worst[launch] = min(worst.get(launch, math.inf), line.of_copy)
        best, chosen = max(worst, key=worst.__getitem__), LAUNCH[dtype.itemsize]
        print(f"{dtype}: best {best} {worst[best]:.1%}, chosen {chosen} {worst[chosen]:.1%}")


def _try_launches(case: Case, bandwidth: float) -> Iterator[Tuned]:
    from surefoot.engines.gpu.plan import Launch, chunks_of  # noqa: PLC0415

    plan, rule = plan_of(getattr(surefoot, case.variant.optimizer)(parameters(case), **case.variant.options))
    sizes = plan._entries[-2]
    # Bytes of a parameter that a thread moves for a block, warps, blocks of a chunk.
    for each, warps, repeat in itertools.product((16, 32), (4, 8), (1, 2, 4, 8, 16)):
        plan._launch = Launch(32 * warps * each // case.dtype.itemsize, warps, repeat)
        plan._chunks = torch.from_numpy(chunks_of(sizes, plan._launch.chunk)).cuda()
        seconds, _ = timed(lambda: plan._start(rule, plan._numbers.there, None), 0.1)
        share = case.bytes() / seconds / bandwidth
        print(f"{case.variant.name:14} {case.dtype} {plan._launch} {share:.1%}")
        yield Tuned(case.variant.name, str(case.dtype), *plan._launch, share)


if __name__ == "__main__":
    main()
