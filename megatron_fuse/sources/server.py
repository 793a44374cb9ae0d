"""A model behind a server: vLLM, SGLang, llama.cpp, `transformers serve`, a hosted one.

It is asked for answers, for the distributions of a source or for rewards. Each kind of request
(request_kind.py) knows its form; this module knows the transport.

No server is trusted. An exchange is bounded in time and bytes and never redirected (bounded_http.py). A
response counts as an answer only if it has the right form and comes from the requested model. If it has
another form, the request is sent again, at most as often as below.

The package `openai` retries after a lost connection, a time-out and the statuses 408, 409, 429 and 5xx. It
retries at most `max_retries` times, after 0.5 s, 1 s, 2 s ... 8 s, or after the time in the server's
`Retry-After` (up to 2 minutes).

If a request still fails, the problem may be this request or all requests. The status does not say which: 400
may mean a prompt that is too long, or a parameter that the server does not know. So after a refused request a
trial is sent, which any model can answer. If the trial is answered, only the refused request is given up;
else the run ends. No error contains the key, although servers and HTTP libraries may quote it.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import ServerAddress
from megatron_fuse.sources.completions import is_name_of
from megatron_fuse.sources.listed_models import listed_models, unlisted
from megatron_fuse.sources.request_kind import Answer, Body, Malformed, NoAnswer, RequestKind
from megatron_fuse.text_safety import brief

# Statuses that may concern one request only: they have several
# meanings, or this request alone causes the fault.
_ABOUT_ONE_REQUEST = (400, 413, 422, 500)
# Error codes of hosted servers that refuse a prompt.
_FILTERED = ("content_filter", "content_policy_violation")
_CONNECT_SECONDS = 10.0
_PROGRESS_SECONDS = 5.0
_LONGEST_QUOTE = 160  # the most characters of a server's text in an error
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds before a retry after a malformed answer, as in the package


class Server(Generic[Answer]):
    """A server of the recipe. `where` is the key of its options (`sources.mpt.server`), for errors."""

    def __init__(self, options: ServerAddress, where: str, kind: RequestKind[Answer]) -> None:
        """kind: of all requests.

        Raises UserError if the package `openai` is missing, and if the key has characters that no request can
        carry.
        """
        try:
            import openai

            from megatron_fuse.sources import bounded_http
        except ImportError as error:
            raise UserError(
                f"{where}: the package openai is needed. Run pip install 'megatron-fuse[server]'."
            ) from error
        self.options, self.where, self._openai, self._http = options, where, openai, bounded_http
        self._kind = kind
        root = options.url.rstrip("/").removesuffix("/v1")
        # The package puts a relative path behind its base_url, and takes an absolute one as it is.
        self._address = root + kind.path if kind.path.startswith("/") else kind.path
        self._key = os.environ.get(options.api_key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise UserError(
                f"the environment variable {options.api_key_variable} holds characters that no key has. Set "
                "it to the key."
            )
        self._known: list[str] = []  # models that the server lists
        self._reached = False

    def ask(
        self,
        bodies: Mapping[str, Body],
        trial: Body,
        received: Callable[[str, Answer], None],
        progress: Callable[[], None],
    ) -> None:
        """Sends every body, at most `concurrency` at the same time.

        received: called with a body's name and its answer, as soon as the answer arrives. trial: a request
        like the others that any model can answer. progress: called every few seconds.
        Raises UserError at once if all requests must fail: there is no server or no such model, or the key is
        not accepted. Also raises UserError if a server is away or overloaded during all retries.
        """
        # All workers share this iterator, so that each takes the next body when it is free.
        waiting = iter(bodies.items())

        async def ask_in_turn(client: Any) -> None:
            for name, body in waiting:
                with self._naming(name):
                    answer = await self._send(client, body)
                    if isinstance(answer, NoAnswer) and not answer.filtered:
                        tried = await self._send(client, trial)
                        if isinstance(tried, NoAnswer) and not tried.filtered:
                            raise self._error(
                                f"refuses every request ({tried.reason}). Fix {self.where}, "
                                f"{self._kind.advice}."
                            )
                if isinstance(answer, NoAnswer):
                    answer = self._kind.without_answer(name, answer)
                received(name, answer)

        try:
            asyncio.run(self._together(ask_in_turn, min(self.options.concurrency, len(bodies)), progress))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _together(
        self, work: Callable[[Any], Coroutine[Any, Any, None]], times: int, progress: Callable[[], None]
    ) -> None:
        """Runs `work` with a client, `times` times concurrently. The first error ends all of them."""
        options, openai = self.options, self._openai
        client = openai.AsyncOpenAI(
            base_url=options.url,
            api_key=self._key or "none",  # local servers need no key, but the package must have one to send
            timeout=openai.Timeout(
                options.timeout, connect=min(options.timeout, _CONNECT_SECONDS), pool=None
            ),
            max_retries=options.max_retries,
            http_client=self._http.BoundedClient(self._kind.most_bytes),
        )
        async with client:
            if not self._reached:  # later a server may be away as long as the retries last
                await self._reach(client)
            clock = asyncio.create_task(_every_few_seconds(progress))
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(times):
                        group.create_task(work(client))
            finally:
                clock.cancel()

    async def _reach(self, client: Any) -> None:
        """Raises UserError if no server listens, the key is not accepted, or the model is not listed.

        Not every server has a list.
        """
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
        """Raises UserError if the server lists its models and the requested one is not among them."""
        names = [name for name in (self.options.model, self.options.answers_as) if name]
        if problem := unlisted(names, self._known):
            raise self._error(
                f"{self._short(problem, 400)}. Fix {self.where}.model. If it is the same model under another "
                f"name, set {self.where}.answers_as to its name in that list."
            )

    async def _send(self, client: Any, body: Body) -> Answer | NoAnswer:
        """The answer to one request, after as many tries as the options allow."""
        for attempt in range(self.options.max_retries + 1):
            if attempt:
                await asyncio.sleep(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))
            content = await self._post(client, body)
            if isinstance(content, NoAnswer):
                return content
            try:
                return self._read(content, body)
            except Malformed as error:
                quoted = self._short(content[: 4 * _LONGEST_QUOTE].decode("utf-8", "replace"))
                reason = f"the server sent no completion but {quoted} ({self._short(error)})"
        return NoAnswer(reason)

    async def _post(self, client: Any, body: Body) -> bytes | NoAnswer:
        """The body of a response with status 200; NoAnswer if the status alone decides it."""
        openai = self._openai
        with self._explained():
            try:
                # `chat.completions.create` is not used: it would reject fields of other servers, and the body
                # must be sent as it was hashed.
                response = await client.post(self._address, body=body, cast_to=self._http.httpx2.Response)
            except openai.APIStatusError as error:
                if error.code in _FILTERED:
                    return NoAnswer(self._said(error), filtered=True)
                if error.status_code in _ABOUT_ONE_REQUEST:
                    return NoAnswer(self._said(error))
                raise
        return response.content

    def _read(self, content: bytes, body: Body) -> Answer:
        """The answer in a response's body.

        Raises Malformed if it is not an answer, UserError if another model answers than the requested one.
        """
        received = self._kind.read(content, body)
        if self._key and self._key in received.text:
            raise Malformed("the answer holds the key")
        options = self.options
        names = [options.model, *([options.answers_as] if options.answers_as else [])]
        if received.model is not None and not any(is_name_of(received.model, name) for name in names):
            raise self._error(
                f"answers as model {self._short(repr(received.model))}, but the requested model is "
                f"{self._short(repr(options.model))}. Fix {self.where}.model. If it is the same model under "
                f"another name, set {self.where}.answers_as to that name."
            )
        return received.answer

    @contextmanager
    def _naming(self, example: str) -> Iterator[None]:
        """Adds the example to an error that ends the run."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{error} [at example {brief(repr(example), 80)}]") from None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of the package into UserErrors.

        The original error is dropped, because it quotes the server's text unchanged.
        """
        try:
            yield
        except self._openai.APIError as error:
            raise self._explain(error) from None

    def _explain(self, error: Any) -> UserError:
        openai, options = self._openai, self.options
        if isinstance(error, openai.APITimeoutError):
            return self._error(
                f"did not answer within {options.timeout:g} s, {options.max_retries + 1} times. Raise "
                f"{self.where}.timeout or lower {self.where}.concurrency. {self._kind.kept}"
            )
        if isinstance(error, openai.APIConnectionError):
            cause = self._short(error.__cause__ or error)
            return self._error(
                f"cannot be reached ({cause}). Start the server, or fix {self.where}.url. {self._kind.kept}"
            )
        said = self._said(error)
        match status := getattr(error, "status_code", None):
            case 301 | 302 | 303 | 307 | 308:
                where_to = self._short(repr(error.response.headers.get("location")))
                return self._error(
                    f"redirects requests ({status} to {where_to}), but prompts and key are never sent to "
                    f"another address. Set {self.where}.url to the address that answers directly."
                )
            case 401 | 403:
                state = "holds" if self._key else "is not set, but should hold"
                return self._error(
                    f"does not accept the key ({said}). The environment variable {options.api_key_variable} "
                    f"{state} it. Set {self.where}.api_key_variable to use another variable."
                )
            case 404:
                known = f"; it lists {self._short(', '.join(self._known[:8]))}" if self._known else ""
                keys = ", ".join(f"{self.where}.{key}" for key in ("model", *self._kind.keys))
                path = self._kind.path.lstrip("/")
                return self._error(
                    f"has no model {options.model!r}, or nothing at /{path} ({said}){known}. Fix {keys}, or "
                    f"{self.where}.url, which usually ends in /v1."
                )
            case 402 | 429:
                return self._error(
                    f"accepts no more requests for now ({said}). Wait, or lower {self.where}.concurrency. "
                    f"{self._kind.kept}"
                )
        return self._error(f"fails ({said}). See the log of the server. {self._kind.kept}")

    def _error(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {self.options.url} {problem}")

    def _said(self, error: Any) -> str:
        """Status and message of a server's error. Its body is {error: {message}}, {detail} or any text."""
        body = error.body
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body
        return f"{getattr(error, 'status_code', '')} {self._short(body or error)}".strip()

    def _short(self, said: Any, limit: int = _LONGEST_QUOTE) -> str:
        """The text on one line, without the key and without control characters for a terminal."""
        text = " ".join(str(said).split())
        text = text.replace(self._key, "[key]") if self._key else text
        return brief(text, limit)


async def _every_few_seconds(progress: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_SECONDS)
        progress()
