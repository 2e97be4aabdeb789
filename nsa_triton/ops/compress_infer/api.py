"""The public function of compress_infer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nsa_triton.ops.compress_infer import library
from nsa_triton.ops.compress_infer.contract import check_call

if TYPE_CHECKING:
    import numpy as np

    Lengths = Sequence[int] | np.ndarray[Any, Any] | Tensor


def nsa_compress_infer(
    input: Tensor,
    weight: Tensor,
    slot_mapping: Tensor,
    compress_block_size: int,
    compress_stride: int,
    page_block_size: int,
    *,
    block_table: Tensor | None = None,
    actual_seq_len: Lengths | None = None,
    cache: Tensor,
    new_tokens: int = 1,
    impl: str = "auto",
) -> Tensor:
    """Compress what decoding has just completed: `nsa_compress` for the windows that the newest tokens end.

    A window of a sequence ends where E >= compress_block_size tokens are there and E - compress_block_size is a
    multiple of compress_stride. For each window that the last `new_tokens` tokens of a batch complete, in order, a row
    of `cache` is written:

        cache[slot, n, :] = sum over i of  weight[i, n] * raw[E - compress_block_size + i, n, :]

    summed in float32 and rounded once. A batch that completes no window writes nothing; its page ids and slots, and
    slots beyond the last window of a batch, are not even read. Not differentiable.

    Args:
        input: the tokens of all batches, in pages [pages, page_block_size, N, D], or, without `block_table`, packed
            one batch after the other, [T, N, D]. float16 or bfloat16; float32, which CANN does not have; float64 with
            impl="reference". Any strides, but that of the last dimension is 1.
        weight: [compress_block_size, N], with the dtype and on the device of `input`. Any strides.
        slot_mapping: integers [B, W], the row of `cache` for each new window of a batch. A batch completes at most
            W = ceil(new_tokens / compress_stride) windows; [B] will do where W is 1. Windows with a slot that is
            negative or beyond `cache` are skipped. No two windows may have the same slot.
        compress_block_size: length of a window, a multiple of 16 from 16 to 128.
        compress_stride: distance between two windows, a multiple of 16 from 16 to `compress_block_size`.
        page_block_size: tokens per page, a multiple of 16. Packed tokens have no pages, and do not use it.
        block_table: integers [B, max_blocks]; token t of batch b is in page block_table[b, t // page_block_size].
        actual_seq_len: required. The tokens of each batch, the newest included: B lengths, not prefix sums; 0 is
            allowed. A list, tuple, numpy array or integer tensor; one on the device of `input` is not read back.
        cache: [rows, N, D], the compressed tokens of all batches, with the dtype and on the device of `input`.
            Changed in place. Any strides, but that of the last dimension is 1.
        new_tokens: how many tokens each batch got since the last call.
        impl: "triton" runs the kernels or raises; "reference" runs the specification in PyTorch (slow); "auto" runs
            the kernels and, where they cannot run, the reference, after a warning in the log "nsa_triton".

    Page ids outside of `input` never lead to a read outside: they are clamped. With NSA_TRITON_CHECK_INDICES=1 every
    bad page id, slot or length is an error instead, for the price of reading these tensors back.

    Returns:
        `cache`, the very tensor.

    Raises:
        ArgumentTypeError: (a TypeError) an argument has the wrong type or dtype.
        ArgumentValueError: (a ValueError and a RuntimeError) a shape, device or value is not as above.
        ToolchainError: impl="triton", and the kernels cannot run on this machine.

    Example:
        >>> keys = torch.randn(4, 64, 8, 128, dtype=torch.bfloat16)  # 4 pages of 64 tokens
        >>> weight, cache = keys.new_ones(32, 8), keys.new_zeros(10, 8, 128)
        >>> table, slots = torch.tensor([[2, 0], [3, 1]]), torch.tensor([5, 6])
        >>> nsa_compress_infer(
        ...     keys, weight, slots, 32, 16, 64, block_table=table, actual_seq_len=[80, 81], cache=cache
        ... )  # row 5 holds tokens 48 to 79 of batch 0; batch 1 has no new window
    """
    tensors = {"input": input, "weight": weight, "slot_mapping": slot_mapping, "cache": cache}
    numbers = {
        "compress_block_size": compress_block_size,
        "compress_stride": compress_stride,
        "page_block_size": page_block_size,
        "new_tokens": new_tokens,
    }
    lengths = check_call(tensors, numbers, block_table, actual_seq_len, impl)
    library.compress_infer(input, weight, slot_mapping, block_table, lengths, cache, *numbers.values(), impl)
    return cache
