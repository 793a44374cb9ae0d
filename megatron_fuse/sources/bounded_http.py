"""An HTTP client for untrusted servers: an exchange is bounded in time and bytes, and is never redirected."""

import asyncio
import functools
import ssl
from collections.abc import AsyncIterator
from typing import Any

import httpx2

MOST_BYTES = 16 << 20  # the most bytes of a body: a hundred times the longest text


class _BoundedStream(httpx2.AsyncByteStream):
    """A body that ends with an error if it is longer than `most` bytes."""

    def __init__(self, stream: Any, request: httpx2.Request, most: int) -> None:
        self._stream, self._request, self._most = stream, request, most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > self._most:
                raise httpx2.RemoteProtocolError(
                    f"the server sent a body of more than {self._most >> 20} MiB", request=self._request
                )
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The certificate authorities that this machine trusts. Reading them is slow, so they are read once."""
    return httpx2.create_ssl_context()


class BoundedClient(httpx2.AsyncClient):
    """Ends an exchange, with its body, after the read time-out of its request, even if bytes still arrive.

    httpx2 itself starts this time again with every byte. Redirects are errors: they would send prompts and
    key to another server. Compressed bodies are errors too: they were not requested, and a few bytes may
    become gigabytes. All errors are httpx2's own, so that the retrying code knows them.
    """

    def __init__(self, most_bytes: int | None = None, **options: Any) -> None:
        """most_bytes: of a body; default: MOST_BYTES."""
        self._most_bytes = MOST_BYTES if most_bytes is None else most_bytes
        options.setdefault("verify", _certificates())
        super().__init__(follow_redirects=False, limits=httpx2.Limits(max_connections=None), **options)

    async def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        seconds = request.extensions["timeout"]["read"]
        request.headers["accept-encoding"] = "identity"
        try:
            async with asyncio.timeout(seconds):
                response = await super().send(request, stream=True, **options)
                try:
                    encoding = response.headers.get("content-encoding", "identity")
                    if encoding != "identity":
                        raise httpx2.RemoteProtocolError(
                            f"the server sent a body encoded as {encoding!r}", request=request
                        )
                    response.stream = _BoundedStream(response.stream, request, self._most_bytes)
                    await response.aread()
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise httpx2.ReadTimeout(f"no complete answer within {seconds:g} s", request=request) from error
        return response
