"""Which token of the target stands for a string of bytes: the three rules that vocabulary maps use."""

from collections.abc import Sequence

from megatron_fuse.alignment.edit_distance import nearest_pieces
from megatron_fuse.progress import Progress
from megatron_fuse.tokenization import Tokenizer


class TargetTokens:
    """The target's tokens by their bytes, without special tokens and the stop token.

    A rule takes a list of strings that are not empty, and gives an id or -1 for each.
    """

    def __init__(self, target: Tokenizer, stop: int) -> None:
        self._target, self._stop = target, stop
        by_bytes: dict[bytes, int] = {}
        doubles: set[bytes] = set()
        for token, piece in enumerate(target.token_bytes):
            if not piece or token in target.special_ids or token == stop:
                continue
            if piece in by_bytes:
                doubles.add(piece)
            else:
                by_bytes[piece] = token
        # Several tokens may have equal bytes, for example a letter and its byte token. The one that the
        # target itself would write is taken.
        for piece in doubles:
            text = _text(piece)
            written = target.encode_continuation(text) if text is not None else []
            if len(written) == 1 and target.token_bytes[written[0]] == piece:
                by_bytes[piece] = written[0]
        self._by_bytes = by_bytes
        self._longest = max(map(len, by_bytes), default=0)

    def equal(self, pieces: Sequence[bytes]) -> list[int]:
        """The token of exactly these bytes."""
        known = self._by_bytes
        return [known.get(piece, -1) for piece in pieces]

    def first(self, pieces: Sequence[bytes]) -> list[int]:
        """The token of exactly these bytes, else the first token of the target's own tokenization of them.

        If the bytes are not UTF-8, or the target would write other bytes (after normalisation, for example),
        it is the longest token that the bytes begin with.
        """
        chosen = self.equal(pieces)
        rest = [index for index, token in enumerate(chosen) if token < 0]
        texts = {index: text for index in rest if (text := _text(pieces[index])) is not None}
        if texts:
            tokenized = self._target.encode_continuations(list(texts.values()))
            for index, written in zip(texts, tokenized, strict=True):
                if written and self._begins(written[0], pieces[index]):
                    chosen[index] = written[0]
        for index in rest:
            if chosen[index] < 0:
                chosen[index] = self._longest_beginning(pieces[index])
        return chosen

    def nearest(self, pieces: Sequence[bytes]) -> list[int]:
        """The token of exactly these bytes, else the one at the least edit distance."""
        chosen = self.equal(pieces)
        rest = [index for index, token in enumerate(chosen) if token < 0]
        vocabulary = list(self._by_bytes)
        with Progress("vocabulary map: nearest tokens", "strings", len(rest)) as progress:
            nearest = nearest_pieces([pieces[index] for index in rest], vocabulary, progress.advance).tolist()
        for index, nearest_index in zip(rest, nearest, strict=True):
            chosen[index] = self._by_bytes[vocabulary[nearest_index]] if nearest_index >= 0 else -1
        return chosen

    def _begins(self, token: int, piece: bytes) -> bool:
        written = self._target.token_bytes[token]
        return token != self._stop and bool(written) and piece.startswith(written)

    def _longest_beginning(self, piece: bytes) -> int:
        known = self._by_bytes
        for length in range(min(len(piece) - 1, self._longest), 0, -1):
            if piece[:length] in known:
                return known[piece[:length]]
        return -1


def _text(piece: bytes) -> str | None:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return None
