"""One numeric matrix of a MATLAB 5 file, read within bounds.

scipy.io.loadmat is compiled code that crashes the process on some damaged files.
"""

from __future__ import annotations

import zlib

import numpy as np

_NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
_MATRIX, _COMPRESSED = 14, 15
_HEADER_BYTES = 128
_MAX_BYTES = 2**20  # of a matrix; Flowers-102's labels are 8,189 bytes


def read_matrix(data: bytes, name: str) -> np.ndarray:
    """The numbers of the matrix `name`, flat, in the order in which they are stored.

    Raises:
        ValueError: not a MATLAB 5 file, no such matrix, or one that is not real and numeric.

    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:_HEADER_BYTES])
    if order is None:
        raise ValueError("not a MATLAB 5 file")
    at = _HEADER_BYTES
    while at < len(data):
        kind, content, at = _element(data, at, order)
        if kind == _COMPRESSED:
            kind, content, _ = _element(_inflate(content), 0, order)
        if kind != _MATRIX:
            continue
        _, _, place = _element(content, 0, order)  # flags
        _, _, place = _element(content, place, order)  # shape
        _, title, place = _element(content, place, order)
        if title == name.encode():
            kind, numbers, _ = _element(content, place, order)
            if kind not in _NUMBERS:
                raise ValueError(f"{name} is not a matrix of numbers")
            return np.frombuffer(numbers, order + _NUMBERS[kind])
    raise ValueError(f"it has no matrix {name}")


def _element(data: bytes, at: int, order: str) -> tuple[int, bytes, int]:
    """(type, content, place of the next element); contents are padded to 8 bytes."""
    kind, size = (int(word) for word in _words(data, at, order))
    if kind >> 16:  # four bytes or fewer lie within the tag itself
        kind, size, start, after = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        if size > 4:
            raise ValueError(f"a small element of {size} bytes")
    else:
        start = at + 8
        after = start + size + (0 if kind == _COMPRESSED else -size % 8)
    if start + size > len(data):
        raise ValueError("it is cut short")
    return kind, data[start : start + size], after


def _words(data: bytes, at: int, order: str) -> np.ndarray:
    if at + 8 > len(data):
        raise ValueError("it is cut short")
    return np.frombuffer(data, f"{order}u4", count=2, offset=at)


def _inflate(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, _MAX_BYTES)
    except zlib.error as error:
        raise ValueError(f"it cannot be decompressed: {error}") from error
    if stream.unconsumed_tail:
        raise ValueError(f"a matrix of more than {_MAX_BYTES:,} bytes")
    if not stream.eof:
        raise ValueError("it is cut short")
    return content
