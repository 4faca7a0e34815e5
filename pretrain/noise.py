"""What libraries print while they start: kept out of the log unless it is asked for. Their warnings are kept."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def start_up_noise(*, wanted: bool, first: bool) -> Iterator[None]:
    """Keep out what is printed within the block, such as DeepSpeed's reports of memory.

    Args:
        wanted: let everything through, and have DeepSpeed print more.
        first: on other ranks than the first, warnings are kept out too, since every rank has the same ones.
    """
    logger = logging.getLogger("DeepSpeed")
    if wanted:
        logger.setLevel(logging.INFO)
        for handler in logger.handlers:
            handler.setLevel(logging.INFO)
        yield
        return
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        if not first:
            warnings.simplefilter("ignore")
        logger.setLevel(logging.WARNING if first else logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(logging.WARNING)
