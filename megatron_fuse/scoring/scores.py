"""The scores stage: the score of each reward model for each answer.

    scores/NAME/REWARD_MODEL/shard-00000.npy    float32 [examples of the shard], in the order of the
                                                instructions

NAME: a source, or `target` if the target's own answers order the examples. NaN marks an answer without a
score, which cannot win: an empty answer, or a conversation longer than the reward model can read. An answer
that the limit of tokens cut off is scored as if it ended there, because the target would learn that text.

Backends: `hf`, the reward model in this process; `server`, a vLLM or SGLang; `file`, existing scores. All
answers to one example are scored together, so that their prompt is read once. For a source that joins later,
only its own answers are scored.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.reward_models import find_reward_model
from megatron_fuse.instructions import INSTRUCTIONS, Example, example_shards, naming_example, shard_sizes
from megatron_fuse.instructions.tables import table_sha256
from megatron_fuse.model.parameter_count import count_parameters
from megatron_fuse.recipe import REFERENCE, Recipe, ScoreFile
from megatron_fuse.recipe.lookup import reward_model_options
from megatron_fuse.responses import RESPONSES, Response, response_shards
from megatron_fuse.scoring.conversations import score_conversations
from megatron_fuse.scoring.given_scores import given_scores
from megatron_fuse.scoring.reward_models import RewardModel, load_reward_model
from megatron_fuse.scoring.served import ServedRewardModel
from megatron_fuse.stages import Amounts, Context, Key, Stage
from megatron_fuse.storage import Artifact, ShardProgress, Shards, Workspace, run_plans, temporary_then_rename
from megatron_fuse.text_safety import brief

# The name of this stage and of the scores against the ground truth (reference_scores.py). Both have the same
# command and form.
NAME = "scores"
COMMAND = "megatron-fuse score"

# (examples of a shard, {name: answers to them}) -> {name: float32 [n], NaN for an answer without a score}
Scorer = Callable[[list[Example], dict[str, list[Response]]], dict[str, np.ndarray]]


def _backend(recipe: Recipe, name: str) -> str:
    """`file` if the recipe names a score file for this reward model, `server` for a server, else `hf`."""
    options = reward_model_options(recipe, name)
    return "file" if options.scores else "server" if options.server else "hf"


def require_backend(recipe: Recipe, name: str, backend: str) -> None:
    """Raises UserError unless the recipe gives this reward model the same backend:
    all later stages follow the recipe."""
    if backend != (decided := _backend(recipe, name)):
        key = f"reward_models.{name}"
        fix = f"{key} names a model. Name a file in {key}.scores instead."
        if decided == "file":
            fix = f"{key}.scores names a file. Name a model in {key}.model instead."
        elif backend != "file":
            fix = f"{key}.server is {'set. Remove it' if backend == 'hf' else 'not set. Set it'}."
        raise UserError(f"--backend {backend}: {fix}")


def scores_options(recipe: Recipe, name: str) -> dict[str, Any]:
    """The options of the recipe that the scores of one reward model record."""
    options = reward_model_options(recipe, name)
    if options.scores:
        return {"backend": "file", **options.scores.model_dump(exclude={"path"})}
    if options.server:  # its address and the way to reach it do not change the rewards
        return {"backend": "server", **options.server.model_dump(include={"model", "engine", "endpoint"})}
    # Without batch_tokens and share_prompts: they change memory and speed, and the scores only by rounding.
    return {"backend": "hf", "dtype": options.dtype}


def _formats(context: Context, _: str, name: str) -> dict[str, str]:
    """The hashes of the reward model's tokenizer and chat format.

    Empty for scores from a file, which need no template.
    """
    if _backend(context.recipe, name) == "file":
        return {}
    chat = context.reward_model_format(name)
    return {"tokenizer": chat.tokenizer.sha256, "chat format": chat.sha256}


def _origin(context: Context, _: str, name: str) -> dict[str, str]:
    options = reward_model_options(context.recipe, name)
    given = options.scores
    if given is None:
        return {} if options.server else {"model": context.reward_model_fingerprint(name)}
    read = partial(table_sha256, given.path, f"reward_models.{name}.scores")
    return {"scores file": context.once("scores file", name, read)}


def _flops(context: Context, amounts: Amounts, _: str, name: str) -> float:
    """A reward model reads every answer once. Scores from a file or a server cost nothing here."""
    options = reward_model_options(context.recipe, name)
    if _backend(context.recipe, name) != "hf":
        return 0.0
    return 2 * count_parameters(find_reward_model(options, name).weights) * amounts.read("inference")


def _keys(recipe: Recipe) -> list[Key]:
    return [
        (name, scorer)
        for name, scorers in recipe.scorers.items()
        for scorer in scorers
        if scorer != REFERENCE
    ]


SCORES = Stage(
    name=NAME,
    recorded_as="scores",
    command=COMMAND + " --source {} --reward-model {}",
    keys=_keys,
    directory=lambda recipe, source, name: Workspace(recipe.workdir).scores(source, name),
    options=lambda recipe, _, name: scores_options(recipe, name),
    parents=lambda _, source, name: {"responses": (RESPONSES, (source,))},
    formats=_formats,
    origin=_origin,
    flops=_flops,
)


def score_responses(context: Context, name: str, sources: Sequence[str] | None = None) -> list[Artifact]:
    """Scores the answers of these sources (default: all models that answer) by one reward model. Loads it
    once, if there is work.

    Returns the finished artifacts. An artifact is missing if other ranks have not finished its shards. Raises
    UserError, which names source and example, for a score that is no finite number.
    """
    recipe = context.recipe
    instructions = context.open(INSTRUCTIONS)
    examples = example_shards(instructions)
    sources = list(recipe.answering if sources is None else sources)
    answers = {source: response_shards(context.open(RESPONSES, source)) for source in sources}
    plans = {source: context.plan(SCORES, source, name) for source in sources}

    progress = ShardProgress(f"reward_models.{name}", "answers", shard_sizes(instructions))

    # The model is loaded at the first shard that needs it.
    @cache
    def scorer() -> Scorer:
        options = reward_model_options(recipe, name)
        if options.scores:
            return _given(options.scores, name, plans, examples)
        if options.server:
            served = ServedRewardModel(options, name)
            rewards = partial(served.score, report=progress.update)
            return lambda shard, shard_answers: _score(served, rewards, shard, shard_answers)
        reward_model = load_reward_model(options, name)

        def rewards_here(groups: list[list[np.ndarray]], _: list[str]) -> list[np.ndarray]:
            return score_conversations(
                reward_model,
                groups,
                batch_tokens=recipe.scoring.batch_tokens,
                share_prompts=recipe.scoring.share_prompts,
                report=progress.update,
            )

        return lambda shard, shard_answers: _score(reward_model, rewards_here, shard, shard_answers)

    def make_shards(index: int, prefixes: dict[str, Path]) -> dict[str, dict[str, int]]:
        scores = scorer()(examples[index], {source: answers[source][index] for source in prefixes})
        return {source: save_shard(prefix, scores[source]) for source, prefix in prefixes.items()}

    return list(run_plans(plans, make_shards, progress).values())


def save_shard(prefix: Path, scores: np.ndarray) -> dict[str, int]:
    """Writes scores float32 [n] or [n, measures]; returns the counts for the manifest."""
    with (
        temporary_then_rename(prefix.with_name(f"{prefix.name}.npy")) as temporary,
        temporary.open("wb") as file,
    ):
        np.save(file, scores)
    return {"examples": len(scores), "unscored": int(np.isnan(scores.reshape(len(scores), -1)).all(1).sum())}


def _given(options: ScoreFile, name: str, sources: Iterable[str], examples: Shards[list[Example]]) -> Scorer:
    given = given_scores(options, f"reward_models.{name}.scores")
    for source in sources:
        given.check(source, chain.from_iterable(examples))
    return lambda shard, answers: {
        source: given.of_source(source, shard, answers[source]) for source in answers
    }


def _score(
    reward_model: RewardModel | ServedRewardModel,
    rewards_of: Callable[[list[list[np.ndarray]], list[str]], list[np.ndarray]],
    examples: list[Example],
    answers: dict[str, list[Response]],
) -> dict[str, np.ndarray]:
    """float32 [n] by source, NaN for an answer without a score.

    rewards_of(groups, names): the rewards of each group of encoded conversations, one group per example.
    """
    scores = {source: np.full(len(examples), np.nan, np.float32) for source in answers}
    groups = [
        _readable(reward_model, example, [answers[source][row] for source in answers])
        for row, example in enumerate(examples)
    ]
    rewards = rewards_of([list(group.values()) for group in groups], [example.id for example in examples])
    names = list(answers)
    for row, (group, values) in enumerate(zip(groups, rewards, strict=True)):
        for index, value in zip(group, values, strict=True):
            if not np.isfinite(value):
                raise UserError(
                    f"reward_models.{reward_model.name} gives {value} to the answer of {names[index]!r} to "
                    f"example {examples[row].id!r}. Its weights are damaged, or its dtype overflows. Set its "
                    "dtype to bf16 or fp32, or fetch the model again."
                )
            scores[names[index]][row] = value
    return scores


def _readable(
    reward_model: RewardModel | ServedRewardModel, example: Example, responses: Sequence[Response]
) -> dict[int, np.ndarray]:
    """Encoded conversations by the index of their answer in `responses`.

    Empty and too long ones are left out.
    """
    messages = example.prompt(reward_model.chat.system)
    with naming_example(example):
        encoded = {
            index: reward_model.encode(messages, response.response, example.tools)
            for index, response in enumerate(responses)
            if response.response.strip()
        }
    limit = reward_model.max_tokens or np.inf
    return {index: ids for index, ids in encoded.items() if len(ids) <= limit}


def load_scores(context: Context, source: str, name: str) -> np.ndarray:
    """float32 [examples], NaN without a score.

    Raises UserError if the scores are missing or were made by other options.
    """
    return read_shards(context.open(SCORES, source, name))


def read_shards(artifact: Artifact) -> np.ndarray:
    """The scores that save_shard wrote, all shards concatenated."""
    return np.concatenate([_read_shard(artifact.checked(path)) for path in artifact.files(".npy")])


def _read_shard(path: Path) -> np.ndarray:
    try:
        scores = np.load(path, allow_pickle=False)
        if scores.dtype != np.float32 or scores.ndim not in (1, 2):
            raise ValueError(f"the array is {scores.dtype} with {scores.ndim} dimensions")
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise UserError(
            f"{path}: not the scores of a shard ({brief(str(error))}). Remove the file and run {COMMAND} "
            "again."
        ) from error
    return scores
