"""What 14 million samples cost a rank: opening their index before the first batch, and their order in every batch.

    python -m benchmarks.index

The dataset is synthetic: 1,400 sparse files that hold nothing but the first and last header, and a real table. The rank
is one of 1,024 with 4 rows each of a global batch of 4,096.
"""

import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from data_pipeline.loader import TrainLoader
from data_pipeline.manifest import File, Manifest, Shard, Split, file_of
from data_pipeline.order import Order
from data_pipeline.shards import BLOCK

SHARDS, PER_SHARD = 1400, 10_000
RANKS, BATCH = 1024, 4096
STEP = 0.05
"""Seconds of a fast step of training."""
_TAR, _IDX, _JPEG, _APART = 2**30, 1000, 90_000, 100_000

_OPEN = """
import re, sys, time
from pathlib import Path
from data_pipeline.dataset import Dataset
begin, cpu = time.perf_counter(), time.process_time()
dataset = Dataset.open(sys.argv[1], "train")
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
# The peak as the kernel counts it from the start of this program; getrusage would count the parent's before it.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(len(dataset), seconds, cpu, peak * 1024 / 1e9)
"""


def write_dataset(folder: Path) -> None:
    """Write a dataset of SHARDS x PER_SHARD samples that can be opened, in 500 MB."""
    header = tarfile.TarInfo("sample.jpg")
    header.size = _JPEG
    offsets = BLOCK + np.arange(PER_SHARD) * _APART
    shards = []
    for number in range(SHARDS):
        stem = folder / f"big-train-{number:06d}"
        for suffix, size in ((".tar", _TAR), (".idx", _IDX)):
            with stem.with_suffix(suffix).open("wb") as out:
                out.truncate(size)
                for offset in (offsets[0], offsets[-1]) if suffix == ".tar" else ():
                    out.seek(int(offset) - BLOCK)
                    out.write(header.tobuf(tarfile.USTAR_FORMAT))
        tar = File(name=f"{stem.name}.tar", bytes=_TAR, sha256="0" * 64)
        idx = File(name=f"{stem.name}.idx", bytes=_IDX, sha256="0" * 64)
        shards.append(Shard(samples=PER_SHARD, tar=tar, idx=idx))
    n = SHARDS * PER_SHARD
    rng = np.random.default_rng(0)
    table = folder / "big-train.samples.npz"
    np.savez(
        table,
        label=rng.integers(0, 10_450, n, np.int32),
        shard=np.repeat(np.arange(SHARDS, dtype=np.int32), PER_SHARD),
        offset=np.tile(offsets, SHARDS),
        length=np.full(n, _JPEG, np.int32),
        width=np.full(n, 500, np.uint16),
        height=np.full(n, 375, np.uint16),
        crc32=rng.integers(0, 2**32, n, np.uint32),
    )
    split = Split(samples=n, class_counts=[0] * 10_450, shards=shards, table=file_of(table), rejected=[], built={})
    names = [f"n{i:08d}" for i in range(10_450)]
    Manifest(name="big", class_ids=names, class_names=names, splits={"train": split}).write(folder)


class Opened(NamedTuple):
    """What a process paid that opened the dataset; its peak of memory in 10^9 bytes."""

    samples: float
    seconds: float
    cpu_seconds: float
    gigabytes: float


def opened(folder: Path) -> Opened:
    """Open the dataset in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _OPEN, str(folder)], check=True, capture_output=True, text=True)
    return Opened(*map(float, done.stdout.split()))


def planned(lanes: int, rounds: int = 5, batches: int = 2000) -> float:
    """Return the CPU seconds that the order of a batch costs a rank, the median of some rounds."""
    order = Order(np.full(SHARDS, PER_SHARD), 1, window=16, lanes=lanes, lane_block=BATCH // lanes)
    # The loader's own plan, without the rest of the loader.
    loader = TrainLoader.__new__(TrainLoader)
    share = BATCH // RANKS
    facts = {"start": 0, "global": BATCH, "micro": share, "share": share, "order": order, "fetcher": None}
    for name, value in (facts | {"first_row": BATCH // 2}).items():
        setattr(loader, f"_{name}", value)
    plan = loader._plan()  # noqa: SLF001
    next(plan)
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        for _ in range(batches):
            next(plan)
        times.append((time.process_time() - begin) / batches)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    console = Console(soft_wrap=True)
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, {model[1] if model else 'CPU unknown'}, {SHARDS * PER_SHARD:,} samples"
    )
    with tempfile.TemporaryDirectory() as scratch:
        write_dataset(Path(scratch))
        found = [opened(Path(scratch)) for _ in range(5)]
    _, seconds, cpu, gigabytes = (statistics.median(values) for values in zip(*found, strict=True))
    console.print("| | median of 5 |")
    console.print("|---|---|")
    console.print(f"| opening the index | {seconds:.2f} s, {cpu:.2f} s of CPU |")
    console.print(f"| peak memory of the process that opened it | {gigabytes:.2f} GB |")
    for lanes in (1, 128):
        cost = planned(lanes)
        share = f"{100 * cost / STEP:.3f} % of a step of {1000 * STEP:.0f} ms"
        console.print(f"| order of a batch, {lanes} lanes | {1e6 * cost:.1f} us of CPU, {share} |")


if __name__ == "__main__":
    main()
