"""Every shipped entry that was tuned for an Ascend chip is found by the call that it was tuned for, and compiles."""

from __future__ import annotations

import json

import pytest

from nsa_triton.ascend.compile import Job, compile_many
from nsa_triton.ascend.toolchain import compilers
from nsa_triton.runtime.configs import Config, config_root, load
from nsa_triton.tuning.evaluation import shape_to_time
from nsa_triton.tuning.planning import asked_for, name_of, planned
from nsa_triton.tuning.timing import Place, place_named
from nsa_triton.workloads import SHAPES, Workload, workload
from tests.compiling import no_ascend

if reason := no_ascend():
    pytest.skip(reason, allow_module_level=True)

ENTRIES = [(file.parent.name, entry) for file in sorted(config_root().glob("Ascend*/*.json")) for entry in load(file)]


def asking_for(entry: Config, place: Place) -> Workload | None:
    """The call that it was tuned for, with all heads; or with those that were timed, where only a call of few heads
    launches the kernel: sums of parts. None where no call finds the entry."""
    op, shape, tokens = (entry.evidence["workload"][name] for name in ("op", "shape", "tokens"))
    for heads in (SHAPES[shape], shape_to_time(op, SHAPES[shape], tokens, place)):
        work = workload(op, heads, tokens, batch=entry.evidence["workload"]["batch"], filled=False)
        if entry in [asked.found for asked in asked_for(work, place)]:
            return work
    return None


@pytest.mark.parametrize(
    ("chip", "entry"), ENTRIES, ids=[f"{chip}-{entry.kernel}-{json.dumps(entry.key)}" for chip, entry in ENTRIES]
)
def test_a_tuned_entry_compiles_for_its_chip(chip: str, entry: Config) -> None:
    version = entry.key.get("compiler")
    if version not in {found.version for found in compilers()}:
        pytest.skip(f"ascendnpu-ir {version} is not installed; `nsa-triton compile --compiler {version}` says how")
    place = place_named(chip, version)
    work = asking_for(entry, place)
    assert work is not None
    compiler = next(found for found in compilers() if found.version == version)
    launch = next(launch for launch in planned(work, place, ()) if name_of(launch) == entry.kernel)
    [report] = compile_many([Job(launch.specialization(), chip, compiler, launch.options, entry.ub_limit)])
    assert report.problems() == []
