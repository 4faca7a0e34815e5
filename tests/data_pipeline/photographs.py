"""What training makes of real photographs, for comparison with Pillow."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from data_pipeline.build import main as build
from data_pipeline.dataset import Dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.reader import Reader
from data_pipeline.transforms import AugmentConfig, InputConfig

CPU = torch.device("cpu")
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1), "threads": 1}


def built(root: Path) -> Dataset:
    """Three cuts of each of scikit-learn's two photographs, as a dataset."""
    for number, array in enumerate(load_sample_images().images):
        folder = root / "in" / f"class{number}"
        folder.mkdir(parents=True)
        whole = Image.fromarray(array)  # 640 x 427
        for i, image in enumerate((whole, whole.crop((100, 50, 400, 420)), whole.resize((333, 250)))):
            image.save(folder / f"{i}.jpg", quality=92)
    assert build([str(root / "in"), str(root / "out"), "--workers", "1"]) == 0
    return Dataset.open(root / "out", "train")


def originals(dataset: Dataset) -> list[Image.Image]:
    reader = Reader(dataset)
    images = [Image.open(io.BytesIO(reader.read(i)[0].tobytes())).convert("RGB") for i in range(len(dataset))]
    reader.close()
    return images


def trained(dataset: Dataset, augment: AugmentConfig, **changes) -> dict[int, np.ndarray]:
    """One epoch of training pictures by sample id, HWC in steps of 8 bits."""
    config = InputConfig(path=dataset.path, augment=augment, **(PLAIN | {"image_size": 96} | changes))
    loader = TrainLoader(dataset, config, seed=5, global_batch=6, micro_batch=6, rank=0, world_size=1, device=CPU)
    batch = next(iter(loader))
    loader.close()
    pixels = (batch.images.float() * 255).permute(0, 2, 3, 1).numpy()
    return dict(zip(batch.sample_ids.tolist(), pixels, strict=True))


def difference(a: np.ndarray, b: Image.Image | np.ndarray) -> float:
    return float(np.abs(a - np.asarray(b, np.float32)).mean())
