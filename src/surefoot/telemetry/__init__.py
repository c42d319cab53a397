"""Telemetry: the norms, ratios and counts that an optimizer's step sees, and where they go.

The step measures and hands over a `RawStep`; everything after that is here.  Give `telemetry=True`, or a `Telemetry`,
to an optimizer.  What is written can be read, and `surefoot report` made of it, without torch being imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

from surefoot.telemetry.live import Live
from surefoot.telemetry.reading import Line, read
from surefoot.telemetry.record import ParameterStats, RawStep, Record
from surefoot.telemetry.sinks import JsonLines, Sink, TensorBoard

if TYPE_CHECKING:
    from surefoot.telemetry.names import parameter_names
    from surefoot.telemetry.telemetry import Telemetry, as_telemetry
else:

    def __getattr__(name: str) -> Any:
        """Import what needs torch when it is first asked for."""
        if name not in __all__:
            raise AttributeError(f"module 'surefoot.telemetry' has no attribute {name!r}")
        module = importlib.import_module(f"surefoot.telemetry.{'names' if name == 'parameter_names' else 'telemetry'}")
        return globals().setdefault(name, getattr(module, name))


__all__ = [
    "JsonLines",
    "Line",
    "Live",
    "ParameterStats",
    "RawStep",
    "Record",
    "Sink",
    "Telemetry",
    "TensorBoard",
    "as_telemetry",
    "parameter_names",
    "read",
]
