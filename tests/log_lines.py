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

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            act(record.getMessage())

    logger, handler = logging.getLogger("megatron_fuse.storage.stage"), Handler()
    handler.addFilter(lambda record: record.levelno == logging.DEBUG)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
