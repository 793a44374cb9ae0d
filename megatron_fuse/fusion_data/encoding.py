"""Conversations in a model's tokens, with the bytes that their labels cover; and how they are written as streams."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_fuse.chat import ChatFormat, supervised_turns
from megatron_fuse.fusion_data.streams import write_stream
from megatron_fuse.instructions import Example, naming_example
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses.answers import Learned, learned_of_example
from megatron_fuse.tokenization.spans import TokenSpans, response_bytes


@dataclass(frozen=True)
class Documents:
    """n conversations in the target's tokens; one that is left out has neither tokens nor rows.

    tokens: ids of prompt, response and stop token; supervised uint8: the token is a label; spans: one row per label.
    """

    tokens: list[np.ndarray]
    supervised: list[np.ndarray]
    spans: list[TokenSpans]
    lossy: np.ndarray  # bool [n]: the tokens do not spell every byte of the responses

    @property
    def present(self) -> np.ndarray:
        """bool [n]"""
        return np.array([len(tokens) > 0 for tokens in self.tokens], bool)


def id_dtype(vocab_size: int) -> type:
    """Smallest type of Megatron's that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def encode_documents(
    chat: ChatFormat,
    examples: Sequence[Example],
    responses: Sequence[Learned | None],
    *,
    every_turn: bool,
    seq_length: int,
) -> Documents:
    """responses [n]: where one ends, its stop token is a label; None leaves the example out.

    every_turn: the assistant's earlier turns are labels too. A conversation of more than seq_length tokens, not counting
    the last, which is never read, is left out as well.
    """
    nothing = np.zeros(0, np.int32)
    tokens, supervised, spans = [], [], []
    lossy = np.zeros(len(examples), bool)
    for index, (example, response) in enumerate(zip(examples, responses, strict=True)):
        encoded = None
        if response is not None:
            with naming_example(example):
                encoded = chat.encode_conversation(
                    example.prompt(chat.system),
                    response.text,
                    stop=response.ends,
                    every_turn=every_turn,
                    reasoning=response.thought,
                    tools=example.tools,
                )
        if encoded is None or len(encoded.ids) > seq_length + 1:
            tokens.append(nothing)
            supervised.append(nothing.astype(np.uint8))
            spans.append(TokenSpans.join([], []))
            continue
        tokens.append(encoded.ids)
        supervised.append(encoded.supervised.astype(np.uint8))
        spans.append(encoded.spans)
        lossy[index] = not encoded.exact
    return Documents(tokens, supervised, spans, lossy)


def encode_ground_truth(recipe: Recipe, chat: ChatFormat, examples: Sequence[Example]) -> Documents:
    """The examples' own responses, as the training mode learns them."""
    return encode_documents(
        chat,
        examples,
        list(map(learned_of_example, examples)),
        every_turn=recipe.data.supervise == "every_turn",
        seq_length=recipe.training.seq_length,
    )


def supervised_bytes(recipe: Recipe, examples: Sequence[Example]) -> list[bytes]:
    """The bytes of the examples' own responses, in which `encode_ground_truth` counts."""
    every_turn = recipe.data.supervise == "every_turn"
    return [
        response_bytes(supervised_turns(example.messages, example.response, every_turn=every_turn))
        for example in examples
    ]


def write_ragged(prefix: Path, field: str, arrays: Sequence[np.ndarray], dtype: type) -> None:
    """One stream, one sequence per array."""
    values: np.ndarray = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
    write_stream(f"{prefix}.{field}", values, [len(array) for array in arrays])
