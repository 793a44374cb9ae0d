"""Law: a directory's ids are those of its tokenizer.json, whatever class transformers would build for it."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from log_lines import logged
from small_tokenizers import byte_level, llama_json
from strange_texts import TEXTS
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_fuse.tokenization import Tokenizer, hugging_face, load_tokenizer, rebuilt_by_class

quick = settings(max_examples=40, deadline=None, database=None)
PROBE = "a 2023 b   c\n\nd cafe\u0301 café ﬁ 日本語 🙂"
PREFIX, SPACES = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
TEMPLATE = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"


def _digits_apart() -> tokenizers.Tokenizer:
    vocabulary = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "20", "23", "2023"]
    merges = [("2", "0"), ("2", "3"), ("20", "23")]
    backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, merges))
    digits, bytes_ = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def _llama(
    normalizer: normalizers.Normalizer | None, pre_tokenizer: pre_tokenizers.PreTokenizer | None = None
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(llama_json().backend_tokenizer.to_str())
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    return backend


def _no_prefix() -> pre_tokenizers.PreTokenizer:
    spaces = pre_tokenizers.Metaspace(prepend_scheme="never")
    return pre_tokenizers.Sequence([spaces, pre_tokenizers.Digits(individual_digits=True)])


def _qwen() -> tokenizers.Tokenizer:
    """As Qwen's files: options of ByteLevel that have no effect are others than the class writes."""
    state = json.loads(byte_level().backend_tokenizer.to_str())
    state["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    split = tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    quiet = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(**quiet)]
    )
    backend.decoder = decoders.ByteLevel(**quiet)
    return backend


# name -> model_type, tokenizer_class, tokenizer.json
REBUILT = {
    "gpt2_digits": ("llama", "GPT2Tokenizer", _digits_apart),
    "starcoder_digits": ("starcoder2", "GPT2TokenizerFast", _digits_apart),
    "neox_digits": ("gpt_neox", "GPTNeoXTokenizerFast", _digits_apart),
    "llama_no_prefix": ("llama", "LlamaTokenizerFast", lambda: _llama(None, _no_prefix())),
    "llama_replace_only": ("llama", "LlamaTokenizerFast", lambda: _llama(SPACES)),
    "llama_nfkc": (
        "llama",
        "LlamaTokenizerFast",
        lambda: _llama(normalizers.Sequence([normalizers.NFKC(), PREFIX, SPACES])),
    ),
}
AGREEING = {
    "plain": ("llama", "PreTrainedTokenizerFast", _digits_apart),
    "neox": ("gpt_neox", "GPTNeoXTokenizerFast", lambda: byte_level().backend_tokenizer),
    "qwen": ("qwen2", "Qwen2Tokenizer", _qwen),
}


@cache
def _directory(name: str) -> Path:
    model_type, by_class, file = (REBUILT | AGREEING)[name]
    backend, directory = file(), Path(mkdtemp())
    end = "</s>" if backend.token_to_id("</s>") is not None else "<|endoftext|>"
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": by_class, "eos_token": end, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return directory


@cache
def _loaded(name: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    return load_tokenizer(_directory(name)), tokenizers.Tokenizer.from_file(
        str(_directory(name) / "tokenizer.json")
    )


@pytest.mark.parametrize("name", REBUILT | AGREEING)
def test_ids_are_those_of_the_file(name: str) -> None:
    tokenizer, file = _loaded(name)
    strings = st.sampled_from(["</s>", "<s>", "<|endoftext|>", "<|im_start|>", "2023", "  ", "\n"])

    @quick
    @given(st.lists(TEXTS | strings, max_size=4).map("".join), st.booleans())
    @example(PROBE, False)
    @example(f"{PROBE}</s> x<|endoftext|> y\nz", True)
    def law(text: str, special: bool) -> None:
        file.encode_special_tokens = not special
        assert tokenizer.encode(text, special=special) == file.encode(text, add_special_tokens=False).ids

    law()


@pytest.mark.parametrize("name", REBUILT | AGREEING)
def test_names_and_template_stay(name: str) -> None:
    tokenizer, file = _loaded(name)
    by_class = AutoTokenizer.from_pretrained(_directory(name), local_files_only=True, trust_remote_code=False)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (by_class.bos_token_id, by_class.eos_token_id)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.vocab_size == file.get_vocab_size()  # the class adds none of its own


@pytest.mark.parametrize("name", REBUILT | AGREEING)
def test_another_cut_is_said(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "new"  # said once a process of each
    directory.symlink_to(_directory(name))
    with logged("warning") as text:
        load_tokenizer(directory)
        load_tokenizer(directory)
    lines = text.getvalue().splitlines()
    assert len(lines) == (name in REBUILT)
    for line in lines:
        assert str(directory / "tokenizer_config.json") in line
        assert REBUILT[name][1].removesuffix("Fast") in line


@pytest.mark.parametrize("name", REBUILT)
def test_the_advised_class_reads_the_file(name: str, tmp_path: Path) -> None:
    """The cure of the warning: AutoTokenizer, and so a server, has the file's ids, and nothing is said any
    more.
    """
    _, file = _loaded(name)
    for path in _directory(name).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    served = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=False)
    file.encode_special_tokens = False
    assert served.encode(PROBE, add_special_tokens=False) == file.encode(PROBE, add_special_tokens=False).ids
    with logged("warning") as text:
        load_tokenizer(tmp_path)
    assert text.getvalue() == ""


@pytest.mark.parametrize("name", REBUILT)
def test_what_is_exported_is_read_again_as_the_file(name: str, tmp_path: Path) -> None:
    tokenizer, _ = _loaded(name)
    tokenizer.hugging_face().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((_directory(name) / "config.json").read_bytes())
    assert load_tokenizer(tmp_path).encode(PROBE) == tokenizer.encode(PROBE)


def test_options_without_an_effect_cause_no_second_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the hash is that of the file's pipeline, as if it had been read again."""
    directory = _directory("qwen")
    monkeypatch.setattr(hugging_face, "with_equal_parts", lambda state, said: state)
    again = load_tokenizer(directory)
    monkeypatch.undo()
    loads = []
    read = PreTrainedTokenizerFast.from_pretrained.__func__
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "from_pretrained",
        classmethod(lambda cls, *a, **k: loads.append(cls.__name__) or read(cls, *a, **k)),
    )
    assert load_tokenizer(directory).sha256 == again.sha256
    assert loads == ["Qwen2Tokenizer"]


@pytest.mark.parametrize(
    ("key", "option"), [("pre_tokenizer", "add_prefix_space"), ("pre_tokenizer", "use_regex")]
)
def test_options_with_an_effect_count(key: str, option: str) -> None:
    state = json.loads(_qwen().to_str())
    said = json.loads(json.dumps(state))
    said[key]["pretokenizers"][1][option] = True
    assert rebuilt_by_class.with_equal_parts(state, said) == state
    said = state | {"decoder": {"type": "Fuse"}}
    assert rebuilt_by_class.with_equal_parts(state, said) == state
