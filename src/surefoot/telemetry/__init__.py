"""Telemetry: the norms, ratios and counts that an optimizer's step sees, and where they go.

The step measures and hands over a `RawStep`; everything after that is here.  Give `telemetry=True`, or a `Telemetry`,
to an optimizer.
"""

from surefoot.telemetry.live import Live
from surefoot.telemetry.names import parameter_names
from surefoot.telemetry.reading import Line, read
from surefoot.telemetry.record import ParameterStats, RawStep, Record
from surefoot.telemetry.sinks import JsonLines, Sink, TensorBoard
from surefoot.telemetry.telemetry import Telemetry, as_telemetry

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
