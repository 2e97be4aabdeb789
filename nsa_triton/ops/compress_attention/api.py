"""The public functions of compress_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_triton.limits import mode_in_force
from nsa_triton.ops._common.ragged_contract import prefix_sums
from nsa_triton.ops.compress_attention import contract, library
from nsa_triton.ops.compress_attention.contract import CMP_LEN, QLEN

if TYPE_CHECKING:
    import numpy as np

    Lengths = Sequence[int] | np.ndarray[Any, Any] | Tensor


def nsa_compress_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale_value: float,
    head_num: int,
    compress_block_size: int,
    compress_stride: int,
    select_block_size: int,
    select_block_count: int,
    *,
    topk_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Lengths | None = None,
    actual_cmp_seq_kvlen: Lengths | None = None,
    actual_sel_seq_kvlen: Lengths | None = None,
    causal: bool = False,
    num_init_blocks: int = 0,
    num_local_blocks: int = 0,
    importance: str = "cann",
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of packed query tokens over the compressed tokens of their segment, and the best selection blocks.

    Query token t of a segment, counted within it, sees all compressed tokens of the segment, or those that `atten_mask`
    or `causal` leave it. With P the softmax of scale_value * query[t, h] . key[i, n] over those:

        attention_out[t, h] = P @ value[:, n]              P is rounded to the dtype of `value` first
        imp[h, j]           = the P of the windows on block j, each as often as they share a stride (before rounding)

    The blocks of kv head n are first those that are forced, by ascending number, then the others by descending sum of
    imp over its query heads, equal ones by ascending number. If select_block_count is more than the number of blocks,
    ceil(S2 * compress_stride / select_block_size), or all that query tokens are in with num_local_blocks, the rest is
    -1. No block is left out for lying behind t: where too
    few blocks have a score, the list goes on with blocks of score 0. A query token that sees nothing has output 0,
    scores of 0 and no gradient. Differentiable once in `query`, `key` and `value`, through attention_out.

    Args:
        query: [T1, N1, Dk], the query tokens of all segments, packed. Any head sizes; kernels take those up to 512.
            float16 or bfloat16; float32, which CANN does not have; float64 with impl="reference". Any strides.
        key: the compressed keys of all segments, packed: [T2, N2, Dk], with the dtype and on the device of `query`.
        value: the compressed values, [T2, N2, Dv], likewise.
        scale_value: what scores are multiplied by, most often Dk ** -0.5.
        head_num: N1, a multiple of N2.
        compress_block_size: raw tokens per compression window, a multiple of 16.
        compress_stride: raw tokens between two windows, a multiple of 16 up to compress_block_size.
        select_block_size: raw tokens per selection block, a multiple of compress_stride, at least compress_block_size.
        select_block_count: K, how many blocks to choose.
        topk_mask: [query tokens, blocks], bool or uint8: what is not 0 forces a block. Rows and columns count within a
            segment; one mask serves all segments and heads, and is at least as large as the longest needs.
        atten_mask: [query tokens, compressed tokens], bool or uint8: what is not 0 is not seen. Likewise.
        actual_seq_qlen: required. Where the query tokens of each segment end, as inclusive prefix sums: segments of 80,
            96 and 80 tokens are [80, 176, 256]. A repeated value is an empty segment. Rows of `query` behind the last
            are nobody's: they see nothing and have no blocks. A list, tuple, numpy integer array or 1-D integer tensor
            on the CPU; under torch.compile a list or tuple.
        actual_cmp_seq_kvlen: required. Where the compressed tokens of each segment end, likewise.
        actual_sel_seq_kvlen: accepted and ignored, as CANN does.
        causal: a query token sees the windows that end at or before it: i * compress_stride + compress_block_size - 1
            <= t. Instead of `atten_mask`, not together with it.
        num_init_blocks: force so many blocks at the beginning of the segment. Instead of `topk_mask`.
        num_local_blocks: force so many blocks up to that of t itself, be there compressed tokens in it or not. Instead
            of `topk_mask`.
        importance: "cann" scores blocks as CANN does, where block j gathers the windows that overlap it, moved by one:
            those that end a stride later. "overlap" gathers those that truly overlap it.
        impl: "triton" runs the kernels or raises; "reference" runs the specification in PyTorch (slow); "auto" runs
            the kernels and, where they cannot run, the reference, after a warning in the log "nsa_triton".

    Returns:
        attention_out [T1, N1, Dv] with the dtype of `query`; topk_indices [T1, N2, K], int32, counted within the
        segment; softmax_max and softmax_sum [T1, N1, 8], float32: the largest scaled score and the sum of the
        exponentials relative to it, each 8 times. As CANN has them, they stand head after head within a segment: its
        part of the memory is [N1, S1, 8]. Where nothing is seen they are the lowest float32 and 0.

    Raises:
        ArgumentTypeError: (a TypeError) an argument has the wrong type or dtype.
        ArgumentValueError: (a ValueError and a RuntimeError) a shape, device or value is not as above.
        ToolchainError: impl="triton", and the kernels cannot run on this machine.

    Example:
        >>> query = torch.randn(1024, 16, 192, dtype=torch.bfloat16)
        >>> keys = torch.randn(62, 4, 192, dtype=torch.bfloat16)
        >>> values = torch.randn(62, 4, 128, dtype=torch.bfloat16)
        >>> lengths = {"actual_seq_qlen": [700, 1024], "actual_cmp_seq_kvlen": [42, 62]}
        >>> sizes = 192**-0.5, 16, 32, 16, 64, 16
        >>> output, blocks, *_ = nsa_compress_attention(query, keys, values, *sizes, causal=True, **lengths)
        >>> output.shape, blocks.shape
        (torch.Size([1024, 16, 128]), torch.Size([1024, 4, 16]))
    """
    sizes = (compress_block_size, compress_stride, select_block_size, select_block_count)
    forced = (num_init_blocks, num_local_blocks)
    is_eager = not torch.compiler.is_compiling()  # Dynamo cannot trace all checks; the operator makes those of shapes
    if is_eager:
        contract.check_types(
            query=query,
            key=key,
            value=value,
            topk_mask=topk_mask,
            atten_mask=atten_mask,
            scale_value=scale_value,
            head_num=head_num,
            **dict(zip(contract.SIZES, sizes, strict=True)),
            **dict(zip(contract.FORCED, forced, strict=True)),
            actual_seq_qlen=actual_seq_qlen,
            actual_cmp_seq_kvlen=actual_cmp_seq_kvlen,
            actual_sel_seq_kvlen=actual_sel_seq_kvlen,
            causal=causal,
            importance=importance,
            impl=impl,
        )
    query_ends, key_ends = prefix_sums(actual_seq_qlen, QLEN), prefix_sums(actual_cmp_seq_kvlen, CMP_LEN)
    if is_eager:
        tensors = {"query": query, "key": key, "value": value, "atten_mask": atten_mask, "topk_mask": topk_mask}
        numbers = dict(zip(contract.NUMBERS, (*sizes, *forced, int(causal)), strict=True))
        mode = mode_in_force()
        contract.check_call(tensors, query_ends, key_ends, {"N1": head_num, **numbers}, mode=mode)
        contract.check_block_lengths(actual_sel_seq_kvlen, len(query_ends), mode)
    else:
        contract.check_head_num(head_num, query)
    return library.compress_attention(
        query,
        key,
        value,
        atten_mask,
        topk_mask,
        query_ends,
        key_ends,
        float(scale_value),
        *sizes,
        causal,
        *forced,
        importance,
        impl,
    )


def nsa_compress_attention_grad(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_out: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    scale_value: float,
    head_num: int,
    compress_block_size: int,
    compress_stride: int,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Lengths | None = None,
    actual_cmp_seq_kvlen: Lengths | None = None,
    causal: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of attention_out of `nsa_compress_attention`, for code that does not use autograd.

    Made from the outputs of the forward call as they are given. Sums are float32 and rounded once. The result is the
    same, bit for bit, each time. CANN has no such function.

    Args:
        grad: the gradient of attention_out: [T1, N1, Dv], with the dtype and on the device of `query`.
        attention_out, softmax_max, softmax_sum: what `nsa_compress_attention` returned.
        query, key, value, scale_value, head_num, compress_block_size, compress_stride, atten_mask, actual_seq_qlen,
            actual_cmp_seq_kvlen, causal, impl: as passed to `nsa_compress_attention`.

    Returns:
        The gradients of `query`, `key` and `value`, with their shapes and dtypes.

    Raises:
        The errors of `nsa_compress_attention`; also ArgumentTypeError or ArgumentValueError where `grad` or an output
        is not one of that call.

    Example:
        >>> output, blocks, *statistics = nsa_compress_attention(query, keys, values, *sizes, causal=True, **lengths)
        >>> given = query, keys, values, output, *statistics, 192**-0.5, 16, 32, 16
        >>> gradients = nsa_compress_attention_grad(torch.ones_like(output), *given, causal=True, **lengths)
    """
    tensors = {
        "grad": grad,
        "query": query,
        "key": key,
        "value": value,
        "attention_out": attention_out,
        "softmax_max": softmax_max,
        "softmax_sum": softmax_sum,
    }
    windows = {"compress_block_size": compress_block_size, "compress_stride": compress_stride}
    is_eager = not torch.compiler.is_compiling()
    if is_eager:
        contract.check_types(
            **tensors,
            atten_mask=atten_mask,
            scale_value=scale_value,
            head_num=head_num,
            **windows,
            actual_seq_qlen=actual_seq_qlen,
            actual_cmp_seq_kvlen=actual_cmp_seq_kvlen,
            causal=causal,
            impl=impl,
        )
    query_ends, key_ends = prefix_sums(actual_seq_qlen, QLEN), prefix_sums(actual_cmp_seq_kvlen, CMP_LEN)
    if is_eager:
        numbers = {"N1": head_num, **windows, "causal": int(causal)}
        called = {**tensors, "atten_mask": atten_mask}
        contract.check_call(called, query_ends, key_ends, numbers, mode=mode_in_force())
    else:
        contract.check_head_num(head_num, query)
    with torch.no_grad():
        return library.compress_attention_grad(
            *tensors.values(),
            atten_mask,
            query_ends,
            key_ends,
            float(scale_value),
            *windows.values(),
            causal,
            impl,
        )
