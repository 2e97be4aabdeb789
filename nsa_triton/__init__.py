"""Native Sparse Attention for Ascend NPUs as open Triton kernels.

Importing this package needs torch and nothing else: Triton is imported when the first kernel runs, and no device is
touched before that.
"""

from nsa_triton.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArgumentValueError,
    CacheFullError,
    CompileError,
    ConfigError,
    NsaError,
    ToolchainError,
)
from nsa_triton.limits import limits
from nsa_triton.modules import NativeSparseAttention, NSACache, NSAConfig, native_sparse_attention
from nsa_triton.ops.compress import nsa_compress, nsa_compress_grad
from nsa_triton.ops.compress_attention import nsa_compress_attention, nsa_compress_attention_grad
from nsa_triton.ops.compress_attention_infer import nsa_compress_attention_infer
from nsa_triton.ops.compress_infer import nsa_compress_infer
from nsa_triton.ops.gated_combine import nsa_gated_combine, nsa_gated_combine_grad
from nsa_triton.ops.select_attention import nsa_select_attention, nsa_select_attention_grad
from nsa_triton.ops.select_attention_infer import nsa_select_attention_infer
from nsa_triton.ops.sliding_window_attention import (
    nsa_sliding_window_attention,
    nsa_sliding_window_attention_grad,
)
from nsa_triton.ops.sliding_window_attention_infer import nsa_sliding_window_attention_infer
from nsa_triton.vendor import (
    npu_nsa_compress,
    npu_nsa_compress_attention,
    npu_nsa_compress_attention_infer,
    npu_nsa_compress_grad,
    npu_nsa_compress_infer,
    npu_nsa_select_attention,
    npu_nsa_select_attention_grad,
    npu_nsa_select_attention_infer,
    patch_torch_npu,
)

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "CacheFullError",
    "CompileError",
    "ConfigError",
    "NSACache",
    "NSAConfig",
    "NativeSparseAttention",
    "NsaError",
    "ToolchainError",
    "__version__",
    "limits",
    "native_sparse_attention",
    "npu_nsa_compress",
    "npu_nsa_compress_attention",
    "npu_nsa_compress_attention_infer",
    "npu_nsa_compress_grad",
    "npu_nsa_compress_infer",
    "npu_nsa_select_attention",
    "npu_nsa_select_attention_grad",
    "npu_nsa_select_attention_infer",
    "nsa_compress",
    "nsa_compress_attention",
    "nsa_compress_attention_grad",
    "nsa_compress_attention_infer",
    "nsa_compress_grad",
    "nsa_compress_infer",
    "nsa_gated_combine",
    "nsa_gated_combine_grad",
    "nsa_select_attention",
    "nsa_select_attention_grad",
    "nsa_select_attention_infer",
    "nsa_sliding_window_attention",
    "nsa_sliding_window_attention_grad",
    "nsa_sliding_window_attention_infer",
    "patch_torch_npu",
]
