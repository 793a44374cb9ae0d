"""Conversations in a model's tokens, with the bytes that their labels cover, and writing them as streams."""

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
    """n conversations in the tokens of one model.

    A conversation that is left out has neither tokens nor rows.

    tokens: ids of prompt, response and stop token. supervised uint8: the token is a label. spans: one row per
    label.
    """

    tokens: list[np.ndarray]
    supervised: list[np.ndarray]
    spans: list[TokenSpans]
    lossy: np.ndarray  # bool [n]: the tokens do not spell all bytes of the responses

    @property
    def present(self) -> np.ndarray:
        """bool [n]: the conversation was not left out."""
        return np.array([len(tokens) > 0 for tokens in self.tokens], bool)


def id_dtype(vocab_size: int) -> type:
    """The smallest dtype of Megatron's indexed data sets that holds every id: uint16 or int32."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def encode_documents(
    chat: ChatFormat,
    examples: Sequence[Example],
    responses: Sequence[Learned | None],
    *,
    every_turn: bool,
    seq_length: int,
) -> Documents:
    """The examples with these responses in the tokens of the model of `chat`.

    responses [n]: None leaves the example out. If a response is complete (`ends`), its stop token is a label.
    every_turn: the assistant's earlier turns are labels too. A conversation of more than seq_length + 1
    tokens is left out: the model reads seq_length of them, and the last token is only predicted.
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
    """The ground truth of the examples, as the training mode learns it."""
    return encode_documents(
        chat,
        examples,
        list(map(learned_of_example, examples)),
        every_turn=recipe.data.supervise == "every_turn",
        seq_length=recipe.training.seq_length,
    )


def encode_answers(
    recipe: Recipe,
    chat: ChatFormat,
    examples: Sequence[Example],
    responses: Sequence[Learned],
    usable: np.ndarray,
) -> Documents:
    """A source's answers to the examples, as the inference mode learns them.

    usable bool [n]: the other answers are left out.
    """
    chosen = [response if is_usable else None for response, is_usable in zip(responses, usable, strict=True)]
    return encode_documents(chat, examples, chosen, every_turn=False, seq_length=recipe.training.seq_length)


def supervised_bytes(recipe: Recipe, examples: Sequence[Example]) -> list[bytes]:
    """The supervised bytes of every example's ground truth.

    The spans of `encode_ground_truth` are offsets in them.
    """
    every_turn = recipe.data.supervise == "every_turn"
    return [
        response_bytes(supervised_turns(example.messages, example.response, every_turn=every_turn))
        for example in examples
    ]


def write_documents(prefix: Path, documents: Documents, dtype: type) -> None:
    """Writes the ids and labels of documents. dtype: of the ids, see id_dtype."""
    write_ragged(prefix, "tokens", documents.tokens, dtype)
    write_ragged(prefix, "supervised", documents.supervised, np.uint8)


def write_ragged(prefix: Path, field: str, arrays: Sequence[np.ndarray], dtype: type) -> None:
    """Writes one stream, PREFIX.FIELD.{bin,idx}, with one sequence per array."""
    values: np.ndarray = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
    write_stream(f"{prefix}.{field}", values, [len(array) for array in arrays])
