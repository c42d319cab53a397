"""The examples of several processes run, and both wrappers train alike."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"


@pytest.fixture(scope="module")
def printed():
    """What each example prints on two processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    running = {
        path.stem: subprocess.Popen([*run, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603
        for path in sorted(EXAMPLES.glob("*.py"))
    }
    found = {}
    for name, process in running.items():
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        found[name] = output
    return found


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
