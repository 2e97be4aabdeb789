"""Linalg as triton-ascend makes it -> MLIR's LLVM dialect, through passes of ascendnpu-ir alone (no C compiler).

Two runs of bishengir-opt with edits of the text around them: the edits hand matmuls, transposes and copies, which the
stock lowering turns into slow scalar loops or library calls, to the loops of host_tiles.py.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nsa_triton.ascend.host_runtime import LIBM
from nsa_triton.ascend.host_tiles import Tiles, VectorUnit
from nsa_triton.ascend.lower import Lowered
from nsa_triton.ascend.toolchain import compiler
from nsa_triton.ascend.tools import run_tool
from nsa_triton.errors import CompileError

# No common subexpressions before bufferization: two operations that share one tensor.empty get one buffer and a copy.
TO_BUFFERS = (
    "--execution-engine-convert-hfusion-to-upstream",
    "--loop-invariant-code-motion",
    "--convert-elementwise-to-linalg",
    "--linalg-fuse-elementwise-ops",
    "--eliminate-empty-tensors",
    "--empty-tensor-to-alloc-tensor",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true",
    "--canonicalize",
    "--cse",
    "--buffer-deallocation-pipeline",
    "--allow-unregistered-dialect",
)
TO_LLVM = (
    "--convert-linalg-to-loops",
    "--convert-scf-to-cf",
    "--expand-strided-metadata",
    "--lower-affine",
    "--arith-emulate-unsupported-floats=source-types=bf16 target-type=f32",
    "--math-legalize-to-f32",
    "--arith-expand=include-bf16=true",
    "--convert-vector-to-llvm",
    "--convert-math-to-llvm",
    "--convert-math-to-libm",
    "--finalize-memref-to-llvm",
    "--convert-func-to-llvm",
    "--convert-cf-to-llvm",
    "--convert-arith-to-llvm",
    "--convert-index-to-llvm",
    "--reconcile-unrealized-casts",
    "--allow-unregistered-dialect",
)

_RESULT_MATMUL = re.compile(
    r"^(?P<indent> *)(?P<result>%\S+) = linalg\.matmul (?:\{[^}\n]*\} )?"
    r"ins\((?P<a>%\S+), (?P<b>%\S+) : tensor<(?P<ta>\S+)>, tensor<(?P<tb>\S+)>\) "
    r"outs\((?P<c>%\S+) : tensor<(?P<tc>\S+xf32)>\)",
    re.MULTILINE,
)
_BROADCAST = re.compile(
    r"linalg\.broadcast ins\((?P<input>%\S+) : tensor<(?P<tin>\S+)>\) "
    r"outs\((?P<out>%\S+) : tensor<(?P<tout>\S+)>\) dimensions = \[(?P<dims>[\d, ]*)\]"
)
_REDUCE_SUM = re.compile(r"(%\S+ = arith\.addf %in, %init) (: \w+)")
_EXTERNAL = re.compile(r"func\.func private @(\w+)\(.*[^{\s]\s*$", re.MULTILINE)
_LIBDEVICE = re.compile(rf"@__hmf_((?:{'|'.join(LIBM)})f)\b")
_COPY = re.compile(r"memref\.copy (%\S+), (%\S+) : (.+?) to (memref<.+>)$", re.MULTILINE)
_MATMUL = re.compile(
    r"linalg\.matmul ins\((%\S+), (%\S+) : (memref<.+?>), (memref<.+?>)\) outs\((%\S+) : (memref<.+>)\)$", re.MULTILINE
)
_TRANSPOSE = re.compile(
    r"linalg\.transpose ins\((%\S+) : (memref<.+?>)\) outs\((%\S+) : (memref<.+?>)\) permutation = \[1, 0\] *$",
    re.MULTILINE,
)
_ROW_REDUCTION = re.compile(
    r"linalg\.reduce ins\((%\S+) : (memref<.+?>)\) outs\((%\S+) : (memref<.+?>)\) dimensions = \[(\d)\] *\n"
    r" *\(%in: f32, %init: f32\) \{\n *(%\S+) = arith\.(\w+) %in, %init (?:fastmath<reassoc> )?: f32\n"
    r" *linalg\.yield (%\S+) : f32\n *\}"
)


def to_llvm_dialect(lowered: Lowered, unit: VectorUnit) -> str:
    """The module as text in MLIR's LLVM dialect."""
    text = _LIBDEVICE.sub(r"@\1", lowered.text)  # tl.math.tanh and its like: the NPU's library has libm's names
    _refuse_external_calls(lowered.name, text)
    buffers = _opt(lowered.name, _before_buffers(text), TO_BUFFERS)
    return _opt(lowered.name, _before_loops(buffers, unit), TO_LLVM)


def _refuse_external_calls(name: str, text: str) -> None:
    """tl.sort, tl.cumsum and their like reach Linalg as calls to functions that only the NPU has."""
    for symbol in _EXTERNAL.findall(text):
        if symbol.removesuffix("f") not in LIBM:
            operation = re.sub(r"_\d+$", "", symbol).removeprefix("triton_").removeprefix("__hmf_")
            raise CompileError(
                f"{name}: tl.{operation} has no CPU implementation; express it through other operations, "
                "or run the kernel on a device",
                text,
            )


def _before_buffers(text: str) -> str:
    """Edits while values are still tensors, where fusion can absorb what they add."""
    text = _RESULT_MATMUL.sub(_widen_operands, text)
    text = _BROADCAST.sub(_generic_broadcast, text)
    # Triton leaves the order of a sum open; without this LLVM must add one element after another.
    return _REDUCE_SUM.sub(r"\1 fastmath<reassoc> \2", text)


def _widen_operands(found: re.Match[str]) -> str:
    """bf16 and f16 operands become f32 once, not once per product."""
    lines, operands, types = [], [], []
    for side in ("a", "b"):
        value, kind = found[side], found[f"t{side}"]
        shape, _, element = kind.rpartition("x")
        if element in ("bf16", "f16"):
            wide = f"%wide_{side}_{found.start()}"
            lines.append(f"{wide} = arith.extf {value} : tensor<{kind}> to tensor<{shape}xf32>")
            value, kind = wide, f"{shape}xf32"
        operands.append(value)
        types.append(f"tensor<{kind}>")
    lines.append(
        f"{found['result']} = linalg.matmul ins({', '.join(operands)} : {', '.join(types)}) "
        f"outs({found['c']} : tensor<{found['tc']}>)"
    )
    return "\n".join(found["indent"] + line for line in lines)


def _generic_broadcast(found: re.Match[str]) -> str:
    """The fusion pass knows generic operations only, and an unfused broadcast costs a whole tile."""
    rank, element = found["tout"].count("x"), found["tout"].rpartition("x")[2]
    added = {int(dim) for dim in found["dims"].split(",") if dim.strip()}
    every = [f"d{dim}" for dim in range(rank)]
    kept = [name for dim, name in enumerate(every) if dim not in added]
    maps = ", ".join(f"affine_map<({', '.join(every)}) -> ({', '.join(names)})>" for names in (kept, every))
    kinds = ", ".join(['"parallel"'] * rank)
    return (
        f"linalg.generic {{indexing_maps = [{maps}], iterator_types = [{kinds}]}} "
        f"ins({found['input']} : tensor<{found['tin']}>) outs({found['out']} : tensor<{found['tout']}>) {{\n"
        f"^bb0(%in: {element}, %out: {element}):\n  linalg.yield %in : {element}\n}} -> tensor<{found['tout']}>"
    )


def _before_loops(text: str, unit: VectorUnit) -> str:
    """Edits once values are buffers: named operations with a fast loop nest become calls to it."""
    tiles = Tiles(unit)
    text = _COPY.sub(r"linalg.copy ins(\1 : \3) outs(\2 : \4)", text)
    text = _MATMUL.sub(
        lambda m: tiles.matmul((m[1], m[2], m[5]), (m[3], m[4], m[6])) or m[0],
        text,
    )
    text = _TRANSPOSE.sub(lambda m: tiles.transpose((m[1], m[3]), (m[2], m[4])) or m[0], text)
    text = _ROW_REDUCTION.sub(lambda m: _row_reduction(tiles, m) or m[0], text)
    # The pool of host_runtime.py aligns every block already; with this MLIR would over-allocate and align again.
    text = text.replace("memref.alloc() {alignment = 64 : i64}", "memref.alloc()")
    end = text.rindex("}")
    return text[:end] + "\n".join(tiles.functions) + text[end:]


def _row_reduction(tiles: Tiles, found: re.Match[str]) -> str | None:
    tile, tin, out, tout, dimension, result, operation, yielded = found.groups()
    if result != yielded or int(dimension) != tin.count("x") - 1:
        return None
    return tiles.row_reduction(operation, (tile, out), (tin, tout))


def _opt(name: str, text: str, passes: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory(prefix="nsa_triton_") as folder:
        source = Path(folder, "kernel.mlir")
        source.write_text(text)
        done = run_tool([str(compiler().opt), str(source), *passes])
    if done.returncode == 0:
        return done.stdout
    reason = next((line for line in done.stderr.splitlines() if "error:" in line), f"exit code {done.returncode}")
    raise CompileError(f"{name}: no native code for this host: {reason}", f"{done.stderr}\n{text}")
