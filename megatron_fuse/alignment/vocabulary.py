"""Vocabulary maps: which target token stands for each source token.

| kind | an ordinary source token goes to |
|---|---|
| `exact` | the target token of equal bytes, else the first token of the target's tokenization of them |
| `em` | the target token of equal bytes, else nowhere: its mass joins the tail |
| `mined` | the target token of equal bytes, else the one at the least edit distance |
| `ms` | the target token of equal bytes, else the one most often met with it in real text, else as `exact` |

In all kinds, tokens with a role are mapped by role: the source's stop token goes to the target's stop token,
and other special tokens go nowhere (no row of a response predicts BOS). If both sides have the same
vocabulary, every id goes to itself, also special tokens and unused ids, and the source's stop token goes to
the target's.

`mined` is FuseLLM's rule (arXiv 2401.10491), applied to bytes. Strings are compared as UTF-8 text with real
spaces. FuseLLM instead compares the spelling of the vocabularies, with the space mark of one replaced by that
of the other. So it compares `Ã©` with `é`, and `<0xE9>` counts as six characters. Here a byte that is part of
no character counts as one character. If several tokens are nearest, FuseLLM takes the first in the order of
the vocabulary; `nearest_pieces` has a rule that does not depend on this order. Special tokens are never
nearest.

`ms` is the idea of FuseChat (arXiv 2408.07990). FuseChat counts pairs that a dynamic program over token
strings finds, and then weighs them by edit distance. Here a pair is two tokens that begin at the same byte,
and only the counts decide. A token that occurs in no pair, or equally often with several tokens, goes where
`exact` sends it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from megatron_fuse.alignment.statistics import PairCounts
from megatron_fuse.alignment.target_tokens import TargetTokens
from megatron_fuse.errors import UserError
from megatron_fuse.storage import temporary_then_rename
from megatron_fuse.storage.files import sha256_of_parts
from megatron_fuse.tokenization import Tokenizer

VOCABULARY_MAPS = ("exact", "em", "mined", "ms")
FORMAT = "vocabulary map 2"


def _no_remainders() -> np.ndarray:
    return np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Target id per source token, -1 = its mass joins the tail.

    There is one table for each state of the source's row and the target's row.

    A row is leading if the token that it predicts begins in the template's white space before the response.
    After `ASSISTANT:` the response `Sure` is the token `▁Sure`; after `<|im_start|>assistant\\n` it is
    `Sure`.
    ids            neither row is leading (all rows but the first of a response)
    leading        the target's row is: `Sure` -> `▁Sure`
    source_leading the source's row is: `▁Sure` -> `Sure`
    both_leading   both are: `▁Sure` -> `▁Sure`; the same as `ids` if both templates have the same white space
    All are int32 [Vs]. exact bool [Vs]: whether `ids` gives a target token with equal bytes, or, if both
    sides have the same vocabulary, the same token.
    """

    ids: np.ndarray
    leading: np.ndarray
    source_leading: np.ndarray
    both_leading: np.ndarray
    exact: np.ndarray
    kind: str
    key: str
    """sha256 of everything that the map depends on. `vocabulary_map_key` computes it."""
    byte_lengths: np.ndarray = field(default_factory=_no_remainders)
    """int32 [Vs] of the source's tokens, if the map was built with remainders; else empty."""
    remainder_ids: np.ndarray = field(default_factory=_no_remainders)
    """int32 [sum of max(byte_lengths - 1, 0)]: per token, what its bytes without the first 1, 2 ...

    are mapped to.
    """

    def __post_init__(self) -> None:
        sizes = {len(table) for table in (self.leading, self.source_leading, self.both_leading, self.exact)}
        if sizes != {len(self.ids)} or len(self.byte_lengths) not in (0, len(self.ids)):
            raise ValueError(
                f"the tables have different sizes: {len(self.ids)} ids, but {sorted(sizes)} in the others"
            )
        if len(self.remainder_ids) != self._remainder_ends[-1:].sum():
            raise ValueError(f"{len(self.remainder_ids)} remainders do not fit the lengths of the tokens")

    def table(self) -> np.ndarray:
        """int32 [4, Vs], row = 2 * (source row leads) + (target row leads)."""
        return np.stack([self.ids, self.leading, self.source_leading, self.both_leading])

    def remainder(self, ids: np.ndarray, consumed: np.ndarray) -> np.ndarray:
        """Target tokens for the rest of source tokens, after a boundary inside them: int32 [e].

        ids int [e]: source tokens. consumed int [e]: bytes of the token before the boundary, from 1 to its
        length. The rest is mapped by the rule of `exact`, in a map of kind `em` by that of `em`. The result
        is -1 if no bytes are left, and for the stop token, because its bytes are not part of the response.
        Raises ValueError for any other `consumed`, and if the map was built without remainders.
        """
        if not len(self.byte_lengths):
            raise ValueError("this vocabulary map was built without remainders")
        left = self.byte_lengths[ids] - consumed
        outside = (consumed < 1) | (left < 0)
        if outside.any():
            at = int(np.argmax(outside))
            raise ValueError(
                f"token {ids[at]} has {self.byte_lengths[ids[at]]} bytes, so it has no byte {consumed[at]}"
            )
        chosen = np.full(len(left), -1, dtype=np.int32)
        inside = left > 0
        chosen[inside] = self.remainder_ids[self._remainder_ends[ids[inside]] - left[inside]]
        return chosen

    @cached_property
    def _remainder_ends(self) -> np.ndarray:
        """int64 [Vs]: the end of each token's part of `remainder_ids`."""
        return np.cumsum(np.maximum(self.byte_lengths.astype(np.int64) - 1, 0))


def build_vocabulary_map(
    source: Tokenizer,
    target: Tokenizer,
    *,
    source_stop: int,
    target_stop: int,
    kind: str = "exact",
    source_separator: str = " ",
    target_separator: str = " ",
    remainders: bool = False,
    texts_sha256: str = "",
    pairs: Callable[[], PairCounts] | None = None,
) -> VocabularyMap:
    """The map of all source tokens. This module's docstring defines the kinds.

    source_separator, target_separator: `ChatFormat.separator` of each side. remainders: whether the map
    supports `VocabularyMap.remainder`. pairs: gives the counts that `ms` needs, of the texts with the hash
    texts_sha256. The first rows of responses are too few for counts: the tables for them follow `exact`,
    except `both_leading` of equal separators, which is the same as `ids`.
    Raises UserError for an unknown kind, ValueError for `ms` without pairs.
    """
    settings = (kind, source_separator, target_separator, remainders, texts_sha256)
    key = vocabulary_map_key(source, target, source_stop, target_stop, *settings)
    tokens = TargetTokens(target, target_stop)
    states = _words(source, source_separator.encode(), target_separator.encode())
    words = [word for state in states for word in state]
    endings = _endings(source, source_stop) if remainders else iter(())
    rule = tokens.equal if kind == "em" else tokens.first
    if kind == "mined":
        chosen, remainder_ids = _chosen(tokens.nearest, words), _chosen(rule, endings)
    else:  # both in one call: most endings are words too, and the rule sees each string once
        chosen, remainder_ids = np.split(_chosen(rule, chain(words, endings)), [len(words)])
    tables = chosen.reshape(len(states), -1)
    # The states without a difference in white space: neither row is
    # leading, or both are, with equal separators.
    plain = [0, 3] if source_separator == target_separator else [0]
    if kind == "ms":
        if pairs is None:
            raise ValueError("a map of kind 'ms' can only be built from pairs")
        met = pairs().most_frequent(otherwise=tables[0])
        tables[plain] = np.where(_equal_bytes(source, target, tables[0], source_stop), tables[0], met)
    # Roles come last, because they override every rule above.
    if _one_vocabulary(source, target):
        tables[plain] = np.arange(source.vocab_size)
        special = sorted(source.special_ids)
        tables[:, special] = special
    tables[:, source_stop] = target_stop
    ids, leading, source_leading, both_leading = tables
    return VocabularyMap(
        ids,
        leading,
        source_leading,
        both_leading,
        exact=_equal_bytes(source, target, tables[0], source_stop),
        kind=kind,
        key=key,
        byte_lengths=source.byte_lengths.astype(np.int32) if remainders else _no_remainders(),
        remainder_ids=remainder_ids,
    )


def vocabulary_map_key(
    source: Tokenizer,
    target: Tokenizer,
    source_stop: int,
    target_stop: int,
    kind: str = "exact",
    source_separator: str = " ",
    target_separator: str = " ",
    remainders: bool = False,
    texts_sha256: str = "",
) -> str:
    """Hash of everything that a map depends on. Raises UserError for an unknown kind."""
    if kind not in VOCABULARY_MAPS:
        raise UserError(
            f"alignment.vocabulary_map: {kind!r} is not allowed. Set it to one of "
            f"{', '.join(VOCABULARY_MAPS)}."
        )
    settings = [
        str(source_stop),
        str(target_stop),
        source_separator,
        target_separator,
        str(remainders),
        texts_sha256,
    ]
    return sha256_of_parts(FORMAT, kind, source.sha256, target.sha256, *settings)


def save_vocabulary_map(vocabulary_map: VocabularyMap, path: Path) -> None:
    """Writes an .npz file, under a temporary name first.

    So ranks on several machines may write it at the same time.

    Integers are stored plus 1, so that -1 becomes 0, in the smallest type that holds them. A map of the
    paper's vocabularies takes 0.15 MB, with remainders 0.4 MB.
    """
    # Equal ones are written once.
    tables, states = np.unique(vocabulary_map.table(), axis=0, return_inverse=True)
    integers = {
        "tables": tables + 1,
        "states": states.reshape(-1),
        "byte_lengths": vocabulary_map.byte_lengths,
        "remainder_ids": vocabulary_map.remainder_ids + 1,
    }
    small = {name: array.astype(np.min_scalar_type(array.max(initial=0))) for name, array in integers.items()}
    others = {name: getattr(vocabulary_map, name) for name in ("exact", "kind", "key")}
    with temporary_then_rename(path) as temporary, temporary.open("wb") as file:
        # numpy's stub holds every keyword for allow_pickle.
        np.savez_compressed(file, **small, **others)  # type: ignore[arg-type]


def load_vocabulary_map(path: Path) -> VocabularyMap:
    """Reads a file of save_vocabulary_map. Raises UserError if the file is damaged or incomplete."""
    try:
        with np.load(path, allow_pickle=False) as data:
            ids, leading, source_leading, both_leading = (data["tables"].astype(np.int32) - 1)[data["states"]]
            return VocabularyMap(
                ids,
                leading,
                source_leading,
                both_leading,
                exact=data["exact"],
                kind=str(data["kind"]),
                key=str(data["key"]),
                byte_lengths=data["byte_lengths"].astype(np.int32),
                remainder_ids=data["remainder_ids"].astype(np.int32) - 1,
            )
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for a damaged file
        raise UserError(
            f"{path}: not a vocabulary map ({error}). Remove the file: the next run makes it again."
        ) from error


def cached_vocabulary_map(
    directory: Path,
    source: Tokenizer,
    target: Tokenizer,
    *,
    pairs: Callable[[], PairCounts] | None = None,
    **options,
) -> VocabularyMap:
    """The map of build_vocabulary_map; an earlier call may have left it in the directory, under its key.

    Pairs are counted only if the map must be built.
    """
    key = vocabulary_map_key(source, target, **options)
    path = directory / f"{key[:24]}.npz"
    if path.is_file():
        vocabulary_map = load_vocabulary_map(path)
        if vocabulary_map.key == key:
            return vocabulary_map
    vocabulary_map = build_vocabulary_map(source, target, pairs=pairs, **options)
    save_vocabulary_map(vocabulary_map, path)
    return vocabulary_map


def _words(source: Tokenizer, source_space: bytes, target_space: bytes) -> list[list[bytes]]:
    """The bytes of every source token in each of the four states of `VocabularyMap.table`; b"": none."""
    pieces = [b"" if token in source.special_ids else piece for token, piece in enumerate(source.token_bytes)]
    # The part of a leading token that belongs to the response. It is
    # empty if the token is only template white space.
    rests = [b"" if source_space.startswith(piece) else piece.removeprefix(source_space) for piece in pieces]
    led = [piece and target_space + piece for piece in pieces]
    both = pieces if source_space == target_space else [rest and target_space + rest for rest in rests]
    return [pieces, led, rests, both]


def _one_vocabulary(source: Tokenizer, target: Tokenizer) -> bool:
    """Whether an id means the same on both sides.

    The sha256 cannot decide this: tokenizers that differ only in their pad token, such as Vicuna's and
    Llama-2's, have different hashes.
    """
    return source.token_bytes == target.token_bytes and source.added_tokens == target.added_tokens


def _equal_bytes(source: Tokenizer, target: Tokenizer, ids: np.ndarray, source_stop: int) -> np.ndarray:
    """`VocabularyMap.exact`: bool [Vs]."""
    if _one_vocabulary(source, target):
        return np.ones(source.vocab_size, dtype=bool)
    pairs = zip(ids.tolist(), source.token_bytes, strict=True)
    equal = np.array([token >= 0 and target.token_bytes[token] == piece for token, piece in pairs])
    equal[source_stop] = True
    return equal


def _endings(source: Tokenizer, stop: int) -> Iterator[bytes]:
    """Per token its bytes without the first 1, 2 ...; b"" for the stop token.

    The bytes of the stop token are not part of the response.
    """
    for token, piece in enumerate(source.token_bytes):
        for begin in range(1, len(piece)):
            yield piece[begin:] if token != stop else b""


def _chosen(rule: Callable[[Sequence[bytes]], list[int]], strings: Iterable[bytes]) -> np.ndarray:
    """The result of a rule of TargetTokens for each of the strings, -1 for b"": int32 [n].

    The rule sees each string only once.
    """
    # A string gets the next number when it is looked up for the first time; b"" has number 0.
    numbers: defaultdict[bytes, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    numbers[b""] = 0
    places = np.fromiter(map(numbers.__getitem__, strings), np.int64)
    return np.array([-1, *rule(list(numbers)[1:])], dtype=np.int32)[places]
