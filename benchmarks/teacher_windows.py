"""How well the teacher's CLS token knows what lies in the middle of a window, by window size.

    python benchmarks/teacher_windows.py [--scenes 96] [--sizes 24 32 48 64 96]

For every class of every validation scene of miniworld, a window is cut around it (a thing's
centre, a random pixel of stuff) and encoded as an image of its own. Printed are the shares in
which its class is the nearest of the 20 class names, and among the nearest two; last, as JSON.
This is why `glm_windows` helps: a token of the whole scene says little about a small thing.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor

import cliptteacher as ct
from cliptteacher.data.miniworld import CLASS_NAMES, IGNORE_INDEX, STUFF, MiniWorld


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=96)
    parser.add_argument("--sizes", type=int, nargs="+", default=[24, 32, 48, 64, 96])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clip = ct.load_clip("miniworld")
    text = ct.class_text_features(clip, CLASS_NAMES)
    scenes = MiniWorld("val")
    results = {}
    print(f"{'window':>6} {'things: first':>14} {'first two':>10} {'stuff: first':>13} {'two':>6}")
    for size in args.sizes:
        torch.manual_seed(args.seed)
        windows, classes = cut_windows(scenes, args.scenes, size)
        with torch.inference_mode():
            cls = torch.cat([clip.encode_image(part).cls for part in windows.split(128)])
        scores = cls @ text.T  # (M, A); the length of a token changes no rank
        rank = (scores > scores.gather(1, classes[:, None])).sum(dim=1)
        things = classes >= len(STUFF)
        shares = [
            round(100 * float((rank[group] < best).float().mean()), 1)
            for group in (things, ~things)
            for best in (1, 2)
        ]
        results[size] = shares
        print(f"{size:>6} {shares[0]:>14} {shares[1]:>10} {shares[2]:>13} {shares[3]:>6}")
    print(json.dumps(results))


def cut_windows(scenes: MiniWorld, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Windows (M, 3, size, size) in [0, 1] around every class of the first scenes, and classes."""
    windows, classes = [], []
    for index in range(count):
        image, labels = scenes[index]
        for value in labels.unique().tolist():
            if value == IGNORE_INDEX:
                continue
            pixels = (labels == value).nonzero()  # (n, 2)
            chosen = pixels[int(torch.randint(len(pixels), ()))]
            centre = pixels.float().mean(dim=0).long() if value >= len(STUFF) else chosen
            top, left = (centre - size // 2).clamp(0, labels.shape[0] - size).tolist()
            windows.append(image[:, top : top + size, left : left + size])
            classes.append(value)
    return torch.stack(windows).float() / 255, torch.tensor(classes)


if __name__ == "__main__":
    main()
