"""The examples give the same loss with our optimizers as with torch's."""

import contextlib
import functools
import io
import json
import runpy

import pytest
import torch

from cli.run_helpers import EXAMPLES, surefoot_run
from surefoot.telemetry import read

SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
ALL = """
import runpy, sys
for path in sys.argv[1:]:
    runpy.run_path(path, run_name="__main__")
    print("END")
"""


@functools.cache
def plain(name):
    """Return what an example prints with torch's optimizers, run once."""
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return output.getvalue()


def final_loss(output):
    label, number = output.strip().splitlines()[-1].rsplit(" ", 1)
    assert label == "final loss"
    return float(number)


def test_examples_end_with_the_same_loss(tmp_path):
    """Engines other than the eager one may round a step differently in its last bit.

    Over some hundred steps that grew to less than the last digit printed in every example; the tolerance leaves room
    for other processors, whose matrix products round differently, and is far below what another seed gives.
    """
    (tmp_path / "all.py").write_text(ALL)
    code, output, error = surefoot_run(tmp_path / "all.py", *(EXAMPLES / name for name in SCRIPTS))
    assert code == 0, error
    *outputs, _ = output.split("END\n")
    losses = dict(zip(SCRIPTS, map(final_loss, outputs), strict=True))
    assert losses == pytest.approx({name: final_loss(plain(name)) for name in SCRIPTS}, rel=2e-3)
    assert error.count("    engine ") == len(SCRIPTS)
    assert "not replaced" not in error


def test_the_eager_engine_gives_the_very_same_output_and_each_optimizer_a_file(tmp_path):
    name, folder, report = "spirals_one_cycle.py", tmp_path / "runs", tmp_path / "report.json"
    options = ("--telemetry", folder, "--json", report)
    code, output, error = surefoot_run(*options, EXAMPLES / name, SUREFOOT_ENGINE="eager")
    assert (code, output) == (0, plain(name)), error
    (path,) = folder.iterdir()
    assert path.name == "00-Adam.jsonl"
    assert json.loads(report.read_text())["optimizers"][0]["telemetry"] == str(path)
    assert f"    see      surefoot report {path}" in error
    lines = list(read(path))
    assert [line.step for line in lines] == list(range(1, 301))
    assert len(lines[0].names) == 6
    assert len({line.lrs[0] for line in lines}) == 300
    assert all(line.grad.min() > 0 for line in lines)
    assert all(line.seconds > 0 for line in lines)


def test_there_are_five_of_them():
    assert len(SCRIPTS) == 5
