"""The pages for users are true: code blocks run, names exist, promised figures are recorded."""

import json
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cliptteacher as ct
from cliptteacher.data import FolderDataset, check_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = (ROOT / "examples" / "README.md").read_text()


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_it_is_one_page_in_the_promised_order() -> None:
    assert len(README.splitlines()) <= 200
    order = ["Install", "The first command", "Your photograph", "Your data", "Your network",
             "Your loop", "Results", "Eight GPUs", "From equation", "Read the code", "Test",
             "Limits", "Licence"]  # fmt: skip
    heads = re.findall(r"^## (.*)$", README, re.MULTILINE)
    assert len(heads) == len(order)
    assert all(head.startswith(start) for head, start in zip(heads, order, strict=True))


def test_the_equation_map_names_what_exists() -> None:
    table = README.split("## From equation to function")[1].split("Where the code deviates")[0]
    names = re.findall(r"`([\w.]+)`", table)
    assert len(names) > 15
    for name in names:
        module, *path = name.split(".")
        found = import_module(f"cliptteacher.{module}")
        for part in path:
            found = getattr(found, part)


def test_your_network() -> None:
    scope: dict[str, object] = {}
    exec(python_blocks(README)[0], scope)
    features = scope["student"].eval()(torch.rand(1, 3, 64, 64))  # type: ignore[operator]
    assert features.shape == (1, scope["clip"].embed_dim, 8, 8)  # type: ignore[attr-defined]


def test_your_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block as it stands, word for word, on two batches."""
    monkeypatch.chdir(tmp_path)
    names, unseen = ["grass", "sand", "disc", "star"], [3]
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    labels = torch.randint(3, (2, 64, 64), dtype=torch.uint8)
    labels[:, :, 32:] = 255
    scope = {
        "device": "cpu", "names": names, "unseen": unseen, "seen_names": names[:3],
        "loader": [(images, labels)] * 2, "image": images[0],
    }  # fmt: skip
    with pytest.warns(UserWarning, match="the CLIP never read dog, frisbee"):
        exec(python_blocks(README)[1], scope)
    assert torch.isfinite(scope["losses"]["total"])
    assert scope["label_map"].shape == (64, 64) and scope["label_map"].max() < 2
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["glm.0.bank.filled"] == 4
    again = ct.load_segmenter("student.pt")
    assert (again.class_names, again.unseen) == (tuple(names), (3,))
    assert torch.equal(again(images[0]), scope["segment"](images[0]))


def test_your_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = python_blocks(PROGRAMS)
    drawn = np.zeros((8, 12, 3), np.uint8)
    drawn[:, :3], drawn[:, 3:6], drawn[:, 6:9] = (0, 0, 255), (0, 255, 0), (160, 80, 0)
    for folder in ("images", "drawn"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for name in ("a", "b", "c"):
            suffix = "jpg" if folder == "images" else "png"
            Image.fromarray(drawn).save(tmp_path / "photos" / folder / f"{name}.{suffix}")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    report = check_folder(tmp_path / "photos")
    assert (report.problems, report.notes) == ([], [])
    assert report.counts == {"train": 2, "val": 1}
    _, label = FolderDataset(tmp_path / "photos", "val")[0]
    assert label[0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [255] * 3


def test_every_program_is_described_and_no_other_file_lies_beside_them() -> None:
    listed = re.findall(r"^\| `(\w+\.py)` \|", PROGRAMS, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize(
    ("row", "results", "name"),
    [
        ("photographs", "ablation_photographs_tuned", "full"),
        (
            "photographs: CLIP's dense tokens, no training",
            "ablation_photographs_7000",
            "clip_dense",
        ),
    ],
)
def test_the_table_of_results_stands_in_the_records(row: str, results: str, name: str) -> None:
    line = next(line for line in README.splitlines() if line.startswith(f"| {row} |"))
    told = [float(cell.split("±")[0]) for cell in line.split("|")[2:6]]
    content = json.loads((ROOT / "benchmarks" / "results" / f"{results}.json").read_text())
    scores = [run["scores"] for run in content["runs"] if run["row"] == name]
    for key, value in zip(("pAcc", "mIoU(S)", "mIoU(U)", "hIoU"), told, strict=True):
        assert np.mean([score[key] for score in scores]) == pytest.approx(value, abs=0.051)


def test_the_papers_scores_are_those_of_the_recipes() -> None:
    from cliptteacher.training.paper_recipes import PAPER_ROWS

    rows = re.findall(r"^\| \*paper\*, (\w[\w-]*), SegFormer-B4.*?\|(.*)\|$", README, re.MULTILINE)
    kinds = {"VOC": "voc", "COCO-Stuff": "coco_stuff", "Context": "context"}
    assert {kinds[kind] for kind, _ in rows} == set(kinds.values())
    for kind, cells in rows:
        told = tuple(float(cell) for cell in cells.split("|"))
        assert told == PAPER_ROWS[f"{kinds[kind]}_segformer_b4"].scores


def test_no_unfilled_figure() -> None:
    assert not re.findall(r"@[A-Z_]+@|TODO", README + PROGRAMS)


def test_public_names_resolve() -> None:
    for name in ct.__all__:
        assert getattr(ct, name) is not None
