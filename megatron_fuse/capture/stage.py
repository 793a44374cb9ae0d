"""The capture stage: a source reads every conversation once.

Only the logits of supervised positions are computed.

captures/SOURCE/training/     distributions over the ground-truth response
captures/SOURCE/inference/    distributions over the source's own answer

Backends: `hf`, the source's model in process; `file`, the file in sources.NAME.captures, which another
program made (docs/captures.md).
"""

from functools import cache
from pathlib import Path
from typing import Any

from megatron_fuse.capture.imported import CaptureFile
from megatron_fuse.capture.reading import SourceReader
from megatron_fuse.capture.shards import (
    CAPTURED,
    MISMATCH,
    MISSING,
    NO_RESPONSE,
    STATUSES,
    TOO_LONG,
    Conversation,
)
from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.limits import declared_vocab_size
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.instructions import INSTRUCTIONS, Example, example_shards, naming_example, shard_sizes
from megatron_fuse.model.parameter_count import count_parameters
from megatron_fuse.progress import log_complete
from megatron_fuse.recipe import MODES, Recipe
from megatron_fuse.recipe.lookup import recipe_key, source_options
from megatron_fuse.responses import RESPONSES, response_shards
from megatron_fuse.responses.answers import Learned, learned_of, learned_of_example
from megatron_fuse.stages import Amounts, Context, Key, Stage
from megatron_fuse.storage import Artifact, ShardProgress, Workspace, completed, run_plan, sha256_of_file
from megatron_fuse.tokenization.spans import SpanFlag


def _backend(recipe: Recipe, source: str, mode: str) -> str:
    """`file` if the recipe names a file for the mode, else `hf`: the source's model in process."""
    return "file" if mode in source_options(recipe, source).captures else "hf"


def _captures_file(recipe: Recipe, source: str, mode: str) -> Path:
    captures: dict[str, Path] = dict(source_options(recipe, source).captures.items())
    path = captures[mode]
    if not path.is_file():
        raise UserError(
            f"sources.{source}.captures.{mode}: {path} does not exist or is not a file. Name the file of "
            "the captures."
        )
    return path


def capture_options(recipe: Recipe, source: str, mode: str) -> dict[str, Any]:
    """The options of the recipe that one capture records."""
    backend = _backend(recipe, source, mode)
    options = {
        "mode": mode,
        "backend": backend,
        "seq_length": recipe.training.seq_length,
        **{key: getattr(recipe.capture, key) for key in ("top_k", "top_p", "filter")},
        "temperatures": recipe.capture_temperatures,
        # batch_tokens is not recorded: a run may continue with a
        # smaller budget. Results agree up to rounding.
    }
    if backend == "hf":
        options["dtype"] = source_options(recipe, source).dtype
    if mode == "training":
        options["supervise"] = recipe.data.supervise
    return options


def _parents(_: Recipe, source: str, mode: str) -> dict[str, tuple[Stage, Key]]:
    answers = {"responses": (RESPONSES, (source,))} if mode == "inference" else {}
    return {"instructions": (INSTRUCTIONS, ()), **answers}


def _formats(context: Context, source: str, _: str) -> dict[str, str]:
    chat = context.format(source)
    return {"tokenizer": chat.tokenizer.sha256, "chat format": chat.sha256}


def _origin(context: Context, source: str, mode: str) -> dict[str, str]:
    if _backend(context.recipe, source, mode) == "hf":
        return {"model": context.fingerprint(source)}
    path = _captures_file(context.recipe, source, mode)
    return {"captures file": context.once("captures file", str(path), lambda: sha256_of_file(path))}


def _flops(context: Context, amounts: Amounts, source: str, mode: str) -> float:
    if _backend(context.recipe, source, mode) == "file":
        return 0.0
    return 2 * count_parameters(context.model_directory(source)) * amounts.read(mode)


def _disk(recipe: Recipe, amounts: Amounts, _: str, mode: str) -> float:
    """Bytes on disk. With real text, the default filter keeps about 6 of 10 entries (8 bytes each).

    The other 26 bytes of a row are its token, places, log-probability and sums.
    """
    return (8 * 0.6 * recipe.capture.top_k + 26) * amounts.learned(mode)


CAPTURES = Stage(
    name="captures",
    recorded_as="capture",
    command="megatron-fuse capture --source {} --mode {}",
    keys=lambda recipe: [(source, mode) for source in recipe.sources for mode in recipe.modes_with_teacher],
    directory=lambda recipe, source, mode: Workspace(recipe.workdir).captures(source, mode),
    options=capture_options,
    parents=_parents,
    formats=_formats,
    origin=_origin,
    flops=_flops,
    disk=_disk,
)


def require_backend(recipe: Recipe, source: str, mode: str, backend: str) -> None:
    """Raises UserError if the recipe names another backend for this capture: later stages use the recipe."""
    if backend != _backend(recipe, source, mode):
        key = f"sources.{source}.captures.{mode}"
        what = (
            "is not set. Name a file there"
            if backend == "file"
            else "names a file. Remove it from the recipe"
        )
        raise UserError(f"--backend {backend}: {key} {what} (docs/captures.md).")


def capture(context: Context, source: str, mode: str) -> Artifact | None:
    """Captures one source's distributions in one mode. None while other ranks still work on their shards.

    Raises UserError if an earlier stage is missing, if the model's logits are not finite, or if the rows of a
    file of captures are not about the recipe's texts in the source's tokens.
    """
    if mode not in MODES:
        raise UserError(f"--mode is {mode!r}. Choose one of {', '.join(MODES)}.")
    recipe, where = context.recipe, recipe_key(source)
    options, chat = source_options(recipe, source), context.format(source)
    plan = context.plan(CAPTURES, source, mode)
    artifact = completed(plan)
    if artifact:
        log_complete(plan.directory, artifact.counts["examples"], "examples")
        return artifact
    instructions = context.open(INSTRUCTIONS)
    examples = example_shards(instructions)
    answers = response_shards(context.open(RESPONSES, source)) if mode == "inference" else None
    progress = ShardProgress(plan.directory, "examples", shard_sizes(instructions))

    @cache  # the model or file is loaded at the first shard that needs it
    def reader() -> SourceReader | CaptureFile:
        if plan.options["backend"] == "hf":
            return SourceReader(recipe, source, load_causal_lm(options, where=where), progress.update)
        path = _captures_file(recipe, source, mode)
        size = declared_vocab_size(context.model_directory(source))
        file = CaptureFile(recipe, path, chat.tokenizer, size or chat.tokenizer.vocab_size)
        if not any(example.id in file.rows for shard in examples for example in shard):
            raise UserError(
                f"{path}: none of its {len(file.rows)} ids is the id of an example (an id of an example is "
                f"{examples[0][0].id!r}). Name the file that was captured for these instructions."
            )
        return file

    possible = [CAPTURED, TOO_LONG, NO_RESPONSE]
    possible += [MISMATCH, MISSING] if plan.options["backend"] == "file" else []

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        every_turn = answers is None and recipe.data.supervise == "every_turn"
        shard_examples = examples[index]
        learned: list[Learned | None] = [None] * len(shard_examples)  # None: the ground truth
        if answers:
            learned = [learned_of(each, recipe.data.reasoning) for each in answers[index]]
        conversations = [
            conversation_of(chat, example, answer, every_turn=every_turn)
            for example, answer in zip(shard_examples, learned, strict=True)
        ]
        shard = reader().capture_shard(conversations)
        shard.save(prefix.with_name(prefix.name + ".safetensors"))
        return {
            "examples": len(shard.status),
            **{STATUSES[code]: int((shard.status == code).sum()) for code in possible},
            "rows": len(shard.counts),
            "lossy_rows": int(((shard.flags & SpanFlag.LOSSY) != 0).sum()),
            "entries": len(shard.entry_ids),
        }

    return run_plan(plan, make_shard, progress)


def conversation_of(
    chat: ChatFormat, example: Example, answer: Learned | None, *, every_turn: bool
) -> Conversation:
    """An example as the source reads it: with the answer, or with the ground truth if `answer` is None."""
    text, ends, thought = answer or learned_of_example(example)
    if not text.strip():
        return Conversation(example.id, None)
    messages = example.prompt(chat.system)
    with naming_example(example):
        encoded = chat.encode_conversation(
            messages, text, stop=ends, every_turn=every_turn, reasoning=thought, tools=example.tools
        )
    return Conversation(example.id, encoded)
