"""What a run's telemetry says, in words: what blew up first, whether the learning rate suits, what clipping did."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from surefoot.telemetry.reading import Line
from surefoot.telemetry.report.condense import Curves

RULE_OF_THUMB = 1e-3
"""The usual update-to-weight ratio."""
JUMP = 10.0
"""A gradient norm this many times the parameter's usual one is a jump."""
_MEMORY = 50
_WARM_UP = 20
_SIGN = 3.0
_OUTLYING = 1.0
_HUGE = 1e6
_STRETCH = 5


@dataclass(frozen=True)
class Finding:
    """A sentence or two.

    Attributes:
        kind: "good", "note" or "bad".
        title: what it is about, in a few words.
        text: what was found; names of parameters stand in backquotes.
    """

    kind: str
    title: str
    text: str


@dataclass(frozen=True)
class _Event:
    """Something that happened to some parameters in a step.

    Attributes:
        step: the step.
        names: the parameters.
        of: how many there are.
        striking: the most striking of them.
        factor: how many times its usual gradient norm, or its first one, this parameter had.
        usual: whether its usual one was known.
    """

    step: int
    names: tuple[str, ...]
    of: int
    striking: str
    factor: float
    usual: bool = True


class Findings:
    """Watches a run go by."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._usual = _Usual(0)
        self._ratios = _Usual(0)
        self._last_factor = np.zeros(0)
        self._broken: _Event | None = None
        self._growing: _Event | None = None
        self._calm = 0
        self._sign: _Event | None = None
        self._jump: _Event | None = None
        self._greatest: _Event | None = None
        self._broken_steps: list[int] = []
        self._last = 0

    def add(self, line: Line) -> None:
        """Take a step."""
        if line.names != self._names:
            self._names = line.names
            self._usual, self._ratios = _Usual(len(line.names)), _Usual(len(line.names))
            self._last_factor = np.ones(len(line.names))
        self._forget_from(line.step)
        broken = (line.nonfinite > 0) | ~np.isfinite(line.grad) | ~np.isfinite(line.param)
        factors = self._usual.factors(line.grad)
        if broken.any():
            self._note_broken(line.step, broken)
        if factors.size:
            self._note_growth(line.step, factors)
        self._last_factor = np.where(broken, self._last_factor, np.maximum(factors, self._usual.growth(line.grad)))
        self._usual.add(line.grad)
        self._ratios.add(line.update_ratio)
        self._last = line.step

    def _note_broken(self, step: int, broken: np.ndarray) -> None:
        self._broken_steps.append(step)
        if self._broken is None:
            self._broken = self._event(step, broken, np.where(broken, self._last_factor, 0))
            self._sign = self._growing

    def _note_growth(self, step: int, factors: np.ndarray) -> None:
        event = self._event(step, factors >= JUMP, factors)
        self._calm = 0 if event.names else self._calm + 1
        if event.names:
            self._jump, self._growing = self._jump or event, self._growing or event
        elif self._calm > _WARM_UP:
            self._growing = None
        if self._greatest is None or event.factor > self._greatest.factor:
            self._greatest = event

    def _event(self, step: int, which: np.ndarray, factors: np.ndarray) -> _Event:
        most = int(factors.argmax())
        names = tuple(self._names[index] for index in np.flatnonzero(which))
        return _Event(
            step, names, len(self._names), self._names[most], float(factors[most]), bool(self._usual.known[most])
        )

    def _forget_from(self, step: int) -> None:
        """Forget what a run did before it went back to an earlier step."""
        for name in ("_broken", "_growing", "_sign", "_jump", "_greatest"):
            event: _Event | None = getattr(self, name)
            if event is not None and event.step >= step:
                setattr(self, name, None)
        while self._broken_steps and self._broken_steps[-1] >= step:
            self._broken_steps.pop()

    def words(self, curves: Curves) -> list[Finding]:
        """Say what was found."""
        steps = np.array(curves.steps)
        found = [self._blow_up(), self._learning_rate(curves["update_ratio"], steps), _clipping(curves["clip"])]
        return [*found, *_skipping(curves["skipped"], steps), _time(curves["seconds"])]

    def _blow_up(self) -> Finding:
        title = "Which layer blew up first?"
        if self._broken is not None:
            text = " ".join(_broken_text(self._broken, self._sign))
            if self._broken_steps[-1] == self._last:
                return Finding("bad", title, text)
            return Finding("note", title, f"{self._recovery()} The first time: {text}")
        if self._jump is not None:
            return Finding("note", title, " ".join(self._jump_text(self._jump)))
        text = "None: no gradient was inf or NaN, and none was ten times its usual norm."
        return Finding("good", title, " ".join([text, *self._greatest_text()]))

    def _recovery(self) -> str:
        count = len(self._broken_steps)
        times = f"{count:,} steps, the last of them {self._broken_steps[-1]:,}" if count > 1 else "one step"
        return f"None for good: gradients were inf or NaN in {times}, and the run went on."

    def _jump_text(self, jump: _Event) -> Iterator[str]:
        others = len(jump.names) - 1
        also = f", and with it those of {others} more of {jump.of} parameters" if others else ""
        yield "None for good: no gradient was inf or NaN."
        yield f"But {_layer(jump.striking)} jumped first: in step {jump.step} its gradient norm was"
        yield f"{_times(jump.factor)} its usual one{also}."
        if self._greatest is not None and self._greatest.step != jump.step:
            yield from self._greatest_text()

    def _greatest_text(self) -> Iterator[str]:
        if (greatest := self._greatest) is not None and greatest.factor > 1:
            yield f"The largest jump was to {_times(greatest.factor)} the usual, of `{greatest.striking}` in step"
            yield f"{greatest.step}."

    def _learning_rate(self, ratios: np.ndarray, steps: np.ndarray) -> Finding:
        title = "Is the learning rate too high?"
        usable = np.isfinite(ratios) & (ratios > 0)
        if not usable.any():
            return Finding("note", title, "This cannot be told: no step changed the weights.")
        median = float(np.median(ratios[usable]))
        kind, verdict = _verdict(median)
        text = f"{verdict} A step changes the weights by {median:.2g} of their norm (median); about 1e-3 is usual."
        if (worst := _worst(ratios[usable], steps[usable])) and kind != "bad":
            kind, text = "bad", f"At times. {worst} {text.removeprefix(verdict).strip()}"
        return Finding(kind, title, " ".join([text, *self._extremes()]))

    def _extremes(self) -> Iterator[str]:
        """Name the parameters that move most and least in proportion, if they differ much from one another."""
        ratios = self._ratios.mean()
        if len(ratios) and np.nanmax(ratios) > JUMP * np.nanmin(ratios):
            most, least = int(np.nanargmax(ratios)), int(np.nanargmin(ratios))
            yield (
                f"`{self._names[most]}` moves most, by {ratios[most]:.2g}, `{self._names[least]}` least, by "
                f"{ratios[least]:.2g}; small weights such as biases move much in proportion."
            )


class _Usual:
    """Geometric means of positive numbers, recent ones weighing more and outliers less."""

    def __init__(self, count: int) -> None:
        self._log = np.zeros(count)
        self._first = np.zeros(count)
        self._seen = np.zeros(count)

    def add(self, values: np.ndarray) -> None:
        good = np.isfinite(values) & (values > 0)
        self._seen += good
        weight = 1 / np.clip(self._seen, 1, _MEMORY)
        logs = np.log(values, out=self._log.copy(), where=good)
        outlying = np.where(self._seen > _WARM_UP, _OUTLYING, np.inf)
        self._log += weight * np.clip(logs - self._log, -outlying, outlying)
        self._first = np.where(good & (self._seen == 1), logs, self._first)

    def mean(self) -> np.ndarray:
        """Return the means; NaN where there was nothing."""
        means: np.ndarray = np.where(self._seen > 0, np.exp(self._log), np.nan)
        return means if (self._seen > 0).any() else np.zeros(0)

    @property
    def known(self) -> np.ndarray:
        """Return whether enough was seen to tell what is usual."""
        known: np.ndarray = self._seen >= _WARM_UP
        return known

    def factors(self, values: np.ndarray) -> np.ndarray:
        """Return how many times their means values are; 0 for what is not finite, or seen too seldom."""
        return _times_as_much(values, self._log, self.known)

    def growth(self, values: np.ndarray) -> np.ndarray:
        """Return how many times their first values are that were seen too seldom; 1 for others, and for less."""
        growth: np.ndarray = np.maximum(_times_as_much(values, self._first, (self._seen > 0) & ~self.known), 1)
        return growth


def _times_as_much(values: np.ndarray, logs: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return how many times `exp(logs)` values are; 0 for what is not finite, or not asked for."""
    asked = asked & np.isfinite(values)
    with np.errstate(over="ignore"):
        factors: np.ndarray = np.where(asked, np.where(asked, values, 0) / np.exp(logs), 0)
    return factors


def _broken_text(event: _Event, sign: _Event | None) -> Iterator[str]:
    which = "all" if len(event.names) == event.of else f"{len(event.names)} of {event.of}"
    if sign is not None:
        yield (
            f"{_sentence(_layer(sign.striking))} went first: in step {sign.step} its gradient norm was "
            f"{_times(sign.factor)} its usual one. In step {event.step} the gradients of {which} parameters became inf "
            f"or NaN; before that, `{event.striking}` had grown to {_times(event.factor)} its usual."
        )
    elif len(event.names) == 1:
        yield f"{_sentence(_layer(event.names[0]))}: in step {event.step} its gradient was the first to be inf or NaN."
    else:
        yield f"In step {event.step} the gradients of {which} parameters became inf or NaN at once."
        yield _culprit(event)


def _culprit(event: _Event) -> str:
    if event.factor >= _SIGN:
        return (
            f"{_sentence(_layer(event.striking))} is the one to look at: before that its gradient norm had grown to "
            f"{_times(event.factor)} its {'usual' if event.usual else 'first'} one."
        )
    if len(event.names) == event.of:
        return "None of them had grown before, so look at the loss and the batch of that step rather than at a layer."
    last = _sentence(_layer(event.names[-1]))
    return f"{last} stands last among them in the model, so that the backward pass met it first."


def _layer(name: str) -> str:
    """Name a layer and which of its parameters it is."""
    layer, _, own = name.rpartition(".")
    return f"layer `{layer}` (its `{own}`)" if layer else f"`{name}`"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _times(factor: float) -> str:
    digits = ".1f" if factor < _SIGN else ",.0f" if factor < _HUGE else ".1e"
    return f"{factor:{digits}} times".replace("e+", "e")


_VERDICTS = (
    (10.0, "bad", "Probably: the updates are large."),
    (3.0, "note", "It is on the high side."),
    (0.3, "good", "No."),
    (0.1, "note", "No, rather on the low side."),
    (0.0, "note", "No, probably too low: the updates are small."),
)


def _worst(ratios: np.ndarray, steps: np.ndarray) -> str:
    """Say in which stretch after the start updates were largest, if they were far too large there."""
    length = max(_STRETCH, len(ratios) // 100)
    starts = range(len(ratios) // 20, len(ratios) - length + 1, max(1, length // 2))
    medians = [float(np.median(ratios[start : start + length])) for start in starts]
    if not medians or max(medians) < _VERDICTS[0][0] * RULE_OF_THUMB:
        return ""
    start = starts[int(np.argmax(medians))]
    first, last = steps[start], steps[start + length - 1]
    return f"In steps {first} to {last} the updates were {max(medians):.2g} of the weights."


def _verdict(median: float) -> tuple[str, str]:
    return next((kind, text) for least, kind, text in _VERDICTS if median >= least * RULE_OF_THUMB)


def _clipping(clip: np.ndarray) -> Finding:
    title = "What does clipping do?"
    clipped = clip[np.isfinite(clip) & (clip < 1)]
    if not len(clipped):
        return Finding("good", title, "Nothing: no step was clipped.")
    share, mean = len(clipped) / len(clip), float(clipped.mean())
    text = f"{len(clipped):,} of {len(clip):,} steps ({share:.1%}) were clipped, by a factor of {mean:.2g} on average"
    text += f" and {clipped.min():.2g} at most."
    if share > 1 / 2:
        text += " Most steps are clipped, so that the limit rather than the gradient sets the size of the updates."
    return Finding("note" if share > 1 / 2 else "good", title, text)


def _skipping(skipped: np.ndarray, steps: np.ndarray) -> Iterator[Finding]:
    if not skipped[-1]:
        return
    share = skipped[-1] / steps[-1]
    text = f"{int(skipped[-1]):,} of {int(steps[-1]):,} steps ({share:.1%}) were skipped because of inf or NaN."
    if share > 1 / 2:
        text += " This run did nothing most of the time."
    yield Finding("bad" if share > 1 / 20 else "note", "Were steps skipped?", text)


def _time(seconds: np.ndarray) -> Finding:
    seconds = seconds[np.isfinite(seconds)]
    if not len(seconds):
        return Finding("note", "How long does a step take?", "This cannot be told: no time is a finite number.")
    median, late = (1e3 * float(np.quantile(seconds, q)) for q in (0.5, 0.99))
    text = f"{median:.3g} ms in the median, {late:.3g} ms in the slowest hundredth; {seconds.sum():,.1f} s in all."
    return Finding("good", "How long does a step take?", text)
