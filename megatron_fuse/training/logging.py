"""One line per step in Megatron-LM's form, and the same numbers for metrics.jsonl,
TensorBoard and Weights & Biases."""

import logging
import math
import resource
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import torch

from megatron_fuse.recipe import Recipe
from megatron_fuse.storage import Workspace
from megatron_fuse.training.directories import metrics_directory
from megatron_fuse.training.loss import FIT
from megatron_fuse.training.metrics import METRICS, SAVED, STEP, VALIDATION, MetricsFile
from megatron_fuse.training.plan import PhasePlan, tokens_left
from megatron_fuse.training.timing import SAVE, STEP_TIMERS, StepTimers
from megatron_fuse.training.trackers import TensorBoard, Tracker, WeightsAndBiases, check_wandb

logger = logging.getLogger(__name__)

_FORMATS = {"loss": ".6E", "learning rate": ".6E"}  # as Megatron-LM prints them


class TrainingLog:
    """Prints and records on the one reporting rank.

    On the other ranks it only takes part in the collectives of `timers`.

    Nothing here waits for a GPU: all numbers are already on the host, and torch's memory statistics come from
    its allocator. With timers, an all-reduce collects their values whenever a line is printed.
    """

    def __init__(
        self,
        recipe: Recipe,
        plans: Sequence[PhasePlan],
        timers: StepTimers,
        *,
        ranks: int,
        peak_flops: float | None,
        active: bool,
    ) -> None:
        """ranks: number of ranks of the run. peak_flops: of one GPU; None: report no MFU. active: whether
        this is the reporting rank.

        Raises UserError on every rank if Weights & Biases is asked for and not installed.
        """
        if recipe.training.wandb_project:
            check_wandb()
        self.recipe, self.plans, self.timers = recipe, plans, timers
        self.ranks, self.peak_flops, self.active = ranks, peak_flops, active
        self.total_steps = plans[-1].last_iteration
        self.trackers: list[Tracker] = []
        self.skipped = 0
        self.restart_clock()

    def start(self, iteration: int) -> None:
        """Called once, with the iteration at which the run starts.

        Earlier records after that iteration are dropped.
        """
        if not self.active:
            return
        directory, options = metrics_directory(self.recipe), self.recipe.training
        self.metrics = MetricsFile(directory / METRICS, continue_at=iteration)
        self.skipped = self.metrics.skipped
        board = options.tensorboard_dir or Workspace(self.recipe.workdir).training / "tensorboard"
        self.trackers = [TensorBoard(board, continue_at=iteration)]
        if options.wandb_project:
            self.trackers.append(
                WeightsAndBiases(
                    directory,
                    project=options.wandb_project,
                    name=options.wandb_exp_name or self.recipe.workdir.resolve().name,
                    config=self.recipe.model_dump(mode="json", by_alias=True),
                    continue_at=iteration,
                )
            )
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts the measurement anew, after an evaluation or a checkpoint,
        whose time is no training time."""
        self.since, self.steps, self.tokens, self.flops = time.perf_counter(), 0, 0, 0.0
        self.timers.reset()

    def step(
        self,
        iteration: int,
        consumed_samples: int,
        phase: str,
        lr: float,
        values: Mapping[str, float],
        tokens: int,
        flops: float,
    ) -> None:
        """Records a step, and prints a line at every log_interval.

        iteration: steps done.
        values: those of reduce_report, `grad norm` and `padding`.
        tokens: input tokens of the step, without padding.
        flops: model FLOPs of the step, of all ranks.

        A step whose grad norm is not finite counts as skipped (guards.step_optimizer).
        """
        self.steps += 1
        self.tokens += tokens
        self.flops += flops
        self.skipped += not math.isfinite(values["grad norm"])
        prints = iteration % self.recipe.training.log_interval == 0 or iteration == self.total_steps
        speed, timed = (self._speed(), self._timed(*STEP_TIMERS)) if prints else ({}, {})
        if self.active:
            numbers = {"learning rate": lr, **values}
            counts = {
                "tokens": tokens,
                "skipped iterations": self.skipped,
                "consumed samples": consumed_samples,
            }
            self._record(STEP, iteration, {**numbers, **speed, **timed, **counts}, phase=phase)
            if prints:
                self._print(iteration, consumed_samples, phase, numbers, speed, timed)
        if prints:
            self.restart_clock()

    def _record(self, kind: str, iteration: int, numbers: Mapping[str, float], **words: str) -> None:
        self.metrics.write(kind, iteration, {**words, **numbers})
        for tracker in self.trackers:
            tracker.numbers(numbers, iteration)

    def _speed(self) -> dict[str, float]:
        """Speed and memory since the clock's last start."""
        elapsed = time.perf_counter() - self.since
        rate, flops = self.tokens / elapsed, self.flops / elapsed / self.ranks
        speed = {
            "milliseconds per iteration": 1000 * elapsed / self.steps,
            "tokens per second": rate,
            "tokens per second per GPU": rate / self.ranks,
            "TFLOP/s per GPU": flops / 1e12,
            "memory GiB": peak_memory() / 2**30,
        }
        return speed | ({"MFU": flops / self.peak_flops} if self.peak_flops else {})

    def _timed(self, *timers: str) -> dict[str, float]:
        """Seconds of a step by the timers, since the clock's last start."""
        return {name: seconds / self.steps for name, seconds in self.timers.seconds(*timers).items()}

    def _print(
        self,
        iteration: int,
        consumed_samples: int,
        phase: str,
        numbers: Mapping[str, float],
        speed: Mapping[str, float],
        timed: Mapping[str, float],
    ) -> None:
        rate = speed["tokens per second"]
        of_phase, of_run = (
            duration(left / rate if rate else 0) for left in tokens_left(self.plans, iteration)
        )
        parts = [
            f"iteration {iteration:8d}/{self.total_steps:8d}",
            f"consumed samples: {consumed_samples:12d}",
            f"phase: {phase}",
            f"elapsed time per iteration (ms): {speed['milliseconds per iteration']:.1f}",
            *(f"{name}: {value:{_FORMATS.get(name, '.4f')}}" for name, value in _of_a_line(numbers)),
            f"tokens/s: {rate:.0f}",
            f"tokens/s/GPU: {speed['tokens per second per GPU']:.0f}",
            f"TFLOP/s/GPU: {speed['TFLOP/s per GPU']:.4g}",
            *([f"MFU: {100 * speed['MFU']:.1f} %"] if "MFU" in speed else []),
            f"memory: {speed['memory GiB']:.2f} GiB",
            f"number of skipped iterations: {self.skipped}",
            f"ETA: {of_phase} phase, {of_run} run",
        ]
        logger.info(f" [{datetime.now():%Y-%m-%d %H:%M:%S}] " + " | ".join(parts))
        if timed:
            logger.info(f" time per iteration on the slowest rank (ms) | {_shown_times(timed)}")

    def evaluation(self, iteration: int, values: Mapping[str, float], examples: int) -> None:
        """Records and prints an evaluation. values: those of reduce_report on the validation examples,
        without the loss, and perplexity/MODE."""
        if self.active:
            self.metrics.write(VALIDATION, iteration, values)
            for tracker in self.trackers:
                tracker.numbers({f"held-out/{name}": value for name, value in values.items()}, iteration)
            shown = " | ".join(f"{name}: {value:.4f}" for name, value in _of_a_line(values))
            logger.info(f" validation at iteration {iteration} ({examples} examples) | {shown}")
        self.restart_clock()

    def saved(self, iteration: int) -> None:
        """Called after a checkpoint. Records its time, if there are timers."""
        timed = self.timers.seconds(SAVE)
        if timed and self.active:
            self._record(SAVED, iteration, timed)
            logger.info(
                f" saved at iteration {iteration}, time on the slowest rank (ms) | {_shown_times(timed)}"
            )
        self.restart_clock()

    def close(self) -> None:
        if self.active:
            self.metrics.close()
            for tracker in self.trackers:
                tracker.close()


def _of_a_line(values: Mapping[str, float]) -> list[tuple[str, float]]:
    """The values that are printed: all but FIT, which would give too many for each source."""
    return [(name, value) for name, value in values.items() if name.partition("/")[0] not in FIT]


def _shown_times(seconds: Mapping[str, float]) -> str:
    return " | ".join(f"{name.partition('/')[2]}: {1000 * value:.1f}" for name, value in seconds.items())


def peak_memory() -> int:
    """The most bytes that this process has held so far:
    of tensors on its GPU, or on a CPU of the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kibibytes


def duration(seconds: float) -> str:
    """Seconds as 1:02:03, with the number of days before it if there are any."""
    return str(timedelta(seconds=round(seconds)))
