"""The public functions of sliding_window_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_triton.ops.sliding_window_attention import contract, library

if TYPE_CHECKING:
    import numpy as np

    Lengths = Sequence[int] | np.ndarray[Any, Any] | Tensor


def nsa_sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale_value: float,
    head_num: int,
    window_size: int,
    *,
    actual_seq_qlen: Lengths | None = None,
    actual_seq_kvlen: Lengths | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of packed sequences, each query token over the newest `window_size` keys up to itself.

    The last query token of a segment stands at its last key, so that query token t of S1 stands at position
    p = t + S2 - S1 of the S2 keys, and sees the keys j with p - window_size < j <= p:

        out[t, h] = softmax over these j (scale_value * query[t, h] . key[j, n]) @ value[j, n]

    With as many keys as query tokens this is the usual sliding window; with more keys, that of a later chunk of a
    prompt; with fewer, the first query tokens see nothing. Where nothing is seen, and in the rows of `query` behind the
    last segment, the output is 0. Scores and sums are float32, and the output is rounded once. Adjacent query tokens
    are worked on together: a value that is not finite may spoil neighbours of those that see it. Differentiable once in
    `query`, `key` and `value`, through the output; keys that nobody sees get a gradient of 0.

    Args:
        query: the query tokens of all segments, packed: [T1, N1, Dk]. Any head sizes; kernels take those up to 512.
            float16, bfloat16 or float32; float64 with impl="reference". Any strides.
        key: [T2, N2, Dk], with the dtype and on the device of `query`. Any strides.
        value: [T2, N2, Dv], likewise.
        scale_value: what scores are multiplied by, most often Dk ** -0.5.
        head_num: N1, a multiple of N2.
        window_size: how many keys a query token sees at most, its own among them; at least 1.
        actual_seq_qlen: required. Where each segment of `query` ends, as inclusive prefix sums: segments of 80, 96 and
            80 tokens are [80, 176, 256]. Never decreasing; any segment may be empty, and the last may end before T1.
        actual_seq_kvlen: required. The same of `key` and `value`, for as many segments. Both are a list, tuple, numpy
            integer array or 1-D integer tensor on the CPU; under torch.compile a list or tuple.
        impl: "triton" runs the kernels or raises; "reference" runs the specification in PyTorch (slow); "auto" runs
            the kernels and, where they cannot run, the reference, after a warning in the log "nsa_triton".

    Returns:
        The output [T1, N1, Dv] with the dtype of `query`, and for the gradient, float32 and without one of its own, the
        logarithm of the sum of exp(score) of each row, [T1, N1]; -inf where nothing is seen.

    Raises:
        ArgumentTypeError: (a TypeError) an argument has the wrong type or dtype.
        ArgumentValueError: (a ValueError and a RuntimeError) a shape, device or value is not as above.
        ToolchainError: impl="triton", and the kernels cannot run on this machine.

    Example:
        >>> query = torch.randn(256, 16, 192, dtype=torch.bfloat16)
        >>> keys = torch.randn(3072, 4, 192, dtype=torch.bfloat16)
        >>> values = torch.randn(3072, 4, 128, dtype=torch.bfloat16)
        >>> lengths = {"actual_seq_qlen": [128, 256], "actual_seq_kvlen": [2048, 3072]}
        >>> output, lse = nsa_sliding_window_attention(query, keys, values, 192**-0.5, 16, 512, **lengths)
        >>> output.shape, lse.shape
        (torch.Size([256, 16, 128]), torch.Size([256, 16]))
    """
    ends = contract.checked_ends(
        {"query": query, "key": key, "value": value},
        scale_value=scale_value,
        head_num=head_num,
        window_size=window_size,
        actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen,
        impl=impl,
    )
    return library.sliding_window_attention(query, key, value, *ends, float(scale_value), window_size, impl)


def nsa_sliding_window_attention_grad(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_out: Tensor,
    lse: Tensor,
    scale_value: float,
    head_num: int,
    window_size: int,
    *,
    actual_seq_qlen: Lengths | None = None,
    actual_seq_kvlen: Lengths | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `nsa_sliding_window_attention`, for code that does not use autograd.

    It is made of the output and the log-sum-exp that are passed, which are not computed again. Sums are float32 and
    rounded once. The result is the same, bit for bit, each time, and has no gradient of its own.

    Args:
        grad: the gradient of the output of `nsa_sliding_window_attention`, [T1, N1, Dv], with the dtype and on the
            device of `query`. Any strides.
        attention_out, lse: what `nsa_sliding_window_attention` returned.
        query, key, value, scale_value, head_num, window_size, actual_seq_qlen, actual_seq_kvlen, impl: as passed to
            `nsa_sliding_window_attention`.

    Returns:
        The gradients of `query`, `key` and `value`, with their shapes and dtypes.

    Raises:
        The errors of `nsa_sliding_window_attention`.

    Example:
        >>> output, lse = nsa_sliding_window_attention(query, keys, values, 192**-0.5, 16, 512, **lengths)
        >>> given = (torch.ones_like(output), query, keys, values, output, lse)
        >>> gradients = nsa_sliding_window_attention_grad(*given, 192**-0.5, 16, 512, **lengths)
        >>> [gradient.shape for gradient in gradients] == [query.shape, keys.shape, values.shape]
        True
    """
    tensors = {
        "grad": grad,
        "query": query,
        "key": key,
        "value": value,
        "attention_out": attention_out,
        "lse": lse,
    }
    ends = contract.checked_ends(
        tensors,
        scale_value=scale_value,
        head_num=head_num,
        window_size=window_size,
        actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen,
        impl=impl,
    )
    with torch.no_grad():
        return library.sliding_window_attention_grad(*tensors.values(), *ends, float(scale_value), window_size, impl)
