"""The LLVM IR that surrounds a lowered kernel: its entry point, its memory pool and its elementary functions."""

from __future__ import annotations

import re
from collections.abc import Sequence

ENTRY = "nsa_entry"
POOL_BYTES = 64 * 8  # one list of free blocks for each power of two

# What compiled code may call. Calls to the C library and conversions of half precision are added by LLVM itself.
LIBM = (
    *("acos", "asin", "atan", "atan2", "cbrt", "ceil", "cos", "cosh", "erf", "exp", "exp2", "expm1", "fabs", "floor"),
    *("fma", "fmod", "log", "log10", "log1p", "log2", "pow", "round", "roundeven", "rint", "sin", "sinh", "sqrt"),
    *("tan", "tanh", "trunc", "fmax", "fmin", "ldexp"),
)
SYMBOLS = (
    *("memcpy", "memmove", "memset", "bcmp", "aligned_alloc"),
    *("__extendhfsf2", "__truncsfhf2", "__truncdfhf2", "__truncdfbf2"),
    *LIBM,
    *(f"{name}f" for name in LIBM),
)

# A kernel allocates its tiles anew in every loop iteration. Freed blocks go to the list of their size and come back
# hot in the cache; the lists belong to one worker thread at a time, so nothing is locked. 64 bytes before each block
# hold its size class and keep the block aligned to a cache line.
POOL = """
declare noalias ptr @aligned_alloc(i64, i64)
declare i64 @llvm.ctlz.i64(i64, i1)
declare i64 @llvm.umax.i64(i64, i64)
declare void @llvm.trap()

define internal noalias ptr @nsa_alloc(ptr %pool, i64 %wanted) noinline nounwind {
  %bytes = call i64 @llvm.umax.i64(i64 %wanted, i64 64)
  %last = sub i64 %bytes, 1
  %zeros = call i64 @llvm.ctlz.i64(i64 %last, i1 true)
  %class = sub i64 64, %zeros
  %list = getelementptr ptr, ptr %pool, i64 %class
  %block = load ptr, ptr %list
  %none = icmp eq ptr %block, null
  br i1 %none, label %grow, label %reuse
reuse:
  %next = load ptr, ptr %block
  store ptr %next, ptr %list
  ret ptr %block
grow:
  %size = shl i64 1, %class
  %total = add i64 %size, 64
  %raw = call ptr @aligned_alloc(i64 64, i64 %total)
  %failed = icmp eq ptr %raw, null
  br i1 %failed, label %exhausted, label %ready
ready:
  store i64 %class, ptr %raw
  %fresh = getelementptr i8, ptr %raw, i64 64
  ret ptr %fresh
exhausted:
  call void @llvm.trap()
  unreachable
}

define internal void @nsa_free(ptr %pool, ptr %block) noinline nounwind {
  %header = getelementptr i8, ptr %block, i64 -64
  %class = load i64, ptr %header
  %list = getelementptr ptr, ptr %pool, i64 %class
  %next = load ptr, ptr %list
  store ptr %next, ptr %block
  store ptr %block, ptr %list
  ret void
}
"""

# LLVM rounds vectors inline, but calls this function for single numbers, and libgcc has it from version 13 on only.
_TRUNCSFBF2 = """
define bfloat @__truncsfbf2(float %x) nounwind {
  %bits = bitcast float %x to i32
  %high = lshr i32 %bits, 16
  %odd = and i32 %high, 1
  %half = add i32 %odd, 32767
  %sum = add i32 %bits, %half
  %rounded = lshr i32 %sum, 16
  %nan = fcmp uno float %x, 0.0
  %quiet = or i32 %high, 64
  %chosen = select i1 %nan, i32 %quiet, i32 %rounded
  %short = trunc i32 %chosen to i16
  %result = bitcast i16 %short to bfloat
  ret bfloat %result
}
"""

# Polynomials of the Cephes library (1 to 2 ulp): unlike calls to libm, LLVM can vectorise them. Adding 1.5 * 2^23
# rounds to the nearest integer and leaves that integer in the low bits; 2^n is applied in two halves, so that results
# reach down to the smallest denormal and up to infinity. Comparisons are ordered so that NaN passes through.
_EXP_TAIL = """
  %p1 = call float @llvm.fmuladd.f32(float %r, float 0x3F2A0D2CE0000000, float 0x3F56E879C0000000)
  %p2 = call float @llvm.fmuladd.f32(float %p1, float %r, float 0x3F81112100000000)
  %p3 = call float @llvm.fmuladd.f32(float %p2, float %r, float 0x3FA5553820000000)
  %p4 = call float @llvm.fmuladd.f32(float %p3, float %r, float 0x3FC5555540000000)
  %p5 = call float @llvm.fmuladd.f32(float %p4, float %r, float 5.000000e-01)
  %r2 = fmul float %r, %r
  %q = call float @llvm.fmuladd.f32(float %p5, float %r2, float %r)
  %y = fadd float %q, 1.000000e+00
  %bits = bitcast float %t to i32
  %n = sub i32 %bits, 1262485504
  %n1 = ashr i32 %n, 1
  %n2 = sub i32 %n, %n1
  %e1 = add i32 %n1, 127
  %e2 = add i32 %n2, 127
  %b1 = shl i32 %e1, 23
  %b2 = shl i32 %e2, 23
  %f1 = bitcast i32 %b1 to float
  %f2 = bitcast i32 %b2 to float
  %y1 = fmul float %y, %f1
  %y2 = fmul float %y1, %f2
  ret float %y2
}
"""
_EXP = (
    """
define internal float @nsa_exp(float %x) alwaysinline nounwind {
  %low = fcmp olt float %x, -1.040000e+02
  %x1 = select i1 %low, float -1.040000e+02, float %x
  %high = fcmp ogt float %x1, 8.900000e+01
  %x2 = select i1 %high, float 8.900000e+01, float %x1
  %t = call float @llvm.fmuladd.f32(float %x2, float 0x3FF7154760000000, float 0x4168000000000000)
  %nf = fsub float %t, 0x4168000000000000
  %ra = call float @llvm.fmuladd.f32(float %nf, float -6.933593750e-01, float %x2)
  %r = call float @llvm.fmuladd.f32(float %nf, float 0x3F2BD01060000000, float %ra)
"""
    + _EXP_TAIL
)
_EXP2 = (
    """
define internal float @nsa_exp2(float %x) alwaysinline nounwind {
  %low = fcmp olt float %x, -1.510000e+02
  %x1 = select i1 %low, float -1.510000e+02, float %x
  %high = fcmp ogt float %x1, 1.290000e+02
  %x2 = select i1 %high, float 1.290000e+02, float %x1
  %t = fadd float %x2, 0x4168000000000000
  %nf = fsub float %t, 0x4168000000000000
  %f = fsub float %x2, %nf
  %r = fmul float %f, 0x3FE62E4300000000
"""
    + _EXP_TAIL
)
_LOG_HEAD = """
  %tiny = fcmp olt float %x, 0x3810000000000000
  %scaled = fmul float %x, 8.388608e+06
  %xs = select i1 %tiny, float %scaled, float %x
  %bias = select i1 %tiny, i32 149, i32 126
  %bits = bitcast float %xs to i32
  %raised = lshr i32 %bits, 23
  %e0 = sub i32 %raised, %bias
  %fraction = and i32 %bits, 8388607
  %half = or i32 %fraction, 1056964608
  %m0 = bitcast i32 %half to float
  %small = fcmp olt float %m0, 0x3FE6A09E60000000
  %borrow = zext i1 %small to i32
  %e1 = sub i32 %e0, %borrow
  %e = sitofp i32 %e1 to float
  %twice = select i1 %small, float %m0, float 0.000000e+00
  %m1 = fsub float %m0, 1.000000e+00
  %m = fadd float %m1, %twice
  %z = fmul float %m, %m
  %p1 = call float @llvm.fmuladd.f32(float %m, float 0x3FB2043760000000, float 0xBFBD7A3700000000)
  %p2 = call float @llvm.fmuladd.f32(float %p1, float %m, float 0x3FBDE4A340000000)
  %p3 = call float @llvm.fmuladd.f32(float %p2, float %m, float 0xBFBFCBA9E0000000)
  %p4 = call float @llvm.fmuladd.f32(float %p3, float %m, float 0x3FC23D37E0000000)
  %p5 = call float @llvm.fmuladd.f32(float %p4, float %m, float 0xBFC555CA00000000)
  %p6 = call float @llvm.fmuladd.f32(float %p5, float %m, float 0x3FC999D580000000)
  %p7 = call float @llvm.fmuladd.f32(float %p6, float %m, float 0xBFCFFFFF80000000)
  %p8 = call float @llvm.fmuladd.f32(float %p7, float %m, float 0x3FD5555540000000)
  %mz = fmul float %m, %z
  %y = fmul float %p8, %mz
"""
_LOG_TAIL = """
  %normal = fcmp ogt float %x, 0.000000e+00
  %zero = fcmp oeq float %x, 0.000000e+00
  %special = select i1 %zero, float 0xFFF0000000000000, float 0x7FF8000000000000
  %v1 = select i1 %normal, float %v, float %special
  %infinite = fcmp oeq float %x, 0x7FF0000000000000
  %v2 = select i1 %infinite, float %x, float %v1
  ret float %v2
}
"""
_LOG = (
    "\ndefine internal float @nsa_log(float %x) alwaysinline nounwind {"
    + _LOG_HEAD
    + """
  %y1 = call float @llvm.fmuladd.f32(float %e, float 0xBF2BD01060000000, float %y)
  %y2 = call float @llvm.fmuladd.f32(float %z, float -5.000000e-01, float %y1)
  %y3 = fadd float %m, %y2
  %v = call float @llvm.fmuladd.f32(float %e, float 6.933593750e-01, float %y3)
"""
    + _LOG_TAIL
)
_LOG2 = (
    "\ndefine internal float @nsa_log2(float %x) alwaysinline nounwind {"
    + _LOG_HEAD
    + """
  %y2 = call float @llvm.fmuladd.f32(float %z, float -5.000000e-01, float %y)
  %y3 = fadd float %m, %y2
  %v = call float @llvm.fmuladd.f32(float %y3, float 0x3FF7154760000000, float %e)
"""
    + _LOG_TAIL
)
_FUNCTIONS = {"exp": _EXP, "exp2": _EXP2, "log": _LOG, "log2": _LOG2}


def complete(text: str, name: str, signature: Sequence[str]) -> str:
    """`text` (LLVM IR of kernel `name`) with all that it needs to run; `signature` gives its argument types."""
    text = _byte_booleans(_pooled(text))
    parts = [POOL, _entry(name, signature)]
    for function, body in _FUNCTIONS.items():
        if f"@llvm.{function}.f32(" in text:
            text = _without_declaration(text, f"llvm.{function}.f32").replace(
                f"@llvm.{function}.f32(", f"@nsa_{function}("
            )
            parts.append(body)
    if " to bfloat" in text:
        parts.append(_TRUNCSFBF2)
    text = _without_declaration(text, "llvm.fmuladd.f32")
    return "\n".join([text, *parts, "declare float @llvm.fmuladd.f32(float, float, float)\n"])


def _pooled(text: str) -> str:
    """Tiles come from the pool that the workspace argument (%5 is its address) carries."""
    text = _without_declaration(_without_declaration(text, "malloc"), "free")
    text = text.replace("call ptr @malloc(", "call ptr @nsa_alloc(ptr %5, ")
    return text.replace("call void @free(", "call void @nsa_free(ptr %5, ")


def _without_declaration(text: str, function: str) -> str:
    return re.sub(rf"^declare .*@{re.escape(function)}\(.*\n", "", text, flags=re.MULTILINE)


def _byte_booleans(text: str) -> str:
    """Tiles of i1 are moved as bytes: LLVM does not vectorise loops that load or store i1."""
    text = re.sub(
        r"^  %(\d+) = load i1, ptr (%\d+), align 1$",
        r'  %"\1.byte" = load i8, ptr \2, align 1\n  %\1 = trunc i8 %"\1.byte" to i1',
        text,
        flags=re.MULTILINE,
    )
    count = iter(range(text.count("store i1 ")))

    def widened(found: re.Match[str]) -> str:
        value = f"%bool.{next(count)}"
        return f"  {value} = zext i1 {found[1]} to i8\n  store i8 {value}, ptr {found[2]}, align 1"

    return re.sub(r"^  store i1 (\S+), ptr (%\d+), align 1$", widened, text, flags=re.MULTILINE)


def _entry(name: str, signature: Sequence[str]) -> str:
    """Unpacks the arguments once, then runs programs until the counter shared by all threads is used up.

    A memref is (allocated, aligned, offset, size, stride). Sizes of arguments are never read. The workspace, the second
    hidden argument, carries the pool.
    """
    whole_memref = "i64 0, i64 9223372036854775807, i64 1"
    passed = [f"ptr null, ptr null, {whole_memref}", f"ptr %pool, ptr %pool, {whole_memref}"]
    loads = []
    for slot, kind in enumerate(signature):
        scalar = "ptr" if kind.startswith("*") else {"fp32": "float"}.get(kind, kind)
        loads.append(f"  %slot{slot} = getelementptr i64, ptr %packed, i64 {slot}")
        loads.append(f"  %value{slot} = load {scalar}, ptr %slot{slot}")
        value = f"{scalar} %value{slot}"
        passed.append(f"{value}, {value}, {whole_memref}" if scalar == "ptr" else value)
    passed.append("i32 %programs, i32 1, i32 1, i32 %program, i32 0, i32 0")
    return "\n".join(
        [
            f"define void @{ENTRY}(ptr %packed, i32 %programs, ptr %counter, ptr %pool) {{",
            *loads,
            "  br label %next",
            "next:",
            "  %program = atomicrmw add ptr %counter, i32 1 monotonic",
            "  %more = icmp slt i32 %program, %programs",
            "  br i1 %more, label %run, label %done",
            "run:",
            f"  call void @{name}({', '.join(passed)})",
            "  br label %next",
            "done:",
            "  ret void",
            "}",
        ]
    )
