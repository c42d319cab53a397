"""`surefoot ckpt`: what its commands print, and their statuses."""

import json
import math
import os
import stat

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import surefoot
from surefoot.cli.ckpt import app


def ckpt(*arguments):
    # A wide terminal keeps messages on one line.
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, [*map(str, arguments)])


def lines(result):
    return [" ".join(line.split()) for line in result.output.splitlines()]


def make(tmp_path, step=1000, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight.data.fill_(0.5)
    optimizer = surefoot.AdamW(surefoot.parameter_groups(model, lr=0.25, weight_decay=0.1), foreach=False, **options)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    model[2].weight.data.fill_(0.5)
    scheduler = surefoot.lr_scheduler.StepLR(optimizer, 3)
    path = surefoot.save(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler, extra={"epoch": 3}, step=step)
    return path, model, optimizer


def test_inspect_shows_parts_groups_and_parameters(tmp_path):
    path, _, _ = make(tmp_path)
    shown = lines(ckpt("inspect", tmp_path))
    assert shown[0] == str(path)
    assert shown[1].startswith("step 1000, ")
    assert f"torch {torch.__version__}" in shown[2]
    assert "model Sequential 9 53 216 B 0" in shown
    assert "optimizer AdamW 18 94 376 B 0" in shown
    assert "scheduler StepLR 0 0 0 B 0" in shown
    assert "optimizer: AdamW" in shown
    assert shown[shown.index("optimizer: AdamW") + 1].startswith("group parameters name lr weight_decay betas eps")
    assert any(line.startswith("0 2 decay 0.25 0.1 0.9, 0.999 1e-08") for line in shown)
    assert any(line.startswith("1 4 no decay 0.25 0 0.9, 0.999 1e-08") for line in shown)
    assert "parameter shape dtype norm step exp_avg exp_avg_sq" in shown
    assert any(line.startswith("2.weight 4 x 4 float32 2 1 ") for line in shown)
    assert "1.num_batches_tracked - int64 -" in shown


def test_inspect_shows_what_is_not_finite_and_what_is_tied(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    model["a"].weight.data = torch.tensor([[math.nan, math.inf], [3.0, 4.0]])
    shown = lines(ckpt("inspect", surefoot.save(tmp_path, model=model)))
    assert "a.weight 2 x 2 float32 5 2 not finite" in shown
    assert "b.weight 2 x 2 float32 = a.weight" in shown
    assert "model ModuleDict 1 4 16 B 2" in shown


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inspect_shows_norms_of_values_where_they_are_kept_in_two_tensors(tmp_path, dtype, bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 101), nn.Conv2d(8, 64, 3).to(memory_format=torch.channels_last)).to(dtype)
    short = {"state_dtype": "float8", "master_weight_bits": bits, "foreach": False}
    optimizer = surefoot.AdamW(model.parameters(), lr=1e-3, **short)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    optimizer.state[model[0].weight]["exp_avg"][3, 4] = 0x80  # NaN
    path = surefoot.save(tmp_path, model=model, optimizer=optimizer)
    shown = lines(ckpt("inspect", tmp_path))
    assert "parameter shape dtype norm step exp_avg exp_avg_sq" in shown
    found = json.loads(ckpt("inspect", path, "--json").output)["tensors"]
    for name, param in model.named_parameters():
        values = [surefoot.full_precision(optimizer, param, slot) for slot in (None, "exp_avg", "exp_avg_sq")]
        norms = [value.where(value.isfinite(), 0).double().norm().item() for value in values]
        keys = [f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"]
        assert [found[key]["norm"] for key in keys] == pytest.approx(norms, rel=1e-6)
        written = [f"{norm:.4g}" for norm in norms]
        bad = " 1 not finite" if name == "0.weight" else ""
        shape = " x ".join(map(str, param.shape))
        row = f"{name} {shape} {str(dtype)[6:]} {written[0]} 2 {written[1]}{bad} {written[2]}"
        assert row in shown


def test_inspect_knows_the_slots_of_each_algorithm_of_several(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 101), nn.Linear(101, 102)).bfloat16()
    parts = [surefoot.Part(surefoot.Muon, "0.weight"), surefoot.Part(surefoot.AdamW, state_dtype="float8")]
    optimizer = surefoot.Combined(model.named_parameters(), parts)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    path = surefoot.save(tmp_path, model=model, optimizer=optimizer)
    found = json.loads(ckpt("inspect", path, "--json").output)["tensors"]
    value = surefoot.full_precision(optimizer, model[1].weight, "exp_avg")
    assert optimizer.state[model[1].weight]["exp_avg"].dtype is torch.uint8
    assert found["optimizer.1.weight.exp_avg"]["norm"] == pytest.approx(value.norm().item(), rel=1e-6)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    assert found["optimizer.0.weight.momentum_buffer"]["norm"] == pytest.approx(
        momentum.float().norm().item(), rel=1e-6
    )


def test_inspect_of_an_optimizer_alone_and_of_long_lists(tmp_path):
    params = [nn.Parameter(torch.ones(2)) for _ in range(50)]
    optimizer = surefoot.SGD(params, lr=torch.tensor(0.5), momentum=0.9, foreach=False)
    for param in params:
        param.grad = torch.ones(2)
    optimizer.step()
    path = surefoot.save(tmp_path, optimizer=optimizer)
    shown = lines(ckpt("inspect", path))
    assert "19 2 float32 - 1.414" in [line.replace("float32 1", "float32 - 1") for line in shown]
    assert "... 10 more, shown by --all" in shown
    assert "0 50 0.5 0.9" in [" ".join(line.split()[:4]) for line in shown]
    everything = lines(ckpt("inspect", path, "--all"))
    assert len(everything) == len(shown) + 9


def test_inspect_as_json(tmp_path):
    path, _, _ = make(tmp_path)
    found = json.loads(ckpt("inspect", tmp_path, "--json").output)
    assert (found["path"], found["step"], found["format"], found["bytes"]) == (str(path), 1000, 1, path.stat().st_size)
    assert found["parts"]["optimizer"]["groups"][0]["lr"] == 0.25
    assert found["parts"]["optimizer"]["groups"][0]["betas"] == [0.9, 0.999]
    assert found["parts"]["optimizer"]["parameters"][0]["name"] == "0.weight"
    assert found["parts"]["model"]["class"] == "Sequential"
    assert found["parts"]["extra"]["state"] == {"epoch": 3}
    tensor = found["tensors"]["model.2.weight"]
    assert (tensor["shape"], tensor["dtype"], tensor["norm"], tensor["nonfinite"]) == ([4, 4], "float32", 2.0, 0)


def test_inspect_as_json_stays_json_with_values_that_json_lacks(tmp_path):
    optimizer = surefoot.LBFGS([nn.Parameter(torch.ones(2))], tolerance_grad=-math.inf)
    path = surefoot.save(
        tmp_path, optimizer=optimizer, extra={"best": math.inf, "z": 1j, "nan": torch.tensor(math.nan)}
    )
    found = json.loads(ckpt("inspect", path, "--json").output, parse_constant=pytest.fail)
    assert found["parts"]["extra"]["state"] == {"best": "inf", "z": [0.0, 1.0], "nan": "nan"}
    assert found["parts"]["optimizer"]["groups"][0]["tolerance_grad"] == "-inf"


def test_inspect_of_lbfgs_and_of_several_optimizers(tmp_path):
    params = [nn.Parameter(torch.ones(2, 2))]
    lbfgs = surefoot.LBFGS(params)

    def closure():
        lbfgs.zero_grad()
        loss = (params[0] ** 4).sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    shown = ckpt("inspect", surefoot.save(tmp_path, optimizer=[lbfgs, surefoot.SGD(params)])).output
    assert "optimizer.0: LBFGS" in shown
    assert "optimizer.1: SGD" in shown
    assert "items" in shown


def test_verify(tmp_path):
    paths = [make(tmp_path, step)[0] for step in (1, 2)]
    result = ckpt("verify", tmp_path)
    assert result.exit_code == 0
    assert result.output.splitlines() == [f"{path}: whole" for path in paths]
    data = bytearray(paths[0].read_bytes())
    data[-1] ^= 1
    paths[0].write_bytes(data)
    result = ckpt("verify", tmp_path)
    assert result.exit_code == 1
    assert f"{paths[0]} is corrupted: bytes of" in result.output
    assert f"{paths[1]}: whole" in result.output
    found = json.loads(ckpt("verify", paths[0], "--json").output)
    assert found[0]["whole"] is False
    assert "corrupted" in found[0]["problem"]


def test_diff(tmp_path):
    path, model, optimizer = make(tmp_path / "a")
    assert ckpt("diff", path, tmp_path / "a").output == "no difference\n"
    model[0].bias.data[1] += 0.5
    optimizer.param_groups[0]["lr"] = 0.125
    other = surefoot.save(
        tmp_path / "b", model=model, optimizer=optimizer, extra={"epoch": 3, "t": torch.ones(2)}, step=1000
    )
    result = ckpt("diff", path, other)
    shown = lines(result)
    assert result.exit_code == 1
    assert any(line.startswith("model.0.bias 1 of 4 elements differ 0.5 ") for line in shown)
    assert "parts.optimizer.groups[0].options.lr 0.25 0.125" in shown
    assert "extra.t not there (2,) torch.float32" in shown
    assert any(line.startswith("parts.scheduler ") and line.endswith("not there") for line in shown)
    found = {one["name"]: one for one in json.loads(ckpt("diff", path, other, "--json").output)}
    assert found["model.0.bias"]["elements"] == 1
    assert found["model.0.bias"]["largest"] == pytest.approx(0.5)


def test_diff_of_values_that_are_not_finite(tmp_path):
    values = [torch.tensor([1.0, math.nan, math.inf, 0.0]), torch.tensor([1.0, math.nan, math.inf, -0.0])]
    paths = [surefoot.save(tmp_path / str(i), extra={"x": value}, rng=False) for i, value in enumerate(values)]
    found = json.loads(ckpt("diff", *paths, "--json").output, parse_constant=pytest.fail)
    assert [(one["name"], one["elements"]) for one in found] == [("extra.x", 1)]


def test_convert_there_and_back(tmp_path):
    _, model, _ = make(tmp_path)
    result = ckpt("convert", tmp_path, tmp_path / "a.pt")
    assert result.exit_code == 0
    assert "with model, optimizer, scheduler, rng, extra, step" in result.output
    result = ckpt("convert", tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert result.exit_code == 0
    assert "optimizer -> optimizer" in result.output
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    found = surefoot.load(tmp_path / "b.safetensors", model=other)
    assert found.extra["epoch"] == 3
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere.safetensors"], "No such file"),
        (["inspect", "."], "there is no checkpoint in ."),
        (["verify", "x"], "there is no checkpoint in x"),
        (["diff", "a.safetensors", "."], "there is no checkpoint in ."),
        (
            ["convert", "a.safetensors", "b.safetensors"],
            "one of the two must be a .safetensors file, the other a file of",
        ),
        (["convert", "a.safetensors", "c.pt"], "c.pt is there already; name another, or give --force"),
        (["convert", "a.safetensors", "y/c.pt"], "there is no folder y"),
        (["convert", "c.pt", "b.safetensors"], "c.pt is damaged, or holds more than tensors and plain data"),
        (["inspect", "c.pt"], "truncated: it has 1 bytes"),
        (["migrate", "c.pt"], "truncated: it has 1 bytes"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    surefoot.save("a.safetensors", extra=1)
    (tmp_path / "c.pt").write_bytes(b"x")
    (tmp_path / "x").mkdir()
    result = ckpt(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_force_replaces(tmp_path):
    path, _, _ = make(tmp_path)
    (tmp_path / "c.pt").write_bytes(b"x")
    assert ckpt("convert", path, tmp_path / "c.pt", "--force").exit_code == 0
    assert "model" in torch.load(tmp_path / "c.pt", weights_only=True)


def test_migrate_leaves_the_present_format(tmp_path):
    path, _, _ = make(tmp_path)
    before = path.read_bytes()
    assert ckpt("migrate", tmp_path).output == f"{path}: has format 1 already\n"
    assert path.read_bytes() == before


def test_names_are_neither_markup_nor_commands_to_a_terminal(tmp_path):
    """Rich takes brackets for markup, and `[/x]` for a mistake in it."""
    model = nn.ParameterDict({name: torch.ones(2) for name in ("a[bold]", "b[/x]", "c\x1b[31m")})
    path = surefoot.save(tmp_path / "a.safetensors", model={"[/y]": model, "\x1b[2J": nn.Linear(1, 1)}, rng=False)
    other = surefoot.save(tmp_path / "b.safetensors", model={"[/y]": model}, rng=False)
    output = ckpt("inspect", path).output
    assert all(name in output for name in ("a[bold]", "b[/x]", "c\\x1b[31m", "model.[/y]", "model.\\x1b[2J"))
    assert "\x1b" not in output
    output = ckpt("diff", path, other, "--all").output
    assert "model.\\x1b[2J.weight" in output
    assert "\x1b" not in output


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_convert_neither_waits_for_a_pipe_nor_replaces_a_device(tmp_path, force):
    path, _, _ = make(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    result = ckpt("convert", tmp_path / "pipe.pt", tmp_path / "new.safetensors")
    assert (result.exit_code, "Not a file but a named pipe" in result.output) == (2, True)
    for target in (os.devnull, tmp_path / "pipe.pt", tmp_path):
        result = ckpt("convert", path, target, *force)
        assert (result.exit_code, "is a folder or a device; name a file" in result.output) == (2, True)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)  # noqa: PTH116
