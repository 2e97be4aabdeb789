"""Run the Ascend compiler on a lowered kernel, on any machine, up to the final HIVM module or, with CANN, to an object.

bishengir-compile plans all on-chip memories and makes the final HIVM module; then it hands that module to a program
called `hivmc`, which turns it into machine code and ships with CANN only. Here `hivmc` is a stand-in that keeps a copy
of the module and, where the machine has a real one, calls it.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nsa_triton.ascend.toolchain import Compiler, hivmc
from nsa_triton.ascend.tools import run_tool
from nsa_triton.errors import ArgumentValueError, ToolchainError

_BOOL = (True, False)
_COUNT = "an int of at least 1"

# Options of triton-ascend 3.2.0 that reach bishengir-compile: the flag and its values. The value None stands for "do
# not pass the flag", as in triton-ascend.
OPTIONS: Mapping[str, tuple[str, tuple[bool | str, ...] | str]] = MappingProxyType(
    {
        "multibuffer": ("enable-auto-multi-buffer", _BOOL),
        "enable_auto_bind_sub_block": ("enable-auto-bind-sub-block", _BOOL),
        "enable_hivm_auto_cv_balance": ("enable-hivm-auto-cv-balance", _BOOL),
        "sync_solver": ("enable-hivm-graph-sync-solver", _BOOL),
        "unit_flag": ("enable-hivm-unit-flag-sync", _BOOL),
        "inject_barrier_all": ("enable-hivm-inject-barrier-all-sync", _BOOL),
        "inject_block_all": ("enable-hivm-inject-block-all-sync", _BOOL),
        "limit_auto_multi_buffer_only_for_local_buffer": ("limit-auto-multi-buffer-only-for-local-buffer", _BOOL),
        "limit_auto_multi_buffer_of_local_buffer": ("limit-auto-multi-buffer-of-local-buffer", ("no-limit", "no-l0c")),
        "set_workspace_multibuffer": ("set-workspace-multibuffer", _COUNT),
        "tile_mix_vector_loop": ("tile-mix-vector-loop", _COUNT),
        "tile_mix_cube_loop": ("tile-mix-cube-loop", _COUNT),
        "disable_auto_inject_block_sync": ("disable-auto-inject-block-sync", _BOOL),
    }
)
DEFAULTS: Mapping[str, Any] = MappingProxyType({"multibuffer": True, "enable_auto_bind_sub_block": True})
_ALWAYS = ("--enable-hfusion-compile=true", "--enable-hivm-compile=true", "--enable-triton-kernel-compile=true")

# ascendnpu-ir 1.2.0 replaces the structured ops by calls of device templates in this pass, its last one; what goes into
# it is printed to stderr. 1.0.0 leaves that step to hivmc, and has no such option.
_LAST_PASS = "convert-hivm-to-std"
_PRINT_FLAG = "mlir-print-ir-before"
_DUMP = re.compile(
    rf"^// -----// IR Dump Before \w+ \({_LAST_PASS}\)[^\n]*\n"  # header
    r"(.*?^\}[^\n]*\n(?:#[^\n]*\n)*)",  # the module ends at the first bracket in column 0; its locations follow
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Outcome:
    """What a run of bishengir-compile left behind; `module` is the final module as it printed it, "" without one."""

    module: str
    log: str
    object_code: bytes | None
    seconds: float
    failed: bool
    signal: int = 0


def compile_flags(chip: str, compiler: Compiler, options: Mapping[str, Any]) -> list[str]:
    """The flags for bishengir-compile that triton-ascend 3.2.0 makes of a chip and of launch options."""
    known = _known_flags(compiler)
    found = [f"--target={chip}"]
    for name, value in {**DEFAULTS, **options}.items():
        flag = _checked_flag(name, value)
        if value is None:
            continue
        if flag not in known:
            expected = f"None, because ascendnpu-ir {compiler.version} has no --{flag}"
            raise ArgumentValueError(f"options[{name!r}]", expected, repr(value))
        found.append(f"--{flag}={value}")
    return [*found, *_ALWAYS]


def _checked_flag(name: str, value: object) -> str:
    if name not in OPTIONS:
        raise ArgumentValueError("options", f"names among {', '.join(sorted(OPTIONS))}", repr(name))
    flag, values = OPTIONS[name]
    if value is None:
        return flag
    if isinstance(values, str):
        allowed, expected = type(value) is int and value >= 1, values
    else:
        allowed = any(type(value) is type(one) and value == one for one in values)
        expected = f"one of {', '.join(map(repr, values))}"
    if not allowed:
        raise ArgumentValueError(f"options[{name!r}]", expected, repr(value))
    return flag


@functools.lru_cache(maxsize=8)
def _known_flags(compiler: Compiler) -> frozenset[str]:
    shown = run_tool([str(compiler.compile), "--help-hidden"])
    flags = re.findall(r"^\s+--([\w-]+)", shown.stdout, re.MULTILINE)
    if not flags:
        raise ToolchainError(f"{compiler.compile} shows no help: {shown.stderr.strip() or 'it says nothing'}")
    return frozenset(flags)


def bishengir_compile(linalg: str, compiler: Compiler, flags: Sequence[str]) -> Outcome:
    """Compile a Linalg module; `flags` come from `compile_flags`."""
    real = hivmc()
    with tempfile.TemporaryDirectory(prefix="nsa_triton.") as name:
        folder = Path(name)
        source, final = folder / "kernel.mlir", folder / "final.mlir"
        source.write_text(linalg)
        _write_hivmc(folder / "hivmc", final, real)
        path = os.pathsep.join((name, str(compiler.bin), os.environ.get("PATH", "")))
        command = [str(compiler.compile), str(source), *flags, *_debug_flags(compiler), "-o", str(folder / "kernel")]
        began = time.perf_counter()
        run = run_tool(command, env={**os.environ, "PATH": path, "TMPDIR": name})
        seconds = time.perf_counter() - began
        objects = [path.read_bytes() for path in (folder / "kernel.o", folder / "kernel_reloc.o") if path.exists()]
        return Outcome(
            module=_structured_module(run.stderr, final.read_text(), compiler) if final.exists() else "",
            log=_DUMP.sub("", run.stderr) + run.stdout,
            object_code=objects[0] if objects else None,
            seconds=seconds,
            # 1.0.0 ends with status 0 also where hivmc failed.
            failed=run.returncode != 0 or (real is not None and not objects),
            signal=max(0, -run.returncode),
        )


def _debug_flags(compiler: Compiler) -> list[str]:
    if _PRINT_FLAG in _known_flags(compiler):
        return ["--mlir-disable-threading", f"--{_PRINT_FLAG}={_LAST_PASS}", "--mlir-print-debuginfo"]
    # Without this the module that 1.0.0 writes for hivmc has no locations. It changes no address and no instruction.
    return ["--enable-debug-info=true"]


def _structured_module(printed: str, handed_over: str, compiler: Compiler) -> str:
    if _PRINT_FLAG not in _known_flags(compiler):
        return handed_over
    dumps: list[str] = _DUMP.findall(printed)
    if not dumps:
        raise ToolchainError(f"ascendnpu-ir {compiler.version} printed no module before its pass {_LAST_PASS}")
    return dumps[-1]


def _write_hivmc(path: Path, final: Path, real: Path | None) -> None:
    """A `hivmc` that keeps its input and calls the real one, or else claims success."""
    call = "" if real is None else f'exec {shlex.quote(str(real))} "$@"'
    version = call or "echo 'hivmc version 0.1.0'"
    keep = f'cp "$1" {shlex.quote(str(final))}'
    path.write_text(f'#!/bin/sh\ncase "$*" in *--version*) {version};; *) {keep}; {call};; esac\n')
    path.chmod(0o755)


def generic_form(module: str, compiler: Compiler, *, optimized: bool = False) -> str:
    """`module` with affine ops lowered, in MLIR's generic syntax, the location of every op in the op's own line.

    `optimized`: with the scalar code that is left when the back end (LLVM) has removed what is computed twice or could
    be computed outside of a loop.
    """
    passes = ["--lower-affine", "--canonicalize", *(["--cse", "--loop-invariant-code-motion"] if optimized else [])]
    syntax = ["--mlir-print-op-generic", "--mlir-print-debuginfo", "--mlir-print-local-scope"]
    run = run_tool([str(compiler.opt), "-", *passes, *syntax], input=module)
    if run.returncode != 0:
        raise ToolchainError(f"bishengir-opt {compiler.version} cannot read its own compiler's module: {run.stderr}")
    return run.stdout
