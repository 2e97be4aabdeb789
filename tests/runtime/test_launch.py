"""Launches as values, and the executor for devices that this machine need not have."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from nsa_triton.errors import ArgumentTypeError, ToolchainError
from nsa_triton.runtime.executors import device as module
from nsa_triton.runtime.executors.device import DeviceExecutor
from nsa_triton.runtime.launch import Launch


class RecordingKernel:
    """Stands in for a JIT function: remembers grid and arguments of each call."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda **arguments: self.calls.append((grid, arguments))


@pytest.fixture
def executor(monkeypatch):
    monkeypatch.setattr(module, "triton_problem", lambda wanted: None)
    monkeypatch.setattr(DeviceExecutor, "_current_device", lambda self: contextlib.nullcontext())
    return lambda kind: DeviceExecutor(kind, torch.device("cpu"))


def test_a_device_launch_passes_arguments_constexprs_and_the_options_of_its_target(executor):
    kernel = RecordingKernel()
    executor("npu").launch(kernel, 48, {"x": 1, "T": 7}, {"BT": 64}, {"multibuffer": True})
    executor("cuda").launch(kernel, 9, {"x": 1}, {}, {"num_warps": 4})
    assert kernel.calls == [((48,), {"x": 1, "T": 7, "BT": 64, "multibuffer": True}), ((9,), {"x": 1, "num_warps": 4})]


@pytest.mark.parametrize(("kind", "wanted"), [("npu", "triton-ascend"), ("cuda", "triton")])
def test_a_device_needs_its_own_triton(monkeypatch, kind, wanted):
    asked = []

    def problem(name):
        asked.append(name)
        return ToolchainError("clobbered", ("fix",))

    monkeypatch.setattr(module, "triton_problem", problem)
    with pytest.raises(ToolchainError, match="clobbered"):
        DeviceExecutor(kind, torch.device("cpu"))
    assert asked == [wanted]


def test_the_specialization_of_a_launch_takes_types_from_its_arguments():
    arguments: dict[str, Any] = {
        "x": torch.empty(3, dtype=torch.bfloat16, device="meta"),
        "tiles": torch.empty(3, dtype=torch.int32),
        "n": 5,
        "stride": 1 << 31,
        "scale": 0.5,
    }
    spec = Launch("kernel", 1, arguments, {"BT": 64}).specialization()
    assert dict(spec.signature) == {"x": "*bf16", "tiles": "*i32", "n": "i32", "stride": "i64", "scale": "fp32"}
    assert spec.constexprs == {"BT": 64}


@pytest.mark.parametrize("value", [None, "a", torch.empty(1, dtype=torch.complex64)])
def test_arguments_that_no_kernel_takes_are_named(value):
    with pytest.raises(ArgumentTypeError, match=r"^bad: expected"):
        Launch("kernel", 1, {"bad": value}, {}).specialization()
