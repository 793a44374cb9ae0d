"""Every key of a recipe either changes nothing that a stage writes, or is noticed by that stage and by
those that build on it.
"""

import fnmatch
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from small_models import save_model, small_recipe, write_rows

from megatron_fuse.capture import capture
from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.scoring.scores import score_responses
from megatron_fuse.stages import Context

# What a stage's command does, where all that it needs is there
STAGES: dict[str, Callable[[Context], Any]] = {
    "instructions": prepare_instructions,
    "responses": lambda context: [generate_responses(context, name) for name in context.recipe.answering],
    "scores": lambda context: [
        score_responses(context, reward_model) for reward_model in context.recipe.voting_reward_models
    ],
    "captures": lambda context: [
        capture(context, source, mode)
        for source in context.recipe.sources
        for mode in context.recipe.modes_with_teacher
    ],
    "fusion": build_fusion_data,
    "training": lambda context: FusionDataset(context.recipe),
}


ALL = "instructions responses scores captures fusion training"
ANSWERS = "responses scores captures fusion training"
# Which of these commands notice that a key has another value than what is there was made with. Training runs
# where only fusion data is: it knows what tokenizers and weights gave, not these themselves, which the stages
# before it compare.
NOTICED = {
    "seed": ALL,
    "target.chat_template": ALL,
    "target.system": ALL,
    "sources.*.model": "responses scores captures fusion",
    "sources.*.chat_template": "responses scores captures fusion",
    "sources.*.system": "responses scores captures fusion",
    "sources.*.dtype": ANSWERS,
    "sources.*.backend": "captures fusion training",
    "sources.*.stop": ANSWERS,
    "sources.*.responses": ANSWERS,
    "sources.*.server": ANSWERS,
    "sources.*.captures": "captures fusion training",
    "reward_models.*.model": "scores fusion",
    "reward_models.*.chat_template": "scores fusion",
    "reward_models.*.system": "scores fusion",
    "reward_models.*.dtype": "scores fusion training",
    "reward_models.*.scores": "scores fusion training",
    "reward_models.*.server": "scores fusion training",
    "data.path": "instructions responses scores captures fusion",
    "data.*": ALL,
    "responses.batch_tokens": "",
    "responses.*": ANSWERS,
    "capture.batch_tokens": "",
    "capture.*": "captures fusion training",
    "alignment.*": "fusion training",
    "selection.*": "fusion training",
    "loss.teacher_temperature": "captures fusion training",
    "schedule.order": "fusion training",  # each order has a file of its own
    "training.seq_length": ALL,
}
# Keys that none of them notices, and why nothing that they write depends on it
WITHOUT = {
    "workdir": "where it all lies",
    "target.model": "its tokenizer and template count in all stages; its weights are those that training "
    "begins with",
    "target.*": "of the target's own answers, which this recipe does not use",
    "*.trust_remote_code": "allows the code that the weights' fingerprint covers",
    "*.device_map": "where a model runs",
    "sources.*.parallel.*": "where a model runs",
    "*.batch_tokens": "results agree to rounding",
    "scoring.share_prompts": "results agree to rounding",
    "reward_models.*.form": "auto names the same form",
    "reward_models.*.body": "of checkpoints without a tokenizer",
    "reference.*": "of selection.inference: reference, which this recipe does not use",
    "selection.strongest": "names the only reward model",
    "selection.reward_models": "names the only reward model",
    "schedule.*": "of training, where run_identity holds them",
    "loss.*": "of training, where run_identity holds what a step depends on",
    "parallel.*": "of training",
    "training.*": "of training, where run_identity holds what a step depends on",
    "export.*": "after training",
}
RUN_IDENTITY = {
    "seed",
    "loss.student_temperature",
    "loss.temperature_squared",
    "loss.teacher_temperature",
    "loss.tail",
    "schedule.order",
    "schedule.preset",
    "training.global_batch_size",
    "training.lr",
    "training.min_lr",
    "training.seed",
    "training.lr_decay_style",
    "training.lr_decay_iters",
    "training.lr_warmup_iters",
    "training.lr_warmup_fraction",
    "training.lr_wsd_decay_iters",
    "training.lr_wsd_decay_style",
    "training.weight_decay",
    "training.adam_beta1",
    "training.adam_beta2",
    "training.adam_eps",
    "training.clip_grad",
    "training.moe_aux_loss_coeff",
}


def keys_of(part: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a recipe that holds no further ones, with its value."""
    for name, field in type(part).model_fields.items():
        value, key = getattr(part, name), f"{prefix}{field.alias or name}"
        if isinstance(value, BaseModel):
            yield from keys_of(value, f"{key}.")
        elif isinstance(value, dict) and any(isinstance(inner, BaseModel) for inner in value.values()):
            for inner_name, inner in value.items():
                yield from keys_of(inner, f"{key}.{inner_name}.")
        else:
            yield key, value


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    directory = tmp_path_factory.mktemp("identity")
    rows = [{"instruction": f"Add {i} and {i + 1}.", "output": f"That makes {2 * i + 1}."} for i in range(7)]
    for name in ("data", "other-data"):
        write_rows(directory / f"{name}.jsonl", rows[len(name) > 4 :])
    for name, family in {"a": "llama", "b": "mpt", "target": "llama"}.items():
        save_model(directory / name, family, seed=ord(name[0]))
        save_model(directory / f"other-{name}", family, seed=1)
    for name in ("reward", "other-reward"):
        save_model(directory / name, "llama", seed=len(name), reward=True)
    write_rows(directory / "answers.jsonl", [{"id": "0", "response": "No."}])
    write_rows(directory / "scores.jsonl", [{"id": "0", "source": "a", "score": 1.0}])
    recipe = small_recipe(
        directory / "work",
        directory / "data.jsonl",
        directory / "target",
        {name: directory / name for name in "ab"},
        reward_models={"reward": {"model": str(directory / "reward"), "dtype": "fp32"}},
        schedule={"preset": "profuser"},
        responses={"max_new_tokens": 8},
    )
    for stage in STAGES.values():
        stage(Context(recipe))
    return recipe


def files(directory: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "recipe.yaml"
    }


def changed(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    content = recipe.model_dump(mode="json", by_alias=True)
    for key, value in values.items():
        part = content
        *path, last = key.split(".")
        for name in path:
            part = part[name]
        part[last] = value
    return make_recipe(content)


def matching(table: dict[str, str], key: str) -> str | None:
    return next((value for pattern, value in table.items() if fnmatch.fnmatchcase(key, pattern)), None)


def noticed_by(key: str) -> set[str]:
    """The commands of NOTICED; none for a key of WITHOUT.

    Fails for a key in neither: a new one is to be thought of.
    """
    if key in WITHOUT:
        return set()
    names = matching(NOTICED, key)
    if names is None:
        assert matching(WITHOUT, key), f"{key} is neither in NOTICED nor in WITHOUT"
    return set((names or "").split())


def other_values(recipe: Recipe, key: str, value: Any) -> dict[str, Any]:
    """The key, and what else has to change with it, with another value than the recipe's."""
    root = recipe.workdir.parent
    given = {
        "workdir": str(root / "elsewhere"),
        "reward_models.reward.scores": str(root / "scores.jsonl"),
        "data.path": str(root / "other-data.jsonl"),
        "data.samples": 5,
        "schedule.phases": None,
        "schedule.preset": "simulfuse",
        "schedule.order": "gt_length",
        "selection.sources": ["b"],
        "selection.reward_models": ["reward"],
        "selection.strongest": "reward",
        "selection.training_margin": {"at_least": 0.1},
        "selection.inference_margin": {"at_least": 1},
        "capture.temperatures": [1.0, 2.0],
        "loss.student_temperature": 1.0,  # by default that of the sources, 2.0
        "parallel.overlap_param_gather": False,
        "parallel.context_parallel_size": 1,
        "parallel.sequence_parallel": False,
        "parallel.virtual_pipeline_model_parallel_size": None,
        "parallel.num_layers_in_first_pipeline_stage": None,
        "parallel.num_layers_in_last_pipeline_stage": None,
        "parallel.account_for_embedding_in_pipeline_split": False,
        "parallel.account_for_loss_in_pipeline_split": False,
        # Of sources that Megatron reads, which these are not.
        **{
            f"sources.{name}.parallel.{size}_model_parallel_size": 1
            for name in "ab"
            for size in ("tensor", "pipeline", "expert")
        },
        **{f"sources.{name}.parallel.transformer_impl": "auto" for name in "ab"},
        "training.packing": False,
        "training.wandb_project": None,
        "reference.bertscore_model": None,
        "training.min_lr": 1e-6,
        "training.lr_decay_style": "linear",
        "training.lr_decay_iters": 40,
        "training.lr_warmup_fraction": 0.1,
        "training.lr_wsd_decay_style": "minus_sqrt",
        "training.exit_duration_in_mins": 1.0,
        "training.profile_ranks": [1],
        "export.checkpoint": "latest",
    }
    last = key.rpartition(".")[2]
    by_name = {
        "model": f"{root}/other-{Path(str(value)).name}",
        "chat_template": "alpaca",
        "system": "Be brief.",
        "dtype": "bf16" if value != "bf16" else "fp32",
        "stop": ["zz"],
        "responses": str(root / "answers.jsonl"),
        "server": {"url": "http://localhost:1/v1", "model": "served"},
        "captures": {"training": str(root / "answers.jsonl")},
        "form": "classifier",
        "body": None,
        "device_map": None,
        "path": str(root / "path"),
        "save": str(root / "save"),
        "load": str(root / "load"),
        "tensorboard_dir": str(root / "board"),
        "wandb_exp_name": "name",
        "backend": "megatron",
        "supervise": "last_turn",
        "too_long": "drop",
        "normalize": "nfc",
        "reasoning": "drop",
        "format": "alpaca",
        "filter": "hugging_face",
        "vocabulary_map": "em",
        "unmatched": "onehot",
        "training": "per_byte",
        "inference": "random",
        "without_bertscore": "renormalize",
        "implementation": "reference",
        "tail": "ignore",
        "transformer_impl": "local",
        "precision": "fp32",
        "order": "gt_length",
    }
    if key in given:
        other = given[key]
    elif last in by_name:
        other = by_name[last]
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, float):
        other = 0.75 * value or 0.5
    else:
        assert value is None or isinstance(value, int), f"{key} has no other value here"
        other = (value or 0) + 2
    wsd = {"training.lr_decay_style": "WSD", "training.lr_wsd_decay_iters": 2}
    besides = {
        "reward_models.reward.scores": {"reward_models.reward.model": None},
        "training.lr_warmup_fraction": {"training.lr_warmup_iters": 0},
        "training.moe_aux_loss_coeff": {"training.packing": True, "training.micro_batch_size": 1},
        "training.lr_wsd_decay_iters": wsd,
        "training.lr_wsd_decay_style": wsd,
    }
    return {**besides.get(key, {}), key: other}


def notices(stage: str, recipe: Recipe) -> bool:
    """Whether a stage that is done refuses the recipe, or makes something else of it."""
    before = files(recipe.workdir)
    try:
        STAGES[stage](Context(recipe))
    except UserError:
        return True
    after = files(recipe.workdir)
    for path in after.keys() - before.keys():
        path.unlink()
    for path in before.items() - after.items():
        path[0].write_bytes(path[1])
    return after != before


def stages_that_notice(recipe: Recipe) -> set[str]:
    return {stage for stage in STAGES if notices(stage, recipe)}


AT_ONCE = {
    "target.system",
    "sources.a.system",
    "reward_models.reward.system",
    "data.path",
    "capture.top_p",
    "sources.b.model",
}
KEYS = [
    key
    for key, _ in keys_of(
        small_recipe(Path(), Path(), Path(), {"a": "a", "b": "b"}, reward_models={"reward": {"model": "m"}})
    )
]


@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=[] if key in AT_ONCE else pytest.mark.slow) for key in KEYS if noticed_by(key)],
)
def test_a_key_that_counts_is_noticed_wherever_it_counts(made: Recipe, key: str) -> None:
    other = changed(made, other_values(made, key, dict(keys_of(made))[key]))
    assert other != made and stages_that_notice(other) == noticed_by(key)


def test_keys_that_do_not_count_are_noticed_nowhere_and_change_nothing(made: Recipe) -> None:
    values: dict[str, Any] = {}
    for key, value in keys_of(made):
        if not noticed_by(key) and key != "workdir":
            values |= other_values(made, key, value)
    del values["target.responses"]  # a file of answers, beside a server and texts to stop at
    assert not stages_that_notice(changed(made, values))
    # The same bytes again from nothing, but for keys that change the rounding
    rounding = ("batch_tokens", "share_prompts")
    exact = {key: value for key, value in values.items() if not key.endswith(rounding)}
    again = changed(made, {**exact, "workdir": str(made.workdir.parent / "again")})
    for stage in STAGES.values():
        stage(Context(again))
    expected, found = (
        {path.relative_to(of.workdir): content for path, content in files(of.workdir).items()}
        for of in (made, again)
    )
    assert expected == found


def test_what_a_step_depends_on_is_in_the_facts_of_a_run(made: Recipe) -> None:
    from megatron_fuse.runtime import enable_cpu_megatron

    enable_cpu_megatron()
    from megatron_fuse.training.resume import run_identity

    dataset, metadata = FusionDataset(made), run_identity(made, FusionDataset(made))
    found = set()
    for key, value in keys_of(made):
        other = changed(made, other_values(made, key, value))
        if run_identity(other, dataset) != metadata:
            found.add(key)
    assert found == RUN_IDENTITY
