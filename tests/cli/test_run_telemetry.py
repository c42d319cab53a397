"""`surefoot run --telemetry DIR`: each optimizer writes its telemetry there."""

import json
import sys

import pytest

from cli.run_helpers import EXAMPLES, surefoot_run
from surefoot.telemetry import read


def test_each_optimizer_gets_a_file(tmp_path):
    folder, report = tmp_path / "runs", tmp_path / "report.json"
    code, _, error = surefoot_run("--telemetry", folder, "--json", report, EXAMPLES / "spirals_one_cycle.py")
    assert code == 0, error
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


def test_optimizers_made_one_after_the_other_do_not_share_a_file(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "for number in range(3):\n"
        "    weight = torch.nn.Parameter(torch.ones(3))\n"
        "    weight.grad = torch.ones(3)\n"
        "    torch.optim.AdamW([weight], lr=0.1).step()\n"
        "torch.optim.LBFGS([weight]).step(lambda: (weight**2).sum())\n"
    )
    code, _, error = surefoot_run("--telemetry", tmp_path / "runs", script)
    assert code == 0, error
    assert error.count("    see      surefoot report ") == 3
    assert error.count("    see      nothing: LBFGS takes no `telemetry`") == 1
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [f"0{n}-AdamW.jsonl" for n in range(3)]


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is forked there")
@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.long), "spawn"])
def test_processes_of_multiprocessing_report_and_have_files_of_their_own(tmp_path, method):
    script = tmp_path / "train.py"
    script.write_text(
        "import multiprocessing, torch\n"
        "\n"
        "def work(steps):\n"
        "    weight = torch.nn.Parameter(torch.ones(3))\n"
        "    weight.grad = torch.ones(3)\n"
        "    optimizer = torch.optim.AdamW([weight], lr=0.1)\n"
        "    optimizer.cycle = optimizer  # it lives to the end of the process\n"
        "    for _ in range(steps):\n"
        "        optimizer.step()\n"
        "\n"
        "if __name__ == '__main__':\n"
        f"    context = multiprocessing.get_context({method!r})\n"
        "    workers = [context.Process(target=work, args=(steps,)) for steps in (2, 3)]\n"
        "    for worker in workers:\n"
        "        worker.start()\n"
        "    for worker in workers:\n"
        "        worker.join()\n"
        "    work(1)\n"
    )
    code, _, error = surefoot_run("--telemetry", tmp_path / "runs", "--json", tmp_path / "r.json", script)
    assert code == 0, error
    steps = sorted(len(list(read(path))) for path in (tmp_path / "runs").iterdir())
    assert steps == [1, 2, 3]
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("r*.json")]
    assert sorted(optimizer["steps"] for report in reports for optimizer in report["optimizers"]) == [1, 2, 3]
    assert error.count("surefoot run: train.py (process ") == 2
    assert error.count("surefoot run: train.py") == 3


def test_copies_of_an_optimizer_write_nothing_and_the_report_says_so(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import copy, torch\n"
        "weight = torch.nn.Parameter(torch.ones(3))\n"
        "copied = copy.deepcopy(torch.optim.AdamW([weight]))\n"
        "copied.param_groups[0]['params'][0].grad = torch.ones(3)\n"
        "copied.step()\n"
    )
    code, _, error = surefoot_run("--telemetry", tmp_path / "runs", script)
    assert code == 0, error
    assert "    see      nothing: a copy of an optimizer writes nothing" in error
