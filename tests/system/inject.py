"""``pretrain/main.py`` with faults or witnesses, which the first arguments name.

- ``nan=9-11,15``: the loss of these steps is NaN on the last rank
- ``raise=7``: the last rank fails in this step
- ``stop=7``: the last rank hangs in this step
- ``kill=7``, ``terminate=7``: the last rank gets SIGKILL, or SIGTERM, in this step
- ``hold=7``: from this step on every rank waits until it is asked to stop, so that the run is not over before
- ``digests=FOLDER``: every rank writes a line for each row of the global batches that it trains on
"""

import hashlib
import itertools
import os
import signal
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch.distributed as dist  # noqa: E402

from pretrain import losses, main  # noqa: E402
from pretrain.fault_tolerance.signals import StopFlag, watch_launcher  # noqa: E402

local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
told = dict(word.split("=", 1) for word in itertools.takewhile(lambda word: not word.startswith("--"), words))
arguments = words[len(told) :]
SIGNALS = {"stop": signal.SIGSTOP, "kill": signal.SIGKILL, "terminate": signal.SIGTERM}
original = losses.TrainingLoss.__call__
flag = StopFlag()


def hits(kind, step):
    """Whether this is the last rank, and this one of the steps that it is told."""
    spans = [span.split("-") for span in told.get(kind, "").split(",") if span]
    last = dist.get_rank() == dist.get_world_size() - 1
    return last and any(int(span[0]) <= step <= int(span[-1]) for span in spans)


def instructed(compute, batch, state):
    step = state.step + 1
    if "digests" in told:
        with (Path(told["digests"]) / f"{dist.get_world_size()}-{dist.get_rank()}.txt").open("a") as lines:
            for row, image, label in zip(batch.rows, batch.images, batch.labels, strict=True):
                digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                lines.write(f"{step} {row} {label} {digest}\n")
    while "hold" in told and step >= int(told["hold"]) and not flag:
        time.sleep(0.01)
    for kind, signum in SIGNALS.items():
        if hits(kind, step):
            os.kill(os.getpid(), signum)
    if hits("raise", step):
        raise RuntimeError("an injected fault")
    loss, parts = original(compute, batch, state)
    return (loss * float("nan") if hits("nan", step) else loss), parts


losses.TrainingLoss.__call__ = instructed
watch_launcher(flag)
sys.exit(main.main(flag, arguments))
