"""`Telemetry`: what an optimizer's `telemetry=` takes; it decides what is measured and passes on what was.

Nothing here waits for a device: records are looked at by sinks, callbacks and people.
"""

import difflib
import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from multiprocessing import util
from typing import Any

from torch import distributed

from surefoot.locks import Lock
from surefoot.telemetry.record import RawStep, Record, fetch
from surefoot.telemetry.sinks import Sink

Select = Callable[[str], bool]
Parameters = str | Iterable[str] | Select | None
Callback = Callable[[Record], object]
HISTORY = 256


class Selection:
    """Which parameters are measured, by name."""

    def __init__(self, parameters: Parameters) -> None:
        self.patterns = _patterns(parameters)
        self._function = parameters if callable(parameters) else None
        self._known: dict[str, bool] = {}

    def __call__(self, name: str) -> bool:
        """Whether a parameter is measured."""
        if name not in self._known:
            self._known[name] = self._decide(name)
        return self._known[name]

    def _decide(self, name: str) -> bool:
        if self._function is not None:
            return bool(self._function(name))
        return self.patterns is None or any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def idle(self, names: Sequence[str]) -> list[str]:
        """Return the patterns that match none of some names."""
        return [p for p in self.patterns or () if not any(fnmatchcase(name, p) for name in names)]

    def known(self) -> list[str]:
        """Return the names that were asked for."""
        return list(self._known)

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind a function that cannot be pickled; what it has decided is kept, other names are measured."""
        name = getattr(self._function, "__qualname__", "")
        return self.__dict__ | ({"_function": None} if "<" in name else {})


def _patterns(parameters: Parameters) -> tuple[str, ...] | None:
    if parameters is None or callable(parameters):
        return None
    patterns = (parameters,) if isinstance(parameters, str) else parameters
    patterns = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise TypeError(
            f"`parameters` must be None (all), one or several patterns such as 'blocks.*.weight', or a function of a "
            f"name, but is {parameters!r}"
        )
    return patterns


class _Outlet:
    """A sink, and the records that wait for it."""

    def __init__(self, sink: Sink) -> None:
        self._sink: Sink | None = sink
        self._waiting: list[Record] = []
        self._process = os.getpid()
        self._lock = Lock()  # several threads may step one optimizer

    def take(self, record: Record) -> None:
        if self._sink is None or not self._is_ours(self._sink):
            return
        with self._lock:
            self._waiting.append(record)
            if self._sink is not None and self._sink.due(len(self._waiting)):
                self._pass_on()

    def _is_ours(self, sink: Sink) -> bool:
        """Whether this process writes: not a forked child, which has the same file open, and not a later rank."""
        return os.getpid() == self._process and (sink.every_rank or _rank() == 0)

    def flush(self) -> None:
        if self._sink is not None and self._is_ours(self._sink):
            with self._lock:
                self._pass_on()
                self._guarded(lambda sink: sink.flush())

    def close(self) -> None:
        self.flush()
        if self._sink is not None and self._is_ours(self._sink):
            with self._lock:
                self._guarded(lambda sink: sink.close())
        self._sink = None

    def _pass_on(self) -> None:
        records, self._waiting = self._waiting, []
        if records:
            fetch(records)
            self._guarded(lambda sink: sink.write(records))

    def _guarded(self, do: Callable[[Sink], object]) -> None:
        """Use the sink; one that fails is left out from then on, so that a full disk does not end a training."""
        sink = self._sink
        if sink is None:
            return
        try:
            do(sink)
        except Exception as error:  # noqa: BLE001 (a sink is anybody's code)
            self._sink = None
            with suppress(Exception):
                sink.close()
            warnings.warn(
                f"the telemetry sink {sink!r} failed and gets nothing from now on: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def _rank() -> int:
    """Return this process's place in a distributed training."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def _close(outlets: Sequence[_Outlet]) -> None:
    for outlet in outlets:
        outlet.close()


class Telemetry:
    """What an optimizer measures while it steps, and where that goes.

    The numbers are computed in the step's own pass; they are fetched from the device only when a sink writes them or
    somebody looks.

    Args:
        parameters: which to measure: None for all, a pattern or several (`"*.weight"`, as file names are matched), or
            a function of a parameter's name.  Totals are over those that are measured.
        every: measure steps 1, 1 + every, 1 + 2 * every, ...
        history: how many records to keep in memory, 40 bytes for each parameter and record; at least 1.
        sinks: where records are written: `JsonLines`, `TensorBoard`, `Live`, or a `Sink` of your own.  A sink serves
            one telemetry.
        callbacks: functions called with each `Record` at the end of the step.  The record waits for the device when
            it is looked at, so look at every hundredth rather than at each on a GPU.

    Attributes:
        every: as given.

    Raises:
        TypeError: an option is of another type than it must be.
        ValueError: `every` or `history` is less than 1; a sink serves another telemetry already.

    A callback that raises ends the call of `step()` with its exception; the step has been done then, and everyone
    else has got the record.  That is the way to stop a training.  A sink that raises is reported by a RuntimeWarning
    and left out from then on; the training goes on.

    Copies of an optimizer, by `deepcopy` or `pickle`, measure the same but have no sinks, callbacks or records.

    Example:
        >>> import torch
        >>> from surefoot.telemetry import RawStep, Telemetry
        >>> telemetry = Telemetry("*.weight", every=10)
        >>> telemetry.wanted(step=11), telemetry.selects("head.weight"), telemetry.selects("head.bias")
        (True, True, False)
        >>> sums = torch.tensor([[9.0, 400.0, 0.0004, 2.0, 0.0]], dtype=torch.float64)
        >>> telemetry.record(RawStep(11, ("head.weight",), sums, lrs=(0.1,)))
        >>> telemetry.latest()["head.weight"].grad_norm
        3.0
        >>> round(telemetry.latest().total.update_ratio, 6)
        0.001
    """

    def __init__(
        self,
        parameters: Parameters = None,
        every: int = 1,
        history: int = HISTORY,
        sinks: Iterable[Sink] | Sink = (),
        callbacks: Iterable[Callback] | Callback = (),
    ) -> None:
        self._selection = Selection(parameters)
        self.every = _whole("every", every)
        self._history: deque[Record] = deque(maxlen=_whole("history", history))
        self._callbacks = _several("callbacks", callbacks, callable, "functions of a Record")
        sinks = _several("sinks", sinks, lambda sink: isinstance(sink, Sink), "JsonLines, TensorBoard, Live or a Sink")
        for sink in sinks:
            sink.claim(self)
        self._outlets = tuple(map(_Outlet, sinks))
        self._closing = weakref.finalize(self, _close, self._outlets)
        # Processes that multiprocessing has forked end without what finalize registers with atexit.
        util.Finalize(self, self._closing, exitpriority=0)
        self._checked = False

    # What the step asks

    def wanted(self, step: int) -> bool:
        """Whether a step is measured; steps count from 1."""
        return (step - 1) % self.every == 0

    def selects(self, name: str) -> bool:
        """Whether a parameter is measured."""
        return self._selection(name)

    def record(self, raw: RawStep) -> None:
        """Take what a step has measured: keep it, pass it to the sinks, call the callbacks.

        Raises:
            Exception: the first that a callback has raised, after all of them were called.
        """
        if not self._checked:
            self._check_patterns(raw.names)
        record = Record(raw)
        self._history.append(record)
        for outlet in self._outlets:
            outlet.take(record)
        failures = [failure for callback in self._callbacks if (failure := _call(callback, record)) is not None]
        if failures:
            raise failures[0]

    def _check_patterns(self, names: Sequence[str]) -> None:
        self._checked = True
        known = list(dict.fromkeys((*self._selection.known(), *names)))
        for pattern in self._selection.idle(known):
            near = difflib.get_close_matches(pattern, known, n=1) or known[:3]
            warnings.warn(
                f"telemetry: the pattern {pattern!r} matches no parameter; there are: {', '.join(near) or 'none'}, ...",
                UserWarning,
                stacklevel=3,
            )

    # What people ask

    def latest(self) -> Record | None:
        """Return the newest record, or None before the first; `print` it to see a table."""
        return self._history[-1] if self._history else None

    @property
    def history(self) -> tuple[Record, ...]:
        """The newest records, the oldest first."""
        records = tuple(self._history)
        fetch(records)
        return records

    def flush(self) -> None:
        """Let the sinks write what they wait with."""
        for outlet in self._outlets:
            outlet.flush()

    def close(self) -> None:
        """Flush and close the sinks; happens by itself at the end of the program.  Records are kept in memory on."""
        self._closing()

    def __repr__(self) -> str:
        """Show the options that shape what is measured."""
        patterns = self._selection.patterns
        chosen = "all" if patterns is None else ", ".join(patterns)
        return f"Telemetry(parameters: {chosen}; every {self.every}; {len(self._history)} records)"

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy what is measured; sinks, callbacks and records stay behind."""
        return {"_selection": self._selection, "every": self.every, "history": self._history.maxlen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        self.__init__(every=state["every"], history=state["history"])  # type: ignore[misc]
        self._selection = state["_selection"]


def as_telemetry(value: "bool | Telemetry | None") -> Telemetry | None:
    """Return what a `value` of the option `telemetry` asks for: True one with the defaults, None and False none.

    Raises:
        TypeError: anything else than a bool, None or a Telemetry.
    """
    if value is None or isinstance(value, Telemetry):
        return value
    if isinstance(value, bool):
        return Telemetry() if value else None
    raise TypeError(f"`telemetry` must be True, False, None or a surefoot.telemetry.Telemetry, but is {value!r}")


def _call(callback: Callback, record: Record) -> Exception | None:
    try:
        callback(record)
    except Exception as error:  # noqa: BLE001 (it is raised when all have been called)
        return error
    return None


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a whole number, but is {value!r}")
    if value < 1:
        raise ValueError(f"`{name}` must be 1 or more, but is {value}")
    return value


def _several(name: str, given: Any, good: Callable[[Any], bool], what: str) -> tuple[Any, ...]:
    items = (given,) if good(given) else given
    items = tuple(items) if isinstance(items, Iterable) and not isinstance(items, str) else (items,)
    for item in items:
        if not good(item):
            raise TypeError(f"`{name}` must be {what}, or a list of them, but got {item!r}")
    return items
