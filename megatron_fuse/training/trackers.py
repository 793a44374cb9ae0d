"""TensorBoard, and Weights & Biases if asked for: they get the same numbers as metrics.jsonl."""

import importlib.util
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from megatron_fuse.errors import UserError


class Tracker(Protocol):
    def numbers(self, values: Mapping[str, float], iteration: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Numbers in a directory of TensorBoard.

    Those that an earlier run wrote after `continue_at` steps are hidden.
    """

    def __init__(self, directory: Path, *, continue_at: int) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=continue_at + 1 if continue_at else 0)

    def numbers(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name.replace(" ", "-"), value, iteration)

    def close(self) -> None:
        self._writer.close()


def check_wandb() -> None:
    """Raises UserError if Weights & Biases is not installed. Imports nothing."""
    if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "--wandb-project needs the package wandb. Run pip install wandb, or remove the option."
        )


class WeightsAndBiases:
    """A run of `wandb`. The package's environment variables work as usual:
    WANDB_MODE=offline, WANDB_API_KEY, WANDB_ENTITY.

    A continued training continues the same wandb run, whose id is in DIRECTORY/wandb_id.txt. Steps that run
    twice keep their first numbers, because wandb accepts no earlier step.
    """

    def __init__(
        self, directory: Path, *, project: str, name: str, config: Mapping[str, Any], continue_at: int
    ) -> None:
        check_wandb()
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        record = directory / "wandb_id.txt"
        if not (continue_at and record.exists()):
            record.write_text(secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=project,
            name=name,
            id=record.read_text().strip(),
            resume="allow",
            dir=str(directory),
            config=dict(config),
        )

    def numbers(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        self._run.finish()
