"""The responses stage: every source answers every instruction once, in its own chat template.

responses/SOURCE/shard-00000.jsonl           {id, response, truncated, tokens}, the same examples as the instructions' shard
responses/SOURCE/shard-00000.unmatched.txt   ids of this shard for which a file of responses has nothing
"""

import codecs
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import Example, example_shards, open_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.generation import Answer, Prompt, generate
from megatron_fuse.sources.huggingface import (
    load_causal_lm,
    load_format,
    max_positions,
    model_fingerprint,
    refuse_unknown_ids,
    resolve_model,
    source_options,
)
from megatron_fuse.storage import (
    Artefact,
    Plan,
    Shards,
    Workspace,
    completed,
    open_artefact,
    read_jsonl,
    run_plan,
    sha256_of_file,
    temporary_then_rename,
    write_jsonl,
)

STAGE = "responses"
COMMAND = "tools/generate_responses.py"


@dataclass(frozen=True)
class Response:
    """One source's answer. An empty one cannot win; a truncated one was cut off by the limit of tokens and has no end."""

    id: str
    response: str
    truncated: bool
    tokens: int  # of the source's own tokenizer, the stop token not counted


def _options(recipe: Recipe, source: str) -> dict[str, Any]:
    options = source_options(recipe, source)
    if options.responses is not None:
        return {"backend": "file"}
    return {
        "backend": "hf",
        "seed": recipe.seed,
        "dtype": options.dtype,
        "seq_length": recipe.training.seq_length,
        # Not batch_size: it is a matter of memory and speed.
        **{key: getattr(recipe.responses, key) for key in ("temperature", "top_p", "max_new_tokens")},
    }


def _format_hashes(recipe: Recipe, source: str, chat: ChatFormat) -> dict[str, str]:
    """Of a given answer only its tokens are counted: the template had no share in it."""
    tokenizer = {"tokenizer": chat.tokenizer.sha256}
    return tokenizer if source_options(recipe, source).responses else {**tokenizer, "chat format": chat.sha256}


def _plan(recipe: Recipe, source: str, instructions: Artefact, chat: ChatFormat) -> Plan:
    options = source_options(recipe, source)
    inputs = {"instructions": instructions.sha256, **_format_hashes(recipe, source, chat)}
    if options.responses is not None:
        if not options.responses.is_file():
            raise UserError(f"sources.{source}.responses: {options.responses} does not exist or is no file")
        inputs["responses file"] = sha256_of_file(options.responses)
    else:
        inputs["model"] = model_fingerprint(resolve_model(options.model, f"sources.{source}.model"))
    directory = Workspace(recipe.workdir).responses(source)
    return Plan(directory, STAGE, _options(recipe, source), inputs, shards=instructions.counts["shards"])


def plan_responses(recipe: Recipe, source: str) -> Plan:
    """What one source's answers depend on. Raises UserError where the instructions are not made yet."""
    chat = load_format(source_options(recipe, source), f"sources.{source}")
    return _plan(recipe, source, open_instructions(recipe), chat)


def generate_responses(recipe: Recipe, source: str, progress: Callable[[str], None] = print) -> Artefact | None:
    """Lets one source answer, or takes its answers from the file that the recipe names. None while other ranks still work."""
    options = source_options(recipe, source)
    chat = load_format(options, f"sources.{source}")
    instructions = open_instructions(recipe, load_format(recipe.target, "target"))
    plan = _plan(recipe, source, instructions, chat)
    artefact = completed(plan)
    if artefact:
        return artefact
    shards = example_shards(instructions)
    if options.responses is not None:
        given = _read_file(options.responses, chat)
        if not any(example.id in given for shard in shards for example in shard):
            raise UserError(
                f"{options.responses}: none of its {len(given)} ids is one of an example of {instructions.directory} "
                f"(there: {shards[0][0].id!r}, here: {next(iter(given), None)!r})"
            )

        def answer(examples: list[Example]) -> list[Response]:
            return [given.get(example.id, Response(example.id, "", truncated=False, tokens=0)) for example in examples]

        def is_unmatched(example: Example) -> bool:
            return example.id not in given
    else:
        model = cache(lambda: load_causal_lm(options, where=f"sources.{source}"))  # not before there is work for it

        def answer(examples: list[Example]) -> list[Response]:
            return _generate(recipe, source, model(), chat, examples)

        def is_unmatched(example: Example) -> bool:
            return False

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        examples = shards[index]
        responses = answer(examples)
        write_jsonl(prefix.with_name(prefix.name + ".jsonl"), [asdict(response) for response in responses])
        unmatched = [example.id for example in examples if is_unmatched(example)]
        if unmatched:
            with temporary_then_rename(prefix.with_name(prefix.name + ".unmatched.txt")) as temporary:
                temporary.write_text("".join(f"{name}\n" for name in unmatched), encoding="utf-8")
        return {
            "examples": len(responses),
            "tokens": sum(response.tokens for response in responses),
            "truncated": sum(response.truncated for response in responses),
            "empty": sum(not response.response.strip() for response in responses),
            "unmatched": len(unmatched),
        }

    return run_plan(plan, make_shard, progress)


def _read_file(path: Path, chat: ChatFormat) -> dict[str, Response]:
    responses: dict[str, Response] = {}
    lines: dict[str, int] = {}
    for line, row in read_jsonl(path):
        name, text, truncated = row.get("id"), row.get("response"), row.get("truncated", False)
        if not isinstance(name, str | int) or not isinstance(text, str) or not isinstance(truncated, bool):
            raise UserError(f"{path}:{line}: needs id and response (text), and truncated (true or false) if anything")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path}:{line}: the response holds half a surrogate pair at character {error.start}"
            ) from error
        name = str(name)
        if name in responses:
            raise UserError(f"{path}:{line}: id {name!r} was given in line {lines[name]} already")
        lines[name] = line
        responses[name] = Response(name, text, truncated, len(chat.tokenizer.encode_continuation(text)))
    return responses


def _seed(recipe: Recipe, source: str, example: Example) -> int:
    digest = hashlib.sha256(f"{recipe.seed}\0{source}\0{example.id}".encode()).digest()
    return int.from_bytes(digest[:16], "little")


def _generate(recipe: Recipe, source: str, model, chat: ChatFormat, examples: list[Example]) -> list[Response]:
    # The answer and its stop token have to fit beside the prompt: capture leaves out what is longer.
    limit = min(recipe.training.seq_length, max_positions(model.config) or recipe.training.seq_length)
    prompts = []
    for example in examples:
        ids = chat.encode_prompt(example.prompt(chat.system))
        room = min(recipe.responses.max_new_tokens, limit - len(ids))
        prompts.append(Prompt(example.id, ids, room, _seed(recipe, source, example)))
    refuse_unknown_ids(model, max(max(prompt.ids) for prompt in prompts), f"sources.{source}")
    tokenizer = chat.tokenizer
    stop_ids = {chat.stop_id, tokenizer.eos_id} - {None}
    # Special tokens carry no text, and neither do columns of the logits beyond the tokenizer's ids: none may be an answer.
    allowed = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
    allowed[sorted(tokenizer.special_ids - stop_ids)] = False
    answers = generate(
        model,
        prompts,
        stop_ids=sorted(stop_ids),
        allowed=allowed,
        temperature=recipe.responses.temperature,
        top_p=recipe.responses.top_p,
        batch_size=recipe.responses.batch_size,
    )
    return [
        Response(example.id, answer_text(chat, answer), not answer.stopped, len(answer.ids))
        for example, answer in zip(examples, answers, strict=True)
    ]


def answer_text(chat: ChatFormat, answer: Answer) -> str:
    """Exact text of generated ids, without the white space that the template itself puts before a response.

    A character that the limit of tokens cut in two is left out; bytes that are no UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(chat.tokenizer.joined_bytes(answer.ids), final=answer.stopped).removeprefix(chat.separator)


def open_responses(
    recipe: Recipe, source: str, *, chat: ChatFormat | None = None, model: str | None = None
) -> Artefact:
    """The finished answers of one source. Raises UserError where they are missing or were made otherwise.

    chat, model: the source's format and its model's fingerprint, where the caller has them: they are compared as well.
    """
    options = _options(recipe, source)  # refuses a name that the recipe does not have
    inputs = {"instructions": open_instructions(recipe).sha256}
    inputs |= _format_hashes(recipe, source, chat) if chat else {}
    inputs |= {"model": model} if model and options["backend"] == "hf" else {}
    directory = Workspace(recipe.workdir).responses(source)
    return open_artefact(directory, STAGE, f"{COMMAND} --source {source}", options=options, inputs=inputs)


def response_shards(artefact: Artefact) -> Shards[list[Response]]:
    """Answers by shard, in the order of the instructions' examples."""
    return Shards(artefact, artefact.files(".jsonl"), lambda path: [Response(**row) for _, row in read_jsonl(path)])
