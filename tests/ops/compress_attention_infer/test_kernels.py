"""The kernels of compress_attention_infer on every target that is present, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton.ops.compress_attention_infer import reference
from tests.fuzzing import fuzzed
from tests.ops.compress_attention_infer.cases import Problem, Sizes, assert_ids_right, assert_right, make

pytest.importorskip("triton", reason="kernels need a Triton: triton-ascend for cpu and npu, triton for cuda")

from nsa_triton.ops.compress_attention_infer import launch

# heads, kv heads, head sizes, page, window, block, K; compressed tokens; query tokens; dtype
SHAPES = [
    (Sizes(64, 4, 192, 128, 128, (32, 16), 64, 16), (300, 77), (1, 1), torch.bfloat16),
    (Sizes(14, 1, 65, 18, 48, (16, 16), 16, 7), (0, 1, 47, 48, 49), (1, 1, 1, 1, 1), torch.float32),
    (Sizes(4, 2, 45, 19, 16, (48, 16), 48, 5), (15, 16, 17, 130), (1, 1, 1, 1), torch.float16),
    (Sizes(64, 1, 64, 80, 64, (64, 32), 128, 4), (63, 64, 65, 200), (2, 2, 2, 2), torch.bfloat16),
    (Sizes(128, 1, 32, 32, 256, (32, 32), 96, 6), (255, 257), (1, 1), torch.float16),
    (Sizes(2, 2, 3, 2, 128, (48, 16), 80, 9, "overlap"), (127, 128, 129), (3, 1, 4), torch.float32),
    (Sizes(8, 2, 16, 48, 48, (48, 32), 64, 40, "overlap"), (100, 7), (1, 1), torch.bfloat16),
    (Sizes(4, 1, 80, 16, 64, (128, 16), 128, 1), (90, 200), (1, 1), torch.float32),
]


def run(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return launch.forward(*problem)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_right(shape, device):
    problem = make(*shape, hides=max(shape[2]) > 1).to(device)
    assert_right(run(problem), problem)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_dtype(dtype, device):
    problem = make(Sizes(4, 2, 64, 48, 64, (32, 16), 64, 8), (150, 33), (1, 1), dtype).to(device)
    assert_right(run(problem), problem)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5]], ids=str)
def test_rows_behind_the_query_tokens_are_nobodys(shape, device):
    problem = make(*shape, apart=4, hides=True, garbage=True).to(device)
    output, ids = run(problem)
    assert_right((output, ids), problem)
    for first, tokens in problem.owned():
        assert not output[first + tokens : first + 4].any()
        assert (ids[first + tokens : first + 4] == -1).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("forced", [(1, 2), (0, 1), (2, None), (0, 0), (7, 40)], ids=str)
@pytest.mark.parametrize(("window", "importance"), [((32, 16), "cann"), ((48, 16), "overlap"), ((32, 32), "overlap")])
def test_blocks_up_to_the_query_token(window, importance, forced, device):
    """Its own block is the last candidate, even where no window touches it yet."""
    sizes = Sizes(4, 2, 32, 16, 16, window, 48 if window[0] == 48 else 64, 6, importance)
    problem = make(sizes, (0, 1, 2, 3, 7, 20, 41), (3,) * 7, hides=True)
    tails = [length % window[1] for length in (0, 15, 1, 31, 7, 10, 13)]
    raw = [
        (int(n) - 1) * window[1] + window[0] + tail if n else 9 for n, tail in zip(problem.lengths, tails, strict=True)
    ]
    first, last = forced
    problem = problem._replace(raw=torch.tensor(raw, dtype=torch.int32), first_blocks=first, last_blocks=last).to(
        device
    )
    _, ids = run(problem)
    _, expected = reference.forward(*problem.doubled())
    assert torch.equal(ids, expected)


def test_long_sequences(device):
    sizes = Sizes(4, 1, 32, 32, 128, (32, 16), 64, 16)
    problem = make(sizes, (8193 + 128, 4097), (1, 1), torch.bfloat16, columns=66).to(device)
    assert_right(run(problem), problem)


@pytest.mark.usefixtures("poisoned")
def test_any_page_id_reads_some_page(device):
    """Page ids that are needed and not in the cache give the nearest page, as the reference says."""
    problem = make(*SHAPES[1])
    problem = problem._replace(key=problem.key.nan_to_num(0.5), value=problem.value.nan_to_num(0.5))
    table = torch.where(problem.table % 2 == 0, problem.table, problem.table * 1_000_003 - 7)
    problem = problem._replace(table=table.int()).to(device)
    assert_right(run(problem), problem)


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_big_scores(size, device):
    """Scores of about +-200, and far beyond: all weight is on few tokens."""
    sizes = Sizes(4, 2, 64, 48, 64, (32, 16), 64, 8)
    for dtype in (torch.float32, torch.bfloat16):
        problem = make(sizes, (150, 33), (1, 1), dtype, size=size).to(device)
        assert_right(run(problem), problem, rtol=1e-5 * size, slack=3.0)


@pytest.mark.parametrize("score", [-200.0, 200.0])
def test_equal_big_scores_average(score, device):
    problem = make(Sizes(4, 2, 64, 48, 64, (32, 16), 64, 8), (150, 33), (1, 1)).to(device)
    problem = problem._replace(query=torch.ones_like(problem.query), key=torch.full_like(problem.key, score / 8))
    output, ids = run(problem)
    assert_right((output, ids), problem)
    blocks = 38
    assert ids[0].tolist() == [[0, blocks - 2, blocks - 1, 1, 2, 3, 4, 5]] * 2


def test_pages_that_repeat_tie_at_any_length(device):
    """Equal pages give equal sums whatever is around them, split or not."""
    problem = make(Sizes(4, 1, 32, 32, 64, (32, 16), 64, 24), (640,), (1,))
    problem = problem._replace(key=problem.key.nan_to_num(0.5), value=problem.value.nan_to_num(0.5))
    table = torch.tensor([[3, 1, 3, 1, 3, 1, 3, 1, 3, 1]], dtype=torch.int32)
    problem = problem._replace(table=table).to(device)
    _, ids = run(problem)
    places = ids[0, 0, 3:].tolist()
    period = 32  # blocks of two pages
    for block in places:
        if 32 <= block < 126:
            assert places.index(block - period) < places.index(block) if block > period else True
    assert_right(run(problem), problem)


def test_results_are_bit_identical_on_repeat_and_with_any_number_of_threads(device):
    problems = [make(*shape).to(device) for shape in SHAPES[:4]]
    once = [run(problem) for problem in problems]
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for problem, first in zip(problems, once, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(run(problem), first, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_batch_gives_what_its_members_give_alone(device):
    problem = make(*SHAPES[2]).to(device)
    output, _ = run(problem)
    for b in range(4):
        one = slice(b, b + 1)
        alone = problem._replace(query=problem.query[one], table=problem.table[one], lengths=problem.lengths[one])
        assert_right(run(alone), alone)
        torch.testing.assert_close(run(alone)[0], output[one], rtol=2e-3, atol=2e-3)


# Few kernels: all of these numbers are compiled in, and so are the splits, which follow from batches and columns.
# sizes, dtype, cached tokens at most, batches, rows of a batch, query tokens at most, hides
FUZZED = [
    (Sizes(4, 2, 16, 16, 16, (32, 16), 64, 3), torch.float32, 320, 4, None, 1, False),
    (Sizes(14, 1, 65, 18, 48, (48, 16), 48, 12, "overlap"), torch.float16, 240, 1, None, 2, True),
    (Sizes(2, 2, 48, 32, 64, (64, 32), 128, 5), torch.bfloat16, 320, 3, 3, 3, True),
    (Sizes(3, 1, 5, 7, 32, (16, 16), 48, 6), torch.float32, 256, 2, 2, 2, False),
]


@st.composite
def any_problem(draw):
    sizes, dtype, longest, batch, apart, most, hides = draw(st.sampled_from(FUZZED))
    cached = draw(st.lists(st.integers(0, longest), min_size=batch, max_size=batch))
    tokens = [draw(st.integers(0, most)) if apart else most for _ in range(batch)]
    seed, garbage, size = draw(st.integers(0, 999)), draw(st.booleans()), draw(st.sampled_from([0.0, 1.0, 1.0, 5.0]))
    options = {"size": size, "apart": apart, "hides": hides, "garbage": garbage, "columns": -(-longest // sizes.page)}
    return make(sizes, cached, tokens, dtype, seed, **options)


@pytest.mark.usefixtures("one_thread")
@fuzzed(200)
@given(problem=any_problem())
def test_any_ragged_batch(problem, device):
    check_batch(problem, device)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@fuzzed(1000)
@given(problem=any_problem())
def test_many_more_ragged_batches(problem, device):
    check_batch(problem, device)


def check_batch(problem, device) -> None:
    problem = problem.to(device)
    output, ids = run(problem)
    expected, _ = reference.forward(*problem.doubled())
    eps = torch.finfo(output.dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=4 * eps, atol=max(4 * eps, 5e-6))
    assert_ids_right(ids, problem, rtol=5e-5)
