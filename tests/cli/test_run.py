"""`surefoot run`: the script notices nothing but its optimizers."""

import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.run_helpers import start, surefoot_run
from surefoot.cli import app
from surefoot.run.settings import Settings, suffix

FAITHFUL = """
    import json, os, sys, threading, traceback
    import helper_beside
    print(json.dumps({
        "argv": sys.argv, "path": sys.path, "name": __name__, "file": __file__, "spec": getattr(__spec__, "name", None),
        "main": sys.modules["__main__"].__dict__ is globals(), "package": __package__,
        "globals": sorted(globals()), "meta": len([f for f in sys.meta_path if "surefoot" not in type(f).__module__]),
        "executable": sys.executable, "helper": helper_beside.__file__, "unbuffered": sys.stdout.write_through,
        "torch": "torch" in sys.modules, "sitecustomize": hasattr(sys.modules.get("sitecustomize"), "chained"),
    }))
    sys.exit(7)
"""


@pytest.fixture
def script(tmp_path):
    """Write a script, and a module beside it, and give its path."""

    def write(text, name="train.py"):
        (tmp_path / "helper_beside.py").write_text("")
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


# What is Python's stays as it is


@pytest.mark.parametrize("how", ["script", "module", "flags"])
def test_the_script_finds_everything_as_without_us(script, tmp_path, how):
    path = script(FAITHFUL)
    arguments = ["--json", "x", "--", "--help", "-q", "a b", ""]
    flags = ["-u", "-X", "dev"] if how == "flags" else []
    what = ["-m", "train"] if how == "module" else [path]
    plain = start(*flags, *what, *arguments, cwd=tmp_path)
    with_us = start(*flags, "-m", "surefoot", "run", *what, *arguments, cwd=tmp_path)
    assert plain[0] == with_us[0] == 7
    assert json.loads(with_us[1]) == json.loads(plain[1])


def test_a_sitecustomize_that_is_there_still_runs(script, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("chained = True\n")
    path = script(FAITHFUL)
    packages = ":".join([str(tmp_path / "site"), *filter(None, sys.path)])
    code, output, _ = surefoot_run(path, cwd=tmp_path, PYTHONPATH=packages)
    assert code == 7
    assert json.loads(output)["sitecustomize"] is True


@pytest.mark.parametrize(
    "text",
    [
        "raise ValueError('boom')",
        "def f():\n    g()\ndef g():\n    1 / 0\nf()",
        "import nowhere_to_be_found",
        "x = (",
        "import sys; sys.exit('that was it')",
        "import sys; sys.exit(3)",
        "import os; os._exit(4)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "raise KeyboardInterrupt",
        "import signal; signal.raise_signal(signal.SIGINT)",
    ],
)
def test_exit_codes_signals_and_tracebacks_are_the_scripts(script, tmp_path, text):
    path = script(text)
    plain_code, _, plain_error = start(path, cwd=tmp_path)
    code, _, error = surefoot_run(path, cwd=tmp_path)
    assert code == plain_code != 0
    assert error.startswith(plain_error)
    assert re.fullmatch(r"(\nsurefoot run: train.py took .*; no optimizer took a step\n)?", error[len(plain_error) :])


def test_a_signal_reaches_the_script(script, tmp_path):
    path = script("""
        import os, signal, sys
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9))
        signal.raise_signal(signal.SIGUSR1)
    """)
    assert surefoot_run(path, cwd=tmp_path)[0] == 9


def test_a_python_of_another_environment_is_left_alone(script, tmp_path):
    path = script("""
        import os, subprocess, sys
        os.environ["SUREFOOT_RUN_PREFIX"] = "/another/environment"
        code = "import sys; print('surefoot' in sys.modules, [type(f).__module__ for f in sys.meta_path])"
        print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    """)
    code, output, _ = surefoot_run(path, cwd=tmp_path)
    assert code == 0
    assert output.startswith("False")
    assert "surefoot" not in output


def test_a_script_that_is_not_there_is_pythons_error(tmp_path):
    code, _, error = surefoot_run("nothing.py", cwd=tmp_path)
    assert code == 2
    assert "can't open file" in error


def test_asking_whether_torch_is_there_does_not_import_it(script, tmp_path):
    path = script("""
        import importlib.util, sys
        assert importlib.util.find_spec("torch").loader is not None
        assert "torch" not in sys.modules
    """)
    code, _, error = surefoot_run(path)
    assert (code, error.count("no optimizer took a step")) == (0, 1)


# What becomes of torch.optim

SWAPPED = """
    import os, sys
    assert "torch" not in sys.modules
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.optim as optim
    from torch.optim import SGD, AdamW
    from torch.optim.adamw import AdamW as FromItsFile
    from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
    from torch.optim.swa_utils import AveragedModel

    assert type(torch.__spec__.loader).__module__ == "_frozen_importlib_external"
    assert "exec_module" not in vars(torch.__spec__.loader)
    assert not any("surefoot" in type(finder).__module__ for finder in sys.meta_path)
    assert AdamW is optim.AdamW is FromItsFile is torch.optim.AdamW
    for ours in (SGD, AdamW, optim.LBFGS, OneCycleLR, AveragedModel, torch.optim.lr_scheduler.StepLR):
        assert ours.__module__.startswith("surefoot."), ours

    class Mine(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.add_(p.grad, alpha=-self.param_groups[0]["lr"])

    class Warmer(AdamW):
        def step(self, closure=None):
            return super().step(closure)

    class MySchedule(LRScheduler):
        def get_lr(self):
            return [lr * 0.5 for lr in self.base_lrs]

    weight = torch.nn.Parameter(torch.ones(300, 4))
    for make in (lambda p: SGD(p, lr=0.1), Warmer, Mine, lambda p: optim.LBFGS(p, max_iter=2)):
        optimizer = make([weight])
        assert isinstance(optimizer, torch.optim.Optimizer)
        schedule = MySchedule(optimizer)
        for _ in range(3):
            def closure():
                optimizer.zero_grad()
                loss = (weight**2).sum()
                loss.backward()
                return loss
            closure()
            optimizer.step(*([closure] if isinstance(optimizer, optim.LBFGS) else []))
            schedule.step()
    assert isinstance(Warmer([weight]), optim.AdamW) and isinstance(OneCycleLR(SGD([weight], 1), 1, 9), LRScheduler)
    print("served")
    sys.stdout.close()
    import surefoot.run.compare
    surefoot.run.compare._SECONDS = 0.0
"""


def test_classes_are_replaced_and_reported_and_timed_beside_torchs(script, tmp_path):
    code, output, error = surefoot_run("--compare", "--json", tmp_path / "report.json", script(SWAPPED))
    assert (code, output) == (0, "served\n"), error
    lines = error.splitlines()
    assert re.fullmatch(r"surefoot run: train.py took [\d.]+ m?s, [\d.]+% of it in optimizer steps \(.*\)", lines[1])
    assert lines[2] == "  SGD: 1 parameter, 1,200 elements, 3 steps"
    assert re.fullmatch(r"    time     \S+ .?s; a step \S+ .?s, the first \S+ .?s", lines[3])
    assert lines[4] == "    engine   cpu for 1 parameter of float32 on cpu"
    assert "  Mine of __main__, which is not replaced: 1 parameter, 1,200 elements, 3 steps" in lines
    assert lines[-2] == "    engine   a custom step, in torch's operators"
    sgd, _, _, lbfgs = re.findall(r"    torch    (.*)", error)
    times = r"on the same shapes: torch for-loop \S+ .s, torch foreach \S+ .s, torch fused \S+ .s, surefoot \S+ .s; "
    assert re.fullmatch(times + r"surefoot is [\d.]+ times as fast as the best of torch", sgd)
    assert lbfgs == "not compared: it is not elementwise, so that its time depends on more than shapes"
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(o["class"], o["surefoot"], o["steps"]) for o in report["optimizers"]] == [
        ("SGD", True, 3),
        ("Warmer", True, 3),
        ("Mine", False, 3),
        ("LBFGS", True, 3),
    ]
    assert report["optimizers"][1]["engines"][0]["engine"] == "cpu"
    assert 0 < report["step_seconds"] < report["seconds"]
    assert report["failed"] is False


def test_under_torchrun_the_first_rank_reports(script, tmp_path):
    path = script("""
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        model = torch.nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for _ in range(3):
            model(torch.ones(5, 4)).sum().backward()
            for param in model.parameters():
                dist.all_reduce(param.grad)
            optimizer.step()
        if dist.get_rank() == 0:
            print(type(optimizer).__module__)
        dist.destroy_process_group()
    """)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code, output, error = start(*launcher, "-m", "surefoot", "run", "--json", tmp_path / "r.json", path)
    assert code == 0, error
    assert output.splitlines()[-1] == "surefoot.optimizers.adam"  # torch 2.9 says before who is connected
    assert error.count("surefoot run: train.py took") == 1
    assert "engine   eager for 2 parameters of float32 on cpu" in error
    ranks = [json.loads((tmp_path / name).read_text())["rank"] for name in ("r.json", "r.rank1.json")]
    assert ranks == [0, 1]


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "nowhere/r.json", "train.py"], "nowhere/r.json must be a file in a folder that exists"),
        (["--json", ".", "train.py"], ". must be a file in a folder that exists"),
        (["--telemetry", __file__, "train.py"], "cannot be made: File exists"),
        (["--unknown", "train.py"], "No such option: --unknown"),
        ([], "Missing argument 'script'"),
    ],
)
def test_mistakes_in_options_are_named(arguments, message):
    result = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, ["run", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("flag", ["-I", "-E", "-S"])
def test_interpreters_that_would_not_listen_are_refused(flag, monkeypatch):
    name = {"-I": "isolated", "-E": "ignore_environment", "-S": "no_site"}[flag]
    flags = type("Flags", (), {"isolated": 0, "ignore_environment": 0, "no_site": 0, name: 1})
    monkeypatch.setattr("sys.flags", flags)
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["run", "train.py"])
    assert result.exit_code == 2
    assert f"surefoot run does not work with Python's option {flag}; leave it out" in result.output


def test_settings_travel_through_the_environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "here")
    settings = Settings("train.py", compare=True, telemetry="/runs", quiet=True, json="/r.json", main=5)
    environment = settings.environment()
    assert Settings.read(environment) == settings
    assert environment["PYTHONPATH"].split(":")[1:] == ["here"]
    assert Path(environment["PYTHONPATH"].split(":")[0], "sitecustomize.py").is_file()


@pytest.mark.parametrize(("rank", "main", "text"), [("0", True, ""), ("3", True, ".rank3"), ("0", False, ".pid77")])
def test_files_of_other_processes_have_names_of_their_own(monkeypatch, rank, main, text):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("os.getpid", lambda: 77)
    assert suffix(Settings("t.py", main=77 if main else 1)) == text
