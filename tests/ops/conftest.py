"""What the tests of several ops ask for, and which files beside this one hold such tests."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target
from tests.ops.launches import Side, assert_the_same_at_the_edge

SHARED = (
    "calls",
    "compiled",
    "paged",
    "paged_integration",
    "paged_runs",
    "paged_reference",
    "paged_validation",
    "ragged_integration",
    "ragged_validation",
)
pytest.register_assert_rewrite(*(f"tests.ops.{module}" for module in SHARED))


@pytest.fixture
def checking_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users ask for it: entries of index tensors are read back and bad ones refused."""
    monkeypatch.setenv("NSA_TRITON_CHECK_INDICES", "1")


@pytest.fixture
def guarded_launches(monkeypatch: pytest.MonkeyPatch, side: Side) -> list[str]:
    """Every launch runs once more at the `side` of forbidden pages; the names of the kernels that did."""
    run, seen = Launch.run, []

    def run_twice(planned: Launch, target: Target, device: torch.device) -> None:
        run(planned, target, device)  # compiles outside of the guarded child, and fills what the next launch reads
        assert_the_same_at_the_edge(planned, target, device, side)
        seen.append(planned.kernel.__name__)

    monkeypatch.setattr(Launch, "run", run_twice)
    return seen
