"""One line a step in Megatron-LM's form, and the same numbers for TensorBoard."""

import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class TrainingLog:
    """Prints and records; exists on the one reporting rank, and does nothing on the others."""

    def __init__(self, tensorboard_dir: Path, *, total_steps: int, log_interval: int, active: bool) -> None:
        self.active = active
        self.total_steps = total_steps
        self.log_interval = log_interval
        self.tensorboard_dir = tensorboard_dir
        self.restart_clock()

    @cached_property
    def writer(self) -> SummaryWriter:
        """Made with the first number, so that a refused run leaves no empty file behind."""
        return SummaryWriter(str(self.tensorboard_dir))

    def restart_clock(self) -> None:
        """After an evaluation or a checkpoint, which are not training time."""
        self.since, self.steps, self.tokens = time.perf_counter(), 0, 0

    def step(
        self, iteration: int, consumed_samples: int, phase: str, lr: float, values: Mapping[str, float], tokens: int
    ) -> None:
        """iteration: steps done. values: loss, ce/MODE, kl/MODE, grad norm. tokens: input tokens of the step, padding left out."""
        if not self.active:
            return
        self.steps += 1
        self.tokens += tokens
        for name, value in {**values, "learning rate": lr, "consumed samples": consumed_samples}.items():
            self.writer.add_scalar(name.replace(" ", "-"), value, iteration)
        if iteration % self.log_interval and iteration != self.total_steps:
            return
        elapsed = time.perf_counter() - self.since
        seconds_per_step = elapsed / self.steps
        tokens_per_second = self.tokens / elapsed
        self.writer.add_scalar("tokens-per-second", tokens_per_second, iteration)
        left = timedelta(seconds=round(seconds_per_step * (self.total_steps - iteration)))
        parts = [
            f"iteration {iteration:8d}/{self.total_steps:8d}",
            f"consumed samples: {consumed_samples:12d}",
            f"phase: {phase}",
            f"elapsed time per iteration (ms): {1000 * seconds_per_step:.1f}",
            f"learning rate: {lr:.6E}",
            *(f"{name}: {value:.6E}" if name == "loss" else f"{name}: {value:.4f}" for name, value in values.items()),
            f"tokens/s: {tokens_per_second:.0f}",
            f"ETA: {left}",
        ]
        print(f" [{datetime.now():%Y-%m-%d %H:%M:%S}] " + " | ".join(parts), flush=True)
        self.restart_clock()

    def evaluation(self, iteration: int, values: Mapping[str, float], examples: int) -> None:
        """values: ce/MODE, kl/MODE, perplexity/MODE on the held-out examples."""
        if not self.active:
            return
        for name, value in values.items():
            self.writer.add_scalar(f"held-out/{name}", value, iteration)
        shown = " | ".join(f"{name}: {value:.4f}" for name, value in values.items())
        print(f" held-out at iteration {iteration} ({examples} examples) | {shown}", flush=True)
        self.restart_clock()

    def close(self) -> None:
        if self.active:
            self.writer.close()
