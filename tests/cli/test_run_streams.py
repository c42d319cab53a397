"""`surefoot run` of scripts that close or replace their streams: the report comes all the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.run_helpers import start, surefoot_run
from surefoot.run.settings import Settings


def hooked(*arguments, **options):
    """Run Python as `surefoot run` does: what it becomes, without what came before."""
    return start(*arguments, **Settings("train.py", **options).environment())


@pytest.mark.parametrize(
    "end",
    [
        "sys.stdout.close()",
        "os.close(1)",
        "print('x'); os.close(1)",
        "sys.stdout = None",
        "sys.stdout = object()",
        "del sys.stdout",
        "sys.stdout = open('/dev/full', 'w'); print('lost')",
        "sys.stderr = io.StringIO(); sys.stderr.close()",
        "sys.stderr = None",
        "sys.stderr = object()",
        "sys.stderr = io.TextIOWrapper(open(2, 'wb', closefd=False), encoding='ascii', errors='strict')",
        "sys.stderr = open(2, 'w', encoding='ascii', errors='strict', closefd=False)",
    ],
)
def test_a_script_may_close_its_streams(tmp_path, end):
    path = tmp_path / "train.py"
    path.write_text(f"import io, os, sys\n{end}\n")
    plain_code, _, plain_error = start(path)
    code, _, error = hooked(path)
    assert code == plain_code
    assert error.count("no optimizer took a step") == 1
    assert ("Traceback" in error) == ("Traceback" in plain_error)


def test_nobody_reads_the_output(tmp_path):
    """As in `surefoot run train.py | head -1`."""
    path = tmp_path / "train.py"
    path.write_text("import os\nos.read(0, 1)\nprint('x' * 100_000)\n")
    command = [sys.executable, "-m", "surefoot", "run", str(path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:  # noqa: S603
        process.stdout.close()
        _, error = process.communicate(b"x")
    assert error.count(b"surefoot run: train.py took") == 1


@pytest.mark.parametrize("place", ["gone/report.json", "report.json"])
@pytest.mark.parametrize("quiet", [False, True], ids=["", "quiet"])
def test_a_json_report_that_cannot_be_written_does_not_take_the_other_with_it(tmp_path, place, quiet):
    (tmp_path / "gone").mkdir()
    path = tmp_path / "train.py"
    path.write_text(f"import os\nos.rmdir({str(tmp_path / 'gone')!r})\nos.mkdir({str(tmp_path / 'report.json')!r})\n")
    code, _, error = hooked(path, json=str(tmp_path / place), quiet=quiet)
    assert code == 0
    assert "Traceback" not in error
    assert error.count("surefoot run: train.py took") == (not quiet)
    assert f"surefoot run: the report was not written to {tmp_path / place}: " in error


def test_a_json_report_is_written_to_what_is_there(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("")
    (tmp_path / "report.json").write_text("old")
    assert surefoot_run("-q", "--json", tmp_path / "report.json", path)[0] == 0
    assert json.loads((tmp_path / "report.json").read_text())["script"] == "train.py"
    assert sorted(os.listdir(tmp_path)) == ["report.json", "train.py"]  # noqa: PTH208
    if Path("/dev/full").exists():
        assert "No space left on device" in surefoot_run("-q", "--json", "/dev/full", path)[2]
