"""The closed formulae agree with what torch builds and counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import LaViT, list_models, model_config
from models.cost import attention_macs, count_macs, count_parameters


def counted_macs(model, image_size):
    """Half the FLOPs that torch counts for one picture, on the meta device, where nothing is computed."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.empty(1, model.config.in_channels, *image_size, device="meta"))
    return counter.get_total_flops() / 2


SHAPE = {"widths": (32, 64, 160, 256), "depths": (2, 2, 3, 2), "patch_size": 4, "image_size": (64, 96),
         "heads": (1, 2, 5, 8), "reduction_ratios": (8, 4, 2, 1)}  # fmt: skip
OTHERS = [
    {"pool": "mean", "reduction_ratios": (4, 2, 1, 1), "vanilla_blocks": (1, 1, 2, 1)},
    {"attention_residual": False, "num_classes": 7, "in_channels": 1, "patch_size": 8, "image_size": (128, 192)},
    {"mlp_ratios": (8.0, 8.0, 4.0, 2.5), "heads": (2, 4, 5, 16), "vanilla_blocks": (1, 1, 1, 1)},
    {"learned_maps": False, "vanilla_blocks": (1, 1, 1, 1)},
]
NETWORKS = [(name, {}) for name in list_models()] + [("lavit_micro", SHAPE | changes) for changes in OTHERS]


@pytest.mark.parametrize(("name", "overrides"), NETWORKS)
def test_formulae_agree_with_torch_for_every_named_model_and_other_shapes(name, overrides):
    config = model_config(name, **overrides)
    with torch.device("meta"):
        model = LaViT(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)
    assert counted_macs(model, config.image_size) == count_macs(config)


@pytest.mark.parametrize(
    ("name", "parameters", "macs"), [("tiny", 10.9e6, 1.6e9), ("small", 22.4e6, 3.3e9), ("base", 39.6e6, 6.1e9)]
)
def test_the_geometry_meets_the_papers_totals(name, parameters, macs):
    config = model_config(f"lavit_{name}")
    assert count_parameters(config) == pytest.approx(parameters, rel=0.02)
    assert count_macs(config) == pytest.approx(macs, rel=0.03)
    assert all(width % 32 == 0 for width in config.widths)


def test_less_attention_saves_multiplications_where_the_family_uses_it_and_not_before():
    config = model_config("lavit_base")
    costs = [
        [attention_macs(config, stage, grids, less=less) for less in (False, True)]
        for stage, grids in enumerate(config.grids((224, 224)))
    ]
    assert [less < vanilla for vanilla, less in costs] == [False, False, True, True]
    assert [v < d for v, d in zip(config.vanilla_blocks, config.depths, strict=True)] == [False, False, True, True]
