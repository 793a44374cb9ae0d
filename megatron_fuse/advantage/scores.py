"""The scores stage: what every reward model thinks of everyone's answers.

    scores/NAME/REWARD_MODEL/shard-00000.npy    float32 [examples of the shard], in the order of the instructions

NAME: a source, or `target` where its own answers order the examples. NaN marks an answer that cannot be judged and so cannot win:
an empty one, or a conversation longer than the judge can read. An answer that the limit of tokens cut off is judged as if it had
ended there: it is what the example has of that source, and what would be learned from.

Backends: `hf`, the reward model in process; `file`, scores that exist already. All answers to one example are judged together, so
that their prompt is read once; a source that joins later has only its own judged.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fuse.advantage.given_scores import given_scores
from megatron_fuse.advantage.reward_models import (
    RewardModel,
    judge_fingerprint,
    load_judge_format,
    load_reward_model,
)
from megatron_fuse.advantage.scoring import score_conversations
from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import Example, example_shards, require_instructions
from megatron_fuse.instructions.tables import table_sha256
from megatron_fuse.progress import Progress, Report
from megatron_fuse.recipe import Recipe, RewardModelOptions
from megatron_fuse.responses import Response, open_responses, response_shards
from megatron_fuse.sources.huggingface import answering_options, fingerprint_if_here, load_format, recipe_key
from megatron_fuse.storage import Artefact, Plan, Shards, Workspace, open_artefact, run_plans, temporary_then_rename
from megatron_fuse.text_safety import brief, say

STAGE = "scores"
COMMAND = "tools/score_responses.py"
BACKENDS = ("hf", "file")

# (examples of a shard, {name: answers to them}) -> {name: float32 [n], NaN for what cannot be judged}
Scorer = Callable[[list[Example], dict[str, list[Response]]], dict[str, np.ndarray]]


def _judge(recipe: Recipe, name: str) -> RewardModelOptions:
    if name not in recipe.reward_models:
        known = ", ".join(recipe.reward_models) or "none"
        raise UserError(f"reward_models: there is no {name!r}; the recipe has {known}")
    return recipe.reward_models[name]


def _backend(recipe: Recipe, name: str) -> str:
    """`file` where the recipe names one for this reward model, else `hf`."""
    return "file" if _judge(recipe, name).scores else "hf"


def require_backend(recipe: Recipe, name: str, backend: str) -> None:
    """Raises UserError unless the recipe has this reward model's scores made so: all later stages go by the recipe."""
    if backend != _backend(recipe, name):
        key = f"reward_models.{name}"
        mend = f"{key} names a model: name a file in {key}.scores instead"
        if backend == "hf":
            mend = f"{key}.scores names a file: name a model in {key}.model instead"
        raise UserError(f"--backend {backend}: {mend}")


def _format(recipe: Recipe, name: str) -> ChatFormat | None:
    """None for scores from a file, in which no template has a share."""
    return load_judge_format(_judge(recipe, name), name) if _backend(recipe, name) == "hf" else None


def scores_options(recipe: Recipe, name: str) -> dict[str, Any]:
    """What one judge's scores record of the recipe."""
    options = _judge(recipe, name)
    if options.scores:
        return {"backend": "file", **options.scores.model_dump(exclude={"path"})}
    # Not batch_tokens and share_prompts: they are a matter of memory and speed; results agree to rounding.
    return {"backend": "hf", "dtype": options.dtype}


def _basis(recipe: Recipe, source: str, name: str, chat: ChatFormat | None) -> tuple[dict[str, Any], dict[str, str]]:
    """(options, inputs) of scores, all but the judge's weights or the file's content."""
    inputs = {"responses": open_responses(recipe, source).sha256}
    inputs |= {"tokenizer": chat.tokenizer.sha256, "chat format": chat.sha256} if chat else {}
    return scores_options(recipe, name), inputs


def _origin(recipe: Recipe, name: str) -> dict[str, str]:
    options = _judge(recipe, name)
    if options.scores:
        return {"scores file": table_sha256(options.scores.path, f"reward_models.{name}.scores")}
    return {"model": judge_fingerprint(options, name)}


def _plan(recipe: Recipe, source: str, name: str, chat: ChatFormat | None, origin: dict[str, str]) -> Plan:
    options, inputs = _basis(recipe, source, name, chat)
    shards = open_responses(recipe, source).manifest["shards"]
    return Plan(Workspace(recipe.workdir).scores(source, name), STAGE, options, inputs | origin, shards)


def plan_scores(recipe: Recipe, source: str, name: str) -> Plan:
    """What the scores of one source's answers, or the target's, by one reward model depend on. The answers must be there."""
    return _plan(recipe, source, name, _format(recipe, name), _origin(recipe, name))


def score_responses(
    recipe: Recipe, name: str, sources: Sequence[str] | None = None, progress: Callable[[str], None] = say
) -> list[Artefact]:
    """Lets one reward model judge the answers of these (default: of everyone who answers), loading it once, if there is work.

    Returns the finished artefacts: those of other ranks' unfinished shards are missing. Raises UserError for scores that are
    no finite numbers, naming source and example.
    """
    chat, origin = _format(recipe, name), _origin(recipe, name)
    examples = example_shards(require_instructions(recipe))
    answers, plans = {}, {}
    for source in recipe.answering if sources is None else sources:
        answers[source] = open_answers(recipe, source)
        plans[source] = _plan(recipe, source, name, chat, origin)

    lines = Progress(f"reward_models.{name}", "answers", progress)

    @cache  # not before there is work for it
    def scorer() -> Scorer:
        if chat is None:
            return _given(recipe, name, plans, examples)
        judge = load_reward_model(_judge(recipe, name), name)
        return lambda shard, given: _score(judge, recipe, shard, given, lines.update)

    def make_shards(index: int, prefixes: dict[str, Path]) -> dict[str, dict[str, int]]:
        score = scorer()
        lines.begin(f"shard {index}")
        scores = score(examples[index], {source: answers[source][index] for source in prefixes})
        return {source: save_shard(prefix, scores[source]) for source, prefix in prefixes.items()}

    return list(run_plans(plans, make_shards, progress).values())


def open_answers(recipe: Recipe, name: str) -> Shards[list[Response]]:
    """The answers of a source or the target by shard. Raises UserError unless they are those of its tokenizer and template and, on
    a machine that has its weights, of these."""
    options, where = answering_options(recipe, name), recipe_key(name)
    model = fingerprint_if_here(options, where)
    return response_shards(open_responses(recipe, name, chat=load_format(options, where), model=model))


def save_shard(prefix: Path, scores: np.ndarray) -> dict[str, int]:
    """Writes scores float32 [n] or [n, measures]; returns the counts for the manifest."""
    with temporary_then_rename(prefix.with_name(f"{prefix.name}.npy")) as temporary, temporary.open("wb") as file:
        np.save(file, scores)
    return {"examples": len(scores), "unscored": int(np.isnan(scores.reshape(len(scores), -1)).all(1).sum())}


def _given(recipe: Recipe, name: str, sources: Sequence[str], examples: Shards[list[Example]]) -> Scorer:
    given = given_scores(_judge(recipe, name).scores, f"reward_models.{name}.scores")
    for source in sources:
        given.check(source, chain.from_iterable(examples))
    return lambda shard, answers: {source: given.of(source, shard, answers[source]) for source in answers}


def _score(
    judge: RewardModel, recipe: Recipe, examples: list[Example], answers: dict[str, list[Response]], report: Report
) -> dict[str, np.ndarray]:
    """float32 [n] by source; NaN for what cannot be judged."""
    scores = {source: np.full(len(examples), np.nan, np.float32) for source in answers}
    groups = [
        _readable(judge, example, [answers[source][row] for source in answers]) for row, example in enumerate(examples)
    ]
    rewards = score_conversations(
        judge,
        [list(group.values()) for group in groups],
        batch_tokens=recipe.scoring.batch_tokens,
        share_prompts=recipe.scoring.share_prompts,
        report=report,
    )
    names = list(answers)
    for row, (group, values) in enumerate(zip(groups, rewards, strict=True)):
        for place, value in zip(group, values, strict=True):
            if not np.isfinite(value):
                raise UserError(
                    f"reward_models.{judge.name} gives {value} to the answer of {names[place]!r} to example "
                    f"{examples[row].id!r}: its weights are broken, or its dtype overflows (try bf16 or fp32)"
                )
            scores[names[place]][row] = value
    return scores


def _readable(judge: RewardModel, example: Example, responses: Sequence[Response]) -> dict[int, np.ndarray]:
    """Encoded conversations by the place of their answer among all; what is empty or too long to read is left out."""
    messages = example.prompt(judge.chat.system)
    encoded = {
        place: judge.encode(messages, response.response)
        for place, response in enumerate(responses)
        if response.response.strip()
    }
    limit = judge.max_tokens or np.inf
    return {place: ids for place, ids in encoded.items() if len(ids) <= limit}


def origin_if_here(recipe: Recipe, name: str) -> dict[str, str]:
    """What a judge's scores come from, for load_scores; nothing on a machine that has neither its weights nor its file."""
    try:
        return _origin(recipe, name)
    except (UserError, OSError):
        return {}


def load_scores(
    recipe: Recipe, source: str, name: str, chat: ChatFormat | None = None, origin: dict[str, str] | None = None
) -> np.ndarray:
    """float32 [examples], NaN for unjudged. chat, origin: the judge's format and origin_if_here, where the caller has them.

    Neither the judge's weights nor the file of scores are needed. Raises UserError where the scores are missing or were made otherwise.
    """
    options, inputs = _basis(recipe, source, name, chat or _format(recipe, name))
    inputs |= origin_if_here(recipe, name) if origin is None else origin
    command = f"{COMMAND} --source {source} --reward-model {name}"
    artefact = open_artefact(
        Workspace(recipe.workdir).scores(source, name), STAGE, command, options=options, inputs=inputs
    )
    return read_shards(artefact)


def read_shards(artefact: Artefact) -> np.ndarray:
    """What save_shard wrote, all shards on end."""
    return np.concatenate([_read_shard(artefact.checked(path)) for path in artefact.files(".npy")])


def _read_shard(path: Path) -> np.ndarray:
    try:
        scores = np.load(path, allow_pickle=False)
        if scores.dtype != np.float32 or scores.ndim not in (1, 2):
            raise ValueError(f"{scores.dtype} in {scores.ndim} dimensions")
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise UserError(
            f"{path}: not the scores of a shard ({brief(str(error))}): remove it and run {COMMAND} again"
        ) from error
    return scores
