"""Read a TorchScript archive as data: its weights, and nothing else.

OpenAI published CLIP (section 3.1) as TorchScript archives. Loading one as a program would run
code from the file. It is a zip, though, and the weights can be read without that:

1. ``data.pkl`` describes a tree of modules and tensors; it is read with a pickle reader that knows
   a few harmless names and refuses every other
2. a module becomes a `_Module` (a dictionary), a tensor a `_TensorRecord` (where its numbers lie)
3. walking the tree gives the names; the numbers are read from the files under ``data/``

The reader never builds a tensor, calls a function or imports a name on behalf of the file.
Cost: one pass over the file.
"""

import collections
import io
import itertools
import math
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tensors import check_sizes, list_zip

_MAX_MODULES = 100_000  # visits; a few modules that hold each other make a tree without end

_DTYPE_OF_STORAGE = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _StorageRecord(NamedTuple):
    """A file under ``data/`` that holds `length` numbers."""

    key: str
    dtype: torch.dtype
    length: int


class _TensorRecord(NamedTuple):
    """A tensor: a view of a storage."""

    storage: _StorageRecord
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Module:
    """What stands in for a module of the archive: its attributes, and no behaviour."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"a module has a state of type {type(state).__name__}")
        self.attributes = state


def is_torchscript(names: list[str]) -> bool:
    """Tell from the names in a zip whether it is a TorchScript archive."""
    return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in names)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read the parameters and buffers of a TorchScript archive without running it.

    Args:
        path: a zip written by ``torch.jit.save``.

    Returns:
        Names and tensors, equal to those of ``torch.jit.load(path).state_dict()``.

    Raises:
        ValueError: if the archive is damaged, asks for anything but modules and tensors, or for
            more memory than its size explains.
    """
    list_zip(path)
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = _read_state_dict(archive)
        check_sizes(tensors, path)
        return tensors
    except Exception as error:  # a hostile file can raise anything; it becomes one sentence
        raise ValueError(
            f"{path} must be an undamaged TorchScript archive of plain modules and tensors, "
            f"but reading it stopped with: {error}; download it again from where it is published"
        ) from error


def _read_state_dict(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    root = root.removesuffix("/data.pkl")
    if _read_or(archive, f"{root}/byteorder", b"little") != b"little":
        raise ValueError("its numbers are big-endian")
    pickled = archive.read(f"{root}/data.pkl")
    _check_memo(pickled)
    module = _RecordUnpickler(io.BytesIO(pickled)).load()
    if not isinstance(module, _Module):
        raise TypeError(f"its root is a {type(module).__name__} instead of a module")
    records = dict(_walk(module, prefix="", visits=itertools.count()))
    storages = {record.storage for record in records.values()}
    numbers = {s: _read_storage(archive, f"{root}/data/{s.key}", s) for s in storages}
    return {name: _view(numbers[r.storage], r, name) for name, r in records.items()}


def _check_memo(pickled: bytes) -> None:
    """Refuse a pickle that numbers its objects higher than it has bytes.

    Python's reader keeps a table as long as the highest number, so five bytes could take 64 GB.
    """
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(pickled):
            raise ValueError(f"its description refers to an object {argument}")


class _RecordUnpickler(pickle.Unpickler):
    """A pickle reader that builds records and refuses every name outside its short list."""

    def find_class(self, module: str, name: str) -> Any:
        """Answer a name of the pickle with an inert recorder, or refuse it."""
        # No answer has a side effect when the pickle calls it. The functions are bound methods,
        # because a pickle could write to the attributes of a plain function.
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _DTYPE_OF_STORAGE:
            return _DTYPE_OF_STORAGE[name]
        allowed = {
            "torch._utils._rebuild_tensor_v2": self._record_tensor,
            "torch._utils._rebuild_parameter": self._first_argument,
            "torch.jit._pickle.build_intlist": self._first_argument,
            "torch.jit._pickle.build_doublelist": self._first_argument,
            "torch.jit._pickle.build_boollist": self._first_argument,
            "torch.jit._pickle.build_tensorlist": self._first_argument,
            "torch.jit._pickle.restore_type_tag": self._first_argument,
            "collections.OrderedDict": collections.OrderedDict,
        }
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return allowed[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _StorageRecord:
        kind, dtype, key, _, length = pid  # the device it was saved from does not matter
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it refers to {pid!r} instead of a storage")
        return _StorageRecord(str(key), dtype, int(length))

    def _record_tensor(
        self, storage: _StorageRecord, offset: int, shape: Any, stride: Any, *_: object
    ) -> _TensorRecord:
        return _TensorRecord(storage, int(offset), tuple(shape), tuple(stride))

    def _first_argument(self, value: object, *_: object) -> object:
        return value


def _walk(
    module: _Module, prefix: str, visits: Iterator[int]
) -> Iterator[tuple[str, _TensorRecord]]:
    """Yield every tensor of a tree of modules with its name; flags and numbers are left out."""
    if next(visits) > _MAX_MODULES:
        raise ValueError(f"it has more than {_MAX_MODULES} modules")
    for name, value in module.attributes.items():
        if isinstance(value, _TensorRecord):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _walk(value, f"{prefix}{name}.", visits)


def _read_storage(archive: zipfile.ZipFile, name: str, storage: _StorageRecord) -> Tensor:
    num_bytes = archive.getinfo(name).file_size
    if num_bytes != storage.length * storage.dtype.itemsize:
        raise ValueError(f"{name} holds {num_bytes} bytes instead of {storage.length} numbers")
    if num_bytes == 0:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(archive.read(name)), dtype=storage.dtype)


def _view(numbers: Tensor, record: _TensorRecord, name: str) -> Tensor:
    """View a storage as a tensor, if the tensor lies inside it."""
    shape, stride, offset = record.shape, record.stride, record.offset
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    sane = all(n >= 0 for n in shape) and all(step >= 0 for step in stride) and offset >= 0
    # The size is compared as well, because a stride of zero would repeat numbers without end.
    inside = math.prod(shape) == 0 or (last < len(numbers) and math.prod(shape) <= len(numbers))
    if not (sane and inside):
        raise ValueError(
            f"{name!r} of shape {shape} does not lie inside its {len(numbers)} numbers"
        )
    return numbers.as_strided(shape, stride, offset)


def _read_or(archive: zipfile.ZipFile, name: str, default: bytes) -> bytes:
    return archive.read(name) if name in archive.namelist() else default
