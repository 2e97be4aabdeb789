"""Kernels as machine code of this host: Linalg -> LLVM IR -> object code, cached in memory and on disk."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from nsa_triton.ascend import elf, host_passes, host_runtime, host_tiles, lower, object_cache
from nsa_triton.ascend.lower import Specialization
from nsa_triton.ascend.toolchain import compiler
from nsa_triton.errors import CompileError

_log = logging.getLogger("nsa_triton")

_SLOTS = {"i32": "i4x", "i64": "q", "fp32": "f4x"}  # an argument takes eight bytes


class NativeKernel:
    """A compiled kernel. `seconds` is what it took to get it, `from_cache` whether it came from the disk cache."""

    def __init__(self, spec: Specialization, code: bytes, seconds: float, from_cache: bool) -> None:
        self.name, self.seconds, self.from_cache = spec.name, seconds, from_cache
        self._engine = _load(code)  # owns the machine code
        address = self._engine.get_function_address(host_runtime.ENTRY)
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
        self._entry = prototype(address)  # a foreign call through it releases the GIL
        self._packed = struct.Struct("=" + "".join(_SLOTS.get(kind, "Q") for kind in spec.signature.values()))

    def run(self, programs: int, values: Sequence[Tensor | int | float], threads: int) -> None:
        """Run all programs; `values` are the arguments in the order of the signature. Returns when all are done."""
        packed = self._packed.pack(*[v.data_ptr() if isinstance(v, Tensor) else v for v in values])
        # Helpers hold all that they use, should an interrupt take this thread away from here.
        work = (packed, programs, ctypes.c_int32(0), values)
        helpers = [_threads().submit(self._work, *work) for _ in range(min(threads, programs) - 1)]
        self._work(*work)
        for helper in helpers:
            # One that has not started would find nothing left to do.
            if not helper.cancel():
                helper.result()

    def _work(self, packed: bytes, programs: int, counter: ctypes.c_int32, values: Sequence[object]) -> None:
        """Run programs until the shared counter is used up; `values` only have to stay alive meanwhile."""
        try:
            pool = _pools.pop()
        except IndexError:
            pool = ctypes.create_string_buffer(host_runtime.POOL_BYTES)
        self._entry(packed, programs, ctypes.addressof(counter), ctypes.addressof(pool))
        _pools.append(pool)


_pools: list[Any] = []  # tiles of earlier launches, kept for the next ones; list operations are atomic
_kernels: dict[str, NativeKernel] = {}
_compiling = threading.Lock()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="nsa_triton")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # the threads of the parent do not exist in the child


def native_kernel(spec: Specialization) -> NativeKernel:
    """Machine code for `spec`: from memory, from disk, or compiled now (once, whichever thread comes first)."""
    key = spec.key()
    kernel = _kernels.get(key)
    if kernel is None:
        with _compiling:
            kernel = _kernels.get(key)
            if kernel is None:
                kernel = _kernels[key] = _from_disk(spec, key) or _compiled(spec, key)
    return kernel


def _from_disk(spec: Specialization, key: str) -> NativeKernel | None:
    start = time.perf_counter()
    code = object_cache.load(_disk_key(key))
    if code is None:
        return None
    return NativeKernel(spec, code, time.perf_counter() - start, from_cache=True)


def _compiled(spec: Specialization, key: str) -> NativeKernel:
    start = time.perf_counter()
    code = compile_object(spec)
    object_cache.store(_disk_key(key), code)
    kernel = NativeKernel(spec, code, time.perf_counter() - start, from_cache=False)
    _log.info("compiled %s for this host in %.2f s", spec.name, kernel.seconds)
    return kernel


def compile_object(spec: Specialization) -> bytes:
    """Lower and compile `spec`, past all caches."""
    for argument, kind in spec.signature.items():
        if not kind.startswith("*") and kind not in _SLOTS:
            raise CompileError(f"{spec.name}: argument {argument}: no native code for a scalar of type {kind}")
    lowered = lower.lower(spec)
    triple, _, features = _host()
    dialect = host_passes.to_llvm_dialect(lowered, host_tiles.VectorUnit.of(triple, features))
    text = host_runtime.complete(_llvm_ir(spec.name, dialect), spec.name, list(spec.signature.values()))
    return _object_code(spec.name, text)


def _llvm_ir(name: str, dialect: str) -> str:
    """MLIR's LLVM dialect -> LLVM IR, by the libraries inside triton-ascend."""
    from triton._C.libtriton import ir, llvm

    llvm.init_targets()
    context = ir.context()
    ir.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".mlir", prefix="nsa_triton_") as file:
        file.write(dialect)
        file.flush()
        try:
            return str(llvm.to_module(ir.parse_mlir_module(file.name, context), llvm.context()))
        except RuntimeError as error:
            raise CompileError(
                f"{name}: operations are left that have no CPU implementation: {error}", dialect
            ) from error


def _object_code(name: str, text: str) -> bytes:
    import llvmlite.binding as llvm

    machine = _machine()
    try:
        module = llvm.parse_assembly(text)
        module.triple, module.data_layout = machine.triple, str(machine.target_data)
        module.verify()
    except RuntimeError as error:
        raise CompileError(f"{name}: LLVM rejected the module: {error}", text) from error
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    options.loop_unrolling = False  # vectorised loops over tiles gain nothing from it, and compile twice as long
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    code = bytes(machine.emit_object(module))
    missing = elf.undefined_symbols(code) - _symbols()
    if missing:
        raise CompileError(f"{name}: {', '.join(sorted(missing))} has no CPU implementation", text)
    return code


def _load(code: bytes) -> Any:
    import llvmlite.binding as llvm

    _symbols()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


@functools.cache
def _symbols() -> frozenset[str]:
    """Make the C library known to the JIT, which does not search the process by itself; the names that were found."""
    import llvmlite.binding as llvm

    libraries = [ctypes.CDLL(None)]
    for file in ("libm.so.6", "libgcc_s.so.1"):  # where a process does not hold their symbols by itself
        with contextlib.suppress(OSError):
            libraries.append(ctypes.CDLL(file))
    found = set()
    for name in host_runtime.SYMBOLS:
        for library in libraries:
            function = getattr(library, name, None)
            if function is not None:
                llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
                found.add(name)
                break
    return frozenset(found)


@functools.cache
def _host() -> tuple[str, str, str]:
    """Triple, CPU and features of this machine."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _machine() -> Any:
    import llvmlite.binding as llvm

    triple, cpu, features = _host()
    return llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


def _disk_key(key: str) -> str:
    return hashlib.sha256(f"{key} {_toolchain()}".encode()).hexdigest()


@functools.cache
def _toolchain() -> str:
    """All that decides the machine code besides the kernel: versions, this host, and the source of this compiler."""
    modules = (elf, host_passes, host_runtime, host_tiles, lower, sys.modules[__name__])
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    versions = [importlib.metadata.version(name) for name in ("triton-ascend", "llvmlite")]
    return repr((versions, compiler().version, _host(), hashlib.sha256(sources).hexdigest()))
