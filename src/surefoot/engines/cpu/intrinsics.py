"""What generated kernels need beyond Numba's language: pointers, bit patterns, an atomic counter, indirect calls.

Imported by kernels only, since it imports Numba.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["as_float32", "as_uint32", "call", "claim", "from_half", "pointer", "to_half"]


@intrinsic
def pointer(typing_context: Any, address: Any, like: Any) -> Any:  # noqa: ARG001
    """Give an integer address as a pointer to values of the type of `like`."""
    signature = types.CPointer(like)(address, like)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, build


@intrinsic
def claim(typing_context: Any, counter: Any) -> Any:  # noqa: ARG001
    """Add one to the int64 at an address, atomically, and give its value before."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), build


@intrinsic
def call(typing_context: Any, function: Any, handle: Any, result: Any) -> Any:  # noqa: ARG001
    """Call the C function `int32 (*)(void* handle, void* result)` at an address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        word = ir.IntType(64)
        target = ir.FunctionType(ir.IntType(32), [word, word]).as_pointer()
        return builder.call(builder.inttoptr(args[0], target), [args[1], args[2]])

    return types.int32(types.int64, types.int64, types.int64), build


def _bitcast(source: Any, target: Any) -> Any:
    def typer(typing_context: Any, value: Any) -> Any:  # noqa: ARG001
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(signature.return_type))

        return target(source), build

    return intrinsic(typer)


as_float32 = _bitcast(types.uint32, types.float32)
as_uint32 = _bitcast(types.float32, types.uint32)


@intrinsic
def from_half(typing_context: Any, bits: Any) -> Any:  # noqa: ARG001
    """Give the float32 value of a float16 bit pattern."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), build


@intrinsic
def to_half(typing_context: Any, value: Any) -> Any:  # noqa: ARG001
    """Give the bit pattern of the float16 nearest to a float32 value."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), build
