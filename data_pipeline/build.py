"""Build WebDataset shards: `python -m data_pipeline.build SOURCE DEST`.

Every picture is fully decoded once, normalised or rejected by the rules in `data_pipeline.normalise`, and put at a
random place among all the others. DEST holds the dataset when dataset.json names the split; until then everything
lies in DEST/.building-SPLIT, which needs as much room as the dataset itself. Killed or out of room, the same command
goes on where it stopped, and the result is the same, byte for byte.
"""

import argparse
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data_pipeline import assemble, normalise, units
from data_pipeline.errors import DataError
from data_pipeline.files import write_atomically
from data_pipeline.in_place import index_in_place
from data_pipeline.manifest import FILE_NAME, Manifest, Shard, Split, file_of
from data_pipeline.sources import Source, imagenet1k
from data_pipeline.sources.digits import Digits
from data_pipeline.sources.folder import Folder
from data_pipeline.sources.imagenet1k import ImageNet1k
from data_pipeline.sources.imagenet21k import ImageNet21k
from data_pipeline.workers import Advance, run_all, workers_pool

SHUFFLE_SEED = 0
TELL = 60.0
"""Seconds between lines that tell how far it is, where there is no terminal to draw a bar on."""
_SOURCES = """'digits'; a folder of class folders; a folder with the three ImageNet-1k archives; an ImageNet-21k
archive; or a quoted pattern of jpg + cls shards such as 'DEST/*.tar', which are indexed where they lie"""


@dataclass(frozen=True)
class Options:
    """What a person may choose."""

    workers: int
    max_side: int | None = None


def build(source: Source, dest: Path, options: Options, console: Console) -> Manifest:
    """Build all splits of a source into `dest` and return what the dataset holds.

    Raises:
        DataError: the source or the destination is not as it should be, or the disk is full.
    """
    try:
        dest.mkdir(parents=True, exist_ok=True)
        with _locked(dest):
            for split in source.splits:
                _build_split(source, split, dest, options, console)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"no space left for {dest}; building needs twice the size of the dataset for a while. "
                "Make room and run the same command again: it goes on from here"
            ) from None
        raise DataError(f"{error.filename or dest}: {error.strerror}; mend it and run the same command again") from None
    return Manifest.read(dest)


def _build_split(source: Source, split: str, dest: Path, options: Options, console: Console) -> None:
    built = source.describe() | {
        "shuffle_seed": SHUFFLE_SEED, "max_side": options.max_side, "shard_bytes": source.shard_bytes,
        "jpeg_quality": normalise.QUALITY, "pillow": PIL.__version__,
    }  # fmt: skip
    manifest = Manifest.read(dest) if (dest / FILE_NAME).exists() else None
    scratch = dest / f".building-{split}"
    if manifest is not None and split in manifest.splits:
        if manifest.splits[split].built != built:
            raise DataError(f"{dest} already holds a split '{split}' that was built otherwise; name another folder")
        shutil.rmtree(scratch, ignore_errors=True)
        console.print(f"{dest}: split '{split}' is complete ({manifest.splits[split].samples} samples); nothing to do")
        return
    prefix = f"{re.sub(r'[^A-Za-z0-9_-]', '_', dest.resolve().name)}-{split}"
    _prepare(scratch, dest, prefix, built, console)
    with _progress(console) as progress, workers_pool(options.workers) as pool:
        task = progress.add_task(f"{split}: decode", total=source.count(split))
        jobs = units.cut(source.pictures(split), scratch, SHUFFLE_SEED, options.max_side)
        made = _units(jobs, pool, options.workers, _Told(progress, task))
        if not made:
            raise DataError(f"split '{split}' of the source has no pictures; check what SOURCE names")
        class_ids, class_names = _classes(source, manifest, made)
        table_units = [path for path in made if _pictures_in(path)]
        if not table_units:
            first = assemble.rejects(made)[0]
            raise DataError(f"no picture of split '{split}' can be used; the first, {first.name}: {first.reason}")
        table = assemble.merge(made, class_ids, source.shard_bytes)
        task = progress.add_task(f"{split}: write shards", total=len(table.label))
        jobs_left = assemble.shard_jobs(table, scratch, scratch, prefix)
        shards = _shards(jobs_left, pool, options.workers, _Told(progress, task))
    assemble.publish(shards, scratch, dest, prefix)
    table_path = dest / f"{prefix}.samples.npz"
    table.save(table_path)
    rejected = assemble.rejects(made)
    counts = np.bincount(table.label, minlength=len(class_ids)).tolist()
    entry = Split(
        samples=len(table.label),
        class_counts=counts,
        shards=shards,
        table=file_of(table_path),
        rejected=rejected,
        built=built,
    )
    splits = (manifest.splits if manifest is not None else {}) | {split: entry}
    Manifest(name=dest.resolve().name, class_ids=class_ids, class_names=class_names, splits=splits).write(dest)
    shutil.rmtree(scratch)
    left_out = f", {len(rejected)} rejected (listed in {FILE_NAME})" if rejected else ""
    console.print(f"{dest}: split '{split}': {entry.samples} samples in {len(shards)} shards{left_out}")


def _prepare(scratch: Path, dest: Path, prefix: str, built: dict[str, Any], console: Console) -> None:
    """Make the scratch folder, or find the one of an interrupted build of the same thing."""
    plan = scratch / "plan.json"
    text = json.dumps(built, sort_keys=True).encode()
    if scratch.exists() and not (plan.exists() and plan.read_bytes() == text):
        console.print(f"{scratch} is of another source, other options or another version: starting anew")
        for record in scratch.glob(f"{prefix}-*.json"):  # shards of that build which were already in their place
            for suffix in (".tar", ".idx"):
                (dest / record.name).with_suffix(suffix).unlink(missing_ok=True)
        shutil.rmtree(scratch)
    if not scratch.exists():
        strangers = assemble.shards_in(dest, prefix)
        if strangers:
            raise DataError(f"{strangers[0]} exists but belongs to no dataset built here; name another folder")
        scratch.mkdir()
        write_atomically(plan, text)
    elif any(scratch.glob("unit-*.npz")):
        console.print(f"{dest}: going on with an interrupted build")


def _units(jobs: Iterable[units.Job], pool: Executor, workers: int, advance: Advance) -> list[Path]:
    """Make the units that an earlier build has not made, and return them all."""

    def missing() -> Iterator[units.Job]:
        for job in jobs:
            paths.append(job.path)
            if job.complete():
                advance(len(job.pictures))
            else:
                yield job

    paths: list[Path] = []
    for job, _ in run_all(pool, units.make, missing(), workers):
        advance(len(job.pictures))
    return paths


def _shards(jobs: Iterable[assemble.ShardJob], pool: Executor, workers: int, advance: Advance) -> list[Shard]:
    """Write the shards that an earlier build has not written, and return them all."""

    def missing() -> Iterator[assemble.ShardJob]:
        for job in jobs:
            known = assemble.written(job)
            if known is None:
                yield job
            else:
                records[job.stem] = known
                advance(known.samples)

    records: dict[Path, Shard] = {}
    for job, shard in run_all(pool, assemble.write, missing(), workers):
        records[job.stem] = shard
        advance(shard.samples)
    return [records[stem] for stem in sorted(records)]


def _pictures_in(unit: Path) -> int:
    with np.load(unit) as table:
        return len(table["key"])


def _classes(source: Source, manifest: Manifest | None, made: list[Path]) -> tuple[list[str], list[str]]:
    """Decide the labels: those of the dataset when it has some, else those the source states, else the sorted ids."""
    found = assemble.classes_of(made)
    stated = source.class_names() or {class_id: class_id for class_id in sorted(found)}
    if manifest is not None:
        known = dict(zip(manifest.class_ids, manifest.class_names, strict=True))
        strange = sorted((found | set(stated)) - known.keys())
        if strange:
            raise DataError(
                f"class '{strange[0]}' is not among the classes of the dataset; build both splits of one source"
            )
        stated = known
    missing = sorted(found - stated.keys())
    if missing:
        raise DataError(f"class '{missing[0]}' is not in the source's list of classes; complete the list")
    return list(stated), list(stated.values())


@contextmanager
def _locked(dest: Path) -> Iterator[None]:
    """Keep a second build out of the same folder; the lock goes with the process, however it ends."""
    with (dest / ".building.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # the other has just ended and removed what we opened
                raise BlockingIOError
        except BlockingIOError:
            raise DataError(f"another build is writing to {dest}; wait for it, or name another folder") from None
        try:
            yield
        finally:
            (dest / ".building.lock").unlink()


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


class _Told:
    """Advances a bar; in a batch job's log, a line now and then."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, progress.tasks[task]
        self._silent_since = time.monotonic()

    def __call__(self, done: float) -> None:
        self._progress.advance(self._task.id, done)
        if not self._progress.disable or time.monotonic() - self._silent_since < TELL:
            return
        self._silent_since = time.monotonic()
        task = self._task
        total = "" if task.total is None else f" of {task.total:.0f}"
        left = "" if task.time_remaining is None else f", {timedelta(seconds=round(task.time_remaining))} left"
        self._progress.console.print(f"{task.description}: {task.completed:.0f}{total}{left}", highlight=False)


def source_named(name: str, split: str | None, classes: Path | None) -> Source:
    """Find out what SOURCE is; DataError when it is nothing we know."""
    path = Path(name)
    if path.is_file():
        source: Source = ImageNet21k(path, None if classes is None else _lines(classes))
    elif (path / imagenet1k.TRAIN).exists():
        source = ImageNet1k(path)
    elif path.is_dir():
        return Folder(path, split or "train")
    elif name == "digits":
        source = Digits()
    else:
        raise DataError(f"{name} is not 'digits', a folder, an archive or a pattern of shards; check the path")
    if split is not None:
        raise DataError(f"{name} comes with its own splits ({', '.join(source.splits)}); leave --split out")
    return source


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a list of WordNet ids, one a line") from None


def _adopt(pattern: str, dest: Path, split: str, workers: int, console: Console) -> None:
    """Index shards where they lie."""
    paths = sorted(Path(path) for path in glob.glob(pattern))  # noqa: PTH207  (the pattern may be absolute)
    if not paths:
        raise DataError(f"no file matches {pattern}; quote the pattern and check the path")
    if any(path.parent.resolve() != dest.resolve() for path in paths):
        raise DataError(f"shards are indexed where they lie; name {paths[0].parent} as DEST")
    with _locked(dest), _progress(console) as progress, workers_pool(workers) as pool:
        task = progress.add_task(f"{split}: index", total=len(paths))
        entry = index_in_place(paths, dest, split, pool, _Told(progress, task))
    left_out = f", {len(entry.rejected)} left out (listed in {FILE_NAME})" if entry.rejected else ""
    console.print(
        f"{dest}: split '{split}': {entry.samples} samples in {len(paths)} shards, indexed in place{left_out}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when the dataset is complete, 1 with one line when it cannot be built."""
    parser = argparse.ArgumentParser(
        "python -m data_pipeline.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help=_SOURCES)
    parser.add_argument("dest", metavar="DEST", type=Path, help="the dataset's folder")
    parser.add_argument(
        "--split", help="name of the split that a folder or a pattern of shards becomes (default: train)"
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="WordNet ids to take from ImageNet-21k, one a line"
    )
    parser.add_argument("--max-side", type=int, metavar="PIXELS", help="shrink pictures whose longer side is longer")
    parser.add_argument("--workers", type=int, help="processes (default: as many as cores)")
    args = parser.parse_args(arguments)
    console = Console(stderr=True, soft_wrap=True)
    workers = max(1, args.workers or len(os.sched_getaffinity(0)))
    try:
        if args.split is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", args.split):
            raise DataError(f"--split {args.split!r} becomes a part of file names; use letters, digits, - and _")
        if any(c in args.source for c in "*?["):
            _adopt(args.source, args.dest, args.split or "train", workers, console)
        else:
            source = source_named(args.source, args.split, args.classes)
            build(source, args.dest, Options(workers, args.max_side), console)
    except DataError as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
