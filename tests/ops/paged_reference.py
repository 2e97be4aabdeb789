"""Layouts, lengths, strides and numbers: what they mean is the same for the ops on paged caches."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nsa_triton.ops._common import implementation
from tests.ops.paged import PagedOp


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def equal(actual: Any, expected: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


class PagedReference:
    """An op says what it is and inherits these tests."""

    op: ClassVar[PagedOp]
    small: ClassVar[Any]  # 4 query heads, 2 kv heads, head sizes 6 and 5, pages of 16

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_everything_is_float32_and_rounded_once(self, dtype):
        problem = self.op.make(self.small, [90, 33], [1, 1], dtype)
        output, lse = self.op.reference(*problem)
        expected, expected_lse = self.op.naive(problem)
        assert (output.dtype, lse.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(output.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)

    def test_auto_takes_the_reference_for_float64_and_says_so_once(self, caplog):
        implementation._say_once.cache_clear()
        problem = self.op.make(self.small, [50], [1], torch.float64)
        with caplog.at_level(logging.WARNING, logger="nsa_triton"):
            for _ in range(3):
                output, lse = self.op(problem, impl="auto")
        close(output, self.op.naive(problem)[0])
        assert lse.dtype == torch.float32
        assert "float64" in caplog.text
        assert len(caplog.records) == 1


class PagedLayouts:
    """These tests too, for each implementation: `impl` is a parameter of the class that inherits them."""

    op: ClassVar[PagedOp]
    small: ClassVar[Any]

    @pytest.mark.parametrize("folded", [False, True])
    @pytest.mark.parametrize(("tokens", "stride"), [([1, 1, 1], None), ([2, 2, 2], None), ([1, 3, 0], 3)])
    def test_layouts_agree(self, tokens, stride, folded, impl):
        problem = self.op.make(self.small, [50, 33, 64], tokens, stride=stride)
        expected, expected_lse = self.op.reference(*problem)
        for layout in ("BSND", "BSH"):
            output, lse = self.op(problem, layout, folded=folded, impl=impl)
            shape = (3, len(problem.query) // 3)
            assert output.shape == ((*shape, 4, 5) if layout == "BSND" else (*shape, 20))
            assert lse.shape == (*shape, 4)
            close(output.reshape(expected.shape), expected, 1e-5)
            close(lse.flatten(0, 1), expected_lse, 1e-5)
            assert output.is_contiguous()
        if stride is None:
            output, lse = self.op(problem, folded=folded, impl=impl)
            close((output, lse), (expected, expected_lse), 1e-5)

    def test_every_kind_of_length_list_and_table_means_the_same(self, impl):
        problem = self.op.make(self.small, [50, 33, 64], [1, 1, 1])
        expected = self.op(problem, impl=impl)
        for kind in (list, tuple, np.array, torch.tensor, lambda entries: torch.tensor(entries, dtype=torch.int32)):
            lengths: Any = {"actual_seq_kvlen": kind([50, 33, 64]), "actual_seq_qlen": kind([1, 1, 1])}
            assert equal(self.op(problem, impl=impl, **lengths), expected)
        far = torch.where(problem.table < 0, 2**40, problem.table.long())
        assert equal(self.op(problem, impl=impl, block_table=far, actual_seq_qlen=None), expected)

    def test_strided_tensors_give_the_bits_of_dense_ones(self, impl):
        problem = self.op.make(self.small._replace(key_dim=16, value_dim=16), [50, 33, 64], [2, 1, 2])
        expected = self.op(problem, impl=impl)

        def wide(tensor, dimension):  # every second entry of the dimension, NaN between
            other = torch.stack((tensor, torch.full_like(tensor, float("nan"))), dimension + 1)
            return other.flatten(dimension, dimension + 1)[(slice(None),) * dimension + (slice(None, None, 2),)]

        def reversed_in_memory(tensor):
            order = range(tensor.dim())[::-1]
            return tensor.permute(*order).contiguous().permute(*order)

        given = self.op.arguments(problem)
        names = {"query", "topk_indices", "block_table"} & set(given)
        turned: dict[str, Any] = {name: reversed_in_memory(given[name]) for name in names}
        turned["key"] = problem.key.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        wider: list[dict[str, Any]] = [{name: wide(given[name], d)} for name in ("key", "value") for d in (0, 1, 2)]
        for changes in (turned, *wider):
            assert equal(self.op(problem, impl=impl, **changes), expected), changes.keys()

    def test_numbers_of_numpy_are_scales_and_the_lse_is_optional(self, impl):
        problem = self.op.make(self.small, [50, 33], [1, 1])
        assert torch.equal(self.op(problem, impl=impl, return_lse=False), self.op(problem, impl=impl)[0])
        twice = self.op(problem, impl=impl, scale_value=2)[0]
        for scale in (2.0, np.float32(2), np.int64(2)):
            assert torch.equal(self.op(problem, impl=impl, scale_value=scale)[0], twice)

    def test_pages_are_dealt_in_order_without_a_block_table(self, impl):
        problem = self.op.make(self.small, [50, 33, 64], [1, 1, 1])
        key, value = (torch.randn(14, *cache.shape[1:]) for cache in (problem.key, problem.value))
        table = torch.arange(12).view(3, 4)  # the longest needs 4 pages
        expected = self.op(problem, key=key, value=value, block_table=table, impl=impl)
        assert equal(self.op(problem, key=key, value=value, block_table=None, impl=impl), expected)
