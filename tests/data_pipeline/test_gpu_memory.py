"""A full GPU is known by the words of every library that may meet it, and no picture is blamed for it."""

import itertools
from pathlib import Path

import pytest
import torch

from data_pipeline.dataset import Dataset
from data_pipeline.gpu_memory import gpu_memory_is_full
from tests.data_pipeline.datasets import spoil_scan, training

FULL = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "driver": torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "NCCL": torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error, NCCL version 2.28.9\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "DALI": RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"),
    "DALI's pool": MemoryError("Can't allocate 67108864 bytes on device 0."),
}
NOT_FULL = {
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    "host in DALI": MemoryError("Can't allocate 67108864 bytes on host."),
    "another CUDA error": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "a peer is gone": torch.distributed.DistBackendError(
        "NCCL error: remote process exited or there was a network error"
    ),
    "a file's name": OSError("cuda out of memory.tar: No such file or directory"),
}


@pytest.mark.parametrize("said", [*FULL, *NOT_FULL])
def test_a_full_gpu_is_told_from_other_errors(said: str) -> None:
    assert gpu_memory_is_full({**FULL, **NOT_FULL}[said]) is (said in FULL)


def test_no_image_is_marked_as_bad_where_the_gpu_was_full(copy: Path) -> None:
    spoil_scan(copy)  # would be found if the images were examined
    with training(Dataset.open(copy, "train")) as loader:
        take = loader._engine._take

        def full() -> torch.Tensor:
            try:
                return take()
            except RuntimeError:
                raise FULL["DALI"] from None

        loader._engine._take = full
        with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
            list(itertools.islice(loader, 24))
