"""The errors that are surefoot's own.

Mistakes of a user raise the built-in types that torch.optim raises (ValueError, TypeError, RuntimeError);
what stands here is about what torch does not have.
"""

from typing import Any


class RuleError(Exception):
    """A rule (an optimizer's `update` or `coefficients`) is not written as a rule must be."""


class NotRestoredError(RuntimeError):
    """Parameters could not be put back at the end of `Optimizer.ema_parameters`.

    Attributes:
        values: `(param, value)` for each of them: what it was before.
    """

    def __init__(self, message: str, values: list[tuple[Any, Any]]) -> None:
        super().__init__(message)
        self.values = values


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds inf or NaN, and the optimizer was told to raise then (`nonfinite="raise"`)."""


class InternalError(AssertionError):
    """Surefoot itself is at fault: a pass left a graph that breaks the specification."""


class KernelError(InternalError, RuntimeError):
    """A kernel was stopped by an error; the text says which kernel, why, and what may have been written."""


class CheckpointError(ValueError):
    """A file is not a whole checkpoint: truncated, corrupted, forged, or of another kind."""
