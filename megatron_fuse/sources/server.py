"""A source model behind a server with OpenAI's interface: vLLM, SGLang, llama.cpp, `transformers serve`, a hosted one.

No server is trusted: an exchange is bounded in time and bytes and never redirected (bounded_http.py), what comes back is an answer
only in the form of one (completions.py) and from the model that was asked. What is none is asked for again, as often as below.

The package `openai` does the retrying: after a lost connection, a time-out and the statuses 408, 409, 429 and 5xx it asks again,
as often as `max_retries` says, after 0.5 s, 1 s, 2 s ... 8 s, or after as long as the server's `Retry-After` says (up to 2 minutes).

What fails then is either one request or all of them, and statuses do not tell (400 may be a prompt that is too long, or a
parameter that the server does not know). So a request that is refused is followed by a trial that any model can answer: where that
is answered, the request alone is given up; else the run ends. The key is in no error: servers and HTTP libraries may quote it.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import ServerOptions
from megatron_fuse.sources.completions import (
    Body,
    Malformed,
    Reply,
    is_name_of,
    most_bytes_of,
    read_completion,
)
from megatron_fuse.sources.listed_models import listed_models, unlisted
from megatron_fuse.text_safety import brief

_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_ABOUT_ONE_REQUEST = (
    400,
    413,
    422,
    500,
)  # perhaps: of several meanings, or a fault that this request alone brings about
_FILTERED = ("content_filter", "content_policy_violation")  # error codes of hosted servers that refuse a prompt
_CONNECT_SECONDS = 10.0
_PROGRESS_SECONDS = 5.0
_LONGEST_QUOTE = 160  # characters of what a server says that an error repeats
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds before what is no answer is asked for again, as the package's own
_STAYS = "the answers that came in are kept, and a rerun asks for the rest"


class Server:
    """A server as a recipe names it; `where` is the key of its options (`sources.mpt.server`), for errors."""

    def __init__(self, options: ServerOptions, where: str, longest_token: int) -> None:
        """longest_token: bytes of the model's, by which answers of impossible length are known.

        Raises UserError without the package `openai`, and for a key that no request can carry.
        """
        try:
            import openai

            from megatron_fuse.sources import bounded_http
        except ImportError as error:
            raise UserError(f"{where}: needs the package openai: pip install 'megatron-fuse[server]'") from error
        self.options, self.where, self._openai, self._http = options, where, openai, bounded_http
        self._longest_token = longest_token
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
        progress: Callable[[], None],
    ) -> None:
        """Sends every body, at most `concurrency` at once.

        received: called with a body's name and its reply as soon as that comes in, in the order in which they come. trial: a request
        like the others that any model can answer. progress: called every few seconds.
        Raises UserError, at once, for what is wrong with all requests: no server, no such model, a key that is not accepted; and
        where a server stays away or overloaded through all retries.
        """
        waiting = iter(bodies.items())

        async def ask_in_turn(client: Any) -> None:
            for name, body in waiting:
                with self._naming(name):
                    reply = await self._send(client, body)
                    if reply.fault and (fault := (await self._send(client, trial)).fault):
                        raise self._error(
                            f"refuses every request ({fault}): fix {self.where}, or the sampling options of the recipe"
                        )
                received(name, reply)

        try:
            asyncio.run(self._together(ask_in_turn, min(self.options.concurrency, len(bodies)), progress))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _together(
        self, work: Callable[[Any], Coroutine[Any, Any, None]], times: int, progress: Callable[[], None]
    ) -> None:
        """Does `work` with a client, so many times side by side; the first error ends all."""
        options, openai = self.options, self._openai
        client = openai.AsyncOpenAI(
            base_url=options.url,
            api_key=self._key or "none",  # local servers want none, but the package wants something to send
            timeout=openai.Timeout(options.timeout, connect=min(options.timeout, _CONNECT_SECONDS), pool=None),
            max_retries=options.max_retries,
            http_client=self._http.BoundedClient(),
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
        """Raises UserError where nobody listens, the key is not accepted or the model is not listed. Not every server has a list."""
        openai = self._openai
        with self._explained():
            try:
                listed = await client.with_options(max_retries=0, timeout=_CONNECT_SECONDS).get(
                    "/models", cast_to=self._http.httpx2.Response
                )
                self._known = listed_models(listed.content)
            except openai.APITimeoutError:
                pass
            except openai.APIStatusError as error:
                if error.status_code == 401:
                    raise
        self._require_listed()
        self._reached = True

    def _require_listed(self) -> None:
        """Raises UserError where the server lists its models and the one to be asked is not among them."""
        names = [name for name in (self.options.model, self.options.answers_as) if name]
        if problem := unlisted(names, self._known):
            raise self._error(
                f"{self._short(problem, 400)}: fix {self.where}.model, or set {self.where}.answers_as to its name in that list where it "
                "is the same model"
            )

    async def _send(self, client: Any, body: Body) -> Reply:
        """The reply to one request, after as many tries as the options allow."""
        for attempt in range(self.options.max_retries + 1):
            if attempt:
                await asyncio.sleep(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))
            content = await self._post(client, body)
            if isinstance(content, Reply):
                return content
            try:
                return self._read(content, body)
            except Malformed as error:
                quoted = self._short(content[: 4 * _LONGEST_QUOTE].decode("utf-8", "replace"))
                fault = f"no completion came back but {quoted} ({self._short(error)})"
        return Reply("", fault=fault)

    async def _post(self, client: Any, body: Body) -> bytes | Reply:
        """The body of a response with status 200; a Reply where the status says it all."""
        openai = self._openai
        with self._explained():
            try:
                # Not through `chat.completions.create`: what was hashed is what is sent, and other servers' fields pass as well.
                response = await client.post(
                    _PATHS[self.options.endpoint], body=body, cast_to=self._http.httpx2.Response
                )
            except openai.APIStatusError as error:
                if error.code in _FILTERED:
                    return Reply("", refused=True)
                if error.status_code in _ABOUT_ONE_REQUEST:
                    return Reply("", fault=self._said(error))
                raise
        return response.content

    def _read(self, content: bytes, body: Body) -> Reply:
        """Raises Malformed for what is no answer, UserError where another model answers than the one that was asked."""
        found = read_completion(content, self.options.endpoint, most_bytes_of(body, self._longest_token))
        if self._key and self._key in found.reply.text + (found.reply.reasoning or ""):
            raise Malformed("the answer holds the key")
        options = self.options
        names = [options.model, *([options.answers_as] if options.answers_as else [])]
        if found.model is not None and not any(is_name_of(found.model, name) for name in names):
            raise self._error(
                f"answers as model {self._short(repr(found.model))}, asked is {self._short(repr(options.model))}: fix {self.where}.model, "
                f"or set {self.where}.answers_as to that name where it is the same model"
            )
        return found.reply

    @contextmanager
    def _naming(self, example: str) -> Iterator[None]:
        """An error that ends the run says at which example."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{error} [at example {brief(repr(example), 80)}]") from None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the package raises into UserErrors, without the original: it quotes what the server says as it is."""
        try:
            yield
        except self._openai.APIError as error:
            raise self._explain(error) from None

    def _explain(self, error: Any) -> UserError:
        openai, options = self._openai, self.options
        if isinstance(error, openai.APITimeoutError):
            return self._error(
                f"did not answer within {options.timeout:g} s, {options.max_retries + 1} times: raise {self.where}.timeout or "
                f"lower {self.where}.concurrency; {_STAYS}"
            )
        if isinstance(error, openai.APIConnectionError):
            cause = self._short(error.__cause__ or error)
            return self._error(f"cannot be reached ({cause}): start the server, or fix {self.where}.url; {_STAYS}")
        said = self._said(error)
        match status := getattr(error, "status_code", None):
            case 301 | 302 | 303 | 307 | 308:
                where_to = self._short(repr(error.response.headers.get("location")))
                return self._error(
                    f"sends requests elsewhere ({status} to {where_to}), where prompts and key are not sent unasked: set "
                    f"{self.where}.url to the address that answers itself"
                )
            case 401 | 403:
                state = "holds" if self._key else "is not set and should hold"
                return self._error(
                    f"does not accept the key ({said}): the environment variable {options.api_key_variable} {state} it; "
                    f"{self.where}.api_key_variable names another"
                )
            case 404:
                known = f"; it lists {self._short(', '.join(self._known[:8]))}" if self._known else ""
                return self._error(
                    f"has no model {options.model!r}, or nothing at {_PATHS[options.endpoint]} ({said}){known}: fix {self.where}.model, "
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

    def _short(self, said: Any, limit: int = _LONGEST_QUOTE) -> str:
        """On one line, without the key, and without what a terminal would obey."""
        text = " ".join(str(said).split())
        text = text.replace(self._key, "[key]") if self._key else text
        return brief(text, limit)


async def _every_few_seconds(progress: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_SECONDS)
        progress()
