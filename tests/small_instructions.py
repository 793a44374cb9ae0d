"""Instructions of a few rows, and a recipe over them."""

from pathlib import Path

from small_models import small_recipe, write_rows

from megatron_fuse.recipe import Recipe


def recipe_for(models: dict[str, Path], workdir: Path, rows: list[object], **sections: object) -> Recipe:
    data = write_rows(workdir / "data.jsonl", rows)
    sources = {name: models[name] for name in ("coarse", "bytes")}
    return small_recipe(workdir / "run", data, models["target"], sources, **sections)


def alpaca(number: int, **more: object) -> dict[str, object]:
    return {"id": f"e{number}", "instruction": f"Question {number}?", "output": f"Answer {number}.", **more}
