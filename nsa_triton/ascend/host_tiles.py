"""Register-blocked loop nests, as MLIR text, for the operations that decide how fast a kernel is on a CPU."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd

_MEMREF = re.compile(r"memref<(\d+)x(\d+)x(\w+)(?:, strided<\[[\d?]+, 1\](?:, offset: [\d?]+)?>)?>")
_ROWS = re.compile(r"memref<(?:(\d+)x)?(\d+)xf32>")
_BITS = {"f32": 32, "i32": 32, "bf16": 16, "f16": 16, "i16": 16, "i8": 8}
# What combines two elements -> the same across the lanes of a vector, and the freedom that Triton leaves: the order.
_COMBINE = {
    "addf": ("add", "fastmath<reassoc>"),
    "maxnumf": ("maxnumf", ""),
    "minnumf": ("minnumf", ""),
}


@dataclass(frozen=True)
class VectorUnit:
    """The vector registers of a CPU: how many, and how many bytes each."""

    registers: int
    width: int

    @classmethod
    def of(cls, triple: str, features: str) -> VectorUnit:
        enabled = set(features.split(","))
        if "+avx512f" in enabled:
            return cls(32, 64)
        if "+avx" in enabled:
            return cls(16, 32)
        return cls(32, 16) if triple.startswith(("aarch64", "arm64")) else cls(16, 16)


@dataclass
class Tiles:
    """Writes one function per operation and tile type; `functions` holds their text."""

    unit: VectorUnit
    functions: list[str] = field(default_factory=list)
    _names: dict[tuple[str, ...], str] = field(default_factory=dict)

    def matmul(self, operands: tuple[str, ...], types: tuple[str, ...]) -> str | None:
        """A call that adds a @ b to c, or None where the types are not static f32 tiles with contiguous rows."""
        tiles = [_MEMREF.fullmatch(text) for text in types]
        if any(tile is None or tile[3] != "f32" for tile in tiles):
            return None
        (m, k), (_, n) = ((int(tile[1]), int(tile[2])) for tile in tiles[:2] if tile is not None)
        return self._call("matmul", operands, types, lambda name: _matmul(name, types, m, n, k, self.unit))

    def transpose(self, operands: tuple[str, ...], types: tuple[str, ...]) -> str | None:
        """A call that writes the transpose of a static tile with contiguous rows, or None where it is not one."""
        tile, out = (_MEMREF.fullmatch(text) for text in types)
        if tile is None or out is None or tile[3] not in _BITS:
            return None
        rows, columns, element = int(tile[1]), int(tile[2]), tile[3]
        return self._call("transpose", operands, types, lambda name: _transpose(name, types, rows, columns, element))

    def row_reduction(self, operation: str, operands: tuple[str, ...], types: tuple[str, ...]) -> str | None:
        """A call that combines each row of a static f32 tile into an element of a vector, or None for other types."""
        tile = _ROWS.fullmatch(types[0])
        if tile is None or operation not in _COMBINE:
            return None
        rows, columns = int(tile[1]) if tile[1] else None, int(tile[2])
        write = functools.partial(_row_reduction, operation, types, rows, columns, self.unit)
        return self._call(operation, operands, types, write)

    def _call(self, kind: str, operands: tuple[str, ...], types: tuple[str, ...], write: Callable[[str], str]) -> str:
        key = (kind, *types)
        if key not in self._names:
            self._names[key] = f"nsa_{kind}_{len(self._names)}"
            self.functions.append(write(self._names[key]))
        return f"func.call @{self._names[key]}({', '.join(operands)}) : ({', '.join(types)}) -> ()"


def _matmul(name: str, types: tuple[str, ...], m: int, n: int, k: int, unit: VectorUnit) -> str:
    """c stays in registers over the whole of k: `rows` x two vectors, one broadcast of a per row."""
    columns, rows = gcd(n, 2 * unit.width // 4), gcd(m, unit.registers // 4)
    vector, (ta, tb, tc) = f"vector<{columns}xf32>", types
    each = range(rows)
    carried = ", ".join(f"%s{r} = %c{r}" for r in each)
    kinds = ", ".join([vector] * rows)
    lines = [
        f"func.func private @{name}(%a: {ta}, %b: {tb}, %c: {tc}) {{",
        *_constants({"zero": 0, "one": 1, "m": m, "n": n, "k": k, "rows": rows, "columns": columns}),
        *(f"%r{r} = arith.constant {r} : index" for r in each),
        "scf.for %j = %zero to %n step %columns {",
        "scf.for %i = %zero to %m step %rows {",
        *(f"%i{r} = arith.addi %i, %r{r} : index" for r in each),
        *(f"%c{r} = vector.load %c[%i{r}, %j] : {tc}, {vector}" for r in each),
        f"%sum:{rows} = scf.for %l = %zero to %k step %one iter_args({carried}) -> ({kinds}) {{",
        f"%bv = vector.load %b[%l, %j] : {tb}, {vector}",
    ]
    for r in each:
        lines += [
            f"%a{r} = memref.load %a[%i{r}, %l] : {ta}",
            f"%v{r} = vector.broadcast %a{r} : f32 to {vector}",
            f"%p{r} = arith.mulf %v{r}, %bv fastmath<contract> : {vector}",
            f"%t{r} = arith.addf %p{r}, %s{r} fastmath<contract> : {vector}",
        ]
    lines += [
        f"scf.yield {', '.join(f'%t{r}' for r in each)} : {kinds}",
        "}",
        *(f"vector.store %sum#{r}, %c[%i{r}, %j] : {tc}, {vector}" for r in each),
        "}",
        "}",
        "return",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _transpose(name: str, types: tuple[str, ...], rows: int, columns: int, element: str) -> str:
    """Square blocks of 16-byte rows: interleaving row i with row i + half, log2(size) times, transposes a block."""
    bits = _BITS[element]
    size = gcd(gcd(rows, columns), 128 // bits)
    loaded, plain = f"vector<{size}x{element}>", f"vector<{size}xi{bits}>"
    tin, tout = types
    lines = [
        f"func.func private @{name}(%in: {tin}, %out: {tout}) {{",
        *_constants({"zero": 0, "rows": rows, "columns": columns, "size": size}),
        *(f"%r{r} = arith.constant {r} : index" for r in range(size)),
        "scf.for %i = %zero to %rows step %size {",
        "scf.for %j = %zero to %columns step %size {",
    ]
    for r in range(size):
        lines += [
            f"%i{r} = arith.addi %i, %r{r} : index",
            f"%j{r} = arith.addi %j, %r{r} : index",
            f"%l{r} = vector.load %in[%i{r}, %j] : {tin}, {loaded}",
            f"%v0_{r} = vector.bitcast %l{r} : {loaded} to {plain}",
        ]
    half, stage = size // 2, 0
    low = ", ".join(f"{lane}, {size + lane}" for lane in range(half))
    high = ", ".join(f"{lane}, {size + lane}" for lane in range(half, size))
    while 1 << stage < size:
        for r in range(half):
            pair = f"%v{stage}_{r}, %v{stage}_{r + half}"
            for offset, lanes in enumerate((low, high)):
                lines.append(f"%v{stage + 1}_{2 * r + offset} = vector.shuffle {pair} [{lanes}] : {plain}, {plain}")
        stage += 1
    for r in range(size):
        lines += [
            f"%o{r} = vector.bitcast %v{stage}_{r} : {plain} to {loaded}",
            f"vector.store %o{r}, %out[%j{r}, %i] : {tout}, {loaded}",
        ]
    return "\n".join([*lines, "}", "}", "return", "}"]) + "\n"


def _row_reduction(
    operation: str, types: tuple[str, ...], rows: int | None, columns: int, unit: VectorUnit, name: str
) -> str:
    """Lanes first, then across the lanes; `rows` is None for a tile of one dimension."""
    width = gcd(columns, unit.width // 4)
    vector, (tin, tout) = f"vector<{width}xf32>", types
    kind, flags = _COMBINE[operation]
    at, row = ("%i, ", "%i") if rows is not None else ("", "")
    return "\n".join(
        [
            f"func.func private @{name}(%in: {tin}, %out: {tout}) {{",
            *_constants({"zero": 0, "one": 1, "rows": rows or 1, "columns": columns, "width": width}),
            "scf.for %i = %zero to %rows step %one {",
            f"%first = vector.load %in[{at}%zero] : {tin}, {vector}",
            f"%lanes = scf.for %j = %width to %columns step %width iter_args(%s = %first) -> ({vector}) {{",
            f"%v = vector.load %in[{at}%j] : {tin}, {vector}",
            f"%t = arith.{operation} %s, %v {flags} : {vector}",
            f"scf.yield %t : {vector}",
            "}",
            f"%all = vector.reduction <{kind}>, %lanes {flags} : {vector} into f32",
            f"%old = memref.load %out[{row}] : {tout}",
            f"%new = arith.{operation} %old, %all : f32",
            f"memref.store %new, %out[{row}] : {tout}",
            "}",
            "return",
            "}",
        ]
    )


def _constants(values: dict[str, int]) -> list[str]:
    return [f"%{name} = arith.constant {value} : index" for name, value in values.items()]
