"""Give an ELF library's prefixed functions their plain names back, without a linker.

Every string `scipy_cblas_sgemm` in `.dynstr` holds `cblas_sgemm` at offset 6, so a symbol is renamed by moving its
`st_name` forward. Symbol lookup goes by hash, so the GNU hash table is replaced, at its own offset, by the older and
smaller SysV table (System V gABI, chapter 5, "Hash Table"), which glibc and musl both read.
"""

from __future__ import annotations

import struct

_DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SONAME = 5, 6, 10, 14
_DT_HASH, _DT_GNU_HASH = 4, 0x6FFFFEF5
#: Dynamic tags whose value is an address inside the image; they bound the room that a table has.
_ADDRESS_TAGS = frozenset({3, 4, 5, 6, 7, 12, 13, 17, 23, 25, 26, 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFE})
_SYMBOL_SIZE = 24


class ElfError(ValueError):
    """The file is no ELF image of the expected kind, or has no room for the new table."""


class _Image:
    """A mutable 64-bit little-endian ELF image, read and written with bounds checks."""

    def __init__(self, data: bytes):
        self.data = bytearray(data)
        if bytes(data[:6]) != b"\x7fELF\x02\x01":
            raise ElfError("not a 64-bit little-endian ELF file")
        (table,) = self.read("<Q", 32)
        size, count = self.read("<HH", 54)
        headers = [self.read("<IIQQQQ", table + index * size) for index in range(count)]
        self.loads = [(address, offset, length) for kind, _, offset, address, _, length in headers if kind == 1]
        dynamic = [(offset, length) for kind, _, offset, _, _, length in headers if kind == 2]
        if len(dynamic) != 1:
            raise ElfError("no dynamic section")
        self.tags = self._dynamic(*dynamic[0])

    def read(self, layout: str, offset: int) -> tuple[int, ...]:
        if offset < 0 or offset + struct.calcsize(layout) > len(self.data):
            raise ElfError(f"offset {offset} lies outside the file")
        return struct.unpack_from(layout, self.data, offset)

    def write(self, layout: str, offset: int, *values: int) -> None:
        if offset < 0 or offset + struct.calcsize(layout) > len(self.data):
            raise ElfError(f"offset {offset} lies outside the file")
        struct.pack_into(layout, self.data, offset, *values)

    def offset(self, address: int) -> int:
        for start, offset, length in self.loads:
            if start <= address < start + length:
                return offset + address - start
        raise ElfError(f"address {address:#x} is not loaded")

    def string(self, offset: int) -> bytes:
        start = self.offset(self.value(_DT_STRTAB)) + offset
        end = self.data.find(b"\0", start)
        if offset >= self.value(_DT_STRSZ) or end < 0:
            raise ElfError(f"string {offset} lies outside the string table")
        return bytes(self.data[start:end])

    def value(self, tag: int) -> int:
        if tag not in self.tags:
            raise ElfError(f"dynamic tag {tag:#x} is missing")
        return self.tags[tag][1]

    def _dynamic(self, offset: int, length: int) -> dict[int, tuple[int, int]]:
        """tag -> (file offset of the entry, value); of a repeated tag, the first."""
        tags: dict[int, tuple[int, int]] = {}
        for entry in range(offset, offset + length - 15, 16):
            tag, value = self.read("<QQ", entry)
            if tag == 0:
                break
            tags.setdefault(tag, (entry, value))
        return tags


def strip_prefix(data: bytes, prefix: bytes) -> bytes:
    """A copy of the ELF image `data` whose defined dynamic symbols called `prefix...` lose that prefix.

    Raises `ElfError` when the image is not understood or the new hash table does not fit where the old one lay.
    """
    image = _Image(data)
    symbols = image.offset(image.value(_DT_SYMTAB))
    count = _symbol_count(image)
    names = []
    for index in range(count):
        entry = symbols + index * _SYMBOL_SIZE
        name, _, _, section = image.read("<IBBH", entry)
        text = image.string(name)
        if section and text.startswith(prefix):
            image.write("<I", entry, name + len(prefix))
            text = text[len(prefix) :]
        names.append(text)
    _replace_hash(image, names)
    if _DT_SONAME in image.tags:  # a SONAME of its own ("lib" cut off), so that the two libraries are never confused
        entry, name = image.tags[_DT_SONAME]
        image.write("<QQ", entry, _DT_SONAME, name + min(3, len(image.string(name))))
    # The section table still calls the region .gnu.hash; without it, tools go by the dynamic section, which is right.
    image.write("<Q", 40, 0)
    image.write("<HHH", 58, 0, 0, 0)
    return bytes(image.data)


def _symbol_count(image: _Image) -> int:
    """The number of dynamic symbols: one past the end of the GNU hash table's last chain."""
    table = image.offset(image.value(_DT_GNU_HASH))
    buckets, first, bloom, _ = image.read("<IIII", table)
    start = table + 16 + 8 * bloom
    if buckets * 4 > len(image.data):
        raise ElfError("the hash table is larger than the file")
    last = max(image.read(f"<{buckets}I", start), default=0)
    if last < first:
        raise ElfError("the hash table is empty")
    chains = start + 4 * buckets
    while not image.read("<I", chains + 4 * (last - first))[0] & 1:
        last += 1
    return last + 1


def _replace_hash(image: _Image, names: list[bytes]) -> None:
    entry, address = image.tags[_DT_GNU_HASH]
    following = [value for tag, (_, value) in image.tags.items() if tag in _ADDRESS_TAGS and value > address]
    words = (min(following, default=address) - address) // 4
    buckets = min(len(names), words - 2 - len(names))
    if buckets < 16:
        raise ElfError(f"no room for the new hash table: {words} words for {len(names)} symbols")
    heads, chains = [0] * buckets, [0] * len(names)
    for index in range(1, len(names)):
        bucket = _sysv_hash(names[index]) % buckets
        chains[index], heads[bucket] = heads[bucket], index
    offset = image.offset(address)
    image.write(f"<{2 + buckets + len(names)}I", offset, buckets, len(names), *heads, *chains)
    image.write("<QQ", entry, _DT_HASH, address)


def _sysv_hash(name: bytes) -> int:
    value = 0
    for byte in name:
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ (high >> 24)) & ~high & 0xFFFFFFFF
    return value
