"""Peaks of GPUs, as their maker states them: what a plan and MFU are measured against.

Dense products, without sparsity. Sources: NVIDIA's data sheets "H100 Tensor Core GPU" (its SXM and PCIe columns), "H200
Tensor Core GPU" (SXM) and "A100 Tensor Core GPU"; where they say "with sparsity" the number is halved. Gigabytes are
10^9 bytes.
"""

import re
from dataclasses import dataclass

import torch


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
        """FLOP/s of dense products of bfloat16, float16 or float32, the latter in TF32 where that is allowed.

        Raises:
            ValueError: another type.
        """
        if dtype in (torch.bfloat16, torch.float16):
            return self.tensor_flops
        if dtype != torch.float32:
            raise ValueError(f"the peak of {dtype} is not in the table")
        return self.tf32_flops if tf32 else self.fp32_flops


DEVICES = {
    "h200": Device("H200 SXM", r"\bH200\b", 989e12, 494.5e12, 67e12, 141e9, 4.8e12, 450e9),
    "h100": Device("H100 SXM", r"\bH100\b(?!.*(PCIe|NVL))", 989e12, 494.5e12, 67e12, 80e9, 3.35e12, 450e9),
    "h100-pcie": Device("H100 PCIe", r"\bH100\b.*PCIe", 756e12, 378e12, 51e12, 80e9, 2.0e12, 300e9),
    "a100": Device("A100 80 GB SXM", r"\bA100\b.*80GB", 312e12, 156e12, 19.5e12, 80e9, 2.039e12, 300e9),
    "a100-40": Device("A100 40 GB SXM", r"\bA100\b(?!.*80GB)", 312e12, 156e12, 19.5e12, 40e9, 1.555e12, 300e9),
}
"""By the name that a person types."""


def find_device(torch_name: str) -> Device | None:
    """The GPU that ``torch.cuda.get_device_name()`` calls so; None: its peak is not known here."""
    return next((device for device in DEVICES.values() if re.search(device.pattern, torch_name)), None)


def peak_flops(torch_name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Peak FLOP/s of dense products on a GPU; None where it is not known, and MFU with it.

    Args:
        torch_name: as ``torch.cuda.get_device_name()`` gives it.
        dtype: what is multiplied.
        tf32: whether products of float32 are computed in TF32.
    """
    device = find_device(torch_name)
    return None if device is None else device.peak(dtype, tf32=tf32)
