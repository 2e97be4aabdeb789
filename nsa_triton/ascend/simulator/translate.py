"""Translate the functions of a final module into Python: one generator per core, one statement per op.

Scalar code becomes Python arithmetic, loops become loops, tile instructions become calls of the core. A core yields
where it may have to wait for another one. The translation can be read: see `Program.python`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from types import CodeType
from typing import Any

import numpy as np

from nsa_triton.ascend.hivm_module import Block, Function, Memref, Op, functions, memref
from nsa_triton.ascend.simulator import scalars
from nsa_triton.ascend.simulator.faults import UnknownInstructionError
from nsa_triton.ascend.simulator.instruction import Instruction, decoded
from nsa_triton.ascend.simulator.memory import DTYPES, row_major
from nsa_triton.ascend.simulator.tiles import check_modelled

DYNAMIC = -(1 << 63)
_WRAPPED = {"addi", "subi", "muli", "shli", "trunci"}
_INFIX = {"addi": "+", "subi": "-", "muli": "*", "andi": "&", "ori": "|", "xori": "^", "shli": "<<", "shrsi": ">>"}
_INFIX |= {"addf": "+", "subf": "-", "mulf": "*", "floordivsi": "//"}
_CALLS = {
    "divsi": "quotient", "remsi": "remainder", "ceildivsi": "ceiling", "divf": "divide", "maxsi": "max", "minsi": "min",
    "maximumf": "maximum", "minimumf": "minimum", "maxnumf": "fmax", "minnumf": "fmin",
}  # fmt: skip
_CMPI = ("==", "!=", "<", "<=", ">", ">=", "<", "<=", ">", ">=")  # from the seventh on: of unsigned numbers
_CMPF = {  # the first six are false of NaN, the others true
    1: "{0} == {1}", 2: "{0} > {1}", 3: "{0} >= {1}", 4: "{0} < {1}", 5: "{0} <= {1}", 6: "({0} < {1} or {0} > {1})",
    8: "(not ({0} < {1} or {0} > {1}))", 9: "(not {0} <= {1})", 10: "(not {0} < {1})", 11: "(not {0} >= {1})",
    12: "(not {0} > {1})", 13: "{0} != {1}",
}  # fmt: skip
_MATH = {"sqrt": "sqrt", "exp": "exp", "exp2": "exp2", "log": "log", "log2": "log2", "absf": "absolute"}
_NO_CODE = {"mark", "set_mask_norm", "set_ffts_base_addr"}
_GLOBAL = ("load", "store", "nd2nz", "fixpipe")  # instructions that may use the memory that all cores share


@dataclass(frozen=True)
class CoreCode:
    """The program of one kind of core. `timed` is the same with scalar work counted and turns taken at the memory."""

    name: str
    role: str  # AIC or AIV
    types: tuple[str, ...]  # of the arguments
    python: str
    instructions: tuple[Instruction, ...]
    run: Callable[..., Iterator[Any]]
    timed: Callable[..., Iterator[Any]]


@dataclass(frozen=True)
class Program:
    """A final module, ready to run: the code of its cores, and the bytes of workspace that a block needs."""

    cores: tuple[CoreCode, ...]
    workspace: int

    @property
    def python(self) -> str:
        return "\n\n".join(core.python for core in self.cores)

    @property
    def is_mixed(self) -> bool:
        return len(self.cores) > 1

    @property
    def uses_cube(self) -> bool:
        return any(core.role == "AIC" for core in self.cores)


def translate(text: str) -> Program:
    """`text` is a module in generic form, as `final_module` returns it."""
    cores, workspace = [], 0
    for function in functions(text):
        if function.name.endswith("infer_workspace_shape_function"):
            workspace = next((value for op in function.ops if (value := op.integer()) is not None), 0)
        elif "_infer_" not in function.name or not function.name.endswith("_function"):
            cores.append(_core(function))
    return Program(tuple(cores), workspace)


def _core(function: Function) -> CoreCode:
    plain, timed = _Writer(timed=False), _Writer(timed=True)
    python = plain.function(function)
    return CoreCode(
        name=function.name,
        role="AIC" if function.name.endswith("_mix_aic") or _uses_l1(function) else "AIV",
        types=tuple(type_ for _, type_ in function.body.arguments),
        python=python,
        instructions=tuple(plain.instructions),
        run=_compiled(python, plain),
        timed=_compiled(timed.function(function), timed),
    )


def _uses_l1(function: Function) -> bool:
    """Whether a kernel without vector work runs on the cube core alone."""
    return any(op.short == "mmadL1" for op in function.ops)


def _compiled(python: str, writer: _Writer) -> Callable[..., Iterator[Any]]:
    scope: dict[str, Any] = {**vars(scalars), "I": writer.instructions, "K": writer.constants}
    code: CodeType = compile(python, "<program of a core>", "exec")
    exec(code, scope)  # our own translation, from ops that were checked one by one
    made: Callable[..., Iterator[Any]] = scope["program"]
    return made


@dataclass
class _Writer:
    """Writes the Python of one function, and collects its instructions and floating-point constants."""

    timed: bool
    lines: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    depth: int = 1
    scalar_work: int = 0

    def function(self, function: Function) -> str:
        arguments = [self._define(name) for name, _ in function.body.arguments]
        self._block(function.body)
        head = f"def program({', '.join(('core', *arguments))}):"
        # The last line makes it a generator even where nothing waits.
        return "\n".join((head, *self.lines, "    return", "    yield", ""))

    def _define(self, value: str) -> str:
        name = self.names[value] = "a" + value[4:] if value.startswith("%arg") else "v" + value[1:].replace("#", "_")
        return name

    def _use(self, value: str) -> str:
        return self.names[value]

    def _results(self, op: Op) -> list[str]:
        """Python names of the results; several results of one op are %5#0, %5#1, ..."""
        base = op.results[0].partition(":")[0] if op.results else ""
        count = len(op.types[1])
        values = [base] if count == 1 else [f"{base}#{i}" for i in range(count)]
        return [self._define(value) for value in values] if op.results else []

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def _flush(self) -> None:
        """Tell the clock how much scalar work came since the last instruction."""
        if self.timed and self.scalar_work:
            self._line(f"core.scalar({self.scalar_work})")
        self.scalar_work = 0

    def _instruction(self, op: Op) -> int:
        self.instructions.append(decoded(op, len(self.instructions)))
        return len(self.instructions) - 1

    def _block(self, block: Block, yields_to: list[str] | None = None) -> None:
        """The ops of a region; its yield assigns to `yields_to`."""
        written = len(self.lines)
        for op in block.ops:
            if op.name == "scf.yield":
                if yields_to:
                    self._line(f"{', '.join(yields_to)} = {', '.join(map(self._use, op.operands))}")
            else:
                self._op(op)
        self._flush()
        if len(self.lines) == written:
            self._line("pass")

    def _op(self, op: Op) -> None:
        dialect = op.name.partition(".")[0]
        if op.short in _NO_CODE or op.name == "func.return":
            return
        writers = {
            "arith": self._arith,
            "math": self._arith,
            "memref": self._memref,
            "scf": self._scf,
            "hivm": self._hivm,
        }
        if dialect not in writers:
            raise UnknownInstructionError(f"{op.name} at {op.source}: the simulator does not model this op")
        writers[dialect](op)

    # ---- scalar code ----

    def _arith(self, op: Op) -> None:
        if op.short == "constant":
            self.names[op.results[0]] = self._constant(op)
            return
        self.scalar_work += 1
        ins, (kind,) = [self._use(operand) for operand in op.operands], op.types[1]
        self._line(f"{self._define(op.results[0])} = {self._expression(op, ins, kind)}")

    def _expression(self, op: Op, ins: list[str], kind: str) -> str:
        short, source = op.short, op.types[0][0]
        if op.name.startswith("math.") and short in _MATH:
            return f"to_{kind}({_MATH[short]}({ins[0]}))"
        if short == "select":
            return f"{ins[1]} if {ins[0]} else {ins[2]}"
        if short == "cmpi":
            predicate = int(op.attributes["predicate"].partition(" ")[0])
            a, b = (f"unsigned({v}, {_width(source)})" for v in ins) if predicate > 5 else ins
            return f"int({a} {_CMPI[predicate]} {b})"
        if short == "cmpf":
            predicate = int(op.attributes["predicate"].partition(" ")[0])
            if predicate not in _CMPF:
                raise UnknownInstructionError(f"arith.cmpf at {op.source}: predicate {predicate} is not modelled")
            return f"int({_CMPF[predicate].format(*ins)})"
        if short in ("index_cast", "trunci", "index_castui") and _width(kind) < _width(source):
            return f"wrap({ins[0]}, {_width(kind)})"
        if short in ("extui", "index_castui"):
            return f"unsigned({ins[0]}, {_width(source)})"
        value = f"-{ins[0]}" if source == "i1" else ins[0]  # of a signed number: one bit is 0 or -1
        if short in ("extsi", "index_cast"):
            return value
        if short in ("sitofp", "truncf", "extf"):
            return f"to_{kind}({value})"
        if short == "fptosi":
            return f"int({ins[0]})"
        if short == "bitcast":
            return f"bitcast({ins[0]}, {source!r}, {kind!r})"
        if short in _INFIX:
            text = f"{ins[0]} {_INFIX[short]} {ins[1]}"
        elif short in _CALLS:
            text = f"{_CALLS[short]}({', '.join(ins)})"
        else:
            raise UnknownInstructionError(f"{op.name} at {op.source}: the simulator does not model this op")
        if kind[0] == "i" and kind != "index" and short in _WRAPPED and kind != "i64":
            return f"wrap({text}, {_width(kind)})"
        return f"to_bf16({text})" if kind == "bf16" else text

    def _constant(self, op: Op) -> str:
        text, _, kind = op.attributes["value"].rpartition(" : ")
        if not text:  # value = true
            return {"true": "1", "false": "0"}[kind]
        if kind[0] == "i":
            return f"({text})" if text.startswith("-") else text
        self.constants.append(_float(text, kind))
        return f"K[{len(self.constants) - 1}]"

    # ---- views, and elements for the scalar unit ----

    def _memref(self, op: Op) -> None:
        short, ins = op.short, [self._use(operand) for operand in op.operands]
        if short in ("load", "store"):
            self._flush()
            at = self._instruction(op)
            if short == "store":
                self._line(f"core.store(I[{at}], {ins[0]}, {ins[1]}, ({', '.join([*ins[2:], ''])}))")
            else:
                self._line(
                    f"{self._define(op.results[0])} = core.load(I[{at}], {ins[0]}, ({', '.join([*ins[1:], ''])}))"
                )
            return
        self.scalar_work += 1
        if short == "extract_strided_metadata":
            rank = len(_shaped(op.types[0][0]).shape)
            self._line(f"{', '.join(self._results(op))} = metadata({ins[0]}, {rank})")
            return
        self._line(f"{self._define(op.results[0])} = {self._view(op, ins)}")

    def _view(self, op: Op, ins: list[str]) -> str:
        short, result = op.short, _shaped(op.types[1][0])
        if short == "cast":
            return ins[0]
        if short in ("reinterpret_cast", "subview"):
            rest = iter(ins[1:])
            parts = [_mixed(op.numbers(f"static_{key}"), rest) for key in ("offsets", "sizes", "strides")]
            kept = [_tuple(_kept_axes(op, result))] if short == "subview" else []
            return f"{short}({', '.join([ins[0], *parts, *kept])})"
        if short == "view":
            sizes = _mixed([DYNAMIC if size is None else size for size in result.shape], iter(ins[2:]))
            return f"view({ins[0]}, {result.element!r}, {ins[1]}, {sizes})"
        if short == "collapse_shape":
            return f"collapse_shape({ins[0]}, {_groups(op)})"
        if short == "expand_shape":
            return f"expand_shape({ins[0]}, {_groups(op)}, {_mixed(op.numbers('static_output_shape'), iter(ins[1:]))})"
        raise UnknownInstructionError(f"{op.name} at {op.source}: the simulator does not model this op")

    # ---- control flow ----

    def _scf(self, op: Op) -> None:
        if op.short == "for":
            self._for(op)
        elif op.short == "if":
            self._if(op)
        else:
            raise UnknownInstructionError(f"{op.name} at {op.source}: the simulator does not model this op")

    def _for(self, op: Op) -> None:
        self._flush()
        (induction, _), *carried = op.blocks[0].arguments
        carries = [self._define(name) for name, _ in carried]
        if carries:
            self._line(f"{', '.join(carries)} = {', '.join(self._use(initial) for initial in op.operands[3:])}")
        low, high, step = (self._use(operand) for operand in op.operands[:3])
        rounds = f"{'core.rounds' if self.timed else 'range'}({low}, {high}, {step})"
        self._line(f"for {self._define(induction)} in {rounds}:")
        self._indented(op.blocks[0], carries)
        for name, carry in zip(self._results(op), carries, strict=True):
            self._line(f"{name} = {carry}")

    def _if(self, op: Op) -> None:
        self._flush()
        results = self._results(op)
        self._line(f"if {self._use(op.operands[0])}:")
        self._indented(op.blocks[0], results)
        if len(op.blocks) > 1 and op.blocks[1].ops:
            self._line("else:")
            self._indented(op.blocks[1], results)

    def _indented(self, block: Block, yields_to: list[str]) -> None:
        self.depth += 1
        self._block(block, yields_to)
        self.depth -= 1

    # ---- instructions ----

    def _hivm(self, op: Op) -> None:
        short, ins = op.short, [self._use(operand) for operand in op.operands]
        if short == "pointer_cast":
            shaped = _shaped(op.types[1][0])
            self._line(f"{self._define(op.results[0])} = core.buffer({shaped.memory!r}, {shaped.element!r}, "
                       f"{ins[0]}, {_tuple(shaped.shape)})")  # fmt: skip
            return
        if short in ("get_block_idx", "get_sub_block_idx", "get_block_num"):
            attribute = {"get_block_idx": "block", "get_sub_block_idx": "sub_block", "get_block_num": "blocks"}[short]
            self._line(f"{self._define(op.results[0])} = core.{attribute}")
            return
        self._flush()
        at = self._instruction(op)
        instruction = self.instructions[at]
        if short in ("set_flag", "wait_flag"):
            fixed = instruction.attributes.get("static_event_id", "").removeprefix("EVENT_ID")
            self._line(f"core.{short}(I[{at}], {fixed or ins[0]})")
        elif short == "pipe_barrier":
            self._line(f"core.barrier(I[{at}])")
        elif short in ("sync_block_set", "sync_block_wait"):
            flag = instruction.attributes.get("static_flag_id", "").partition(" ")[0] or ins[0]
            if short == "sync_block_wait":
                self._line(f"while not core.arrived(I[{at}], {flag}): yield")
            self._line(f"core.{short}(I[{at}], {flag})")
        else:
            check_modelled(instruction)
            if self.timed and short in _GLOBAL:
                self._line(f"yield core.turn(I[{at}])")
            self._line(f"core.tile(I[{at}], ({', '.join([*ins, ''])}))")


def _width(kind: str) -> int:
    return 64 if kind == "index" else int(kind[1:])


def _shaped(text: str) -> Memref:
    found = memref(text)
    if found is None:
        raise UnknownInstructionError(f"the simulator cannot read the type {text}")
    return found


def _kept_axes(op: Op, result: Memref) -> tuple[int, ...]:
    """The axes of a subview that its result has: those of one element may go, and the type says which."""
    sizes, steps = op.numbers("static_sizes"), op.numbers("static_strides")
    source = _shaped(op.types[0][0])
    strides = source.strides or row_major([size or 0 for size in source.shape])

    def fits(kept: tuple[int, ...], *, with_strides: bool) -> bool:
        if any(sizes[axis] != 1 for axis in set(range(len(sizes))) - set(kept)):
            return False
        for axis, size, stride in zip(kept, result.shape, result.strides or [None] * len(kept), strict=True):
            own = strides[axis]
            if size is not None and sizes[axis] not in (size, DYNAMIC):
                return False
            if with_strides and own is not None and stride is not None and own * steps[axis] != stride:
                return False
        return True

    choices = list(combinations(range(len(sizes)), len(result.shape)))
    for with_strides in (True, False):
        for kept in choices:
            if fits(kept, with_strides=with_strides):
                return kept
    raise UnknownInstructionError(f"memref.subview at {op.source}: the simulator cannot tell which axes it keeps")


def _tuple(items: Any) -> str:
    return f"({', '.join([*map(str, items), ''])})"


def _mixed(static: Any, dynamic: Iterator[str]) -> str:
    """A tuple of the static numbers, the dynamic ones taken from the operands in turn."""
    return _tuple(next(dynamic) if number == DYNAMIC else number for number in static)


def _groups(op: Op) -> str:
    """reassociation = [[0, 1], [2]] as a tuple of tuples."""
    groups = re.findall(r"\[([\d, ]*)\]", op.attributes["reassociation"])
    return _tuple(_tuple(group.replace(" ", "").split(",")) for group in groups if group)


def _float(text: str, kind: str) -> Any:
    """A floating-point constant; MLIR spells what decimals cannot say as the bits in hexadecimal."""
    if text.startswith("0x"):
        bits = int(text, 16)
        if kind == "bf16":
            return np.float32(struct.unpack("<f", struct.pack("<I", bits << 16))[0])
        return np.array([bits], np.uint32 if kind == "f32" else np.uint16).view(DTYPES[kind])[0]
    return scalars.to_bf16(np.float32(text)) if kind == "bf16" else DTYPES.get(kind, np.float64)(text)
