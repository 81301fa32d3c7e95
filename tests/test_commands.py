"""Every command of the pages that starts a program of examples/, word for word but shortened."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from test_pages import PAGES, ROOT, commands_of
from test_programs import NAMES, UNSEEN, tiny_clip, training, write_dataset

from cliptteacher.clip import save_clip

SHORTER = {  # appended: of two values for a flag the last one counts
    "train": "--iterations 1 --batch-size 2 --segmenter segformer_nano --segmenter-weights none "
    "--device cpu --checkpoint-interval 1",
    "pretrain_clip": "--iterations 1 --batch-size 4 --vision-layers 1 --pool 64",
}
STAND_INS = {"ViT-B/16": "runs/clip/clip.pt", "NAME": "segformer_nano"}
ELSEWHERE = {  # they need the data as its owners ship it; in miniature: test_prepare_data.py
    ("examples/prepare_data.py", "voc", "--root", "data/voc"),
    ("examples/train.py", "--data", "voc", "--output", "runs/voc"),
}
COMMANDS = sorted(
    {
        tuple(command)
        for page in PAGES
        for command in commands_of(page.read_text())
        if command[0].startswith("examples/")
    }
    - ELSEWHERE
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages presume: photographs, a data set, a CLIP, and finished runs."""
    place = tmp_path_factory.mktemp("commands")
    write_dataset(place / "DIR", NAMES, UNSEEN)
    shutil.copy(place / "DIR" / "val.txt", place / "DIR" / "test.txt")
    (place / "runs" / "clip").mkdir(parents=True)
    torch.manual_seed(0)
    save_clip(tiny_clip(), place / "runs" / "clip" / "clip.pt")
    (place / "clip.pt").symlink_to(place / "runs" / "clip" / "clip.pt")
    (place / "data").symlink_to(place / "DIR")
    scenes = sorted((place / "DIR" / "images").iterdir())
    (place / "photos").mkdir()
    for name in ("photo.jpg", "a.jpg", "tile.png", "photos/b.png", "photos/c.png"):
        shutil.copy(scenes[0], place / name)
    (place / "list.txt").write_text("photo.jpg\n")
    (place / "words.txt").write_text("roof\nwater\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        importlib.import_module("train").main(training(place, place / "runs" / "first"))
    for name in ("voc", "mine", "photos", "second", "tuned"):
        shutil.copytree(place / "runs" / "first", place / "runs" / name)
    shutil.copytree(place / "runs" / "first", place / "RUN")
    return place


def shortened(command: tuple[str, ...]) -> list[str]:
    program, *words = command
    name = Path(program).stem
    words = [STAND_INS.get(word, word) for word in words]
    if name in SHORTER and "--output" in words:  # the directory of a finished run is refused
        where = words.index("--output") + 1
        words[where] = f"new/{COMMANDS.index(command)}"
    return [*words, *SHORTER.get(name, "").split()]


@pytest.mark.filterwarnings("ignore:the CLIP never read")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_it_runs(
    command: tuple[str, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any(word.endswith(".onnx") for word in command):
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    program = importlib.import_module(Path(command[0]).stem)
    words = shortened(command)
    assert not program.main(words)
    if "--output" in words:
        assert Path(words[words.index("--output") + 1]).exists()
