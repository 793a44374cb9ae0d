"""The data stages over two small models."""

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
_IMPORTED = (
    "megatron_fuse.pipeline",
    "megatron_fuse.responses",
    "megatron_fuse.report",
    "megatron_fuse.experiments",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mpt.modeling_mpt",
)


def start_server(root: Path) -> Server:
    """A process in which a job finds all modules imported, and the caches filled; it has made the models
    and ROOT/recipe.yaml.
    """
    return Server(_IMPORTED, _prepare, root)


def _prepare(root: Path) -> None:
    """Two sources of two families and vocabularies, a reward model, one example a shard."""
    from small_models import save_model, write_rows

    from megatron_fuse.huggingface.formats import load_format
    from megatron_fuse.huggingface.loading import load_causal_lm
    from megatron_fuse.recipe import make_recipe
    from megatron_fuse.scoring.reward_models import load_reward_model_format

    models = {
        "alpha": save_model(root / "alpha", "llama", seed=0),
        "beta": save_model(root / "beta", "mpt", seed=1, vocab_size=340),
    }
    reward_model = save_model(root / "reward", "llama", reward=True)
    rows = [{"instruction": f"Add {i} and 1.", "output": f"That is {i + 1}, été 🙂"} for i in range(EXAMPLES)]
    content = {
        "workdir": str(root / "work"),
        "target": {"model": str(models["alpha"])},
        "sources": {name: {"model": str(path), "dtype": "fp32"} for name, path in models.items()},
        "reward_models": {"reward": {"model": str(reward_model), "dtype": "fp32"}},
        "data": {"path": str(write_rows(root / "data.jsonl", rows)), "shard_size": 1},
        "responses": {"max_new_tokens": 3},
        "schedule": {"preset": "profuser"},
        "training": {"seq_length": 120, "precision": "fp32"},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = make_recipe(content)
    load_format(recipe.target, "target")
    for name, source in recipe.sources.items():
        load_format(source, f"sources.{name}")
        load_causal_lm(source, where=f"sources.{name}")
    for name, options in recipe.reward_models.items():
        load_reward_model_format(options, name)


def stage_targets(server: Server, root: Path) -> dict[str, Target]:
    """Every stage has run once, undisturbed."""
    for directory in (root / "work", root / "scratch"):
        directory.mkdir()
    targets = {
        tool: recipe_target(server, root, tool, [], directory).learn()
        for tool, (directory, _) in STAGES.items()
    }
    inspect = recipe_target(server, root, "inspect_data", ["--verify"], "inspected")
    for tool, (_, reader) in STAGES.items():
        targets[tool].reader = targets.get(reader, inspect)
    return targets


def recipe_target(server: Server, root: Path, tool: str, words: list[str], directory: str) -> Target:
    """A tool over the recipe of `start_server`, which writes WORKDIR/directory."""
    arguments = (tool, [*words, "--recipe", str(root / "recipe.yaml")])
    return Target(
        tool, run_tool, arguments, root / "work" / directory, root / "work", root / "scratch", server
    )
