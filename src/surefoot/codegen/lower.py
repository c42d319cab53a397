"""The language of kernels, a small part of Python, lowered to LLVM IR.

A source is read as Python reads it and means what it means there, but for types.  Statements outside of functions are
executed, and give constants.  A function is compiled for the types it is called with: int64 (an address too), int8,
int16, int32, uint8, uint16, uint32, uint64, float32, float64, bool, and arrays of these.  Two numbers that are combined
must have one type; constants take that of the other, a bool becomes an integer beside one.  A variable keeps the type
of its first value.
There are no exceptions, and integers do not grow.  Beside `range`, `min`, `max` and `abs` there are:

    float32(x)            x as another type (also of the other types)
    array(address, type)  what stands at an address; `a[i]` loads and stores
    buffer(type, n)       n elements of this call's own
    call(type, f, ...)    the C function at address f, on words; `call(None, f, ...)` for one without a result
    narrow_vectors()      this function computes in vectors of 256 bits
    wide_vectors()        in vectors of 512 bits, where the processor has them
    separate_arrays()     no two arrays that this function is handed overlap
    not_inlined()         this function is not copied into those that call it
    math.sqrt(x), ...     functions of floats, and all intrinsics

A source with `FEW_PASSES = True` waits for memory more than it computes: it is compiled in less time, to slower code.
"""

import ast
import ctypes
import operator
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from surefoot.codegen.intrinsics import FUNCTIONS, INTRINSICS
from surefoot.errors import InternalError

LIBRARY = ("conversions.py", "arctangent.py")
"""The files of functions, in the language itself, that every source may call."""


class Type(NamedTuple):
    """A type: its name, LLVM's, its bits, whether it is a float or signed; its elements' or parts' types."""

    name: str
    llvm: str
    bits: int
    is_float: bool = False
    signed: bool = False
    element: "Type | None" = None
    parts: "tuple[Type, ...]" = ()


class Value(NamedTuple):
    """What is computed when the kernel runs: its type and its name in LLVM IR."""

    type: Type
    name: str


Operand = Value | float  # what is known already is a number of Python

BOOL, INT64 = Type("bool", "i1", 1), Type("int64", "i64", 64, signed=True)
FLOAT32, FLOAT64 = Type("float32", "float", 32, is_float=True), Type("float64", "double", 64, is_float=True)
_SIGNED = [Type(f"int{n}", f"i{n}", n, signed=True) for n in (8, 16, 32)]
_UNSIGNED = [Type(f"uint{n}", f"i{n}", n) for n in (8, 16, 32, 64)]
TYPES = {kind.name: kind for kind in (BOOL, INT64, *_SIGNED, *_UNSIGNED, FLOAT32, FLOAT64)}

# Products and sums may become one operation, which rounds once; all else is as IEEE 754 says.
_FLOAT_OPS = {ast.Add: "fadd contract", ast.Sub: "fsub contract", ast.Mult: "fmul contract", ast.Div: "fdiv contract"}
_INT_OPS = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.LShift: "shl", ast.BitAnd: "and", ast.BitOr: "or",
    ast.BitXor: "xor",
}  # fmt: skip
_COMPARISONS = {ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge"}
_OF_CONSTANTS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_REST = """\
{n}.rest = srem i64 {0}, {1}
{n}.signs = xor i64 {n}.rest, {1}
{n}.negative = icmp slt i64 {n}.signs, 0
{n}.inexact = icmp ne i64 {n}.rest, 0
{n}.less = and i1 {n}.negative, {n}.inexact
"""  # the rest has the sign of what is divided, in Python that of the divisor
_INT64_OPS = {
    ast.FloorDiv: f"""{_REST}\
{{n}}.quotient = sdiv i64 {{0}}, {{1}}
{{n}}.one = zext i1 {{n}}.less to i64
{{n}} = sub i64 {{n}}.quotient, {{n}}.one""",
    ast.Mod: f"""{_REST}\
{{n}}.more = select i1 {{n}}.less, i64 {{1}}, i64 0
{{n}} = add i64 {{n}}.rest, {{n}}.more""",
}


class Lowered(NamedTuple):
    """A source in LLVM IR, and whether few of LLVM's passes are enough for it."""

    text: str
    few_passes: bool


def lower(source: str) -> Lowered:
    """Return a source in LLVM IR: its function `kernel`, of the address of a launch, under the name `entry`.

    Raises:
        InternalError: the source says what the language cannot.
    """
    module = _Module(source)
    # The entry is compiled as the kernel asks, which becomes a part of it.
    attributes = module.function("kernel", (INT64,)).attributes
    entry = f"define void @entry(i64 %launch) {attributes} {{\n  call void @kernel(i64 %launch)\n  ret void\n}}\n"
    return Lowered("\n".join([*module.declarations, *module.text, entry]), module.constants.get("FEW_PASSES", False))


class _Module:
    """A source: its constants, and its functions, each compiled once."""

    def __init__(self, source: str) -> None:
        library = [Path(__file__).with_name(name).read_text() for name in LIBRARY]
        statements = [statement for text in (*library, source) for statement in ast.parse(text).body]
        self.definitions = {node.name: node for node in statements if isinstance(node, ast.FunctionDef)}
        self.constants: dict[str, Any] = dict(TYPES)
        constants: list[ast.stmt] = [node for node in statements if isinstance(node, ast.Assign)]
        exec(compile(ast.Module(constants, []), "<kernel>", "exec"), self.constants)  # noqa: S102 (our own source)
        self._compiled: dict[str, _Function] = {}
        self.text: list[str] = []
        self.declarations: dict[str, None] = {}

    def function(self, name: str, types: tuple[Type, ...]) -> "_Function":
        """Return a function, compiled for arguments of some types."""
        if name not in self._compiled:
            compiled = _Function(self, self.definitions[name], types)
            self.text.append(compiled.define())
            self._compiled[name] = compiled
        if (known := self._compiled[name]).types != types:
            raise InternalError(f"`{name}` is called with {types}, and elsewhere with {known.types}")
        return known


class _Function:
    """A function while it is compiled: its variables, which live in slots that LLVM dissolves, and its code so far."""

    def __init__(self, module: _Module, definition: ast.FunctionDef, types: tuple[Type, ...]) -> None:
        self.types = types
        self.result: Type | None = None
        self._module, self._definition = module, definition
        self._variables: dict[str, Value] = {}
        self._code: list[str] = []
        self._slots: list[str] = []
        self._count, self._block, self._open = 0, "begin", True
        self._loops: list[tuple[str, str]] = []  # where `continue` and `break` go
        self.attributes, self._of_arrays = "nounwind", ""

    def define(self) -> str:
        """Compile the function and return its definition."""
        arguments = [Value(t, f"%{a.arg}") for a, t in zip(self._definition.args.args, self.types, strict=True)]
        for argument in arguments:
            self._set(argument.name.removeprefix("%"), argument)
        self._do(self._definition.body)
        self._emit("ret void" if self.result is None else "unreachable")
        parameters = ", ".join(f"{kind.llvm}{self._of_arrays * bool(kind.element)} {name}" for kind, name in arguments)
        result = self.result.llvm if self.result else "void"
        head = f"define internal {result} @{self._definition.name}({parameters}) {self.attributes} {{\nbegin:"
        return "\n".join([head, *self._slots, *self._code, "}\n"])

    # Code

    def _emit(self, text: str) -> None:
        """Add instructions, unless none goes on to them."""
        if self._open:
            self._code.append(text)
            self._open = not text.startswith(("br ", "ret ", "unreachable"))

    def _value(self, kind: Type, text: str) -> Value:
        """Add instructions that give a value, {n} in their text."""
        self._count += 1
        name = f"%v{self._count}"
        self._emit(text.replace("{n}", name) if "{n}" in text else f"{name} = {text}")
        return Value(kind, name)

    def _label(self, name: str) -> None:
        """Begin a block, to which the one before goes on."""
        self._emit(f"br label %{name}")
        self._code.append(f"{name}:")
        self._block, self._open = name, True

    def _labels(self, *names: str) -> list[str]:
        self._count += 1
        return [f"{name}{self._count}" for name in names]

    def _branch(self, condition: Operand, yes: str, no: str) -> None:
        self._emit(f"br i1 {self._truth(condition)}, label %{yes}, label %{no}")

    # Statements

    def _do(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            try:
                getattr(self, f"_do_{type(statement).__name__}")(statement)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise InternalError(f"kernels cannot say `{ast.unparse(statement)}`: {error!r}") from error

    def _do_Expr(self, statement: ast.Expr) -> None:
        if not isinstance(statement.value, ast.Constant):  # a docstring
            self._of(statement.value)

    def _do_Pass(self, _: ast.Pass) -> None:
        pass

    def _do_Assign(self, statement: ast.Assign) -> None:
        for target in statement.targets:
            if isinstance(target, ast.Tuple):
                for each, value in zip(target.elts, self._parts(statement.value), strict=True):
                    self._store(each, value)
            else:
                self._store(target, self._of(statement.value))

    def _parts(self, expression: ast.expr) -> list[Operand]:
        """Return the values that a tuple has."""
        if isinstance(expression, ast.Tuple):
            return [self._of(each) for each in expression.elts]
        kind, name = self._of(expression)
        return [self._value(part, f"extractvalue {kind.llvm} {name}, {i}") for i, part in enumerate(kind.parts)]

    def _do_AugAssign(self, statement: ast.AugAssign) -> None:
        current = ast.Name(_name(statement.target), ast.Load())
        self._store(statement.target, self._of(ast.BinOp(current, statement.op, statement.value)))

    def _store(self, target: ast.expr, value: Operand) -> None:
        if isinstance(target, ast.Subscript):
            kind, address = self._element(target)
            self._emit(f"store {kind.llvm} {self._as(kind, value)}, ptr {address}")
        else:
            self._set(_name(target), value)

    def _set(self, variable: str, value: Operand) -> None:
        if variable not in self._variables:
            kind = _typed(value).type
            self._variables[variable] = Value(kind, f"%{variable}.slot")
            self._slots.append(f"%{variable}.slot = alloca {kind.llvm}")
        kind, slot = self._variables[variable]
        self._emit(f"store {kind.llvm} {self._as(kind, value)}, ptr {slot}")

    def _do_If(self, statement: ast.If) -> None:
        then, otherwise, end = self._labels("then", "else", "end")
        self._branch(self._of(statement.test), then, otherwise)
        self._label_only(then)
        self._do(statement.body)
        self._emit(f"br label %{end}")
        self._label_only(otherwise)
        self._do(statement.orelse)
        self._label(end)

    def _label_only(self, name: str) -> None:
        """Begin a block after one that has ended."""
        self._open = False
        self._label(name)

    def _do_While(self, statement: ast.While) -> None:
        with self._loop(lambda: self._of(statement.test), lambda: None):
            self._do(statement.body)

    def _do_For(self, statement: ast.For) -> None:
        if not isinstance(statement.iter, ast.Call) or _name(statement.iter.func) != "range":
            raise TypeError("a loop is over a range, or a while")
        bounds = [self._of(argument) for argument in statement.iter.args]
        start, end, step = ([0, *bounds, 1], [*bounds, 1], bounds)[len(bounds) - 1]
        comparison = ast.Gt if not isinstance(step, Value) and step < 0 else ast.Lt
        name = _name(statement.target)
        end = Value(INT64, self._as(INT64, end))
        self._set(name, start)
        now = ast.Name(name, ast.Load())

        def go_on() -> None:
            self._set(name, self._value(INT64, f"add nsw i64 {self._of(now).name}, {self._as(INT64, step)}"))

        with self._loop(lambda: self._compare(comparison, self._of(now), end), go_on):
            self._do(statement.body)

    @contextmanager
    def _loop(self, condition: Callable[[], Operand], go_on: Callable[[], None]) -> Iterator[None]:
        """Make a loop of what is emitted meanwhile."""
        head, body, again, end = self._labels("head", "body", "again", "end")
        self._label(head)
        self._branch(condition(), body, end)
        self._label_only(body)
        self._loops.append((again, end))
        yield
        self._loops.pop()
        self._label(again)
        go_on()
        self._emit(f"br label %{head}")
        self._label_only(end)

    def _do_Continue(self, _: ast.Continue) -> None:
        self._emit(f"br label %{self._loops[-1][0]}")

    def _do_Break(self, _: ast.Break) -> None:
        self._emit(f"br label %{self._loops[-1][1]}")

    def _do_Return(self, statement: ast.Return) -> None:
        if statement.value is None:
            return self._emit("ret void")
        value = self._of(statement.value)
        if self.result is None:
            self.result = _typed(value).type
        return self._emit(f"ret {self.result.llvm} {self._as(self.result, value)}")

    # Expressions

    def _of(self, expression: ast.expr) -> Any:
        """Return the value of an expression: an operand, or a type."""
        return getattr(self, f"_of_{type(expression).__name__}")(expression)

    def _of_Constant(self, expression: ast.Constant) -> Any:
        return expression.value

    def _of_Name(self, expression: ast.Name) -> Any:
        if (variable := self._variables.get(expression.id)) is None:
            return self._module.constants[expression.id]
        return self._value(variable.type, f"load {variable.type.llvm}, ptr {variable.name}")

    def _of_Tuple(self, expression: ast.Tuple) -> Value:
        values = [_typed(self._of(each)) for each in expression.elts]
        parts = tuple(value.type for value in values)
        kind = Type("tuple", f"{{ {', '.join(part.llvm for part in parts)} }}", 0, parts=parts)
        made = Value(kind, "undef")
        for i, (part, name) in enumerate(values):
            made = self._value(kind, f"insertvalue {kind.llvm} {made.name}, {part.llvm} {name}, {i}")
        return made

    def _of_UnaryOp(self, expression: ast.UnaryOp) -> Operand:
        value = self._of(expression.operand)
        if isinstance(expression.op, ast.Not):
            return self._value(BOOL, f"xor i1 {self._truth(value)}, true")
        if not isinstance(value, Value):
            number: float = -value
            return number
        text = f"fneg contract {value.type.llvm}" if value.type.is_float else f"sub nsw {value.type.llvm} 0,"
        return self._value(value.type, f"{text} {value.name}")

    def _of_BinOp(self, expression: ast.BinOp) -> Operand:
        one, other, op = self._of(expression.left), self._of(expression.right), type(expression.op)
        if not isinstance(one, Value) and not isinstance(other, Value):
            number: float = _OF_CONSTANTS[op](one, other)
            return number
        kind, left, right = self._alike(one, other)
        if op is ast.Pow:
            return self._call_function("pow", [Value(kind, left), Value(kind, right)])
        if kind is INT64 and op in _INT64_OPS:
            return self._value(kind, _INT64_OPS[op].replace("{0}", left).replace("{1}", right))
        if op is ast.RShift:
            text = "ashr" if kind.signed else "lshr"
        elif kind.is_float:
            text = _FLOAT_OPS[op]
        else:
            text = _INT_OPS[op] + " nsw" * (kind.signed and op in _FLOAT_OPS)
        return self._value(kind, f"{text} {kind.llvm} {left}, {right}")

    def _of_Compare(self, expression: ast.Compare) -> Operand:
        values = [self._of(each) for each in (expression.left, *expression.comparators)]
        pairs = zip(expression.ops, values[:-1], values[1:], strict=True)
        results = [self._compare(type(op), one, other) for op, one, other in pairs]
        result = results[0]
        for each in results[1:]:
            result = self._value(BOOL, f"and i1 {result.name}, {each.name}")
        return result

    def _compare(self, op: type[ast.cmpop], one: Operand, other: Operand) -> Value:
        kind, left, right = self._alike(one, other)
        text = _COMPARISONS[op]
        if kind.is_float:
            text = "fcmp une" if op is ast.NotEq else f"fcmp o{text}"
        else:
            sign = "" if op in (ast.Eq, ast.NotEq) else "s" if kind.signed else "u"
            text = f"icmp {sign}{text}"
        return self._value(BOOL, f"{text} {kind.llvm} {left}, {right}")

    def _of_BoolOp(self, expression: ast.BoolOp) -> Operand:
        """Return whether all or any of some values are true; what comes after one that decides is not evaluated."""
        (end,), everything = self._labels("decided"), isinstance(expression.op, ast.And)
        values: list[tuple[str, str]] = []
        for part in expression.values:
            if values:
                (more,) = self._labels("more")
                self._branch(Value(BOOL, values[-1][0]), *((more, end) if everything else (end, more)))
                self._label_only(more)
            values.append((self._truth(self._of(part)), self._block))
        self._label(end)
        return self._phi(BOOL, values)

    def _of_IfExp(self, expression: ast.IfExp) -> Operand:
        then, otherwise, end = self._labels("then", "else", "end")
        self._branch(self._of(expression.test), then, otherwise)
        self._label_only(then)
        one, after_one = self._of(expression.body), self._block
        self._emit(f"br label %{end}")
        self._label_only(otherwise)
        other = self._of(expression.orelse)
        kind, left, right = self._alike(one, other)
        after_other = self._block
        self._label(end)
        return self._phi(kind, [(left, after_one), (right, after_other)])

    def _phi(self, kind: Type, values: list[tuple[str, str]]) -> Value:
        """Return the value that comes from the block before."""
        return self._value(kind, f"phi {kind.llvm} {', '.join(f'[{value}, %{block}]' for value, block in values)}")

    def _of_Subscript(self, expression: ast.Subscript) -> Operand:
        kind, address = self._element(expression)
        return self._value(kind, f"load {kind.llvm}, ptr {address}")

    def _element(self, expression: ast.Subscript) -> tuple[Type, str]:
        array, index = self._of(expression.value), self._as(INT64, self._of(expression.slice))
        kind = array.type.element
        return kind, self._value(array.type, f"getelementptr inbounds {kind.llvm}, ptr {array.name}, i64 {index}").name

    # Calls

    def _of_Call(self, expression: ast.Call) -> Any:
        function = expression.func
        name = function.attr if isinstance(function, ast.Attribute) else _name(function)
        arguments = [self._of(argument) for argument in expression.args]
        if isinstance(kind := self._module.constants.get(name), Type):
            return Value(kind, self._converted(kind, arguments[0]))
        if name in self._module.definitions:
            return self._call_ours(name, arguments)
        if name in INTRINSICS:
            return self._call_intrinsic(name, arguments)
        if name in FUNCTIONS:
            return self._call_function(name, arguments)
        return getattr(self, f"_call_{name}")(*arguments)

    def _call_ours(self, name: str, arguments: list[Operand]) -> Value | None:
        values = [_typed(argument) for argument in arguments]
        function = self._module.function(name, tuple(value.type for value in values))
        given = ", ".join(f"{kind.llvm} {value}" for kind, value in values)
        return self._call(function.result, f"@{name}({given})")

    def _call(self, result: Type | None, call: str) -> Value | None:
        if result is None:
            self._emit(f"call void {call}")
            return None
        return self._value(result, f"call {result.llvm} {call}")

    def _call_intrinsic(self, name: str, arguments: list[Operand]) -> Value | None:
        intrinsic = INTRINSICS[name]
        if intrinsic.declares:
            self._module.declarations[intrinsic.declares] = None
        text = intrinsic.text
        for index, (kind, argument) in enumerate(zip(intrinsic.takes, arguments, strict=True)):
            text = text.replace(f"{{{index}}}", self._as(TYPES[kind], argument))
        result = self._value(TYPES.get(intrinsic.gives, INT64), text)
        return result if intrinsic.gives else None

    def _call_function(self, name: str, arguments: list[Operand], flags: str = "contract") -> Value:
        kind = next(argument.type for argument in arguments if isinstance(argument, Value))
        symbol = FUNCTIONS[name].format(suffix=f"f{kind.bits}", f="f" if kind is FLOAT32 else "")
        types = ", ".join([kind.llvm] * len(arguments))
        self._module.declarations[f"declare {kind.llvm} @{symbol}({types})"] = None
        given = ", ".join(f"{kind.llvm} {self._as(kind, argument)}" for argument in arguments)
        return self._value(kind, f"call {flags} {kind.llvm} @{symbol}({given})")

    def _call_plus(self, total: Value, value: Value) -> Value:
        """Add a value to a sum whose order does not matter, so that several can be added at once."""
        return self._value(total.type, f"fadd reassoc {total.type.llvm} {total.name}, {value.name}")

    def _call_plus_square(self, total: Value, value: Value) -> Value:
        """Add the square of a value to a sum whose order does not matter, so that several can be added at once.

        It is one operation, so that a product which the rule computes as well is not taken from its own sum.
        """
        return self._call_function("fmuladd", [value, value, total], "reassoc contract")

    def _call_array(self, address: Value, element: Type) -> Value:
        kind = Type(f"array of {element.name}", "ptr", 64, element=element)
        return self._value(kind, f"inttoptr i64 {address.name} to ptr")

    def _call_buffer(self, element: Type, count: int) -> Value:
        self._count += 1
        self._slots.append(f"%buffer{self._count} = alloca [{count} x {element.llvm}], align 64")
        return Value(Type(f"array of {element.name}", "ptr", 64, element=element), f"%buffer{self._count}")

    def _call_call(self, result: Type | None, address: Value, *arguments: Operand) -> Value | None:
        given = ", ".join(f"i64 {self._as(INT64, argument)}" for argument in arguments)
        function = self._value(INT64, f"inttoptr i64 {address.name} to ptr").name
        return self._call(result, f"{function}({given})")

    def _call_narrow_vectors(self) -> None:
        self.attributes += ' "prefer-vector-width"="256"'

    def _call_wide_vectors(self) -> None:
        self.attributes += ' "prefer-vector-width"="512"'

    def _call_separate_arrays(self) -> None:
        self._of_arrays = " noalias"

    def _call_not_inlined(self) -> None:
        self.attributes += " noinline"

    def _call_min(self, one: Operand, other: Operand) -> Value:
        return self._pick(ast.Lt, one, other)

    def _call_max(self, one: Operand, other: Operand) -> Value:
        return self._pick(ast.Gt, one, other)

    def _pick(self, op: type[ast.cmpop], one: Operand, other: Operand) -> Value:
        kind, left, right = self._alike(one, other)
        first = self._compare(op, Value(kind, left), Value(kind, right))
        return self._value(kind, f"select i1 {first.name}, {kind.llvm} {left}, {kind.llvm} {right}")

    def _call_abs(self, value: Value) -> Value:
        if value.type.is_float:
            return self._call_function("fabs", [value])
        return self._pick(ast.Gt, value, self._value(value.type, f"sub nsw {value.type.llvm} 0, {value.name}"))

    # Types

    def _truth(self, value: Operand) -> str:
        """Return a value as an i1: whether it is not zero."""
        if isinstance(value, Value) and value.type is not BOOL:
            return self._compare(ast.NotEq, value, 0).name
        return self._as(BOOL, value)

    def _alike(self, one: Operand, other: Operand) -> tuple[Type, str, str]:
        """Return two values as values of one type."""
        types = {value.type for value in (one, other) if isinstance(value, Value)} or {INT64}
        kind = (types - {BOOL} or {BOOL}).pop()
        return kind, self._as(kind, one), self._as(kind, other)

    def _as(self, kind: Type, value: Operand) -> str:
        """Return a value that has a type already, or takes it without a word, in LLVM IR."""
        if not isinstance(value, Value):
            return _constant(kind, value)
        if value.type != kind and (value.type is not BOOL or kind.is_float or kind.element):
            raise TypeError(f"{value.type.name} where {kind.name} must stand")
        return self._converted(kind, value)

    def _converted(self, kind: Type, value: Operand) -> str:
        """Return a value as one of another type, in LLVM IR."""
        if not isinstance(value, Value):
            return _constant(kind, value)
        given = value.type
        if given.llvm == kind.llvm:
            return value.name
        wider = kind.bits > given.bits
        if given.is_float and kind.is_float:
            op = "fpext" if wider else "fptrunc"
        elif kind.is_float:
            op = "sitofp" if given.signed else "uitofp"
        elif not given.is_float:
            op = ("sext" if given.signed else "zext") if wider else "trunc"
        else:
            raise TypeError(f"no {kind.name} is made of {given.name}")
        return self._value(kind, f"{op} {given.llvm} {value.name} to {kind.llvm}").name


def _name(expression: ast.expr) -> str:
    if not isinstance(expression, ast.Name):
        raise TypeError(f"`{ast.unparse(expression)}` where a name must stand")
    return expression.id


def _typed(value: Operand) -> Value:
    """Return a value; constants are integers or truth values."""
    if isinstance(value, Value):
        return value
    kind = BOOL if isinstance(value, bool) else INT64
    return Value(kind, _constant(kind, value))


def _constant(kind: Type, value: float) -> str:
    if kind is BOOL:
        return "true" if value else "false"
    if not kind.is_float:
        return str(operator.index(value))  # type: ignore[arg-type]  # what is not an integer raises
    rounded = ctypes.c_float(value).value if kind is FLOAT32 else float(value)
    return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"
