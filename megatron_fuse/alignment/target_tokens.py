"""Which token of the target stands for a string of bytes: the three rules that vocabulary maps are made of."""

from collections.abc import Iterable

from megatron_fuse.alignment.edit_distance import nearest_pieces
from megatron_fuse.tokenization import Tokenizer


class TargetTokens:
    """The target's tokens by their bytes, without the special ones and the stop token. Every rule gives an id, or -1."""

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
            own = self._own_pieces(piece)
            if len(own) == 1 and target.token_bytes[own[0]] == piece:
                by_bytes[piece] = own[0]
        self._by_bytes = by_bytes
        self._longest = max(map(len, by_bytes), default=0)
        self._first = dict(by_bytes)  # what `first` has found so far

    def equal(self, piece: bytes) -> int:
        """The token of exactly these bytes."""
        return self._by_bytes.get(piece, -1)

    def first(self, piece: bytes) -> int:
        """The token of exactly these bytes, else the first piece of the target's own tokenization of them.

        Of bytes that are no UTF-8, or that the target would write otherwise (normalised, say): the longest token that
        they begin with.
        """
        if piece not in self._first:
            own = self._own_pieces(piece)[:1]
            if not own or own[0] == self._stop or not self._begins(piece, own[0]):
                lengths = range(min(len(piece) - 1, self._longest), 0, -1)
                own = [self._by_bytes[piece[:length]] for length in lengths if piece[:length] in self._by_bytes][:1]
            self._first[piece] = own[0] if own else -1
        return self._first[piece]

    def nearest(self, pieces: Iterable[bytes]) -> dict[bytes, int]:
        """For each of the pieces, the token of exactly these bytes, else the one at the least edit distance."""
        found = {piece: self.equal(piece) for piece in pieces}
        rest = [piece for piece, token in found.items() if token < 0]
        vocabulary = list(self._by_bytes)
        for piece, index in zip(rest, nearest_pieces(rest, vocabulary).tolist(), strict=True):
            found[piece] = self._by_bytes[vocabulary[index]] if index >= 0 else -1
        return found

    def _own_pieces(self, piece: bytes) -> list[int]:
        try:
            return self._target.encode_continuation(piece.decode("utf-8"))
        except UnicodeDecodeError:
            return []

    def _begins(self, piece: bytes, token: int) -> bool:
        start = self._target.token_bytes[token]
        return bool(start) and piece.startswith(start)
