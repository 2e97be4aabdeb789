"""The kernels touch nothing outside their tensors, at any size of tensor."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.ops.gated_combine import reference
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import target_of
from tests.guard import run_guarded
from tests.ops.gated_combine.cases import make

if front_end_problem() is not None:
    pytest.skip(f"no Ascend front end: {front_end_problem()}", allow_module_level=True)

from nsa_triton.ops.gated_combine import launch

CPU = torch.device("cpu")
# Tails of rows and columns, whole tiles, and less than one.
SHAPES = [(47, 1, 16), (64, 2, 128), (33, 3, 80), (13, 2, 176)]


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_stay_inside_their_tensors(shape, dtype, side):
    """Every tensor of every launch, outputs too, ends (or begins) at a page that faults when touched."""
    tokens, heads, value_dim = shape
    grad, inputs = make((tokens,), heads, value_dim, dtype)
    g, *branches = (launch.rows_of(tensor) for tensor in (grad, *inputs[:3]))
    z = launch.branch_major(inputs[3])
    plan = launch.Plan(target_of(CPU), g)
    y, dc, ds, dw, dz = (torch.empty_like(tensor) for tensor in (g, *branches, z))
    plans = [
        launch.plan_forward(plan, tuple(branches), z, y),
        launch.plan_backward(plan, g, tuple(branches), z, (dc, ds, dw, dz)),
    ]
    for planned in plans:
        planned.run(target_of(CPU), CPU)  # compiles outside of the guarded child
        tensors = {name: value for name, value in planned.arguments.items() if isinstance(value, torch.Tensor)}
        numbers = {name: value for name, value in planned.arguments.items() if name not in tensors}

        def guarded(planned=planned, numbers=numbers, **tensors):
            arguments = {name: tensors.get(name, numbers.get(name)) for name in planned.arguments}
            Launch(planned.kernel, planned.programs, arguments, planned.constexprs).run(target_of(CPU), CPU)

        after = run_guarded(guarded, tensors, side)
        assert all(torch.equal(after[name], tensors[name]) for name in tensors), planned.kernel.__name__


def huge(tail):
    """A view of more than 2^31 elements from its first to its last row. Pages never touched take no memory."""
    rows, value_dim, stride = 2 * tail, 16, 80_000_000
    whole = torch.empty((rows, stride), dtype=torch.float16)
    assert whole.numel() > 1 << 31
    tensor = whole[:, :value_dim]
    return tensor.copy_(torch.randn(rows, value_dim)).unsqueeze(1)


def test_offsets_beyond_two_to_the_31_elements():
    branch = huge(tail=20)
    assert launch.rows_of(branch).data_ptr() == branch.data_ptr()
    _, (_, selected, local, gates) = make((40,), heads=1, dtype=torch.float16)
    inputs = (branch, selected, local, gates)
    doubles = [tensor.double() for tensor in inputs]
    expected = (reference.forward(*doubles), *reference.backward(doubles[0], *doubles))
    actual = (launch.forward(*inputs), *launch.backward(branch, *inputs))
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-3, atol=1e-3)
