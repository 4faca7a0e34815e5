"""Check a dataset: `python -m data_pipeline.verify DEST`.

Every file is read and compared with its size and checksum in dataset.json, which carries its own; every index must
belong to its shard, every row of the table must point at an image with its checksum and a label equal to its .cls
member, and the counts must add up. With --decode every image is decoded as well: it must be
usable as it is, and its size is compared.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from data_pipeline.acceptance import Rejected
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.in_place import ROW, row_of
from data_pipeline.manifest import FILE_NAME, INFO_NAME, File, Manifest, Shard, file_of, info_text
from data_pipeline.shards import index_text, samples_in
from data_pipeline.workers import run_all, workers_pool

_AGAIN = "copy it again or build the dataset again"


def verify(folder: Path, console: Console, *, workers: int, decode: bool) -> list[str]:
    """Return what is wrong with a dataset, a line each; an empty list when nothing is.

    Raises:
        DataError: dataset.json itself, a table or a file's size is not as it should be.
    """
    manifest = Manifest.read(folder)
    problems: list[str] = []
    check = partial(check_shard, folder=folder, decode=decode)
    if not _info_fits(folder, manifest):
        problems.append(f"{folder / INFO_NAME} is not as it was written; remove it or build the dataset again")
    with workers_pool(workers) as pool, Progress(console=console, disable=not console.is_terminal) as progress:
        for split, entry in manifest.splits.items():
            wrong = list(_check_file(folder, entry.table))
            if wrong:  # then its rows cannot be checked
                problems += wrong
                continue
            dataset = Dataset.open(folder, split)
            counts = np.bincount(dataset.labels, minlength=dataset.num_classes).tolist()
            if counts != entry.class_counts:
                problems.append(
                    f"{folder / FILE_NAME} does not count the classes of '{split}' as the table does; {_AGAIN}"
                )
            task = progress.add_task(split, total=len(entry.shards))
            for _, found in run_all(pool, check, _jobs(dataset), workers):
                problems += found
                progress.advance(task)
    return problems


def _info_fits(folder: Path, manifest: Manifest) -> bool:
    """Whether _info.json, which datasets of older versions and shards of others need not have, agrees."""
    path = folder / INFO_NAME
    in_place = any("in place" in str(split.built.get("source")) for split in manifest.splits.values())
    return in_place or not path.exists() or path.read_bytes() == info_text(manifest).encode()


def _jobs(dataset: Dataset) -> Iterator[tuple[Shard, NDArray[Any]]]:
    """Yield each shard with its rows of the table, (n,) of ROW."""
    columns = (dataset.labels, dataset.offset, dataset.length, dataset.crc32, dataset.width, dataset.height)
    ends = np.cumsum(dataset.shard_sizes).tolist()
    for record, end in zip(dataset.shards, ends, strict=True):
        yield record, np.rec.fromarrays([column[end - record.samples : end] for column in columns], dtype=ROW)


def check_shard(job: tuple[Shard, NDArray[Any]], folder: Path, *, decode: bool) -> list[str]:
    """Return what is wrong with one shard, its index and its rows of the table."""
    record, rows = job
    tar, idx = folder / record.tar.name, folder / record.idx.name
    problems = [line for file in (record.tar, record.idx) for line in _check_file(folder, file)]
    if problems:
        return problems
    try:
        samples = list(samples_in(tar))
    except DataError as error:
        return [str(error)]
    if index_text(samples) != idx.read_text():
        problems.append(f"{idx} is not the index of its shard; {_AGAIN}")
    at = {member.offset: sample for sample in samples for member in sample.members}
    with tar.open("rb") as stream:
        for row in rows:
            sample = at.get(int(row["offset"]))
            found = Rejected("no sample begins there") if sample is None else row_of(sample, stream, decode=decode)
            if isinstance(found, Rejected):
                wrong = [found.reason]
            else:
                pairs = [(name, value, row[name]) for name, value in zip(ROW.names or (), found, strict=False)]
                wrong = [
                    f"its {name} is {value}, in the table {there}" for name, value, there in pairs if there != value
                ]
            where = f"byte {row['offset']}" if sample is None else sample.key
            problems += [f"{tar}, {where}: {line}; {_AGAIN}" for line in wrong]
    return problems


def _check_file(folder: Path, file: File) -> Iterator[str]:
    try:
        if file_of(folder / file.name, file.name) != file:
            yield f"{folder / file.name} is not as it was written: its size or checksum differs; {_AGAIN}"
    except OSError as error:
        yield f"{folder / file.name} cannot be read ({error.strerror}); {_AGAIN}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when all is well, 1 with a line for each thing that is not."""
    parser = argparse.ArgumentParser(
        "python -m data_pipeline.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dest", metavar="DEST", type=Path, help="the dataset's folder")
    parser.add_argument("--decode", action="store_true", help="decode every image as well")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    args = parser.parse_args(arguments)
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        workers = args.workers or len(os.sched_getaffinity(0))
        problems = verify(args.dest, console, workers=workers, decode=args.decode)
        splits = Manifest.read(args.dest).splits
    except DataError as error:
        problems = [str(error)]
    for problem in problems:
        console.print(f"error: {problem}")
    if problems:
        return 1
    counts = ", ".join(
        f"{split}: {entry.samples} samples in {len(entry.shards)} shards" for split, entry in splits.items()
    )
    console.print(f"{args.dest} is intact ({counts}{', all decoded' if args.decode else ''})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
