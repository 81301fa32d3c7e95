"""How time and memory grow: each size doubled, beside what the arithmetic demands.

    OMP_NUM_THREADS=1 python benchmarks/speed/growth.py

A row's other side is its time or memory at the plain size, times the growth that the arithmetic
demands: above 1, it grows by less. Memory is the peak resident size of a process of its own, three
training steps of the recipe `miniworld` with more classes or a larger crop.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping

import torch
from race import finish, race, report, start

from cliptteacher.clip import load_clip
from cliptteacher.clip.model import CLIP, CLIPConfig
from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.fusion import fuse_clusters
from cliptteacher.kmeans import masked_kmeans
from cliptteacher.plm import pixel_cross_entropy
from cliptteacher.segmenters import build_segmenter
from cliptteacher.training.config import TrainConfig, resolve_config
from cliptteacher.training.recipes import get_recipe

GOAL = 0.8
Sizes = Mapping[str, int]


def kmeans(sizes: Sizes) -> Callable[[], object]:
    B, N, K, C = (sizes[name] for name in "BNKC")
    points, centers = torch.randn(B, N, C), torch.randn(B, K, C)
    mask = torch.ones(B, N, dtype=torch.bool)
    return lambda: masked_kmeans(points, centers, mask, 2)  # few: none converges earlier


def fusion(sizes: Sizes) -> Callable[[], object]:
    B, K, C = (sizes[name] for name in "BKC")
    centers, alive = torch.randn(B, K, C), torch.ones(B, K, dtype=torch.bool)
    return lambda: fuse_clusters(centers, alive, 0.8)


def losses(sizes: Sizes) -> Callable[[], object]:
    B, A, side = (sizes[name] for name in ("B", "A", "side"))
    seen, potential = torch.randn(B, A, side, side), torch.randn(B, 40, side, side)
    labels = torch.randint(A, (B, 4 * side, 4 * side))
    leaf = seen.requires_grad_()
    return lambda: pixel_cross_entropy(leaf, potential, labels).backward()


def teacher(sizes: Sizes) -> Callable[[], object]:
    clip = CLIP(CLIPConfig()).eval().requires_grad_(False)
    images = torch.rand(sizes["B"], 3, sizes["side"], sizes["side"])
    return lambda: clip.encode_image(images)


def student(sizes: Sizes) -> Callable[[], object]:
    network = build_segmenter("segformer_b0", 512)
    images = torch.rand(sizes["B"], 3, sizes["side"], sizes["side"])
    return lambda: network(images).sum().backward()


def teacher_growth(side: int) -> float:
    """Tokens times 12 C^2 + 2 N C, of images of twice the side."""
    n = (side // 16) ** 2
    return 4 * (12 * 768 + 2 * 4 * n) / (12 * 768 + 2 * n)


# what, how, plain sizes, and of each size that is doubled the growth of the arithmetic
CASES: list[tuple[str, Callable[[Sizes], Callable[[], object]], Sizes, dict[str, float]]] = [
    ("K-Means", kmeans, {"B": 8, "N": 1024, "K": 58, "C": 512}, dict.fromkeys("BNKC", 2)),
    ("fusion", fusion, {"B": 8, "K": 116, "C": 512}, {"B": 2, "K": 4, "C": 2}),
    ("cross entropy", losses, {"B": 1, "A": 60, "side": 128}, {"B": 2, "A": 1.6, "side": 4}),
    ("teacher", teacher, {"B": 1, "side": 256}, {"B": 2, "side": teacher_growth(256)}),
    ("SegFormer-B0, both passes", student, {"B": 1, "side": 256}, {"B": 2, "side": 4}),
]


def measure_time(rounds: int) -> list[dict[str, object]]:
    rows = []
    for what, build, plain, doubled in CASES:
        ways = {"plain": build(plain)}
        ways |= {name: build({**plain, name: 2 * plain[name]}) for name in doubled}
        times = race(ways, rounds)
        for name, growth in doubled.items():
            demanded = {f"{growth:.3g} x plain": growth * times["plain"]}
            values = {f"twice the {name}": times[name], **demanded}
            rows.append(report(f"{what}, twice the {name}", values, GOAL))
    return rows


def resident_mib(classes: int, crop: int) -> float:
    """Peak resident size of this program as a training process."""
    command = [sys.executable, "-W", "ignore", __file__, "train", str(classes), str(crop)]
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return used.ru_maxrss / 1024  # kibibytes on Linux


def train(classes: int, crop: int) -> None:
    config, method = resolve_config((TrainConfig, CLIPTeacherConfig), (get_recipe("miniworld"),))
    clip = load_clip(config.clip)
    network = build_segmenter(config.segmenter, clip.embed_dim)
    model = CLIPTeacher(clip, network, [f"thing {n}" for n in range(classes)], method).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    labels = torch.randint(classes, (config.batch_size, crop, crop))
    labels[:, crop // 2 :] = 255
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(config.batch_size, 3, crop, crop), labels)["total"].backward()
        optimizer.step()


def measure_memory() -> list[dict[str, object]]:
    plain, more, larger = resident_mib(15, 128), resident_mib(150, 128), resident_mib(15, 256)
    return [
        report("peak of a run", {"15 classes, crop 128": plain, "1 GiB": 1024}, 1.0, unit="MiB"),
        report("peak, 150 classes", {"ours": more, "10 x plain": 10 * plain}, 1.0, unit="MiB"),
        report("peak, crop 256", {"ours": larger, "4 x plain": 4 * plain}, 1.0, unit="MiB"),
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(*map(int, sys.argv[2:]))
    else:
        rounds = start(__doc__)
        memory = measure_memory()  # first: a process begins with the peak of the one that made it
        finish([*memory, *measure_time(max(3, rounds // 2))])
