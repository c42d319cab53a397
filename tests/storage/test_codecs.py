"""Formats of 16 and 8 bits, enumerated: by torch's operations and in kernels, against what their definitions say."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surefoot.codegen.compile import build_kernel
from surefoot.codegen.threads import run_on_threads
from surefoot.engines.cpu.source import _STORAGE
from surefoot.storage import BLOCK, codecs, decode, encode, format_8_bits, format_16_bits, random_bits, scale_shape

BF16, F16 = torch.bfloat16, torch.float16
ALL_16 = torch.arange(1 << 16).to(torch.int32).to(torch.int16)
SIGNED = (True, False)


def floats(bits):
    """Float32 values of bit patterns."""
    return torch.from_numpy(np.asarray(bits, dtype=np.uint32).view(np.float32).copy())


@pytest.fixture(scope="module")
def values():
    """All exponents with mantissas at and around every kind of tie, both signs, and what is not a finite number."""
    mantissas = [0, 1, 0x7F, 0x80, 0x81, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x18000, 0x1FFFFF, 0x400000, 0x7FFFFF]
    bits = [sign | exponent << 23 | m for sign in (0, 1 << 31) for exponent in range(256) for m in mantissas]
    return floats(bits)


def code_value(code, *, signed):
    """The value of a code in units of its scale, by the definition of the format."""
    sign = -1.0 if signed and code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F if signed else code) >> 3, code & 7
    if signed and code & 0x7F == 0x7F:
        return sign * math.inf
    if signed and code == 0x80:
        return math.nan
    if not signed and exponent == 31:
        return math.nan if mantissa else math.inf
    return sign * (mantissa * 2.0**-17 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 18))


def table(*, signed):
    return torch.tensor([code_value(code, signed=signed) for code in range(256)])


# In kernels: the same bits as by torch's operations


def run_kernel(lines, arrays, n, name):
    """Run lines of the language of kernels for each of n elements of some arrays, given by name."""
    kinds = {torch.float32: "float32", torch.uint8: "uint8", torch.int8: "int8", torch.int16: "int16"}
    kinds |= {BF16: "uint16", F16: "uint16", torch.int32: "uint32"}
    words = np.zeros(8 + len(arrays), dtype=np.int64)
    views = "\n".join(
        f"    {key} = array(slots[{8 + i}], {kinds[tensor.dtype]})" for i, (key, tensor) in enumerate(arrays.items())
    )
    words[8:] = [tensor.data_ptr() for tensor in arrays.values()]
    body = "\n".join(f"        {line}" for line in lines)
    head = "real = float32\n\ndef kernel(launch):\n    slots = array(launch, int64)"
    source = f"{head}\n{views}\n    for i in range({n}):\n{body}\n"
    run_on_threads(build_kernel(source, name).address, words.ctypes.data, 1)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("bits", [0, 24, 32])
def test_kernels_load_every_16_bit_number(dtype, bits):
    correction = {0: None, 24: torch.int8, 32: torch.int16}[bits]
    kept = format_16_bits(dtype, stochastic=not bits, correction=correction)
    stored = ALL_16.view(dtype)
    for low in (0,) if not bits else (0, 1, -1, 100, torch.iinfo(correction).min, torch.iinfo(correction).max):
        part = torch.full_like(stored, low, dtype=correction) if bits else torch.zeros(1)
        found = torch.empty(len(stored))
        row = _STORAGE[kept]
        run_kernel(
            [f"out[i] = {row.load.format(at='stored[i]', part='part[i]')}"],
            {"stored": stored, "part": part, "out": found},
            len(stored),
            "loads",
        )
        expected = decode(kept, stored, part if bits else None).float()
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(
    "kept", [kept for kept in _STORAGE if not kept.is_plain and not kept.code], ids=lambda k: k.name
)
def test_kernels_store_16_bits_as_torchs_operations_do(kept, values):
    random = torch.randint(0, 1 << 16, values.shape, generator=torch.Generator().manual_seed(0))
    stored, part = (
        torch.empty(values.shape, dtype=kept.dtype),
        torch.zeros(values.shape, dtype=kept.correction or torch.int8),
    )
    row = _STORAGE[kept]
    lines = [f"stored[i] = {row.store.format(value='values[i]', random='random[i]')}"]
    if kept.correction:
        lines.append(f"part[i] = {row.part[1].format(value='values[i]', random='random[i]')}")
    given_ = {"values": values, "random": random.to(torch.int32), "stored": stored, "part": part}
    run_kernel(lines, given_, len(values), "stores")
    expected = encode(kept, values, random if kept.stochastic else None)
    for found, wanted in zip((stored, part), expected, strict=False):
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("signed", SIGNED)
def test_kernels_load_every_code(signed):
    codes, found = torch.arange(256).to(torch.uint8), torch.empty(256)
    row = _STORAGE[format_8_bits(signed=signed)]
    run_kernel(
        [f"out[i] = {row.load.format(at='codes[i]', part='float32(0.25)')}"],
        {"codes": codes, "out": found},
        256,
        "codes",
    )
    expected = table(signed=signed) * 0.25
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


# 16 bits and corrections


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_correction_holds_all_16_bit_numbers_with_nothing_to_correct(dtype):
    stored = ALL_16.view(dtype)
    for correction in (torch.int8, torch.int16):
        kept = format_16_bits(dtype, stochastic=False, correction=correction)
        number, low = encode(kept, stored.float())
        assert torch.equal(number.isnan(), stored.isnan())
        assert torch.equal(number[~stored.isnan()].view(torch.int16), stored[~stored.isnan()].view(torch.int16))
        assert not low.any()


def test_32_bits_of_bfloat16_are_float32(values):
    kept = format_16_bits(BF16, stochastic=False, correction=torch.int16)
    number, low = encode(kept, values)
    held = decode(kept, number, low)
    assert torch.equal(held.isnan(), values.isnan())
    assert torch.equal(held[~values.isnan()].view(torch.int32), values[~values.isnan()].view(torch.int32))
    fits = ~values.isnan() & (values.view(torch.int32) & 0xFFFF != 0x8000)  # ties go away from zero
    assert torch.equal(number[fits], values[fits].to(BF16))


def test_32_bits_of_float16_are_float32_in_its_range(values):
    kept = format_16_bits(F16, stochastic=False, correction=torch.int16)
    held = decode(kept, *encode(kept, values))
    inside = (values.abs() >= 2.0**-14) & (values.abs() < 65536)
    assert torch.equal(held[inside], values[inside])
    below = values.abs() < 2.0**-14
    assert (held - values)[below].abs().max() <= 2.0**-38
    assert held[(values.abs() >= 65536) & values.isfinite()].isinf().all()


@pytest.mark.parametrize(("dtype", "relative"), [(BF16, 2.0**-16), (F16, 2.0**-19)])
def test_24_bits_are_rounded_once_and_storing_again_changes_nothing(values, dtype, relative):
    kept = format_16_bits(dtype, stochastic=False, correction=torch.int8)
    first = encode(kept, values)
    held = decode(kept, *first)
    inside = (values.abs() >= 2.0**-14) & (values.abs() < 65000)
    assert ((held - values).abs() <= relative * values.abs())[inside].all()
    for one, other in zip(first, encode(kept, held), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@settings(max_examples=50, deadline=None)
@given(st.floats(width=32, allow_nan=False), st.integers(0, 65535))
def test_a_stale_correction_changes_a_number_by_less_than_its_neighbours(value, noise):
    for dtype, correction in product((BF16, F16), (torch.int8, torch.int16)):
        kept = format_16_bits(dtype, stochastic=False, correction=correction)
        number = torch.tensor([value]).to(dtype)
        if not number.isfinite().all():
            continue
        low = torch.tensor([noise - 32768]).to(torch.int16).view(torch.int16)
        low = low if correction is torch.int16 else (low >> 8).to(torch.int8)
        held = decode(kept, number, low)
        gap = torch.finfo(dtype).eps * number.float().abs().clamp(min=torch.finfo(dtype).smallest_normal)
        assert held.isfinite().all()
        assert (held - number.float()).abs() <= gap
        assert (held == 0) | (held.sign() == number.float().sign()) | (number == 0)


def test_stochastic_rounding_goes_to_a_neighbour_and_is_right_in_the_mean():
    for dtype in (BF16, F16):
        kept = format_16_bits(dtype, stochastic=True)
        value = torch.tensor([1.0 + torch.finfo(dtype).eps * 0.3])
        every = torch.arange(1 << 16)
        (stored,) = encode(kept, value.expand(1 << 16), every)
        assert set(stored.tolist()) == {1.0, 1.0 + torch.finfo(dtype).eps}
        assert abs(stored.double().mean().item() - value.item()) <= torch.finfo(dtype).eps * 2.0**-16


# 8 bits


@pytest.mark.parametrize("signed", SIGNED)
def test_every_code_is_its_value_and_is_found_again(signed):
    kept, values = format_8_bits(signed=signed), table(signed=signed)
    codes = torch.zeros(256, BLOCK, dtype=torch.uint8)
    codes[:, 0] = torch.arange(256)
    codes[:, 1] = 0x7E if signed else 0xF7  # the highest, so that the scale is the same again
    scale = torch.full((256, 1), 2.0**-20)
    held = decode(kept, codes, scale)
    assert torch.equal(held[:, 0].nan_to_num(nan=7.0), (values * 2.0**-20).nan_to_num(nan=7.0))
    for random in (None, torch.zeros(held.shape, dtype=torch.int64), torch.full(held.shape, 0xFFFF)):
        again, new_scale = encode(kept, held, random)
        assert torch.equal(decode(kept, again, new_scale).nan_to_num(nan=7.0), held.nan_to_num(nan=7.0))
        assert torch.equal(new_scale, scale)


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("largest", [1.0, 1.75, 1.8, 1.9, 1e38, 1e-30])
def test_values_are_rounded_to_a_neighbouring_code(signed, largest):
    kept = format_8_bits(signed=signed)
    generator = torch.Generator().manual_seed(0)
    value = largest * torch.exp2(-20 * torch.rand(64, BLOCK, generator=generator))
    value *= torch.randint(0, 2, value.shape, generator=generator) * 2 - 1 if signed else 1
    value[:, 0] = largest
    random = torch.randint(0, 1 << 16, value.shape, generator=generator)
    codes, scale = encode(kept, value, random)
    neighbours = torch.sort(table(signed=signed)[table(signed=signed).isfinite()].double()).values
    scaled = value.double() / scale.double()
    above = torch.searchsorted(neighbours, scaled).clamp(1, len(neighbours) - 1)
    found = decode(kept, codes, scale).double() / scale.double()
    assert ((found == neighbours[above]) | (found == neighbours[above - 1])).all()
    assert (found[:, 0] - scaled[:, 0]).abs().max() <= scaled[:, 0].max() / 8


def test_what_is_beyond_every_scale_ends_at_the_highest_code_or_the_lowest():
    for signed in SIGNED:
        kept = format_8_bits(signed=signed)
        assert decode(kept, *encode(kept, torch.tensor([3.4e38]))).isfinite().all()
        assert decode(kept, *encode(kept, torch.tensor([1e-45]))) <= 1e-37


def test_zeros_stay_zeros_and_squares_never_become_zero():
    value = torch.zeros(2, BLOCK)
    value[0, 0] = 1.0
    value[0, 1] = 1e-30
    for signed in SIGNED:
        kept = format_8_bits(signed=signed)
        held = decode(kept, *encode(kept, value, torch.full(value.shape, 0xFFFF)))
        assert not held[value == 0].any()
    assert decode(kept, *encode(kept, value, torch.zeros(value.shape, dtype=torch.int64)))[0, 1] > 0


@pytest.mark.parametrize("signed", SIGNED)
def test_what_is_no_finite_number_passes_through_and_spares_its_block(signed):
    kept = format_8_bits(signed=signed)
    value = torch.linspace(0.5, 1, BLOCK).repeat(3)
    odd = {5: math.nan, 9: math.inf, BLOCK: math.nan} | ({11: -math.inf} if signed else {})
    for place, each in odd.items():
        value[place] = each
    held = decode(kept, *encode(kept, value, torch.zeros(value.shape, dtype=torch.int64)))
    assert torch.equal(held.isnan(), value.isnan())
    assert torch.equal(held[value.isinf()], value[value.isinf()])
    ordinary = value.isfinite()
    assert ((held - value)[ordinary].abs() <= value[ordinary] / 8).all()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (127,), (128,), (3, 128), (3, 130), (2, 3, 256)])
def test_any_shape(shape):
    for signed in SIGNED:
        kept = format_8_bits(signed=signed)
        value = torch.rand(shape)
        codes, scale = encode(kept, value)
        assert codes.shape == value.shape
        assert scale.shape == scale_shape(value.shape)
        assert ((decode(kept, codes, scale) - value).abs() <= value / 8).all()


# Random bits


def test_random_bits_depend_on_nothing_but_seed_parameter_step_and_element():
    elements = torch.arange(1000)
    known = random_bits(1, 2, 3, elements, 0)
    assert torch.equal(known[500:], random_bits(1, 2, torch.tensor(3.0), elements[500:], 0))
    others = [(0, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1), (1, 2, 3, 2), (1, 2, 3, 3)]
    for seed, parameter, step, number in others:
        assert (random_bits(seed, parameter, step, elements, number) == known).double().mean() < 0.01
    assert (random_bits(1, 2, 3, elements + (1 << 32), 0) == known).double().mean() < 0.01


def test_random_bits_are_uniform():
    drawn = torch.stack(
        [random_bits(0, 0, step, torch.arange(1 << 14), number) for step in (1, 2) for number in (0, 1)]
    )
    counts = torch.bincount((drawn >> 8).flatten(), minlength=256).double()
    expected = drawn.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 350  # chi-squared of 255 degrees: 1 in 30000
    assert torch.corrcoef(drawn.double()).triu(1).abs().max() < 0.03


def test_kernels_draw_the_same_bits():
    found = torch.zeros(256, dtype=torch.int32)
    lines = [
        "key = random_key(int64(7), int64(-3), float64(5), int64(8589934848))",
        "out[i] = random_32(uint32(256 + i), next_key(key))",
    ]
    run_kernel(lines, {"out": found}, 256, "draws")
    elements = torch.arange(256) + (1 << 33) + 256
    low, high = (random_bits(7, -3, 5, elements, number) for number in (3, 4))
    assert torch.equal(found.to(torch.int64) & 0xFFFFFFFF, low | (high << 16))


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("random", [False, True], ids=["nearest", "stochastic"])
def test_codes_do_not_depend_on_the_pieces_in_which_they_are_made(signed, random, monkeypatch):
    kept, value = (
        format_8_bits(signed=signed),
        torch.randn(7, 5 * BLOCK + 3, generator=torch.Generator().manual_seed(0)),
    )
    noise = torch.randint(1 << 16, value.shape) if random else None
    whole = encode(kept, value, noise)
    monkeypatch.setattr("surefoot.storage.codecs._PIECE", 2 * BLOCK)
    assert all(map(torch.equal, encode(kept, value, noise), whole))


def test_nothing_is_computed_in_pieces_where_there_is_nothing_to_compute(monkeypatch):
    """On the meta device; a large model took minutes there."""
    made = []
    encode_piece = codecs._encode_piece
    monkeypatch.setattr(codecs, "_encode_piece", lambda *given: made.append(given) or encode_piece(*given))
    codes, scales = encode(format_8_bits(signed=True), torch.empty(1 << 15, 1 << 15, device="meta"), None)
    assert (codes.shape, scales.shape) == ((1 << 15, 1 << 15), scale_shape((1 << 15, 1 << 15)))
    assert len(made) == 1
