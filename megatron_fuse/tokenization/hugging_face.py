"""Tokenizers of the `tokenizers` library: what transformers loads from tokenizer.json, or from vocab.json + merges.txt."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from megatron_fuse.errors import UserError
from megatron_fuse.tokenization.tokenizer import VISIBLE_SPACE, Tokenizer, hash_parts

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFaceBackend:
    """`continuation` is the same tokenizer without what it does to the beginning of a text or to its Unicode form."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
        self._transformers = tokenizer
        state = backend_state(tokenizer)
        self._whole = tokenizers.Tokenizer.from_str(json.dumps(state))
        self._continuation = tokenizers.Tokenizer.from_str(json.dumps(_without_beginning(state)))
        self._continuation.encode_special_tokens = True  # the library's name for: special strings are plain text

    def encode(self, text: str, *, special: bool) -> list[int]:
        self._whole.encode_special_tokens = not special
        return self._whole.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        return self._continuation.encode(text, add_special_tokens=False).ids

    def hugging_face(self, tokenizer: Tokenizer) -> transformers.PreTrainedTokenizerFast:
        return self._transformers


def load_hugging_face(directory: Path) -> Tokenizer:
    """Reads a directory that transformers' AutoTokenizer can read, or a bare pair vocab.json + merges.txt (GPT-2)."""
    try:
        if (directory / "tokenizer.json").is_file():
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        else:
            tokenizer = transformers.GPT2TokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a broken file
        raise UserError(f"{directory}: transformers cannot load this tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: only fast tokenizers have known bytes: save a tokenizer.json with transformers")
    return wrap_hugging_face(tokenizer, name=str(directory))


def wrap_hugging_face(tokenizer: transformers.PreTrainedTokenizerFast, name: str) -> Tokenizer:
    """The interface over a transformers fast tokenizer that is already in memory."""
    state = backend_state(tokenizer)
    added = {token["content"]: token["id"] for token in state["added_tokens"]}
    special = {token["id"] for token in state["added_tokens"] if token["special"]}
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    special.update(token for token in named if token is not None)
    for token in special:
        added.setdefault(tokenizer.convert_ids_to_tokens(token), token)
    bos = tokenizer.bos_token_id
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids[:1]
    return Tokenizer(
        name=name,
        token_bytes=_vocabulary_bytes(state, special, name),
        bos_id=bos,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        special_ids=frozenset(special),
        added_tokens=added,
        adds_bos=bos is not None and first == [bos],
        chat_template=_default_template(tokenizer.chat_template),
        sha256=hash_parts(["hugging_face", json.dumps(state, sort_keys=True), str(named), str(sorted(special))]),
        backend=HuggingFaceBackend(tokenizer),
    )


def backend_state(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, Any]:
    """tokenizer.json as it works in memory; truncation and padding are moods of a caller and are left out."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return state | {"truncation": None, "padding": None}


def _default_template(template: str | dict[str, str] | None) -> str | None:
    return template.get("default") if isinstance(template, dict) else template


@cache
def byte_level_table() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level BPE: printable Latin-1 stands for itself, the rest is moved up from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(moved)}


def _vocabulary_bytes(state: dict[str, Any], special: set[int], name: str) -> list[bytes]:
    model = state["model"]
    kinds = {part["type"] for key in ("normalizer", "pre_tokenizer", "decoder") for part in _parts(state[key])}
    spaces = any(
        part["type"] == "Metaspace" or (part["type"] == "Replace" and part.get("content") == " ")
        for part in _parts(state["decoder"])
    )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model["type"] == "WordPiece":
        raise UserError(f"{name}: a {model['type']} vocabulary with word marks has no exact bytes for its tokens")
    if "ByteLevel" in kinds:
        table = byte_level_table()

        def piece_bytes(piece: str) -> bytes:
            codes = [table.get(character) for character in piece]
            return piece.encode() if None in codes else bytes(codes)
    elif spaces or model.get("byte_fallback"):

        def piece_bytes(piece: str) -> bytes:
            match = BYTE_PIECE.fullmatch(piece) if model.get("byte_fallback") else None
            return bytes([int(match[1], 16)]) if match else piece.replace(VISIBLE_SPACE, " ").encode()
    else:
        raise UserError(
            f"{name}: cannot tell which bytes its tokens stand for: expected a byte-level or SentencePiece-like "
            f"tokenizer.json, found model {model['type']} with {sorted(kinds) or 'no decoder'}"
        )
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score], the place is the id
        vocabulary = {piece: token for token, (piece, _) in enumerate(vocabulary)}
        special = special | ({model["unk_id"]} if model.get("unk_id") is not None else set())
    elif model.get("unk_token") in vocabulary:
        special = special | {vocabulary[model["unk_token"]]}
    added = {token["id"]: token["content"] for token in state["added_tokens"]}
    result = [b""] * (1 + max([*vocabulary.values(), *added]))
    for piece, token in vocabulary.items():
        result[token] = piece_bytes(piece)
    for token, content in added.items():  # matched in the raw text, so their bytes are plain UTF-8
        result[token] = content.replace(VISIBLE_SPACE, " ").encode() if "ByteLevel" not in kinds else content.encode()
    for token in special:
        result[token] = b""
    return result


def _without_beginning(state: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer with no dummy prefix and no normaliser but the one that makes spaces visible."""
    kept = [
        part
        for part in _parts(state["normalizer"])
        if part["type"] == "ByteLevel" or (part["type"] == "Replace" and part["pattern"] == {"String": " "})
    ]
    pre_tokenizers = []
    for part in _parts(state["pre_tokenizer"]):
        if part["type"] == "Metaspace":
            part = part | {"prepend_scheme": "never"}
        elif part["type"] == "ByteLevel":
            part = part | {"add_prefix_space": False}
        pre_tokenizers.append(part)
    return state | {
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None,
    }


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The members of a normalizer, pre-tokenizer or decoder, sequences opened."""
    if component is None:
        return
    if component["type"] == "Sequence":
        members = next(value for key, value in component.items() if key != "type")
        for member in members:
            yield from _parts(member)
    else:
        yield component
