"""Ranks as real processes, each of which writes what it sees; run by the tests.

    python -m tests.data_pipeline.ranks DATASET OUT WORLD START STEPS MICRO THREADS

imports everything once, then forks the ranks and prints their pids. Rank r writes to OUT.r a line per sample, and
flushes after every step. Nothing of DALI runs before the fork.
"""

import hashlib
import itertools
import os
import sys
from pathlib import Path

import torch

from data_pipeline.dataset import Dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.mixing import MixingConfig, mix
from data_pipeline.transforms import (
    AugmentConfig,
    ColorJitterConfig,
    InputConfig,
    RandAugmentConfig,
    RandomErasingConfig,
    RandomResizedCropConfig,
)

SEED, BATCH = 11, 64


def train(path: str, out: str, rank: int, settings: list[int]) -> None:
    """Read some global batches, and write the digests of every sample before and after mixing."""
    world, start, steps, micro, threads = settings
    augment = AugmentConfig(
        random_resized_crop=RandomResizedCropConfig(scale=(0.3, 1)),
        horizontal_flip=0.5,
        color_jitter=ColorJitterConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
        random_erasing=RandomErasingConfig(probability=0.5),
        # One operation: building the graph of two takes twice as long, and test_loader.py compares two.
        rand_augment=RandAugmentConfig(operations=1),
    )
    loader = TrainLoader(
        Dataset.open(path, "train"),
        InputConfig(path=path, image_size=32, augment=augment, threads=threads),
        seed=SEED,
        global_batch=BATCH,
        micro_batch=micro,
        rank=rank,
        world_size=world,
        device=torch.device("cpu"),
        start_sample=start * BATCH,
    )
    mixing = MixingConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    per_step = BATCH // world // micro
    with Path(f"{out}.{rank}").open("a") as file:
        for i, b in enumerate(itertools.islice(loader, steps * per_step)):
            step = start + i // per_step
            images, targets = mix(b.images, b.labels, b.rows, config=mixing, num_classes=10, seed=SEED, step=step)
            for k in range(micro):
                digests = [hashlib.md5(t[k].numpy().tobytes()).hexdigest() for t in (b.images, images, targets)]
                facts = (b.rows[k], b.epochs[k], b.sample_ids[k], b.labels[k])
                print(step, *map(int, facts), *digests, file=file)
            file.flush()
    loader.close()


def main() -> int:
    path, out = sys.argv[1:3]
    settings = [int(setting) for setting in sys.argv[3:]]
    pids = []
    for rank in range(settings[0]):
        pid = os.fork()
        if pid == 0:
            train(path, out, rank, settings)
            os._exit(0)  # an error above ends the rank with its traceback and 1
        pids.append(pid)
    print(*pids, flush=True)
    ended = [os.waitpid(pid, 0)[1] for pid in pids]
    return int(any(ended))


if __name__ == "__main__":
    sys.exit(main())
