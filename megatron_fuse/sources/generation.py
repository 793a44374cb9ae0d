"""Samples answers of a causal language model in process.

Each answer depends on its own seed, not on its batch.

Tokens are sampled by inverting the cumulative distribution (CDF), with one random stream per row: the t-th
token of a row uses the t-th number of the row's stream. Attention masks and position ids hide the left
padding, so the other rows of a batch change a row's logits only by rounding. A token changes only if its
random number is within the rounding error of a step of the CDF.

Active rows share one cache, with padding on the left up to the longest of them. A finished row leaves the
cache, and so does padding that all other rows share. Waiting prompts take the free places, so that short
answers do not wait for long ones.
"""

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import pad

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.loading import input_device
from megatron_fuse.progress import Report, silent
from megatron_fuse.sources.row_cache import RowCache, cache_argument, keeps_keys_and_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # its import takes seconds, also for commands that load no model


@dataclass(frozen=True)
class Prompt:
    """One prompt to answer: its ids, the most tokens of an answer, and the 128-bit key of its random
    stream.
    """

    name: str
    ids: Sequence[int]
    room: int
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen and where an answer ends.

    stop_ids end an answer and are not part of it. allowed bool [v']: the ids that may be sampled; columns of
    the logits beyond v' are never sampled. temperature 0 is greedy. top_p keeps the likeliest tokens until
    their mass reaches top_p. is_complete: called after every token, if given: whether the ids so far end an
    answer without a stop id, by a stop text.
    """

    stop_ids: frozenset[int]
    allowed: torch.Tensor
    temperature: float = 1.0
    top_p: float = 1.0
    is_complete: Callable[[Sequence[int]], bool] | None = None


@dataclass(frozen=True)
class Answer:
    """Generated ids without the stop token.

    stopped: whether the model ended the answer; if not, its room ran out.
    """

    ids: list[int]
    stopped: bool


def _ignore(prompt: Prompt, answer: Answer) -> None:
    """The default of `finished`."""


@torch.inference_mode()
def generate(
    model: "PreTrainedModel",
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    batch_tokens: int,
    report: Report = silent,
    finished: Callable[[Prompt, Answer], None] = _ignore,
) -> list[Answer]:
    """The answers in the order of the prompts.

    batch_tokens: the most positions of all active rows. Every row counts with the length that the longest of
    them may reach; a row that is longer than batch_tokens runs alone. The longest rows begin, so that a
    budget that is too large for the memory fails at once. A prompt without room gets an empty answer with
    stopped = False. report: called after every step with the finished answers, the tokens of all answers, and
    the least share of all tokens that these are. finished: called with every answer as soon as it ends.
    Raises UserError if logits are NaN or infinite.
    """
    rows = [_Row(prompt) for prompt in prompts]
    waiting = deque(sorted((row for row in rows if row.prompt.room > 0), key=lambda row: -row.limit))
    for row in rows:
        if row.prompt.room <= 0:
            finished(row.prompt, row.answer)
    generator = _Generator(model, sampling, finished)
    batch = generator.start([])
    while waiting or batch.rows:
        newcomers = _newcomers(waiting, batch.rows, batch_tokens)
        if newcomers:
            batch = _join(batch, generator.step(generator.start(newcomers)))
        else:
            batch = generator.step(batch)
        under_way = [*waiting, *batch.rows]
        tokens, left = (
            sum(len(row.ids) for row in rows),
            sum(row.prompt.room - len(row.ids) for row in under_way),
        )
        # If all answers are empty, nothing was written and nothing is left.
        report(len(rows) - len(under_way), tokens, tokens / max(tokens + left, 1) if under_way else 1.0)
    return [row.answer for row in rows]


@dataclass(eq=False)
class _Row:
    """A prompt and its answer so far."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    stopped: bool = False
    uniforms: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.uniforms = np.random.Generator(np.random.Philox(key=self.prompt.seed)).random(
            max(self.prompt.room, 0)
        )

    @property
    def limit(self) -> int:
        """The most positions that the row may need."""
        return len(self.prompt.ids) + self.prompt.room

    @property
    def answer(self) -> Answer:
        return Answer(self.ids, self.stopped)

    def take(self, token: int, sampling: Sampling) -> bool:
        """Adds a token. Returns whether another token follows."""
        self.stopped = token in sampling.stop_ids
        if not self.stopped:
            self.ids.append(token)
            self.stopped = sampling.is_complete is not None and sampling.is_complete(self.ids)
        return not self.stopped and len(self.ids) < self.prompt.room


@dataclass(frozen=True)
class _Batch:
    """The active rows.

    tokens [b, n]: the next tokens to read, after the positions in the cache. The cache is empty, or has all
    but the last token of each row. mask [b, w]: 1 for a row's tokens, with the n next ones, and 0 for padding
    on the left. w is the number of tokens of the longest row: it must not be larger, because of the size of
    ALiBi tables and position embeddings.
    """

    rows: list[_Row]
    tokens: torch.Tensor
    mask: torch.Tensor
    cache: RowCache


def _newcomers(waiting: deque[_Row], rows: list[_Row], batch_tokens: int) -> list[_Row]:
    """Takes the rows that may begin now from the waiting ones, which are sorted by falling limit.

    Rows begin only if at least a quarter of the places is free. Active rows must wait while prompts are read,
    so it is better to read several prompts together.
    """
    if not waiting:
        return []
    places = max(batch_tokens // max(row.limit for row in [waiting[0], *rows]), 1)
    free = places - len(rows)
    if 4 * free < places:
        return []
    return [waiting.popleft() for _ in range(min(free, len(waiting)))]


def _join(batch: _Batch, newcomers: _Batch) -> _Batch:
    """Both as one batch. The narrower one is padded on the left to the width of the other."""
    if not (batch.rows and newcomers.rows):
        return batch if batch.rows else newcomers
    width = max(batch.mask.shape[1], newcomers.mask.shape[1])
    mask = torch.cat([pad(each.mask, (width - each.mask.shape[1], 0)) for each in (batch, newcomers)])
    batch.cache.join(newcomers.cache)
    return _Batch(batch.rows + newcomers.rows, torch.cat([batch.tokens, newcomers.tokens]), mask, batch.cache)


def _closed_ranks(stays: list[bool]) -> list[int]:
    """The order of the rows that stay: the last of them take the places of the rows that leave.

    So few rows change their place, and few caches are copied.
    """
    kept = [index for index, stay in enumerate(stays) if stay]
    return [index if stays[index] else kept.pop() for index in range(len(kept))]


class _Generator:
    """Generates one token for each row of a batch."""

    def __init__(
        self,
        model: "PreTrainedModel",
        sampling: Sampling,
        finished: Callable[[Prompt, Answer], None],
    ) -> None:
        self.model, self.sampling, self.device = model, sampling, input_device(model)
        self.finished = finished
        self.allowed = sampling.allowed.to(self.device)
        parameters = inspect.signature(model.forward).parameters
        argument = cache_argument(model.forward)
        if argument is None or not keeps_keys_and_values(model.config):
            raise UserError(
                f"{model.config.name_or_path}: {type(model).__name__} keeps other state than keys and "
                "values, which generation in batches does not support here. Use a server for its answers, or "
                "name a file of its answers (docs/responses.md)."
            )
        self.cache_argument = argument
        self.takes_positions = "position_ids" in parameters  # ALiBi models do not
        self.only_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def start(self, rows: list[_Row]) -> _Batch:
        """A batch of rows whose prompts are not read yet."""
        width = max((len(row.prompt.ids) for row in rows), default=0)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(rows):
            tokens[index, width - len(row.prompt.ids) :] = torch.as_tensor(row.prompt.ids, dtype=torch.long)
            mask[index, width - len(row.prompt.ids) :] = 1
        return _Batch(rows, tokens.to(self.device), mask.to(self.device), RowCache())

    def step(self, batch: _Batch) -> _Batch:
        """Gives every row its next token, and returns the batch of the rows that continue."""
        uniforms = torch.tensor([row.uniforms[len(row.ids)] for row in batch.rows], device=self.device)
        chosen = sample(self._logits(batch), uniforms, self.sampling.temperature, self.sampling.top_p)
        goes_on = [
            row.take(token, self.sampling) for row, token in zip(batch.rows, chosen.tolist(), strict=True)
        ]
        rows, mask = batch.rows, batch.mask
        for row, stays in zip(rows, goes_on, strict=True):
            if not stays:
                self.finished(row.prompt, row.answer)
        if not all(goes_on):
            order = _closed_ranks(goes_on)
            rows, chosen, mask = [rows[index] for index in order], chosen[order], mask[order]
            padding = int(mask.argmax(dim=1).min()) if order else 0
            batch.cache.keep(order, padding)
            mask = mask[:, padding:]
        return _Batch(rows, chosen[:, None], pad(mask, (0, 1), value=1), batch.cache)

    def _logits(self, batch: _Batch) -> torch.Tensor:
        """[b, v'] fp32 logits of the next token, -inf for ids that are not allowed."""
        positions = (batch.mask.cumsum(1) - 1).clamp(min=0)[:, -batch.tokens.shape[1] :]
        output = self.model(
            input_ids=batch.tokens,
            attention_mask=batch.mask,
            use_cache=True,
            **{self.cache_argument: batch.cache},
            **({"position_ids": positions} if self.takes_positions else {}),
            **self.only_last,
        )
        logits = output.logits[:, -1].float()
        bad = (~(logits < torch.inf)).any(dim=1)  # NaN or +inf
        if bad.any():
            name = batch.rows[int(bad.nonzero()[0])].prompt.name
            raise UserError(
                f"{self.model.config.name_or_path}: the logits are NaN or infinite in the answer to example "
                f"{name!r}. The model's weights are damaged, or its dtype overflows. Set its dtype to bf16 "
                "or fp32, or fetch the model again."
            )
        width = min(logits.shape[1], len(self.allowed))
        return logits[:, :width].masked_fill(~self.allowed[:width], -torch.inf)


def sample(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """One id [n] per row of logits [n, v] fp32, by inverting its CDF at uniforms [n] in [0, 1)."""
    if temperature == 0:
        return logits.argmax(dim=1)
    probabilities = torch.softmax(logits / temperature, dim=1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered
        probabilities = probabilities.scatter(1, order, ordered.masked_fill(before >= top_p, 0.0))
    # The CDF runs in the order of ids, not of probabilities: two ids with nearly equal probabilities could
    # change their order from batch to batch.
    cumulative = probabilities.double().cumsum(1)
    total = cumulative[:, -1:].contiguous()
    chosen = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    # The product may round up to the total. Then the last id that has any mass is chosen.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(chosen, last).squeeze(1)
