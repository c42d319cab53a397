"""The two trainings of `surefoot demo`: fair to both, timed honestly, and of use with every optimizer."""

import re
from time import sleep

import pytest
import torch

from surefoot import optimizers
from surefoot.cli._demo.errors import DemoError
from surefoot.cli._demo.model import Shape, build_model, continue_text
from surefoot.cli._demo.recipes import RECIPES, TrainedPart, resolve
from surefoot.cli._demo.text import Corpus, batch_at, draw_starts, help_topics
from surefoot.cli._demo.training import Clock, Contender, Gap, Training, TrainingSetup, compare

TINY = Shape(context=16, width=16, blocks=1, heads=2)
CORPUS = Corpus.of("she sells sea shells by the sea shore; " * 60)
TORCH_TWICE = ("torch.optim", "torch.optim")
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
ALONE = ("Muon", "LBFGS", "SparseAdam")


def plan_of(optimizer, **changes):
    return TrainingSetup(optimizer, **{"steps": 3, "lr": RECIPES[optimizer].lr, "shape": TINY} | changes)


def test_what_torch_has_not_has_a_reference_that_it_has():
    assert set(RECIPES) == set(optimizers.__all__)
    assert {name for name, recipe in RECIPES.items() if recipe.reference is not None} == optimizers.NOT_IN_TORCH
    assert all(hasattr(torch.optim, recipe.reference or name) for name, recipe in RECIPES.items())


@pytest.mark.parametrize(("written", "meant"), [("AdamW", "AdamW"), ("adamw", "AdamW"), ("LBFGs", "LBFGS")])
def test_names_are_found_in_any_case(written, meant):
    assert resolve(written) == meant


def test_the_same_library_twice_gives_the_same_bits():
    comparison = compare(plan_of("AdamW", steps=10, libraries=TORCH_TWICE), CORPUS)
    one, _, other = comparison.outcomes
    assert set(other.gaps) == set(range(1, 11))
    assert set(other.gaps.values()) == {Gap(0.0, same_bits=True)}
    assert one.losses == other.losses
    assert (one.train_loss, one.held_out_loss) == (other.train_loss, other.held_out_loss)


@pytest.mark.parametrize("optimizer", [name for name in RECIPES if name not in optimizers.NOT_IN_TORCH])
def test_every_optimizer_of_torch_runs_with_both_libraries(optimizer):
    comparison = compare(plan_of(optimizer), CORPUS)
    one, *others = comparison.outcomes
    engine = "fused" if optimizer in FUSED else "foreach"
    second = [] if optimizer in ALONE else [f"torch.optim.{optimizer}, {engine}"]
    labels = [f"torch.optim.{optimizer}", *second, f"surefoot.{optimizer}"]
    assert [outcome.label for outcome in comparison.outcomes] == labels
    for other in others:
        assert one.losses[0] == other.losses[0]
        assert one.losses == pytest.approx(other.losses, abs=1e-3)
        assert set(other.gaps) == {1, 2, 3}
    for outcome in comparison.outcomes:
        assert all(len(seconds) == 3 for seconds in outcome.clock.optimizers.values())
        assert 0 < outcome.clock.share < 1


@pytest.mark.parametrize("optimizer", sorted(optimizers.NOT_IN_TORCH))
def test_what_torch_has_not_runs_beside_its_reference(optimizer):
    setup = plan_of(optimizer, steps=8)  # in the first of which RAdamScheduleFree stands still
    assert setup.labels == ("torch.optim.AdamW", f"surefoot.{optimizer}")
    one, other = (Training(each, setup, build_model(len(CORPUS.alphabet), TINY, 0)) for each in setup.contenders)
    rates = [group["lr"] for each in (one, other) for built in each.optimizers.values() for group in built.param_groups]
    assert rates == [RECIPES["AdamW"].lr, RECIPES[optimizer].lr]
    reference, ours = compare(setup, CORPUS).outcomes
    assert reference.losses == compare(plan_of("AdamW", steps=8), CORPUS).outcomes[0].losses
    assert ours.losses[0] == reference.losses[0]
    assert ours.losses[-1] not in (ours.losses[0], reference.losses[-1])
    assert [len(seconds) for seconds in ours.clock.optimizers.values()] == [8]


def test_what_is_evaluated_is_what_schedule_free_optimizers_ship():
    setup = plan_of("SGDScheduleFree", steps=5)
    comparison = compare(setup, CORPUS)
    training = Training(Contender("surefoot"), setup, build_model(len(CORPUS.alphabet), TINY, 0))
    for starts in draw_starts(CORPUS.train, (5, setup.recipe.batch), TINY.context, 0):
        training.step(batch_at(CORPUS.train, starts, TINY.context))
    trained = [param.detach().clone() for param in training.model.parameters()]
    (optimizer,) = training.optimizers.values()
    with optimizer.eval_mode():
        shipped = [param.detach().clone() for param in training.model.parameters()]
    assert all(map(torch.equal, comparison.model.parameters(), shipped))
    assert not any(map(torch.equal, trained, shipped))


def test_short_numbers_are_those_of_the_second_library():
    short = {"master_weight_bits": 24, "state_dtype": "float8"}
    plan = plan_of("AdamW", dtype=torch.bfloat16, storage=short)
    model = build_model(len(CORPUS.alphabet), TINY, 0).to(torch.bfloat16)
    assert [contender.engine for contender in plan.contenders] == ["", "foreach", ""]
    groups = [Training(each, plan, model).optimizers["AdamW"].param_groups[0] for each in plan.contenders]
    assert [{name: group[name] for name in short if name in group} for group in groups] == [{}, {}, short]
    comparison = compare(plan, CORPUS)
    one, _, other = comparison.outcomes
    assert one.losses[0] == other.losses[0]
    assert one.losses == pytest.approx(other.losses, abs=1e-2)
    assert not other.gaps[3].same_bits
    assert {param.dtype for param in comparison.model.parameters()} == {torch.float32}


def test_options_that_an_optimizer_has_not_are_said():
    with pytest.raises(DemoError, match="Muon has a custom step, which takes no .state_dtype='float8'"):
        compare(plan_of("Muon", storage={"state_dtype": "float8"}), CORPUS)


def test_the_loss_falls_on_text_it_has_not_seen():
    comparison = compare(plan_of("AdamW", steps=60, lr=1e-2), CORPUS)
    for outcome in comparison.outcomes:
        assert outcome.losses[-1] < 0.5 * outcome.losses[0]
        assert outcome.held_out_loss < 0.5 * outcome.losses[0]


def test_the_seed_decides_everything_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    runs = [compare(plan_of("SGD", seed=seed, libraries=TORCH_TWICE), CORPUS) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0].outcomes[0].losses == runs[1].outcomes[0].losses != runs[2].outcomes[0].losses
    prompt = CORPUS.encode("she ")
    texts = [CORPUS.decode(continue_text(run.model, prompt, 40, seed=5)) for run in runs[:2]]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 40


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon", "SparseAdam"])
def test_each_parameter_has_one_optimizer(optimizer):
    setup = plan_of(optimizer)
    pairs = setup.recipe.part is TrainedPart.TABLE
    model = build_model(len(CORPUS.alphabet), TINY, 0, pairs=pairs)
    training = Training(Contender("torch.optim"), setup, model)
    groups = [group for built in training.optimizers.values() for group in built.param_groups]
    taken = [id(param) for group in groups for param in group["params"]]
    assert sorted(taken) == sorted(id(param) for param in model.parameters())


def test_evaluations_of_a_closure_are_not_the_optimizers_time(monkeypatch):
    training = Training(Contender("torch.optim"), plan_of("LBFGS"), build_model(len(CORPUS.alphabet), TINY, 0))
    batch = batch_at(CORPUS.train, draw_starts(CORPUS.train, (1, 2), TINY.context, 0)[0], TINY.context)
    training.model.register_forward_hook(lambda *_: sleep(0.05))
    training.step(batch)
    (inside,) = training.clock.optimizers["LBFGS"]
    (whole,) = training.clock.whole
    assert whole > 0.1
    assert inside < whole - 0.1


def test_medians_and_share_of_a_clock():
    clock = Clock({"A": [0.001, 0.003, 0.002], "B": [0.004, 0.004, 0.1]}, [0.01, 0.02, 0.05])
    assert clock.optimizer_ms == pytest.approx([5, 7, 102])
    assert clock.median_ms("A") == pytest.approx(2)
    assert clock.whole_ms == pytest.approx(20)
    assert clock.share == pytest.approx(0.35)
    assert clock.steps_per_second == pytest.approx(37.5)


def test_a_gap_of_signed_zeros_is_not_the_same_bits():
    one, other = (torch.nn.ParameterList([torch.tensor([zero, 1.0])]) for zero in (0.0, -0.0))
    assert Gap.between(one, other) == Gap(0.0, same_bits=False)


def test_a_loss_that_explodes_is_said():
    text = (
        r"^with torch\.optim\.SGD(, fused)? the loss became (inf|nan) in step \d: give a smaller --lr, or leave it out$"
    )
    with pytest.raises(DemoError, match=text):
        compare(plan_of("SGD", lr=1e30), CORPUS)


def test_a_library_without_the_optimizer_is_said():
    text = "math has no AdamW here; with --optimizer name one it has: none at all"
    with pytest.raises(DemoError, match=f"^{re.escape(text)}$"):
        compare(plan_of("AdamW", libraries=("torch.optim", "math")), CORPUS)


def test_no_paragraph_is_both_trained_on_and_held_out():
    corpus = Corpus.of(help_topics())
    train, held_out = (corpus.decode(data).split("\n\n") for data in (corpus.train, corpus.held_out))
    assert len(corpus.train) > 200_000
    assert set(train).isdisjoint(held_out)


def test_text_survives_its_numbers():
    assert CORPUS.decode(CORPUS.encode("sea shore")) == "sea shore"


def test_targets_are_the_inputs_one_character_on():
    batch = batch_at(torch.arange(10), torch.tensor([0, 5]), 4)
    assert batch.inputs.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]


def test_the_model_sees_no_character_that_comes_later():
    model = build_model(len(CORPUS.alphabet), TINY, 0, pairs=True)
    for param in model.parameters():
        torch.nn.init.normal_(param, generator=torch.Generator().manual_seed(0))
    text = CORPUS.encode("she sells")
    changed = text.clone()
    changed[0, 5:] = 0
    assert torch.equal(model(text)[:, :5], model(changed)[:, :5])
    assert not torch.equal(model(text)[:, 5:], model(changed)[:, 5:])
