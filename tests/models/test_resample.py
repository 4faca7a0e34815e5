"""Other image sizes: Psi, Theta and position embeddings follow the grid."""

import copy

import pytest
import torch

from models import create_model, load_weights
from models.attention import LessAttention
from models.resample import resample_map, resample_table
from tests.models.test_lavit import SMALL, small


def smooth(grid, harmonics=2):
    """A smooth image with values of order one: the product of a few cosines that fit the grid's borders."""
    rows = (torch.arange(grid[0]) + 0.5) / grid[0] * torch.pi
    columns = (torch.arange(grid[1]) + 0.5) / grid[1] * torch.pi
    generator = torch.Generator().manual_seed(0)
    amounts = torch.randn(harmonics, harmonics, generator=generator)
    pairs = [(i, j) for i in range(harmonics) for j in range(harmonics)]
    return sum(amounts[i, j] * torch.outer((i * rows).cos(), (j * columns).cos()) for i, j in pairs)


@pytest.mark.parametrize("target", [(24, 24), (32, 48), (7, 7), (9, 21)])
def test_a_fresh_identity_stays_exactly_the_identity(target):
    weight = resample_map(torch.eye(14 * 14), (14, 14), target)
    assert torch.equal(weight, torch.eye(target[0] * target[1]))


def test_the_same_grid_changes_nothing():
    weight, table = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    torch.testing.assert_close(resample_map(weight, (3, 4), (3, 4)), weight)
    torch.testing.assert_close(resample_table(table, (3, 4), (3, 4)), table)


@pytest.mark.parametrize("target", [(16, 16), (12, 20), (8, 6)])
def test_a_smooth_map_and_a_smooth_table_follow_their_formulae_to_another_grid(target):
    """A map written as products of cosines is known on every grid; a sum over T' tokens weighs each by 1 / T'."""

    def waves(grid):
        return [smooth(grid, n).flatten() for n in (1, 2)]

    def formula(grid):
        return sum(torch.outer(a, b) for a in waves(grid) for b in waves(grid)) / (grid[0] * grid[1])

    resampled, expected = resample_map(torch.eye(64) + formula((8, 8)), (8, 8), target), formula(target)
    error = (resampled - torch.eye(len(resampled)) - expected).norm() / expected.norm()
    assert error < 0.005  # bicubic misses by 0.001 here, bilinear by 0.01, repeating the nearest token by 0.04 to 0.09
    table, expected = torch.stack(waves((8, 8)), 1), torch.stack(waves(target), 1)
    assert (resample_table(table, (8, 8), target) - expected).norm() / expected.norm() < 0.005


def perturbed(model):
    """As after training: Psi and Theta moved smoothly off the identity, position embeddings smooth and large."""
    with torch.no_grad():
        for stage in model.stages:
            grid = stage.position.grid
            for channel in range(stage.position.table.shape[2]):
                stage.position.table[:, :, channel] = smooth(grid, 1 + channel % 2) * 0.2
            for block in stage.blocks:
                if isinstance(block.attention, LessAttention):
                    for module in (block.attention.theta, block.attention.psi):
                        wave = smooth(module.grid).flatten()
                        module.weight += torch.outer(wave, wave) / wave.numel()
            if stage.residual is not None:
                stage.residual.gamma.fill_(0.3)
    return model


@pytest.mark.parametrize("size", [(48, 48), (64, 96), (32, 64), (128, 192)])
def test_loading_at_another_size_equals_resampling_on_the_way(size):
    model = perturbed(small()).double().eval()
    other = small(image_size=size).double().eval()
    resampled = load_weights(other, model.state_dict())
    assert "stages.2.blocks.1.attention.psi.weight" in resampled
    assert "stages.0.position.table" in resampled
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(other(images), model(images))
    assert not torch.allclose(other(images), small(image_size=size).double().eval()(images))


def test_loading_names_every_tensor_that_does_not_fit_and_changes_nothing():
    model = small()
    before = copy.deepcopy(model.state_dict())
    state = {k: v + 1 for k, v in small().state_dict().items()}
    state["head.weight"] = torch.zeros(7, 24)
    del state["norm.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_weights(model, state)
    for line in ("shape: head.weight is (7, 24), not (5, 24)", "missing: norm.bias", "unknown: extra"):
        assert line in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_patches_of_another_size_are_no_matter_of_the_grid():
    with pytest.raises(ValueError, match=r"shape: stages\.0\.embed\.conv\.weight"):
        load_weights(small(patch_size=4, image_size=(64, 64)), small().state_dict())


def test_a_fresh_head_is_left_as_it_is_and_the_rest_is_loaded():
    source, model = small(), create_model("lavit_micro", num_classes=9, **SMALL)
    head = model.head.weight.clone()
    assert load_weights(model, source.state_dict(), fresh=["head."]) == []
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert torch.equal(model.stages[2].blocks[0].mlp.fc1.weight, source.stages[2].blocks[0].mlp.fc1.weight)


def test_resampling_on_the_way_passes_gradients():
    model = small()
    model(torch.randn(1, 3, 48, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
