"""The responses stage: every source answers every instruction once, in its own chat template; so does the target, under the
name `target`, where its own answers order the examples.

responses/NAME/shard-00000.jsonl           {id, response, truncated, tokens, refused}, the same examples as the instructions' shard;
                                           and reasoning, where the model thought before it answered
responses/NAME/shard-00000.unmatched.txt   ids of this shard without answer: not in the file, refused by the server, or a thought alone

Backends: `hf`, the model in process; `openai`, a server that the recipe names; `file`, answers that exist already.
"""

from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_fuse.chat import ChatFormat
from megatron_fuse.instructions import Example, example_shards, open_instructions, require_instructions
from megatron_fuse.instructions.tables import table_sha256
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses.answers import Answerer, Response
from megatron_fuse.responses.given import given_answers
from megatron_fuse.responses.sampled import sampled_answers
from megatron_fuse.responses.served import served_answers
from megatron_fuse.sources.huggingface import (
    answering_options,
    load_format,
    model_fingerprint,
    recipe_key,
    resolve_model,
)
from megatron_fuse.storage import (
    Artefact,
    Plan,
    Shards,
    Workspace,
    completed,
    open_artefact,
    run_plan,
    temporary_then_rename,
    write_jsonl,
)
from megatron_fuse.storage.records import read_typed_rows
from megatron_fuse.text_safety import say

STAGE = "responses"
COMMAND = "tools/generate_responses.py"
BACKENDS = ("hf", "openai", "file")


def backend_of(recipe: Recipe, name: str) -> str:
    """What the recipe says of where a model's answers come from: one of BACKENDS."""
    options = answering_options(recipe, name)
    return "file" if options.responses else "openai" if options.server else "hf"


def responses_options(recipe: Recipe, name: str) -> dict[str, Any]:
    """What one model's answers record of the recipe."""
    options, backend = answering_options(recipe, name), backend_of(recipe, name)
    if backend == "file":
        given = options.responses
        return {"backend": backend, **given.model_dump(include={"response", "match", given.match})}
    sampling = {key: getattr(recipe.responses, key) for key in ("temperature", "top_p", "max_new_tokens")}
    sampling |= {"backend": backend, "seed": recipe.seed, "stop": options.stop}
    if backend == "openai":  # not where it is, nor how it is asked
        server = options.server.model_dump(include={"model", "endpoint", "extra"})
        return sampling | server | {"seq_length": recipe.training.seq_length}
    # Not batch_tokens: it is a matter of memory and speed.
    return sampling | {"dtype": options.dtype, "seq_length": recipe.training.seq_length}


def _format_hashes(recipe: Recipe, name: str, chat: ChatFormat) -> dict[str, str]:
    """Of a given answer only its tokens are counted: the template had no share in it."""
    tokenizer, backend = {"tokenizer": chat.tokenizer.sha256}, backend_of(recipe, name)
    if backend == "file":
        return tokenizer
    # Those of generation_config.json, which neither the format nor the model's fingerprint covers. A chat server has its own.
    further = sorted(chat.end_ids - {chat.stop_id, chat.tokenizer.eos_id})
    asks_itself = backend == "hf" or answering_options(recipe, name).server.endpoint == "completions"
    ends = {"further ends": ",".join(map(str, further))} if further and asks_itself else {}
    return {**tokenizer, "chat format": chat.sha256, **ends}


def _plan(recipe: Recipe, name: str, instructions: Artefact, chat: ChatFormat) -> Plan:
    options, backend, where = answering_options(recipe, name), backend_of(recipe, name), recipe_key(name)
    inputs = {"instructions": instructions.sha256, **_format_hashes(recipe, name, chat)}
    if backend == "file":
        inputs["responses file"] = table_sha256(options.responses.path, f"{where}.responses")
    elif backend == "hf":
        inputs["model"] = model_fingerprint(resolve_model(options.model, f"{where}.model"))
    directory = Workspace(recipe.workdir).responses(name)
    return Plan(directory, STAGE, responses_options(recipe, name), inputs, shards=instructions.counts["shards"])


def plan_responses(recipe: Recipe, name: str) -> Plan:
    """What one model's answers depend on. Raises UserError where the instructions are not made yet."""
    chat = load_format(answering_options(recipe, name), recipe_key(name))
    return _plan(recipe, name, open_instructions(recipe), chat)


def generate_responses(recipe: Recipe, name: str, progress: Callable[[str], None] = say) -> Artefact | None:
    """Lets a source, or the target, answer, or takes its answers from where the recipe says. None while other ranks still work."""
    chat = load_format(answering_options(recipe, name), recipe_key(name))
    instructions = require_instructions(recipe)
    plan = _plan(recipe, name, instructions, chat)
    artefact = completed(plan)
    if artefact:
        return artefact
    shards = example_shards(instructions)
    answer = _answerer(recipe, name, chat, plan.directory, shards, progress)

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        examples = shards[index]
        found = answer(index, examples)
        unmatched = [example.id for example, response in zip(examples, found, strict=True) if response is None]
        responses = [
            response or Response(example.id, "", truncated=False, tokens=0)
            for example, response in zip(examples, found, strict=True)
        ]
        write_jsonl(prefix.with_name(prefix.name + ".jsonl"), map(_row, responses))
        if unmatched:
            with temporary_then_rename(prefix.with_name(prefix.name + ".unmatched.txt")) as temporary:
                temporary.write_text("".join(f"{name}\n" for name in unmatched), encoding="utf-8")
        return {
            "examples": len(responses),
            "tokens": sum(response.tokens for response in responses),
            "truncated": sum(response.truncated for response in responses),
            "empty": sum(not response.response.strip() for response in responses),
            "refused": sum(response.refused for response in responses),
            "with_thought": sum(response.reasoning is not None for response in responses),
            "unmatched": len(unmatched),
        }

    return run_plan(plan, make_shard, progress)


def _row(response: Response) -> dict[str, Any]:
    row = asdict(response)
    return row if response.reasoning is not None else {key: row[key] for key in row if key != "reasoning"}


def _answerer(
    recipe: Recipe,
    name: str,
    chat: ChatFormat,
    directory: Path,
    shards: Shards[list[Example]],
    progress: Callable[[str], None],
) -> Answerer:
    """Refuses a file of other instructions at once; a model is loaded, and a server asked, at the first shard that is missing."""
    match backend_of(recipe, name):
        case "file":
            options, where = answering_options(recipe, name).responses, f"{recipe_key(name)}.responses"
            return given_answers(options, where, chat, chain.from_iterable(shards), progress)
        case "openai":
            return served_answers(recipe, name, chat, directory, progress)
        case _:
            return sampled_answers(recipe, name, chat, directory, progress)


def open_responses(recipe: Recipe, name: str, *, chat: ChatFormat | None = None, model: str | None = None) -> Artefact:
    """The finished answers of one model. Raises UserError where they are missing or were made otherwise.

    chat, model: its format and its weights' fingerprint, where the caller has them: they are compared as well.
    """
    options = responses_options(recipe, name)  # refuses a name that the recipe does not have
    inputs = {"instructions": open_instructions(recipe).sha256}
    inputs |= _format_hashes(recipe, name, chat) if chat else {}
    inputs |= {"model": model} if model and options["backend"] == "hf" else {}
    directory = Workspace(recipe.workdir).responses(name)
    return open_artefact(directory, STAGE, f"{COMMAND} --source {name}", options=options, inputs=inputs)


def response_shards(artefact: Artefact) -> Shards[list[Response]]:
    """Answers by shard, in the order of the instructions' examples."""
    return Shards(artefact, artefact.files(".jsonl"), lambda path: list(read_typed_rows(path, Response)))
