"""The gated sum of the three branches of Native Sparse Attention."""

from nsa_triton.ops.gated_combine.api import nsa_gated_combine, nsa_gated_combine_grad

__all__ = ["nsa_gated_combine", "nsa_gated_combine_grad"]
