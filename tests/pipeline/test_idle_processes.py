"""Where a stage has fewer shards than processes, a line says so and names the data.shard_size that gives
each of them work.
"""

import re
from pathlib import Path

import pytest
from log_lines import logged
from small_models import save_model, small_recipe, write_rows

from megatron_fuse.claiming import LEASE
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.pipeline.idle_processes import idle_line, warn_of_idle_processes
from megatron_fuse.processes import STARTED
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.stages import Context


def recipe_of(tmp_path: Path, shard_size: int, model: str = "nowhere") -> Recipe:
    rows = [{"instruction": f"Add {i}.", "output": f"{i + 1}."} for i in range(14)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    return small_recipe(tmp_path / "w", data, Path(model), {"a": model}, data={"shard_size": shard_size})


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 14, 15, 100])
@pytest.mark.parametrize("shard_size", [1, 7, 512])
@pytest.mark.parametrize("examples", [1, 9, 14, 150, 5000])
def test_the_value_that_is_named_gives_every_process_a_shard(
    tmp_path: Path, examples: int, shard_size: int, processes: int
) -> None:
    def shards(size: int) -> int:
        return -(-examples // size)

    line = idle_line(recipe_of(tmp_path, shard_size), examples, processes)
    assert (line is None) == (shards(shard_size) >= processes)
    if line is None:
        return
    assert f"{processes - shards(shard_size)} of {processes} processes" in line
    if named := re.search(r"Set data\.shard_size to (\d+)", line):
        size = int(named[1])
        assert size < shard_size
        assert shards(size) >= min(processes, examples)
    else:
        assert (
            f"Start {shards(shard_size)} processes, because there are no more examples" in line
            and shards(shard_size) == examples
        )


def test_where_processes_do_not_take_shards_one_by_one_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, 7)
    assert idle_line(recipe, 14, 8)
    parallel = {"backend": "megatron", "parallel": {"tensor_model_parallel_size": 4}}
    divided = make_recipe(
        {**recipe.model_dump(mode="json"), "sources": {"a": {"model": "nowhere", **parallel}}}
    )
    assert idle_line(divided, 14, 8) is None
    monkeypatch.setenv(LEASE, "180")
    assert idle_line(recipe, 14, 8) is None


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "2", STARTED: "1"}, False),  # run_recipe.py has said it
    ],
)
def test_the_first_process_of_a_stage_says_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: bool
) -> None:
    recipe = recipe_of(tmp_path, 512, str(save_model(tmp_path / "model", "llama")))
    for key in ("RANK", "WORLD_SIZE", STARTED):
        monkeypatch.delenv(key, raising=False)
    prepare_instructions(Context(recipe))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with logged("warning") as text:
        warn_of_idle_processes(Context(recipe))
    said = text.getvalue().splitlines()
    assert len(said) == says
    assert all(
        "1 of 2 processes has no work" in line
        and f"shard_size to 7 or less. The prepared data keep their shards: remove {recipe.workdir}" in line
        for line in said
    )


def test_nothing_is_said_of_instructions_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with logged("warning") as said:
        warn_of_idle_processes(Context(recipe_of(tmp_path, 512)))
    assert said.getvalue() == ""
