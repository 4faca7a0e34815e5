"""What cannot work is refused in one line that names the field."""

import functools
import sys
import types

import pytest
import torch
from torch import nn

from models import LaViT, LaViTConfig, config, create_model, list_models
from tests.models.test_lavit import small


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (2, 2, 2)}, "depths: 4 positive integers"),
        ({"vanilla_blocks": (0, 1, 1, 1)}, "vanilla_blocks: 4 positive integers"),
        ({"vanilla_blocks": (1, 1, 4, 1)}, "vanilla_blocks: stage 3 has 4 of them, but depths gives it 3 blocks"),
        ({"heads": (1, 2, 3, 3)}, "heads: 3 heads cannot share stage 3's width of 16"),
        ({"widths": (8.0, 16, 16, 24)}, "widths: 4 positive integers"),
        ({"mlp_ratios": (4.0, 4.0, 0.0, 4.0)}, "mlp_ratios: 4 positive numbers"),
        ({"mlp_ratios": ("4", 4.0, 4.0, 4.0)}, "mlp_ratios: 4 positive numbers"),
        ({"mlp_ratios": (4.0, 4.0, 4.0, float("inf"))}, "mlp_ratios: 4 positive numbers"),
        ({"mlp_ratios": (0.01, 4.0, 4.0, 4.0)}, "mlp_ratios: 0.01 of stage 1's width of 8 is nothing"),
        ({"attention_residual": "no"}, "attention_residual: true or false"),
        ({"learned_maps": 1}, "learned_maps: true or false"),
        ({"image_size": 32.5}, "image_size: "),
        ({"reduction_ratios": (2, 4, 4, 4)}, "image_size: 32 x 32 pixels; each side must be a multiple of 64"),
        ({"reduction_ratios": (8, 2, 1, 1)}, "reduction_ratios: a key of stage 2 covers 8 pixels"),
        ({"image_size": (64, 32, 3)}, "image_size: "),
        ({"patch_size": 0}, "patch_size: a positive integer"),
        ({"num_classes": 0}, "num_classes: a positive integer"),
        ({"in_channels": "rgb"}, "in_channels: a positive integer"),
        ({"pool": "max"}, "pool: 'class_attention' or 'mean'"),
        ({"norm": "batch"}, "norm: 'torch' or 'apex'"),
        ({"drop_path": 1.0}, "drop_path: at least 0 and below 1"),
        ({"drop_path": "0.1"}, "drop_path: at least 0 and below 1"),
    ],
)
def test_an_architecture_that_makes_no_sense_is_refused_and_the_field_named(fields, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        create_model("lavit_micro", **{"num_classes": 5, "patch_size": 2, "widths": (8, 16, 16, 24),
                                       "depths": (1, 2, 3, 2), "heads": (1, 2, 2, 3),
                                       "reduction_ratios": (4, 2, 1, 1)} | fields)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 32, 40), "image_size: 32 x 40 pixels; each side must be a multiple of 16"),
        ((1, 1, 32, 32), r"images: \(batch, 3, height, width\) is wanted"),
        ((3, 32, 32), r"images: \(batch, 3, height, width\) is wanted"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "forward_features"])
def test_images_of_a_wrong_shape_are_refused(shape, message, method):
    with pytest.raises(ValueError, match=message):
        getattr(small(), method)(torch.zeros(shape))


def test_uniforms_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"drop_path_uniforms: \(16, 2\) is wanted"):
        small()(torch.zeros(2, 3, 32, 32), drop_path_uniforms=torch.zeros(2, 16))


@pytest.mark.parametrize("policy", ["some", (True, False), [True] * 5])
def test_an_unknown_checkpointing_policy_is_refused(policy):
    with pytest.raises(ValueError, match="activation checkpointing"):
        small().set_activation_checkpointing(policy)


def test_an_unknown_name_or_override_lists_the_near_ones():
    with pytest.raises(ValueError, match=r"'lavit_smal'; near it: lavit_small"):
        create_model("lavit_smal")
    with pytest.raises(ValueError, match="'resnet50'; known: lavit_micro"):
        create_model("resnet50")
    with pytest.raises(ValueError, match="'depth'; near it: depths"):
        create_model("lavit_micro", depth=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="no field width"):
        LaViTConfig.from_dict({"width": 3})


@pytest.mark.parametrize("value", ["torch", "triton"])
def test_a_field_of_earlier_versions_is_ignored_with_one_logged_line(value, caplog, monkeypatch):
    """Recipes name it among the overrides, hand-offs in their architecture."""
    monkeypatch.setattr(config, "_log_removed", functools.cache(config._log_removed.__wrapped__))
    expected = small().config
    for _ in range(2):
        assert small(attention_kernel=value).config == expected
        assert LaViTConfig.from_dict(expected.to_dict() | {"attention_kernel": value}) == expected
    assert caplog.messages == ["model: the field attention_kernel was removed and is ignored: it changed no weight"]


def test_every_listed_name_has_a_vanilla_twin_without_less_attention():
    sizes = ("micro", "tiny", "small", "base", "large", "huge")
    assert list_models() == [f"lavit_{size}{twin}" for size in sizes for twin in ("", "_vanilla")]
    with torch.device("meta"):
        twin = create_model("lavit_tiny_vanilla", depths=(1, 1, 2, 1))
    assert isinstance(twin, LaViT)
    assert [n for n, _ in twin.named_parameters() if "theta" in n or "psi" in n or "residual" in n] == []


def install_apex(monkeypatch, layer):
    """An apex with this FusedLayerNorm; None: PyPI's, which has no apex.normalization."""
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.delitem(sys.modules, "apex.normalization", raising=False)
    if layer is not None:
        monkeypatch.setitem(sys.modules, "apex.normalization", types.SimpleNamespace(FusedLayerNorm=layer))


class BrokenNorm(nn.Module):
    def __init__(self, width, eps):
        raise ImportError("No module named 'fused_layer_norm_cuda'")


@pytest.mark.parametrize(
    ("layer", "told"),
    [(None, r"NVIDIA's apex.*PyPI's 'apex' is an unrelated"), (BrokenNorm, r"fused_layer_norm_cuda.*--cuda_ext")],
)
def test_an_apex_that_cannot_be_used_is_refused_with_the_way_out(layer, told, monkeypatch):
    install_apex(monkeypatch, layer)
    with pytest.raises(RuntimeError, match=told):
        create_model("lavit_micro", norm="apex")


def test_a_working_apex_is_used_for_every_norm_and_shares_weights_with_torchs(monkeypatch):
    class Fused(nn.LayerNorm):
        pass

    install_apex(monkeypatch, Fused)
    fused, plain = small(norm="apex"), small()
    assert {type(m) for m in fused.modules() if isinstance(m, nn.LayerNorm)} == {Fused}
    fused.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(fused(images), plain(images))
