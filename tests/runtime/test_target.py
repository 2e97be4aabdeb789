"""Targets: what is said of a chip, how many programs a kernel gets, and that nothing is probed before it is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nsa_triton.ascend.chips import chip
from nsa_triton.errors import ArgumentValueError
from nsa_triton.runtime import target as module
from nsa_triton.runtime.target import Target, ascend_target, present_targets, target_of

NPU = ascend_target(chip("Ascend910B2"))
GPU = Target("cuda", "nvidia-h200", 132, 132)


def test_programs_follow_the_cores_of_the_target():
    assert [NPU.programs(items) for items in (0, 1, 47, 48, 1000)] == [1, 1, 47, 48, 48]
    assert [NPU.programs(items, uses_cube=True) for items in (23, 24, 1000)] == [23, 24, 24]
    assert [GPU.programs(items) for items in (0, 5, 100_000)] == [1, 5, 100_000]


def test_tiles_are_powers_of_two_for_upstream_triton_only():
    sizes = (1, 2, 3, 16, 48, 80, 128, 144)
    assert [NPU.tile(size) for size in sizes] == list(sizes)
    assert [GPU.tile(size) for size in sizes] == [1, 2, 4, 16, 64, 128, 128, 256]


def test_the_cpu_target_follows_torchs_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert target_of(torch.device("cpu")).vector_cores == 1
        torch.set_num_threads(3)
        assert target_of(torch.device("cpu")).vector_cores == 3
    finally:
        torch.set_num_threads(threads)


def test_a_gpu_is_named_for_its_config_folder(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    module._cuda_target.cache_clear()
    try:
        assert target_of(torch.device("cuda", 0)) == GPU
    finally:
        module._cuda_target.cache_clear()


def test_a_device_without_kernels_is_an_error_that_names_the_others():
    with pytest.raises(ArgumentValueError, match="expected a tensor on cpu, cuda or npu, got mps"):
        target_of(torch.device("mps"))


def test_the_cpu_is_always_present_and_comes_last():
    assert present_targets()[-1] == "cpu"
