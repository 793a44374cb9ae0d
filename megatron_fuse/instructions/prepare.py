"""The instructions stage: it samples examples, cuts them to length, splits them into shards and writes them.

Every later stage works on these examples in these shards.

instructions/examples.00000.jsonl ...   data.shard_size examples each, in the order of the user's file
instructions/examples.bad_rows.jsonl    {line, kind, reason}: rows that could not be used
instructions/examples.dropped.jsonl     {id, line, kind, reason}: examples that are too long, or have tools
                                        that a model cannot read
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np

from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.instructions.bad_rows import BadRow, Kind
from megatron_fuse.instructions.cleaning import Cleaning, is_in_nfc
from megatron_fuse.instructions.examples import Example
from megatron_fuse.instructions.length import fit, require_readable
from megatron_fuse.instructions.rows import Rows, read_rows
from megatron_fuse.instructions.tables import table_sha256
from megatron_fuse.progress import Progress, log_complete
from megatron_fuse.recipe import TARGET, Recipe
from megatron_fuse.recipe.stage_options import DataOptions
from megatron_fuse.stages import Context, Stage
from megatron_fuse.storage import (
    Artifact,
    ShardProgress,
    Shards,
    Workspace,
    completed,
    rank_and_world,
    run_plan,
    shard_bounds,
    write_jsonl,
)
from megatron_fuse.storage.records import read_typed_rows

logger = logging.getLogger(__name__)

_NAME = "examples"
# Options of `data` by the names under which the instructions record them.
_RECORDED = {
    "format": "format",
    "samples": "samples",
    "held_out": "validation_samples",
    "too_long": "too_long",
    "supervise": "supervise",
    "normalize": "normalize",
    "strip": "strip",
    "reasoning": "reasoning",
    "shard_size": "shard_size",
}


def instructions_options(recipe: Recipe) -> dict:
    """The options of the recipe that the instructions record."""
    data = recipe.data
    return {
        "seed": recipe.seed,
        "seq_length": recipe.training.seq_length,
        **{name: getattr(data, key) for name, key in _RECORDED.items()},
    }


# Instructions depend on the user's file and the target, not on the list of sources: a source may join later,
# and then leaves out what does not fit it. They are one unit of work, because the number of shards is known
# only after the examples are chosen.
INSTRUCTIONS = Stage(
    name="instructions",
    recorded_as="instructions",
    command="megatron-fuse prepare",
    keys=lambda _: [()],
    directory=lambda recipe: Workspace(recipe.workdir).instructions,
    options=instructions_options,
    formats=lambda context: context.target_hashes,
    origin=lambda context: {"data.path": table_sha256(context.recipe.data.path)},
    shard_names=(_NAME,),
)


def _by_rank(names: Iterable[str], seed: int, purpose: str) -> list[str]:
    """Ids in the order of a hash of seed, purpose and id.

    So a sample of the first ids does not depend on the order of rows, and a larger sample contains a smaller
    one.
    """
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest())


@dataclass(frozen=True)
class _Fitted:
    """The result of `fit` for an example, without its texts."""

    characters: int  # how many characters of the response fit
    truncated: bool
    target_tokens: int
    in_nfc: bool  # whether all texts of the assistant are in NFC

    def __call__(self, example: Example, *, is_validation: bool) -> Example:
        return replace(
            example,
            response=example.response[: self.characters],
            truncated=self.truncated,
            target_tokens=self.target_tokens,
            is_validation=is_validation,
        )


def _choose(
    context: Context, rows: Rows, formats: list[tuple[str, ChatFormat]]
) -> tuple[dict[str, _Fitted], dict[str, BadRow]]:
    """The sample, and the reasons why examples are left out for their length or their tools, both by id.

    It holds the texts of only one example at a time.
    """
    recipe, data = context.recipe, context.recipe.data
    fitted: dict[str, _Fitted] = {}
    dropped: dict[str, BadRow] = {}
    candidates = _by_rank(rows.lines, recipe.seed, "sample")
    wanted = data.samples or len(rows)
    reward_models = cache(lambda: _reward_model_formats(context))  # only for rows with tools
    # Examples that do not fit are replaced by the next ones in rank, until the sample is complete.
    with Progress(f"{data.path}: fitting to length", "examples", min(wanted, len(rows))) as progress:
        while candidates and len(fitted) < wanted:
            missing = wanted - len(fitted)
            for example in rows.read(candidates[:missing]):
                try:
                    result = fit(
                        example,
                        formats,
                        recipe.training.seq_length,
                        policy=data.too_long,
                        every_turn=rows.every_turn,
                    )
                    if example.uses_tools:
                        require_readable(result, reward_models())
                except BadRow as error:
                    dropped[example.id] = error.with_traceback(None)  # a traceback would keep the texts
                    continue
                fitted[example.id] = _Fitted(
                    len(result.response), result.truncated, result.target_tokens, is_in_nfc(example)
                )
                progress.update(len(fitted))
            candidates = candidates[missing:]
        progress.total = len(fitted)  # those that were dropped are not left
    if not fitted:
        name, reason = next(iter(dropped.items()))
        why = (
            "can be read" if reason.kind == Kind.TOOLS else f"fits --seq-length {recipe.training.seq_length}"
        )
        raise UserError(f"{data.path}: no example {why} ({name!r}: {reason})")
    if data.validation_samples >= len(fitted):
        raise UserError(
            f"data.validation_samples is {data.validation_samples}, but there are only {len(fitted)} "
            "examples, so none remains for training. Lower data.validation_samples."
        )
    return fitted, dropped


def _reward_model_formats(context: Context) -> list[ChatFormat]:
    """The chat formats of the reward models that will read conversations, if they are on this machine."""
    recipe, formats = context.recipe, []
    for name in dict.fromkeys(name for names in recipe.scorers.values() for name in names):
        options = recipe.reward_models.get(name)
        if options is None or options.scores:  # scores by the reference, or from a file
            continue
        try:
            formats.append(context.reward_model_format(name))
        except UserError as error:
            logger.warning(f"not known whether reward_models.{name} can read tools: {error}")
    return formats


def prepare_instructions(context: Context) -> Artifact | None:
    """Writes the instructions of a recipe. Rank 0 does all the work; on other ranks the result is None.

    Raises UserError if the file cannot be read, if no row can be used, if the validation split leaves no
    examples for training, or if selection chooses by_category and no example has a category.
    """
    recipe, plan = context.recipe, context.plan(INSTRUCTIONS)
    artifact = completed(plan)
    if artifact:
        log_complete(plan.directory, artifact.counts["examples"], "examples")
        _check_categories(recipe, artifact)
    if artifact or rank_and_world()[0] != 0:
        return artifact
    # The examples are chosen before anything is written, so that an error leaves no directory.
    rows = _usable_rows(recipe.data)
    formats = [(name, context.format(name)) for name in (TARGET, *recipe.sources)]
    fitted, dropped = _choose(context, rows, formats)
    validation_ids = set(_by_rank(fitted, recipe.seed, "held out")[: recipe.data.validation_samples])

    def make_shard(_: int, prefix: Path) -> dict[str, int]:
        examples = (
            fitted[example.id](example, is_validation=example.id in validation_ids)
            for example in rows.read(fitted)
        )
        sizes = np.diff(shard_bounds(len(fitted), recipe.data.shard_size))
        for shard, size in enumerate(sizes):
            path = prefix.with_name(f"{prefix.name}.{shard:05d}.jsonl")
            write_jsonl(path, (example.as_row() for example in islice(examples, size)))
        write_jsonl(prefix.with_name(f"{prefix.name}.bad_rows.jsonl"), rows.bad)
        left_out = (
            {"id": name, "line": line, "kind": dropped[name].kind, "reason": str(dropped[name])}
            for name, line in rows.lines.items()
            if name in dropped
        )
        write_jsonl(prefix.with_name(f"{prefix.name}.dropped.jsonl"), left_out)
        unreadable = sum(reason.kind == Kind.TOOLS for reason in dropped.values())
        return {
            "rows": len(rows) + len(rows.bad),
            "bad_rows": len(rows.bad),
            "leading_answers_left_off": rows.began_with_answer,
            "dropped_for_length": len(dropped) - unreadable,
            **({"dropped_for_tools": unreadable} if unreadable else {}),
            "examples": len(fitted),
            "held_out": len(validation_ids),
            "not_in_nfc": sum(not example.in_nfc for example in fitted.values()),
            "truncated": sum(example.truncated for example in fitted.values()),
            "target_tokens": sum(example.target_tokens for example in fitted.values()),
            "shards": len(sizes),
        }

    artifact = run_plan(plan, make_shard, ShardProgress(plan.directory, "examples", [len(fitted)]))
    if artifact:
        _warn_of_other_forms(artifact, formats)
        _check_categories(recipe, artifact)
    return artifact


def _usable_rows(data: DataOptions) -> Rows:
    """The rows of the user's file. Raises UserError if none of them can be used."""
    clean = Cleaning(nfc=data.normalize == "nfc", strip=data.strip, reasoning=data.reasoning)
    rows = read_rows(data.path, data.format, every_turn=data.supervise == "every_turn", clean=clean)
    if not rows:
        reason = f"line {rows.bad[0]['line']}: {rows.bad[0]['reason']}" if rows.bad else "the file is empty"
        raise UserError(
            f"{data.path}: none of its {len(rows.bad)} rows can be used in {rows.form} form ({reason})"
        )
    return rows


def _check_categories(recipe: Recipe, artifact: Artifact) -> None:
    """Checks what the rule by_category needs, before the sources answer for hours."""
    if "by_category" in recipe.rules_for_answers:
        require_categories(recipe, chain.from_iterable(example_shards(artifact)))


def require_categories(recipe: Recipe, examples: Iterable[Example]) -> None:
    """Raises UserError if no example has a category. Reads examples up to the first one that has."""
    if all(example.category is None for example in examples):
        raise UserError(
            f"{recipe.data.path}: no example has a category, but selection chooses by_category: add "
            "the key category to the rows, or choose another rule"
        )


def _warn_of_other_forms(artifact: Artifact, formats: list[tuple[str, ChatFormat]]) -> None:
    """Warns if responses are not in NFC and a model's tokenizer changes text to NFC."""
    composing = [name for name, chat in formats if chat.tokenizer.composes]
    if artifact.counts["not_in_nfc"] and composing:
        logger.warning(
            f"{artifact.counts['not_in_nfc']} of {artifact.counts['examples']} examples have responses that "
            f"are not in Unicode's form NFC, which {', '.join(composing)} would read as NFC when served: set "
            "data.normalize: nfc"
        )


def example_shards(artifact: Artifact) -> Shards[list[Example]]:
    """The examples by shard.

    Shard i of responses, scores and captures has the same examples in the same order.
    """
    paths = [artifact.directory / f"{_NAME}.{shard:05d}.jsonl" for shard in range(artifact.counts["shards"])]
    return Shards(artifact, paths, lambda path: list(read_typed_rows(path, Example)))


def shard_sizes(artifact: Artifact) -> list[int]:
    """The number of examples of every shard."""
    size, shards = artifact.manifest["options"]["shard_size"], artifact.counts["shards"]
    return [size] * (shards - 1) + [artifact.counts["examples"] - size * (shards - 1)]


def load_examples(artifact: Artifact) -> list[Example]:
    """All examples in order, in one list."""
    return [example for shard in example_shards(artifact) for example in shard]
