"""Small tokenizers of every kind, made in memory in well under a second, and where the real ones are."""

import base64
import io
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_fuse.tokenization import Tokenizer, load_tokenizer
from megatron_fuse.tokenization.tiktoken_encodings import ENCODINGS
from megatron_fuse.tokenization.tokenizer_json import byte_level_table

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "tokenizers"
REAL_KINDS = ["llama2", "gpt_neox_mpt", "gpt2", "cl100k_base"]
KINDS = ["sentencepiece", "llama_json", "llama_metaspace", "byte_level", "tiktoken"]
EXACT_KINDS = [*KINDS, "sentencepiece_unigram", "o200k", "llama3"]  # that spell every text
LOSSY_KINDS = ["t5", "t5_json", "t5_json_metaspace"]  # that normalise it and have an unknown token

_WORDS = (
    "sure international internationalization nation station the then hello world user assistant answer "
    "is café"
)
CORPUS = [
    f"{a} {b}, {c} 123 45\n  {b}{a}"
    for a in _WORDS.split()
    for b in _WORDS.split()
    for c in ("été", "日本", "x")
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

RANK_FILES = {"tiktoken": "cl100k_base.tiktoken", "o200k": "o200k_base.tiktoken", "llama3": "tokenizer.model"}


def make_tokenizer(kind: str, directory: Path) -> Path:
    """Writes the small tokenizer of this kind and returns the path to load."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind in ("sentencepiece", "sentencepiece_unigram", "t5"):
        model_type = "bpe" if kind == "sentencepiece" else "unigram"
        model = t5_model() if kind == "t5" else sentencepiece_model(model_type, byte_fallback=True)
        (directory / "tokenizer.model").write_bytes(model)
        return directory / "tokenizer.model"
    if kind in RANK_FILES:
        (directory / RANK_FILES[kind]).write_bytes(rank_file(kind))
        return directory
    hugging_face(kind).save_pretrained(directory)
    return directory


@cache
def small_tokenizer(kind: str) -> Tokenizer:
    return load_tokenizer(make_tokenizer(kind, Path(mkdtemp())))


def hugging_face(kind: str) -> PreTrainedTokenizerFast:
    """The kinds that are a tokenizer.json, as transformers tokenizers."""
    if kind == "byte_level":
        return byte_level()
    if kind.startswith("t5"):
        return t5_json(metaspace=kind == "t5_json_metaspace")
    return llama_json(metaspace=kind == "llama_metaspace")


@cache
def sentencepiece_model(model_type: str, byte_fallback: bool, **options) -> bytes:
    """A SentencePiece model; with byte_fallback in Llama-2's manner, else with T5's normalisation and no
    fallback.
    """
    llama = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type=model_type,
        vocab_size=420 if byte_fallback else 120,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        split_digits=True,
        **(llama if byte_fallback else {}) | options,
    )
    if not byte_fallback:
        return model.getvalue()
    # Llama-2 has runs of spaces as its very last merges, all of one score
    changed = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    pieces = {entry.piece: entry for entry in changed.pieces}
    for run in ("▁" * n for n in range(2, 6)):
        entry = pieces.get(run) or changed.pieces.add(piece=run)
        entry.score = -1e9
    return changed.SerializeToString()


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """GPT-NeoX's manner: NFC, byte-level BPE, runs of spaces as added tokens, ChatML."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=CHATML)


@cache
def llama_json(metaspace: bool = False) -> PreTrainedTokenizerFast:
    """Llama-2's tokenizer.json: BPE with byte fallback, BOS by the post-processor, and the dummy prefix by
    the normaliser, before every part of a text between special tokens, or by a pre-tokenizer, at the
    beginning only."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def rank_file(kind: str) -> bytes:
    """tiktoken ranks: the bytes first, then merges of a small corpus."""
    if kind == "tiktoken":
        vocabulary = json.loads(byte_level().backend_tokenizer.to_str())["model"]["vocab"]
    else:
        pattern = ENCODINGS[{"o200k": "o200k_base"}.get(kind, kind)].pattern
        trained = tokenizers.Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
        trained.train_from_iterator([*CORPUS, *(line.title() for line in CORPUS)], trainer)
        vocabulary = trained.get_vocab()
    table = byte_level_table()
    pieces = sorted(
        (i, bytes(table[c] for c in piece)) for piece, i in vocabulary.items() if "|>" not in piece
    )
    lines = [base64.b64encode(piece) + f" {rank}".encode() for rank, (_, piece) in enumerate(pieces)]
    return b"\n".join(lines) + b"\n"


def t5_model() -> bytes:
    """T5's manner: unigram, NFKC, runs of white space become one space, no byte fallback, no BOS."""
    return sentencepiece_model("unigram", byte_fallback=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@cache
def t5_json(metaspace: bool = False) -> PreTrainedTokenizerFast:
    """The same as a tokenizer.json: runs of spaces end by splitting at white space, as T5's, or in the
    normaliser, as mT5's.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(t5_model())
    pieces = [(entry.piece, entry.score) for entry in model.pieces]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    if metaspace:
        one_space = [normalizers.Strip(left=False), normalizers.Replace(tokenizers.Regex(" {2,}"), "▁")]
        backend.normalizer = normalizers.Sequence([normalizer, *one_space])
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        backend.normalizer = normalizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
