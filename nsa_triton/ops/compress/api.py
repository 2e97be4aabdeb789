"""The public functions of compress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nsa_triton.ops.compress import library
from nsa_triton.ops.compress.contract import check_call

if TYPE_CHECKING:
    import numpy as np

    Lengths = Sequence[int] | np.ndarray[Any, Any] | Tensor


def nsa_compress(
    input: Tensor,
    weight: Tensor,
    compress_block_size: int,
    compress_stride: int,
    *,
    actual_seq_len: Lengths | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compress keys or values: one weighted sum of tokens per window, head and feature.

    The windows of a segment are `compress_block_size` tokens long and start every `compress_stride` tokens. They never
    leave their segment; tokens that fill no window are dropped. Row r of the output, whose window starts at token s, is

        output[r, n, :] = sum over i of  weight[i, n] * input[s + i, n, :]

    summed in float32 and rounded once. A segment of L tokens gives (L - compress_block_size) // compress_stride + 1
    rows, or none if it is shorter than a window. Differentiable any number of times in `input` and `weight`.

    Args:
        input: the tokens of all segments, packed: [T, N, D], with 1 <= N <= 128 heads and a head size D that is a
            multiple of 16 up to 256. float16 or bfloat16; float32, which CANN does not have; float64 with
            impl="reference". Any strides.
        weight: [compress_block_size, N], with the dtype and on the device of `input`. Any strides.
        compress_block_size: length of a window, a multiple of 16 from 16 to 128.
        compress_stride: distance between two windows, a multiple of 16 from 16 to `compress_block_size`.
        actual_seq_len: required. Where each segment ends, as inclusive prefix sums: segments of 80, 96 and 80 tokens
            are [80, 176, 256]. Positive, never decreasing, the last one is T; a repeated value is an empty segment.
            A list, tuple, numpy integer array or 1-D integer tensor on the CPU; under torch.compile a list or tuple.
        impl: "triton" runs the kernels or raises; "reference" runs the specification in PyTorch (slow); "auto" runs
            the kernels and, where they cannot run, the reference, after a warning in the log "nsa_triton".

    Returns:
        A new contiguous tensor [T', N, D] with the dtype of `input`. T' may be 0.

    Raises:
        ArgumentTypeError: (a TypeError) an argument has the wrong type or dtype.
        ArgumentValueError: (a ValueError and a RuntimeError) a shape, device or value is not as above.
        ToolchainError: impl="triton", and the kernels cannot run on this machine.

    Example:
        >>> keys = torch.randn(256, 8, 128, dtype=torch.bfloat16)
        >>> weight = torch.randn(64, 8, dtype=torch.bfloat16)
        >>> nsa_compress(keys, weight, 64, 16, actual_seq_len=[80, 176, 256]).shape
        torch.Size([7, 8, 128])
    """
    tensors = {"input": input, "weight": weight}
    ends = check_call(tensors, compress_block_size, compress_stride, actual_seq_len, impl)
    return library.compress(input, weight, compress_block_size, compress_stride, ends, impl)


def nsa_compress_grad(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    compress_block_size: int,
    compress_stride: int,
    *,
    actual_seq_len: Lengths | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The gradient of `nsa_compress`, for code that does not use autograd.

    Sums are float32 and rounded once. Tokens that no window covers get a gradient of 0. The result is the same, bit
    for bit, each time.

    Args:
        grad: the gradient of the output of `nsa_compress`: [T', N, D], with the dtype and on the device of `input`.
        input, weight, compress_block_size, compress_stride, actual_seq_len, impl: as passed to `nsa_compress`.

    Returns:
        The gradients of `input`, [T, N, D], and of `weight`, [compress_block_size, N], with their dtypes.

    Raises:
        The errors of `nsa_compress`; also ArgumentValueError where `grad` has not the shape of the output.

    Example:
        >>> grad = torch.ones(7, 8, 128, dtype=torch.bfloat16)
        >>> keys_grad, weight_grad = nsa_compress_grad(grad, keys, weight, 64, 16, actual_seq_len=[80, 176, 256])
    """
    tensors = {"grad": grad, "input": input, "weight": weight}
    ends = check_call(tensors, compress_block_size, compress_stride, actual_seq_len, impl)
    return library.compress_grad(grad, input, weight, compress_block_size, compress_stride, ends, impl)
