"""The errors that are surefoot's own.

Mistakes of a user raise the built-in types that torch.optim raises (ValueError, TypeError, RuntimeError);
what stands here is about what torch does not have.
"""


class RuleError(Exception):
    """A rule (an optimizer's `update` or `coefficients`) is not written as a rule must be."""


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds inf or NaN, and the optimizer was told to raise then (`nonfinite="raise"`)."""


class InternalError(AssertionError):
    """Surefoot itself is at fault: a pass left a graph that breaks the specification."""


class CheckpointError(ValueError):
    """A file is no whole checkpoint: truncated, corrupted, forged, or of another kind."""
