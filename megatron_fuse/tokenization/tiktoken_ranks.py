"""Tokenizers given as a tiktoken rank file (`cl100k_base.tiktoken`): base64 bytes and a rank on every line."""

import base64
import json
from pathlib import Path
from typing import Any

import tiktoken

from megatron_fuse.errors import UserError
from megatron_fuse.tokenization.tokenizer import Tokenizer, hash_parts

# A rank file holds neither the splitting pattern nor the special tokens: both are known by its name.
# Written without possessive quantifiers, which the regex engine of `tokenizers` reads as something else.
ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "cl100k_base": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    )
}


class TiktokenBackend:
    def __init__(self, path: Path, encoding: tiktoken.Encoding) -> None:
        self._path, self._encoding = path, encoding

    def encode(self, text: str, *, special: bool) -> list[int]:
        if special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def encode_continuation(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def hugging_face(self, tokenizer: Tokenizer) -> Any:
        """The same merges as a transformers tokenizer; takes seconds, because merges are derived from ranks."""
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter

        pattern, special = ENCODINGS[self._path.stem]
        state = json.loads(TikTokenConverter(str(self._path), pattern=pattern).converted().to_str())
        # Special tokens stand behind a hole in the numbering, which only a place in the vocabulary itself can keep
        state["model"]["vocab"] |= special
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        state["added_tokens"] = [{"id": token, "content": text} | flags for text, token in special.items()]
        backend = Backend.from_str(json.dumps(state))
        eos = tokenizer.token_text(tokenizer.eos_id)
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=tokenizer.chat_template)


def load_tiktoken(path: Path) -> Tokenizer:
    """Reads a *.tiktoken file whose name tells a known encoding."""
    if path.stem not in ENCODINGS:
        raise UserError(
            f"{path}: the pattern of tiktoken encoding {path.stem!r} is not known (known: {', '.join(ENCODINGS)}): "
            "give the model's tokenizer.json instead"
        )
    pattern, special = ENCODINGS[path.stem]
    data = path.read_bytes()
    try:
        pairs = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(piece): int(rank) for piece, rank in pairs}
    except ValueError as error:
        raise UserError(f"{path}: not a tiktoken rank file (base64 bytes and a rank on every line): {error}") from error
    token_bytes = [b""] * (1 + max([*ranks.values(), *special.values()]))
    for piece, rank in ranks.items():
        token_bytes[rank] = piece
    encoding = tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(
        name=str(path),
        token_bytes=token_bytes,
        bos_id=None,
        eos_id=special["<|endoftext|>"],
        pad_id=None,
        special_ids=frozenset(special.values()),
        added_tokens=dict(special),
        adds_bos=False,
        chat_template=None,
        sha256=hash_parts(["tiktoken", pattern, str(sorted(special.items())), data]),
        backend=TiktokenBackend(path, encoding),
    )
