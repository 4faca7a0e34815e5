"""Ports at which the ranks of a run meet."""

import random
import socket

FIRST, COUNT = 10_000, 20_000
"""They are below those that systems hand out to clients, any of which may be taken before the ranks are there."""
_TRIES = 100
_draw = random.SystemRandom()


def free_port() -> int:
    """A free port of this machine.

    Drawn at random, since seconds pass until it is taken, in which other processes look for ports too.

    Raises:
        OSError: none was found.
    """
    for _ in range(_TRIES):
        port = FIRST + _draw.randrange(COUNT)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port in {_TRIES} tries from {FIRST} to {FIRST + COUNT}")
