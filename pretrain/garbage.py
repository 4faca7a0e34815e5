"""Python's collector of cyclic garbage, kept out of the steps.

By default it runs whenever the number of new objects reaches a threshold. A full collection visits all that torch, DALI
and DeepSpeed made while they were loaded, half a million objects, for 0.2 s (measured); the rank that it hits lets all
others wait, each time another one.
"""

import gc


def keep_out_of_steps() -> None:
    """From now on collect only where `collect` is called, and only what was made since: all before it stays."""
    gc.collect()
    gc.freeze()
    gc.disable()


def collect() -> None:
    """Collect, where collecting was put into our hands."""
    if not gc.isenabled():
        gc.collect()


def let_it_run() -> None:
    """Leave it to Python again, with all that was frozen."""
    gc.unfreeze()
    gc.enable()
