"""TorchScript archives and pickles are read as data, and never run."""

import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clip_files import assert_same, save_openai, small_clip, write_torchscript

from cliptteacher.clip import CLIP, load_clip
from cliptteacher.clip.archive import read_torchscript


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return small_clip()


@pytest.mark.parametrize("script", [False, True])
def test_archive_equals_jit_load(tmp_path: Path, script: bool) -> None:
    torch.manual_seed(1)
    storage = torch.randn(40)
    state = {
        "scalar": torch.tensor(1.5),
        "a.fp16": torch.randn(3, 4).half(),
        "a.b.0.fp64": torch.randn(2, 2).double(),
        "a.b.0.bf16": torch.randn(5).bfloat16(),
        "a.b.1.view": storage[4:10],
        "a.transposed": storage[10:30].view(4, 5).T,
        "empty": torch.empty(0, 3),
    }
    expected = write_torchscript(state, tmp_path / "a.pt", script)
    found = read_torchscript(tmp_path / "a.pt")
    assert found.keys() == expected.keys()
    assert len(found) == 10
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def storage_id(length: int, kind: bytes = b"ctorch\nFloatStorage\n", key: str = "0") -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cuda:0") + number(length) + b"tQ"


def tensor_pickle(
    offset: int, shape: tuple[int, ...], stride: tuple[int, ...], storage: bytes | None = None
) -> bytes:
    """A module with one tensor, as opcodes."""
    arguments = number(offset) + numbers(*shape) + numbers(*stride) + b"\x89N"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + (storage or storage_id(6)) + arguments + b"tR"
    )
    return b"\x80\x02c__torch__.net\nNet\n)\x81}" + text("weight") + tensor + b"sb."


def write_archive(path: Path, pickled: bytes, data: bytes = b"", byteorder: str = "little") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/constants.pkl", b"\x80\x02).")
        archive.writestr("a/data/0", data)
        archive.writestr("a/byteorder", byteorder)
    return path


SIX = struct.pack("<6f", *range(6))


def test_handmade_archive(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.pt", tensor_pickle(1, (2, 2), (1, 3)), SIX)
    assert read_torchscript(path)["weight"].tolist() == [[1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (tensor_pickle(0, (7,), (1,)), "does not lie inside its 6 numbers"),
        (tensor_pickle(1, (2, 3), (3, 1)), "does not lie inside"),
        (tensor_pickle(-1, (2,), (1,)), "does not lie inside"),
        (tensor_pickle(5, (2,), (-1,)), "does not lie inside"),
        (tensor_pickle(0, (-2,), (1,)), "does not lie inside"),
        (tensor_pickle(0, (1 << 30, 1 << 30), (0, 0)), "does not lie inside"),
        (tensor_pickle(0, (2,), (1, 1)), "zip"),
        (tensor_pickle(0, (2,), (1,), storage_id(5)), "24 bytes instead of 5 numbers"),
        (tensor_pickle(0, (2,), (1,), storage_id(6, key="1")), "no item named 'a/data/1'"),
        (tensor_pickle(0, (2,), (1,), storage_id(6, b"c__torch__\nX\n")), "instead of a storage"),
        (tensor_pickle(0, (2,), (1,))[:-9], "stopped with"),
        (b"\x80\x02K\x01.", "its root is a int instead of a module"),
        (b"\x80\x02c__torch__.net\nNet\n)\x81K\x01b.", "has a state of type int"),
        (b"", "stopped with: pickle exhausted"),
        (b"hello", "stopped with"),
    ],
)
def test_damaged_archives(tmp_path: Path, pickled: bytes, reason: str) -> None:
    path = write_archive(tmp_path / "a.pt", pickled, SIX)
    with pytest.raises(ValueError, match=f"must be an undamaged TorchScript archive.*{reason}"):
        load_clip(path)


def test_big_endian_archive(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.pt", tensor_pickle(0, (6,), (1,)), SIX, "big")
    with pytest.raises(ValueError, match="its numbers are big-endian"):
        load_clip(path)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (b"cos\nsystem\n" + text("touch {}") + b"\x85R", "os.system"),
        (b"cbuiltins\neval\n" + text("open('{}', 'w')") + b"\x85R", "builtins.eval"),
        (b"cbuiltins\nexec\n" + text("open('{}', 'w')") + b"\x85R", "builtins.exec"),
        (b"cbuiltins\ngetattr\n", "builtins.getattr"),
        (b"cio\nopen\n" + text("{}") + text("w") + b"\x86R", "io.open"),
        (b"ctorch\nload\n" + text("{}") + b"\x85R", "torch.load"),
        (b"ctorch.storage\n_load_from_bytes\n" + text("{}") + b"\x85R", "_load_from_bytes"),
        (b"ctorch.jit\nload\n" + text("{}") + b"\x85R", "torch.jit.load"),
        (b"(" + text("{}") + b"iposix\nsystem\n", "posix.system"),
        (b"c__torch__x\nNet\n)\x81", "__torch__x.Net"),
        (b"cother\nFloatStorage\n", "other.FloatStorage"),
    ],
)
def test_hostile_archives_are_refused(tmp_path: Path, call: bytes, name: str) -> None:
    witness = tmp_path / "witness"
    # The path goes in behind the length prefix, so the prefix is computed again here.
    for template in ("touch {}", "open('{}', 'w')", "{}"):
        call = call.replace(text(template), text(template.format(witness)))
    pickled = b"\x80\x02c__torch__\nNet\n)\x81}" + text("weight") + call + b"sb."
    path = write_archive(tmp_path / "a.pt", pickled)
    with pytest.raises(ValueError, match=f"it asks for .*{name}, which is refused"):
        load_clip(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    "target",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ccollections\nOrderedDict\n",
        b"c__torch__\nNet\n",
        b"ctorch\nFloatStorage\n",
    ],
)
def test_an_archive_cannot_change_the_reader(tmp_path: Path, target: bytes) -> None:
    """The BUILD opcode sets attributes on whatever it is given."""
    state = b"N}" + text("__doc__") + text("changed") + b"s\x86"
    path = write_archive(tmp_path / "a.pt", b"\x80\x02" + target + state + b"b.", SIX)
    with pytest.raises(ValueError, match="stopped with"):
        load_clip(path)
    good = write_archive(tmp_path / "b.pt", tensor_pickle(0, (6,), (1,)), SIX)
    assert read_torchscript(good)["weight"].tolist() == [0, 1, 2, 3, 4, 5]


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.witness), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_state_dicts_are_refused(tmp_path: Path, zipped: bool) -> None:
    content = {"state_dict": {"a": torch.ones(1)}, "args": Hostile(tmp_path / "witness")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="must be an undamaged file of plain tensors"):
        load_clip(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "witness"), protocol=2))
    with pytest.raises(ValueError, match="must be an undamaged file of plain tensors"):
        load_clip(tmp_path / "b.pt")
    assert not (tmp_path / "witness").exists()


def test_no_torchscript_program_is_loaded(
    clip: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_openai(clip, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch.jit.load was called")

    monkeypatch.setattr(torch.jit, "load", refuse)
    assert_same(load_clip(path), clip)


# --- more than the file can hold ----------------------------------------------------------------


def limited(action: Callable[[], object], megabytes: int = 200) -> str:
    """Run in a process that may not grow by more than this; returns the ValueError it raised."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            bound = pages * resource.getpagesize() + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
            action()
        except ValueError as error:
            os.write(writing, str(error).encode()[:2000])
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as answer:
        return answer.read()


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """1 MB that unpacks to 1 GB."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", tensor_pickle(0, (6,), (1,), storage_id(1 << 28)))
        archive.writestr("a/constants.pkl", b"\x80\x02).")
        with archive.open("a/data/0", "w", force_zip64=True) as file:
            for _ in range(1024):
                file.write(bytes(1 << 20))
    assert (tmp_path / "a.pt").stat().st_size < 1_100_000
    assert "must unpack to about its own" in limited(lambda: load_clip(tmp_path / "a.pt"))
    content = (tmp_path / "a.pt").read_bytes()  # and the same as a file of `torch.save`
    (tmp_path / "b.pt").write_bytes(content.replace(b"a/constants.pkl", b"a/otherwise.pkl"))
    assert "must unpack to about its own" in limited(lambda: load_clip(tmp_path / "b.pt"))


def test_a_pickle_that_numbers_without_end(tmp_path: Path) -> None:
    pickled = b"\x80\x02Nr\xff\xff\xff\x7f0" + tensor_pickle(0, (6,), (1,))[2:]
    path = write_archive(tmp_path / "a.pt", pickled, SIX)
    assert "refers to an object 2147483647" in limited(lambda: load_clip(path))


def test_modules_that_hold_each_other(tmp_path: Path) -> None:
    """Forty modules, each with two names for the next: a tree of 2 ** 40 leaves."""
    module = b"c__torch__\nNet\n)\x81"
    pickled = b"\x80\x02" + module + b"q\x00}b"
    for level in range(40):
        below, own = bytes([level]), bytes([level + 1])
        pickled += module + b"q" + own + b"}" + text("a") + b"h" + below + b"s"
        pickled += text("b") + b"h" + below + b"sb"
    path = write_archive(tmp_path / "a.pt", pickled + b".", SIX)
    with pytest.raises(ValueError, match="more than 100000 modules"):
        load_clip(path)
    cycle = b"\x80\x02" + module + b"q\x00}" + text("a") + b"h\x00sb."
    with pytest.raises(ValueError, match=r"a\.pt must be an undamaged TorchScript archive"):
        load_clip(write_archive(tmp_path / "a.pt", cycle, SIX))


def test_one_storage_under_many_names(tmp_path: Path) -> None:
    storage = torch.randn(4000)
    write_torchscript({f"w{n}": storage.view(40, 100) for n in range(60)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"must hold the numbers of its tensors, but 'w\d+' of"):
        read_torchscript(tmp_path / "a.pt")


def test_flipped_bytes_in_the_directory_of_an_archive(clip: CLIP, tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.pt", tensor_pickle(0, (6,), (1,)), SIX)
    whole = path.read_bytes()
    for position in range(whole.index(b"PK\x01\x02"), len(whole)):
        flipped = bytes([whole[position] ^ 0x88])
        path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"a\.pt "):
            load_clip(path)  # at the latest because this is no CLIP
