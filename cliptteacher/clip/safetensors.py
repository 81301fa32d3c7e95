"""Read a ``.safetensors`` file, the plain format in which Hugging Face publishes weights.

Layout: 8 bytes with the length of the header (little-endian), the header (JSON: name -> dtype,
shape and the first and last byte), the raw numbers. Every number is checked before it is used.

Cost: one pass over the file.
"""

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 100_000_000  # the limit of the format itself


def is_safetensors(head: bytes) -> bool:
    """Tell from the first 9 bytes of a file whether it looks like safetensors."""
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Args:
        path: the file.

    Returns:
        Names and tensors; each owns its numbers.

    Raises:
        ValueError: if the header is no valid description of the bytes that follow.
    """
    with path.open("rb") as file:
        try:
            header_length = int.from_bytes(file.read(8), "little")
            start = 8 + header_length
            num_bytes = path.stat().st_size - start
            if not 0 < header_length <= _MAX_HEADER or num_bytes < 0:
                raise ValueError(f"its header of {header_length} bytes does not fit into the file")
            header = json.loads(file.read(header_length))
            header.pop("__metadata__", None)
            return {
                name: _read_tensor(file, start, num_bytes, name, entry)
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} must be an undamaged safetensors file, but reading it stopped with: "
                f"{error}; download it again"
            ) from error


def _read_tensor(
    file: BinaryIO, start: int, num_bytes: int, name: str, entry: dict[str, Any]
) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {entry['dtype']!r}")
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name!r} has a negative or fractional size")
    if end > num_bytes or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{name!r} of shape {shape} takes the bytes {begin} to {end} of {num_bytes}"
        )
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    file.seek(start + begin)
    return torch.frombuffer(bytearray(file.read(end - begin)), dtype=dtype).reshape(shape)
