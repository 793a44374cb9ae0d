"""A world for the tests of capture: conversations of several turns in awkward characters, three sources
that have answered them.
"""

import shutil
from pathlib import Path

from small_fusion import SOURCES, fusion_recipe, save_models, write_data
from small_models import write_rows

from megatron_fuse.capture import CAPTURES, CaptureShard, capture_shard
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.stages import Context

TEXTS = [
    "Sure: the internationalization of 123 stations is 45.",
    "日本 and été are words.\n\n  Indented\ttext. 🙂👍🏽",
    "Yes.",
    "line one\r\nline two\r\n",
    "a NUL \0 in the text, and e\u0301 of two characters",
    " begins with a space, </s> and <|im_end|> as text ",
]
Models = dict[str, Path]


def world_recipe(root: Path, models: Models, **sections: object) -> Recipe:
    """Over the data that `build_world` put under root; every conversation fits."""
    return fusion_recipe(root, models, **{"training": {"seq_length": 255}, **sections})


def build_world(root: Path) -> tuple[Path, Models]:
    """(root, models): the stages before capture are done, in root/run.

    Of 13 examples every third has an earlier turn.
    """
    models = save_models(root / "models")
    write_data(root)  # the answers, of which some are empty, missing or truncated
    rows = []
    for n in range(13):
        earlier = [("user", f"First {n}?"), ("assistant", TEXTS[(n + 2) % len(TEXTS)])] if n % 3 == 0 else []
        turns = [*earlier, ("user", f"Question {n}?"), ("assistant", TEXTS[n % len(TEXTS)])]
        rows.append({"id": f"e{n}", "messages": [{"role": role, "content": text} for role, text in turns]})
    write_rows(root / "data.jsonl", rows)
    recipe = world_recipe(root, models)
    prepare_instructions(Context(recipe))
    for source in SOURCES:
        generate_responses(Context(recipe), source)
    return root, models


def fresh_recipe(world: tuple[Path, Models], directory: Path) -> Recipe:
    """The world's recipe in a workdir of its own."""
    root, models = world
    for name in ("instructions", "responses"):
        shutil.copytree(root / "run" / name, directory / "run" / name)
    return world_recipe(root, models).model_copy(update={"workdir": directory / "run"})


def changed(recipe: Recipe, **sections: object) -> Recipe:
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=value) for name, value in sections.items()}
    )


def read(recipe: Recipe, source: str, mode: str) -> list[CaptureShard]:
    artifact = Context(recipe).open(CAPTURES, source, mode)
    return [capture_shard(artifact, index) for index in range(artifact.manifest["shards"])]
