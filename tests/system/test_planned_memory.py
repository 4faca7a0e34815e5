"""The memory that ``pretrain.plan`` estimates, compared with the measured peak of training on two ranks.

On a CPU the peak is what the C library has handed out (``mallinfo2`` of glibc), read after every operator and every
2 ms. What the first use allocates for good is not counted: a tiny network is trained first, and one micro-batch runs
without an engine, because oneDNN keeps scratch memory for every shape that it has seen.
"""

import ctypes
import dataclasses
import gc
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.batch import Batch
from pretrain.engine.deepspeed_config import read_deepspeed_config, resolve_for
from pretrain.engine.engine import build_model
from pretrain.factory import architecture
from pretrain.memory_estimate import MemoryEstimate
from pretrain.recipe import Recipe, validate_recipe
from tests.pretrain import test_equality
from tests.pretrain.ranks import run_ranks

RANKS, STEPS, CLASSES, GOAL = 2, 2, 1000, 0.15
CONFIG = Path(__file__).parents[2] / "ds_config.json"
FIRST = (True, False, False, False)
TINY = {"widths": (8, 8, 16, 16), "heads": (1, 1, 2, 2), "depths": (1, 1, 2, 1)}


@dataclass(frozen=True)
class Configuration:
    model: str
    size: int
    micro_batch: int
    stage: int
    precision: str = "fp32"
    policy: Any = "none"
    accumulation: int = 1
    ema: bool = False

    def recipe(self, **overrides: Any) -> Recipe:
        model = {"name": self.model, "overrides": {"drop_path": 0.1, **overrides}}
        content = {
            "name": "memory",
            "data": {"path": "none", "image_size": self.size},
            "mixing": {"mixup": 0.8, "label_smoothing": 0.1},
            "model": model | {"activation_checkpointing": self.policy},
            "loss": {"diagonality_weight": 0.01},
            "optimizer": {"lr": 1e-3},
            "ema": {"decay": 0.99} if self.ema else None,
            "schedule": {"epochs": 1e6},
        }
        return validate_recipe(content, "test")

    def deepspeed(self) -> dict[str, Any]:
        changes = {
            "train_batch_size": RANKS * self.micro_batch * self.accumulation,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "zero_optimization": {"stage": self.stage},
            "bf16": {"enabled": self.precision == "bf16"},
            "torch_autocast": {"enabled": self.precision == "bf16 autocast"},
        }
        return read_deepspeed_config(CONFIG, changes)


CONFIGURATIONS = (
    Configuration("lavit_tiny", 96, 16, 0),
    Configuration("lavit_tiny", 96, 16, 1),
    Configuration("lavit_tiny", 96, 2, 1, "bf16"),
    Configuration("lavit_tiny", 96, 16, 1, "bf16", "all", ema=True),
    Configuration("lavit_tiny", 96, 8, 2, accumulation=2),
    Configuration("lavit_tiny", 96, 16, 2, "bf16", FIRST),
    Configuration("lavit_tiny", 96, 16, 0, "bf16 autocast"),
    Configuration("lavit_tiny", 96, 8, 2, "bf16 autocast", ema=True),
    Configuration("lavit_small", 128, 2, 1, ema=True),
    Configuration("lavit_small", 128, 4, 1, "bf16 autocast", FIRST, accumulation=2),
    Configuration("lavit_small", 128, 4, 2, "bf16", "all"),
    # All run in the same processes, in which the first engine at stage 3 replaces torch.nn.functional.linear for good.
    Configuration("lavit_tiny", 96, 16, 3),
    Configuration("lavit_tiny", 96, 2, 3, "bf16"),
    Configuration("lavit_base", 128, 2, 3, policy="all"),
)


def estimate(configuration: Configuration) -> int:
    recipe = configuration.recipe()
    config = architecture(recipe, CLASSES)
    resolved = resolve_for(recipe, configuration.deepspeed(), world_size=RANKS)
    return MemoryEstimate(recipe, resolved, config, gpu=False).memory().total


def train(configuration: Configuration, **overrides: Any) -> None:
    rows = np.arange(configuration.micro_batch)
    images = torch.randn(len(rows), 3, configuration.size, configuration.size)
    batch = Batch(images, torch.randint(CLASSES, (len(rows),)), rows, rows * 0, rows, rows >= 0)
    with mock.patch.multiple(test_equality, CLASSES=CLASSES):
        run = test_equality.training(
            configuration.recipe(**overrides), accumulation=configuration.accumulation, **configuration.deepspeed()
        )
    for _ in range(STEPS):
        run.train_step(iter([batch] * configuration.accumulation))
        run.state.step += 1


def pass_once(configuration: Configuration) -> None:
    dtype = torch.bfloat16 if configuration.precision == "bf16" else torch.float32
    model = build_model(configuration.recipe(), CLASSES).to(dtype)
    images = torch.randn(configuration.micro_batch, 3, configuration.size, configuration.size, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=configuration.precision == "bf16 autocast"):
        logits, diagonality = model(images, with_diagonality=True)
    (logits.float().logsumexp(1).mean() + diagonality).backward()


class MallInfo(ctypes.Structure):
    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


class Watch(TorchDispatchMode):
    """Bytes that the C library has handed out, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.read = ctypes.CDLL("libc.so.6").mallinfo2
        self.read.restype = MallInfo
        self.peak, self.done = 0, threading.Event()
        self.look()
        self.before = self.peak

    def look(self) -> None:
        now = self.read()
        self.peak = max(self.peak, int(now.uordblks + now.hblkhd))

    def sample(self) -> None:
        while not self.done.wait(2e-3):
            self.look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.look()
        return result


def measure(configuration: Configuration, control: dist.ProcessGroup) -> int:
    """The larger peak of two ranks."""
    train(dataclasses.replace(configuration, model="lavit_micro", size=32, micro_batch=2), **TINY)
    pass_once(configuration)
    gc.collect()
    watch = Watch()
    sampler = threading.Thread(target=watch.sample)
    sampler.start()
    try:
        with watch:
            train(configuration)
    finally:
        watch.done.set()
        sampler.join()
    peak = torch.tensor([watch.peak - watch.before])
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=control)
    gc.collect()
    return int(peak)


def measure_all(control: dist.ProcessGroup, file: Path) -> None:
    peaks = [measure(configuration, control) for configuration in CONFIGURATIONS]
    if dist.get_rank() == 0:
        file.write_text(json.dumps(peaks))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_planned_memory_is_what_training_takes_within_15_percent(tmp_path: Path) -> None:
    run_ranks(RANKS, measure_all, tmp_path / "peaks.json")
    peaks = json.loads((tmp_path / "peaks.json").read_text())
    errors = {one: estimate(one) / measured - 1 for one, measured in zip(CONFIGURATIONS, peaks, strict=True)}
    for (one, error), measured in zip(errors.items(), peaks, strict=True):
        print(f"{measured / 2**20:.1f} MiB, planned {error:+.1%}: {one}")
    assert max(map(abs, errors.values())) < GOAL, errors
