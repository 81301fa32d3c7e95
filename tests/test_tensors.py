"""Weights from elsewhere: equal to the peer's reading, bounded by the file, refused in one line."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clip_files import write_safetensors
from torch import Tensor

from cliptteacher.tensors import (
    is_safetensors,
    read_safetensors,
    read_torch,
    read_weights,
    without_prefixes,
)

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


# --- safetensors --------------------------------------------------------------------------------


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
    assert is_safetensors(tmp_path / "a.safetensors")
    assert same(read_safetensors(tmp_path / "a.safetensors"), state)
    assert same(read_weights(tmp_path / "a.safetensors"), state)


def write_header(header: bytes, path: Path, body: bytes = bytes(8)) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


DEEP = b'{"a":' * 100_000


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}, "unknown dtype 'F8_E4M3'"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "takes the bytes 0 to 4 of 8"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "takes the bytes 0 to 12 of 8"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}, "negative or fractional"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "negative or fractional"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8]}, "negative or fractional"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "negative or fractional"),
        ({"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}, "negative or fractional"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "negative or fractional"),
        ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}, "takes the bytes"),
        ({"dtype": "F32", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}, "stopped with"),
        ({"dtype": "F32", "shape": [1 << 70, 0], "data_offsets": [0, 0]}, "fractional size"),
        ({"dtype": "F32", "shape": [2]}, "data_offsets"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "stopped with"),
        ("F32", "stopped with"),
        (None, "stopped with"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, entry: object, reason: str) -> None:
    path = write_header(json.dumps({"a": entry}).encode(), tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=rf"x\.safetensors must be an undamaged safetensors.*{reason}"
    ):
        read_weights(path)


@pytest.mark.parametrize("header", [b"{]}", b'{"a": ', b"{\xff}", DEEP, b'{"a": 1e999}'])
def test_safetensors_with_a_broken_header(tmp_path: Path, header: bytes) -> None:
    path = write_header(header, tmp_path / "a")
    with pytest.raises(ValueError, match="must be an undamaged safetensors file"):
        read_weights(path)


def test_safetensors_whose_tensors_share_bytes(tmp_path: Path) -> None:
    """Ten thousand names for one block: a file of 1 MB would take 10 GB."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({str(n): entry for n in range(3)}).encode()
    with pytest.raises(ValueError, match="its tensors take 24 bytes together, but 8 are there"):
        read_safetensors(write_header(header, tmp_path / "a"))


@pytest.mark.parametrize("length", [0, 5, 8, 30, -4])
def test_truncated_safetensors(tmp_path: Path, length: int) -> None:
    write_safetensors(STATE, tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:length])
    with pytest.raises(ValueError, match="must be an undamaged safetensors file"):
        read_safetensors(tmp_path / "a")


# --- torch.save ---------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False])
def test_torch_files_own_their_numbers(new: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content in (STATE, {"epoch": 3, "state_dict": STATE}, {"model": STATE}):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        found = read_weights(path)
        path.write_bytes(b"")  # nothing is left of the file that they might be views of
        assert same(found, STATE)
    tied = torch.randn(40, 50)
    torch.save({"a": tied, "b": tied, "c": tied.T}, path, _use_new_zipfile_serialization=new)
    found = read_weights(path)
    assert torch.equal(found["c"], tied.T) and found["a"].data_ptr() != found["b"].data_ptr()


def sparse() -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (1 << 40, 512))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.ones(1).expand(1 << 40), r"'big' of shape \(1099511627776,\) takes more"),
        (lambda: torch.empty(1 << 40, 512, device="meta"), "got 'big' of the kind meta"),
        (sparse, "got 'big' of the kind torch.sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "got 'big' of the kind torch.sparse_csr"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "torch.qint8"),
        (lambda: torch.ones(3, dtype=torch.complex64), "of the kind torch.complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # sparse CSR and quantised are in beta
def test_tensors_without_their_numbers(
    make: Callable[[], Tensor], reason: str, tmp_path: Path
) -> None:
    torch.save({**STATE, "big": make()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt must .*{reason}"):
        read_weights(tmp_path / "a.pt")


def test_one_block_under_many_names(tmp_path: Path) -> None:
    block = torch.zeros(1000)
    torch.save({str(n): block for n in range(100)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"must hold the numbers of its tensors, but '\d+' of"):
        read_weights(tmp_path / "a.pt")


def repack(path: Path, change: Callable[[str, bytes], bytes], compress: int) -> None:
    """Write the parts of a zip anew."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))


def test_a_tensor_larger_than_its_storage_is_not_allocated(tmp_path: Path) -> None:
    """The shape lies in the pickle; a storage that is not mapped would grow to fit it."""
    torch.save({"w": torch.zeros(77)}, tmp_path / "a.pt")
    shape, large = b"KM\x85", b"J\x00\x00\x00\x40\x85"  # (77,) and (2 ** 30,)

    def enlarge(name: str, content: bytes) -> bytes:
        assert not name.endswith("data.pkl") or content.count(shape) == 1
        return content.replace(shape, large) if name.endswith("data.pkl") else content

    repack(tmp_path / "a.pt", enlarge, zipfile.ZIP_STORED)
    with pytest.raises(ValueError, match=r"a\.pt must be an undamaged file of plain tensors"):
        read_weights(tmp_path / "a.pt")


def test_a_storage_longer_than_its_part_of_the_zip(tmp_path: Path) -> None:
    """`torch.load` takes the length from the pickle and would read what lies behind."""
    torch.save({"w": torch.zeros(77), "z": torch.ones(5000)}, tmp_path / "a.pt")

    def enlarge(name: str, content: bytes) -> bytes:
        assert not name.endswith("data.pkl") or content.count(b"KM") == 2  # length and shape
        return content.replace(b"KM", b"K\xf0") if name.endswith("data.pkl") else content

    repack(tmp_path / "a.pt", enlarge, zipfile.ZIP_STORED)
    with pytest.raises(ValueError, match=r"a\.pt must hold the numbers of 'w' .* none has 960 byt"):
        read_weights(tmp_path / "a.pt")


def test_numbers_repeated_by_a_stride(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(1).expand(2)}, path)
    assert read_weights(path)["w"].tolist() == [1, 1]
    torch.save({"w": torch.ones(1).expand(path.stat().st_size // 2)}, path)  # two times the file
    with pytest.raises(ValueError, match=r"a\.pt must hold the numbers of its tensors, but 'w'"):
        read_weights(path)


def test_a_zip_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(8 << 20)}, tmp_path / "a.pt")
    repack(tmp_path / "a.pt", lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pt").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"must unpack to about its own \d+ bytes, but .* 3355"):
        read_weights(tmp_path / "a.pt")


def test_one_flipped_bit_among_the_numbers(tmp_path: Path) -> None:
    """`torch.load` would read another number; a file without checksums is taken as it is."""
    path = tmp_path / "a.pt"
    for computed in (True, False):
        torch.serialization.set_crc32_options(computed)
        try:
            torch.save({"w": torch.arange(1000.0)}, path)
        finally:
            torch.serialization.set_crc32_options(True)
        whole = bytearray(path.read_bytes())
        whole[whole.index(torch.arange(500.0, 510.0).numpy().tobytes())] ^= 1
        path.write_bytes(whole)
        if computed:
            with pytest.raises(ValueError, match=r"a\.pt must be an undamaged .*Bad CRC-32"):
                read_weights(path)
    assert read_weights(path)["w"].shape == (1000,)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(2)], "must hold a state dict, tensors by name"),
        ({"a": 1}, "must hold a state dict, tensors by name"),
        ({1: torch.ones(2)}, "must hold a state dict, tensors by name"),
        (Path("x"), "must be an undamaged file of plain tensors"),
    ],
)
def test_files_that_hold_no_state_dict(content: object, reason: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt {reason}"):
        read_weights(tmp_path / "a.pt")


def test_files_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match=r"a\.pt must hold weights .*gave a page or a pointer"):
        read_weights(tmp_path / "a.pt")


def test_every_flipped_byte_of_a_directory_is_refused_or_read(tmp_path: Path) -> None:
    """Names, sizes and offsets of a zip; a UnicodeDecodeError was one of the results."""
    torch.save(STATE, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    refused = 0
    for position in range(whole.index(b"PK\x01\x02"), len(whole)):
        for bit in (0x80, 0x01):
            damaged = whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :]
            (tmp_path / "b.pt").write_bytes(damaged)
            try:
                read_torch(tmp_path / "b.pt")
            except ValueError as error:
                assert str(tmp_path / "b.pt") in str(error)  # noqa: PT017
                refused += 1
    assert refused > 100


# --- prefixes and shards ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "module.module.{}"],
)
def test_prefixes_in_any_order(wrapped: str) -> None:
    assert same(without_prefixes({wrapped.format(k): v for k, v in STATE.items()}), STATE)
    inner = {k.replace("a.", f"a.{wrapped.format('')}"): v for k, v in STATE.items()}
    assert same(without_prefixes(inner), STATE)
    part = {"submodule.weight": torch.ones(1), "x_orig_mod.weight": torch.ones(1)}
    assert same(without_prefixes(part), part)


def test_two_names_of_one_weight() -> None:
    state = {"module.a": torch.ones(1), "_orig_mod.a": torch.ones(1)}
    with pytest.raises(ValueError, match="got 'module.a' and '_orig_mod.a' for 'a'"):
        without_prefixes(state)


def shard(folder: Path, weight_map: dict[str, str] | object) -> Path:
    write_safetensors({"module.a.weight": STATE["a.weight"]}, folder / "1.safetensors")
    torch.save({"module.a.bias": STATE["a.bias"]}, folder / "2.bin")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


SHARDS = {"module.a.weight": "1.safetensors", "module.a.bias": "2.bin"}


def test_shards_are_joined(tmp_path: Path) -> None:
    assert same(read_weights(shard(tmp_path, SHARDS)), STATE)


@pytest.mark.parametrize(
    "name", ["../1.safetensors", "/etc/passwd", "sub/1.safetensors", "..", ".", "", "..\\x"]
)
def test_shards_outside_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    index = shard(tmp_path, {**SHARDS, "module.a.weight": name})
    with pytest.raises(ValueError, match=r"index\.json must name files of its own folder, got"):
        read_weights(index)


def test_shards_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"3\.bin is missing, which .*index\.json names"):
        read_weights(shard(tmp_path, {**SHARDS, "module.a.bias": "3.bin"}))
    with pytest.raises(ValueError, match=r"2\.bin must hold what .* 'module.a.scale' is in one"):
        read_weights(shard(tmp_path, {**SHARDS, "module.a.scale": "2.bin"}))
    with pytest.raises(ValueError, match=r"1\.safetensors must hold what .* 'module.a.weight'"):
        read_weights(shard(tmp_path, {"module.b": "1.safetensors"}))
    for wrong in (None, [], {"a": 1}, "a"):
        with pytest.raises(ValueError, match=r"index\.json must hold a `weight_map`"):
            read_weights(shard(tmp_path, wrong))
    index = shard(tmp_path, SHARDS)
    index.write_bytes(DEEP)
    with pytest.raises(ValueError, match=r"index\.json must hold JSON"):
        read_weights(index)
