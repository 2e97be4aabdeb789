"""The lists that nsa_select_attention works by: the blocks that a tile holds, and the tiles that hold a block.

Names as in kernels.py: a tile is PACK adjacent tokens, and its E = PACK * K entries are their ids. The *union* is every
block among them once.

The inverse is for the gradients of keys and values: for every block the tiles whose union holds it. They are counted,
places in one long list are given out, and the list is filled, all in ascending order and by copies of whole vectors:
several cores that store single numbers into one cache line would overwrite one another. No atomics: the same inputs
give the same lists.
"""

import triton
import triton.language as tl

from nsa_triton.ops._common.primitives import is_column

BEHIND: tl.constexpr = tl.constexpr(1e9)  # larger than every place in a list


@triton.jit(do_not_specialize=["n_items", "n_tiles", "n_all"])
def select_attention_union(
    ids,  # [N2, T, K] int32
    tiles,  # [n_tiles, 6], see query_tiles
    union,  # [N2, n_tiles, U] int32: the blocks, as many -1 as are missing, in column E how many blocks there are
    n_items,  # N2 * n_tiles
    n_tiles,
    n_all,  # T
    K: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
    U: tl.constexpr,  # more than E; rows of whole 32 bytes
    CAUSAL: tl.constexpr,
    BC: tl.constexpr,  # entries that are looked at at once
    BE: tl.constexpr,  # U, or the power of two above it
):
    o_e = tl.arange(0, BE)
    o_c = tl.arange(0, BC)
    f_e = o_e.to(tl.float32)
    f_c = o_c.to(tl.float32)
    # [BC, BC] 1.0 where the row is before the column
    b_before = tl.where(f_c[:, None] < f_c[None, :], 1.0, 0.0)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        p_tile = tiles + i_item % n_tiles * 6
        i_q = tl.load(p_tile).to(tl.int64)
        n_t = tl.load(p_tile + 2)
        n_blocks = (tl.load(p_tile + 5) + L - 1) // L
        if CAUSAL:
            n_blocks = tl.minimum(n_blocks, (tl.load(p_tile + 1) + n_t - 1) // L + 1)
        p_ids = ids + ((i_item // n_tiles).to(tl.int64) * n_all + i_q) * K
        # [BE]
        b_all = tl.load(p_ids + o_e, mask=o_e < n_t * K, other=-1).to(tl.float32)
        b_union = tl.zeros([BE], tl.float32)
        b_count = tl.zeros([BC], tl.float32)
        for i_c in range(0, n_t * K, BC):
            # [BC]
            b_ids = tl.load(p_ids + i_c + o_c, mask=o_c < n_t * K - i_c, other=-1).to(tl.float32)
            # [BE, BC] where an entry names the same block, its place; a block is new where the first of them is its own
            b_first = tl.where(b_all[:, None] == b_ids[None, :], f_e[:, None], BEHIND)
            b_new = tl.where(tl.min(b_first, axis=0) == f_c + i_c * 1.0, 1.0, 0.0)
            b_new = tl.where(b_ids >= 0.0, tl.where(b_ids < n_blocks * 1.0, b_new, 0.0), 0.0)
            b_place = tl.sum(b_new[:, None] * b_before, axis=0) + b_count
            b_place = tl.where(b_new > 0.0, b_place, -1.0)
            # [BC, BE]
            b_here = tl.where(b_place[:, None] == f_e[None, :], (b_ids + 1.0)[:, None], 0.0)
            b_union += tl.sum(b_here, axis=0)
            b_count += tl.sum(b_new, axis=0)
        n_found = tl.sum(b_count, axis=0) / BC
        b_union += is_column(f_e, E * 1.0) * (n_found + 1.0)
        tl.store(union + i_item.to(tl.int64) * U + o_e, (b_union - 1.0).to(tl.int32), mask=o_e < U)


@triton.jit(do_not_specialize=["n_items", "n_groups", "n_tiles", "n_blocks", "n_rows"])
def select_attention_count(
    union,  # [N2, n_tiles, U] int32
    groups,  # [n_groups, 6], see block_groups
    before,  # [*, n_rows] int32, for each BT tiles of a group, how many tiles before them hold each block; then, in all
    counts,  # [n_rows] int32, how many tiles hold each block
    n_items,  # N2 * n_groups
    n_groups,
    n_tiles,
    n_blocks,  # rows of `blocks`
    n_rows,  # N2 * n_blocks
    E: tl.constexpr,
    U: tl.constexpr,
    BG: tl.constexpr,  # blocks of a group
    BT: tl.constexpr,  # tiles that are looked at at once
    BE: tl.constexpr,  # U, or the power of two above it
):
    o_g = tl.arange(0, BG)
    o_t = tl.arange(0, BT)
    o_e = tl.arange(0, BE)
    f_g = o_g.to(tl.float32)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        p_group = groups + i_item % n_groups * 6
        i_n = (i_item // n_groups).to(tl.int64)
        n_g = tl.load(p_group + 1)
        i_block = tl.load(p_group + 2)
        i_first = tl.load(p_group + 3)
        n_t = tl.load(p_group + 4) - i_first
        i_row = i_n * n_blocks + tl.load(p_group)
        # [BG]
        b_counts = tl.zeros([BG], tl.float32)
        for i_t in range(0, n_t, BT):
            p_before = before + (i_t // BT).to(tl.int64) * n_rows + i_row
            tl.store(p_before + o_g, b_counts.to(tl.int32), mask=o_g < n_g)
            # [BT, BE]
            m_u = (o_t < n_t - i_t)[:, None] & (o_e < E)[None, :]
            p_u = union + (i_n * n_tiles + i_first + i_t) * U
            b_u = tl.load(p_u + o_t[:, None] * U + o_e[None, :], mask=m_u, other=-1).to(tl.float32)
            # [BG, BE]
            b_found = tl.zeros([BG, BE], tl.float32)
            for i_g in range(0, n_g):
                b_here = tl.sum(tl.where(b_u == (i_block + i_g) * 1.0, 1.0, 0.0), axis=0)
                b_found += is_column(f_g, i_g * 1.0)[:, None] * b_here[None, :]
            b_counts += tl.sum(b_found, axis=1)
        p_before = before + ((n_t + BT - 1) // BT).to(tl.int64) * n_rows + i_row
        tl.store(p_before + o_g, b_counts.to(tl.int32), mask=o_g < n_g)
        tl.store(counts + i_row + o_g, b_counts.to(tl.int32), mask=o_g < n_g)


@triton.jit(do_not_specialize=["n_rows"])
def select_attention_place(
    counts,  # [n_rows] int32
    places,  # [n_rows + 1] int32, where the list of each row begins
    parts,  # [n_rows + 1] int32, the first part of each row
    most,  # [8] int32, 8 times the same: how many entries of a list make one part
    n_rows,
    PARTS: tl.constexpr,  # as many parts as there are more than rows, at the most
    BO: tl.constexpr,
):
    """Sums of what comes before each row. One program: there are few rows, T2 N2 / L."""
    o_o = tl.arange(0, BO)
    f_o = o_o.to(tl.float32)
    # [BO, BO] 1.0 where the row is before the column
    b_before = tl.where(f_o[:, None] < f_o[None, :], 1.0, 0.0)
    b_zeros = tl.zeros([BO, BO], tl.float32)
    # Long lists are cut where a part has its share of all entries.
    b_entries = tl.zeros([BO], tl.int32)
    for i_o in range(0, n_rows, BO):
        b_entries += tl.load(counts + i_o + o_o, mask=o_o < n_rows - i_o, other=0)
    n_most = tl.maximum((tl.sum(b_entries, axis=0) + PARTS - 1) // PARTS, 1)
    tl.store(most + tl.arange(0, 8), tl.zeros([8], tl.int32) + n_most)
    # [BO] the sums so far, in every element: they never become scalars, which would wait for the vector unit
    b_places = tl.zeros([BO], tl.int32)
    b_all_parts = tl.zeros([BO], tl.int32)
    for i_o in range(0, n_rows + 1, BO):
        b_counts = tl.load(counts + i_o + o_o, mask=o_o < n_rows - i_o, other=0).to(tl.float32)
        b_parts = ((b_counts + (n_most - 0.5)) / n_most).to(tl.int32).to(tl.float32)
        b_place = tl.sum(b_counts[:, None] * b_before, axis=0).to(tl.int32)
        b_part = tl.sum(b_parts[:, None] * b_before, axis=0).to(tl.int32)
        tl.store(places + i_o + o_o, b_place + b_places, mask=o_o < n_rows + 1 - i_o)
        tl.store(parts + i_o + o_o, b_part + b_all_parts, mask=o_o < n_rows + 1 - i_o)
        b_places += tl.sum(b_counts[:, None] + b_zeros, axis=0).to(tl.int32)
        b_all_parts += tl.sum(b_parts[:, None] + b_zeros, axis=0).to(tl.int32)


@triton.jit(do_not_specialize=["n_items", "n_groups", "n_tiles", "n_blocks", "n_rows"])
def select_attention_fill(
    union,  # [N2, n_tiles, U] int32
    groups,  # [n_groups, 6]
    before,  # [*, n_rows] int32
    places,  # [n_rows + 1] int32
    parts,  # [n_rows + 1] int32
    entries,  # [*] int32, for each tile of a list the place of its first token in its segment, ascending
    rows,  # [*] int32, the row of each part
    n_items,  # N2 * n_groups
    n_groups,
    n_tiles,
    n_blocks,
    n_rows,
    PACK: tl.constexpr,
    E: tl.constexpr,
    U: tl.constexpr,
    BT: tl.constexpr,  # as in select_attention_count
    BE: tl.constexpr,
):
    o_t = tl.arange(0, BT)
    o_e = tl.arange(0, BE)
    f_t = o_t.to(tl.float32)
    # [BT, BT] 1.0 where the row is before the column
    b_earlier = tl.where(f_t[:, None] < f_t[None, :], 1.0, 0.0)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        p_group = groups + i_item % n_groups * 6
        i_n = (i_item // n_groups).to(tl.int64)
        n_g = tl.load(p_group + 1)
        i_block = tl.load(p_group + 2)
        i_first = tl.load(p_group + 3)
        n_t = tl.load(p_group + 4) - i_first
        i_place = tl.load(p_group + 5)
        i_row = i_n * n_blocks + tl.load(p_group)
        for i_t in range(0, n_t, BT):
            # [BT, BE]
            m_u = (o_t < n_t - i_t)[:, None] & (o_e < E)[None, :]
            p_u = union + (i_n * n_tiles + i_first + i_t) * U
            b_u = tl.load(p_u + o_t[:, None] * U + o_e[None, :], mask=m_u, other=-1).to(tl.float32)
            for i_g in range(0, n_g):
                p_before = before + (i_t // BT).to(tl.int64) * n_rows + i_row + i_g
                n_before = tl.load(p_before)
                n_here = tl.load(p_before + n_rows) - n_before
                if n_here > 0:
                    # [BT] 1.0 for tiles that hold the block, and how many before them do
                    b_here = tl.sum(tl.where(b_u == (i_block + i_g) * 1.0, 1.0, 0.0), axis=1)
                    b_place = tl.sum(b_here[:, None] * b_earlier, axis=0)
                    b_place = b_place * b_here + b_here - 1.0
                    # [BT, BT] -> [BT] those tiles, side by side
                    b_tile = tl.where(b_place[:, None] == f_t[None, :], f_t[:, None], 0.0)
                    b_tile = tl.sum(b_tile, axis=0).to(tl.int32) + (i_place + i_t)
                    p_entries = entries + tl.load(places + i_row + i_g) + n_before
                    tl.store(p_entries + o_t, b_tile * PACK, mask=o_t < n_here)
        for i_g in range(0, n_g):
            i_part = tl.load(parts + i_row + i_g)
            n_parts = tl.load(parts + i_row + i_g + 1) - i_part
            for i_t in range(0, n_parts, BT):
                b_row = tl.zeros([BT], tl.int32) + (i_row + i_g).to(tl.int32)
                tl.store(rows + i_part + i_t + o_t, b_row, mask=o_t < n_parts - i_t)
