"""Compression of keys and values: a weighted sum over sliding windows of tokens."""

from nsa_triton.ops.compress.api import nsa_compress, nsa_compress_grad

__all__ = ["nsa_compress", "nsa_compress_grad"]
