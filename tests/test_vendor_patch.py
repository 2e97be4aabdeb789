"""patch_torch_npu: code for torch_npu runs our functions while a patch is in force, and its own again afterwards."""

from __future__ import annotations

import itertools
import sys
import threading
from types import ModuleType

import pytest
import torch

import nsa_triton
from nsa_triton import ToolchainError, patch_torch_npu
from nsa_triton.vendor.patch import FUNCTIONS

LACKING = ("npu_nsa_select_attention_infer", "npu_nsa_compress_infer")  # as in an older torch_npu


def closed(*arguments, **named):
    raise RuntimeError("CANN's operator was called")


@pytest.fixture
def torch_npu(monkeypatch):
    """A module of that name with some of the operators, and something else."""
    module = ModuleType("torch_npu")
    for name in ("npu_format_cast", *FUNCTIONS):
        if name not in LACKING:
            setattr(module, name, closed)
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    return module


def operators(module):
    return {name: value for name, value in vars(module).items() if name.startswith("npu_")}


def is_patched(module):
    return all(getattr(module, name, None) is function for name, function in FUNCTIONS.items())


def test_all_vendor_spellings_are_put_in_place_and_taken_back(torch_npu):
    before = operators(torch_npu)
    assert set(FUNCTIONS) == {name for name in nsa_triton.__all__ if name.startswith("npu_")}
    with patch_torch_npu():
        assert operators(torch_npu) == {"npu_format_cast": closed, **FUNCTIONS}
        assert torch_npu.npu_nsa_compress is nsa_triton.npu_nsa_compress
    assert operators(torch_npu) == before
    assert not any(hasattr(torch_npu, name) for name in LACKING)


def test_code_for_torch_npu_runs_unchanged(torch_npu):
    def model(input, weight):
        import torch_npu

        return torch_npu.npu_nsa_compress(input, weight, 32, 16, actual_seq_len=[0, 5, 49])

    input, weight = torch.randn(49, 2, 16), torch.randn(32, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="CANN's operator"):
        model(input, weight)
    with patch_torch_npu():
        output = model(input, weight)
    assert torch.equal(output, nsa_triton.npu_nsa_compress(input, weight, 32, 16, actual_seq_len=[0, 5, 49]))
    output.sum().backward()
    assert weight.grad is not None


def test_without_a_block_it_stays_until_it_is_undone(torch_npu):
    before = operators(torch_npu)
    patch = patch_torch_npu()
    assert is_patched(torch_npu)
    patch.undo()
    assert operators(torch_npu) == before
    patch.undo()
    assert operators(torch_npu) == before


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_patches_are_undone_in_any_order(order, torch_npu):
    before = operators(torch_npu)
    patches = [patch_torch_npu() for _ in order]
    for place in order:
        assert is_patched(torch_npu)
        patches[place].undo()
        patches[place].undo()  # counts once
    assert operators(torch_npu) == before


def test_patches_nest(torch_npu):
    before = operators(torch_npu)
    with patch_torch_npu() as outer:
        with patch_torch_npu():
            outer.undo()
            assert is_patched(torch_npu)
        assert operators(torch_npu) == before
    assert operators(torch_npu) == before


def test_an_error_in_the_block_undoes_the_patch_and_passes(torch_npu):
    before = operators(torch_npu)
    with pytest.raises(KeyError), patch_torch_npu():
        raise KeyError
    assert operators(torch_npu) == before


def test_what_others_put_there_meanwhile_stays(torch_npu):
    with patch_torch_npu():
        torch_npu.npu_nsa_compress = other = len
        with patch_torch_npu():
            assert is_patched(torch_npu), "each patch puts all functions in place"
            torch_npu.npu_nsa_compress = other
    assert torch_npu.npu_nsa_compress is other
    assert torch_npu.npu_nsa_compress_grad is closed


def test_two_modules_are_told_apart(torch_npu, monkeypatch):
    first = patch_torch_npu()
    reloaded = ModuleType("torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", reloaded)
    second = patch_torch_npu()
    first.undo()
    assert torch_npu.npu_nsa_compress is closed
    assert is_patched(reloaded)
    second.undo()
    assert operators(reloaded) == {}


def test_threads_may_patch_at_the_same_time(torch_npu):
    before, wrong = operators(torch_npu), []

    def work():
        for _ in range(200):
            with patch_torch_npu():
                if not is_patched(torch_npu):
                    wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert operators(torch_npu) == before


def test_without_torch_npu_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # importing it fails
    with pytest.raises(ToolchainError, match="torch_npu cannot be imported") as caught:
        patch_torch_npu()
    assert any("pip install" in command for command in caught.value.commands)
    assert "nsa_triton.npu_nsa_" in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


def test_a_library_of_cann_that_is_missing_is_named(monkeypatch, tmp_path):
    (tmp_path / "torch_npu.py").write_text("import ctypes\nctypes.CDLL('libhccl_is_not_here.so')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    with pytest.raises(ToolchainError, match="libhccl_is_not_here"):
        patch_torch_npu()
