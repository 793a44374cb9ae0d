"""The forms in which a model directory has its tokenizer, and the library whose ids ours have to be."""

import json
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers
from small_tokenizers import RANK_FILES, make_tokenizer
from tiktoken.load import load_tiktoken_bpe

from megatron_fuse.tokenization import load_tokenizer
from megatron_fuse.tokenization.tiktoken_encodings import ENCODINGS

PROBE = "The 2023 answer,  is\u00e9 12\n\n\tcafe\u0301 日本 👍🏽 it's x_1 </s>"
Ids = Callable[[str], list[int]]


def _tokenizers(directory: Path) -> Ids:
    whole = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    whole.encode_special_tokens = True
    return lambda text: whole.encode(text, add_special_tokens=False).ids


def _sentencepiece(path: Path) -> Ids:
    return sentencepiece.SentencePieceProcessor(str(path)).encode


def _tiktoken(kind: str) -> Callable[[Path], Ids]:
    def reference(directory: Path) -> Ids:
        ranks = load_tiktoken_bpe(str(directory / RANK_FILES[kind]))
        pattern = ENCODINGS[
            "cl100k_base" if kind == "tiktoken" else "o200k_base" if kind == "o200k" else "llama3"
        ].pattern
        whole = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        return whole.encode_ordinary

    return reference


def _kind(kind: str) -> Callable[[Path], Path]:
    return lambda directory: make_tokenizer(kind, directory)


def _rebuilt(directory: Path) -> Path:
    """A tokenizer.json whose digits are cut apart, and a class for which transformers 5 makes another
    pre-tokenizer.
    """
    make_tokenizer("byte_level", directory)
    path, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    content = json.loads(path.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    path.write_text(json.dumps(content))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def _only(name: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        directory.mkdir()
        (directory / name).write_text("{}")
        return directory

    return make


# name -> (maker, what cuts the probe beside us, its name)
FORMS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Ids] | None, str]] = {
    "tokenizer.json, byte-level BPE": (_kind("byte_level"), _tokenizers, "tokenizers"),
    "tokenizer.json, byte-level BPE, of a class that transformers 5 rebuilds": (
        _rebuilt,
        _tokenizers,
        "tokenizers",
    ),
    "tokenizer.json, BPE with byte fallback, prefix by the normaliser": (
        _kind("llama_json"),
        _tokenizers,
        "tokenizers",
    ),
    "tokenizer.json, BPE with byte fallback, Metaspace": (
        _kind("llama_metaspace"),
        _tokenizers,
        "tokenizers",
    ),
    "tokenizer.json, unigram with NFKC (T5)": (_kind("t5_json"), _tokenizers, "tokenizers"),
    "tokenizer.model, BPE with byte fallback": (_kind("sentencepiece"), _sentencepiece, "sentencepiece"),
    "tokenizer.model, unigram with byte fallback": (
        _kind("sentencepiece_unigram"),
        _sentencepiece,
        "sentencepiece",
    ),
    "tokenizer.model, unigram with NFKC (T5)": (_kind("t5"), _sentencepiece, "sentencepiece"),
    "cl100k_base.tiktoken": (_kind("tiktoken"), _tiktoken("tiktoken"), "tiktoken"),
    "o200k_base.tiktoken": (_kind("o200k"), _tiktoken("o200k"), "tiktoken"),
    "tokenizer.model of tiktoken ranks (Llama 3)": (_kind("llama3"), _tiktoken("llama3"), "tiktoken"),
    "tekken.json alone": (_only("tekken.json"), None, ""),
    "tiktoken.model alone": (_only("tiktoken.model"), None, ""),
}


def same_ids(path: Path, reference: Callable[[Path], Ids]) -> None:
    """Ids of the probe are those of the library that owns the form."""
    assert load_tokenizer(path).encode(PROBE) == reference(path)(PROBE)


def spells(path: Path) -> bool:
    """Whether the tokens of a text that follows other text are its bytes."""
    tokenizer = load_tokenizer(path)
    return tokenizer.joined_bytes(tokenizer.encode_continuation(PROBE)) == PROBE.encode()
