"""Compression while decoding: the windows that new tokens complete, from a paged cache into a flat one."""

from nsa_triton.ops.compress_infer.api import nsa_compress_infer

__all__ = ["nsa_compress_infer"]
