"""Safetensors files: equal to the peer's reading, and validated."""

import json
import struct
from pathlib import Path

import pytest
import torch

from cliptteacher.clip import load_clip
from cliptteacher.clip.safetensors import read_safetensors


def test_safetensors_equal_the_peer(tmp_path: Path) -> None:
    peer = pytest.importorskip("safetensors.torch")
    state = {
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(5).bfloat16(),
        "double": torch.randn(2, 1, 2).double(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "bool": torch.tensor([True, False, True]),
        "byte": torch.arange(5, dtype=torch.uint8),
        "long": torch.arange(3),
    }
    peer.save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_safetensors(tmp_path / "a.safetensors")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}, "unknown dtype 'F8_E4M3'"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "takes the bytes 0 to 4 of 8"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "takes the bytes 0 to 12 of 8"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}, "negative or fractional"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "negative or fractional"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "negative or fractional"),
        ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}, "takes the bytes"),
        ({"dtype": "F32", "shape": [2]}, "data_offsets"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "stopped with"),
        ("F32", "stopped with"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, entry: object, reason: str) -> None:
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=f"must be an undamaged safetensors file.*{reason}"):
        load_clip(path)


@pytest.mark.parametrize("header", [b"{]}", b'{"a": ', b"{\xff}"])
def test_safetensors_with_a_broken_header(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="must be an undamaged safetensors file"):
        load_clip(tmp_path / "a")
