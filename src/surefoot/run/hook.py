"""Waiting, in a program's process, for torch to be imported; then swapping, watching, and reporting at the end."""

import atexit
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from time import perf_counter
from types import ModuleType
from typing import Any

from surefoot.run.settings import VARIABLE, Settings


def install() -> None:
    """Read the settings and get ready; the first process that does is the script's."""
    started = perf_counter()
    settings = Settings.read(os.environ)
    if settings.main is None:
        settings = settings._replace(main=os.getpid())
        os.environ[VARIABLE] = settings.environment()[VARIABLE]
    if "torch" in sys.modules:
        _begin(settings, started)
    else:
        sys.meta_path.insert(0, _TorchFinder(settings, started))
        if settings.is_main:
            atexit.register(_say_that_torch_was_not_used, settings, started)


def _begin(settings: Settings, started: float) -> None:
    """Replace the classes, and see to it that steps are watched and reported."""
    atexit.unregister(_say_that_torch_was_not_used)
    from multiprocessing import parent_process, util  # noqa: PLC0415 (torch has imported it)

    from surefoot.run import report, swap, watch  # noqa: PLC0415 (they need torch)

    swap.replace_classes(settings)
    watch.start()
    atexit.register(report.at_exit, settings, started)
    if parent_process() is not None:
        _report_as_child(settings, started)
    util.register_after_fork(sys.modules[__name__], lambda _: _report_as_child(settings))


def _report_as_child(settings: Settings, started: float | None = None) -> None:
    """Report at the end of a process of multiprocessing, where atexit is passed over if it was forked."""
    from multiprocessing import util  # noqa: PLC0415

    from surefoot.run import report  # noqa: PLC0415

    arguments = (settings, perf_counter() if started is None else started)
    util.Finalize(None, report.at_exit, arguments, exitpriority=-1)  # when its own children have been waited for


def _say_that_torch_was_not_used(settings: Settings, started: float) -> None:
    from surefoot.run import report  # noqa: PLC0415

    report.without_torch(settings, started)


class _TorchFinder:
    """Finds torch as Python would, and calls `_begin` as soon as it has been imported."""

    def __init__(self, settings: Settings, started: float) -> None:
        self._settings, self._started = settings, started
        self._asking = False

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        """Return the specification that the other finders give, its loader with one thing more to do."""
        if fullname != "torch" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader)
        return spec

    def _extend(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the loader is as it was, and so is a traceback through it
            execute(module)
            sys.meta_path.remove(self)
            _begin(self._settings, self._started)

        loader.exec_module = exec_module
