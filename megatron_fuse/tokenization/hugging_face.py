"""Tokenizers of the `tokenizers` library: what transformers loads from tokenizer.json, or from vocab.json + merges.txt."""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
import transformers

from megatron_fuse.errors import UserError
from megatron_fuse.own_code import not_loadable
from megatron_fuse.tokenization.normalized_spans import covered, trace
from megatron_fuse.tokenization.rebuilt_by_class import as_in_file
from megatron_fuse.tokenization.settings import check_tokenizer_files
from megatron_fuse.tokenization.tokenizer import VISIBLE_SPACE, Tokenizer, hash_parts
from megatron_fuse.tokenization.tokenizer_json import State, own_normalizer, vocabulary_bytes, without_beginning


class HuggingFaceBackend:
    """`continuation` is the same tokenizer without what it does to the beginning of a text or to its Unicode form."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, state: State) -> None:
        """state: the tokenizer's `backend_state`."""
        self._transformers = tokenizer
        self._state = state
        self._whole = _build(state)
        self._continuation = _build(without_beginning(state))
        self._continuation.encode_special_tokens = True  # the library's name for: special strings are plain text

    def encode(self, text: str, *, special: bool) -> list[int]:
        self._whole.encode_special_tokens = not special
        return self._whole.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        return self._continuation.encode(text, add_special_tokens=False).ids

    def encode_normalized(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        normalizer, strips = self._own_normalizer
        normalized, origin = trace(text, normalizer.normalize_str)
        if strips:
            normalized = normalized[: len(normalized.replace(VISIBLE_SPACE, " ").rstrip())]
            origin = np.append(origin[: len(normalized.encode())], origin[-1])
        encoding = self._continuation.encode(normalized, add_special_tokens=False)
        widths = np.array([0, *(len(character.encode()) for character in normalized)], np.int64)
        starts, ends = np.cumsum(widths)[np.array(encoding.offsets, np.int64).reshape(-1, 2)].T
        return encoding.ids, *covered(starts, ends, origin)

    @cached_property
    def _own_normalizer(self) -> tuple[tokenizers.normalizers.Normalizer, bool]:
        state, strips = own_normalizer(self._state)
        return _build(state).normalizer, strips

    def hugging_face(self, tokenizer: Tokenizer) -> transformers.PreTrainedTokenizerFast:
        return self._transformers


def load_hugging_face(directory: Path, trust_remote_code: bool = False, allowed_by: str | None = None) -> Tokenizer:
    """Reads a directory that transformers' AutoTokenizer can read, or a bare pair vocab.json + merges.txt (GPT-2)."""
    check_tokenizer_files(directory)
    try:
        if (directory / "tokenizer.json").is_file():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
        else:
            tokenizer = transformers.GPT2TokenizerFast.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"{directory}: only fast tokenizers have known bytes: save a tokenizer.json with transformers"
            )
        if (directory / "tokenizer.json").is_file():
            tokenizer = as_in_file(tokenizer, directory)
        return wrap_hugging_face(tokenizer, name=str(directory))
    except UserError:
        raise
    except BaseException as error:  # transformers raises many kinds for a broken file; the library in Rust may panic
        if not _is_of_a_file(error):
            raise
        part = _damaged_part(directory / "tokenizer.json")
        raise not_loadable(directory, error, f"tokenizer.json, {part}" if part else "tokenizer", allowed_by) from error


def _is_of_a_file(error: BaseException) -> bool:
    """The library's code in Rust panics over some values, with a BaseException that cannot be imported."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _damaged_part(path: Path) -> str | None:
    """The key of tokenizer.json that cannot be used even by itself; None where it is another file, or not to be told."""
    try:
        state = json.loads(path.read_bytes())
        plain = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "padding", "truncation"))
        plain |= {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    except (OSError, ValueError, TypeError):
        return None
    for key in plain:
        try:
            _build(plain | {key: state.get(key)}).encode("a b")
        except BaseException as error:
            if not _is_of_a_file(error):
                raise
            return key
    return None


def wrap_hugging_face(tokenizer: transformers.PreTrainedTokenizerFast, name: str) -> Tokenizer:
    """The interface over a transformers fast tokenizer that is already in memory."""
    state = backend_state(tokenizer)
    added = {token["content"]: token["id"] for token in state["added_tokens"]}
    special = {token["id"] for token in state["added_tokens"] if token["special"]}
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    special.update(token for token in named if token is not None)
    for token in special:
        added.setdefault(tokenizer.convert_ids_to_tokens(token), token)
    bos = tokenizer.bos_token_id
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids[:1]
    return Tokenizer(
        name=name,
        token_bytes=vocabulary_bytes(state, special, name),
        bos_id=bos,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        special_ids=frozenset(special),
        added_tokens=added,
        adds_bos=bos is not None and first == [bos],
        chat_template=_default_template(tokenizer.chat_template),
        sha256=hash_parts(["hugging_face", json.dumps(state, sort_keys=True), str(named), str(sorted(special))]),
        backend=HuggingFaceBackend(tokenizer, state),
    )


def backend_state(tokenizer: transformers.PreTrainedTokenizerFast) -> State:
    """tokenizer.json as it works in memory; truncation and padding are moods of a caller and are left out."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return state | {"truncation": None, "padding": None}


def _build(state: State) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _default_template(template: str | dict[str, str] | None) -> str | None:
    return template.get("default") if isinstance(template, dict) else template
