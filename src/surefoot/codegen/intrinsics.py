"""What generated kernels need beyond Numba's language: pointers, bit patterns, an atomic counter, indirect calls.

Imported by kernels only, since it imports Numba.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = [
    "as_float32",
    "as_float64",
    "as_uint32",
    "as_uint64",
    "atomic_increment",
    "atomic_increment_32",
    "call_assign",
    "call_getter",
    "call_kernel",
    "call_thread_number",
    "dict_lookup",
    "dict_next",
    "equal_words",
    "from_half",
    "list_item",
    "list_size",
    "load",
    "load_half",
    "narrow_vectors",
    "plus_square",
    "pointer",
    "prefetch",
    "store",
    "store_half",
    "to_half",
]


@intrinsic
def pointer(typing_context: Any, address: Any, like: Any) -> Any:  # noqa: ARG001
    """Return an integer address as a pointer to values of the type of `like`."""
    signature = types.CPointer(like)(address, like)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, build


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
    """Begin to load what is at an address, which need not be valid."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        place, word = ir.PointerType(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place], kind)
        builder.call(function, [builder.inttoptr(args[0], place), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.none(types.int64), build


def _access(kind: Any) -> tuple[Any, Any]:
    """Make the intrinsics that load a value of `kind` from an address, and store one there."""

    def place(context: Any, builder: Any, address: Any) -> Any:
        return builder.inttoptr(address, context.get_value_type(kind).as_pointer())

    def loading(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
        return kind(types.int64), lambda c, builder, _, args: builder.load(place(c, builder, args[0]))

    def storing(typing_context: Any, address: Any, value: Any) -> Any:  # noqa: ARG001
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            builder.store(args[1], place(context, builder, args[0]))
            return context.get_dummy_value()

        return types.none(types.int64, kind), build

    return intrinsic(loading), intrinsic(storing)


load, store = _access(types.int64)
load_half, store_half = _access(types.uint32)


@intrinsic
def equal_words(typing_context: Any, one: Any, other: Any) -> Any:  # noqa: ARG001
    """Return whether the 8 words at two addresses are the same."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        words = ir.VectorType(ir.IntType(64), 8)
        ours, theirs = (builder.load(builder.inttoptr(arg, words.as_pointer()), align=8) for arg in args)
        differing = builder.icmp_unsigned("!=", ours, theirs)
        return builder.icmp_unsigned("==", builder.bitcast(differing, ir.IntType(8)), ir.IntType(8)(0))

    return types.boolean(types.int64, types.int64), build


def _add_one(kind: Any) -> Any:
    """Build the atomic addition of one to the number of `kind` at an address; it returns the number before."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = context.get_value_type(signature.return_type)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], number.as_pointer()), number(1), "monotonic")

    return kind(types.int64), build


@intrinsic
def atomic_increment(typing_context: Any, counter: Any) -> Any:  # noqa: ARG001
    """Add one to the int64 at an address, atomically, and return its value before."""
    return _add_one(types.int64)


@intrinsic
def atomic_increment_32(typing_context: Any, counter: Any) -> Any:  # noqa: ARG001
    """Add one to the uint32 at an address, atomically, and return its value before."""
    return _add_one(types.uint32)


@intrinsic
def narrow_vectors(typing_context: Any) -> Any:  # noqa: ARG001
    """Ask for vectors of 256 bits in the calling function.

    Where memory is the limit wider ones gain nothing, and on AMD's Zen 4 SGD's three streams took 6 % longer with them.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        set.add(builder.function.attributes, '"prefer-vector-width"="256"')  # its own `add` knows no such attributes
        return context.get_dummy_value()

    return types.none(), build


def _foreign(result: Any, arguments: int) -> Any:
    """Build a call of the C function whose address comes first; its arguments are words."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = ir.FunctionType(context.get_value_type(signature.return_type), [ir.IntType(64)] * arguments)
        return builder.call(builder.inttoptr(args[0], target.as_pointer()), args[1:])

    return result(*[types.int64] * (1 + arguments)), build


@intrinsic
def call_getter(typing_context: Any, function: Any, tensor: Any, answer: Any) -> Any:  # noqa: ARG001
    """Call `int32 (*)(void* tensor, void* answer)` and return the word at `answer`, zero where nothing is written."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        word = ir.IntType(64)
        place = builder.inttoptr(args[2], word.as_pointer())
        builder.store(word(0), place)
        kind = ir.FunctionType(ir.IntType(32), [word, word])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return builder.load(place)

    return types.int64(types.int64, types.int64, types.int64), build


@intrinsic
def call_assign(typing_context: Any, function: Any, tensor: Any, result: Any) -> Any:  # noqa: ARG001
    """Call `int32 (*)(void* tensor, void* result)`."""
    return _foreign(types.int32, 2)


@intrinsic
def call_thread_number(typing_context: Any, function: Any) -> Any:  # noqa: ARG001
    """Call `int32 (*)(void)`."""
    return _foreign(types.int32, 0)


@intrinsic
def call_kernel(typing_context: Any, function: Any, launch: Any) -> Any:  # noqa: ARG001
    """Call `void (*)(int64 launch)`, a kernel."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), build


@intrinsic
def list_size(typing_context: Any, function: Any, items: Any) -> Any:  # noqa: ARG001
    """Call `Py_ssize_t (*)(PyObject* items)`."""
    return _foreign(types.int64, 1)


@intrinsic
def list_item(typing_context: Any, function: Any, items: Any, position: Any) -> Any:  # noqa: ARG001
    """Call `PyObject* (*)(PyObject* items, Py_ssize_t position)`."""
    return _foreign(types.int64, 2)


@intrinsic
def dict_lookup(typing_context: Any, function: Any, mapping: Any, key: Any) -> Any:  # noqa: ARG001
    """Call `PyObject* (*)(PyObject* mapping, PyObject* key)`."""
    return _foreign(types.int64, 2)


@intrinsic
def dict_next(typing_context: Any, function: Any, mapping: Any, position: Any, key: Any, value: Any) -> Any:  # noqa: ARG001
    """Call `int (*)(PyObject* mapping, Py_ssize_t* position, PyObject** key, PyObject** value)`."""
    return _foreign(types.int32, 4)


def _bitcast(source: Any, target: Any) -> Any:
    def typer(typing_context: Any, value: Any) -> Any:  # noqa: ARG001
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(signature.return_type))

        return target(source), build

    return intrinsic(typer)


@intrinsic
def plus_square(typing_context: Any, total: Any, value: Any) -> Any:  # noqa: ARG001
    """Add the square of a value to a sum whose order does not matter, so that several can be added at once.

    It is one operation, so that a product which the rule computes as well is not taken from its own sum.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        kind = args[0].type
        function = builder.module.declare_intrinsic("llvm.fmuladd", [kind], ir.FunctionType(kind, [kind] * 3))
        return builder.call(function, [args[1], args[1], args[0]], fastmath=("reassoc", "contract"))

    return total(total, total), build


as_float32 = _bitcast(types.uint32, types.float32)
as_uint32 = _bitcast(types.float32, types.uint32)
as_float64 = _bitcast(types.uint64, types.float64)
as_uint64 = _bitcast(types.float64, types.uint64)


@intrinsic
def from_half(typing_context: Any, bits: Any) -> Any:  # noqa: ARG001
    """Return the float32 value of a float16 bit pattern."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), build


@intrinsic
def to_half(typing_context: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the bit pattern of the float16 nearest to a float32 value."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), build
