"""One training step of the method against a step with the seen labels alone and a teacher's pass.

    OMP_NUM_THREADS=1 python benchmarks/speed/step.py

Two crops of 512 pixels, ViT-B/16, SegFormer-B0, 49 seen classes, half of the pixels without a
label, the literal method with the losses at the size of the features and, its default, of the
labels. The other side is what nobody can leave out: CLIP once, the student's forward and backward
pass, cross entropy, focal and dice of the seen classes. Everything else, GLM, K-Means, fusion,
prototypes, adapter and potential classes, may add 5 %.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from race import finish, race, report, start

from cliptteacher.clip.model import CLIP, CLIPConfig
from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.segmenters import build_segmenter

SIDE, SEEN = 512, 49


def measure(rounds: int) -> list[dict[str, object]]:
    clip = CLIP(CLIPConfig())
    names = [f"thing {number}" for number in range(SEEN)]
    student = build_segmenter("segformer_b0", clip.embed_dim)
    images = torch.rand(2, 3, SIDE, SIDE)
    labels = torch.randint(SEEN, (2, 8, 8)).repeat_interleave(64, 1).repeat_interleave(64, 2)
    labels[:, : SIDE // 2] = 255

    def step(method: CLIPTeacherConfig) -> Callable[[], None]:
        model = CLIPTeacher(clip, student, names, method).train()
        return lambda: model(images, labels)["total"].backward()

    rows = []
    for size in ("features", "labels"):
        method = CLIPTeacherConfig(loss_size=size)
        least = replace(method, ce="seen", global_weight=0.0, generate_weight=0.0)
        ways = {"ours": step(method), "seen labels + teacher": step(least)}
        times = race(ways, max(2, rounds // 2))
        rows.append(report(f"training step, losses at the size of the {size}", times, 1 / 1.05))
    return rows


if __name__ == "__main__":
    finish(measure(start(__doc__)))
