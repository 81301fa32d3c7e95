"""How a run ends before its time: by a signal, or by a loss that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from saving import Run
from torch.utils.data import DataLoader

from cliptteacher.data import TrainingStream
from cliptteacher.training.interruption import EXIT_CODE
from cliptteacher.training.nonfinite import NonFiniteStep

NAMED_SAMPLES = 8


def leave(step: int, run: Run) -> NoReturn:
    """End all processes after a signal and its checkpoint."""
    if run.process.is_main:
        print(
            f"stopped by a signal after step {step}, exit code {EXIT_CODE}; the same command with "
            f"--resume --output {run.output} goes on",
            flush=True,
        )
    raise SystemExit(EXIT_CODE)


def report_nonfinite(found: NonFiniteStep | None, stream: TrainingStream, run: Run) -> None:
    """Say which loss of which samples was not finite; ends the run unless it may be skipped."""
    if found is None:
        return
    where = "; ".join(
        f"{', '.join(terms)} on process {rank}, {name_samples(found.step, rank, stream, run)}"
        for rank, terms in found.terms.items()
        if terms
    )
    message = (
        f"iteration {found.step} was not finite: {where}. The weights did not move; "
        f"{found.count} such iterations so far, {found.allowed} may be skipped"
    )
    if found.is_fatal:
        advice = "lower --learning-rate, set --clip-gradient, or raise --skip-nonfinite"
        problem = f"error: {message}. The last checkpoint in {run.output} is good; {advice}"
        raise SystemExit(problem if run.process.is_main else 1)
    if run.process.is_main:
        print(f"warning: {message}", flush=True)


def name_dead_worker(loader: DataLoader[Any]) -> Iterator[Any]:
    """Pass batches on; if a worker was killed, say what it was making."""
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise  # an error inside a worker, which names its sample itself
        samples, stream = loader.dataset.in_the_making(), loader.dataset.stream
        names = [f"{n} (image {stream.dataset.image_name(stream.image_index(n))})" for n in samples]
        raise SystemExit(
            f"error: a data worker died while samples {_shorten(names) or '(none)'} were being "
            f"made; lack of memory is the usual reason, try fewer --workers"
        ) from error


def name_samples(step: int, rank: int, stream: TrainingStream, run: Run) -> str:
    """The counters of one process's samples in one iteration, and their images."""
    share = run.config.batch_size // run.process.world_size
    first = step * run.config.batch_size + rank * share
    names = [stream.dataset.image_name(stream.image_index(first + i)) for i in range(share)]
    return f"samples {first} to {first + share - 1} (images {_shorten(names)})"


def _shorten(names: Iterable[str]) -> str:
    shown = list(names)
    more = [f"and {len(shown) - NAMED_SAMPLES} more"] if len(shown) > NAMED_SAMPLES else []
    return ", ".join([*shown[:NAMED_SAMPLES], *more])
