"""Nodes that the preflight of ``pretrain`` named, read from what the ranks printed."""

import re
from collections.abc import Iterable
from pathlib import Path

HEAD_BYTES = 2**20
"""Of a rank's log: preflight comes first, but libraries that are told to can print a lot before."""
_MISSING = re.compile(r"(?:PeersMissingError: |^)([^\s,]+) \(rank [\d, ]+\) did not arrive")
_SLOW_RANK = re.compile(r"WARNING preflight: rank \d+ on (\S+) computes")
_SLOW_LINK = re.compile(r"WARNING preflight: (\S+) -> (\S+) took")


def missing_node(errors: Iterable[str]) -> str:
    """The one node that did not arrive; "" where several did not: nobody is to blame then.

    Two nodes that say it of each other are several.

    Args:
        errors: the last error of every rank that told one.
    """
    named = {found[1] for error in errors if (found := _MISSING.search(error))}
    return named.pop() if len(named) == 1 else ""


def slow_nodes(log: Path) -> tuple[str, ...]:
    """Nodes that compute slowly, or whose links to both neighbours are slow: a single slow link blames neither end.

    Args:
        log: of rank 0, which prints the warnings; it need not exist.
    """
    try:
        with log.open("rb") as handle:
            text = handle.read(HEAD_BYTES).decode(errors="replace")
    except OSError:
        return ()
    links = _SLOW_LINK.findall(text)
    both = {source for source, _ in links} & {target for _, target in links}
    return tuple(sorted({*_SLOW_RANK.findall(text), *both}))
