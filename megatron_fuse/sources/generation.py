"""Sampled answers of a causal language model in process, each decided by its own seed and by nothing that shares its batch.

A row's t-th token is the inverse of its cumulative distribution at the t-th number of the row's own random stream. Attention
masks and position ids hide the left padding, so neighbours change a row's logits by rounding only, and rounding changes a token
only where a random number falls within it of a step of the distribution.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from megatron_fuse.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """One prompt to answer: its ids, the most tokens of an answer, and the 128-bit key of its random stream."""

    name: str
    ids: Sequence[int]
    room: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """Generated ids without the stop token; stopped: the model ended it, otherwise room ran out."""

    ids: list[int]
    stopped: bool


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    stop_ids: Sequence[int],
    allowed: torch.Tensor,
    temperature: float,
    top_p: float,
    batch_size: int,
) -> list[Answer]:
    """Answers in the order of the prompts.

    allowed bool [v']: ids that may be sampled; columns of the logits beyond it may not. temperature 0 is greedy; top_p keeps the
    likeliest tokens until their mass reaches it. Batches are of neighbours in length. A prompt without room gets an empty answer
    that did not stop. Raises UserError where logits are not numbers.
    """
    answers = [Answer([], stopped=False)] * len(prompts)
    order = sorted((i for i, prompt in enumerate(prompts) if prompt.room > 0), key=lambda i: len(prompts[i].ids))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = _Batch(model, [prompts[i] for i in indices])
        for index, answer in zip(indices, batch.run(stop_ids, allowed, temperature, top_p), strict=True):
            answers[index] = answer
    return answers


class _Batch:
    """Rows that are generated together. Finished ones leave it, and so does padding that all the others share."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Prompt]) -> None:
        self.model, self.prompts = model, prompts
        self.device = model.get_input_embeddings().weight.device
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters  # ALiBi models do not
        self.only_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def run(self, stop_ids: Sequence[int], allowed: torch.Tensor, temperature: float, top_p: float) -> list[Answer]:
        rows, width = len(self.prompts), max(len(prompt.ids) for prompt in self.prompts)
        tokens = torch.zeros(rows, width, dtype=torch.long)
        mask = torch.zeros(rows, width, dtype=torch.long)
        for row, prompt in enumerate(self.prompts):
            tokens[row, width - len(prompt.ids) :] = torch.as_tensor(prompt.ids, dtype=torch.long)
            mask[row, width - len(prompt.ids) :] = 1
        tokens, mask, allowed = tokens.to(self.device), mask.to(self.device), allowed.to(self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        rooms = np.array([prompt.room for prompt in self.prompts])
        uniforms = np.stack(
            [np.random.Generator(np.random.Philox(key=prompt.seed)).random(rooms.max()) for prompt in self.prompts]
        )
        generated = np.zeros((rows, rooms.max()), dtype=np.int64)
        lengths = np.zeros(rows, dtype=np.int64)
        stopped = np.zeros(rows, dtype=bool)
        alive = np.arange(rows)
        cache = DynamicCache()
        for step in range(rooms.max()):
            logits = self._logits(tokens, mask, positions, cache, alive)
            logits = _forbid(logits, allowed)
            chosen = sample(logits, torch.from_numpy(uniforms[alive, step]).to(self.device), temperature, top_p)
            ids = chosen.cpu().numpy()
            ends = np.isin(ids, stop_ids)
            generated[alive, step] = ids
            stopped[alive] = ends
            lengths[alive] += ~ends
            kept = np.flatnonzero(~ends & (step + 1 < rooms[alive]))
            if len(kept) == 0:
                break
            if len(kept) < len(alive):
                alive = alive[kept]
                kept_rows = torch.from_numpy(kept).to(self.device)
                chosen, mask = chosen[kept_rows], mask[kept_rows]
                mask = _shrink(cache, mask, kept_rows)
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            positions = mask.sum(1, keepdim=True) - 1
            tokens = chosen[:, None]
        return [Answer(generated[row, : lengths[row]].tolist(), bool(stopped[row])) for row in range(rows)]

    @torch.inference_mode()
    def _logits(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, alive: np.ndarray
    ) -> torch.Tensor:
        """[rows, v] fp32 logits of the next token."""
        extra = {"position_ids": positions} if self.takes_positions else {}
        output = self.model(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **extra, **self.only_last
        )
        logits = output.logits[:, -1].float()
        bad = (~(logits < torch.inf)).any(dim=1)  # NaN or +inf
        if bad.any():
            name = self.prompts[alive[int(bad.nonzero()[0])]].name
            raise UserError(
                f"{self.model.config.name_or_path}: NaN or infinite logits while answering example {name!r}: "
                "the model's weights are broken, or its dtype overflows (try bf16 or fp32)"
            )
        return logits


def _forbid(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Logits [n, v] with -inf at every column that is not allowed [v']."""
    width = min(logits.shape[1], len(allowed))
    return logits[:, :width].masked_fill(~allowed[:width], -torch.inf)


def _shrink(cache: DynamicCache, mask: torch.Tensor, kept_rows: torch.Tensor) -> torch.Tensor:
    """Keeps these rows of the cache, and cuts off the left padding that is common to them; returns their mask.

    Without the cut a batch would grow beyond what the longest of its rows needs, and beyond what ALiBi tables hold.
    """
    padding = int(mask.argmax(dim=1).min())
    cache.batch_select_indices(kept_rows)
    if padding:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[..., padding:, :], layer.values[..., padding:, :]
    return mask[:, padding:]


def sample(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """One id [n] for each row of logits [n, v] fp32, by inverting its cumulative distribution at uniforms [n] in [0, 1)."""
    if temperature == 0:
        return logits.argmax(dim=1)
    probabilities = torch.softmax(logits / temperature, dim=1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered
        probabilities = probabilities.scatter(1, order, ordered.masked_fill(before >= top_p, 0.0))
    # In the order of ids, not of probabilities: two nearly equal ones may change places from batch to batch.
    cumulative = probabilities.double().cumsum(1)
    total = cumulative[:, -1:].contiguous()
    chosen = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # the last id with any mass, where the product rounds up to the total
    return torch.minimum(chosen, last).squeeze(1)
