"""The command `surefoot memory`."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import surefoot
from surefoot.cli import app


def memory(*arguments):
    env = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    result = CliRunner(env=env).invoke(app, ["memory", *map(str, arguments)], terminal_width=300)
    return result.exit_code, [" ".join(line.replace("│", " ").split()) for line in result.output.splitlines()]


def test_a_known_model():
    code, lines = memory("GPT2-small", "--dtype", "bfloat16", "--state-dtype", "float8", "--master-weight-bits", 24)
    assert code == 0
    assert lines[0] == "GPT-2 small, 124,439,808 parameters in 148 tensors, AdamW"
    assert "exp_avg_sq float8 e5m3 1.00 124 MB" in lines
    assert "weight_correction int8 1.00 124 MB" in lines
    assert "together 7.07 880 MB" in lines


def test_choices_side_by_side_and_their_picture(tmp_path):
    code, lines = memory("gpt2-small", "--compare", "--ema", "--plot", tmp_path / "memory.png")
    assert code == 0
    assert "choice weights gradients state scales corrections averages together bytes each" in lines
    assert "float32 498 MB 498 MB 996 MB 498 MB 2.49 GB 20.00" in lines
    assert "bfloat16 (stochastic), state float8 249 MB 249 MB 250 MB 7.77 MB 498 MB 1.25 GB 10.07" in lines
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_number_for_each_tensor_is_state_too():
    code, lines = memory("gpt2-small", "--optimizer", "novograd")
    assert code == 0
    assert "exp_avg float32 4.00 498 MB" in lines
    assert "exp_avg_sq float32 0.00 592 B" in lines  # of 148 tensors
    assert "together 12.00 1.49 GB" in lines


def test_an_optimizer_without_some_options_has_fewer_choices():
    code, lines = memory("gpt2-small", "--optimizer", "muon", "--compare")
    assert code == 0
    assert lines[0] == "GPT-2 small, 124,439,808 parameters in 148 tensors, Muon of 50 and AdamW of 98"
    assert "bfloat16 249 MB 249 MB 249 MB 747 MB 6.00" in lines
    assert not any("float8" in line for line in lines)


@pytest.mark.parametrize("place", ["{folder}/net_of_test_memory.py:build", "net_of_test_memory:build"])
def test_a_model_is_built_without_memory(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    (tmp_path / "net_of_test_memory.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Linear(1 << 20, 1 << 20, bias=False)\n"
    )
    code, lines = memory(place.format(folder=tmp_path), "--optimizer", "SGD", "-o", "momentum=0.9", "--params")
    assert code == 0
    assert "momentum_buffer float32 4.00 4.4 TB" in lines
    assert "weight 1048576 x 1048576 4.4 TB 4.4 TB 4.4 TB 13.2 TB 12.00" in lines


def test_a_checkpoint_with_and_without_a_model(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    optimizer = surefoot.SGD(model.parameters())
    whole = surefoot.save(tmp_path / "whole.safetensors", model=model, optimizer=optimizer)
    code, lines = memory(whole, "--json")
    found = json.loads("".join(lines))["choices"][0]
    assert (code, found["elements"]) == (0, 15 + 6 + 7)
    assert found["kinds"]["gradients"] == 2 * (15 + 6)
    alone = surefoot.save(tmp_path / "alone.safetensors", optimizer=optimizer)
    code, lines = memory(alone, "--json", "--all")
    found = json.loads("".join(lines))["choices"][0]
    assert (code, found["elements"], found["bytes"]) == (0, 21, 8 * 21 + 4 * 4)
    assert [one["shape"] for one in found["parameters"]] == [[3, 4], [3], [3], [3]]


def test_the_largest_parameters_come_first():
    code, lines = memory("gpt2-small", "--params")
    assert code == 0
    assert lines[lines.index("parameter shape weights gradients state together bytes each") + 1].startswith(
        "0 50257 x 768"
    )
    assert "... 128 more, shown by --all" in lines
    assert not any("more, shown" in line for line in memory("gpt2-small", "--all")[1])


@pytest.mark.parametrize(
    "arguments",
    ["llama-7b --compare", "llama-7b --dtype bfloat16 --rounding stochastic --state-dtype float8"],
)
def test_the_tables_of_the_page(arguments):
    page = (Path(__file__).parents[2] / "docs/memory.md").read_text(encoding="utf-8")
    shown = [" ".join(line.split()) for line in page.splitlines()]
    _, lines = memory(*arguments.split())
    assert set(lines) <= set(shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt3"], "must be a known model (overhead, tiny, medium, large, mlp1000, resnet50, gpt2-small, gpt2-xl,"),
        (["json:loads_"], "json has no function 'loads_'"),
        (["builtins:list"], "builtins:list returns a list, must be a torch.nn.Module"),
        (["gpt2-small", "--optimizer", "LBFGS"], "LBFGS keeps state that grows as it steps"),
        (["gpt2-small", "--optimizer", "Adamm"], "there is no optimizer 'Adamm'; did you mean"),
        (["gpt2-small", "--optimizer", "Muon", "--rest", "Muon"], "Muon only supports 2D parameters"),
        (["gpt2-small", "--dtype", "int8"], "must be one of float32, float64, bfloat16, float16, but is 'int8'"),
        (["gpt2-small", "--state-dtype", "int8"], "`state_dtype` must be None, torch.float32"),
        (["gpt2-small", "--rounding", "up"], "`rounding` must be None, 'nearest' or 'stochastic', but got 'up'"),
        (["gpt2-small", "--compare", "--dtype", "float16"], "shows the usual formats; leave out --dtype"),
        (["gpt2-small", "--plot", "nowhere/memory.png"], "nowhere/memory.png was not written: "),
        (["torch.nn:Identity"], "there is nothing to train"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    code, lines = memory(*arguments)
    assert code == 2
    assert message in " ".join(lines)


def test_what_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "notes.safetensors").write_text("nothing")
    code, lines = memory(tmp_path / "notes.safetensors")
    assert code == 2
    assert "notes.safetensors is" in " ".join(lines)
