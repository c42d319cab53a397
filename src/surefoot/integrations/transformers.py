"""Telemetry in the Trainer of Hugging Face's transformers."""

from typing import Any

from transformers import TrainerCallback

from surefoot.integrations.logged import LatestRecord
from surefoot.telemetry.telemetry import Parameters


class TelemetryCallback(TrainerCallback):  # type: ignore[misc] # of a framework that need not be there
    """Logs an optimizer's telemetry whenever the Trainer logs its loss.

    `telemetry/grad_norm`, `telemetry/update_ratio` and the other numbers of the newest step join what the Trainer
    logs: `trainer.state.log_history`, and what `report_to` sends to TensorBoard and others.  For these it must come
    before the callbacks that send, which `attach` sees to; given by `callbacks=` it comes after them.

    Args:
        parameters: as `surefoot.telemetry.Telemetry`'s: the parameters whose own numbers are logged too, as
            `telemetry/grad_norm/<name>`; by default totals only.

    Raises:
        ValueError: when training begins, the optimizer measures nothing.
    """

    def __init__(self, parameters: Parameters = None) -> None:
        self._parameters = parameters
        self._newest: LatestRecord | None = None

    def attach(self, trainer: Any) -> "TelemetryCallback":
        """Put this callback before all others of a `trainer`, and return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **given: Any) -> None:
        """Find the telemetry."""
        self._newest = LatestRecord(given["optimizer"], self._parameters)

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Add the newest step's numbers to what is logged with a loss."""
        if "loss" in logs and self._newest is not None:
            numbers = self._newest.take()
            logs |= numbers
            state.log_history[-1] |= numbers
