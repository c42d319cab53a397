"""Algorithms that torch does not have beside the implementations that others use; needs the extra `references`.

The packages are loaded module by module, since some of them import much more than what is compared.
"""

import contextlib
import importlib.util
import io
import sys
import types
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import surefoot
from conformance import normals

STEPS = 20
SHAPES = ((), (5,), (8, 3), (2, 3, 4))


@dataclass(frozen=True)
class Pair:
    """An algorithm and a reference.

    Attributes:
        ours: the name of our class.
        module: the module of the reference.
        theirs: the name of its class there.
        options: hyperparameters of both.
        our_options: further ones of ours.
        their_options: further ones of the reference.
        same_state: whether what is called alike in the state is the same.
    """

    ours: str
    module: str
    theirs: str
    options: dict[str, Any] = field(default_factory=dict)
    our_options: dict[str, Any] = field(default_factory=dict)
    their_options: dict[str, Any] = field(default_factory=dict)
    same_state: bool = True

    def __str__(self) -> str:
        options = self.options | self.our_options
        return ",".join([f"{self.ours}-{self.module}", *(f"{name}={value}" for name, value in options.items())])


OTHERS = "pytorch_optimizer.optimizer"
LONG = {"betas": (0.0, 0.9, 0.99)}
COUPLED = {"decoupled_weight_decay": False}
PAIRS = (
    Pair("Lion", "lion_pytorch.lion_pytorch", "Lion"),
    Pair("Lion", "timm.optim.lion", "Lion"),
    Pair("Lion", "timm.optim.lion", "Lion", {}, {"cautious": True}, {"caution": True}),
    Pair("Lion", f"{OTHERS}.lion", "Lion", {"betas": (0.5, 0.7)}),
    Pair("Lion", "optimi.lion", "Lion"),
    Pair("Signum", f"{OTHERS}.sgd", "SignSGD"),
    Pair("Signum", f"{OTHERS}.sgd", "SignSGD", {"momentum": 0.0}),
    Pair("AdEMAMix", f"{OTHERS}.ademamix", "AdEMAMix", {"alpha": 5.0}, {}, {"weight_decouple": True}),
    Pair(
        "AdEMAMix",
        f"{OTHERS}.ademamix",
        "AdEMAMix",
        {"alpha": 5.0},
        {"beta3_warmup": 15, "alpha_warmup": 15},
        {"weight_decouple": True, "t_alpha_beta3": 15},
    ),
    Pair("AdEMAMix", f"{OTHERS}.ademamix", "AdEMAMix", {**LONG, "alpha": 5.0}, {}, {"weight_decouple": True}),
    Pair("Adan", "timm.optim.adan", "Adan"),
    Pair("Adan", "timm.optim.adan", "Adan", {"no_prox": True}),
    Pair("Adan", f"{OTHERS}.adan", "Adan"),
    Pair("Adan", "optimi.adan", "Adan", {"eps": 1e-8}, same_state=False),  # its averages are free of bias
    Pair("AdaBelief", "adabelief_pytorch.AdaBelief", "AdaBelief", {"betas": (0.9, 0.9)}),
    Pair("AdaBelief", "adabelief_pytorch.AdaBelief", "AdaBelief", {"fixed_decay": True, "betas": (0.9, 0.999)}),
    Pair("AdaBelief", "adabelief_pytorch.AdaBelief", "AdaBelief", {"rectify": False, "amsgrad": True}),
    Pair("AdaBelief", "adabelief_pytorch.AdaBelief", "AdaBelief", {"degenerated_to_sgd": False}),
    Pair("AdaBelief", "adabelief_pytorch.AdaBelief", "AdaBelief", {}, COUPLED, {"weight_decouple": False}),
    Pair("AdaBelief", "timm.optim.adabelief", "AdaBelief", {"betas": (0.9, 0.9)}),
    Pair("ADOPT", "timm.optim.adopt", "Adopt"),
    Pair("ADOPT", "timm.optim.adopt", "Adopt", {"clip_exp": None}),
    Pair("ADOPT", "timm.optim.adopt", "Adopt", {}, {"decoupled_weight_decay": True}, {"decoupled": True}),
    Pair("ADOPT", "timm.optim.adopt", "Adopt", {}, {"cautious": True}, {"caution": True}),
    # It counts one step more than the authors do.
    Pair("ADOPT", f"{OTHERS}.adopt", "ADOPT", {}, {"clip_exp": 0.25}, {"clip_lambda": lambda t: (t - 1) ** 0.25}),
    Pair("AdamAtan2", "adam_atan2_pytorch.adam_atan2", "AdamAtan2"),
    Pair("AdamAtan2", "adam_atan2_pytorch.adam_atan2", "AdamAtan2", {"a": 1.0, "b": 2.0}),
    Pair("LaProp", "timm.optim.laprop", "LaProp"),
    Pair("LaProp", "timm.optim.laprop", "LaProp", {"eps": 1e-3}, {"cautious": True}, {"caution": True}),
    Pair("QHAdam", f"{OTHERS}.qhadam", "QHAdam"),
    Pair("QHAdam", f"{OTHERS}.qhadam", "QHAdam", {"nus": (0.7, 0.9), "betas": (0.995, 0.999)}),
    Pair(
        "QHAdam",
        f"{OTHERS}.qhadam",
        "QHAdam",
        {"nus": (0.7, 1.0)},
        {"decoupled_weight_decay": True},
        {"weight_decouple": True},
    ),
    # It keeps two slots flattened; tests of its own compare d.
    Pair("Prodigy", "prodigyopt.prodigy", "Prodigy", {"d0": 0.1}, same_state=False),
    Pair("Prodigy", "prodigyopt.prodigy", "Prodigy", {"d0": 0.1, "betas": (0.0, 0.9)}, same_state=False),
    Pair("Prodigy", "prodigyopt.prodigy", "Prodigy", {"d0": 0.1, "decouple": False, "beta3": 0.9}, same_state=False),
    Pair(
        "Prodigy",
        "prodigyopt.prodigy",
        "Prodigy",
        {"d0": 0.1, "use_bias_correction": True, "safeguard_warmup": True, "growth_rate": 1.1, "d_coef": 2.0},
        same_state=False,
    ),
    Pair("Prodigy", f"{OTHERS}.prodigy", "Prodigy", {"d0": 0.1}, {}, {"weight_decouple": True}, same_state=False),
    Pair("Yogi", "torch_optimizer.yogi", "Yogi"),
    Pair("Yogi", f"{OTHERS}.yogi", "Yogi", {}, {}, {"weight_decouple": False}),
    Pair("LAMB", "timm.optim.lamb", "Lamb"),
    Pair("LAMB", "timm.optim.lamb", "Lamb", {"max_grad_norm": None, "grad_averaging": False, "always_adapt": True}),
    Pair("LAMB", "timm.optim.lamb", "Lamb", {"trust_clip": True, "bias_correction": False}),
    Pair("LAMB", "timm.optim.lamb", "Lamb", {}, {"cautious": True}, {"caution": True}),
    Pair("LAMB", "timm.optim.lamb", "Lamb", {}, {"decoupled_weight_decay": True}, {"decoupled_decay": True}),
    Pair("LARS", "timm.optim.lars", "Lars", {"momentum": 0.9}),
    Pair("LARS", "timm.optim.lars", "Lars", {"momentum": 0.9, "nesterov": True, "always_adapt": True}),
    Pair("LARS", "timm.optim.lars", "Lars", {"trust_clip": True, "trust_coeff": 0.1}),
    Pair("StableAdamW", "optimi.stableadamw", "StableAdamW", {}, {}, {"triton": False}),
    Pair("NovoGrad", "timm.optim.nvnovograd", "NvNovoGrad"),
    Pair("NovoGrad", "timm.optim.nvnovograd", "NvNovoGrad", {"grad_averaging": True, "amsgrad": True}),
    Pair(
        "NovoGrad",
        "timm.optim.nvnovograd",
        "NvNovoGrad",
        {},
        {"decoupled_weight_decay": True},
        {"decoupled_decay": True},
    ),
    # Its learning rate of vectors is an option of its own; timm's first step is another.
    Pair("MARS", f"{OTHERS}.mars", "MARS", {"optimize_1d": True}),
    Pair("MARS", f"{OTHERS}.mars", "MARS", {"optimize_1d": True, "gamma": 0.5}, {"amsgrad": True}, {"ams_bound": True}),
    Pair("AdamWScheduleFree", "schedulefree.adamw_schedulefree", "AdamWScheduleFree", {"warmup_steps": 3}),
    Pair("AdamWScheduleFree", "schedulefree.adamw_schedulefree", "AdamWScheduleFree", {"r": 1.0, "betas": (0.5, 0.9)}),
    Pair("SGDScheduleFree", "schedulefree.sgd_schedulefree", "SGDScheduleFree", {"warmup_steps": 3}),
    Pair("RAdamScheduleFree", "schedulefree.radam_schedulefree", "RAdamScheduleFree"),
    Pair("RAdamScheduleFree", "schedulefree.radam_schedulefree", "RAdamScheduleFree", {"silent_sgd_phase": False}),
)


@contextlib.contextmanager
def bare_packages(name):
    """Let a module be imported without what its packages import, unless these are there already."""
    before = set(sys.modules)
    parents = name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        package = ".".join(parents[:depth])
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            if spec is None:
                pytest.skip(f"{package} is not installed; the extra `references` has it")
            module = types.ModuleType(package)
            module.__path__ = list(spec.submodule_search_locations)
            sys.modules[package] = module
    yield
    for added in set(sys.modules) - before:
        if added.split(".")[0] == parents[0]:
            del sys.modules[added]


def reference(pair):
    with bare_packages(pair.module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(pair.module), pair.theirs)


def params_of(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in SHAPES]


def trained(optimizer, params):
    """Take steps with a learning rate that falls; return parameters and the tensors of their state."""
    generator = torch.Generator().manual_seed(1)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(STEPS):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        if step == STEPS // 2:
            for group in optimizer.param_groups:
                group["lr"] /= 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    names = {slot.name for slot in getattr(surefoot, type(optimizer).__name__, surefoot.SGD).slots}
    return [
        {"param": param.detach()} | {name: value for name, value in optimizer.state[param].items() if name in names}
        for param in params
    ]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_steps_are_those_of_the_reference(pair, dtype, weight_decay):
    kind, found = reference(pair), []
    options = {**pair.options, "lr": 0.01, "weight_decay": weight_decay}
    for build, more in ((getattr(surefoot, pair.ours), pair.our_options), (kind, pair.their_options)):
        params = params_of(dtype)
        with contextlib.redirect_stdout(io.StringIO()):
            found.append(trained(build(params, **options, **more), params))
    # Some references keep numbers of the state in float32.
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-7}[dtype]
    for ours, theirs in zip(*found, strict=True):
        for name in ours.keys() & theirs.keys() if pair.same_state else ("param",):
            torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


# Their state dicts go on here

GOING_ON = (
    Pair("Lion", "lion_pytorch.lion_pytorch", "Lion"),
    Pair("Lion", "timm.optim.lion", "Lion"),
    Pair("Lion", f"{OTHERS}.lion", "Lion"),
    Pair("Signum", f"{OTHERS}.sgd", "SignSGD"),
    Pair("Adan", "timm.optim.adan", "Adan", {"no_prox": True}),
    Pair("AdEMAMix", f"{OTHERS}.ademamix", "AdEMAMix", {}, {}, {"weight_decouple": True, "t_alpha_beta3": 90}),
    Pair("ADOPT", "timm.optim.adopt", "Adopt", {}, {}, {"decoupled": True}),
    Pair("AdamAtan2", "adam_atan2_pytorch.adam_atan2", "AdamAtan2"),
    Pair("LaProp", "timm.optim.laprop", "LaProp"),
    Pair("Prodigy", "prodigyopt.prodigy", "Prodigy", {}, {}, {"d0": 0.1}),
    Pair("QHAdam", f"{OTHERS}.qhadam", "QHAdam", {}, {}, {"weight_decouple": True}),
    Pair("Yogi", "torch_optimizer.yogi", "Yogi"),
    Pair("AdamWScheduleFree", "schedulefree.adamw_schedulefree", "AdamWScheduleFree", {"warmup_steps": 30, "r": 1.0}),
    Pair("SGDScheduleFree", "schedulefree.sgd_schedulefree", "SGDScheduleFree", {"warmup_steps": 3, "momentum": 0.8}),
    Pair("RAdamScheduleFree", "schedulefree.radam_schedulefree", "RAdamScheduleFree"),
)


def begun(kind, dtype, **options):
    params = params_of(dtype)
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = kind(params, lr=0.01, weight_decay=0.1, **options)
    trained(optimizer, params)
    return optimizer, params


@pytest.mark.parametrize("pair", GOING_ON, ids=str)
def test_a_run_goes_on_here(pair):
    """Hyperparameters, too, are those of the state dict."""
    theirs, params = begun(reference(pair), torch.float64, **pair.options, **pair.their_options)
    copies = [param.detach().clone().requires_grad_() for param in params]
    ours = getattr(surefoot, pair.ours)(copies)
    ours.load_state_dict(theirs.state_dict())
    for one, other in zip(trained(ours, copies), trained(theirs, params), strict=True):
        torch.testing.assert_close(one["param"], other["param"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pair", [pair for pair in GOING_ON if pair.module.startswith("schedulefree.")], ids=str)
def test_a_run_that_was_saved_in_eval_mode_goes_on_here(pair):
    theirs, params = begun(reference(pair), torch.float64, **pair.options)
    theirs.eval()
    copies = [param.detach().clone().requires_grad_() for param in params]
    ours = getattr(surefoot, pair.ours)(copies)
    ours.load_state_dict(theirs.state_dict())
    assert not ours.param_groups[0]["train_mode"]
    for one, other in zip(trained(ours, copies), trained(theirs, params), strict=True):
        torch.testing.assert_close(one["param"], other["param"], rtol=1e-6, atol=1e-6)
    ours.eval()
    theirs.eval()
    for one, other in zip(copies, params, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "option", "value", "kind"),
    [("AdEMAMix", "weight_decouple", False, "always"), ("Yogi", "weight_decouple", True, "never")],
)
def test_another_kind_of_weight_decay_is_refused(name, option, value, kind):
    optimizer = getattr(surefoot, name)([torch.ones(2, requires_grad=True)], weight_decay=0.1)
    saved = optimizer.state_dict()
    saved["param_groups"][0][option] = value
    with pytest.raises(
        ValueError, match=f"^the state dict has `{option}={value}`, but weight decay of {name} is {kind}"
    ):
        optimizer.load_state_dict(saved)
    saved["param_groups"][0]["weight_decay"] = 0.0
    optimizer.load_state_dict(saved)
    assert option not in optimizer.param_groups[0]


# What is stepped matrix by matrix


def stepped_alike(theirs, ours, shapes, dtype):
    """Return how far both have moved the parameters, and how far they are apart then."""
    moved, ends = [], []
    for build in (theirs, ours):
        params = [normals(dtype, seed=i)(*shape).requires_grad_() for i, shape in enumerate(shapes)]
        begun = [param.detach().clone() for param in params]
        optimizer = build(params)
        for step in range(STEPS):
            for i, param in enumerate(params):
                param.grad = normals(dtype, seed=100 * step + i)(*param.shape)
            optimizer.step()
        ends.append([param.detach() for param in params])
        moved.append(max((a - b).abs().max() for a, b in zip(begun, ends[-1], strict=True)))
    return min(moved), max((a - b).abs().max() for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("match", [False, True])
def test_normuon_is_that_of_the_reference(match):
    """To the rounding of bfloat16, in which both orthogonalise."""
    kind = reference(Pair("Muon", f"{OTHERS}.muon.normuon", "NorMuon"))
    options = {"lr": 0.02, "weight_decay": 0.1, "beta2": 0.9}
    ours = {"adjust_lr_fn": "match_rms_adamw"} if match else {"adjust_lr_fn": "original"}
    moved, apart = stepped_alike(
        lambda params: kind([{"params": params, "use_muon": True, **options}], use_adjusted_lr=match),
        lambda params: surefoot.Muon(params, normuon=True, **options, **ours),
        [(8, 12), (12, 5), (16, 16)],
        torch.float32,
    )
    assert apart < 0.02 * moved


@pytest.mark.parametrize(
    ("options", "longest"),
    [({}, 10000), ({"precondition_frequency": 3, "shampoo_beta": 0.9}, 10000), ({"merge_dims": True}, 6)],
    ids=str,
)
def test_soap_is_that_of_the_reference(options, longest):
    """With gradients of full rank along every axis: the eigenvectors of others are anybody's."""
    kind = reference(Pair("SOAP", f"{OTHERS}.soap", "SOAP"))
    moved, apart = stepped_alike(
        lambda params: kind(params, max_precondition_dim=longest, **options),
        lambda params: surefoot.SOAP(params, max_precond_dim=longest, **options),
        [(5, 5), (2, 3, 4), *[(6,)] * ("merge_dims" not in options)],  # of vectors it takes all axes for one of 1
        torch.float64,
    )
    assert apart < 1e-6 * moved
