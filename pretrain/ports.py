"""Ports at which the ranks of a run meet."""

import random
import socket
from contextlib import suppress

FIRST, COUNT = 10_000, 20_000
"""They are below those that systems hand out to clients, any of which may be taken before the ranks are there."""


def free_port() -> int:
    """A free port of this machine, drawn at random: seconds pass until it is taken, and others look for ports, too.

    Raises:
        OSError: none was found.
    """
    for port in random.SystemRandom().sample(range(FIRST, FIRST + COUNT), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError(f"no free port in 100 tries from {FIRST} to {FIRST + COUNT}")
