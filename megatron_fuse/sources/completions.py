"""Parses a server's answer to a completion request. Anything that is not certainly an answer is refused.

These parts of OpenAI's form are read: {"model", "choices": [{"index", "finish_reason", "message": {"content",
"refusal"}}]}. The endpoint `completions` has "text" instead of the message. The thought of a reasoning model
may be in the message's "reasoning_content", "reasoning" or "thinking". Other keys belong to the servers and
are ignored.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_fuse.sources.request_kind import Body, Malformed, NoAnswer, Received

# Finish reasons of an answer that ends by itself.
_WHOLE = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
_CUT_OFF = ("length", "max_tokens", "content_filter")
_BYTES_OF_INVALID = 3  # bytes of U+FFFD, which replaces a token's byte that is not a character
_SLACK = 256  # bytes beyond those of the tokens: a stop text that was left in, spaces of a template


@dataclass(frozen=True)
class Reply:
    """An answer as the server gave it.

    refused: the server says that the answer declines. fault: the reason why the request has no answer at all.
    reasoning: the thought before the answer, if the server keeps it apart.
    """

    text: str
    truncated: bool = False
    refused: bool = False
    fault: str | None = None
    reasoning: str | None = None


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Message(_Form):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    thinking: Any = None

    @property
    def thought(self) -> str | None:
        thoughts = (self.reasoning_content, self.reasoning, self.thinking)
        return next((text for text in thoughts if isinstance(text, str) and text), None)


class _Choice(_Form):
    index: Annotated[int, Field(ge=0, le=0)] | None = None  # Literal[0] would take false
    finish_reason: Literal[_WHOLE + _CUT_OFF]  # type: ignore[valid-type]


class _ChatChoice(_Choice):
    message: _Message


class _TextChoice(_Choice):
    text: str


class _ChatCompletion(_Form):
    model: str | None = None
    choices: list[_ChatChoice] = Field(min_length=1, max_length=1)


class _TextCompletion(_Form):
    model: str | None = None
    choices: list[_TextChoice] = Field(min_length=1, max_length=1)


class Completions:
    """Requests for one whole answer (RequestKind). endpoint: `chat` or `completions`.

    longest_token: bytes of the model's longest token. It bounds the length of a possible answer.
    """

    keys = ("endpoint",)
    advice = "or the sampling options of the recipe"
    kept = "The answers received so far are kept, and the next run requests the others."
    most_bytes = None

    def __init__(self, endpoint: str, longest_token: int) -> None:
        self.path = {"chat": "chat/completions", "completions": "completions"}[endpoint]
        self._endpoint, self._longest_token = endpoint, longest_token

    def read(self, content: bytes, body: Body) -> Received[Reply]:
        return read_completion(content, self._endpoint, most_bytes_of(body, self._longest_token))

    def without_answer(self, _: str, refusal: NoAnswer) -> Reply:
        return Reply("", refused=refusal.filtered, fault=None if refusal.filtered else refusal.reason)


def read_completion(content: bytes, endpoint: str, most_bytes: int | None = None) -> Received[Reply]:
    """Parses the body of a response with status 200. most_bytes: see most_bytes_of.

    Raises Malformed if it is not an answer, or longer than most_bytes.
    """
    form = _ChatCompletion if endpoint == "chat" else _TextCompletion
    try:
        completion = form.model_validate(read_object(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole body"
        raise Malformed(f"{key}: {first['msg']}") from None
    choice = completion.choices[0]
    message = choice.message if isinstance(choice, _ChatChoice) else _Message(content=choice.text)
    nothing = message.content is None and message.refusal is None and message.thought is None
    if nothing and choice.finish_reason in _WHOLE:
        raise Malformed(f"choices.0.message: no content, although finish_reason is {choice.finish_reason!r}")
    text = message.content or message.refusal or ""
    if most_bytes is not None and (size := len((text + (message.thought or "")).encode())) > most_bytes:
        raise Malformed(
            f"an answer of {size:,} bytes, which is more than the requested number of tokens can hold"
        )
    refused = bool(message.refusal) or choice.finish_reason == "content_filter"
    reply = Reply(text, choice.finish_reason in _CUT_OFF, refused, reasoning=message.thought)
    return Received(reply, completion.model or None, text + (message.thought or ""))


def most_bytes_of(body: Body, longest_token: int) -> int | None:
    """The most bytes of a possible answer to a request, by its token limit; None if it has no limit."""
    limits = (body.get(key) for key in ("max_tokens", "max_completion_tokens"))
    limit = next((value for value in limits if isinstance(value, int)), None)
    return None if limit is None else _BYTES_OF_INVALID * longest_token * limit + _SLACK


def read_object(content: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8 without repeated keys. Raises Malformed."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats)
    except Malformed:
        raise
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Malformed(f"a {type(value).__name__} instead of an object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = {key: whole_characters(value) if isinstance(value, str) else value for key, value in pairs}
    if len(members) < len(pairs):
        repeated = next(
            key for number, (key, _) in enumerate(pairs) if key in [other for other, _ in pairs[:number]]
        )
        raise Malformed(f"the key {repeated!r} is given twice")
    return members


def whole_characters(text: str) -> str:
    """The text without halves of surrogate pairs.

    A server may cut a pair in two; a half cannot be written.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_name_of(said: str, asked: str) -> bool:
    """Whether two names mean the same model.

    Servers may add a directory before it, or a date, revision or file type after.

    `gpt-4o-2024-08-06` is `gpt-4o`, /models/mistral-7b.Q4.gguf is `mistral-7b`, and `small@main` is
    `org/small`. `gpt-4o-mini` is not `gpt-4o`.
    """
    shorter, longer = sorted(
        (name.rstrip("/").rsplit("/", 1)[-1].casefold() for name in (said, asked)), key=len
    )
    behind = longer.removeprefix(shorter)
    if not shorter or (behind == longer and shorter != longer):
        return False
    return behind[:1] in ("", "@", ":", ".") or (
        behind[0] == "-" and behind[1:5].isdecimal() and len(behind) >= 5
    )
