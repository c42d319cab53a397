"""What the callbacks of frameworks log: an optimizer's newest record, once, as numbers with names."""

from typing import Any

from surefoot.optimizer import Optimizer
from surefoot.telemetry.record import QUANTITIES, Record
from surefoot.telemetry.telemetry import Parameters, Selection, Telemetry


class LatestRecord:
    """The numbers of an optimizer's newest record, each record's once.

    Args:
        optimizer: one of surefoot's with telemetry, or a wrapper that has it as its attribute `optimizer`.
        parameters: as `Telemetry`'s: those whose own numbers are told beside the totals; None for none.
        prefix: what names begin with.

    Raises:
        ValueError: the optimizer measures nothing.
    """

    def __init__(self, optimizer: Any, parameters: Parameters, prefix: str = "telemetry/") -> None:
        self._telemetry = telemetry_of(optimizer)
        self._selects = (lambda _: False) if parameters is None else Selection(parameters)
        self._prefix = prefix
        self._told: Record | None = self._telemetry.latest()

    def take(self) -> dict[str, float]:
        """Return the numbers of the newest record; nothing if they have been taken before, or there are none."""
        record = self._telemetry.latest()
        if record is None or record is self._told:
            return {}
        self._told = record
        numbers = {name: float(getattr(record.total, name)) for name in QUANTITIES}
        numbers |= {"clip": record.clip, "skipped": float(record.skipped)}
        for name in filter(self._selects, record.names):
            numbers |= {f"{quantity}/{name}": float(getattr(record[name], quantity)) for quantity in QUANTITIES}
        return {f"{self._prefix}{name}": number for name, number in numbers.items()}


def telemetry_of(optimizer: Any) -> Telemetry:
    """Return the telemetry of an optimizer, or of the one that it wraps.

    Raises:
        ValueError: it has none.
    """
    inner = optimizer
    while not isinstance(inner, Optimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer) or inner.step_options.telemetry is None:
        raise ValueError(
            f"TelemetryCallback found no telemetry in {type(inner).__name__}; make an optimizer of surefoot's with "
            f"`telemetry=True`"
        )
    return inner.telemetry
