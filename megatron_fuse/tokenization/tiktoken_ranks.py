"""Tokenizers in the form of a tiktoken rank file: base64 bytes and a rank on every line.

A rank file holds neither the splitting pattern nor the special tokens. `cl100k_base.tiktoken` and
`o200k_base.tiktoken` are recognised by their names. A `.model` file of this form is Llama-3's
`tokenizer.model`.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import tiktoken

from megatron_fuse.errors import UserError
from megatron_fuse.storage.files import sha256_of_parts
from megatron_fuse.storage.strict_json import read_small_file
from megatron_fuse.tokenization.settings import Settings, read_settings
from megatron_fuse.tokenization.tiktoken_encodings import ENCODINGS, PublishedEncoding
from megatron_fuse.tokenization.tokenizer import Tokenizer, split_at

# tiktoken's regex engine can keep a million places for backtracking.
# A run of white space needs one per character.
LONGEST_RUN = 500_000
_WHITE_SPACE = re.compile(r"\s+")


class TiktokenBackend:
    """A tiktoken encoding. It can spell every text, because all 256 bytes have a rank."""

    def __init__(
        self, encoding: tiktoken.Encoding, ranks: dict[bytes, int], pattern: str, special: dict[str, int]
    ) -> None:
        self._encoding, self._ranks, self._pattern, self._special = encoding, ranks, pattern, special

    def encode(self, text: str, *, special: bool) -> list[int]:
        if not special:
            return self.encode_continuation(text)
        if not _has_overlong_run(text):
            return self._encoding.encode(text, allowed_special="all")
        ids: list[int] = []
        for part in split_at(text, self._special):
            ids += [self._special[part]] if part in self._special else self.encode_continuation(part)
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        if not _has_overlong_run(text):
            return self._encoding.encode_ordinary(text)
        from tokenizers import Regex, pre_tokenizers

        splitter = pre_tokenizers.Split(Regex(self._pattern), behavior="isolated")
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)]
        return [token for piece in pieces for token in self._encoding._encode_single_piece(piece)]

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode_continuation(text) for text in texts]

    def encode_normalized(self, text: str) -> NoReturn:
        raise NotImplementedError("tiktoken has no normaliser: its tokens spell every text")

    def hugging_face(self, tokenizer: Tokenizer) -> Any:
        from megatron_fuse.tokenization.tiktoken_export import as_transformers

        return as_transformers(tokenizer, self._ranks, self._pattern, self._special)


def _has_overlong_run(text: str) -> bool:
    return len(text) > LONGEST_RUN and any(
        match.end() - match.start() > LONGEST_RUN for match in _WHITE_SPACE.finditer(text)
    )


def load_tiktoken(path: Path) -> Tokenizer:
    """Reads a rank file, and the settings of transformers beside it (tokenizer_config.json and others).

    Raises UserError if the encoding of the file is unknown, or if the file is not the one that its name says.
    """
    data = read_small_file(path)
    encoding = _known_encoding(path)
    _refuse_another_encoding(data, encoding, path)
    ranks = _read_ranks(data, path)
    if len(ranks) > encoding.ranks:
        raise UserError(
            f"{path}: it holds {len(ranks)} ranks, but {encoding.name} has {encoding.ranks}. So this is the "
            "rank file of another model, and a rank file does not hold its splitting pattern. Use the "
            "tokenizer.json of that model."
        )
    settings = read_settings(path.parent)
    published, special = _special_tokens(path, encoding, len(ranks), settings)
    named = {
        kind: settings.named_token(kind, special, None if default is None else published.get(default))
        for kind, default in (("bos", encoding.bos), ("eos", encoding.eos), ("pad", None))
    }
    setting = settings.config.add_bos_token
    adds_bos = named["bos"] is not None and (encoding.bos is not None if setting is None else setting)
    token_bytes = [b""] * (1 + max([*ranks.values(), *published.values(), *special.values()]))
    for piece, rank in ranks.items():
        token_bytes[rank] = piece
    return Tokenizer(
        name=str(path),
        token_bytes=token_bytes,
        bos_id=named["bos"],
        eos_id=named["eos"],
        pad_id=named["pad"],
        special_ids=frozenset({*published.values(), *special.values()}),
        added_tokens=special,
        adds_bos=adds_bos,
        chat_template=settings.chat_template,
        sha256=sha256_of_parts(
            "tiktoken", encoding.pattern, str([sorted(special.items()), named, adds_bos]), data
        ),
        backend=TiktokenBackend(
            tiktoken.Encoding(
                path.stem, pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens=special
            ),
            ranks,
            encoding.pattern,
            special,
        ),
    )


def _special_tokens(
    path: Path, encoding: PublishedEncoding, ranks: int, settings: Settings
) -> tuple[dict[str, int], dict[str, int]]:
    """Two tables text -> id: as published, and with the names of tokenizer_config.json.

    The settings may rename some of the published ids, and add others.
    """
    for text, token in settings.added.items():
        if token < ranks:
            raise UserError(
                f"{path.parent}: the added token {text!r} has id {token}, but in {path.name} this is the id "
                "of other bytes. The settings beside the rank file belong to another model."
            )
    shift = ranks - encoding.ranks if encoding.follows else 0
    published = {text: token + shift for text, token in encoding.special.items()}
    renamed = set(settings.added.values())
    return published, {
        text: token for text, token in published.items() if token not in renamed
    } | settings.added


def _known_encoding(path: Path) -> PublishedEncoding:
    """The encoding by the file's name.

    A `.model` file is Llama-3's. Raises UserError if the name is unknown.
    """
    name = "llama3" if path.suffix == ".model" else path.stem
    if name not in ENCODINGS:
        raise UserError(
            f"{path}: a rank file does not hold its splitting pattern, and the encoding {name!r} is not "
            f"known (known: {', '.join(ENCODINGS)}). Rename the file to its encoding, or use the "
            "tokenizer.json of the model."
        )
    return ENCODINGS[name]


def _refuse_another_encoding(data: bytes, encoding: PublishedEncoding, path: Path) -> None:
    """Raises UserError for a renamed file.

    It would be split by the wrong pattern, which the ranks cannot show.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    for other in ENCODINGS.values():
        if other.sha256 == sha256 and other.name != encoding.name:
            raise UserError(
                f"{path}: this is the rank file of {other.name} with the name of {encoding.name}, which has "
                "another splitting pattern or other special tokens. Rename the file to "
                f"{other.name}.tiktoken."
            )


def _read_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """bytes -> rank, with all ranks 0, 1, 2 ... Raises UserError for a damaged file."""
    try:
        pairs = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in pairs}
    except ValueError as error:
        raise UserError(
            f"{path}: not a tiktoken rank file (each line needs base64 bytes and a rank): {error}"
        ) from error
    if sorted(ranks.values()) != list(range(len(pairs))):
        raise UserError(
            f"{path}: the ranks of its {len(pairs)} lines are not 0, 1, 2 ... The file is damaged: fetch it "
            "again."
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of the 256 single bytes have no rank, the first is 0x{missing[0]:02X}. "
            "The file is damaged: fetch it again."
        )
    return ranks
