"""Files that are not what `JsonLines` writes: every one is read, or refused with the number of the line."""

import json
import re
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surefoot.telemetry import read, reading
from surefoot.telemetry.report import condense, write_report

HEADER = {"surefoot": "0.1", "format": 1, "time": 0.0, "names": ["a", "b"]}
STEP = {
    "step": 1,
    "time": 0.0,
    "seconds": 0.1,
    "clip": 1.0,
    "skipped": 0,
    "lr": 0.1,
    "grad": [1.0, 2.0],
    "param": [1.0, 2.0],
    "update": [0.1, 0.2],
    "max": [1.0, 2.0],
    "nonfinite": {},
}


def written(path, *lines):
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines), encoding="utf-8")
    return path


def changed(name, value):
    """Return a step as text, with a value that `json` may not be able to write."""
    return json.dumps(STEP | {name: "@"}).replace('"@"', value)


MOST = sys.float_info.max

BROKEN = [
    ("step", "1e400", "`step` must be a whole number from 1 on, but is inf"),
    ("step", "NaN", "`step` must be a whole number from 1 on, but is nan"),
    ("step", "0", "`step` must be a whole number from 1 on, but is 0"),
    ("step", "-3", "from 1 on, but is -3"),
    ("step", "1.5", "from 1 on, but is 1.5"),
    ("step", "true", "from 1 on, but is True"),
    ("step", '"7"', "from 1 on, but is '7'"),
    ("step", "null", "from 1 on, but is None"),
    ("step", "9" * 30, "from 1 on, but is 99999"),
    ("step", "9" * 5000, "ValueError: Exceeds the limit"),
    ("skipped", "1e400", "`skipped` must be a whole number from 0 on, but is inf"),
    ("skipped", "[1]", "`skipped` must be a whole number from 0 on, but is [1]"),
    ("clip", "[[1]]", "`clip` has [[1]], which is not a number"),
    ("clip", "{}", "`clip` has {}, which is not a number"),
    ("seconds", '"soon"', "`seconds` has 'soon', which is not a number"),
    ("seconds", "null", "`seconds` has None, which is not a number"),
    ("seconds", "1" + "0" * 400, "`seconds` has a number that is too large"),
    ("lr", "null", "`lr` has None, which is not a number"),
    ("lr", "[1]", "`lr` has 1 numbers for 2 parameters"),
    ("lr", '{"a": 1}', "`lr` has {'a': 1}, which is not a number"),
    ("grad", "[[1, 2], [3, 4]]", "`grad` has [1, 2], which is not a number"),
    ("grad", "[1, [2, 3]]", "`grad` has [2, 3], which is not a number"),
    ("grad", "[1, true]", "`grad` has True, which is not a number"),
    ("grad", '[1, "1e5"]', "`grad` has '1e5', which is not a number"),
    ("grad", "[1]", "`grad` has 1 numbers for 2 parameters"),
    ("grad", "7", "`grad` must be a list, but is 7"),
    ("grad", '{"0": 1, "1": 1}', "`grad` must be a list, but is {"),
    ("grad", "[" * 100_000 + "]" * 100_000, "RecursionError"),
    ("max", "[1, " + "1" + "0" * 400 + "]", "`max` has a number that is too large"),
    ("nonfinite", "[]", "`nonfinite` must be an object, but is []"),
    ("nonfinite", '{"2": 1}', "`nonfinite` has '2', which is not a number of a parameter"),
    ("nonfinite", '{"-1": 1}', "`nonfinite` has '-1', which is not a number of a parameter"),
    ("nonfinite", '{"²": 1}', "`nonfinite` has '\\xb2', which is not a number of a parameter"),
    ("nonfinite", '{"' + "1" * 5000 + '": 1}', "which is not a number of a parameter"),
    ("nonfinite", '{"0": 1e400}', "`0` must be a whole number from 0 on, but is inf"),
    ("nonfinite", '{"0": "x"}', "`0` must be a whole number from 0 on, but is 'x'"),
]


@pytest.mark.parametrize(("name", "value", "message"), BROKEN, ids=[f"{name}={value:.20}" for name, value, _ in BROKEN])
def test_a_value_that_is_none_is_refused_with_its_line(tmp_path, name, value, message):
    path = written(tmp_path / "run.jsonl", HEADER, STEP, changed(name, value), STEP)
    with pytest.raises(ValueError, match=rf"run\.jsonl: line 3 is broken \(.*{re.escape(message)}.*remove it to read"):
        write_report(path, tmp_path / "run.html")
    assert not (tmp_path / "run.html").exists()


@pytest.mark.parametrize("name", sorted(STEP.keys() - {"time"}))
def test_a_value_that_is_missing_is_named(tmp_path, name):
    path = written(tmp_path / "run.jsonl", HEADER, {key: STEP[key] for key in STEP if key != name}, STEP)
    with pytest.raises(ValueError, match=f"line 2 is broken .it has no `{name}`"):
        list(read(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5", "5 is not an object"),
        ('"names"', "'names' is not an object"),
        ('["names"]', "is not an object"),
        ("[" * 100_000, "RecursionError"),
        ('{"names": [["a"]], "format": 1}', "`names` must be a list of strings, but is [['a']]"),
        ('{"names": "ab", "format": 1}', "`names` must be a list of strings, but is 'ab'"),
        ('{"names": null, "format": 1}', "`names` must be a list of strings, but is None"),
        ('{"names": ["a", "a"], "format": 1}', "`names` holds a name twice"),
        ('{"names": ["a"]}', "it has no `format`"),
        ('{"names": ["a"], "format": "1"}', "`format` must be a whole number from 0 on, but is '1'"),
        ("\x00", "JSONDecodeError"),
    ],
)
def test_a_header_that_is_none(tmp_path, line, message):
    path = written(tmp_path / "run.jsonl", line, STEP)
    with pytest.raises(ValueError, match=rf"is not a telemetry file: .*line 1: .*{re.escape(message)}"):
        list(read(path))
    path = written(tmp_path / "run.jsonl", HEADER, STEP, line, STEP)
    with pytest.raises(ValueError, match=rf"line 3 is broken .*{re.escape(message)}"):
        list(read(path))


def test_a_newer_format_says_where(tmp_path):
    path = written(tmp_path / "run.jsonl", HEADER, STEP, HEADER | {"format": 9})
    with pytest.raises(ValueError, match=r"line 3 was written by surefoot 0.1, in a newer format \(9\)"):
        list(read(path))
    path = written(tmp_path / "run.jsonl", '{"names": [], "format": 9}')
    with pytest.raises(ValueError, match=r"line 1 was written by surefoot of a later version, in a newer"):
        list(read(path))


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_LONGEST", 1000)
    path = written(tmp_path / "run.jsonl", HEADER, STEP, "[" + "1," * 1000, STEP)
    with pytest.raises(ValueError, match="line 3 is broken .it is longer than 1,000 bytes"):
        list(read(path))


def test_what_is_odd_but_right_is_read(tmp_path):
    steps = [
        STEP | {"grad": [1, "inf"], "update": ["nan", "-inf"], "lr": ["nan", 1], "step": 2**62, "nonfinite": {"1": 3}},
        json.dumps(STEP | {"step": 2**63 - 1}).replace("[1.0, 2.0]", "[1e308, 1e400]"),
    ]
    path = written(tmp_path / "run.jsonl", HEADER, *steps)
    first, last = read(path)
    assert first.step == 2**62
    assert first.nonfinite.tolist() == [0, 3]
    assert last.grad.tolist() == [1e308, float("inf")]
    assert write_report(path, tmp_path / "run.html")


def test_a_run_without_parameters_has_a_page(tmp_path):
    nothing = {name: [] for name in ("grad", "param", "update", "max", "lr")}
    path = written(tmp_path / "run.jsonl", HEADER | {"names": []}, *(STEP | nothing | {"step": n} for n in (1, 2, 3)))
    assert write_report(path, tmp_path / "run.html")
    assert "0 parameters" in (tmp_path / "run.html").read_text(encoding="utf-8")


def test_times_that_are_not_finite(tmp_path):
    path = written(tmp_path / "run.jsonl", HEADER, STEP | {"seconds": "inf"}, STEP | {"step": 2, "seconds": "nan"})
    assert write_report(path, tmp_path / "run.html")[-1].text == "This cannot be told: no time is a finite number."
    path = written(path, HEADER, STEP | {"seconds": 1e308}, STEP | {"step": 2, "seconds": 1e308})
    assert "ms in the median" in write_report(path, tmp_path / "run.html")[-1].text


def test_the_largest_numbers_stay_finite(tmp_path, monkeypatch):
    """Five digits of them are more than a float64 holds, and so may be their mean."""
    monkeypatch.setattr(condense, "POINTS", 2)
    steps = [STEP | {"step": step, "lr": [-MOST, MOST], "clip": MOST} for step in range(1, 7)]
    assert write_report(written(tmp_path / "run.jsonl", HEADER, *steps), tmp_path / "run.html")
    assert write_report(written(tmp_path / "run.jsonl", HEADER, STEP | {"seconds": 1.79765e308}), tmp_path / "run.html")


def test_names_that_utf_8_cannot_write(tmp_path):
    """Half of a pair of surrogates is a string in JSON."""
    lines = (STEP | {"step": step, "grad": ["nan" if step == 2 else 1, 1]} for step in (1, 2, 3))
    path = written(tmp_path / "run.jsonl", HEADER | {"names": ["\ud800", "</script>\x1b[31m"]}, *lines)
    words = write_report(path, tmp_path / "run.html")
    assert any("\ud800" in one.text for one in words)
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2


NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([1e308, -1e308, 5e-324, 0, 10**400, "inf", "-inf", "nan"])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("01a-", max_size=2), inner, max_size=2),
    max_leaves=4,
)
GOOD = {
    "step": st.integers(1, 50),
    "skipped": st.integers(0, 2**63 - 1),
    "nonfinite": st.dictionaries(st.sampled_from(["0", "1"]), st.integers(0, 2**63 - 1)),
    "lr": NUMBERS | st.lists(NUMBERS, min_size=2, max_size=2),
    "clip": NUMBERS,
    "seconds": NUMBERS,
    **{name: st.lists(NUMBERS, min_size=2, max_size=2) for name in ("grad", "param", "update", "max")},
}


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.fixed_dictionaries(GOOD), min_size=1, max_size=30), st.data())
def test_whatever_a_file_holds_there_is_a_page_or_a_line(tmp_path_factory, steps, data):
    folder = tmp_path_factory.mktemp("fuzz")
    if data.draw(st.booleans()):
        step = data.draw(st.sampled_from(steps))
        step[data.draw(st.sampled_from(sorted(step)))] = data.draw(VALUES)
    path = written(folder / "run.jsonl", HEADER, *steps, "{}")
    try:
        words = write_report(path, folder / "run.html")
    except ValueError as error:
        assert re.search(r"run\.jsonl: line \d+ is broken|has no step yet", str(error))  # noqa: PT017
        assert not (folder / "run.html").exists()
    else:
        assert words
        page = (folder / "run.html").read_text(encoding="utf-8")
        json.loads(re.search(r'id="data">(.*?)</script>', page)[1], parse_constant=pytest.fail)
