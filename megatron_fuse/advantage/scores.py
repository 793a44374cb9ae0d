"""The scores stage: what every reward model thinks of every source's answers.

    scores/SOURCE/REWARD_MODEL/shard-00000.npy    float32 [examples of the shard], in the order of the instructions

NaN marks an answer that cannot be judged and so cannot win: an empty one, or a conversation longer than the judge can read.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from megatron_fuse.advantage.reward_models import RewardModel, load_reward_model
from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import Example, example_shards, open_instructions
from megatron_fuse.recipe import Recipe, RewardModelOptions
from megatron_fuse.responses import Response, open_responses, response_shards
from megatron_fuse.sources.huggingface import load_format, model_fingerprint, resolve_model
from megatron_fuse.storage import Artefact, Plan, Workspace, open_artefact, run_plan, temporary_then_rename

STAGE = "scores"
COMMAND = "tools/score_responses.py"


def _judge(recipe: Recipe, name: str) -> RewardModelOptions:
    if name not in recipe.reward_models:
        known = ", ".join(recipe.reward_models) or "none"
        raise UserError(f"reward_models: there is no {name!r}; the recipe has {known}")
    return recipe.reward_models[name]


def _plan(recipe: Recipe, source: str, name: str, chat: ChatFormat, responses: Artefact) -> Plan:
    options = _judge(recipe, name)
    inputs = {
        "responses": responses.sha256,  # which holds the hash of the instructions
        "tokenizer": chat.tokenizer.sha256,
        "chat format": chat.sha256,
        "model": model_fingerprint(resolve_model(options.model, f"reward_models.{name}.model")),
    }
    directory = Workspace(recipe.workdir).scores(source, name)
    return Plan(directory, STAGE, {"dtype": options.dtype}, inputs, shards=responses.manifest["shards"])


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
        responses = open_responses(recipe, source)
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


def load_scores(recipe: Recipe, source: str, name: str) -> np.ndarray:
    """float32 [examples], NaN for unjudged. Raises UserError where they are missing or belong to other answers."""
    command = f"{COMMAND} --source {source} --reward-model {name}"
    artefact = open_artefact(Workspace(recipe.workdir).scores(source, name), STAGE, command)
    found, wanted = artefact.manifest["inputs"]["responses"], open_responses(recipe, source).sha256
    if found != wanted:
        raise UserError(
            f"{artefact.directory} was made from answers {found[:12]}..., those of {source!r} are {wanted[:12]}...: "
            f"remove it and run {command} again"
        )
    return np.concatenate([np.load(path) for path in artefact.files(".npy")])
