"""Recipes with a model behind a server, and what such a run has answered and kept."""

import re
import traceback
from pathlib import Path
from typing import Any

import pytest
from local_server import Act, Asked, completion
from small_models import small_recipe, write_rows

from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import RESPONSES, Response, generate_responses, response_shards
from megatron_fuse.stages import Context

KEY = "sk-5ecretOfNobody/+=31"


def recipe_for(model: Path, workdir: Path, url: str, /, *, examples: int = 8, **options: Any) -> Recipe:
    """One model as two sources, `served` and `local`; questions `Q0 ...`, `Q1 ...`, every third with a system
    message.

    options: of the server; `stop`, `chat_template` and `directory` are the sources', `responses` and `data`
    sections of the recipe.
    """
    rows = [
        {"id": f"e{n}", "instruction": f"Q{n}" + " fig" * (n * 7 % 5), "output": "A."}
        for n in range(examples)
    ]
    for row in rows[::3]:
        row["system"] = "Be brief."
    workdir.mkdir(parents=True, exist_ok=True)
    data = write_rows(workdir / "data.jsonl", rows)
    source = {"model": str(options.pop("directory", model))}
    source |= {key: options.pop(key) for key in ("stop", "chat_template") if key in options}
    sections = {
        "responses": {"max_new_tokens": 12, "temperature": 0.0} | options.pop("responses", {}),
        "data": {"shard_size": 64} | options.pop("data", {}),
    }
    server = {"url": url, "model": "small", "timeout": 10, "max_retries": 2} | options
    sources = {"served": source | {"server": server}, "local": source | {"dtype": "fp32"}}
    recipe = small_recipe(workdir / "run", data, model, sources, **sections)
    prepare_instructions(Context(recipe))
    return recipe


def answers(recipe: Recipe, name: str = "served") -> dict[str, Response]:
    generate_responses(Context(recipe), name)
    return {row.id: row for shard in response_shards(Context(recipe).open(RESPONSES, name)) for row in shard}


def number(asked: Asked) -> int:
    """Of the example that a question comes from; -1 for the trial."""
    found = re.search(r"Q(\d+)", asked.question)
    return int(found[1]) if found else -1


def echo(asked: Asked) -> Act:
    return completion(f"answer {number(asked)}")


def journals(recipe: Recipe) -> list[Path]:
    return sorted((recipe.workdir / "responses/served").glob(".answers-*"))


def assert_nowhere(
    key: str, directory: Path, capfd: pytest.CaptureFixture, error: BaseException | None = None
) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if key.encode() in path.read_bytes()]
    assert key not in "".join(capfd.readouterr())
    if error:
        assert key not in "".join(traceback.format_exception(error))
