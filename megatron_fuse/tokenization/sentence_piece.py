"""SentencePiece models (`tokenizer.model`), read by the library that trained them.

transformers 5 rebuilds such a model as BPE merges, and splits runs of spaces differently: "Hello  world"
becomes `▁Hello ▁▁ world`, although the model was trained on `▁Hello ▁ ▁world`. So transformers is not used if
there is no tokenizer.json.
"""

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_fuse.errors import UserError
from megatron_fuse.storage.files import sha256_of_parts
from megatron_fuse.storage.records import quoted
from megatron_fuse.storage.strict_json import read_small_file
from megatron_fuse.text_safety import brief
from megatron_fuse.tokenization.normalized_spans import covered
from megatron_fuse.tokenization.settings import Strips, read_settings
from megatron_fuse.tokenization.tokenizer import VISIBLE_SPACE, Tokenizer, split_at

# protoc builds the classes of the module when it is imported: mypy does not see them.
_ModelProto = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]


class SentencePieceBackend:
    def __init__(
        self, model: Any, added: dict[str, int], always: dict[str, int], strips: Strips, legacy: bool
    ) -> None:
        """added: strings that become ids in a template's text.

        always: those of them that become ids in any text.

        strips: white space that the added tokens remove, in `encode` only: a continuation keeps every byte.
        """
        self._model, self._added, self._always, self._strips, self._legacy = (
            model,
            added,
            always,
            strips,
            legacy,
        )
        self._whole = _processor(model)
        self._continuation = _processor(
            model,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            name="identity",
            precompiled_charsmap=b"",
        )

    def encode(self, text: str, *, special: bool) -> list[int]:
        table = self._added if special else self._always
        ids: list[int] = []
        for index, part in enumerate(self._strips.applied(split_at(text, table))):
            if part in table:
                ids.append(table[part])
            elif part:
                # `legacy` is transformers' word for a dummy prefix
                # after every special token: Llama-2 was trained so.
                processor = self._whole if index == 0 or self._legacy else self._continuation
                ids += processor.encode(part)
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in split_at(text, self._always):
            ids += [self._always[part]] if part in self._always else self._continuation.encode(part)
        return ids

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode_continuation(text) for text in texts]

    def encode_normalized(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        ids: list[int] = []
        starts, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        offset = 0
        for part in split_at(text, self._always):
            size = len(part.encode())
            if part in self._always:
                part_ids, begin, end = [self._always[part]], np.zeros(1, np.int64), np.full(1, size)
            else:
                part_ids, begin, end = self._encode_normalized_part(part)
            ids += part_ids
            starts.append(begin + offset)
            ends.append(end + offset)
            offset += size
        return ids, np.concatenate(starts), np.concatenate(ends)

    def _encode_normalized_part(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        # The normaliser drops white space at the beginning of a text. But this text is in the middle of
        # another, where one space would be left: the dummy prefix of `_whole` takes its place.
        drops = self._model.normalizer_spec.remove_extra_whitespaces
        space = drops and self._keeping_spaces.normalize(text[:1]).startswith(VISIBLE_SPACE)
        processor = self._whole if space else self._without_prefix
        data = text.encode()
        tokens = processor.encode(data, return_type="offset_mapping")
        normalized, offsets = processor.normalize(data, with_offsets=True)  # in bytes, as the input is
        origin = np.array([*offsets[:-1], len(data)], np.int64)
        if space:
            origin[: len(VISIBLE_SPACE.encode())] = 0
        lengths = np.array([len(piece) for piece in tokens["pieces"]], np.int64)
        ends = np.cumsum(lengths)
        # If the pieces do not spell the normalised text, no token has
        # a known place: each covers the whole text.
        if b"".join(tokens["pieces"]) != normalized:
            return tokens["ids"], np.zeros(len(ends), np.int64), np.full(len(ends), len(data))
        return tokens["ids"], *covered(ends - lengths, ends, origin)

    @cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        return _processor(self._model, add_dummy_prefix=False)

    @cached_property
    def _keeping_spaces(self) -> sentencepiece.SentencePieceProcessor:
        return _processor(self._model, add_dummy_prefix=False, remove_extra_whitespaces=False)

    def hugging_face(self, tokenizer: Tokenizer) -> Any:
        from megatron_fuse.tokenization.sentence_piece_export import as_transformers

        return as_transformers(tokenizer, self._model, self._strips, legacy=self._legacy)


def _processor(model: Any, **normalizer: Any) -> sentencepiece.SentencePieceProcessor:
    """The model with some fields of its normalizer_spec changed."""
    changed = _ModelProto()
    changed.CopyFrom(model)
    for field, value in normalizer.items():
        setattr(changed.normalizer_spec, field, value)
    return sentencepiece.SentencePieceProcessor(model_proto=changed.SerializeToString())


def _refuse_other_bytes(model: Any, extra: dict[str, int], path: Path) -> None:
    """Raises UserError if an added token has the id of a piece of text.

    It may only rename reserved pieces.
    """
    for text, token in extra.items():
        if token < len(model.pieces) and model.pieces[token].type in (
            model.SentencePiece.NORMAL,
            model.SentencePiece.BYTE,
        ):
            raise UserError(
                f"{path.parent}: the added token {quoted(text)} has id {token}, but in {path.name} this is "
                f"the id of {quoted(model.pieces[token].piece)}. The settings beside the model belong to "
                "another model."
            )


def _hide_from_text(model: Any, special: Set[int | None]) -> None:
    """Turns special user-defined pieces, such as Gemma's `<end_of_turn>`, into control pieces.

    So a user's text cannot become a special token.
    """
    for token, entry in enumerate(model.pieces):
        if token in special and entry.type == entry.USER_DEFINED:
            entry.type = entry.CONTROL


def _user_defined(model: Any) -> dict[str, int]:
    """Pieces that SentencePiece itself matches as whole strings in any text.

    Runs of spaces are left out, because a piece writes them in another form than the text.
    """
    return {
        entry.piece: token
        for token, entry in enumerate(model.pieces)
        if entry.type == entry.USER_DEFINED and VISIBLE_SPACE not in entry.piece
    }


def _visible(piece: str) -> bytes:
    return piece.replace(VISIBLE_SPACE, " ").encode()


@dataclass(frozen=True)
class _Pieces:
    """The tokens of a model file."""

    ids: dict[str, int]  # piece -> id
    token_bytes: dict[int, bytes]  # id -> the bytes that it stands for
    named: dict[str, int | None]  # ids of "bos", "eos" and "pad"


def _parse(data: bytes, path: Path) -> tuple[Any, _Pieces]:
    """The model of a file, and its tokens. Raises UserError if the file is not a SentencePiece model."""
    model = _ModelProto()
    try:
        model.ParseFromString(data)
        if not model.pieces:
            raise ValueError("it has no pieces")
        processor = _processor(model)
        ids = {processor.id_to_piece(token): token for token in range(processor.vocab_size())}
        token_bytes = {
            token: bytes([int(piece[3:5], 16)]) if processor.is_byte(token) else _visible(piece)
            for piece, token in ids.items()
        }
    except Exception as error:  # protobuf and sentencepiece raise their own kinds
        raise UserError(
            f"{path}: not a SentencePiece model ({brief(str(error))}), and not tiktoken ranks. Any other "
            "tokenizer needs a tokenizer.json beside it."
        ) from error
    named = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}  # -1 = none
    return model, _Pieces(
        ids, token_bytes, {kind: token if token >= 0 else None for kind, token in named.items()}
    )


def _token_bytes(pieces: _Pieces, extra: dict[str, int], special: Set[int]) -> list[bytes]:
    """Tokenizer.token_bytes. extra: the added tokens that are no pieces. special: ids without bytes."""
    token_bytes = [b""] * (1 + max([*pieces.ids.values(), *extra.values()]))
    # The order matters: added tokens override the model's pieces, and special tokens have no bytes at all.
    for token, piece_bytes in pieces.token_bytes.items():
        token_bytes[token] = piece_bytes
    for text, token in extra.items():
        token_bytes[token] = text.encode()
    for token in special:
        token_bytes[token] = b""
    return token_bytes


def load_sentence_piece(path: Path) -> Tokenizer:
    """Reads a SentencePiece model file, and transformers' settings beside it (tokenizer_config.json, others).

    Raises UserError if the file is not a SentencePiece model, or if the settings belong to another model.
    """
    data = read_small_file(path)
    model, pieces = _parse(data, path)
    settings = read_settings(path.parent)
    extra = {text: token for text, token in settings.added.items() if text not in pieces.ids}
    _refuse_other_bytes(model, extra, path)
    named = {
        kind: settings.named_token(kind, pieces.ids | extra, token) for kind, token in pieces.named.items()
    }
    _hide_from_text(model, {*settings.special, *named.values()})
    processor = _processor(model)
    control = {
        piece: i for piece, i in pieces.ids.items() if processor.is_control(i) or processor.is_unknown(i)
    }
    special = {
        *control.values(),
        *settings.special,
        *(token for token in named.values() if token is not None),
    }
    always = {text: token for text, token in extra.items() if token not in special}
    added = control | extra
    legacy = settings.config.legacy
    if legacy is None:
        # Mistral's later models have [INST] as a control piece, and no dummy prefix after control pieces.
        # Llama-2 and Mistral's first models have no such piece, and a dummy prefix.
        legacy = "[INST]" not in control
    adds_bos = named["bos"] is not None and settings.config.add_bos_token is not False
    return Tokenizer(
        name=str(path),
        token_bytes=_token_bytes(pieces, extra, special),
        bos_id=named["bos"],
        eos_id=named["eos"],
        pad_id=named["pad"],
        special_ids=frozenset(special),
        added_tokens=_user_defined(model) | added,
        adds_bos=adds_bos,
        chat_template=settings.chat_template,
        sha256=sha256_of_parts(
            "sentencepiece",
            data,
            json.dumps([sorted(extra.items()), sorted(special), named, legacy, adds_bos]),
            *settings.strips.parts(),
        ),
        backend=SentencePieceBackend(model, added, always, settings.strips, legacy),
    )
