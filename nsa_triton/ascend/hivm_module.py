"""Read the final HIVM module of a kernel, in MLIR's generic form: a flat list of ops that know their enclosing loops.

A scanner of lines, not a parser: in the generic form every op is one line, and a region opens and closes at the end
and the start of a line. xdsl reads the same text into a full IR, but needs 0.45 to 0.7 s for a kernel of 500 ops (this
scanner: 6 ms) and holds the interpreter lock meanwhile, so that it would take longer than the compiler itself when
hundreds of configs are compiled in parallel.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

MEMORIES = {"ub": "UB", "cbuf": "L1", "ca": "L0A", "cb": "L0B", "cc": "L0C", "gm": "GM"}

# Ops that only look at a buffer in another way: the first operand is the buffer, the others are indices and sizes.
VIEWS = frozenset(
    f"memref.{name}"
    for name in ("subview", "cast", "collapse_shape", "expand_shape", "reinterpret_cast", "view", "transpose")
)
LOOPS = frozenset({"scf.for", "scf.while", "scf.parallel", "scf.forall"})

_OP = re.compile(r'\s*(?:(%[^="]*?) = )?"([\w.]+)"\(([^()]*)\)(.*)')
_LOCATION = re.compile(r'"([^"]+)":(\d+):(\d+)')
_MEMREF = re.compile(r"memref<((?:(?:\d+|\?)x)*)(\w+)([,>].*)")
_NUMBER = re.compile(r"-?\d+")
_GENERATED = ("-", "<stdin>")  # the file that bishengir-opt names for ops that it made itself


@dataclass(frozen=True)
class Memref:
    """A memref type. Unknown sizes and strides are None; `strides` is None where the layout is row-major."""

    shape: tuple[int | None, ...]
    element: str
    memory: str
    strides: tuple[int | None, ...] | None

    @property
    def bits(self) -> int | None:
        """The bits of all elements side by side, or None where a size is known only at run time."""
        sizes = [size for size in self.shape if size is not None]
        if len(sizes) < len(self.shape):
            return None
        width = re.search(r"\d+", self.element)  # i1, bf16, f8E4M3FN; "index" has none
        return math.prod(sizes) * (int(width.group()) if width else 64)

    @property
    def bytes(self) -> int | None:
        return None if self.bits is None else -(-self.bits // 8)

    @property
    def elementwise(self) -> bool:
        """Whether neighbours along the last axis lie apart, so that a transfer moves every element by itself."""
        return bool(self.shape) and self.shape[-1] != 1 and self.strides is not None and self.strides[-1] != 1


@functools.lru_cache(maxsize=4096)
def memref(text: str) -> Memref | None:
    """The memref that a type's text spells, or None for any other type."""
    found = _MEMREF.match(text)
    if found is None:
        return None
    sizes, element, rest = found.groups()
    strided, space = re.search(r"strided<\[(.*?)\]", rest), re.search(r"address_space<(\w+)>", rest)
    return Memref(
        tuple(_number(size) for size in sizes.split("x")[:-1]),
        element,
        MEMORIES.get(space.group(1), space.group(1)) if space else "GM",
        tuple(_number(stride) for stride in strided.group(1).split(",") if stride) if strided else None,
    )


def _number(text: str) -> int | None:
    return None if text.strip() == "?" else int(text)


@dataclass(eq=False)
class Block:
    """One region of an op: all regions of these modules have one block."""

    arguments: tuple[tuple[str, str], ...] = ()  # name and type
    ops: list[Op] = field(default_factory=list)


@dataclass(eq=False)
class Op:
    """One op. `regions` holds the ops inside it, however deep, and `blocks` those directly inside, region by region;
    `parents` are the ops that it lies in, outermost first."""

    name: str
    results: tuple[str, ...]
    operands: tuple[str, ...]
    tail: str  # attributes, types and location of an op without regions
    parents: tuple[Op, ...]
    regions: list[Op] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    closing: str = ""  # the same for an op with regions

    @property
    def short(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def loops(self) -> tuple[Op, ...]:
        return tuple(op for op in self.parents if op.name in LOOPS)

    @functools.cached_property
    def types(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The types of the operands and of the results, as text."""
        # "->" would count as a closing bracket; no attribute value is followed by " : (".
        signature = (self.closing or self.tail).rpartition(" : (")[2].replace("->", "\u2192")
        inside, _, outside = signature.rpartition(") \u2192 ")
        outside = outside.rpartition(" loc(")[0] or outside
        return _split(inside), _split(outside.removeprefix("(").removesuffix(")"))

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """Name and value of all attributes, as text; an attribute without a value has ""."""
        found: dict[str, str] = {}
        for group in (*_braced(self.tail), *_braced(self.closing.removeprefix("})"))):
            for part in _split(group.replace("->", "\u2192")):
                name, _, value = part.partition(" = ")
                found[name.strip('"')] = value
        return found

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The elements of an array attribute, however nested."""
        text = self.attributes.get(attribute, "").removeprefix("array<")  # array<i64: 1, 2>, array<i64>, [[0, 1], [2]]
        elements = text if text.startswith("[") else text.partition(":")[2]
        return tuple(int(number) for number in _NUMBER.findall(elements))

    @property
    def location(self) -> tuple[str, int, int] | None:
        """File, line and column in the kernel's source: the innermost place that is not a function of Triton's own."""
        places = _LOCATION.findall((self.closing or self.tail).rpartition(" loc(")[2])
        return source_place(places)

    @property
    def source(self) -> str:
        return source_text(self.location)

    def integer(self) -> int | None:
        """The value of an integer constant."""
        found = re.search(r"value = (-?\d+|true|false)\b", self.tail) if self.name == "arith.constant" else None
        return None if found is None else int({"true": "1", "false": "0"}.get(found.group(1), found.group(1)))


def source_place(places: list[tuple[str, str, str]]) -> tuple[str, int, int] | None:
    for file, line, column in places:
        if file not in _GENERATED and not {"triton", "language"} <= set(PurePath(file).parts):
            return file, int(line), int(column)
    return None


def source_text(place: tuple[str, int, int] | None) -> str:
    """`folder/file.py:line`: no more of the path, so that reports of two machines can be compared."""
    return "" if place is None else f"{'/'.join(PurePath(place[0]).parts[-2:])}:{place[1]}"


def location_in(text: str) -> str:
    """The source line in a message of the compiler, which begins with `loc(...):`; "" where it names none."""
    return source_text(source_place(_LOCATION.findall(text)))


def _braced(text: str) -> Iterator[str]:
    """The contents of the outermost braces before the colon that begins the types."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        if letter == "{":
            start = i + 1 if depth == 0 else start
            depth += 1
        elif letter == "}":
            depth -= 1
            if depth == 0:
                yield text[start:i]
        elif letter == ":" and depth == 0:
            return


def _split(text: str) -> tuple[str, ...]:
    """Split at the commas that are outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "<([{":
            depth += 1
        elif letter in ">)]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return (*parts, last) if last else tuple(parts)


@dataclass(frozen=True)
class Function:
    """A function of the module: its ops in order, and which of them defines each value."""

    name: str
    ops: tuple[Op, ...]
    definitions: dict[str, Op]
    op: Op

    @property
    def body(self) -> Block:
        return self.op.blocks[0]

    def definition(self, value: str) -> Op | None:
        return self.definitions.get(value.partition("#")[0])

    def constant(self, value: str) -> int | None:
        op = self.definition(value)
        return None if op is None else op.integer()

    def views(self, value: str) -> Iterator[Op]:
        """The chain of views from `value` down to, but without, the op that makes the buffer."""
        op = self.definition(value)
        while op is not None and op.name in VIEWS:
            yield op
            op = self.definition(op.operands[0])

    def buffer(self, value: str) -> str:
        """The value that `value` is a view of."""
        for view in self.views(value):
            value = view.operands[0]
        return value

    def static_bytes(self, value: str, type_: str) -> int | None:
        """Bytes of a view, or where its size is known at run time only, of the smallest static tile it is cut from."""
        for text in (type_, *(view.types[0][0] for view in self.views(value))):
            shaped = memref(text)
            if shaped is not None and shaped.bytes is not None:
                return shaped.bytes
        return None

    def trips(self, op: Op) -> int:
        """How often `op` runs, as far as loop bounds are static; a loop with other bounds counts once."""
        total = 1
        for loop in op.loops:
            bounds = [self.constant(value) for value in loop.operands[:3]] if loop.name == "scf.for" else [None]
            if None not in bounds:
                low, high, step = (bound or 0 for bound in bounds)
                total *= max(0, -(-(high - low) // step)) if step else 1
        return total


def functions(text: str) -> list[Function]:
    """Read a module in the generic form, printed with local locations (`--mlir-print-local-scope`)."""
    found: list[Function] = []
    stack: list[Op] = []
    ops: list[Op] = []
    for line in text.splitlines():
        stripped = line.lstrip()
        if stripped.startswith("})") and stack:
            closed = stack.pop()
            closed.closing = stripped
            if closed.name == "func.func":
                found.append(_function(closed, ops))
                ops = []
            continue
        if stripped.startswith("}, {") and stack:
            stack[-1].blocks.append(Block())
            continue
        if stripped.startswith("^") and stack:
            stack[-1].blocks[-1].arguments = tuple(_block_arguments(stripped))
            continue
        match = _OP.match(line)
        if match is None:
            continue
        results, name, operands, tail = match.groups()
        op = Op(
            name,
            tuple(result.partition(":")[0].strip() for result in (results or "").split(",") if result),
            tuple(operand.strip() for operand in operands.split(",") if operand),
            tail,
            tuple(stack),
        )
        for parent in stack:
            parent.regions.append(op)
        if stack:
            stack[-1].blocks[-1].ops.append(op)
        ops.append(op)
        if line.endswith("({"):
            op.blocks.append(Block())
            stack.append(op)
    return found


def _block_arguments(header: str) -> Iterator[tuple[str, str]]:
    """Name and type of the arguments in a block's header, `^bb0(%arg0: i32 loc(...), ...):`."""
    for argument in _split(header.partition("(")[2].rpartition(")")[0]):
        name, _, type_ = argument.partition(": ")
        yield name, type_.partition(" loc(")[0]


def _function(op: Op, ops: list[Op]) -> Function:
    name = re.search(r'sym_name = "([^"]+)"', op.tail)
    inside = tuple(o for o in ops if op in o.parents)
    return Function(name.group(1) if name else "", inside, {result: o for o in inside for result in o.results}, op)
