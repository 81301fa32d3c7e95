"""Export every student and measure the files: size on disk, time, largest difference.

    python benchmarks/exported.py --students fpn_small segformer_b0 --output runs/exported
    python benchmarks/exported.py --output runs/exported              # all of them, hours
    python benchmarks/exported.py --table --output benchmarks/results # the table of export.md

Students have random weights, 512 channels and 20 classes; pictures are resized to fit into 160 x
107 and mirrored to a multiple of 32, so that every part of the program is at work. One process per
student runs `examples/export.py`. A student that exported.json holds already is passed over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cliptteacher.command_line import number
from cliptteacher.data.miniworld import CLASS_NAMES, MiniWorld
from cliptteacher.files import read_json, write_json
from cliptteacher.inference import save_segmenter
from cliptteacher.segmenters import build_segmenter, list_segmenters

EXPORT = Path(__file__).resolve().parents[1] / "examples" / "export.py"
CHANNELS = 512


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", nargs="+", default=list_segmenters())
    parser.add_argument("--pictures", type=number(int, 1), default=100)
    parser.add_argument("--table", action="store_true", help="print the table of exported.json")
    parser.add_argument("--output", type=Path, required=True, help="folder of exported.json")
    args = parser.parse_args(argv)
    path = args.output / "exported.json"
    rows = read_json(path) if path.exists() else {}
    if args.table:
        print(format_table(rows))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.students:
        if name not in rows:
            rows[name] = measure(name, args.pictures, args.output)
            write_json(rows, path)
            print(json.dumps({name: rows[name]}), flush=True)


def measure(name: str, pictures: int, folder: Path) -> dict[str, Any]:
    """Save a student of random weights, export it twice and return the figures; or the error."""
    torch.manual_seed(0)
    checkpoint, figures = folder / "student.pt", folder / "figures.json"
    save_segmenter(
        checkpoint,
        build_segmenter(name, CHANNELS),
        names=CLASS_NAMES,
        unseen=MiniWorld.unseen,
        text_features=torch.nn.functional.normalize(torch.randn(len(CLASS_NAMES), CHANNELS)),
        resize=(160, 107),
        size_divisor=32,
    )
    files = [str(folder / f"student{ending}") for ending in (".pt2", ".onnx")]
    command = [sys.executable, str(EXPORT), "--checkpoint", str(checkpoint), "--output", *files]
    command += ["--pictures", str(pictures), "--json", str(figures)]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        return {"error": said[-1]}
    return {"seconds": time.time() - start, **read_json(figures)}


def format_table(rows: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    lines = [
        "| student | MiB, .pt2 | MiB, ONNX | eager, ms | .pt2, ms | ONNX, ms "
        "| largest difference, .pt2 | ONNX | pixels with another label, .pt2 | ONNX |",
        "|" + "---|" * 10,
    ]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| `{name}` | {row['error']} |" + " |" * 8)
            continue
        traced, onnx = row[".pt2"], row[".onnx"]
        cells = [
            *(f"{kind['bytes'] / 2**20:.1f}" for kind in (traced, onnx)),
            f"{500 * (traced['eager'] + onnx['eager']):.0f}",
            *(f"{1000 * kind['seconds']:.0f}" for kind in (traced, onnx)),
            *(f"{kind['largest']:.1e}" for kind in (traced, onnx)),
            *(str(kind["pixels"]) for kind in (traced, onnx)),
        ]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
