"""Vocabulary maps: which target token stands for each source token."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from megatron_fuse.errors import UserError
from megatron_fuse.storage import temporary_then_rename
from megatron_fuse.tokenization import Tokenizer
from megatron_fuse.tokenization.tokenizer import hash_parts

VOCABULARY_MAPS = ("exact",)
FORMAT = "vocabulary map 1"


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Target id per source token, -1 = its mass goes to the tail; one table for each state of the two first rows.

    A row is leading when the token it predicts begins in its template's white space before the response: after
    `ASSISTANT:` the response `Sure` is `▁Sure`, after `<|im_start|>assistant\\n` it is `Sure`.
    ids            neither row leads (all rows but the response's first)
    leading        the target's does: `Sure` -> `▁Sure`
    source_leading the source's does: `▁Sure` -> `Sure`
    both_leading   both do: `▁Sure` -> `▁Sure`, the same as `ids` where both templates have the same white space
    All int32 [Vs]. exact bool [Vs]: a target token with equal bytes exists (in `ids`).
    """

    ids: np.ndarray
    leading: np.ndarray
    source_leading: np.ndarray
    both_leading: np.ndarray
    exact: np.ndarray
    kind: str
    key: str
    """sha256 of all that the map depends on; `vocabulary_map_key` computes it."""

    def table(self) -> np.ndarray:
        """int32 [4, Vs], row = 2 * (source row leads) + (target row leads)."""
        return np.stack([self.ids, self.leading, self.source_leading, self.both_leading])


def build_vocabulary_map(
    source: Tokenizer,
    target: Tokenizer,
    *,
    source_stop: int,
    target_stop: int,
    kind: str = "exact",
    source_separator: str = " ",
    target_separator: str = " ",
) -> VocabularyMap:
    """The map of all source tokens.

    `exact`: the target token of equal bytes, else the first piece of the target's own tokenization of those bytes (of
    bytes that are no UTF-8: the longest target token that they begin with). Stop token to stop token; other special
    tokens and those that the target cannot spell: -1. separator: `ChatFormat.separator` of each side.
    Raises UserError for a kind that is not known.
    """
    key = vocabulary_map_key(source, target, source_stop, target_stop, kind, source_separator, target_separator)
    find = _token_finder(target, target_stop)
    source_space, target_space = source_separator.encode(), target_separator.encode()

    def after_space(piece: bytes) -> bytes | None:
        """What a leading source token says about the response itself; None: only that white space comes first."""
        if piece.startswith(source_space):
            return piece[len(source_space) :] or None
        return None if source_space.startswith(piece) else piece

    tables = np.full((4, source.vocab_size), -1, dtype=np.int32)
    for token, piece in enumerate(source.token_bytes):
        if not piece or token in source.special_ids:
            continue
        rest = after_space(piece)
        tables[0, token] = find(piece)
        tables[1, token] = find(target_space + piece) if target_space else tables[0, token]
        tables[2, token] = find(rest) if rest is not None else -1
        if source_space == target_space:
            tables[3, token] = tables[0, token]
        else:
            tables[3, token] = find(target_space + rest) if rest is not None else -1
    tables[:, source_stop] = target_stop
    mapped = tables[0]
    exact = np.array(
        [t >= 0 and target.token_bytes[t] == piece for t, piece in zip(mapped, source.token_bytes, strict=True)]
    )
    exact[source_stop] = True
    return VocabularyMap(*tables, exact=exact, kind=kind, key=key)


def vocabulary_map_key(
    source: Tokenizer,
    target: Tokenizer,
    source_stop: int,
    target_stop: int,
    kind: str,
    source_separator: str,
    target_separator: str,
) -> str:
    """Hash of all that a map depends on. Raises UserError for a kind that is not known."""
    if kind not in VOCABULARY_MAPS:
        raise UserError(f"alignment.vocabulary_map: {kind!r} is not one of {', '.join(VOCABULARY_MAPS)}")
    settings = [str(source_stop), str(target_stop), source_separator, target_separator]
    return hash_parts([FORMAT, kind, source.sha256, target.sha256, *settings])


def save_vocabulary_map(vocabulary_map: VocabularyMap, path: Path) -> None:
    """Writes an .npz file, under a temporary name first: ranks on several machines may write it at once."""
    arrays = {field.name: getattr(vocabulary_map, field.name) for field in fields(VocabularyMap)}
    with temporary_then_rename(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_vocabulary_map(path: Path) -> VocabularyMap:
    """Reads what save_vocabulary_map wrote. Raises UserError for a file that is not a whole map."""
    try:
        with np.load(path, allow_pickle=False) as data:
            values = {field.name: data[field.name] for field in fields(VocabularyMap)}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a vocabulary map ({error}): delete it to have it made again") from error
    return VocabularyMap(**values | {"kind": str(values["kind"]), "key": str(values["key"])})


def cached_vocabulary_map(directory: Path, source: Tokenizer, target: Tokenizer, **options) -> VocabularyMap:
    """build_vocabulary_map, or the map that an earlier call left in the directory under its key."""
    defaults = {"kind": "exact", "source_separator": " ", "target_separator": " "}
    key = vocabulary_map_key(source, target, **defaults | options)
    path = directory / f"{key[:24]}.npz"
    if path.is_file():
        vocabulary_map = load_vocabulary_map(path)
        if vocabulary_map.key == key:
            return vocabulary_map
    vocabulary_map = build_vocabulary_map(source, target, **options)
    save_vocabulary_map(vocabulary_map, path)
    return vocabulary_map


def _token_finder(target: Tokenizer, target_stop: int) -> Callable[[bytes], int]:
    """bytes -> target id as `exact` defines it, remembering what it has found."""
    known: dict[bytes, int] = {}
    doubles: set[bytes] = set()
    for token, piece in enumerate(target.token_bytes):
        if not piece or token in target.special_ids or token == target_stop:
            continue
        if piece in known:
            doubles.add(piece)
        else:
            known[piece] = token
    for piece in doubles:  # a letter and its byte token, say: take the one that the target itself would write
        own = _own_pieces(target, piece)
        if len(own) == 1 and target.token_bytes[own[0]] == piece:
            known[piece] = own[0]
    found = dict(known)
    longest = max(map(len, known), default=0)

    def find(piece: bytes) -> int:
        if piece not in found:
            first = _own_pieces(target, piece)[:1]
            if not first or first[0] == target_stop or not _begins(piece, target.token_bytes[first[0]]):
                lengths = range(min(len(piece) - 1, longest), 0, -1)
                first = [known[piece[:length]] for length in lengths if piece[:length] in known][:1]
            found[piece] = first[0] if first else -1
        return found[piece]

    return find


def _own_pieces(target: Tokenizer, piece: bytes) -> list[int]:
    try:
        return target.encode_continuation(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return []


def _begins(piece: bytes, start: bytes) -> bool:
    return bool(start) and piece.startswith(start)
