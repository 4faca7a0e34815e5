"""How big and how fast the network is: Less Attention against its vanilla twin and timm's networks, compiled and not.

    python -m benchmarks.model                                    # on whatever device there is
    python -m benchmarks.model --sizes tiny --batch 64 --no-compile

All of a size take turns, one step each, so that whatever else the machine does hits all; the median of the rounds
counts. ``small`` runs beside timm's networks of its size where timm can be imported (CONTRIBUTING.md says how), all
without stochastic depth: timm's own default is 0.1 for Swin and 0 for the others. A GPU is timed by the clock; a CPU by
the seconds that one thread on one core worked, which a busy machine does not stretch, and without the page faults that
differ from heap to heap. Peak memory is each mode's own on a GPU, and on a CPU the eager one's alone.
Prints a table and writes a section of benchmarks/results/bench-DATE-MACHINE.json.
"""

import argparse
import ctypes
import gc
import importlib
import multiprocessing
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import tables
from benchmarks.report import Section, add_common, fill_in, say
from models import LaViT, create_model, model_config
from models.cost import count_macs, count_parameters
from pretrain.planning.speed import WITH_KERNEL

SIZE = 224
RIVALS = ("pvt_v2_b2", "swin_tiny_patch4_window7_224", "deit_small_patch16_224", "convnext_tiny")
"""timm's networks that are about as big as ``lavit_small``."""
STEPS_ON_GPU = 10
"""Steps between two looks at the clock there: the host must not wait for the device after each."""
MODES: dict[str, dict[str, Any] | None] = {"eager": None, "compiled": {}, "CUDA graphs": {"mode": "reduce-overhead"}}
"""Ways to run a network, and what each asks of torch.compile."""


def forward(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Classify, without gradients."""
    with torch.no_grad():
        model(images)


def train(model: torch.nn.Module, images: torch.Tensor) -> None:
    """One step without the optimizer: forward and backward; of a LaViT both losses."""
    logits, more = model(images, with_diagonality=True) if is_ours(model) else (model(images), 0.0)
    classes = torch.zeros(len(images), dtype=torch.long, device=images.device)
    (cross_entropy(logits.float(), classes) + more).backward()
    model.zero_grad()


def is_ours(model: torch.nn.Module) -> bool:
    """Whether it is a LaViT, compiled or not."""
    return isinstance(getattr(model, "_orig_mod", model), LaViT)


def has_timm() -> bool:
    """Whether timm's networks can be built here."""
    try:
        importlib.import_module("timm")  # which imports torchvision
    except (ImportError, RuntimeError):  # a torchvision for another torch raises the latter
        return False
    return True


def dtype_of(device: str) -> torch.dtype:
    """What is computed in: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def build(name: str, device: str) -> torch.nn.Module:
    """A network as it trains, without stochastic depth, with random weights."""
    torch.manual_seed(0)
    if name.startswith("lavit_"):
        kernel = "triton" if name.endswith(WITH_KERNEL) else "torch"
        return create_model(plain(name), attention_kernel=kernel).to(device, dtype_of(device))
    rival = importlib.import_module("timm").create_model(name, drop_path_rate=0.0)
    return rival.to(device, dtype_of(device))


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    """Compiled beside others of its class: by default dynamo keeps 8 graphs of a class's code, whoever they are of."""
    return torch.compile(model, fullgraph=True, isolate_recompiles=True, **options)


def in_mode(name: str, mode: str, device: str) -> Any:
    """A network that runs in one of `MODES`."""
    options = MODES[mode]
    return build(name, device) if options is None else compiled(build(name, device), **options)


def cost(name: str) -> tuple[int, int]:
    """Parameters, and MACs of a forward pass of one picture."""
    if name.startswith("lavit_"):
        return count_parameters(model_config(plain(name))), count_macs(model_config(plain(name)))
    model = build(name, "cpu").eval()
    # Fused attention is not counted on a CPU; the kernel that is made of products is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, SIZE, SIZE))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def plain(name: str) -> str:
    """What `create_model` calls a network of ours."""
    return name.removesuffix(WITH_KERNEL)


def contestants(size: str, device: str) -> list[str]:
    """Who is measured in one run with a size of ours: on a GPU also itself with attention's Triton kernels."""
    ours = [f"lavit_{size}", f"lavit_{size}_vanilla"]
    if device == "cuda":
        ours.insert(1, f"lavit_{size}{WITH_KERNEL}")
    return [*ours, *(RIVALS if size == "small" and has_timm() else ())]


def keep_memory() -> None:
    """Let glibc keep what tensors give back, and take no part of it from the kernel anew, step for step.

    That is 1 to 2 % of a step, or none: as the heap happens to lie, which says nothing about a network.
    """
    mmap_max, trim_threshold = -4, -1  # malloc.h
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    if not (mallopt(mmap_max, 0) and mallopt(trim_threshold, -1)):
        raise RuntimeError("glibc's mallopt refuses to keep memory")


def seconds(model: torch.nn.Module, step, images: torch.Tensor) -> float:
    """Of one step: wall time on a GPU, core time on a CPU."""
    if not images.is_cuda:
        start = time.process_time()
        step(model, images)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS_ON_GPU):
        step(model, images)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS_ON_GPU


def _resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) from Linux's account of this process."""
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _child(name: str, mode: str, device: str, batch: int, queue) -> None:
    images = torch.randn(batch, 3, SIZE, SIZE, device=device).to(dtype_of(device))
    model = in_mode(name, mode, device)
    if device == "cuda":
        for _ in range(3):  # CUDA graphs warm up, record, and replay
            train(model, images)
        queue.put(torch.cuda.max_memory_allocated())
    else:
        before = _resident("VmRSS")
        train(model, images)
        queue.put(_resident("VmHWM") - before)


def peak_memory(name: str, mode: str, device: str, batch: int) -> float:
    """GiB that a training step takes in a fresh process: allocated on a GPU; on a CPU (Linux) its memory's growth.

    Raises:
        RuntimeError: the process failed.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(name, mode, device, batch, queue))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"measuring the memory of {name}, {mode}, ended with exit code {child.exitcode}")
    return queue.get() / 2**30


def peaks(names: list[str], modes: list[str], device: str, batch: int) -> dict[tuple[str, str], float]:
    """`peak_memory` of each network in each mode; on a CPU, where a process would compile for minutes, eager alone."""
    measured = modes if device == "cuda" else ["eager"]
    return {(name, mode): peak_memory(name, mode, device, batch) for mode in measured for name in names}


def require_equal_outputs(models: dict[tuple[str, str], torch.nn.Module], images: torch.Tensor) -> None:
    """Networks of equal weights, compiled or with kernels, must classify alike: what is timed does the same work."""
    with torch.no_grad():
        # Three times: CUDA graphs warm up, record, and replay. A copy: the next one overwrites what they give.
        logits = {key: [model.eval()(images).clone() for _ in range(3)][-1] for key, model in models.items()}
    for (name, mode), values in logits.items():
        tolerance = 2**-5 if images.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(
            values, logits[plain(name), "eager"], rtol=tolerance, atol=tolerance, msg=f"{name}, {mode}"
        )


def measure(names: list[str], device: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the result for networks that take turns."""
    torch.compiler.reset()  # the graphs of the size before
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # what the size before has left here, the processes below would lack
    modes = ["eager", *(["compiled"] if options.compile else []), *(["CUDA graphs"] if options.cuda_graphs else [])]
    memory = {} if options.quick else peaks(names, modes, device, options.batch)
    models = {(name, mode): in_mode(name, mode, device) for mode in modes for name in names}
    images = torch.randn(options.batch, 3, SIZE, SIZE, device=device).to(dtype_of(device))
    require_equal_outputs(models, images)
    times: dict[tuple[str, str], dict[str, list[float]]] = {key: {"forward_s": [], "training_s": []} for key in models}
    for label, step in (("forward_s", forward), ("training_s", train)):
        for turn in range(options.rounds + 1):
            # Forwards and backwards: whoever always came after the same other one would inherit its caches and heap.
            for key, model in list(models.items())[:: -1 if turn % 2 else 1]:
                model.train(step is train)
                took = seconds(model, step, images)
                if turn:  # the first turn warms up
                    times[key][label].append(took)
    rows = []
    for name, mode in models:
        parameters, macs = cost(name)
        facts = {"model": name, "mode": mode, "parameters": parameters, "macs": macs}
        facts["peak_gib"] = memory.get((name, mode))
        rows.append(facts | times[name, mode])
    return rows


def parse(arguments: list[str] | None, device: str) -> argparse.Namespace:
    """The options, with defaults that suit the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", help="default: T, S and B on a GPU, T and S on a CPU")
    parser.add_argument("--batch", type=int, help="pictures a step (default: 128 on a GPU, 2 on a CPU)")
    parser.add_argument("--rounds", type=int, help="to take the median of (default: 15 on a GPU, 25 on a CPU)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="also torch.compile(fullgraph=True) (default: yes, but for --quick on a CPU)")  # fmt: skip
    parser.add_argument("--cuda-graphs", action="store_true",
                        help="also compiled with CUDA graphs (mode='reduce-overhead'), on a GPU; the memory of each "
                        "stays taken, so few --sizes")  # fmt: skip
    add_common(parser)
    options = parser.parse_args(arguments)
    gpu = device == "cuda"
    if options.cuda_graphs and not gpu:
        parser.error("--cuda-graphs needs a GPU, and there is none here")
    defaults = {"sizes": ["tiny", "small", "base"], "batch": 128, "rounds": 15, "compile": True} if gpu else {
        "sizes": ["tiny", "small"], "batch": 2, "rounds": 25, "compile": True}  # fmt: skip
    if options.quick:
        defaults |= {"sizes": ["small"] if gpu else ["tiny"], "rounds": 3, "compile": gpu}
    return fill_in(options, defaults)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = parse(arguments, device)
    torch.set_num_threads(1)  # a thread that waits for another one spins, which core time would count as work
    if device == "cpu":
        keep_memory()
    section = Section("model", options, arguments)
    rows = [row for size in options.sizes for row in measure(contestants(size, device), device, options)]
    conditions = {
        "batch": options.batch, "size": SIZE, "rounds": options.rounds,
        "precision": "bf16" if device == "cuda" else "fp32",
        "clock": "wall" if device == "cuda" else "seconds of one core",
    }  # fmt: skip
    say(tables.model(section.write(conditions, rows)))


if __name__ == "__main__":
    main()
