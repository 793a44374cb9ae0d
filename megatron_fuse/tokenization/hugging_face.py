"""Tokenizers of the `tokenizers` library.

transformers loads them from tokenizer.json, or from vocab.json + merges.txt.
"""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from pydantic_core import to_json

from megatron_fuse.errors import UserError
from megatron_fuse.own_code import not_loadable
from megatron_fuse.storage.files import sha256_of_parts
from megatron_fuse.tokenization.normalized_spans import covered, trace
from megatron_fuse.tokenization.rebuilt_by_class import as_in_file, with_equal_parts
from megatron_fuse.tokenization.settings import check_tokenizer_files
from megatron_fuse.tokenization.tokenizer import VISIBLE_SPACE, Tokenizer
from megatron_fuse.tokenization.tokenizer_json import (
    State,
    own_normalizer,
    pipeline,
    vocabulary_bytes,
    with_paired_merges,
    without_beginning,
)

_TEXTS_AT_ONCE = 256  # larger lists take no less time per text


class HuggingFaceBackend:
    """A transformers fast tokenizer, and a second pipeline for continuations of a text.

    The second one does not change the beginning of a text (no dummy prefix) or its Unicode form.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, state: State) -> None:
        """state: the tokenizer's `backend_state`."""
        self._transformers = tokenizer
        self._pipeline = pipeline(state)
        self._whole = _with_pipeline(tokenizer.backend_tokenizer, state)
        self._continuation = _with_pipeline(tokenizer.backend_tokenizer, without_beginning(state))
        self._continuation.encode_special_tokens = True  # it means that special strings are plain text

    def encode(self, text: str, *, special: bool) -> list[int]:
        self._whole.encode_special_tokens = not special
        return self._whole.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        return self._continuation.encode(text, add_special_tokens=False).ids

    def encode_continuations(self, texts: Sequence[str]) -> Iterator[list[int]]:
        # With is_pretokenized, the library runs its whole pipeline on each string of
        # the list, and `word_ids` says to which string a token belongs. Its batch
        # call makes an object for each text, which takes as long as single calls.
        for begin in range(0, len(texts), _TEXTS_AT_ONCE):
            together = texts[begin : begin + _TEXTS_AT_ONCE]
            encoding = self._continuation.encode(together, is_pretokenized=True, add_special_tokens=False)
            ids, counts = (
                encoding.ids,
                np.bincount(np.array(encoding.word_ids, np.int64), minlength=len(together)),
            )
            ends = np.cumsum(counts).tolist()
            yield from (ids[first:end] for first, end in pairwise([0, *ends]))

    def encode_normalized(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        normalizer, strips = self._own_normalizer
        normalized, origin = trace(text, normalizer.normalize_str)
        # The end of the text was stripped: `origin` keeps one place for each byte that is left, and the end.
        if strips:
            normalized = normalized[: len(normalized.replace(VISIBLE_SPACE, " ").rstrip())]
            origin = np.append(origin[: len(normalized.encode())], origin[-1])
        encoding = self._continuation.encode(normalized, add_special_tokens=False)
        # The library's offsets count characters, `origin` counts bytes.
        widths = np.array([0, *(len(character.encode()) for character in normalized)], np.int64)
        starts, ends = np.cumsum(widths)[np.array(encoding.offsets, np.int64).reshape(-1, 2)].T
        return encoding.ids, *covered(starts, ends, origin)

    @cached_property
    def _own_normalizer(self) -> tuple[tokenizers.normalizers.Normalizer, bool]:
        state, strips = own_normalizer(self._pipeline)
        return _build(state).normalizer, strips

    def hugging_face(self, tokenizer: Tokenizer) -> transformers.PreTrainedTokenizerFast:
        return self._transformers


def load_hugging_face(
    directory: Path, trust_remote_code: bool = False, allowed_by: str | None = None
) -> Tokenizer:
    """Reads a directory that transformers' AutoTokenizer can read, or a bare pair vocab.json + merges.txt
    (GPT-2).
    """
    with _collector_paused():
        said = check_tokenizer_files(directory)
        return _load(directory, said, trust_remote_code, allowed_by)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pauses the garbage collector.

    A vocabulary in JSON is a million objects, and none of them becomes garbage.

    The search for cycles among them would take as long as reading them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _load(directory: Path, said: State | None, trust_remote_code: bool, allowed_by: str | None) -> Tokenizer:
    try:
        if said is not None:
            said = with_paired_merges(said)
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
        else:
            tokenizer = transformers.GPT2Tokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
            raise UserError(
                f"{directory}: only for fast tokenizers the bytes of the tokens are known. Save a "
                "tokenizer.json with transformers."
            )
        state = backend_state(tokenizer, said)
        if said is not None:
            state = with_equal_parts(state, said)
        if said is not None and (from_file := as_in_file(tokenizer, state, said, directory)) is not tokenizer:
            tokenizer, state = from_file, backend_state(from_file, said)
        return wrap_hugging_face(tokenizer, str(directory), state)
    except UserError:
        raise
    # transformers raises many kinds of errors for a broken file, and the library in Rust may panic.
    except BaseException as error:
        if not _is_of_a_file(error):
            raise
        part = _damaged_part(directory / "tokenizer.json")
        raise not_loadable(
            directory, error, f"tokenizer.json, {part}" if part else "tokenizer", allowed_by
        ) from error


def _is_of_a_file(error: BaseException) -> bool:
    """Whether an error comes from a broken file.

    For some values the library's code in Rust panics, with a BaseException that cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _damaged_part(path: Path) -> str | None:
    """The key of tokenizer.json that cannot be used even by itself; None if the damage is not found there."""
    try:
        state = json.loads(path.read_bytes())
        plain = dict.fromkeys(
            ("normalizer", "pre_tokenizer", "post_processor", "decoder", "padding", "truncation")
        )
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


def wrap_hugging_face(
    tokenizer: transformers.PreTrainedTokenizerFast, name: str, state: State | None = None
) -> Tokenizer:
    """A Tokenizer over a transformers fast tokenizer in memory.

    state: its `backend_state`, if it is known.
    """
    state = backend_state(tokenizer) if state is None else state
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
        sha256=sha256_of_parts("hugging_face", _canonical(state), str(named), str(sorted(special))),
        backend=HuggingFaceBackend(tokenizer, state),
    )


def backend_state(tokenizer: transformers.PreTrainedTokenizerFast, said: State | None = None) -> State:
    """The content of tokenizer.json as it works in memory, without truncation and padding, which callers set.

    said: the content of the file, if it is known. If vocabulary and merges in memory are the same as in the
    file, they are taken from `said`.
    """
    text = tokenizer.backend_tokenizer.to_str().encode()
    large = {key: said["model"].get(key) for key in ("vocab", "merges")} if said else {}
    # Parsing the vocabulary again is slow. To write a million strings takes a fifth of the time to read them,
    # so the file's vocabulary is written and compared with the end of `text`.
    written = to_json(large)[1:] + b"}"
    if large and text.endswith(written):
        state = json.loads(text.removesuffix(written) + b'"vocab": null, "merges": null}}')
        state["model"] |= large
    else:
        state = json.loads(text)
    return state | {"truncation": None, "padding": None}


def _canonical(state: State) -> str:
    """json.dumps(state, sort_keys=True), but faster.

    `json` sorts pairs of keys and values. Here the keys of the large vocabulary are sorted, in a fraction of
    the time.
    """
    model = state["model"]
    large = {key: model[key] for key in ("merges", "vocab") if key in model}
    ordered = json.loads(json.dumps(state | {"model": model | dict.fromkeys(large)}, sort_keys=True))
    if isinstance(vocabulary := model["vocab"], dict):
        large["vocab"] = {piece: vocabulary[piece] for piece in sorted(vocabulary)}
    ordered["model"] |= large
    return json.dumps(ordered)


def _build(state: State) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _with_pipeline(backend: tokenizers.Tokenizer, state: State) -> tokenizers.Tokenizer:
    """A tokenizer with the state's pipeline and the backend's model.

    They share the model, so vocabulary and merges are in memory only once.
    """
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    pipeline = _build(state | empty)
    shared = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(pipeline, part)) is not None:
            setattr(shared, part, value)
    added = backend.get_added_tokens_decoder()
    # After the normaliser is set, because it changes the strings that some added tokens match.
    shared.add_tokens([added[token] for token in sorted(added)])
    if shared.get_added_tokens_decoder() != added:
        raise ValueError("the ids of its added tokens depend on the order in which they were added")
    return shared


def _default_template(template: str | dict[str, str] | None) -> str | None:
    return template.get("default") if isinstance(template, dict) else template
