"""A target row that begins inside a source token: the source's distribution, given the bytes of it that are read."""

import numpy as np

from megatron_fuse.alignment.rows import Entries, SourceRows
from megatron_fuse.tokenization import Tokenizer
from megatron_fuse.tokenization.spans import TokenSpans


def bytes_consumed(source: SourceRows, target: TokenSpans, row: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """int64 [m]: how many bytes of the source token that it begins inside a target row has read; 0 where not `inside`.

    Counted in the token's own bytes: where it begins in the template's white space, that counts as read.
    """
    consumed = source.tokenizer.byte_lengths[source.spans.tokens[row]] - (source.spans.ends[row] - target.starts)
    return np.where(inside, consumed, 0)


def condition(entries: Entries, source: SourceRows, row: np.ndarray, consumed: np.ndarray) -> Entries:
    """The entries, those of rows that begin inside a source token restricted to what may follow the bytes read.

    row, consumed [m]: of find_source_rows and bytes_consumed.

    With b the bytes that the target has read since the source last decided, the source's distribution of what comes
    next is p(token | token begins with b) = p(token) / p(b), where p(b) adds up all tokens that begin with b. That is
    why the mass is divided: left as it is, it would say how likely b was, which is read and no longer in question, and
    the tail would hold the tokens that b has ruled out. p(b) is known from the stored entries only, up to the row's
    tail: with less of it than the tail, or none, the row says nothing and loses its entries. A token equal to b belongs
    to p(b), but what would follow it is decided at a row that the source never had: its share joins the tail.
    """
    conditioned = np.flatnonzero(consumed[entries.rows])
    within = entries[conditioned]
    token = source.spans.tokens[row[within.rows]]
    begins = begin_alike(source.tokenizer, within.ids, token, consumed[within.rows])
    masses = np.exp(within.logprobs)
    known = np.bincount(within.rows, masses * begins, minlength=len(row))
    tail = 1 - np.bincount(within.rows, masses, minlength=len(row))
    says = (known > 0) & (known >= tail)
    logprobs, keep = entries.logprobs.copy(), np.ones(len(entries.rows), bool)
    logprobs[conditioned] -= np.log(np.where(says, known, 1.0))[within.rows]
    keep[conditioned] = begins & says[within.rows]
    return Entries(entries.rows, entries.ids, logprobs)[keep]


def begin_alike(tokenizer: Tokenizer, ids: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """bool [n]: the bytes of ids[i] begin with the first lengths[i] bytes of tokens[i]."""
    width = int(lengths.max(initial=0))
    table = tokenizer.byte_matrix[:, :width]
    alike = (table[ids] == table[tokens]) | (np.arange(width) >= lengths[:, None])
    return alike.all(axis=1) & (tokenizer.byte_lengths[ids] >= lengths)
