"""Attention of a batch of sequences over selected blocks of their keys, and its gradient."""

from nsa_triton.ops.select_attention.api import nsa_select_attention, nsa_select_attention_grad

__all__ = ["nsa_select_attention", "nsa_select_attention_grad"]
