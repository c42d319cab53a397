"""Param groups from models: a small GPT, a small ResNet, an encoder with a decoder, all made here."""

import math

import pytest
import torch
from torch import nn

import surefoot
from helpers import assert_same, params_of
from surefoot.groups import parameter_groups


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, add_bias_kv=True)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.gain = nn.Parameter(torch.ones(()))


class Gpt(nn.Module):
    """Token embeddings tied to the head; the positions are registered after the blocks."""

    def __init__(self, layers=3, width=8):
        super().__init__()
        self.tokens = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.positions = nn.Embedding(6, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.tokens.weight


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.convolution = nn.Conv2d(width, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))


class ResNet(nn.Module):
    """Stages of 2, 1 and 2 blocks, with a transition between two of them."""

    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.stage1 = nn.Sequential(Residual(width), Residual(width))
        self.stage2 = nn.Sequential(Residual(width))
        self.transition = nn.Conv2d(width, width, 1)
        self.stage3 = nn.Sequential(Residual(width), Residual(width))
        self.head = nn.Linear(width, 10)


def names(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def rates(groups):
    return {name: group["lr"] for group in groups for name, _ in group["params"]}


# Weight decay


def test_what_is_decayed():
    groups = parameter_groups(Gpt(layers=1), weight_decay=0.1)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 0.1), ("no decay", 0.0)]
    assert all("lr" not in group for group in groups)
    assert names(groups)["decay"] == [
        "tokens.weight",
        "blocks.0.attention.in_proj_weight",
        "blocks.0.attention.out_proj.weight",
        "blocks.0.mlp.0.weight",
        "blocks.0.mlp.2.weight",
        "positions.weight",
    ]


NORMS = [
    nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3), nn.InstanceNorm1d(3, affine=True),
    nn.InstanceNorm2d(3, affine=True), nn.InstanceNorm3d(3, affine=True), nn.LayerNorm((3, 4)), nn.GroupNorm(3, 3),
    nn.RMSNorm((3, 4)),
]  # fmt: skip


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_norms_are_not_decayed_whatever_their_shape(norm):
    for name in norm.state_dict():
        if name in dict(norm.named_parameters()):
            getattr(norm, name).data = torch.ones(3, 4)
    groups = parameter_groups(nn.ModuleDict({"layer": norm}), weight_decay=0.1)
    assert [group["name"] for group in groups] == ["no decay"]


def test_every_norm_of_torch_is_known():
    known = {type(norm).__name__ for norm in NORMS}
    without_parameters = {"LocalResponseNorm", "CrossMapLRN2d"}
    there = {name for name in dir(nn) if "Norm" in name and not name.startswith("Lazy") and name != "NormModule"}
    assert there - without_parameters == known


def test_a_lazy_norm_is_a_norm_once_it_is_initialized():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"`0.weight` has not been initialized yet; run the model once on data first"):
        parameter_groups(model)
    model(torch.ones(2, 3))
    assert [group["name"] for group in parameter_groups(model)] == ["no decay"]


def test_biases_of_two_dimensions_are_not_decayed():
    model = nn.Module()
    model.relative_position_bias_table = nn.Parameter(torch.ones(3, 3))
    model.unbiased = nn.Parameter(torch.ones(3, 3))
    assert names(parameter_groups(model)) == {"decay": ["unbiased"], "no decay": ["relative_position_bias_table"]}


def test_embeddings_by_choice():
    groups = names(parameter_groups(Gpt(), decay_embeddings=False))
    assert {"tokens.weight", "positions.weight"} <= set(groups["no decay"])
    assert not {"tokens.weight", "positions.weight"} & set(groups["decay"])


def test_the_predicate_decides_first():
    def no_decay(name, param):
        return {"tokens.weight": True, "norm.bias": False}.get(name)

    plain, groups = (names(parameter_groups(Gpt(), no_decay=given)) for given in (None, no_decay))
    assert set(groups["decay"]) == set(plain["decay"]) - {"tokens.weight"} | {"norm.bias"}
    everything = parameter_groups(Gpt(), no_decay=lambda name, param: param.dim() < 9)
    assert [group["name"] for group in everything] == ["no decay"]


def test_every_parameter_stands_once_and_frozen_ones_nowhere():
    model = Gpt()
    model.positions.requires_grad_(requires_grad=False)
    groups = parameter_groups(model, lr=1.0, layer_decay=0.5)
    found = [param for group in groups for _, param in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {param for param in model.parameters() if param.requires_grad}


def test_what_is_not_given_is_left_to_the_optimizer():
    optimizer = surefoot.AdamW(parameter_groups(Gpt()), lr=0.3, weight_decay=0.2)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.3, 0.2), (0.3, 0.0)]


# Layers


def test_layers_of_a_transformer():
    groups = parameter_groups(Gpt(), lr=1.0, weight_decay=0.1, layer_decay=0.5)
    assert [group["name"] for group in groups] == [
        "stem, decay",
        *(f"layer {number}, {decay}" for number in (1, 2, 3) for decay in ("decay", "no decay")),
        "head, no decay",
    ]
    found = rates(groups)
    assert found["tokens.weight"] == found["positions.weight"] == 0.5**4
    assert [found[f"blocks.{index}.mlp.0.weight"] for index in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert found["norm.weight"] == 1.0


def test_layers_of_a_resnet():
    found = rates(parameter_groups(ResNet(), lr=1.0, layer_decay=0.5))
    blocks = ["stage1.0", "stage1.1", "stage2.0", "stage3.0", "stage3.1"]
    expected = {"stem.0": 6, "stem.1": 6, "transition": 2, "head": 0}
    expected |= {f"{block}.shortcut.0": 5 - index for index, block in enumerate(blocks)}
    assert {place: math.log2(1 / found[f"{place}.weight"]) for place in expected} == expected


def test_layers_of_an_encoder_and_a_decoder():
    model = nn.Transformer(8, 2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=8, batch_first=True)
    found = rates(parameter_groups(model, lr=1.0, layer_decay=0.5))
    assert [found[f"{part}.layers.{i}.linear1.weight"] for part in ("encoder", "decoder") for i in (0, 1)] == [
        0.5**4, 0.5**3, 0.5**2, 0.5,
    ]  # fmt: skip
    assert found["encoder.norm.weight"] == 0.5**2
    assert found["decoder.norm.weight"] == 1.0


def test_a_model_that_is_nothing_but_blocks():
    model = nn.Sequential(*(Block() for _ in range(3)))
    groups = parameter_groups(model, lr=1.0, layer_decay=0.5)
    assert {group["lr"] for group in groups} == {0.25, 0.5, 1.0}
    assert groups[-1]["name"] == "layer 3, no decay"


def test_containers_in_containers_are_no_blocks():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(Block(), Block()))
    assert {group["name"].split(",")[0] for group in parameter_groups(model, lr=1.0, layer_decay=0.5)} == {
        "stem",
        "layer 1",
        "layer 2",
    }


def test_a_rate_in_a_tensor():
    groups = parameter_groups(Gpt(), lr=torch.tensor(1.0), layer_decay=0.5)
    assert_same(groups[0]["lr"], torch.tensor(0.5**4))
    shared = torch.tensor(1.0)
    assert all(group["lr"] is shared for group in parameter_groups(Gpt(), lr=shared))


def test_a_decay_of_one_changes_no_rate():
    assert set(rates(parameter_groups(Gpt(), lr=0.3, layer_decay=1)).values()) == {0.3}


# With optimizers


def trained(cls, model, **options):
    torch.manual_seed(1)
    optimizer = cls(parameter_groups(model, lr=0.1, weight_decay=0.1, layer_decay=0.5), foreach=False, **options)
    for param in params_of(optimizer):
        param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer


def seeded():
    torch.manual_seed(0)
    return Gpt()


@pytest.mark.parametrize(("source", "target"), [("surefoot", "torch"), ("torch", "surefoot"), ("surefoot", "surefoot")])
def test_state_dicts_cross_with_names_of_groups_and_parameters(source, target):
    start, end = ({"surefoot": surefoot.AdamW, "torch": torch.optim.AdamW}[where] for where in (source, target))
    saved, loaded = trained(start, seeded()), trained(end, seeded())
    loaded.load_state_dict(saved.state_dict())
    for group, other in zip(saved.param_groups, loaded.param_groups, strict=True):
        for key in ("name", "lr", "weight_decay", "param_names"):
            assert group[key] == other[key]
    for param, other in zip(params_of(saved), params_of(loaded), strict=True):
        assert_same(saved.state[param], loaded.state[other])


def test_both_take_the_groups_and_agree():
    ours, theirs = trained(surefoot.AdamW, seeded()), trained(torch.optim.AdamW, seeded())
    assert_same([param.detach() for param in params_of(ours)], [param.detach() for param in params_of(theirs)])


# Errors


class Flat(nn.Module):
    """No layers: one stack of parts, one of bare matrices, one of different blocks."""

    def __init__(self):
        super().__init__()
        self.one = nn.ModuleList([Block()])
        self.bare = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.mixed = nn.Sequential(Block(), Residual(2))


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (Gpt().parameters(), {}, TypeError, "`model` must be a torch.nn.Module, but got generator"),
        (Gpt(), {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        (Gpt(), {"lr": "0.1"}, TypeError, "`lr` must be a number"),
        (Gpt(), {"weight_decay": math.nan}, ValueError, "Invalid weight_decay value: nan"),
        (Gpt(), {"lr": 0.1, "layer_decay": 0.0}, ValueError, r"Invalid layer_decay value: 0.0; .* in \(0, 1\]"),
        (Gpt(), {"lr": 0.1, "layer_decay": 1.5}, ValueError, "Invalid layer_decay value: 1.5"),
        (Gpt(), {"layer_decay": 0.5}, ValueError, "`layer_decay` needs `lr`"),
        (Flat(), {"lr": 0.1, "layer_decay": 0.5}, ValueError, "`layer_decay` needs layers, but this Flat has no"),
        (Gpt(), {"no_decay": ["bias"]}, TypeError, r"`no_decay` must be a function .* but got \['bias'\]"),
        (Gpt(), {"no_decay": lambda *_: "yes"}, TypeError, "must answer True, False or None, but answered 'yes'"),
        (nn.Flatten(), {}, ValueError, "no parameter of this Flatten requires a gradient"),
        (nn.Linear(2, 2).requires_grad_(requires_grad=False), {}, ValueError, "no parameter of this Linear requires"),
        (nn.LazyLinear(2), {}, ValueError, "`weight` has not been initialized yet"),
    ],
)  # fmt: skip
def test_errors(model, options, error, message):
    with pytest.raises(error, match=message):
        parameter_groups(model, **options)
