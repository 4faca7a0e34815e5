"""A hand-off like the demo's, trained for less time: a small LaViT on scans of digits, 32 pixels a side."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models import create_model
from pretrain.handoff.folder import write_handoff

SIDE, BATCH, STEPS = 32, 32, 150


@pytest.fixture(scope="session")
def handoff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    labels = torch.tensor(scans.target)
    torch.manual_seed(0)
    model = create_model("lavit_micro", num_classes=10, image_size=SIDE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(STEPS):
        drawn = torch.randint(len(images), (BATCH,))
        batch = F.interpolate(images[drawn], (SIDE, SIDE), mode="bilinear")
        optimizer.zero_grad()
        F.cross_entropy(model((batch - 0.5) / 0.5), labels[drawn]).backward()
        optimizer.step()
    content = {
        "architecture": model.config.to_dict(), "num_classes": 10, "class_names": list("0123456789"),
        "input": {"path": "digits", "image_size": SIDE, "mean": [0.5] * 3, "std": [0.5] * 3}, "weights": "raw",
        "dataset": {"name": "digits"}, "recipe": {"name": "digits"}, "metrics": {}, "samples_seen": STEPS * BATCH,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("examples") / "handoff"
    write_handoff(folder, model.state_dict(), content, "card")
    return folder
