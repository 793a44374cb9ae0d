"""Reads a tokenizer.json: the bytes of its vocabulary, and the parts of its pipeline.

A State is its parsed JSON.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_fuse import ragged
from megatron_fuse.errors import UserError
from megatron_fuse.tokenization.tokenizer import VISIBLE_SPACE

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

State = dict[str, Any]


@cache
def byte_level_table() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level BPE.

    Printable Latin-1 characters stand for themselves. The other bytes are the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(moved)}


def vocabulary_bytes(state: State, special: set[int], name: str) -> list[bytes]:
    """The bytes of every id in the middle of a text; b"" for special and unknown tokens and unused ids.

    Raises UserError, with the tokenizer's name, if the bytes of the vocabulary cannot be known.
    """
    model = state["model"]
    byte_level = any(part["type"] == "ByteLevel" for key in _PIPELINE for part in _parts(state[key]))
    spelled = _spelling(state, byte_level, name)
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: a list of [piece, score]; the place is the id
        vocabulary = {piece: token for token, (piece, _) in enumerate(vocabulary)}
        special = special | ({model["unk_id"]} if model.get("unk_id") is not None else set())
    elif model.get("unk_token") in vocabulary:
        special = special | {vocabulary[model["unk_token"]]}
    added = {token["id"]: token["content"] for token in state["added_tokens"]}
    result = [b""] * (1 + max([*vocabulary.values(), *added]))
    for token, data in zip(vocabulary.values(), spelled(list(vocabulary)), strict=True):
        result[token] = data
    for token, content in added.items():  # they are matched in the raw text, so their bytes are plain UTF-8
        result[token] = (content if byte_level else content.replace(VISIBLE_SPACE, " ")).encode()
    for token in special:
        result[token] = b""
    return result


_PIPELINE = ("normalizer", "pre_tokenizer", "decoder")


def pipeline(state: State) -> State:
    """The state without its model, which takes most of the memory."""
    return {key: state[key] for key in _PIPELINE}


def with_paired_merges(state: State) -> State:
    """The state with merges as pairs, `["a", "b"]`. Older files write them as `"a b"`."""
    model = state["model"]
    merges = model.get("merges")
    if merges and isinstance(merges[0], str):
        return state | {"model": model | {"merges": [merge.split(" ") for merge in merges]}}
    return state


def _spelling(state: State, byte_level: bool, name: str) -> Callable[[list[str]], list[bytes]]:
    """The function that gives the bytes of pieces, of a whole vocabulary in one call."""
    model = state["model"]
    if (
        model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or model["type"] == "WordPiece"
    ):
        raise UserError(
            f"{name}: the tokens of a {model['type']} vocabulary with word marks have no exact bytes. Choose "
            "a model with a byte-level or SentencePiece-like tokenizer."
        )
    if byte_level:
        return _byte_level_bytes
    if model.get("byte_fallback"):
        return lambda pieces: [_fallback_byte(piece) or _spaced(piece) for piece in pieces]
    if _makes_spaces_visible(state):
        return lambda pieces: [_spaced(piece) for piece in pieces]
    kinds = sorted({part["type"] for key in _PIPELINE for part in _parts(state[key])})
    raise UserError(
        f"{name}: the bytes of its tokens are not known, because the tokenizer.json has model "
        f"{model['type']} with {kinds or 'no decoder'}. Choose a model with a byte-level or "
        "SentencePiece-like tokenizer.json."
    )


def _byte_level_bytes(pieces: list[str]) -> list[bytes]:
    """The bytes of byte-level pieces.

    If a character of a piece stands for no byte, they are the piece's UTF-8.
    """
    table = np.full(0x110000, -1, np.int16)
    for character, byte in byte_level_table().items():
        table[ord(character)] = byte
    bytes_or_none = table[np.frombuffer("".join(pieces).encode("utf-32-le"), np.uint32)]
    ends = ragged.offsets([len(piece) for piece in pieces])
    data = bytes_or_none.astype(np.uint8).tobytes()
    result = [data[begin:end] for begin, end in pairwise(ends.tolist())]
    for index in np.unique(np.searchsorted(ends, np.flatnonzero(bytes_or_none < 0), side="right") - 1):
        result[index] = pieces[index].encode()
    return result


def _fallback_byte(piece: str) -> bytes | None:
    match = BYTE_PIECE.fullmatch(piece) if piece.startswith("<0x") else None
    return bytes([int(match[1], 16)]) if match else None


def _spaced(piece: str) -> bytes:
    return piece.replace(VISIBLE_SPACE, " ").encode()


def _makes_spaces_visible(state: State) -> bool:
    """Whether pieces write spaces as U+2581. Then some part of the pipeline turns one into the other."""
    return any(
        part["type"] == "Metaspace"
        or (part["type"] == "Replace" and _replaced(part) in (_SPACE_SHOWN, _SPACE_READ))
        for key in _PIPELINE
        for part in _parts(state[key])
    )


_SPACE_SHOWN = (" ", VISIBLE_SPACE)
_SPACE_READ = (VISIBLE_SPACE, " ")


def _replaced(part: State) -> tuple[str | None, str]:
    return part["pattern"].get("String"), part["content"]


def without_beginning(state: State) -> State:
    """The tokenizer without dummy prefix, without dropped white space, and without normalisation of the text.

    Only the normalisers that make spaces visible or write bytes as characters stay.
    """
    kept = [part for part in _parts(state["normalizer"]) if _only_spells(part)]
    pre_tokenizers = []
    for part in _parts(state["pre_tokenizer"]):
        if part["type"] == "Metaspace":
            part = part | {"prepend_scheme": "never"}
        elif part["type"] == "ByteLevel":
            part = part | {"add_prefix_space": False}
        if part["type"] != "WhitespaceSplit":
            pre_tokenizers.append(part)
    return state | {
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None,
        "post_processor": None,  # it may remove white space from the offsets
    }


def own_normalizer(state: State) -> tuple[State, bool]:
    """The normaliser that `without_beginning` leaves out, in the state of an empty tokenizer.

    Also returns whether white space at the end of a text is dropped. White space at the beginning is not
    dropped, because the beginning of a continuation is the middle of a text.
    """
    parts = [
        part for part in _parts(state["normalizer"]) if not _only_spells(part) and part["type"] != "Prepend"
    ]
    strips = any(part["type"] == "Strip" and part["strip_right"] for part in parts)
    parts = [part for part in parts if part["type"] != "Strip"]
    if any(part["type"] == "WhitespaceSplit" for part in _parts(state["pre_tokenizer"])):
        parts.append({"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "})
        strips = True
    normalizer = {"type": "Sequence", "normalizers": parts}
    return {
        "version": "1.0",
        "normalizer": normalizer,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }, strips


def _only_spells(part: State) -> bool:
    """Whether a normaliser changes only the spelling of a text for the vocabulary, not the text itself."""
    return part["type"] == "ByteLevel" or (part["type"] == "Replace" and part["pattern"] == {"String": " "})


def _parts(component: State | None) -> Iterator[State]:
    """The members of a normalizer, pre-tokenizer or decoder, also those inside sequences."""
    if component is None:
        return
    if component["type"] == "Sequence":
        members = next(value for key, value in component.items() if key != "type")
        for member in members:
            yield from _parts(member)
    else:
        yield component
