"""The bytes that the README states are those of the compiled kernels, and the compressed keys are read once."""

from __future__ import annotations

import csv

import pytest

from nsa_triton.ascend.toolchain import compilers, front_end_problem
from tests.readme import RESULTS

if front_end_problem() is not None or not compilers():
    pytest.skip(f"no Ascend toolchain: {front_end_problem() or 'no ascendnpu-ir'}", allow_module_level=True)

from bench.decode_bytes import COLUMNS, CONTEXTS, Shape, compressed_attention_bytes, kilobytes, selected_attention_bytes

CHIP = "Ascend910B2"


def committed(context: int) -> dict[str, str]:
    with (RESULTS / "ascend" / "decode_bytes.csv").open(newline="") as file:
        return next(row for row in csv.DictReader(file) if row[COLUMNS[0]] == f"{context:,}")


@pytest.mark.parametrize("context", CONTEXTS)
def test_compressed_attention_moves_little_more_than_it_must(context):
    bytes_moved, least = compressed_attention_bytes(Shape(), context, CHIP)
    assert least < bytes_moved <= 1.15 * least
    assert committed(context)["compressed attention"] == kilobytes(bytes_moved)


def test_a_grouped_query_shape_too():
    shape = Shape(heads=32, kv_heads=8, key_dim=128, value_dim=128, page=64)
    bytes_moved, least = compressed_attention_bytes(shape, 32768, CHIP)
    assert bytes_moved <= 1.15 * least


def test_selected_attention_reads_its_blocks_once():
    """The rest is the outputs of the splits, which let one sequence use all cores."""
    shape = Shape()
    blocks = shape.dense(shape.count * shape.block)
    assert blocks < selected_attention_bytes(shape, 65536, CHIP) <= 1.25 * blocks
