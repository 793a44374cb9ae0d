"""The one interface to a tokenizer: ids, the exact bytes of every id, special tokens, a chat template."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from megatron_fuse.tokenization.normalized_spans import settle

VISIBLE_SPACE = "▁"  # U+2581: SentencePiece writes a space like this in its pieces


class Backend(Protocol):
    """The library that splits text into ids. There is one backend per kind of tokenizer file."""

    def encode(self, text: str, *, special: bool) -> list[int]: ...

    def encode_continuation(self, text: str) -> list[int]: ...

    def encode_continuations(self, texts: Sequence[str]) -> Iterable[list[int]]: ...

    def encode_normalized(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Ids of a text after the tokenizer's normaliser, without dummy prefix; and starts, ends int64 [n].

        starts, ends: the bytes of the text that became each token. They overlap if tokens share a chunk
        (`normalized_spans`). This is called only if encode_continuation does not spell the text. A backend
        that spells every text raises NotImplementedError.
        """

    def hugging_face(self, tokenizer: "Tokenizer") -> Any: ...


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """One interface over Hugging Face fast tokenizers, SentencePiece models and tiktoken ranks.

    token_bytes[i] are the bytes that id i stands for in the MIDDLE of a text. They are read from the
    vocabulary (byte-level table, pieces and <0xNN>, ranks), never from character offsets, which cannot split
    a character. Special tokens and unused ids have b"".
    """

    name: str
    token_bytes: list[bytes]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    special_ids: frozenset[int]
    added_tokens: dict[str, int]
    """Text -> id of all tokens that are matched as whole strings: special ones and ones like `<|im_end|>`."""
    adds_bos: bool
    chat_template: str | None
    sha256: str
    """Hash of everything that decides ids and bytes. The chat template is not part of it."""
    backend: Backend = field(repr=False)

    @property
    def vocab_size(self) -> int:
        """1 + the largest id.

        The config.vocab_size of a model may be larger (padding); it is not known here.
        """
        return len(self.token_bytes)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """int64 [vocab_size]: len(token_bytes[i])."""
        return np.fromiter(map(len, self.token_bytes), dtype=np.int64, count=self.vocab_size)

    @cached_property
    def byte_matrix(self) -> np.ndarray:
        """uint8 [vocab_size, longest token]: every token's bytes, followed by zeros."""
        longest = max(1, int(self.byte_lengths.max()))
        return np.array(self.token_bytes, dtype=f"S{longest}").view(np.uint8).reshape(-1, longest)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text with nothing before it, without BOS and EOS.

        special: strings of special tokens become their ids (for a template's text); else they stay plain
        text.
        """
        return self.backend.encode(text, special=special)

    @cached_property
    def composes(self) -> bool:
        """Whether its normaliser joins a letter and the accent after it (NFC, NFKC).

        encode_continuation does not.
        """
        composed = self.encode("ae\u0301")
        return composed == self.encode("a\u00e9") and self.joined_bytes(composed).endswith("\u00e9".encode())

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows other text: no dummy prefix, no Unicode normalisation, special strings
        are text.

        The joined token_bytes are the text's UTF-8 if the vocabulary can spell it. Byte-level BPE, byte
        fallback and tiktoken always can.
        """
        if VISIBLE_SPACE not in text:
            return self.backend.encode_continuation(text) if text else []
        # SentencePiece reads a literal U+2581 as a space. If the
        # vocabulary has single bytes, they spell it instead.
        ids = self.backend.encode_continuation(text)
        space = VISIBLE_SPACE.encode()
        spelled = [self._single_bytes[byte] for byte in space if byte in self._single_bytes]
        if self.joined_bytes(ids) == text.encode() or len(spelled) < len(space):
            return ids
        ids = []
        for index, part in enumerate(text.split(VISIBLE_SPACE)):
            ids += (spelled if index else []) + (self.backend.encode_continuation(part) if part else [])
        return ids

    def encode_continuations(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """`encode_continuation` of each text. Short texts take less time together."""
        together = iter(
            self.backend.encode_continuations([text for text in texts if VISIBLE_SPACE not in text])
        )
        for text in texts:
            yield self.encode_continuation(text) if VISIBLE_SPACE in text else next(together)

    def encode_spans(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Ids of a text that follows other text, and their places in its UTF-8.

        Returns ids; ends int64 [n], not decreasing, the last one len(text.encode()): token i covers the bytes
        from ends[i - 1] to ends[i]; and lossy bool [n]: the token_bytes are not the bytes that the token
        covers, or its end is not known.
        If encode_continuation spells the text, its ids are returned and nothing is lossy. Otherwise the
        tokenizer's own normaliser works on the whole text, as in the model's training, and
        `normalized_spans.settle` says which boundaries are known. A text that the normaliser removes (such as
        a newline with T5) has no tokens.
        """
        ids = self.encode_continuation(text)
        data = text.encode()
        if b"".join(map(self.token_bytes.__getitem__, ids)) == data:
            return ids, np.cumsum(self.byte_lengths[np.array(ids, np.int64)]), np.zeros(len(ids), bool)
        ids, starts, ends = self.backend.encode_normalized(text)
        ends, shared = settle(starts, ends, len(data))
        spans = zip(ids, pairwise([0, *ends.tolist()]), strict=True)
        differs = [data[start:end] != self.token_bytes[token] for token, (start, end) in spans]
        return ids, ends, shared | np.array(differs, bool)

    def joined_bytes(self, ids: Iterable[int]) -> bytes:
        """The concatenated token_bytes. Ids beyond the vocabulary (padded logits) add nothing."""
        table, size = self.token_bytes, self.vocab_size
        return b"".join([table[i] for i in ids if 0 <= i < size])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids as a continuation, without special tokens.

        A leading space stays; broken UTF-8 is replaced.
        """
        return self.joined_bytes(ids).decode("utf-8", errors="replace")

    def token_text(self, token: int) -> str | None:
        """The string of a special or added token (`</s>`), for templates; None for an unknown one."""
        return self._added_text.get(token)

    def hugging_face(self) -> Any:
        """A transformers tokenizer that gives the same ids, for saving beside an exported model."""
        return self.backend.hugging_face(self)

    @cached_property
    def _single_bytes(self) -> dict[int, int]:
        return {piece[0]: token for token, piece in enumerate(self.token_bytes) if len(piece) == 1}

    @cached_property
    def _added_text(self) -> dict[int, str]:
        return {token: text for text, token in self.added_tokens.items()}


def split_at(text: str, table: dict[str, int]) -> list[str]:
    """The text split at the table's strings, longest first. The parts, concatenated, are the text."""
    if not table:
        return [text]
    pattern = "|".join(re.escape(entry) for entry in sorted(table, key=len, reverse=True))
    return re.split(f"({pattern})", text)
