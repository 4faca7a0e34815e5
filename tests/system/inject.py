"""``pretrain/main.py`` with a fault: ``inject.py 9-11,15 ...`` makes the loss of these steps NaN on the last rank."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch.distributed as dist  # noqa: E402

from pretrain import main, train  # noqa: E402
from pretrain.signals import StopFlag, watch_launcher  # noqa: E402

local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
spans, *arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
bad_steps = {step for span in spans.split(",") for step in range(int(span.split("-")[0]), int(span.split("-")[-1]) + 1)}
original = train.micro_batch_loss


def with_fault(run, batch):
    loss, parts = original(run, batch)
    if run.progress.step + 1 in bad_steps and dist.get_rank() == dist.get_world_size() - 1:
        loss = loss * float("nan")
    return loss, parts


train.micro_batch_loss = with_fault
flag = StopFlag()
watch_launcher(flag)
sys.exit(main.main(flag, arguments))
