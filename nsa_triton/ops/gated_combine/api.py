"""The public functions of gated_combine."""

from __future__ import annotations

from torch import Tensor

from nsa_triton.ops.gated_combine import library
from nsa_triton.ops.gated_combine.contract import check_call


def nsa_gated_combine(
    compressed: Tensor, selected: Tensor, local: Tensor, gates: Tensor, *, impl: str = "auto"
) -> Tensor:
    """Add up the three branches of Native Sparse Attention, each weighted by its gate.

    For every token t, head h and branch x_i

        output[t, h, :] = sum over i of  sigmoid(gates[t, h, i]) * x_i[t, h, :]

    computed in float32 and rounded once, in one pass over memory. Differentiable once, in all four tensors.

    Args:
        compressed, selected, local: what attention over compressed tokens, selected blocks and the sliding window
            returned: [T, N1, Dv], or with any other leading dimensions, such as [B, S, N1, Dv]. One shape and dtype:
            float16, bfloat16 or float32; float64 with impl="reference". Any strides; a branch is copied if its tokens
            and heads do not lie at one distance from one another, or its last dimension is strided.
        gates: [T, N1, 3], or with the same leading dimensions: the logits of `compressed`, `selected` and `local`, in
            this order, in the dtype of the branches or float32. Any strides; copied, unless they are a transposed view
            of a contiguous [3, T, N1].
        impl: "triton" runs the kernels or raises; "reference" runs the specification in PyTorch; "auto" runs the
            kernels and, where they cannot run, the reference, after a warning in the log "nsa_triton".

    Returns:
        A new contiguous tensor with the shape and dtype of the branches.

    Raises:
        ArgumentTypeError: (a TypeError) an argument has the wrong type or dtype.
        ArgumentValueError: (a ValueError and a RuntimeError) a shape or device is not as above.
        ToolchainError: impl="triton", and the kernels cannot run on this machine.

    Example:
        >>> branches = [torch.randn(1024, 64, 128, dtype=torch.bfloat16) for _ in range(3)]
        >>> gates = torch.randn(1024, 64, 3)
        >>> nsa_gated_combine(*branches, gates).shape
        torch.Size([1024, 64, 128])
    """
    check_call({"compressed": compressed, "selected": selected, "local": local, "gates": gates}, impl)
    return library.gated_combine(compressed, selected, local, gates, impl)


def nsa_gated_combine_grad(
    grad: Tensor, compressed: Tensor, selected: Tensor, local: Tensor, gates: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of `nsa_gated_combine`, for code that does not use autograd.

    With s = sigmoid(gates[t, h, i]), that of a branch is s * grad, and that of its gate s * (1 - s) times the sum of
    grad * x_i over Dv. Computed in float32 and rounded once; the result is the same, bit for bit, each time.

    Args:
        grad: the gradient of the output of `nsa_gated_combine`, with the shape, dtype and device of the branches.
        compressed, selected, local, gates, impl: as passed to `nsa_gated_combine`.

    Returns:
        The gradients of `compressed`, `selected`, `local` and `gates`, with their shapes and dtypes.

    Raises:
        The errors of `nsa_gated_combine`.

    Example:
        >>> grad = torch.randn(1024, 64, 128, dtype=torch.bfloat16)
        >>> *branch_grads, gates_grad = nsa_gated_combine_grad(grad, *branches, gates)
    """
    tensors = {"grad": grad, "compressed": compressed, "selected": selected, "local": local, "gates": gates}
    check_call(tensors, impl)
    return library.gated_combine_grad(grad, compressed, selected, local, gates, impl)
