"""Where numbers go besides the terminal and metrics.jsonl: TensorBoard, and Weights & Biases when asked."""

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
    """What an earlier run had written beyond `continue_at` steps is hidden."""

    def __init__(self, directory: Path, *, continue_at: int) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=continue_at + 1 if continue_at else 0)

    def numbers(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name.replace(" ", "-"), value, iteration)

    def close(self) -> None:
        self._writer.close()


def check_wandb() -> None:
    """Raises UserError where Weights & Biases is asked for and not installed; imports nothing."""
    if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb-project needs the package wandb: pip install wandb, or leave the option out")


class WeightsAndBiases:
    """A run of `wandb`, whose environment variables hold as everywhere: WANDB_MODE=offline, WANDB_API_KEY, WANDB_ENTITY.

    A continued run is the same run there: its id lies in DIRECTORY/wandb_id.txt. Steps that are done twice keep their first
    numbers, since wandb takes no step back.
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
