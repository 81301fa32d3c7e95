r"""Run every program of speed/ and write the table of speed.md: machine, versions, commit.

    pip install -e ".[bench]"
    python benchmarks/run.py --threads 1
    python benchmarks/run.py --only kmeans fusion --dry-run

A quarter of an hour on two cores. With one thread the times are the processor's, so that other
programs disturb them less. The last line is JSON, all rows of all programs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROGRAMS = (
    *("kmeans", "fusion", "losses", "metrics", "teacher", "students"),
    *("step", "inference", "loader", "growth"),
)
PEERS = (
    *("faiss-cpu", "scikit-learn", "torch-kmeans", "fast-pytorch-kmeans", "torchmetrics"),
    *("open_clip_torch", "transformers", "segmentation-models-pytorch"),
)
BEGIN, END = "<!-- table of run.py -->", "<!-- end of the table -->"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=PROGRAMS, metavar="NAME")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="leave the page as it is")
    args = parser.parse_args()
    began, rows = time.time(), []
    for name in args.only:
        rows += run(name, args.threads, args.rounds)
    text = describe(args.threads, time.time() - began) + "\n\n" + table(rows)
    print(text)
    if not args.dry_run:
        page = HERE / "speed.md"
        pattern = re.compile(f"(?<={BEGIN}\n).*(?=\n{END})", re.DOTALL)
        page.write_text(pattern.sub(lambda _: f"\n{text}\n", page.read_text()))
    print(json.dumps(rows))


def run(name: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Run one program in a process of its own and return its rows."""
    command = [sys.executable, "-W", "ignore", str(HERE / "speed" / f"{name}.py")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    output = subprocess.run(
        [*command, "--rounds", str(rounds)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    *lines, last = output.splitlines()
    print("\n".join(lines), flush=True)
    rows: list[dict[str, Any]] = json.loads(last)
    return rows


def describe(threads: int, seconds: float) -> str:
    """Say when, on what and with which versions the table was made."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, stdout=subprocess.PIPE, text=True
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *PEERS))
    return (
        f"{date.today()}, {processor()}, {threads} of {os.cpu_count()} cores, "
        f"{seconds / 60:.0f} minutes, commit {git.stdout.strip()}; {versions}."
    )


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each row: ours, the peers, the ratio of the best peer, the goal, the limit."""
    lines = ["| row | ours | peers | best peer / ours | goal | of the limit |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        (_, ours), *peers = row["values"].items()
        others = "; ".join(f"{name} {short(value)}" for name, value in peers)
        limit = "-" if row["floor"] is None else f"{row['floor'] / ours:.0%}"
        lines.append(
            f"| {row['row']} | {short(ours)} {row['unit']} | {others} | {row['ratio']:.2f} "
            f"| {row['goal']:.3g} | {limit} |"
        )
    return "\n".join(lines)


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
