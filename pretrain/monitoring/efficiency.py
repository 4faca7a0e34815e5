"""Model FLOPs utilisation (MFU): the share of the device's peak that the network's own products use.

    MFU = images/s * 6 * MACs / (devices * peak FLOP/s)

A MAC is two FLOP, and a backward pass computes twice the products of a forward pass: 2 * (1 + 2). What activation
checkpointing recomputes is not counted (PaLM, arXiv 2204.02311, appendix B).
"""

import re

import torch

from pretrain.devices import DEVICES

FLOPS_PER_MAC = 6


def peak_of(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device in what a run multiplies in; None on a CPU and on a GPU whose peak is not known here.

    Args:
        device: of this rank.
        precision: as ``pretrain.engine.precision`` names it.
    """
    if device.type != "cuda":
        return None
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16  # of float16 it is the same
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"  # `allow_tf32` cannot be read once this one was set
    name = torch.cuda.get_device_name(device)
    return next((known.peak(dtype, tf32=tf32) for known in DEVICES.values() if re.search(known.pattern, name)), None)


def model_flops_per_image(macs: int) -> int:
    """FLOP that a training step needs for one image whose forward pass has ``macs``, without what is recomputed."""
    return FLOPS_PER_MAC * macs
