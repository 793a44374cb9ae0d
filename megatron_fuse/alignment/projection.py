"""Rewrites a source's rows, over its own tokens and vocabulary, as rows over those of the target.

Mass is conserved: entries that go to the same target token add up, and mass that cannot be mapped joins the
tail.
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
"""The ways to treat a target row that begins inside a source token.

`skip` leaves the row to cross-entropy. `condition` takes the source's entries that continue the bytes read.
`onehot` puts all mass on the label, the token that the row predicts. (`onehot` is the fallback of prior work.
FuseLLM's own code puts the mass on the row's INPUT token, one too early, and so teaches the model to repeat
it.)"""

MATCHES = ("skip", "exact", "condition", "onehot")
"""How a target row got its entries. The stored code is the place in this list."""


def project_responses(
    source: SourceRows, target: TokenSpans, vocabulary_map: VocabularyMap, *, unmatched: str
) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Projects the source's rows on m target rows.

    Returns the target's rows; uint8 [m]: how each row was aligned, as a place in MATCHES; and bool [m]:
    whether the row contains the label's own mass (`label_mass`).

    source and target are two tokenizations of the same bytes: of one response, or of all responses of a
    shard, concatenated. Either may lack some of the turns. The entries of a row have different ids and are
    sorted by falling log-probability; equal ones keep the order of the capture. A row may have one entry more
    than the source's row: the label's own. If all mass of a row has gone to the tail, the row says nothing
    and counts as `skip`. `condition` needs a map with remainders. The label's own mass is computed only for a
    map of kind `exact`: the other kinds follow prior work, which does not have it.
    Raises UserError if `unmatched` is not one of UNMATCHED.
    """
    if unmatched not in UNMATCHED:
        raise UserError(
            f"alignment.unmatched: {unmatched!r} is not allowed. Set it to one of {', '.join(UNMATCHED)}."
        )
    if not len(source.spans):
        nothing = Rows(np.zeros(len(target), np.uint8), np.zeros(0, np.int32), np.zeros(0, np.float32))
        return nothing, np.zeros(len(target), np.uint8), np.zeros(len(target), bool)
    # 1. Find the source row of each target row: -1 if a row takes no entries of the source.
    source = replace(source, rows=source.rows.below(source.tokenizer.vocab_size))
    row, inside = find_source_rows(source.spans, target)
    source_row = row if unmatched == "condition" else np.where(inside, -1, row)
    # 2. Take the entries, still source tokens. Rows inside a source token are conditioned on the bytes read.
    entries = source.rows.entries_of(source_row)
    consumed = np.zeros(len(target), np.int64)
    if unmatched == "condition":
        consumed = bytes_consumed(source, target, row, inside)
        entries = condition(entries, source, row, consumed)
    # 3. Split off the label's own mass. This comes after conditioning, because it takes its share of the
    # conditional probability, and before the mapping, because it looks for the source token s1.
    own_mass = (
        label_mass(source, target, source_row, inside) if vocabulary_map.kind == "exact" else LabelMass.none()
    )
    logprobs, label_logprobs = own_mass.split(entries, len(target))
    corrected = label_logprobs > -np.inf
    if unmatched == "onehot":
        label_logprobs[inside] = 0.0
    # 4. Replace source tokens by target tokens, add the labels, and add up the entries that are now equal.
    mapped = _target_tokens(entries, source, target, row, consumed, vocabulary_map)
    projected = merge_entries(
        _with_labels(Entries(entries.rows, mapped, logprobs), label_logprobs, target), len(target)
    )
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
    """int32 [e]: the target token of every entry, -1 = none.

    If some bytes of the entry are already read, only the rest of them is mapped.
    """
    tables = vocabulary_map.table()
    # `leads` is the row of VocabularyMap.table: white space of a
    # template before the target's token, the source's, both.
    leads = target.has(SpanFlag.LEADING) + 2 * source.spans.has(SpanFlag.LEADING)[row]
    mapped = tables[0, entries.ids]
    led = np.flatnonzero(leads[entries.rows])
    mapped[led] = tables[leads[entries.rows[led]], entries.ids[led]]
    left = np.flatnonzero(consumed[entries.rows])
    if len(left):
        mapped[left] = vocabulary_map.remainder(entries.ids[left], consumed[entries.rows[left]])
    return mapped


def _with_labels(entries: Entries, label_logprobs: np.ndarray, target: TokenSpans) -> Entries:
    """The entries of target tokens; after those of each row, the label's own entry is added.

    label_logprobs [m]: the label's log-probability, -inf = none.
    """
    rows = np.flatnonzero(label_logprobs > -np.inf)
    places = np.searchsorted(entries.rows, rows, side="right")
    return Entries(
        np.insert(entries.rows, places, rows),
        np.insert(entries.ids, places, target.tokens[rows]),
        np.insert(entries.logprobs, places, label_logprobs[rows]),
    )
