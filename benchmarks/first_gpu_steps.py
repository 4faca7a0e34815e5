"""The steps of ``benchmarks.first_gpu``: generators of names and of what measures their rows, most valuable first.

``python -m benchmarks.first_gpu_steps STEP ROWS KNOWN SCRATCH`` appends each row to ROWS as soon as it is measured, and
goes on with the next where one fails.
KNOWN holds the rows of earlier steps, SCRATCH is a folder for all of them. On a CPU nothing is compiled, which takes
minutes there.
"""

import argparse
import gc
import importlib.util
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from nvidia.dali import __version__ as dali_version
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import data, model, timing
from benchmarks.first_gpu import ROOT, STEPS, Found, fastest
from benchmarks.trainer import build, changes_of, fixed_batches, join, recipe_of, started
from data_pipeline.dataset import Dataset
from data_pipeline.graph import undecodable
from data_pipeline.loader import TrainLoader
from data_pipeline.transforms import IMAGENET_STD, AugmentConfig, InputConfig
from pretrain.devices import use_gpu
from pretrain.ports import free_port
from pretrain.recipe import load_recipe

Row = dict[str, Any]
Rows = Iterator[tuple[str, Callable[[], Row]]]
GPU = use_gpu()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
NETWORK, SIDE, BATCHES = ("lavit_small", 224, (128, 256)) if GPU else ("lavit_micro", 32, (4,))
OTHERS = ("pvt_v2_b2", "swin_tiny_patch4_window7_224")
IMAGES, ALIKE = (512, 64) if GPU else (48, 8)
"""Images of the dataset, and those whose pixels are compared."""
WARMUP, ROUNDS, COUNT = (10, 5, 20) if GPU else (1, 2, 2)
"""Steps or batches before measuring; measurements; steps or batches of each."""
SIZES = ((500, 375), (500, 333), (375, 500), (500, 500), (640, 480), (400, 300), (320, 240), (1600, 1200))
"""Widths and heights as in ImageNet, where most images have less than a million pixels."""
TRAINERS = {
    f"ZeRO {stage} {'bf16' if bf16 else 'autocast'} {mode}": (stage, bf16, mode == "compiled")
    for mode in ("eager", "compiled")
    for stage, bf16 in ((1, True), (0, False))
}
"""ZeRO stage, whether weights are in bf16, and whether the network is compiled, by name."""
HOST_BOUND = 0.9
"""A GPU that computes less of a step's time waits for the host."""
AUGMENT = load_recipe(ROOT / "recipes/in1k_lavit_small.yaml").data.augment
PLAIN = AUGMENT.model_copy(update={"rand_augment": None})


def shards(scratch: Path) -> Path:
    """The dataset, built by the first step that needs it."""
    if not (scratch / "data").exists():
        new = scratch / f"data-{os.getpid()}"
        data.build_shards(new, IMAGES, SIZES)
        new.rename(scratch / "data")
    return scratch / "data/shards"


def environment(known: Found, scratch: Path) -> Rows:  # noqa: ARG001
    """Versions; torch and DALI compute on one GPU, in one process."""
    described = timing.environment()
    row = {**described["versions"], **described["machine"], "revision": described["revision"], "dali": dali_version}
    row |= {"cudnn": torch.backends.cudnn.version(), "nccl": torch.cuda.nccl.version() if GPU else None}

    def compute() -> Row:
        ones = torch.ones(256, 256, device=DEVICE, dtype=torch.bfloat16)
        right = (ones @ ones).unique().tolist() == [256]
        jpeg, size = io.BytesIO(), np.array([48, 64], np.int32)
        Image.new("RGB", (64, 48)).save(jpeg, "jpeg")
        image = np.frombuffer(jpeg.getvalue(), np.uint8), 0 * size, size
        failed = undecodable({0: image}, InputConfig(path="none"), DEVICE.index).get(0)
        return row | {"computes": f"torch {'multiplies' if right else 'MULTIPLIES WRONG'}, DALI {failed or 'decodes'}"}

    yield row.pop("name"), compute


def pixels(known: Found, scratch: Path) -> Rows:  # noqa: ARG001
    """Whether pixels repeat bit for bit, also in other batches, by decoder share; and their distance from a CPU's."""
    dataset = Dataset.open(shards(scratch), "train")

    def load(batch: int, device: torch.device = DEVICE, **settings: Any) -> torch.Tensor:
        config = InputConfig(path=dataset.path, **{"augment": PLAIN, **settings})
        place = {"global_batch": ALIKE, "rank": 0, "world_size": 1, "device": device}
        with closing(TrainLoader(dataset, config, seed=0, micro_batch=batch, **place)) as loader:
            return torch.cat([one.images.cpu() for one in itertools.islice(loader, ALIKE // batch)])

    def compare(policy: AugmentConfig, share: float) -> Row:
        settings = {"hw_decoder_load": share, "augment": policy}
        there, first = load(ALIKE, torch.device("cpu"), **settings), load(ALIKE, **settings)
        differ = [batch for batch in (ALIKE, ALIKE // 4, 1) if not torch.equal(first, load(batch, **settings))]
        apart = (first - there).abs() * 255 * torch.tensor(IMAGENET_STD)[:, None, None]
        said = f"DO NOT REPEAT in batches of {differ}" if differ else "repeat bit for bit"
        return {"repeats": said, "same": not differ, "max": apart.max().item(), "mean": apart.mean().item()}

    for share in (1.0, 0.0, 0.65):
        yield f"hw_decoder_load {share}", partial(compare, PLAIN, share)
    yield "hw_decoder_load 0.0, RandAugment", partial(compare, AUGMENT, 0.0)


def loader(known: Found, scratch: Path) -> Rows:  # noqa: ARG001
    """The loader alone, with the recipe's augmentation, by decoder share; and without RandAugment."""

    def read(policy: AugmentConfig, share: float) -> Row:
        settings = {"interpolation": "bicubic", "hw_decoder_load": share, "augment": policy}
        with closing(data.ours(shards(scratch), DEVICE, BATCHES[0], **settings)) as batches:
            data.measure(batches, WARMUP, BATCHES[0])
            per_cpu_s, per_s, python_us = data.measure(batches, ROUNDS * COUNT, BATCHES[0])
        return {"images_per_s": per_s, "cores": per_s / per_cpu_s, "python_us": python_us}

    for share in (0.0, 1.0, 0.65):
        yield f"hw_decoder_load {share}", partial(read, AUGMENT, share)
    for share in (0.0, 1.0):
        yield f"hw_decoder_load {share}, RandAugment off", partial(read, PLAIN, share)


def profiled(step: Callable[[], float]) -> Row:
    """How much of the seconds that ``step`` returns the device computes, and the kernels with most of its time."""
    device = DeviceType.CUDA if GPU else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as found:
        took = step()
    kernels, busy, end = Counter[str](), 0.0, 0.0
    for one in sorted(found.events() or (), key=lambda one: one.time_range.start):
        if one.device_type == device and not one.is_user_annotation:
            span = one.time_range
            busy += max(0.0, span.end - max(span.start, end))  # streams overlap
            end = max(end, span.end)
            kernels[one.name[:100]] += span.elapsed_us()
    busy = min(1.0, busy / (1e6 * took))
    bound = "host" if busy < HOST_BOUND else "device"
    return {"busy": busy, "bound": bound, "kernels_ms": {name: us / 1e3 for name, us in kernels.most_common(10)}}


def speed(name: str, mode: str, batch: int) -> Row:
    """Forward and backward pass of a network."""
    torch.compiler.reset()
    gc.collect()
    network, images = model.build(name, mode), torch.randn(batch, 3, SIDE, SIDE, device=DEVICE, dtype=model.DTYPE)
    for _ in range(3):  # compiles, and records CUDA graphs
        model.seconds(model.train, network, images)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    times = [model.seconds(model.train, network, images) for _ in range(ROUNDS)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0
    row = {"images_per_s": batch / statistics.median(times), "step_s": times, "peak_gib": peak}
    return row | profiled(lambda: model.STEPS * model.seconds(model.train, network, images))


def network(known: Found, scratch: Path) -> Rows:  # noqa: ARG001
    """The network alone, in each batch and mode."""
    for batch, mode in itertools.product(BATCHES, model.MODES):
        yield f"{NETWORK} {mode}, batch {batch}", partial(speed, NETWORK, mode, batch)


def others(known: Found, scratch: Path) -> Rows:  # noqa: ARG001
    """LaViT and timm's networks, compiled."""
    installed = importlib.util.find_spec("timm") is not None
    for name in (NETWORK, *(OTHERS if installed else ())):
        yield name, partial(speed, name, "compiled", BATCHES[0])
    if not installed:
        yield "timm", lambda: {"note": "timm is not installed"}


def train(name: str, scratch: Path, control: dist.ProcessGroup, **settings: Any) -> Row:
    """A trainer's own loop on a fixed batch, or on its loader where that has settings."""
    stage, bf16, compiled = TRAINERS[name]
    place = {"model": NETWORK, "size": SIDE, "micro_batch": BATCHES[0], "ranks": 1, "shards": shards(scratch)}
    options = argparse.Namespace(autocast=True, **place)
    recipe = recipe_of(options, compiled=compiled, augment=AUGMENT.model_dump(), **settings)
    recipe = recipe.model_copy(update={"log_every_steps": 10**9})
    path, changes = scratch / f"run-{time.monotonic_ns()}", changes_of(options, stage, bf16=bf16)
    trainer = build(recipe, changes, path, DEVICE, control)
    loop = started(trainer, None if settings else fixed_batches(0, options, DEVICE))
    loop.seconds(WARMUP, DEVICE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if GPU:
            torch.cuda.set_sync_debug_mode("warn")
        loop.seconds(5, DEVICE)
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
    # Where torch says that the host waits for the device; the end of `seconds` waits in torch/cuda.
    found = [one for one in caught if "synchroniz" in str(one.message) and "torch/cuda/" not in one.filename]
    waits = sorted({f"{Path(one.filename).name}:{one.lineno}" for one in found})
    trainer.monitor.timer.split()  # of before
    step_s = loop.seconds(ROUNDS * COUNT, DEVICE) / (ROUNDS * COUNT)
    phases = {phase: 1e3 * took / (ROUNDS * COUNT) for phase, took in trainer.monitor.timer.split().items()}
    row = {"images_per_s": BATCHES[0] / step_s, "step_ms": 1e3 * step_s, "optimizer_ms": phases["optimizer"]}
    row |= {"phases_ms": phases, "data_wait": phases["data"] / sum(phases.values())}
    return row | {"waits": "; ".join(waits) or "none"} | profiled(lambda: loop.seconds(COUNT, DEVICE))


def trainer(known: Found, scratch: Path) -> Rows:  # noqa: ARG001
    """The trainer on a fixed batch, in each stage, precision and mode."""
    control = join(0, free_port(), 1)[1]
    for name in TRAINERS:
        yield name, partial(train, name, scratch, control)


def end_to_end(known: Found, scratch: Path) -> Rows:
    """The fastest trainer on its loader with the fastest decoder share that repeats, and again on a fixed batch."""
    good = [share for share, row in known["pixels"].items() if row.get("same")]
    load = fastest(known["loader"], good) or "hw_decoder_load 0.0"
    name = fastest(known["trainer"], [*TRAINERS]) or next(iter(TRAINERS))

    def both() -> Row:
        control = join(0, free_port(), 1)[1]
        row = train(name, scratch, control, hw_decoder_load=float(load.split()[-1]))
        return row | {"ratio": row["images_per_s"] / train(name, scratch, control)["images_per_s"]}

    yield f"{name}, {load}", both


def tests(known: Found, scratch: Path) -> Rows:  # noqa: ARG001
    """The tests marked ``gpu``, complete runs last."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    files.sort(key=lambda path: path.parent.name == "system")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu", *map(str, files)]
    counts, failed = Counter[str](), []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)  # noqa: T201
            if found := re.match(r"(tests/\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)", line):
                counts[found[2].lower()] += 1
                failed += [found[1]] if found[2] in {"FAILED", "ERROR"} else []
                counted = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
                row = {"outcomes": "; ".join([counted, *failed])}
                yield "tests marked gpu", row.copy
    if failed or process.returncode:
        raise RuntimeError(f"pytest ended with {process.returncode}")


def main() -> int:
    """Take the step that the command line names."""
    step, rows, known, scratch = sys.argv[1:]
    assert step in STEPS
    torch.set_num_threads(1)
    if not GPU:
        torch.compiler.set_stance("force_eager")
    failed = 0
    with Path(rows).open("a") as out:
        for name, measure in globals()[step](json.loads(Path(known).read_text()), Path(scratch)):
            try:
                row = measure()
            except Exception as error:  # noqa: BLE001 - the next row may be measured all the same
                traceback.print_exc()
                failed, row = 1, {"note": f"{name} failed: {' '.join(str(error).split())[:200]}"}
            print(json.dumps({name: row}), file=out, flush=True)
    return failed


if __name__ == "__main__":
    try:
        code = main()
    except BaseException:  # noqa: BLE001 - the last line of it is what the summary shows
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # loops and watchdogs are still running
