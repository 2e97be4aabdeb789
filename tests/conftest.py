"""Which targets the tests run on, and the poison that makes a forgotten write visible."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nsa_triton.ascend.simulator.checks import Checker
from nsa_triton.ascend.toolchain import compilers, host_problem, triton_problem
from nsa_triton.runtime.executors.simulator import SimulatorExecutor
from nsa_triton.runtime.simulation import simulating
from nsa_triton.runtime.target import present_targets

SIMULATORS = "ascend-sim"
PROBLEMS = {
    "cpu": host_problem,
    "cuda": lambda: triton_problem("triton"),
    "npu": lambda: triton_problem("triton-ascend"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--target",
        choices=("cpu", "cuda", "npu", SIMULATORS, "all-present"),
        default="all-present",
        help=f"where kernels run; default: every target of this machine whose toolchain is installed. {SIMULATORS}: "
        "the final on-chip programs, from every Ascend compiler that is found, watched for races; about 1 s per test",
    )


def targets(config: pytest.Config) -> list[str]:
    chosen = config.getoption("--target")
    if chosen == SIMULATORS:
        return [f"{SIMULATORS}-{compiler.version}" for compiler in compilers()]
    if chosen != "all-present":
        return [chosen]  # asked for by name: it runs or fails
    return [kind for kind in present_targets() if PROBLEMS[kind]() is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", targets(metafunc.config), indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device of each target in turn; the target's name is part of the test id. In the simulator, a test also fails
    where the programs that it ran have races or use bytes that nobody wrote."""
    if not request.param.startswith(SIMULATORS):
        yield torch.device(request.param)
        return
    executor = simulator(request.param.removeprefix(f"{SIMULATORS}-"))
    executor.checker = Checker()
    with simulating(executor):
        yield torch.device("cpu")
    assert not executor.checker.faults, "\n".join(map(str, executor.checker.faults))


@functools.cache
def simulator(version: str) -> SimulatorExecutor:
    """One for the whole run: every kernel is compiled once."""
    return SimulatorExecutor("Ascend910B2", next(found for found in compilers() if found.version == version))


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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors are not worth a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
