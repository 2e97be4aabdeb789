"""The three branches of native sparse attention and their gated sum, for ready queries, keys, values and gates."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentTypeError
from nsa_triton.modules.cache import Step
from nsa_triton.modules.config import NSAConfig
from nsa_triton.modules.packing import checked_cu_seqlens
from nsa_triton.ops.compress import nsa_compress
from nsa_triton.ops.compress_attention import nsa_compress_attention
from nsa_triton.ops.compress_attention_infer import nsa_compress_attention_infer
from nsa_triton.ops.gated_combine import nsa_gated_combine
from nsa_triton.ops.select_attention import nsa_select_attention
from nsa_triton.ops.select_attention_infer import nsa_select_attention_infer
from nsa_triton.ops.sliding_window_attention import nsa_sliding_window_attention
from nsa_triton.ops.sliding_window_attention_infer import nsa_sliding_window_attention_infer

if TYPE_CHECKING:
    from nsa_triton.modules.packing import Lengths


def native_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    config: NSAConfig,
    *,
    cu_seqlens: Lengths | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal native sparse attention of packed sequences, each with itself.

    Every query token attends to the compressed tokens before it, to the blocks that these scores select, and to its
    newest `window_size` tokens; the three outputs are added, each times the sigmoid of its gate. Rotary embeddings, if
    any, are in `query` and `key` already. Differentiable once in all six tensors.

    Args:
        query: [T, N1, Dk], the tokens of all sequences, packed. float16, bfloat16 or float32; float64 with
            impl="reference".
        key: [T, N2, Dk], with the dtype and on the device of `query`; [T, 3 * N2, Dk] with `separate_key_values`.
        value: [T, N2, Dv], likewise; [T, 3 * N2, Dv].
        gates: [T, N1, 3], logits of the compressed, the selected and the local branch, like `query` or float32.
        key_weight: [compress_block_size, N2], how keys are compressed.
        value_weight: [compress_block_size, N2], how values are compressed.
        config: heads, windows and blocks.
        cu_seqlens: where sequences begin and end, with a leading 0: those of 80 and 96 tokens are [0, 80, 176]. A list,
            tuple, numpy integer array or integer tensor on the CPU; under torch.compile a list or tuple. None: one
            sequence.
        impl: "triton" runs the kernels or raises; "reference" runs the specifications in PyTorch (slow); "auto" runs
            the kernels and, where they cannot run, the references, after a warning in the log "nsa_triton".

    Returns:
        [T, N1, Dv] with the dtype of `query`.

    Raises:
        ArgumentTypeError: (a TypeError) an argument has the wrong type or dtype.
        ArgumentValueError: (a ValueError and a RuntimeError) a shape, device or value is not as above.
        ToolchainError: impl="triton", and the kernels cannot run on this machine.

    Example:
        >>> config = NSAConfig(hidden_size=256, head_num=4, key_value_head_num=1, head_dim=64)
        >>> query, key, value = (torch.randn(300, heads, 64) for heads in (4, 1, 1))
        >>> gates, weight = torch.zeros(300, 4, 3), torch.full((32, 1), 1 / 32)
        >>> native_sparse_attention(query, key, value, gates, weight, weight, config, cu_seqlens=[0, 200, 300]).shape
        torch.Size([300, 4, 64])
    """
    if not isinstance(config, NSAConfig):
        raise ArgumentTypeError("config", "an NSAConfig", type(config).__name__)
    keys, values = config.branches("key", key), config.branches("value", value)
    bounds = checked_cu_seqlens(cu_seqlens, query.shape[0])
    ends = [end for begin, end in pairwise(bounds) if end > begin]  # an empty sequence has no token to attend
    if not ends:
        return query.new_zeros((0, config.head_num, config.value_size))
    sizes = (config.score_scale, config.head_num)
    compressed, blocks = _compressed_branch(query, keys[0], values[0], key_weight, value_weight, config, ends, impl)
    lengths: dict[str, Any] = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends, "impl": impl}
    selected, _, _ = nsa_select_attention(
        query, keys[1], values[1], blocks, *sizes, config.select_block_size, config.select_block_count, causal=True,
        **lengths,
    )  # fmt: skip
    local, _ = nsa_sliding_window_attention(query, keys[2], values[2], *sizes, config.window_size, **lengths)
    return nsa_gated_combine(compressed, selected, local, gates, impl=impl)


def _compressed_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    config: NSAConfig,
    ends: list[int],
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The output of the first branch, and the blocks that it selects for the second."""
    block, stride = config.compress_block_size, config.compress_stride
    keys, values = (
        nsa_compress(tokens, weight.to(tokens.dtype), block, stride, actual_seq_len=ends, impl=impl)
        for tokens, weight in ((key, key_weight), (value, value_weight))
    )
    windows = [config.windows(end - begin) for begin, end in pairwise([0, *ends])]
    output, blocks, _, _ = nsa_compress_attention(
        query,
        keys,
        values,
        config.score_scale,
        config.head_num,
        block,
        stride,
        config.select_block_size,
        config.select_block_count,
        actual_seq_qlen=ends,
        actual_cmp_seq_kvlen=list(accumulate(windows)),
        causal=True,
        num_init_blocks=config.num_init_blocks,
        num_local_blocks=config.num_local_blocks,
        importance=config.importance,
        impl=impl,
    )
    return output, blocks


@torch.no_grad()
def decode(query: Tensor, gates: Tensor, step: Step, layer: int, *, impl: str = "auto") -> Tensor:
    """Native sparse attention of the new tokens of a step to all tokens of their sequences.

    The keys and values of these tokens must be in the cache already: `step.cache.write` puts them there.

    Args:
        query: [T, N1, Dk], packed as the step has them, on the device of the cache and computed with in its dtype.
        gates: [T, N1, 3], as in `native_sparse_attention`.
        step: what `NSACache.extend` made of these tokens.
        layer: whose keys and values to attend to.
        impl: as in `native_sparse_attention`.

    Returns:
        [T, N1, Dv] with the dtype of `query`; no gradient goes through it.
    """
    cache, config = step.cache, step.cache.config
    asked, query = query.dtype, query.to(cache.keys.dtype)
    heads = (config.score_scale, config.head_num, config.key_value_head_num)
    blocks_of = (config.select_block_size, config.select_block_count)
    rows: dict[str, Any] = {"layout": "TND", "block_table": step.table, "actual_seq_qlen": step.counts, "impl": impl}
    compressed, blocks = nsa_compress_attention_infer(
        query,
        cache.compressed_keys[layer],
        cache.compressed_values[layer],
        *heads,
        *blocks_of,
        cache.compressed_page_size,
        config.compress_block_size,
        config.compress_stride,
        actual_cmp_seq_kvlen=step.windows,
        actual_sel_seq_kvlen=step.lengths,
        num_init_blocks=config.num_init_blocks,
        num_local_blocks=config.num_local_blocks,
        importance=config.importance,
        **rows,
    )
    keys = config.branches("cache.keys", cache.keys[layer])
    values = config.branches("cache.values", cache.values[layer])
    rows["actual_seq_kvlen"] = step.lengths
    selected = nsa_select_attention_infer(
        query, keys[1], values[1], blocks, *heads, *blocks_of, cache.page_size, **rows
    )
    local = nsa_sliding_window_attention_infer(
        query, keys[2], values[2], *heads, config.window_size, cache.page_size, **rows
    )
    branches = (compressed, cast(Tensor, selected), cast(Tensor, local))
    return nsa_gated_combine(*branches, gates.to(query.dtype), impl=impl).to(asked)
