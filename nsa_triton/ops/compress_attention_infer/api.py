"""The public function of compress_attention_infer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.indices import as_int32
from nsa_triton.ops._common.lengths import batch_lengths, read_once
from nsa_triton.ops._common.pages import dealt_pages
from nsa_triton.ops._common.queries import (
    batch_count,
    most_query_tokens,
    packed,
    query_rows,
    unpacked,
    with_heads,
)
from nsa_triton.ops.compress_attention_infer import contract, library
from nsa_triton.ops.compress_attention_infer.contract import CMP_LEN, QLEN, RAW_LEN

if TYPE_CHECKING:
    import numpy as np

    Lengths = Sequence[int] | np.ndarray[Any, Any] | Tensor


def nsa_compress_attention_infer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale_value: float,
    head_num: int,
    key_value_head_num: int,
    select_block_size: int,
    select_block_count: int,
    page_block_size: int,
    compress_block_size: int,
    compress_stride: int,
    *,
    layout: str = "TND",
    atten_mask: Tensor | None = None,
    block_table: Tensor | None = None,
    topk_mask: Tensor | None = None,
    actual_seq_qlen: Lengths | None = None,
    actual_cmp_seq_kvlen: Lengths | None = None,
    actual_sel_seq_kvlen: Lengths | None = None,
    num_init_blocks: int | None = None,
    num_local_blocks: int | None = None,
    importance: str = "cann",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens of each batch over its paged cache of compressed tokens, and the best blocks.

    With P the softmax of scale_value * query[t, h] . key[i, n] over the compressed tokens i of the batch:

        output[t, h] = P @ value[:, n]                    P is rounded to the dtype of `value` first
        imp[h, j]    = the P of the windows on block j, each as often as they share a stride (before rounding)

    The blocks of kv head n are 0, nb - 2 and nb - 1, as far as they exist, then the others by descending sum of imp
    over its query heads, equal ones by ascending number. If select_block_count is more than nb, the rest is -1. nb
    counts the blocks of select_block_size raw tokens that windows touch: raw tokens behind the last complete window may
    be in a block that is no candidate; the sliding window covers those. A batch without a compressed token has output
    0 and no blocks. So have the rows of `query` behind the query tokens of a batch. It has no gradient.

    Args:
        query: [T, N1, Dk] for layout "TND", which packs the query tokens of all batches, [B, S, N1, Dk] for "BSND". Any
            head sizes; kernels take those up to 512. float16 or bfloat16; float32, which CANN does not have; float64
            with impl="reference".
        key: the cache of compressed keys, [pages, page_block_size, N2 * Dk] or [pages, page_block_size, N2, Dk], with
            the dtype and on the device of `query`. Any strides, but the last dimension is dense: a cache is never
            copied.
        value: the cache of compressed values, with Dv in place of Dk, likewise.
        scale_value: what scores are multiplied by, most often Dk ** -0.5.
        head_num: N1, a multiple of N2.
        key_value_head_num: N2.
        select_block_size: raw tokens per selection block, a multiple of compress_stride, at least compress_block_size.
        select_block_count: K, how many blocks to choose.
        page_block_size: compressed tokens per page, a multiple of 16.
        compress_block_size: raw tokens per compression window, a multiple of 16.
        compress_stride: raw tokens between two windows, a multiple of 16 up to compress_block_size.
        layout: "TND" or "BSND".
        atten_mask: a tensor whose values are ignored; that it is there says that the newest query tokens are new to
            the cache: where a batch has several, and actual_sel_seq_kvlen is given, the last compressed token is
            hidden from query tokens that stand before the end of its window.
        block_table: the pages of each batch in order, [B, max_blocks], an integer tensor, best int32. Entries behind
            the last page of a batch are not read. None: pages are dealt to the batches in order, as many to each as
            the longest needs.
        topk_mask: accepted and ignored, as CANN does.
        actual_seq_qlen: query tokens of each batch. None: all S rows, or one for "TND".
        actual_cmp_seq_kvlen: required. Compressed tokens of each batch in the cache.
        actual_sel_seq_kvlen: raw tokens of each batch, its query tokens included; see `atten_mask`. Where they are
            used, the compressed tokens must be those of all complete windows. All three kinds of lengths are a list,
            tuple, numpy integer array or integer tensor. A tensor on the device is not read back: its values are not
            checked. Under torch.compile a list, tuple or tensor, and values are not checked either.
        num_init_blocks: choose so many of the first blocks in any case, in place of CANN's three.
        num_local_blocks: choose so many of the last blocks in any case, in place of CANN's three, where the last one is
            that of the query token, whether or not a window touches it; so does `nsa_compress_attention`. With either,
            actual_sel_seq_kvlen is required, and query tokens are new to the cache without an atten_mask.
        importance: "cann" scores blocks as CANN does, where block j gathers the windows that overlap it, moved by one:
            those that end a stride later. "overlap" gathers those that truly overlap it.
        impl: "triton" runs the kernels or raises; "reference" runs the specification in PyTorch (slow); "auto" runs
            the kernels and, where they cannot run, the reference, after a warning in the log "nsa_triton".

    Returns:
        A new tensor like `query` with Dv in place of Dk, and the ids of the blocks, int32: [T, N2, K], or
        [B, S, N2, K] for "BSND".

    Raises:
        ArgumentTypeError: (a TypeError) an argument has the wrong type or dtype.
        ArgumentValueError: (a ValueError and a RuntimeError) a shape, device or value is not as above. Pages, and
            lengths on the device, are looked at only with NSA_TRITON_CHECK_INDICES=1; without it, garbage in them gives
            wrong numbers, but never an access outside of the tensors.
        ToolchainError: impl="triton", and the kernels cannot run on this machine.

    Example:
        >>> query = torch.randn(2, 16, 192, dtype=torch.bfloat16)
        >>> keys = torch.randn(40, 128, 4, 192, dtype=torch.bfloat16)
        >>> values = torch.randn(40, 128, 4, 128, dtype=torch.bfloat16)
        >>> pages = torch.arange(40, dtype=torch.int32).view(2, 20)
        >>> sizes = 192**-0.5, 16, 4, 64, 16, 128, 32, 16
        >>> cached = {"block_table": pages, "actual_cmp_seq_kvlen": [2500, 900]}
        >>> output, blocks = nsa_compress_attention_infer(query, keys, values, *sizes, **cached)
        >>> output.shape, blocks.shape
        (torch.Size([2, 16, 128]), torch.Size([2, 4, 16]))
    """
    is_eager = not torch.compiler.is_compiling()  # Dynamo cannot trace all checks; the operator makes those of shapes
    if is_eager:
        contract.check_types(
            query=query,
            key=key,
            value=value,
            scale_value=scale_value,
            head_num=head_num,
            key_value_head_num=key_value_head_num,
            select_block_size=select_block_size,
            select_block_count=select_block_count,
            page_block_size=page_block_size,
            compress_block_size=compress_block_size,
            compress_stride=compress_stride,
            layout=layout,
            atten_mask=atten_mask,
            block_table=block_table,
            topk_mask=topk_mask,
            actual_seq_qlen=actual_seq_qlen,
            actual_cmp_seq_kvlen=actual_cmp_seq_kvlen,
            actual_sel_seq_kvlen=actual_sel_seq_kvlen,
            importance=importance,
            impl=impl,
        )
        actual_seq_qlen = read_once(actual_seq_qlen, "actual_seq_qlen")
        actual_cmp_seq_kvlen = read_once(actual_cmp_seq_kvlen, "actual_cmp_seq_kvlen")
        actual_sel_seq_kvlen = read_once(actual_sel_seq_kvlen, "actual_sel_seq_kvlen")
    queries = packed(query, layout, head_num)
    keys = with_heads(key, key_value_head_num, "key", "key_value_head_num")
    values = with_heads(value, key_value_head_num, "value", "key_value_head_num")
    table = None if block_table is None else as_int32("block_table", block_table)
    batch = batch_count(query, table, actual_cmp_seq_kvlen, layout)
    most = most_query_tokens(actual_seq_qlen, layout, query)
    counts = num_init_blocks is not None or num_local_blocks is not None
    hides = (most is None or most > 1) and atten_mask is not None and actual_sel_seq_kvlen is not None
    windows = (compress_block_size, compress_stride)
    if is_eager:
        numbers = {
            "compress_block_size": compress_block_size,
            "compress_stride": compress_stride,
            "select_block_size": select_block_size,
            "select_block_count": select_block_count,
            "page_block_size": page_block_size,
            "B": batch,
            "N1": head_num,
            "N2": key_value_head_num,
            "S": 1 if most is None else most,
        }
        tensors = {"query": queries, "key": keys, "value": values, "block_table": table}
        contract.check_call(tensors, numbers, mode=mode_in_force())
        lengths_of = {CMP_LEN: actual_cmp_seq_kvlen}
        contract.check_forced(num_init_blocks, num_local_blocks, actual_sel_seq_kvlen)
        if hides or counts:
            each = (1 if layout == "TND" else query.shape[1],) * batch if actual_seq_qlen is None else actual_seq_qlen
            lengths_of |= {RAW_LEN: actual_sel_seq_kvlen, QLEN: each}
        contract.check_host_lengths(lengths_of, keys, table, batch, *windows)
    rows = query_rows(actual_seq_qlen, layout, query, batch)
    lengths = batch_lengths(actual_cmp_seq_kvlen, CMP_LEN, batch, query.device)
    raw = batch_lengths(actual_sel_seq_kvlen, RAW_LEN, batch, query.device) if hides or counts else None
    if table is None:
        table = dealt_pages(lengths, keys.shape[0], keys.shape[1])
    sizes = (*windows, select_block_size, select_block_count)
    with torch.no_grad():
        output, ids = library.compress_attention_infer(
            queries,
            keys,
            values,
            table,
            lengths,
            rows,
            raw,
            float(scale_value),
            *sizes,
            importance,
            impl,
            num_init_blocks,
            num_local_blocks,
        )
    return unpacked(output, layout, query), unpacked(ids, layout, query)
