"""Lower a Triton kernel to Linalg exactly as triton-ascend does it for an NPU; no NPU is needed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nsa_triton.ascend.toolchain import front_end_problem, require
from nsa_triton.ascend.tools import once_more
from nsa_triton.errors import ArgumentTypeError, CompileError

ARCH = "Ascend910B2"  # the front end makes the same module for every A2/A3 chip
# The front end reads a switch from the environment while it lowers, and its contexts are not made for several threads.
_LOWERING = threading.Lock()


@dataclass(frozen=True)
class Specialization:
    """One kernel made concrete: the types of its run-time arguments and the values of its constexprs."""

    kernel: Any  # triton.runtime.JITFunction
    signature: Mapping[str, str]  # {argument: "*bf16" | "i32" | "fp32" ...}, in the kernel's order
    constexprs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def key(self) -> str:
        """A hash of all that decides the lowered module besides the toolchain: source with callees, types, values."""
        text = repr((self.kernel.cache_key, list(self.signature.items()), sorted(self.constexprs.items())))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Lowered:
    """A Linalg module. `mix_mode` says which cores run it: aiv (vector), aic (cube) or mix (both)."""

    text: str
    name: str
    mix_mode: str


def lower(spec: Specialization, *, line_info: bool = False) -> Lowered:
    """Lower `spec` to Linalg; `line_info` keeps the source lines of the kernel as MLIR locations."""
    require(front_end_problem())
    with _LOWERING:
        text = _linalg(spec, line_info)
    mix_mode = re.search(r'mix_mode = "(\w+)"', text)
    if mix_mode is None:
        raise CompileError(f"{spec.name}: the lowered module names no mix_mode", text)
    return Lowered(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", text), spec.name, mix_mode.group(1))


def _linalg(spec: Specialization, line_info: bool) -> str:
    from triton._C.libtriton import ir
    from triton.backends.ascend.compiler import AscendBackend, make_ttir, ttir_to_linalg
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.errors import CompilationError

    target = GPUTarget("npu", ARCH, 0)
    backend, context = AscendBackend(target), ir.context()
    options = backend.parse_options({})
    ir.load_dialects(context)
    source = ASTSource(spec.kernel, signature=dict(spec.signature), constants=dict(spec.constexprs))
    try:
        module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    except CompilationError as error:
        raise CompileError(f"{spec.name}: the Triton front end rejected the kernel: {error}", str(error)) from error
    metadata = {"hash": spec.key(), "target": target, **options.__dict__}
    try:
        with _line_info(line_info):
            ttir = make_ttir(module, metadata, options)
            return once_more("triton-adapter-opt", lambda: str(ttir_to_linalg(ttir, metadata, options, named_ops=True)))
    except subprocess.CalledProcessError as error:
        log = (error.stderr or b"").decode(errors="replace")
        died = f"triton-adapter-opt ended with status {error.returncode}"
        reason = next((line for line in log.splitlines() if "error:" in line), died)
        raise CompileError(f"{spec.name}: triton-ascend could not lower the kernel to Linalg: {reason}", log) from error


@contextmanager
def _line_info(wanted: bool) -> Iterator[None]:
    """triton-ascend reads this switch from the environment only."""
    name, before = "TRITON_DISABLE_LINE_INFO", os.environ.get("TRITON_DISABLE_LINE_INFO")
    os.environ[name] = "false" if wanted else "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


TYPE_NAMES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "i8", "uint8": "u8",
    "int16": "i16", "int32": "i32", "int64": "i64", "bool": "i1",
}  # fmt: skip


def signature_of(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The types of a launch's run-time arguments: tensors, ints (i32 if they fit, else i64) and floats (fp32)."""
    return {name: _type_of(name, value) for name, value in arguments.items()}


def _type_of(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = TYPE_NAMES.get(str(value.dtype).removeprefix("torch."))
        if dtype is None:
            raise ArgumentTypeError(name, f"a tensor of dtype {', '.join(TYPE_NAMES)}", value.dtype)
        return f"*{dtype}"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise ArgumentTypeError(name, "a tensor, an int or a float", type(value).__name__)
