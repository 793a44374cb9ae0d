"""The capture stage: a source reads every conversation once, and only response positions leave the model.

captures/SOURCE/training/    over the ground-truth response      captures/SOURCE/inference/    over the source's own answer
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from megatron_fuse.capture.reading import SourceReader
from megatron_fuse.capture.shards import STATUSES
from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import example_shards, open_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import open_responses, response_shards
from megatron_fuse.sources.huggingface import (
    load_causal_lm,
    load_format,
    model_fingerprint,
    resolve_model,
    source_options,
)
from megatron_fuse.storage import Artefact, Plan, Workspace, completed, open_artefact, run_plan

STAGE = "capture"
MODES = ("training", "inference")


def _command(source: str, mode: str) -> str:
    return f"tools/capture_teacher.py --source {source} --mode {mode}"


def _basis(recipe: Recipe, source: str, mode: str, chat: ChatFormat) -> tuple[dict[str, Any], dict[str, str]]:
    """(options, inputs) of a capture, all but the model's weights."""
    if mode not in MODES:
        raise UserError(f"--mode is {mode!r}: allowed are {', '.join(MODES)}")
    inputs = {
        "instructions": open_instructions(recipe).sha256,
        "tokenizer": chat.tokenizer.sha256,
        "chat format": chat.sha256,
    }
    if mode == "inference":
        inputs["responses"] = open_responses(recipe, source).sha256
    capture = recipe.capture
    options = {
        "mode": mode,
        "seq_length": recipe.training.seq_length,
        "dtype": source_options(recipe, source).dtype,
        "top_k": capture.top_k,
        "top_p": capture.top_p,
        "filter": capture.filter,
        "temperatures": recipe.capture_temperatures,
        # Not batch_tokens: a smaller budget may continue what a larger one began; results agree to rounding.
    }
    return options, inputs


def plan_capture(recipe: Recipe, source: str, mode: str, chat: ChatFormat | None = None) -> Plan:
    """What one capture depends on. Raises UserError where instructions or, in inference mode, responses are not made yet."""
    model = source_options(recipe, source)
    options, inputs = _basis(recipe, source, mode, chat or load_format(model, f"sources.{source}"))
    inputs["model"] = model_fingerprint(resolve_model(model.model, f"sources.{source}.model"))
    shards = open_instructions(recipe).counts["shards"]
    return Plan(Workspace(recipe.workdir).captures(source, mode), STAGE, options, inputs, shards)


def open_capture(recipe: Recipe, source: str, mode: str) -> Artefact:
    """The finished capture of a source. Raises UserError where it is missing or does not belong to the recipe.

    The weights are not needed: a capture may be used on a machine that has only the source's tokenizer.
    """
    command = _command(source, mode)
    artefact = open_artefact(Workspace(recipe.workdir).captures(source, mode), STAGE, command)
    wanted = _basis(recipe, source, mode, load_format(source_options(recipe, source), f"sources.{source}"))
    for kind, values in zip(("options", "inputs"), wanted, strict=True):
        for key, want in values.items():
            have = artefact.manifest[kind].get(key)
            if have != want:
                raise UserError(
                    f"{artefact.directory} was made with {key} = {have!r}, but the recipe's source {source!r} has {want!r}: "
                    f"remove it and run {command} again, or put the old value back"
                )
    return artefact


def capture(recipe: Recipe, source: str, mode: str, progress: Callable[[str], None] = print) -> Artefact | None:
    """Captures one source's distributions in one mode. None while other ranks still work on their shards.

    Raises UserError where a stage before is missing and where the model's logits are not finite.
    """
    options = source_options(recipe, source)
    chat = load_format(options, f"sources.{source}")
    plan = plan_capture(recipe, source, mode, chat)
    artefact = completed(plan)
    if artefact:
        return artefact
    examples = example_shards(open_instructions(recipe))
    answers = response_shards(open_responses(recipe, source)) if mode == "inference" else None
    reader = cache(lambda: SourceReader(recipe, source, load_causal_lm(options, where=f"sources.{source}")))

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        conversations = []
        for number, example in enumerate(examples[index]):
            answer = answers[index][number] if answers else None
            text, truncated = (answer.response, answer.truncated) if answer else (example.response, example.truncated)
            conversations.append(
                chat.encode_conversation(example.prompt(chat.system), text, stop=not truncated)
                if text.strip()
                else None
            )
        shard = reader().capture_shard(examples[index], conversations)
        shard.save(prefix.with_name(prefix.name + ".safetensors"))
        counts = {name: int((shard.status == code).sum()) for code, name in enumerate(STATUSES)}
        return {"examples": len(shard.status), **counts, "rows": len(shard.counts), "entries": len(shard.entry_ids)}

    return run_plan(plan, make_shard, progress)
