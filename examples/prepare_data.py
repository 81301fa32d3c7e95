"""Download and convert a benchmark, or check a data set.

    python examples/prepare_data.py voc        --root data/voc          #  3.4 GB to download
    python examples/prepare_data.py coco-stuff --root data/coco_stuff   # 20.9 GB
    python examples/prepare_data.py context    --root data/context      #  2.1 GB
    python examples/prepare_data.py voc        --root data/voc --check  # what is missing?
    python examples/prepare_data.py folder     --root my/photos --check # what is wrong?

A run that was interrupted goes on where it stopped when it is started again. Archives that you
have already belong into ROOT/archives, under their official names; unpacked official folders
(VOCdevkit, benchmark_RELEASE, train2017, val2017, stuffthingmaps, trainval) into ROOT itself. What
comes out is a data set in the folder format, see cliptteacher/data/folder.py: the official files,
links to them in images/, index PNGs in labels/, train.txt, val.txt and dataset.json.

The exit status is 0 if the data set is complete, 1 if not.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cliptteacher.command_line import number
from cliptteacher.data.benchmark import Benchmark
from cliptteacher.data.check import Report, check_benchmark, check_folder
from cliptteacher.data.coco_stuff import COCO_STUFF
from cliptteacher.data.pascal_context import PASCAL_CONTEXT
from cliptteacher.data.prepare import prepare_benchmark
from cliptteacher.data.voc import VOC

BENCHMARKS = {"voc": VOC, "coco-stuff": COCO_STUFF, "context": PASCAL_CONTEXT}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("kind", choices=(*BENCHMARKS, "folder"), help="folder: a data set of your own")
    add("--root", type=Path, required=True, help="folder of the data set")
    add("--check", action="store_true", help="change nothing; say what is missing or wrong")
    add("--mirror", metavar="URL", help="folder with the archives, tried before the official one")
    add(
        "--workers",
        type=number(int, 1),
        default=os.cpu_count() or 1,
        help="processes; default: all cores",
    )
    add("--delete-archives", action="store_true", help="delete each archive when it is unpacked")
    args = parser.parse_args(argv)
    if args.kind == "folder" and not args.check:
        parser.error("a data set of your own needs no preparation; add --check to have it checked")
    return args


def main(argv: list[str] | None = None, benchmarks: Mapping[str, Benchmark] = BENCHMARKS) -> int:
    args = parse_arguments(argv)
    progress = progress_line()
    if args.kind == "folder":
        return print_report(
            check_folder(args.root, workers=args.workers, progress=progress), args.root
        )
    benchmark = benchmarks[args.kind]
    if args.check:
        report = check_benchmark(benchmark, args.root, workers=args.workers, progress=progress)
        return print_report(report, args.root)
    print(f"{benchmark.name}: {benchmark.terms}")
    try:
        prepare_benchmark(
            benchmark,
            args.root,
            mirror=args.mirror,
            workers=args.workers,
            delete_archives=args.delete_archives,
            progress=progress,
        )
    except (OSError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    sizes = ", ".join(f"{count:,} images in {split}" for split, count in benchmark.counts.items())
    print(f"\n{args.root} is complete: {sizes}")
    recipe = f"{args.kind.replace('-', '_')}_segformer_b4"
    print(f"next: examples/train.py --recipe {recipe} --root {args.root} --dry-run")
    return 0


def print_report(report: Report, root: Path) -> int:
    """Print a report; returns the exit status."""
    print()
    for split, count in report.counts.items():
        print(f"{split}: {count:,} images")
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"problem: {problem}")
    print(f"{root}: {len(report.problems)} problems" if report.problems else f"{root} is complete")
    return 1 if report.problems else 0


def progress_line(seconds: float = 0.5) -> Callable[[str, int, int], None]:
    """Return a function that keeps one line on a terminal up to date, and is quiet in a log."""
    last = [0.0]

    def show(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        finished = done == total
        if not finished and now - last[0] < (seconds if sys.stdout.isatty() else 60 * seconds):
            return
        last[0] = now
        share = f" of {total:,} ({done / total:.0%})" if total else ""
        end = "\r" if sys.stdout.isatty() and not finished else "\n"
        print(f"{what}: {done:,}{share}".ljust(79), end=end, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
