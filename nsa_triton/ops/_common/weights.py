"""How the kernels of compression want its weights."""

from __future__ import annotations

from torch import Tensor


def head_major(weight: Tensor) -> Tensor:
    """[L, N] as [N, L], dense: a copy of a few numbers, so that a kernel loads the weights of a head side by side.

    A strided column costs Ascend a wait of the scalar unit for every weight; and ascendnpu-ir 1.0.0 forgets a stride
    that is known at run time only.
    """
    return weight.t().contiguous()
