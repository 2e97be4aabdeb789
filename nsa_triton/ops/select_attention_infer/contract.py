"""What a legal call of select_attention_infer is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentValueError
from nsa_triton.limits import check
from nsa_triton.ops._common import paged_contract, pages
from nsa_triton.ops._common.arguments import Meta, check_size
from nsa_triton.ops._common.indices import refuse_outside
from nsa_triton.ops._common.paged_contract import KVLEN
from nsa_triton.ops._common.queries import refuse_bad_rows, visible_tokens

OP = "nsa_select_attention_infer"
INTEGERS = ("head_num", "key_value_head_num", "select_block_size", "select_block_count", "page_block_size")


def check_types(**call: Any) -> None:
    """Check the arguments of a public call one by one."""
    tensors = ("query", "key", "value", "topk_indices")
    paged_contract.check_types(call, tensors=tensors, optional=("atten_mask", "block_table"), ints=INTEGERS)


def packed_ids(topk_indices: Tensor, query: Tensor, layout: str) -> Tensor:
    """[T, N2, K] of the ids of any layout. [B, N2, K] will do for one query token per batch."""
    if layout != "TND" and topk_indices.dim() == 4:
        if topk_indices.shape[:2] != query.shape[:2]:
            expected = f"{list(query.shape[:2])}, the batches and query tokens of query"
            raise ArgumentValueError("topk_indices.shape[:2]", expected, list(topk_indices.shape[:2]))
        return topk_indices.flatten(0, 1)
    if topk_indices.dim() != 3 or (layout != "TND" and query.shape[1] != 1):
        one = " or, for one query token per batch, [B, N2, K]"
        expected = "[T, N2, K]" if layout == "TND" else "[B, S, N2, K]" + (one if query.shape[1] == 1 else "")
        raise ArgumentValueError("topk_indices", expected, f"shape {list(topk_indices.shape)}")
    return topk_indices


@paged_contract.CallCheck
def check_call(call: dict[str, Meta], numbers: dict[str, int], mode: str) -> None:
    """`numbers` has select_block_size, and what a public call, which has no lengths yet, says in numbers."""
    paged_contract.check_kinds(OP, call, mode)
    count = call["topk_indices"].shape[2]
    given = paged_contract.quantities(call, {"select_block_count": count, "topk_indices.shape[-1]": count, **numbers})
    check(OP, {**given, "key_value_head_num": given["N2"]}, mode)
    paged_contract.check_sizes(call, given)
    check_size("topk_indices", call["topk_indices"], 0, call["query"].shape[0], "a row for each query token")
    check_size("topk_indices", call["topk_indices"], 1, given["N2"], "a list for each kv head")
    if count < 1:
        raise ArgumentValueError("select_block_count", "at least 1", count)


def refuse_bad_indices(
    key: Tensor, topk_indices: Tensor, block_table: Tensor, lengths: Tensor, rows: Tensor | None, block: int
) -> None:
    """Raise for ids, pages and lengths that the kernels would clamp or skip. Reads them back to the host."""
    n_pages, page = key.shape[:2]
    if rows is not None:
        refuse_bad_rows(rows, topk_indices.shape[0])
    pages.refuse_missing_pages(KVLEN, lengths, block_table, page)
    batch, visible = visible_tokens(rows, lengths, topk_indices.shape[0])
    blocks = ((visible + block - 1) // block)[:, None, None]
    hint = "-1 is an empty entry, and blocks that the query token does not see do not exist"
    refuse_outside("topk_indices", topk_indices, -1, blocks, (visible > 0)[:, None, None], hint)
    # Blocks and pages are made of sixteens: the tokens 0, 16, 32 .. of a block are in all pages that it touches.
    place = topk_indices.long()[..., None] * block + torch.arange(
        0, block, 16, device=key.device
    )  # [T, N2, K, l' / 16]
    read = torch.zeros_like(block_table, dtype=torch.bool)
    is_read = (place >= 0) & (place < visible[:, None, None, None])
    read[batch[:, None, None, None].expand_as(place)[is_read], place[is_read] // page] = True
    pages.refuse_bad_pages(block_table, n_pages, read)
