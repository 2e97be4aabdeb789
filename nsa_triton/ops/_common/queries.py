"""The query layouts of the paged operators, and which rows of the packed queries belong to which batch.

The registered operators see one layout: queries [T, N1, Dk], caches [pages, page, N2, D], and a table [B, 2] of the
first row and the number of query tokens of each batch; None stands for T / B tokens each.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.ops._common.arguments import check_rank
from nsa_triton.ops._common.indices import refuse_outside
from nsa_triton.ops._common.lengths import batch_lengths, check_batch_lengths, host_ints, int32_tensor, on_device

# The dimensions of a query in each layout. H is heads times head size.
LAYOUTS = {"TND": "[T, N1, Dk]", "BSND": "[B, S, N1, Dk]", "BSH": "[B, S, H]"}


def check_layout(layout: Any, known: tuple[str, ...]) -> None:
    if not isinstance(layout, str):
        raise ArgumentTypeError("layout", f"one of {', '.join(known)}", type(layout).__name__)
    if layout not in known:
        raise ArgumentValueError("layout", f"one of {', '.join(known)}", repr(layout))


def packed(query: Tensor, layout: str, heads: int) -> Tensor:
    """[T, N1, Dk]; T = B * S for the layouts with a batch dimension."""
    check_rank("query", query, LAYOUTS[layout])  # type: ignore[arg-type]  # looks at the shape only
    if layout == "TND":
        return query
    if layout == "BSND":
        return query.flatten(0, 1)
    return with_heads(query, heads, "query", "head_num").flatten(0, 1)


def unpacked(output: Tensor, layout: str, query: Tensor) -> Tensor:
    """[T, N, D] as the layout has it, for the query that was packed; a BSH output has its heads folded."""
    if layout == "TND":
        return output
    batch, tokens, (heads, size) = *query.shape[:2], output.shape[1:]
    return output.view(batch, tokens, heads * size) if layout == "BSH" else output.view(batch, tokens, heads, size)


def with_heads(tensor: Tensor, heads: int, argument: str, heads_argument: str) -> Tensor:
    """[..., heads * D] as [..., heads, D]; 4-D tensors have their heads apart already."""
    if tensor.dim() == 4:
        return tensor
    check_rank(argument, tensor, "[pages, page, N * D]")  # type: ignore[arg-type]
    if heads < 1 or tensor.shape[2] % heads:
        expected = f"a multiple of {heads_argument} = {heads}"
        raise ArgumentValueError(f"{argument}.shape[2]", expected, tensor.shape[2], "It is heads times head size")
    split: Tensor = tensor.unflatten(2, (heads, tensor.shape[2] // heads))  # type: ignore[no-untyped-call]
    return split


def batch_count(query: Tensor, block_table: Tensor | None, lengths: Any, layout: str) -> int:
    """B, from the first argument that says it."""
    if layout != "TND":
        return query.shape[0]
    if block_table is not None:
        check_rank("block_table", block_table, "[B, max_blocks]")  # type: ignore[arg-type]
        return block_table.shape[0]
    return lengths.numel() if isinstance(lengths, Tensor) else len(lengths)


def most_query_tokens(qlen: Any, layout: str, query: Tensor) -> int | None:
    """S, the most query tokens of a batch; None where only the device knows."""
    if qlen is None:
        return 1 if layout == "TND" else query.shape[1]
    if isinstance(qlen, Tensor) and (on_device(qlen) or torch.compiler.is_compiling()):
        return None
    if torch.compiler.is_compiling():  # Dynamo cannot trace what host_ints does
        most: int = max(qlen)
        return most
    return max(host_ints(qlen, "actual_seq_qlen"), default=0)


def refuse_bad_rows(rows: Tensor, tokens: int) -> None:
    """Raise at the first batch whose query tokens are not among the `tokens` rows. Reads the rows back to the host."""
    first, count = rows.long().unbind(1)
    every = torch.ones_like(first, dtype=torch.bool)
    hint = f"query has {tokens} rows for the query tokens of all batches"
    refuse_outside("actual_seq_qlen", count, 0, tokens - first.clamp(min=0) + 1, every, hint)


def query_rows(qlen: Any, layout: str, query: Tensor, batch: int) -> Tensor | None:
    """The table [B, 2] for `actual_seq_qlen`, or None where all batches have T / B query tokens."""
    tokens = query.shape[0] if layout == "TND" else query.shape[1]
    if qlen is None:
        if layout == "TND" and tokens != batch:
            expected = f"{batch} rows, one per batch, in a call without actual_seq_qlen"
            raise ArgumentValueError("query.shape[0]", expected, tokens, "Pass the query tokens of each batch")
        return None
    stride = 0 if layout == "TND" else tokens
    if on_device(qlen) or torch.compiler.is_compiling():
        return _rows(batch_lengths(qlen, "actual_seq_qlen", batch, query.device), stride)
    values = host_ints(qlen, "actual_seq_qlen")
    check_batch_lengths(values, "actual_seq_qlen", batch)
    if layout == "TND" and sum(values) != tokens:
        raise ArgumentValueError("sum(actual_seq_qlen)", f"{tokens}, the rows of query", sum(values))
    if layout != "TND" and max(values) > tokens:
        expected = f"at most {tokens} (S), the query tokens of a batch"
        raise ArgumentValueError("max(actual_seq_qlen)", expected, max(values))
    if values.count(values[0]) == batch and (layout == "TND" or values[0] == tokens):
        return None
    firsts = range(0, batch * stride, stride) if stride else (0, *itertools.accumulate(values[:-1]))
    return int32_tensor(tuple(zip(firsts, values, strict=True)), query.device)


def _rows(lengths: Tensor, stride: int) -> Tensor:
    """Packed one after another, or `stride` rows apart."""
    first = torch.arange(lengths.shape[0], device=lengths.device) * stride if stride else lengths.cumsum(0) - lengths
    return torch.stack((first.to(torch.int32), lengths), dim=1)


def visible_tokens(rows: Tensor | None, lengths: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The batch and the number of tokens that it sees, of each of the `tokens` rows of the packed queries.

    Query tokens are the newest of the cache, and each sees up to itself. Rows that are no query token see nothing.
    """
    lengths = lengths.long()
    if rows is None:
        each = tokens // lengths.shape[0]
        rows = _rows(torch.full_like(lengths, each), each)
    first, count = rows.long().unsqueeze(-1).unbind(1)  # [B, 1]
    within = torch.arange(tokens, device=lengths.device) - first  # [B, T]
    owned = (within >= 0) & (within < count)
    visible = torch.where(owned, lengths[:, None] - (count - 1 - within), 0)
    return owned.int().argmax(0), visible.amax(0).clamp(min=0)
