"""What a legal call of sliding_window_attention_infer is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_triton.limits import check
from nsa_triton.ops._common import paged_contract, pages
from nsa_triton.ops._common.arguments import Meta
from nsa_triton.ops._common.paged_contract import KVLEN
from nsa_triton.ops._common.queries import refuse_bad_rows, visible_tokens

OP = "nsa_sliding_window_attention_infer"
INTEGERS = ("head_num", "key_value_head_num", "window_size", "page_block_size")


def check_types(**call: Any) -> None:
    """Check the arguments of a public call one by one."""
    tensors = ("query", "key", "value")
    paged_contract.check_types(call, tensors=tensors, optional=("block_table",), ints=INTEGERS)


@paged_contract.CallCheck
def check_call(call: dict[str, Meta], numbers: dict[str, int], mode: str) -> None:
    """`numbers` has window_size, and what a public call, which has no lengths yet, says in numbers."""
    paged_contract.check_kinds(OP, call, mode)
    given = paged_contract.quantities(call, numbers)
    check(OP, {**given, "key_value_head_num": given["N2"]}, mode)
    paged_contract.check_sizes(call, given)


def refuse_bad_indices(
    query: Tensor, key: Tensor, block_table: Tensor, lengths: Tensor, rows: Tensor | None, window: int
) -> None:
    """Raise for pages that a window touches and for lengths that the kernels would clamp. Reads them back to the host.

    Pages that no window touches may be anything: a cache may give them away.
    """
    n_pages, page = key.shape[:2]
    if rows is not None:
        refuse_bad_rows(rows, query.shape[0])
    pages.refuse_missing_pages(KVLEN, lengths, block_table, page)
    batch, visible = visible_tokens(rows, lengths, query.shape[0])
    first_token = torch.arange(block_table.shape[1], device=key.device) * page
    begin, end = (visible - window)[:, None], visible[:, None]
    touched = (first_token < end) & (first_token + page > begin)  # [T, max_blocks]
    read = torch.zeros_like(block_table).index_add_(0, batch, touched.int()) > 0
    pages.refuse_bad_pages(block_table, n_pages, read)
