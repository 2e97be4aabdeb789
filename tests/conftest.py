"""Which targets the tests run on, and the poison that makes a forgotten write visible."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_triton.ascend.toolchain import host_problem, triton_problem
from nsa_triton.runtime.target import present_targets

PROBLEMS = {
    "cpu": host_problem,
    "cuda": lambda: triton_problem("triton"),
    "npu": lambda: triton_problem("triton-ascend"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--target",
        choices=("cpu", "cuda", "npu", "all-present"),
        default="all-present",
        help="where kernels run; default: every target of this machine whose toolchain is installed",
    )


def targets(config: pytest.Config) -> list[str]:
    chosen = config.getoption("--target")
    if chosen != "all-present":
        return [chosen]  # asked for by name: it runs or fails
    return [kind for kind in present_targets() if PROBLEMS[kind]() is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", targets(metafunc.config), indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device of each target in turn; the target's name is part of the test id."""
    return torch.device(request.param)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every fresh floating-point allocation with NaN: a kernel that forgets to write a tile fails at once."""

    def poison(allocate: Any) -> Any:
        def allocated(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocated

    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
