"""Which settings of our loader are fast: what its defaults are measured against.

    python -m benchmarks.input_settings           # four minutes on two cores, some ten on a GPU
    python -m benchmarks.input_settings --threads 8 16 --prefetch 2

The same shards and work as in ``benchmarks.data``. Settings take turns, each turn in a fresh process, and are compared
with the defaults of the same round. On a CPU every number of threads meets every prefetch. On a GPU every number of
threads meets every share of the JPEG engine, which depend on each other (DALI's documentation); prefetch and the
memory that decoders take ahead vary one at a time beside the other defaults. Prints a table and writes a section of
benchmarks/results/bench-DATE-MACHINE.json.
"""

import argparse
import itertools
from typing import Any

import torch

from benchmarks import tables
from benchmarks.data import BATCH, ENGINE_SHARE, SIDE, in_turns, parser_of
from benchmarks.photographs import SHAPE
from benchmarks.report import Section, cores, fill_in, say
from data_pipeline.transforms import InputConfig

ON_GPU = ("hw_decoder_load", "device_memory_padding", "preallocate_hint")
"""Settings that mean nothing to a CPU."""
ENGINE_SHARES = (ENGINE_SHARE, 1.0)
PADDINGS = (0, 64 * 2**20)
Settings = dict[str, Any]


def defaults(device: str) -> Settings:
    """What a run has that sets nothing, alone on its machine."""
    names = ("prefetch", *(ON_GPU if device == "cuda" else ()))
    return {"threads": cores()} | {name: InputConfig.model_fields[name].default for name in names}


def grid(device: str, threads: list[int], prefetch: list[int]) -> list[Settings]:
    """Each setting to be measured once, the defaults first."""
    start = defaults(device)
    changes: list[Settings] = []
    if device == "cuda":
        shares = (start["hw_decoder_load"], *ENGINE_SHARES)
        changes += [{"threads": n, "hw_decoder_load": share} for n, share in itertools.product(threads, shares)]
        changes += [{"prefetch": depth} for depth in prefetch]
        changes += [{"device_memory_padding": size} for size in PADDINGS]
        changes += [{"hw_decoder_load": share, "preallocate_hint": SHAPE} for share in ENGINE_SHARES]
    else:
        changes += [{"threads": n, "prefetch": depth} for n, depth in itertools.product(threads, prefetch)]
    found = [start]
    for change in changes:
        if (one := start | change) not in found:
            found.append(one)
    return found


def parse(arguments: list[str] | None, device: str) -> argparse.Namespace:
    """The options, with defaults that suit the device."""
    parser = parser_of("input_settings", __doc__, device)
    parser.add_argument("--rounds", type=int, help="turns of each setting (default: 5)")
    parser.add_argument("--batches", type=int, help="in a turn (default: 50 on a GPU, 15 on a CPU)")
    parser.add_argument("--threads", type=int, nargs="+", help="default: this machine's cores, half and three halves")
    parser.add_argument("--prefetch", type=int, nargs="+", help="micro-batches ahead (default: 1 2 3)")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    threads = sorted({max(1, cores() // 2), cores(), 3 * cores() // 2})
    chosen = {"rounds": 5, "batch": BATCH[options.device], "batches": 50 if gpu else 15, "threads": threads,
              "prefetch": [1, 2, 3]}  # fmt: skip
    if options.quick:
        chosen |= {"rounds": 2, "batches": 4, "threads": [cores()], "prefetch": [1, 2]}
    return fill_in(options, chosen)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the result."""
    options = parse(arguments, "cuda" if torch.cuda.is_available() else "cpu")
    section = Section("input_settings", options, arguments)
    settings = grid(options.device, options.threads, options.prefetch)
    found = in_turns([("ours", one) for one in settings], options)
    rows = [{"settings": one} | values for one, values in zip(settings, found, strict=True)]
    conditions = {name: getattr(options, name) for name in ("device", "rounds", "batch", "batches")} | {"size": SIDE}
    say(tables.input_settings(section.write(conditions, rows)))


if __name__ == "__main__":
    main()
