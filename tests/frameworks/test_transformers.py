"""The Trainer of Hugging Face's transformers, on a tiny Llama."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import surefoot
from conftest import difference, run_script, seeded

SCRIPT = """
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(1)
model = LlamaForCausalLM(config)
tokens = torch.randint(0, 32, (16, 8))
arguments = TrainingArguments(
    "out", max_steps=6, per_device_train_batch_size=4, use_cpu=True, report_to="none", optim=sys.argv[2]
)
Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens]).train()
torch.save([param.detach() for param in model.parameters()], sys.argv[1])
"""


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def examples(count=16):
    tokens = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_trainer(model, **options):
    fields = {"optimizers", "optimizer_cls_and_kwargs", "callbacks", "eval_dataset"}
    trainer_options = {name: options.pop(name) for name in fields & options.keys()}
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }
    return Trainer(model, TrainingArguments("out", **settings | options), train_dataset=examples(), **trainer_options)


def fitted(model, **options):
    make_trainer(model, **options).train()
    return list(model.parameters())


def test_optimizers(compare):
    """`optimizers=` with a scheduler."""

    def train(optim):
        model = make_model()
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        return fitted(model, optimizers=(optimizer, scheduler))

    compare(train)


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "Adafactor", "RMSprop"])
def test_optimizer_cls_and_kwargs(compare, name):
    """`optimizer_cls_and_kwargs=`, warm-up and linear decay of the Trainer's."""

    def train(optim):
        return fitted(
            make_model(), optimizer_cls_and_kwargs=(getattr(optim, name), {"weight_decay": 0.01}), warmup_steps=2
        )

    compare(train, bits=name != "Adafactor")  # whose means are summed in another order


def test_accumulation(compare):
    """Gradient accumulation over 2 batches, clipped by the Trainer."""

    def train(optim):
        return fitted(
            make_model(),
            optimizer_cls_and_kwargs=(optim.AdamW, {}),
            gradient_accumulation_steps=2,
            max_grad_norm=0.1,
        )

    compare(train)


def test_clipping_in_the_step(compare):
    """`max_grad_norm` in surefoot's step beside the Trainer's clipping."""

    def train(optim):
        return fitted(make_model(), optimizer_cls_and_kwargs=(optim.AdamW, {}), max_grad_norm=0.1)

    def ours(optim):
        return fitted(make_model(), optimizer_cls_and_kwargs=(optim.AdamW, {"max_grad_norm": 0.1}), max_grad_norm=0.0)

    compare(train, ours=ours, bits=False)


def test_bf16(compare):
    """`bf16=True`."""

    def train(optim):
        return fitted(make_model(), optimizer_cls_and_kwargs=(optim.AdamW, {}), bf16=True)

    compare(train, tolerance=1e-2, bits=True)


def resumed(first, second):
    """Return the weights of a training that is gone on with from its third step, by another optimizer maybe."""
    fitted(make_model(), optimizer_cls_and_kwargs=first, save_strategy="steps", save_steps=3)
    model = make_model()
    make_trainer(model, optimizer_cls_and_kwargs=second).train(resume_from_checkpoint="out/checkpoint-3")
    return list(model.parameters())


def test_resume(compare):
    """Resume from a checkpoint."""
    compare(lambda optim: resumed((optim.AdamW, {}), (optim.AdamW, {})))


def test_resume_from_torch(compare):
    """Resume with surefoot from a checkpoint of torch.optim."""
    pair = (torch.optim.AdamW, {})
    compare(lambda optim: resumed(pair, (optim.AdamW, {})))


def test_resume_by_torch(compare):
    """Resume with torch.optim from a checkpoint of surefoot."""
    pair = (torch.optim.AdamW, {})
    compare(lambda optim: resumed((optim.AdamW, {}), pair))


@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "float8"},
        {"ema": 0.9, "max_grad_norm": 0.5, "nonfinite": "skip"},
        {"telemetry": True},
    ],
    ids=str,
)
def test_resume_with_options(record_property, options):
    """Resume with options of the step or 8-bit state: the bits of the run that was not interrupted."""
    pair = (surefoot.AdamW, options)
    whole = seeded(lambda: fitted(make_model(), optimizer_cls_and_kwargs=pair))
    again = seeded(lambda: resumed(pair, pair))
    record_property("difference", value := difference(again, whole))
    assert value == 0


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"])
def test_surefoot_run(record_property, tmp_path, optim):
    """`surefoot run` of an unmodified script."""
    Path("train.py").write_text(SCRIPT)
    run_script("train.py", "torch.pt", optim)
    run_script("-m", "surefoot", "run", "--json", "report.json", "train.py", "ours.pt", optim)
    record_property("difference", value := difference(torch.load("ours.pt"), torch.load("torch.pt")))
    assert value <= 1e-5
    kinds = {"adamw_torch": "AdamW", "adamw_torch_fused": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop"}
    (made,) = json.loads(Path("report.json").read_text())["optimizers"]
    assert made["class"] == kinds.get(optim, "Adafactor")
    assert made["surefoot"] is (optim in kinds)


def test_muon_with(compare):
    """`surefoot.muon_with(model)`, beside a loop with torch's Muon and AdamW."""

    def loop(optim):
        model = make_model()
        hidden = surefoot.hidden_matrices(model)
        names = {name for name, param in model.named_parameters() if hidden(name, param)}
        matrices = [param for name, param in model.named_parameters() if name in names]
        rest = [param for name, param in model.named_parameters() if name not in names]
        optimizers = optim.Muon(matrices, lr=0.02, weight_decay=0.01), optim.AdamW(rest, lr=1e-2, weight_decay=0.1)
        rows = torch.stack([row["input_ids"] for row in examples(16)])
        for _ in range(6):
            model(input_ids=rows, labels=rows).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return list(model.parameters())

    def trainer(_):
        model = make_model()
        optimizer = surefoot.muon_with(
            model, lr=0.02, weight_decay=0.01, rest_lr=1e-2, rest_options={"weight_decay": 0.1}
        )
        scheduler = surefoot.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        return fitted(model, optimizers=(optimizer, scheduler), per_device_train_batch_size=16)

    compare(loop, ours=trainer, tolerance=1e-2, bits=False)


class Watch(TrainerCallback):
    """Notes in which mode the weights are when they are evaluated and saved."""

    def __init__(self):
        self.modes = []

    def on_evaluate(self, args, state, control, optimizer=None, **kwargs):
        self.modes.append([group["train_mode"] for group in optimizer.optimizer.param_groups])


def test_schedule_free(record_property):
    """Schedule-free: the Trainer switches between training and evaluation."""
    rows = torch.stack([row["input_ids"] for row in examples(16)])

    def trainer():
        model, watch = make_model(), Watch()
        optimizer = surefoot.AdamWScheduleFree(model.parameters(), lr=1e-2)
        scheduler = surefoot.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        made = make_trainer(
            model, optimizers=(optimizer, scheduler), per_device_train_batch_size=16, eval_strategy="steps",
            eval_steps=2, eval_dataset=examples(4), callbacks=[watch], max_grad_norm=0.0,
        )  # fmt: skip
        made.train()
        assert watch.modes == [[False]] * 3
        return list(model.parameters())

    def loop():
        model = make_model()
        optimizer = surefoot.AdamWScheduleFree(model.parameters(), lr=1e-2)
        for _ in range(6):
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()
        return list(model.parameters())

    record_property("difference", value := difference(seeded(trainer), seeded(loop)))
    assert value <= 1e-3  # the Trainer shuffles the batch


def test_telemetry(record_property):
    """`telemetry=`: the norm that the Trainer logs, and the same weights."""

    def train(**options):
        model = make_model()
        optimizer = surefoot.AdamW(model.named_parameters(), lr=1e-2, **options)
        scheduler = surefoot.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        trainer = make_trainer(model, optimizers=(optimizer, scheduler), max_grad_norm=1e9)
        trainer.train()
        if options:
            logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
            measured = [record.total.grad_norm for record in optimizer.telemetry.history]
            assert measured == pytest.approx(logged, rel=1e-5)
        return list(model.parameters())

    record_property("difference", value := difference(seeded(lambda: train(telemetry=True)), seeded(train)))
    assert value == 0


def test_callback_of_integrations(record_property):
    """`surefoot.integrations.transformers.TelemetryCallback`."""
    from surefoot.integrations.transformers import TelemetryCallback

    model = make_model()
    optimizer = surefoot.AdamW(model.named_parameters(), lr=1e-2, telemetry=True)
    scheduler = surefoot.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = make_trainer(model, optimizers=(optimizer, scheduler), logging_steps=2, max_grad_norm=1e9)
    heard = []

    class Reporting(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(dict(logs))

    trainer.callback_handler.callbacks.insert(0, Reporting())  # as report_to's, before those of the script
    TelemetryCallback("*.norm.weight").attach(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        record = optimizer.telemetry.history[entry["step"] - 1]
        assert entry["telemetry/update_ratio"] == record.total.update_ratio
        assert entry["telemetry/grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert entry["telemetry/grad_norm/model.norm.weight"] == record["model.norm.weight"].grad_norm
        assert math.isfinite(sum(value for name, value in entry.items() if name.startswith("telemetry/")))
    assert [entry["telemetry/grad_norm"] for entry in heard if "loss" in entry] == [
        entry["telemetry/grad_norm"] for entry in logged
    ]
