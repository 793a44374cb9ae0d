"""Which token of the target stands for a string of bytes: the three rules that vocabulary maps are made of."""

from collections.abc import Sequence

from megatron_fuse.alignment.edit_distance import nearest_pieces
from megatron_fuse.tokenization import Tokenizer


class TargetTokens:
    """The target's tokens by their bytes, without the special ones and the stop token.

    A rule takes many strings, none of them empty, and gives an id or -1 for each.
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
        for piece in doubles:  # a letter and its byte token, say: take the one that the target itself would write
            text = _text(piece)
            own = target.encode_continuation(text) if text is not None else []
            if len(own) == 1 and target.token_bytes[own[0]] == piece:
                by_bytes[piece] = own[0]
        self._by_bytes = by_bytes
        self._longest = max(map(len, by_bytes), default=0)

    def equal(self, pieces: Sequence[bytes]) -> list[int]:
        """The token of exactly these bytes."""
        known = self._by_bytes
        return [known.get(piece, -1) for piece in pieces]

    def first(self, pieces: Sequence[bytes]) -> list[int]:
        """The token of exactly these bytes, else the first piece of the target's own tokenization of them.

        Of bytes that are no UTF-8, or that the target would write otherwise (normalised, say): the longest token that
        they begin with.
        """
        found = self.equal(pieces)
        rest = [place for place, token in enumerate(found) if token < 0]
        texts = {place: text for place in rest if (text := _text(pieces[place])) is not None}
        if texts:
            for place, own in zip(texts, self._target.encode_continuations(list(texts.values())), strict=True):
                if own and self._begins(own[0], pieces[place]):
                    found[place] = own[0]
        for place in rest:
            if found[place] < 0:
                found[place] = self._longest_beginning(pieces[place])
        return found

    def nearest(self, pieces: Sequence[bytes]) -> list[int]:
        """The token of exactly these bytes, else the one at the least edit distance."""
        found = self.equal(pieces)
        rest = [place for place, token in enumerate(found) if token < 0]
        vocabulary = list(self._by_bytes)
        nearest = nearest_pieces([pieces[place] for place in rest], vocabulary).tolist()
        for place, index in zip(rest, nearest, strict=True):
            found[place] = self._by_bytes[vocabulary[index]] if index >= 0 else -1
        return found

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
