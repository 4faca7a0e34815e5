"""Worker processes that never outlive their parent, and work that an interrupted build need not do again."""

import ctypes
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel

from data_pipeline.errors import DataError
from data_pipeline.files import write_atomically

Advance = Callable[[float], None]
"""Called with how much more is done, for a progress bar."""
J = TypeVar("J")
R = TypeVar("R")
M = TypeVar("M", bound=BaseModel)
_PR_SET_PDEATHSIG = 1


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the work in order


def run_all(pool: Executor | None, function: Callable[[J], R], jobs: Iterable[J], ahead: int) -> Iterator[tuple[J, R]]:
    """Yield each job with its result, as they are done; at most `ahead` wait, so that a fast source fills no memory."""
    if pool is None:
        yield from ((job, function(job)) for job in jobs)
        return
    running: dict[Future[R], J] = {}

    def finished() -> Iterator[tuple[J, R]]:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield running.pop(future), future.result()

    for job in jobs:
        running[pool.submit(function, job)] = job
        while len(running) > ahead:
            yield from finished()
    while running:
        yield from finished()


@contextmanager
def workers_pool(count: int) -> Iterator[Executor | None]:
    """Give an executor of `count` processes, None for one; on the way out, what has not begun is dropped."""
    if count == 1:
        yield None
        return
    # spawn: forking a process that has threads (progress bar, numpy) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_die_with_parent, initargs=(os.getpid(),))
    try:
        yield pool
    except BrokenProcessPool:
        raise DataError("a worker process was killed, perhaps out of memory; run again with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Job(Generic[M]):
    """A part of a build, with a record next to its files that is written last."""

    path: Path
    """Of its files, but for their extensions."""
    count: int
    """How many images it is about."""
    digest: str
    """Identifies those images."""
    make: Callable[[], M]
    """Writes the files, and returns what is to be recorded of them."""
    result: type[M]

    def done(self) -> M | None:
        """Return the result if an earlier build has made it, of the same images."""
        record = self.path.with_suffix(".json")
        content = json.loads(record.read_bytes()) if record.exists() else {}
        return self.result.model_validate(content["result"]) if content.get("digest") == self.digest else None

    def run(self) -> M:
        """Write the files and then the record, whose presence means that they are complete."""
        record = self.path.with_suffix(".json")
        record.unlink(missing_ok=True)  # an older one is of other images
        result = self.make()
        write_atomically(record, json.dumps({"digest": self.digest, "result": result.model_dump()}).encode())
        return result


def run_missing(pool: Executor | None, jobs: Iterable[Job[M]], ahead: int, advance: Advance) -> dict[Path, M]:
    """Run the jobs that an earlier build has not done, and return the results of all, in the order of the jobs."""
    results: dict[Path, M | None] = {}

    def missing() -> Iterator[Job[M]]:
        for job in jobs:
            results[job.path] = job.done()
            if results[job.path] is None:
                yield job
            else:
                advance(job.count)

    for job, result in run_all(pool, Job.run, missing(), ahead):
        results[job.path] = result
        advance(job.count)
    return {path: result for path, result in results.items() if result is not None}
