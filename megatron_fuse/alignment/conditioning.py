"""The distribution of a source for a target row that begins inside a source token.

It is the source's distribution under the condition that the bytes read so far are known.
"""

import numpy as np

from megatron_fuse.alignment.rows import Entries, SourceRows
from megatron_fuse.tokenization import Tokenizer
from megatron_fuse.tokenization.spans import TokenSpans


def bytes_consumed(source: SourceRows, target: TokenSpans, row: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """int64 [m]: how many bytes of the surrounding source token each target row has already read.

    It is 0 for a row that is not `inside` a source token. The number counts the token's own bytes: if the
    token begins in the template's white space, this white space counts as read.
    """
    consumed = source.tokenizer.byte_lengths[source.spans.tokens[row]] - (
        source.spans.ends[row] - target.starts
    )
    return np.where(inside, consumed, 0)


def condition(entries: Entries, source: SourceRows, row: np.ndarray, consumed: np.ndarray) -> Entries:
    """Restricts the entries of rows inside a source token to what may follow the bytes read. Others stay.

    row, consumed [m]: results of find_source_rows and bytes_consumed.

    Let b be the bytes that the target has read since the start of the source token. The source's distribution
    of what comes next is

        p(token | token begins with b) = p(token) / p(b)
        p(b) = sum of p over all tokens that begin with b

    The division by p(b) renormalises: b is already observed. Without it the tail would include the tokens
    that b rules out. The stored entries give p(b) only up to the mass of the row's tail. If their part of
    p(b) is less than the tail, or zero, the row says nothing and loses its entries. A token equal to b
    belongs to p(b), but the source has no row for what follows it, so its share joins the tail.
    """
    # Only the entries of rows inside a source token change. They must begin with the bytes b of this token.
    conditioned = np.flatnonzero(consumed[entries.rows])
    within = entries[conditioned]
    token = source.spans.tokens[row[within.rows]]
    begins = begin_alike(source.tokenizer, within.ids, token, consumed[within.rows])
    # Per row: the stored part of p(b), and the tail, which may hold more tokens that begin with b.
    masses = np.exp(within.logprobs)
    known = np.bincount(within.rows, masses * begins, minlength=len(row))
    tail = 1 - np.bincount(within.rows, masses, minlength=len(row))
    is_known_enough = (known > 0) & (known >= tail)
    logprobs, keep = entries.logprobs.copy(), np.ones(len(entries.rows), bool)
    logprobs[conditioned] -= np.log(np.where(is_known_enough, known, 1.0))[within.rows]
    keep[conditioned] = begins & is_known_enough[within.rows]
    return Entries(entries.rows, entries.ids, logprobs)[keep]


def begin_alike(tokenizer: Tokenizer, ids: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """bool [n]: whether the bytes of ids[i] begin with the first lengths[i] bytes of tokens[i]."""
    width = int(lengths.max(initial=0))
    table = tokenizer.byte_matrix[:, :width]
    alike = (table[ids] == table[tokens]) | (np.arange(width) >= lengths[:, None])
    return alike.all(axis=1) & (tokenizer.byte_lengths[ids] >= lengths)
