"""The kernels touch nothing outside their tensors, at any size of tensor."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.ops.compress import reference
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import target_of
from tests.guard import run_guarded

if front_end_problem() is not None:
    pytest.skip(f"no Ascend front end: {front_end_problem()}", allow_module_level=True)

from nsa_triton.ops.compress import launch

# Tails everywhere: tokens, heads, columns, windows, splits.
SHAPES = [
    ((47,), 1, 16, 32, 16),
    ((16, 33, 80), 3, 80, 16, 16),
    ((97, 95), 2, 176, 48, 32),
    ((130,), 1, 48, 128, 112),
]


def inputs(lengths, heads, head_dim, block, stride, *, dtype):
    generator = torch.Generator().manual_seed(1)
    ends = tuple(torch.tensor(lengths).cumsum(0).tolist())
    rows = len(reference.window_starts(block, stride, ends))
    shapes = {"g": (rows, heads, head_dim), "x": (ends[-1], heads, head_dim), "w": (block, heads)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}, ends


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_stay_inside_their_tensors(shape, dtype, side):
    """Every tensor of every launch, outputs and tables too, ends (or begins) at a page that faults when touched."""
    given, ends = inputs(*shape, dtype=dtype)
    geometry = shape[3:]
    windows = launch.Windows(ends, *geometry)
    target = target_of(torch.device("cpu"))
    plan = launch.Plan(target, windows, given["x"])
    y, dx, dw = torch.empty_like(given["g"]), torch.empty_like(given["x"]), torch.empty_like(given["w"])
    plans = [
        launch.plan_forward(plan, given["x"], given["w"], y),
        launch.plan_input_grad(plan, given["g"], given["w"], dx),
        *launch.plan_weight_grad(plan, given["g"], given["x"], dw),
    ]
    for planned in plans:
        planned.run(target, torch.device("cpu"))  # compiles outside of the guarded child, and fills the partial sums
        tensors = {name: value for name, value in planned.arguments.items() if isinstance(value, torch.Tensor)}
        numbers = {name: value for name, value in planned.arguments.items() if name not in tensors}

        def guarded(planned=planned, numbers=numbers, **tensors):
            arguments = {name: tensors.get(name, numbers.get(name)) for name in planned.arguments}
            Launch(planned.kernel, planned.programs, arguments, planned.constexprs).run(target, torch.device("cpu"))

        after = run_guarded(guarded, tensors, side)
        assert all(torch.equal(after[name], tensors[name]) for name in tensors), planned.kernel.__name__


def huge(dtype):
    """More than 2^31 elements. Pages never touched take no memory, and only the last segment has windows."""
    heads, head_dim, short, tail, tokens = 128, 256, 31, 48, 70_000
    x = torch.empty((tokens, heads, head_dim), dtype=dtype)
    assert x.numel() > 1 << 31
    x[-tail:] = torch.randn((tail, heads, head_dim)).to(dtype)
    ends = (*range(short, tokens - tail, short), tokens - tail, tokens)
    return x, torch.randn(32, heads).to(dtype), ends, tail


def test_forward_offsets_beyond_two_to_the_31_elements():
    x, w, ends, tail = huge(torch.float16)
    y = launch.forward(x, w, 32, 16, ends)
    expected = reference.forward(x[-tail:].double(), w.double(), 32, 16, (tail,))
    assert y.shape == expected.shape
    assert torch.allclose(y.double(), expected, rtol=1e-3, atol=1e-4)


def test_weight_gradient_offsets_beyond_two_to_the_31_elements():
    x, w, ends, tail = huge(torch.float16)
    g, dw = torch.randn(2, *x.shape[1:]).half(), torch.empty_like(w)
    target = target_of(x.device)
    plan = launch.Plan(target, launch.Windows(ends, 32, 16), x)
    for planned in launch.plan_weight_grad(plan, g, x, dw):
        planned.run(target, x.device)
    _, expected = reference.backward(g.double(), x[-tail:].double(), w.double(), 32, 16, (tail,))
    assert torch.allclose(dw.double(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_input_gradient_offsets_beyond_two_to_the_31_elements():
    """Writes 4.6 GB: every token gets its gradient, most of them zero."""
    x, w, ends, tail = huge(torch.float16)
    g = torch.randn(2, *x.shape[1:]).half()
    dx, _ = launch.backward(g, x, w, 32, 16, ends)
    expected, _ = reference.backward(g.double(), x[-tail:].double(), w.double(), 32, 16, (tail,))
    assert torch.allclose(dx[-tail:].double(), expected, rtol=1e-3, atol=1e-4)
    assert not dx[:-tail].any()
