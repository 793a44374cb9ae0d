"""Vocabulary maps: which target token stands for each source token.

| kind | an ordinary source token goes to |
|---|---|
| `exact` | the target token of equal bytes, else the first piece of the target's own tokenization of those bytes |
| `em` | the target token of equal bytes, else nowhere: its mass joins the tail |
| `mined` | the target token of equal bytes, else the one at the least edit distance |
| `ms` | the target token of equal bytes, else the one most often met with it in real text, else as `exact` |

By role, in all kinds: the source's stop token goes to the target's, other special tokens nowhere (no row of a response
predicts BOS). Two sides with one vocabulary map every id to itself, special tokens and holes included, and the source's
stop token to the target's.

`mined` is FuseLLM's rule (arXiv 2401.10491) on bytes: strings are compared as UTF-8 text with real spaces, where FuseLLM
compares the vocabularies' own spelling with one space mark replaced by the other (so `Ã©` with `é`, and `<0xE9>` as six
characters). A byte that is part of no character counts as a character of its own. Of several nearest tokens FuseLLM
takes the first that the vocabulary lists, in whatever order; `nearest_pieces` has a rule of its own. Special tokens are
never nearest.
`ms` is the idea of FuseChat (arXiv 2408.07990), which counts pairs of a dynamic program over token strings and then weighs
them by edit distance. Here pairs are tokens that begin at the same byte, nothing else weighs in, and a token that was
never met, or equally often with several, goes where `exact` sends it.
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
from megatron_fuse.tokenization import Tokenizer
from megatron_fuse.tokenization.tokenizer import hash_parts

VOCABULARY_MAPS = ("exact", "em", "mined", "ms")
FORMAT = "vocabulary map 2"


def _no_remainders() -> np.ndarray:
    return np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Target id per source token, -1 = its mass goes to the tail; one table for each state of the two first rows.

    A row is leading when the token it predicts begins in its template's white space before the response: after
    `ASSISTANT:` the response `Sure` is `▁Sure`, after `<|im_start|>assistant\\n` it is `Sure`.
    ids            neither row leads (all rows but the response's first)
    leading        the target's does: `Sure` -> `▁Sure`
    source_leading the source's does: `▁Sure` -> `Sure`
    both_leading   both do: `▁Sure` -> `▁Sure`, the same as `ids` where both templates have the same white space
    All int32 [Vs]. exact bool [Vs]: `ids` gives a target token with equal bytes, or the same token of one vocabulary.
    """

    ids: np.ndarray
    leading: np.ndarray
    source_leading: np.ndarray
    both_leading: np.ndarray
    exact: np.ndarray
    kind: str
    key: str
    """sha256 of all that the map depends on; `vocabulary_map_key` computes it."""
    byte_lengths: np.ndarray = field(default_factory=_no_remainders)
    """int32 [Vs] of the source's tokens, when the map was built with remainders."""
    remainder_ids: np.ndarray = field(default_factory=_no_remainders)
    """int32 [sum of max(byte_lengths - 1, 0)]: token by token, what its bytes without the first 1, 2 ... go to."""

    def __post_init__(self) -> None:
        sizes = {len(table) for table in (self.leading, self.source_leading, self.both_leading, self.exact)}
        if sizes != {len(self.ids)} or len(self.byte_lengths) not in (0, len(self.ids)):
            raise ValueError(f"tables of different sizes: {len(self.ids)} ids, {sorted(sizes)} in the others")
        if len(self.remainder_ids) != self._remainder_ends[-1:].sum():
            raise ValueError(f"{len(self.remainder_ids)} remainders are not those of the tokens' lengths")

    def table(self) -> np.ndarray:
        """int32 [4, Vs], row = 2 * (source row leads) + (target row leads)."""
        return np.stack([self.ids, self.leading, self.source_leading, self.both_leading])

    def remainder(self, ids: np.ndarray, consumed: np.ndarray) -> np.ndarray:
        """Target token for the bytes of source tokens that are left behind a boundary inside them: int32 [e].

        ids int [e]; consumed int [e]: bytes of the token before the boundary, from 1 to its length. The rule for the
        bytes left is that of `exact`, in a map of kind `em` that of `em`; -1 where none are left, and for the stop
        token, whose bytes are not the response's.
        Raises ValueError for any other `consumed`, and if the map was built without remainders.
        """
        if not len(self.byte_lengths):
            raise ValueError("this vocabulary map was built without remainders")
        left = self.byte_lengths[ids] - consumed
        outside = (consumed < 1) | (left < 0)
        if outside.any():
            at = int(np.argmax(outside))
            raise ValueError(f"token {ids[at]} has {self.byte_lengths[ids[at]]} bytes, and no byte {consumed[at]}")
        chosen = np.full(len(left), -1, dtype=np.int32)
        inside = left > 0
        chosen[inside] = self.remainder_ids[self._remainder_ends[ids[inside]] - left[inside]]
        return chosen

    @cached_property
    def _remainder_ends(self) -> np.ndarray:
        """int64 [Vs]: where each token's part of `remainder_ids` ends."""
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
    """The map of all source tokens, as this module's docstring defines the kinds.

    separator: `ChatFormat.separator` of each side; remainders: whether `VocabularyMap.remainder` can be asked;
    pairs: gives the counts that `ms` needs, made from the texts of this sha256; first rows are too few to be counted:
    unless they are like all others (`both_leading` of equal separators), they follow `exact`.
    Raises UserError for a kind that is not known, ValueError for `ms` without pairs.
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
    else:  # together: most endings are words too
        chosen, remainder_ids = np.split(_chosen(rule, chain(words, endings)), [len(words)])
    tables = chosen.reshape(len(states), -1)
    plain = [0, 3] if source_separator == target_separator else [0]  # states without any difference in white space
    if kind == "ms":
        if pairs is None:
            raise ValueError("a map of kind 'ms' is built from pairs")
        met = pairs().most_frequent(otherwise=tables[0])
        tables[plain] = np.where(_equal_bytes(source, target, tables[0], source_stop), tables[0], met)
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
    """Hash of all that a map depends on. Raises UserError for a kind that is not known."""
    if kind not in VOCABULARY_MAPS:
        raise UserError(f"alignment.vocabulary_map: {kind!r} is not one of {', '.join(VOCABULARY_MAPS)}")
    settings = [str(source_stop), str(target_stop), source_separator, target_separator, str(remainders), texts_sha256]
    return hash_parts([FORMAT, kind, source.sha256, target.sha256, *settings])


def save_vocabulary_map(vocabulary_map: VocabularyMap, path: Path) -> None:
    """Writes an .npz file, under a temporary name first: ranks on several machines may write it at once.

    The integers take the smallest type that holds them and -1 is 0: a map of the paper's vocabularies has 0.15 MB, with
    remainders 0.4 MB.
    """
    tables, states = np.unique(vocabulary_map.table(), axis=0, return_inverse=True)  # equal ones are written once
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
    """Reads what save_vocabulary_map wrote. Raises UserError for a file that is not a whole map."""
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
        raise UserError(f"{path}: not a vocabulary map ({error}): delete it to have it made again") from error


def cached_vocabulary_map(
    directory: Path,
    source: Tokenizer,
    target: Tokenizer,
    *,
    pairs: Callable[[], PairCounts] | None = None,
    **options,
) -> VocabularyMap:
    """build_vocabulary_map, or the map that an earlier call left in the directory under its key.

    Pairs are counted only if the map has to be built.
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
    """What every source token says in each of the four states of `VocabularyMap.table`; b"": nothing."""
    pieces = [b"" if token in source.special_ids else piece for token, piece in enumerate(source.token_bytes)]
    # what a leading token says about the response itself: nothing, if it is but white space of the template
    rests = [b"" if source_space.startswith(piece) else piece.removeprefix(source_space) for piece in pieces]
    led = [piece and target_space + piece for piece in pieces]
    both = pieces if source_space == target_space else [rest and target_space + rest for rest in rests]
    return [pieces, led, rests, both]


def _one_vocabulary(source: Tokenizer, target: Tokenizer) -> bool:
    """Whether an id means the same on both sides. Equal sha256 say so; tokenizers that differ in their pad token only,
    as Vicuna's from Llama-2's, have different ones."""
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
    """Token by token, its bytes without the first 1, 2 ...; b"" for the stop token: none of its bytes are the response's."""
    for token, piece in enumerate(source.token_bytes):
        for begin in range(1, len(piece)):
            yield piece[begin:] if token != stop else b""


def _chosen(rule: Callable[[Sequence[bytes]], list[int]], strings: Iterable[bytes]) -> np.ndarray:
    """What a rule of TargetTokens gives for each of the strings, -1 for b"": int32 [n]. The rule sees each string once."""
    numbers: defaultdict[bytes, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    numbers[b""] = 0
    places = np.fromiter(map(numbers.__getitem__, strings), np.int64)
    return np.array([-1, *rule(list(numbers)[1:])], dtype=np.int32)[places]
