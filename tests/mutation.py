"""Mutation campaign: small wrong changes to the package, and which test notices each.

    python tests/mutation.py --output runs/mutation --jobs 2

A test suite that passes says little until it is seen to fail. Every mutant of `mutants.py` (a
swapped axis, another epsilon, a dropped detach, ...) is applied alone to a copy of the package and
its tests in a temporary directory; the tests named beside it must then fail there. The working
tree is only read.

1. the tests that are named are run once without a mutant: they must pass
2. each mutant is run; the first failing test is noted
3. ``mutation.json`` is written after each one, ``mutation.md`` at the end

A result stays valid until the mutant, the file it changes or its test files change, so a campaign
that was stopped goes on where it was, and a second one repeats only what may have changed. The
exit status is 1 if a mutant survives without a reason beside it.

Every mutant has a process of its own, forked from one that has imported the heavy packages: that
saves several seconds for each. Tests marked ``slow`` are left out.
"""

import argparse
import contextlib
import gc
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mutants import GROUPS

ROOT = Path(__file__).parent.parent
COPIED = ("cliptteacher", "tests", "examples", "pyproject.toml")
# Imported once by the process that all others are forked from; what is not installed is left out.
HEAVY = (
    *("torch", "torchvision", "pytest", "hypothesis", "regex", "ftfy"),
    *("open_clip", "transformers", "sklearn.cluster", "torchmetrics.classification"),
)


@dataclass(frozen=True)
class Mutant:
    """One wrong change.

    Args:
        file: path below ``cliptteacher/``.
        what: the change in a few words.
        old: text of the file, which must occur exactly once.
        new: what stands there instead.
        tests: names of the test files, without ``test_`` and ``.py``.
        select: pytest's ``-k`` expression; empty for all tests of the files.
        survives: why no test can notice it; empty if one must.
    """

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]
    select: str = ""
    survives: str = ""

    @property
    def title(self) -> str:
        """File and change; unique in the table."""
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class Result:
    """What became of a mutant; ``first_failure`` is empty if it survived."""

    first_failure: str
    seconds: float


class CampaignError(RuntimeError):
    """The campaign itself is wrong: a text does not occur, or tests fail without a mutant."""


def load_mutants() -> list[Mutant]:
    """Return the mutants of `mutants.py`, in order."""
    mutants = [
        Mutant(file, what, old, new, **{"tests": tests, **(extra[0] if extra else {})})
        for file, tests, changes in GROUPS
        for what, old, new, *extra in changes
    ]
    titles = [mutant.title for mutant in mutants]
    repeated = sorted({title for title in titles if titles.count(title) > 1})
    if repeated:
        raise CampaignError(f"each mutant must have a title of its own, got twice: {repeated}")
    return mutants


def mutate(mutant: Mutant, root: Path = ROOT) -> str:
    """Return the text of the changed file.

    Raises:
        CampaignError: if the old text does not occur exactly once, or nothing would change.
    """
    text = (root / "cliptteacher" / mutant.file).read_text(encoding="utf-8")
    found = text.count(mutant.old)
    if found != 1 or mutant.old == mutant.new:
        raise CampaignError(
            f"{mutant.title}: the old text must occur once and differ from the new one, "
            f"but it occurs {found} times; repair tests/mutants.py"
        )
    return text.replace(mutant.old, mutant.new)


def fingerprint(mutant: Mutant) -> str:
    """Return a digest of all that the result depends on: the mutant, its file and its tests."""
    digest = hashlib.sha256(json.dumps(asdict(mutant)).encode())
    digest.update((ROOT / "cliptteacher" / mutant.file).read_bytes())
    for test in mutant.tests:
        digest.update((ROOT / "tests" / f"test_{test}.py").read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def copy_of_tree(mutant: Mutant | None) -> Iterator[Path]:
    """Copy what the tests need to a temporary directory, with one mutant applied."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        root = Path(name).resolve()
        for item in COPIED:
            if (ROOT / item).is_dir():
                ignore = shutil.ignore_patterns("__pycache__", ".*")
                shutil.copytree(ROOT / item, root / item, ignore=ignore)
            else:
                shutil.copy(ROOT / item, root / item)
        if mutant is not None:
            path = root / "cliptteacher" / mutant.file
            path.write_text(mutate(mutant), encoding="utf-8")
        yield root


class FirstFailure:
    """A pytest plugin that notes the first test that fails, be it while it is collected."""

    def __init__(self) -> None:
        self.name = ""

    def note(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    pytest_runtest_logreport = note
    pytest_collectreport = note


def run_tests(mutant: Mutant, apply: bool, limit: int) -> Result:
    """Run the tests of a mutant in a copy of the tree; belongs into a process of its own.

    Args:
        mutant: names the tests.
        apply: whether to change the file.
        limit: seconds of processor time (or ten times as many on the clock) after which a mutant
            counts as noticed, because it hangs.
    """
    import hypothesis
    import pytest

    start = time.perf_counter()
    gc.freeze()  # what was imported before the fork is never searched for garbage: half the time
    # The same examples every time, none from an earlier failure, and no time spent on shrinking.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("campaign", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("campaign")
    failure, output = FirstFailure(), io.StringIO()
    with copy_of_tree(mutant if apply else None) as root:
        enter(root)
        start_timers(limit)
        files = [str(root / "tests" / f"test_{test}.py") for test in mutant.tests]
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"--rootdir={root}"]
        options += ["-c", str(root / "pyproject.toml"), "--tb=short", "--assert=plain"]
        options += ["-k", mutant.select] if mutant.select else []
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = pytest.main([*options, *files], plugins=[failure])
        hangs = not stop_timers()
        check_origin(root)
    if status == pytest.ExitCode.OK:
        return Result("", time.perf_counter() - start)
    if not failure.name and not hangs:
        raise CampaignError(f"{mutant.title}: pytest stopped:\n{output.getvalue()[-2000:]}")
    if not apply:
        raise CampaignError(
            f"the tests of {mutant.title} must pass without it:\n{output.getvalue()[-2000:]}"
        )
    return Result(failure.name or f"hangs: more than {limit} s", time.perf_counter() - start)


def enter(root: Path) -> None:
    """Make the copy the place that this process and its children import from."""
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True
    here = {str(ROOT), str(ROOT / "tests")}
    sys.path[:] = [str(root), *(path for path in sys.path if path not in here)]
    sys.modules.pop("mutants", None)


def check_origin(root: Path) -> None:
    """Refuse a run that tested another copy of the package, such as an installed one."""
    loaded = sys.modules.get("cliptteacher")
    if loaded is not None and not str(loaded.__file__).startswith(str(root)):
        raise CampaignError(f"the tests must import the copy in {root}, got {loaded.__file__}")


def start_timers(limit: int) -> None:
    """Interrupt this process when its time is over; a busy machine takes none of it away."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGPROF, interrupt)
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_PROF, limit)
    signal.setitimer(signal.ITIMER_REAL, 10 * limit)


def stop_timers() -> bool:
    """Stop both; return whether time was left on both."""
    left = [signal.setitimer(kind, 0)[0] for kind in (signal.ITIMER_PROF, signal.ITIMER_REAL)]
    return min(left) > 0


def start_pool(jobs: int) -> ProcessPoolExecutor:
    """Start processes that are forked from a warm one, a fresh process for every task."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(HEAVY))
    return ProcessPoolExecutor(jobs, context, max_tasks_per_child=1)


def check_baseline(pool: ProcessPoolExecutor, mutants: Sequence[Mutant], limit: int) -> None:
    """Run every set of tests that is needed once without a mutant."""
    needed = {(mutant.tests, mutant.select): mutant for mutant in mutants}
    waiting = {pool.submit(run_tests, mutant, False, limit): mutant for mutant in needed.values()}
    for done in as_completed(waiting):
        seconds, mutant = done.result().seconds, waiting[done]
        print(f"passes  {seconds:6.1f} s  {' '.join(mutant.tests)}  {mutant.select}", flush=True)


def run_campaign(
    mutants: Sequence[Mutant], output: Path, jobs: int, limit: int
) -> dict[str, dict[str, Any]]:
    """Run the mutants that have no valid result yet; return the records of all, by title."""
    path = output / "mutation.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    records = {
        mutant.title: old[mutant.title]
        for mutant in mutants
        if old.get(mutant.title, {}).get("fingerprint") == fingerprint(mutant)
    }
    pending = [mutant for mutant in mutants if mutant.title not in records]
    print(f"{len(mutants)} mutants, {len(pending)} to run", flush=True)
    with start_pool(jobs) as pool:
        check_baseline(pool, pending, limit)
        waiting: dict[Future[Result], Mutant] = {
            pool.submit(run_tests, mutant, True, limit): mutant for mutant in pending
        }
        for done in as_completed(waiting):
            mutant, result = waiting[done], done.result()
            records[mutant.title] = {**asdict(result), "fingerprint": fingerprint(mutant)}
            write(path, json.dumps(records, indent=1))
            verdict = "killed" if result.first_failure else "SURVIVED"
            print(f"{verdict:9}{result.seconds:6.1f} s  {mutant.title}", flush=True)
    return records


def write(path: Path, text: str) -> None:
    """Write a file under its name only when it is complete."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def in_table(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def describe(mutants: Sequence[Mutant], records: dict[str, dict[str, Any]]) -> str:
    """Write the results as Markdown: counts per file, survivors, then every mutant."""
    killed = [mutant for mutant in mutants if records[mutant.title]["first_failure"]]
    seconds = sum(records[mutant.title]["seconds"] for mutant in mutants)
    lines = [
        f"{len(mutants)} mutants, {len(killed)} killed, {len(mutants) - len(killed)} survive; "
        f"{seconds:.0f} seconds in all.",
        "",
        *("| file | mutants | killed |", "|---|---|---|"),
    ]
    for file in dict.fromkeys(mutant.file for mutant in mutants):
        own = [mutant for mutant in mutants if mutant.file == file]
        lines.append(in_table((f"`{file}`", len(own), sum(mutant in killed for mutant in own))))
    lines += ["", "| survivor | why |", "|---|---|"]
    survivors = [mutant for mutant in mutants if mutant not in killed]
    lines += [in_table((m.title, m.survives or "not explained")) for m in survivors]
    lines += ["", "| mutant | first test that fails | s |", "|---|---|---|"]
    for mutant in killed:
        record = records[mutant.title]
        test = record["first_failure"].removeprefix("tests/").split("[")[0]
        lines.append(in_table((mutant.title, f"`{test}`", f"{record['seconds']:.1f}")))
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "mutation")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at the same time")
    parser.add_argument("--limit", type=int, default=120, help="processor seconds for a mutant")
    parser.add_argument("--only", default="", help="mutants whose title contains this text")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in load_mutants() if arguments.only in mutant.title]
    for mutant in mutants:
        mutate(mutant)
    arguments.output.mkdir(parents=True, exist_ok=True)
    records = run_campaign(mutants, arguments.output, arguments.jobs, arguments.limit)
    report = describe(mutants, records)
    write(arguments.output / "mutation.md", report)
    print(report.split("\n| mutant")[0])
    unexplained = [
        m.title for m in mutants if not records[m.title]["first_failure"] and not m.survives
    ]
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
