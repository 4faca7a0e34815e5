"""What the examples share: their command line, their pictures in batches, and a training loop."""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.shapes import EVALUATED, Scene, draw_many
from pretrain.outcome import UserError

BACKBONE_RATE = 0.25
"""Share of the heads' learning rate that a fine-tuned backbone gets: at all of it, some seeds did not learn."""


@dataclass(frozen=True)
class Settings:
    """What a person chooses."""

    handoff: Path | None
    """The backbone's weights; None: random ones."""
    size: tuple[int, int]
    """Height and width of the pictures in pixels."""
    steps: int
    """Updates of the weights."""
    batch: int
    """Pictures a step."""
    lr: float
    """The highest learning rate."""
    evaluated: int
    """Pictures evaluated."""
    out: Path
    """Where JSON and pictures are written."""


def run_seeds(
    program: str, description: str | None, arguments: list[str] | None, run: Callable[[Settings, int], str]
) -> int:
    """Run an example for each seed of a command line and print the line that it returns.

    Returns:
        The exit status: 0, or 2 where hand-off or picture size cannot be used, which is told in one line.
    """
    settings, seeds = _parse(program, description, arguments)
    for seed in seeds:
        try:
            print(f"seed {seed}: {run(settings, seed)}", flush=True)
        except (UserError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def _parse(program: str, description: str | None, arguments: list[str] | None) -> tuple[Settings, list[int]]:
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--handoff", type=Path, help="the backbone's weights; without it they are random")
    parser.add_argument("--image-size", type=int, nargs=2, default=(64, 96), metavar=("HEIGHT", "WIDTH"), help="pixels")
    parser.add_argument("--steps", type=int, default=800, help="updates of the weights")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--evaluated", type=int, default=200, help="pictures evaluated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of heads and random backbones")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="where JSON and pictures are written")
    given = parser.parse_args(arguments)
    size = (given.image_size[0], given.image_size[1])
    return Settings(given.handoff, size, given.steps, given.batch, given.lr, given.evaluated, given.out), given.seeds


def write_result(settings: Settings, name: str, result: dict[str, Any]) -> Path:
    """Write ``NAME.json`` with the settings; returns where a picture goes that belongs to it."""
    settings.out.mkdir(parents=True, exist_ok=True)
    content = dataclasses.asdict(settings) | result
    (settings.out / f"{name}.json").write_text(json.dumps(content, indent=2, default=str) + "\n")
    return settings.out / f"{name}.png"


def evaluated_scenes(size: tuple[int, int], pictures: int) -> Iterator[tuple[Tensor, list[Scene]]]:
    """Pictures that no training sees, in batches of up to 25: (batch, 3, height, width), and what is on them."""
    for start in range(0, pictures, 25):
        yield _batch(EVALUATED + start, EVALUATED + min(start + 25, pictures), size)


def train(model: nn.Module, settings: Settings, loss_of: Callable[[Tensor, list[Scene]], Tensor]) -> dict[str, float]:
    """Train on pictures that are never seen twice.

    Returns:
        The loss of the last step, the seconds it took, and those of the processor.
    """

    def losses() -> Iterator[Callable[[], Tensor]]:
        for step in itertools.count():
            yield partial(loss_of, *_batch(step * settings.batch, (step + 1) * settings.batch, settings.size))

    start, cpu = time.monotonic(), time.process_time()
    last = fit(model, losses(), settings.steps, settings.lr)[-1]
    return {"loss": last, "seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu}


def _batch(first: int, end: int, size: tuple[int, int]) -> tuple[Tensor, list[Scene]]:
    scenes = draw_many(range(first, end), size)
    return torch.stack([scene.picture for scene in scenes]), scenes


def fit(model: nn.Module, batch_losses: Iterator[Callable[[], Tensor]], steps: int, lr: float) -> list[float]:
    """Train with AdamW and a learning rate that warms up for a tenth of the steps and falls to zero as a cosine.

    Args:
        model: whose parameters that ask for a gradient are trained.
        batch_losses: gives for each step what computes its loss.
        steps: updates of the weights.
        lr: the highest learning rate; what is called ``backbone`` gets `BACKBONE_RATE` of it.

    Returns:
        The loss of each step.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups, rates = [], []
    for is_backbone in (True, False):
        for is_matrix in (True, False):
            members = [
                p for n, p in trained.items() if n.startswith("backbone.") == is_backbone and (p.ndim > 1) == is_matrix
            ]
            if members:
                groups.append({"params": members, "weight_decay": 0.05 if is_matrix else 0.0})
                rates.append(lr * (BACKBONE_RATE if is_backbone else 1))
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=0.1, cycle_momentum=False, div_factor=100, final_div_factor=100
    )
    losses = []
    model.train()
    for _ in range(steps):
        loss = next(batch_losses)()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses
