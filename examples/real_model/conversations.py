"""The conversations of this experiment: Alpaca rows as token ids, and their split.

l: tokens of a conversation, with the prompt. The response begins at `begin` and ends with the stop token.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_fuse.errors import UserError

SHORT, LONG = 128, 160  # tokens of a conversation in SmolLM2's tokenizer: for fusion, for the sources
HELD_OUT = 48
SEED = 1234


@dataclass(frozen=True)
class Conversation:
    ids: list[int]  # [l]
    begin: int


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> Conversation:
    """A row in the chat template of the tokenizer, up to the stop token."""
    question = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    begin = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    text = prompt + row["output"] + tokenizer.eos_token
    return Conversation(tokenizer(text, add_special_tokens=False)["input_ids"], begin)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def split_instructions(path: Path, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Writes OUTPUT/{fusion,held_out,sources}.jsonl: three parts without a common row.

    fusion, held_out: conversations of up to SHORT tokens. sources: longer ones, up to LONG.

    Raises UserError if the file has too few short rows.
    """
    rows = [row for row in read_rows(path) if row["output"].strip()]
    lengths = [len(encode(tokenizer, row).ids) for row in rows]
    short = [row for row, length in zip(rows, lengths, strict=True) if length <= SHORT]
    long = [row for row, length in zip(rows, lengths, strict=True) if SHORT < length <= LONG]
    if len(short) < 3 * HELD_OUT or not long:
        raise UserError(
            f"--instructions: {path} has {len(short)} conversations of at most {SHORT} tokens and "
            f"{len(long)} more of at most {LONG}, but {3 * HELD_OUT} and 1 are needed. Name a file with "
            "more rows."
        )
    rng = random.Random(SEED)
    rng.shuffle(short)
    rng.shuffle(long)
    parts = {"held_out": short[:HELD_OUT], "fusion": short[HELD_OUT:], "sources": long}
    for name, part in parts.items():
        write_rows(output / f"{name}.jsonl", part)


def response_logits(model: PreTrainedModel, batch: list[Conversation], pad: int) -> tuple[Tensor, Tensor]:
    """Logits [m, v] that predict the responses of a batch, and their tokens [m]."""
    longest = max(len(conversation.ids) for conversation in batch)
    ids = torch.full((len(batch), longest), pad)
    labels = torch.full((len(batch), longest), -100)
    for row, conversation in enumerate(batch):
        tokens = torch.tensor(conversation.ids)
        ids[row, : len(tokens)] = tokens
        labels[row, conversation.begin - 1 : len(tokens) - 1] = tokens[conversation.begin :]
    # Padding is on the right and attention is causal: no mask is needed.
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden[labels >= 0]), labels[labels >= 0]


def in_batches(conversations: list[Conversation], size: int) -> list[list[Conversation]]:
    """Conversations of nearly equal length together."""
    ordered = sorted(conversations, key=lambda conversation: len(conversation.ids))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
