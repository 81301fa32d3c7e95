"""The library in a training loop of one's own: the lines of the README, alone and under DDP."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import cliptteacher as ct
from cliptteacher.data.miniworld import CLASS_NAMES, UNSEEN_NAMES, MiniWorld

NAMES, CROP = list(CLASS_NAMES), 64
UNSEEN = [NAMES.index(name) for name in UNSEEN_NAMES]
SEEN = [name for name in NAMES if name not in UNSEEN_NAMES]


def samples(count: int) -> TensorDataset:
    """Images (3, H, W) in [0, 1], and seen labels in the order of SEEN, 255 elsewhere."""
    world = ct.data.SeenOnly(MiniWorld("train", CROP, count))
    images, labels = zip(*(world[index] for index in range(count)), strict=True)
    return TensorDataset(torch.stack(images).float() / 255, torch.stack(labels))


def test_the_loop_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    device, names, unseen, seen_names = "cpu", NAMES, UNSEEN, SEEN
    loader = DataLoader(samples(6), batch_size=2, shuffle=True)

    clip = ct.load_clip("miniworld", device=device)
    student = ct.build_segmenter("segformer_b0", channels=clip.embed_dim)
    model = ct.CLIPTeacher(clip, student, seen_names).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for images, labels in loader:
        losses = model(images, labels)
        losses["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), "run.pt")
    text = ct.class_text_features(clip, names)
    ct.save_segmenter("student.pt", student, names=names, unseen=unseen, text_features=text)
    segment = ct.load_segmenter("student.pt")
    image, _ = MiniWorld("val", CROP, 1)[0]
    label_map = segment(image)
    words_map = segment(image, words=["dog", "frisbee"], clip=clip)

    assert label_map.shape == words_map.shape == (CROP, CROP)
    assert torch.equal(label_map, ct.Predictor(student, text, unseen=unseen)(image))
    assert set(words_map.unique().tolist()) <= {0, 1}
    label_map[label_map == 1] = 255  # an ordinary tensor


def test_the_state_goes_on_in_a_new_process_with_equal_losses(tmp_path: Path) -> None:
    """What run.pt and the optimiser's state hold is all: student, adapter and CLS bank."""
    clip = ct.load_clip("miniworld")
    batches = list(DataLoader(samples(8), batch_size=2))

    def build() -> tuple[ct.CLIPTeacher, torch.optim.Optimizer]:
        student = ct.build_segmenter("segformer_nano", channels=clip.embed_dim)
        model = ct.CLIPTeacher(clip, student, SEEN)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train(model: ct.CLIPTeacher, optimizer: torch.optim.Optimizer, first: int) -> list[Tensor]:
        torch.manual_seed(5)  # of the student's dropout
        totals = []
        for images, labels in batches[first : first + 2]:
            losses = model(images, labels)
            losses["total"].backward()
            optimizer.step()
            optimizer.zero_grad()
            totals.append(losses["total"].detach())
        return totals

    torch.manual_seed(0)
    model, optimizer = build()
    train(model, optimizer, 0)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")
    expected = train(model, optimizer, 2)
    fresh, restored = build()
    states = torch.load(tmp_path / "run.pt", weights_only=True)
    fresh.load_state_dict(states[0])
    restored.load_state_dict(states[1])
    assert torch.equal(torch.stack(train(fresh, restored, 2)), torch.stack(expected))


def train_on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    clip = ct.load_clip("miniworld")
    student = ct.build_segmenter("segformer_b0", channels=clip.embed_dim)
    model = ct.CLIPTeacher(clip, student, SEEN)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-4)
    gradients, own = {}, slice(2 * rank, 2 * rank + 2)
    for images, labels in DataLoader(samples(8), batch_size=4):
        optimizer.zero_grad()
        ddp(images[own], labels[own])["total"].backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    torch.save({"gradients": gradients, "state": model.state_dict()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_same_loop_in_two_processes(tmp_path: Path) -> None:
    """DDP averages every gradient, and both processes hold the bank of all images."""
    mp.spawn(train_on_one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    first, second = (rank["gradients"] for rank in ranks)
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert gradient.isfinite().all() and torch.equal(gradient, second[name]), name
    assert all(gradient.any() for name, gradient in first.items() if "head" in name)
    for name, value in ranks[0]["state"].items():
        # The running statistics of BatchNorm are each process's own, as always under DDP.
        same = torch.equal(value, ranks[1]["state"][name])
        assert same or name.endswith(("running_mean", "running_var")), name
    bank, filled = (ranks[0]["state"][f"glm.0.bank.{key}"] for key in ("tokens", "filled"))
    clip = ct.load_clip("miniworld")
    assert bank.shape == (24 * 4, clip.embed_dim) and filled == 8
    images = torch.cat([images for images, _ in DataLoader(samples(8), batch_size=4)])
    with torch.no_grad():
        tokens = clip.encode_image(images).cls  # rank order within an iteration, newest first
    expected = torch.cat((tokens[4:], tokens[:4]))
    torch.testing.assert_close(bank[:8], expected, rtol=1e-4, atol=1e-5)
    assert not bank[8:].any()
