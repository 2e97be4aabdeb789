"""Attention of packed tokens over compressed tokens, the best selection blocks, and the gradient."""

from nsa_triton.ops.compress_attention.api import nsa_compress_attention, nsa_compress_attention_grad

__all__ = ["nsa_compress_attention", "nsa_compress_attention_grad"]
