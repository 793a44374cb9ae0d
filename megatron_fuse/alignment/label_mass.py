"""The label's own mass, if a target token (the label) contains a whole source token and goes on beyond it.

Example: " internationalization" is one target token. The source writes " international" + "ization". If only
the source's entries were projected, the target's token for " international" would get all the mass, and the
teacher would vote against the label. Let s1, s2 ... be the source's tokens of the text from that row on. Then

    f = p_1(s2 | s1) p_1(s3 | s1 s2) ...    over the tokens that end within the label.
        If the label ends inside a source token, f has one more factor: the T=1 mass at that token's row of
        the known tokens (the stored ones and the text's own) that begin with the bytes left over.

The label gets p_T(s1) f, and the target's token for s1 keeps p_T(s1) (1 - f). The temperature T applies to
the first decision only: a product of several tempered probabilities would flatten every label of several
pieces. If the target's row begins inside s1, the same holds with s1's conditional probability.
"""

from dataclasses import dataclass

import numpy as np

from megatron_fuse.alignment.conditioning import begin_alike
from megatron_fuse.alignment.rows import Entries, SourceRows
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans


@dataclass(frozen=True, eq=False)
class LabelMass:
    """c corrections, one per corrected target row.

    rows int64 [c]: the target rows, rising. source_token int32 [c]: s1. source_logprob float64 [c]: log
    p_T(s1), for rows that do not store s1. log_fraction float64 [c]: log f, f > 0.
    """

    rows: np.ndarray
    source_token: np.ndarray
    source_logprob: np.ndarray
    log_fraction: np.ndarray

    @classmethod
    def none(cls) -> "LabelMass":
        """No corrections."""
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing.astype(np.int32), nothing.astype(np.float64), nothing.astype(np.float64))

    def split(self, entries: Entries, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Takes the label's share of s1 out of the entries (of source tokens) of `count` target rows.

        Returns the entries' log-probabilities float64 [e], and the label's own float64 [count], -inf = none.
        If s1 is not stored, the mass comes out of the tail.
        """
        token, fraction = np.full(count, -1, np.int32), np.full(count, -np.inf)
        label_logprobs = np.full(count, -np.inf)
        token[self.rows], fraction[self.rows] = self.source_token, self.log_fraction
        label_logprobs[self.rows] = self.source_logprob
        # If s1 is stored, its entry says its mass: p_T(s1), or the conditional probability inside s1. The
        # entry keeps the share 1 - f.
        first = np.flatnonzero(entries.ids == token[entries.rows])
        rows = entries.rows[first]
        label_logprobs[rows] = entries.logprobs[first]
        logprobs = entries.logprobs.copy()
        with np.errstate(divide="ignore"):  # f = 1 leaves nothing: log 0
            logprobs[first] += np.log1p(-np.exp(fraction[rows]))
        return logprobs, label_logprobs + fraction


def label_mass(source: SourceRows, target: TokenSpans, row: np.ndarray, inside: np.ndarray) -> LabelMass:
    """The corrections of m target rows.

    row int32 [m], inside bool [m]: results of find_source_rows, with row -1 for rows that are left out.
    """
    spans, lossy = source.spans, source.spans.has(SpanFlag.LOSSY)
    # Last source row that starts within the label.
    last = np.searchsorted(spans.starts, target.ends, side="left") - 1
    corrected = np.flatnonzero((row >= 0) & (last > row))
    # A label is not corrected if the source's tokens end before it does, or if the last of them is lossy.
    corrected = corrected[(spans.ends[last[corrected]] >= target.ends[corrected]) & ~lossy[last[corrected]]]
    first, last, ends = row[corrected], last[corrected], target.ends[corrected]
    # `whole`: the last source token ends with the label, so that its own probability is the last factor of f.
    whole = spans.ends[last] == ends
    # Each label has a sum of its own: a running sum over a whole shard
    # would lose digits, and carry a -inf on to all later labels.
    chain = np.where(lossy, -np.inf, source.token_logprobs.astype(np.float64))
    log_fraction = _sums(chain, first + 1, last + whole)
    # Otherwise the last factor is the mass of the tokens that begin with the label's remaining bytes.
    left_over = ends - spans.starts[last]
    with np.errstate(divide="ignore"):
        log_fraction[~whole] += np.log(_beginning_mass(source, last[~whole], left_over[~whole]))
    # On an `inside` row, conditioning has renormalised over the stored entries. The mass of an s1 that is not
    # stored is then no part of the tail, so it cannot be taken from there.
    source_logprob = np.where(inside[corrected], -np.inf, source.tempered_token_logprobs(first))
    possible = np.exp(log_fraction) > 0
    return LabelMass(
        rows=corrected[possible],
        source_token=spans.tokens[first[possible]],
        source_logprob=source_logprob[possible],
        log_fraction=np.minimum(log_fraction[possible], 0.0),
    )


def _sums(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """values[begin:end].sum() for every pair; 0 if begin >= end."""
    # reduceat gives a sum for every pair of neighbours in `bounds`; every second one is of a (begin, end).
    bounds = np.stack([begin, end], axis=1).ravel()
    sums = np.add.reduceat(np.append(values, 0.0), bounds)[::2] if len(bounds) else np.zeros(0)
    return np.where(begin < end, sums, 0.0)


def _beginning_mass(source: SourceRows, row: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """T=1 mass [n] of the known tokens at these rows that begin like the text's token.

    lengths [n]: how many bytes must be equal. Known are the stored tokens and the text's own token, which
    always counts.
    """
    entries = source.rows.entries_of(row)
    source_rows, text_tokens = row[entries.rows], source.spans.tokens[row[entries.rows]]
    others = begin_alike(source.tokenizer, entries.ids, text_tokens, lengths[entries.rows])
    others &= entries.ids != text_tokens
    masses = np.exp(source.untempered(entries.logprobs, source_rows)) * others
    return np.bincount(entries.rows, masses, minlength=len(row)) + np.exp(
        source.token_logprobs[row].astype(np.float64)
    )
