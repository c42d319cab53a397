"""`surefoot run --telemetry DIR`: each optimizer writes its telemetry there; test_run_examples.py reads such a file."""

import json
import sys

import pytest

from cli.run_helpers import surefoot_run
from surefoot.telemetry import read


def test_optimizers_do_not_share_a_file_and_copies_have_none(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import copy, torch\n"
        "for number in range(3):\n"
        "    weight = torch.nn.Parameter(torch.ones(3))\n"
        "    weight.grad = torch.ones(3)\n"
        "    torch.optim.AdamW([weight], lr=0.1).step()\n"
        "torch.optim.LBFGS([weight]).step(lambda: (weight**2).sum())\n"
        "copied = copy.deepcopy(torch.optim.AdamW([weight]))\n"
        "copied.param_groups[0]['params'][0].grad = torch.ones(3)\n"
        "copied.step()\n"
    )
    code, _, error = surefoot_run("--telemetry", tmp_path / "runs", script)
    assert code == 0, error
    assert error.count("    see      surefoot report ") == 3
    assert error.count("    see      nothing: LBFGS takes no `telemetry`") == 1
    assert error.count("    see      nothing: a copy of an optimizer writes nothing") == 1
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [f"0{n}-AdamW.jsonl" for n in range(3)]


PROCESSES = """
import multiprocessing

def work(steps):
    import torch
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    optimizer.cycle = optimizer  # it lives to the end of the process
    for _ in range(steps):
        optimizer.step()
    print(type(optimizer).__module__, flush=True)

def in_process(method, steps):
    worker = multiprocessing.get_context(method).Process(target=work, args=(steps,))
    worker.start()
    worker.join()

if __name__ == "__main__":
    in_process("spawn", 2)  # before torch is imported here
    work(1)
    in_process(METHOD, 3)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is forked there")
@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.long)])
def test_processes_of_multiprocessing_are_served_and_report_and_have_files_of_their_own(tmp_path, method):
    script = tmp_path / "train.py"
    script.write_text(PROCESSES.replace("METHOD", repr(method)))
    code, output, error = surefoot_run("--telemetry", tmp_path / "runs", "--json", tmp_path / "r.json", script)
    assert code == 0, error
    assert output == "surefoot.optimizers.adam\n" * 3
    steps = sorted(len(list(read(path))) for path in (tmp_path / "runs").iterdir())
    assert steps == [1, 2, 3]
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("r*.json")]
    assert sorted(optimizer["steps"] for report in reports for optimizer in report["optimizers"]) == [1, 2, 3]
    assert error.count("surefoot run: train.py (process ") == 2
    assert error.count("surefoot run: train.py") == 3
