"""The command `surefoot demo`: its options, what it prints and leaves behind, and how it ends."""

import io
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

from surefoot import optimizers
from surefoot.cli import app, main
from surefoot.cli._demo import story
from surefoot.cli._demo.errors import DemoError
from surefoot.cli._demo.model import Shape
from surefoot.cli._demo.report import comparison_lines, tell_of_kernels
from surefoot.cli._demo.training import TrainingSetup, compare
from surefoot.codegen import store

TINY = Shape(context=16, width=16, blocks=1, heads=2)
PLAN = TrainingSetup("AdamW", steps=12, lr=1e-2, shape=TINY, libraries=("torch.optim", "torch.optim"))
OPTIMIZERS = ", ".join(sorted(optimizers.__all__))


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def invoke(*arguments):
    """Run the command line; gives the exit status and what was printed, without frames and line breaks."""
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, " ".join(re.sub("[╭╮╰╯│─]", " ", result.output).split())


def tell(out, setup=PLAN):
    """Run the demo without its options; gives what was printed."""
    console = Console(file=io.StringIO(), width=100)
    story.tell(setup, out, console)
    return console.file.getvalue()


@pytest.fixture
def told(monkeypatch):
    """Replace the demo by a list of the plans it was to run."""
    plans = []
    monkeypatch.setattr(story, "tell", lambda setup, out, console: plans.append((setup, out)))
    return plans


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--optimizer", "Adamm", f"there is no optimizer 'Adamm'; did you mean Adam? Choose one of {OPTIMIZERS}."),
        ("--optimizer", "xyz", f"there is no optimizer 'xyz'; choose one of {OPTIMIZERS}."),
        ("--steps", "0", "0 steps cannot be trained: give 1 or more, or leave it out."),
        ("--lr", "0", "0.0 is not a learning rate: give a positive number, or leave it out."),
        ("--lr", "nan", "nan is not a learning rate: give a positive number, or leave it out."),
        ("--lr", "inf", "inf is not a learning rate: give a positive number, or leave it out."),
        ("--seed", "-1", "-1 is not a seed: give a whole number from 0 to 9223372036854775807."),
        ("--threads", "0", "0 threads cannot be used: give 1 to 1024, or leave it out."),
        ("--threads", "9999", "9999 threads cannot be used: give 1 to 1024, or leave it out."),
    ],
)
def test_options_that_cannot_be(option, value, message, told):
    status, printed = invoke("demo", option, value)
    assert status == 2
    assert f"Invalid value for '{option}': {message}" in printed
    assert not told


def test_a_dtype_that_cannot_be(told):
    status, printed = invoke("demo", "--dtype", "int8")
    assert (status, told) == (2, [])
    assert "Invalid value for --dtype: must be one of float32, float64, bfloat16, float16, but is 'int8'" in printed


def test_pictures_that_cannot_be_written(told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    here = tmp_path.resolve()
    wrong = {
        "demo.txt": f"'{here}/demo.txt' does not end in .png, .svg, .pdf: name a picture, such as demo.png.",
        "folder.png": f"'{here}/folder.png' is there and is not a file: name another.",
        "none/demo.png": f"'{here}/none/demo.png' cannot be written (No such file or directory): "
        "name a file in a folder of yours.",
        "file/demo.png": f"'{here}/file/demo.png' cannot be written (Not a directory): "
        "name a file in a folder of yours.",
    }
    for name, message in wrong.items():
        status, printed = invoke("demo", "--out", name)
        assert status == 2
        assert f"Invalid value for '--out': {message}".replace(" ", "") in printed.replace(" ", "")
    assert not told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_protected_picture_is_refused(told, tmp_path, monkeypatch):
    out = tmp_path / "demo.png"
    out.write_text("mine")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    status, printed = invoke("demo", "--out", str(out))
    assert status == 2
    assert f"'{out.resolve()}' is write-protected: name another.".replace(" ", "") in printed.replace(" ", "")
    assert out.read_text() == "mine"


def test_options_become_a_plan(told, tmp_path):
    out = tmp_path / "x.svg"
    threads = str(torch.get_num_threads())
    arguments = ("--optimizer", "sgd", "--steps", "7", "--lr", "0.5", "--seed", "3", "--threads", threads)
    assert invoke("demo", *arguments, "--out", str(out)) == (0, "")
    assert told == [(TrainingSetup("SGD", steps=7, lr=0.5, seed=3), out.resolve())]
    short = ("--dtype", "bfloat16", "--rounding", "stochastic", "--state-dtype", "float32")
    assert invoke("demo", *arguments, "--out", str(out), *short) == (0, "")
    kept = {"dtype": torch.bfloat16, "storage": {"rounding": "stochastic", "state_dtype": torch.float32}}
    assert told[1] == (TrainingSetup("SGD", steps=7, lr=0.5, seed=3, **kept), out.resolve())


def test_what_is_left_out_suits_the_optimizer(told, tmp_path):
    assert invoke("demo", "--optimizer", "LBFGS", "--out", str(tmp_path / "x.png")) == (0, "")
    ((setup, _),) = told
    assert (setup.steps, setup.lr) == (25, 1.0)


def test_the_table_holds_what_was_measured():
    comparison = compare(PLAN, story.Corpus.of("the sea shore and the sea shells; " * 60))
    lines = list(comparison_lines(comparison))
    table = {line.name: line.values for line in lines}
    assert table["loss, held-out text"] == tuple(f"{outcome.held_out_loss:.4f}" for outcome in comparison.outcomes)
    times = [sorted(outcome.clock.optimizers["AdamW"]) for outcome in comparison.outcomes]
    medians = [500 * (seconds[5] + seconds[6]) for seconds in times]
    assert table["AdamW.step()"] == tuple(f"{median:.2f} ms" for median in medians)
    below = lines[[line.name for line in lines].index("AdamW.step()") + 1]
    assert below.values == ("", *(f"{medians[0] / median:.2f}x as fast" for median in medians[1:]))
    assert table["parameters differ, in the end"] == ("", f"{comparison.gaps(12)[0].largest:.1e}", "same bits")


def test_a_log_gets_lines_and_the_picture_comes_whole(tmp_path):
    printed = tell(tmp_path / "demo.png")
    assert "\x1b" not in printed
    line = re.compile(r"^step \d+/12: torch.optim.AdamW loss \d\.\d{3}, [\d.]+ steps/s; ", re.MULTILINE)
    assert len(line.findall(printed)) == 12
    assert "Same bits: after 12 steps no parameter of torch's model and of ours differs." in printed
    assert "after the prompt 'The ':" in printed
    assert f"Picture: {tmp_path / 'demo.png'}" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_models_that_differ_are_reported_as_such(tmp_path):
    setup = TrainingSetup("SGD", steps=2, lr=0.1, shape=TINY, libraries=("torch.optim", "one_ulp_off"))
    module = type(sys)("one_ulp_off")
    module.SGD = lambda params, lr, **options: torch.optim.SGD(params, lr=lr * (1 + 1e-5), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "one_ulp_off", module)
        printed = tell(tmp_path / "demo.svg", setup)
    assert re.search(
        r"The parameters of surefoot's model ended up to \d\.\de-\d\d from those of torch's; torch's two "
        r"implementations round alike here\. Training amplifies differences in rounding: "
        r"it is the losses that have to agree\.",
        " ".join(printed.split()),
    )


def test_torchs_own_two_implementations_are_the_measure(tmp_path):
    printed = " ".join(tell(tmp_path / "demo.png", TrainingSetup("AdamW", steps=12, lr=1e-2, shape=TINY)).split())
    assert re.search(
        r"learns \d{3},\d{3} characters of Python's help texts three times, from the same weights", printed
    )
    assert "torch.optim takes part by its default and by fused=True: how far its own two end from" in printed
    apart = r"up to \d\.\de-\d\d"
    assert re.search(rf"model ended {apart} from those of torch's, torch's own fused=True {apart}\. Training", printed)


def test_one_implementation_of_torchs_is_said(tmp_path):
    printed = tell(tmp_path / "demo.png", TrainingSetup("Muon", steps=2, lr=1e-2, shape=TINY))
    assert "help texts\ntwice, from the same weights" in printed
    assert "torch.optim has one implementation of Muon." in printed


def test_what_kernels_cost_is_said_and_why_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SUREFOOT_CACHE_DIR", str(tmp_path / "kernels"))
    found = iter([{"before.o"}, {"before.o", "a.o", "b.o"}, set(), set()])
    monkeypatch.setattr(story, "_kernels", lambda: next(found))
    first, again = (" ".join(tell(tmp_path / "demo.png").split()) for _ in range(2))
    assert re.search(
        r"The very first step\(\) took \d+ ms, since it compiled its kernels \(2\)\. This machine pays", first
    )
    assert f"they are kept in {tmp_path}/kernels and serve every later training with these options" in first
    assert f"No kernel had to be compiled: those that earlier runs have needed are kept in {tmp_path}/kernels." in again
    monkeypatch.setattr(store, "unusable_reason", lambda: "it is full")
    console = Console(file=io.StringIO(), width=100)
    tell_of_kernels(console, 1.0, compiled=2)
    assert console.file.getvalue() == "Kernels are compiled anew in every run, since they cannot be kept: it is full.\n"


def test_what_torch_has_not_is_compared_with_its_reference(tmp_path):
    setup = TrainingSetup("LARS", steps=3, lr=0.5, shape=TINY)
    printed = " ".join(tell(tmp_path / "demo.png", setup).split())
    assert printed.startswith("torch.optim.AdamW against surefoot.LARS ")
    assert "torch.optim has no LARS: its AdamW, lr 0.002, learns beside it for reference. LARS runs with" in printed
    assert re.search(r"step\(\) │ +[\d.]+ ms │ +[\d.]+ ms │ │ +│ +│ +[\d.]+x as fast", printed)
    assert "AdamW and LARS are different algorithms: the losses compare them on this model" in printed
    assert "parameters" not in printed
    assert (tmp_path / "demo.png").is_file()


def test_a_terminal_gets_bars(tmp_path):
    console = Console(file=Terminal(), force_terminal=True, width=100, _environ={"TERM": "xterm"})
    story.tell(PLAN, tmp_path / "demo.png", console)
    assert re.search(r"torch\.optim\.AdamW.*12/12.*loss.*steps/s", console.file.getvalue())


def test_without_matplotlib_everything_else_happens(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "surefoot.cli._demo.picture", raising=False)
    printed = tell(tmp_path / "demo.png")
    assert printed.startswith(
        "There will be no picture: matplotlib is missing. Install it with: pip install 'surefoot[plot]'\n"
    )
    assert "after the prompt 'The ':" in printed
    assert "Picture:" not in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["compare", "continue_text"])
def test_an_interruption_leaves_nothing(moment, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(story, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        tell(tmp_path / "demo.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", [None, "an earlier picture"])
@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError(28, "full"), DemoError)])
def test_a_picture_is_never_half_written(error, seen, before, tmp_path, monkeypatch):
    def write_a_little(figure, path, **_):
        path.write_bytes(b"\x89PN")
        raise error

    out = tmp_path / "demo.png"
    if before:
        out.write_text(before)
    monkeypatch.setattr(Figure, "savefig", write_a_little)
    with pytest.raises(seen):
        tell(out)
    assert [path.read_text() for path in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "surefoot demo: interrupted."),
        (DemoError("the loss became nan"), 1, "surefoot demo: the loss became nan."),
    ],
)
def test_how_it_ends(error, status, message, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(story, "tell", fail)
    assert invoke("demo", "--out", str(tmp_path / "x.png")) == (status, message)


def test_main_turns_an_interruption_into_a_status(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("surefoot.cli.app", interrupt)
    with pytest.raises(SystemExit, match="130"):
        main()


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a child alone")
def test_ctrl_c_in_a_real_run(tmp_path):
    command = [sys.executable, "-c", "from surefoot.cli import main; main()", "demo", "--out", "demo.png"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as child:  # noqa: S603 - our own command
        child.stdout.readline()
        child.send_signal(signal.SIGINT)
        _, complaint = child.communicate(timeout=300)
    assert (child.returncode, complaint) == (130, "surefoot demo: interrupted.\n")
    assert not list(tmp_path.iterdir())


def test_help_and_version():
    status, printed = invoke("--version")
    assert status == 0
    assert re.fullmatch(r"surefoot \S+, torch \S+, Python \S+", printed)
    assert "Train a small model with torch.optim and with surefoot" in invoke("--help")[1]
    printed = invoke("demo", "--help")[1]
    assert all(option in printed for option in ("--optimizer", "--steps", "--lr", "--seed", "--out", "--threads"))
