"""From a module's text to Python that runs: small programs by hand, against what MLIR says of their ops."""

from __future__ import annotations

import itertools
import math
import operator
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_triton.ascend.chips import chip
from nsa_triton.ascend.compile import final_module
from nsa_triton.ascend.hivm_module import functions
from nsa_triton.ascend.lower import Specialization
from nsa_triton.ascend.simulator.core import Core
from nsa_triton.ascend.simulator.faults import UnknownInstructionError
from nsa_triton.ascend.simulator.memory import Memory, View
from nsa_triton.ascend.simulator.translate import Program, translate
from nsa_triton.ascend.toolchain import compilers, front_end_problem

HERE = 'loc("ops/k.py":7:3)'
DYNAMIC = "-9223372036854775808"


def module(body: str, arguments: Mapping[str, str], name: str = "k") -> str:
    """A function in generic form. Ops are given without their location."""
    taken = ", ".join(f"{value}: {type_} {HERE}" for value, type_ in arguments.items())
    lines = [line if line.rstrip().endswith(("({", "}, {")) or line.lstrip()[:1] == "^" else f"{line} {HERE}"
             for line in body.splitlines() if line.strip()]  # fmt: skip
    return "\n".join([
        '"builtin.module"() ({',
        f'"func.func"() <{{function_type = () -> (), sym_name = "{name}"}}> ({{',
        f"^bb0({taken}):",
        *lines,
        f'"func.return"() : () -> () {HERE}',
        f"}}) : () -> () {HERE}",
        f"}}) : () -> () {HERE}",
    ])  # fmt: skip


def core(role: str = "AIV") -> Core:
    return Core(chip("Ascend910B2"), role, 3, 1, 7)


def run(program: Program, *values: Any) -> None:
    """Runs it twice: as it is computed, and as it is timed."""
    (code,) = program.cores
    for function in (code.run, code.timed):
        for turn in function(core(code.role), *values):
            assert isinstance(turn, float)


class Compiled:
    """A body as a function from its arguments to those of its values that are named. Each is stored in a memory that
    is wide enough not to round or wrap it once more."""

    def __init__(self, body: str, arguments: Mapping[str, str], results: Mapping[str, str]) -> None:
        outs = {f"%out{i}": (value, type_) for i, (value, type_) in enumerate(results.items())}
        stores = "\n".join(
            f'"memref.store"({value}, {out}, %zero) : ({type_}, memref<1x{type_}>, index) -> ()'
            for out, (value, type_) in outs.items()
        )
        taken = {**arguments, **{out: f"memref<1x{type_}>" for out, (_, type_) in outs.items()}}
        zero = '%zero = "arith.constant"() <{value = 0 : index}> : () -> index'
        self.program = translate(module("\n".join((zero, body, stores)), taken))
        self.types = [*results.values()]

    def __call__(self, *values: Any) -> list[Any]:
        kinds = ["f32" if "f" in type_ else "i64" for type_ in self.types]
        outs = [View(Memory("out", "tensor", np.full(8, 0xAA, np.uint8)), kind, 0, (1,)) for kind in kinds]
        run(self.program, *values, *outs)
        return [out.read()[0].item() for out in outs]


def binary(op: str, kind: str, result: str = "", attributes: str = "") -> Compiled:
    result = result or kind
    body = f'%r = "{op}"(%a, %b) {attributes} : ({kind}, {kind}) -> {result}'
    return Compiled(body, {"%a": kind, "%b": kind}, {"%r": result})


def unary(op: str, source: str, target: str) -> Compiled:
    return Compiled(f'%r = "{op}"(%a) : ({source}) -> {target}', {"%a": source}, {"%r": target})


def constant(value: str, type_: str) -> Any:
    return Compiled(f'%c = "arith.constant"() <{{value = {value}}}> : () -> {type_}', {}, {"%c": type_})()[0]


# ---- integers --------------------------------------------------------------------------------------------------------


def signed(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> bits - 1 else value


def towards_zero(a: int, b: int) -> int:
    sign = -1 if (a < 0) != (b < 0) else 1
    return sign * (abs(a) // abs(b))


INTEGERS: dict[str, Callable[[int, int], int]] = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "andi": operator.and_, "ori": operator.or_,
    "xori": operator.xor, "maxsi": max, "minsi": min,
}  # fmt: skip
WORDS = st.one_of(st.integers(-(1 << 31), (1 << 31) - 1), st.integers(-5, 5))


@pytest.mark.parametrize("op", sorted(INTEGERS))
def test_arithmetic_of_i32_wraps(op: str) -> None:
    compute = binary(f"arith.{op}", "i32", attributes="<{overflowFlags = #arith.overflow<none>}>")
    for a, b in itertools.product((-(1 << 31), -65537, -5, 0, 1, 6, 65536, (1 << 31) - 1), repeat=2):
        assert compute(a, b) == [signed(INTEGERS[op](a, b), 32)]


@pytest.mark.parametrize("kind", ["i32", "i64", "index"])
def test_division_is_rounded_towards_zero(kind: str) -> None:
    quotient, remainder = (binary(f"arith.{op}", kind) for op in ("divsi", "remsi"))
    assert [quotient(a, b) + remainder(a, b) for a, b in ((7, 2), (-7, 2), (7, -2), (-7, -2), (0, -2), (-6, 3))] == [
        [3, 1], [-3, -1], [-3, 1], [3, -1], [0, 0], [-2, 0]
    ]  # fmt: skip

    @settings(max_examples=40)
    @given(WORDS, WORDS.filter(bool))
    def check(a: int, b: int) -> None:
        a += a == -(1 << 31)  # divided by -1 it has no quotient
        assert quotient(a, b) == [towards_zero(a, b)]
        assert remainder(a, b) == [int(math.fmod(a, b))]

    check()


def test_other_divisions() -> None:
    down, up = binary("arith.floordivsi", "i32"), binary("arith.ceildivsi", "i32")
    for a in (-7, -6, 0, 6, 7):
        for b in (-3, 3):
            assert down(a, b) + up(a, b) == [math.floor(a / b), math.ceil(a / b)]


def test_shifts() -> None:
    left, right = binary("arith.shli", "i32"), binary("arith.shrsi", "i32")
    assert [left(1, 31), left(3, 30), left(-1, 4)] == [[-(1 << 31)], [-(1 << 30)], [-16]]
    assert [right(-8, 1), right(-1, 31), right(9, 2)] == [[-4], [-1], [2]]


COMPARES: list[Callable[[int, int], bool]] = [
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.lt, operator.le, operator.gt,
    operator.ge,
]  # fmt: skip


@pytest.mark.parametrize("predicate", range(10))
def test_compare_integers(predicate: int) -> None:
    compute = binary("arith.cmpi", "i32", "i1", f"<{{predicate = {predicate} : i64}}>")
    for a in (-2, -1, 0, 1, 5):
        for b in (-2, -1, 0, 1, 5):
            x, y = (a % (1 << 32), b % (1 << 32)) if predicate > 5 else (a, b)
            assert compute(a, b) == [COMPARES[predicate](x, y)]


@pytest.mark.parametrize(
    ("op", "source", "target", "pairs"),
    [
        ("index_cast", "i32", "index", [(-5, -5), (7, 7)]),
        ("index_cast", "index", "i32", [(-5, -5), ((1 << 32) + 3, 3), (1 << 31, -(1 << 31))]),
        ("index_cast", "index", "i1", [(0, 0), (1, 1), (2, 0), (-1, 1)]),
        ("index_castui", "i32", "index", [(5, 5)]),
        ("trunci", "i64", "i32", [((1 << 40) + 5, 5), (-1, -1), ((1 << 32) - 1, -1)]),
        ("trunci", "i32", "i1", [(2, 0), (3, 1)]),
        ("extsi", "i32", "i64", [(-5, -5)]),
        ("extsi", "i1", "i32", [(1, -1), (0, 0)]),
        ("extui", "i32", "i64", [(-5, (1 << 32) - 5)]),
        ("extui", "i1", "i32", [(1, 1), (0, 0)]),
        ("sitofp", "i32", "f32", [(-5, -5.0), ((1 << 24) + 1, float(1 << 24))]),
        ("fptosi", "f32", "i32", [(-2.75, -2), (2.75, 2)]),
    ],
)
def test_conversions(op: str, source: str, target: str, pairs: Sequence[tuple[Any, Any]]) -> None:
    compute = unary(f"arith.{op}", source, target)
    for value, expected in pairs:
        assert compute(value) == [expected]


@pytest.mark.parametrize(("op", "target"), [("index_cast", "index"), ("sitofp", "f32")])
def test_a_signed_bit_is_minus_one(op: str, target: str) -> None:
    assert unary(f"arith.{op}", "i1", target)(1) == [-1]


def test_index_castui_extends_with_zeros() -> None:
    assert unary("arith.index_castui", "i32", "index")(-1) == [(1 << 32) - 1]


def test_select() -> None:
    body = '%r = "arith.select"(%c, %a, %b) : (i1, i32, i32) -> i32'
    compute = Compiled(body, {"%c": "i1", "%a": "i32", "%b": "i32"}, {"%r": "i32"})
    assert [compute(1, 5, 6), compute(0, 5, 6)] == [[5], [6]]


# ---- floats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "meaning"), [("addf", operator.add), ("subf", operator.sub), ("mulf", operator.mul),
                                             ("divf", operator.truediv)])  # fmt: skip
def test_arithmetic_of_f32_is_rounded(op: str, meaning: Callable[[float, float], float]) -> None:
    compute = binary(f"arith.{op}", "f32", attributes="<{fastmath = #arith.fastmath<none>}>")
    for a, b in ((0.1, 0.2), (1.0, 3.0), (1e8, 1.0), (-2.5, 7.0)):
        x, y = np.float32(a), np.float32(b)
        assert compute(x, y) == [float(np.float32(meaning(float(x), float(y))))]


def test_arithmetic_of_bf16_is_rounded_to_bf16() -> None:
    one, step = np.float32(1), np.float32(2**-8)  # half of the distance to the next bfloat16
    add = binary("arith.addf", "bf16")
    assert [add(one, step), add(one, 3 * step)] == [[1.0], [1 + 2**-6]]
    assert unary("arith.truncf", "f32", "bf16")(np.float32(1 + 2**-8)) == [1.0]
    assert unary("arith.truncf", "f32", "f16")(np.float32(1 + 2**-11)) == [1.0]
    assert unary("arith.extf", "bf16", "f32")(np.float32(1.5)) == [1.5]


def test_division_by_zero_is_infinite() -> None:
    with np.errstate(divide="ignore"):
        assert binary("arith.divf", "f32")(np.float32(-1), np.float32(0)) == [-math.inf]


def test_maxima_differ_in_nan() -> None:
    nan, one = np.float32(np.nan), np.float32(1)
    for op, expected in (("maximumf", True), ("minimumf", True), ("maxnumf", False), ("minnumf", False)):
        compute = binary(f"arith.{op}", "f32")
        assert math.isnan(compute(one, nan)[0]) is expected
        assert compute(one, np.float32(2)) == [2.0 if op.startswith("max") else 1.0]


ORDERED = {1: operator.eq, 2: operator.gt, 3: operator.ge, 4: operator.lt, 5: operator.le, 6: operator.ne}
VALUES = [np.float32(value) for value in (-1.0, 0.0, -0.0, 2.0, math.inf)]


@pytest.mark.parametrize("predicate", [*ORDERED, *(p + 7 for p in ORDERED)])
def test_compare_floats(predicate: int) -> None:
    compute = binary(
        "arith.cmpf", "f32", "i1", f"<{{fastmath = #arith.fastmath<none>, predicate = {predicate} : i64}}>"
    )
    meaning = ORDERED[predicate if predicate < 7 else predicate - 7]
    for a, b in itertools.product(VALUES, repeat=2):
        assert compute(a, b) == [meaning(float(a), float(b))]


@pytest.mark.parametrize("predicate", [1, 2, 3, 4, 5, 13])
def test_nan_is_not_ordered(predicate: int) -> None:
    compute = binary("arith.cmpf", "f32", "i1", f"<{{predicate = {predicate} : i64}}>")
    assert compute(np.float32(np.nan), np.float32(1)) == [predicate == 13]


@pytest.mark.parametrize("predicate", [6, 8, 9, 10, 11, 12])
def test_nan_and_the_other_predicates(predicate: int) -> None:
    compute = binary("arith.cmpf", "f32", "i1", f"<{{predicate = {predicate} : i64}}>")
    assert compute(np.float32(np.nan), np.float32(1)) == [predicate > 7]


@pytest.mark.parametrize("predicate", [0, 7, 14, 15])
def test_predicates_that_no_kernel_needs_are_refused(predicate: int) -> None:
    with pytest.raises(UnknownInstructionError, match=f"arith.cmpf at ops/k.py:7: predicate {predicate}"):
        binary("arith.cmpf", "f32", "i1", f"<{{predicate = {predicate} : i64}}>")


def test_bitcast() -> None:
    bits = struct.unpack("<i", struct.pack("<f", -1.5))[0]
    assert unary("arith.bitcast", "f32", "i32")(-1.5) == [bits]
    assert unary("arith.bitcast", "i32", "f32")(bits) == [-1.5]


# ---- constants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "type_", "expected"),
    [
        ("true", "i1", 1),
        ("false", "i1", 0),
        ("-7 : i32", "i32", -7),
        ("-9223372036854775808 : index", "index", -(1 << 63)),
        ("2.500000e-01 : f32", "f32", 0.25),
        ("-1.000000e-01 : f32", "f32", float(np.float32(-0.1))),
        ("0xFF800000 : f32", "f32", -math.inf),
        ("0x7F800000 : f32", "f32", math.inf),
        ("0xFC00 : f16", "f16", -math.inf),
        ("0x3555 : f16", "f16", float(np.uint16(0x3555).view(np.float16))),
        ("1.000000e+00 : f16", "f16", 1.0),
        ("0xFF80 : bf16", "bf16", -math.inf),
        ("5.000000e-01 : bf16", "bf16", 0.5),
    ],
)
def test_constants(value: str, type_: str, expected: Any) -> None:
    assert constant(value, type_) == expected


@pytest.mark.parametrize("value", ["0x7FC00000 : f32", "0x7E00 : f16", "0x7FC0 : bf16"])
def test_nan_constants(value: str) -> None:
    assert math.isnan(constant(value, value[-3:].strip() if "bf" not in value else "bf16"))


def test_a_bf16_constant_is_a_bf16_number() -> None:
    body = """
%c = "arith.constant"() <{value = 3.007810e-01 : bf16}> : () -> bf16
%r = "arith.extf"(%c) : (bf16) -> f32
"""
    assert Compiled(body, {}, {"%r": "f32"})() == [0.30078125]


# ---- control flow ----------------------------------------------------------------------------------------------------

ONE = '%one = "arith.constant"() <{value = 1 : index}> : () -> index'


def test_a_loop_carries_values() -> None:
    """Fibonacci's numbers."""
    body = f"""{ONE}
%r:2 = "scf.for"(%zero, %n, %one, %a, %b) ({{
^bb0(%i: index, %x: i32, %y: i32):
  %s = "arith.addi"(%x, %y) : (i32, i32) -> i32
  "scf.yield"(%y, %s) : (i32, i32) -> ()
}}) : (index, index, index, i32, i32) -> (i32, i32)
"""
    compute = Compiled(body, {"%n": "index", "%a": "i32", "%b": "i32"}, {"%r#0": "i32", "%r#1": "i32"})
    assert [compute(n, 0, 1) for n in (0, 1, 2, 10)] == [[0, 1], [1, 1], [1, 2], [55, 89]]


def test_what_is_carried_changes_places() -> None:
    body = f"""{ONE}
%r:2 = "scf.for"(%zero, %n, %one, %a, %b) ({{
^bb0(%i: index, %x: i32, %y: i32):
  "scf.yield"(%y, %x) : (i32, i32) -> ()
}}) : (index, index, index, i32, i32) -> (i32, i32)
"""
    compute = Compiled(body, {"%n": "index", "%a": "i32", "%b": "i32"}, {"%r#0": "i32", "%r#1": "i32"})
    assert [compute(n, 5, 6) for n in (0, 1, 2, 3)] == [[5, 6], [6, 5], [5, 6], [6, 5]]


def test_a_loop_steps_from_its_lower_to_its_upper_bound() -> None:
    body = """
%r = "scf.for"(%low, %high, %step, %zero) ({
^bb0(%i: index, %x: index):
  %t = "arith.muli"(%x, %ten) : (index, index) -> index
  %s = "arith.addi"(%t, %i) : (index, index) -> index
  "scf.yield"(%s) : (index) -> ()
}) : (index, index, index, index) -> index
"""
    compute = Compiled(body, dict.fromkeys(("%low", "%high", "%step", "%ten"), "index"), {"%r": "index"})
    assert [compute(2, 9, 3, 10), compute(5, 5, 1, 10), compute(9, 2, 1, 10)] == [[258], [0], [0]]


def test_nested_loops_and_ifs_with_results() -> None:
    """Of all pairs i < n, j < i the sum of i * j where i + j is even, less the number of the other pairs."""
    body = f"""{ONE}
%two = "arith.constant"() <{{value = 2 : index}}> : () -> index
%r:2 = "scf.for"(%zero, %n, %one, %zero, %zero) ({{
^bb0(%i: index, %sum: index, %odd: index):
  %q:2 = "scf.for"(%zero, %i, %one, %sum, %odd) ({{
  ^bb0(%j: index, %x: index, %y: index):
    %s = "arith.addi"(%i, %j) : (index, index) -> index
    %m = "arith.remsi"(%s, %two) : (index, index) -> index
    %c = "arith.cmpi"(%m, %zero) <{{predicate = 0 : i64}}> : (index, index) -> i1
    %p:2 = "scf.if"(%c) ({{
      %t = "arith.muli"(%i, %j) : (index, index) -> index
      %u = "arith.addi"(%x, %t) : (index, index) -> index
      "scf.yield"(%u, %y) : (index, index) -> ()
    }}, {{
      %v = "arith.addi"(%y, %one) : (index, index) -> index
      "scf.yield"(%x, %v) : (index, index) -> ()
    }}) : (i1) -> (index, index)
    "scf.yield"(%p#0, %p#1) : (index, index) -> ()
  }}) : (index, index, index, index, index) -> (index, index)
  "scf.yield"(%q#0, %q#1) : (index, index) -> ()
}}) : (index, index, index, index, index) -> (index, index)
"""
    compute = Compiled(body, {"%n": "index"}, {"%r#0": "index", "%r#1": "index"})
    for n in (0, 1, 2, 7):
        pairs = [(i, j) for i in range(n) for j in range(i)]
        even = sum(i * j for i, j in pairs if (i + j) % 2 == 0)
        assert compute(n) == [even, sum((i + j) % 2 for i, j in pairs)]


def test_an_if_without_results_acts_or_does_not() -> None:
    def act(value: str) -> str:
        return f'"memref.store"({value}, %m, %zero) : (i32, memref<1xi32>, index) -> ()'

    end = '"scf.yield"() : () -> ()'
    alone = f'"scf.if"(%c) ({{\n{act("%a")}\n{end}\n}}, {{\n}}) : (i1) -> ()'
    both = f'"scf.if"(%c) ({{\n{act("%a")}\n{end}\n}}, {{\n{act("%b")}\n{end}\n}}) : (i1) -> ()'
    empty = f'"scf.if"(%c) ({{\n{end}\n}}, {{\n{act("%b")}\n{end}\n}}) : (i1) -> ()'
    arguments = {"%c": "i1", "%a": "i32", "%b": "i32", "%m": "memref<1xi32>"}
    for body, taken, left in ((alone, 5, 9), (both, 5, 6), (empty, 9, 6)):
        compute = Compiled(body, arguments, {})
        for condition, expected in ((1, taken), (0, left)):
            memory = View(Memory("m", "tensor", np.zeros(4, np.uint8)), "i32", 0, (1,))
            memory.write(9)
            compute(condition, 5, 6, memory)
            assert memory.read().tolist() == [expected]


# ---- views -----------------------------------------------------------------------------------------------------------


def reinterpret(
    result: str, source: str, shape: Sequence[int], offset: str, strides: Sequence[int], values: Sequence[str] = ()
) -> str:
    """`values` are the operands of a dynamic offset."""
    at = ", ".join([source, *values])
    sizes, steps = ", ".join(map(str, shape)), ", ".join(map(str, strides))
    attributes = (
        f"operandSegmentSizes = array<i32: 1, {len(values)}, 0, 0>, static_offsets = array<i64: {offset}>, "
        f"static_sizes = array<i64: {sizes}>, static_strides = array<i64: {steps}>"
    )
    kind = type_of(shape, strides, offset)
    indices = ", index" * len(values)
    return f'{result} = "memref.reinterpret_cast"({at}) <{{{attributes}}}> : (memref<?xi32>{indices}) -> {kind}'


def type_of(shape: Sequence[int], strides: Sequence[int] = (), offset: str = "?") -> str:
    sizes = "x".join(map(str, shape))
    steps = ", ".join(map(str, strides))
    at = "?" if offset == DYNAMIC else offset
    return f"memref<{sizes}xi32" + (f", strided<[{steps}], offset: {at}>>" if strides else ">")


def viewed(body: str, shape: Sequence[int], *values: Any, type_: str = "") -> Any:
    """What %view shows of the numbers 0 to 255 in %x, copied out by an instruction; arguments %v0, %v1, ... are
    indices."""
    sizes = "x".join(map(str, shape))
    out_type = f"memref<{sizes}xi32, #hivm.address_space<ub>>"
    copy = f'"hivm.hir.copy"(%view, %out) : ({type_ or type_of(shape)}, {out_type}) -> ()'
    arguments = {"%x": "memref<?xi32>", **{f"%v{i}": "index" for i in range(len(values))}, "%out": out_type}
    x = View(Memory("x", "tensor", np.arange(256, dtype=np.int32).view(np.uint8)), "i32", 0, (256,))
    out = View(Memory.on_chip("UB", 1024), "i32", 0, shape)
    run(translate(module(f"{body}\n{copy}", arguments)), x, *values, out)
    return out.read().tolist()


def affine(shape: Sequence[int], start: int, strides: Sequence[int]) -> Any:
    """start + sum of index x stride, as nested lists."""
    if not shape:
        return start
    return [affine(shape[1:], start + i * strides[0], strides[1:]) for i in range(shape[0])]


MATRIX = reinterpret("%m", "%x", (16, 16), "0", (16, 1))


def test_reinterpret_cast() -> None:
    body = reinterpret("%view", "%x", (3, 4), DYNAMIC, (10, 2), ["%v0"])
    assert viewed(body, (3, 4), 5) == affine((3, 4), 5, (10, 2))


def test_a_reinterpreted_view_counts_from_the_start_of_its_buffer() -> None:
    first = reinterpret("%y", "%x", (8,), "100", (1,))
    assert viewed(first + "\n" + reinterpret("%view", "%y", (4,), "20", (2,)), (4,)) == [20, 22, 24, 26]


def test_subview_with_offsets_sizes_and_strides() -> None:
    body = f"""{MATRIX}
%view = "memref.subview"(%m, %v0, %v1) <{{operandSegmentSizes = array<i32: 1, 1, 1, 0>, static_offsets = array<i64: {DYNAMIC}, 3>, static_sizes = array<i64: {DYNAMIC}, 5>, static_strides = array<i64: 2, 1>}}> : (memref<16x16xi32>, index, index) -> memref<?x5xi32, strided<[32, 1], offset: ?>>
"""  # noqa: E501
    assert viewed(body, (4, 5), 2, 4, type_="memref<?x5xi32>") == affine((4, 5), 2 * 16 + 3, (32, 1))


@pytest.mark.parametrize(
    ("sizes", "shape", "strides"), [((1, 5), (5,), (1,)), ((5, 1), (5,), (16,)), ((1, 1), (1,), (16,))]
)
def test_subview_drops_axes_of_one_element(
    sizes: tuple[int, int], shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    body = f"""{MATRIX}
%view = "memref.subview"(%m) <{{operandSegmentSizes = array<i32: 1, 0, 0, 0>, static_offsets = array<i64: 2, 3>, static_sizes = array<i64: {sizes[0]}, {sizes[1]}>, static_strides = array<i64: 1, 1>}}> : (memref<16x16xi32>) -> {type_of(shape, strides)}
"""  # noqa: E501
    assert viewed(body, shape) == affine(shape, 35, strides)


@pytest.mark.parametrize(
    ("result", "shape", "strides"),
    [
        ("memref<3xi32, strided<[8], offset: ?>>", (3,), (8,)),
        ("memref<3x1xi32, strided<[8, 2], offset: ?>>", (3, 1), (8, 2)),
        ("memref<1x3xi32, strided<[40, 8], offset: ?>>", (1, 3), (40, 8)),
    ],
)
def test_the_result_of_a_subview_tells_which_axes_it_dropped(
    result: str, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    body = f"""{reinterpret("%m", "%x", (4, 5, 1), "0", (40, 8, 2))}
%view = "memref.subview"(%m, %v0) <{{operandSegmentSizes = array<i32: 1, 1, 0, 0>, static_offsets = array<i64: {DYNAMIC}, 1, 0>, static_sizes = array<i64: 1, 3, 1>, static_strides = array<i64: 1, 1, 1>}}> : (memref<4x5x1xi32, strided<[40, 8, 2]>>, index) -> {result}
"""  # noqa: E501
    assert viewed(body, shape, 2, type_=result) == affine(shape, 88, strides)


def test_subview_of_a_subview() -> None:
    def cut(result: str, source: str, row: int, column: int, rows: int, columns: int) -> str:
        return f"""
{result} = "memref.subview"({source}) <{{operandSegmentSizes = array<i32: 1, 0, 0, 0>, static_offsets = array<i64: {row}, {column}>, static_sizes = array<i64: {rows}, {columns}>, static_strides = array<i64: 1, 1>}}> : (memref<16x16xi32>) -> {type_of((rows, columns), (16, 1))}
"""  # noqa: E501

    body = MATRIX + cut("%c", "%m", 4, 5, 8, 8) + cut("%view", "%c", 1, 2, 3, 4)
    assert viewed(body, (3, 4)) == affine((3, 4), 5 * 16 + 7, (16, 1))


@pytest.mark.parametrize(
    ("shape", "strides", "groups", "result", "steps"),
    [
        ((4, 8), (8, 1), "[[0, 1]]", (32,), (1,)),
        ((2, 3, 4), (50, 4, 1), "[[0], [1, 2]]", (2, 12), (50, 1)),
        ((2, 3, 4), (12, 4, 1), "[[0, 1], [2]]", (6, 4), (4, 1)),
        ((6, 1), (16, 1), "[[0, 1]]", (6,), (16,)),  # the axis of one element says nothing about the distance
        ((1, 6), (64, 3), "[[0, 1]]", (6,), (3,)),
    ],
)
def test_collapse_shape(
    shape: tuple[int, ...], strides: tuple[int, ...], groups: str, result: tuple[int, ...], steps: tuple[int, ...]
) -> None:
    body = f"""{reinterpret("%m", "%x", shape, "7", strides)}
%view = "memref.collapse_shape"(%m) <{{reassociation = {groups}}}> : ({type_of(shape, strides)}) -> {type_of(result)}
"""
    assert viewed(body, result) == affine(result, 7, steps)


@pytest.mark.parametrize(
    ("shape", "strides", "groups", "result", "steps"),
    [
        ((12,), (5,), "[[0, 1]]", (3, 4), (20, 5)),
        ((12,), (1,), "[[0, 1, 2]]", (1, 12, 1), (12, 1, 1)),
        ((6, 4), (32, 1), "[[0, 1], [2]]", (2, 3, 4), (96, 32, 1)),
    ],
)
def test_expand_shape(
    shape: tuple[int, ...], strides: tuple[int, ...], groups: str, result: tuple[int, ...], steps: tuple[int, ...]
) -> None:
    sizes = ", ".join(map(str, result))
    body = f"""{reinterpret("%m", "%x", shape, "7", strides)}
%view = "memref.expand_shape"(%m) <{{reassociation = {groups}, static_output_shape = array<i64: {sizes}>}}> : ({type_of(shape, strides)}) -> {type_of(result)}
"""  # noqa: E501
    assert viewed(body, result) == affine(result, 7, steps)


def test_metadata_of_a_view_makes_it_again() -> None:
    many = ", ".join(["index"] * 5)
    body = f"""{reinterpret("%y", "%x", (6, 4), DYNAMIC, (10, 2), ["%v0"])}
%d:6 = "memref.extract_strided_metadata"(%y) : ({type_of((6, 4), (10, 2))}) -> (memref<i32>, {many})
%view = "memref.reinterpret_cast"(%d#0, %d#1, %d#2, %d#3, %d#4, %d#5) <{{operandSegmentSizes = array<i32: 1, 1, 2, 2>, static_offsets = array<i64: {DYNAMIC}>, static_sizes = array<i64: {DYNAMIC}, {DYNAMIC}>, static_strides = array<i64: {DYNAMIC}, {DYNAMIC}>}}> : (memref<i32>, {many}) -> memref<?x?xi32, strided<[?, ?], offset: ?>>
"""  # noqa: E501
    assert viewed(body, (6, 4), 33, type_="memref<?x?xi32>") == affine((6, 4), 33, (10, 2))


def test_a_view_of_bytes() -> None:
    """16-bit halves of the numbers, from the third byte on."""
    body = """
%y = "memref.view"(%bytes, %shift, %n) : (memref<?xi8>, index, index) -> memref<?x2xi16>
%r = "memref.load"(%y, %i, %j) : (memref<?x2xi16>, index, index) -> i16
"""
    arguments = {"%bytes": "memref<?xi8>", "%shift": "index", "%n": "index", "%i": "index", "%j": "index"}
    compute = Compiled(body, arguments, {"%r": "i16"})
    data = np.arange(64, dtype=np.uint8)
    source = View(Memory("workspace", "workspace", data), "i8", 0, (64,))
    for i, j in ((0, 0), (0, 1), (3, 1)):
        first = 4 + 2 * (2 * i + j)
        assert compute(source, 4, 4, i, j) == [int.from_bytes(data[first : first + 2].tobytes(), "little")]


def test_a_cast_is_the_same_view() -> None:
    body = f"""{MATRIX}
%view = "memref.cast"(%m) : (memref<16x16xi32>) -> memref<?x16xi32>
"""
    assert viewed(body, (16, 16)) == affine((16, 16), 0, (16, 1))


def test_elements_of_every_type() -> None:
    for dtype, value in (("bf16", 1.5), ("f16", -2.25), ("f32", 0.1), ("i8", -3), ("i16", 300), ("i64", 1 << 40)):
        body = f"""
%y = "memref.load"(%m, %i, %j) : (memref<4x8x{dtype}, strided<[8, 1]>>, index, index) -> {dtype}
"memref.store"(%y, %m, %j, %i) : ({dtype}, memref<4x8x{dtype}, strided<[8, 1]>>, index, index) -> ()
"""
        arguments = {"%m": f"memref<4x8x{dtype}>", "%i": "index", "%j": "index"}
        m = View(Memory("m", "tensor", np.zeros(512, np.uint8)), dtype, 0, (4, 8))
        m.at(2 * 8 + 3, (1,), (1,)).write(value)
        assert Compiled(body, arguments, {"%y": dtype})(m, 2, 3) == [np.float32(value) if dtype == "f32" else value]
        element = m.read()[3, 2]
        assert element == (np.float32(value) if dtype == "f32" else value)
        assert np.count_nonzero(m.read()) == 2


# ---- what a core knows, and whole modules ----------------------------------------------------------------------------


def test_a_core_knows_which_one_it_is() -> None:
    body = """
%a = "hivm.hir.get_block_idx"() : () -> i64
%b = "hivm.hir.get_sub_block_idx"() : () -> i64
%c = "hivm.hir.get_block_num"() : () -> i64
"hivm.hir.set_mask_norm"() : () -> ()
"annotation.mark"(%a) {keys = [], logical_block_num} : (i64) -> ()
"""
    assert Compiled(body, {}, dict.fromkeys(("%a", "%b", "%c"), "i64"))() == [3, 1, 7]


def test_buffers_lie_at_their_addresses() -> None:
    """Two buffers, the second one 64 bytes into the first: what is written through one is read through the other."""
    body = """
%p = "arith.constant"() <{value = 1024 : i64}> : () -> i64
%q = "arith.constant"() <{value = 1088 : i64}> : () -> i64
%f = "arith.constant"() <{value = 2.5 : f32}> : () -> f32
%two = "arith.constant"() <{value = 2 : index}> : () -> index
%three = "arith.constant"() <{value = 3 : index}> : () -> index
%a = "hivm.hir.pointer_cast"(%p) <{operandSegmentSizes = array<i32: 1, 0>}> : (i64) -> memref<4x8xf32, #hivm.address_space<ub>>
%b = "hivm.hir.pointer_cast"(%q) <{operandSegmentSizes = array<i32: 1, 0>}> : (i64) -> memref<16xf32, #hivm.address_space<ub>>
"hivm.hir.vbrc"(%f, %a) <{broadcast_dims = array<i64>}> : (f32, memref<4x8xf32, #hivm.address_space<ub>>) -> ()
"memref.store"(%i, %a, %two, %three) : (f32, memref<4x8xf32, #hivm.address_space<ub>>, index, index) -> ()
%r = "memref.load"(%b, %three) : (memref<16xf32, #hivm.address_space<ub>>, index) -> f32
%s = "memref.load"(%b, %two) : (memref<16xf32, #hivm.address_space<ub>>, index) -> f32
"""  # noqa: E501
    assert Compiled(body, {"%i": "f32"}, {"%r": "f32", "%s": "f32"})(np.float32(7)) == [7.0, 2.5]


def test_the_functions_of_a_module() -> None:
    def function(name: str, body: str = "") -> str:
        text = module(body, {"%flags": "i64", "%n": "i32"}, name)
        return "\n".join(text.splitlines()[1:-1])

    workspace = '%w = "arith.constant"() <{value = 4096 : index}> : () -> index'
    kind = '%t = "arith.constant"() <{value = 32 : i8}> : () -> i8'
    parts = [
        function("k_infer_workspace_shape_function", workspace),
        function("k_infer_task_type_function", kind),
        function("k_mix_aic"),
        function("k_mix_aiv"),
    ]
    program = translate("\n".join(['"builtin.module"() ({', *parts, f"}}) : () -> () {HERE}"]))
    assert [(one.name, one.role, one.types) for one in program.cores] == [
        ("k_mix_aic", "AIC", ("i64", "i32")),
        ("k_mix_aiv", "AIV", ("i64", "i32")),
    ]
    assert (program.workspace, program.is_mixed, program.uses_cube) == (4096, True, True)
    assert program.python.count("def program(core, vflags, vn):") == 2
    alone = translate(module("", {}))
    assert (alone.workspace, alone.is_mixed, alone.uses_cube, alone.cores[0].role) == (0, False, False, "AIV")


def test_instructions_keep_their_source_and_attributes() -> None:
    tile = "memref<16xf32, #hivm.address_space<ub>>"
    body = (
        '"hivm.hir.vcast"(%x, %y, %t) <{broadcast = array<i64>, cast = #hivm.cast<cast_signed>, '
        "operandSegmentSizes = array<i32: 1, 1, 1>, round_mode = #hivm.round_mode<rint>, transpose = array<i64>}> : "
        f"({tile}, {tile}, {tile}) -> ()"
    )
    (code,) = translate(module(body, dict.fromkeys(("%x", "%y", "%t"), tile))).cores
    (one,) = code.instructions
    assert (one.name, one.pipe, one.source, str(one)) == ("vcast", "V", "ops/k.py:7", "hivm.hir.vcast")
    assert one.attributes["round_mode"] == "rint"
    assert one.parts == (slice(0, 1), slice(1, 2), slice(2, 3))
    assert one.numbers == {"broadcast": (), "transpose": ()}


# ---- what is refused -------------------------------------------------------------------------------------------------

TILE = "memref<16xf32, #hivm.address_space<ub>>"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('%r = "arith.shrui"(%n, %n) : (i32, i32) -> i32', "arith.shrui"),
        ('%r = "arith.divui"(%n, %n) : (i32, i32) -> i32', "arith.divui"),
        ('%r = "math.erf"(%f) : (f32) -> f32', "math.erf"),
        ('"scf.while"(%n) : (i32) -> ()', "scf.while"),
        ('"func.call"() <{callee = @other}> : () -> ()', "func.call"),
        (f'%r = "memref.transpose"(%x) : ({TILE}) -> {TILE}', "memref.transpose"),
        (f'%r = "memref.alloc"() : () -> {TILE}', "memref.alloc"),
        (f'"hivm.hir.vsort"(%x, %x) : ({TILE}, {TILE}) -> ()', "hivm.hir.vsort"),
        (f'"hivm.hir.vgather"(%x, %x, %x) : ({TILE}, {TILE}, {TILE}) -> ()', "hivm.hir.vgather"),
    ],
)
def test_unknown_ops_are_refused(line: str, name: str) -> None:
    with pytest.raises(UnknownInstructionError, match=f"{name} at ops/k.py:7: the simulator does not model this op"):
        translate(module(line, {"%n": "i32", "%f": "f32", "%x": TILE}))


@pytest.mark.parametrize(
    ("name", "operands", "attributes", "attribute"),
    [
        ("vreduce", 2, "arith = #hivm.reduce_op<prod>, operandSegmentSizes = array<i32: 1, 1, 0, 0>", "arith = prod"),
        ("store", 2, "atomic_kind = #hivm.atomic_kind<add>", "atomic_kind = add"),
        ("vadd", 3, "operandSegmentSizes = array<i32: 2, 1>, transpose = array<i64: 1>", "transpose = array<i64: 1>"),
        ("fixpipe", 2, "pre_relu = #hivm.pre_relu<NORMAL_RELU>", "pre_relu = NORMAL_RELU"),
        ("fixpipe", 2, "pre_quant = #hivm.pre_quant<S322I8>", "pre_quant = S322I8"),
    ],
)  # fmt: skip
def test_unknown_attribute_values_are_refused(name: str, operands: int, attributes: str, attribute: str) -> None:
    values, types = ", ".join(["%x"] * operands), ", ".join([TILE] * operands)
    line = f'"hivm.hir.{name}"({values}) <{{{attributes}}}> : ({types}) -> ()'
    message = f"hivm.hir.{name} at ops/k.py:7: the simulator does not model {attribute}"
    with pytest.raises(UnknownInstructionError, match=re.escape(message)):
        translate(module(line, {"%x": TILE}))


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("vcast", "round_mode = #hivm.round_mode<round>"),
        ("vcast", "round_mode = #hivm.round_mode<odd>"),
        ("load", "may_implicit_transpose_with_last_axis = true"),
        ("load", "init_out_buffer = true"),
        ("load", "pad_mode = #hivm.padmode<PadFirstElem>"),
        ("fixpipe", "dma_mode = #hivm.dma_mode<nz2dn>"),
    ],
)
def test_more_attribute_values_to_refuse(name: str, attributes: str) -> None:
    line = f'"hivm.hir.{name}"(%x, %x) <{{{attributes}}}> : ({TILE}, {TILE}) -> ()'
    with pytest.raises(UnknownInstructionError, match=f"hivm.hir.{name} at ops/k.py:7: the simulator does not model"):
        translate(module(line, {"%x": TILE}))


# ---- attributes of ops -----------------------------------------------------------------------------------------------


def test_attributes_are_text_and_numbers() -> None:
    line = (
        '"hivm.hir.vadd"(%x, %x, %x) <{broadcast = array<i64>, groups = [[0, 1], [2]], '
        "function_type = (i8) -> (), pair = #hivm.pair<a, {b}>, sizes = array<i64: 1, -2>, unit}> {more = 3 : i32} : "
        f"({TILE}, {TILE}, {TILE}) -> ()"
    )
    (op, _) = functions(module(line, {"%x": TILE}))[0].ops
    assert op.attributes == {
        "broadcast": "array<i64>",
        "groups": "[[0, 1], [2]]",
        "function_type": "(i8) \u2192 ()",  # so that ">" always closes a bracket
        "pair": "#hivm.pair<a, {b}>",
        "sizes": "array<i64: 1, -2>",
        "unit": "",
        "more": "3 : i32",
    }
    assert [op.numbers(name) for name in ("broadcast", "groups", "sizes", "absent")] == [(), (0, 1, 2), (1, -2), ()]


def test_attributes_of_an_op_with_regions() -> None:
    body = f"""{ONE}
"scf.for"(%zero, %one, %one) ({{
^bb0(%i: index):
  "scf.yield"() : () -> ()
}}) {{hivm.loop_core_type = #hivm.tcore_type<CUBE>, pipeline.veconly}} : (index, index, index) -> ()
"""
    zero = '%zero = "arith.constant"() <{value = 0 : index}> : () -> index'
    loop = next(op for op in functions(module(f"{zero}\n{body}", {}))[0].ops if op.name == "scf.for")
    assert loop.attributes == {"hivm.loop_core_type": "#hivm.tcore_type<CUBE>", "pipeline.veconly": ""}
    assert loop.types == (("index",) * 3, ())


def test_attributes_of_a_real_module_are_those_that_xdsl_reads() -> None:
    parser, builtin = pytest.importorskip("xdsl.parser"), pytest.importorskip("xdsl.dialects.builtin")
    context = pytest.importorskip("xdsl.context").Context(allow_unregistered=True)
    problem = front_end_problem() or (None if compilers() else "no Ascend compiler is installed")
    if problem is not None:
        pytest.skip(str(problem))
    from tests.ascend.compile_kernels import attention

    types = {**dict.fromkeys("qkvo", "*bf16"), "table": "*i32", "scale": "fp32", "n_steps": "i32"}
    text = final_module(Specialization(attention, types, {"BM": 32, "BN": 32, "D": 64}))
    context.load_dialect(builtin.Builtin)
    theirs = [
        op
        for function in parser.Parser(context, text).parse_module().body.block.ops
        for op in function.walk()
        if op is not function
    ]
    ours = [op for function in functions(text) for op in function.ops]
    assert len(ours) == len(theirs) > 100
    for our, their in zip(ours, theirs, strict=True):
        attributes = {**their.properties, **their.attributes}
        name = attributes.pop("op_name__").data if "op_name__" in attributes else their.name
        assert (our.name, len(our.operands)) == (name, len(their.operands))
        assert our.attributes == {key: _as_printed(value) for key, value in attributes.items()}
        for key, value in attributes.items():
            if type(value).__name__ in ("DenseArrayBase", "ArrayAttr"):
                assert our.numbers(key) == tuple(_numbers(value))


def _as_printed(attribute: Any) -> str:
    """MLIR's own spelling: a unit has no value, integers in brackets no type."""
    text = str(attribute)
    return "" if text == "unit" else text.replace(" : i64", "") if text.startswith("[") else text


def _numbers(attribute: Any) -> list[int]:
    if type(attribute).__name__ == "ArrayAttr":
        return [number for part in attribute.data for number in _numbers(part)]
    return [*attribute.get_values()] if hasattr(attribute, "get_values") else [attribute.value.data]
