"""The vendors' spellings, so that code moves here by changing an import.

torch_npu     nsa_triton.npu_nsa_*, or in the module torch_npu itself with nsa_triton.patch_torch_npu
MindSpore     nsa_triton.vendor.mindspore.nsa_compress
"""

from nsa_triton.vendor import mindspore
from nsa_triton.vendor.npu import (
    npu_nsa_compress,
    npu_nsa_compress_attention,
    npu_nsa_compress_attention_infer,
    npu_nsa_compress_grad,
    npu_nsa_compress_infer,
    npu_nsa_select_attention,
    npu_nsa_select_attention_grad,
    npu_nsa_select_attention_infer,
)
from nsa_triton.vendor.patch import patch_torch_npu

__all__ = [
    "mindspore",
    "npu_nsa_compress",
    "npu_nsa_compress_attention",
    "npu_nsa_compress_attention_infer",
    "npu_nsa_compress_grad",
    "npu_nsa_compress_infer",
    "npu_nsa_select_attention",
    "npu_nsa_select_attention_grad",
    "npu_nsa_select_attention_infer",
    "patch_torch_npu",
]
