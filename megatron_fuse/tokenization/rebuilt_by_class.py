"""Restores the pipeline of tokenizer.json in tokenizers that transformers rebuilds by their class.

If `tokenizer_class` names a class with a pipeline of its own (GPT2Tokenizer, LlamaTokenizer ...),
transformers 5 takes only vocabulary and merges from tokenizer.json. It builds the normaliser and the
pre-tokenizer of that class. If the file splits digits, "2023" then becomes one token, although the model was
trained on four. The model was trained with the file.
"""

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from megatron_fuse.text_safety import printable
from megatron_fuse.tokenization.tokenizer_json import State

logger = logging.getLogger(__name__)

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Texts on which pipelines differ: digits, runs of spaces, the beginning of a text, newlines, and composed,
# decomposed or compatibility characters.
_PROBE = (
    "a 2023 b",
    "two  and   three",
    " led",
    "one\n\ntwo\tthree",
    "café",
    "cafe\u0301",
    "ﬁ ½",
    "I'm HERE: 日本語",
    "🙂",
)


def with_equal_parts(state: State, said: State) -> State:
    """The state in memory with the pre-tokenizer and the decoder of the file, if they split and join alike.

    The classes write other values of options that a part does not use, as Qwen2Tokenizer does.
    """
    equal = {
        key: said[key]
        for key in ("pre_tokenizer", "decoder")
        if key in said and _used(said[key], key) == _used(state[key], key)
    }
    return state | equal


def _used(part: Any, key: str) -> Any:
    """A part of a pipeline without the options of ByteLevel that it does not use there."""
    if isinstance(part, list):
        return [_used(each, key) for each in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "ByteLevel":
        unused = {"trim_offsets"} if key == "pre_tokenizer" else {*part} - {"type"}
        return {name: value for name, value in part.items() if name not in unused}
    return {name: _used(value, key) for name, value in part.items()}


def as_in_file(
    tokenizer: transformers.PreTrainedTokenizerFast, state: State, said: State, directory: Path
) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer with the pipeline of the directory's tokenizer.json.

    Warns if transformers' class splits differently.

    state: the tokenizer in memory, in the form of tokenizer.json. said: the content of the file, with merges
    as pairs. If both are the same, the tokenizer itself is returned and nothing is read again.

    Additions of tokenizer_config.json stay: tokens, names of special tokens, chat template, BOS and EOS.
    Names that only the class defines stay too, if the file has such tokens. A class that comes with the model
    was allowed to run, so its tokenizer stays as it is.
    """
    by_class = type(tokenizer)
    if by_class is transformers.PreTrainedTokenizerFast or not by_class.__module__.startswith(
        "transformers."
    ):
        return tokenizer
    if _same(said, state) and _has_its_names(tokenizer):
        return tokenizer
    from_file = transformers.PreTrainedTokenizerFast.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
    for name in _NAMES:
        text = getattr(tokenizer, name)
        if (
            text is not None
            and getattr(from_file, name) is None
            and from_file.backend_tokenizer.token_to_id(text) is not None
        ):
            setattr(from_file, name, text)
    from_file.backend_tokenizer.post_processor = tokenizer.backend_tokenizer.post_processor
    added = sorted(from_file.added_tokens_decoder.items())[:16]
    for text in (*_PROBE, *(f"a{token.content} b" for _, token in added)):
        read, rebuilt = (_cut(one, text) for one in (from_file, tokenizer))
        if read != rebuilt:
            _warn(directory, by_class.__name__, text, read, rebuilt)
            break
    return from_file


def _same(said: State, state: State) -> bool:
    """Whether both are the same, apart from BOS and EOS around a text, which stay as the class has them."""
    ignored = {"truncation": None, "padding": None, "post_processor": None}
    return said | ignored == state | ignored


def _has_its_names(tokenizer: transformers.PreTrainedTokenizerFast) -> bool:
    """Whether the special tokens of the class are tokens of the file."""
    texts = (getattr(tokenizer, name) for name in _NAMES)
    return all(text is None or tokenizer.backend_tokenizer.token_to_id(text) is not None for text in texts)


def _cut(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> tuple[str, ...]:
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return tuple(backend.encode(text, add_special_tokens=False).tokens)


@cache  # warns once per process: a command may load a tokenizer several times
def _warn(directory: Path, by_class: str, text: str, read: tuple[str, ...], rebuilt: tuple[str, ...]) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    logger.warning(
        f"{directory}: tokenizer.json splits {_quoted(text)} into {_quoted(*read)}, but transformers' "
        f"{by_class} splits it into {_quoted(*rebuilt)}. Training uses tokenizer.json. A server with "
        f'transformers 5 may split text as {by_class} does. Set "tokenizer_class": '
        '"PreTrainedTokenizerFast" in '
        f"{directory / 'tokenizer_config.json'}, and name its special tokens there."
    )


def _quoted(*texts: str) -> str:
    return " ".join(f"'{printable(text)}'" for text in texts)
