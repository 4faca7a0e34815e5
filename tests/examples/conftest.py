"""A backbone that saw made pictures of single shapes, at a quarter of the size that the examples use."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from examples.shapes import CLASSES, draw_many
from examples.training import fit
from models import create_model
from pretrain.handoff import write_handoff

SIDE, BATCH, STEPS = 32, 32, 150


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tests' processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def handoff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model("lavit_micro", num_classes=len(CLASSES), image_size=SIDE)

    def losses() -> Iterator[Callable[[], torch.Tensor]]:
        for step in itertools.count():
            first = 10**6 + step * BATCH
            scenes = draw_many(range(first, first + BATCH), (SIDE, SIDE), most=1)
            pictures, labels = torch.stack([s.picture for s in scenes]), torch.cat([s.labels for s in scenes])
            yield lambda: F.cross_entropy(model((pictures - 0.5) / 0.25), labels)  # noqa: B023 - called at once

    fit(model, losses(), STEPS, 2e-3)
    content = {
        "architecture": model.config.to_dict(), "num_classes": len(CLASSES), "class_names": list(CLASSES),
        "input": {"path": "made", "image_size": SIDE, "mean": [0.5] * 3, "std": [0.25] * 3}, "weights": "raw",
        "dataset": {"name": "made"}, "recipe": {"name": "made"}, "metrics": {}, "samples_seen": STEPS * BATCH,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("examples") / "handoff"
    write_handoff(folder, model.state_dict(), content, "card")
    return folder
