"""Fourteen million samples, 1,024 ranks: the sizes that the pipeline is made for, simulated."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.loader import EvalLoader
from data_pipeline.manifest import File, Manifest, Shard, Split, file_of
from data_pipeline.order import Order

SHARDS, PER_SHARD = 1400, 10_000
RANKS, BATCH = 1024, 4096
PER_NODE = 8


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


def test_evaluation_puts_a_sample_in_the_same_row_of_the_same_batch_on_any_number_of_ranks():
    def batches(world):
        loader = EvalLoader.__new__(EvalLoader)
        loader._dataset = range(1000)
        found = {}
        for rank in range(world):
            loader._set_share(32, rank, world)
            for rows in loader._plan():
                found |= {int(i): rows.sample_ids.tolist() for i in rows.sample_ids[rows.valid]}
        return found

    assert batches(1) == batches(2) == batches(3) == batches(40)


def write_dataset(folder: Path) -> None:
    """A dataset whose table can be read: it has no shards."""
    count, rng, table = SHARDS * PER_SHARD, np.random.default_rng(0), folder / "big-train.samples.npz"
    np.savez(
        table, label=rng.integers(0, 10_450, count, np.int32),
        shard=np.repeat(np.arange(SHARDS, dtype=np.int32), PER_SHARD), offset=np.arange(count) * 100_000,
        length=np.full(count, 90_000, np.int32), width=np.full(count, 500, np.uint16),
        height=np.full(count, 375, np.uint16), crc32=rng.integers(0, 2**32, count, np.uint32),
    )  # fmt: skip
    file = File(name="big-train.tar", bytes=2**30, sha256="0" * 64)
    shards = [Shard(samples=PER_SHARD, tar=file, idx=file)] * SHARDS
    split = Split(samples=count, class_counts=[0] * 10_450, shards=shards, table=file_of(table), rejected=[], built={})
    names = [f"n{i:08d}" for i in range(10_450)]
    Manifest(name="big", class_ids=names, class_names=names, splits={"train": split}).write(folder)


OPEN = """
import re, sys
from pathlib import Path
from data_pipeline.dataset import Dataset
print(len(Dataset.open(sys.argv[1], "train", check_files=False)))
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_an_index_of_14_million_samples_opens_within_1_gigabyte(tmp_path):
    write_dataset(tmp_path)
    ended = subprocess.run([sys.executable, "-c", OPEN, str(tmp_path)], check=True, capture_output=True, text=True)
    samples, peak_kib = map(int, ended.stdout.split())
    assert samples == SHARDS * PER_SHARD
    assert peak_kib * 1024 < 10**9
