"""The instructions stage: sample, cut to length, split, write. Every later stage works on these examples in these shards.

instructions/examples.00000.jsonl ...   data.shard_size examples each, in the order of the user's file
instructions/examples.bad_rows.jsonl    {line, reason}: rows that could not be used
instructions/examples.dropped.jsonl     {id, reason}: examples left out for their length
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.instructions.examples import Example, read_rows
from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.huggingface import load_format
from megatron_fuse.storage import (
    Artefact,
    Plan,
    Workspace,
    completed,
    open_artefact,
    rank_and_world,
    read_jsonl,
    run_plan,
    sha256_of_file,
    shard_bounds,
    write_jsonl,
)

STAGE = "instructions"
COMMAND = "tools/prepare_instructions.py"
_NAME = "examples"


def _options(recipe: Recipe) -> dict:
    data = recipe.data
    return {
        "seed": recipe.seed,
        "seq_length": recipe.training.seq_length,
        **{key: getattr(data, key) for key in ("format", "samples", "held_out", "too_long", "shard_size")},
    }


def plan_instructions(recipe: Recipe, target: ChatFormat | None = None) -> Plan:
    """Depends on the user's file and the target, not on the list of sources: a source may join later (and leave out what does not fit it)."""
    if not recipe.data.path.is_file():
        raise UserError(f"data.path: {recipe.data.path} does not exist or is no file")
    target = target or load_format(recipe.target, "target")
    inputs = {
        "data.path": sha256_of_file(recipe.data.path),
        "target tokenizer": target.tokenizer.sha256,
        "target chat format": target.sha256,
    }
    # One unit of work: how many shards it writes is known only once the examples are chosen.
    directory = Workspace(recipe.workdir).instructions
    return Plan(directory, STAGE, _options(recipe), inputs, shards=1, shard_names=[_NAME])


def _rank_key(seed: int, purpose: str, example: Example) -> bytes:
    return hashlib.sha256(f"{seed}\0{purpose}\0{example.id}".encode()).digest()


def _cut_at_character(data: bytes, length: int) -> bytes:
    """The longest prefix of at most `length` bytes that ends between two characters."""
    while length > 0 and length < len(data) and data[length] & 0xC0 == 0x80:
        length -= 1
    return data[:length]


def fit(example: Example, formats: Iterable[tuple[str, ChatFormat]], seq_length: int, policy: str) -> Example | str:
    """The example, its response cut where needed so that the conversation has at most `seq_length` tokens in every model.

    formats: (name, chat format), the target's first. A whole response counts with its stop token, a cut one has none. The cut is
    at the last token end of the tightest model that is also a character's end. Returns the reason where it is to be left out.
    """
    response = example.response.encode()
    truncated = False
    tokens = 0
    formats = list(formats)
    pending = list(enumerate(formats))
    while pending:
        index, (name, chat) = pending.pop(0)
        encoded = chat.encode_conversation(example.prompt(chat.system), response.decode(), stop=not truncated)
        if index == 0:
            tokens = len(encoded.ids)
        if len(encoded.ids) <= seq_length:
            continue
        if policy == "drop":
            return f"{len(encoded.ids)} tokens for {name}, seq_length is {seq_length}"
        kept = seq_length - encoded.prompt_length
        end = int(encoded.ends[kept - 1]) if kept > 0 else 0
        # Where only the stop token is too much the text stays whole; after that every further cut takes a byte at least.
        response = _cut_at_character(response, min(end, len(response) - truncated))
        if not response.strip():
            return f"the prompt leaves no room: {encoded.prompt_length} tokens for {name}, seq_length is {seq_length}"
        truncated = True
        pending = list(enumerate(formats))  # a cut may split a token, so that those who fitted are asked again
    return replace(example, response=response.decode(), truncated=truncated, target_tokens=tokens)


def _choose(
    recipe: Recipe, examples: list[Example], formats: list[tuple[str, ChatFormat]], progress: Callable[[str], None]
) -> tuple[list[Example], list[dict[str, str]]]:
    """The sample in file order, with the held-out split marked, and what was left out for its length.

    Both draws go by a hash of seed and id: they do not depend on the order of rows, and a larger sample holds the smaller one.
    """
    wanted = recipe.data.samples or len(examples)
    order = sorted(range(len(examples)), key=lambda index: _rank_key(recipe.seed, "sample", examples[index]))
    chosen: dict[int, Example] = {}
    dropped: list[dict[str, str]] = []
    for index in order:
        if len(chosen) == wanted:
            break
        fitted = fit(examples[index], formats, recipe.training.seq_length, recipe.data.too_long)
        if isinstance(fitted, str):
            dropped.append({"id": examples[index].id, "reason": fitted})
            continue
        chosen[index] = fitted
        if len(chosen) % 10_000 == 0:
            progress(f"{len(chosen)} of at most {wanted} examples fitted to length")
    if not chosen:
        raise UserError(
            f"{recipe.data.path}: no example fits --seq-length {recipe.training.seq_length} (the first: {dropped[0]['reason']})"
        )
    if recipe.data.held_out >= len(chosen):
        raise UserError(
            f"data.held_out is {recipe.data.held_out} but there are {len(chosen)} examples in all: none would be left to train on"
        )
    draw = sorted(chosen, key=lambda index: _rank_key(recipe.seed, "held out", chosen[index]))
    for index in draw[: recipe.data.held_out]:
        chosen[index] = replace(chosen[index], held_out=True)
    return [chosen[index] for index in sorted(chosen)], dropped


def prepare_instructions(recipe: Recipe, progress: Callable[[str], None] = print) -> Artefact | None:
    """Writes the instructions of a recipe; None on ranks that have no share in it (rank 0 does it all).

    Raises UserError for a file that cannot be read, ids given twice, nothing usable, or a split that leaves nothing to train on.
    """
    target = load_format(recipe.target, "target")
    plan = plan_instructions(recipe, target)
    artefact = completed(plan)
    if artefact or rank_and_world()[0] != 0:
        return artefact
    # Chosen before anything is written: a refusal leaves no directory behind.
    rows = read_rows(recipe.data.path, recipe.data.format)
    if not rows.examples:
        reason = f"line {rows.bad[0]['line']}: {rows.bad[0]['reason']}" if rows.bad else "it is empty"
        raise UserError(f"{recipe.data.path}: no usable row among {len(rows.bad)} in {rows.form} form ({reason})")
    formats = [("target", target)]
    formats += [(name, load_format(options, f"sources.{name}")) for name, options in recipe.sources.items()]
    examples, dropped = _choose(recipe, rows.examples, formats, progress)

    def make_shard(_: int, prefix: Path) -> dict[str, int]:
        bounds = shard_bounds(len(examples), recipe.data.shard_size)
        for shard, (start, stop) in enumerate(pairwise(bounds)):
            path = prefix.with_name(f"{prefix.name}.{shard:05d}.jsonl")
            write_jsonl(path, [asdict(example) for example in examples[start:stop]])
        write_jsonl(prefix.with_name(f"{prefix.name}.bad_rows.jsonl"), rows.bad)
        write_jsonl(prefix.with_name(f"{prefix.name}.dropped.jsonl"), dropped)
        return {
            "rows": len(rows.examples) + len(rows.bad),
            "bad_rows": len(rows.bad),
            "dropped_for_length": len(dropped),
            "examples": len(examples),
            "held_out": sum(example.held_out for example in examples),
            "truncated": sum(example.truncated for example in examples),
            "target_tokens": sum(example.target_tokens for example in examples),
            "shards": len(bounds) - 1,
        }

    return run_plan(plan, make_shard, progress)


def open_instructions(recipe: Recipe) -> Artefact:
    """The finished instructions of a recipe. Raises UserError where they are missing or were made with other options."""
    artefact = open_artefact(Workspace(recipe.workdir).instructions, STAGE, COMMAND)
    for key, wanted in _options(recipe).items():
        found = artefact.manifest["options"].get(key)
        if found != wanted:
            raise UserError(
                f"{artefact.directory} was made with {key} = {found!r}, but the recipe has {wanted!r}: "
                f"remove it and run {COMMAND} again, or put the old value back"
            )
    return artefact


def example_shards(artefact: Artefact) -> list[list[Example]]:
    """Examples by shard. Shard i of responses, scores and captures holds the same examples in the same order."""
    paths = [artefact.directory / f"{_NAME}.{shard:05d}.jsonl" for shard in range(artefact.counts["shards"])]
    return [[Example(**row) for _, row in read_jsonl(path)] for path in paths]


def load_examples(artefact: Artefact) -> list[Example]:
    """All examples in order."""
    return [example for shard in example_shards(artefact) for example in shard]
