"""Causal attention of a batch of sequences over the newest keys before each query token, and its gradient."""

from nsa_triton.ops.sliding_window_attention.api import (
    nsa_sliding_window_attention,
    nsa_sliding_window_attention_grad,
)

__all__ = ["nsa_sliding_window_attention", "nsa_sliding_window_attention_grad"]
