"""Throughput of the whole: training on a fixed batch, the input alone, both together, and DDP + webdataset + Pillow.

All four are loops of ``benchmarks.trainer`` in the same processes and take turns. The last one reads by a torch
DataLoader with as many workers as our loader has threads. Each turn begins with steps that do not count, more than its
queue holds. On a CPU decoding and training share the cores: the harmonic bound 1 / (1 / synthetic + 1 / data only)
limits both together.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.data import PHOTOGRAPH, build_shards
from benchmarks.trainer import PILLOW, measure, start_ranks

MODES = {PILLOW: PILLOW, "trainer": "synthetic", "loader": "data only", "trainer on its loader": "both"}
"""Names of the loops in the result; a DataLoader forks its workers, so it comes first, while there are few threads."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    gpus = torch.cuda.device_count()
    cases = ["lavit_small:224:128", "lavit_tiny:224:128"] if gpus else ["lavit_micro:32:32", "lavit_tiny:128:8"]
    ranks, threads = gpus or min(2, timing.cores()), max(1, timing.cores() // (gpus or 2))
    defaults = {
        "cases": cases, "ranks": ranks, "threads": threads, "rounds": 7, "warmup": 1, "steps": 50 if gpus else 10,
        "skipped": 4 * max(2, threads) + 2, "modes": ["compiled" if gpus else "eager"], "autocast": bool(gpus),
    }  # fmt: skip
    quick = {"rounds": 1, "steps": 4, "cases": cases[:1]}
    options = timing.parse("end_to_end", __doc__, arguments, defaults=defaults, quick=quick)
    options.kinds, options.stages, options.bf16_stages, rows = [*MODES], [1], [], []
    with tempfile.TemporaryDirectory() as scratch:
        options.shards = build_shards(Path(scratch), 300 if options.quick else 3000)
        for case in options.cases:  # MODEL:SIZE:MICRO_BATCH
            options.model, size, micro_batch = case.split(":")
            options.size, options.micro_batch = int(size), int(micro_batch)
            images = options.ranks * options.micro_batch
            found = start_ranks(measure, options).items()
            rates = {MODES[kind]: [images / step_s for step_s in taken] for (_, kind, _, _), taken in found}
            bounds = [1 / (1 / a + 1 / b) for a, b in zip(rates["synthetic"], rates["data only"], strict=True)]
            rows += [
                {"case": case, "mode": mode, "images_per_s": each, "both_over": timing.ratio(rates["both"], each)}
                for mode, each in (rates | {"harmonic bound": bounds}).items()
            ]
    names = ("ranks", "threads", "rounds", "steps", "skipped", "modes", "autocast", "stages")
    conditions = {name: getattr(options, name) for name in names}
    timing.write(options, conditions | {"photographs": "{} x {} pixels".format(*PHOTOGRAPH)}, rows)


if __name__ == "__main__":
    main()
