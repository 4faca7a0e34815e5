"""The DALI graphs. They hold no random operator: whatever differs from image to image comes in as an argument.

One graph serves both devices: with a GPU the decoder is "mixed" (bytes on the host, pixels on the device) and
everything after it follows the pixels; without one it is "cpu", and torch resizes.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from data_pipeline import auto_augment
from data_pipeline.draws import Draws, eval_params, train_params
from data_pipeline.gpu_memory import gpu_memory_is_full
from data_pipeline.transforms import InputConfig

_RESIZE = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}
_TYPES = {np.dtype(types.to_numpy_type(kind)): kind for kind in (types.UINT8, types.INT32, types.FLOAT)}


@do_not_convert  # type: ignore[untyped-decorator]
def _inputs(examples: Mapping[str, NDArray], source: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the node of each input; `source` is called for every batch and returns their values by name.

    DALI reads them in place: the caller keeps them alive until the batch's output is consumed.

    Args:
        examples: what each input has for one image.
        source: called for every batch.
    """

    def values() -> list[Any]:
        batch = source()
        return [batch[name] for name in examples]

    nodes = fn.external_source(
        values, num_outputs=len(examples), ndim=[value.ndim for value in examples.values()],
        dtype=[_TYPES[value.dtype] for value in examples.values()], no_copy=True,
    )  # fmt: skip
    return dict(zip(examples, nodes, strict=True))


def in_place(values: NDArray | list[NDArray[np.uint8]]) -> TensorListCPU:
    """Wrap an array with a row for each image, or one array each, for DALI without a copy; keeps them alive."""
    if isinstance(values, list):
        tensors = [TensorCPU(value) for value in values]
        return TensorListCPU(tensors, contiguous=False)  # type: ignore[call-overload]  # missing in DALI's stubs
    return TensorListCPU(values)


def shut_down(pipe: Pipeline) -> None:
    """End a pipeline, also one that failed, when its operators have returned; as DALI does when it is deleted.

    Deleting it is not enough, as an exception refers to it.
    """
    pipe._shutdown()  # noqa: SLF001  (what its __del__ calls)


def _decode(inputs: dict[str, Any], config: InputConfig, device_id: int | None) -> Any:
    gpu = {"device": "mixed", "hw_decoder_load": config.hw_decoder_load}
    where: dict[str, Any] = {"device": "cpu"} if device_id is None else gpu
    return fn.decoders.image_slice(
        inputs["jpeg"], start=inputs["start"], shape=inputs["shape"], axes=[0, 1], output_type=types.RGB, **where
    )


def resize_by_dali(images: Any, size: Any, interpolation: str) -> Any:
    """Return the node that resizes (h, w, 3) uint8 images, with antialiasing, on the device where they are.

    The size is (height, width) for all images, or a node of one (2,) float32 each.
    """
    return fn.resize(images, size=size, interp_type=_RESIZE[interpolation], antialias=True)


@do_not_convert  # type: ignore[untyped-decorator]
def resize_by_torch(images: Any, size: Any, interpolation: str, threads: int) -> Any:
    """Return the node that resizes on the CPU; arguments as of `resize_by_dali`, and in how many threads.

    On a CPU DALI's own resizing would be more than half of all that the input costs. torch's kernel for bytes takes a
    fraction of it, and its pixels are nearer to Pillow's (tests/data_pipeline/test_resize.py).
    """
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


def _resize(images: Any, size: Any, config: InputConfig, threads: int, device_id: int | None) -> Any:
    if device_id is None:
        return resize_by_torch(images, size, config.interpolation, threads)
    return resize_by_dali(images, size, config.interpolation)


def _normalise(images: Any, config: InputConfig, **arguments: Any) -> Any:
    return fn.crop_mirror_normalize(
        images, dtype=types.FLOAT16 if config.dtype == "float16" else types.FLOAT, output_layout="CHW",
        mean=(np.array(config.mean) * 255).tolist(), std=(np.array(config.std) * 255).tolist(), **arguments,
    )  # fmt: skip


def _has_policy(config: InputConfig) -> bool:
    return config.augment.rand_augment is not None or config.augment.trivial_augment


def train_graph(config: InputConfig, inputs: dict[str, Any], threads: int, device_id: int | None) -> Any:
    """Return the node that gives (3, H, W) float32 training images."""
    images = _resize(_decode(inputs, config, device_id), config.size, config, threads, device_id)
    if config.augment.affine is not None:
        images = fn.warp_affine(
            images, matrix=inputs["affine"], inverse_map=True, interp_type=types.INTERP_LINEAR, fill_value=0
        )
    if config.augment.color_jitter is not None:
        jitter = {name: inputs[name] for name in ("brightness", "contrast", "saturation", "hue")}
        images = fn.color_twist(images, **jitter)
    if _has_policy(config):
        images = auto_augment.apply(images, config.augment, inputs, config.size)
    images = _normalise(images, config, mirror=inputs["mirror"])
    if config.augment.random_erasing is not None:
        images = fn.erase(
            images, anchor=inputs["erase_start"], shape=inputs["erase_shape"], axis_names="HW", fill_value=0
        )
    return images


def eval_graph(config: InputConfig, inputs: dict[str, Any], threads: int, device_id: int | None) -> Any:
    """Return the node that gives (3, H, W) float32 evaluation images."""
    images = _resize(_decode(inputs, config, device_id), inputs["resize"], config, threads, device_id)
    return _normalise(images, config, crop=config.size, crop_pos_x=inputs["crop_x"], crop_pos_y=inputs["crop_y"])


def pipeline(
    config: InputConfig,
    source: Callable[[], Mapping[str, Any]],
    *,
    train: bool,
    batch_size: int,
    threads: int,
    device_id: int | None,
) -> Pipeline:
    """Build a pipeline that keeps `config.prefetch` batches on their way.

    Args:
        config: what the graph does.
        source: called for every batch; returns the values of the inputs by name, or raises StopIteration. DALI reads
            them in place: keep them alive until the batch's output is consumed.
        train: the training graph, else the evaluation graph.
        batch_size: images in a batch.
        threads: CPU threads of DALI; on the CPU as many more resize.
        device_id: the GPU, or None for the CPU.
    """
    # What is drawn for one image of one pixel has the names, dimensions and types of the inputs.
    one = np.ones(1, np.int64)
    params = train_params(config, Draws(0, one, one), one, one) if train else eval_params(config, one, one)
    examples = {"jpeg": np.zeros(1, np.uint8)} | {name: values[0] for name, values in params.items()}

    # RandAugment's choice between operations is a condition in the graph, for which DALI must convert this function.
    @pipeline_def(enable_conditionals=train and _has_policy(config))  # type: ignore[untyped-decorator]
    def graph() -> Any:
        inputs = _inputs(examples, source)
        return (train_graph if train else eval_graph)(config, inputs, threads, device_id)

    # DALI's own augmentations use names that it has moved, and warn past any filter, a page for each rank.
    with warnings.catch_warnings(record=True) as remarks:
        pipe = graph(
            batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=config.prefetch
        )
    for remark in remarks:
        if not issubclass(remark.category, DeprecationWarning):
            warnings.warn_explicit(remark.message, remark.category, remark.filename, remark.lineno)
    pipe.build()
    return pipe


def undecodable(
    images: Mapping[int, tuple[NDArray, NDArray, NDArray]], config: InputConfig, device_id: int | None
) -> dict[int, str]:
    """Decode a box of each image, one by one; return DALI's reasons for those that it cannot decode.

    The decoder is rebuilt after each of those only: on a GPU creating it takes far longer than decoding with it.

    Args:
        images: JPEG, start and shape of the box, by number.
        config: how images are decoded.
        device_id: the GPU, or None for the CPU.
    """
    reasons, pipe = {}, None
    batch: dict[str, list[NDArray]] = {}
    for number, values in images.items():
        image = dict(zip(("jpeg", "start", "shape"), values, strict=True))
        batch.update({name: [value] for name, value in image.items()})
        if pipe is None:
            pipe = Pipeline(1, 1, device_id, prefetch_queue_depth=1)
            with pipe:
                pipe.set_outputs(_decode(_inputs(image, lambda: batch), config, device_id))
        try:
            pipe.run()
        except RuntimeError as error:
            pipe = None
            if gpu_memory_is_full(error):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            # DALI's message is a page; the line after the source position says what is wrong.
            said = (line for line in lines if "decode" in line.lower() or "codec" in line.lower())
            reasons[number] = next(said, lines[0])
    return reasons
