"""A sweep from plan to entry: with verdicts that are given, killed half-way, with wrong candidates, and end to end."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch

import nsa_triton
from nsa_triton.ascend.compile import final_module
from nsa_triton.ascend.simulator.checks import Checker
from nsa_triton.ascend.simulator.faults import Fault, TooSlowError
from nsa_triton.ascend.toolchain import compiler
from nsa_triton.errors import ToolchainError
from nsa_triton.ops.catalog import families
from nsa_triton.runtime import configs
from nsa_triton.runtime.configs import load
from nsa_triton.runtime.executors.simulator import SimulatorExecutor
from nsa_triton.runtime.simulation import simulated_times, simulating
from nsa_triton.runtime.target import target_of
from nsa_triton.tuning import evaluation, gate, merge, planning, plans, tune
from nsa_triton.tuning import workers as team
from nsa_triton.tuning.evaluation import evaluate
from nsa_triton.tuning.gate import slower_when_longer, what_is_wrong
from nsa_triton.tuning.journal import journal_path
from nsa_triton.tuning.result import Result, entry
from nsa_triton.tuning.space import space_of
from nsa_triton.tuning.sweep import Verdict
from nsa_triton.tuning.timing import place_named
from nsa_triton.tuning.tune import Interrupted, Output
from nsa_triton.tuning.workers import Processes, workers
from nsa_triton.workloads import SHAPES, workload
from tests.tuning.sweeps import CHIP, TINY, candidate, needs_toolchain, small_space, timed, tiny_plan, tiny_sweep

pytestmark = needs_toolchain


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """A cache whose journals are ours; compiled code comes from the usual place."""
    from nsa_triton.settings import settings

    usual = settings().cache_dir
    ours = tmp_path / "cache"
    ours.mkdir()
    for name in ("native", "compilers"):
        if (usual / name).exists():
            (ours / name).symlink_to(usual / name)
    monkeypatch.setenv("NSA_TRITON_CACHE_DIR", str(ours))
    yield
    merge.forget_configs()


class Told:
    """Keeps what it is told."""

    def __init__(self):
        self.known, self.tried = [], []

    def begin(self, sweep, search, known):
        self.known.append(known)

    def heard(self, search, candidate, verdict):
        self.tried.append(candidate)


@pytest.fixture
def rank(monkeypatch):
    """Replace what candidates come to; the gate lets all of them pass."""

    def ranked(verdict):
        class Given:
            size = 1

            def submit(self, sweep, one):
                done: Future[Verdict] = Future()
                done.set_result(verdict(one))
                return done

        monkeypatch.setattr("nsa_triton.tuning.workers.Here", Given)
        monkeypatch.setattr(plans, "winners", lambda *_: [])  # what ships must not matter here
        for asked in ("what_is_wrong", "slower_when_longer"):
            monkeypatch.setattr(tune, asked, lambda sweep, one: "")

    return ranked


def searched(tmp_path, told=None, **more):
    (result,) = tune.tune([tiny_sweep()], Output(tmp_path / "configs"), told or Told(), workers="1", **more)
    return result


def entries(tmp_path):
    return json.loads((tmp_path / "configs" / CHIP / "compress_infer.json").read_text())["entries"]


SMALLEST = candidate(BD=16)
ALL = 7  # four sizes, and three of them with one buffer


def smaller_is_better(one):
    return timed(float(dict(one.tiles)["BD"]))


# ---- what is planned ----


def test_the_default_is_that_of_the_files_and_equal_launches_are_tried_once():
    planned = tiny_plan()
    assert dict(planned.default.tiles) == {"BD": 512}
    # Wider ones are cut to the 64 columns of a head, as the default's are.
    assert {dict(one.tiles)["BD"] for one in planned.tiles} == {16, 32, 48}
    assert planned.twin == candidate(BD=64)
    assert dict(planned.asked.key) == {"itemsize": 2, "head_dim": 64, "piece": 16, "compiler": planned.sweep.compiler}


def test_others_are_tuned_if_they_come_before_and_defaults_if_they_come_later(monkeypatch):
    """So a sweep stays the same when those behind it are tuned."""
    request = plans.Request(["nsa_compress_grad"], [(CHIP, None)], [TINY], [256])
    names = ("compress_bwd_dx", "compress_bwd_dw", "sum_parts")
    found = {sweep.kernel: sweep for sweep in plans.sweeps(request)}
    assert tuple(found) == names
    defaults = {name: plans.default_of(found[name]) for name in names}

    def others_of(name):
        chosen = dict(evaluation.choices(found[name], defaults[name]))
        assert set(chosen) == set(names)
        assert chosen.pop(name) == defaults[name]
        return chosen

    assert others_of("compress_bwd_dx") == {name: defaults[name] for name in names[1:]}
    tuned = candidate(BT=16, BD=64)
    files_say({"compress_bwd_dw": tuned}, monkeypatch)
    assert others_of("compress_bwd_dx")["compress_bwd_dw"] == defaults["compress_bwd_dw"]
    assert others_of("sum_parts")["compress_bwd_dw"] == tuned


def test_others_have_the_configs_that_a_candidates_tiles_make_them_ask_for():
    request = plans.Request(["nsa_select_attention"], [(CHIP, "1.2.0")], [SHAPES["gqa-d64-g4"]], [256])
    (sweep,) = (one for one in plans.sweeps(request) if one.kernel == "select_attention_fwd")
    columns = {
        rows: dict(dict(evaluation.choices(sweep, candidate(BR=rows, BN=64)))["select_attention_union"].tiles)["BC"]
        for rows in (16, 64)
    }
    assert columns == {16: 64, 64: 16}, "with 64 ids per tile, and with 256, which leave room for fewer"


def files_say(tuned, monkeypatch):
    """Look-ups of evaluations find these, as if files said so; those of default/ do not."""
    real = planning.asked_for

    def asked_for(*arguments):
        return [
            replace(one, found=replace(one.found, tiles=dict(tuned[one.kernel].tiles), options={}))
            if one.kernel in tuned
            else one
            for one in real(*arguments)
        ]

    monkeypatch.setattr(evaluation, "asked_for", asked_for)


def test_a_kernel_that_two_ops_share_is_tuned_once():
    request = plans.Request(["select_attention"], [(CHIP, None)], [TINY], [256])
    kernels = [sweep.kernel for sweep in plans.sweeps(request)]
    assert len(kernels) == len(set(kernels))
    assert kernels.count("select_attention_union") == 1


def test_winners_of_other_chips_are_tried_early(tmp_path, monkeypatch):
    def file(target, *tiles_and_how):
        found = [
            {"kernel": "compress_infer", "key": {"piece": 2 * size}, "length": 0, "tiles": {"BD": size},
             "options": {}, "evidence": {"how": how}} for size, how in tiles_and_how
        ]  # fmt: skip
        found += [{**found[0], "kernel": "another"}]
        text = json.dumps({"schema": 1, "op": "compress_infer", "target": target, "entries": found})
        (tmp_path / target).mkdir()
        (tmp_path / target / "compress_infer.json").write_text(text)

    file("default", (256, "default"))
    file("Ascend910B4", (48, "simulated"), (96, "measured"))
    file("Ascend910_9392", (96, "simulated"))
    monkeypatch.setattr(plans, "config_roots", lambda: (tmp_path,))
    merge.forget_configs()
    space = space_of("compress_infer", "compress_infer")
    assert plans.winners(space, "compress_infer", "npu", {"piece": 16}) == [candidate(BD=48), candidate(BD=96)]
    assert plans.winners(space, "compress_infer", "npu", {"piece": 192}) == [candidate(BD=96), candidate(BD=48)]


@pytest.mark.parametrize(
    ("op", "chip", "heads"),
    [
        ("nsa_compress_attention", CHIP, 8),  # 65,536 rows of 8,192 tokens
        ("nsa_select_attention_grad", CHIP, 4),  # a tile holds few tokens, of one kv head
        ("nsa_sliding_window_attention", "cpu", 32),  # measured as it is
        ("nsa_select_attention_infer", CHIP, 32),  # one token for each head
        ("nsa_compress", CHIP, 32),
    ],
)
def test_training_attention_is_simulated_with_a_part_of_its_heads(op, chip, heads):
    shape = replace(TINY, heads=32, kv_heads=8)
    found = plans.sweeps(plans.Request([op], [(chip, None)], [shape], [8192]))
    assert {sweep.shape.heads for sweep in found} == {heads}
    assert {sweep.shape.group for sweep in found} == {4}


def test_another_workload_compiler_or_limit_is_another_sweep():
    ways: tuple[dict[str, Any], ...] = ({}, {"tokens": [128]}, {"ub_limit": 90}, {"shapes": [replace(TINY, heads=8)]})
    files = {str(journal_path(one.sweep, one.identity)) for one in (tiny_plan(**way) for way in ways)}
    assert len(files) == len(ways)


@pytest.mark.parametrize(
    ("chip", "like"), [(CHIP, CHIP), ("Ascend910_9392", CHIP), ("Ascend910B4-1", "Ascend910B4"), ("Ascend910B1",) * 2]
)
def test_chips_that_the_model_cannot_tell_apart_share_verdicts(chip, like):
    """Cores, memories, clock and bandwidth are the same; Ascend910B1 has a faster clock."""
    found, other = (tiny_plan(chips=[(name, None)]) for name in (chip, like))
    assert found.identity["chip"] == like
    assert journal_path(found.sweep, found.identity) == journal_path(other.sweep, other.identity)


def test_both_get_entries_of_their_own(tmp_path, rank):
    asked = []

    def once(one):
        asked.append(one)
        return smaller_is_better(one)

    rank(once)
    names = (CHIP, "Ascend910_9392")
    wanted = [tiny_sweep(chips=[(name, None)]) for name in names]
    found = tune.tune(wanted, Output(tmp_path), Told(), workers="1")
    assert [result.best for result in found] == [SMALLEST] * 2
    assert len(asked) == ALL
    chips = [json.loads((tmp_path / name / "compress_infer.json").read_text())["entries"][0] for name in names]
    assert [entry["evidence"]["chip"] for entry in chips] == list(names)


def test_the_compiler_makes_the_same_program_for_both():
    """But for addresses, which differ from build to build."""
    work = workload("nsa_compress_infer", TINY, 64, filled=False)
    place = place_named(CHIP, None)
    (launch,) = planning.planned(work, place, ())
    texts = [
        final_module(launch.specialization(), name, compiler=compiler(place.target.compiler), optimized=True)
        for name in (CHIP, "Ascend910_9392")
    ]
    first, second = (re.findall(r'"[a-z_]+\.[a-z_.0-9]+"', text) for text in texts)
    assert first == second
    assert len(first) > 50


# ---- one sweep ----


def test_the_winner_becomes_an_entry_with_its_evidence(tmp_path, rank):
    rank(smaller_is_better)
    result = searched(tmp_path)
    assert result.best == SMALLEST
    assert (result.default_us, result.us, result.ratio) == (512.0, 16.0, 32.0)
    (written,) = entries(tmp_path)
    assert written["tiles"] == {"BD": 16}
    assert written["length"] == 0
    assert written["key"]["compiler"] == result.sweep.compiler
    evidence = written["evidence"]
    assert (evidence["how"], evidence["chip"], evidence["us"], evidence["default_us"]) == ("simulated", CHIP, 16, 512)
    assert evidence["workload"]["shape"] == "tiny"
    assert [one["us"] for one in evidence["runners_up"]] == [32.0, 48.0, 512.0]  # options change nothing: no others
    assert {"model", "triton-ascend", "source", "date"} <= set(evidence)


def test_a_default_that_stays_is_written_too(tmp_path, rank):
    """So that what is tuned is known, and an entry for shorter calls does not serve these."""
    rank(lambda one: timed(1.0))
    result = searched(tmp_path)
    assert not result.wins
    assert result.best == result.default
    (written,) = entries(tmp_path)
    assert written["tiles"] == dict(result.default.tiles)
    evidence = written["evidence"]
    assert (evidence["us"], evidence["default_us"], evidence["tried"], evidence["left"]) == (1.0, 1.0, ALL, 0)


def test_a_default_whose_neighbours_are_unknown_is_not_written(tmp_path, rank):
    def one_only(one):
        time.sleep(0.2)
        return timed(1.0)

    rank(one_only)
    result = searched(tmp_path, minutes=0.1 / 60)
    assert (result.tried, result.best, result.settled) == (1, result.default, False)
    assert not (tmp_path / "configs").exists()


def test_where_nothing_works_nothing_is_written(tmp_path, rank):
    rank(lambda one: Verdict("compiler", "no"))
    result = searched(tmp_path)
    assert (result.best, result.us, result.file) == (None, None, None)
    assert not (tmp_path / "configs").exists()


def test_the_default_stays_where_the_gain_says_little(tmp_path, rank):
    rank(lambda one: timed(100.0 if dict(one.tiles)["BD"] == 512 else 98.5))
    result = searched(tmp_path)
    assert dict(result.default.tiles) == {"BD": 512}
    assert (result.best, result.us, result.wins) == (result.default, 100.0, False)
    assert {(dict(one.tiles)["BD"], us) for one, us in result.runners_up} == {(16, 98.5), (32, 98.5), (48, 98.5)}


def test_a_candidate_with_wrong_numbers_is_never_kept(tmp_path, rank, monkeypatch):
    """The ranking says that the broken one is the best by far."""
    rank(smaller_is_better)
    asked = []

    def wrong(sweep, one):
        asked.append(one)
        return "cache is wrong" if dict(one.tiles)["BD"] == 16 else ""

    monkeypatch.setattr(tune, "what_is_wrong", wrong)
    result = searched(tmp_path)
    assert result.best == candidate(BD=32)
    assert set(result.refused) == {"BD=16", "BD=16 multibuffer=False"}
    assert [dict(one.tiles)["BD"] for one in asked] == [16, 32]
    assert all(dict(one["tiles"])["BD"] != 16 for one in entries(tmp_path)[0]["evidence"]["runners_up"])
    asked.clear()
    searched(tmp_path)  # what the gate said is in the journal
    assert not asked


def test_options_that_change_nothing_are_refused_with_their_tiles(tmp_path, rank, monkeypatch):
    """They have the same time to the last digit; the gate takes minutes."""
    rank(lambda one: timed(float(dict(one.tiles)["BD"]) + 0.5 * (dict(one.tiles)["BD"] == 32 and bool(one.options))))
    asked = []

    def wrong(sweep, one):
        asked.append(one)
        return "cache is wrong"

    monkeypatch.setattr(tune, "what_is_wrong", wrong)
    result = searched(tmp_path)
    assert result.best == result.default
    assert sorted(str(one) for one in asked) == ["BD=16", "BD=32", "BD=32 multibuffer=False", "BD=48"]
    assert {"BD=16", "BD=16 multibuffer=False", "BD=32 multibuffer=False"} <= set(result.refused)


def test_the_gate_runs_the_check_cases_with_the_candidates_tiles(monkeypatch):
    """A kernel that is wrong with these tiles only is found."""
    sweep = tiny_plan().sweep
    assert what_is_wrong(sweep, SMALLEST) == ""
    (family,) = families(["compress_infer"])
    real = list(family.check_cases(torch.device("cpu")))

    def spoiled(case):
        def run():
            target = target_of(torch.device("cpu"))
            found = configs.lookup("compress_infer", "compress_infer", target, {}, 0, ())  # what is overridden
            return tuple(output * (1.01 if found.tiles["BD"] == 16 else 1.0) for output in case.run())

        return replace(case, run=run)

    monkeypatch.setattr(type(family), "check_cases", lambda self, device: iter([spoiled(real[0])]))
    gate._judged_cases.cache_clear()
    assert "RMS error" in what_is_wrong(sweep, SMALLEST)
    assert what_is_wrong(sweep, candidate(BD=32)) == ""
    gate._judged_cases.cache_clear()


def test_the_gate_also_asks_the_program_of_the_chip(monkeypatch):
    """It computes the right numbers, but a fault in it is one."""
    sweep = tiny_plan().sweep
    assert what_is_wrong(sweep, SMALLEST) == ""

    class Finds(Checker):
        def __init__(self) -> None:
            super().__init__()
            self.faults[Fault("race", "this reads what that writes", "kernels.py:1")] = 1

    monkeypatch.setattr(gate, "Checker", Finds)
    found = what_is_wrong(sweep, SMALLEST)
    assert found.startswith("race: this reads what that writes (kernels.py:1) in nsa_compress_infer ")
    assert found.endswith(f"in the simulator of {CHIP}")


def test_what_wins_at_one_length_must_not_lose_at_a_longer_one(monkeypatch):
    """There its entry serves too."""
    sweep, default, other = tiny_sweep(), tiny_plan().default, SMALLEST
    assert sweep.tokens == 64
    given = {(256, default): timed(10.0)}
    monkeypatch.setattr(gate, "evaluate", lambda of, one: given[of.tokens, one])
    gate._of_default.cache_clear()
    given[256, other] = timed(10.0)
    assert slower_when_longer(sweep, other) == ""
    given[256, other] = timed(23.0)
    assert slower_when_longer(sweep, other) == "takes 2.30 times as long as the default at 256 tokens"
    given[256, other] = Verdict("compiler", "UB overflow")
    assert slower_when_longer(sweep, other) == "compiler at 256 tokens: UB overflow"
    given.clear()
    assert slower_when_longer(tiny_sweep(chips=[("cpu", None)]), other) == ""
    gate._of_default.cache_clear()


def test_a_kernel_that_a_longer_call_does_not_launch_cannot_lose_there(monkeypatch):
    """Sums of parts: enough tokens keep all cores busy without being cut into parts."""
    request = plans.Request(["sliding_window_attention"], [(CHIP, None)], [SHAPES["paper"]], [4096], ["sum_parts"])
    (sweep,) = plans.sweeps(request)
    monkeypatch.setattr(gate, "evaluate", lambda of, one: pytest.fail("there is nothing to time"))
    assert slower_when_longer(sweep, candidate(BP=16, BE=64)) == ""


def test_the_unified_buffer_is_filled_to_the_limit_only():
    """256 tokens of 192 columns take more than 80 % of it."""
    request = plans.Request(["nsa_compress"], [(CHIP, None)], [replace(TINY, key_dim=192)], [512])
    full = candidate(BT=128, BD=192)
    (sweep,) = plans.sweeps(request)
    refused = evaluate(plans.plan(sweep).sweep, full)
    assert refused.verdict == "compiler"
    assert "limit 80 %" in refused.why
    assert refused.ub_percent is not None
    assert 80 < refused.ub_percent <= 100
    allowed = plans.plan(replace(sweep, ub_limit=95))
    verdict = evaluate(allowed.sweep, full)
    assert verdict.verdict == "timed"
    search = allowed.search()
    search.hear(full, verdict)
    result = Result(allowed.sweep, allowed.default, 9.0, full, verdict.us)
    evidence = entry(allowed, search, result, "2026-01-01")["evidence"]
    assert evidence["ub_limit"] == 95
    assert "of the unified buffer" in evidence["note"]


def test_what_takes_much_longer_is_not_simulated_to_its_end(tmp_path):
    sweep = tiny_plan().sweep
    us = evaluate(sweep, SMALLEST).us
    assert us is not None
    assert evaluate(replace(sweep, most_us=1.01 * us), SMALLEST).us == us
    given_up = evaluate(replace(sweep, most_us=0.5 * us), SMALLEST)
    assert (given_up.verdict, given_up.us) == ("slow", None)
    assert given_up.why == f"takes more than {0.5 * us:.1f} µs"


def test_the_best_so_far_says_how_long_a_candidate_may_take(tmp_path, rank, monkeypatch):
    most = []
    rank(smaller_is_better)

    class Noting(team.Here):  # the one that `rank` put there
        def submit(self, sweep, one):
            most.append((sweep.most_us, one))
            return super().submit(sweep, one)

    monkeypatch.setattr(team, "Here", Noting)
    searched(tmp_path)
    assert most[0] == (float("inf"), tiny_plan().default)
    best = 512.0
    for limit, one in most[1:]:
        assert limit == tune.SLOW * best
        best = min(best, smaller_is_better(one).us)


def test_a_program_whose_time_is_known_is_not_simulated_again():
    sweep = tiny_plan().sweep
    first = evaluate(sweep, SMALLEST)
    assert first.program
    assert evaluate(replace(sweep, known=((first.program, 1.5),)), SMALLEST).us == 1.5
    assert evaluate(replace(sweep, known=(("another", 1.5),)), SMALLEST).us == first.us
    single = evaluate(sweep, SMALLEST.with_options({"multibuffer": False}))
    assert single.program != first.program


def test_only_programs_with_the_same_tiles_are_known(tmp_path, rank, monkeypatch):
    """Other tiles may be other work for the same program."""
    rank(lambda one: replace(smaller_is_better(one), program=str(one)))
    told = []

    class Noting(team.Here):
        def submit(self, sweep, one):
            told.append((one, dict(sweep.known)))
            return super().submit(sweep, one)

    monkeypatch.setattr(team, "Here", Noting)
    searched(tmp_path)
    assert any(known for _, known in told)
    for number, (one, known) in enumerate(told):
        before = {str(other): smaller_is_better(other).us for other, _ in told[:number] if other.tiles == one.tiles}
        assert known == before


def test_the_time_of_all_launches_together_is_limited():
    call = workload("nsa_compress_grad", TINY, 256, filled=False).call
    us = [report.us for report in simulated_times(lambda: call("triton"), CHIP)]
    simulated_times(lambda: call("triton"), CHIP, most_us=1.01 * sum(us))
    with pytest.raises(TooSlowError, match="the launch takes more than"):
        simulated_times(lambda: call("triton"), CHIP, most_us=sum(us) - us[-1] / 2)


def test_only_the_kernel_that_is_tuned_is_timed():
    call = workload("nsa_compress_grad", TINY, 256, filled=False).call
    every = simulated_times(lambda: call("triton"), CHIP)
    only = simulated_times(lambda: call("triton"), CHIP, only=("sum_parts",))
    assert [report.kernel for report in every] == ["compress_bwd_dx", "compress_bwd_dw", "sum_parts"]
    assert [(report.kernel, report.us) for report in only] == [("sum_parts", every[-1].us)]


def test_what_is_computed_is_not_left_out():
    """`only` is about times."""
    with simulating(SimulatorExecutor(CHIP, only=())):
        x, w = torch.ones(64, 1, 16), torch.ones(32, 1)
        y = nsa_triton.nsa_compress(x, w, 32, 16, actual_seq_len=[64], impl="triton")
    assert torch.equal(y, torch.full((3, 1, 16), 32.0))


# ---- interruptions ----


def test_a_sweep_goes_on_where_it_was(tmp_path, rank):
    seen = []

    def until_the_third(one):
        seen.append(one)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return smaller_is_better(one)

    rank(until_the_third)
    with pytest.raises(Interrupted) as stopped:
        searched(tmp_path)
    (result,) = stopped.value.results
    assert result.tried == 2
    assert result.left == ALL - 2
    assert result.wins
    assert len(entries(tmp_path)) == 1  # what was found is kept

    rank(smaller_is_better)
    told = Told()
    assert searched(tmp_path, told).best == SMALLEST
    assert told.known == [2]
    assert not set(told.tried) & set(seen[:2])
    assert len(entries(tmp_path)) == 1

    again = Told()
    assert searched(tmp_path, again).best == SMALLEST
    assert not again.tried
    fresh = Told()
    searched(tmp_path, fresh, fresh=True)
    assert len(fresh.tried) == ALL


def test_a_budget_ends_it_and_keeps_the_best(tmp_path, rank):
    def slow(one):
        time.sleep(0.2)
        return smaller_is_better(one)

    rank(slow)
    result = searched(tmp_path, minutes=0.5 / 60)
    assert 1 <= result.tried <= 4
    assert result.tried + result.left == ALL
    assert result.wins


def test_it_ends_when_settled_if_that_is_enough(tmp_path, rank):
    rank(lambda one: timed(1000.0 - dict(one.tiles)["BD"]))  # the default is best
    result = searched(tmp_path, settled=True)
    assert (result.best, result.settled) == (result.default, True)
    assert 0 < result.left < ALL
    assert searched(tmp_path).left == 0


def test_where_measuring_again_makes_another_the_best_it_settles_there(tmp_path, rank, monkeypatch):
    rank(lambda one: timed(1000.0 - dict(one.tiles)["BD"]))  # the default seems best, next to the one of 64
    monkeypatch.setattr(tune, "evaluate", lambda sweep, one: smaller_is_better(one))
    told, sweep = Told(), tiny_sweep(chips=[("cpu", None)])
    (result,) = tune.tune([sweep], Output(tmp_path / "configs"), told, settled=True)
    assert (result.best, result.settled, result.left) == (SMALLEST, True, 0)
    assert told.known == [0], "it went on, and did not begin again"


KILLED = """
import sys
from pathlib import Path
from nsa_triton.tuning import workers
from nsa_triton.tuning.evaluation import evaluate
from nsa_triton.tuning.tune import Output, tune
from tests.tuning.sweeps import tiny_sweep
from tests.tuning.test_tune import Told

class Told(Told):
    def heard(self, search, candidate, verdict):
        print(len(search.verdicts), flush=True)

tune([tiny_sweep()], Output(Path(sys.argv[1])), Told(), workers="1")
"""


def test_a_killed_sweep_loses_nothing(tmp_path):
    """SIGKILL in the middle of the fourth candidate, in a process of its own, with the real compiler and simulator."""
    configs = tmp_path / "configs"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(configs)], stdout=subprocess.PIPE, env={**os.environ})
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == b"3":
                process.send_signal(signal.SIGKILL)
                break
    assert process.wait() == -signal.SIGKILL
    assert not configs.exists()
    planned = tiny_plan()
    with planned.journal() as journal:
        known = dict(journal.verdicts)
    assert len(known) in (3, 4)
    told = Told()
    result = searched(tmp_path, told)
    assert told.known == [len(known)]
    assert len(told.tried) + len(known) == result.tried == ALL
    assert not set(told.tried) & set(known)


# ---- end to end ----


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """One whole sweep, from nothing, with the real compiler and simulator, by two processes."""
    place = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        small_space(patch)
        patch.setenv("NSA_TRITON_CACHE_DIR", str(place / "cache"))
        (sweep,) = plans.sweeps(plans.Request(["nsa_compress"], [(CHIP, None)], [TINY], [512]))
        (result,) = tune.tune([sweep], Output(place / "configs"), Told(), workers="2")
    return place, result


def simulated_call():
    call = workload("nsa_compress", TINY, 512, filled=False).call
    (report,) = simulated_times(lambda: call("triton"), CHIP)
    return report


def test_the_winner_is_used_by_the_next_call_and_is_faster(tuned, monkeypatch, caplog):
    place, result = tuned
    assert result.wins
    assert result.us < result.default_us
    assert simulated_call().us == pytest.approx(result.default_us)
    monkeypatch.setenv("NSA_TRITON_CONFIG_DIR", str(place / "configs"))
    merge.forget_configs()
    with caplog.at_level(logging.INFO, logger="nsa_triton"):
        assert simulated_call().us == pytest.approx(result.us)
    assert f"compress: tuned config for {CHIP}, using {result.file}" in caplog.messages
    assert load(result.file)[0].evidence["how"] == "simulated"


# ---- workers ----


def test_processes_say_the_same_as_this_one(tuned):
    _, result = tuned
    assert evaluate(result.sweep, result.best).us == pytest.approx(result.us)


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do(monkeypatch):
    planned = tiny_plan()
    with workers("2", simulated=True) as team, planned.journal() as journal:
        assert isinstance(team, Processes)
        future = team.submit(planned.sweep, planned.default)
        while not team.pool._processes:
            time.sleep(0.01)
        for process in list(team.pool._processes.values()):
            process.kill()
        with pytest.raises(ToolchainError, match=r"a worker process was killed.*fewer --workers"):
            tune._result(future)
        assert not journal.verdicts


def test_without_ray_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ToolchainError, match=r"pip install 'nsa_triton\[ray\]'"), workers("ray", simulated=True):
        pass


def test_ray_evaluates_candidates_on_a_cluster(tmp_path):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        planned = tiny_plan()
        chosen = (planned.default, *planned.tiles)
        with workers("ray", simulated=True) as team:
            assert team.size == 2
            futures = [team.submit(planned.sweep, one) for one in chosen[:2]]
            found = [future.result(timeout=200) for future in futures]
    finally:
        ray.shutdown()
    here = [evaluate(planned.sweep, one) for one in chosen[:2]]
    assert [one.us for one in found] == [one.us for one in here]
