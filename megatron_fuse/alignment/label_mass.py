"""The label's own mass, where a target token contains a whole source token and goes on beyond it.

Projecting the source's entries alone makes such a teacher vote against the label: " internationalization" is one target
token, " international" + "ization" are two of the source, and the piece of the first would get all the mass. With s1,
s2 ... the source tokens that came from that row on,

    f = p_1(s2 | s1) p_1(s3 | s1 s2) ...    over those that end within the label,
        times, if the label ends inside a source token, the T=1 mass of the known tokens there (the stored ones and the
        one that came) that begin with the bytes left over;

the label gets p_T(s1) f and the piece of s1 keeps p_T(s1) (1 - f). Only the first decision is tempered: a product of
tempered conditionals would flatten every label of several pieces. On a row that begins inside s1 the same holds of s1's
conditional probability.
"""

from dataclasses import dataclass

import numpy as np

from megatron_fuse.alignment.conditioning import begin_alike
from megatron_fuse.alignment.rows import Entries, SourceRows
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans


@dataclass(frozen=True, eq=False)
class LabelMass:
    """c corrections: rows int64 [c], the target rows that are corrected, rising; source_token int32 [c]: s1;
    source_logprob float64 [c]: log p_T(s1), for rows where s1 is not stored; log_fraction float64 [c]: log f, f > 0."""

    rows: np.ndarray
    source_token: np.ndarray
    source_logprob: np.ndarray
    log_fraction: np.ndarray

    @classmethod
    def none(cls) -> "LabelMass":
        """Nothing to be corrected."""
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing.astype(np.int32), nothing.astype(np.float64), nothing.astype(np.float64))

    def split(self, entries: Entries, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Takes s1's share for the label out of the entries (of source tokens) of `count` target rows.

        Returns the entries' log-probabilities float64 [e], and float64 [count]: the label's own, -inf = none.
        Where s1 is not stored, its mass comes out of the tail.
        """
        token, fraction, own = np.full(count, -1, np.int32), np.full(count, -np.inf), np.full(count, -np.inf)
        token[self.rows], fraction[self.rows] = self.source_token, self.log_fraction
        own[self.rows] = self.source_logprob
        first = np.flatnonzero(entries.ids == token[entries.rows])
        rows = entries.rows[first]
        own[rows] = entries.logprobs[first]
        logprobs = entries.logprobs.copy()
        with np.errstate(divide="ignore"):  # f = 1 leaves nothing: log 0
            logprobs[first] += np.log1p(-np.exp(fraction[rows]))
        return logprobs, own + fraction


def label_mass(source: SourceRows, target: TokenSpans, row: np.ndarray, inside: np.ndarray) -> LabelMass:
    """The corrections of m target rows. row int32 [m], inside bool [m]: of find_source_rows, -1 for rows to leave out."""
    spans, lossy = source.spans, source.spans.has(SpanFlag.LOSSY)
    last = np.searchsorted(spans.starts, target.ends, side="left") - 1  # last source row that starts within the label
    corrected = np.flatnonzero((row >= 0) & (last > row))
    # A label that the source's tokens do not reach the end of, or reach in one of unknown bytes, is left alone.
    corrected = corrected[(spans.ends[last[corrected]] >= target.ends[corrected]) & ~lossy[last[corrected]]]
    first, last, ends = row[corrected], last[corrected], target.ends[corrected]
    whole = spans.ends[last] == ends
    # Summed label by label: a running sum over a whole shard would lose digits, and carry a -inf to all later labels.
    chain = np.where(lossy, -np.inf, source.token_logprobs.astype(np.float64))
    log_fraction = _sums(chain, first + 1, last + whole)
    left_over = ends - spans.starts[last]
    with np.errstate(divide="ignore"):
        log_fraction[~whole] += np.log(_beginning_mass(source, last[~whole], left_over[~whole]))
    # Conditioning has divided the tail away, so that nothing is left for an s1 that is not stored to come out of.
    source_logprob = np.where(inside[corrected], -np.inf, source.tempered_token_logprobs(first))
    possible = np.exp(log_fraction) > 0
    return LabelMass(
        rows=corrected[possible],
        source_token=spans.tokens[first[possible]],
        source_logprob=source_logprob[possible],
        log_fraction=np.minimum(log_fraction[possible], 0.0),
    )


def _sums(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """values[begin:end].sum() for every pair; 0 where nothing lies between."""
    bounds = np.stack([begin, end], axis=1).ravel()
    sums = np.add.reduceat(np.append(values, 0.0), bounds)[::2] if len(bounds) else np.zeros(0)
    return np.where(begin < end, sums, 0.0)


def _beginning_mass(source: SourceRows, row: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """T=1 mass [n] of the known tokens at these rows that begin with the first bytes, so many, of the one that came."""
    entries = source.rows.taken(row)
    there, came = row[entries.rows], source.spans.tokens[row[entries.rows]]
    others = begin_alike(source.tokenizer, entries.ids, came, lengths[entries.rows]) & (entries.ids != came)
    masses = np.exp(source.untempered(entries.logprobs, there)) * others
    return np.bincount(entries.rows, masses, minlength=len(row)) + np.exp(source.token_logprobs[row].astype(np.float64))
