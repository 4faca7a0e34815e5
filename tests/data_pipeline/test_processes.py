"""The promise of the README, with real processes: killed in mid-epoch, continued by another number of ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Each rank is a process that writes what it sees, a line per sample, and flushes after every step.
RANK = """
import hashlib, itertools, sys
from pathlib import Path
import torch
from data_pipeline.dataset import Dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.mixing import MixingConfig, mix
from data_pipeline.transforms import *

path, out, policy, rank, world, start, steps, micro, threads = sys.argv[1:4] + list(map(int, sys.argv[4:]))
augment = AugmentConfig(
    random_resized_crop=RandomResizedCropConfig(scale=(0.3, 1)), horizontal_flip=0.5,
    color_jitter=ColorJitterConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    random_erasing=RandomErasingConfig(probability=0.5), rand_augment=RandAugmentConfig() if policy == "rand" else None,
    trivial_augment=policy == "trivial",
)
config = InputConfig(path=path, image_size=32, augment=augment, threads=threads)
loader = TrainLoader(
    Dataset.open(path, "train"), config, seed=11, global_batch=64, micro_batch=micro, rank=rank, world_size=world,
    device=torch.device("cpu"), start_sample=start * 64,
)
mixing = MixingConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
per_step = 64 // world // micro
with Path(out).open("a") as file:
    for i, b in enumerate(itertools.islice(loader, steps * per_step)):
        step = start + i // per_step
        images, targets = mix(b.images, b.labels, b.rows, config=mixing, num_classes=10, seed=11, step=step)
        for k in range(micro):
            digests = [hashlib.md5(t[k].numpy().tobytes()).hexdigest() for t in (b.images, images, targets)]
            print(step, int(b.rows[k]), int(b.epochs[k]), int(b.sample_ids[k]), int(b.labels[k]), *digests, file=file)
        file.flush()
"""


def start(data: Path, out: Path, world: int, *settings: int, policy: str = "rand") -> list[subprocess.Popen]:
    begin, steps, micro, threads = settings
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(data), f"{out}.{rank}", policy]
            + [str(setting) for setting in (rank, world, begin, steps, micro, threads)]
        )
        for rank in range(world)
    ]


def seen(out: Path) -> dict[tuple[int, int], str]:
    lines = [line for path in out.parent.glob(out.name + ".*") for line in path.read_text().splitlines()]
    found = {}
    for line in lines:
        step, row, rest = line.split(" ", 2)
        assert (int(step), int(row)) not in found
        found[int(step), int(row)] = rest
    return found


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_goes_on_with_another_number_of_ranks_down_to_the_pixel(digits, tmp_path):
    steps = 30  # 1920 samples: more than the 1437 of an epoch
    assert [process.wait() for process in start(digits, tmp_path / "whole", 1, 0, steps, 64, 1)] == [0]
    whole = seen(tmp_path / "whole")
    assert len(whole) == steps * 64

    # Four ranks, killed without warning; two go on from a step that all had finished; then one.
    killed = start(digits, tmp_path / "four", 4, 0, 10_000, 16, 1)
    files = [Path(f"{tmp_path}/four.{rank}") for rank in range(4)]

    def finished() -> int:
        return min(len(path.read_text().splitlines()) // 16 if path.exists() else 0 for path in files)

    while finished() < 5:
        time.sleep(0.02)
        assert all(process.poll() is None for process in killed)
    for process in killed:
        os.kill(process.pid, signal.SIGKILL)
    for process in killed:
        process.wait()
    step = min(finished(), 20)
    four = {key: value for key, value in seen(tmp_path / "four").items() if key[0] < step}
    middle = step + 5
    assert [p.wait() for p in start(digits, tmp_path / "two", 2, step, middle - step, 8, 2)] == [0, 0]
    assert [p.wait() for p in start(digits, tmp_path / "one", 1, middle, steps - middle, 32, 3)] == [0]
    assert four | seen(tmp_path / "two") | seen(tmp_path / "one") == whole
    epoch = [value.split()[1] for value in whole.values() if value.startswith("0 ")]
    assert sorted(map(int, epoch)) == list(range(1437))


@pytest.mark.slow
def test_trivial_augment_gives_four_ranks_the_pixels_of_one(digits, tmp_path):
    one = start(digits, tmp_path / "one", 1, 0, 2, 64, 2, policy="trivial")
    four = start(digits, tmp_path / "four", 4, 0, 2, 8, 1, policy="trivial")
    assert [process.wait() for process in one + four] == [0] * 5
    whole = seen(tmp_path / "one")
    assert len(whole) == 2 * 64
    assert seen(tmp_path / "four") == whole
