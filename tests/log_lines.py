"""What a command would write to stderr, and code that runs at a message."""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

from megatron_fuse.logs import start_logging, stop_logging


@contextmanager
def logged(level: str = "info") -> Iterator[io.StringIO]:
    """Yields what the messages of this process write to stderr, as under `--log-level LEVEL`."""
    text = io.StringIO()
    with redirect_stderr(text):
        start_logging(level)
        try:
            yield text
        finally:
            stop_logging()


@contextmanager
def at_every_shard(act: Callable[[str], None]) -> Iterator[None]:
    """Calls act(line) after every shard that is made, with the line about it. act may raise an exception."""
    with at_messages_of_shards(logging.DEBUG, act):
        yield


@contextmanager
def at_messages_of_shards(level: int, act: Callable[[str], None]) -> Iterator[None]:
    """Calls act(line) at each message of this level about the shards of a stage."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            act(record.getMessage())

    logger, handler = logging.getLogger("megatron_fuse.storage.stage"), Handler()
    handler.addFilter(lambda record: record.levelno == level)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
