"""Whether to compute on GPUs, and their peaks as their maker states them, which plans and MFU are compared with.

Dense products, without sparsity. Sources: NVIDIA's data sheets "H100 Tensor Core GPU" (its SXM and PCIe columns), "H200
Tensor Core GPU" (SXM) and "A100 Tensor Core GPU"; where they say "with sparsity" the number is halved. Gigabytes are
10^9 bytes.
"""

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.outcome import UserError

FLOPS_PER_MAC = 6
"""Of training: a MAC is two FLOP, and a backward pass computes twice the products of a forward pass, 2 * (1 + 2). What
activation checkpointing recomputes is not counted (PaLM, arXiv 2204.02311, appendix B)."""
DEVICE_FILES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
_HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs; the last is Slurm's."""


def use_gpu(wanted: str = "auto") -> bool:
    """Whether to compute on GPUs.

    Args:
        wanted: "cuda", "cpu", or "auto": on GPUs where torch finds some. ``DS_ACCELERATOR`` in the environment, which
            DeepSpeed reads too, takes the place of "auto".

    Raises:
        UserError: torch finds no GPU, though "cuda" is wanted or there is evidence of a GPU.
    """
    wanted = os.environ.get("DS_ACCELERATOR", wanted) if wanted == "auto" else wanted
    if wanted == "cpu":
        return False
    with warnings.catch_warnings(record=True) as caught:
        if torch.cuda.is_available():
            return True
    if evidence := "--device cuda" if wanted == "cuda" else _evidence_of_gpu():
        said = "".join(f" ({' '.join(str(warning.message).split())})" for warning in caught[-1:])
        raise UserError(f"torch finds no GPU in spite of {evidence}{said}: {_why_no_gpu()}, or choose --device cpu")
    return False


def _evidence_of_gpu() -> str:
    """Evidence that this process has a GPU; "" without any."""
    if devices := sorted(DEVICE_FILES.glob("nvidia[0-9]*")):
        return str(devices[0])
    if (count := os.environ.get("SLURM_GPUS_ON_NODE", "0")) not in ("", "0"):
        return f"SLURM_GPUS_ON_NODE={count}"
    # On a machine without GPUs the `deepspeed` launcher numbers the ranks in it. That launcher alone sets CROSS_RANK.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return "" if visible in _HIDDEN or "CROSS_RANK" in os.environ else f"CUDA_VISIBLE_DEVICES={visible}"


def _why_no_gpu() -> str:
    """The likely reason why torch finds no GPU, and what to do about it."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES", "0")) in _HIDDEN:
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides all of them: unset it"
    driver = re.search(r"\b\d{3}\.[\d.]+", DRIVER.read_text()) if DRIVER.exists() else None
    versions = f"NVIDIA's driver is {driver[0] if driver else 'not loaded'}, torch {torch.__version__} is built "
    if torch.version.cuda is None:
        return f"{versions}without CUDA: install a build of torch with CUDA"
    return f"{versions}for CUDA {torch.version.cuda}: install a driver for this version of CUDA"


@dataclass(frozen=True)
class Device:
    """One kind of GPU."""

    name: str
    pattern: str
    """Regular expression for the name that torch gives it."""
    tensor_flops: float
    """FLOP/s of dense products in bfloat16 and float16."""
    tf32_flops: float
    fp32_flops: float
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second to the other GPUs of its node, one way (NVLink; half of what the data sheet adds up)."""

    def peak(self, dtype: torch.dtype, *, tf32: bool = False) -> float:
        """FLOP/s of dense products of bfloat16, float16 or float32, the latter in TF32 where that is allowed."""
        if dtype in (torch.bfloat16, torch.float16):
            return self.tensor_flops
        return self.tf32_flops if tf32 else self.fp32_flops


DEVICES = {
    "h200": Device("H200 SXM", r"\bH200\b", 989e12, 494.5e12, 67e12, 141e9, 4.8e12, 450e9),
    "h100": Device("H100 SXM", r"\bH100\b(?!.*(PCIe|NVL))", 989e12, 494.5e12, 67e12, 80e9, 3.35e12, 450e9),
    "h100-pcie": Device("H100 PCIe", r"\bH100\b.*PCIe", 756e12, 378e12, 51e12, 80e9, 2.0e12, 300e9),
    "a100": Device("A100 80 GB SXM", r"\bA100\b.*80GB", 312e12, 156e12, 19.5e12, 80e9, 2.039e12, 300e9),
    "a100-40": Device("A100 40 GB SXM", r"\bA100\b(?!.*80GB)", 312e12, 156e12, 19.5e12, 40e9, 1.555e12, 300e9),
}
"""By the name that a user types."""
