"""Try generated bad input of every kind and print a table.

    python tests/hardening/run.py --cases 20000
    python tests/hardening/run.py --cases 500 --kinds pictures targets --seed 3

A violation is printed with the smallest input that shows it; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from calls import CALLS
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from judge import Draw, Kind, Violation, judge
from reading import READING
from weights import WEIGHTS

KINDS: dict[str, Kind] = {kind.__name__: kind for kind in (*READING, *WEIGHTS, *CALLS)}


def try_kind(kind: Kind, cases: int, folder: Path, number: int = 0) -> Counter[str]:
    """Try cases of one kind, each in an empty folder; counts "right", "refused", "violations"."""
    counts: Counter[str] = Counter()

    def attempt(data: st.DataObject) -> None:
        own = Path(tempfile.mkdtemp(dir=folder, prefix="case"))
        try:
            counts[judge(kind(Draw(data), own))] += 1
        finally:
            shutil.rmtree(own)

    run = settings(
        max_examples=cases, database=None, deadline=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )(seed(number)(given(st.data())(attempt)))  # fmt: skip
    try:
        run()
    except Exception as raised:
        found = getattr(raised, "exceptions", (raised,))  # of a group: several kinds of failure
        if not all(isinstance(error, Violation) for error in found):
            raise  # a mistake of the case itself
        for error in found:
            counts["violations"] += 1
            drawn = (note for note in getattr(error, "__notes__", ()) if note.startswith("Draw"))
            print(f"{kind.__name__}: {error}"[:500], *drawn, sep="\n  ", file=sys.stderr)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total: Counter[str] = Counter()
    began = time.monotonic()
    print("| kind | cases | right | refused | violations | seconds |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.kinds:
            started, missing = time.monotonic(), -(-args.cases // len(args.kinds))
            counts: Counter[str] = Counter()
            # A kind with few inputs is exhausted early: other seeds draw other tensors.
            for number in range(args.seed, args.seed + 50):
                tried = try_kind(KINDS[name], missing, Path(folder), number)
                counts += tried
                missing -= sum(tried.values())
                if missing <= 0 or tried["violations"]:
                    break
            total += counts
            row = (counts["right"], counts["refused"], counts["violations"])
            what = (KINDS[name].__doc__ or "").rstrip(".").split(";")[0]
            seconds = time.monotonic() - started
            print(
                f"| {what} | {sum(row)} | {' | '.join(map(str, row))} | {seconds:.0f} |", flush=True
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = (total.total(), *(total[name] for name in ("right", "refused", "violations")))
    print(f"| all | {' | '.join(map(str, row))} | {time.monotonic() - began:.0f} |")
    print(f"\nLargest memory: {peak:.1f} GiB")
    return 1 if total["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
