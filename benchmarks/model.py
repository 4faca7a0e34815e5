"""Speed of the network: LaViT, its vanilla twin and timm's networks; eager, compiled, with CUDA graphs.

timm's networks of the size of ``lavit_small`` join where timm can be imported (CONTRIBUTING.md), without stochastic
depth. A GPU is timed by the clock; a CPU by the seconds of one core, which a busy machine does not stretch.
"""

import argparse
import gc
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from models import LaViT, create_model
from pretrain.devices import use_gpu

SIZE = 224
OTHERS = ("pvt_v2_b2", "swin_tiny_patch4_window7_224", "deit_small_patch16_224", "convnext_tiny")
MODES: dict[str, dict[str, Any] | None] = {"eager": None, "compiled": {}, "CUDA graphs": {"mode": "reduce-overhead"}}
"""Arguments of torch.compile."""
DEVICE = "cuda" if use_gpu() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
STEPS = 10 if DEVICE == "cuda" else 1
"""Steps per turn; the host must not wait for a GPU after each."""


def forward(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Classify, without gradients."""
    with torch.no_grad():
        model(images)


def train(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Forward and backward pass; of a LaViT with both losses."""
    ours = isinstance(getattr(model, "_orig_mod", model), LaViT)
    logits, more = model(images, with_diagonality=True) if ours else (model(images), 0.0)
    classes = torch.zeros(len(images), dtype=torch.long, device=images.device)
    (cross_entropy(logits.float(), classes) + more).backward()
    model.zero_grad()


def build(name: str, mode: str = "eager") -> Any:
    """A network with random weights, as it trains, in one of ``MODES``."""
    torch.manual_seed(0)
    ours = name.startswith("lavit_")
    model = create_model(name) if ours else importlib.import_module("timm").create_model(name, drop_path_rate=0.0)
    model = model.to(DEVICE, DTYPE)
    options = MODES[mode]
    return model if options is None else torch.compile(model, fullgraph=True, isolate_recompiles=True, **options)


def cost(model: torch.nn.Module, size: int) -> dict[str, int]:
    """Parameters of a network on the CPU, and multiply-accumulates of a forward pass of one image."""
    # Fused attention is not counted on a CPU; the kernel made of products is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, size, size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "macs": counter.get_total_flops() // 2}


def seconds(step: Callable[..., None], model: torch.nn.Module, images: torch.Tensor) -> float:
    """Of one step: wall time on a GPU, core time on a CPU."""
    clock, device = time.perf_counter if DEVICE == "cuda" else time.process_time, torch.get_device_module(DEVICE)
    device.synchronize()
    began = clock()
    for _ in range(STEPS):
        step(model, images)
    device.synchronize()
    return (clock() - began) / STEPS


def measure(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for networks that take turns."""
    torch.compiler.reset()
    gc.collect()
    modes = ["eager", *(["compiled"] if options.compile else []), *(["CUDA graphs"] if options.cuda_graphs else [])]
    keys = [(name, mode) for mode in modes for name in names]
    models = {key: build(*key) for key in keys}
    images = torch.randn(options.batch, 3, SIZE, SIZE, device=DEVICE).to(DTYPE)
    times: dict[str, dict[tuple[str, str], list[float]]] = {}
    for label, step in (("forward_s", forward), ("training_s", train)):
        times[label] = {key: [] for key in keys}
        for key, counts in timing.turns(keys, options.rounds, warmup=3):  # CUDA graphs warm up, record, replay
            models[key].train(step is train)
            took = seconds(step, models[key], images)
            if counts:
                times[label][key].append(took)
    costs = {name: cost(build(name).to("cpu", torch.float32), SIZE) for name in names}
    rows = []
    for name, mode in keys:
        taken = {label: found[name, mode] for label, found in times.items()}
        speed = timing.ratio(taken["training_s"], times["training_s"][names[0], mode])
        rows.append({"model": name, "mode": mode, **costs[name], **taken, "lavit_speed_over": speed})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    gpu = DEVICE == "cuda"
    sizes = ["tiny", "small", *(["base"] if gpu else [])]
    defaults = {"sizes": sizes, "batch": 128 if gpu else 2, "rounds": 15 if gpu else 25, "compile": True}
    quick = {"sizes": ["tiny"], "rounds": 2, "compile": gpu}
    options = timing.parse("model", __doc__, arguments, defaults=defaults | {"cuda_graphs": False}, quick=quick)
    torch.set_num_threads(1)  # a waiting thread spins, which core time would count as work
    try:
        others = OTHERS if importlib.import_module("timm") else ()
    except (ImportError, RuntimeError):  # a torchvision for another torch raises the latter
        others = ()
    rows = []
    for size in options.sizes:
        names = [f"lavit_{size}", f"lavit_{size}_vanilla", *(others if size == "small" else ())]
        rows += measure(names, options)
    precision, clock = ("bf16", "wall") if gpu else ("fp32", "seconds of one core")
    conditions = {name: getattr(options, name) for name in ("batch", "rounds")}
    timing.write(options, conditions | {"size": SIZE, "precision": precision, "clock": clock}, rows)


if __name__ == "__main__":
    main()
