"""The kernel touches nothing outside its tensors, whatever page ids, slots and lengths say, at any size of tensor."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import target_of
from tests.guard import run_guarded
from tests.ops.compress_infer.cases import make

if front_end_problem() is not None:
    pytest.skip(f"no Ascend front end: {front_end_problem()}", allow_module_level=True)

from nsa_triton.ops.compress_infer import launch

CPU = torch.device("cpu")
# lengths, heads, head size, window, stride, page, new tokens, dtype. Tails everywhere: heads, columns, windows, pages.
SHAPES = [
    ((47, 160, 33, 80), 1, 33, 32, 16, 64, 1, torch.bfloat16),
    ((96, 130, 0, 48), 3, 20, 48, 16, 16, 33, torch.float32),
    ((64, 33, 80), 2, 100, 32, 16, None, 20, torch.float16),
]


def bad_indices(call):
    """Nothing that the tensors of indices say is true any more, but most batches emit."""
    generator = torch.Generator().manual_seed(5)

    def garbage(tensor):
        return tensor if tensor is None else torch.randint(-(2**31), 2**31, tensor.shape, generator=generator).int()

    lengths = torch.tensor([16 * 10**7, -5, 2**31 - 16, 16 * 1000])[: len(call.lengths)].int()
    return call._replace(lengths=lengths, slots=garbage(call.slots), table=garbage(call.table))


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("indices", ["good", "bad", "bad, with slots"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_stays_inside_its_tensors(shape, indices, side):
    """Every tensor, indices too, ends (or begins) at a page that faults when touched."""
    call = make(*shape)
    if indices != "good":
        call = bad_indices(call)
    if indices == "bad, with slots":  # what bad pages give is written somewhere: their clamped contents are read
        call = call._replace(slots=torch.arange(call.slots.numel()).view(call.slots.shape).int())
    target = target_of(CPU)
    table = launch.first_tokens(call.lengths) if call.table is None else call.table
    cache = call.cache.clone()
    tensors = (call.input, call.weight, call.slots, table, call.lengths, cache)
    planned = launch.plan_forward(target, *tensors, call.block, call.stride, call.new_tokens)
    planned.run(target, CPU)  # compiles outside of the guarded child
    given = {name: value for name, value in planned.arguments.items() if isinstance(value, torch.Tensor)}

    def guarded(**tensors):
        Launch(planned.kernel, planned.programs, {**planned.arguments, **tensors}, planned.constexprs).run(target, CPU)

    after = run_guarded(guarded, {**given, "cache": call.cache}, side)
    assert all(torch.equal(after[name], given[name]) for name in given)


@pytest.mark.parametrize("page", [128, None])
def test_offsets_beyond_two_to_the_31_elements(page):
    """Pages of memory never touched take none: one window is read at the far end, and one row written there."""
    heads, size, tokens = 64, 256, 140_032
    x = torch.empty((tokens, heads, size), dtype=torch.float16)
    assert x.numel() > 1 << 31
    x[-32:] = torch.randn((32, heads, size)).half()
    cache = torch.empty((tokens, heads, size), dtype=torch.float16)
    weight, slots = torch.randn(32, heads).half(), torch.tensor([-1, tokens - 1])
    lengths = torch.tensor([tokens - 128, 128], dtype=torch.int32)
    table = None
    if page is not None:
        table, lengths[0] = torch.tensor([[0], [tokens // page - 1]]), 0
        x = x.view(-1, page, heads, size)
    launch.forward(x, weight, slots, table, lengths, cache, 32, 16, 1)
    window = x.view(-1, heads, size)[-32:].double()
    expected = (weight.double()[:, :, None] * window).sum(0)
    torch.testing.assert_close(cache[-1].double(), expected, rtol=1e-3, atol=1e-3)
