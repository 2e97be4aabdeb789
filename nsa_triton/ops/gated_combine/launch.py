"""Plans and runs the launches of nsa_gated_combine. Tokens and heads are one dimension here: rows."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_triton.ops._common.dense import with_dense_rows
from nsa_triton.ops._common.plans import CallPlan
from nsa_triton.ops.gated_combine import kernels
from nsa_triton.runtime.configs import Config, lookup
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target, target_of

OP = "gated_combine"
TILES = ("BR", "BD")  # rows and columns of a tile, from autotune_configs

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


class Plan(CallPlan):
    """What a launch is planned from: target and shape; `rows` is a branch [R, D]."""

    def __init__(self, target: Target, rows: Tensor) -> None:
        super().__init__(target, rows)
        self.rows, self.value_dim = rows.shape

    def config(self, kernel: str) -> Config:
        key = {"itemsize": self.dtype.itemsize, "value_dim": self.value_dim}
        return lookup(OP, kernel, self.target, key, self.rows, TILES)

    def tiles(self, config: Config) -> tuple[dict[str, int], int, int]:
        """The constexprs of a kernel, and how many tiles cover the rows, and the columns."""
        long, wide = config.tiles["BR"], min(config.tiles["BD"], self.target.tile(self.value_dim))
        return {"D": self.value_dim, "BR": long, "BD": wide}, -(-self.rows // long), -(-self.value_dim // wide)


def plan_forward(plan: Plan, branches: tuple[Tensor, ...], z: Tensor, y: Tensor) -> Launch:
    config = plan.config("gated_combine_fwd")
    constexprs, tiles, blocks = plan.tiles(config)
    c, s, w = branches
    items = tiles * blocks
    arguments = {
        "c": c, "s": s, "w": w, "z": z, "y": y, "n_rows": plan.rows, "n_items": items,
        "c_r": c.stride(0), "s_r": s.stride(0), "w_r": w.stride(0),
    }  # fmt: skip
    return plan.launch(kernels.gated_combine_fwd, items, arguments, constexprs, config)


def plan_backward(plan: Plan, g: Tensor, branches: tuple[Tensor, ...], z: Tensor, grads: Gradients) -> Launch:
    config = plan.config("gated_combine_bwd")
    constexprs, tiles, _ = plan.tiles(config)
    (c, s, w), (dc, ds, dw, dz) = branches, grads
    arguments = {
        "g": g, "c": c, "s": s, "w": w, "z": z, "dc": dc, "ds": ds, "dw": dw, "dz": dz,
        "n_rows": plan.rows, "n_items": tiles,
        "g_r": g.stride(0), "c_r": c.stride(0), "s_r": s.stride(0), "w_r": w.stride(0),
    }  # fmt: skip
    return plan.launch(kernels.gated_combine_bwd, tiles, arguments, constexprs, config)


def rows_of(tensor: Tensor) -> Tensor:
    """[..., N1, Dv] as [R, Dv] with dense rows; a copy only where one stride cannot lead from row to row."""
    return with_dense_rows(tensor.reshape(-1, tensor.shape[-1]))


def branch_major(gates: Tensor) -> Tensor:
    """[..., N1, 3] as contiguous [3, R]."""
    return gates.reshape(-1, gates.shape[-1]).t().contiguous()


def forward(compressed: Tensor, selected: Tensor, local: Tensor, gates: Tensor) -> Tensor:
    """nsa_gated_combine on the device of the branches; there is at least one row."""
    branches = tuple(map(rows_of, (compressed, selected, local)))
    target = target_of(compressed.device)
    y = compressed.new_empty(compressed.shape)
    plan_forward(Plan(target, branches[0]), branches, branch_major(gates), y).run(target, compressed.device)
    return y


def backward(grad: Tensor, compressed: Tensor, selected: Tensor, local: Tensor, gates: Tensor) -> Gradients:
    """The gradients of the branches and of the gates; there is at least one row."""
    branches = tuple(map(rows_of, (compressed, selected, local)))
    target = target_of(compressed.device)
    z = branch_major(gates)
    dc, ds, dw, dz = (tensor.new_empty(tensor.shape) for tensor in (compressed, selected, local, z))
    plan = Plan(target, branches[0])
    plan_backward(plan, rows_of(grad), branches, z, (dc, ds, dw, dz)).run(target, compressed.device)
    return dc, ds, dw, dz.t().reshape(gates.shape)


def compile_plans(
    target: Target, dtype: torch.dtype, heads: int, value_dim: int, gates: torch.dtype, tokens: int = 4096
) -> list[Launch]:
    """Every launch of the op for one shape, on meta tensors: what `nsa-triton compile` gives to the Ascend compiler."""
    x = torch.empty((tokens * heads, value_dim), dtype=dtype, device="meta")
    z = torch.empty((3, tokens * heads), dtype=gates, device="meta")
    plan, branches = Plan(target, x), (x, x, x)
    return [plan_forward(plan, branches, z, x), plan_backward(plan, x, branches, z, (x, x, x, z))]
