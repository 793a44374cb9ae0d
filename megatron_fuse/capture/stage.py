"""The capture stage: a source reads every conversation once, and only supervised positions leave the model.

captures/SOURCE/training/    over the ground-truth response      captures/SOURCE/inference/    over the source's own answer

Backends: `hf`, the source's model in process; `file`, what sources.NAME.captures names, made elsewhere (docs/captures.md).
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from megatron_fuse.capture.imported import CaptureFile
from megatron_fuse.capture.reading import SourceReader
from megatron_fuse.capture.shards import CAPTURED, MISMATCH, MISSING, NO_RESPONSE, STATUSES, TOO_LONG, Conversation
from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import Example, example_shards, open_instructions, require_instructions
from megatron_fuse.progress import Progress
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import open_responses, response_shards
from megatron_fuse.responses.answers import Learned, learned_of, learned_of_example
from megatron_fuse.sources.huggingface import (
    declared_vocab_size,
    load_causal_lm,
    load_format,
    model_fingerprint,
    resolve_model,
    source_options,
)
from megatron_fuse.storage import Artefact, Plan, Workspace, completed, open_artefact, run_plan, sha256_of_file
from megatron_fuse.text_safety import say
from megatron_fuse.tokenization.spans import SpanFlag

STAGE = "capture"
MODES = ("training", "inference")
COMMAND = "tools/capture_teacher.py"
BACKENDS = ("hf", "file")


def _command(source: str, mode: str) -> str:
    return f"{COMMAND} --source {source} --mode {mode}"


def _backend(recipe: Recipe, source: str, mode: str) -> str:
    """`file` where the recipe names one for the mode, else `hf`: the source's model, in process."""
    return "file" if mode in source_options(recipe, source).captures else "hf"


def _captures_file(recipe: Recipe, source: str, mode: str) -> Path:
    path = source_options(recipe, source).captures[mode]
    if not path.is_file():
        raise UserError(f"sources.{source}.captures.{mode}: {path} does not exist or is no file")
    return path


def capture_options(recipe: Recipe, source: str, mode: str) -> dict[str, Any]:
    """What one capture records of the recipe."""
    backend = _backend(recipe, source, mode)
    options = {
        "mode": mode,
        "backend": backend,
        "seq_length": recipe.training.seq_length,
        **{key: getattr(recipe.capture, key) for key in ("top_k", "top_p", "filter")},
        "temperatures": recipe.capture_temperatures,
        # Not batch_tokens: a smaller budget may continue what a larger one began; results agree to rounding.
    }
    if backend == "hf":
        options["dtype"] = source_options(recipe, source).dtype
    if mode == "training":
        options["supervise"] = recipe.data.supervise
    return options


def _basis(recipe: Recipe, source: str, mode: str, chat: ChatFormat) -> tuple[dict[str, Any], dict[str, str]]:
    """(options, inputs) of a capture, all but the model's weights or the file's content."""
    inputs = {
        "instructions": open_instructions(recipe).sha256,
        "tokenizer": chat.tokenizer.sha256,
        "chat format": chat.sha256,
    }
    if mode == "inference":
        inputs["responses"] = open_responses(recipe, source, chat=chat).sha256
    return capture_options(recipe, source, mode), inputs


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UserError(f"--mode is {mode!r}: allowed are {', '.join(MODES)}")


def plan_capture(recipe: Recipe, source: str, mode: str, chat: ChatFormat | None = None) -> Plan:
    """What one capture depends on. Raises UserError where instructions or, in inference mode, responses are not made yet."""
    _check_mode(mode)
    model = source_options(recipe, source)
    chat = chat or load_format(model, f"sources.{source}")
    options, inputs = _basis(recipe, source, mode, chat)
    if options["backend"] == "file":
        inputs["captures file"] = sha256_of_file(_captures_file(recipe, source, mode))
    else:
        inputs["model"] = model_fingerprint(resolve_model(model.model, f"sources.{source}.model"))
        if mode == "inference":  # refuses another model's answers
            open_responses(recipe, source, chat=chat, model=inputs["model"])
    shards = open_instructions(recipe).counts["shards"]
    return Plan(Workspace(recipe.workdir).captures(source, mode), STAGE, options, inputs, shards)


def open_capture(recipe: Recipe, source: str, mode: str, *, model: str | None = None) -> Artefact:
    """The finished capture of a source. Raises UserError where it is missing or not the recipe's.

    Neither the weights nor the file of captures are needed: a capture may be used on a machine that has only the tokenizer.
    model: the weights' fingerprint, where the caller has it: it is compared as well.
    """
    _check_mode(mode)
    directory, command = Workspace(recipe.workdir).captures(source, mode), _command(source, mode)
    chat = load_format(source_options(recipe, source), f"sources.{source}")
    options, inputs = _basis(recipe, source, mode, chat)
    inputs |= {"model": model} if model and options["backend"] == "hf" else {}
    return open_artefact(directory, STAGE, command, options=options, inputs=inputs)


def require_backend(recipe: Recipe, source: str, mode: str, backend: str) -> None:
    """Raises UserError unless the recipe has this source captured so: all later stages go by the recipe."""
    if backend != _backend(recipe, source, mode):
        key = f"sources.{source}.captures.{mode}"
        what = "is not set: name a file there" if backend == "file" else "names a file: take it out of the recipe"
        raise UserError(f"--backend {backend}: {key} {what} (docs/captures.md)")


def capture(recipe: Recipe, source: str, mode: str, progress: Callable[[str], None] = say) -> Artefact | None:
    """Captures one source's distributions in one mode. None while other ranks still work on their shards.

    Raises UserError where a stage before is missing, where the model's logits are not finite, and where a file of captures is not
    about the recipe's texts in the source's tokens.
    """
    options, where = source_options(recipe, source), f"sources.{source}"
    chat = load_format(options, where)
    instructions = require_instructions(recipe)
    plan = plan_capture(recipe, source, mode, chat)
    artefact = completed(plan)
    if artefact:
        return artefact
    examples = example_shards(instructions)
    answers = response_shards(open_responses(recipe, source)) if mode == "inference" else None
    lines = Progress(plan.directory, "tokens", progress)

    @cache  # not before there is work for it
    def reader() -> SourceReader | CaptureFile:
        if plan.options["backend"] == "hf":
            return SourceReader(recipe, source, load_causal_lm(options, where=where), lines.update)
        path = _captures_file(recipe, source, mode)
        size = declared_vocab_size(resolve_model(options.model, f"{where}.model"))
        file = CaptureFile(recipe, path, chat.tokenizer, size or chat.tokenizer.vocab_size, progress)
        if not any(example.id in file.rows for shard in examples for example in shard):
            raise UserError(
                f"{path}: none of its {len(file.rows)} ids is one of an example (one is {examples[0][0].id!r})"
            )
        return file

    possible = [CAPTURED, TOO_LONG, NO_RESPONSE]
    possible += [MISMATCH, MISSING] if plan.options["backend"] == "file" else []

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        every_turn = answers is None and recipe.data.supervise == "every_turn"
        asked = examples[index]
        given = [learned_of(each, recipe.data.reasoning) for each in answers[index]] if answers else [None] * len(asked)
        conversations = [
            conversation_of(chat, example, answer, every_turn=every_turn)
            for example, answer in zip(asked, given, strict=True)
        ]
        source_reader = reader()
        lines.begin(f"shard {index}")
        shard = source_reader.capture_shard(conversations)
        shard.save(prefix.with_name(prefix.name + ".safetensors"))
        return {
            "examples": len(shard.status),
            **{STATUSES[code]: int((shard.status == code).sum()) for code in possible},
            "rows": len(shard.counts),
            "lossy_rows": int(((shard.flags & SpanFlag.LOSSY) != 0).sum()),
            "entries": len(shard.entry_ids),
        }

    return run_plan(plan, make_shard, progress)


def conversation_of(chat: ChatFormat, example: Example, answer: Learned | None, *, every_turn: bool) -> Conversation:
    """An example with its ground truth, or with the source's answer where there is one, as the source is to read it."""
    text, ends, thought = answer or learned_of_example(example)
    if not text.strip():
        return Conversation(example.id, None)
    messages = example.prompt(chat.system)
    encoded = chat.encode_conversation(messages, text, stop=ends, every_turn=every_turn, reasoning=thought)
    return Conversation(example.id, encoded)
