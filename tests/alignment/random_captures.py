"""Conversations cut into spans by the tokenizers alone, texts of many scripts, and captures of random
distributions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import tokenizers
from hypothesis import strategies as st
from small_tokenizers import CORPUS, make_tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_fuse.alignment import Rows, SourceRows, VocabularyMap, build_vocabulary_map
from megatron_fuse.tokenization import Tokenizer, load_tokenizer
from megatron_fuse.tokenization.hugging_face import wrap_hugging_face
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans, response_bytes

_PARTS = [
    *(
        "sure",
        " sure",
        " internationalization",
        "nation",
        "ization",
        " station",
        " hello",
        " été",
        "日本",
        " 日",
        "x",
    ),
    *(
        "12",
        "345",
        " 1",
        " ",
        "  ",
        "    ",
        "\n",
        "\n\n  ",
        "\t",
        ",",
        ".",
        "🙂",
        "👩‍🚀",
        "▁",
        "</s>",
        "<|im_end|>",
    ),
    *("مرحبا", " Привет", "ελ", "한국어", "हिन्दी", "e\u0301", "ﬁ", "\u200b", "ÿ", " the answer is"),
]
texts = st.lists(
    st.sampled_from(_PARTS) | st.characters(codec="utf-8", exclude_characters="\0"), max_size=14
).map("".join)
conversations = st.lists(texts, min_size=1, max_size=3)


@cache
def small(kind: str) -> Tokenizer:
    """One of KINDS of small_tokenizers; `crossing`, whose tokens cross words, so that they meet others'
    boundaries seldom and end inside their tokens; or `bytes`, whose tokens are single bytes."""
    sizes = {"bytes": 257, "crossing": 400}
    if kind not in sizes:
        return load_tokenizer(make_tokenizer(kind, Path(mkdtemp())))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=sizes[kind],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(text.split()[::-1]) for text in CORPUS[::7]], trainer)
    return wrap_hugging_face(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"), kind
    )


@dataclass(frozen=True)
class Side:
    """A tokenizer, its stop token, and the white space of its template before a response."""

    tokenizer: Tokenizer
    separator: str
    stop: int

    def spans(self, turns: Sequence[str], *, stop: bool = True) -> TokenSpans | None:
        """Supervised tokens of a conversation's turns; stop: the last one ends in a stop token. None where
        the tokenizer cannot spell a text."""
        parts, offsets, offset = [], [], 0
        for number, turn in enumerate(turns):
            space = self.separator if turn else ""
            ids, pieces = self.tokenizer.encode_continuation(space + turn), self.tokenizer.token_bytes
            if self.tokenizer.joined_bytes(ids) != (space + turn).encode():
                return None
            ends = np.maximum(np.cumsum([len(pieces[i]) for i in ids], dtype=np.int64) - len(space), 0)
            flags = np.zeros(len(ids), np.uint8)
            flags[:1] = SpanFlag.LEADING if space else 0
            if stop or number + 1 < len(turns):
                ids, ends = [*ids, self.stop], np.append(ends, len(turn.encode()) + 1)
                flags = np.append(flags, np.uint8(SpanFlag.STOP))
            starts = np.append(0, ends)[: len(ends)]
            parts.append(TokenSpans(np.array(ids, np.int32), starts, ends, flags))
            offsets.append(offset)
            offset += len(turn.encode()) + 1
        return TokenSpans.join(parts, offsets)


def small_side(kind: str, separator: str) -> Side:
    return Side(small(kind), separator, small(kind).eos_id)


@cache
def map_between(theirs: Side, ours: Side, kind: str = "exact", remainders: bool = True) -> VocabularyMap:
    return build_vocabulary_map(
        theirs.tokenizer,
        ours.tokenizer,
        source_stop=theirs.stop,
        target_stop=ours.stop,
        kind=kind,
        source_separator=theirs.separator,
        target_separator=ours.separator,
        remainders=remainders,
    )


def join(parts: Sequence[TokenSpans], conversations: Sequence[Sequence[str]]) -> TokenSpans:
    """Examples on end, as in a shard."""
    lengths = [len(response_bytes(turns)) for turns in conversations]
    return TokenSpans.join(parts, np.cumsum([0, *lengths])[:-1])


@dataclass(frozen=True)
class Capture:
    """source: what a capture stores; logp_1, logp_t: a dictionary id -> log-probability for every row, over
    every id of any probability; stored: the ids that the capture holds, row by row."""

    source: SourceRows
    logp_1: list[dict[int, float]]
    logp_t: list[dict[int, float]]
    stored: list[list[int]]


def random_capture(
    seed: int, side: Side, spans: TokenSpans, *, keep: int, temperature: float, dense: bool = False
) -> Capture:
    """Every row is a softmax over all tokens and five padded columns of the logits; the `keep` largest are
    stored.

    Logits are multiples of 1/2, so that ties are common; tokens that begin like the one that came are
    likelier than others; the one that came is sometimes not stored. dense: only 150 tokens, none padded, have
    any probability, so that all of it can be stored.
    """
    rng, tokenizer = np.random.default_rng(seed), side.tokenizer
    usable = np.array([i for i, piece in enumerate(tokenizer.token_bytes) if piece] + [side.stop])
    ids = np.append(usable, tokenizer.vocab_size + np.arange(0 if dense else 5))
    firsts = np.array([piece[:1] for piece in tokenizer.token_bytes], "S1")[usable]
    rows, logp_1, logp_t, stored, lse = [], [], [], [], []
    for token in spans.tokens.tolist():
        logits = rng.normal(0, 2, len(ids))
        logits[: len(usable)] += 6 * (firsts == tokenizer.token_bytes[token][:1]) * rng.random()
        logits[np.flatnonzero(ids == token)] += rng.choice([-3, 6, 11])
        logits = np.round(2 * logits) / 2
        if dense:
            others = rng.permutation(np.flatnonzero(ids != token))[149:]
            logits[others] = -np.inf
        logits -= logits.max()
        order = np.argsort(-logits, kind="stable")[:keep]
        order = order[logits[order] > -np.inf]
        lse.append([np.log(np.exp(logits / t).sum()) for t in (1.0, temperature)])
        logp_1.append(dict(zip(ids.tolist(), logits - lse[-1][0], strict=True)))
        logp_t.append(dict(zip(ids.tolist(), logits / temperature - lse[-1][1], strict=True)))
        stored.append(ids[order].tolist())
        rows.append(logp_t[-1])
    counts = np.array([len(row) for row in stored], np.uint8)
    logprobs = [distribution[i] for distribution, row in zip(logp_t, stored, strict=True) for i in row]
    lse = np.array(lse).reshape(-1, 2)
    source = SourceRows(
        tokenizer=tokenizer,
        spans=spans,
        rows=Rows(
            counts, np.array([i for row in stored for i in row], np.int32), np.array(logprobs, np.float32)
        ),
        temperature=temperature,
        token_logprobs=np.array(
            [row[t] for row, t in zip(logp_1, spans.tokens.tolist(), strict=True)], np.float32
        ),
        logsumexp=lse[:, 0].astype(np.float32),
        logsumexp_temperature=lse[:, 1].astype(np.float32),
    )
    return Capture(source, logp_1, logp_t, stored)


def as_dicts(rows: Rows) -> list[dict[int, float]]:
    """id -> probability, row by row, in the order of the entries."""
    ends = np.cumsum(rows.counts.astype(int))
    mass = np.exp(rows.logprobs.astype(float))
    return [
        dict(zip(rows.ids[end - n : end].tolist(), mass[end - n : end].tolist(), strict=True))
        for n, end in zip(rows.counts.astype(int), ends, strict=True)
    ]
