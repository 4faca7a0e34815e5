"""Which geometry trains fastest, of those that meet the paper's totals: the published family against five other rules.

    python -m benchmarks.geometry

All take turns, one training step each; a GPU is timed by the clock, a CPU by the seconds that one core worked. Prints a
table and adds it to benchmarks/results/geometry-DATE-MACHINE.md.
"""

import argparse
import statistics
from dataclasses import dataclass

import torch

from benchmarks.model import seconds, train
from benchmarks.report import tell
from models import LaViT, LaViTConfig, model_config
from models.cost import count_macs, count_parameters

TOTALS = {"tiny": (10.9e6, 1.6e9), "small": (22.4e6, 3.3e9), "base": (39.6e6, 6.1e9)}
"""The paper's parameters and MACs at 224 x 224; a geometry must meet them within 2 and 3 %."""

Geometry = tuple[tuple[int, int, int, int], tuple[int, int, int, int]]
"""Widths and depths."""


@dataclass(frozen=True)
class Rule:
    """A family: what its sizes share, and the geometry of each. All use Less Attention as the published one does."""

    name: str
    mlp_ratios: tuple[float, ...]
    head_width: int
    geometries: dict[str, Geometry]

    def config(self, size: str) -> LaViTConfig:
        """The architecture, checked against the paper's totals."""
        widths, depths = self.geometries[size]
        config = LaViTConfig(
            widths=widths,
            depths=depths,
            vanilla_blocks=(depths[0], depths[1], min(2, depths[2]), 1),
            heads=tuple(width // self.head_width for width in widths),
            mlp_ratios=self.mlp_ratios,
        )
        parameters, macs = TOTALS[size]
        if abs(count_parameters(config) / parameters - 1) > 0.02 or abs(count_macs(config) / macs - 1) > 0.03:
            raise ValueError(f"{self.name}, {size}: not within 2 % of the parameters and 3 % of the MACs")
        return config


PUBLISHED = Rule(
    "published: few, wide blocks", (8.0, 8.0, 4.0, 4.0), 64,
    {
        size: (model_config(f"lavit_{size}").widths, model_config(f"lavit_{size}").depths)  # type: ignore[misc]
        for size in TOTALS
    },
)  # fmt: skip
RULES = [
    PUBLISHED,
    Rule(
        "wider and shallower", (8.0, 8.0, 4.0, 4.0), 64,
        {
            "tiny": ((64, 192, 320, 512), (1, 1, 2, 1)),
            "small": ((64, 192, 448, 576), (3, 1, 3, 2)),
            "base": ((64, 192, 448, 576), (2, 3, 8, 2)),
        },
    ),
    Rule(
        "narrower and deeper", (8.0, 8.0, 4.0, 4.0), 64,
        {
            "tiny": ((64, 128, 320, 384), (1, 1, 4, 1)),
            "small": ((64, 128, 320, 384), (2, 2, 8, 4)),
            "base": ((64, 128, 320, 384), (2, 3, 20, 3)),
        },
    ),
    Rule(
        "published widths, MLP ratio 4", (4.0, 4.0, 4.0, 4.0), 64,
        {
            "tiny": ((64, 128, 256, 384), (2, 3, 4, 2)),
            "small": ((64, 192, 384, 576), (2, 4, 3, 2)),
            "base": ((64, 192, 384, 576), (2, 6, 10, 2)),
        },
    ),
    Rule(
        "about PVT's widths, MLP ratio 4", (4.0, 4.0, 4.0, 4.0), 64,
        {
            "tiny": ((64, 128, 320, 448), (2, 2, 3, 1)),
            "small": ((64, 128, 320, 448), (2, 6, 8, 2)),
            "base": ((64, 128, 320, 448), (2, 6, 20, 2)),
        },
    ),
    Rule(
        "as Swin: from 96, heads of 32, MLP ratio 4", (4.0, 4.0, 4.0, 4.0), 32,
        {
            "tiny": ((96, 192, 256, 384), (1, 1, 4, 2)),
            "small": ((96, 192, 384, 576), (2, 3, 3, 2)),
            "base": ((96, 192, 384, 576), (1, 6, 10, 2)),
        },
    ),
]  # fmt: skip


def measure(size: str, device: str, batch: int, rounds: int) -> list[str]:
    """Rows of the table for one size."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    configs = [rule.config(size) for rule in RULES]
    models = [LaViT(config).to(device, dtype).train() for config in configs]
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    times: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):
        for taken, model in zip(times, models, strict=True):
            took = seconds(model, train, images) / batch * 1000
            if turn:  # the first turn warms up
                taken.append(took)
    rows = []
    for rule, config, taken in zip(RULES, configs, times, strict=True):
        speed = statistics.median(first / own for first, own in zip(times[0], taken, strict=True))
        rows.append(
            f"| {size} | {rule.name} | {', '.join(map(str, config.widths))} | {', '.join(map(str, config.depths))} "
            f"| {count_parameters(config) / 1e6:.2f} M | {count_macs(config) / 1e9:.2f} G "
            f"| {statistics.median(taken):.1f} | {min(taken):.1f} | {speed:.2f} |"
        )
    return rows


def main() -> None:
    """Measure, print, and add to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(TOTALS), help="default: T, S and B")
    parser.add_argument("--batch", type=int, default=None, help="pictures a step (default: 64 on a GPU, 2 on a CPU)")
    parser.add_argument("--rounds", type=int, default=9, help="steps to take the median of (default: 9)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # as in benchmarks.model
    torch.manual_seed(0)
    batch = arguments.batch or (64 if device == "cuda" else 2)
    lines = [
        (
            f"`python -m benchmarks.geometry`: one training step without the optimizer's, batch {batch} of 224 x 224, "
            f"{'bf16' if device == 'cuda' else 'fp32, one core'}, {arguments.rounds} interleaved rounds; "
            "speed is the median of the rounds' ratios to the published geometry (above 1: faster)."
        ),
        "",
        "| size | rule | widths | depths | parameters | MACs | ms a picture, median | best | speed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in arguments.sizes:
        lines += measure(size, device, batch, arguments.rounds)
    tell("geometry", lines)


if __name__ == "__main__":
    main()
