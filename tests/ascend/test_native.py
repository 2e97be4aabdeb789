"""Native code of the CPU target: right numbers, right bounds, bounded memory, a cache that survives everything."""

from __future__ import annotations

import logging
import mmap
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_triton.ascend import elf, native, object_cache
from nsa_triton.ascend.lower import Specialization
from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.errors import ArgumentTypeError, ArgumentValueError, CompileError
from nsa_triton.runtime.executors.host import HostExecutor
from tests.guard import OutOfBoundsError, run_guarded

if front_end_problem() is not None:
    pytest.skip(f"no Ascend front end: {front_end_problem()}", allow_module_level=True)

from tests.ascend import native_kernels as kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)

executor = HostExecutor()


def launch(kernel: Any, programs: int, arguments: dict[str, Any], **constexprs: Any) -> None:
    executor.launch(kernel, programs, arguments, constexprs, {})


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, or NaN on both sides."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No compiled code, in memory or on disk."""
    monkeypatch.setenv("NSA_TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native, "_kernels", {})
    object_cache._warn_once.cache_clear()
    return tmp_path / "native"


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("programs", [1, 2, 7])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("threads")
def test_masked_tiles(dtype: torch.dtype, programs: int) -> None:
    x, w = torch.randn(100, 128).to(dtype), torch.randn(100).to(dtype)
    y = torch.full_like(x, float("nan"))
    launch(kernels.scale_rows, programs, {"x": x, "w": w, "y": y, "T": 100}, D=128, BT=16)
    assert torch.equal(y, (x.double() * w.double()[:, None]).to(dtype))


@pytest.mark.parametrize("shape", [(64, 64, 128), (16, 16, 16), (64, 48, 32), (1, 16, 16), (16, 192, 128)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_matmul(dtype: torch.dtype, transposed: bool, shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    a, b, c = torch.randn(2, M, K).to(dtype), torch.randn(K, N).to(dtype), torch.full((2, M, N), float("nan"))
    given = b.T.contiguous() if transposed else b
    launch(kernels.matmul, 1, {"a": a, "b": given, "c": c, "T": 2}, M=M, N=N, K=K, TRANSPOSED=transposed)
    assert relative_error(c, a.double() @ b.double()) < 1e-6


def test_integer_matmul() -> None:
    a, b = torch.randint(-128, 128, (1, 16, 32), dtype=torch.int8), torch.randint(-128, 128, (32, 16), dtype=torch.int8)
    c = torch.zeros(1, 16, 16, dtype=torch.int32)
    launch(kernels.matmul, 1, {"a": a, "b": b, "c": c, "T": 1}, M=16, N=16, K=32, TRANSPOSED=False)
    assert torch.equal(c.double(), a.double() @ b.double())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_matmul_passes_poison_on(poison: float) -> None:
    a, b, c = torch.ones(1, 16, 16), torch.eye(16), torch.zeros(1, 16, 16)
    a[0, 3, 5] = poison
    launch(kernels.matmul, 1, {"a": a, "b": b, "c": c, "T": 1}, M=16, N=16, K=16, TRANSPOSED=False)
    assert same(c[0], a[0] @ b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 64), (4, 16), (2, 64)])
def test_transpose(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    M, N = shape
    x, y = (torch.randn(M, N) * 10).to(dtype), torch.zeros(N, M, dtype=dtype)
    launch(kernels.transpose, 1, {"x": x, "y": y}, M=M, N=N)
    assert torch.equal(y, x.T)


@pytest.mark.parametrize("kind", ["sum", "max", "min"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bfloat16])
def test_reductions(dtype: torch.dtype, axis: int, kind: str) -> None:
    x = (torch.randn(32, 64) * 10).to(dtype)
    y = torch.zeros(64 if axis == 0 else 32, dtype=dtype)
    launch(kernels.reduce, 1, {"x": x, "y": y}, M=32, N=64, AXIS=axis, KIND=kind)
    expected = getattr(x.double(), {"sum": "sum", "max": "amax", "min": "amin"}[kind])(axis)
    if kind == "sum" and dtype.is_floating_point:
        assert relative_error(y, expected) < (1e-6 if dtype is torch.float32 else 2**-8)
    else:
        assert torch.equal(y.double(), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_sums_pass_poison_on(poison: float, axis: int) -> None:
    x = torch.ones(32, 64)
    x[5, 7] = poison
    y = torch.zeros(64 if axis == 0 else 32)
    launch(kernels.reduce, 1, {"x": x, "y": y}, M=32, N=64, AXIS=axis, KIND="sum")
    assert same(y, x.sum(axis))


def test_the_maximum_of_infinities() -> None:
    """Fast-math would be free to get this wrong: a row of -inf, and one that holds +inf."""
    x = torch.full((32, 64), float("-inf"))
    x[1, 3] = float("inf")
    y = torch.zeros(32)
    launch(kernels.reduce, 1, {"x": x, "y": y}, M=32, N=64, AXIS=1, KIND="max")
    assert torch.equal(y, x.amax(1))


SPECIAL = (0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 3e38, -3e38, -1.0, 2.0**-149)


@pytest.mark.parametrize(
    "function", ["exp", "exp2", "log", "log2", "sqrt", "rsqrt", "erf", "abs", "sin", "floor", "tanh"]
)
def test_elementary_functions(function: str) -> None:
    """At most 2.5 units in the last place from the true value, over all exponents, and exact at special points."""
    n = 4096
    step = 2**32 // (128 * n)
    spread = torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([spread, torch.linspace(-160, 140, 16 * n), torch.rand(16 * n) * 2])
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    y = torch.zeros_like(x)
    launch(kernels.elementary, x.numel() // n, {"x": x, "y": y}, N=n, FUNCTION=function)
    true = getattr(torch, function)(x.double())
    rounded = true.float()
    exact = ~torch.isfinite(rounded) | (rounded == 0)
    unit = (torch.nextafter(rounded.abs(), torch.tensor(float("inf"))) - rounded.abs()).double()
    assert same(y[exact], rounded[exact])
    assert ((y.double() - true).abs() / unit)[~exact].max() <= 2.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_bits", [0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_to_nearest_even(dtype: torch.dtype, low_bits: int) -> None:
    """All 65536 upper halves of an f32: ties, denormals, overflow, infinities and NaN are among them."""
    x = (torch.arange(65536, dtype=torch.int64) << 16 | low_bits).to(torch.int32).view(torch.float32)
    y = torch.zeros(65536, dtype=dtype)
    launch(kernels.cast, 1, {"x": x, "y": y}, N=65536)
    assert same(y, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_single_numbers(dtype: torch.dtype) -> None:
    """Which no vector instruction does: ties to even, both neighbours of a tie, overflow, infinity, denormals, NaN."""
    bits = (0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7FC00001, 0x00018000, 0xFF800001)
    for n in (1, 3):  # tiles of one element, and one that is no power of two
        for i in range(0, len(bits), n):
            x = torch.tensor(bits[i : i + n], dtype=torch.int64).to(torch.int32).view(torch.float32)
            y = torch.zeros(len(x), dtype=dtype)
            launch(kernels.cast, 1, {"x": x, "y": y}, N=n)
            assert same(y, x.to(dtype))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.bool])
def test_casts(source: torch.dtype, to: torch.dtype) -> None:
    x, y = (torch.randn(64) * 10).abs().to(source), torch.zeros(64, dtype=to)
    launch(kernels.cast, 1, {"x": x, "y": y}, N=64)
    assert torch.equal(y, x.to(to))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_arithmetic(dtype: torch.dtype) -> None:
    x, z = torch.randn(4096).to(dtype), torch.randn(4096).to(dtype)
    y = torch.zeros_like(x)
    launch(kernels.add, 1, {"x": x, "z": z, "y": y}, N=4096)
    assert torch.equal(y, x + z)


@pytest.mark.parametrize("length", [1, 64, 100, 333])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("threads")
def test_attention(dtype: torch.dtype, length: int) -> None:
    q, k, v = (torch.randn(length, 64).to(dtype) for _ in range(3))
    o = torch.full_like(q, float("nan"))
    arguments = {"q": q, "k": k, "v": v, "o": o, "T": length, "scale": 0.2}
    launch(kernels.attention, 3, arguments, D=64, BM=32, BN=64)
    expected = torch.softmax(q.double() @ k.double().T * 0.2, -1) @ v.double()
    assert relative_error(o, expected) < 4 * torch.finfo(dtype).eps + 1e-6


def test_slices() -> None:
    x, y = torch.randn(32, 64), torch.zeros(32, 32)
    launch(kernels.slices, 1, {"x": x, "y": y}, M=32, N=64)
    assert torch.equal(y, x[:, :32] - x[:, 32:])


def test_nested_loops_and_scalar_loads() -> None:
    x, n, y = torch.randn(20, 64), torch.tensor([0, 3, 5, 1], dtype=torch.int32), torch.zeros(4, 64)
    launch(kernels.partial_sums, 2, {"x": x, "n": n, "y": y, "B": 4}, N=64)
    for row, count in enumerate(n.tolist()):
        expected = torch.stack([torch.zeros(64).double(), *(x[: j + 1].double().sum(0) for j in range(count))]).sum(0)
        torch.testing.assert_close(y[row].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_while(dtype: torch.dtype) -> None:
    n, steps = torch.tensor([1, 7, 27], dtype=dtype), torch.full((3,), -1, dtype=dtype)
    launch(kernels.collatz, 1, {"n": n, "steps": steps, "B": 3})
    assert steps.tolist() == [0, 16, 111]


@pytest.mark.parametrize("times", [0, 1, 2, 5])
def test_carried_tensors_that_change_places(times: int) -> None:
    x, y = torch.randn(2, 64), torch.zeros(2, 64)
    launch(kernels.swap, 1, {"x": x, "y": y, "T": times}, N=64)
    first, second = x
    for _ in range(times):
        first, second = second + 1.0, first
    assert torch.equal(y, torch.stack([first, second]))


def test_boolean_tensors() -> None:
    m, x, y = torch.rand(64) < 0.5, torch.arange(64), torch.zeros(64, dtype=torch.int64)
    launch(kernels.choose, 1, {"m": m, "x": x, "z": -x, "y": y, "T": 50}, N=64)
    assert torch.equal(y, torch.where(m, x, -x) * (torch.arange(64) < 50))


def test_a_mask_that_is_used_twice() -> None:
    x, y, z = torch.randn(16, 64), torch.zeros(16, 64), torch.zeros(16, dtype=torch.int32)
    launch(kernels.mask_reused, 1, {"x": x, "y": y, "z": z, "T": 30}, M=16, N=64)
    assert torch.equal(z, (x < 0).sum(1).int())
    assert torch.equal(y, x * ((x < 0) & (torch.arange(64) < 30)))


def test_gathers() -> None:
    x, rows = torch.randn(16, 64), torch.tensor([3, 2, 15, -1, 0, 0, 7, 8], dtype=torch.int32)
    y = torch.zeros(2, 8, 64)
    launch(kernels.gather_rows, 1, {"x": x, "rows": rows, "y": y}, M=8, N=64)
    expected = torch.where((rows >= 0)[:, None], x[rows.long()], 0.0)
    assert torch.equal(y, torch.stack([expected, expected]))


def test_inserted_slices() -> None:
    x, y = torch.randn(16, 64), torch.zeros(16, 64)
    launch(kernels.inserted, 1, {"x": x, "y": y}, M=16, N=64)
    assert torch.equal(y, x.flip(0))


def test_maximum_with_its_index() -> None:
    x, y, z = torch.randn(16, 64), torch.zeros(16), torch.zeros(16, dtype=torch.int32)
    x[3, 9] = x[3, 40] = 9.0  # the left one wins
    launch(kernels.best, 1, {"x": x, "y": y, "z": z}, M=16, N=64)
    assert torch.equal(y, x.amax(1))
    assert torch.equal(z, x.argmax(1).int())
    assert z[3] == 9


def test_reshaped_sums() -> None:
    x, y, total = torch.randn(16, 64), torch.zeros(4, 64), torch.zeros(1)
    launch(kernels.grouped_sum, 1, {"x": x, "y": y, "total": total}, M=16, N=64, G=4)
    torch.testing.assert_close(y.double(), x.double().view(4, 4, 64).sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(total[0].double(), x.double().sum(), rtol=0, atol=1e-4)


def test_a_matmul_under_a_run_time_condition() -> None:
    x, y = torch.randn(16, 64), torch.zeros(16, 16)
    launch(kernels.dot_under_condition, 1, {"x": x, "take": torch.tensor([1, 0, 1, 0]), "y": y, "B": 4}, M=16, N=64)
    assert relative_error(y, 6 * (x.double() @ x.double().T)) < 1e-6


@pytest.mark.parametrize("cpu", ["x86-64", "haswell"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_older_processors(cpu: str, dtype: torch.dtype, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for SSE2 and for AVX2 alone, with their own tile sizes, runs on a newer processor of the family."""
    triple = native._host()[0]
    if not triple.startswith("x86_64") or "+avx2" not in native._host()[2]:
        pytest.skip("needs an x86-64 processor with AVX2")
    features = {"x86-64": "+sse2", "haswell": "+avx,+avx2,+fma,+f16c"}[cpu]
    monkeypatch.setattr(native, "_host", lambda: (triple, cpu, features))
    monkeypatch.setattr(sys.modules[__name__], "executor", HostExecutor())
    test_attention(dtype, 100)
    test_masked_tiles(dtype, 1)
    assert empty_cache.exists()


def test_offsets_beyond_32_bits() -> None:
    """Five gigabytes of address space, of which a few pages at the ends are ever touched."""
    offset, n = 2**32 + 2**29 + 64, 64
    if not hasattr(mmap, "MAP_NORESERVE"):
        pytest.skip("this Python cannot map memory without reserving it")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE
    x = torch.frombuffer(mmap.mmap(-1, offset + n, flags=flags), dtype=torch.int8)
    y = torch.zeros(n, dtype=torch.int8)
    x[offset:] = torch.arange(n)
    x[:n] = 3
    launch(kernels.far, 1, {"x": x, "y": y, "offset": offset}, N=n)
    assert torch.equal(y, torch.arange(n, dtype=torch.int8) + 3)
    assert torch.equal(x[offset:], y + 1)


@pytest.mark.parametrize("programs", [1, 3, 1000])
@pytest.mark.usefixtures("threads")
def test_every_program_runs_once(programs: int) -> None:
    seen = torch.zeros(programs, dtype=torch.int32)
    launch(kernels.count_programs, programs, {"seen": seen})
    assert torch.equal(seen, torch.full_like(seen, programs))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sort", "cumsum", "print"])
def test_operations_without_an_implementation_are_named(name: str) -> None:
    x = torch.zeros(64)
    with pytest.raises(CompileError, match=rf"tl\.{name} has no CPU implementation"):
        launch(getattr(kernels, {"print": "device_print"}.get(name, name)), 1, {"x": x, "y": x}, N=64)


def test_undefined_symbols_are_an_error_not_a_crash(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The JIT resolves an unknown symbol to address 0 and says nothing."""
    monkeypatch.setattr(native, "_symbols", lambda: frozenset({"memcpy"}))
    with pytest.raises(CompileError, match=r"aligned_alloc.* has no CPU implementation"):
        check_kernel()
    assert not list(empty_cache.parent.rglob("*.o"))


def test_symbols_are_read_from_elf_only() -> None:
    assert elf.undefined_symbols(native.compile_object(specialization())) <= native._symbols()
    assert elf.undefined_symbols(bytes(64)) == frozenset()


def test_a_kernel_that_the_front_end_rejects() -> None:
    with pytest.raises(CompileError, match="no_such_method") as raised:
        launch(kernels.wrong, 1, {"x": torch.zeros(64)}, N=64)
    assert "no_such_method" in raised.value.log


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.zeros(4, dtype=torch.complex64), ArgumentTypeError),
        (torch.zeros(4, device="meta"), ArgumentValueError),
        ("text", ArgumentTypeError),
        (2**63, ArgumentValueError),
    ],
)
def test_arguments_that_cannot_be_passed(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="x: expected"):
        launch(kernels.cast, 1, {"x": value, "y": torch.zeros(4)}, N=4)


# ---- memory ----------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.usefixtures("threads")
def test_memory_stays_flat() -> None:
    """10^5 programs and 10^5 iterations of a loop inside one program, 8 KiB of tiles and more in each."""
    T = 100_000
    x, w, y = torch.zeros(T, 8, 16).bfloat16(), torch.zeros(8).bfloat16(), torch.zeros(T, 16).bfloat16()
    a, b = torch.zeros(16, 16), torch.zeros(32, 16)

    def work() -> None:
        launch(kernels.weighted_sum, T, {"x": x, "w": w, "y": y, "T": T}, BT=8, D=16)
        launch(kernels.weighted_sum, 1, {"x": x, "w": w, "y": y, "T": T}, BT=8, D=16)
        launch(kernels.swap, 1, {"x": a, "y": b, "T": T}, N=128)

    work()
    before = resident_bytes()
    work()
    assert resident_bytes() - before < 4 * 2**20


GUARDED = {"x": torch.randn(37, 64).bfloat16(), "w": torch.randn(37).bfloat16(), "y": torch.zeros(37, 64).bfloat16()}


@pytest.mark.parametrize("side", ["after", "before"])
def test_guarded_memory_passes_a_masked_kernel(side: Any) -> None:
    def function(**tensors: Tensor) -> None:
        launch(kernels.scale_rows, 1, {**tensors, "T": 37}, D=64, BT=16)

    done = run_guarded(function, GUARDED, side)
    assert torch.equal(done["y"], (GUARDED["x"].double() * GUARDED["w"].double()[:, None]).bfloat16())


def test_guarded_memory_catches_a_read_after_the_end() -> None:
    def function(**tensors: Tensor) -> None:
        launch(kernels.scale_rows_unmasked, 1, {**tensors, "T": 37}, D=64, BT=16)

    with pytest.raises(OutOfBoundsError, match="out of bounds"):
        run_guarded(function, GUARDED, "after")


def test_guarded_memory_catches_a_read_before_the_beginning() -> None:
    def function(**tensors: Tensor) -> None:
        launch(kernels.shift_left_unmasked, 1, {**tensors, "T": 32, "distance": 1}, BT=32)

    tensors = {"x": torch.randn(32), "y": torch.zeros(32)}
    with pytest.raises(OutOfBoundsError, match="out of bounds"):
        run_guarded(function, tensors, "before")


def test_guarded_memory_shows_what_the_lowering_makes_of_a_mask_from_data() -> None:
    """triton-ascend honours masks of the form index < n. For any other it loads, and even stores, the whole tile."""

    def function(**tensors: Tensor) -> None:
        launch(kernels.copy_where, 1, {**tensors, "T": 37}, BT=64)

    tensors = {"x": torch.randn(37), "m": torch.ones(37, dtype=torch.int32), "y": torch.zeros(37)}
    with pytest.raises(OutOfBoundsError, match="out of bounds"):
        run_guarded(function, tensors, "after")


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_alignment_beyond_the_element_is_assumed(dtype: torch.dtype, side: Any) -> None:
    """One element more than a multiple of anything, so that tiles begin at odd addresses."""
    tensors = {name: torch.randn(331, 16).to(dtype) for name in ("q", "k", "v", "o")}

    def function(**tensors: Tensor) -> None:
        odd = {name: tensor.flatten()[1:-15].view(330, 16) for name, tensor in tensors.items()}
        launch(kernels.attention, 1, {**odd, "T": 330, "scale": 0.3}, D=16, BM=16, BN=32)

    o = run_guarded(function, tensors, side)["o"].flatten()[1:-15].view(330, 16)
    q, k, v = (tensors[name].flatten()[1:-15].view(330, 16).double() for name in ("q", "k", "v"))
    assert relative_error(o, torch.softmax(q @ k.T * 0.3, -1) @ v) < 4 * torch.finfo(dtype).eps + 1e-6


def test_guarded_memory_reports_exceptions() -> None:
    def function(**_: Tensor) -> None:
        raise ValueError("told to the parent")

    with pytest.raises(RuntimeError, match="told to the parent"):
        run_guarded(function, {})


# ---- the cache -------------------------------------------------------------------------------------------------------


def check_kernel() -> None:
    """Past the executor's own memory, so that the cache under test is asked."""
    x, y = torch.randn(64), torch.zeros(64)
    HostExecutor().launch(kernels.add, 1, {"x": x, "z": x, "y": y}, {"N": 64}, {})
    assert torch.equal(y, x + x)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_kernels", {})


def specialization() -> Specialization:
    return Specialization(kernels.add, {"x": "*fp32", "z": "*fp32", "y": "*fp32"}, {"N": 64})


def test_code_is_kept_on_disk(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nsa_triton"):
        check_kernel()
    assert "compiled add" in caplog.text
    assert not native.native_kernel(specialization()).from_cache
    assert len(list(empty_cache.iterdir())) == 1
    forget(monkeypatch)
    monkeypatch.setattr(native, "compile_object", lambda _: pytest.fail("compiled although the code is on disk"))
    check_kernel()
    assert native.native_kernel(specialization()).from_cache


def test_the_key_covers_values_and_types(empty_cache: Path) -> None:
    local = HostExecutor()
    x = torch.randn(64)
    for n, dtype in ((64, torch.float32), (32, torch.float32), (64, torch.bfloat16)):
        y = torch.zeros(64, dtype=dtype)
        local.launch(kernels.cast, 1, {"x": x, "y": y}, {"N": n}, {})
        assert torch.equal(y[:n], x[:n].to(dtype))
        assert not y[n:].any()
    assert len(list(empty_cache.iterdir())) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda code: b"",
        lambda code: code[:20],
        lambda code: code[: len(code) // 2],
        lambda code: code[:-1],
        lambda code: b"garbage" * 1000,
        lambda code: code[:-100] + bytes(100),
    ],
    ids=["empty", "header", "half", "last byte", "garbage", "tail of zeros"],
)
def test_damaged_files_are_replaced(
    damage: Callable[[bytes], bytes], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_kernel()
    (file,) = empty_cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    forget(monkeypatch)
    check_kernel()
    assert not native.native_kernel(specialization()).from_cache
    forget(monkeypatch)
    check_kernel()
    assert native.native_kernel(specialization()).from_cache


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file where the folder should be stops root as well, whom permissions do not stop."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("NSA_TRITON_CACHE_DIR", str(blocked))
    object_cache._warn_once.cache_clear()
    for _ in range(2):
        forget(monkeypatch)
        check_kernel()
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="permissions do not stop root")
def test_a_read_only_cache(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_cache.mkdir()
    empty_cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    check_kernel()
    assert not list(empty_cache.iterdir())


def test_two_processes_at_once(empty_cache: Path) -> None:
    script = "import tests.ascend.test_native as t; t.check_kernel(); print('fine')"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0].strip() for process in both] == ["fine", "fine"]
    assert [file.suffix for file in empty_cache.iterdir()] == [".o"]


# ---- threads ---------------------------------------------------------------------------------------------------------


def in_threads(work: list[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001  raised again below, on the thread that pytest watches
            failures.append(error)

    running = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]


def test_one_compilation_for_many_threads(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile_object = [], native.compile_object

    def counted(spec: Specialization) -> bytes:
        compiled.append(spec.name)
        time.sleep(0.05)
        return compile_object(spec)

    monkeypatch.setattr(native, "compile_object", counted)
    in_threads([check_kernel] * 4)
    assert compiled == ["add"]


@pytest.mark.usefixtures("empty_cache", "threads")
def test_launches_from_two_threads_at_once() -> None:
    in_threads([lambda: test_attention(torch.bfloat16, 100), test_slices, lambda: test_attention(torch.float32, 333)])
    in_threads([lambda: test_attention(torch.bfloat16, 333) for _ in range(8)])


# ---- speed -----------------------------------------------------------------------------------------------------------


def best_seconds(function: Callable[[], Any], repeats: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("one_thread")
def test_matmul_speed(dtype: torch.dtype, transposed: bool) -> None:
    """Tiles with their loads and casts against one large torch.mm in f32: a naive loop nest is fifty times slower."""
    T, M, N, K = 64, 64, 64, 128
    a, b = torch.randn(T, M, K).to(dtype), torch.randn(K, N).to(dtype)
    given, c = (b.T.contiguous() if transposed else b), torch.zeros(T, M, N)
    constexprs = {"M": M, "N": N, "K": K, "TRANSPOSED": transposed}
    native_seconds = best_seconds(
        lambda: launch(kernels.matmul, 1, {"a": a, "b": given, "c": c, "T": T}, **constexprs), repeats=10
    )
    wide, right = a.float().view(T * M, K), b.float()
    torch_seconds = best_seconds(lambda: torch.mm(wide, right), repeats=10)
    work = 2e-9 * T * M * N * K
    print(f"{work / native_seconds:.0f} GFLOP/s, torch.mm {work / torch_seconds:.0f}")
    assert native_seconds < 8 * torch_seconds


@pytest.mark.usefixtures("one_thread")
def test_launch_overhead() -> None:
    seen = torch.zeros(1, dtype=torch.int32)
    assert best_seconds(lambda: launch(kernels.count_programs, 1, {"seen": seen}), repeats=200) < 100e-6
