"""The examples of several processes run, and both wrappers train alike."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each example prints on two processes."""
    script, folder = Path(__file__).with_name("forked_examples.py"), tmp_path_factory.mktemp("examples")
    command = [sys.executable, script, folder, *sorted(EXAMPLES.glob("*.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_examples_learn(printed):
    assert len(printed) == 2
    for output in printed.values():
        losses = [float(loss) for loss in re.findall(r"loss (\S+)", output)]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] / 1.5
        assert "of the letters are foretold" in output


def test_sharded_training_is_that_of_ddp(printed):
    ddp, fsdp = ([float(loss) for loss in re.findall(r"loss (\S+)", output)] for output in printed.values())
    assert fsdp == pytest.approx(ddp, rel=1e-3)
