"""A source model reads conversations by teacher forcing.

Only supervised positions go through the output head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_fuse.capture.distributions import NotFiniteError, SparseRows, sparse_rows
from megatron_fuse.capture.shards import CAPTURED, NO_RESPONSE, TOO_LONG, CaptureShard, Conversation
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.limits import max_positions
from megatron_fuse.huggingface.loading import input_device, refuse_unknown_ids
from megatron_fuse.progress import Report, silent
from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.batching import token_budget_batches


def reading_status(conversation: Conversation, limit: int) -> int:
    """Whether a source that reads at most `limit` tokens can read a conversation: an index in STATUSES."""
    if conversation.encoded is None:
        return NO_RESPONSE
    # The last token is only predicted, never read.
    return TOO_LONG if len(conversation.encoded.ids) - 1 > limit else CAPTURED


def reading_limit(recipe: Recipe, positions: int | None) -> int:
    """The most tokens that a source may read: the recipe's limit, or the model's positions if fewer."""
    return min(recipe.training.seq_length, positions or recipe.training.seq_length)


@dataclass(frozen=True)
class ReadingBatch:
    """Conversations as the input of one forward pass, b of them, padded on the right to s tokens.

    The last token of a conversation is only predicted, so it is not read.
    """

    tokens: torch.Tensor  # int64 [b, s]
    mask: torch.Tensor  # int64 [b, s]: 1 at tokens, 0 at padding
    # int64 [n]: places in the flattened tokens. The logits there predict the supervised tokens.
    positions: torch.Tensor
    labels: torch.Tensor  # int64 [n]: the supervised tokens
    lengths: list[int]  # [b]: supervised tokens of each conversation; they add up to n
    largest_id: int  # of all tokens, read or predicted

    @classmethod
    def of(cls, conversations: Sequence[Conversation]) -> "ReadingBatch":
        encoded = [conversation.readable for conversation in conversations]
        width = max(len(e.ids) for e in encoded) - 1
        tokens = np.zeros((len(encoded), width), np.int64)
        mask = np.zeros_like(tokens)
        for row, conversation in enumerate(encoded):
            tokens[row, : len(conversation.ids) - 1] = conversation.ids[:-1]
            mask[row, : len(conversation.ids) - 1] = 1
        # Supervised token i is predicted at position i - 1.
        positions = [row * width + np.flatnonzero(e.supervised) - 1 for row, e in enumerate(encoded)]
        labels = np.concatenate([e.ids[e.supervised] for e in encoded]).astype(np.int64)
        return cls(
            torch.from_numpy(tokens),
            torch.from_numpy(mask),
            torch.from_numpy(np.concatenate(positions)),
            torch.from_numpy(labels),
            lengths=[len(e.spans) for e in encoded],
            largest_id=max(int(e.ids.max()) for e in encoded),
        )


def reading_order(
    conversations: Sequence[Conversation], limit: int, batch_tokens: int
) -> tuple[np.ndarray, list[list[int]]]:
    """(status uint8 [n]: index in STATUSES, batches: indices of those that are read).

    The batches hold conversations of similar length, the longest first, within batch_tokens.
    """
    status = np.array([reading_status(conversation, limit) for conversation in conversations], np.uint8)
    chosen = np.flatnonzero(status == CAPTURED)
    lengths = [len(conversations[index].readable.ids) - 1 for index in chosen.tolist()]
    batches = token_budget_batches(lengths, batch_tokens)
    return status, [chosen[batch].tolist() for batch in batches]


def capture_in_batches(
    conversations: Sequence[Conversation],
    recipe: Recipe,
    limit: int,
    read: Callable[[list[Conversation]], list[SparseRows]],
    report: Report = silent,
) -> CaptureShard:
    """The shard of these conversations, in their original order.

    limit: the most tokens that the source reads. read: makes the rows of each conversation of a batch.
    report: called after every batch with the conversations and the tokens that are read, and the share of all
    tokens.
    """
    status, batches = reading_order(conversations, limit, recipe.capture.batch_tokens)
    lengths = {index: len(conversations[index].readable.ids) - 1 for batch in batches for index in batch}
    rows: dict[int, SparseRows] = {}
    total, done = sum(lengths.values()), 0
    for batch in batches:
        rows |= zip(batch, read([conversations[index] for index in batch]), strict=True)
        done += sum(lengths[index] for index in batch)
        report(len(rows), done, done / total)
    nothing = SparseRows.none(len(recipe.capture_temperatures))
    joined = SparseRows.join([nothing, *(rows[index] for index in sorted(rows))])
    return CaptureShard.of(conversations, status, joined)


@dataclass
class SourceReader:
    """A source model in this process that reads conversations. report: see capture_in_batches."""

    recipe: Recipe
    source: str
    model: Any
    report: Report = silent

    def capture_shard(self, conversations: Sequence[Conversation]) -> CaptureShard:
        limit = reading_limit(self.recipe, max_positions(self.model.config))
        return capture_in_batches(conversations, self.recipe, limit, self.read, self.report)

    @torch.inference_mode()
    def read(self, conversations: list[Conversation]) -> list[SparseRows]:
        """The rows of each conversation of a batch. Raises UserError if logits are NaN or infinite."""
        batch = ReadingBatch.of(conversations)
        refuse_unknown_ids(self.model, batch.largest_id, f"sources.{self.source}")
        logits = logits_at(self.model, batch.tokens, batch.mask, batch.positions)
        options = self.recipe.capture
        try:
            rows = sparse_rows(
                logits,
                batch.labels.to(logits.device),
                top_k=options.top_k,
                top_p=options.top_p,
                filter=options.filter,
                temperatures=self.recipe.capture_temperatures,
            )
        except NotFiniteError as error:
            raise not_finite(self.source, self.model.dtype, conversations, batch, error.row) from error
        return rows.split(batch.lengths)


def not_finite(
    source: str, dtype: torch.dtype, conversations: Sequence[Conversation], batch: ReadingBatch, row: int
) -> UserError:
    """The error for logits that are NaN or infinite. row: counted over the whole batch."""
    bounds = np.cumsum(batch.lengths)
    example = int(np.searchsorted(bounds, row, side="right"))
    row -= int(bounds[example]) - batch.lengths[example]
    return UserError(
        f"sources.{source}: the logits are NaN or infinite in example {conversations[example].example!r}, "
        f"response row {row}. The model's weights are damaged, or sources.{source}.dtype ({dtype}) "
        f"overflows. Set sources.{source}.dtype to bf16 or fp32, or fetch the model again."
    )


def logits_at(model: Any, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [n, v] at the flat positions [n] of tokens [b, s]. The output head sees no other position.

    The positions are selected at the input of the head. So everything that the model does to its logits
    afterwards (scaling, soft caps) is applied to them. If a model has no head module, it computes all logits,
    and the positions are selected after that. If a model is spread over several GPUs (device_map), its input
    goes to the device of the embedding, and the head may be on another device.
    """

    def pick(_: Any, inputs: tuple) -> tuple:
        hidden = inputs[0].flatten(0, -2)
        return (hidden[positions.to(hidden.device)].unsqueeze(0), *inputs[1:])

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(pick) if head is not None else None
    device = input_device(model)
    try:
        output = model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False)
    finally:
        if hook:
            hook.remove()
    logits = output.logits.flatten(0, 1)
    return logits if hook and len(logits) == len(positions) else logits[positions.to(logits.device)]
