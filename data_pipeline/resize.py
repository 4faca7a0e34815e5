"""Resizing with antialiasing: by DALI on a GPU, by torch within DALI's graph on a CPU.

On a CPU DALI's own resizing would be more than half of all that the input costs. torch's kernel for bytes takes a
fraction of it, and its pixels are nearer to Pillow's (tests/data_pipeline/test_resize.py).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import do_not_convert

_DALI = {
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
}


def by_dali(images: Any, size: Any, interpolation: str) -> Any:
    """Return the node that resizes on the device where the images are.

    Args:
        images: node of (h, w, 3) uint8 images.
        size: (height, width) for all images, or a node of one (2,) float32 each.
        interpolation: "bilinear", "bicubic" or "lanczos".
    """
    return fn.resize(images, size=size, interp_type=_DALI[interpolation], antialias=True)


@do_not_convert  # type: ignore[untyped-decorator]
def by_torch(images: Any, size: Any, interpolation: str, threads: int) -> Any:
    """Return the node that resizes on the CPU; arguments as of `by_dali`, and in how many threads."""
    # Threads exist as long as the graph that holds this pool. torch releases the GIL while it computes.
    pool = ThreadPoolExecutor(threads, thread_name_prefix="data-resize")

    def resize(batch: list[NDArray[np.uint8]], sizes: Sequence[Any] | None = None) -> list[NDArray[np.uint8]]:
        sizes = [size] * len(batch) if sizes is None else sizes
        return list(pool.map(lambda image, wanted: _resized(image, wanted, interpolation), batch, sizes))

    inputs = (images,) if isinstance(size, tuple) else (images, size)
    return fn.python_function(*inputs, function=resize, batch_processing=True, output_layouts="HWC")


@torch.inference_mode()
def _resized(image: NDArray[np.uint8], size: Any, mode: str) -> NDArray[np.uint8]:
    """Resize one image, (h, w, 3) -> (height, width, 3)."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # channels last in memory, as torch's fast kernel wants it
    resized = F.interpolate(pixels, size=[int(side) for side in size], mode=mode, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
