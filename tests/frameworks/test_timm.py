"""timm: a small vision transformer."""

import pytest
import timm
import torch
from timm.optim import Lookahead, create_optimizer_v2, list_optimizers, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler, PlateauLRScheduler, StepLRScheduler, TanhLRScheduler
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3, dispatch_clip_grad
from torch import nn

import surefoot
from conftest import difference, seeded

SIZES = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "qkv_bias": False,
}
"""Without biases of keys, whose gradients are nothing but rounding."""
EPS = 1e-6
"""Above the rounding of gradients that are zero otherwise."""


def make_model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SIZES)


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(4, 3, 16, 16, generator=generator), torch.randint(0, 5, (4,), generator=generator)


def fitted(model, optimizer, scheduler=None, average=None, clip=None, count=6):
    for step, (images, labels) in enumerate(batches(count), 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        if clip:
            dispatch_clip_grad(model.parameters(), value=0.1, mode=clip)
        optimizer.step()
        if average is not None:
            average.update(model)
        if scheduler is not None:
            scheduler.step_update(step)
            scheduler.step(step, metric=1.0)
    return list((model if average is None else average.module).parameters())


SCHEDULERS = {
    "cosine": lambda optimizer: CosineLRScheduler(optimizer, 6, warmup_t=2, warmup_lr_init=1e-5, cycle_limit=2),
    "step": lambda optimizer: StepLRScheduler(optimizer, 2, decay_rate=0.5, noise_range_t=(0, 6)),
    "tanh": lambda optimizer: TanhLRScheduler(optimizer, 6, t_in_epochs=False),
    "plateau": lambda optimizer: PlateauLRScheduler(optimizer, patience_t=1),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(compare, kind):
    """Its schedulers."""

    def train(optim):
        model = make_model()
        optimizer = optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
        return fitted(model, optimizer, SCHEDULERS[kind](optimizer))

    compare(train)


@pytest.mark.parametrize("cls", [ModelEmaV2, ModelEmaV3])
def test_averages(compare, cls):
    """ModelEmaV2 and ModelEmaV3."""

    def train(optim):
        model = make_model()
        return fitted(model, optim.AdamW(model.parameters(), lr=1e-2, eps=EPS), average=cls(model, decay=0.9))

    compare(train)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping(compare, mode):
    """Its clipping: norm, value, adaptive."""

    def train(optim):
        model = make_model()
        return fitted(model, optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), clip=mode)

    compare(train)


def test_layer_decay(compare):
    """Layer decay: `param_groups_layer_decay`."""

    def train(optim):
        model = make_model()
        groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
        for group in groups:
            group["lr"] = 1e-2 * group["lr_scale"]
        return fitted(model, optim.AdamW(groups, lr=1e-2, eps=EPS))

    compare(train)


def test_layer_decay_with_its_scheduler(compare):
    """Layer decay with its scheduler, which applies `lr_scale`."""

    def train(optim):
        model = make_model()
        optimizer = optim.AdamW(param_groups_layer_decay(model, layer_decay=0.7), lr=1e-2, eps=EPS)
        return fitted(model, optimizer, SCHEDULERS["cosine"](optimizer))

    compare(train)


def looking_ahead(optim, model):
    return Lookahead(optim.AdamW(model.parameters(), lr=1e-2, eps=EPS), alpha=0.5, k=2)


def test_lookahead(compare):
    """Lookahead."""

    def train(optim):
        model = make_model()
        return fitted(model, looking_ahead(optim, model))

    compare(train)


def test_lookahead_resumed(compare):
    """Lookahead, resumed."""

    def train(optim):
        model = make_model()
        optimizer = looking_ahead(optim, model)
        fitted(model, optimizer, count=3)
        again = make_model()
        again.load_state_dict(model.state_dict())
        restored = looking_ahead(optim, again)
        restored.load_state_dict(optimizer.state_dict())
        return fitted(again, restored)

    compare(train)


def test_checkpoint_saver(compare):
    """CheckpointSaver and `resume_checkpoint`."""

    def train(optim):
        model = make_model()
        optimizer = optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
        fitted(model, optimizer)
        CheckpointSaver(model, optimizer).save_checkpoint(0, metric=1.0)
        again = make_model()
        restored = optim.AdamW(again.parameters(), lr=1e-2, eps=EPS)
        timm.models.resume_checkpoint(again, "checkpoint-0.pth.tar", restored, log_info=False)
        return fitted(again, restored)

    compare(train)


PAIRS = ["sgd", "momentum", "adam", "adamw", "nadam", "radam", "adamax", "adadelta", "adagrad", "rmsprop"]


@pytest.mark.parametrize("name", [*PAIRS, "lookahead_adamw"])
def test_create_optimizer(compare, name):
    """`create_optimizer_v2` with surefoot's names registered, layer decay included."""
    from surefoot.integrations import timm as integration

    integration.register()
    first, _, last = name.rpartition("_")
    ours = f"{first}_surefoot-{last}" if first else f"surefoot-{last}"

    def train(optim):
        model = make_model()
        known = ours if optim is surefoot else name
        optimizer = create_optimizer_v2(model, known, lr=1e-2, weight_decay=0.05, layer_decay=0.8, eps=EPS)
        assert isinstance(getattr(optimizer, "_base_optimizer", optimizer), surefoot.Optimizer) is (optim is surefoot)
        return fitted(model, optimizer)

    compare(train, tolerance=1e-4)  # RMSprop divides its first gradients by themselves


@pytest.mark.parametrize("name", ["adan", "adopt", "lamb", "laprop", "lion"])
def test_algorithms_of_timm(record_property, name):
    """`create_optimizer_v2`: timm's own algorithm beside ours of that name."""
    from surefoot.integrations import timm as integration

    integration.register()

    def train(name):
        model = make_model()
        return fitted(model, create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.05))

    ours, theirs = seeded(train, f"surefoot-{name}"), seeded(train, name)
    record_property("difference", value := difference(ours, theirs))
    assert value <= 1e-4


def test_every_name_is_made():
    """Every registered name makes an optimizer that steps."""
    from surefoot.integrations import timm as integration

    names = integration.register()
    assert set(names) <= set(list_optimizers())
    for name in names:
        model = make_model()
        fitted(model, create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.01), count=1)
