import os
import socket

import pytest
import torch
import torch.distributed as dist

from pretrain.engine.distributed import Rank
from pretrain.fault_tolerance.preflight import Measured, PeersMissingError, _listen, measure, meet, slow_ones
from pretrain.outcome import BusyError, ExitCode
from pretrain.ports import free_port
from tests.pretrain.ranks import run_ranks


def two_nodes(rank: int) -> Rank:
    return Rank(rank, 2, 0, 1, host=f"node-{'ab'[rank]}", job_id="", nodes=("node-a", "node-b"))


def test_a_rank_that_finds_nobody_names_the_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tests/slurm/test_events.py`` has the first node, and those that do arrive."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(PeersMissingError, match=r"^node-a \(rank 0\) did not arrive"):
        meet(two_nodes(1), 1.0)


def test_a_port_that_is_taken_is_named_and_may_be_free_later(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("127.0.0.1", "192.0.2.1"):  # the latter is no machine's: torch listens itself
        with socket.create_server(("", 0)) as other:
            monkeypatch.setenv("MASTER_ADDR", address)
            monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
            with pytest.raises(BusyError, match=rf"^port {other.getsockname()[1]} is taken: ") as error:
                meet(two_nodes(0), 1.0)
            assert error.value.code is ExitCode.RETRY


def test_the_rendezvous_listens_on_its_address_alone_and_without_a_launcher_at_any_free_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    assert meet(Rank(0, 1, 0, 1, host="node-a", job_id=""), 1.0) == ""
    port = int(os.environ["MASTER_PORT"])
    socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))


def test_a_name_that_is_the_loopback_here_only_leaves_listening_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    assert _listen(two_nodes(0)) is None


def first_rank_tells(control: dist.ProcessGroup) -> None:
    told = "\n".join(measure(two_nodes(dist.get_rank()), torch.device("cpu"), control))
    if dist.get_rank() == 0:
        assert told.startswith("preflight: all-reduce of 4 MiB among 2 ranks on 2 nodes in ")
    else:
        assert told == ""


def test_the_all_reduce_is_timed_and_told_by_rank_0() -> None:
    run_ranks(2, first_rank_tells)


def test_a_slow_link_and_a_slow_rank_are_named_and_links_within_a_node_are_not_compared() -> None:
    nodes = [node for node in "abcd" for _ in range(2)]
    good = [Measured(node, 0.001 if index % 2 else 0.010, 0.02) for index, node in enumerate(nodes)]
    assert slow_ones(good) == ([], [])
    slow = list(good)
    slow[4] = Measured("c", 0.050, 0.02)
    slow[7] = Measured("d", 0.001, 0.09)
    (link, compute), _ = slow_ones(slow)
    assert link == "WARNING preflight: b -> c took 50.0 ms, the median is 10.0 ms"
    assert compute == "WARNING preflight: rank 7 on d computes 4.5 times slower than the median"
