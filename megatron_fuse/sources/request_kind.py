"""What the transport to a server knows of one kind of request: its path, and how an answer is read."""

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

Body = dict[str, Any]  # the body of a request, as JSON
Answer = TypeVar("Answer")


class Malformed(ValueError):
    """The content of a response is not an answer. The message says why in a few words."""


@dataclass(frozen=True)
class Received(Generic[Answer]):
    """The content of a response.

    model: the name of the model that answered, if the server names one. text: the server's text in the answer
    that is kept; it must not hold the key.
    """

    answer: Answer
    model: str | None = None
    text: str = ""


@dataclass(frozen=True)
class NoAnswer:
    """A request that the server answers neither at once nor after retries, although it answers others.

    filtered: the server declines the prompt for its content.
    """

    reason: str
    filtered: bool = False


FINISHED_SHARDS = "Finished shards are kept, and the next run continues with the others."


class RequestKind(Protocol[Answer]):
    """One kind of request.

    path: behind the server's url; one that begins with `/` is behind its host, so without `/v1`.
    keys: keys of the server's options that may be wrong if nothing is at this path.
    advice: the fix if every request is refused, behind `Fix sources.NAME.server`.
    kept: what is kept if the run ends, as a sentence.
    most_bytes: the most bytes of a response; None for the default of bounded_http.py.
    """

    @property
    def path(self) -> str: ...

    @property
    def keys(self) -> tuple[str, ...]: ...

    @property
    def advice(self) -> str: ...

    @property
    def kept(self) -> str: ...

    @property
    def most_bytes(self) -> int | None: ...

    def read(self, content: bytes, body: Body) -> Received[Answer]:
        """Parses the body of a response with status 200. Raises Malformed if it is not an answer."""
        ...

    def without_answer(self, name: str, refusal: NoAnswer) -> Answer:
        """What stands for the answer that a request did not get. Raises UserError if it must have one."""
        ...
