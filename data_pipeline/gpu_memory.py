"""Whether an error means that a GPU's memory is full, whichever library raised it."""

import re

import torch

_FULL = re.compile(
    # The driver's own, of torch ("CUDA error: out of memory"), of NCCL ("Cuda failure 2 'out of memory'") and of DALI.
    r"cuda\b.{0,40}out of memory|cudaErrorMemoryAllocation|CU(BLAS|DNN)_STATUS_\w*ALLOC|NVJPEG_STATUS_ALLOC"
    r"|CUDA allocation failed|Can't allocate \d+ bytes on device",
    re.IGNORECASE | re.DOTALL,
)


def gpu_memory_is_full(error: BaseException) -> bool:
    """Whether a GPU had no memory left. torch's allocator has an exception for it, all others only a message."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, (RuntimeError, MemoryError)) and _FULL.search(str(error)) is not None
    )
