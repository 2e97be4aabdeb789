"""Faults planted into programs that are right: each is reported, with its kind and the line of the kernel."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.simulator_mutations import NOT_RUN, Trial, trials
from nsa_triton.ascend.chips import chip
from nsa_triton.ascend.compile import final_module
from nsa_triton.ascend.lower import Specialization, signature_of
from nsa_triton.ascend.simulator.checks import Checker
from nsa_triton.ascend.simulator.core import Core
from nsa_triton.ascend.simulator.faults import Fault, UnknownInstructionError
from nsa_triton.ascend.simulator.instruction import Instruction
from nsa_triton.ascend.simulator.memory import Memory, View
from nsa_triton.ascend.simulator.translate import translate
from nsa_triton.ascend.toolchain import compilers
from tests.ascend.simulator.mutations import CHIP, KINDS, Launched, Mutation, Outcome, mutations, observe
from tests.compiling import VERSIONS, no_ascend

MISSING = no_ascend()
if not MISSING:
    from tests.ascend.simulator import fault_kernels as kernels

needs_compiler = pytest.mark.skipif(bool(MISSING), reason=MISSING)
both_compilers = pytest.mark.parametrize("version", VERSIONS)
SOURCE = Path(__file__).with_name("fault_kernels.py")


# ---- the kernels -----------------------------------------------------------------------------------------------------


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def arguments(name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Arguments and constexprs."""
    half = torch.float16
    q, k, v = randn(16, 32, dtype=half), randn(160, 32, dtype=half), randn(160, 32, dtype=half).flip(0)
    order = torch.tensor([3, 1, 0, 2, 7, 4, 6, 5], dtype=torch.int32)
    known: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
        "add": ({"x": randn(1000), "y": randn(1000).flip(0), "z": torch.zeros(1000), "n": 1000}, {"BLOCK": 128}),
        "attend": (
            {"q": q, "k": k, "v": v, "o": torch.zeros_like(q), "n_steps": 5, "scale": 0.1},
            {"BM": 16, "BN": 32, "D": 32},
        ),
        "gather_rows": ({"x": randn(8, 64), "index": order, "y": torch.zeros(8, 64), "n": 8}, {"D": 64}),
        "halves": ({"x": randn(2, 64), "y": torch.zeros(96)}, {"BLOCK": 64}),
        "last_row": ({"x": randn(3, 64), "y": torch.zeros(3, 64)}, {"BLOCK": 64}),
    }
    return known[name]


def expected(name: str) -> Tensor:
    values: Mapping[str, Any] = arguments(name)[0]
    result: Tensor
    if name == "add":
        result = values["x"].exp() + values["y"]
    elif name == "attend":
        q, k, v = (values[key].float() for key in "qkv")
        result = ((q @ k.T * values["scale"]).softmax(1) @ v).half()
    else:
        rows = values["x"][values["index"].long()]
        result = rows * torch.where(rows.sum(1, keepdim=True) < 0, -1.0, 1.0)
    return result


@functools.cache
def launched(name: str, version: str) -> Launched:
    compiler = next((found for found in compilers() if found.version == version), None)
    if compiler is None:
        pytest.skip(f"ascendnpu-ir {version} is not installed; `nsa-triton compile --compiler {version}` says how")
    values, constexprs = arguments(name)
    spec = Specialization(getattr(kernels, name), signature_of(values), constexprs)
    text = final_module(spec, CHIP, compiler=compiler)
    return Launched(name, version, text, {"attend": 1, "last_row": 3}.get(name, 2), values)


def line_of(text: str) -> str:
    """Where in the kernels' file a statement stands."""
    number = next(i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if text in line)
    return f"simulator/{SOURCE.name}:{number}"


def planted(launch: Launched, kind: str, *words: str) -> Mutation:
    """The first place for a fault whose line has these words."""
    for mutation in mutations(launch.text, kind, random.Random(0)):
        line = launch.text.splitlines()[mutation.line - 1]
        if all(word in f"{line} {mutation.detail}" for word in words):
            return mutation
    raise AssertionError(f"no place for {kind} in {launch.name}, {words}")


def seen(launch: Launched, kind: str, *words: str) -> Outcome:
    return observe(launch, planted(launch, kind, *words).text)


def flag(source: str, target: str) -> tuple[str, str]:
    return f"set_pipe = #hivm.pipe<PIPE_{source}>", f"wait_pipe = #hivm.pipe<PIPE_{target}>"


def races(outcome: Outcome, instruction: str, other: str) -> list[Fault]:
    """The races of one instruction with another one."""
    assert not outcome.error
    words = (f"{instruction} of", f"while hivm.hir.{other} of")
    found = [f for f in outcome.faults if f.kind == "race" and all(word in f.message for word in words)]
    assert found, [str(fault) for fault in outcome.faults]
    return found


@needs_compiler
@both_compilers
@pytest.mark.parametrize("name", ["add", "attend", "gather_rows"])
def test_kernels_are_right_and_clean(name, version):
    outcome = observe(launched(name, version))
    assert not outcome.error
    assert not outcome.faults
    result = outcome.tensors[{"add": "z", "attend": "o", "gather_rows": "y"}[name]]
    torch.testing.assert_close(result, expected(name), rtol=1e-5, atol=2e-3 if name == "attend" else 1e-6)


# ---- order within a core ---------------------------------------------------------------------------------------------


@needs_compiler
@both_compilers
def test_a_missing_wait_is_a_race_and_leaves_its_flag(version):
    outcome = seen(launched("add", version), "wait_flag deleted", *flag("MTE2", "V"))
    assert {fault.source for fault in races(outcome, "vexp", "load")} == {line_of("tl.exp(b_x)")}
    assert line_of("tl.load(x + o, mask=m") in races(outcome, "vexp", "load")[0].message
    assert {"flag set twice", "flag left set"} <= set(outcome.kinds)


@needs_compiler
@both_compilers
def test_a_flag_that_nobody_sets_stops_the_program(version):
    outcome = seen(launched("add", version), "set_flag deleted", *flag("V", "MTE3"))
    assert outcome.error.startswith("deadlock: MTE3 of AIV 0 of block 0 waits for a flag of V, event ")
    assert line_of("tl.store(z + o") in outcome.error


@needs_compiler
@both_compilers
def test_a_wait_for_another_event_stops_the_program(version):
    outcome = seen(launched("gather_rows", version), "wait for another event", *flag("MTE2", "V"))
    assert outcome.error.startswith("deadlock: V of AIV 0 of block 0 waits for a flag of MTE2, event ")
    assert SOURCE.name in outcome.error


@needs_compiler
@both_compilers
def test_a_wait_of_another_pipe_stops_the_program(version):
    outcome = seen(launched("gather_rows", version), "wait of another pipe", *flag("V", "S"))
    assert outcome.error.startswith("deadlock: ")
    assert line_of("tl.sum(b_x, 0)") in outcome.error


@needs_compiler
@both_compilers
def test_a_missing_flag_is_a_race(version):
    """Set and wait are both missing, so nothing but the order tells."""
    outcome = seen(launched("add", version), "flag deleted", *flag("V", "MTE3"))
    assert {fault.source for fault in races(outcome, "store", "vadd")} == {line_of("tl.store(z + o")}
    assert outcome.kinds == ("race",)


@needs_compiler
@both_compilers
def test_a_flag_of_another_pipe_is_a_race(version):
    outcome = seen(launched("add", version), "flag of another pipe", *flag("V", "MTE3"))
    assert {fault.source for fault in races(outcome, "store", "vadd")} == {line_of("tl.store(z + o")}


@needs_compiler
@both_compilers
@pytest.mark.parametrize("kind", ["barrier deleted", "barrier of another pipe"])
def test_a_missing_barrier_is_a_race(kind, version):
    """Instructions of one pipe overlap."""
    launch = launched("add", version)
    found = [observe(launch, mutation.text) for mutation in mutations(launch.text, kind, random.Random(0))]
    outcome = next(outcome for outcome in found if outcome.faults)
    assert {fault.source for fault in races(outcome, "vadd", "vexp")} == {line_of("tl.exp(b_x) + b_y")}


@needs_compiler
@both_compilers
def test_an_instruction_before_its_wait_is_a_race(version):
    outcome = seen(launched("add", version), "instruction before its wait", *flag("V", "MTE3"))
    assert {fault.source for fault in races(outcome, "store", "vadd")} == {line_of("tl.store(z + o")}


@needs_compiler
@both_compilers
def test_an_instruction_behind_its_flag_is_a_race(version):
    outcome = seen(launched("add", version), "instruction behind its flag", *flag("MTE2", "V"))
    assert {fault.source for fault in races(outcome, "vexp", "load")} == {line_of("tl.exp(b_x)")}


@needs_compiler
@both_compilers
def test_a_store_before_what_it_stores_is_reported(version):
    outcome = seen(launched("gather_rows", version), "instruction moved up", '"hivm.hir.store"')
    assert {fault.source for fault in races(outcome, "vmul", "store")} == {line_of("b_x * sign")}


@needs_compiler
@both_compilers
def test_a_flag_set_twice_is_reported(version):
    outcome = seen(launched("add", version), "set_flag doubled", *flag("V", "MTE3"))
    assert {"flag left set", "flag set twice"} <= set(outcome.kinds)
    (fault,) = (fault for fault in outcome.faults if fault.kind == "flag set twice")
    assert fault.message.startswith("V to MTE3, event ")
    assert SOURCE.name in fault.source


@needs_compiler
@both_compilers
def test_a_flag_that_is_left_set_is_reported(version):
    """The last wait of the program orders nothing, but the next program would find the flag."""
    launch = launched("add", version)
    last = mutations(launch.text, "wait_flag deleted", random.Random(0))[-1]
    outcome = observe(launch, last.text)
    assert outcome.kinds == ("flag left set",)
    assert all(" of AIV is still set" in fault.message for fault in outcome.faults)


# ---- order between cores and blocks ----------------------------------------------------------------------------------


@needs_compiler
@both_compilers
def test_a_missing_wait_for_another_core_is_a_race(version):
    """Products leave the cube core through the workspace, and their factors come back the same way."""
    launch = launched("attend", version)
    places = mutations(launch.text, "sync_block_wait deleted", random.Random(0))
    faults = [fault for mutation in places for fault in observe(launch, mutation.text).faults]
    assert any("load of AIV reads workspace while hivm.hir.fixpipe of AIC" in fault.message for fault in faults)
    assert any("nd2nz of AIC reads workspace while hivm.hir.store of AIV" in fault.message for fault in faults)
    assert all(SOURCE.name in fault.source for fault in faults if fault.kind == "race")


@needs_compiler
@both_compilers
def test_a_core_that_waits_for_ever_is_named(version):
    launch = launched("attend", version)
    errors = [
        observe(launch, mutation.text).error
        for mutation in mutations(launch.text, "sync_block_set deleted", random.Random(0))[::2]
    ]
    assert all(error.startswith("deadlock: ") and SOURCE.name in error for error in errors)
    assert any("AIC of block 0 waits for another core's flag" in error for error in errors)
    assert any("AIV 1 of block 0 waits for another core's flag" in error for error in errors)


@needs_compiler
@both_compilers
def test_two_blocks_that_write_the_same_bytes(version):
    (fault,) = observe(launched("halves", version)).faults
    assert fault.kind == "race"
    assert "two blocks write the same bytes of y" in fault.message
    assert fault.source == line_of("tl.store(y + i * (BLOCK // 2)")


@needs_compiler
@both_compilers
def test_a_block_that_writes_what_others_read(version):
    """It reads these bytes itself, too, and after the others."""
    (fault,) = observe(launched("last_row", version)).faults
    assert fault.kind == "race"
    assert "writes bytes of x that another block reads" in fault.message
    assert fault.source == line_of("tl.store(x + i * BLOCK")


# ---- values, addresses and views -------------------------------------------------------------------------------------


@needs_compiler
@both_compilers
def test_bytes_that_nobody_wrote_do_not_reach_a_tensor(version):
    outcome = seen(launched("add", version), "load deleted", '"hivm.hir.load"')
    assert not outcome.error
    assert outcome.kinds == ("undefined",)
    assert {f.source for f in outcome.faults} == {line_of("tl.store(z + o")}
    assert all("nobody wrote reaches z" in fault.message for fault in outcome.faults)


@needs_compiler
@both_compilers
def test_bytes_that_nobody_wrote_do_not_reach_the_scalar_unit(version):
    outcome = seen(launched("gather_rows", version), "load deleted")
    faults = [fault for fault in outcome.faults if "the scalar unit reads a value made of bytes" in fault.message]
    assert {f.source for f in faults} == {line_of("tl.sum(b_x, 0)")}


@needs_compiler
@both_compilers
def test_bytes_that_nobody_wrote_go_through_a_product(version):
    launch = launched("attend", version)
    for mutation in mutations(launch.text, "load deleted", random.Random(0)):
        outcome = observe(launch, mutation.text)
        assert any(fault.kind == "undefined" and "reaches o" in fault.message for fault in outcome.faults), mutation


@needs_compiler
@both_compilers
@pytest.mark.parametrize("name", ["add", "attend", "gather_rows"])
def test_a_view_outside_its_tensor_stops_the_program(name, version):
    launch = launched(name, version)
    places = mutations(launch.text, "view outside its tensor", random.Random(0))
    assert places
    for mutation in places:
        error = observe(launch, mutation.text).error
        assert error.startswith("out of bounds: hivm.hir."), mutation
        assert SOURCE.name in error


@needs_compiler
@both_compilers
def test_a_view_that_begins_one_element_late_is_reported(version):
    launch = launched("add", version)
    right = observe(launch)
    for mutation in mutations(launch.text, "view shifted", random.Random(0)):
        assert observe(launch, mutation.text).detected_by(right), mutation


@needs_compiler
@both_compilers
def test_buffers_that_overlap_are_a_race(version):
    launch = launched("add", version)
    for mutation in mutations(launch.text, "buffer moved", random.Random(0)):
        outcome = observe(launch, mutation.text)
        assert "race" in outcome.kinds, mutation
        assert {SOURCE.name} == {fault.source.partition("/")[2].partition(":")[0] for fault in outcome.faults}


@needs_compiler
@both_compilers
def test_addresses_of_buffers_that_are_alive_at_once(version):
    """Halves of a double buffer may be swapped: that is the same program. Swapped with others, it is a race."""
    launch = launched("attend", version)
    right = observe(launch)
    found = [
        observe(launch, mutation.text).detected_by(right)
        for mutation in mutations(launch.text, "addresses swapped", random.Random(0))
    ]
    assert "race" in found
    assert "" in found


# ---- ops that the simulator does not know ----------------------------------------------------------------------------


@needs_compiler
@both_compilers
@pytest.mark.parametrize(
    ("known", "unknown"),
    [("hivm.hir.vexp", "hivm.hir.vfancy"), ("arith.muli", "arith.fancy"), ("memref.subview", "memref.fancy"),
     ("scf.if", "scf.while"), ("arith.muli", "math.absi")],
)  # fmt: skip
def test_an_unknown_op_is_refused_by_name(known, unknown, version):
    launch = launched("add", version)
    assert f'"{known}"' in launch.text
    with pytest.raises(UnknownInstructionError, match=rf"{unknown} at [\w/]*{SOURCE.name}:\d+: the simulator"):
        translate(launch.text.replace(f'"{known}"', f'"{unknown}"'))


# ---- what the checker remembers --------------------------------------------------------------------------------------


class Team:
    """Cores of one block under a checker, for which a test spells the program."""

    def __init__(self, *roles: str) -> None:
        self.checker = Checker()
        vectors = iter(range(2))
        self.cores = [
            Core(chip(CHIP), role, 0, next(vectors) if role == "AIV" else 0, 1, checker=self.checker) for role in roles
        ]
        for core in self.cores:
            core.peers = [other for other in self.cores if other.role != core.role]

    @property
    def faults(self) -> list[str]:
        return [str(fault) for fault in self.checker.faults]


def instruction(name: str, pipe: str, **attributes: str) -> Instruction:
    return Instruction(0, name, pipe, attributes, (slice(0, 1), slice(1, 2)), "k.py:1")


def wait_and_set(source: str, target: str) -> tuple[Instruction, Instruction]:
    pipes = {"set_pipe": f"PIPE_{source}", "wait_pipe": f"PIPE_{target}"}
    return instruction("set_flag", "S", **pipes), instruction("wait_flag", "S", **pipes)


@pytest.mark.parametrize("synchronised", [True, False])
def test_the_vector_unit_has_to_wait_for_the_scalar_unit(synchronised):
    """Also for its last access but one: that the scalar unit works in order does not show others what it wrote."""
    team = Team("AIV")
    (core,) = team.cores
    element, other, out = (core.buffer("UB", "f32", address, (1,)) for address in (0, 32, 64))
    core.store(instruction("store", "S"), np.float32(1), element, (0,))
    core.store(instruction("store", "S"), np.float32(1), other, (0,))
    set_, wait = wait_and_set("S", "V")
    if synchronised:
        core.set_flag(set_, 0)
        core.wait_flag(wait, 0)
    core.tile(instruction("vexp", "V"), (element, out))
    assert bool(team.faults) is not synchronised


SAME, OTHER = np.arange(8, dtype=np.float32), np.arange(8, dtype=np.float32)[::-1]


def stores(team: Team, values: Sequence[np.ndarray], target: View, ops: Sequence[Instruction]) -> None:
    """Each vector core stores eight numbers into the workspace."""
    set_, wait = wait_and_set("V", "MTE3")
    for core, value, op in zip(team.cores[1:], values, ops, strict=True):
        tile = core.buffer("UB", "f32", 0, (8,))
        core.tile(instruction("vexp", "V"), (tile, tile))
        tile.write(value)
        core.set_flag(set_, 0)
        core.wait_flag(wait, 0)
        core.tile(op, (tile, target))


def workspace() -> View:
    memory = Memory("workspace", "workspace", np.full(64, 0xFF, np.uint8))
    memory.follow()
    return View(memory, "f32", 0, (8,))


@pytest.mark.parametrize(
    ("values", "twice", "is_right"),
    [((SAME, SAME), True, True), ((SAME, OTHER), True, False), ((SAME, SAME), False, False)],
    ids=["the same", "other numbers", "by another instruction"],
)
def test_both_vector_cores_may_store_the_same(values, twice, is_right):
    team, target, op = Team("AIC", "AIV", "AIV"), workspace(), instruction("store", "MTE3")
    stores(team, values, target, [op, op if twice else instruction("store", "MTE3")])
    assert (not team.faults) is is_right


@pytest.mark.parametrize("waits_for", [0, 1, 2])
def test_both_stores_have_to_be_done_before_the_bytes_change(waits_for):
    """The second one changed nothing, but would if it came later."""
    team, target, op = Team("AIC", "AIV", "AIV"), workspace(), instruction("store", "MTE3")
    stores(team, (SAME, SAME), target, [op, op])
    cube, *vectors = team.cores
    for vector in vectors[:waits_for]:
        team.checker.acquire(cube, "S", team.checker.release(vector, "MTE3"))
    product = cube.buffer("L0C", "f32", 0, (1, 1, 16, 16))
    cube.tile(instruction("fixpipe", "FIX"), (product, View(target.memory, "f32", 0, (1, 8))))
    assert bool(team.faults) is (waits_for < 2)


# ---- many at once ----------------------------------------------------------------------------------------------------

# Of each kind, the least share of faults that are detected: both compilers place buffers differently from one run to
# the next. The others are none in these runs, as is shown for each of them: another flag orders the same, nothing that
# is ordered touches the same bytes, or buffers are never alive at once.
RATES = {
    "barrier deleted": 0.3, "barrier of another pipe": 0.0, "flag deleted": 0.6, "sync_block flag deleted": 0.5,
    "sync_block_wait deleted": 0.0, "instruction before its wait": 0.3, "instruction behind its flag": 0.3,
    "instruction moved up": 0.6, "addresses swapped": 0.0, "buffers swapped": 0.0, "buffer moved": 0.3,
}  # fmt: skip


@functools.cache
def campaign(version: str) -> list[Trial]:
    return [
        trial
        for name, count in {"add": 36, "attend": 21}.items()
        for trial in trials(launched(name, version), count, seed=7)
    ]


@needs_compiler
@both_compilers
def test_no_planted_fault_is_missed(version):
    missed = [f"{trial.kernel} {trial.mutation}: {trial.verdict}" for trial in campaign(version) if trial.missed]
    assert not missed


@needs_compiler
@both_compilers
@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_of_detection(kind, version):
    own = [trial for trial in campaign(version) if trial.kind == kind and trial.verdict != NOT_RUN]
    assert own
    assert sum(trial.detected for trial in own) >= RATES.get(kind, 1.0) * len(own)


@needs_compiler
@both_compilers
def test_the_checker_finds_all_races_that_the_exact_order_finds(version):
    """Also where another fault was reported, in all runs that came to their end."""
    assert not [str(trial) for trial in campaign(version) if trial.exact and trial.disagrees]
