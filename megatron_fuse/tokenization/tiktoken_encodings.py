"""Published facts about the encodings of tiktoken rank files that the rank files themselves do not hold."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedEncoding:
    """One published encoding.

    pattern: splits a text into the pieces that are merged separately. It has no possessive quantifiers,
    because the regex engine of `tokenizers` reads them as something else. ranks: the number of ranks.
    special: text -> id. follows: special tokens come directly after the ranks, also if a file has fewer
    ranks. sha256: of the rank file, if its publisher gives it.
    """

    name: str
    pattern: str
    ranks: int
    special: dict[str, int]
    follows: bool = False
    bos: str | None = None
    eos: str = "<|endoftext|>"
    sha256: str | None = None


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama-3 has 256 special tokens. Those with a name have the same id in every release. The reserved ones are
# numbered in order. Release 3.1 gave names to three more of them (4, 8, 10), so that in 3.0 the same ids have
# other reserved names. The file does not say its release. These are the names of 3.1, unless a
# tokenizer_config.json beside it lists others.
_LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_LLAMA3_RESERVED = (offset for offset in range(256) if offset not in _LLAMA3_NAMED)
_LLAMA3 = _LLAMA3_NAMED | {
    offset: f"<|reserved_special_token_{n}|>" for n, offset in enumerate(_LLAMA3_RESERVED)
}

_PUBLISHED = (
    PublishedEncoding(
        name="cl100k_base",
        pattern=_CL100K,
        ranks=100256,
        special={
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
    PublishedEncoding(
        name="o200k_base",
        pattern=_O200K,
        ranks=199998,
        special={"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
        sha256="446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    ),
    PublishedEncoding(
        name="llama3",
        pattern=_CL100K,
        ranks=128000,
        special={text: 128000 + offset for offset, text in _LLAMA3.items()},
        follows=True,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
    ),
)
ENCODINGS = {encoding.name: encoding for encoding in _PUBLISHED}
