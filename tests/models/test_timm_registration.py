"""Every LaViT is one of timm's models, with the numbers of our own."""

import pytest
import torch

from models import create_model, list_models
from tests.pages import snippets
from tests.pretrain.handoffs import hand_off
from tests.rounding import allowed_error, relative_error

pytestmark = pytest.mark.timm
ALLOWED = allowed_error(operations=80, terms=640)
"""Ten operations in a row in each of some eight blocks; the longest sums are over an MLP's hidden width or less."""


def build(name="lavit_micro", **arguments):
    import timm

    import models.timm_registration  # noqa: F401

    torch.manual_seed(0)
    return timm.create_model(name, **arguments).eval()


def state_file(tmp_path, model):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


def ours(seed=1, **options):
    torch.manual_seed(seed)
    model = create_model("lavit_micro", **({"num_classes": 7} | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def test_timm_lists_every_name_and_knows_its_input():
    import timm
    from timm.data import resolve_model_data_config

    assert resolve_model_data_config(build("lavit_tiny"))["input_size"] == (3, 224, 224)
    assert resolve_model_data_config(build("lavit_micro"))["input_size"] == (3, 32, 32)
    assert set(timm.list_models("lavit_*")) >= set(list_models())


@pytest.mark.parametrize("name", ["lavit_tiny", "lavit_small", "lavit_base"])
def test_four_maps_at_strides_4_to_32_with_the_stated_channels(name):
    model = build(name, features_only=True)
    images = torch.randn(1, 3, 224, 224)
    torch.manual_seed(0)
    net = create_model(name).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == list(net.config.widths)
    with torch.no_grad():
        maps, expected = model(images), net.forward_features(images)
    assert [tuple(m.shape[2:]) for m in maps] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


def test_some_maps_only_cost_only_the_stages_they_need():
    model, whole = build(features_only=True, out_indices=(0, 2)), build(features_only=True)
    images = torch.randn(2, 3, 64, 32)
    assert len(model.model.stages) == 3
    assert all(torch.equal(a, whole(images)[i]) for a, i in zip(model(images), (0, 2), strict=True))
    assert model.feature_info.reduction() == [4, 16]


@pytest.mark.parametrize("pool", ["map", "avg"])
def test_a_checkpoint_of_ours_gives_the_same_logits_bit_for_bit(pool, tmp_path):
    net = ours(pool={"map": "class_attention", "avg": "mean"}[pool])
    model = build(num_classes=7, global_pool=pool, checkpoint_path=state_file(tmp_path, net))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), net(images))
    assert model.forward_features(images).shape == (2, 160, 1, 1)
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, 160)
    last, maps = model.forward_intermediates(images, indices=[1, 3])
    assert torch.equal(last, model.forward_features(images))
    assert torch.equal(maps[1], net.forward_features(images)[3])


def test_another_size_is_resampled_and_other_classes_get_a_fresh_head(tmp_path):
    net = ours()
    overlay = {"file": state_file(tmp_path, net), "num_classes": 7}
    model = build(num_classes=3, img_size=(64, 96), pretrained=True, pretrained_cfg_overlay=overlay)
    images = torch.randn(1, 3, 64, 96)
    net.double()
    maps = model.forward_intermediates(images, intermediates_only=True)
    for a, b in zip(maps, net.forward_features(images.double()), strict=True):
        assert relative_error(a, b) < ALLOWED
    assert model(images).shape == (1, 3)
    kept = build(num_classes=7, img_size=(64, 96), pretrained=True, pretrained_cfg_overlay=overlay)
    assert relative_error(kept(images), net(images.double())) < ALLOWED


def test_pretrained_without_a_file_is_an_error_and_not_random_weights():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for lavit_micro"):
        build(pretrained=True)


def test_the_classifier_can_be_read_replaced_and_left_out():
    model = build(num_classes=7)
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.num_features, 1, 1)
    assert build(num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 160)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "map")
    with pytest.raises(ValueError, match="no field of a model is called 'drop_pathrate'"):
        build(drop_pathrate=0.1)


def test_drop_path_and_checkpointing_train_and_checkpointing_changes_nothing():
    model = build(num_classes=3, drop_path_rate=0.3).train().double()
    images, gradients = torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        model(images).square().sum().backward()
        gradients.append(model.stages[0].embed.conv.weight.grad.clone())
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)
    torch.manual_seed(6)
    assert not torch.allclose(model(images), model(images))


def test_timms_layer_decay_counts_layers_as_ours_does():
    from timm.models import group_parameters

    model = build()
    grouped = group_parameters(model, model.group_matcher(), return_values=False)
    names = [sorted(grouped[key]) for key in sorted(grouped)]
    assert sorted(n for group in names for n in group) == sorted(n for n, _ in model.named_parameters())
    assert names == [sorted(group) for group in model.layer_groups()]


def test_the_snippets_of_timm_and_torchvision_run(tmp_path, monkeypatch):
    shown = [block for page, block in snippets("python") if "timm" in block or "torchvision" in block]
    assert len(shown) == 2
    hand_off(tmp_path / "runs/demo/handoff", create_model("lavit_micro", num_classes=10, image_size=32))
    hand_off(tmp_path / "runs/NAME/handoff", create_model("lavit_small", num_classes=1000, image_size=224))
    monkeypatch.chdir(tmp_path)
    for content in shown:
        found = {}
        exec(content, found)
    assert len(found["losses"]) == 4
    sum(found["losses"].values()).backward()
    assert found["net"].stages[0].embed.conv.weight.grad.abs().sum() > 0
