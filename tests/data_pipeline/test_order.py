import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Order

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda s: sum(s) > 0)


@st.composite
def orders(draw):
    lanes = draw(st.integers(1, 6))
    return Order(
        np.array(draw(sizes)), draw(st.integers(0, 2**64 - 1)), draw(st.integers(1, 5)), lanes, draw(st.integers(1, 9))
    )


@given(orders(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_sample_exactly_once(order, epoch):
    n = order.num_samples
    epochs, ids = order.samples(epoch * n, (epoch + 1) * n)
    assert (epochs == epoch).all()
    assert sorted(ids.tolist()) == list(range(n))


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
    st.integers(0, 1000),
    st.integers(1, 4),
    st.tuples(
        st.sampled_from([1, 2, 4, 8]),
        st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=6),
        st.sampled_from([8, 16, 24]),
    ),
)
@settings(max_examples=40, deadline=None)
def test_any_changes_of_world_size_in_mid_epoch_go_on_exactly(shards, seed, window, plan):
    lanes, worlds, batch = plan

    def order():
        return Order(np.array(shards), seed, window, lanes, batch // lanes)

    expected = order().samples(0, 3 * batch * len(worlds))[1].tolist()
    seen, position = [], 0
    for world in worlds:  # each is a fresh start of `world` ranks that runs three steps
        ranks = [order() for _ in range(world)]
        share = batch // world
        for _ in range(3):
            for rank, own in enumerate(ranks):
                seen += own.samples(position + rank * share, position + (rank + 1) * share)[1].tolist()
            position += batch
    assert seen == expected


def test_epochs_and_seeds_differ_and_are_well_mixed():
    order = Order(np.full(10, 1000), 1, window=10)
    first, second = order.samples(0, 10_000)[1], order.samples(10_000, 20_000)[1]
    other = Order(np.full(10, 1000), 2, window=10).samples(0, 10_000)[1]
    for a, b in ((first, second), (first, other), (first, np.arange(10_000))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    # Any stretch of the stream draws from all shards alike.
    assert np.bincount(first[:1000] // 1000, minlength=10).min() > 60


def test_a_window_reads_no_more_shards_than_it_says():
    order = Order(np.full(20, 50), 3, window=4)
    ids = order.samples(0, 1000)[1]
    for begin in range(0, 1000, 200):
        assert len(np.unique(ids[begin : begin + 200] // 50)) == 4


def test_a_lane_keeps_its_shards_from_epoch_to_epoch():
    lanes, block, shards = 4, 8, 64
    order = Order(np.full(shards, 100), 3, window=4, lanes=lanes, lane_block=block)
    touched: list[set[int]] = [set() for _ in range(lanes)]
    for epoch in range(4):
        positions = np.arange(epoch * 6400, (epoch + 1) * 6400)
        ids = order.at(positions)[1]
        for lane in range(lanes):
            touched[lane] |= set((ids[positions // block % lanes == lane] // 100).tolist())
    # 16 shards each, and at most the neighbours on both sides, across which the cuts move.
    assert all(16 <= len(own) <= 18 for own in touched)


def test_an_order_without_samples_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        Order(np.array([0, 0]), 1)


@pytest.mark.parametrize(
    ("sizes", "settings", "start", "digest"),
    [
        ([130] * 9 + [70], (0, 4, 1, 64), 0, "f3d5de511d574e8e"),
        ([1300] * 40, (7, 16, 1, 1024), 51_000, "9e2e2f6ad9f7b106"),
        ([97, 5, 400, 1] * 8, (2**40 + 1, 3, 8, 16), 123_456, "d72e6997a5f617db"),
    ],
)
def test_the_order_is_the_one_that_runs_of_older_versions_began_with(sizes, settings, start, digest):
    order = np.stack(Order(np.array(sizes), *settings).samples(start, start + 5000)).astype("<i8")
    assert hashlib.sha256(order.tobytes()).hexdigest()[:16] == digest
