"""Every shipped entry that was tuned for an Ascend chip is found by the call that it was tuned for, and compiles."""

from __future__ import annotations

import json

import pytest

from nsa_triton.ascend.compile import Job, compile_many
from nsa_triton.ascend.toolchain import compilers
from nsa_triton.runtime.configs import Config, config_root, load
from nsa_triton.tuning.planning import asked_for, name_of, planned
from nsa_triton.tuning.timing import place_named
from nsa_triton.workloads import SHAPES, workload
from tests.compiling import no_ascend

if reason := no_ascend():
    pytest.skip(reason, allow_module_level=True)

ENTRIES = [(file.parent.name, entry) for file in sorted(config_root().glob("Ascend*/*.json")) for entry in load(file)]


@pytest.mark.parametrize(
    ("chip", "entry"), ENTRIES, ids=[f"{chip}-{entry.kernel}-{json.dumps(entry.key)}" for chip, entry in ENTRIES]
)
def test_a_tuned_entry_compiles_for_its_chip(chip: str, entry: Config) -> None:
    version, tuned = entry.key.get("compiler"), entry.evidence["workload"]
    if version not in {found.version for found in compilers()}:
        pytest.skip(f"ascendnpu-ir {version} is not installed; `nsa-triton compile --compiler {version}` says how")
    place = place_named(chip, version)
    work = workload(tuned["op"], SHAPES[tuned["shape"]], tuned["tokens"], batch=tuned["batch"], filled=False)
    assert entry in [asked.found for asked in asked_for(work, place)]
    compiler = next(found for found in compilers() if found.version == version)
    launch = next(launch for launch in planned(work, place, ()) if name_of(launch) == entry.kernel)
    [report] = compile_many([Job(launch.specialization(), chip, compiler, launch.options, entry.ub_limit)])
    assert report.problems() == []
