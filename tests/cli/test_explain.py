"""The command `surefoot explain`."""

import re

import pytest
from typer.testing import CliRunner

from surefoot import optimizers
from surefoot.cli import app


def explain(*arguments):
    result = CliRunner().invoke(app, ["explain", *arguments], terminal_width=300)
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_it_shows_operations_source_traffic_and_engine():
    code, output = explain("nadam", "--dtype", "bfloat16", "-o", "weight_decay=0.1")
    assert code == 0
    assert output.startswith("NAdam flags that are on: weight_decay")
    assert "traffic: 14 bytes per element (8 read, 6 written)" in output
    assert "lerp(exp_avg, add_scaled, c_weight1)" in output
    assert "# nadam.py:" in output
    assert "exp_avg = real(from_bfloat16(exp_avg_[i]))" in output
    assert output.endswith("1 parameters (16,384 elements) of bfloat16 on cpu (exp_avg_sq bfloat16, stochastic): cpu")


def test_of_a_rule_that_reduces_it_shows_every_pass():
    code, output = explain("LAMB", "-o", "cautious=True")
    assert code == 0
    # Gradients to clip them, all for the mean of a mask, for the norm of what it leaves, and for the update.
    assert "traffic: 64 bytes per element (52 read, 12 written, in 4 passes)" in output
    assert "mean_1 = mean(where_3) sum_of_squares = sum_of_squares(param) maximum = maximum(c_measured_mean_1" in output
    assert "operations of stage 2, which measures" in output
    assert "sum_of_squares_1 = sum_of_squares(add_scaled_1) sqrt_3 = sqrt(c_measured_sum_of_squares_1)" in output
    assert "return add_scaled_2, add_scaled, addcmul_1 generated source of stage 1, which measures (CPU)" in output
    assert output.count("def kernel(launch):") == 3


def test_a_number_of_state_is_told_from_a_tensor():
    code, output = explain("NovoGrad", "--gpu", "-o", "amsgrad=True")
    assert code == 0
    assert "kept as: param float32; exp_avg float32; exp_avg_sq one number; max_exp_avg_sq one number" in output
    assert "traffic: 24 bytes per element (16 read, 8 written, in 2 passes)" in output
    assert output.count("def kernel(") == 2


def test_numbers_that_parameters_share_are_told():
    code, output = explain("Prodigy")
    assert code == 0
    assert "; d shared, in the groups; d_max shared, in the groups" in output
    assert "traffic: 52 bytes per element (36 read, 16 written, in 2 passes)" in output
    assert re.search(r"total_sum_\d = total_sum\(mul_\d+\)", output)


@pytest.mark.parametrize("name", sorted(n for n in optimizers.NOT_IN_TORCH if getattr(optimizers, n).is_rule()))
def test_it_knows_what_torch_has_not(name):
    code, output = explain(name)
    assert code == 0
    assert output.startswith(f"{name} flags that are on: ")
    assert output.endswith("1 parameters (16,384 elements) of float32 on cpu: cpu")


def test_it_shows_the_kernel_for_a_gpu():
    code, output = explain("SGD", "--dtype", "bfloat16", "--gpu", "-o", "momentum=0.9")
    assert code == 0
    assert "generated source (GPU)" in output
    assert "momentum_buffer = tl.load(momentum_buffer_ + lanes, mask).to(tl.float32)" in output


def test_it_says_how_everything_is_kept():
    short = ("--dtype", "bfloat16", "--state-dtype", "float8", "--master-weight-bits", "24")
    code, output = explain("AdamW", *short, "--no-source")
    assert code == 0
    kept = "param bfloat16 + int8; exp_avg float8 e4m3; exp_avg_sq float8 e5m3"
    assert f"kept as: {kept} traffic: 12.12 bytes per element (7.062 read, 5.062 written)" in output
    assert output.endswith(f"1 parameters (16,384 elements) of bfloat16 on cpu ({kept}): cpu")
    code, output = explain("SGD", "--dtype", "float16", "--rounding", "stochastic")
    assert code == 0
    assert "kept as: param float16, stochastic" in output
    assert "param_[i] = stochastic_16(" in output


def test_it_says_who_gets_a_model_and_why(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n\ndef build():\n"
        "    model = torch.nn.Linear(3, 2)\n"
        "    model.bias = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))\n"
        "    return model\n"
    )
    code, output = explain("SGD", "--no-source", "--model", f"{tmp_path}/net.py:build", "-o", "differentiable=True")
    assert code == 0
    assert "1 parameters (6 elements) of float32 on cpu: eager" in output
    assert "1 parameters (2 elements) of float64 on cpu: eager" in output
    assert "not cpu: kernels carry no gradients through the step" in output


def test_an_algorithm_with_a_step_of_its_own():
    code, output = explain("Muon")
    assert code == 0
    assert output == "Muon is not elementwise: torch's operators run its custom step."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Nadamm"], "there is no optimizer 'Nadamm'; did you mean NAdam? There are SGD, Adam, AdamW"),
        (["SGD", "--dtype", "int8"], "must be one of float32, float64, bfloat16, float16, but is 'int8'"),
        (["Adam", "--state-dtype", "float9"], "torch.float16 or 'float8', but got 'float9'"),
        (["SGD", "-o", "lr"], "must be name=value with a Python literal as value, but is 'lr'"),
        (["SGD", "-o", "lr=x y"], "must be name=value with a Python literal as value, but is 'lr=x y'"),
        (["SGD", "-o", "lr=-1"], "Invalid learning rate: -1; `lr` must be a number in [0, inf)"),
        (["SGD", "-o", "speed=1"], "unexpected keyword argument 'speed'"),
        (["SGD", "--model", "nothing"], "must be FILE.py:FUNCTION or MODULE:FUNCTION, but is 'nothing'"),
        (["SGD", "--model", "json:load_s"], "json has no function 'load_s'"),
        (["SGD", "--model", "nothing.py:f"], "there is no file or module nothing.py"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    code, output = explain(*arguments)
    assert code == 2
    assert message in output


MODEL = """
from torch import nn

def make():
    model = nn.Module()
    model.tokens, model.head = nn.Embedding(9, 4), nn.Linear(4, 9)
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
    return model
"""


def test_of_muon_and_a_model_it_shows_who_would_step_what(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    result = CliRunner().invoke(app, ["explain", "muon", "--model", f"{path}:make", "-o", "lr=0.1"], terminal_width=300)
    assert result.exit_code == 0, result.output
    assert [line.split("  ")[0] for line in result.output.splitlines()] == ["Muon", *["AdamW"] * 4]
    assert "Muon   blocks.*.*.weight  2 x (4, 4)  lr=0.1" in result.output
    assert explain("muon", "--model", f"{path}:make", "-o", "head=('x',)")[0] == 2
