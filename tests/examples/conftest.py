"""A hand-off as the demo's, only shorter trained: a small LaViT that saw scans of digits, 32 pixels a side."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from examples.training import fit
from models import create_model
from pretrain.handoff.folder import write_handoff

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
    from sklearn.datasets import load_digits

    scans = load_digits()
    pictures = torch.tensor(scans.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    labels = torch.tensor(scans.target)
    torch.manual_seed(0)
    model = create_model("lavit_micro", num_classes=10, image_size=SIDE)

    def losses() -> Iterator[Callable[[], torch.Tensor]]:
        for _ in itertools.count():
            drawn = torch.randint(len(pictures), (BATCH,))
            batch = F.interpolate(pictures[drawn], (SIDE, SIDE), mode="bilinear")
            yield lambda: F.cross_entropy(model((batch - 0.5) / 0.5), labels[drawn])  # noqa: B023 - called at once

    fit(model, losses(), STEPS, 2e-3)
    content = {
        "architecture": model.config.to_dict(), "num_classes": 10, "class_names": list("0123456789"),
        "input": {"path": "digits", "image_size": SIDE, "mean": [0.5] * 3, "std": [0.5] * 3}, "weights": "raw",
        "dataset": {"name": "digits"}, "recipe": {"name": "digits"}, "metrics": {}, "samples_seen": STEPS * BATCH,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("examples") / "handoff"
    write_handoff(folder, model.state_dict(), content, "card")
    return folder
