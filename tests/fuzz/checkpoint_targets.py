"""Checkpoints as a resumed training reads them: with checksums, and with none, as --no-verify accepts."""

import shutil
import sys
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import torch
from campaign import FuzzTarget
from file_damage import Mutation, mutate
from rank_pool import RankPool

sys.path.append(str(Path(__file__).parents[1] / "training"))

from synthetic import SyntheticDataset, make_tiny_recipe, make_tiny_target

CHECKSUMS, CHECKPOINT = "checksums.json", Path("work/training/checkpoints/iter_0000001")


def _recipe(directory: Path) -> Any:
    parallel = {"use_distributed_optimizer": True}
    return make_tiny_recipe(
        directory / "work", directory / "target", parallel=parallel, training={"train_iters": 1}
    )


def _trainer(directory: Path) -> Any:
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.target import read_target
    from megatron_fuse.training.target import build_target
    from megatron_fuse.training.trainer import make_trainer

    recipe, runtime = _recipe(directory), start_runtime()
    target = read_target(recipe)
    return make_trainer(
        recipe, runtime, target.architecture, build_target(recipe, target), SyntheticDataset()
    )


def _train(directory: Path) -> None:
    from megatron_fuse.training.trainer import train

    train(_trainer(directory))


@cache
def _trained() -> Path:
    """A target and the checkpoint of its first step, which no target of a campaign damages."""
    directory = Path(tempfile.mkdtemp(prefix="fuzz-checkpoint-"))
    make_tiny_target(directory / "target")
    ranks = RankPool()
    ranks(1, _train, directory)
    ranks.close()
    return directory


def _make_seeds(directory: Path) -> None:
    shutil.copytree(_trained(), directory, dirs_exist_ok=True)


def _make_unverified_seeds(directory: Path) -> None:
    _make_seeds(directory)
    (directory / CHECKPOINT / CHECKSUMS).unlink()


@cache
def _trainer_of_this_process(directory: Path) -> Any:
    """The child reads undamaged files first."""
    return _trainer(directory)


def _load(directory: Path, *, verify: bool) -> str:
    """A hash of what a resumed training continues with."""
    from megatron_fuse.training.checkpoint import load_checkpoint

    trainer = _trainer_of_this_process(directory)
    for chunk in trainer.chunks:
        for parameter in chunk.parameters():
            torch.nn.init.zeros_(parameter)
    facts = load_checkpoint(
        directory / CHECKPOINT, trainer.chunks, trainer.optimizer, trainer.architecture, verify=verify
    )
    digest = sha256(repr((facts.iteration, facts.consumed_samples, facts.run)).encode())
    state = trainer.optimizer.chained_optimizers[0].optimizer.state
    moments = [value for of_one in state.values() for value in of_one.values() if torch.is_tensor(value)]
    for tensor in [*(p for chunk in trainer.chunks for p in chunk.parameters()), *moments]:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@cache
def _expected(directory: Path) -> str:
    return _load(directory, verify=True)


def _read(directory: Path) -> None:
    expected = _expected(directory)
    assert _load(directory, verify=True) == expected, "other weights, and no word about it"


def _read_unverified(directory: Path) -> None:
    _load(directory, verify=False)


def _change(path: Path, random: Random) -> Mutation:
    """What a checksum finds has no key."""
    found = mutate(path, random)
    return Mutation(found.file, f"file of a checkpoint, {found.what}")


_FILES = (f"{CHECKPOINT}/*",)

TARGETS = [
    FuzzTarget("checkpoint", _make_seeds, _read, _FILES, 0.5, _change),
    FuzzTarget("checkpoint-unverified", _make_unverified_seeds, _read_unverified, _FILES, 0.5),
]
