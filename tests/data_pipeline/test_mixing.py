import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError
from data_pipeline.mixing import draw_mixing, mix, soft_targets
from data_pipeline.transforms import MixingConfig

BOTH = MixingConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1)


def batch(m=64, side=16, classes=10):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(m, 3, side, side, generator=generator), torch.randint(0, classes, (m,), generator=generator)


def mixed(config, rows=None, step=5, seed=1, m=64):
    images, labels = batch(m)
    rows = np.arange(m) if rows is None else rows
    return mix(images[rows], labels[rows], rows, config=config, num_classes=10, seed=seed, step=step)


def test_label_smoothing_is_the_published_formula():
    targets = soft_targets(torch.tensor([2, 0]), 4, 0.1)
    torch.testing.assert_close(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))


def test_nothing_is_mixed_when_both_are_off():
    images, labels = batch()
    out, targets = mixed(MixingConfig())
    assert torch.equal(out, images)
    assert torch.equal(targets.argmax(1), labels)
    assert targets.sum() == 64


@pytest.mark.parametrize("config", [BOTH, MixingConfig(mixup=0.8), MixingConfig(cutmix=1.0)], ids=str)
def test_targets_say_how_much_of_each_picture_is_seen(config):
    images, labels = batch()
    white = torch.zeros_like(images)
    white[::2] = 1.0  # partner pairs of a white and a black picture
    out, targets = mix(white, labels, np.arange(64), config=config, num_classes=10, seed=1, step=5)
    smooth = soft_targets(labels, 10, config.label_smoothing)
    share = out[::2].double().mean((1, 2, 3))
    expected = share[:, None] * smooth[::2] + (1 - share[:, None]) * smooth[1::2]
    # Four roundings of numbers up to 1, and one of each pixel.
    torch.testing.assert_close(targets[::2].double(), expected, atol=5 * torch.finfo(torch.float32).eps, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    assert share.std() > 0.1


def test_cutmix_pixels_come_whole_from_one_of_the_two():
    images, _ = batch()
    out, _ = mixed(MixingConfig(cutmix=1.0))
    partner = images[torch.arange(64) ^ 1]
    assert ((out == images) | (out == partner)).all()
    assert 0.2 < (out == partner).float().mean() < 0.7


def test_mixup_is_the_convex_combination_with_one_share_per_pair_also_in_float16():
    images, labels = batch()
    out, _ = mixed(MixingConfig(mixup=0.8))
    # With one share for both, the pair's sum is kept.
    torch.testing.assert_close(out[::2] + out[1::2], images[::2] + images[1::2])
    half, targets = mix(images.half(), labels, np.arange(64), config=BOTH, num_classes=10, seed=1, step=0)
    assert (half.dtype, targets.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("world", [2, 4, 32])
def test_mixing_is_the_same_on_any_number_of_ranks(world):
    whole, whole_targets = mixed(BOTH)
    parts = [mixed(BOTH, np.arange(64)[r * 64 // world : (r + 1) * 64 // world]) for r in range(world)]
    assert torch.equal(torch.cat([images for images, _ in parts]), whole)
    assert torch.equal(torch.cat([targets for _, targets in parts]), whole_targets)


def test_every_step_and_seed_mixes_anew():
    base = mixed(BOTH)[0]
    assert not torch.equal(base, mixed(BOTH, step=6)[0])
    assert not torch.equal(base, mixed(BOTH, seed=2)[0])


def test_shares_follow_the_beta_distribution():
    from scipy.stats import beta, kstest

    drawn = draw_mixing(MixingConfig(mixup=0.8), seed=3, step=9, rows=np.arange(40_000), size=(8, 8))
    assert kstest(drawn.keep[::2], beta(0.8, 0.8).cdf).pvalue > 0.01
    assert not drawn.boxes.any()


@pytest.mark.parametrize("rows", [np.arange(1, 5), np.arange(3), np.array([0, 2])], ids=str)
def test_rows_that_are_not_whole_pairs_are_refused(rows):
    with pytest.raises(DataError, match="complete pairs"):
        mixed(BOTH, rows)
