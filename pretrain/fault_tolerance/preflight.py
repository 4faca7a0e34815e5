"""Before anything expensive: are all ranks here, and does every node communicate and compute as fast as the others?"""

import errno
import json
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pretrain.engine.distributed import Rank
from pretrain.outcome import BusyError, ExitCode, UserError, record

SLOW = 3.0
"""So many times slower than the median is worth a warning."""
MESSAGE = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
"""Bytes that are reduced and sent around, by device."""
MATRIX = {"cuda": 4096, "cpu": 256}
"""Side of the square matrices that are multiplied, by device."""
REPEATS = 3
TAKEN = "port {} is taken: choose another one with the launcher's --master_port"

_stores: list[TCPStore] = []  # rank 0's server must last as long as the process; torch's own rendezvous shares it


class PeersMissingError(UserError):
    """Ranks did not arrive; the text names them and their nodes, which ``nodes`` has too."""

    code = ExitCode.RETRY
    exit_cause = "peers missing"

    def __init__(self, text: str, nodes: Iterable[str]) -> None:
        super().__init__(text)
        self.nodes = tuple(nodes)


@dataclass(frozen=True)
class Measured:
    """What one rank measured; seconds."""

    node: str
    link: float
    """Receiving a message from the rank before it."""
    compute: float
    """Multiplying matrices."""


def meet(rank: Rank, timeout_s: float) -> str:
    """Wait until every rank has arrived, at MASTER_ADDR:MASTER_PORT.

    Returns:
        on rank 0, and where it is worth telling: in one line how long the last came after the first; else "".

    Raises:
        PeersMissingError: some did not arrive within ``timeout_s`` seconds; on all that did.
        BusyError: another process listens at the port; on rank 0.
    """
    serves = rank.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else `torchrun` does
    listening = _listen(rank) if serves else None
    port, problem, nodes = int(os.environ["MASTER_PORT"]), "", [rank.node_of(0)]
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            port,
            rank.world_size,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listening.detach() if listening else None,
        )
        _stores.append(store)
        if rank.world_size == 1:
            return ""
        store.set(f"preflight/{rank.rank}", str(time.time()))
        if rank.is_first:
            return _wait_for_all(rank, store, timeout_s)
        problem, nodes = json.loads(_read(store, "preflight/problem", 2 * timeout_s))
    except dist.DistError as error:
        text = str(error).splitlines()[0]
        if serves and "EADDRINUSE" in text:
            raise BusyError(TAKEN.format(port)) from None
        problem = f"{nodes[0]} (rank 0) did not arrive at port {port} or is gone: {text}"
    if problem:
        raise PeersMissingError(problem, nodes)
    return ""


def _listen(rank: Rank) -> socket.socket | None:
    """Listen at MASTER_ADDR:MASTER_PORT; a port of 0 becomes a free one.

    Returns:
        None where torch has to listen, which it does on all interfaces: MASTER_ADDR is no address of this machine, or
        names its loopback, while other nodes know that name by another address.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        if rank.world_size > rank.local_world_size and place[0] != address and ip_address(place[0]).is_loopback:
            return None
        listening = socket.create_server(place, family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BusyError(TAKEN.format(port)) from None
        return None
    os.environ["MASTER_PORT"] = str(listening.getsockname()[1])
    return listening


def _wait_for_all(rank: Rank, store: TCPStore, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    arrived, missing = {}, []
    for other in range(rank.world_size):
        try:
            arrived[other] = float(_read(store, f"preflight/{other}", max(0.1, deadline - time.monotonic())))
        except dist.DistError:
            missing.append(other)
    problem, nodes = "", sorted({rank.node_of(other) for other in missing})
    if missing:
        problem = f"{', '.join(nodes)} (rank {', '.join(map(str, missing))}) did not arrive within {timeout_s:.0f} s"
    store.set("preflight/problem", json.dumps([problem, nodes]))
    if problem:
        time.sleep(1.0)  # the others read it from this process
        raise PeersMissingError(problem, nodes)
    last = max(arrived, key=lambda other: arrived[other])
    late = arrived[last] - min(arrived.values())
    return f"preflight: {rank.node_of(last)} (rank {last}) came last, {late:.0f} s after the first" if late > 10 else ""


def _read(store: TCPStore, key: str, seconds: float) -> str:
    store.wait([key], timedelta(seconds=seconds))
    return store.get(key).decode()


def measure(rank: Rank, device: torch.device, control: dist.ProcessGroup) -> list[str]:
    """Time an all-reduce, every link of a ring over the ranks, and every rank's arithmetic. Collective.

    Returns:
        lines to print on rank 0, the first of them the all-reduce, the others warnings; else nothing. The nodes
        that are slow are in the record of rank 0's exit, whatever ends it.
    """
    if rank.world_size == 1:
        return []
    buffer = torch.zeros(MESSAGE[device.type] // 4, device=device)
    reduced = _timed(lambda: dist.all_reduce(buffer), device)
    link = _timed(lambda: _pass_on(rank, buffer), device)
    side = MATRIX[device.type]
    matrix = torch.ones(side, side, device=device)
    compute = _timed(lambda: matrix @ matrix, device)
    found = [Measured(rank.node_of(rank.rank), link, compute)] * rank.world_size
    dist.all_gather_object(found, found[0], group=control)
    if not rank.is_first:
        return []
    nodes = len({one.node for one in found})
    who = f"{len(found)} ranks on {nodes} node{'s' if nodes > 1 else ''}"
    warnings, slow = slow_ones(found)
    record(slow=slow)
    size = MESSAGE[device.type] / 2**20
    return [f"preflight: all-reduce of {size:.0f} MiB among {who} in {1e3 * reduced:.1f} ms", *warnings]


def slow_ones(measured: list[Measured]) -> tuple[list[str], list[str]]:
    """Find what is much slower than the median: links between nodes, and arithmetic.

    Args:
        measured: by rank. Links within a node are not compared with those between nodes.

    Returns:
        warnings, and the slow nodes: those that compute slowly, or whose links to both neighbors are slow. A single
        slow link does not show which of its ends is slow.
    """
    crossing = [(a, b) for a, b in pairwise([measured[-1], *measured]) if a.node != b.node]
    usual = statistics.median(one.link for _, one in crossing) if len(crossing) >= 3 else math.inf
    links = [(a.node, b.node, b.link) for a, b in crossing if b.link > SLOW * usual]
    lines = [
        f"WARNING preflight: {source} -> {target} took {1e3 * seconds:.1f} ms, the median is {1e3 * usual:.1f} ms"
        for source, target, seconds in links
    ]
    both = {source for source, _, _ in links} & {target for _, target, _ in links}
    usual = statistics.median(one.compute for one in measured)
    slow = [(index, one) for index, one in enumerate(measured) if one.compute > SLOW * usual]
    lines += [
        f"WARNING preflight: rank {index} on {one.node} computes {one.compute / usual:.1f} times slower than the median"
        for index, one in slow
    ]
    return lines, sorted(both | {one.node for _, one in slow})


def _pass_on(rank: Rank, buffer: torch.Tensor) -> None:
    """Send to the next rank of the ring while receiving from the one before."""
    received = torch.empty_like(buffer)
    to, source = (rank.rank + 1) % rank.world_size, (rank.rank - 1) % rank.world_size
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, buffer, to), dist.P2POp(dist.irecv, received, source)]):
        work.wait()


def _timed(act: Callable[[], object], device: torch.device) -> float:
    """The shortest of some repeats, in seconds, after one that warms up."""
    took = []
    for _ in range(REPEATS + 1):
        began = time.monotonic()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.monotonic() - began)
    return min(took[1:])
