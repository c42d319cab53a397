"""The fuzzer: random worlds, random changes between steps, each step compared with a twin's or with a clean refusal.

    python tests/fuzz/fuzz.py --cases 10000 --seed 0

Cases run in forked children, so that a crash ends a child, not the run; its case is known by a number in shared memory.
What fails is reduced to a small case and printed as Python, to be put into `faults.py`.  With `--malloc` Python starts
anew with glibc's debugging library, so that corruption shows at once.
"""

import argparse
import ctypes
import json
import mmap
import os
import pickle
import random
import re
import signal
import struct
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("SUREFOOT_CACHE_DIR", str(Path(__file__).parents[2] / ".kernels"))
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

import torch
from averages import AverageCase, draw_averages, run_averages
from cases import Case, Round, draw_case
from changes import CHANGES
from judge import coarsest, difference, misfits, synchronize, torch_writes_elsewhere, written_by_step
from loops import LoopCase, draw_loop, run_loop
from memory import Snapshot, everything, lacks_memory
from sharded import ShardedCase, draw_sharded, mesh, run_sharded
from steps import attempt, give_gradients, take_step
from worlds import ENGINES, FEW, SETTINGS, WITHOUT_ENGINES, Kind, World

from surefoot.errors import InternalError, RuleError

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What a refusal is."""
ALSO_NAMELESS = (
    "does not support sparse gradients",
    "does not support dense gradients",
    "not compatible with sparse gradients",
    "capturable=True",
    "start afresh with `optimizer.state.clear()`",
)
"""Parts of refusals, in torch's own words, that name no parameter."""


class Failure(AssertionError):  # noqa: N818 (a finding, not an error of the fuzzer)
    """A case has shown a fault.

    Attributes:
        kind: what sort of fault.
        detail: what was seen.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


# Running cases


def run(case: Case) -> Counter[str]:
    """Run a case; return how its steps ended.

    Raises:
        Failure: a fault.
    """
    ended: Counter[str] = Counter()
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(enable=False):
        warnings.simplefilter("ignore")
        if isinstance(case, AverageCase):
            ended += run_averages(case, Failure, attempt)
        elif isinstance(case, ShardedCase):
            ended += run_sharded(case, Failure, attempt)
        elif isinstance(case, LoopCase):
            ended += run_loop(case, Failure)
        else:
            _Run(case, ended).all()
    return ended


def _failed(kind: str, error: BaseException, what: str = "") -> Failure:
    text = f"{what}: {error!r}" if what else repr(error)
    return Failure(kind, f"{text} from {getattr(error, 'origin', '?')}")


class _Run:
    """A case while it is run."""

    def __init__(self, case: Case, ended: Counter[str]) -> None:
        self.case, self.ended = case, ended
        self.setting = SETTINGS[case.setting]
        self.judge = "eager" if self.setting.is_ours_only else "torch"
        torch.set_num_threads(1)
        self.ours = World(self.setting, case.engine, case.kinds, "ours", case.seed)
        self.twin = World(self.setting, case.engine, case.kinds, self.judge, case.seed)
        self.ours.partner = self.twin
        self.before: Snapshot | None = None
        self.goes_on = True
        self.eager = self.judge == "eager"
        self.refused: set[int] = set()

    def all(self) -> None:
        """Run every round."""
        for number, each in enumerate(self.case.rounds):
            self.round(number, each)
            if not self.goes_on:
                return

    def round(self, number: int, each: Round) -> None:
        """Return gradients, change things, step, and compare."""
        for world in (self.ours, self.twin):
            give_gradients(world, each.grads, self.case.seed * 97 + number * 11)
        self.before = None
        if each.where == "before":
            self.change(each.moves)
            self.before = Snapshot(self.ours)
        else:
            self._defer(each)
        closure = each.where == "closure" or self.setting.algorithm == "LBFGS"
        must, may = ([], []) if self.before is None else misfits(self.ours)
        error = take_step(self.ours, each.how, closure, number)
        if self.before is None:  # nobody has called what was deferred
            raise Failure("hook was not called", each.where) if error is None else _failed("raw error", error)
        if each.where != "before":
            must, may = self.misfits
        if error is not None:
            self._refused(error, must, may, each, closure, number)
        else:
            self._stepped(must, may, each, closure, number)

    def _defer(self, each: Round) -> None:
        def call() -> None:
            self.change(each.moves)
            self.before, self.misfits = Snapshot(self.ours), misfits(self.ours)

        self.ours.deferred = each.where, call

    def change(self, moves: Iterable[tuple[str, int, int, int]]) -> None:
        """Apply changes to both worlds."""
        for name, *numbers in moves:
            if any(lacks_memory(tensor) for _, tensor in everything(self.ours)):
                return  # most changes would read what is not there
            row = CHANGES[name]
            before = Snapshot(self.ours) if row.raises else None
            ours = attempt(lambda: row.apply(self.ours, *numbers))  # noqa: B023 (called at once)
            if ours is not None and row.raises:
                if not isinstance(ours, REFUSALS) or isinstance(ours, InternalError | RuleError):
                    raise _failed("raw error", ours, name)
                if found := before.difference(self.ours):
                    raise Failure("changed by a refused change", f"{name}: {found}; {ours!r}")
                continue
            theirs = attempt(lambda: row.apply(self.twin, *numbers))  # noqa: B023 (called at once)
            if (ours is None) != (theirs is None):
                if row.raises or (theirs is not None and row.judge == "eager") or name in ("copied", "pickled"):
                    self.eager = True
                    self.judge = "nobody"
                    continue
                raise Failure("change in one world only", f"{name}: {ours!r} and {theirs!r}")
            if row.refusable:
                self.ours.pending.add(name)
            if row.judge == "eager":
                self.eager = True

    def _refused(self, error: BaseException, must, may, each: Round, closure: bool, number: int) -> None:
        """Check that a refusal is one, changed nothing, and was called for."""
        if not isinstance(error, REFUSALS) or isinstance(error, InternalError | RuleError) or not str(error):
            raise _failed("raw error", error)
        # Of two optimizers the first may have stepped.
        found = None if self.ours.second is not None else self.before.difference(self.ours)
        if found is not None:
            raise Failure("changed by a refusal", f"{found}; {error!r}")
        text = str(error)
        if not any(part in text for part in ("params[", "`weight", *ALSO_NAMELESS)):
            raise _failed("nameless refusal", error)
        self.ended["refused"] += 1
        if not (must or may or self.ours.pending) and self.judge != "nobody":
            theirs = take_step(self.twin, each.how, closure, number)
            if theirs is None and not torch_writes_elsewhere(self.twin):
                raise _failed("refused what torch steps", error)
        self.refused.add(number)
        for world in (self.ours, self.twin):
            world.repair(self.case.seed + number)
        self.ours.deferred = self.twin.deferred = None

    def _stepped(self, must, may, each: Round, closure: bool, number: int) -> None:
        """Check that a step was right."""
        if must:
            raise Failure("stepped what must be refused", ", ".join(must))
        if found := self.before.outside(self.ours, written_by_step(self.ours)):
            raise Failure("wrote outside", found)
        if self.judge == "nobody":
            self.ended["stepped, unjudged"] += 1
            return
        if self.judge == "torch" and torch_writes_elsewhere(self.twin):
            self.ended["torch would write elsewhere"] += 1
            self.second_opinion(number, "not asked")
            self.goes_on = False
            return
        theirs = take_step(self.twin, each.how, closure, number)
        if theirs is not None:
            self.ended[f"stepped where {self.judge} refuses"] += 1
            self.second_opinion(number, f"{theirs!r}")
            self.goes_on = False
            return
        found = difference(self.ours, self.twin)
        if found is None:
            self.ended["stepped"] += 1
            if any(
                coarsest((self.ours,), i).itemsize < 4 or coarsest((self.ours,), i) != p.dtype
                for i, p in enumerate(self.ours.params)
            ):
                synchronize(self.ours, self.twin)
            return
        coarse = any(tensor.dtype.itemsize == 2 for tensor in written_by_step(self.ours))
        if not (self.eager or coarse) or self.judge == "eager":
            raise Failure(f"differs from {self.judge}", found)
        self.ended["judged by the eager engine"] += 1
        self.second_opinion(number, found)
        self.goes_on = False

    def second_opinion(self, number: int, why: str) -> None:
        """Compare with surefoot's eager engine, which is led to the same place."""
        if self.setting.algorithm in WITHOUT_ENGINES or self.case.engine == "eager":
            return
        twin = replace(self.case, rounds=self.case.rounds[: number + 1])
        other = _Alone(twin, self.refused)
        error = other.all()
        if error is not None:
            raise Failure("engines disagree", f"the eager one refuses: {error!r}; torch: {why}")
        if found := difference(self.ours, other.world):
            raise Failure("engines disagree", f"{found}; torch: {why}")


class _Alone:
    """A case run by the eager engine alone, refusals aside."""

    def __init__(self, case: Case, refused: set[int]) -> None:
        self.case, self.refused = case, refused
        self.world = World(SETTINGS[case.setting], "eager", case.kinds, "eager", case.seed)

    def all(self) -> BaseException | None:
        """Run every round; return what the last step raised."""
        error = None
        for number, each in enumerate(self.case.rounds):
            give_gradients(self.world, each.grads, self.case.seed * 97 + number * 11)

            def call(each: Round = each) -> None:
                for name, *numbers in each.moves:
                    if any(lacks_memory(tensor) for _, tensor in everything(self.world)):
                        return
                    attempt(lambda: CHANGES[name].apply(self.world, *numbers))  # noqa: B023 (called at once)

            if each.where == "before":
                call()
            else:
                self.world.deferred = each.where, call
            closure = each.where == "closure" or self.world.setting.algorithm == "LBFGS"
            if number not in self.refused:
                error = take_step(self.world, each.how, closure, number)
            else:
                if self.world.deferred is not None:
                    self.world.run_deferred(each.where)
                self.world.repair(self.case.seed + number)
        return error


# Finding and reducing faults


def outcome(case: Case) -> tuple[str, str] | None:
    """Return what is wrong with a case, None if nothing."""
    try:
        run(case)
    except Failure as failure:
        return failure.kind, failure.detail
    except Exception as error:  # noqa: BLE001 (a fault of the fuzzer or of torch is reported like any other)
        return "the fuzzer failed", f"{error!r} {_line(error)}"
    return None


def _line(error: BaseException) -> str:
    trace = error.__traceback__
    places = []
    while trace is not None:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(places[-4:])


def in_child(call: Callable[[], Any], seconds: int = 100) -> Any:
    """Return what a call gives in a forked child, or what it crashes with."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        _silence()
        signal.alarm(seconds)
        os.write(writer, pickle.dumps(call()))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return crash(status) or pickle.loads(told)


def outcome_in_child(case: Case) -> tuple[str, str] | None:
    """Return what is wrong with a case that may crash."""
    return in_child(lambda: outcome(case))


def crash(status: int) -> tuple[str, str] | None:
    """Return what a child's status tells of a crash."""
    return ("crash", signal.Signals(os.WTERMSIG(status)).name) if os.WIFSIGNALED(status) else None


def _silence() -> None:
    """Let a child that may crash say nothing."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)


def reduced(case: Case, kind: str) -> Case:
    """Return a smaller case that shows a fault of the same kind."""
    if kind != "crash":
        smaller = in_child(lambda: _reduced(case, kind, outcome, tries=150))
        if isinstance(smaller, Case):
            return smaller
    return _reduced(case, kind, outcome_in_child, tries=60)


def _reduced(case: Case, kind: str, judge: Callable[[Case], Any], tries: int) -> Case:
    tried, smaller = 0, True
    while smaller:
        smaller = False
        for candidate in _smaller(case):
            if (tried := tried + 1) > tries:
                return case
            found = judge(candidate)
            if found is not None and found[0] == kind:
                case, smaller = candidate, True
                break
    return case


def _smaller(case: Any) -> Iterator[Any]:
    """Yield simpler cases, the simplest first."""
    if isinstance(case, AverageCase):
        yield from _smaller_averages(case)
    elif isinstance(case, ShardedCase):
        yield from _smaller_sharded(case)
    else:
        yield from _smaller_rounds(case)
        yield from _smaller_kinds(case)


def _smaller_rounds(case: Case) -> Iterator[Case]:
    rounds = case.rounds
    for index in reversed(range(len(rounds))):
        yield replace(case, rounds=rounds[:index] + rounds[index + 1 :])
    for index, each in enumerate(rounds):
        simpler = [each._replace(moves=each.moves[:i] + each.moves[i + 1 :]) for i in range(len(each.moves))]
        simpler += [each._replace(**{name: Round._field_defaults[name]}) for name in ("where", "how", "grads")]
        for other in simpler:
            if other != each:
                yield replace(case, rounds=(*rounds[:index], other, *rounds[index + 1 :]))


def _smaller_kinds(case: Case) -> Iterator[Case]:
    kinds = case.kinds
    for index in range(len(kinds) * (len(kinds) > 1)):
        yield replace(case, kinds=kinds[:index] + kinds[index + 1 :])
    for index, kind in enumerate(kinds):
        first = (SETTINGS[case.setting].shapes or (0,))[0]
        for other in (Kind(first, 0), kind._replace(layout=0), kind._replace(other_dtype=False)):
            if other != kind:
                yield replace(case, kinds=(*kinds[:index], other, *kinds[index + 1 :]))
    if case.seed > 1:
        yield replace(case, seed=case.seed % 2)


def _smaller_averages(case: AverageCase) -> Iterator[AverageCase]:
    tensors, updates = case.tensors, case.updates
    for index in reversed(range(len(updates))):
        yield replace(case, updates=updates[:index] + updates[index + 1 :])
        for i in range(len(updates[index])):
            fewer = updates[index][:i] + updates[index][i + 1 :]
            yield replace(case, updates=(*updates[:index], fewer, *updates[index + 1 :]))
    for index in range(len(tensors) * (len(tensors) > 1)):
        yield replace(case, tensors=tensors[:index] + tensors[index + 1 :])
    for index, each in enumerate(tensors):
        if each != (0, 0, 0, 0):
            yield replace(case, tensors=(*tensors[:index], (0, 0, 0, 0), *tensors[index + 1 :]))
    if case.how == "model":
        yield replace(case, how="lists")


def _smaller_sharded(case: ShardedCase) -> Iterator[ShardedCase]:
    params, rounds = case.params, case.rounds
    for index in reversed(range(len(rounds))):
        yield replace(case, rounds=rounds[:index] + rounds[index + 1 :])
        for i in range(len(rounds[index])):
            fewer = rounds[index][:i] + rounds[index][i + 1 :]
            yield replace(case, rounds=(*rounds[:index], fewer, *rounds[index + 1 :]))
    for index in range(len(params) * (len(params) > 1)):
        yield replace(case, params=params[:index] + params[index + 1 :])
    for index, (shape, placement) in enumerate(params):
        if shape:
            yield replace(case, params=(*params[:index], (0, placement), *params[index + 1 :]))


@dataclass
class Report:
    """What a run has found.

    Attributes:
        cases: how many cases were run.
        ended: how steps ended, and which kinds of faults there were.
        faults: each fault once: kind, detail, its smallest case, and the seed.
        seen: how often faults that look alike were met.
    """

    cases: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    faults: dict[Any, tuple[str, str, Any, int]] = field(default_factory=dict)
    seen: Counter[Any] = field(default_factory=Counter)

    @property
    def steps(self) -> int:
        """How many steps were judged."""
        return sum(count for name, count in self.ended.items() if not name.startswith("fault"))


def fuzz(options: argparse.Namespace, say: Callable[[str], None]) -> Report:
    """Run cases in children until there were enough, or the time is over."""
    report = Report()
    place = mmap.mmap(-1, 16)
    warm_up(options)
    start, seed, end = time.monotonic(), options.seed, options.seed + options.cases
    said = start
    while seed < end and time.monotonic() - start < options.seconds:
        found, seed = _batch(options, place, seed, min(end, seed + options.batch), report)
        for kind, detail, number in found:
            _note(report, options, kind, detail, number, say)
        if time.monotonic() - said > 10:
            said = time.monotonic()
            rate = report.steps / (said - start)
            say(f"{report.cases} cases, {report.steps} steps, {rate:.0f} steps/s, {len(report.faults)} faults")
    return report


def warm_up(options: argparse.Namespace) -> None:
    """Let the parent import and compile what its children would import and compile one by one."""
    if options.sharded or options.suite:
        mesh()
        for seed in range(-4, 0):
            outcome(draw_sharded(random.Random(seed).randrange, options.engines))  # noqa: S311 (no secret)
    if options.sharded:
        return
    for setting in options.settings:
        for engine in options.engines:
            kinds = Kind((SETTINGS[setting].shapes or (0,))[0], 0)
            outcome(Case(setting, engine, (kinds, kinds), (Round(), Round(), Round())))


def _case_of(options: argparse.Namespace, seed: int) -> Case:
    source = random.Random(seed)  # noqa: S311 (no secret)
    if options.averages or (options.suite and seed % 3 == 1):
        return draw_averages(source.randrange)
    if options.sharded or (options.suite and seed % 3 == 2):
        return draw_sharded(source.randrange, options.engines)
    draw = draw_loop if options.loops else draw_case
    return draw(source.randrange, engines=options.engines, settings=options.settings)


def _batch(options, place: mmap.mmap, first: int, end: int, report: Report) -> tuple[list[tuple[str, str, int]], int]:
    """Run cases in a child; return what failed and where to go on."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        _silence()
        _work(options, place, first, end, writer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found, ended = [], Counter()
        while True:
            try:
                kind, *rest = pickle.load(pipe)
            except (EOFError, pickle.UnpicklingError):
                break
            if kind == "ended":
                ended += rest[0]
            else:
                found.append((kind, *rest))
    _, status = os.waitpid(child, 0)
    last = struct.unpack_from("q", place)[0]
    crashed = crash(status)
    report.cases += last - first + 1
    report.ended += ended
    if crashed is not None:
        found.append((*crashed, last))
    return found, last + 1


def _work(options, place: mmap.mmap, first: int, end: int, writer: int) -> None:
    ended: Counter[str] = Counter()
    for seed in range(first, end):
        struct.pack_into("q", place, 0, seed)
        signal.alarm(options.limit)
        try:
            ended += run(_case_of(options, seed))
        except Failure as failure:
            os.write(writer, pickle.dumps((failure.kind, failure.detail, seed)))
            if failure.kind in CORRUPTING:  # what comes now could be blamed for it
                os.write(writer, pickle.dumps(("ended", ended)))
                return
        except Exception as error:  # noqa: BLE001 (told)
            os.write(writer, pickle.dumps(("the fuzzer failed", f"{error!r} {_line(error)}", seed)))
        if seed % 20 == 0 or seed == end - 1:
            os.write(writer, pickle.dumps(("ended", ended)))
            ended = Counter()


CORRUPTING = (
    "stepped what must be refused",
    "averaged without memory",
    "averaged what must be refused",
    "wrote outside",
)


def _note(report: Report, options, kind: str, detail: str, seed: int, say: Callable[[str], None]) -> None:
    """Reduce what failed, and say it if it is new."""
    rough = (kind, _skeleton(detail))
    report.ended[f"fault: {kind}"] += 1
    report.seen[rough] += 1
    if report.seen[rough] > options.each:
        return
    case = _case_of(options, seed)
    told = outcome_in_child(case)
    if told is None:
        case_, kind = case, f"{kind}, in company only"
    else:
        case_ = reduced(case, kind)
        told = outcome_in_child(case_) or told
    sequence = _moves(case_)
    names = tuple(sorted({move[0] for moves in sequence for move in moves}))
    key = kind, names, _skeleton(told[1] if told else detail)
    if key not in report.faults:
        report.faults[key] = kind, told[1] if told else detail, case_, seed
        say(f"FAULT {kind} (seed {seed})\n  {told[1] if told else detail}\n  {case_!r}")


def _moves(case: Any) -> Iterable[Any]:
    if isinstance(case, AverageCase | ShardedCase):
        return case.updates if isinstance(case, AverageCase) else case.rounds
    return [each.moves for each in case.rounds]


def _skeleton(text: str) -> str:
    """Return a message without its numbers."""
    text = re.sub(r"\(['\"]", "", text)
    return re.sub(r"\{.*\}|'[^']*'|\[[^]]*\]|\([^)]*\)|-?[\d.]+(e[-+]?\d+)?", "#", text)[:110]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others' count up")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--engine", choices=("all", *ENGINES), default="all")
    parser.add_argument("--settings", nargs="*", default=tuple(SETTINGS), choices=tuple(SETTINGS))
    parser.add_argument("--few", action="store_true", help="only settings that have kernels in common")
    parser.add_argument("--batch", type=int, default=500, help="cases for each child")
    parser.add_argument("--limit", type=int, default=120, help="seconds for a case")
    parser.add_argument("--each", type=int, default=2, help="how many of faults that look alike are reduced")
    parser.add_argument("--case", help="run one case, as it was printed")
    parser.add_argument("--faults", action="store_true", help="run the cases in faults.py and print what they show")
    parser.add_argument("--averages", action="store_true", help="averages of tensors instead of optimizers")
    parser.add_argument("--sharded", action="store_true", help="sharded parameters among plain ones")
    parser.add_argument("--loops", action="store_true", help="many steps, with what is kept between them and without")
    parser.add_argument("--suite", action="store_true", help="faults, then --few, averages and sharded in turn")
    parser.add_argument("--malloc", action="store_true", help="let the allocator check what it can")
    options = parser.parse_args(given)
    options.engines = tuple(ENGINES) if options.engine == "all" else (options.engine,)
    options.settings = FEW if options.few or options.suite else tuple(options.settings)
    return options


DEBUG_LIBRARY = "libc_malloc_debug.so.0"
"""Where glibc keeps its checks since 2.34."""


def with_malloc_checks() -> dict[str, str]:
    """Return an environment in which glibc checks every block that is freed, and fills what is freed or new.

    Large blocks are mapped by themselves, so that a storage that was resized to less and then to more is likely to
    stand where it stood.  Without the library there is only the filling.
    """
    checks = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165", "MALLOC_MMAP_THRESHOLD_": "100000"}
    return os.environ | checks | ({"LD_PRELOAD": DEBUG_LIBRARY} if has_debug_library() else {})


def has_debug_library() -> bool:
    """Whether glibc's checks are installed."""
    try:
        ctypes.CDLL(DEBUG_LIBRARY)
    except OSError:
        return False
    return True


def say(text: str) -> None:
    """Say something at once."""
    sys.stdout.write(f"{text}\n")


def run_given(options: argparse.Namespace) -> int:
    """Run given cases in children; print what is wrong with them as JSON, and whether a byte too many is noticed."""
    import faults  # noqa: PLC0415 (it is of no use for drawn cases)

    given = {"case": eval(options.case, vars(faults))} if options.case else faults.CASES  # noqa: S307 (our own)
    mesh()
    for setting in ("sgd", "adam"):
        outcome(Case(setting, rounds=(Round(), Round(), Round())))  # children find imported what they need
    found = in_child(lambda: {name: outcome(case) for name, case in given.items()}, seconds=300)
    if not isinstance(found, dict) or any(found.values()):  # who is to blame?
        alone = {name: outcome_in_child(case) for name, case in given.items()}
        found = alone if any(alone.values()) else {"in company only": found}
    say(json.dumps({"wrong": found, "a byte too many": in_child(write_a_byte_too_many)}, indent=1))
    return any(found.values())


def write_a_byte_too_many() -> None:
    """Write beyond a block, which the allocator is to notice when it is freed."""
    tensor = torch.empty(3)
    ctypes.memset(tensor.data_ptr() + tensor.nbytes, 65, 1)


def main() -> int:
    options = arguments()
    if options.malloc and "MALLOC_CHECK_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], with_malloc_checks())  # noqa: S606
    sys.stdout.reconfigure(line_buffering=True)
    if options.case or options.faults:
        return run_given(options)
    if options.suite:
        run_given(options)
    start = time.monotonic()
    report = fuzz(options, say)
    seconds = time.monotonic() - start
    say(f"{report.cases} cases, {report.steps} steps in {seconds:.0f} s ({report.steps / seconds:.0f} steps/s)")
    for name, count in report.ended.most_common():
        say(f"{count:9d}  {name}")
    say(f"{len(report.faults)} kinds of faults")
    return bool(report.faults)


if __name__ == "__main__":
    sys.exit(main())
