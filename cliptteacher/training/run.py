"""One training run: its directory, resuming, log, checkpoints, evaluation, and signals.

    run = TrainingRun(config, method, recipe, process, model, optimizer, scaler, student, evaluate)
    start = run.resume()
    for step, (images, labels) in run.steps(loader):
        ...                                  forward pass: run.add(losses); backward pass, update
        run.end_step(step, gradient_norm)    log line, checkpoint, evaluation, signal: when due
    run.finish()

The directory holds config.json, environment.json, metrics.jsonl, checkpoints/ and panels/. Every
process of the run calls the same methods; the main process prints and writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..checkpoint import newest_checkpoint, read_checkpoint, save_checkpoint
from ..distributed import (
    Process,
    from_main,
    gather_from_processes,
    launch_id,
    share_buffers,
    was_restarted,
)
from ..files import read_json, write_json
from .config import TrainConfig, config_as_dict
from .finite import FiniteCheck
from .interruption import EXIT_CODE, StopSignal
from .loading import move_batches, name_dead_worker, name_samples
from .progress import Progress, format_time
from .records import MetricsLog, as_json, default_output, describe_environment, hold, record_start

LAUNCH = "launch.json"  # which torchrun made the directory: a restarted attempt goes on there
# Fields that a resumed run may change; they take effect. Any other would make it another run.
_MAY_CHANGE = {
    *("output", "resume", "root", "device", "workers", "precision", "compile", "channels_last"),
    *("tensorboard", "log_interval", "checkpoint_interval", "eval_interval", "test_split"),
    *("eval_resize", "eval_size_divisor", "gamma", "dry_run"),
    *("iterations", "warmup", "learning_rate", "head_multiplier", "weight_decay"),
    *("clip_gradient", "accumulate", "sync_batch_norm", "segmenter_weights"),
}
Evaluate = Callable[[str, Path], dict[str, Any]]  # split and panel file -> scores, table


class TrainingRun:
    """Everything around the training loop that is no part of the method.

    Args:
        config: of the run.
        method: configuration of the model.
        recipe: its name, for the directory.
        process: this process.
        model: a ``CLIPTeacher``; its state dict is part of the checkpoints.
        optimizer: with groups of ``optimizer.parameter_groups``.
        scaler: of the loss, for fp16.
        student: gives what a checkpoint holds of the student, ``checkpoint.student_content``.
        evaluate: called with a split and the file of a panel; returns the scores in percent, and
            as "line" and "table" the texts to print on the way and at the end.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Any,
        recipe: str,
        process: Process,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        student: Callable[[], dict[str, Any]],
        evaluate: Evaluate,
    ) -> None:
        self.config, self.process, self.student, self._evaluate = config, process, student, evaluate
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.fields = config_as_dict(config, method)
        self.recipe = recipe
        self._lock: IO[str]  # of the main process, as long as it lives
        self.output = self._choose_output()
        self._finite = FiniteCheck(process.device, scaled=scaler.is_enabled())
        self._start = 0
        self._log: MetricsLog | None = None
        self._progress: Progress
        self._signal: StopSignal
        self._loader: DataLoader[Any]

    def resume(self) -> int:
        """Load the newest undamaged checkpoint, if there is one, and open the log.

        Returns:
            Iterations already done.

        Raises:
            SystemExit: every checkpoint is damaged, or is of another run than ``config`` asks for.
        """
        config, process = self.config, self.process
        torch.manual_seed(config.seed + 1000 * (process.rank + 1))  # dropout differs between ranks
        path = from_main(_find_checkpoint(self.output) if process.is_main else None)
        if isinstance(path, str):
            self._exit(path)
        if path is not None:
            self._load(read_checkpoint(path))
            self._print(f"resumed from step {self._start} in {self.output}")
        environment = describe_environment(process)  # of all processes
        if process.is_main:
            record = {"recipe": self.recipe, **self.fields}
            record_start(record, environment, self.output, self._start)
            log = self.output / "metrics.jsonl"
            self._log = MetricsLog(log, self._start, tensorboard=config.tensorboard)
        if self._is_due(self._start) and not self._was_scored("val", self._start):
            self._score("val", self._start)
        return self._start

    def steps(self, loader: DataLoader[Any]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield the number of every iteration and its batch (images, labels) on the device."""
        config, device = self.config, self.process.device
        self._loader = loader
        self._progress = Progress(
            config.iterations, self._start, config.batch_size, device, self._log
        )
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        batches = self._progress.time_batches(name_dead_worker(loader))
        with StopSignal() as self._signal:
            yield from enumerate(move_batches(batches, device, layout), self._start)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Take the losses of an iteration, or of a part of it, for the log; nothing waits."""
        self._progress.add(losses)
        self._finite.add(losses)

    def end_step(self, step: int, gradient_norm: Tensor) -> None:
        """Close an iteration: log, save, evaluate where that is due, and stop after a signal.

        Raises:
            SystemExit: a loss or gradient was not finite, or a signal came (after a checkpoint).
        """
        config, done = self.config, step + 1
        self._finite.end_step(step, gradient_norm)
        stopping, last = self._signal.agreed(), done == config.iterations
        logging = last or done % config.log_interval == 0
        saving = last or stopping or done % config.checkpoint_interval == 0
        if logging or saving:
            self._check_finite()
        if logging:
            line = self._progress.report(done, self.optimizer.param_groups[0]["lr"])
            if line is not None:
                print(line, flush=True)
        with self._progress.paused() if saving or self._is_due(done) else nullcontext():
            if saving:
                self._save(done)
            if stopping:
                self._leave(done)
            if self._is_due(done):
                self._score("val", done)

    def finish(self) -> dict[str, Any]:
        """Evaluate at the end; returns the scores in percent."""
        if self._start < self.config.iterations:
            self._print(f"trained in {format_time(self._progress.seconds)}, see {self.output}")
        return self._score(self.config.test_split, self.config.iterations, whole=True)

    def _is_due(self, done: int) -> bool:
        every = self.config.eval_interval
        return every > 0 and done > 0 and done % every == 0 and done < self.config.iterations

    def _score(self, split: str, step: int, whole: bool = False) -> dict[str, Any]:
        """Evaluate the student on all classes, every process its share."""
        share_buffers(self.model)
        scores = self._evaluate(split, self.output / "panels" / f"{split}_{step:08d}.png")
        self.model.train()
        table, line = scores.pop("table"), scores.pop("line")
        if self._log is not None:
            self._log.write({"step": step, "split": split, **scores})
        self._print(table if whole else f"{step:>6} {split}: {line}")
        return scores

    def _was_scored(self, split: str, step: int) -> bool:
        """Whether the log holds these scores: a run may have been killed before it had them."""
        found = False
        if self.process.is_main:
            rows = map(json.loads, (self.output / "metrics.jsonl").read_text().splitlines())
            found = any((row["step"], row.get("split")) == (step, split) for row in rows)
        return from_main(found)

    def _save(self, step: int) -> None:
        """Write a checkpoint; every process takes part. A full disk ends the run on all of them."""
        device, cuda = self.process.device, self.process.device.type == "cuda"
        state = self.model.state_dict()
        training = {
            "adapter": {k: value for k, value in state.items() if k.startswith("plm.")},
            "bank": {k: value for k, value in state.items() if k.startswith("glm.")},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": gather_from_processes(torch.get_rng_state(), device),
            "cuda_rng": gather_from_processes(torch.cuda.get_rng_state(device), device)
            if cuda
            else [],
        }
        content = {"step": step, **self.student(), "training": training, "config": self.fields}
        problem = ""
        if self.process.is_main:
            try:
                save_checkpoint(content, self.output / "checkpoints")
            except OSError as error:
                problem = f"error: {error.strerror or error}"
        problem = from_main(problem)
        if problem:
            self._exit(problem)

    def _load(self, content: dict[str, Any]) -> None:
        """Take everything over that ``_save`` has written."""
        self._check_same_run(content)
        training = content["training"]
        student = {f"segmenter.{name}": value for name, value in content["segmenter"].items()}
        self.model.load_state_dict({**student, **training["adapter"], **training["bank"]})
        options = [{k: v for k, v in g.items() if k != "params"} for g in self._groups()]
        self.optimizer.load_state_dict(training["optimizer"])
        for group, asked in zip(self._groups(), options, strict=True):
            group.update(asked)  # the learning rate that the configuration asks for
        if self.scaler.is_enabled() and training["scaler"]:
            self.scaler.load_state_dict(training["scaler"])
        self._restore_random_numbers(training)
        self._start = int(content["step"])

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _check_same_run(self, content: dict[str, Any]) -> None:
        """Refuse a checkpoint that these options would continue as something else."""
        now = self.student()
        pairs = [(name, content.get(name), now[name]) for name in ("class_names", "unseen")]
        stored = content.get("config", {})
        pairs += [
            (f"--{name.replace('_', '-')}", stored.get(name), value)
            for name, value in self.fields.items()
            if name not in _MAY_CHANGE
        ]
        for name, before, after in pairs:
            if as_json(before) != as_json(after):
                self._exit(
                    f"error: {self.output} was begun with {name} = {before} and cannot go on with "
                    f"{after}; keep it, or start another run with --output"
                )

    def _restore_random_numbers(self, training: dict[str, Any]) -> None:
        """Let dropout go on where it stopped, on every process."""
        process = self.process
        if len(training["rng"]) != process.world_size:
            self._print("warning: another number of processes than before: dropout starts anew")
            return
        torch.set_rng_state(training["rng"][process.rank])
        if process.device.type == "cuda" and training["cuda_rng"]:
            torch.cuda.set_rng_state(training["cuda_rng"][process.rank], process.device)

    def _check_finite(self) -> None:
        """End the run if a loss or gradient was not finite, and name terms and images."""
        found = self._finite.check()
        if found is None:
            return
        batch = self.config.batch_size
        share, stream = batch // self.process.world_size, self._loader.dataset.stream  # type: ignore[attr-defined]
        where = "; ".join(
            f"{', '.join(terms)} on process {rank}, "
            + name_samples(stream, found.step * batch + rank * share, share)
            for rank, terms in found.terms.items()
        )
        self._exit(
            f"error: iteration {found.step} was not finite: {where}. The last checkpoint in "
            f"{self.output} is good; go on from it with --resume and a lower --learning-rate, or "
            "set --clip-gradient"
        )

    def _choose_output(self) -> Path:
        """Take the run directory, the same on all processes; a used one needs `resume`."""
        found: Path | str = ""
        if self.process.is_main:
            try:
                found = self._take_output()
            except (OSError, ValueError) as error:
                found = str(error)
        found = from_main(found)
        if isinstance(found, str):
            self._exit(found)
        return found

    def _take_output(self) -> Path:
        config, restarted = self.config, was_restarted()
        output = Path(config.output) if config.output else None
        if output is None and restarted:
            output = _find_launched(Path("runs"), self.recipe)
        output = output or default_output(self.recipe)
        self._lock = hold(output)
        if (output / "checkpoints").exists() and not (config.resume or restarted):
            raise ValueError(
                f"{output} already holds a run; add --resume or choose another --output"
            )
        write_json({"launch": launch_id()}, output / LAUNCH)
        return output

    def _leave(self, step: int) -> NoReturn:
        """End all processes after a signal and its checkpoint."""
        self._print(
            f"stopped by a signal after step {step}, exit code {EXIT_CODE}; the same command with "
            f"--resume --output {self.output} goes on"
        )
        raise SystemExit(EXIT_CODE)

    def _exit(self, problem: str) -> NoReturn:
        raise SystemExit(problem if self.process.is_main else 1)

    def _print(self, line: str) -> None:
        if self.process.is_main:
            print(line, flush=True)


def _find_launched(folder: Path, recipe: str) -> Path | None:
    """The newest run directory that an earlier attempt of this torchrun made."""
    files = folder.glob(f"{recipe}-*/{LAUNCH}")
    own = [f.parent for f in files if read_json(f)["launch"] == launch_id()]
    return max(own, default=None)  # names end in the date


def _find_checkpoint(output: Path) -> Path | str | None:
    """The main process alone compares digests; what is wrong, as a sentence for all."""
    try:
        return newest_checkpoint(output / "checkpoints")
    except ValueError as error:
        return f"error: {error}"
