"""Attention of new tokens over a paged cache of compressed tokens, and the best selection blocks."""

from nsa_triton.ops.compress_attention_infer.api import nsa_compress_attention_infer

__all__ = ["nsa_compress_attention_infer"]
