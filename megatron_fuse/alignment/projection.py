"""A source's rows over its own tokens and vocabulary, rewritten as rows over the target's.

Mass is conserved: entries that meet on one target token add up, what cannot be mapped joins the tail.
"""

from dataclasses import replace

import numpy as np

from megatron_fuse.alignment.boundaries import find_source_rows
from megatron_fuse.alignment.conditioning import bytes_consumed, condition
from megatron_fuse.alignment.label_mass import LabelMass, label_mass
from megatron_fuse.alignment.rows import Entries, Rows, SourceRows, merge_entries
from megatron_fuse.alignment.vocabulary import VocabularyMap
from megatron_fuse.errors import UserError
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans

UNMATCHED = ("skip", "condition", "onehot")
"""What may be done with a target row that begins inside a source token. `skip` leaves it to cross-entropy; `condition`
takes the source's entries that go on from the bytes read; `onehot` puts all mass on the label, the token that the row
predicts. (It is prior work's fallback; FuseLLM's own puts the mass on the row's INPUT token, one too early, and
so teaches to repeat it.)"""

MATCHES = ("skip", "exact", "condition", "onehot")
"""How a target row came by its entries; the stored code is the place in this list."""


def project_responses(
    source: SourceRows, target: TokenSpans, vocabulary_map: VocabularyMap, *, unmatched: str
) -> tuple[Rows, np.ndarray, np.ndarray]:
    """The target's rows, m of them; how each was aligned: uint8 [m], place in MATCHES; and bool [m]: whether the label's own
    mass (`label_mass`) is in it.

    source and target cut the same bytes, of one response or of all that a shard holds on end; either may lack some of
    the turns. Entries of one row have different ids and stand by falling log-probability, equal ones as they were captured;
    a row may have one more than its source's, the label's own. A row whose mass has all gone to the tail says nothing: it
    is a `skip` too. `condition` needs a map with remainders. The label's own mass goes with a map of kind `exact`: the
    others are prior work's, which has none.
    Raises UserError for a name of `unmatched` that is not known.
    """
    if unmatched not in UNMATCHED:
        raise UserError(f"alignment.unmatched: {unmatched!r} is not one of {', '.join(UNMATCHED)}")
    if not len(source.spans):
        nothing = Rows(np.zeros(len(target), np.uint8), np.zeros(0, np.int32), np.zeros(0, np.float32))
        return nothing, np.zeros(len(target), np.uint8), np.zeros(len(target), bool)
    source = replace(source, rows=source.rows.below(source.tokenizer.vocab_size))
    row, inside = find_source_rows(source.spans, target)
    taken = row if unmatched == "condition" else np.where(inside, -1, row)
    entries = source.rows.taken(taken)
    consumed = np.zeros(len(target), np.int64)
    if unmatched == "condition":
        consumed = bytes_consumed(source, target, row, inside)
        entries = condition(entries, source, row, consumed)
    own_mass = label_mass(source, target, taken, inside) if vocabulary_map.kind == "exact" else LabelMass.none()
    logprobs, own = own_mass.split(entries, len(target))
    corrected = own > -np.inf
    if unmatched == "onehot":
        own[inside] = 0.0
    mapped = _target_tokens(entries, source, target, row, consumed, vocabulary_map)
    projected = merge_entries(_with_labels(Entries(entries.rows, mapped, logprobs), own, target), len(target))
    how = np.where(inside, MATCHES.index(unmatched), MATCHES.index("exact"))
    return projected, np.where(projected.counts > 0, how, MATCHES.index("skip")).astype(np.uint8), corrected


def _target_tokens(
    entries: Entries,
    source: SourceRows,
    target: TokenSpans,
    row: np.ndarray,
    consumed: np.ndarray,
    vocabulary_map: VocabularyMap,
) -> np.ndarray:
    """int32 [e]: the target token of every entry, of what is left of it where bytes of it are read; -1 = none."""
    tables = vocabulary_map.table()
    leads = target.has(SpanFlag.LEADING) + 2 * source.spans.has(SpanFlag.LEADING)[row]
    mapped = tables[0, entries.ids]
    led = np.flatnonzero(leads[entries.rows])
    mapped[led] = tables[leads[entries.rows[led]], entries.ids[led]]
    left = np.flatnonzero(consumed[entries.rows])
    if len(left):
        mapped[left] = vocabulary_map.remainder(entries.ids[left], consumed[entries.rows[left]])
    return mapped


def _with_labels(entries: Entries, own: np.ndarray, target: TokenSpans) -> Entries:
    """The entries of target tokens, and behind those of a row the label's own (log-probability [m], -inf = none)."""
    rows = np.flatnonzero(own > -np.inf)
    places = np.searchsorted(entries.rows, rows, side="right")
    return Entries(
        np.insert(entries.rows, places, rows),
        np.insert(entries.ids, places, target.tokens[rows]),
        np.insert(entries.logprobs, places, own[rows]),
    )
