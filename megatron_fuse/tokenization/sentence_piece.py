"""SentencePiece models (`tokenizer.model`), read by the library that trained them.

transformers 5 rebuilds such a model as BPE merges and cuts runs of spaces differently ("Hello  world" becomes
`▁Hello ▁▁ world` where the model was trained on `▁Hello ▁ ▁world`), so it is not asked when there is no tokenizer.json.
"""

import json
import re
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_fuse.errors import UserError
from megatron_fuse.tokenization.tokenizer import VISIBLE_SPACE, Tokenizer, hash_parts


class SentencePieceBackend:
    def __init__(self, model: Any, added: dict[str, int], always: dict[str, int], legacy: bool) -> None:
        """added: strings that are ids in template text; always: those of them that are ids in any text."""
        self._model, self._added, self._always, self._legacy = model, added, always, legacy
        self._whole = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        plain = sentencepiece_model_pb2.ModelProto()
        plain.CopyFrom(model)
        plain.normalizer_spec.add_dummy_prefix = False
        plain.normalizer_spec.remove_extra_whitespaces = False
        plain.normalizer_spec.name = "identity"
        plain.normalizer_spec.precompiled_charsmap = b""
        self._continuation = sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())

    def encode(self, text: str, *, special: bool) -> list[int]:
        table = self._added if special else self._always
        ids: list[int] = []
        for index, part in enumerate(_split(text, table)):
            if part in table:
                ids.append(table[part])
            elif part:
                # `legacy` is transformers' word for a dummy prefix after every special token, as Llama-2 was trained
                processor = self._whole if index == 0 or self._legacy else self._continuation
                ids += processor.encode(part)
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in _split(text, self._always):
            ids += [self._always[part]] if part in self._always else self._continuation.encode(part)
        return ids

    def hugging_face(self, tokenizer: Tokenizer) -> Any:
        from megatron_fuse.tokenization.sentence_piece_export import as_transformers

        return as_transformers(tokenizer, self._model, legacy=self._legacy)


def load_sentence_piece(path: Path) -> Tokenizer:
    """Reads a SentencePiece model file and, beside it, what transformers keeps in tokenizer_config.json and the like."""
    data = path.read_bytes()
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except Exception as error:  # protobuf and sentencepiece raise their own kinds
        raise UserError(
            f"{path}: not a SentencePiece model ({error}); a tiktoken rank file must end in .tiktoken, any other "
            "tokenizer needs a tokenizer.json beside it"
        ) from error
    config = _read_json(path.parent / "tokenizer_config.json")
    pieces = {processor.id_to_piece(token): token for token in range(processor.vocab_size())}
    control = {piece: i for piece, i in pieces.items() if processor.is_control(i) or processor.is_unknown(i)}
    extra, extra_special = _added_tokens(path.parent, config, pieces)
    special = set(control.values()) | extra_special
    named = {
        kind: _named_token(config.get(f"{kind}_token"), pieces | extra, getattr(processor, f"{kind}_id")())
        for kind in ("bos", "eos", "pad")
    }
    special.update(token for token in named.values() if token is not None)
    token_bytes = [b""] * (1 + max([*pieces.values(), *extra.values()]))
    for piece, token in pieces.items():
        token_bytes[token] = (
            bytes([int(piece[3:5], 16)]) if processor.is_byte(token) else piece.replace(VISIBLE_SPACE, " ").encode()
        )
    for text, token in extra.items():
        token_bytes[token] = text.encode()
    for token in special:
        token_bytes[token] = b""
    always = {text: token for text, token in extra.items() if token not in special}
    legacy = config.get("legacy") is not False
    adds_bos = named["bos"] is not None and config.get("add_bos_token", True) is not False
    settings = json.dumps([sorted(extra.items()), sorted(special), named, legacy, adds_bos])
    template_file = path.parent / "chat_template.jinja"
    template = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return Tokenizer(
        name=str(path),
        token_bytes=token_bytes,
        bos_id=named["bos"],
        eos_id=named["eos"],
        pad_id=named["pad"],
        special_ids=frozenset(special),
        added_tokens=control | extra,
        adds_bos=adds_bos,
        chat_template=template,
        sha256=hash_parts(["sentencepiece", data, settings]),
        backend=SentencePieceBackend(model, control | extra, always, legacy),
    )


def _split(text: str, table: dict[str, int]) -> list[str]:
    """The text cut at the table's strings, longest first; joined again it is the text."""
    if not table:
        return [text]
    pattern = "|".join(re.escape(entry) for entry in sorted(table, key=len, reverse=True))
    return re.split(f"({pattern})", text)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON: {error}") from error


def _added_tokens(directory: Path, config: dict[str, Any], pieces: dict[str, int]) -> tuple[dict[str, int], set[int]]:
    """Tokens that transformers adds to the model's own (text -> id), and the ids among all that are special."""
    extra = {text: token for text, token in _read_json(directory / "added_tokens.json").items() if text not in pieces}
    special: set[int] = set()
    for token, entry in config.get("added_tokens_decoder", {}).items():
        if entry["content"] not in pieces:
            extra[entry["content"]] = int(token)
        if entry.get("special"):
            special.add(int(token))
    return extra, special


def _named_token(entry: Any, tokens: dict[str, int], default: int) -> int | None:
    """The id of tokenizer_config.json's `eos_token` (text or AddedToken), else the model's own (-1 = none)."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is not None and text in tokens:
        return tokens[text]
    return default if default >= 0 else None
