"""What the examples share: their settings, and a training loop."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


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


def parse(program: str, description: str | None, arguments: list[str] | None) -> tuple[Settings, list[int]]:
    """The settings and the seeds on a command line."""
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


def fit(model: nn.Module, batch_losses: Iterator[Callable[[], Tensor]], steps: int, lr: float) -> list[float]:
    """Train with AdamW and a learning rate that warms up for a tenth of the steps and falls to zero as a cosine.

    Args:
        model: whose parameters that ask for a gradient are trained.
        batch_losses: gives for each step what computes its loss.
        steps: updates of the weights.
        lr: the highest learning rate.

    Returns:
        The loss of each step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False, div_factor=100, final_div_factor=100
    )
    losses = []
    model.train()
    for _ in range(steps):
        loss = next(batch_losses)()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses
