"""Write MATLAB files of level 5, byte by byte, as the label sets have them."""

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_CLASSES = {"u1": 9, "i1": 8, "u2": 11, "i2": 10, "u4": 13, "i4": 12, "f4": 7, "f8": 6}
_TYPES = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 9}


def element(kind: int, content: bytes, order: str = "<") -> bytes:
    """An element with its tag and padding; the small form where the content has 1 to 4 bytes."""
    if 0 < len(content) <= 4:
        return struct.pack(f"{order}I", len(content) << 16 | kind) + content.ljust(4, b"\0")
    padding = b"\0" * (-len(content) % 8)
    return struct.pack(f"{order}II", kind, len(content)) + content + padding


def matrix(name: str, kind: int, shape: tuple[int, ...], body: bytes, order: str = "<") -> bytes:
    head = element(6, struct.pack(f"{order}II", kind, 0), order)
    head += element(5, struct.pack(f"{order}{len(shape)}i", *shape), order)
    return element(14, head + element(1, name.encode(), order) + body, order)


def array(name: str, values: NDArray[np.generic], order: str = "<", stored: str = "") -> bytes:
    """A numeric array; `stored` is the type of its numbers in the file, if another."""
    code = values.dtype.str[1:]
    numbers = values.astype(order + (stored or code)).tobytes(order="F")
    body = element(_TYPES[stored or code], numbers, order)
    return matrix(name, _CLASSES[code], values.shape, body, order)


def record(name: str, fields: dict[str, bytes], order: str = "<", length: int = 32) -> bytes:
    """A struct of one element; its fields are arrays without names."""
    names = b"".join(field.encode().ljust(length, b"\0") for field in fields)
    body = element(5, struct.pack(f"{order}i", length), order) + element(1, names, order)
    return matrix(name, 2, (1, 1), body + b"".join(fields.values()), order)


def write(path: Path, *variables: bytes, compress: bool = True, order: str = "<") -> None:
    header = b"MATLAB 5.0 MAT-file, written by a test".ljust(124)
    header += struct.pack(f"{order}HH", 0x0100, 0x4D49)
    body = b""
    for variable in variables:
        packed = zlib.compress(variable)
        body += struct.pack(f"{order}II", 15, len(packed)) + packed if compress else variable
    path.write_bytes(header + body)


def write_sbd(path: Path, labels: NDArray[np.uint8]) -> None:
    """`GTcls` with the fields of SBD, of which one is a cell."""
    boundaries = matrix("", 1, (1, 1), array("", np.zeros((2, 2))))
    categories = array("", np.unique(labels).astype("f8")[:, None], stored="u1")
    fields = {"Boundaries": boundaries, "Segmentation": array("", labels)}
    write(path, record("GTcls", {**fields, "CategoriesPresent": categories}))
