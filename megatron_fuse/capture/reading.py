"""A source model reads conversations by teacher forcing.

Only supervised positions go through the output head.
"""

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
    """Whether a source that reads at most `limit` tokens can read a conversation: an index in STATUSES."""
    if conversation.encoded is None:
        return NO_RESPONSE
    # The last token is only predicted, never read.
    return TOO_LONG if len(conversation.encoded.ids) - 1 > limit else CAPTURED


def reading_limit(recipe: Recipe, config: Any) -> int:
    """The most tokens that a source may read: the recipe's limit, or the model's positions if fewer."""
    return min(recipe.training.seq_length, max_positions(config) or recipe.training.seq_length)


@dataclass
class SourceReader:
    """A source model that reads conversations.

    report: called after every batch with the conversations and the tokens that are read, and the share of all
    tokens.
    """

    recipe: Recipe
    source: str
    model: Any
    report: Report = silent

    def capture_shard(self, conversations: Sequence[Conversation]) -> CaptureShard:
        """Reads the conversations in batches of similar length.

        The shard has them in their original order.
        """
        limit = reading_limit(self.recipe, self.model.config)
        status = np.array([reading_status(conversation, limit) for conversation in conversations], np.uint8)
        chosen = np.flatnonzero(status == CAPTURED)
        lengths = [len(conversations[index].readable.ids) - 1 for index in chosen.tolist()]
        rows: dict[int, SparseRows] = {}
        done = 0
        for batch in token_budget_batches(lengths, self.recipe.capture.batch_tokens):
            indices = chosen[batch].tolist()
            rows |= zip(indices, self.read([conversations[index] for index in indices]), strict=True)
            done += sum(lengths[index] for index in batch)
            self.report(len(rows), done, done / sum(lengths))
        nothing = SparseRows.none(len(self.recipe.capture_temperatures))
        joined = SparseRows.join([nothing, *(rows[index] for index in chosen.tolist())])
        return CaptureShard.of(conversations, status, joined)

    @torch.inference_mode()
    def read(self, conversations: list[Conversation]) -> list[SparseRows]:
        """The rows of each conversation of a batch. The batch is padded on the right.

        The logits at position t predict token t + 1.
        Raises UserError if logits are NaN or infinite.
        """
        encoded = [conversation.readable for conversation in conversations]
        refuse_unknown_ids(self.model, max(int(e.ids.max()) for e in encoded), f"sources.{self.source}")
        # The last token of a conversation is only predicted, so it is not read.
        width = max(len(e.ids) for e in encoded) - 1
        tokens = np.zeros((len(encoded), width), np.int64)
        mask = np.zeros_like(tokens)
        for row, conversation in enumerate(encoded):
            tokens[row, : len(conversation.ids) - 1] = conversation.ids[:-1]
            mask[row, : len(conversation.ids) - 1] = 1
        # Supervised token i is predicted at position i - 1, counted over the flattened batch.
        positions = [row * width + np.flatnonzero(e.supervised) - 1 for row, e in enumerate(encoded)]
        logits = logits_at(self.model, *map(torch.from_numpy, (tokens, mask, np.concatenate(positions))))
        labels = torch.from_numpy(np.concatenate([e.ids[e.supervised] for e in encoded]).astype(np.int64))
        lengths = [len(e.spans) for e in encoded]
        options = self.recipe.capture
        try:
            rows = sparse_rows(
                logits,
                labels.to(logits.device),
                top_k=options.top_k,
                top_p=options.top_p,
                filter=options.filter,
                temperatures=self.recipe.capture_temperatures,
            )
        except NotFiniteError as error:
            # error.row counts over the whole batch: find the example, and the row within it.
            bounds = np.cumsum(lengths)
            example = int(np.searchsorted(bounds, error.row, side="right"))
            row = error.row - int(bounds[example]) + lengths[example]
            raise UserError(
                f"sources.{self.source}: the logits are NaN or infinite in example "
                f"{conversations[example].example!r}, response row {row}. The model's weights are damaged, "
                f"or sources.{self.source}.dtype ({self.model.dtype}) overflows. Set "
                f"sources.{self.source}.dtype to bf16 or fp32, or fetch the model again."
            ) from error
        return rows.split(lengths)


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
