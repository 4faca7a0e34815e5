"""Worker processes that never outlive their parent."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from data_pipeline.errors import DataError

Advance = Callable[[float], None]
"""Called with how much more is done, for a progress bar."""
J = TypeVar("J")
R = TypeVar("R")
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
