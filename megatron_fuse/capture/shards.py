"""The capture of one shard of examples: a safetensors file of concatenated ragged arrays and offsets."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from megatron_fuse import ragged
from megatron_fuse.capture.distributions import SparseRows
from megatron_fuse.chat import EncodedConversation
from megatron_fuse.errors import UserError
from megatron_fuse.storage import Artifact, write_safetensors
from megatron_fuse.text_safety import brief
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans

# The result for an example. Only `captured` ones have rows. The last two are for
# files of captures. mismatch: the file's tokens are not those of the source's
# own tokenizer and template. missing: the file has no row for the example.
STATUSES = ("captured", "too_long", "no_response", "mismatch", "missing")
CAPTURED, TOO_LONG, NO_RESPONSE, MISMATCH, MISSING = range(len(STATUSES))

_BY_ROW = ("tokens", "starts", "ends", "flags", "token_logprobs", "lse", "counts")
_BY_EXAMPLE = ("status", "response_bytes", "lossy", "ce_sum", "ce_stop")


@dataclass(frozen=True, eq=False)
class Conversation:
    """An example as a source reads it. encoded: None if there is no response."""

    example: str
    encoded: EncodedConversation | None

    @property
    def readable(self) -> EncodedConversation:
        """`encoded` of a conversation with a response. Raises ValueError if there is no response."""
        if self.encoded is None:
            raise ValueError(f"example {self.example} has no response")
        return self.encoded


@dataclass(frozen=True, eq=False)
class CaptureShard:
    """The capture of n examples, with r rows and e entries, at t temperatures besides T = 1.

    There is one row per supervised token. The row predicts this token.
    """

    offsets: np.ndarray  # int64 [n + 1]: example i has the rows offsets[i] to offsets[i + 1]
    status: np.ndarray  # uint8 [n]: index in STATUSES
    response_bytes: np.ndarray  # int32 [n]: `EncodedConversation.size`, 0 if there are no rows
    lossy: np.ndarray  # uint8 [n]: 1 if the tokens do not spell every byte
    ce_sum: np.ndarray  # float64 [n]: nats of supervised tokens, without stop tokens; NaN if no rows
    ce_stop: np.ndarray  # float64 [n]: nats of the stop tokens; NaN if none is supervised
    tokens: np.ndarray  # int32 [r]: the tokens of the text
    starts: np.ndarray  # int32 [r]: the token's first byte in the example's bytes, see TokenSpans
    ends: np.ndarray  # int32 [r]: the end of its bytes
    flags: np.ndarray  # uint8 [r]: SpanFlag
    token_logprobs: np.ndarray  # float32 [r]: the token's log p at T = 1
    lse: np.ndarray  # float32 [r, 1 + t]: log-sum-exp relative to the largest logit
    counts: np.ndarray  # uint8 [r]: entries of a row
    entry_ids: np.ndarray  # int32 [e]
    entry_logits: np.ndarray  # float32 [e]: relative to the largest logit, falling within a row
    vocab_size: np.ndarray  # int64 [1]: columns of the model's logits, above every entry id; 0 if no rows

    @classmethod
    def of(
        cls, conversations: Sequence[Conversation], status: np.ndarray, rows: SparseRows
    ) -> "CaptureShard":
        """Makes the shard. rows: the rows of the captured conversations, concatenated."""
        captured = status == CAPTURED
        read = [c.readable for c, is_captured in zip(conversations, captured, strict=True) if is_captured]
        spans = TokenSpans.join([each.spans for each in read], [0] * len(read))
        lengths, sizes = np.zeros((2, len(conversations)), np.int64)
        lengths[captured] = [len(each.spans) for each in read]
        sizes[captured] = [each.size for each in read]
        lossy = np.zeros(len(conversations), np.uint8)
        lossy[captured] = [not each.exact for each in read]
        # Cross-entropies are sums per example: `example` is the example of each row.
        example = ragged.row_numbers(lengths)
        nats, stop = -rows.token_logprobs.astype(np.float64), spans.has(SpanFlag.STOP)

        def sums(chosen: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
            weights = None if weights is None else weights[chosen]
            return np.bincount(example[chosen], weights, minlength=len(conversations))

        return cls(
            offsets=ragged.offsets(lengths),
            status=status.astype(np.uint8),
            response_bytes=sizes.astype(np.int32),
            lossy=lossy,
            ce_sum=np.where(lengths > 0, sums(~stop, nats), np.nan),
            ce_stop=np.where(sums(stop) > 0, sums(stop, nats), np.nan),
            tokens=spans.tokens.astype(np.int32),
            starts=spans.starts.astype(np.int32),
            ends=spans.ends.astype(np.int32),
            flags=spans.flags,
            token_logprobs=rows.token_logprobs,
            lse=rows.lse,
            counts=rows.counts,
            entry_ids=rows.ids,
            entry_logits=rows.logits,
            vocab_size=np.array([rows.vocab_size], np.int64),
        )

    def save(self, path: Path) -> None:
        tensors = {field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}
        write_safetensors(path, tensors)

    def rows(self, example: int) -> slice:
        return slice(int(self.offsets[example]), int(self.offsets[example + 1]))

    def spans(self, example: int) -> TokenSpans:
        """The spans of one example, counted in its own bytes."""
        rows = self.rows(example)
        starts, ends = (array[rows].astype(np.int64) for array in (self.starts, self.ends))
        return TokenSpans(self.tokens[rows], starts, ends, self.flags[rows])

    def all_spans(self, text_offsets: Sequence[int] | np.ndarray) -> TokenSpans:
        """The spans of all rows, counted in the shard's concatenated bytes.

        text_offsets [n]: the place where each example's bytes begin.
        """
        offset = np.repeat(np.asarray(text_offsets, np.int64), np.diff(self.offsets))
        return TokenSpans(self.tokens, self.starts + offset, self.ends + offset, self.flags)

    @property
    def response_tokens(self) -> np.ndarray:
        """int32 [n]: the number of supervised tokens without stop tokens; `ce_sum` is the sum over these."""
        before = ragged.offsets((self.flags & SpanFlag.STOP) == 0)
        return np.diff(before[self.offsets]).astype(np.int32)

    def logprobs(self, column: int, temperature: float) -> np.ndarray:
        """float32 [e]: log-probabilities of the entries at a temperature. column: its column in `lse`."""
        return self.entry_logits / np.float32(temperature) - np.repeat(self.lse[:, column], self.counts)


def capture_shard(artifact: Artifact, index: int) -> CaptureShard:
    """One shard of a finished capture, checked by the checksum in its manifest.

    Raises UserError, with the file, if the checksum differs or the file is broken.
    """
    return read_capture_shard(artifact.checked(artifact.files(".safetensors")[index]))


def read_capture_shard(path: Path) -> CaptureShard:
    """Reads a shard. Raises UserError if the file is missing or broken, or if a row has impossible values."""
    fix = f"Remove {path.parent} and run megatron-fuse capture again."
    try:
        shard = CaptureShard(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a capture ({brief(str(error), 150)}). {fix}") from error
    fault = _misfit(shard) or _impossible_row(shard)
    if fault:
        raise UserError(f"{path}: {fault}. {fix}")
    return shard


def _misfit(shard: CaptureShard) -> str | None:
    """The first array whose length does not fit the others, in words; None if all fit."""
    examples, rows, entries = len(shard.offsets) - 1, len(shard.counts), len(shard.entry_ids)
    wanted = dict.fromkeys(_BY_EXAMPLE, examples) | dict.fromkeys(_BY_ROW, rows) | {"entry_logits": entries}
    for name, length in wanted.items():
        if len(getattr(shard, name)) != length:
            return f"{name} has {len(getattr(shard, name))} items, but the other arrays need {length}"
    if (
        examples < 0
        or shard.offsets[0] != 0
        or shard.offsets[-1] != rows
        or (np.diff(shard.offsets) < 0).any()
    ):
        return f"offsets do not divide its {rows} rows"
    if int(shard.counts.sum()) != entries:
        return f"counts add up to {int(shard.counts.sum())}, but there are {entries} entries"
    return None


def _impossible_row(shard: CaptureShard) -> str | None:
    """The first row with a value that is impossible in a distribution or a text, in words; else None."""
    row_of_entry = ragged.row_numbers(shard.counts)
    same_example = np.ones(len(shard.counts), bool)
    same_example[shard.offsets[:-1][np.diff(shard.offsets) > 0]] = False
    backwards = same_example & (np.diff(shard.starts, prepend=0) < 0)
    same_row = np.diff(row_of_entry, prepend=-1) == 0
    rising = same_row & (np.diff(shard.entry_logits, prepend=0) > 0)
    every = np.arange(len(shard.counts))
    # The text's token may have probability 0 (-inf), so only +inf and
    # NaN are refused: a comparison with NaN is false.
    for what, bad, row in (
        ("token_logprobs is not finite", ~(shard.token_logprobs < np.inf), every),
        ("lse is not finite", ~np.isfinite(shard.lse).all(1), every),
        ("counts is 0", shard.counts == 0, every),
        (
            "starts and ends are out of order",
            backwards | (shard.starts < 0) | (shard.ends < shard.starts),
            every,
        ),
        ("entry_logits is not finite", ~np.isfinite(shard.entry_logits), row_of_entry),
        ("entry_logits rise", rising | (shard.entry_logits > 0), row_of_entry),
        (
            f"an entry's id is not one of the model's {shard.vocab_size[0]}",
            (shard.entry_ids < 0) | (shard.entry_ids >= shard.vocab_size[0]),
            row_of_entry,
        ),
    ):
        if bad.any():
            return f"{what} in row {row[bad][0]}"
    return None
