"""What a notebook and `python -m cliptteacher` show."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cliptteacher as ct
from cliptteacher.__main__ import describe
from cliptteacher.inference import TrainedSegmenter


def test_objects_say_what_they_are() -> None:
    clip = ct.load_clip("miniworld")
    student = ct.build_segmenter("segformer_nano", clip.embed_dim)
    model = ct.CLIPTeacher(clip, student, ["grass", "sand"])
    width = clip.config.vision_width
    patch = clip.config.patch_size
    assert repr(model) == f"CLIPTeacher(ViT-{width}/{patch} -> segformer_nano, 2 seen classes)"
    own = nn.Conv2d(3, clip.embed_dim, 4, stride=4)
    assert repr(ct.CLIPTeacher(clip, own, ["grass"])).endswith("-> Conv2d, 1 seen classes)")
    names = tuple("abcdefg")
    trained = TrainedSegmenter(student, names, (), torch.rand(7, 8), {}, {"segmenter_name": "x"})
    assert repr(trained) == "TrainedSegmenter(x, 7 words: a, b, c, d, e, ...)"


def test_the_description_says_which_weights_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPTTEACHER_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "ViT-B-16.pt").write_bytes(bytes(3 << 20))
    lines = {line.split()[0]: line for line in describe() if line}
    assert lines["cliptteacher"].split()[1] == ct.__version__
    assert lines["miniworld"].split()[1] == "bundled,"
    assert lines["ViT-B/16"].endswith("ViT-B-16.pt, 3.0 MiB")
    assert "not there" in lines["ViT-L/14"] and str(tmp_path) in lines["ViT-L/14"]
    assert set(ct.list_segmenters()) <= set(lines)
    assert lines["fpn_small"].endswith("none published")
    for name in ("segformer_b0", "segnext_t", "swin_t", "torchvision/convnext_tiny"):
        assert f"not there: {tmp_path}/checkpoints/" in lines[name]


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cliptteacher"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.startswith(f"cliptteacher {ct.__version__} in ") and not done.stderr
