import pytest
import torch
import torch.distributed as dist

from pretrain.engine.distributed import Rank
from pretrain.fault_tolerance.preflight import Measured, PeersMissingError, measure, meet, slow_ones
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
