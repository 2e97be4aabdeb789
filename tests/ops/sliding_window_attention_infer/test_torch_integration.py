"""torch.compile, fake tensors, opcheck and the absence of gradients, on every implementation."""

from __future__ import annotations

from tests.ops.paged_integration import PagedImplementations, PagedOperator
from tests.ops.sliding_window_attention_infer.cases import OP, Sizes, every_impl

SIZES = Sizes(heads=4, kv_heads=2, key_dim=16, value_dim=8, page=16, window=20)


class TestOperator(PagedOperator):
    op = OP
    sizes = SIZES


@every_impl
class TestImplementations(PagedImplementations):
    op = OP
    sizes = SIZES
