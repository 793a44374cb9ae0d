"""Sparse distributions over the source's vocabulary, rewritten as distributions over the target's.

Mass is conserved: entries that meet on one target token add up, what cannot be mapped joins the tail, which is never
stored (tail = 1 - sum of the stored).
"""

from dataclasses import dataclass

import numpy as np

from megatron_fuse.alignment.vocabulary import VocabularyMap
from megatron_fuse.tokenization import Tokenizer


@dataclass(frozen=True, eq=False)
class Rows:
    """Ragged sparse distributions: counts uint8 [r]; ids int32 [e]; logprobs float32 [e], natural, at the KL
    temperature; e = counts.sum(), row after row."""

    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray

    def __post_init__(self) -> None:
        total = int(self.counts.sum(dtype=np.int64))
        if not total == len(self.ids) == len(self.logprobs):
            raise ValueError(f"counts add up to {total}, but {len(self.ids)} ids, {len(self.logprobs)} logprobs")

    def kept(self) -> np.ndarray:
        """float64 [r]: stored mass of every row."""
        rows = np.repeat(np.arange(len(self.counts)), self.counts)
        return np.bincount(rows, np.exp(self.logprobs.astype(np.float64)), minlength=len(self.counts))


@dataclass(frozen=True, eq=False)
class LabelMass:
    """Per target row, the share of the first actual source token's mass that belongs to the label.

    log_fraction float64 [m]: log f, -inf where nothing is to be corrected; source_token int32 [m]: s1;
    source_logprob float64 [m]: log p_T(s1), used when s1 is not among the stored entries; label int32 [m].
    """

    log_fraction: np.ndarray
    source_token: np.ndarray
    source_logprob: np.ndarray
    label: np.ndarray

    @classmethod
    def none(cls, rows: int) -> "LabelMass":
        """Nothing to be corrected in so many target rows."""
        absent, nothing = np.full(rows, -1, dtype=np.int32), np.full(rows, -np.inf)
        return cls(log_fraction=nothing, source_token=absent, source_logprob=nothing, label=absent)


def project_rows(
    rows: Rows,
    source_row: np.ndarray,
    vocabulary_map: VocabularyMap,
    *,
    leading: np.ndarray,
    source_leading: np.ndarray | None = None,
    labels: LabelMass | None = None,
) -> Rows:
    """The rows of the target.

    rows: r source rows; source_row int32 [m]: the row each target row takes, -1 = none (no entries);
    leading bool [m], source_leading bool [r] (default: none): `EncodedConversation.leading_rows` of target and source;
    labels: the correction of `label_mass`.
    Returns m rows; entries of one row have different ids and stand by falling log-probability (then by id).
    """
    targets, entries = _expand(rows, source_row)
    ids = rows.ids[entries]
    logprobs = rows.logprobs[entries].astype(np.float64)
    if np.isnan(logprobs).any():
        raise ValueError("a log-probability is NaN")
    state = np.asarray(leading, dtype=np.int64)
    if source_leading is not None and len(source_leading):
        state = state + 2 * (np.asarray(source_leading)[source_row] & (source_row >= 0))
    mapped = vocabulary_map.table()[state[targets], ids]
    if labels is not None:
        first = ids == labels.source_token[targets]
        source_logprob = labels.source_logprob.copy()
        source_logprob[targets[first]] = logprobs[first]
        with np.errstate(divide="ignore"):  # f = 1 leaves nothing: log 0
            logprobs[first] += np.log1p(-np.exp(labels.log_fraction[targets[first]]))
        corrected = np.flatnonzero(labels.log_fraction > -np.inf)
        targets = np.concatenate([targets, corrected])
        mapped = np.concatenate([mapped, labels.label[corrected]])
        logprobs = np.concatenate([logprobs, source_logprob[corrected] + labels.log_fraction[corrected]])
    return _merge(targets, mapped, logprobs, len(source_row))


def label_mass(
    rows: Rows,
    source_row: np.ndarray,
    source: Tokenizer,
    *,
    response: bytes,
    source_tokens: np.ndarray,
    source_ends: np.ndarray,
    target_tokens: np.ndarray,
    target_ends: np.ndarray,
    label_logprobs: np.ndarray,
    logsumexp: np.ndarray,
    logsumexp_temperature: np.ndarray,
    temperature: float,
) -> LabelMass:
    """The label's own mass where a target token contains a whole source token and goes on beyond it.

    Projecting the source's entries alone makes such a teacher vote against the label: " internationalization" is one
    target token, " international" + "ization" are two of the source, and the first would get all the mass. With s1,
    s2 ... the actual source tokens from that row on, f = p_1(s2 | s1) p_1(s3 | ..) ... over those that end within the
    label, times, if the label ends inside a source token, the T=1 mass of the known tokens there that begin with the
    bytes left over. The label gets p_T(s1) f, the piece of s1 keeps p_T(s1) (1 - f). Only the first decision is
    tempered: a product of tempered conditionals would flatten every label of several pieces.

    rows, source_row [m]: as in project_rows, at `temperature`; response: its UTF-8; *_tokens, *_ends: actual response
    tokens without the stop token and the offsets where they end (n of the source, mt of the target; m = mt or mt + 1);
    label_logprobs, logsumexp, logsumexp_temperature float [r]: T=1 log-probability of the actual token, and the two
    log-sum-exps relative to the largest logit. Raises ValueError if the two do not end at the same byte.
    """
    m, count = len(source_row), len(target_ends)
    if not len(source_ends):
        return LabelMass.none(m)
    if source_ends[-1] != target_ends[-1]:
        raise ValueError(f"the source's tokens end at byte {source_ends[-1]}, the target's at {target_ends[-1]}")
    actual = label_logprobs.astype(np.float64)
    j = np.clip(source_row[:count], 0, len(source_ends) - 1)  # stop rows hold no token; masked below
    past = np.searchsorted(source_ends, target_ends, side="right")  # first source token that ends beyond the label
    starts = np.concatenate([np.zeros(1, target_ends.dtype), target_ends])[:count]
    applies = (source_row[:count] >= 0) & (source_row[:count] < len(source_ends))
    applies &= (source_ends[j] > starts) & (source_ends[j] < target_ends)
    chain = actual[: len(source_ends)]
    impossible = np.isneginf(chain)  # a masked logit: counted aside, since a sum would carry it to all later labels
    total = np.append(0.0, np.cumsum(np.where(impossible, 0.0, chain)))
    blocked = np.append(0, np.cumsum(impossible))
    second = np.minimum(j + 1, past)
    applies &= blocked[past] == blocked[second]
    log_fraction = np.where(applies, total[past] - total[second], -np.inf)

    partial = np.flatnonzero(applies & (source_ends[past - 1] < target_ends))
    if len(partial):
        row = past[partial]
        begin = source_ends[row - 1]
        left = _leftover_mass(
            rows,
            row,
            source,
            left=_windows(response, begin, target_ends[partial]),
            actual_token=source_tokens[row],
            actual_logprob=actual[row],
            scale=temperature,
            shift=temperature * logsumexp_temperature[row] - logsumexp[row],
        )
        with np.errstate(divide="ignore"):
            log_fraction[partial] += np.log(left)
    first_logprob = (actual[j] + logsumexp[j]) / temperature - logsumexp_temperature[j]
    return LabelMass(
        log_fraction=_pad(np.minimum(log_fraction, 0.0), m, -np.inf),
        source_token=_pad(np.where(applies, source_tokens[j], -1).astype(np.int32), m, -1),
        source_logprob=_pad(first_logprob, m, -np.inf),
        label=_pad(np.asarray(target_tokens, dtype=np.int32), m, -1),
    )


def _windows(response: bytes, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes response[begin:end] of several spans: uint8 [n, longest], padded with anything, and lengths [n]."""
    lengths = end - begin
    columns = np.arange(int(lengths.max(initial=0)))
    data = np.frombuffer(response, dtype=np.uint8)
    return data[np.minimum(begin[:, None] + columns, len(data) - 1)], lengths


def _leftover_mass(
    rows: Rows,
    row: np.ndarray,
    source: Tokenizer,
    *,
    left: tuple[np.ndarray, np.ndarray],
    actual_token: np.ndarray,
    actual_logprob: np.ndarray,
    scale: float,
    shift: np.ndarray,
) -> np.ndarray:
    """T=1 mass [n] of the entries of `row` that begin with the bytes left over, the actual token (which does) included.

    An entry's T=1 log-probability is scale * logprob + shift.
    """
    windows, lengths = left
    where, entries = _expand(rows, row)
    ids = rows.ids[entries]
    width = windows.shape[1]
    pieces = source.byte_matrix[ids, :width]
    equal = (pieces == windows[where]) | (np.arange(width) >= lengths[where, None])
    begins = equal.all(axis=1) & (source.byte_lengths[ids] >= lengths[where])
    begins &= ids != actual_token[where]
    masses = np.exp(scale * rows.logprobs[entries].astype(np.float64) + shift[where]) * begins
    return np.bincount(where, masses, minlength=len(row)) + np.exp(actual_logprob)


def _pad(values: np.ndarray, length: int, fill: float) -> np.ndarray:
    """Values of the token rows, then of the stop row if there is one."""
    return np.concatenate([values, np.full(length - len(values), fill, dtype=values.dtype)])


def _expand(rows: Rows, source_row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every entry of every row taken: the place in source_row, and the index into rows.ids."""
    counts = rows.counts.astype(np.int64)
    ends = np.cumsum(counts)
    taken = np.flatnonzero(source_row >= 0)
    chosen = np.asarray(source_row)[taken]
    sizes = counts[chosen]
    places = np.repeat(taken, sizes)
    begin = np.repeat(ends[chosen] - np.cumsum(sizes), sizes)  # source offset minus place in the output
    return places, begin + np.arange(len(places))


def _merge(targets: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, count: int) -> Rows:
    """Adds up entries of equal row and id in fp64, drops id -1 and empty mass, sorts."""
    kept = (ids >= 0) & (logprobs > -np.inf)
    targets, ids, logprobs = targets[kept], ids[kept], logprobs[kept]
    if len(ids):
        order = np.lexsort((ids, targets))
        targets, ids, logprobs = targets[order], ids[order], logprobs[order]
        begins = np.flatnonzero(np.concatenate([[True], (np.diff(targets) != 0) | (np.diff(ids) != 0)]))
        targets, ids = targets[begins], ids[begins]
        logprobs = np.logaddexp.reduceat(logprobs, begins)
        order = np.lexsort((ids, -logprobs, targets))
        targets, ids, logprobs = targets[order], ids[order], logprobs[order]
    counts = np.bincount(targets, minlength=count)
    if counts.max(initial=0) > 255:
        raise ValueError(f"a row has {counts.max()} entries, more than 255")
    return Rows(counts.astype(np.uint8), ids.astype(np.int32), logprobs.astype(np.float32))
