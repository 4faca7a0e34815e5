"""Fourteen million samples, 1,024 ranks: the sizes that this is made for, simulated."""

import math
import subprocess
import sys
import time

import numpy as np
import pytest

from data_pipeline.loader import EvalLoader, TrainLoader
from data_pipeline.manifest import File, Manifest, Shard, Split, file_of
from data_pipeline.order import Order

SHARDS, PER_SHARD = 1400, 10_000
RANKS, PER_NODE, BATCH = 1024, 8, 4096


def test_1024_ranks_read_14_million_samples_evenly_and_each_node_its_own_shards():
    nodes = RANKS // PER_NODE
    order = Order(np.full(SHARDS, PER_SHARD), 1, window=8, lanes=nodes, lane_block=BATCH // nodes)
    steps = order.num_samples // BATCH  # the tail, less than a batch, belongs to the next one
    rows = BATCH // nodes
    seen = np.zeros(order.num_samples, np.int8)
    for node in range(nodes):
        positions = (np.arange(steps)[:, None] * BATCH + node * rows + np.arange(rows)).reshape(-1)
        ids = order.at(positions)[1]
        np.add.at(seen, ids, 1)
        shards = ids // PER_SHARD
        # 1400 shards for 128 nodes are 10.9 for each; a cut through a shard gives it to both sides.
        assert len(np.unique(shards)) <= 13
        if node % 16 == 0:
            # A shard is read within its window of 8 shards and not opened again.
            first, last = (np.full(SHARDS, -1), np.full(SHARDS, -1))
            last[shards] = np.arange(len(shards))
            first[shards[::-1]] = np.arange(len(shards))[::-1]
            assert (last - first)[first >= 0].max() <= 8 * PER_SHARD
    assert seen.max() == 1
    assert seen.sum() == steps * BATCH


@pytest.mark.parametrize(("samples", "size"), [(50_000, 32), (1024, 1), (1023, 4), (360, 16), (1, 8)])
def test_evaluation_on_1024_ranks_covers_every_sample_once_in_equally_many_batches(samples, size):
    seen, lengths = np.zeros(samples, int), set()
    for rank in range(RANKS):
        # The loader's own plan, without the rest of the loader.
        loader = EvalLoader.__new__(EvalLoader)
        loader._dataset = range(samples)
        loader._set_share(size, rank, RANKS)
        batches = list(loader._plan())
        lengths.add((len(loader), len(batches)))
        for rows in batches:
            assert len(rows.sample_ids) == len(rows.valid) == size
            assert (rows.sample_ids[~rows.valid] < samples).all()
            np.add.at(seen, rows.sample_ids[rows.valid], 1)
    assert (seen == 1).all()
    batches = math.ceil(math.ceil(samples / RANKS) / size)
    assert lengths == {(batches, batches)}


@pytest.mark.parametrize("lanes", [1, 128])
def test_planning_costs_less_than_a_hundredth_of_a_step_of_50_ms(train, lanes):
    order = Order(np.full(SHARDS, PER_SHARD), 1, window=16, lanes=lanes, lane_block=BATCH // lanes)
    # The loader's own plan of a rank with 4 rows, without the rest of the loader.
    loader = TrainLoader.__new__(TrainLoader)
    loader._start, loader._global, loader._micro, loader._share = 0, BATCH, 4, 4
    loader._first_row, loader._order, loader._fetcher = 2048, order, None
    plan = loader._plan()
    next(plan)
    times = []
    for _ in range(5):
        begin = time.process_time()
        for _ in range(2000):
            next(plan)
        times.append((time.process_time() - begin) / 2000)
    assert np.median(times) < 0.5e-3


OPEN = """
import re, sys, time
from pathlib import Path
from data_pipeline.dataset import Dataset
begin = time.perf_counter()
dataset = Dataset.open(sys.argv[1], "train")
seconds = time.perf_counter() - begin
# The peak as the kernel counts it from the start of this program; getrusage would count the parent's before it.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(len(dataset), seconds, peak * 1024 / 1e9)
"""


@pytest.mark.slow
def test_an_index_of_14_million_samples_opens_within_10_seconds_and_1_gigabyte(tmp_path):
    n = SHARDS * PER_SHARD
    shards = []
    for number in range(SHARDS):
        stem = tmp_path / f"big-train-{number:06d}"
        for suffix, size in ((".tar", 2**30), (".idx", 1000)):
            with stem.with_suffix(suffix).open("wb") as out:
                out.truncate(size)
        tar, idx = (
            File(name=stem.with_suffix(s).name, bytes=b, sha256="0" * 64) for s, b in ((".tar", 2**30), (".idx", 1000))
        )
        shards.append(Shard(samples=PER_SHARD, tar=tar, idx=idx))
    table = tmp_path / "big-train.samples.npz"
    rng = np.random.default_rng(0)
    np.savez(
        table,
        label=rng.integers(0, 10_450, n, np.int32),
        shard=np.repeat(np.arange(SHARDS, dtype=np.int32), PER_SHARD),
        offset=np.tile(np.arange(PER_SHARD) * 100_000, SHARDS),
        length=np.full(n, 90_000, np.int32),
        width=np.full(n, 500, np.uint16),
        height=np.full(n, 375, np.uint16),
        crc32=rng.integers(0, 2**32, n, np.uint32),
    )
    split = Split(samples=n, class_counts=[0] * 10_450, shards=shards, table=file_of(table), rejected=[], built={})
    names = [f"n{i:08d}" for i in range(10_450)]
    Manifest(name="big", class_ids=names, class_names=names, splits={"train": split}).write(tmp_path)
    done = subprocess.run([sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, check=True)
    count, seconds, gigabytes = done.stdout.split()
    assert int(count) == n
    assert float(seconds) < 10
    assert float(gigabytes) < 1
