"""What an object file expects others to define."""

from __future__ import annotations

import struct

_HEADER = struct.Struct("<4sBB34xQ10xHHH")  # magic, class, byte order, ..., section table, ..., its entries
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMBOL_TABLE = 2
_ELF64_LITTLE = (b"\x7fELF", 2, 1)


def undefined_symbols(code: bytes) -> frozenset[str]:
    """The symbols that `code` uses and does not define; nothing is known of formats other than 64-bit ELF."""
    magic, bits, order, table, entry_size, count, _ = _HEADER.unpack_from(code)
    if (magic, bits, order) != _ELF64_LITTLE:
        return frozenset()
    sections = [_SECTION.unpack_from(code, table + index * entry_size) for index in range(count)]
    found = set()
    for _, kind, _, _, offset, size, names, *_ in sections:
        if kind == _SYMBOL_TABLE:
            for name, _, _, section, _, _ in _SYMBOL.iter_unpack(code[offset : offset + size]):
                if name and section == 0:
                    start = sections[names][4] + name
                    found.add(code[start : code.index(b"\0", start)].decode())
    return frozenset(found)
