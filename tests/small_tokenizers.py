"""Small tokenizers of every kind, made in memory in well under a second, and where the real ones are."""

import base64
import io
import json
from functools import cache
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_fuse.tokenization.hugging_face import byte_level_table

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "tokenizers"
REAL_KINDS = ["llama2", "gpt_neox_mpt", "gpt2", "cl100k_base"]
KINDS = ["sentencepiece", "llama_json", "llama_metaspace", "byte_level", "tiktoken"]

_WORDS = "sure international internationalization nation station the then hello world user assistant answer is café"
CORPUS = [
    f"{a} {b}, {c} 123 45\n  {b}{a}" for a in _WORDS.split() for b in _WORDS.split() for c in ("été", "日本", "x")
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(kind: str, directory: Path) -> Path:
    """Writes the small tokenizer of this kind and returns the path to load."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "sentencepiece":
        (directory / "tokenizer.model").write_bytes(sentencepiece_model("bpe", byte_fallback=True))
        return directory / "tokenizer.model"
    if kind == "tiktoken":
        table = byte_level_table()
        vocabulary = json.loads(byte_level().backend_tokenizer.to_str())["model"]["vocab"]
        pieces = sorted((i, bytes(table[c] for c in piece)) for piece, i in vocabulary.items() if "|>" not in piece)
        lines = [base64.b64encode(piece) + f" {rank}".encode() for rank, (_, piece) in enumerate(pieces)]
        (directory / "cl100k_base.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
        return directory
    hugging_face(kind).save_pretrained(directory)
    return directory


def hugging_face(kind: str) -> PreTrainedTokenizerFast:
    """The kinds that are a tokenizer.json, as transformers tokenizers."""
    if kind == "byte_level":
        return byte_level()
    return llama_json(metaspace=kind == "llama_metaspace")


@cache
def sentencepiece_model(model_type: str, byte_fallback: bool, **options) -> bytes:
    """A SentencePiece model; with byte_fallback in Llama-2's manner, else with T5's normalisation and no fallback."""
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
    """Llama-2's tokenizer.json: BPE with byte fallback, BOS by the post-processor, and the dummy prefix by the
    normaliser, before every part of a text between special tokens, or by a pre-tokenizer, at the beginning only."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
