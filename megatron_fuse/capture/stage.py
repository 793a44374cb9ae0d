"""The capture stage: a source reads every conversation once.

Only the logits of supervised positions are computed.

captures/SOURCE/training/     distributions over the ground-truth response
captures/SOURCE/inference/    distributions over the source's own answer

Backends: `hf`, the source's model in process; `megatron`, the same model divided over the ranks of a job
(docs/large_sources.md); `server`, a vLLM or SGLang with the source's model; `file`, the file in
sources.NAME.captures, which another program made (docs/captures.md).
"""

import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from megatron_fuse.capture.imported import CaptureFile
from megatron_fuse.capture.megatron_layout import check_processes, source_architecture
from megatron_fuse.capture.reading import SourceReader
from megatron_fuse.capture.served import ServedReader
from megatron_fuse.capture.shards import (
    CAPTURED,
    MISMATCH,
    MISSING,
    NO_RESPONSE,
    STATUSES,
    TOO_LONG,
    CaptureShard,
    Conversation,
)
from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.limits import declared_positions, declared_vocab_size
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.instructions import INSTRUCTIONS, Example, example_shards, naming_example, shard_sizes
from megatron_fuse.model.parameter_count import count_parameters
from megatron_fuse.progress import log_complete
from megatron_fuse.recipe import MODES, Recipe
from megatron_fuse.recipe.lookup import recipe_key, source_options
from megatron_fuse.responses import RESPONSES, Response, response_shards
from megatron_fuse.responses.answers import Learned, learned_of, learned_of_example
from megatron_fuse.runtime import start_runtime
from megatron_fuse.stages import Amounts, Context, Key, Stage
from megatron_fuse.storage import (
    Artifact,
    Plan,
    ShardProgress,
    Workspace,
    completed,
    rank_and_world,
    run_plan,
    sha256_of_file,
)
from megatron_fuse.tokenization.spans import SpanFlag


def _backend(recipe: Recipe, source: str, mode: str) -> str:
    """`file` if the recipe names a file for the mode, else the backend of the source."""
    options = source_options(recipe, source)
    return "file" if mode in options.captures else options.backend


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
        # batch_tokens and the parallel layout are not recorded: a run may
        # continue with others. Results agree up to rounding.
    }
    if backend in ("hf", "megatron"):
        options["dtype"] = source_options(recipe, source).dtype
    # The address of a server and the way to reach it do not change what it knows, so they are not recorded.
    server = source_options(recipe, source).server
    if backend == "server" and server is not None:
        options |= server.model_dump(include={"model", "engine"})
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
    backend = _backend(context.recipe, source, mode)
    if backend == "server":  # its weights need not be here
        return {}
    if backend != "file":
        return {"model": context.fingerprint(source)}
    path = _captures_file(context.recipe, source, mode)
    return {"captures file": context.once("captures file", str(path), lambda: sha256_of_file(path))}


def _flops(context: Context, amounts: Amounts, source: str, mode: str) -> float:
    if _backend(context.recipe, source, mode) in ("file", "server"):
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
    expected = _backend(recipe, source, mode)
    if backend == expected:
        return
    key = f"sources.{source}.captures.{mode}"
    if backend == "file":
        fix = f"{key} is not set. Name a file there"
    elif expected == "file":
        fix = f"{key} names a file. Remove it from the recipe"
    else:
        fix = f"sources.{source}.backend is {expected}. Change it"
    raise UserError(f"--backend {backend}: {fix} (docs/captures.md).")


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
    backend = plan.options["backend"]
    # Ranks that hold a source together must agree on what is left to do: then only the leader looks.
    artifact = None if backend == "megatron" and rank_and_world()[1] > 1 else completed(plan)
    if artifact:
        log_complete(plan.directory, artifact.counts["examples"], "examples")
        return artifact
    instructions = context.open(INSTRUCTIONS)
    examples = example_shards(instructions)
    answers = response_shards(context.open(RESPONSES, source)) if mode == "inference" else None
    progress = ShardProgress(plan.directory, "examples", shard_sizes(instructions))

    def conversations(index: int) -> list[Conversation]:
        shard_answers = answers[index] if answers else None
        return shard_conversations(context, source, mode, examples[index], shard_answers)

    if backend == "megatron":
        return _capture_together(recipe, source, plan, conversations, progress)

    @cache  # the model or file is loaded, or the server reached, at the first shard that needs it
    def reader() -> SourceReader | ServedReader | CaptureFile:
        if backend == "hf":
            return SourceReader(recipe, source, load_causal_lm(options, where=where), progress.update)
        vocab_size = declared_vocab_size(context.model_directory(source)) or chat.tokenizer.vocab_size
        if backend == "server":
            positions = declared_positions(context.model_directory(source))
            return ServedReader(
                recipe,
                source,
                chat,
                plan.directory,
                vocab_size=vocab_size,
                positions=positions,
                report=progress.update,
            )
        path = _captures_file(recipe, source, mode)
        file = CaptureFile(recipe, path, chat.tokenizer, vocab_size)
        if not any(example.id in file.rows for shard in examples for example in shard):
            raise UserError(
                f"{path}: none of its {len(file.rows)} ids is the id of an example (an id of an example is "
                f"{examples[0][0].id!r}). Name the file that was captured for these instructions."
            )
        return file

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        return _write(reader().capture_shard(conversations(index)), prefix, backend)

    return run_plan(plan, make_shard, progress)


def _capture_together(
    recipe: Recipe,
    source: str,
    plan: Plan,
    conversations: Callable[[int], list[Conversation]],
    progress: ShardProgress,
) -> Artifact | None:
    """The shards of this rank's copy of a source in Megatron. Every rank of the job calls this.

    conversations: those of a shard. Returns the artifact on the leader that finished it, else None. Raises
    UserError if the model, its layout and the number of ranks do not fit together.
    """
    source_architecture(recipe, source)  # an error ends every rank here, before one waits for another
    check_processes(recipe, source, rank_and_world()[1])
    runtime = start_runtime(**source_options(recipe, source).parallel.sizes)
    # Megatron-core may only be imported once the runtime has prepared the process for a machine without CUDA.
    from megatron_fuse.capture.megatron_ranks import SourceRanks
    from megatron_fuse.capture.megatron_reading import MegatronReader

    ranks = SourceRanks.of(runtime)

    @cache
    def reader() -> MegatronReader:
        return MegatronReader.load(recipe, source, ranks, progress.update)

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        ranks.announce(index)
        return _write(reader().capture_shard(conversations(index)), prefix, "megatron")

    artifact = None
    if ranks.is_leader:
        artifact = run_plan(plan, make_shard, progress, ranks.share)
        ranks.dismiss()
    else:
        for index in ranks.announced():
            reader().take_part(conversations(index))
    ranks.leave()
    # Megatron's modules refer to each other in circles. The weights must be gone before the next are read.
    reader.cache_clear()
    gc.collect()
    return artifact


def _write(shard: CaptureShard, prefix: Path, backend: str) -> dict[str, int]:
    """Writes a shard's file. Returns its counts."""
    possible = [CAPTURED, TOO_LONG, NO_RESPONSE]
    possible += [MISMATCH, MISSING] if backend == "file" else []
    shard.save(prefix.with_name(prefix.name + ".safetensors"))
    return {
        "examples": len(shard.status),
        **{STATUSES[code]: int((shard.status == code).sum()) for code in possible},
        "rows": len(shard.counts),
        "lossy_rows": int(((shard.flags & SpanFlag.LOSSY) != 0).sum()),
        "entries": len(shard.entry_ids),
    }


def shard_conversations(
    context: Context, source: str, mode: str, examples: list[Example], answers: list[Response] | None
) -> list[Conversation]:
    """The examples of a shard as the source reads them. answers: the source's own, in mode inference."""
    recipe, chat = context.recipe, context.format(source)
    every_turn = mode == "training" and recipe.data.supervise == "every_turn"
    learned: list[Learned | None] = [None] * len(examples)  # None: the ground truth
    if answers is not None:
        learned = [learned_of(each, recipe.data.reasoning) for each in answers]
    return [
        conversation_of(chat, example, answer, every_turn=every_turn)
        for example, answer in zip(examples, learned, strict=True)
    ]


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
