"""The kernel of nsa_compress_infer: the windows that the newest tokens complete, read from pages, written into slots.

    cache[slot, n, :] = sum_i w[i, n] raw[start + i, n, :]                 i = 0 .. L-1

Names: N heads, D head size, L window length, S stride. Window number r of a sequence starts at token r * S. All its
tokens come in pieces of C, the largest power of two that divides S, L and the page: a piece never straddles two pages,
so that it is one page id and one load of C rows.

Which windows there are is known on the device only. A loop that turns once or not at all stands for the question: then
nothing that belongs to a missing window is read, and its table rows and slots may hold anything.
"""

import triton
import triton.language as tl

from nsa_triton.ops._common.primitives import page_at


@triton.jit
def unpack(i_item, N, D, W, BD: tl.constexpr):
    """The batch, its window, the head and the first column of an item of work."""
    n_blocks = (D + BD - 1) // BD
    i_window = i_item // n_blocks // N
    return i_window // W, i_window % W, i_item // n_blocks % N, i_item % n_blocks * BD


@triton.jit
def completed(n_tokens, L: tl.constexpr, S: tl.constexpr):
    """How many windows the first `n_tokens` tokens of a sequence complete."""
    return tl.maximum(n_tokens - (L - S), 0) // S


@triton.jit(do_not_specialize=["n_items", "n_pages", "n_columns", "n_rows", "new_tokens", "W", "page"])
def compress_infer(
    x,  # [n_pages, page, N, D], or packed tokens [n_pages, N, D]: a page is a token
    w,  # [N, L]
    cache,  # [n_rows, N, D]
    lengths,  # [B] tokens of each batch
    table,  # [B, n_columns] page ids, or [B, 1] the first packed token of each batch
    slots,  # [B, W] rows of cache, one per window
    n_items,
    n_pages,
    n_columns,
    n_rows,
    new_tokens,
    W,  # windows that new_tokens tokens may complete
    page,
    N,
    D,
    x_p,  # strides
    x_t,
    x_n,
    cache_r,
    cache_n,
    L: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    PAGED: tl.constexpr,
):
    o_c = tl.arange(0, C)
    o_d = tl.arange(0, BD)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i_b, i_k, i_n, i_d = unpack(i_item, N, D, W, BD)
        n_tokens = tl.load(lengths + i_b)
        first = completed(n_tokens - new_tokens, L, S)
        # the k-th new window of the batch, if it is there
        for i_r in range(first + i_k, tl.minimum(first + i_k + 1, completed(n_tokens, L, S))):
            b_y = tl.zeros([BD], tl.float32)
            for i_l in range(0, L, C):
                i_t = i_r * S + i_l
                if PAGED:
                    i_page = page_at(table + i_b.to(tl.int64) * n_columns, i_t // page, n_columns, n_pages)
                    p_x = x + i_page * x_p + (i_t % page).to(tl.int64) * x_t
                    n_c = C
                else:
                    i_x = tl.minimum(tl.load(table + i_b).to(tl.int64) + i_t, n_pages)
                    p_x = x + i_x * x_p
                    n_c = (n_pages - i_x).to(tl.int32)
                # [C, BD]
                p_x += i_n * x_n + i_d
                m_x = (o_c < n_c)[:, None] & (o_d < D - i_d)[None, :]
                b_x = tl.load(p_x + o_c[:, None] * x_t + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
                # [C, 1]
                b_w = tl.load(w + i_n * L + i_l + o_c).to(tl.float32)[:, None]
                b_y += tl.sum(b_x * b_w, axis=0)
            i_slot = tl.load(slots + i_b.to(tl.int64) * W + i_k).to(tl.int64)
            # no column of a slot that is not in the cache
            n_d = tl.where((i_slot >= 0) & (i_slot < n_rows), D - i_d, 0)
            p_y = cache + i_slot * cache_r + i_n * cache_n + i_d
            tl.store(p_y + o_d, b_y.to(cache.dtype.element_ty), mask=o_d < n_d)
