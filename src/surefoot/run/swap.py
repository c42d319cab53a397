"""Putting our classes where torch's are, in torch.optim and in every module that has taken them from there.

The base classes `Optimizer` and `LRScheduler` stay torch's: ours are subclasses of them, so that `isinstance` and
subclasses of the script hold whichever were imported first.
"""

import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim import swa_utils as torch_averages

from surefoot import lr_scheduler, optimizers, swa_utils
from surefoot.run.settings import Settings, suffix

_STAY = {torch.optim.Optimizer, torch_schedulers.LRScheduler, torch_schedulers._LRScheduler}
_swapped: list[tuple[Any, str, Any]] = []
files: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""For each optimizer the file of its telemetry."""
_number = itertools.count()


def replace_classes(settings: Settings) -> None:
    """Replace torch's classes; with `settings.telemetry` also give every optimizer a telemetry of its own."""
    ours = dict(pairs())
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] == "surefoot":
            continue
        for name, value in list(vars(module).items()):
            if id(value) in ours:
                _put(module, name, ours[id(value)])
    if settings.telemetry is not None:
        for name in optimizers.__all__:
            _add_telemetry(getattr(optimizers, name), Path(settings.telemetry), settings)


def _put(owner: Any, name: str, value: Any) -> None:
    """Set an attribute, and note what it was."""
    _swapped.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def put_back() -> None:
    """Put everything back that `replace_classes` has replaced."""
    while _swapped:
        setattr(*_swapped.pop())


def pairs() -> Iterator[tuple[int, Any]]:
    """Yield the id of each of torch's classes and functions that we have too, and ours."""
    for theirs, ours in ((torch.optim, optimizers), (torch_schedulers, lr_scheduler), (torch_averages, swa_utils)):
        for name in ours.__all__:
            original = getattr(theirs, name, None)
            if callable(original) and original not in _STAY:
                yield id(original), getattr(ours, name)


def _add_telemetry(algorithm: Any, folder: Path, settings: Settings) -> None:
    """Let the constructor add `telemetry`, unless the script gives one."""
    construct = algorithm.__init__

    @functools.wraps(construct)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        # A constructor that calls its base's has been here already; LBFGS measures nothing.
        if id(self) in _under_construction or "telemetry" not in type(self).supported_step_options():
            construct(self, *args, **kwargs)
            return
        _under_construction.add(id(self))
        try:
            construct(self, *args, **({"telemetry": _telemetry(self, folder, suffix(settings))} | kwargs))
        finally:
            _under_construction.discard(id(self))

    _put(algorithm, "__init__", constructor)


_under_construction: set[int] = set()


def _telemetry(optimizer: Any, folder: Path, suffix: str) -> Any:
    from surefoot.telemetry import JsonLines, Telemetry  # noqa: PLC0415 (only when asked for)

    path = folder / f"{next(_number):02d}-{type(optimizer).__name__}{suffix}.jsonl"
    files[optimizer] = str(path)
    return Telemetry(sinks=JsonLines(path, every_rank=True))
