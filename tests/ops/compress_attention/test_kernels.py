"""The kernels of compress_attention on every target that is present, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton.ops.compress_attention import reference
from tests.dtypes import shapes_in_dtypes
from tests.fuzzing import fuzzed
from tests.ops.compress_attention.cases import (
    LOWEST,
    GradProblem,
    Problem,
    Sizes,
    assert_gradients_right,
    assert_ids_right,
    assert_right,
    assert_statistics_right,
    gradient_of,
    make,
    seen_by,
)

pytest.importorskip("triton", reason="kernels need a Triton: triton-ascend for cpu and npu, triton for cuda")

from nsa_triton.ops.compress_attention import launch

# heads, kv heads, head sizes, window, block, K; query tokens; keys, None: the windows of the queries; options
SHAPES: list[Any] = [
    (Sizes(64, 4, 192, 128, (32, 16), 64, 16), (130, 31), None, {"causal": True, "forced": (1, 2)}),
    (Sizes(4, 4, 64, 64, (16, 16), 16, 8), (31, 0, 33, 1, 63, 65), (33, 7, 0, 65, 31, 1), {"masked": True}),
    (Sizes(8, 2, 80, 48, (64, 16), 64, 4), (5, 63, 0, 65), (0, 65, 33, 1), {"forced": "mask", "behind": 3}),
    (Sizes(10, 5, 65, 18, (48, 32), 96, 5, "overlap"), (200, 31, 40), None, {"causal": True}),
    (Sizes(64, 1, 16, 16, (32, 16), 64, 16, "overlap"), (65, 1, 20), (70, 3, 20), {"mask_dtype": torch.uint8}),
    (Sizes(7, 7, 8, 7, (32, 16), 64, 16), (70, 33), (66, 80), {"masked": True, "forced": "mask"}),
    (Sizes(2, 1, 3, 2, (48, 16), 48, 1), (20, 47, 48, 0, 49, 170), None, {"causal": True, "forced": (0, 1)}),
    (Sizes(3, 1, 33, 40, (16, 16), 80, 3), (63, 65), (64, 31), {"forced": (2, 0)}),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OWN = [BF16, FP32, FP16, FP32, BF16, FP16, FP32, BF16]  # dtype of each
# Small and quick, where the shape does not matter.
PLAIN = Sizes(4, 2, 32, 32, (32, 16), 64, 6)


def run(problem: Problem) -> tuple[torch.Tensor, ...]:
    return launch.forward(*problem.bytes())


def run_backward(problem: GradProblem) -> tuple[torch.Tensor, ...]:
    mask = problem.atten_mask
    return launch.backward(*problem._replace(atten_mask=None if mask is None else mask.view(torch.uint8)))


def outputs_of(problem: Problem) -> tuple[torch.Tensor, ...]:
    """Of both kernels."""
    outputs = run(problem)
    return *outputs, *run_backward(gradient_of(problem, outputs))


@pytest.mark.usefixtures("poisoned")
@shapes_in_dtypes(SHAPES, OWN, SHAPES[1])
def test_results_are_right(shape, dtype, device):
    problem = make(*shape[:3], dtype, **shape[3]).to(device)
    outputs = run(problem)
    assert_right(outputs, problem)
    gradients = gradient_of(problem, outputs)
    assert_gradients_right(run_backward(gradients), gradients)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("group", [1, 2, 4, 16, 64])
def test_groups(group, device):
    """Apart from all else; each is among SHAPES too."""
    sizes = Sizes(2 * group, 2, 32, 16, (32, 16), 64, 6)
    problem = make(sizes, (100, 17), dtype=torch.bfloat16, causal=True, forced=(1, 1)).to(device)
    outputs = run(problem)
    assert_right(outputs, problem)
    gradients = gradient_of(problem, outputs)
    assert_gradients_right(run_backward(gradients), gradients)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_tokens_that_see_nothing(kind, device):
    problem = make(PLAIN, (70, 3), (18, 5), forced=(1, 0), behind=2, **{kind: True})
    if kind == "masked":
        problem.atten_mask[5:37] = True  # whole tiles, too
    problem = problem.to(device)
    outputs = run(problem)
    assert_right(outputs, problem)
    out, ids, softmax_max, softmax_sum = outputs
    blind = [t for t in range(70) if not seen_by(problem, t, 18)]
    assert set(range(5, 31)) <= set(blind)
    assert not out[blind].any()
    assert ids[blind].tolist() == [[[0, 1, 2, 3, 4, -1]] * 2] * len(blind)
    for statistic, nothing in ((softmax_max, LOWEST), (softmax_sum, 0.0)):
        assert (statistic.flatten()[: 70 * 4 * 8].view(4, 70, 8)[:, blind] == nothing).all()
    gradients = gradient_of(problem, outputs)
    query_grad, key_grad, value_grad = run_backward(gradients)
    assert not query_grad[blind].any()
    assert_gradients_right((query_grad, key_grad, value_grad), gradients)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("queries", [(31,), (5, 0, 20), (0, 31, 1)], ids=str)
def test_segments_shorter_than_a_window(queries, device):
    """No compressed token at all: keys and values have no rows."""
    problem = make(PLAIN, queries, causal=True, forced=(1, 1), behind=1).to(device)
    problem = problem._replace(key=problem.key[:0], value=problem.value[:0])
    outputs = run(problem)
    assert_right(outputs, problem)
    query_grad, key_grad, value_grad = run_backward(gradient_of(problem, outputs))
    assert not query_grad.any()
    assert key_grad.shape == problem.key.shape
    assert value_grad.shape == problem.value.shape


@pytest.mark.usefixtures("poisoned")
def test_rows_that_are_nobodys_only(device):
    problem = make(PLAIN, (0, 0), (20, 5), behind=40).to(device)
    outputs = run(problem)
    assert_right(outputs, problem)
    for gradient in run_backward(gradient_of(problem, outputs)):
        assert not gradient.any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("importance", ["cann", "overlap"])
def test_long_sequences(importance, device):
    """More blocks than are looked at at once, and more tiles of keys than one."""
    sizes = Sizes(4, 1, 32, 32, (32, 16), 64, 16, importance)
    problem = make(sizes, (70, 9), (2500, 1025), torch.bfloat16, forced="mask").to(device)
    outputs = run(problem)
    assert_right(outputs, problem)
    gradients = gradient_of(problem, outputs)
    assert_gradients_right(run_backward(gradients), gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [20.0, 70.0])
def test_big_scores(size, dtype, device):
    """Scores of about +-60 and +-200: all weight is on few tokens, and float32 has fewer bits behind their point."""
    problem = make(PLAIN, (150, 33), dtype=dtype, size=size, causal=True).to(device)
    outputs = run(problem)
    assert_right(outputs, problem, rtol=2e-6 * size, slack=3.0)
    gradients = gradient_of(problem, outputs)
    assert_gradients_right(run_backward(gradients), gradients, slack=3.0)


@pytest.mark.parametrize("importance", ["cann", "overlap"])
@pytest.mark.parametrize("score", [-200.0, -60.0, 0.0, 60.0, 200.0])
def test_equal_scores_average_and_go_by_number(score, importance, device):
    """Equal keys: every token weighs the same, and so does every block that gathers equally many."""
    problem = make(PLAIN._replace(entries=9, importance=importance), (9, 5), (130, 64)).to(device)
    key = torch.full_like(problem.key, score / 32)
    problem = problem._replace(query=torch.ones_like(problem.query), key=key, scale=1.0)
    outputs = run(problem)
    assert_right(outputs, problem, rtol=1e-4, slack=100.0 if score else 1.0)
    expected = torch.arange(9, dtype=torch.int32) + (importance == "overlap")  # block 0 misses a token there
    assert torch.equal(outputs[1].cpu(), expected.expand(14, 2, 9))
    torch.testing.assert_close(outputs[2], torch.full_like(outputs[2], score))
    assert (outputs[3].cpu() == torch.tensor([130.0] * 9 + [64.0] * 5)[:, None, None]).all()


def test_equal_blocks_tie_at_any_length(device):
    """Keys that repeat give equal sums wherever they are; each class of equal blocks goes by number."""
    problem = make(PLAIN._replace(entries=40), (65, 40), (1300, 160))
    one = problem.key[:32]
    key = torch.cat((one.repeat(41, 1, 1)[:1300], one.repeat(5, 1, 1)))  # 8 blocks are a period
    problem = problem._replace(key=key).to(device)
    outputs = run(problem)
    assert_right(outputs, problem)
    for first, tokens, blocks in ((0, 65, 325), (65, 40, 40)):
        own = outputs[1][first : first + tokens].cpu().long()
        place = torch.full((*own.shape[:2], blocks + 1), 10_000)
        place.scatter_(2, own.clamp(min=0), torch.arange(40).expand(own.shape))
        inner = place[..., 1 : blocks - 9]  # without the ends, which gather fewer
        assert (inner <= place[..., 9 : blocks - 1]).all()


def test_causal_scores_of_nobody_are_zero_and_go_by_number(device):
    problem = make(PLAIN._replace(entries=12), (600,), causal=True).to(device)
    _, ids, *_ = run(problem)
    assert_ids_right(ids, problem)
    assert ids[:31].tolist() == [[[0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1, -1]] * 2] * 31
    t, blocks = torch.arange(600), 9
    seen = (((t - 31) // 16 + 1).clamp(min=0) + 3) // 4  # blocks that gather a token that is seen
    for token in range(600):
        rest = ids[token, :, int(seen[token]) : blocks].tolist()
        assert all(row == list(range(int(seen[token]), blocks)) for row in rest)


def test_results_are_bit_identical_on_repeat_and_with_any_number_of_threads(device):
    problems = [make(*SHAPES[i][:3], OWN[i], **SHAPES[i][3]).to(device) for i in (1, 3, 4)]
    problems.append(make(PLAIN, (700, 3, 900), dtype=torch.float32, causal=True).to(device))
    once = [outputs_of(problem) for problem in problems]
    threads = torch.get_num_threads()
    try:
        for turn in range(20):
            torch.set_num_threads(turn % 3 + 1)
            for problem, first in zip(problems, once, strict=True):
                again = outputs_of(problem)
                assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[6]], ids=str)
def test_a_batch_gives_what_its_segments_give_alone(shape, device):
    problem = make(*shape[:3], torch.float32, **shape[3]).to(device)
    outputs = run(problem)
    given = gradient_of(problem, outputs)
    gradients = run_backward(given)
    heads = problem.query.shape[1]
    for b, (first, tokens, first_key, keys) in enumerate(problem.segments()):
        if tokens == 0:
            continue
        queries, rows = slice(first, first + tokens), slice(first_key, first_key + keys)
        alone = problem.segment(b)
        own = run(alone)
        assert torch.equal(own[1], outputs[1][queries])
        place = slice(first * heads * 8, (first + tokens) * heads * 8)
        torch.testing.assert_close(own[0], outputs[0][queries], rtol=1e-5, atol=1e-5)
        for ours, all_of_them in zip(own[2:], outputs[2:], strict=True):
            torch.testing.assert_close(ours.flatten(), all_of_them.flatten()[place], rtol=1e-6, atol=1e-6)
        one = gradient_of(alone, own)._replace(grad=given.grad[queries])
        for ours, whole, mine in zip(run_backward(one), gradients, (queries, rows, rows), strict=True):
            torch.testing.assert_close(ours, whole[mine], rtol=1e-4, atol=1e-5)


def in_wide(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in a larger tensor: strided tokens and heads, and rows of consecutive elements."""
    shape = (tensor.shape[0] + 1, tensor.shape[1] + 3, tensor.shape[2] + 5)
    wide = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
    return wide[1:, 2:-1, 3:-2].copy_(tensor)


def test_strided_inputs_give_the_bits_of_dense_ones(device):
    problem = make(PLAIN, (70, 33), (20, 9), torch.float16, masked=True, forced="mask").to(device)
    outputs = run(problem)
    given = gradient_of(problem, outputs)
    gradients = run_backward(given)
    names = ("query", "key", "value")
    heads_first = {name: getattr(problem, name).transpose(0, 1).contiguous().transpose(0, 1) for name in names}
    for changed in ({name: in_wide(getattr(problem, name)) for name in names}, heads_first):
        assert all(torch.equal(a, b) for a, b in zip(run(problem._replace(**changed)), outputs, strict=True))
        more = {name: in_wide(getattr(given, name)) for name in ("grad", "attention_out")}
        again = run_backward(given._replace(**changed, **more))
        assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


# Few kernels: all of these numbers are compiled in. Lengths, masks and data are not.
# sizes, dtype, whether keys are the windows of the queries, query tokens at most, options
FUZZED: list[Any] = [
    (Sizes(4, 2, 16, 16, (32, 16), 64, 3), torch.float32, True, 120, {"causal": True, "forced": (1, 1)}),
    (Sizes(2, 2, 65, 18, (48, 16), 48, 12, "overlap"), torch.float16, False, 40, {"masked": True, "forced": "mask"}),
    (Sizes(2, 1, 48, 32, (48, 32), 96, 5), torch.bfloat16, True, 120, {"causal": True}),
    (Sizes(1, 1, 5, 7, (16, 16), 48, 6), torch.float32, False, 60, {"mask_dtype": torch.uint8, "masked": True}),
]


@st.composite
def any_problem(draw):
    sizes, dtype, fitting, longest, options = draw(st.sampled_from(FUZZED))
    batch = draw(st.integers(1, 4))
    queries = draw(st.lists(st.integers(0, longest), min_size=batch, max_size=batch))
    keys = None if fitting else draw(st.lists(st.integers(0, 40), min_size=batch, max_size=batch))
    size, behind = draw(st.sampled_from([0.0, 1.0, 1.0, 5.0])), draw(st.sampled_from([0, 0, 3]))
    if not sum(queries) + behind:
        queries = [1] * batch
    return make(sizes, queries, keys, dtype, draw(st.integers(0, 999)), size=size, behind=behind, **options)


def assert_near(actual, expected, eps: float) -> None:
    """Within some roundings of the largest number, or of 1: what is added up is about as large, and may cancel."""
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=4 * eps, atol=max(4 * eps, 1e-5) * scale)


@pytest.mark.usefixtures("one_thread")
@fuzzed(200)
@given(problem=any_problem())
def test_any_ragged_batch(problem, device):
    check_batch(problem, device)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@fuzzed(1200)
@given(problem=any_problem())
def test_many_more_ragged_batches(problem, device):
    check_batch(problem, device)


def check_batch(problem, device) -> None:
    problem = problem.to(device)
    outputs = run(problem)
    expected, _, *statistics = reference.forward(*problem.doubled())
    eps = torch.finfo(problem.query.dtype).eps
    torch.testing.assert_close(outputs[0].double(), expected, rtol=4 * eps, atol=max(4 * eps, 5e-6))
    assert_ids_right(outputs[1], problem, rtol=5e-5)
    assert_statistics_right(outputs[2:], statistics, rtol=2e-5)
    given = gradient_of(problem, outputs)
    for ours, exact in zip(run_backward(given), reference.backward(*given.doubled()), strict=True):
        assert_near(ours, exact, eps)
