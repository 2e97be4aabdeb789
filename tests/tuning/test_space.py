"""The declared spaces fit the kernels, and lower bounds are lower bounds: they never exceed what the compiler needs."""

from __future__ import annotations

import pytest

from nsa_triton.ascend.bishengir import compile_flags
from nsa_triton.ascend.chips import chip
from nsa_triton.ascend.compile import Job, compile_many
from nsa_triton.ascend.toolchain import compilers
from nsa_triton.ops.catalog import FAMILIES
from nsa_triton.runtime.configs import TILE_MAX, TILE_STEP
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import ascend_target
from nsa_triton.tuning.planning import asked_for, name_of
from nsa_triton.tuning.space import NEEDS, SPACES, Needs, disagreement, needs, space_of
from nsa_triton.tuning.timing import place_named
from nsa_triton.workloads import OPS, workload
from tests.tuning.sweeps import CHIP, TINY, needs_toolchain

ALL = [(family, space) for family, spaces in SPACES.items() for space in spaces]
each_space = pytest.mark.parametrize(("family", "space"), ALL, ids=lambda one: getattr(one, "kernel", one))


@each_space
def test_sizes_are_legal_and_ascend(family, space):
    for sizes in space.tiles.values():
        assert list(sizes) == sorted(set(sizes))
        assert all(size % TILE_STEP == 0 and TILE_STEP <= size <= TILE_MAX for size in sizes)
    assert len(list(space.candidates())) > 1


@each_space
def test_a_kernel_is_timed_with_what_it_decides(family, space):
    assert space.timed[0] == space.kernel


@needs_toolchain
@each_space
def test_every_compiler_knows_the_options(family, space):
    for compiler in compilers():
        for options in space.options("npu"):
            assert compile_flags(CHIP, compiler, options)


def test_on_a_gpu_tiles_are_powers_of_two():
    space = space_of("select_attention", "select_attention_fwd")
    sizes = {size for tiles in space.candidates("cuda") for size in tiles.values()}
    assert sizes == {16, 32, 64, 128, 256}


def test_options_are_those_of_the_kind():
    space = space_of("compress", "compress_fwd")
    assert {"num_warps": 8, "num_stages": 2} in space.options("cuda")
    assert {"multibuffer": False} in space.options("npu")
    assert space.options("cpu") == ({},)


@needs_toolchain
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_of_every_op_has_a_space_with_its_tiles(op):
    place = place_named(CHIP, None)
    family = next(family for family in FAMILIES if op in {one.name for one in family.ops})
    asked = asked_for(workload(op, TINY, 256, filled=False), place)
    assert asked
    for one in asked:
        assert one.family == family.name
        assert set(space_of(one.family, one.kernel).tiles) == set(one.tiles)
        assert dict(one.key)["compiler"] == place.target.compiler


def test_the_choice_of_blocks_divides_the_rows_of_the_scores():
    assert disagreement("compress_attention_choose", {"BQ": 48, "BR": 32})
    assert not disagreement("compress_attention_choose", {"BQ": 64, "BR": 32})
    assert not disagreement("compress_attention_choose", {"BJ": 16})  # that of the op for decoding


def test_memories_are_full_at_their_size():
    one = chip(CHIP)
    for memory, field in (("L0C", "l0c"), ("L1", "l1")):
        size = one.memory(memory)
        assert not Needs(**{field: size}).refusal(one, 80)
        assert Needs(**{field: size + 1}).refusal(one, 80).startswith(f"{memory}: at least {size + 1} bytes")
    assert not Needs(ub=one.ub * 8 // 10).refusal(one, 80)
    assert "80 % of" in Needs(ub=one.ub * 8 // 10 + 1).refusal(one, 80)
    assert not Needs(ub=one.ub).refusal(one, 100)


def test_products_that_cannot_fit_are_refused():
    """128 rows of 512 float32 columns are twice the L0C."""
    c = {"BQ": 128, "BN": 512, "BE": 64, "BK": 192, "BV": 128}
    assert needs("attention_fwd", c, 2).refusal(chip(CHIP), 80).startswith("L0C")
    assert not needs("attention_fwd", {**c, "BN": 128}, 2).refusal(chip(CHIP), 100)


def test_kernels_without_bounds_are_left_to_the_compiler():
    assert needs("select_attention_place", {"BO": 512}, 2) == Needs()


def _launches():
    target = ascend_target(chip(CHIP))
    found: dict[str, Launch] = {}
    for family in FAMILIES:
        for launch in next(iter(family.compile_cases())).plans(target):
            found.setdefault(name_of(launch), launch)
    return found


@needs_toolchain
def test_bounds_are_below_what_the_compiler_plans():
    """For every kernel that has one."""
    launches = _launches()
    assert set(NEEDS) <= set(launches)
    jobs = [Job(launches[name].specialization(), CHIP, None, launches[name].options, 100) for name in NEEDS]
    for name, report in zip(NEEDS, compile_many(jobs), strict=True):
        bound = needs(name, launches[name].constexprs, 2)
        assert report.fits, name
        assert bound.ub > 0, name
        for memory, least in (("L0C", bound.l0c), ("L1", bound.l1), ("UB", bound.ub)):
            assert least <= report.used[memory], (name, memory)
