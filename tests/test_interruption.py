"""A command that was killed at any moment ends, run again, with the same bytes as one that nobody killed, and leaves no other file.

Killed is meant as `kill -9` means it: no handler runs and no buffer is written. A moment is right before one of the command's
own file system operations under its work directory, which Python's audit events announce; before a temporary file gets its name
it may also be cut in half, as a kill within the writing leaves it. Commands run in children of a server that has imported
everything once, so that one costs a fork and its work instead of seconds of imports.
"""

import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_models import save_model, write_rows

ROOT = Path(__file__).parents[1]
# What each command writes under the work directory, in the order of the road.
COMMANDS = {
    "prepare_instructions": "instructions",
    "generate_responses": "responses",
    "score_responses": "scores",
    "capture_teacher": "captures",
    "build_fusion_data": "fusion",
}
_IMPORTED_ONCE = [
    "megatron_fuse.pipeline",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mpt.modeling_mpt",
    "small_models",
]
_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def run_command(tool: str, recipe: Path, workdir: Path, kill_at: int, half: bool, operations: Synchronized) -> None:
    """In a child: the command as a shell would start it, killed before operation number `kill_at` (from 1; 0 = never)."""

    def watch(event: str, arguments: tuple) -> None:
        if event not in _OPERATIONS or not str(arguments[0]).startswith(str(workdir)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        operations.value += 1
        if operations.value == kill_at:
            if half and event == "os.rename":
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.argv = [tool, "--recipe", str(recipe)]
    sys.addaudithook(watch)
    runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")


class World:
    """Two models of two families and vocabularies, a judge, a recipe; every command has run once, undisturbed."""

    def __init__(self, root: Path) -> None:
        self.work, self.recipe = root / "work", root / "recipe.yaml"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(_IMPORTED_ONCE)
        models = {
            "alpha": save_model(root / "alpha", "llama", seed=0),
            "beta": save_model(root / "beta", "mpt", seed=1, vocab_size=340),
        }
        judge = save_model(root / "judge", "llama", reward=True)
        rows = [{"instruction": f"Add {i} and 1.", "output": f"That is {i + 1}, été 🙂"} for i in range(6)]
        recipe = {
            "workdir": str(self.work),
            "target": {"model": str(models["alpha"])},
            "sources": {name: {"model": str(path), "dtype": "fp32"} for name, path in models.items()},
            "reward_models": {"judge": {"model": str(judge), "dtype": "fp32"}},
            "data": {"path": str(write_rows(root / "data.jsonl", rows)), "shard_size": 2},
            "responses": {"max_new_tokens": 3},
            "schedule": {"preset": "profuser"},
            "training": {"seq_length": 120, "precision": "fp32"},
        }
        self.work.mkdir()
        self.recipe.write_text(yaml.safe_dump(recipe))
        self.operations = {tool: self.run(tool)[1] for tool in COMMANDS}
        self.undisturbed = {tool: self.files(tool) for tool in COMMANDS}

    def run(self, tool: str, kill_at: int = 0, half: bool = False) -> tuple[bool, int]:
        """Whether it was killed, and the number of operations it came to."""
        operations: Any = self.context.Value("i", 0)
        arguments = (tool, self.recipe, self.work, kill_at, half, operations)
        child = self.context.Process(target=run_command, args=arguments)
        child.start()
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL), f"{tool} ended with {child.exitcode}"
        return child.exitcode != 0, operations.value

    def files(self, tool: str) -> dict[str, bytes]:
        directory = self.work / COMMANDS[tool]
        return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("interruption"))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 21))])
@pytest.mark.parametrize("tool", COMMANDS)
def test_killed_and_run_again_ends_with_the_same_bytes(world: World, tool: str, seed: int) -> None:
    draw = random.Random(f"{tool} {seed}")
    shutil.rmtree(world.work / COMMANDS[tool])
    killed, at = world.run(tool, draw.randint(1, world.operations[tool]), half=draw.random() < 0.5)
    assert killed
    # Once more, in what is left to do or never: then the command has ended, and the last run finds all done.
    _, again = world.run(tool, draw.randint(1, world.operations[tool] - at + 1), half=draw.random() < 0.5)
    assert world.run(tool)[0] is False
    found, wanted = world.files(tool), world.undisturbed[tool]
    different = {name for name in found | wanted if found.get(name) != wanted.get(name)}
    assert not different, f"killed at operations {at} and {again} of {world.operations[tool]}"
