"""The kernels touch nothing outside their tensors, at any size of tensor, and memory is linear in tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_triton import nsa_compress_attention
from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.runtime.launch import Launch
from tests.dtypes import shapes_in_dtypes
from tests.guard import run_guarded
from tests.ops.compress_attention.cases import (
    Sizes,
    assert_gradients_right,
    assert_right,
    call,
    gradient_of,
    make,
)

if front_end_problem() is not None:
    pytest.skip(f"no Ascend front end: {front_end_problem()}", allow_module_level=True)

from nsa_triton.ops.compress_attention import launch

# Tails everywhere: tokens, keys, heads, head sizes, blocks, ids.
SHAPES: list[Any] = [
    (Sizes(4, 2, 65, 18, (32, 16), 64, 5), (47, 0, 20, 100), None, {"causal": True, "forced": (1, 2), "behind": 1}),
    (Sizes(3, 1, 16, 16, (16, 16), 48, 40, "overlap"), (33, 5, 9), (67, 3, 0), {"masked": True, "forced": "mask"}),
    (Sizes(2, 2, 3, 2, (48, 32), 96, 1), (1, 65), (33, 1), {"masked": True, "mask_dtype": torch.uint8}),
]
OWN = [torch.bfloat16, torch.float32, torch.float16]  # dtype of each


def guarded(function, side, monkeypatch):
    """What `function()` returns, with every tensor of every launch, tables and the workspace too, flush with a page
    that faults."""

    def run(planned, target, device):
        tensors = {name: value for name, value in planned.arguments.items() if isinstance(value, torch.Tensor)}

        def guarded_run(**tensors):
            arguments = {name: tensors.get(name, value) for name, value in planned.arguments.items()}
            original(Launch(planned.kernel, planned.programs, arguments, planned.constexprs), target, device)

        for name, after in run_guarded(guarded_run, tensors, side).items():
            tensors[name].copy_(after)

    original = Launch.run
    function()  # compiles outside of the guarded child
    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", run)
        return function()


def tight(mask):
    """A mask without a row or a column more than is needed, which `make` puts there."""
    return None if mask is None else mask[:-2, :-3].contiguous().view(torch.uint8)


@pytest.mark.parametrize("side", ["after", "before"])
@shapes_in_dtypes(SHAPES, OWN)
def test_kernels_stay_inside_their_tensors(shape, dtype, side, monkeypatch):
    sizes, queries, keys, options = shape
    problem = make(sizes, queries, keys, dtype, **options)
    problem = problem._replace(atten_mask=tight(problem.atten_mask), topk_mask=tight(problem.topk_mask))
    outputs = guarded(lambda: launch.forward(*problem), side, monkeypatch)
    assert_right(outputs, problem)
    given = gradient_of(problem, outputs)
    assert_gradients_right(guarded(lambda: launch.backward(*given), side, monkeypatch), given)


class Apart:
    """Tensors with their tokens so far apart that the last lies beyond 2^31 elements. Pages never touched take no
    memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.memory = torch.empty((1 << 31) + (1 << 20), dtype=dtype)
        self.used = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        step = (1 << 31) // (len(tensor) - 1) + 1
        strides = (step, *tensor[0].stride())
        far = self.memory.as_strided(tensor.shape, strides, self.used)
        self.used += tensor[0].numel() + len(tensor)  # steps are rounded up: places drift by one a token at most
        return far.copy_(tensor)


def test_offsets_beyond_two_to_the_31_elements():
    sizes = Sizes(4, 2, 32, 16, (32, 16), 64, 6)
    problem = make(sizes, (70, 33), (20, 9), torch.float16, masked=True, forced="mask").bytes()
    apart, of_bytes = Apart(torch.float16), Apart(torch.uint8)
    tensors = {name: apart(getattr(problem, name)) for name in ("query", "key", "value")}
    masks = {name: of_bytes(getattr(problem, name)) for name in ("atten_mask", "topk_mask")}
    far = problem._replace(**tensors, **masks)
    outputs = launch.forward(*far)
    assert all(torch.equal(a, b) for a, b in zip(outputs, launch.forward(*problem), strict=True))
    assert_right(outputs, problem)
    near = gradient_of(problem, outputs)
    moved = {name: apart(getattr(near, name)) for name in ("grad", "attention_out")}
    given = near._replace(**tensors, **moved, atten_mask=masks["atten_mask"])
    gradients = launch.backward(*given)
    assert all(torch.equal(a, b) for a, b in zip(gradients, launch.backward(*near), strict=True))


@pytest.mark.slow
def test_output_offsets_beyond_two_to_the_31_elements():
    """Writes 5 GB: the tokens of the first segment see nothing, those of the second do."""
    tokens, tail = 65_600, 40
    sizes = Sizes(128, 128, 16, 256, (32, 16), 64, 2)
    small = make(sizes, (tail,), (5,), torch.float16)
    query = torch.zeros(tokens, 128, 16, dtype=torch.float16)
    assert tokens * 128 * 256 > 1 << 31
    query[-tail:] = small.query
    problem = small._replace(query=query, query_ends=(tokens - tail, tokens), key_ends=(0, 5))
    out, ids, *statistics = launch.forward(*problem)
    assert not out[: tokens - tail : 1000].any()
    assert (ids[: tokens - tail] == -1).all()
    assert_right((out[-tail:], ids[-tail:], *(statistic[-tail:] for statistic in statistics)), small)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_memory_is_linear_in_tokens():
    """No tensor has an element for each query token and each selection block, let alone each compressed token."""
    tokens = 16384
    sizes = Sizes(2, 1, 16, 16, (32, 16), 64, 16)
    problem = make(sizes, (tokens,), dtype=torch.bfloat16, causal=True, forced=(1, 2))
    leaves = [tensor.requires_grad_() for tensor in problem[:3]]
    with Largest() as largest:
        out, *_ = call(nsa_compress_attention, problem, "triton")
        out.backward(torch.ones_like(out))
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert out.numel() <= largest.elements < tokens * (tokens // 64)


def test_the_largest_tensor_is_seen():
    with Largest() as largest:
        torch.zeros(3, 1) + torch.zeros(1, 5)
    assert largest.elements == 15
