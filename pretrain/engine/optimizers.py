"""AdamW, LAMB and SGD over the parameter groups of a network."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from pretrain.recipe import OptimizerSection


def build_optimizer(
    model: torch.nn.Module,
    section: OptimizerSection,
    *,
    no_decay: set[str],
    layers: Sequence[Sequence[str]],
) -> tuple[torch.optim.Optimizer, list[str]]:
    """The recipe's optimizer over the groups of ``parameter_groups``.

    AdamW (Loshchilov and Hutter 2019) is torch's fused one, on GPUs and CPUs. LAMB (You et al. 2020) is apex's or,
    without NVIDIA's apex, pytorch_optimizer's, both with the choices of the authors' code: the bias of the moments is
    not corrected, since the warm-up has the same effect; the trust ratio is not limited; what is spared weight decay
    has trust ratio 1. SGD is torch's, with momentum; its decay is added to the gradient. None of them clips.
    ``no_decay`` names the parameters that weight decay spares, ``layers`` all of them in the order of depth, for
    ``layer_decay``; those that need no gradient are left out.

    Returns:
        the optimizer, whose groups have ``lr_scale`` and torch's own keys (the learning rate is set before every
        step; the one given here is never used), and lines about what was chosen.
    """
    groups = parameter_groups(model, section, no_decay=no_decay, layers=layers)
    notes = []
    if section.layer_decay < 1:
        scales = [group["lr_scale"] for group in groups]
        notes.append(
            f"learning rate by depth: from {min(scales):.3g} of the schedule's in the first layer to {max(scales):.3g}"
        )
    if section.kind == "lamb":
        optimizer, note = _lamb(groups, section)
        return optimizer, [*notes, note]
    if section.kind == "sgd":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum, fused=True), notes
    options: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    return torch.optim.AdamW(groups, fused=True, **options), notes


def parameter_groups(
    model: torch.nn.Module, section: OptimizerSection, *, no_decay: set[str], layers: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Groups of equal weight decay and, with ``layer_decay`` below 1, of equal depth.

    The learning rate of a layer is ``layer_decay ** (layers above it)`` of the schedule's (Clark et al. 2020), so the
    last layer, the head, has all of it.

    Raises:
        ValueError: a spared name does not exist, or a parameter is in no layer or in two.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if unknown := no_decay - {name for name, _ in model.named_parameters()}:
        raise ValueError(f"no_weight_decay names parameters that the model does not have: {sorted(unknown)}")
    if section.layer_decay == 1:
        depths = [list(named)]
    else:
        depths = [list(layer) for layer in layers]
        if sorted(name for layer in depths for name in layer) != sorted(name for name, _ in model.named_parameters()):
            raise ValueError("layers: every parameter of the model must be in exactly one of them")
    groups = []
    for above, layer in zip(range(len(depths) - 1, -1, -1), depths, strict=True):
        for spared in (False, True):
            parameters = [named[name] for name in layer if name in named and (name in no_decay) is spared]
            if parameters:
                decay = 0.0 if spared else section.weight_decay
                groups.append({"params": parameters, "weight_decay": decay, "lr_scale": section.layer_decay**above})
    return groups


def peak_learning_rate(section: OptimizerSection, global_batch: int) -> tuple[float, str]:
    """The learning rate at the end of the warm-up, and one line about how it came about.

    With ``lr_for_batch`` it grows with the global batch: linearly (Goyal et al. 2017), for LAMB by the square root (You
    et al. 2020).
    """
    if section.lr_for_batch is None:
        return section.lr, f"learning rate: {section.lr:g} at its peak, as given; nothing rescales it"
    ratio = global_batch / section.lr_for_batch
    peak = section.lr * (math.sqrt(ratio) if section.kind == "lamb" else ratio)
    rule = "with the square root of the batch" if section.kind == "lamb" else "linearly"
    return peak, (
        f"learning rate: {peak:g} at its peak for the global batch of {global_batch}, scaled {rule} from "
        f"{section.lr:g} for {section.lr_for_batch}"
    )


def _lamb(groups: list[dict[str, Any]], section: OptimizerSection) -> tuple[torch.optim.Optimizer, str]:
    options: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    try:
        from apex.optimizers import FusedLAMB  # noqa: PLC0415 - NVIDIA's; PyPI's apex is another package

        # It clips by itself at 1.0 unless set otherwise; clipping is set once, in ds_config.json.
        optimizer = FusedLAMB(groups, bias_correction=False, max_grad_norm=math.inf, **options)
    except Exception as error:  # noqa: BLE001 - without CUDA extensions it raises here; another package may raise anything
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    else:
        return optimizer, "LAMB: FusedLAMB of NVIDIA's apex (it is installed)"
    from pytorch_optimizer import Lamb  # noqa: PLC0415 - imports a hundred optimizers

    for group in groups:
        group["adam"] = group["weight_decay"] == 0  # trust ratio 1, as in apex and the authors' code
    # Its own defaults decay outside of the trust ratio, multiply early steps by 1 / (1 - beta1^t), which they call
    # correcting, and limit the norm of weights to 10, which those of wide layers exceed.
    library = Lamb(groups, weight_decouple=False, adam_debias=True, **options)
    library.clamp = math.inf
    return library, f"LAMB: pytorch_optimizer's, slower than the fused one of NVIDIA's apex ({problem})"
