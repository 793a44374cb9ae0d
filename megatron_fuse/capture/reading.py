"""A source model reads conversations by teacher forcing, and only its response positions meet the output head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_fuse.capture.distributions import NotFiniteError, SparseRows, sparse_rows
from megatron_fuse.capture.shards import EXACT_STATUS, STATUSES, CaptureShard
from megatron_fuse.chat import EncodedConversation
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import Example
from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.huggingface import max_positions, refuse_unknown_ids


def token_budget_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of sequences by falling length, in batches of at most batch_tokens padded tokens (or of one long sequence).

    The longest come first, so that a budget too large for the memory fails at once.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if room < 1:
            batches.append([])
            room = max(batch_tokens // lengths[index], 1)
        batches[-1].append(index)
        room -= 1
    return batches


@dataclass
class SourceReader:
    """A source model that reads conversations."""

    recipe: Recipe
    source: str
    model: Any

    def capture_shard(self, examples: list[Example], conversations: list[EncodedConversation | None]) -> CaptureShard:
        status = np.array([self._status(conversation) for conversation in conversations], np.uint8)
        chosen = np.flatnonzero(status == EXACT_STATUS)
        lengths = [len(conversations[index].ids) - 1 for index in chosen]
        rows: list[SparseRows] = [_no_rows(len(self.recipe.capture_temperatures))] * len(examples)
        for batch in token_budget_batches(lengths, self.recipe.capture.batch_tokens):
            indices = chosen[batch]
            done = self._read([examples[i].id for i in indices], [conversations[i] for i in indices])
            for index, part in zip(indices, done, strict=True):
                rows[index] = part
        joined = SparseRows.join(rows)
        kept = [c if s == EXACT_STATUS else None for c, s in zip(conversations, status, strict=True)]
        sums = [_cross_entropy(c, part) for c, part in zip(kept, rows, strict=True)]
        nothing = [np.zeros(0, np.int32)]
        return CaptureShard(
            offsets=np.cumsum([0, *(len(part.counts) for part in rows)], dtype=np.int64),
            status=status,
            stop=np.array([c is not None and c.stop for c in kept], np.uint8),
            leading=np.array([c is not None and c.leading for c in kept], np.uint8),
            response_bytes=np.array([c.ends[-1] if c is not None and len(c.ends) else 0 for c in kept], np.int32),
            ce_sum=np.array([ce for ce, _ in sums], np.float64),
            ce_stop=np.array([ce for _, ce in sums], np.float64),
            tokens=np.concatenate(nothing + [c.ids[c.prompt_length :] for c in kept if c]).astype(np.int32),
            starts=np.concatenate(nothing + [c.starts for c in kept if c]).astype(np.int32),
            token_logprobs=joined.token_logprobs,
            lse=joined.lse,
            counts=joined.counts,
            entry_ids=joined.ids,
            entry_logits=joined.logits,
        )

    def _status(self, conversation: EncodedConversation | None) -> int:
        if conversation is None:
            return STATUSES.index("no_response")
        if not conversation.exact:
            return STATUSES.index("inexact")
        limit = min(
            self.recipe.training.seq_length, max_positions(self.model.config) or self.recipe.training.seq_length
        )
        # The last token is only predicted, never read.
        return STATUSES.index("too_long") if len(conversation.ids) - 1 > limit else EXACT_STATUS

    @torch.inference_mode()
    def _read(self, names: list[str], conversations: list[EncodedConversation]) -> list[SparseRows]:
        """One batch, padded on the right. The logits after position t predict token t + 1."""
        width = max(len(c.ids) for c in conversations) - 1
        tokens = torch.zeros(len(conversations), width, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, conversation in enumerate(conversations):
            length = len(conversation.ids) - 1
            tokens[row, :length] = torch.from_numpy(conversation.ids[:-1].astype(np.int64))
            mask[row, :length] = 1
        largest = max(int(conversation.ids.max()) for conversation in conversations)
        refuse_unknown_ids(self.model, largest, f"sources.{self.source}")
        first = [row * width + c.prompt_length - 1 for row, c in enumerate(conversations)]
        counts = [len(c.ids) - c.prompt_length for c in conversations]
        positions = torch.cat([torch.arange(f, f + count) for f, count in zip(first, counts, strict=True)])
        logits = logits_at(self.model, tokens, mask, positions)
        came = torch.from_numpy(np.concatenate([c.ids[c.prompt_length :] for c in conversations]).astype(np.int64))
        options = self.recipe.capture
        try:
            rows = sparse_rows(
                logits,
                came.to(logits.device),
                top_k=options.top_k,
                top_p=options.top_p,
                filter=options.filter,
                temperatures=self.recipe.capture_temperatures,
            )
        except NotFiniteError as error:
            bounds = np.cumsum(counts)
            example = int(np.searchsorted(bounds, error.row, side="right"))
            row = error.row - int(bounds[example]) + counts[example]
            raise UserError(
                f"sources.{self.source}: NaN or infinite logits in example {names[example]!r}, response row {row}: the model's "
                f"weights are broken, or sources.{self.source}.dtype ({self.model.dtype}) overflows: try bf16 or fp32"
            ) from error
        return _split(rows, counts)


def logits_at(model: Any, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [n, v] at the flat positions [n] of tokens [b, s]; the output head sees no other position.

    The positions are picked at the head's input, so that whatever the model does to its logits afterwards (scaling, soft caps)
    is done to them as well. A model without a head module of its own computes all logits first.
    """

    def pick(_: Any, inputs: tuple) -> tuple:
        hidden = inputs[0].flatten(0, -2)
        return (hidden[positions.to(hidden.device)].unsqueeze(0), *inputs[1:])

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        output = model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    finally:
        if hook:
            hook.remove()
    logits = output.logits.flatten(0, 1)
    return logits if hook and len(logits) == len(positions) else logits[positions.to(logits.device)]


def _no_rows(temperatures: int) -> SparseRows:
    empty = np.zeros(0, np.float32)
    return SparseRows(
        np.zeros(0, np.uint8), np.zeros(0, np.int32), empty, np.zeros((0, 1 + temperatures), np.float32), empty
    )


def _split(rows: SparseRows, counts: list[int]) -> list[SparseRows]:
    at = np.cumsum(counts)[:-1]
    entries = np.concatenate([[0], np.cumsum(rows.counts, dtype=np.int64)])[at]
    parts = [
        np.split(a, b)
        for a, b in (
            (rows.counts, at),
            (rows.ids, entries),
            (rows.logits, entries),
            (rows.lse, at),
            (rows.token_logprobs, at),
        )
    ]
    return [SparseRows(*fields) for fields in zip(*parts, strict=True)]


def _cross_entropy(conversation: EncodedConversation | None, rows: SparseRows) -> tuple[float, float]:
    """(nats over the response's bytes, nats of the stop token); NaN where there is nothing to sum."""
    if conversation is None:
        return np.nan, np.nan
    nats = -rows.token_logprobs.astype(np.float64)
    response = len(conversation.ends)
    return float(nats[:response].sum()), float(nats[response]) if conversation.stop else np.nan
