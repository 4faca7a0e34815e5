"""``pretrain/main.py`` with a fault or a witness, which the first argument names.

- ``nan=9-11,15``: the loss of these steps is NaN on the last rank
- ``raise=7``: the last rank fails in this step
- ``digests=FOLDER``: every rank writes a line for each row of the global batches that it trains on
"""

import hashlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch.distributed as dist  # noqa: E402

from pretrain import main, train  # noqa: E402
from pretrain.survival.signals import StopFlag, watch_launcher  # noqa: E402

local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
instruction, *arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
kind, _, value = instruction.partition("=")
spans = [span.split("-") for span in value.split(",")] if kind != "digests" else []
steps = {step for span in spans for step in range(int(span[0]), int(span[-1]) + 1)}
original = train.micro_batch_loss


def instructed(run, batch):
    step = run.progress.step + 1
    if kind == "digests":
        with (Path(value) / f"{dist.get_world_size()}-{dist.get_rank()}.txt").open("a") as lines:
            for row, image, label in zip(batch.rows, batch.images, batch.labels, strict=True):
                digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                lines.write(f"{step} {row} {label} {digest}\n")
    hit = step in steps and dist.get_rank() == dist.get_world_size() - 1
    if hit and kind == "raise":
        raise RuntimeError("an injected fault")
    loss, parts = original(run, batch)
    return (loss * float("nan") if hit else loss), parts


train.micro_batch_loss = instructed
flag = StopFlag()
watch_launcher(flag)
sys.exit(main.main(flag, arguments))
