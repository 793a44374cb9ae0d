"""The scores stage: what every reward model thinks of every source's answers.

    scores/SOURCE/REWARD_MODEL/shard-00000.npy    float32 [examples of the shard], in the order of the instructions

NaN marks an answer that cannot be judged and so cannot win: an empty one, or a conversation longer than the judge can read.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fuse.advantage.reward_models import RewardModel, load_reward_model
from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import Example, example_shards, open_instructions
from megatron_fuse.recipe import Recipe, RewardModelOptions
from megatron_fuse.responses import Response, open_responses, response_shards
from megatron_fuse.sources.huggingface import load_format, model_fingerprint, resolve_model, source_options
from megatron_fuse.storage import Artefact, Plan, Workspace, open_artefact, run_plan, temporary_then_rename

STAGE = "scores"
COMMAND = "tools/score_responses.py"


def _judge(recipe: Recipe, name: str) -> RewardModelOptions:
    if name not in recipe.reward_models:
        known = ", ".join(recipe.reward_models) or "none"
        raise UserError(f"reward_models: there is no {name!r}; the recipe has {known}")
    return recipe.reward_models[name]


def _basis(recipe: Recipe, name: str, responses: Artefact, chat: ChatFormat) -> tuple[dict[str, Any], dict[str, str]]:
    """(options, inputs) of scores, all but the judge's weights."""
    inputs = {
        "responses": responses.sha256,  # which holds the hash of the instructions
        "tokenizer": chat.tokenizer.sha256,
        "chat format": chat.sha256,
    }
    return {"dtype": _judge(recipe, name).dtype}, inputs


def _plan(recipe: Recipe, source: str, name: str, chat: ChatFormat, responses: Artefact) -> Plan:
    options, inputs = _basis(recipe, name, responses, chat)
    directory = resolve_model(_judge(recipe, name).model, f"reward_models.{name}.model")
    inputs["model"] = model_fingerprint(directory)
    shards = responses.manifest["shards"]
    return Plan(Workspace(recipe.workdir).scores(source, name), STAGE, options, inputs, shards)


def plan_scores(recipe: Recipe, source: str, name: str) -> Plan:
    """What the scores of one source's answers by one reward model depend on. The answers must be there."""
    chat = load_format(_judge(recipe, name), f"reward_models.{name}")
    return _plan(recipe, source, name, chat, open_responses(recipe, source))


def score_responses(
    recipe: Recipe, name: str, sources: Sequence[str] | None = None, progress: Callable[[str], None] = print
) -> list[Artefact]:
    """Lets one reward model judge the answers of these sources (default: all), loading it once, and only if there is work.

    Returns the finished artefacts: those of other ranks' unfinished shards are missing. Raises UserError for scores that are
    no finite numbers, naming source and example.
    """
    options = _judge(recipe, name)
    chat = load_format(options, f"reward_models.{name}")
    judge = cache(lambda: load_reward_model(options, name))
    examples = example_shards(open_instructions(recipe))
    finished = []
    for source in recipe.sources if sources is None else sources:
        source_chat = load_format(source_options(recipe, source), f"sources.{source}")
        responses = open_responses(recipe, source, chat=source_chat)
        shards = response_shards(responses)

        def make_shard(index: int, prefix: Path, source: str = source, shards: list = shards) -> dict[str, int]:
            scores = _score(judge(), examples[index], shards[index], recipe.scoring.batch_size, source)
            with (
                temporary_then_rename(prefix.with_name(prefix.name + ".npy")) as temporary,
                temporary.open("wb") as file,
            ):
                np.save(file, scores)
            return {"examples": len(scores), "unscored": int(np.isnan(scores).sum())}

        artefact = run_plan(_plan(recipe, source, name, chat, responses), make_shard, progress)
        if artefact:
            finished.append(artefact)
    return finished


def _score(
    judge: RewardModel, examples: list[Example], responses: list[Response], batch_size: int, source: str
) -> np.ndarray:
    """float32 [n]; NaN for what cannot be judged."""
    scores = np.full(len(examples), np.nan, dtype=np.float32)
    rows, conversations = [], []
    for row, (example, response) in enumerate(zip(examples, responses, strict=True)):
        if not response.response.strip():
            continue
        ids = judge.encode(example.prompt(judge.chat.system), response.response)
        if judge.max_tokens is None or len(ids) <= judge.max_tokens:
            rows.append(row)
            conversations.append(ids)
    if rows:
        scores[rows] = judge.score(conversations, batch_size)
        bad = next((row for row in rows if not np.isfinite(scores[row])), None)
        if bad is not None:
            raise UserError(
                f"reward_models.{judge.name} gives {scores[bad]} to the answer of {source!r} to example {examples[bad].id!r}: "
                "its weights are broken, or its dtype overflows (try bf16 or fp32)"
            )
    return scores


def load_scores(recipe: Recipe, source: str, name: str, chat: ChatFormat | None = None) -> np.ndarray:
    """float32 [examples], NaN for unjudged. chat: the judge's format, where the caller has it.

    Raises UserError where they are missing or were made otherwise.
    """
    command = f"{COMMAND} --source {source} --reward-model {name}"
    chat = chat or load_format(_judge(recipe, name), f"reward_models.{name}")
    options, inputs = _basis(recipe, name, open_responses(recipe, source), chat)
    directory = Workspace(recipe.workdir).scores(source, name)
    artefact = open_artefact(directory, STAGE, command, options=options, inputs=inputs)
    return np.concatenate([np.load(artefact.checked(path)) for path in artefact.files(".npy")])
