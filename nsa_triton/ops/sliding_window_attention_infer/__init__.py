"""Attention of new tokens over the newest tokens of a paged cache."""

from nsa_triton.ops.sliding_window_attention_infer.api import nsa_sliding_window_attention_infer

__all__ = ["nsa_sliding_window_attention_infer"]
