"""The report's parts: what is condensed equals what was measured, what is said in words is what happened."""

import base64
import itertools
import json
import math
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from surefoot.telemetry.reading import Line
from surefoot.telemetry.report import condense, write_report
from surefoot.telemetry.report.condense import QUANTITIES, Curves, Heat
from surefoot.telemetry.report.findings import Findings
from surefoot.telemetry.report.page import render_page

NAMES = ("embed.weight", "blocks.0.weight", "blocks.0.bias", "head.weight")


def line(step, grad=1.0, names=NAMES, **given):
    """Make a step of a quiet run; numbers stand for all parameters."""
    count = len(names)
    values = {"grad": grad, "param": 10.0, "update": 0.01, "max_grad": 0.5, "nonfinite": 0, "lrs": 0.1} | given
    arrays = {
        name: np.broadcast_to(np.asarray(values.pop(name), dtype=float), (count,)).copy()
        for name in ("grad", "param", "update", "max_grad", "nonfinite", "lrs")
    }
    return Line(step, names, **arrays, **({"clip": 1.0, "skipped": 0, "seconds": 0.002} | values))


def quiet(steps, seed=0):
    """Make steps whose gradients vary by some ten per cent."""
    generator = np.random.default_rng(seed)
    return [line(step, np.exp(generator.normal(0, 0.1, len(NAMES)))) for step in range(1, steps + 1)]


def broken(step, *which):
    """Make a step in which the gradients of some parameters are not finite; of all if none is given."""
    mask = np.isin(NAMES, which or NAMES)
    return line(step, np.where(mask, np.nan, 1.0), nonfinite=np.where(mask, 7, 0))


def words(lines):
    """Say what there is to say of a run: texts by title."""
    findings, curves = Findings(), Curves()
    for each in lines:
        findings.add(each)
        curves.add(each)
    return {finding.title: (finding.kind, finding.text) for finding in findings.words(curves)}


FIRST = "Which layer blew up first?"
RATE = "Is the learning rate too high?"
CLIP = "What does clipping do?"
SKIP = "Were steps skipped?"

# Words


def test_a_quiet_run():
    said = words(quiet(300))
    assert said[FIRST][0] == "good"
    assert said[FIRST][1].startswith(
        "None: no gradient was inf or NaN, and none was ten times its usual norm. The largest jump"
    )
    assert said[CLIP] == ("good", "Nothing: no step was clipped.")
    assert said["How long does a step take?"][1] == "2 ms in the median, 2 ms in the slowest hundredth; 0.6 s in all."
    assert SKIP not in said


def test_one_layer_blows_up_alone():
    kind, text = words([*quiet(50), broken(51, "blocks.0.weight"), broken(52)])[FIRST]
    assert kind == "bad"
    assert text == "Layer `blocks.0` (its `weight`): in step 51 its gradient was the first to be inf or NaN."


def test_a_layer_grows_until_all_are_nan():
    growing = [line(51 + k, [1, 1, 1, 2.0**k]) for k in range(6)]
    kind, text = words([*quiet(50), *growing, broken(57)])[FIRST]
    assert kind == "bad"
    match = re.fullmatch(
        r"Layer `head` \(its `weight`\) went first: in step 55 its gradient norm was (\d+) times its usual one. "
        r"In step 57 the gradients of all parameters became inf or NaN; before that, `head.weight` had grown to (\d+) "
        r"times its usual\.",
        text,
    )
    assert 10 <= int(match[1]) <= 16
    assert 20 <= int(match[2]) <= 32


def test_a_little_growth_points_at_a_layer_too():
    growing = [line(51 + k, [1, 1, 1, 1.5**k]) for k in range(5)]
    text = words([*quiet(50), *growing, broken(56)])[FIRST][1]
    assert "In step 56 the gradients of all parameters became inf or NaN at once. Layer `head` (its `weight`)" in text
    assert re.search(
        r"is the one to look at: before that its gradient norm had grown to [45] times its usual one\.", text
    )


def test_a_jump_long_ago_is_no_sign():
    lines = [*quiet(50), line(51, [30, 1, 1, 1]), *quiet(200)[51:], broken(201)]
    assert "went first" not in words(lines)[FIRST][1]
    assert "went first" in words([*lines[:60], broken(61)])[FIRST][1]


def test_all_at_once_without_a_sign():
    assert words([*quiet(50), broken(51)])[FIRST][1] == (
        "In step 51 the gradients of all parameters became inf or NaN at once. None of them had grown before, so look "
        "at the loss and the batch of that step rather than at a layer."
    )


def test_some_at_once_the_one_nearest_the_loss():
    assert words([*quiet(50), broken(51, *NAMES[:3])])[FIRST][1] == (
        "In step 51 the gradients of 3 of 4 parameters became inf or NaN at once. Layer `blocks.0` (its `bias`) stands "
        "last among them in the model, so that the backward pass met it first."
    )


def test_a_run_that_went_on_after_steps_that_broke():
    kind, text = words([*quiet(50), broken(51), *quiet(60)[51:]])[FIRST]
    assert kind == "note"
    assert text.startswith(
        "None for good: gradients were inf or NaN in one step, and the run went on. The first time: In"
    )
    text = words([*quiet(50), broken(51), broken(52), *quiet(60)[52:]])[FIRST][1]
    assert "in 2 steps, the last of them 52, and the run went on. The first time: In step 51 the" in text


def test_a_jump_that_passes():
    jump = line(51, [30, 30, 1, 1])
    kind, text = words([*quiet(50), jump, *quiet(100)[51:], line(101, [1, 1, 1, 200])])[FIRST]
    assert kind == "note"
    assert "None for good: no gradient was inf or NaN. But layer `" in text
    assert "jumped first: in step 51 its gradient norm was" in text
    assert "and with it those of 1 more of 4 parameters." in text
    assert re.search(r"The largest jump was to (19|20)\d times the usual, of `head.weight` in step 101\.", text)


def test_growth_in_the_first_steps_is_measured_from_the_first():
    growing = [line(1 + k, [1, 1, 1, 10.0**k]) for k in range(8)]
    text = words([*growing, broken(9)])[FIRST][1]
    assert text.endswith(
        "Layer `head` (its `weight`) is the one to look at: before that its gradient norm had grown to 1.0e07 times "
        "its first one."
    )


def test_a_run_without_warm_up_is_not_judged_too_early():
    assert words([line(1, 1.0), line(2, 500.0)])[FIRST][0] == "good"


def test_what_came_after_a_checkpoint_is_forgotten():
    assert words([*quiet(50), broken(51), *quiet(60)[30:]])[FIRST][0] == "good"


@pytest.mark.parametrize(
    ("update", "kind", "verdict"),
    [
        (0.2, "bad", "Probably: the updates are large."),
        (0.05, "note", "It is on the high side."),
        (0.01, "good", "No. A step changes the weights by 0.001 of their norm (median); about 1e-3 is usual."),
        (0.002, "note", "No, rather on the low side."),
        (1e-5, "note", "No, probably too low: the updates are small."),
    ],
)
def test_the_learning_rate_is_judged_by_the_update_ratio(update, kind, verdict):
    found = words([line(step, update=update) for step in range(1, 30)])[RATE]
    assert found[0] == kind
    assert found[1].startswith(verdict)


def test_updates_that_are_too_large_at_times_are_found():
    kind, text = words([line(step, update=0.01 if step < 250 else 3.0) for step in range(1, 300)])[RATE]
    assert kind == "bad"
    assert text.startswith("At times. In steps 249 to 253 the updates were 0.3 of the weights. A step changes the")
    assert words([line(step, update=3.0 if step < 10 else 0.01) for step in range(1, 300)])[RATE][0] == "good"


def test_parameters_that_move_much_more_than_others_are_named():
    text = words([line(step, update=[0.01, 0.001, 0.5, 0.01]) for step in range(1, 30)])[RATE][1]
    assert "`blocks.0.bias` moves most, by 0.05, `blocks.0.weight` least, by 0.0001; small weights" in text


def test_a_run_that_changes_nothing_has_no_verdict():
    text = words([line(step, update=0) for step in range(1, 30)])[RATE]
    assert text == ("note", "This cannot be told: no step changed the weights.")


@pytest.mark.parametrize(
    ("factors", "kind", "text"),
    [
        (
            [0.5, 1, 1, 0.25],
            "good",
            "2 of 4 steps (50.0%) were clipped, by a factor of 0.38 on average and 0.25 at most.",
        ),
        (
            [0.1] * 9 + [1],
            "note",
            "9 of 10 steps (90.0%) were clipped, by a factor of 0.1 on average and 0.1 at most. Most",
        ),
    ],
)
def test_clipping_is_summed_up(factors, kind, text):
    found = words([line(step, clip=factor) for step, factor in enumerate(factors, 1)])[CLIP]
    assert found[0] == kind
    assert found[1].startswith(text)


@pytest.mark.parametrize(
    ("skipped", "kind", "text"),
    [
        (2, "note", "2 of 100 steps (2.0%) were skipped because of inf or NaN."),
        (
            90,
            "bad",
            "90 of 100 steps (90.0%) were skipped because of inf or NaN. This run did nothing most of the time.",
        ),
    ],
)
def test_skipped_steps_are_told(skipped, kind, text):
    assert words([line(step, skipped=min(step, skipped)) for step in range(1, 101)])[SKIP] == (kind, text)


# Condensing


def decoded(heat, quantity):
    """Read the codes of a quantity as a browser does."""
    coded = heat.coded(quantity)
    codes = np.frombuffer(base64.b64decode(coded["codes"]), "<u2").reshape(len(heat.rows()), len(heat.starts))
    values = 2.0 ** (coded["low"] + (codes.astype(float) - 3) / (65535 - 3) * (coded["high"] - coded["low"]))
    values[codes == condense.ABSENT] = np.nan
    values[codes == condense.NONFINITE] = np.inf
    values[codes == condense.ZERO] = 0
    return values


@settings(max_examples=12, deadline=None)
@given(steps=st.integers(1, 3000), every=st.integers(1, 7), seed=st.integers(0, 9))
@example(steps=condense.POINTS + 1, every=1, seed=0)
def test_the_heat_map_has_the_greatest_of_each_stretch(steps, every, seed):
    generator = np.random.default_rng(seed)
    values = np.exp(generator.normal(0, 10, (steps, 3)))
    values[generator.random(values.shape) < 0.01] = 0
    values[generator.random(values.shape) < 0.002] = np.nan
    heat = Heat()
    numbers = 1 + every * np.arange(steps)
    for step, row in zip(numbers, values, strict=True):
        heat.add(line(int(step), row, NAMES[:3]))
    assert len(heat.starts) <= condense.POINTS
    assert (len(heat.starts) == steps) == (steps <= condense.POINTS)
    starts = np.searchsorted(numbers, heat.starts)
    expected = np.maximum.reduceat(np.nan_to_num(values, nan=np.inf), starts).T
    np.testing.assert_allclose(decoded(heat, "grad"), expected, rtol=1e-3)
    assert heat.last == numbers[-1]


def test_the_more_parameters_the_fewer_columns(monkeypatch):
    monkeypatch.setattr(condense, "ROWS", 30)
    monkeypatch.setattr(condense, "CELLS", 600)
    monkeypatch.setattr(condense, "POINTS", 101)
    names, heat = [f"p{index}" for index in range(70)], Heat()
    for step in range(1, 401):
        count = 1 if step < 199 else 15 if step < 300 else len(names)
        heat.add(line(step, 1.0 + step % 97, names[:count]))
        assert len(heat.starts) * min(count, 30) <= 600
        assert len(heat.starts) >= min(step, 10)
        bounds = [*heat.starts, step + 1]
        greatest = [max(1.0 + each % 97 for each in range(*pair)) for pair in itertools.pairwise(bounds)]
        assert decoded(heat, "grad")[0].tolist() == pytest.approx(greatest, rel=1e-2)


def test_all_quantities_are_there():
    heat = Heat()
    heat.add(line(1, grad=3, param=20, update=0.5, max_grad=2))
    assert [decoded(heat, quantity)[0, 0] for quantity in QUANTITIES] == pytest.approx([3, 0.025, 0.5, 20, 2], rel=2e-3)


def test_elements_that_are_not_finite_show_though_the_norms_are():
    heat = Heat()
    heat.add(line(1, nonfinite=[0, 3, 0, 0]))
    assert decoded(heat, "grad")[:, 0].tolist() == pytest.approx([1, math.inf, 1, 1], rel=2e-3)
    assert np.isinf(decoded(heat, "max_grad")[1, 0])
    assert np.isfinite(decoded(heat, "param")).all()


def test_parameters_come_and_go():
    heat = Heat()
    for step, names in enumerate((NAMES[:2], NAMES[1:3], NAMES), 1):
        heat.add(line(step, names=names))
    assert heat.rows() == list(NAMES)
    present = ~np.isnan(decoded(heat, "grad"))
    assert present.tolist() == [[True, False, True], [True, True, True], [False, True, True], [False, False, True]]


def test_many_parameters_share_rows():
    names = tuple(f"p{index}" for index in range(2 * condense.ROWS + 1))
    heat = Heat()
    grad = np.ones(len(names))
    grad[4] = 8
    heat.add(line(1, grad, names))
    assert len(heat.rows()) <= condense.ROWS
    assert heat.rows()[1] == "p3 to p5"
    assert heat.rows()[-1] == "p1200"
    assert decoded(heat, "grad")[:3, 0].tolist() == pytest.approx([1, 8, 1], rel=2e-3)


@settings(max_examples=10, deadline=None)
@given(steps=st.integers(1, 5000), seed=st.integers(0, 9))
@example(steps=4 * condense.POINTS + 1, seed=0)
def test_curves_keep_least_greatest_and_mean(steps, seed):
    generator = np.random.default_rng(seed)
    seconds = generator.random(steps)
    seconds[generator.random(steps) < 0.01] = np.inf
    curves = Curves()
    for step, value in enumerate(seconds, 1):
        curves.add(line(step, names=NAMES[:1], seconds=value))
    bounds = curves.bounds()
    points = curves.points("seconds")
    assert len(points["mid"]) == len(bounds) - 1 == min(steps, condense.POINTS)
    assert (bounds[0], bounds[-1]) == (0, steps)
    finite = np.isfinite(seconds)
    lows, highs = points.get("low", points["mid"]), points.get("high", points["mid"])
    assert max(v for v in highs if v is not None) == pytest.approx(seconds[finite].max(), rel=1e-4)
    assert min(v for v in lows if v is not None) == pytest.approx(seconds[finite].min(), rel=1e-4)
    assert points["broken"] == sorted(set(np.searchsorted(bounds, np.flatnonzero(~finite), side="right") - 1))


def test_totals_are_over_all_parameters():
    curves = Curves()
    curves.add(line(1, [3, 4, 0, 0], param=[6, 8, 0, 0], update=[0, 0.01, 0, 0], lrs=[0.1, 0.2, 0.3, 0.3]))
    expected = {
        "grad": 5,
        "update_ratio": 1e-3,
        "lr_low": 0.1,
        "lr_high": 0.3,
        "clip": 1,
        "skipped": 0,
        "seconds": 0.002,
    }
    assert {name: curves[name][0] for name in Curves.NAMES} == pytest.approx(expected)


def test_a_run_that_went_back_counts_as_it_went_on():
    curves, heat = Curves(), Heat()
    for step, value in [(1, 1), (2, 1), (3, 9), (4, 9), (3, 2), (4, 2), (5, 2)]:
        curves.add(line(step, value))
        heat.add(line(step, value))
    assert list(curves.steps) == heat.starts == [1, 2, 3, 4, 5]
    assert curves["grad"].tolist() == [2, 2, 4, 4, 4]
    assert decoded(heat, "grad")[0].tolist() == pytest.approx([1, 1, 2, 2, 2], rel=2e-3)


# The page


def page_of(lines):
    curves, heat, findings = Curves(), Heat(), Findings()
    for each in lines:
        for part in (findings, curves, heat):
            part.add(each)
    return render_page("run.jsonl", findings.words(curves), curves, heat)


def test_the_page_asks_the_network_for_nothing():
    text = page_of(quiet(30))
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in text
    assert "{{" not in text


def test_names_do_no_harm():
    wicked = ("</script><script>alert(1)</script>", "a.`<b>`", "{{DATA}}", "\u2028")
    text = page_of([*[line(step, names=wicked) for step in range(1, 40)], line(40, math.nan, wicked, nonfinite=1)])
    assert text.count("<script") == text.count("</script>") == 2
    assert "<b>" not in text
    data = re.search(r'<script type="application/json" id="data">(.*)</script>', text)[1]
    assert json.loads(data)["heat"]["rows"] == list(wicked)


def test_charts_without_news_are_left_out():
    def titles(**given):
        data = re.search(r'id="data">(.*)</script>', page_of([line(step, **given) for step in (1, 2)]))[1]
        return [chart["title"] for chart in json.loads(data)["charts"]]

    always = ["gradient norm, before clipping", "update / weights", "learning rate", "step time, seconds"]
    assert titles() == always
    assert titles(clip=0.5, skipped=1) == [*always[:3], "clip factor", "steps skipped so far", always[3]]
    assert titles(lrs=[1, 2, 3, 4])[2] == "learning rates, least and greatest"


def test_the_page_of_a_long_run_of_a_large_model_is_bounded():
    names = tuple(f"layers.{index}.weight" for index in range(1500))
    generator = np.random.default_rng(0)
    grads = np.exp(generator.normal(0, 3, (50, len(names))))
    text = page_of(line(step, grads[step % 50], names, clip=1 / (1 + step % 3)) for step in range(1, 3001))
    assert len(text) < 3.5e6


def test_a_file_without_steps(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"surefoot":"0.1.0","format":1,"names":["w"]}\n')
    with pytest.raises(ValueError, match="has no step yet: it was written by a run that ended before its first flush"):
        write_report(path, tmp_path / "run.html")
    assert not (tmp_path / "run.html").exists()
