"""Read one array from a MATLAB file of level 5, such as SBD and PASCAL Context use for labels.

    file     128 bytes of header, then elements
    element  type and size (8 bytes, or 4 if at most 4 bytes of content follow), content, padding
    matrix   an element of elements: flags, dimensions, name, then numbers or the fields of a struct

Why not scipy: the two label sets need numeric arrays and structs of one element and nothing else;
that is one page, and preparing data then needs no package that training does not need. Elements
that were not asked for (cells, sparse matrices, texts) are stepped over by their size.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_HEADER = 128
_COMPRESSED, _MATRIX = 15, 14
_STRUCT_CLASS = 2
_NUMERIC_CLASSES = range(6, 16)  # double, single, and the integers of 8 to 64 bits
_COMPLEX = 0x0800
_LARGEST = 1 << 28  # bytes that a compressed element may unfold to; labels have under 1 MB
_NUMBERS = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip


class _Element(NamedTuple):
    """A type and the bytes that belong to it."""

    kind: int
    content: bytes


class _Matrix(NamedTuple):
    """The head of an array, and the elements behind it."""

    name: str
    kind: int  # MATLAB class
    shape: tuple[int, ...]
    rest: Iterator[_Element]


def read_matlab_array(path: str | Path, variable: str) -> NDArray[Any]:
    """Read a numeric array from a file of level 5 (``-v6`` and ``-v7`` of MATLAB's ``save``).

    Args:
        path: the ``.mat`` file.
        variable: name of a variable, or of a field of structs of one element:
            "LabelMap", "GTcls.Segmentation".

    Returns:
        The array in the shape that MATLAB shows, (H, W) for a label map.

    Raises:
        ValueError: if the file is no such file, is cut short, or lacks the variable.
    """
    data = Path(path).read_bytes()
    order = {b"IM": "<", b"MI": ">"}.get(data[126:_HEADER])
    if order is None or data[:4] == b"\x89HDF":
        raise ValueError(
            f"{path} must be a MATLAB file of level 5, got another format; save it with -v7"
        )
    try:
        return _find(_elements(data[_HEADER:], order), variable.split("."), order)
    except (StopIteration, zlib.error, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must hold the numeric array {variable!r}, got {error!r} while reading; "
            "the file may be cut short, fetch it again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} must hold the numeric array {variable!r}: {error}") from error


def _find(elements: Iterator[_Element], names: list[str], order: str) -> NDArray[Any]:
    """Go down from the variables of a file to the one that is asked for."""
    found: list[str] = []
    for element in elements:
        if element.kind != _MATRIX:
            continue
        matrix = _open(element.content, order)
        found.append(matrix.name)
        if matrix.name == names[0]:
            return _descend(matrix, names[1:], order)
    raise ValueError(f"there is no variable {names[0]!r}, only {found}; check the data set")


def _descend(matrix: _Matrix, names: list[str], order: str) -> NDArray[Any]:
    if not names:
        return _numbers(matrix, order)
    if matrix.kind != _STRUCT_CLASS or matrix.shape != (1, 1):
        raise ValueError(f"{matrix.name!r} must be a struct of one element, got {matrix.shape}")
    length = int(_integers(next(matrix.rest), order)[0])
    packed = next(matrix.rest).content
    fields = [
        packed[start : start + length].split(b"\0")[0].decode("ascii")
        for start in range(0, len(packed), length)
    ]
    if names[0] not in fields:
        raise ValueError(f"there is no field {names[0]!r}, only {fields}; check the data set")
    for field, element in zip(fields, matrix.rest, strict=False):
        if field == names[0]:
            return _descend(_open(element.content, order), names[1:], order)
    raise ValueError(f"the field {names[0]!r} is not there; the file is cut short")


def _open(content: bytes, order: str) -> _Matrix:
    """Read flags, dimensions and name of an array."""
    rest = _elements(content, order)
    flags = int(_integers(next(rest, _Element(0, b"")), order)[0])
    if flags & _COMPLEX:
        raise ValueError("complex numbers are no labels; check the data set")
    shape = tuple(int(side) for side in _integers(next(rest), order))
    name = next(rest).content.decode("ascii")
    return _Matrix(name, flags & 0xFF, shape, rest)


def _numbers(matrix: _Matrix, order: str) -> NDArray[Any]:
    if matrix.kind not in _NUMERIC_CLASSES:
        raise ValueError(f"{matrix.name or 'the field'!r} is of MATLAB's class {matrix.kind}")
    values = _integers(next(matrix.rest), order)  # MATLAB stores the smallest type that suffices
    if values.size != int(np.prod(matrix.shape)):
        raise ValueError(f"{matrix.shape} values were announced, {values.size} are there")
    return values.reshape(matrix.shape, order="F")


def _integers(element: _Element, order: str) -> NDArray[Any]:
    dtype = np.dtype(order + _NUMBERS[element.kind])
    return np.frombuffer(element.content, dtype)


def _elements(data: bytes, order: str) -> Iterator[_Element]:
    """Walk over the elements of a file or of a matrix; compressed ones are unfolded."""
    position = 0
    while position + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, position)
        start = position + 8
        if kind >> 16:  # the small form: size and type share four bytes, the content has the others
            kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
        if start + size > len(data):
            raise ValueError(f"an element of {size} bytes ends behind the file; fetch it again")
        content = data[start : start + size]
        position = start + size
        if kind == _COMPRESSED:
            yield from _elements(_unfold(content), order)
        else:
            yield _Element(kind, content)
            position += -position % 8  # all elements but the compressed ones are padded


def _unfold(content: bytes) -> bytes:
    stream = zlib.decompressobj()
    data = stream.decompress(content, _LARGEST)
    if not stream.eof:
        raise ValueError(
            f"a compressed element is cut short, or larger than {_LARGEST} bytes; fetch it again"
        )
    return data
