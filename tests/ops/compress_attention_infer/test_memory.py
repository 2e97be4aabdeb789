"""The kernels touch nothing outside their tensors, whatever is in the indices, and at any size of cache."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.ops.compress_attention_infer import reference
from nsa_triton.runtime.launch import Launch
from tests.guard import run_guarded
from tests.ops.compress_attention_infer.cases import Problem, Sizes, assert_right, make

if front_end_problem() is not None:
    pytest.skip(f"no Ascend front end: {front_end_problem()}", allow_module_level=True)

from nsa_triton.ops.compress_attention_infer import launch

# Tails everywhere: tokens, pages, heads, head sizes, blocks, ids.
SHAPES = [
    (Sizes(4, 2, 65, 18, 16, (32, 16), 64, 5), (17, 0, 40), (1, 1, 1)),
    (Sizes(14, 1, 16, 16, 48, (48, 16), 80, 40, "overlap"), (47, 50), (3, 1)),
    (Sizes(1, 1, 3, 2, 64, (16, 16), 16, 1), (65,), (2,)),
]


def guarded_forward(problem, side, monkeypatch):
    """launch.forward, with every tensor of every launch, the workspace too, flush with a page that faults."""

    def run(planned, target, device):
        tensors = {name: value for name, value in planned.arguments.items() if isinstance(value, torch.Tensor)}

        def guarded(**tensors):
            arguments = {name: tensors.get(name, value) for name, value in planned.arguments.items()}
            original(Launch(planned.kernel, planned.programs, arguments, planned.constexprs), target, device)

        for name, after in run_guarded(guarded, tensors, side).items():
            tensors[name].copy_(after)

    original = Launch.run
    launch.forward(*problem)  # compiles outside of the guarded child
    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", run)
        return launch.forward(*problem)


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_stay_inside_their_tensors(shape, dtype, side, monkeypatch):
    sizes, cached, tokens = shape
    problem = make(sizes, cached, tokens, dtype, hides=max(tokens) > 1, garbage=True)
    result = guarded_forward(problem, side, monkeypatch)
    assert_right(result, problem)


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_page_id_stays_inside_the_cache(shape, side, monkeypatch):
    problem = make(*shape, garbage=True)
    entries = torch.randint(-(2**31), 2**31 - 1, problem.table.shape, generator=torch.Generator().manual_seed(3))
    problem = problem._replace(
        key=problem.key.nan_to_num(0.5), value=problem.value.nan_to_num(0.5), table=entries.int()
    )
    assert_right(guarded_forward(problem, side, monkeypatch), problem)


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("lengths", [(-5, 10_000, 33), (2**31 - 1, -(2**31), 49)], ids=str)
def test_any_length_stays_inside_the_block_table(lengths, side, monkeypatch):
    """Lengths on the device are not checked: what lies beyond the block table does not exist."""
    problem = make(*SHAPES[0], columns=3)
    problem = problem._replace(key=problem.key.nan_to_num(0.5), value=problem.value.nan_to_num(0.5))
    wild = problem._replace(lengths=torch.tensor(lengths, dtype=torch.int32), table=problem.table.clamp(min=0))
    launch.forward(*problem)  # compiles

    def forward(**tensors):
        output, ids = launch.forward(*wild._replace(**{name: tensors[name] for name in given}))
        tensors["output"].copy_(output)
        tensors["ids"].copy_(ids)

    given = {name: getattr(wild, name) for name in ("query", "key", "value", "table", "lengths")}
    expected, ids = reference.forward(*wild)
    after = run_guarded(forward, {**given, "output": torch.zeros_like(expected), "ids": torch.zeros_like(ids)}, side)
    held = wild._replace(lengths=wild.lengths.clamp(0, 48))
    assert_right((after["output"], after["ids"]), held)


def test_caches_beyond_two_to_the_31_elements():
    """Pages never touched take no memory."""
    page, pages = 128, 70_000
    joint = torch.empty((pages, page, 1, 256), dtype=torch.float16)
    assert joint.numel() > 1 << 31
    table = torch.tensor([[pages - 1, 5, pages - 3]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for used in table[0].tolist():
        joint[used] = torch.randn(page, 1, 256, generator=generator)
    key, value = joint[..., :128], joint[..., 128:]
    query, lengths = torch.randn(1, 4, 128, generator=generator).half(), torch.tensor([300], dtype=torch.int32)
    problem = Problem(query, key, value, table, lengths, None, None, 0.1, 32, 16, 64, 8, "cann")
    result = launch.forward(*problem)
    small = table.tolist()[0]
    near = problem._replace(key=key[small], value=value[small], table=torch.tensor([[0, 1, 2]], dtype=torch.int32))
    assert_right(result, near)
