"""The programs end to end: as a user runs them, on tiny networks and six images of 64 pixels.

The first run of each program is a process of its own; variations call its `main` in this process,
where PyTorch is loaded already.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cliptteacher.checkpoint import load_checkpoint
from cliptteacher.clip import (
    CLIP,
    CLIPConfig,
    class_text_features,
    load_clip,
    save_clip,
    tokenize,
)
from cliptteacher.clip.prompts import SINGLE
from cliptteacher.clip.tokenizer import load_tokenizer
from cliptteacher.inference import load_segmenter

ROOT = Path(__file__).resolve().parents[1]
NAMES, UNSEEN = ("grass", "sky", "brick", "water"), "water"
COLOURS = np.array([(40, 160, 60), (120, 180, 250), (170, 70, 50), (20, 60, 160)])
SCORES = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")
Program = Callable[..., str]


def start(*command: str) -> str:
    """Run a program of examples/ as a process; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT / "examples",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a program of examples/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set (data/), a CLIP of random weights (clip.pt), and no runs yet."""
    space = tmp_path_factory.mktemp("programs")
    write_dataset(space / "data", NAMES, UNSEEN)
    torch.manual_seed(0)
    save_clip(tiny_clip(), space / "clip.pt")
    return space


def tiny_clip() -> CLIP:
    config = CLIPConfig(
        embed_dim=32,
        image_size=32,
        patch_size=8,
        vision_width=64,
        vision_layers=1,
        text_width=64,
        text_layers=1,
    )
    return CLIP(config)


def write_dataset(root: Path, names: tuple[str, ...], unseen: str) -> None:
    """Six images of two or three noisy stripes, one class each; 4 to train, 2 to validate."""
    generator = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for i in range(6):
        label = np.repeat(generator.permutation(4)[:3], (20, 20, 24)).astype(np.uint8)
        label = np.tile(label[:, None], (1, 64))
        label[:2] = 255
        noise = generator.integers(-20, 20, (64, 64, 3))
        pixels = (COLOURS[np.where(label == 255, 0, label)] + noise).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"scene{i}.png")
        Image.fromarray(label).save(root / "labels" / f"scene{i}.png")
    description = {"classes": list(names), "unseen": [unseen], "ignore_index": 255}
    (root / "dataset.json").write_text(json.dumps(description))
    (root / "train.txt").write_text("scene0\nscene1\nscene2\nscene3\n")
    (root / "val.txt").write_text("scene4\nscene5\n")


def training(space: Path, output: Path, *more: str) -> list[str]:
    options = f"""--data folder --root {space / "data"} --clip {space / "clip.pt"}
        --segmenter segformer_nano --iterations 4 --batch-size 2 --crop 64 --resize 64 64
        --checkpoint-interval 2 --eval-interval 2 --log-interval 1
        --warmup 1 --kmeans-iterations 2 --gamma 1.5 --device cpu --seed 3 --output {output}"""
    return [*options.split(), *more]


@pytest.fixture(scope="module")
def trained(space: Path) -> tuple[Path, str]:
    """The directory of a run of four iterations, and what it printed."""
    return space / "run", start("train.py", *training(space, space / "run"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(first: Any, second: Any) -> None:
    """Compare nested containers of tensors and values, bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def four_scores(printed: str) -> dict[str, float | None]:
    """Read the last two lines: the names of the four scores and their percentages."""
    head, line = printed.rstrip("\n").split("\n")[-2:]
    assert tuple(head.split()) == SCORES
    return {
        name: None if cell == "-" else float(cell)
        for name, cell in zip(SCORES, line.split(), strict=True)
    }


def rounded(scores: dict[str, Any]) -> dict[str, float | None]:
    return {name: None if scores[name] is None else float(f"{scores[name]:.1f}") for name in SCORES}


# train.py


def test_a_run_leaves_its_files(space: Path, trained: tuple[Path, str]) -> None:
    run, printed = trained
    config = json.loads((run / "config.json").read_text())
    assert config["recipe"] == "folder" and config["iterations"] == 4 and config["seed"] == 3
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and "train.py" in environment["command"]
    files = sorted(file.name for file in (run / "checkpoints").iterdir())
    assert files == ["SHA256SUMS", "last.pt", "step_00000002.pt", "step_00000004.pt"]
    assert (run / "checkpoints" / "last.pt").samefile(run / "checkpoints" / "step_00000004.pt")
    panels = sorted(file.name for file in (run / "panels").iterdir())
    assert panels == ["val_00000002.png", "val_00000004.png"]
    rows = read_lines(run / "metrics.jsonl")
    losses = [row for row in rows if "total" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4]
    for row in losses:
        parts = ("global", "ce", "focal", "dice", "generate")
        assert row["total"] == pytest.approx(sum(row[part] for part in parts), rel=1e-4)
        assert row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1
    assert losses[0]["seconds_left"] > 0 and losses[-1]["seconds_left"] == 0
    scores = [row for row in rows if "pAcc" in row]
    assert [row["step"] for row in scores] == [2, 4]
    assert four_scores(printed) == rounded(scores[-1])


def test_a_checkpoint_says_everything_needed_to_predict(trained: tuple[Path, str]) -> None:
    content = load_checkpoint(trained[0])
    assert content["class_names"] == list(NAMES) and content["unseen"] == [NAMES.index(UNSEEN)]
    assert content["text_features"].shape == (4, 32) and content["step"] == 4
    assert content["gamma"] == 1.5
    assert content["training"]["bank"]["glm.0.bank.filled"] == 8  # 4 iterations of 2 images
    assert not any("clip" in name or "visual" in name for name in content["segmenter"])


@pytest.mark.parametrize("workers", [0, 1])
def test_four_iterations_equal_two_and_two_resumed(
    space: Path,
    trained: tuple[Path, str],
    program: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    """The run that is resumed stopped behind step 2 of 4: it has that checkpoint and no later."""
    run = space / f"resumed{workers}"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("step_00000002.pt", "last.pt"):
        shutil.copy(trained[0] / "checkpoints" / "step_00000002.pt", run / "checkpoints" / name)
    for name in ("metrics.jsonl", "config.json", "environment.json"):
        shutil.copy(trained[0] / name, run)
    options = training(space, run, "--resume", "--workers", str(workers))
    torch.set_num_threads(1)  # as the first run; the order of sums depends on it
    program("train").main(options)
    assert "resumed from step 2" in capsys.readouterr().out
    whole, resumed = load_checkpoint(trained[0]), load_checkpoint(run)
    for part in ("segmenter", "text_features", "training"):
        assert_same(whole[part], resumed[part])
    told = ("step", "total", "pAcc")
    first, second = (
        [{key: row.get(key) for key in told} for row in read_lines(folder / "metrics.jsonl")]
        for folder in (trained[0], run)
    )
    assert first == second
    first, second = (json.loads((f / "environment.json").read_text()) for f in (trained[0], run))
    assert second["earlier"] == [first] and (first["start"], second["start"]) == (0, 2)
    assert second["config_changes"]["resume"] == [False, True]


def test_a_foreign_network_by_one_flag(
    space: Path, program: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    """A network of torchvision trains, and its checkpoint evaluates and predicts by itself."""
    run, name = space / "foreign", "torchvision/lraspp_mobilenet_v3_large"
    program("train").main(training(space, run, "--segmenter", name, "--iterations", "2"))
    trained = four_scores(capsys.readouterr().out)
    assert load_segmenter(run).checkpoint["segmenter_name"] == name
    program("evaluate").main(["--checkpoint", str(run)])
    assert four_scores(capsys.readouterr().out) == trained
    image = str(space / "data" / "images" / "scene4.png")
    program("predict").main(
        ["--checkpoint", str(run), "--image", image, "--output", str(run / "predicted")]
    )
    indices = np.array(Image.open(run / "predicted" / "scene4_index.png"))
    assert indices.shape == (64, 64) and indices.max() < len(NAMES)


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_near_miss_of_a_student_is_named(
    space: Path, program: Callable[[str], ModuleType], more: tuple[str, ...]
) -> None:
    options = training(space, space / "none", "--segmenter", "torchvision/convnext_tinny", *more)
    with pytest.raises(SystemExit, match="did you mean 'torchvision/convnext_tiny'"):
        program("train").main(options)


@pytest.mark.slow
def test_two_processes(space: Path) -> None:
    """Two gloo processes share a batch; evaluation by two gives the scores of one."""
    run = space / "two"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    printed = start(*torchrun, "train.py", *training(space, run))
    assert "2 processes on cpu" in printed
    devices = json.loads((run / "environment.json").read_text())["devices"]
    assert [device["rank"] for device in devices] == [0, 1]
    content = load_checkpoint(run)
    assert len(content["training"]["rng"]) == 2
    bank = content["training"]["bank"]
    assert bank["glm.0.bank.filled"] == 8 and bank["glm.0.bank.tokens"].shape == (48, 32)
    again = start(*torchrun, "evaluate.py", "--checkpoint", str(run))
    assert four_scores(again) == four_scores(printed)


def test_a_dry_run_writes_nothing(
    space: Path, program: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    program("train").main(training(space, space / "dry", "--dry-run"))
    printed = capsys.readouterr().out
    assert "4 images, 3 classes with labels, 1 without" in printed
    assert "M parameters" in printed and not (space / "dry").exists()


def test_a_used_output_is_refused(
    space: Path, trained: tuple[Path, str], program: Callable[[str], ModuleType]
) -> None:
    with pytest.raises(SystemExit, match="already holds a run; add --resume or choose another"):
        program("train").main(training(space, trained[0]))


@pytest.mark.filterwarnings("error:.*has weights alone")
def test_the_settings_of_a_silent_teacher_are_said_once(
    space: Path, tmp_path: Path, program: Callable[[str], ModuleType]
) -> None:
    """Bare weights say neither GELU nor the heads; the student's checkpoint remembers both."""
    teacher = CLIP(replace(tiny_clip().config, activation="gelu", vision_heads=4, text_heads=2))
    torch.save(teacher.state_dict(), tmp_path / "bare.pt")
    said = ["--clip", str(tmp_path / "bare.pt"), "--clip-activation", "gelu", "--clip-heads"]
    options = training(space, tmp_path / "run", *said, "4", "2", "--iterations", "2")
    program("train").main(options)
    content = load_checkpoint(tmp_path / "run")
    assert (content["clip_activation"], content["clip_heads"]) == ("gelu", [4, 2])
    right = class_text_features(teacher.eval(), ["frisbee"])
    words = load_segmenter(tmp_path / "run").with_words(["frisbee"])
    torch.testing.assert_close(words.text_features, right)
    other = load_segmenter(tmp_path / "run").with_words(["frisbee"], activation="quick_gelu")
    assert not torch.allclose(other.text_features, right, atol=1e-3)
    with pytest.raises(SystemExit, match=r"--clip-heads = \(4, 2\) and cannot go on with \(2, 2\)"):
        program("train").main([*training(space, tmp_path / "run", *said, "2", "2", "--resume")])
    program("evaluate").main(
        ["--clip-only", *said, "4", "2", "--root", str(space / "data"), "--device", "cpu"]
    )
    image = str(space / "data" / "images" / "scene0.png")
    program("predict").main(
        [
            "--clip-only",
            *said,
            "4",
            "2",
            "--image",
            image,
            "--classes",
            "grass, sky",
            "--device",
            "cpu",
            "--output",
            str(tmp_path / "out"),
        ]
    )


def test_two_runs_in_one_directory(
    space: Path, tmp_path: Path, program: Callable[[str], ModuleType]
) -> None:
    """The second of two that were started together ends with a sentence, the first goes on."""
    held = "from pathlib import Path; from cliptteacher.training.records import hold; import sys; "
    code = held + f"file = hold(Path({str(tmp_path / 'run')!r})); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "1\n"
        with pytest.raises(SystemExit, match=r"another run is writing to .*run; wait for its end"):
            program("train").main(training(space, tmp_path / "run"))
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        first.kill()
    program("train").main(training(space, tmp_path / "run", "--iterations", "1"))


@pytest.mark.parametrize("below", ["", "run"])
def test_an_output_that_is_a_file(
    space: Path, tmp_path: Path, program: Callable[[str], ModuleType], below: str
) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(
        SystemExit, match=r"taken.* cannot be written \(.*is a file, choose another"
    ):
        program("train").main(training(space, tmp_path / "taken" / below))
    assert (tmp_path / "taken").read_text() == "x"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--iteration-s", "4"), "did you mean '--iterations'?"),
        (("--segmentor", "x"), "did you mean '--segmenter'?"),
        (("--batch-size", "0"), "`batch_size` must be at least 1, got 0"),
        (("--config", "missing.json"), "missing.json does not exist; check --config"),
    ],
)
def test_mistyped_options(
    program: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    option: tuple[str, str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        program("train").main([*option])
    assert message in capsys.readouterr().err


# evaluate.py


def test_evaluate_needs_no_clip_for_the_words_of_training(
    space: Path, trained: tuple[Path, str]
) -> None:
    """The scores are those of the end of training; files hold what was predicted."""
    run, printed = trained
    folder, file = space / "predictions", space / "scores.json"
    options = f"--checkpoint {run} --clip nowhere --save-dir {folder} --json {file} --batch-size 2"
    again = start("evaluate.py", *options.split())
    assert f"unseen in training, with a bonus of 1.5: {UNSEEN}" in again
    assert four_scores(again) == four_scores(printed)
    summary = json.loads(file.read_text())
    assert rounded(summary["scores"]) == four_scores(again)
    assert set(summary["scores"]["IoU"]) == set(NAMES)
    told = {key: summary[key] for key in ("step", "data", "split", "gamma", "mode", "unseen")}
    assert told == {
        "step": 4,
        "data": "folder",
        "split": "val",
        "gamma": 1.5,
        "mode": "whole",
        "unseen": [UNSEEN],
    }
    written = sorted(path.name for path in folder.iterdir())
    assert written == [f"scene{i}{end}" for i in (4, 5) for end in (".png", "_overlay.png")]
    right = labelled = 0
    for name in ("scene4", "scene5"):
        label = np.array(Image.open(space / "data" / "labels" / f"{name}.png"))
        guess = np.array(Image.open(folder / f"{name}.png"))
        right += ((guess == label) & (label != 255)).sum()
        labelled += (label != 255).sum()
    assert summary["scores"]["pAcc"] == pytest.approx(100 * right / labelled)


def test_evaluate_chooses_gamma_on_another_split(
    space: Path,
    trained: tuple[Path, str],
    program: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate, file = program("evaluate"), space / "calibrated.json"
    options = ["--checkpoint", str(trained[0]), "--calibrate", "train"]
    evaluate.main([*options, "--gammas", "-1", "0.5", "2", "--json", str(file)])
    printed, summary = capsys.readouterr().out, json.loads(file.read_text())
    assert [row["gamma"] for row in summary["sweep"]] == [-1, 0.5, 2]
    best = max(row["hIoU"] for row in summary["sweep"])
    chosen = next(row for row in summary["sweep"] if row["gamma"] == summary["gamma"])
    assert chosen["hIoU"] == best and printed.count("<- chosen") == 1
    evaluate.main(["--checkpoint", str(trained[0]), "--gamma", str(summary["gamma"])])
    assert four_scores(capsys.readouterr().out) == rounded(summary["scores"])
    assert summary["calibrated_on"] == "train" and summary["split"] == "val"
    for wrong in (["--split", "train"], ["--gamma", "1"]):
        with pytest.raises(SystemExit, match="chooses gamma on another split than --split, got"):
            evaluate.main([*options, *wrong])


def test_evaluate_reads_new_names_with_the_clip(
    space: Path,
    trained: tuple[Path, str],
    program: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another data set, whose own list of unseen classes is not what training left out."""
    root = space / "other"
    write_dataset(root, ("sky", "lawn", "Brick", "sea"), unseen="sky")
    options = f"--checkpoint {trained[0]} --root {root} --mode slide --window 48 --gamma 50"
    program("evaluate").main([*options.split(), "--resize", "64", "64"])
    printed = capsys.readouterr().out
    assert "unseen in training, with a bonus of 50: lawn, sea" in printed
    assert four_scores(printed)["mIoU(S)"] == 0  # nobody competes with that bonus


@pytest.mark.parametrize("name", ["evaluate", "predict"])
def test_a_missing_checkpoint(space: Path, name: str, program: Callable[[str], ModuleType]) -> None:
    more = f"--image {space / 'data' / 'images'} --output {space / 'none'}".split()
    options = ["--checkpoint", str(space / "nothing"), *(more if name == "predict" else [])]
    with pytest.raises(
        SystemExit, match=r"the checkpoint .*nothing does not exist; examples/train"
    ):
        program(name).main(options)


def test_a_missing_or_foreign_clip_is_named(
    space: Path, trained: tuple[Path, str], program: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    options = f"--checkpoint {trained[0]} --output {tmp_path} --image {space / 'data/images'}"
    ask = [*options.split(), "--classes", "sky, lawn", "--clip"]
    with pytest.raises(SystemExit, match=r"need its teacher, but .*lost.pt.*`clip` \(--clip\)"):
        program("predict").main([*ask, str(tmp_path / "lost.pt")])
    wide = CLIPConfig(
        embed_dim=48, image_size=16, patch_size=8, vision_width=64, vision_layers=1,
        text_width=64, text_layers=1,
    )  # fmt: skip
    save_clip(CLIP(wide), tmp_path / "wide.pt")
    with pytest.raises(SystemExit, match="taught the student, with 32 channels, got 48"):
        program("predict").main([*ask, str(tmp_path / "wide.pt")])


# predict.py


def test_predict_without_words_takes_those_of_training(
    space: Path, trained: tuple[Path, str]
) -> None:
    image, output = space / "data" / "images" / "scene4.png", space / "out"
    options = f"--checkpoint {trained[0]} --image {image} --clip nowhere --output {output}"
    printed = start("predict.py", *options.split())
    assert f"with a bonus of 1.5: {UNSEEN}" in printed
    indices = np.array(Image.open(output / "scene4_index.png"))
    assert indices.shape == (64, 64) and indices.dtype == np.uint8
    expected = load_segmenter(trained[0]).predictor()(
        torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)
    )
    assert np.array_equal(indices, expected.numpy())
    line = next(line for line in printed.splitlines() if line.startswith("1/1  scene4: "))
    for k in np.unique(indices):
        assert f"{NAMES[k]} {100 * (indices == k).mean():.1f}%" in line
    assert str(output / "scene4_overlay.png") in line
    assert Image.open(output / "scene4_overlay.png").width >= 256  # small images are enlarged


def test_predict_any_words_on_any_images(
    space: Path,
    trained: tuple[Path, str],
    program: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """New words; a turned photo, RGBA, grey, palette, two of one name, two files that are none."""
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    picture = Image.open(space / "data" / "images" / "scene4.png").resize((80, 48))
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(photos / "turned.jpg", exif=turned)
    picture.convert("RGBA").save(photos / "rgba.png")
    picture.convert("L").save(photos / "grey.png")
    picture.convert("P").save(photos / "palette.gif")
    picture.save(photos / "grey.BMP")
    (photos / "cut.jpg").write_bytes((photos / "turned.jpg").read_bytes()[:700])
    (photos / "text.png").write_text("not a picture")
    (photos / "notes.txt").write_text("not even by name")
    options = f"--checkpoint {trained[0]} --image {photos} --output {output} --resize 40 40"
    with pytest.raises(SystemExit) as stop:
        program("predict").main([*options.split(), "--classes", " sky, Grass,wild  water, tower"])
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "with a bonus of 1.5: wild water, tower" in printed.out
    assert len(printed.err.splitlines()) == 3
    for name in ("cut.jpg", "text.png"):
        assert f"{photos / name} must be a readable image, but " in printed.err
    assert f"{photos / 'notes.txt'} is passed over: no ending of an image" in printed.err
    sizes = {path.name: Image.open(path).size for path in output.glob("*_index.png")}
    assert sizes == {
        "turned_index.png": (48, 80),
        "rgba_index.png": (80, 48),
        "grey.png_index.png": (80, 48),
        "grey.BMP_index.png": (80, 48),
        "palette_index.png": (80, 48),
    }
    assert all(np.array(Image.open(path)).max() < 4 for path in output.glob("*_index.png"))
    assert len(list(output.glob("*_overlay.png"))) == 5


def test_known_words_and_the_clip_agree(trained: tuple[Path, str]) -> None:
    """A word has the same features from the checkpoint as from the CLIP; order is the caller's."""
    student = load_segmenter(trained[0])
    stored = student.with_words(["Water", "sky"], clip="nowhere")
    assert stored.unread == () and stored.unseen == (0,) and stored.class_names == ("Water", "sky")
    assert torch.equal(stored.text_features, student.text_features[[3, 1]])
    read = student.with_words(["Water", "sky", "a tower"])
    assert read.unseen == (0, 2)
    torch.testing.assert_close(read.text_features[:2], stored.text_features)


def test_clip_alone_predicts_what_evaluation_scores(
    space: Path,
    program: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """No student: dense tokens against words, the same maps from both programs."""
    (tmp_path / "words.txt").write_text("\n".join(NAMES))
    clip = ["--clip-only", "--clip", str(space / "clip.pt")]
    image = ["--image", str(space / "data" / "images" / "scene4.png")]
    words = ["--classes", str(tmp_path / "words.txt"), "--output", str(tmp_path)]
    program("predict").main([*clip, *image, *words])
    data = ["--root", str(space / "data"), "--save-dir", str(tmp_path / "scored")]
    program("evaluate").main([*clip, *data])
    assert "on " in capsys.readouterr().out
    maps = [
        np.array(Image.open(path))
        for path in (tmp_path / "scene4_index.png", tmp_path / "scored" / "scene4.png")
    ]
    assert np.array_equal(*maps)
    with pytest.raises(SystemExit, match="--clip-only needs a CLIP and words"):
        program("predict").main([*clip, *image, "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (" , ", "the words must be 1 to 255 different words, got 0"),
        ("cat, dog, cat", "different words, got cat twice"),
    ],
)
def test_words_are_checked(
    space: Path,
    trained: tuple[Path, str],
    program: Callable[[str], ModuleType],
    classes: str,
    message: str,
) -> None:
    options = f"--checkpoint {trained[0]} --image {space / 'data/images'} --output {space / 'no'}"
    with pytest.raises(SystemExit, match=message):
        program("predict").main([*options.split(), "--classes", classes])


@pytest.mark.parametrize(
    ("image", "output", "message"),
    [
        ("missing.jpg", "out", r"the image .*missing.jpg does not exist; check --image"),
        ("empty", "out", r"empty must hold an image, got none of .*\.jpg"),
        ("empty", "empty", "--output must not be the directory of the images"),
    ],
)
def test_images_are_checked(
    trained: tuple[Path, str],
    program: Callable[[str], ModuleType],
    tmp_path: Path,
    image: str,
    output: str,
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    options = f"--checkpoint {trained[0]} --image {tmp_path / image} --output {tmp_path / output}"
    with pytest.raises(SystemExit, match=message):
        program("predict").main(options.split())


# pretrain_clip.py


@pytest.fixture(scope="module")
def pretrained(space: Path) -> tuple[Path, str]:
    options = f"""--data folder --root {space / "data"} --output {space / "pretrained"}
        --iterations 3 --batch-size 16 --image-size 32 --embed-dim 32 --vision-width 64
        --vision-layers 1 --text-width 64 --text-layers 1 --log-interval 2 --device cpu"""
    return space / "pretrained", start("pretrain_clip.py", *options.split())


def test_pretraining_writes_a_clip_that_loads(pretrained: tuple[Path, str]) -> None:
    folder, printed = pretrained
    clip = load_clip(str(folder / "clip.pt"))
    assert (clip.embed_dim, clip.patch_size, clip.config.image_size) == (32, 8, 32)
    assert clip.encode_image(torch.rand(1, 3, 32, 40)).dense.shape == (1, 32, 4, 5)
    extra = torch.load(folder / "clip.pt", weights_only=True)["extra"]
    assert extra["iterations"] == 3 and extra["seed"] == 0
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 3] and 0 <= rows[1]["dense_accuracy_val"] <= 1
    assert json.loads((folder / "config.json").read_text())["iterations"] == 3
    assert printed.rstrip().endswith("min") and "dense_accuracy_val: " in printed


def test_only_words_of_captions_have_rows(pretrained: tuple[Path, str]) -> None:
    """Every word of the single template and of the classes was trained; all others are zero."""
    rows = load_clip(str(pretrained[0] / "clip.pt")).token_embedding.weight.any(dim=1)
    prompts = [SINGLE[0].replace("{}", name) for name in NAMES]
    used = tokenize(prompts).unique()
    assert bool(rows[used[used != 0]].all())  # 0 is padding, never looked at
    captions = [f"a photo of {name}, {name} and a {name}." for name in NAMES]
    allowed = tokenize([*captions, "a picture of", "an image with"]).unique()
    assert set(rows.nonzero().flatten().tolist()) <= set(allowed.tolist())
    assert not bool(rows[load_tokenizer().encode("small scene")].any())


def test_words_that_the_clip_never_read_are_named(
    space: Path,
    trained: tuple[Path, str],
    pretrained: tuple[Path, str],
    program: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    image = space / "data" / "images" / "scene4.png"
    options = f"--checkpoint {trained[0]} --image {image} --output {tmp_path} --clip"
    classes = ["--classes", "sky, zebra, brick sky"]
    program("predict").main([*options.split(), str(pretrained[0] / "clip.pt"), *classes])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "warning: the CLIP never read the word 'zebra'" in errors[0]


def test_pretraining_says_what_is_missing(
    program: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    with pytest.raises(SystemExit):
        program("pretrain_clip").main(["--data", "folder", "--output", str(tmp_path)])
    assert "--data folder needs --root" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"dataset.json must describe the data set"):
        program("pretrain_clip").main(
            ["--data", "folder", "--root", str(tmp_path), "--output", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


def test_predict_synonyms_template_list_windows_and_confidence(
    space: Path,
    trained: tuple[Path, str],
    program: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    images = space / "data" / "images"
    (tmp_path / "list.txt").write_text(f"{images / 'scene3.png'}\n\n{images / 'scene4.png'}\n")
    listed = f"--image {tmp_path / 'list.txt'} {images / 'scene5.png'} --output {tmp_path / 'out'}"
    options = [*listed.split(), "--mode", "slide", "--confidence", "--classes", "sky/fog, tower"]
    template = ["--template", "a satellite photo of {}."]
    program("predict").main(["--checkpoint", str(trained[0]), *options, *template])
    printed = capsys.readouterr()
    assert "with a bonus of 1.5: tower" in printed.out  # fog stands for a seen class
    assert printed.out.splitlines()[1].startswith("1/3, ") and " s left  scene3: " in printed.out
    assert printed.out.splitlines()[3].startswith("3/3, 0 s left  scene5: ")
    for name in ("scene3", "scene4", "scene5"):
        index = np.array(Image.open(tmp_path / "out" / f"{name}_index.png"))
        sure = np.array(Image.open(tmp_path / "out" / f"{name}_confidence.png"))
        assert index.max() < 2 and sure.shape == index.shape and sure.min() >= 255 // 3
    with pytest.raises(SystemExit, match="a template must hold '{}' once"):
        program("predict").main(["--checkpoint", str(trained[0]), *options, "--template", "photo"])
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(SystemExit, match="must name at least one image, got none"):
        program("predict").main(["--checkpoint", "x", "--image", str(tmp_path / "list.txt"),
                                 "--output", str(tmp_path)])  # fmt: skip


def test_a_template_gives_other_features(trained: tuple[Path, str]) -> None:
    student = load_segmenter(trained[0])
    plain = student.with_words(["sky", "water"])
    other = student.with_words(["sky", "water"], templates=["a drawing of {}."])
    assert other.unseen == plain.unseen == (1,)
    assert not torch.allclose(other.text_features, plain.text_features)
