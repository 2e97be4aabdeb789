"""The kernels of the ops on paged caches: what each of them must compute, whatever it attends to."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st

from tests.dtypes import DTYPES
from tests.ops.paged import PagedOp


class PagedKernels:
    """An op says what it is and inherits these tests."""

    op: ClassVar[PagedOp]
    run: ClassVar[Any]  # launch.forward
    assert_accurate: ClassVar[Any]
    shapes: ClassVar[list[Any]]  # arguments of op.make; number 3 has several batches
    dtypes: ClassVar[list[torch.dtype]]  # of each
    wide: ClassVar[Any]  # sizes: 16 query heads, 2 kv heads, several splits
    narrow: ClassVar[Any]  # sizes: head sizes 16

    @pytest.mark.usefixtures("poisoned")
    def test_any_page_id_reads_some_page(self, device):
        """Page ids that are needed and not in the cache give the nearest page, as the reference says."""
        problem = self.op.make(*self.shapes[3], torch.float32)
        problem = problem._replace(key=problem.key.nan_to_num(0.5), value=problem.value.nan_to_num(0.5))
        table = torch.where(problem.table % 2 == 0, problem.table, problem.table * 1_000_003 - 7)
        problem = problem._replace(table=table.int()).to(device)
        self.assert_accurate(self.run(*problem), problem)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [20.0, 200.0])
    def test_big_scores(self, size, dtype, device):
        """Scores of about +-200, and far beyond, where all weight is on one token."""
        problem = self.op.make(self.wide, (500, 77), (1, 1), dtype, size=size).to(device)
        self.assert_accurate(self.run(*problem), problem)

    @pytest.mark.parametrize("score", [-200.0, 200.0])
    def test_equal_big_scores_average(self, score, device):
        problem = self.op.make(self.narrow, (70,), (1,), torch.float32).to(device)
        query, key = torch.ones_like(problem.query), torch.full_like(problem.key, score / 16)
        problem = problem._replace(query=query, key=key, scale=1.0)
        output, lse = self.run(*problem)
        expected, expected_lse = self.op.reference(*problem.doubled())
        # log-sum-exps of +-200 have 16 bits behind the point, and they weigh the splits
        torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0)
        found = lse[lse.isfinite()]
        assert len(found) > 0
        assert (found.abs() > 190).all()

    def test_results_are_bit_identical_on_repeat_and_with_any_number_of_threads(self, device):
        pairs = zip(self.shapes, self.dtypes, strict=True)
        problems = [self.op.make(*shape, dtype).to(device) for shape, dtype in pairs]
        once = [self.run(*problem) for problem in problems]
        threads = torch.get_num_threads()
        try:
            for number in (1, 2, 3, threads):
                torch.set_num_threads(number)
                for problem, expected in zip(problems, once, strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(self.run(*problem), expected, strict=True))
        finally:
            torch.set_num_threads(threads)

    def test_a_batch_does_not_depend_on_the_others(self, device):
        """But for the order of summation: one batch alone is cut into more splits."""
        problem = self.op.make(self.narrow, (90, 5, 64), (1, 1, 1), torch.float32).to(device)
        output, lse = self.run(*problem)
        of_batches = [name for name in ("query", "ids", "table", "lengths") if name in problem._fields]
        for b in range(3):
            one = slice(b, b + 1)
            alone = problem._replace(**{name: getattr(problem, name)[one] for name in of_batches})
            torch.testing.assert_close(self.run(*alone), (output[one], lse[one]), rtol=1e-5, atol=1e-5)


def ragged_batches(sizes_and_dtypes: list[Any]) -> st.SearchStrategy[Any]:
    """Arguments and keywords of op.make: few sizes, each of which is compiled, in any batch."""

    @st.composite
    def any_batch(draw):
        sizes, dtype = draw(st.sampled_from(sizes_and_dtypes))
        batch = draw(st.integers(1, 4))
        cached = draw(st.lists(st.integers(0, 300), min_size=batch, max_size=batch))
        tokens = [draw(st.integers(0, min(4, length))) for length in cached]
        stride = max(1, *tokens) if draw(st.booleans()) else None
        if not stride and not any(tokens):
            tokens, cached = [1] * batch, [length + 1 for length in cached]
        more = {"stride": stride, "garbage": draw(st.booleans())}
        return (sizes, cached, tokens, dtype, draw(st.integers(0, 999))), more

    return any_batch()


def assert_as_the_reference(actual: Any, op: PagedOp, problem: Any) -> None:
    output, lse = actual
    expected, expected_lse = op.reference(*problem.doubled())
    eps = torch.finfo(output.dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=4 * eps, atol=max(4 * eps, 2e-6))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def assert_nothing_behind(actual: Any, rows: torch.Tensor, stride: int) -> None:
    """Rows of batches that are `stride` apart, behind the query tokens of each, are 0 and -inf."""
    output, lse = actual
    for first, count in rows.tolist():
        assert not output[first + count : first + stride].any()
        assert (lse[first + count : first + stride] == -torch.inf).all()
