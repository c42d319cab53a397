"""Telemetry in Lightning."""

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:  # the same under its older name
    from pytorch_lightning import Callback

from surefoot.integrations.logged import LatestRecord
from surefoot.telemetry.telemetry import Parameters


class TelemetryCallback(Callback):  # type: ignore[misc] # of a framework that need not be there
    """Logs the telemetry of a module's optimizers, every `log_every_n_steps` steps of the Trainer.

    `telemetry/grad_norm`, `telemetry/update_ratio` and the other numbers go to the Trainer's loggers and into
    `trainer.callback_metrics`, as what the module logs.  With several optimizers each has its number in the names:
    `telemetry/0/grad_norm`.

    Args:
        parameters: as `surefoot.telemetry.Telemetry`'s: the parameters whose own numbers are logged too, as
            `telemetry/grad_norm/<name>`; by default totals only.

    Raises:
        ValueError: when training begins, an optimizer measures nothing.
    """

    def __init__(self, parameters: Parameters = None) -> None:
        self._parameters = parameters
        self._newest: list[LatestRecord] = []

    def on_train_start(self, trainer: Any, _module: Any) -> None:
        """Find the telemetry."""
        several = len(trainer.optimizers) > 1
        prefixes = [f"telemetry/{number}/" if several else "telemetry/" for number in range(len(trainer.optimizers))]
        pairs = zip(trainer.optimizers, prefixes, strict=True)
        self._newest = [LatestRecord(optimizer, self._parameters, prefix) for optimizer, prefix in pairs]

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Log the newest step's numbers when the Trainer logs."""
        # By hand one batch may make any number of steps; Lightning then leaves out what is not due.
        if trainer.global_step % trainer.log_every_n_steps == 0 or not module.automatic_optimization:
            for newest in self._newest:
                module.log_dict(newest.take())
