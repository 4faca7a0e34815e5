"""The DALI graphs. They hold no random operator: whatever differs from image to image comes in as an argument.

One graph serves both devices: with a GPU the decoder is "mixed" (bytes on the host, pixels on the device) and
everything after it follows the pixels; without one it is "cpu", and torch resizes.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from data_pipeline import auto_augment, resize
from data_pipeline.gpu_memory import gpu_memory_is_full
from data_pipeline.transforms import InputConfig

Source = Callable[..., list[Any]]

# Dimensions and type of an image's inputs, as DALI wants them.
_INPUTS = {
    "jpeg": (1, types.UINT8),
    "start": (1, types.INT32),
    "shape": (1, types.INT32),
    "mirror": (0, types.INT32),
    "affine": (2, types.FLOAT),
    "brightness": (0, types.FLOAT),
    "contrast": (0, types.FLOAT),
    "saturation": (0, types.FLOAT),
    "hue": (0, types.FLOAT),
    "operation": (1, types.INT32),
    "strength": (1, types.INT32),
    "sign": (1, types.INT32),
    "erase_start": (1, types.FLOAT),
    "erase_shape": (1, types.FLOAT),
    "resize": (1, types.FLOAT),
    "crop_x": (0, types.FLOAT),
    "crop_y": (0, types.FLOAT),
}


@do_not_convert  # type: ignore[untyped-decorator]
def _inputs(names: list[str], source: Source) -> dict[str, Any]:
    """Return the node of each input; `source` is called for every batch and returns their values in this order.

    DALI reads them in place: the caller keeps them alive until the batch's output is consumed.
    """
    kinds = [_INPUTS[name] for name in names]
    nodes = fn.external_source(
        source, num_outputs=len(names), ndim=[ndim for ndim, _ in kinds], dtype=[dtype for _, dtype in kinds],
        no_copy=True,
    )  # fmt: skip
    return dict(zip(names, nodes, strict=True))


def in_place(values: NDArray | list[NDArray[np.uint8]]) -> TensorListCPU:
    """Wrap the values of a batch's input for DALI without a copy; the result keeps the arrays alive.

    Args:
        values: an array with a row for each image, or an array for each image.
    """
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
    where: dict[str, Any] = {"device": "cpu"}
    if device_id is not None:
        height, width = config.preallocate_hint
        where = {
            "device": "mixed", "hw_decoder_load": config.hw_decoder_load,
            "device_memory_padding": config.device_memory_padding,
            "preallocate_height_hint": height, "preallocate_width_hint": width,
        }  # fmt: skip
    return fn.decoders.image_slice(
        inputs["jpeg"], start=inputs["start"], shape=inputs["shape"], axes=[0, 1], output_type=types.RGB, **where
    )


def _resize(images: Any, size: Any, config: InputConfig, threads: int, device_id: int | None) -> Any:
    if device_id is None:
        return resize.by_torch(images, size, config.interpolation, threads)
    return resize.by_dali(images, size, config.interpolation)


def _normalise(images: Any, config: InputConfig, **arguments: Any) -> Any:
    return fn.crop_mirror_normalize(
        images, dtype=types.FLOAT16 if config.dtype == "float16" else types.FLOAT, output_layout="CHW",
        mean=(np.array(config.mean) * 255).tolist(), std=(np.array(config.std) * 255).tolist(), **arguments,
    )  # fmt: skip


def train_inputs(config: InputConfig) -> list[str]:
    """Return the names of what the training graph is fed with."""
    augment = config.augment
    names = ["jpeg", "start", "shape", "mirror"]
    if augment.affine is not None:
        names += ["affine"]
    if augment.color_jitter is not None:
        names += ["brightness", "contrast", "saturation", "hue"]
    if _has_policy(config):
        names += ["operation", "strength", "sign"]
    if augment.random_erasing is not None:
        names += ["erase_start", "erase_shape"]
    return names


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


def eval_inputs(config: InputConfig) -> list[str]:  # noqa: ARG001  (as train_inputs)
    """Return the names of what the evaluation graph is fed with."""
    return ["jpeg", "start", "shape", "resize", "crop_x", "crop_y"]


def eval_graph(config: InputConfig, inputs: dict[str, Any], threads: int, device_id: int | None) -> Any:
    """Return the node that gives (3, H, W) float32 evaluation images."""
    images = _resize(_decode(inputs, config, device_id), inputs["resize"], config, threads, device_id)
    return _normalise(images, config, crop=config.size, crop_pos_x=inputs["crop_x"], crop_pos_y=inputs["crop_y"])


def pipeline(
    config: InputConfig, source: Source, *, train: bool, batch_size: int, threads: int, device_id: int | None
) -> Pipeline:
    """Build a pipeline that keeps `config.prefetch` batches on their way.

    Args:
        config: what the graph does.
        source: called for every batch with the names of the inputs; returns their values, or raises StopIteration.
            DALI reads the values in place: keep them alive until the batch's output is consumed.
        train: the training graph, else the evaluation graph.
        batch_size: images in a batch.
        threads: CPU threads of DALI; on the CPU as many more resize.
        device_id: the GPU, or None for the CPU.
    """
    names = (train_inputs if train else eval_inputs)(config)

    def feed() -> list[Any]:
        return source(names)

    # RandAugment's choice between operations is a condition in the graph, for which DALI must convert this function.
    @pipeline_def(enable_conditionals=train and _has_policy(config))  # type: ignore[untyped-decorator]
    def graph() -> Any:
        inputs = _inputs(names, feed)
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


class SingleDecoder:
    """Decodes images one by one, to find those that cannot be decoded.

    It is rebuilt after each of those only: on a GPU creating a decoder takes far longer than decoding with it.
    """

    def __init__(self, config: InputConfig, device_id: int | None) -> None:
        self._config, self._device_id = config, device_id
        self._values: dict[str, Any] = {}
        self._pipe: Pipeline | None = None

    def why_not(self, jpeg: NDArray[np.uint8], start: NDArray[np.int32], shape: NDArray[np.int32]) -> str:
        """Decode a box of an image and return DALI's reason when it cannot, else ''."""
        self._values = {"jpeg": [jpeg], "start": start[None], "shape": shape[None]}
        pipe = self._pipe = self._pipe or self._built()
        try:
            pipe.run()
        except RuntimeError as error:
            self._pipe = None
            if gpu_memory_is_full(error):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            # DALI's message is a page; the line after the source position says what is wrong.
            return next((line for line in lines if "decode" in line.lower() or "codec" in line.lower()), lines[0])
        return ""

    def _built(self) -> Pipeline:
        pipe = Pipeline(1, 1, self._device_id, prefetch_queue_depth=1)
        with pipe:
            inputs = _inputs(list(self._values), lambda: list(self._values.values()))
            pipe.set_outputs(_decode(inputs, self._config, self._device_id))
        return pipe
