"""A source model behind a server with OpenAI's interface: vLLM, SGLang, llama.cpp, `transformers serve`, a hosted one.

The package `openai` does the retrying: after a lost connection, a time-out and the statuses 408, 409, 429 and 5xx it asks again,
as often as `max_retries` says, after 0.5 s, 1 s, 2 s ... 8 s, or after as long as the server's `Retry-After` says (up to 2 minutes).

What fails then is either one request or all of them, and statuses do not tell (400 may be a prompt that is too long, or a
parameter that the server does not know). So a request that is refused is followed by a trial that any model can answer: where that
is answered, the request alone is given up; else the run ends. The key is in no error: servers and HTTP libraries may quote it.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import ServerOptions

Body = dict[str, Any]  # of a request, as JSON

_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_ABOUT_ONE_REQUEST = (
    400,
    413,
    422,
    500,
)  # perhaps: of several meanings, or a fault that this request alone brings about
_FILTERED = ("content_filter", "content_policy_violation")  # error codes of hosted servers that refuse a prompt
_CUT_OFF = ("length", "content_filter", "abort")  # finish reasons of an answer that has no end of its own
_CONNECT_SECONDS = 10.0
_PROGRESS_SECONDS = 5.0
_LONGEST_QUOTE = 300  # characters of what a server says that an error repeats
_STAYS = "the answers that came in are kept, and a rerun asks for the rest"


@dataclass(frozen=True)
class Reply:
    """An answer as the server gave it. refused: by the server's own word. fault: why the request has no answer at all."""

    text: str
    truncated: bool = False
    refused: bool = False
    fault: str | None = None


class Server:
    """A server as a recipe names it; `where` is the key of its options (`sources.mpt.server`), for errors."""

    def __init__(self, options: ServerOptions, where: str) -> None:
        """Raises UserError without the package `openai`, and for a key that no request can carry."""
        try:
            import openai
        except ImportError as error:
            raise UserError(f"{where}: needs the package openai: pip install 'megatron-fuse[server]'") from error
        self.options, self.where, self._openai = options, where, openai
        self._key = os.environ.get(options.api_key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise UserError(
                f"the environment variable {options.api_key_variable} holds characters that no key has: set it anew"
            )
        self._known: list[str] = []  # models that the server lists
        self._reached = False

    def ask(
        self,
        bodies: Mapping[str, Body],
        trial: Body,
        received: Callable[[str, Reply], None],
        progress: Callable[[float], None],
    ) -> None:
        """Sends every body, at most `concurrency` at once.

        received: called with a body's name and its reply as soon as that comes in, in the order in which they come. trial: a request
        like the others that any model can answer. progress: called every few seconds with the seconds since the beginning.
        Raises UserError, at once, for what is wrong with all requests: no server, no such model, a key that is not accepted; and
        where a server stays away or overloaded through all retries.
        """
        waiting = iter(bodies.items())

        async def ask_in_turn(client: Any) -> None:
            for name, body in waiting:
                reply = await self._send(client, body)
                if reply.fault and (fault := (await self._send(client, trial)).fault):
                    raise self._error(
                        f"refuses every request ({fault}): mend {self.where}, or the sampling options of the recipe"
                    )
                received(name, reply)

        try:
            asyncio.run(self._together(ask_in_turn, min(self.options.concurrency, len(bodies)), progress))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _together(
        self, work: Callable[[Any], Awaitable[None]], times: int, progress: Callable[[float], None]
    ) -> None:
        """Does `work` with a client, so many times side by side; the first error ends all."""
        options, openai = self.options, self._openai
        client = openai.AsyncOpenAI(
            base_url=options.url,
            api_key=self._key or "none",  # local servers want none, but the package wants something to send
            timeout=openai.Timeout(options.timeout, connect=min(options.timeout, _CONNECT_SECONDS), pool=None),
            max_retries=options.max_retries,
        )
        async with client:
            if not self._reached:  # later a server may be away for as long as the retries last
                await self._reach(client)
            clock = asyncio.create_task(_every_few_seconds(progress))
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(times):
                        group.create_task(work(client))
            finally:
                clock.cancel()

    async def _reach(self, client: Any) -> None:
        """Raises UserError where nobody listens or the key is not accepted. Not every server can list its models."""
        openai = self._openai
        with self._explained():
            try:
                listed = await client.with_options(max_retries=0, timeout=_CONNECT_SECONDS).get(
                    "/models", cast_to=object
                )
                self._known = [str(model["id"]) for model in listed["data"]]
            except (openai.APITimeoutError, KeyError, TypeError, ValueError):
                pass
            except openai.APIStatusError as error:
                if error.status_code == 401:
                    raise
        self._reached = True

    async def _send(self, client: Any, body: Body) -> Reply:
        openai = self._openai
        with self._explained():
            try:
                # Not through `chat.completions.create`: what was hashed is what is sent, and other servers' fields pass as well.
                content = await client.post(_PATHS[self.options.endpoint], body=body, cast_to=object)
            except openai.APIStatusError as error:
                if error.code in _FILTERED:
                    return Reply("", refused=True)
                if error.status_code in _ABOUT_ONE_REQUEST:
                    return Reply("", fault=self._said(error))
                raise
            except ValueError:  # it says that it is JSON
                content = "what is no JSON"
        return self._read(content)

    def _read(self, content: Any) -> Reply:
        """The first choice of a completion of either endpoint. What a server keeps apart as its reasoning is no part of the text."""
        try:
            choice = content["choices"][0]
            message = {"content": choice["text"]} if "text" in choice else choice["message"]
            refusal = message.get("refusal")
            text = _whole_characters(message["content"] or refusal or "")
        except (KeyError, IndexError, TypeError, AttributeError):
            return Reply("", fault=f"no completion came back but {self._short(content)}")
        finish = choice.get("finish_reason")
        return Reply(text, truncated=finish in _CUT_OFF, refused=bool(refusal) or finish == "content_filter")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the package raises into UserErrors, without the original: it quotes what the server says as it is."""
        try:
            yield
        except self._openai.APIError as error:
            raise self._explain(error) from None

    def _explain(self, error: Exception) -> UserError:
        openai, options = self._openai, self.options
        if isinstance(error, openai.APITimeoutError):
            return self._error(
                f"did not answer within {options.timeout:g} s, {options.max_retries + 1} times: raise {self.where}.timeout or "
                f"lower {self.where}.concurrency; {_STAYS}"
            )
        if isinstance(error, openai.APIConnectionError):
            cause = self._short(error.__cause__ or error)
            return self._error(f"cannot be reached ({cause}): start the server, or mend {self.where}.url; {_STAYS}")
        said = self._said(error)
        match getattr(error, "status_code", None):
            case 401 | 403:
                state = "holds" if self._key else "is not set and should hold"
                return self._error(
                    f"does not accept the key ({said}): the environment variable {options.api_key_variable} {state} it; "
                    f"{self.where}.api_key_variable names another"
                )
            case 404:
                known = f"; it lists {', '.join(self._known[:8])}" if self._known else ""
                return self._error(
                    f"has no model {options.model!r}, or nothing at {_PATHS[options.endpoint]} ({said}){known}: mend {self.where}.model, "
                    f"or {self.where}.url, which mostly ends in /v1"
                )
            case 402 | 429:
                return self._error(f"gives no more for now ({said}): wait, or lower {self.where}.concurrency; {_STAYS}")
        return self._error(f"fails ({said}): see its own log; {_STAYS}")

    def _error(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {self.options.url} {problem}")

    def _said(self, error: Any) -> str:
        """Status and message of an error that a server gave, whose body is {error: {message}}, {detail} or any text."""
        body = error.body
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body
        return f"{getattr(error, 'status_code', '')} {self._short(body or error)}".strip()

    def _short(self, said: Any) -> str:
        text = _whole_characters(" ".join(str(said).split()))
        text = text.replace(self._key, "[key]") if self._key else text
        return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


def _whole_characters(text: str) -> str:
    """A server may cut a surrogate pair in two: half of one is no character, and cannot be written."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


async def _every_few_seconds(progress: Callable[[float], None]) -> None:
    begin = time.monotonic()
    while True:
        await asyncio.sleep(_PROGRESS_SECONDS)
        progress(time.monotonic() - begin)
