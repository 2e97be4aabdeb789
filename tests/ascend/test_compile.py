"""The compile step: real kernels through both Ascend compilers, and what the reports say about them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nsa_triton.ascend import bishengir, tools
from nsa_triton.ascend.chips import CHIPS, chip
from nsa_triton.ascend.compile import Job, compile_kernel, compile_many, final_module
from nsa_triton.ascend.hivm_facts import module_facts
from nsa_triton.ascend.hivm_module import Memref, functions, memref
from nsa_triton.ascend.lower import Specialization
from nsa_triton.ascend.report import CompileReport
from nsa_triton.ascend.report_view import report_table, report_view
from nsa_triton.ascend.toolchain import Compiler, compilers, front_end_problem
from nsa_triton.errors import ArgumentValueError, CompileError, ToolchainError

FRONT_END = front_end_problem()
if FRONT_END is None:
    from tests.ascend import compile_kernels as kernels

KB = 1024
NEW, OLD = "1.2.0", "1.0.0"
SIGNATURES = {
    "add": {"x": "*fp32", "y": "*fp32", "z": "*fp32", "n": "i32"},
    "product": {"a": "*bf16", "b": "*bf16", "c": "*fp32"},
    "scaled_product": {"a": "*bf16", "b": "*bf16", **dict.fromkeys(["c", "rows", "columns"], "*fp32"), "n": "i32"},
    "attention": {**dict.fromkeys("qkvo", "*bf16"), "table": "*i32", "scale": "fp32", "n_steps": "i32"},
    "modulo": {"x": "*i32", "y": "*i32", "n": "i32"},
    "compare_int64": {"x": "*i64", "y": "*fp32"},
    "compare_int32": {"x": "*i32", "y": "*fp32", "n": "i32"},
    "reversed_mask": {"x": "*fp32", "y": "*fp32", "n": "i32"},
    "gather": {"x": "*fp32", "index": "*i32", "y": "*fp32"},
    "row_gather": {"x": "*bf16", "index": "*i32", "y": "*bf16"},
    "row_sums": {"x": "*fp32", "y": "*fp32"},
    "strided": {"x": "*fp32", "y": "*fp32", "stride": "i32"},
    "locked": {"x": "*fp32", "y": "*fp32", "z": "*fp32"},
    "running_sum": {"x": "*fp32", "y": "*fp32"},
    "float64": {"x": "*fp64", "y": "*fp64"},
    "flipped": {"x": "*fp32", "y": "*fp32"},
    "transposed": {"x": "*fp32", "y": "*fp32", "stride": "i32"},
    "two_types": {"x": "*fp32", "y": "*fp32"},
}


def spec(name: str, **constexprs: int | str) -> Specialization:
    if FRONT_END is not None:
        pytest.skip(f"needs triton-ascend: {FRONT_END}")
    return Specialization(getattr(kernels, name), SIGNATURES[name], constexprs)


def found(version: str) -> Compiler:
    for candidate in compilers():
        if candidate.version == version:
            return candidate
    have = ", ".join(c.version for c in compilers()) or "none"
    pytest.skip(f"ascendnpu-ir {version} is not in toolchain.compilers() (found: {have}; see NSA_TRITON_COMPILERS)")


@pytest.fixture(params=[NEW, OLD])
def compiler(request: pytest.FixtureRequest) -> Compiler:
    return found(request.param)


@pytest.fixture
def new() -> Compiler:
    return found(NEW)


@pytest.fixture
def old() -> Compiler:
    return found(OLD)


def line_of(name: str, text: str) -> str:
    """`folder/file.py:line` of the first line with `text` in the kernel `name`."""
    lines = Path(kernels.__file__).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"def {name}("))
    return f"ascend/compile_kernels.py:{next(i for i, line in enumerate(lines[start:], start + 1) if text in line)}"


def in_problems(report: CompileReport, *texts: str) -> bool:
    return any(all(text in problem for text in texts) for problem in report.problems())


# ---- text alone, without any compiler --------------------------------------------------------------------------------

MODULE = """
"builtin.module"() ({
  "func.func"() <{function_type = () -> index, sym_name = "k_infer_workspace_shape_function"}> ({
    %0 = "arith.constant"() <{value = 4096 : index}> : () -> index loc("k.py":1:0)
    "func.return"(%0) : (index) -> () loc("k.py":1:0)
  }) : () -> () loc("k.py":1:0)
  "func.func"() <{function_type = (i32) -> (), sym_name = "k"}> ({
  ^bb0(%arg0: i32 loc("k.py":1:0)):
    %1 = "arith.constant"() <{value = 0 : index}> : () -> index loc(unknown)
    %2 = "arith.constant"() <{value = 1 : index}> : () -> index loc(unknown)
    %3 = "arith.constant"() <{value = 10 : index}> : () -> index loc(unknown)
    %4 = "arith.constant"() <{value = 3 : index}> : () -> index loc(unknown)
    %5 = "arith.constant"() <{value = 256 : i64}> : () -> i64 loc(unknown)
    %6 = "hivm.hir.pointer_cast"(%5) <{operandSegmentSizes = array<i32: 1, 0>}> : (i64) -> memref<8x2xf32, #hivm.address_space<ub>> loc("a/k.py":2:1)
    %7 = "hivm.hir.pointer_cast"(%5) <{operandSegmentSizes = array<i32: 1, 0>}> : (i64) -> memref<12xi1, #hivm.address_space<cbuf>> loc("a/k.py":2:1)
    "scf.for"(%1, %3, %4) ({
    ^bb0(%arg1: index loc("k.py":3:0)):
      "scf.for"(%1, %arg1, %2) ({
      ^bb0(%arg2: index loc("k.py":3:0)):
        "hivm.hir.vadd"(%6, %6, %6) : (memref<8x2xf32, #hivm.address_space<ub>>, memref<8x2xf32, #hivm.address_space<ub>>, memref<8x2xf32, #hivm.address_space<ub>>) -> () loc("a/k.py":4:2)
        "scf.yield"() : () -> () loc("-":1:1)
      }) : (index, index, index) -> () loc("k.py":3:0)
      %8:2 = "scf.if"(%arg0) ({
        %9 = "memref.load"(%6, %arg1, %1) : (memref<8x2xf32, #hivm.address_space<ub>>, index, index) -> f32 loc(callsite("triton/language/standard.py":1:1 at "a/k.py":5:3))
        "scf.yield"(%9, %9) : (f32, f32) -> () loc("-":1:1)
      }, {
        "hivm.hir.pipe_barrier"() <{pipe = #hivm.pipe<PIPE_ALL>}> : () -> () loc("<stdin>":2:2)
        "scf.yield"(%9, %9) : (f32, f32) -> () loc("-":1:1)
      }) : (i1) -> (f32, f32) loc("k.py":3:0)
      "scf.yield"() : () -> () loc("-":1:1)
    }) : (index, index, index) -> () loc("k.py":3:0)
    "func.return"() : () -> () loc("k.py":1:0)
  }) : () -> () loc("k.py":1:0)
}) : () -> () loc("k.py":1:0)
"""  # noqa: E501


def test_facts_of_a_module() -> None:
    facts = module_facts(MODULE)
    assert facts.workspace == 4096
    assert facts.used == {"UB": 256 + 64, "L1": 256 + 2, "L0A": 0, "L0B": 0, "L0C": 0}
    assert facts.counts == {"vector": {"vadd": 1}, "cube": {}, "dma": {}, "sync": {"pipe_barrier": 1}}
    assert facts.executed["vector"] == {"vadd": 4}  # 0, 3, 6, 9, and once in the loop of unknown length
    (access,) = facts.scalar_accesses
    assert (access.source, access.memory, access.in_loop, access.kind) == ("a/k.py:5", "UB", True, "row")
    sources = {op.short: op.source for function in functions(MODULE) for op in function.ops}
    assert (sources["vadd"], sources["pipe_barrier"]) == ("a/k.py:4", "")
    assert module_facts("").used == dict.fromkeys(facts.used, 0)


def test_memref_types() -> None:
    text = "memref<4x?xbf16, strided<[?, 1], offset: ?>, #hivm.address_space<gm>>"
    assert memref(text) == Memref((4, None), "bf16", "GM", (None, 1))
    assert memref("memref<8x4x16x16xbf16, #hivm.address_space<cbuf>>") == Memref((8, 4, 16, 16), "bf16", "L1", None)
    assert memref("memref<9xi1, #hivm.address_space<ub>>") == Memref((9,), "i1", "UB", None)
    assert memref("index") is None
    sizes = {text: memref(text) for text in ("memref<9xi1>", "memref<i64>", "memref<3xf8E4M3FN>", "memref<?xi8>")}
    assert [one.bytes for one in sizes.values() if one is not None] == [2, 8, 3, None]


# ---- what fits, and what does not ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "block", "used_kb", "dropped"),
    [
        (NEW, 4096, 96, False),  # three tiles, each twice
        (NEW, 8192, 192, False),
        (NEW, 10240, 160, False),  # still twice: the sum now lies where an operand lay
        (NEW, 24576, 192, True),
        (OLD, 8192, 128, False),  # always shares
        (OLD, 10240, 160, False),
    ],
)
def test_add_that_fits(version: str, block: int, used_kb: int, dropped: bool) -> None:
    report = compile_kernel(spec("add", BLOCK=block), compiler=found(version))
    assert report.ok
    assert report.used == {"UB": used_kb * KB, "L1": 0, "L0A": 0, "L0B": 0, "L0C": 0}
    assert report.ub_percent == pytest.approx(100 * used_kb / 192)
    assert report.double_buffer_dropped is dropped
    assert report.double_buffers == (0 if dropped else 3)
    assert any("enable-auto-multi-buffer to false" in note for note in report.notes) is dropped
    assert in_problems(report, "Double buffering was dropped") is dropped
    assert in_problems(report, "UB is", "% full") is (used_kb > 0.8 * 192)
    assert report.mix_mode == "aiv"
    assert report.scalar_accesses == ()
    assert report.scalar_warnings == report.unstructured_masks == ()


def test_the_old_compiler_refuses_what_only_fits_without_double_buffers(old: Compiler) -> None:
    report = compile_kernel(spec("add", BLOCK=24576), compiler=old)
    assert not report.ok
    assert report.overflow is not None
    assert (report.overflow.memory, report.overflow.required) == ("UB", 4 * 24576 * 4)
    alone = compile_kernel(spec("add", BLOCK=24576), compiler=old, options={"multibuffer": False})
    assert alone.ok
    assert alone.used["UB"] == 2 * 24576 * 4
    assert not alone.double_buffer_dropped


def test_double_buffers_given_up_on_purpose_are_not_dropped(new: Compiler) -> None:
    report = compile_kernel(spec("add", BLOCK=8192), compiler=new, options={"multibuffer": False})
    assert (report.ok, report.double_buffers, report.double_buffer_dropped) == (True, 0, False)
    assert report.options == {"multibuffer": False}


@pytest.mark.parametrize(
    ("name", "constexprs", "memory", "available"),
    [
        ("add", {"BLOCK": 32768}, "UB", 192 * KB),
        ("product", {"M": 256, "N": 256, "K": 128}, "L0C", 128 * KB),
        ("product", {"M": 256, "N": 64, "K": 2048}, "L1", 512 * KB),
    ],
)
def test_overflow_is_a_report(
    compiler: Compiler, name: str, constexprs: Mapping[str, int], memory: str, available: int
) -> None:
    report = compile_kernel(spec(name, **constexprs), compiler=compiler)
    assert not report.ok
    assert not report.fits
    assert report.error == ""
    assert report.overflow is not None
    assert report.overflow.memory == memory
    assert report.overflow.available == available < report.overflow.required
    assert in_problems(report, f"{memory} overflow: {report.overflow.required} bytes needed", "lower")


def test_refused_by_the_back_end_is_a_report(compiler: Compiler) -> None:
    report = compile_kernel(spec("float64", BLOCK=1024), compiler=compiler)
    assert not report.ok
    assert report.overflow is None
    assert "hivm.hir.vmul" in report.error
    assert line_of("float64", "tl.load") in report.error
    assert in_problems(report, "Does not compile", "hivm.hir.vmul")


def test_refused_by_the_front_end_raises(new: Compiler) -> None:
    with pytest.raises(CompileError, match="two_types: the Triton front end rejected the kernel"):
        compile_kernel(spec("two_types", BLOCK=64), compiler=new)


# ---- what became of it -----------------------------------------------------------------------------------------------


def test_cube_kernel(compiler: Compiler) -> None:
    report = compile_kernel(spec("product", M=64, N=64, K=128), compiler=compiler)
    assert report.ok
    assert report.problems() == []
    assert report.used == {"UB": 0, "L1": 2 * 64 * 128 * 2, "L0A": 0, "L0B": 0, "L0C": 64 * 64 * 4}
    assert report.counts["cube"] == {"mmadL1": 1}
    assert report.counts["dma"] == {"nd2nz": 2, "fixpipe": 1}
    assert report.counts["vector"] == {}
    assert report.dma_bytes == {"nd2nz": 2 * 64 * 128 * 2, "fixpipe": 64 * 64 * 4}
    assert report.workspace == 0


def test_mix_kernel(compiler: Compiler) -> None:
    report = compile_kernel(spec("attention", BM=64, BN=64, D=128), compiler=compiler)
    assert report.ok
    assert report.problems() == []
    assert report.mix_mode == "mix"
    assert report.counts["cube"] == {"mmadL1": 2}
    assert report.counts["vector"]["vexp"] == 2
    assert report.counts["sync"]["sync_block_set"] > 0
    # p, s and p @ v of one step travel through the workspace, four steps deep with 1.2.0 and one with 1.0.0
    assert report.workspace == (64 * 64 * 2 + 64 * 64 * 4 + 64 * 128 * 4) * (4 if compiler.version == NEW else 1)
    assert report.double_buffers == 3
    assert 0 < report.ub_percent < 80
    assert report.used["L1"] == 96 * KB
    assert report.used["L0C"] == 48 * KB


def test_page_ids_are_no_fallback(compiler: Compiler) -> None:
    report = compile_kernel(spec("attention", BM=64, BN=64, D=128), compiler=compiler)
    assert {(a.op, a.memory, a.in_loop, a.kind) for a in report.scalar_accesses} == {("memref.load", "GM", True, "gm")}
    assert {access.source for access in report.scalar_accesses} == {line_of("attention", "tl.load(table")}
    assert report.scalar_fallbacks() == []
    assert report.scalar_fallbacks(allow_gm=False) == list(report.scalar_accesses)


def test_static_loops_multiply(compiler: Compiler) -> None:
    report = compile_kernel(spec("row_sums", ROWS=8, D=256), compiler=compiler)
    assert report.ok
    assert report.counts["vector"] == {"vreduce": 1}
    assert report.executed["vector"] == {"vreduce": 8}
    assert report.dma_bytes["load"] == 8 * 256 * 4
    assert ("UB", True, "one") in {(a.memory, a.in_loop, a.kind) for a in report.scalar_accesses}  # the sum itself
    assert report.scalar_fallbacks() == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("modulo", "b_x % 7"),
        ("compare_int64", "tl.where"),
        ("gather", "tl.load(x + tl.load"),
        ("running_sum", "tl.cumsum"),
    ],
)
def test_scalar_fallback(compiler: Compiler, name: str, line: str) -> None:
    report = compile_kernel(spec(name, BLOCK=1024), compiler=compiler)
    assert report.ok
    fallbacks = report.scalar_fallbacks()
    assert fallbacks
    assert {access.source for access in fallbacks} == {line_of(name, line)}
    assert {access.kind for access in fallbacks} == {"element"}
    assert "UB" in {access.memory for access in fallbacks}
    assert in_problems(report, line_of(name, line))


def test_old_compiler_warns_of_scalar_instructions(old: Compiler) -> None:
    report = compile_kernel(spec("compare_int32", BLOCK=1024), compiler=old)
    assert [(w.what, w.source) for w in report.scalar_warnings] == [
        ("hivm.hir.vcmp", line_of("compare_int32", "tl.where"))
    ]
    assert report.scalar_fallbacks()
    assert [problem for problem in report.problems() if "scalar" in problem or "elements" in problem] == [
        problem for problem in report.problems() if "hivm.hir.vcmp runs by scalar instructions" in problem
    ]


def test_new_compiler_vectorises_int32_compares(new: Compiler) -> None:
    report = compile_kernel(spec("compare_int32", BLOCK=1024), compiler=new)
    assert report.problems() == []
    assert report.counts["vector"]["vcmp"] == 1


def test_index_of_a_gathered_row(compiler: Compiler) -> None:
    report = compile_kernel(spec("row_gather", ROWS=32, D=128), compiler=compiler)
    assert [(a.memory, a.kind) for a in report.scalar_fallbacks()] == [("UB", "row")]
    assert report.executed["dma"]["load"] == 33
    assert in_problems(report, line_of("row_gather", "tl.store"), "single elements of UB") or in_problems(
        report, line_of("row_gather", "tl.load(x + rows"), "single elements of UB"
    )


def test_unstructured_masks(compiler: Compiler) -> None:
    report = compile_kernel(spec("reversed_mask", BLOCK=1024), compiler=compiler)
    assert {(place.what, place.source) for place in report.unstructured_masks} == {
        ("tl.load", line_of("reversed_mask", "tl.load")),
        ("tl.store", line_of("reversed_mask", "tl.store")),
    }
    assert in_problems(report, "tl.store", "neighbouring programs race")
    assert in_problems(report, "tl.load", "outside of the tensor")


def test_element_transfers_are_remarked(compiler: Compiler) -> None:
    report = compile_kernel(spec("strided", BLOCK=512), compiler=compiler)
    assert report.problems() == []
    assert [place.source for place in report.element_transfers] == [line_of("strided", "tl.load")]
    assert "moves each element by itself" in report.remarks()[0]


@pytest.mark.parametrize(("name", "line"), [("flipped", "tl.flip"), ("transposed", "tl.load")])
def test_device_templates_that_loop_over_elements(compiler: Compiler, name: str, line: str) -> None:
    report = compile_kernel(spec(name, BLOCK=64), compiler=compiler)
    assert [place.source for place in report.scalar_templates] == [line_of(name, line)]
    assert in_problems(report, line_of(name, line), "works element by element")


def test_locks_between_blocks(new: Compiler) -> None:
    report = compile_kernel(spec("locked", BLOCK=512), compiler=new)
    assert report.counts["sync"]["sync_block_lock"] == 1
    assert in_problems(report, "lock", "atomic")


def xdsl_op_names(text: str) -> list[str]:
    """The ops of a module in order, as a full parser reads them."""
    xdsl_parser = pytest.importorskip("xdsl.parser")
    context = pytest.importorskip("xdsl.context").Context(allow_unregistered=True)
    context.load_dialect(pytest.importorskip("xdsl.dialects.builtin").Builtin)
    module = xdsl_parser.Parser(context, text).parse_module()
    tops = list(module.body.block.ops)
    return [op.op_name.data for op in module.walk() if op is not module and op not in tops]


def test_final_module_is_structured_and_generic(compiler: Compiler) -> None:
    text = final_module(spec("attention", BM=64, BN=64, D=128), compiler=compiler)
    assert '"hivm.hir.mmadL1"(' in text
    assert '"affine.' not in text
    assert f'{Path(kernels.__file__).name}":' in text
    assert [op.name for f in functions(text) for op in f.ops] == xdsl_op_names(text)
    with pytest.raises(CompileError, match=r"add: UB overflow: \d+ bytes needed, 196608 there"):
        final_module(spec("add", BLOCK=32768), compiler=compiler)


# ---- arguments, files, the toolchain ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Ascend910B4", "Ascend910_9392"])
def test_other_chips(compiler: Compiler, name: str) -> None:
    report = compile_kernel(spec("product", M=64, N=64, K=128), name, compiler=compiler)
    assert report.ok
    assert report.chip == name


def test_the_compiler_knows_every_chip_as_we_do(compiler: Compiler) -> None:
    for one in CHIPS.values():
        text = final_module(spec("modulo", BLOCK=64), one.name, compiler=compiler)
        entries = {
            "CUBE_CORE_COUNT": one.cube_cores,
            "VECTOR_CORE_COUNT": one.vector_cores,
            **{f"{memory}_SIZE": 8 * one.memory(memory) for memory in ("UB", "L1", "L0A", "L0B", "L0C")},
        }
        assert all(f'"{key}", {value} : i32' in text for key, value in entries.items()), one


def test_unknown_chip() -> None:
    with pytest.raises(ArgumentValueError, match=r"chip: expected one of Ascend910B1, .*, got 'Ascend310'"):
        chip("Ascend310")
    with pytest.raises(ArgumentValueError, match="chip: expected one of"):
        compile_kernel(spec("modulo", BLOCK=64), "910B2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multi_buffer": True}, r"options: expected names among .*multibuffer.*, got 'multi_buffer'"),
        ({"num_warps": 4}, r"options: expected names among"),
        ({"multibuffer": 1}, r"options\['multibuffer'\]: expected one of True, False, got 1"),
        ({"tile_mix_cube_loop": 0}, r"options\['tile_mix_cube_loop'\]: expected an int of at least 1, got 0"),
        ({"tile_mix_cube_loop": True}, r"expected an int of at least 1, got True"),
        ({"limit_auto_multi_buffer_of_local_buffer": "l0c"}, r"expected one of 'no-limit', 'no-l0c', got 'l0c'"),
    ],
)
def test_bad_options(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ArgumentValueError, match=message):
        compile_kernel(spec("modulo", BLOCK=64), options=options)


def test_every_option_reaches_the_compiler(new: Compiler) -> None:
    values = {
        name: {bool: True, str: "no-l0c"}.get(type(allowed[-1]), 2) if isinstance(allowed, tuple) else 2
        for name, (_, allowed) in bishengir.OPTIONS.items()
    }
    assert set(values) == set(bishengir.OPTIONS)
    assert compile_kernel(spec("product", M=64, N=64, K=128), compiler=new, options=values).ok


def test_option_that_only_the_new_compiler_has(old: Compiler) -> None:
    with pytest.raises(ArgumentValueError, match=r"sync_solver.*ascendnpu-ir 1.0.0 has no --enable-hivm-graph-sync"):
        compile_kernel(spec("modulo", BLOCK=64), compiler=old, options={"sync_solver": True})
    assert compile_kernel(spec("modulo", BLOCK=64), compiler=old, options={"sync_solver": None}).ok


def test_keep(compiler: Compiler, tmp_path: Path) -> None:
    report = compile_kernel(spec("modulo", BLOCK=64), compiler=compiler, keep=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"modulo-BLOCK64-Ascend910B2-{compiler.version}-")
    assert sorted(path.name for path in folder.iterdir()) == [
        "compiler.log",
        "kernel.hivm.mlir",
        "kernel.linalg.mlir",
    ]
    assert '"hivm.hir.load"' in (folder / "kernel.hivm.mlir").read_text()
    assert "func.func @modulo" in (folder / "kernel.linalg.mlir").read_text()
    assert report.object_file == ""
    compile_kernel(spec("add", BLOCK=32768), compiler=compiler, keep=tmp_path)
    failed = next(path for path in tmp_path.iterdir() if path.name.startswith("add-"))
    assert "overflow" in (failed / "compiler.log").read_text()


@pytest.mark.parametrize("version", [NEW, OLD])
@pytest.mark.parametrize(
    ("work", "shared_by_old"),
    [
        ("nothing more", True),
        ("a sum of each row", True),
        ("a number for each column", True),
        ("a select", True),
        ("a number for each row", False),
        ("a branch", False),
        ("a mask of rows", False),
    ],
)
def test_which_vector_work_the_compilers_share_out(work: str, shared_by_old: bool, version: str) -> None:
    """Each of the two vector cores then has half of the rows, and half of the tile in its unified buffer. 1.0.0 gives
    all rows to both where it cannot; what docs/kernels.md says of its tiles rests on this."""
    used = [
        compile_kernel(
            spec("scaled_product", M=128, N=64, K=64, WITH=work),
            compiler=found(version),
            options={"enable_auto_bind_sub_block": share},
        ).ub_percent
        for share in (True, False)
    ]
    if version == NEW or shared_by_old:
        assert used[0] == pytest.approx(used[1] / 2, rel=0.02)
    else:
        assert used[0] == used[1]


@pytest.fixture
def hivmc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called hivmc on PATH, as with CANN; this one writes a word where the object file goes."""
    tool = tmp_path / "bin" / "hivmc"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo "hivmc version 0.1.0"; exit 0;; esac\n'
        'while [ "$1" != -o ]; do shift; done\necho machine > "$2.o"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    return tool


def test_with_a_real_hivmc_the_compile_goes_on(compiler: Compiler, hivmc: Path, tmp_path: Path) -> None:
    report = compile_kernel(spec("modulo", BLOCK=64), compiler=compiler, keep=tmp_path / "kept")
    assert report.ok
    assert Path(report.object_file).read_text() == "machine\n"
    assert report.counts["dma"]["load"] == 1
    assert compile_kernel(spec("modulo", BLOCK=64), compiler=compiler).object_file == "kernel.o"


def test_a_hivmc_that_fails(compiler: Compiler, hivmc: Path) -> None:
    hivmc.write_text('#!/bin/sh\ncase "$*" in *--version*) echo "hivmc version 0.1.0";; *) exit 1;; esac\n')
    report = compile_kernel(spec("modulo", BLOCK=64), compiler=compiler)
    assert report.fits
    assert not report.ok
    assert "hivmc" in report.error
    assert in_problems(report, "after the memory plan")


def test_timeout(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel(spec("modulo", BLOCK=64), compiler=compiler)
    monkeypatch.setattr(tools, "TIMEOUT", 0.001)
    with pytest.raises(CompileError, match="bishengir-compile did not end within"):
        compile_kernel(spec("modulo", BLOCK=64), compiler=compiler)
    (report,) = compile_many([Job(spec("modulo", BLOCK=64), compiler=compiler)])
    assert not report.ok
    assert "did not end" in report.error


def test_a_compiler_that_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="does not run"):
        compile_kernel(spec("modulo", BLOCK=64), compiler=Compiler("9.9.9", tmp_path))


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_compile_many_keeps_the_order(new: Compiler) -> None:
    blocks = [4096, 32768, 64, 8192, 128, 256]
    jobs = [Job(spec("add", BLOCK=block), "Ascend910B4", new) for block in blocks]
    jobs.insert(3, Job(spec("two_types", BLOCK=64), compiler=new))
    seen: list[CompileReport] = []
    reports = compile_many(jobs, workers=3, progress=seen.append)
    assert [report.constexprs["BLOCK"] for report in reports] == [4096, 32768, 64, 64, 8192, 128, 256]
    assert [report.ok for report in reports] == [True, False, True, False, True, True, True]
    assert reports[3].kernel == "two_types"
    assert "front end rejected" in reports[3].error
    assert in_problems(reports[3], "Does not compile")
    assert sorted(map(id, seen)) == sorted(map(id, reports))
    assert compile_many([]) == []


def test_compile_many_refuses_bad_jobs_before_any_work(new: Compiler) -> None:
    seen: list[CompileReport] = []
    jobs = [Job(spec("add", BLOCK=64), compiler=new), Job(spec("add", BLOCK=64), "Ascend1", new)]
    with pytest.raises(ArgumentValueError, match="chip"):
        compile_many(jobs, progress=seen.append)
    assert seen == []


def test_json_and_view(new: Compiler) -> None:
    jobs = [
        Job(spec("attention", BM=64, BN=64, D=128), "Ascend910_9392", new, {"set_workspace_multibuffer": 2}),
        Job(spec("add", BLOCK=24576), compiler=new),
        Job(spec("add", BLOCK=32768), compiler=new),
        Job(spec("modulo", BLOCK=64), compiler=new),
    ]
    reports = compile_many(jobs)
    plain = json.loads(json.dumps([report.to_json() for report in reports]))
    assert plain[0]["options"] == {"set_workspace_multibuffer": 2}
    assert plain[0]["signature"]["table"] == "*i32"
    assert reports[0].label == "attention bf16 BM=64 BN=64 D=128"
    assert plain[1]["double_buffer_dropped"] is True
    assert plain[1]["problems"] == reports[1].problems()
    assert plain[2]["overflow"] == {"memory": "UB", "required": 262144, "available": 196608}
    assert plain[3]["scalar_accesses"][0]["kind"] == "element"
    console = Console(width=100, record=True, force_terminal=False)
    console.print(report_table(reports))
    lines = console.export_text().splitlines()
    rows = [line for line in lines if line.startswith(("attention", "add", "modulo"))]
    assert [[word for word in row.split() if word in ("yes", "bad", "NO")] for row in rows] == [
        ["yes"],
        ["bad"],
        ["NO"],
        ["bad"],
    ]
    assert "lost" in rows[1]
    assert max(map(len, lines)) <= 100
    console.print(report_view(reports))
    assert "UB overflow: 262144 bytes needed" in console.export_text()
