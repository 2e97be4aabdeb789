"""What the tests of the tuner share: the smallest sweep, and verdicts without compilers."""

from __future__ import annotations

import pytest

from nsa_triton.tuning.plans import Request, plan, sweeps
from nsa_triton.tuning.space import Space
from nsa_triton.tuning.sweep import Candidate, Verdict
from nsa_triton.workloads import Shape
from tests.compiling import no_ascend

CHIP = "Ascend910B2"
TINY = Shape("tiny", heads=4, kv_heads=2, key_dim=64, value_dim=32, count=4)
needs_toolchain = pytest.mark.skipif(bool(no_ascend()), reason=no_ascend())


def candidate(options=None, **tiles) -> Candidate:
    return Candidate.of(tiles, options or {})


def timed(us: float) -> Verdict:
    return Verdict("timed", us=us)


def tiny_sweep(**changes):
    """The only kernel of nsa_compress_infer, at a tiny shape."""
    request = {"ops": ["compress_infer"], "chips": [(CHIP, None)], "shapes": [TINY], "tokens": [64], **changes}
    (sweep,) = sweeps(Request(**request))
    return sweep


def tiny_plan(**changes):
    return plan(tiny_sweep(**changes))


def small_space(monkeypatch):
    """A space of few candidates in the place of the real one of compress."""
    from nsa_triton.tuning import plans, space

    few = Space("compress_fwd", {"BT": (16, 32), "BD": (64,)}, (), ({}, {"multibuffer": False}))
    spaces = {**space.SPACES, "compress": (few,)}
    for module in (space, plans):
        monkeypatch.setattr(module, "SPACES", spaces)
    assert space.space_of("compress", "compress_fwd") == few
