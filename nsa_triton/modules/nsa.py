"""NativeSparseAttention: projections, learned compression, three branches and gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.modules.cache import Step
from nsa_triton.modules.config import NSAConfig
from nsa_triton.modules.functional import decode, native_sparse_attention
from nsa_triton.modules.packing import Packing

if TYPE_CHECKING:
    from nsa_triton.modules.packing import Lengths

Rotate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class NativeSparseAttention(nn.Module):
    """Native sparse attention of a transformer layer (arXiv 2502.11089), causal, with grouped queries.

    Each query head adds up three branches, each behind a sigmoid gate of its own: attention to compressed tokens, to
    the blocks that these scores select, and to the newest tokens. The three share keys and values, or each has its
    own (`separate_key_values` of the config). They are compressed by learned weights, one per place in a window and kv
    head, which begin as the mean.

    Args:
        config: heads, windows and blocks.
        bias: whether the projections of queries, keys and values have one.
        projections: False leaves them all out: call `attend` with ready queries, keys, values and gates.
        impl: "triton" runs the kernels or raises; "reference" runs the specifications in PyTorch (slow); "auto" runs
            the kernels and, where they cannot run, the references, after a warning in the log "nsa_triton".
        device, dtype: of the parameters.

    Parameters, as `state_dict` has them: `key_weight` and `value_weight` [compress_block_size, N2], and, with
    projections, `query`, `key`, `value`, `gate` and `output`, which are `torch.nn.Linear`.

    Example:
        >>> config = NSAConfig(hidden_size=256, head_num=4, key_value_head_num=1, head_dim=64)
        >>> attention = NativeSparseAttention(config)
        >>> attention(torch.randn(300, 256), cu_seqlens=[0, 200, 300]).shape
        torch.Size([300, 256])
        >>> attention(torch.randn(2, 150, 256), lengths=[150, 99]).shape
        torch.Size([2, 150, 256])
    """

    def __init__(
        self,
        config: NSAConfig,
        *,
        bias: bool = False,
        projections: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, NSAConfig):
            raise ArgumentTypeError("config", "an NSAConfig", type(config).__name__)
        self.config, self.impl, self.has_projections = config, impl, projections
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (config.compress_block_size, config.key_value_head_num)
        self.key_weight, self.value_weight = (nn.Parameter(torch.empty(shape, **kind)) for _ in range(2))
        if projections:
            queries, keys = (heads * config.head_dim for heads in (config.head_num, config.raw_head_num))
            outputs, values = (heads * config.value_size for heads in (config.head_num, config.raw_head_num))
            self.query = nn.Linear(config.hidden_size, queries, bias=bias, **kind)
            self.key = nn.Linear(config.hidden_size, keys, bias=bias, **kind)
            self.value = nn.Linear(config.hidden_size, values, bias=bias, **kind)
            self.gate = nn.Linear(config.hidden_size, 3 * config.head_num, **kind)
            self.output = nn.Linear(outputs, config.hidden_size, bias=False, **kind)
        self.reset_compression()

    def reset_compression(self) -> None:
        """Compress by the mean of each window."""
        for weight in (self.key_weight, self.value_weight):
            nn.init.constant_(weight, 1 / self.config.compress_block_size)

    def forward(
        self,
        hidden: Tensor,
        *,
        cu_seqlens: Lengths | None = None,
        lengths: Lengths | None = None,
        rotary: Rotate | None = None,
        step: Step | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attention of each sequence with itself or, with `step`, of its new tokens with all that the cache holds.

        Args:
            hidden: [T, hidden_size], the tokens of all sequences, packed, or [B, S, hidden_size], padded on the right.
            cu_seqlens: for packed tokens, where sequences begin and end, with a leading 0; see
                `native_sparse_attention`. None: one sequence.
            lengths: for padded tokens, how many of each sequence are real: a list, tuple or integer tensor on the CPU.
                The output behind them is 0. None: all.
            rotary: takes queries [T, N1, Dk], keys [T, N2, Dk] (3 * N2 with `separate_key_values`) and positions [T]
                (int64, counted within each sequence), and returns queries and keys with their embeddings. It comes
                before keys are compressed or cached.
            step: what `NSACache.extend` made of these tokens, instead of `cu_seqlens` or `lengths`. There are no
                gradients then. A [B, S, hidden_size] tensor holds S new tokens of each sequence.
            layer: whose part of the cache is used.

        Returns:
            A tensor like `hidden`.
        """
        if not self.has_projections:
            hint = "Call attend(query, key, value, gates), or make the module with projections=True"
            raise ArgumentValueError("projections", "True for a call with hidden states", False, hint)
        packing = Packing.of(hidden, self.config.hidden_size, cu_seqlens, lengths, step)
        packed = packing.pack(hidden)
        query, key, value, gates = self.project(packed)
        if rotary is not None:
            query, key = rotary(query, key, packing.positions(hidden.device))
        attended = self.attend(query, key, value, gates, cu_seqlens=packing.cu_seqlens, step=step, layer=layer)
        return packing.unpack(self.output(attended.flatten(1)), hidden)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [T, N1, Dk], keys [T, N2, Dk], values [T, N2, Dv] and gates [T, N1, 3] of tokens [T, hidden_size];
        3 * N2 instead of N2 with `separate_key_values`."""
        config = self.config
        return (
            self.query(hidden).view(-1, config.head_num, config.head_dim),
            self.key(hidden).view(-1, config.raw_head_num, config.head_dim),
            self.value(hidden).view(-1, config.raw_head_num, config.value_size),
            self.gate(hidden).view(-1, config.head_num, 3),
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Tensor,
        *,
        cu_seqlens: Lengths | None = None,
        step: Step | None = None,
        layer: int = 0,
    ) -> Tensor:
        """The same for ready queries [T, N1, Dk], keys [T, N2, Dk], values [T, N2, Dv] and gates [T, N1, 3], packed:
        [T, N1, Dv]. Rotary embeddings, if any, are in them already."""
        if step is not None:
            self._check_cache(step, layer)
            weights = (self.key_weight, self.value_weight)
            step.cache.write(step, layer, key, value, *weights, impl=self.impl)
            if step.fresh is None:
                return decode(query, gates, step, layer, impl=self.impl)
            cu_seqlens = step.fresh
        return native_sparse_attention(
            query,
            key,
            value,
            gates,
            self.key_weight,
            self.value_weight,
            self.config,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )

    def _check_cache(self, step: Step, layer: int) -> None:
        if step.cache.config != self.config:
            raise ArgumentValueError("step", f"one of a cache for {self.config}", f"one for {step.cache.config}")
        if not 0 <= layer < step.cache.layers:
            raise ArgumentValueError("layer", f"from 0 to {step.cache.layers - 1}, a layer of the cache", layer)

    def extra_repr(self) -> str:
        c = self.config
        heads = f"{c.head_num}/{c.key_value_head_num}" + (" per branch" if c.separate_key_values else "")
        return (
            f"heads={heads}, head_dim={c.head_dim}/{c.value_size}, "
            f"l={c.compress_block_size}, d={c.compress_stride}, l'={c.select_block_size}, K={c.select_block_count}, "
            f"window={c.window_size}, impl={self.impl}"
        )
