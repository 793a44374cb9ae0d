"""Conversations in the target's tokens: the text part of fusion data, which every source's rows refer to.

FUSION/text/shard-00000.{tokens,supervised,starts}.{bin,idx}    one sequence per example, empty where it is left out
FUSION/text/shard-00000.examples.jsonl                          {id, held_out, exact, leading}
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_fuse.chat import ChatFormat
from megatron_fuse.fusion_data.layout import TEXT_STAGE, target_hashes, text_directory
from megatron_fuse.fusion_data.streams import Stream, write_stream
from megatron_fuse.instructions import Example, example_shards, open_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.huggingface import load_format
from megatron_fuse.storage import Artefact, Plan, read_jsonl, run_plan, write_jsonl


@dataclass(frozen=True)
class TargetDocuments:
    """n conversations in the target's tokens; a conversation that is left out has no tokens."""

    tokens: list[np.ndarray]  # ids: prompt, response, stop token
    supervised: list[np.ndarray]  # uint8: the token is a label
    starts: list[np.ndarray]  # int32: byte offset in the response at which each supervised token begins
    exact: np.ndarray  # bool [n]: the response's tokens are byte for byte the response
    leading: np.ndarray  # bool [n]: the first response token begins in the template's white space

    @property
    def present(self) -> np.ndarray:
        """bool [n]"""
        return np.array([len(tokens) > 0 for tokens in self.tokens], bool)


def id_dtype(vocab_size: int) -> type:
    """Smallest type of Megatron's that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def encode_documents(
    chat: ChatFormat, examples: Sequence[Example], responses: Sequence[tuple[str, bool] | None], seq_length: int
) -> TargetDocuments:
    """responses [n]: (text, whether its end is an end and the stop token is a label); None leaves the example out.

    A conversation of more than seq_length tokens, not counting the last, which is never read, is left out as well.
    """
    nothing = np.zeros(0, np.int32)
    tokens, supervised, starts = [], [], []
    exact, leading = np.zeros((2, len(examples)), bool)
    for index, (example, response) in enumerate(zip(examples, responses, strict=True)):
        encoded = None
        if response is not None:
            text, stop = response
            encoded = chat.encode_conversation(example.prompt(chat.system), text, stop=stop)
        if encoded is None or len(encoded.ids) > seq_length + 1:
            tokens.append(nothing)
            supervised.append(nothing.astype(np.uint8))
            starts.append(nothing)
            continue
        tokens.append(encoded.ids)
        supervised.append((np.arange(len(encoded.ids)) >= encoded.prompt_length).astype(np.uint8))
        starts.append(encoded.starts.astype(np.int32))
        exact[index], leading[index] = encoded.exact, encoded.leading
    return TargetDocuments(tokens, supervised, starts, exact, leading)


def write_ragged(prefix: Path, field: str, arrays: Sequence[np.ndarray], dtype: type) -> None:
    """One stream, one sequence per array."""
    values = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
    write_stream(f"{prefix}.{field}", values, [len(array) for array in arrays])


def plan_text(recipe: Recipe, target: ChatFormat | None = None) -> Plan:
    """What the text depends on: instructions and target. Raises UserError where the instructions are not made yet."""
    target = target or load_format(recipe.target, "target")
    instructions = open_instructions(recipe)
    inputs = {"instructions": instructions.sha256, **target_hashes(target)}
    options = {"seq_length": recipe.training.seq_length}
    return Plan(text_directory(recipe), TEXT_STAGE, options, inputs, instructions.counts["shards"])


def build_text(recipe: Recipe, target: ChatFormat, progress: Callable[[str], None] = print) -> Artefact | None:
    """Writes prompt and ground-truth response of every example. None while other ranks still work."""
    plan = plan_text(recipe, target)
    shards = example_shards(open_instructions(recipe))

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        examples = shards[index]
        responses = [(example.response, not example.truncated) for example in examples]
        documents = encode_documents(target, examples, responses, recipe.training.seq_length)
        write_ragged(prefix, "tokens", documents.tokens, id_dtype(target.tokenizer.vocab_size))
        write_ragged(prefix, "supervised", documents.supervised, np.uint8)
        write_ragged(prefix, "starts", documents.starts, np.int32)
        rows = [
            {"id": example.id, "held_out": example.held_out, "exact": bool(exact), "leading": bool(leading)}
            for example, exact, leading in zip(examples, documents.exact, documents.leading, strict=True)
        ]
        write_jsonl(Path(f"{prefix}.examples.jsonl"), rows)
        present = documents.present
        return {
            "examples": len(examples),
            "documents": int(present.sum()),
            "too_long": int((~present).sum()),
            "inexact": int((present & ~documents.exact).sum()),
            "tokens": sum(map(len, documents.tokens)),
            "supervised_tokens": sum(map(len, documents.starts)),
        }

    return run_plan(plan, make_shard, progress)


def read_text_shard(text: Artefact, index: int) -> TargetDocuments:
    """The documents of one shard as they were written."""
    prefix = text.directory / f"shard-{index:05d}"
    rows = [row for _, row in read_jsonl(Path(f"{prefix}.examples.jsonl"))]
    streams = [Stream([f"{prefix}.{field}"]) for field in ("tokens", "supervised", "starts")]
    tokens, supervised, starts = ([stream[i] for i in range(len(rows))] for stream in streams)
    flags = np.array([[row["exact"], row["leading"]] for row in rows], bool).reshape(-1, 2)
    return TargetDocuments(tokens, supervised, starts, flags[:, 0], flags[:, 1])
