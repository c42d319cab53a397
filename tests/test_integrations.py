"""What frameworks are told about surefoot, with stand-ins for them; tests/frameworks has the frameworks themselves."""

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import surefoot
from helpers import make_params, train

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class OptimInfo:
    name: str
    opt_class: type
    description: str = ""
    has_eps: bool = True
    has_momentum: bool = False
    has_betas: bool = False
    num_betas: int = 2
    defaults: dict | None = None


class Registry:
    def __init__(self):
        self.infos = {}
        self.register(OptimInfo("sgd", torch.optim.SGD, has_momentum=True, defaults={"nesterov": True}))
        self.register(OptimInfo("momentum", torch.optim.SGD, has_momentum=True))
        self.register(OptimInfo("fusedsgd", "apex.optimizers.FusedSGD"))
        self.register(OptimInfo("lion", type("Lion", (), {}), has_betas=True))

    def register(self, info):
        assert info.name not in self.infos
        assert "_" not in info.name  # timm takes what stands before it for a wrapper
        self.infos[info.name] = info

    def list_optimizers(self):
        return sorted(self.infos)

    def get_optimizer_info(self, name):
        return self.infos[name]


@pytest.fixture
def integration(monkeypatch):
    """Return a function that imports a module of `surefoot.integrations`, its framework being a stand-in."""

    def stand_in(name, **contents):
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    stand_in("transformers", TrainerCallback=object)
    stand_in("lightning")
    stand_in("lightning.pytorch", Callback=object)
    stand_in("timm")
    stand_in("timm.optim", OptimInfo=OptimInfo)
    stand_in("timm.optim._optim_factory", default_registry=Registry())

    def load(name):
        monkeypatch.delitem(sys.modules, f"surefoot.integrations.{name}", raising=False)
        return importlib.import_module(f"surefoot.integrations.{name}")

    yield load
    for name in ("transformers", "lightning", "timm"):
        sys.modules.pop(f"surefoot.integrations.{name}", None)


def measured(**options):
    return surefoot.AdamW([("first", make_params([(3,)])[0]), ("second", make_params([(2,)])[0])], **options)


def trained(callback, optimizer, wrapped):
    """Log after each of four steps, as the Trainer does."""
    state = SimpleNamespace(log_history=[])
    callback.on_train_begin(None, state, None, optimizer=wrapped, model=None)
    for _ in range(4):
        train(optimizer, steps=1)
        logs = {"loss": 1.0}
        state.log_history.append(dict(logs))
        callback.on_log(None, state, None, logs=logs, optimizer=wrapped)
        assert logs == state.log_history[-1]
    return state.log_history


def test_the_trainer_logs_telemetry(integration):
    callback = integration("transformers").TelemetryCallback("sec*")
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=["sends"]))
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks == [callback, "sends"]
    optimizer = measured(telemetry=surefoot.telemetry.Telemetry(every=2))
    logged = trained(callback, optimizer, SimpleNamespace(optimizer=optimizer))
    for entry, record in zip(logged[::2], optimizer.telemetry.history, strict=True):
        assert entry["telemetry/grad_norm"] == record.total.grad_norm
        assert entry["telemetry/update_ratio/second"] == record["second"].update_ratio
        assert "telemetry/update_ratio/first" not in entry
    assert logged[1] == logged[3] == {"loss": 1.0}  # not measured
    callback.on_log(None, SimpleNamespace(log_history=[{}]), None, logs=(summary := {"train_runtime": 1.0}))
    assert summary == {"train_runtime": 1.0}


def test_a_callback_refuses_what_measures_nothing(integration):
    callback = integration("transformers").TelemetryCallback()
    message = "TelemetryCallback found no telemetry in AdamW; make an optimizer of surefoot's with `telemetry=True`"
    with pytest.raises(ValueError, match=re.escape(message)):
        callback.on_train_begin(None, None, None, optimizer=SimpleNamespace(optimizer=measured()))


def test_lightning_logs_telemetry(integration):
    callback = integration("lightning").TelemetryCallback()
    optimizers = [measured(telemetry=True) for _ in range(2)]
    trainer = SimpleNamespace(optimizers=optimizers, global_step=0, log_every_n_steps=2)
    logged = []
    module = SimpleNamespace(automatic_optimization=True, log_dict=logged.append)
    callback.on_train_start(trainer, module)
    for trainer.global_step in (1, 2):
        for optimizer in optimizers:
            train(optimizer, steps=1)
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert [{name.split("/")[1] for name in numbers} for numbers in logged] == [{"0"}, {"1"}]
    assert logged[1]["telemetry/1/grad_norm"] == optimizers[1].telemetry.latest().total.grad_norm
    callback.on_train_batch_end(trainer, module, None, None, 0)
    assert logged[2:] == [{}, {}]  # a batch that was accumulated only


def test_lightning_under_its_older_name(integration, monkeypatch):
    older = ModuleType("pytorch_lightning")
    older.Callback = type("Older", (), {})
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", older)
    assert issubclass(integration("lightning").TelemetryCallback, older.Callback)


def test_timm_gets_our_names(integration):
    module = integration("timm")
    names = module.register()
    assert module.register() == names
    infos = sys.modules["timm.optim._optim_factory"].default_registry.infos
    assert [name for name in names if infos[name].opt_class is surefoot.SGD] == ["surefoot-momentum", "surefoot-sgd"]
    assert infos["surefoot-sgd"].defaults == {"nesterov": True}
    assert infos["surefoot-momentum"].has_momentum
    assert infos["surefoot-lion"].opt_class is surefoot.Lion
    assert infos["surefoot-ademamix"].num_betas == 3
    assert not infos["surefoot-lion"].has_eps
    assert "surefoot-fusedsgd" not in infos
    left_out = {f"surefoot-{name.lower()}" for name in surefoot.optimizers.__all__} - set(names)
    assert left_out == {f"surefoot-{name}" for name in ("lbfgs", "muon", "rprop", "sparseadam")}


def test_each_is_explained(integration):
    page = (ROOT / "docs/reference/integrations.md").read_text(encoding="utf-8")
    for name in re.findall(r"^::: (surefoot\.[\w.]+)", page, re.MULTILINE):
        module, _, item = name.removeprefix("surefoot.integrations.").partition(".")
        value = getattr(integration(module), item)
        arguments = [key for key in inspect.signature(value).parameters if key != "self"]
        assert [key for key in arguments if f"{key}:" not in value.__doc__] == []
