"""Builds that die; run by the tests as a process of its own, which imports everything once and builds in its children.

A child counts its changes of the disk: a file that is opened for writing, renamed or removed, a folder that is made or
removed. When it has counted enough it dies, before the change or within 3 ms after it.
"""

import io
import itertools
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import webdataset.writer  # noqa: F401  (here, not in each child)

from data_pipeline import units
from data_pipeline.build import main as build
from data_pipeline.sources.folder import ClassFolders
from data_pipeline.verify import main as verify

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def built(source: Path, dest: Path, death: int | None = None, later: float = 0.0) -> int:
    """Build in a child that dies at change `death`, or `later` seconds after it; return how it ended."""
    child = os.fork()
    if child == 0:
        counted = itertools.count()

        def watch(event: str, arguments: tuple) -> None:
            written = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
            if (written or event in CHANGES) and next(counted) == death:
                if not later:
                    os.kill(os.getpid(), signal.SIGKILL)
                signal.setitimer(signal.ITIMER_REAL, later)  # nobody handles its signal: as sudden as SIGKILL

        sys.addaudithook(watch)
        os._exit(build([str(source), str(dest), "--workers", "1"]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def deaths(source: Path, dest: Path, way: str) -> Iterator[int]:
    """Yield after each death, until a build is not killed any more."""
    chance = random.Random(7)
    for change in itertools.count():
        if way == "anywhere":
            ended = built(source, dest, change)
        else:
            ended = built(source, dest, chance.randint(5, 45), chance.choice([0, chance.uniform(1e-6, 3e-3)]))
        if ended == 0:
            return
        assert ended in {-signal.SIGKILL, -signal.SIGALRM}, ended
        yield change


def main() -> None:
    source, whole, dest, way = *map(Path, sys.argv[1:4]), sys.argv[4]
    units.UNIT_IMAGES, ClassFolders.shard_bytes = (4, 9_000) if way == "anywhere" else (7, 40_000)
    assert built(source, whole) == 0
    expected, kills = contents(whole), 0
    for change in deaths(source, dest, way):
        kills += 1
        if (dest / "dataset.json").exists():
            with redirect_stderr(io.StringIO()):
                assert verify([str(dest), "--workers", "1"]) == 0, change
        if way == "anywhere":
            assert built(source, dest) == 0, change
            assert contents(dest) == expected, change
            shutil.rmtree(dest)
    assert contents(dest) == expected
    print(kills)


if __name__ == "__main__":
    main()
