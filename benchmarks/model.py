"""How big and how fast the network is: Less Attention against its vanilla twin, eager against compiled.

    python -m benchmarks.model                                    # tiny, small and base, on whatever device there is
    python -m benchmarks.model --sizes tiny --batch 64 --compile  # and torch.compile

The twins take turns, one step each, so that whatever else the machine does hits both; every number is the median of the
rounds. A GPU is timed by the clock; a CPU by the seconds that one thread on one core worked, which a busy machine does
not stretch. Prints a table and adds it to benchmarks/results/model-DATE-MACHINE.md.
"""

import argparse
import multiprocessing
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from benchmarks.report import add_to_results, processor, today
from models import LaViT, create_model, model_config
from models.cost import count_macs, count_parameters


def forward(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Classify, without gradients."""
    with torch.no_grad():
        model(images)


def train(model: torch.nn.Module, images: torch.Tensor) -> None:
    """One step without the optimizer: both losses, forward and backward."""
    logits, diagonality = model(images, with_diagonality=True)
    classes = torch.zeros(len(images), dtype=torch.long, device=images.device)
    (cross_entropy(logits.float(), classes) + diagonality).backward()
    model.zero_grad()


def build(name: str, device: str) -> LaViT:
    """The model as it trains: bf16 weights on a GPU, fp32 on a CPU."""
    torch.manual_seed(0)
    return create_model(name).to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def seconds(model: torch.nn.Module, step, images: torch.Tensor) -> float:
    """Wall time of one step on a GPU, core time on a CPU."""
    if not images.is_cuda:
        start = time.process_time()
        step(model, images)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(model, images)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) from Linux's account of this process."""
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _child(name: str, device: str, batch: int, queue) -> None:
    images = torch.randn(batch, 3, 224, 224, device=device).to(torch.bfloat16 if device == "cuda" else torch.float32)
    model = build(name, device)
    if device == "cuda":
        train(model, images)
        queue.put(torch.cuda.max_memory_allocated())
    else:
        before = _resident("VmRSS")
        train(model, images)
        queue.put(_resident("VmHWM") - before)


def peak_memory(name: str, device: str, batch: int) -> float:
    """GiB of one training step, in a fresh process: allocated on a GPU; on a CPU (Linux) the growth of its memory."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(name, device, batch, queue))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"measuring the memory of {name} ended with exit code {child.exitcode}")
    return queue.get() / 2**30


def require_equal_outputs(models: dict[tuple[str, str], torch.nn.Module], images: torch.Tensor) -> None:
    """Compiled and eager networks, of equal weights, must classify alike: what is timed does the same work."""
    with torch.no_grad():
        logits = {key: model.eval()(images) for key, model in models.items()}
    for (name, mode), values in logits.items():
        tolerance = 2**-5 if images.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(values, logits[name, "eager"], rtol=tolerance, atol=tolerance, msg=f"{name}, {mode}")


def measure(size: str, device: str, batch: int, rounds: int, compiled: bool) -> list[str]:
    """Rows of the table for one size: the network, its twin, and their ratio."""
    names = [f"lavit_{size}", f"lavit_{size}_vanilla"]
    models: dict[tuple[str, str], torch.nn.Module] = {(name, "eager"): build(name, device) for name in names}
    if compiled:
        models |= {(name, "compiled"): torch.compile(build(name, device), fullgraph=True) for name in names}
    images = torch.randn(batch, 3, 224, 224, device=device).to(torch.bfloat16 if device == "cuda" else torch.float32)
    if compiled:
        require_equal_outputs(models, images)
    speed, ratio = {}, {}
    for label, step in (("forward", forward), ("train", train)):
        times: dict[tuple[str, str], list[float]] = {key: [] for key in models}
        for turn in range(rounds + 1):
            for key, model in models.items():
                model.train(label == "train")
                took = seconds(model, step, images)
                if turn:  # the first turn warms up
                    times[key].append(took)
        speed |= {(*key, label): batch / statistics.median(taken) for key, taken in times.items()}
        for mode in {mode for _, mode in models}:
            pairs = zip(times[names[1], mode], times[names[0], mode], strict=True)
            ratio[mode, label] = statistics.median(vanilla / less for vanilla, less in pairs)
    memory = {name: peak_memory(name, device, batch) for name in names}
    rows = []
    for name, mode in models:
        config = model_config(name)
        rows.append(
            f"| {name} | {mode} | {count_parameters(config) / 1e6:.2f} M | {count_macs(config) / 1e9:.2f} G "
            f"| {speed[name, mode, 'forward']:.2f} | {speed[name, mode, 'train']:.2f} | {memory[name]:.2f} |"
        )
    for mode in dict.fromkeys(mode for _, mode in models):
        memory_ratio = memory[names[0]] / memory[names[1]]
        forward_ratio, train_ratio = ratio[mode, "forward"], ratio[mode, "train"]
        rows.append(f"| *less / vanilla* | {mode} | | | {forward_ratio:.2f} | {train_ratio:.2f} | {memory_ratio:.2f} |")
    return rows


def machine() -> str:
    """What was measured on."""
    return processor() if torch.cuda.is_available() else f"{processor()}, one core"


def heading() -> list[str]:
    """Of a table: machine, versions and day."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return [f"## {machine()}, {versions}, {today()}", ""]


def main() -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base"], help="default: T, S and B")
    parser.add_argument("--batch", type=int, default=None, help="pictures a step (default: 64 on a GPU, 4 on a CPU)")
    parser.add_argument("--rounds", type=int, default=5, help="steps to take the median of (default: 5)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile(fullgraph=True)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # a thread that waits for another one spins, which core time would count as work
    batch = arguments.batch or (64 if device == "cuda" else 4)
    lines = [
        *heading(),
        " ".join(
            [
                f"`python -m benchmarks.model {' '.join(sys.argv[1:])}`: batch {batch} of 224 x 224,",
                f"{'bf16' if device == 'cuda' else 'fp32'}, median of {arguments.rounds} interleaved rounds;",
                "training without the optimizer's step; peak memory of one eager training step.",
            ]
        ),
        "",
        "| model | mode | parameters | MACs | forward, images/s | training, images/s | peak memory, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))  # noqa: T201  the table is what this command is for
    for size in arguments.sizes:
        rows = measure(size, device, batch, arguments.rounds, arguments.compile)
        print("\n".join(rows), flush=True)  # noqa: T201
        lines += rows
    add_to_results("model", machine(), lines)


if __name__ == "__main__":
    main()
