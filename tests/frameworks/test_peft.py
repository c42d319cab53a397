"""peft: LoRA on a tiny Llama."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from test_transformers import examples, fitted, make_model

import surefoot
from conftest import difference, seeded


def adapted(**options):
    torch.manual_seed(0)
    return get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))


def test_lora_in_the_trainer(compare):
    """LoRA in the Trainer."""
    compare(lambda optim: fitted(adapted(), optimizer_cls_and_kwargs=(optim.AdamW, {})))


def test_dora(compare):
    """DoRA in the Trainer."""
    compare(lambda optim: fitted(adapted(use_dora=True), optimizer_cls_and_kwargs=(optim.AdamW, {})))


def loop(model, optimizer, count=6):
    rows = torch.stack([row["input_ids"] for row in examples(4)])
    for _ in range(count):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


def test_adapters_saved_and_loaded(compare):
    """A loop over all parameters, frozen ones included; adapters saved and loaded."""

    def train(optim):
        model = adapted()
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        loop(model, optimizer, count=3)
        model.save_pretrained("adapter")
        again = PeftModel.from_pretrained(make_model(), "adapter", is_trainable=True)
        restored = optim.AdamW(again.parameters(), lr=1e-2)
        restored.load_state_dict(optimizer.state_dict())
        return loop(again, restored)

    compare(train)


def test_lora_plus(compare):
    """LoRA+ (`create_loraplus_optimizer`)."""

    def train(optim):
        model = adapted()
        optimizer = create_loraplus_optimizer(model, optim.AdamW, lr=1e-2, loraplus_lr_ratio=4)
        return loop(model, optimizer)

    compare(train)


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.1, "telemetry": True}], ids=str)
def test_options(record_property, options):
    """Options of the step, with frozen parameters: the norm is that of the adapters."""

    def clipped():
        model = adapted()
        for _ in range(1):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        rows = torch.stack([row["input_ids"] for row in examples(4)])
        for _ in range(6):
            model(input_ids=rows, labels=rows).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    def ours():
        model = adapted()
        return loop(model, surefoot.AdamW(model.named_parameters(), lr=1e-2, **options))

    record_property("difference", value := difference(seeded(ours), seeded(clipped)))
    assert value <= 1e-5
