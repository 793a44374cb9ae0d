"""Ports for tests whose processes listen at one."""

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """A port of this machine that nothing listens at.

    Not of those from 32768 on, of which Linux may give one to an outgoing connection before
    the test listens there.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # hypothesis gives every test the same numbers
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
