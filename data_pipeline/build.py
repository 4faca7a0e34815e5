"""Build WebDataset shards: `python -m data_pipeline.build SOURCE DEST`.

Every image is fully decoded once; it is kept, encoded again or left out by the rule in `data_pipeline.acceptance`, and
written at a random position. What is left out is listed in dataset.json with its reason. The dataset is complete when
dataset.json names the split; until then its files are in DEST/.building-SPLIT, which needs as much space as the dataset
itself. Killed or out of space, the same command resumes where it stopped, and the result is the same, byte for byte.

Exit status: 0 when the dataset is complete, 2 when SOURCE, DEST or an option is wrong, 1 when the same command may
succeed later.

  python -m data_pipeline.build photos data/photos --val-fraction 0.1         class folders; a tenth becomes val
  python -m data_pipeline.build downloads/imagenet data/imagenet-1k           the three archives of ImageNet-1k
  python -m data_pipeline.build 'shards/*.tar' data/mine                      WebDataset shards, converted
  python -m data_pipeline.build 'shards/*.tar' shards                         the same, used in place
  python -m data_pipeline.build train='a/*.tar' val='b/*.tar' --index data/x  the same, the index elsewhere
"""

import argparse
import errno
import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID

from data_pipeline import acceptance, assemble, units
from data_pipeline.errors import DataError, StorageError, printable
from data_pipeline.files import write_atomically
from data_pipeline.in_place import index_in_place
from data_pipeline.manifest import FILE_NAME, Manifest, publish
from data_pipeline.sources import Source
from data_pipeline.sources.find import Wanted, find_source, read_classes
from data_pipeline.sources.shards import Shards
from data_pipeline.workers import Advance, run_missing, workers_pool

LOG_EVERY_S = 60.0
"""Seconds between lines with the progress, where there is no terminal to draw a bar on."""
_SHOWN, _LONGEST_NAME = 5, 100
_RECORDS = 2
"""Version of what is in the scratch folder."""
_SOURCES = """'digits'; a folder of class folders, or with one of these per split; a folder with the three
ImageNet-1k archives; an ImageNet-21k archive, or an archive of class folders; a folder with IDX files, such as MNIST;
WebDataset shards: a folder, a quoted pattern such as 'SHARDS/train-{0000..0146}.tar', or several SPLIT=PATTERN"""


def _build_split(
    source: Source, split: str, dest: Path, console: Console, *, workers: int, max_side: int | None
) -> None:
    built = source.described | {
        "shuffle_seed": units.SHUFFLE_SEED, "max_side": max_side, "shard_bytes": source.shard_bytes,
        "jpeg_quality": acceptance.QUALITY, "pillow": PIL.__version__,
    }  # fmt: skip
    manifest = Manifest.read(dest) if (dest / FILE_NAME).exists() else None
    scratch = dest / f".building-{split}"
    if manifest is not None and split in manifest.splits:
        if manifest.splits[split].built != built:
            raise DataError(f"{dest} already holds a split '{split}' built with other options; choose another DEST")
        shutil.rmtree(scratch, ignore_errors=True)
        console.print(f"{dest}: split '{split}' is complete ({manifest.splits[split].samples} samples); nothing to do")
        return
    prefix = f"{re.sub(r'[^A-Za-z0-9_-]', '_', dest.resolve().name)}-{split}"
    _prepare(scratch, dest, prefix, built, console)
    with _left_for_the_next_build(scratch), _Progress(console) as progress, workers_pool(workers) as pool:
        report = progress.begin(f"{split}: decode", source.counts.get(split))
        made = run_missing(pool, units.cut(source.images(split), scratch, max_side), workers, report)
        if not made and split == source.splits[0]:
            raise DataError(f"split '{split}' of the source has no images; check what SOURCE names")
        if not made:
            shutil.rmtree(scratch)
            console.print(f"{dest}: warning: the source has no images for a split '{split}'; it is not built")
            return
        rejected = [reject for unit in made.values() for reject in unit.rejected]
        if not any(unit.images for unit in made.values()):
            first = rejected[0]
            raise DataError(f"no image of split '{split}' can be used; the first, {first.name}: {first.reason}")
        classes = _classes(source, manifest, {name for unit in made.values() for name in unit.class_ids})
        table = assemble.merge(made, list(classes), source.shard_bytes)
        report = progress.begin(f"{split}: write shards", len(table["label"]))
        written = run_missing(pool, assemble.shard_jobs(table, scratch, prefix), workers, report)
        shards = list(written.values())
    assemble.publish(shards, scratch, dest, prefix)
    path = dest / f"{prefix}.samples.npz"
    complete = assemble.with_split(
        manifest, split, path, table, classes=classes, shards=shards, rejected=rejected, built=built
    )
    publish(complete, dest)
    shutil.rmtree(scratch)
    print_summary(console, dest, complete, split)


def print_summary(console: Console, dest: Path, manifest: Manifest, split: str) -> None:
    """Print the size of a split, its classes, and what was left out."""
    entry = manifest.splits[split]
    counts = np.array(entry.class_counts)
    present = counts[counts > 0]
    say = partial(console.print, f"{dest}: split '{split}':")
    say(
        f"{entry.samples} samples in {len(entry.shards)} shards; {len(present)} classes with {present.min()} to "
        f"{present.max()} images (median {np.median(present):g})"
    )
    empty = [manifest.class_names[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        names = ", ".join(empty[:_SHOWN]) + (", ..." if len(empty) > _SHOWN else "")
        say(f"warning: {len(empty)} of {len(counts)} classes have no images: {names}")
    if entry.rejected:
        reasons = Counter(re.split(r"[:(]", reject.reason)[0].strip() for reject in entry.rejected)
        kinds = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(_SHOWN))
        say(f"{len(entry.rejected)} left out (all are listed in {FILE_NAME}): {kinds}")
        for reject in entry.rejected[:_SHOWN]:
            console.print(f"  left out: {reject.name}: {reject.reason}")


@contextmanager
def _left_for_the_next_build(scratch: Path) -> Iterator[None]:
    """Remove the scratch folder of a build that was refused, unless much was made from which to resume."""
    try:
        yield
    except DataError as error:
        if not isinstance(error, StorageError) and len(list(scratch.glob("unit-*.npz"))) <= 1:
            shutil.rmtree(scratch)
        raise


def _prepare(scratch: Path, dest: Path, prefix: str, built: dict[str, Any], console: Console) -> None:
    """Make the scratch folder, or find the one of an interrupted build of the same thing."""
    plan = scratch / "plan.json"
    text = json.dumps({**built, "records": _RECORDS}, sort_keys=True).encode()
    if scratch.exists() and not (plan.exists() and plan.read_bytes() == text):
        console.print(f"{scratch} is of another source, other options or another version: starting anew")
        for record in scratch.glob(f"{prefix}-*.json"):  # shards of that build which were already in their place
            for suffix in (".tar", ".idx"):
                (dest / record.name).with_suffix(suffix).unlink(missing_ok=True)
        shutil.rmtree(scratch)
    if not scratch.exists():
        foreign = assemble.shards_in(dest, prefix)
        if foreign:
            raise DataError(f"{foreign[0]} exists but belongs to no dataset built here; choose another DEST")
        scratch.mkdir()
        write_atomically(plan, text)
    elif any(scratch.glob("unit-*.npz")):
        console.print(f"{dest}: resuming an interrupted build")


def _classes(source: Source, manifest: Manifest | None, found: set[str]) -> dict[str, str]:
    """Decide the labels: those of the dataset when it has some, else those the source states, else the sorted ids."""
    stated = source.class_names(found)
    known = stated if manifest is None else dict(zip(manifest.class_ids, manifest.class_names, strict=True))
    renamed = next((name for class_id, name in stated.items() if known.get(class_id, name) != name), None)
    if renamed is not None:
        raise DataError(f"class '{renamed}' has another label in the dataset; give the classes in the same order")
    strange = sorted((found | set(stated)) - known.keys())
    if strange:
        owner = "source's list of classes" if manifest is None else "classes of the dataset"
        raise DataError(
            f"class '{strange[0]}' is not among the {owner}; complete them, or build all splits of a source"
        )
    return known


@contextmanager
def _locked(dest: Path) -> Iterator[None]:
    """Make the dataset's folder, and keep a second build out of it; the lock goes with the process, however it ends."""
    if len(os.fsencode(dest.resolve().name)) > _LONGEST_NAME or printable(str(dest.resolve())) != str(dest.resolve()):
        raise DataError(f"{dest} names shards, for which it must be UTF-8 of at most {_LONGEST_NAME} bytes; shorten it")
    try:
        dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{dest} cannot be created ({error.strerror}); choose another DEST") from None
    with (dest / ".building.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # the other has just ended and removed what we opened
                raise BlockingIOError
        except BlockingIOError:
            raise StorageError(f"another build is writing to {dest}; wait for it, or name another folder") from None
        try:
            yield
        finally:
            (dest / ".building.lock").unlink()


class _Progress(Progress):
    """A bar for each task; in a batch job's log, a line now and then."""

    def __init__(self, console: Console) -> None:
        columns = (*self.get_default_columns(), MofNCompleteColumn())
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._silent_since = time.monotonic()

    def begin(self, description: str, total: int | None) -> Advance:
        """Add a task, and return what is called with how much more of it is done."""
        return partial(self.advance, self.add_task(description, total=total))

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task."""
        super().advance(task_id, advance)
        if not self.disable or time.monotonic() - self._silent_since < LOG_EVERY_S:
            return
        self._silent_since = time.monotonic()
        task = self._tasks[task_id]
        total = "" if task.total is None else f" of {task.total:.0f}"
        left = "" if task.time_remaining is None else f", {timedelta(seconds=round(task.time_remaining))} left"
        self.console.print(f"{task.description}: {task.completed:.0f}{total}{left}")


def _run(args: argparse.Namespace, console: Console) -> None:
    """Build or index what the arguments name.

    Raises:
        DataError: the source, the destination or an option is not as it should be.
        StorageError: the disk is full, or something else that may pass.
    """
    *names, place = args.paths if args.index is None else [*args.paths, args.index]
    if not names or not place or "" in names:
        raise DataError("name SOURCE and DEST; see python -m data_pipeline.build --help")
    dest = Path(place)
    if args.max_side is not None and args.max_side < 1:
        raise DataError(f"--max-side is a number of pixels, but is {args.max_side}")
    if args.split is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", args.split):
        raise DataError(f"--split {args.split[:40]!r} becomes a part of file names; use few letters, digits, - and _")
    if not 0 <= args.val_fraction < 1:
        raise DataError(f"--val-fraction is a share of each class, such as 0.1, but is {args.val_fraction}")
    workers = max(1, args.workers or len(os.sched_getaffinity(0)))
    classes = [] if args.classes is None else read_classes(args.classes)
    source = find_source(Wanted(names, args.split, classes, args.label_key, args.val_fraction))
    in_place = args.index is not None
    if isinstance(source, Shards):
        folders = {path.parent.resolve() for paths in source.paths.values() for path in paths}
        in_place = in_place or all(folder.is_relative_to(dest.resolve()) for folder in folders)
        if in_place and (classes or args.label_key is not None or args.max_side is not None):
            raise DataError("shards in place stay as they are: leave out --classes, --label-key and --max-side")
    elif in_place:
        raise DataError("--index goes with plain WebDataset shards only; name DEST in its place")
    elif Path(names[0]).is_dir() and dest.resolve().is_relative_to(Path(names[0]).resolve()):
        raise DataError(f"{dest} is inside {names[0]}, which is read; name another DEST")
    try:
        with _locked(dest):
            if in_place and isinstance(source, Shards):
                with _Progress(console) as progress, workers_pool(workers) as pool:
                    report = progress.begin("index", sum(map(len, source.paths.values())))
                    made = index_in_place(source, dest, pool, report, beside=args.index is None)
                for split in made:
                    print_summary(console, dest, Manifest.read(dest), split)
                for split in source.splits if not made else ():
                    console.print(f"{dest}: split '{split}' is complete; nothing to do")
                return
            for split in source.splits:
                _build_split(source, split, dest, console, workers=workers, max_side=args.max_side)
    except DataError:
        with suppress(OSError):
            dest.rmdir()  # if nothing is in it
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC and not in_place:
            raise StorageError(
                f"no space left for {dest}; building needs twice the size of the dataset for a while. "
                "Free space and run the same command again: it resumes from here"
            ) from None
        where = f"{error.filename or dest}: {error.strerror}"
        if in_place:
            elsewhere = ", or write the index elsewhere: --index FOLDER" if args.index is None else ""
            raise DataError(f"{where}; fix it{elsewhere}") from None
        raise StorageError(f"{where}; fix it and run the same command again") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when the dataset is complete, 2 or 1 with one line when it cannot be built."""
    parser = argparse.ArgumentParser(
        "python -m data_pipeline.build", usage="%(prog)s SOURCE [SOURCE ...] DEST [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("paths", metavar="SOURCE, DEST", nargs="+", help=f"{_SOURCES}; last, the dataset's folder")
    parser.add_argument("--split", help="name of the split that a folder or shards become (default: by their names)")
    parser.add_argument(
        "--val-fraction", type=float, default=0.0, metavar="SHARE",
        help="share of each class of a folder, or of IDX files' training images, that becomes the val split, always "
        "the same images; the test images of IDX files become the test split then",
    )  # fmt: skip
    parser.add_argument(
        "--classes", type=Path, metavar="FILE",
        help="WordNet ids to take from ImageNet-21k, or the names of the classes of shards in the order of their "
        "labels, one a line",
    )  # fmt: skip
    parser.add_argument("--label-key", metavar="KEY", help="field of the json members of shards that holds the label")
    parser.add_argument("--index", metavar="DEST", help="use shards in place, and write the dataset's index here")
    parser.add_argument("--max-side", type=int, metavar="PIXELS", help="shrink images whose longer side exceeds this")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    args = parser.parse_args(arguments)
    console = Console(stderr=True, soft_wrap=True, markup=False)
    try:
        _run(args, console)
    except DataError as error:
        console.print(f"error: {error}")
        return 1 if isinstance(error, StorageError) else 2
    except KeyboardInterrupt:
        console.print("interrupted; the same command resumes the build")
        return 1
    except OSError as error:  # of a path that cannot even be looked at
        console.print(f"error: {printable(str(error.filename))[:200]}: {error.strerror}; check the path")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
