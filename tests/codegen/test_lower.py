"""The language of kernels: it means what Python means."""

import ctypes
import itertools
import math

import numpy as np
import pytest

from surefoot.codegen.compile import build_kernel
from surefoot.codegen.lower import lower
from surefoot.errors import InternalError

HEAD = """
def kernel(launch):
    words = array(load(launch), int64)
    floats = array(load(launch + 8), float64)
"""


def compiled(body):
    """Return a function of words and floats, lists of numbers, that runs the body of a kernel and returns both."""
    source = body if "def kernel" in body else HEAD + "".join(f"    {line}\n" for line in body.splitlines())
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_int64)(build_kernel(source, "test").address)

    def run(words=(), floats=()):
        words, floats = np.array(words, dtype=np.int64), np.array(floats, dtype=np.float64)
        launch = np.array([words.ctypes.data, floats.ctypes.data], dtype=np.int64)
        kernel(launch.ctypes.data)
        return words.tolist(), floats.tolist()

    return run


EDGES = (-9, -8, -1, 0, 1, 7, 8, 1 << 30)


@pytest.mark.parametrize("expression", [
    "x + y", "x - y", "x * y", "x // 8", "x // (y * y + 1)", "x % 8", "x % (y - 100)",
    "x & y", "x | y", "(x & 15) << 2", "x >> 1", "-x",
    "abs(x)", "min(x, y)", "max(x, 3)", "x == y", "x != y", "x < y <= 7", "not x", "x and y > 3", "x > 3 or y",
    "x if y > x else y",
    "int64(uint64(x) >> 60)", "int64(uint16(x))", "int64(uint32(x) < uint32(y))",
])  # fmt: skip
def test_integers_are_those_of_python(expression):
    run = compiled(f"x, y = words[0], words[1]\nwords[0] = {expression}")
    names = {"int64": int, "uint64": lambda x: x % 2**64, "uint32": lambda x: x % 2**32, "uint16": lambda x: x % 2**16}
    for x, y in itertools.product(EDGES, EDGES):
        expected = eval(expression, names, {"x": x, "y": y})  # noqa: S307 (our own text)
        if " and " in expression or " or " in expression:
            expected = bool(expected)
        assert run((x, y))[0][0] == expected, (x, y)


FLOATS = (0.0, -0.0, 1.5, -2.25, 5e-324, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize(("text", "function"), {
    "x / y": lambda x, y: np.float64(x) / np.float64(y), "x * y": lambda x, y: np.float64(x) * np.float64(y),
    "x - y": lambda x, y: np.float64(x) - np.float64(y), "math.sqrt(x)": lambda x, y: np.sqrt(x),
    "-x": lambda x, y: -x, "abs(x)": lambda x, y: abs(x), "x if x < y else y": lambda x, y: min(y, x),
    "float64(x != y)": lambda x, y: float(x != y), "float64(x >= y)": lambda x, y: float(x >= y),
    "float64(float32(x))": lambda x, y: float(np.float32(x)), "float64(0.1)": lambda x, y: 0.1,
    "float64(as_float32(as_uint32(float32(x))))": lambda x, y: float(np.float32(x)),
}.items())  # fmt: skip
def test_floats_are_those_of_ieee_754(text, function):
    run = compiled(f"x, y = floats[0], floats[1]\nfloats[0] = {text}")
    for x, y in itertools.product(FLOATS, FLOATS):
        with np.errstate(all="ignore"):
            expected = np.float64(function(x, y))
        (_, (found, _)) = run(floats=(x, y))
        assert np.float64(found).tobytes() == expected.tobytes() or (math.isnan(found) and math.isnan(expected)), (x, y)


def test_functions_are_those_of_libm():
    for name in ("exp", "log", "tanh"):
        (_, (found,)) = compiled(f"floats[0] = math.{name}(floats[0])")(floats=(0.7,))
        assert found == getattr(math, name)(0.7)
    assert compiled("floats[0] = floats[0] ** floats[1]")(floats=(0.7, 2.5))[1][0] == 0.7**2.5


def test_control_flow():
    body = """
total, odd = 0, 0
for i in range(1, words[0], 2):
    if i == 9:
        continue
    elif i > 20:
        break
    odd += i
while True:
    total += 1
    if total * total > words[1]:
        break
for i in range(words[0]):
    pass
words[0], words[1] = odd, total
"""
    assert compiled(body)((100, 50))[0] == [sum(range(1, 20, 2)) - 9, 8]


def test_functions_and_constants():
    source = """
A, B = (n * 8 for n in (1, 2))

def second(launch, scale):
    if scale > 5:
        return 0
    return load(launch + A) * scale + B

def kernel(launch):
    store(load(launch), second(launch, 1) - load(launch + A))
"""
    assert compiled(source)((0,))[0] == [16]


def test_tuples_and_loops_downwards():
    source = """
def both(x):
    return x + 1, x > 3

def kernel(launch):
    words, total = array(load(launch), int64), 0
    for i in range(words[0], 0, -2):
        total += i
    words[0], found = both(total)
    words[1] = int64(found)
"""
    assert compiled(source)((9, 0))[0] == [26, 1]


def test_what_comes_after_a_decision_is_not_evaluated():
    source = """
def counted(place):
    return atomic_increment(place) >= 0

def kernel(launch):
    place = load(launch)
    if load(place + 8) and counted(place):
        pass
    if load(place + 8) == 0 or counted(place):
        pass
    found = 1 if load(place + 8) == 0 else int64(counted(place))
"""
    assert compiled(source)((0, 0))[0] == [0, 0]


@pytest.mark.parametrize(("body", "message"), {
    "x = words[0] + floats[0]": "where", "x = unknown(1)": "unknown", "x = [1]": "List", "x = words[0] / 2": "Div",
    "with words: pass": "With", "x = y": "y", "x = 1.5": "float", "try:\n    pass\nfinally:\n    pass": "Try",
    "x = int64(floats[0])": "no int64 is made of float64", "x = 1\nx = floats[0]": "float64 where int64 must stand",
}.items())  # fmt: skip
def test_what_cannot_be_said_is_named(body, message):
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    head = "def kernel(launch):\n    words = array(launch, int64)\n    floats = array(launch, float64)\n"
    with pytest.raises(InternalError, match=f"(?s)kernels cannot say `.*{message}"):
        lower(head + lines)
