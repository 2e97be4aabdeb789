"""The public function of select_attention_infer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.indices import as_int32
from nsa_triton.ops._common.lengths import batch_lengths, read_once
from nsa_triton.ops._common.paged_contract import check_host_lengths
from nsa_triton.ops._common.pages import dealt_pages
from nsa_triton.ops._common.queries import batch_count, most_query_tokens, packed, query_rows, unpacked, with_heads
from nsa_triton.ops.select_attention_infer import contract, library

if TYPE_CHECKING:
    import numpy as np

    Lengths = Sequence[int] | np.ndarray[Any, Any] | Tensor


def nsa_select_attention_infer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    scale_value: float,
    head_num: int,
    key_value_head_num: int,
    select_block_size: int,
    select_block_count: int,
    page_block_size: int,
    *,
    layout: str = "BSND",
    atten_mask: Tensor | None = None,
    block_table: Tensor | None = None,
    actual_seq_qlen: Lengths | None = None,
    actual_seq_kvlen: Lengths | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens of each batch over selected blocks of its paged cache.

    The query tokens of a batch are the last `actual_seq_qlen[b]` of its `actual_seq_kvlen[b]` tokens, and each sees the
    cache up to itself. Block i is the tokens from i * select_block_size on, cut where the query token sees no further.
    A query head attends to the blocks that the list of its kv head names:

        output[t, h] = softmax over the tokens p of these blocks (scale_value * query[t, h] . key[p, n]) @ value[p, n]

    An entry of -1 is skipped, wherever it stands, and so is a block that the query token does not see; a block that is
    listed twice counts twice. Where nothing is selected, the output is 0. It is 0 also in the rows of `query` behind
    the query tokens of a batch. Scores and sums are float32, and the output is rounded once. It has no gradient.

    Args:
        query: [B, S, N1, Dk] for layout "BSND", [B, S, N1 * Dk] for "BSH", [T, N1, Dk] for "TND", which packs the query
            tokens of all batches. Any head sizes; kernels take those up to 512. float16 or bfloat16; float32, which
            CANN does not have; float64 with impl="reference".
        key: the cache of keys, [pages, page_block_size, N2, Dk] or [pages, page_block_size, N2 * Dk], with the dtype
            and on the device of `query`. Any strides, but the last dimension is dense: a cache is never copied.
        value: the cache of values, [pages, page_block_size, N2, Dv] or [pages, page_block_size, N2 * Dv], likewise.
        topk_indices: the blocks of each query token and kv head, an integer tensor, best int32: [B, S, N2, K], or
            [B, N2, K] where S is 1; [T, N2, K] for "TND".
        scale_value: what scores are multiplied by, most often Dk ** -0.5.
        head_num: N1, a multiple of N2.
        key_value_head_num: N2.
        select_block_size: tokens per block, a multiple of 16. Blocks and pages need not be aligned.
        select_block_count: K, the last dimension of `topk_indices`.
        page_block_size: tokens per page, a multiple of 16.
        layout: "BSH", "BSND" or "TND". It says nothing of the caches.
        atten_mask: accepted and ignored, as CANN does: what a token may see follows from the lengths.
        block_table: the pages of each batch in order, [B, max_blocks], an integer tensor, best int32. Entries of pages
            that no selected block touches are not read. None: pages are dealt to the batches in order, as many to each
            as the longest needs.
        actual_seq_qlen: query tokens of each batch. None: all S rows, or one for "TND".
        actual_seq_kvlen: required. Tokens of each batch in the cache, its query tokens included. Both kinds of lengths
            are a list, tuple, numpy integer array or integer tensor. A tensor on the device is not read back: its
            values are not checked. Under torch.compile a list, tuple or tensor, and values are not checked either.
        return_lse: also return the logarithm of the sum of exp(score), for joining with other attention.
        impl: "triton" runs the kernels or raises; "reference" runs the specification in PyTorch (slow); "auto" runs
            the kernels and, where they cannot run, the reference, after a warning in the log "nsa_triton".

    Returns:
        A new tensor like `query` with Dv in place of Dk; with `return_lse` also a float32 tensor [B, S, N1], or
        [T, N1] for "TND", -inf where nothing is selected.

    Raises:
        ArgumentTypeError: (a TypeError) an argument has the wrong type or dtype.
        ArgumentValueError: (a ValueError and a RuntimeError) a shape, device or value is not as above. Ids, pages and
            lengths on the device are looked at only with NSA_TRITON_CHECK_INDICES=1; without it, garbage in them gives
            wrong numbers, but never an access outside of the tensors.
        ToolchainError: impl="triton", and the kernels cannot run on this machine.

    Example:
        >>> query = torch.randn(2, 1, 16, 192, dtype=torch.bfloat16)
        >>> keys = torch.randn(40, 128, 4, 192, dtype=torch.bfloat16)
        >>> values = torch.randn(40, 128, 4, 128, dtype=torch.bfloat16)
        >>> blocks = torch.arange(16, dtype=torch.int32).expand(2, 4, 16)
        >>> pages = torch.arange(40, dtype=torch.int32).view(2, 20)
        >>> sizes = 192**-0.5, 16, 4, 64, 16, 128
        >>> cached = {"block_table": pages, "actual_seq_kvlen": [2500, 900]}
        >>> nsa_select_attention_infer(query, keys, values, blocks, *sizes, **cached).shape
        torch.Size([2, 1, 16, 128])
    """
    is_eager = not torch.compiler.is_compiling()  # Dynamo cannot trace all checks; the operator makes those of shapes
    if is_eager:
        contract.check_types(
            query=query,
            key=key,
            value=value,
            topk_indices=topk_indices,
            scale_value=scale_value,
            head_num=head_num,
            key_value_head_num=key_value_head_num,
            select_block_size=select_block_size,
            select_block_count=select_block_count,
            page_block_size=page_block_size,
            layout=layout,
            atten_mask=atten_mask,
            block_table=block_table,
            actual_seq_qlen=actual_seq_qlen,
            actual_seq_kvlen=actual_seq_kvlen,
            return_lse=return_lse,
            impl=impl,
        )
        actual_seq_kvlen = read_once(actual_seq_kvlen, "actual_seq_kvlen")
        actual_seq_qlen = read_once(actual_seq_qlen, "actual_seq_qlen")
    queries = packed(query, layout, head_num)
    keys = with_heads(key, key_value_head_num, "key", "key_value_head_num")
    values = with_heads(value, key_value_head_num, "value", "key_value_head_num")
    ids = as_int32("topk_indices", contract.packed_ids(topk_indices, query, layout))
    table = None if block_table is None else as_int32("block_table", block_table)
    batch = batch_count(query, table, actual_seq_kvlen, layout)
    if is_eager:
        most = most_query_tokens(actual_seq_qlen, layout, query)
        numbers = {
            **({"S": most} if most else {}),  # 0 is for the operator, which knows whether there are rows at all
            "B": batch,
            "N1": head_num,
            "N2": key_value_head_num,
            "page_block_size": page_block_size,
            "select_block_size": select_block_size,
            "select_block_count": select_block_count,
        }
        tensors = {"query": queries, "key": keys, "value": values, "topk_indices": ids, "block_table": table}
        contract.check_call(tensors, numbers, mode=mode_in_force())
    rows = query_rows(actual_seq_qlen, layout, query, batch)
    lengths = batch_lengths(actual_seq_kvlen, "actual_seq_kvlen", batch, query.device)
    if is_eager:
        check_host_lengths(actual_seq_kvlen, actual_seq_qlen, keys, table)
    if table is None:
        table = dealt_pages(lengths, keys.shape[0], keys.shape[1])
    with torch.no_grad():
        output, lse = library.select_attention_infer(
            queries, keys, values, ids, table, lengths, rows, float(scale_value), select_block_size, impl
        )
    output = unpacked(output, layout, query)
    if not return_lse:
        return output
    return output, lse if layout == "TND" else lse.view(query.shape[0], query.shape[1], head_num)
