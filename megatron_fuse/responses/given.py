"""Answers that already exist in a file. They are found by the ids or the prompts of their examples.

Every rank reads the file once, before the first shard is made. It keeps one answer for each example of this
run.
"""

import json
import logging
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import Example
from megatron_fuse.instructions.bad_rows import BadRow
from megatron_fuse.instructions.tables import read_table
from megatron_fuse.instructions.tool_turns import OUTPUT_ROLES, calls_of
from megatron_fuse.recipe import ResponseFile
from megatron_fuse.responses.answers import Answerer, Response
from megatron_fuse.responses.refusals import is_refusal
from megatron_fuse.storage import sha256_of_parts
from megatron_fuse.storage.records import quoted
from megatron_fuse.storage.rows import id_at, keys_shown, refuse_half_characters, value_at

logger = logging.getLogger(__name__)

_SHOWN = 3  # ids or prompts named in a message


@dataclass(frozen=True)
class _Given:
    """A text of the file, and its line."""

    text: str
    truncated: bool
    line: int


def given_answers(
    options: ResponseFile,
    where: str,
    chat: ChatFormat,
    examples: Iterable[Example],
) -> Answerer:
    """Looks up the answers to these examples in a file.

    chat: the answering model's format, which counts the tokens. where: the recipe's key.

    A row belongs to an example by its id. With match: prompt, it belongs by the text of the last user
    message, or by a list of all messages {role, content}, with calls of tools in OpenAI's form. White space
    at the ends of texts does not count. A row has no answer if the text is null or missing. `truncated` (true
    or false) may be in the row beside the text. Rows of other examples are counted.

    Raises UserError
    - with the line, if a row has no id or prompt, or a value of a wrong type;
    - with both lines, if there are two different answers to one example;
    - with the line, if a last message would answer different conversations;
    - if the file has no answer to any of the examples.
    """
    asked: dict[str, list[str]] = {}
    here: list[str] = []
    for example in examples:
        asked[example.id] = list(_keys(options, example))
        if len(here) < _SHOWN:
            here.append(example.id if options.match == "id" else _question(example))
    by_key = _read(options, where, set(chain.from_iterable(asked.values())), here)
    given = _by_example(options, asked, by_key)

    def answer(shard: int, examples: list[Example]) -> list[Response | None]:
        return [_response(each, given[each.id], chat) if each.id in given else None for each in examples]

    return answer


def _by_example(
    options: ResponseFile,
    asked: dict[str, list[str]],
    by_key: dict[str, _Given],
) -> dict[str, _Given]:
    """The answers by the examples' ids.

    asked: the keys of each example (see _keys). by_key: the answers by key.
    """
    given: dict[str, _Given] = {}
    # Last message -> (the first example found by it, all its messages).
    first_of: dict[str, tuple[str, str]] = {}
    for name, keys in asked.items():
        key = next((key for key in keys if key in by_key), None)
        if key is None:
            continue
        given[name] = by_key[key]
        # The last key is the last message alone. If two different conversations end in it, it is ambiguous.
        if options.match == "prompt" and key == keys[-1]:
            first, messages = first_of.setdefault(key, (name, keys[-2]))
            if messages != keys[-2]:
                raise UserError(
                    f"{options.path}:{by_key[key].line}: the conversations of {quoted(first)} and "
                    f"{quoted(name)} are different, but both end in the same {options.prompt}. Write all "
                    f"messages {{role, content}} there, or set match: id."
                )
    return given


def _response(example: Example, given: _Given, chat: ChatFormat) -> Response:
    tokens = len(chat.tokenizer.encode_continuation(given.text))
    return Response(example.id, given.text, given.truncated, tokens, is_refusal(given.text))


def _keys(options: ResponseFile, example: Example) -> Iterator[str]:
    """The keys under which an example's row may be found, the most specific first.

    With match: prompt, the last two are all messages, and the last user message alone.
    """
    if options.match == "id":
        yield example.id
        return
    if example.system is not None:
        yield _messages_key(example.prompt())
    yield _messages_key(example.messages)
    yield _text_key(_question(example))


def _question(example: Example) -> str:
    """The last user message. Calls of tools may follow it."""
    return next(message["content"] for message in reversed(example.messages) if message["role"] == "user")


def _row_key(options: ResponseFile, row: dict[str, Any], place: str) -> str:
    if options.match == "id":
        return id_at(row, options.id, place)
    prompt = value_at(row, options.prompt)
    if isinstance(prompt, str):
        return _text_key(prompt)
    try:
        return _messages_key(prompt)
    except (TypeError, KeyError, AttributeError, BadRow) as error:
        raise UserError(
            f"{place}: {options.prompt} is {quoted(prompt)}, but match: prompt needs the text of the last "
            f"user message or a list of {{role, content}}. The row has {keys_shown(row)}."
        ) from error


def _messages_key(messages: Sequence[Mapping[str, Any]]) -> str:
    """The key of a prompt in a file, or of an example's messages. Ids of calls do not count."""
    return _text_key(*(text for message in messages for text in _message_texts(message)))


def _message_texts(message: Mapping[str, Any]) -> Iterator[str]:
    calls = calls_of(message) if len(message) > 2 else []
    yield "tool" if message["role"] in OUTPUT_ROLES else message["role"]
    yield (message.get("content") or "") if calls else message["content"]
    for call in calls:
        yield call["function"]["name"]
        yield json.dumps(call["function"]["arguments"], sort_keys=True, ensure_ascii=False)


def _text_key(*texts: str) -> str:
    """A hash of texts, to save memory.

    It uses the form NFC, because data.normalize may have changed the prompts to it.
    """
    composed = (unicodedata.normalize("NFC", text.strip()) for text in texts)
    return sha256_of_parts(*(text.encode("utf-8", "surrogatepass") for text in composed))


def _read(options: ResponseFile, where: str, wanted: set[str], here: list[str]) -> dict[str, _Given]:
    """The answers for the wanted keys, by key. here: some ids or prompts of the examples, for the error."""
    path, asked = options.path, options.id if options.match == "id" else options.prompt
    by_key: dict[str, _Given] = {}
    rows = strangers = 0  # strangers: rows of other examples
    there: list[str] = []  # the ids or prompts of the first of them
    unanswered = None  # the last row of an example that has no answer
    for line, row in read_table(path, where):
        rows += 1
        place = f"{path}:{line}"
        key = _row_key(options, row, place)
        if key not in wanted:
            strangers += 1
            if len(there) < _SHOWN:
                there.append(value_at(row, asked))
            continue
        given = _given(options, row, line, place)
        if given is None:
            unanswered = line, row
            continue
        first = by_key.setdefault(key, given)
        if (first.text, first.truncated) != (given.text, given.truncated):
            raise UserError(
                f"{place}: {asked} {quoted(value_at(row, asked))} is also in line {first.line}, with another "
                "answer. Remove one of the two."
            )
    if strangers == rows:
        other = "prompt" if options.match == "id" else "id"
        raise UserError(
            f"{path}: none of its {rows} {options.match}s is one of an example (the instructions have "
            f"{_listed(here)}; the file has {_listed(there)}). Name the file that was made for these "
            f"instructions, change {where}.{options.match} (now {asked}), or set match: {other}."
        )
    if not by_key:
        line, row = unanswered  # type: ignore[misc]  # there is one: not all rows are strangers
        raise UserError(
            f"{path}: no row of an example has an answer under {options.response} ({where}.response); line "
            f"{line} has {keys_shown(row)}"
        )
    if strangers:
        logger.info(f"{path}: {strangers} of {rows} rows belong to no example, among them {_listed(there)}")
    return by_key


def _given(options: ResponseFile, row: dict[str, Any], line: int, place: str) -> _Given | None:
    text, truncated = value_at(row, options.response), row.get("truncated")
    if text is None:
        return None
    if not isinstance(text, str):
        inner = f". Name one of {keys_shown({options.response: text})}." if isinstance(text, dict) else ""
        raise UserError(
            f"{place}: {options.response} is a {type(text).__name__}, not the text of an answer{inner}"
        )
    refuse_half_characters(text, options.response, place)
    if not isinstance(truncated, bool | None):
        raise UserError(
            f"{place}: truncated is {quoted(truncated)}, but must be true or false: it says whether the "
            "answer was cut off"
        )
    return _Given(text, truncated or False, line)


def _listed(values: list[Any]) -> str:
    return ", ".join(map(quoted, values)) + ", ..." if values else "none"
