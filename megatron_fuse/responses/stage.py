"""The responses stage: every source answers every instruction once, in its own chat template.

The target answers too, under the name `target`, if its own answers decide the order of the examples.

responses/NAME/shard-00000.jsonl           {id, response, truncated, tokens, refused}, and reasoning if there
                                           is a thought: the same examples as in the instructions' shard
responses/NAME/shard-00000.unmatched.txt   ids of this shard without an answer: not in the file, refused by
                                           the server, or only a thought

Backends: `hf`, the model in process; `openai`, a server that the recipe names; `file`, answers that already
exist.
"""

from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_fuse.instructions import INSTRUCTIONS, Example, example_shards, shard_sizes
from megatron_fuse.instructions.tables import table_sha256
from megatron_fuse.model.parameter_count import count_parameters
from megatron_fuse.progress import log_complete
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.lookup import answering_options, recipe_key
from megatron_fuse.responses.answers import Answerer, Response
from megatron_fuse.responses.given import given_answers
from megatron_fuse.responses.sampled import sampled_answers
from megatron_fuse.responses.served import served_answers
from megatron_fuse.stages import Amounts, Context, Stage
from megatron_fuse.storage import (
    Artifact,
    ShardProgress,
    Shards,
    Workspace,
    completed,
    run_plan,
    temporary_then_rename,
    write_jsonl,
)
from megatron_fuse.storage.records import read_typed_rows


def backend_of(recipe: Recipe, name: str) -> str:
    """The backend of a model's answers by the recipe: one of RESPONSE_BACKENDS."""
    options = answering_options(recipe, name)
    return "file" if options.responses else "openai" if options.server else "hf"


def responses_options(recipe: Recipe, name: str) -> dict[str, Any]:
    """The options of the recipe that one model's answers record."""
    options, backend = answering_options(recipe, name), backend_of(recipe, name)
    if given := options.responses:
        return {"backend": backend, **given.model_dump(include={"response", "match", given.match})}
    sampling = {key: getattr(recipe.responses, key) for key in ("temperature", "top_p", "max_new_tokens")}
    sampling |= {"backend": backend, "seed": recipe.seed, "stop": options.stop}
    # The address of a server and the way to reach it do not change the answers, so they are not recorded.
    if options.server:
        server = options.server.model_dump(include={"model", "endpoint", "extra"})
        return sampling | server | {"seq_length": recipe.training.seq_length}
    # batch_tokens is not recorded: it changes memory and speed only.
    return sampling | {"dtype": options.dtype, "seq_length": recipe.training.seq_length}


def _formats(context: Context, name: str) -> dict[str, str]:
    """The hashes of tokenizer and chat format.

    For answers of a file only the tokenizer counts, for their tokens.
    """
    chat, backend = context.format(name), backend_of(context.recipe, name)
    tokenizer = {"tokenizer": chat.tokenizer.sha256}
    if backend == "file":
        return tokenizer
    # End tokens of generation_config.json are in neither the format's hash nor the model's fingerprint, so
    # they are recorded here. A chat server has its own end tokens.
    further = sorted(chat.end_ids - {chat.stop_id, chat.tokenizer.eos_id})
    server = answering_options(context.recipe, name).server
    asks_itself = server is None or server.endpoint == "completions"
    ends = {"further ends": ",".join(map(str, further))} if further and asks_itself else {}
    return {**tokenizer, "chat format": chat.sha256, **ends}


def _origin(context: Context, name: str) -> dict[str, str]:
    options = answering_options(context.recipe, name)
    given = options.responses
    if given is None:
        return {} if options.server else {"model": context.fingerprint(name)}
    read = partial(table_sha256, given.path, f"{recipe_key(name)}.responses")
    return {"responses file": context.once("responses file", name, read)}


def _flops(context: Context, amounts: Amounts, name: str) -> float:
    """The work of a model in process, which reads every prompt and writes its answer.

    Other backends cost nothing.
    """
    if backend_of(context.recipe, name) != "hf":
        return 0.0
    return 2 * count_parameters(context.model_directory(name)) * amounts.read("inference")


RESPONSES = Stage(
    name="responses",
    recorded_as="responses",
    command="megatron-fuse generate --source {}",
    keys=lambda recipe: [(name,) for name in recipe.answering],
    directory=lambda recipe, name: Workspace(recipe.workdir).responses(name),
    options=responses_options,
    parents=lambda *_: {"instructions": (INSTRUCTIONS, ())},
    formats=_formats,
    origin=_origin,
    flops=_flops,
    disk=lambda _, amounts, name: 5 * amounts.answer_tokens,
)


def generate_responses(context: Context, name: str) -> Artifact | None:
    """Makes the answers of a source or the target, by the recipe's backend.

    None while other ranks still work.
    """
    plan = context.plan(RESPONSES, name)
    artifact = completed(plan)
    if artifact:
        log_complete(plan.directory, artifact.counts["examples"], "examples")
        return artifact
    instructions = context.open(INSTRUCTIONS)
    shards = example_shards(instructions)
    # A model in process may write fewer tokens than it has room for.
    most = plan.options["backend"] == "hf"
    progress = ShardProgress(plan.directory, "examples", shard_sizes(instructions), most=most)
    answer = _answerer(context, name, plan.directory, shards, progress)

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        examples = shards[index]
        answers = answer(index, examples)
        pairs = list(zip(examples, answers, strict=True))
        unmatched = [example.id for example, response in pairs if response is None]
        # An example without an answer gets an empty one.
        responses = [response or Response(each.id, "", truncated=False, tokens=0) for each, response in pairs]
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
    context: Context,
    name: str,
    directory: Path,
    shards: Shards[list[Example]],
    progress: ShardProgress,
) -> Answerer:
    """The answerer of the recipe's backend.

    A file for other instructions is refused at once. A model is loaded, or a server reached, only at the
    first missing shard.
    """
    recipe, chat = context.recipe, context.format(name)
    options = answering_options(recipe, name)
    if options.responses:
        where = f"{recipe_key(name)}.responses"
        return given_answers(options.responses, where, chat, chain.from_iterable(shards))
    if options.server:
        return served_answers(recipe, name, chat, directory, progress)
    return sampled_answers(recipe, name, chat, progress.update)


def response_shards(artifact: Artifact) -> Shards[list[Response]]:
    """The answers by shard, in the order of the instructions' examples."""
    return Shards(artifact, artifact.files(".jsonl"), lambda path: list(read_typed_rows(path, Response)))
