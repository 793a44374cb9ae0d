"""A source model reads conversations by teacher forcing, and only its supervised positions meet the output head."""

from collections.abc import Sequence
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
    """Whether a source that reads at most `limit` tokens can read it, as an index in STATUSES."""
    if conversation.encoded is None:
        return NO_RESPONSE
    # The last token is only predicted, never read.
    return TOO_LONG if len(conversation.encoded.ids) - 1 > limit else CAPTURED


def reading_limit(recipe: Recipe, config: Any) -> int:
    """Most tokens that a source may read: the recipe's, or what its positions allow."""
    return min(recipe.training.seq_length, max_positions(config) or recipe.training.seq_length)


@dataclass
class SourceReader:
    """A source model that reads conversations. report: gets, after every batch, the tokens read of a shard and those left."""

    recipe: Recipe
    source: str
    model: Any
    report: Report = silent

    def capture_shard(self, conversations: Sequence[Conversation]) -> CaptureShard:
        """Reads them in batches of neighbours in length; the shard has them in their own order again."""
        limit = reading_limit(self.recipe, self.model.config)
        status = np.array([reading_status(conversation, limit) for conversation in conversations], np.uint8)
        chosen = np.flatnonzero(status == CAPTURED)
        lengths = [len(conversations[index].readable.ids) - 1 for index in chosen.tolist()]
        rows: dict[int, SparseRows] = {}
        done = 0
        for batch in token_budget_batches(lengths, self.recipe.capture.batch_tokens):
            indices = chosen[batch].tolist()
            rows |= zip(indices, self.read([conversations[index] for index in indices]), strict=True)
            done += sum(lengths[place] for place in batch)
            self.report(done, sum(lengths) - done, f"{len(rows)}/{len(lengths)} conversations")
        nothing = SparseRows.none(len(self.recipe.capture_temperatures))
        joined = SparseRows.join([nothing, *(rows[index] for index in chosen.tolist())])
        return CaptureShard.of(conversations, status, joined)

    @torch.inference_mode()
    def read(self, conversations: list[Conversation]) -> list[SparseRows]:
        """The rows of one batch, padded on the right. The logits after position t predict token t + 1."""
        encoded = [conversation.readable for conversation in conversations]
        refuse_unknown_ids(self.model, max(int(e.ids.max()) for e in encoded), f"sources.{self.source}")
        width = max(len(e.ids) for e in encoded) - 1
        tokens = np.zeros((len(encoded), width), np.int64)
        mask = np.zeros_like(tokens)
        for row, conversation in enumerate(encoded):
            tokens[row, : len(conversation.ids) - 1] = conversation.ids[:-1]
            mask[row, : len(conversation.ids) - 1] = 1
        positions = [row * width + np.flatnonzero(e.supervised) - 1 for row, e in enumerate(encoded)]
        logits = logits_at(self.model, *map(torch.from_numpy, (tokens, mask, np.concatenate(positions))))
        came = torch.from_numpy(np.concatenate([e.ids[e.supervised] for e in encoded]).astype(np.int64))
        lengths = [len(e.spans) for e in encoded]
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
            bounds = np.cumsum(lengths)
            example = int(np.searchsorted(bounds, error.row, side="right"))
            row = error.row - int(bounds[example]) + lengths[example]
            raise UserError(
                f"sources.{self.source}: NaN or infinite logits in example {conversations[example].example!r}, response row "
                f"{row}: the model's weights are broken, or sources.{self.source}.dtype ({self.model.dtype}) overflows: "
                "try bf16 or fp32"
            ) from error
        return rows.split(lengths)


def logits_at(model: Any, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [n, v] at the flat positions [n] of tokens [b, s]; the output head sees no other position.

    The positions are picked at the head's input, so that whatever the model does to its logits afterwards (scaling, soft caps)
    is done to them as well. A model without a head module of its own computes all logits first. A model spread over several GPUs
    (device_map) takes its input where its embedding is, and the head may be elsewhere.
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
