"""Weights from elsewhere: read them as data, with bounds taken from the size of the file.

| content         | read by                                                                  |
|-----------------|--------------------------------------------------------------------------|
| safetensors     | `read_safetensors`, this room's own reader                               |
| ``torch.save``  | ``torch.load(weights_only=True)``, memory-mapped, then copied            |
| an index (JSON) | the files of its folder that its ``weight_map`` names, one after another |

Layout of safetensors: 8 bytes with the length of the header (little-endian), the header (JSON:
name -> dtype, shape and the first and last byte), the raw numbers. A ground room like `files.py`.

Nothing is allocated because a header asks for it: every size is compared with the bytes that are
there first. Cost: one pass over the file and one copy of its numbers.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .files import StrPath, read_json

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
State = dict[str, Tensor]
_MAX_HEADER = 100_000_000  # the limit of the format itself
_INDEX = ".index.json"
# What DistributedDataParallel and torch.compile put before the names of what they wrap.
_WRAPPED = re.compile(r"(^|(?<=\.))(?:module|_orig_mod)\.")
_UNPACKED = 16 << 20  # bytes that the small compressed files of an archive may take


def is_safetensors(path: StrPath) -> bool:
    """Whether a file begins as safetensors does."""
    with Path(path).open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER


def read_safetensors(path: StrPath) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Args:
        path: the file.

    Returns:
        Names and tensors; each owns its numbers.

    Raises:
        ValueError: the header is no valid description of the bytes that follow.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            header_length = int.from_bytes(file.read(8), "little")
            start = 8 + header_length
            num_bytes = path.stat().st_size - start
            if not 0 < header_length <= _MAX_HEADER or num_bytes < 0:
                raise ValueError(f"its header of {header_length} bytes does not fit into the file")
            header = json.loads(file.read(header_length))
            header.pop("__metadata__", None)
            _check_overlap(header, num_bytes)
            return {
                name: _read_tensor(file, start, num_bytes, name, entry)
                for name, entry in header.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{path} must be an undamaged safetensors file, but reading it stopped with: "
                f"{error}; get it again"
            ) from error


def _check_overlap(header: Mapping[str, Any], num_bytes: int) -> None:
    """Refuse tensors that share bytes: a small file could ask for any amount of memory."""
    total = 0
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end):
            raise ValueError(f"{name!r} has a negative or fractional size")
        total += end - begin
        if end > num_bytes:
            raise ValueError(f"{name!r} takes the bytes {begin} to {end} of {num_bytes}")
    if total > num_bytes:
        raise ValueError(f"its tensors take {total} bytes together, but {num_bytes} are there")


def _read_tensor(
    file: BinaryIO, start: int, num_bytes: int, name: str, entry: dict[str, Any]
) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {entry['dtype']!r}")
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(isinstance(n, int) and 0 <= n < 1 << 63 for n in shape):
        raise ValueError(f"{name!r} has a negative or fractional size")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{name!r} of shape {shape} takes the bytes {begin} to {end} of {num_bytes}"
        )
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    file.seek(start + begin)
    return torch.frombuffer(bytearray(file.read(end - begin)), dtype=dtype).reshape(shape)


def read_weights(path: StrPath, wrappers: tuple[str, ...] = ("state_dict", "model")) -> State:
    """Read tensors by name from safetensors, ``torch.save``, or the index of a file in shards.

    The format is recognised by the content, not by the extension.

    Args:
        path: a file, or an ``*.index.json``, whose shards lie in the same folder.
        wrappers: entries in which a state dict may be packed.

    Returns:
        Names, without what DistributedDataParallel and ``torch.compile`` put before them, and
        tensors on the CPU; each owns its numbers.

    Raises:
        ValueError: the file is damaged, holds anything but plain tensors by name, or a tensor
            that is larger than the file.
    """
    path = Path(path)
    if path.name.endswith(_INDEX):
        tensors = _read_shards(path)
    elif is_safetensors(path):
        tensors = read_safetensors(path)
    else:
        tensors = take_tensors(read_torch(path), path, wrappers)
    try:
        return without_prefixes(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_torch(path: StrPath) -> object:
    """Read a file of ``torch.save`` without running code from it.

    Returns:
        What was saved, on the CPU. The tensors may be views of the file: see `take_tensors`.

    Raises:
        ValueError: the file is damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(9)
    is_zip = head.startswith(b"PK\x03\x04")
    if not is_zip and not head.startswith(b"\x80"):  # a pickle: how PyTorch saved before 1.6
        raise ValueError(
            f"{path} must hold weights (TorchScript, torch.save or safetensors), but it begins "
            f"with {head!r}; if that is text, the download gave a page or a pointer instead of "
            "the file"
        )
    if is_zip:
        list_zip(path)
    try:
        if is_zip:
            _compare_checksums(path)
        # Memory-mapped, a storage that claims more than the file is an error, and no allocation.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged or hostile file can raise anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} must be an undamaged file of plain tensors, but reading it stopped with: "
            f"{reason}; get it again, or save only the state dict"
        ) from error


def list_zip(path: Path) -> list[str]:
    """List the names in a zip, if its parts take about as many bytes as the file.

    Raises:
        ValueError: it is damaged, or unpacks to more than its size and 16 MiB.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # one flipped byte gives any of six types
        raise ValueError(f"{path} is truncated or damaged ({error}); get it again") from error
    stored = sum(m.file_size for m in members if m.compress_type == zipfile.ZIP_STORED)
    packed = sum(m.file_size for m in members if m.compress_type != zipfile.ZIP_STORED)
    size = path.stat().st_size
    if stored > size or packed > _UNPACKED:
        raise ValueError(
            f"{path} must unpack to about its own {size} bytes, but its header gives "
            f"{stored + packed}; get it again from where it is published"
        )
    return [member.filename for member in members]


def _compare_checksums(path: Path) -> None:
    """Read every part of a zip, which compares its CRC-32; ``torch.load`` does not."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.CRC:  # zero: `torch.serialization.set_crc32_options` can leave them out
                with archive.open(member) as part:
                    while part.read(1 << 20):
                        pass


def take_tensors(content: object, path: Path, wrappers: tuple[str, ...] = ()) -> State:
    """Take the state dict out of what it was saved in, and copy its tensors.

    Raises:
        ValueError: it is no dictionary of plain tensors, or they take more bytes than the file
            can hold.
    """
    for wrapper in wrappers:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError(
            f"{path} must hold a state dict, tensors by name; save `model.state_dict()`"
        )
    check_sizes(content, path)
    if zipfile.is_zipfile(path):
        _check_storages(content, path)
    return {name: tensor.detach().clone() for name, tensor in content.items()}


def _check_storages(tensors: State, path: Path) -> None:
    """Refuse a storage longer or shorter than its part of the zip; torch would read on behind."""
    with zipfile.ZipFile(path) as archive:
        lengths = {member.file_size for member in archive.infolist()}
    for name, tensor in tensors.items():
        if tensor.untyped_storage().nbytes() not in lengths:
            raise ValueError(
                f"{path} must hold the numbers of {name!r} in a part of their own, but none has "
                f"{tensor.untyped_storage().nbytes()} bytes; get it again"
            )


def check_sizes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors whose numbers are not in the file: meta, sparse, or repeated by a stride.

    Raises:
        ValueError: names the first of them.
    """
    size, total = path.stat().st_size, 0
    for name, tensor in tensors.items():
        kind = str(tensor.layout if tensor.layout != torch.strided else tensor.device)
        if kind != "cpu" or tensor.is_quantized or tensor.is_complex():
            kind = kind if kind != "cpu" else str(tensor.dtype)
            raise ValueError(
                f"{path} must hold plain tensors on the CPU, got {name!r} of the kind {kind}; "
                "save the state dict of the model in full"
            )
        num_bytes = tensor.numel() * tensor.element_size()
        total += num_bytes
        # Some models hold one matrix under two or three names.
        if num_bytes > size or total > 4 * size:
            raise ValueError(
                f"{path} must hold the numbers of its tensors, but {name!r} of shape "
                f"{tuple(tensor.shape)} takes more than the {size} bytes of the file; get it again"
            )


def _read_shards(index: Path) -> State:
    """Read the files that an index names, each inside the folder of the index."""
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{index} must hold a `weight_map` of names and files; get it again")
    tensors: State = {}
    for shard in dict.fromkeys(shards.values()):
        file = index.parent / shard
        if Path(shard).name != shard or shard in ("", "..") or "\\" in shard:
            raise ValueError(
                f"{index} must name files of its own folder, got {shard!r}; get it again from "
                "where it is published"
            )
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, which {index.name} names; get it as well")
        read = (
            read_safetensors(file) if is_safetensors(file) else take_tensors(read_torch(file), file)
        )
        wanted = {name for name, other in shards.items() if other == shard}
        if read.keys() != wanted:
            name = min(read.keys() ^ wanted)
            raise ValueError(
                f"{file} must hold what {index.name} says, but {name!r} is in one of them only; "
                "get all shards of one release"
            )
        tensors.update(read)
    return tensors


def without_prefixes(tensors: Mapping[str, Tensor]) -> State:
    """Remove ``module.`` and ``_orig_mod.``, which wrappers of a model put into its names.

    Raises:
        ValueError: two names become one.
    """
    return rename(tensors, lambda name: _WRAPPED.sub("", name))


def rename(tensors: Mapping[str, Tensor], new_name: Callable[[str], str]) -> State:
    """Give all tensors new names, none over another.

    Raises:
        ValueError: two names become one.
    """
    source: dict[str, str] = {}
    for name in tensors:
        new = new_name(name)
        if new in source:
            raise ValueError(
                f"each weight must have one name, got {source[new]!r} and {name!r} for {new!r}; "
                "save the state dict of one model"
            )
        source[new] = name
    return {new: tensors[name] for new, name in source.items()}
