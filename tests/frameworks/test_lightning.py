"""Lightning."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn

import surefoot
from conftest import difference, run_script, seeded

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}
SCRIPT = """
import sys

import lightning.pytorch as pl
import torch
from torch import nn

optim = torch.optim if sys.argv[2] == "torch" else __import__("surefoot")
torch.manual_seed(0)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, _):
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return optim.AdamW(self.parameters(), lr=1e-2)


if __name__ == "__main__":
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, gradient_clip_val=0.1,
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    if trainer.is_global_zero:
        torch.save([param.detach() for param in model.parameters()], sys.argv[1])
"""


def make_loader():
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(32, 8, generator=generator), torch.randn(32, 1, generator=generator)
    )
    return torch.utils.data.DataLoader(data, batch_size=4)


class Model(pl.LightningModule):
    """A regression whose optimizer is made by a function of its parameters."""

    def __init__(self, configure, lr=1e-2):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.configure, self.lr = configure, lr

    def training_step(self, batch, _):
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("validation", nn.functional.mse_loss(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.configure(self)


def fitted(configure, model=Model, validate=False, ckpt_path=None, **options):
    module = model(configure)
    trainer = pl.Trainer(**QUIET | {"max_epochs": 3} | options)
    trainer.fit(module, make_loader(), make_loader() if validate else None, ckpt_path=ckpt_path)
    return list(module.parameters())


def test_schedule_by_step(compare):
    """OneCycleLR by step."""

    def train(optim):
        def configure(module):
            optimizer = optim.Adam(module.parameters(), lr=1e-2)
            scheduler = optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=24)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        return fitted(configure)

    compare(train)


def test_schedule_by_epoch(compare):
    """SequentialLR by epoch."""

    def train(optim):
        def configure(module):
            optimizer = optim.SGD(module.parameters(), lr=1e-2, momentum=0.9, nesterov=True)
            warm = optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=1)
            cool = optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
            return [optimizer], [optim.lr_scheduler.SequentialLR(optimizer, [warm, cool], [1])]

        return fitted(configure)

    compare(train)


def test_plateau(compare):
    """ReduceLROnPlateau of a validation metric."""

    def train(optim):
        def configure(module):
            optimizer = optim.AdamW(module.parameters(), lr=0.5)
            plateau = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "validation"}}

        return fitted(configure, validate=True, max_epochs=5)

    compare(train)


def test_lbfgs(compare):
    """LBFGS, whose closure is the training step."""
    compare(lambda optim: fitted(lambda module: optim.LBFGS(module.parameters(), lr=0.1, max_iter=4)))


def adamw(optim, **options):
    return lambda module: optim.AdamW(module.parameters(), lr=1e-2, **options)


def test_accumulation_and_clipping(compare):
    """`accumulate_grad_batches` and `gradient_clip_val`."""
    compare(lambda optim: fitted(adamw(optim), accumulate_grad_batches=2, gradient_clip_val=0.1))


def test_clipping_by_value(compare):
    """`gradient_clip_algorithm="value"`."""
    compare(lambda optim: fitted(adamw(optim), gradient_clip_val=0.01, gradient_clip_algorithm="value"))


def test_bf16(compare):
    """`precision="bf16-mixed"`, clipped."""
    compare(lambda optim: fitted(adamw(optim), precision="bf16-mixed", gradient_clip_val=0.1), tolerance=1e-2)


def test_bf16_true(compare):
    """`precision="bf16-true"` beside torch.optim in bfloat16: other roundings of ours, on purpose."""
    compare(lambda optim: fitted(adamw(optim), precision="bf16-true"), tolerance=5e-2, bits=False)


def test_averages(compare):
    """StochasticWeightAveraging."""
    compare(lambda optim: fitted(adamw(optim), max_epochs=5, callbacks=[StochasticWeightAveraging(1e-3, 2)]))


def test_ema(compare):
    """EMAWeightAveraging."""
    compare(lambda optim: fitted(adamw(optim), callbacks=[EMAWeightAveraging(decay=0.9)]))


class Adversarial(Model):
    """Two optimizers, each with a schedule, stepped by hand."""

    def __init__(self, configure):
        super().__init__(configure)
        self.automatic_optimization = False
        self.critic = nn.Linear(9, 1)

    def training_step(self, batch, _):
        generator, critic = self.optimizers()
        inputs, targets = batch
        made = self.layers(inputs)
        self.toggle_optimizer(critic)
        score = lambda outputs: self.critic(torch.cat([inputs, outputs], 1)).mean()  # noqa: E731
        loss = score(made.detach()) - score(targets) + 0.1 * self.critic.weight.square().sum()
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(-score(made))
        self.clip_gradients(generator, 0.1, "norm")
        generator.step()
        self.untoggle_optimizer(generator)
        for scheduler in self.lr_schedulers():
            scheduler.step()


def test_two_optimizers(compare):
    """A GAN: manual optimization with two optimizers and two schedules."""

    def train(optim):
        def configure(module):
            generator = optim.Adam(module.layers.parameters(), lr=1e-2, betas=(0.5, 0.999))
            critic = optim.RMSprop(module.critic.parameters(), lr=1e-3)
            schedules = [optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (generator, critic)]
            return [generator, critic], schedules

        return fitted(configure, model=Adversarial)

    compare(train)


def resumed(first, second):
    """Return the weights of a training that is gone on with from its second epoch, by another optimizer maybe."""
    saving = ModelCheckpoint("saved", filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    fitted(first, enable_checkpointing=True, callbacks=[saving])
    return fitted(second, ckpt_path="saved/epoch=1.ckpt")


def cosine(optim, **options):
    def configure(module):
        optimizer = optim.AdamW(module.named_parameters() if options else module.parameters(), lr=1e-2, **options)
        return [optimizer], [optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)]

    return configure


def test_resume(compare):
    """Resume (`ckpt_path=`)."""
    compare(lambda optim: resumed(cosine(optim), cosine(optim)))


def test_resume_from_torch(compare):
    """Resume with surefoot from a checkpoint of torch.optim."""
    compare(lambda optim: resumed(cosine(torch.optim), cosine(optim)))


def test_resume_by_torch(compare):
    """Resume with torch.optim from a checkpoint of surefoot."""
    compare(lambda optim: resumed(cosine(optim), cosine(torch.optim)))


@pytest.mark.parametrize(
    "options",
    [{"ema": 0.9, "max_grad_norm": 0.5, "nonfinite": "skip"}, {"state_dtype": "float8"}, {"telemetry": True}],
    ids=str,
)
def test_resume_with_options(record_property, options):
    """Resume with options of the step or 8-bit state: the bits of the run that was not interrupted."""
    configure = cosine(surefoot, **options)
    whole = seeded(lambda: fitted(configure))
    record_property("difference", value := difference(seeded(lambda: resumed(configure, configure)), whole))
    assert value == 0


def test_muon_with(compare):
    """`surefoot.muon_with(model)`, beside torch's Muon and AdamW stepped by hand."""

    class ByHand(Model):
        def __init__(self, configure):
            super().__init__(configure)
            self.automatic_optimization = False

        def training_step(self, batch, _):
            loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    def theirs(module):
        rest = [module.layers[0].bias, *module.layers[2].parameters()]
        return torch.optim.Muon([module.layers[0].weight], lr=0.02, weight_decay=0.1), torch.optim.AdamW(rest, lr=1e-3)

    def ours(module):
        return surefoot.muon_with(
            module, lr=0.02, weight_decay=0.1, rest_lr=1e-3, rest_options={"weight_decay": 1e-2}, head="layers.2.*"
        )

    compare(lambda _: fitted(theirs, model=ByHand), ours=lambda _: fitted(ours), tolerance=1e-2, bits=False)


class Switching(pl.Callback):
    """What Lightning has no hook of its own for: the mode of a schedule-free optimizer."""

    def on_train_epoch_start(self, trainer, module):
        for optimizer in trainer.optimizers:
            optimizer.train()

    def on_validation_start(self, trainer, module):
        for optimizer in trainer.optimizers:
            optimizer.eval()

    on_train_end = on_validation_start


def test_schedule_free(record_property):
    """Schedule-free, switched by a callback."""

    def configure(module):
        return surefoot.AdamWScheduleFree(module.parameters(), lr=1e-2)

    def bare():
        module = Model(configure)
        optimizer = configure(module)
        for _ in range(3):
            for inputs, targets in make_loader():
                nn.functional.mse_loss(module.layers(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
        optimizer.eval()
        return list(module.parameters())

    train = lambda: fitted(configure, validate=True, callbacks=[Switching()])  # noqa: E731
    record_property("difference", value := difference(seeded(train), seeded(bare)))
    assert value <= 1e-6  # what is switched to and fro may round


def test_learning_rate_finder(compare):
    """`Tuner.lr_find`."""

    def train(optim):
        module = Model(lambda module: optim.AdamW(module.parameters(), lr=module.lr))
        trainer = pl.Trainer(**QUIET | {"max_epochs": 2})
        Tuner(trainer).lr_find(module, make_loader(), num_training=20)
        trainer.fit(module, make_loader())
        return [*module.parameters(), torch.tensor(module.lr)]

    compare(train, tolerance=1e-4)


def test_two_processes(record_property):
    """Two processes: `strategy="ddp"`."""
    Path("train.py").write_text(SCRIPT)
    for kind in "torch", "surefoot":
        run_script("train.py", f"{kind}.pt", kind)
    value = difference(torch.load("surefoot.pt"), torch.load("torch.pt"))
    record_property("difference", value)
    assert value <= 1e-5


def test_callback_of_integrations():
    """`surefoot.integrations.lightning.TelemetryCallback`."""
    from surefoot.integrations.lightning import TelemetryCallback

    made = []

    def configure(module):
        made.append(surefoot.AdamW(module.named_parameters(), lr=1e-2, telemetry=True))
        return made

    logger = CSVLogger("logs", flush_logs_every_n_steps=1)
    callbacks = [TelemetryCallback("*.0.weight")]
    fitted(configure, logger=logger, callbacks=callbacks, log_every_n_steps=2, gradient_clip_val=0.1)
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    names, first = rows[0].split(","), rows[1].split(",")
    logged = dict(zip(names, first, strict=True))
    (optimizer,) = made
    record = optimizer.telemetry.history[int(logged["step"])]
    assert float(logged["telemetry/update_ratio"]) == pytest.approx(record.total.update_ratio)
    assert float(logged["telemetry/grad_norm/layers.0.weight"]) == pytest.approx(record["layers.0.weight"].grad_norm)
    assert len(rows) == 1 + 12
