"""Attention of new tokens over the selected blocks of a paged cache."""

from nsa_triton.ops.select_attention_infer.api import nsa_select_attention_infer

__all__ = ["nsa_select_attention_infer"]
