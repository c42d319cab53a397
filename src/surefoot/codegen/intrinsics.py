"""What kernels can call beyond the functions that their source defines, each as the LLVM IR that stands for it."""

from typing import NamedTuple


class Intrinsic(NamedTuple):
    """An instruction or two.

    Attributes:
        takes: the types of its arguments.
        gives: the type of its value, "" if it has none.
        text: LLVM IR, in which {0}, {1} are the arguments and {n} is the value.
        declares: the declaration of what it calls.
    """

    takes: tuple[str, ...]
    gives: str
    text: str
    declares: str = ""


def _load(kind: str, llvm: str) -> Intrinsic:
    return Intrinsic(("int64",), kind, f"{{n}}.at = inttoptr i64 {{0}} to ptr\n{{n}} = load {llvm}, ptr {{n}}.at")


def _store(kind: str, llvm: str) -> Intrinsic:
    text = f"{{n}}.at = inttoptr i64 {{0}} to ptr\nstore {llvm} {{1}}, ptr {{n}}.at"
    return Intrinsic(("int64", kind), "", text)


def _atomic_increment(kind: str, llvm: str) -> Intrinsic:
    text = f"{{n}}.at = inttoptr i64 {{0}} to ptr\n{{n}} = atomicrmw add ptr {{n}}.at, {llvm} 1 monotonic"
    return Intrinsic(("int64",), kind, text)


def _bitcast(takes: str, llvm: str, gives: str, to: str) -> Intrinsic:
    return Intrinsic((takes,), gives, f"{{n}} = bitcast {llvm} {{0}} to {to}")


INTRINSICS: dict[str, Intrinsic] = {
    # The word at an address, or half of it.
    "load": _load("int64", "i64"),
    "store": _store("int64", "i64"),
    "load_half": _load("uint32", "i32"),
    "store_half": _store("uint32", "i32"),
    # Add one to the number at an address, for all threads at once; the number before.
    "atomic_increment": _atomic_increment("int64", "i64"),
    "atomic_increment_32": _atomic_increment("uint32", "i32"),
    # Begin to load what is at an address, which need not be valid.
    "prefetch": Intrinsic(
        ("int64",),
        "",
        "{n}.at = inttoptr i64 {0} to ptr\ncall void @llvm.prefetch.p0(ptr {n}.at, i32 0, i32 3, i32 1)",
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
    ),
    # Whether the 8 words at two addresses are the same.
    "equal_words": Intrinsic(
        ("int64", "int64"),
        "bool",
        """\
{n}.one = inttoptr i64 {0} to ptr
{n}.other = inttoptr i64 {1} to ptr
{n}.ours = load <8 x i64>, ptr {n}.one, align 8
{n}.theirs = load <8 x i64>, ptr {n}.other, align 8
{n}.differ = icmp ne <8 x i64> {n}.ours, {n}.theirs
{n}.bits = bitcast <8 x i1> {n}.differ to i8
{n} = icmp eq i8 {n}.bits, 0""",
    ),
    # The same bits as a number of another kind.
    "as_float32": _bitcast("uint32", "i32", "float32", "float"),
    "as_uint32": _bitcast("float32", "float", "uint32", "i32"),
    "as_float64": _bitcast("uint64", "i64", "float64", "double"),
    "as_uint64": _bitcast("float64", "double", "uint64", "i64"),
    # float16, whose elements are bit patterns.
    "from_half": Intrinsic(
        ("uint16",), "float32", "{n}.half = bitcast i16 {0} to half\n{n} = fpext half {n}.half to float"
    ),
    "to_half": Intrinsic(
        ("float32",), "uint16", "{n}.half = fptrunc float {0} to half\n{n} = bitcast half {n}.half to i16"
    ),
}

FUNCTIONS = {
    "fabs": "llvm.fabs.{suffix}",
    "sqrt": "llvm.sqrt.{suffix}",
    "exp": "llvm.exp.{suffix}",
    "log": "llvm.log.{suffix}",
    "tanh": "tanh{f}",
    "pow": "llvm.pow.{suffix}",
    "fmuladd": "llvm.fmuladd.{suffix}",
}
"""Functions of floats: LLVM's own, which become instructions or calls of libm as the processor has them, or libm's."""
