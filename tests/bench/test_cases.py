"""The cases cover every op once, and bad requests name the valid ones."""

from __future__ import annotations

import pytest

from bench.cases import CASES, DEFAULT, PROVIDERS, Wanted, points
from bench.rates import GPUS, rates_of
from nsa_triton.errors import ArgumentValueError
from nsa_triton.runtime.target import Target
from nsa_triton.workloads import INDICES, OPS, SHAPES


def test_every_op_has_one_case():
    assert sorted(case.op for case in CASES) == sorted(OPS)
    for case in CASES:
        assert case.shape in SHAPES
        assert set(case.providers) <= set(PROVIDERS)
        assert ("sdpa" in case.providers) == ("attention" in case.op)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_points_are_those_of_the_cases(on_cpu):
    found = list(points(Wanted(), on_cpu=on_cpu))
    assert len(found) == sum(len(case.cpu_lengths if on_cpu else case.lengths) for case in CASES)
    assert all(set(point.providers) <= set(DEFAULT) for point in found)


def test_what_is_wanted_replaces_what_the_cases_say():
    wanted = Wanted(
        ops=["nsa_select_attention", "nsa_compress"],
        shapes=["gqa-d64-g1", "gqa-d64-g4"],
        lengths=[128, 256],
        providers=["sdpa", "ours"],
        indices=INDICES,
    )
    found = list(points(wanted, on_cpu=True))
    assert len([point for point in found if point.op == "nsa_select_attention"]) == 2 * 2 * 3
    compress = [point for point in found if point.op == "nsa_compress"]
    assert len(compress) == 2 * 2, "nothing is selected there"
    assert {point.providers for point in compress} == {("ours",)}
    assert {point.providers for point in found if point.op != "nsa_compress"} == {("sdpa", "ours")}


def test_quick_has_every_op_once():
    assert [point.op for point in points(Wanted(quick=True), on_cpu=True)] == [case.op for case in CASES]


@pytest.mark.parametrize(
    ("wanted", "valid"),
    [
        (Wanted(ops=["nsa_dream"]), OPS),
        (Wanted(shapes=["papr"]), SHAPES),
        (Wanted(providers=["flash"]), PROVIDERS),
        (Wanted(indices=["uniform"]), INDICES),
        (Wanted(lengths=[16]), ["32"]),
        (Wanted(lengths=[1 << 30]), ["32"]),
    ],
)
def test_bad_requests_name_the_valid_ones(wanted, valid):
    with pytest.raises(ArgumentValueError) as error:
        list(points(wanted, on_cpu=True))
    assert all(name in str(error.value) for name in valid)


def test_rates_are_those_of_chips_and_known_gpus():
    assert rates_of("cpu") is None
    chip = rates_of("Ascend910B2")
    assert chip is not None
    assert chip.bytes == 1600e9
    assert chip.flops == 24 * 2 * 16**3 * 1.8e9, "cores, products of a cube per cycle, cycles"
    for name, rates in GPUS.items():
        assert Target("cuda", name, 1, 1).name == name == name.lower().replace(" ", "-")
        assert rates_of(name) is rates
        assert rates.source
    assert chip.least_us(flops=0, moved=1_600_000) == pytest.approx(1)
    assert chip.least_us(flops=int(chip.flops), moved=0) == pytest.approx(1e6)
