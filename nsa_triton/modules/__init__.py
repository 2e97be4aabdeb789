"""Native sparse attention as a module: what a model author needs beside the operators."""

from nsa_triton.modules.cache import NSACache, Step
from nsa_triton.modules.config import NSAConfig
from nsa_triton.modules.functional import decode, native_sparse_attention
from nsa_triton.modules.nsa import NativeSparseAttention

__all__ = ["NSACache", "NSAConfig", "NativeSparseAttention", "Step", "decode", "native_sparse_attention"]
