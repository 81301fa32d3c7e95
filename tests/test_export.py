"""What is exported predicts as the predictor does, from bytes, for every size of picture."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cliptteacher.export import ExportableSegmenter, export_program, save_onnx
from cliptteacher.inference import Predictor, save_segmenter
from cliptteacher.segmenters import build_segmenter

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("grass", "sky", "brick", "water")
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnxscript", "onnxruntime"))),
    reason="needs the extra `export`",
)


def predictor(student: str = "fpn_small", **settings: object) -> Predictor:
    torch.manual_seed(0)
    text = F.normalize(torch.randn(4, 16), dim=1)
    return Predictor(build_segmenter(student, 16).eval(), text, unseen=[3], gamma=0.1, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("student", ["fpn_small", "swin_nano", "segformer_nano"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size_divisor": 32, "similarity": "cosine", "logit_scale": 3.0},
        {"resize": (160, 107), "size_divisor": 32},
        {"resize": (200, 40)},
    ],
    ids=["plain", "mirrored", "resized and mirrored", "resized"],
)
def test_the_module_does_what_the_predictor_does(student: str, settings: dict[str, object]) -> None:
    own = predictor(student, **settings)
    module = ExportableSegmenter(own)
    for height, width in ((128, 128), (75, 100), (33, 250), (1, 1), (213, 320)):
        images = torch.randint(256, (2, 3, height, width), dtype=torch.uint8)
        labels, logits = module(images)
        full = own.logits(images)
        again = F.interpolate(logits, (height, width), mode="bilinear")
        torch.testing.assert_close(again, full, rtol=1e-4, atol=1e-4)
        best = full.topk(2, dim=1).values
        differs = labels != own(images)
        assert (best[:, 0] - best[:, 1])[differs].lt(1e-4).all() and differs.float().mean() < 1e-3


def test_the_predictor_itself_stays_as_it_was() -> None:
    own = predictor("swin_nano")
    before = list(own.state_dict())
    ExportableSegmenter(own)
    assert list(own.state_dict()) == before
    assert any(parameter.requires_grad for parameter in own.segmenter.parameters())


def test_windows_are_refused() -> None:
    with pytest.raises(ValueError, match='must have the mode "whole" to be exported, got \'slide'):
        ExportableSegmenter(predictor(mode="slide"))


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "export", lambda module, args: None)
    with pytest.raises(ValueError, match="exporting needs a torch whose torch.export defers"):
        export_program(predictor())


def test_onnx_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs the packages onnx and onnxscript; run"):
        save_onnx(None, tmp_path / "a.onnx", "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "sentence"),
    [("a.pth", "--output must end in .pt2 or .onnx, got"), ("a.onnx", "needs the package onnx")],
)
def test_what_cannot_be_written_is_refused_before_tracing(
    output: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    program = importlib.import_module("export")
    with pytest.raises(SystemExit, match=sentence):
        program.main(["--checkpoint", "none.pt", "--output", output])


# Reads the file as a user without this package does.
READ = """
import json, sys
sys.modules["cliptteacher"] = None
import numpy as np, torch
files = {"description.json": ""}
program = torch.export.load(sys.argv[1], extra_files=files).module()
images = torch.from_numpy(np.load(sys.argv[2]))
labels, logits = program(images)
np.save(sys.argv[3], labels.numpy())
print(files["description.json"])
"""


@pytest.mark.slow
def test_the_program_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Export, compare, then run the file in a process that cannot import the package."""
    own = predictor(resize=(160, 107), size_divisor=32)
    settings = {"resize": (160, 107), "size_divisor": 32, "gamma": 0.1}
    text = own.text_features
    save_segmenter(
        tmp_path / "student.pt", own.segmenter, names=NAMES, unseen=[3], text_features=text,
        **settings,
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(EXAMPLES))
    program = importlib.import_module("export")
    files = [tmp_path / "student.pt2"]
    command = ["--checkpoint", str(tmp_path / "student.pt"), "--output", *map(str, files)]
    program.main([*command, "--pictures", "10", "--json", str(tmp_path / "figures.json")])
    assert "10 pictures of 10 sizes: " in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())[".pt2"]["pictures"] == 10
    images = torch.randint(256, (3, 3, 61, 90), dtype=torch.uint8)
    np.save(tmp_path / "images.npy", images.numpy())
    paths = [str(tmp_path / name) for name in ("student.pt2", "images.npy", "labels.npy")]
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    description = json.loads(done.stdout)
    assert description["classes"] == list(NAMES) and description["unseen"] == ["water"]
    differs = np.load(tmp_path / "labels.npy") != own(images).numpy()
    assert differs.mean() < 1e-3


@needs_onnx
@pytest.mark.slow
def test_onnx_of_swin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shifted windows and pyramid pooling, at ten sizes, in onnxruntime."""
    own = predictor("swin_nano", resize=(160, 107), size_divisor=32)
    save_segmenter(
        tmp_path / "student.pt", own.segmenter, names=NAMES, unseen=[3], gamma=0.1,
        text_features=own.text_features, resize=(160, 107), size_divisor=32,
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(EXAMPLES))
    program = importlib.import_module("export")
    output = str(tmp_path / "student.onnx")
    program.main(["--checkpoint", str(tmp_path / "student.pt"), "--output", output])
    assert "20 pictures of 10 sizes:" in capsys.readouterr().out


def test_the_table_of_the_page_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every label equals the predictor's, up to ties that rounding decides."""
    benchmarks = EXAMPLES.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    rows = json.loads((benchmarks / "results" / "exported.json").read_text())
    table = importlib.import_module("exported").format_table(rows)
    assert table in (benchmarks / "export.md").read_text()
    for kinds in rows.values():
        for ending in (".pt2", ".onnx"):
            assert kinds[ending]["pictures"] == 100
            assert kinds[ending]["widest"] <= 2 * kinds[ending]["largest"] < 1e-4
