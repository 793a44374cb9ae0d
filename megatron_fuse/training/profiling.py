"""--profile: torch's profiler over some iterations and ranks, by Megatron-LM's options. Each of the ranks
writes one trace:

    DIRECTORY/profile/rank-0.iterations-10-11.pt.trace.json

DIRECTORY is that of metrics.jsonl. Perfetto, chrome://tracing and TensorBoard's profiler plugin show such a
file. It also holds the evaluations and saves between the steps.
"""

import logging
from types import TracebackType
from typing import Self

from torch.profiler import ProfilerAction, profile

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Recipe
from megatron_fuse.runtime import Runtime
from megatron_fuse.storage import temporary_then_rename
from megatron_fuse.training.directories import metrics_directory

logger = logging.getLogger(__name__)

TRACES = "profile"


def check_profile(recipe: Recipe, *, ranks: int, last_step: int) -> None:
    """Raises UserError if --profile names a rank that does not exist, or iterations after the last one."""
    options = recipe.training
    if not options.profile:
        return
    if (highest := max(options.profile_ranks)) >= ranks:
        raise UserError(f"--profile-ranks: there is no rank {highest}. Choose from 0 to {ranks - 1}.")
    if options.profile_step_start > last_step:
        raise UserError(
            f"--profile-step-start {options.profile_step_start} is after the last iteration of the run, "
            f"{last_step}. Choose an earlier iteration."
        )


class StepProfiler:
    """Records this rank's trace of --profile. It is a context around the loop over steps.

    done: steps done before the first `begin_step`. A run that starts or ends within the chosen iterations
    records those of them that it runs. The iteration before the first one is traced too and thrown away,
    because the start of tracing is slow. On other ranks, without --profile, and after the last chosen
    iteration it does nothing.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime, *, done: int) -> None:
        options = recipe.training
        self.runtime, self.directory = runtime, metrics_directory(recipe) / TRACES
        self.start, self.end = options.profile_step_start, options.profile_step_end
        self.first = max(self.start, done + 1)
        self.ranks = sorted(set(options.profile_ranks)) if options.profile and self.first < self.end else []
        self._profiler = None
        if runtime.rank in self.ranks:
            self._profiler = profile(schedule=self._action, on_trace_ready=self._write, record_shapes=True)
            self._profiler.step_num = done  # the trace then names iterations as the log does

    def _action(self, iteration: int) -> ProfilerAction:
        if iteration == self.end - 1:
            return ProfilerAction.RECORD_AND_SAVE
        if self.start <= iteration < self.end:
            return ProfilerAction.RECORD
        return ProfilerAction.WARMUP if iteration == self.start - 1 else ProfilerAction.NONE

    def _write(self, profiler: profile) -> None:
        last = min(profiler.step_num, self.end - 1)
        path = self.directory / f"rank-{self.runtime.rank}.iterations-{self.first}-{last}.pt.trace.json"
        with temporary_then_rename(path) as temporary:
            profiler.export_chrome_trace(str(temporary))

    def __enter__(self) -> Self:
        if self.ranks:
            whose = ", ".join(map(str, self.ranks))
            logger.info(
                f"profiling iterations {self.first} to {self.end - 1} on rank {whose}: traces go to "
                f"{self.directory}"
            )
        if self._profiler:
            self._profiler.start()
        return self

    def begin_step(self) -> None:
        """Every rank must call it before every step."""
        if self._profiler:
            self._profiler.step()
            if self._profiler.step_num >= self.end:
                self._stop()

    def _stop(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._profiler = None

    def __exit__(self, failed: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._profiler:
            if failed:  # no trace then: an error of writing it would hide the first one
                self._profiler.on_trace_ready = None
            self._stop()
