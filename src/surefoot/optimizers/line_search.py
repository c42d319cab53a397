"""A line search for the strong Wolfe conditions; it knows losses and slopes along a line, and nothing of parameters.

Nocedal & Wright 2006, "Numerical Optimization", algorithms 3.5 and 3.6.  Slopes are 0-d tensors on the host, in the
precision of the gradient, and so are most steps: host arithmetic costs no synchronization, and rounds as torch's does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

SUFFICIENT_DECREASE = 1e-4
"""c1 of the first Wolfe condition: loss(t) <= loss(0) + c1 t slope(0)."""
CURVATURE = 0.9
"""c2 of the second one: |slope(t)| <= c2 |slope(0)|."""

NARROWEST = 1e-9
"""A bracket in which no parameter moves further than this is not narrowed any more; torch's value, whatever
`tolerance_change` is."""

Step = Any
"""A step length: a number or a 0-d tensor on the host, and arithmetic need not know which."""


class Trial(NamedTuple):
    """What is known about one point of the line.

    Attributes:
        step: its distance t from the start, in lengths of the direction.
        loss: the loss there; never NaN, except at the start.
        slope: the derivative of the loss by t.
        grad: the gradient.
    """

    step: Step
    loss: float
    slope: Tensor
    grad: Tensor


class StrongWolfe:
    """Find a step where the loss is lower by enough and its slope flatter by enough.

    Args:
        evaluate: gives the trial at a step.  A point without a value has the loss inf.
        start: the trial at step 0; its slope is negative.
        longest: gives the largest element of the direction, which tells when a bracket is too narrow.
        budget: how many trials there may be.
    """

    def __init__(
        self,
        evaluate: Callable[[Step], Trial],
        start: Trial,
        longest: Callable[[], Tensor],
        budget: float,
    ) -> None:
        self.evaluate = evaluate
        self.start = start
        self.longest = longest
        self.budget = budget
        self.trials = 0

    def search(self, step: Step) -> Trial:
        """Go outwards from `step` until a good step is found or bracketed (algorithm 3.5).

        Returns:
            The trial to go on from: one that meets both conditions, or the lowest one when the budget is used up.
        """
        previous = self.start
        if step == 0:
            return previous
        trial = self._try(step)
        while True:
            if self._too_high(trial) or (self.trials > 2 and trial.loss >= previous.loss):  # noqa: PLR2004 (as torch)
                return self._zoom([previous, trial])
            if self._flat(trial):
                return trial
            if trial.slope >= 0:
                return self._zoom([previous, trial])
            if self.trials >= self.budget:
                return min(self.start, trial, key=lambda end: end.loss)
            previous, trial = trial, self._try(_farther(previous, trial))

    def _zoom(self, ends: list[Trial]) -> Trial:
        """Narrow a bracket around a good step (algorithm 3.6)."""
        longest = self.longest()
        low, hesitant = _lower(ends), False
        while self.trials < self.budget:
            if abs(ends[1].step - ends[0].step) * longest < NARROWEST:
                break
            step, hesitant = _between(ends, hesitant=hesitant)
            trial = self._try(step)
            if self._too_high(trial) or trial.loss >= ends[low].loss:
                ends[1 - low] = trial
                low = _lower(ends)
                continue
            if self._flat(trial):
                return trial
            if trial.slope * (ends[1 - low].step - ends[low].step) >= 0:
                ends[1 - low] = ends[low]
            ends[low] = trial
        return ends[low]

    def _try(self, step: Step) -> Trial:
        self.trials += 1
        return self.evaluate(step)

    def _too_high(self, trial: Trial) -> bool:
        return bool(trial.loss > self.start.loss + SUFFICIENT_DECREASE * trial.step * self.start.slope)

    def _flat(self, trial: Trial) -> bool:
        return bool(abs(trial.slope) <= -CURVATURE * self.start.slope)


def _lower(ends: list[Trial]) -> int:
    """Tell which end has the lower loss; the first one, if they are level."""
    return 0 if ends[0].loss <= ends[1].loss else 1


def _farther(previous: Trial, trial: Trial) -> Step:
    """Extrapolate beyond `trial`, up to ten times its step."""
    nearest = trial.step + 0.01 * (trial.step - previous.step)
    return cubic_minimum(previous, trial, nearest, trial.step * 10)


def _between(ends: list[Trial], *, hesitant: bool) -> tuple[Step, bool]:
    """Interpolate between the ends of a bracket, and keep away from them where that would be slow.

    A step within a tenth of the bracket from an end is allowed once; the next time, or outside, it is moved inwards.

    Returns:
        The step, and whether it is one of those allowed once.
    """
    steps = [end.step for end in ends]
    left, right = min(steps), max(steps)
    margin = 0.1 * (right - left)
    step = cubic_minimum(ends[0], ends[1], left, right)
    if min(right - step, step - left) >= margin:
        return step, False
    if left < step < right and not hesitant:
        return step, True
    return (right - margin if abs(step - right) < abs(step - left) else left + margin), False


def cubic_minimum(one: Trial, other: Trial, low: Step, high: Step) -> Step:
    """Find where the cubic through two trials, losses and slopes, is least (equation 3.59).

    Args:
        one: a trial.
        other: another one, at a different step.
        low: least step allowed.
        high: greatest step allowed.

    Returns:
        The minimizer, moved into `[low, high]`; the middle if the cubic has none.
    """
    middle = (low + high) / 2.0
    if one.step == other.step:
        return middle
    left, right = (one, other) if one.step <= other.step else (other, one)
    mean = left.slope + right.slope - 3 * (left.loss - right.loss) / (left.step - right.step)
    root = (mean**2 - left.slope * right.slope).sqrt()
    fraction = (right.slope + root - mean) / (right.slope - left.slope + 2 * root)
    step = right.step - (right.step - left.step) * fraction
    return middle if step.isnan() else min(max(step, low), high)
