"""The data stages over two small models, and the commands that read what they made."""

import argparse
from pathlib import Path

import yaml
from jobs import Server, run_tool
from targets import Target

EXAMPLES = 8
# What each command writes under the work directory, and what reads it later, in the order of the road.
STAGES = {
    "prepare_instructions": ("instructions", "generate_responses"),
    "generate_responses": ("responses", "score_responses"),
    "score_responses": ("scores", "build_fusion_data"),
    "capture_teacher": ("captures", "build_fusion_data"),
    "build_fusion_data": ("fusion", "inspect_data"),
}
IMPORTED = (
    "megatron_fuse.pipeline",
    "megatron_fuse.responses",
    "megatron_fuse.report",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mpt.modeling_mpt",
    "matplotlib.pyplot",
)


def write_recipe(root: Path) -> Path:
    """Two sources of two families and vocabularies, a judge, one example a shard; returns the recipe's file."""
    from small_models import save_model, write_rows  # brings torch and transformers

    models = {
        "alpha": save_model(root / "alpha", "llama", seed=0),
        "beta": save_model(root / "beta", "mpt", seed=1, vocab_size=340),
    }
    judge = save_model(root / "judge", "llama", reward=True)
    rows = [{"instruction": f"Add {i} and 1.", "output": f"That is {i + 1}, été 🙂"} for i in range(EXAMPLES)]
    content = {
        "workdir": str(root / "work"),
        "target": {"model": str(models["alpha"])},
        "sources": {name: {"model": str(path), "dtype": "fp32"} for name, path in models.items()},
        "reward_models": {"judge": {"model": str(judge), "dtype": "fp32"}},
        "data": {"path": str(write_rows(root / "data.jsonl", rows)), "shard_size": 1},
        "responses": {"max_new_tokens": 3},
        "schedule": {"preset": "profuser"},
        "training": {"seq_length": 120, "precision": "fp32"},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start_server(recipe: Path) -> Server:
    """A process in which a job finds all modules imported, and the caches filled."""
    return Server(IMPORTED, _load_all, recipe)


def _load_all(path: Path) -> None:
    from megatron_fuse.advantage.reward_models import load_judge_format
    from megatron_fuse.recipe import add_recipe_arguments, recipe_from_arguments
    from megatron_fuse.sources.huggingface import load_causal_lm, load_format

    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    recipe = recipe_from_arguments(parser.parse_args(["--recipe", str(path)]))
    load_format(recipe.target, "target")
    for name, source in recipe.sources.items():
        load_format(source, f"sources.{name}")
        load_causal_lm(source, where=f"sources.{name}")
    for name, judge in recipe.reward_models.items():
        load_judge_format(judge, name)


def stage_targets(server: Server, recipe: Path) -> dict[str, Target]:
    """Every stage has run once, undisturbed. Beside them `report`, which writes no artefact."""
    work, scratch = recipe.parent / "work", recipe.parent / "scratch"
    for directory in (work, scratch):
        directory.mkdir()

    def target(tool: str, words: list[str], directory: str, ranked: bool = True) -> Target:
        arguments = (tool, [*words, "--recipe", str(recipe)])
        return Target(tool, run_tool, arguments, work / directory, work, scratch, server, ranked)

    targets = {tool: target(tool, [], directory).learn() for tool, (directory, _) in STAGES.items()}
    inspect = target("inspect_data", ["--verify"], "inspected", ranked=False)
    for tool, (_, reader) in STAGES.items():
        targets[tool].reader = targets.get(reader, inspect)
    for name in ("advantage", "alignment"):
        found = target("report", [name], f"reports/{name}", ranked=False)
        found.name = f"report {name}"
        targets[found.name] = found.learn()
    return targets
