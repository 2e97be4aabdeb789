"""The public functions of select_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_triton.ops.select_attention import contract, library

if TYPE_CHECKING:
    import numpy as np

    Lengths = Sequence[int] | np.ndarray[Any, Any] | Tensor


def nsa_select_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor,
    scale_value: float,
    head_num: int,
    select_block_size: int,
    select_block_count: int,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Lengths | None = None,
    actual_seq_kvlen: Lengths | None = None,
    causal: bool | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of packed sequences, each query token over the blocks of its segment that it has selected.

    Block i of a segment is its key tokens from i * select_block_size on, the last block as long as there are tokens. A
    query head attends to the blocks that the list of its kv head names:

        out[t, h] = softmax over the tokens p of these blocks (scale_value * query[t, h] . key[p, n]) @ value[p, n]

    With causal attention query token t sees of them the tokens p <= t only, both counted from the first of their
    segment. An id that is negative or beyond the last block is skipped, wherever it stands; a block that is listed
    twice counts twice. Where nothing is left, and in the rows of `query` behind the last segment, the output is 0.
    Scores and sums are float32, and the output is rounded once. Adjacent query tokens are worked on together: a value
    that is not finite may spoil neighbours of those that selected it. Differentiable once in `query`, `key` and
    `value`, through the output; tokens that nobody selects get a gradient of 0.

    Args:
        query: the query tokens of all segments, packed: [T1, N1, Dk]. Any head sizes; kernels take those up to 512.
            float16 or bfloat16; float32, which CANN does not have; float64 with impl="reference". Any strides.
        key: [T2, N2, Dk], with the dtype and on the device of `query`. Any strides.
        value: [T2, N2, Dv], likewise.
        topk_indices: the blocks of each query token and kv head, [T1, N2, K], an integer tensor, best int32.
        scale_value: what scores are multiplied by, most often Dk ** -0.5.
        head_num: N1, a multiple of N2.
        select_block_size: tokens per block, a multiple of 16.
        select_block_count: K, the last dimension of `topk_indices`.
        atten_mask: a tensor of any shape means causal attention; what it holds is not looked at, as CANN does it.
        actual_seq_qlen: required. Where each segment of `query` ends, as inclusive prefix sums: segments of 80, 96 and
            80 tokens are [80, 176, 256]. Never decreasing; any segment may be empty, and the last may end before T1.
        actual_seq_kvlen: required. The same of `key` and `value`, for as many segments. Both are a list, tuple, numpy
            integer array or 1-D integer tensor on the CPU; under torch.compile a list or tuple.
        causal: whether attention is causal, without a mask that says so. None: it is if `atten_mask` is given.
        impl: "triton" runs the kernels or raises; "reference" runs the specification in PyTorch (slow); "auto" runs
            the kernels and, where they cannot run, the reference, after a warning in the log "nsa_triton".

    Returns:
        The output [T1, N1, Dv] with the dtype of `query`, and for the gradient, float32 and without one of their own,
        the largest score and the sum of exp(score - largest) of each row, [T1, N1, 8]: each number eight times. Where
        nothing is left they are the lowest number of float32 and 0.

    Raises:
        ArgumentTypeError: (a TypeError) an argument has the wrong type or dtype.
        ArgumentValueError: (a ValueError and a RuntimeError) a shape, device or value is not as above. With
            NSA_TRITON_CHECK_INDICES=1 also an id, other than -1, that would be skipped.
        ToolchainError: impl="triton", and the kernels cannot run on this machine.

    Example:
        >>> query = torch.randn(256, 16, 192, dtype=torch.bfloat16)
        >>> keys = torch.randn(3072, 4, 192, dtype=torch.bfloat16)
        >>> values = torch.randn(3072, 4, 128, dtype=torch.bfloat16)
        >>> blocks = torch.arange(16, dtype=torch.int32).expand(256, 4, 16)
        >>> lengths = {"actual_seq_qlen": [128, 256], "actual_seq_kvlen": [2048, 3072]}
        >>> output, largest, total = nsa_select_attention(query, keys, values, blocks, 192**-0.5, 16, 64, 16, **lengths)
        >>> output.shape
        torch.Size([256, 16, 128])
    """
    is_causal = contract.is_causal(causal, atten_mask)
    ends = contract.checked_ends(
        {"query": query, "key": key, "value": value, "topk_indices": topk_indices},
        scale_value=scale_value,
        head_num=head_num,
        select_block_size=select_block_size,
        select_block_count=select_block_count,
        atten_mask=atten_mask,
        actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen,
        impl=impl,
    )
    return library.select_attention(
        query, key, value, topk_indices, *ends, float(scale_value), select_block_size, is_causal, impl
    )


def nsa_select_attention_grad(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_out: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    topk_indices: Tensor,
    scale_value: float,
    head_num: int,
    select_block_size: int,
    select_block_count: int,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Lengths | None = None,
    actual_seq_kvlen: Lengths | None = None,
    causal: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `nsa_select_attention`, for code that does not use autograd.

    It is made of the output and the statistics that are passed, which are not computed again. Sums are float32 and
    rounded once. The result is the same, bit for bit, each time, and has no gradient of its own.

    Args:
        grad: the gradient of the output of `nsa_select_attention`, [T1, N1, Dv], with the dtype and on the device of
            `query`. Any strides.
        attention_out, softmax_max, softmax_sum: what `nsa_select_attention` returned.
        query, key, value, topk_indices, scale_value, head_num, select_block_size, select_block_count,
            actual_seq_qlen, actual_seq_kvlen, impl: as passed to `nsa_select_attention`.
        atten_mask: accepted and ignored, as CANN does, whose gradient is always causal.
        causal: whether the forward call was causal. Pass False, and no mask, for the gradient of full attention.

    Returns:
        The gradients of `query`, `key` and `value`, with their shapes and dtypes.

    Raises:
        The errors of `nsa_select_attention`.

    Example:
        >>> lengths = {"actual_seq_qlen": [128, 256], "actual_seq_kvlen": [2048, 3072], "causal": True}
        >>> forward = nsa_select_attention(query, keys, values, blocks, 192**-0.5, 16, 64, 16, **lengths)
        >>> given = (torch.ones_like(forward[0]), query, keys, values, *forward, blocks)
        >>> query_grad, key_grad, value_grad = nsa_select_attention_grad(*given, 192**-0.5, 16, 64, 16, **lengths)
    """
    contract.check_causal(causal, atten_mask)
    tensors = {
        "grad": grad,
        "query": query,
        "key": key,
        "value": value,
        "attention_out": attention_out,
        "softmax_max": softmax_max,
        "softmax_sum": softmax_sum,
        "topk_indices": topk_indices,
    }
    ends = contract.checked_ends(
        tensors,
        scale_value=scale_value,
        head_num=head_num,
        select_block_size=select_block_size,
        select_block_count=select_block_count,
        atten_mask=atten_mask,
        actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen,
        impl=impl,
    )
    with torch.no_grad():
        return library.select_attention_grad(
            *tensors.values(), *ends, float(scale_value), select_block_size, causal, impl
        )
