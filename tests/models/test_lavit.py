"""The whole network: shapes, options, dropped paths, checkpointing, parameter groups."""

import pytest
import torch

from models import LaViT, create_model, diagonality_loss, diagonality_loss_as_printed
from models.diagnostics import attention_diagnostics

SMALL = {
    "patch_size": 2,
    "widths": (8, 16, 16, 24),
    "depths": (1, 2, 3, 2),
    "vanilla_blocks": (1, 1, 1, 1),
    "heads": (1, 2, 2, 3),
    "reduction_ratios": (4, 2, 1, 1),
}
"""A few thousand parameters on grids of 16, 8, 4 and 2 tokens a side, with every mechanism."""


def small(seed=0, **overrides) -> LaViT:
    torch.manual_seed(seed)
    return create_model("lavit_micro", num_classes=5, **SMALL | overrides)


def shaken(**overrides) -> LaViT:
    """A small network whose Psi, Theta and LayerScale have left their initial values."""
    model = small(**overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("theta", "psi", "gamma")):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def step(network, images, uniforms=None):
    """Logits, diagonality loss, and the gradients of a loss that reads both."""
    network.zero_grad()
    logits, loss = network(images, drop_path_uniforms=uniforms, with_diagonality=True)
    (logits.square().sum() + loss).backward()
    return [logits.detach(), loss.detach(), *(parameter.grad.clone() for parameter in network.parameters())]


def dead_parameters(model) -> list[str]:
    """Names of the parameters without a gradient, or with one that is but float64's rounding of zero."""
    images = torch.randn(3, 3, *model.config.image_size, dtype=torch.float64)
    _, _, *gradients = step(model.double(), images)
    names = [name for name, _ in model.named_parameters()]
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient.abs().max() < 1e-12]


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 32), (3, 32, 64), (2, 80, 48)])
def test_logits_and_maps_have_the_stated_shapes_at_any_rectangle(batch, height, width):
    model = small(image_size=(32, 48)).eval()
    images = torch.randn(batch, 3, height, width)
    logits, diagonality = model(images, with_diagonality=True)
    assert logits.shape == (batch, 5)
    assert diagonality.shape == ()
    assert diagonality.dtype == torch.float32
    assert torch.equal(model(images), logits)
    shapes = [tuple(features.shape) for features in model.forward_features(images)]
    assert shapes == [(batch, w, height // s, width // s) for w, s in zip((8, 16, 16, 24), (2, 4, 8, 16), strict=True)]


@pytest.mark.parametrize("pool", ["class_attention", "mean"])
@pytest.mark.parametrize("vanilla", [(1, 1, 1, 1), (1, 2, 2, 1), (1, 2, 3, 2)])
def test_every_parameter_gets_a_gradient(pool, vanilla):
    assert dead_parameters(shaken(pool=pool, vanilla_blocks=vanilla)) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lavit_tiny", []),
        ("lavit_tiny_vanilla", []),
        # Its last stage is one token at 32 x 32: scores have nothing to choose among, so what makes them never trains.
        (
            "lavit_micro",
            ["pool.class_token"]
            + [f"stages.3.blocks.0.attention.q.{part}" for part in ("bias", "weight")]
            + [f"stages.3.residual.{part}" for part in ("gamma", "mix", "pool")],
        ),
    ],
)
def test_a_named_network_as_it_comes_has_no_dead_parameter_but_where_there_is_one_token(name, expected):
    torch.manual_seed(0)
    assert sorted(dead_parameters(create_model(name))) == expected


def test_without_less_attention_the_diagonality_is_zero():
    assert create_model("lavit_micro_vanilla")(torch.randn(2, 3, 32, 32), with_diagonality=True)[1] == 0


def test_given_uniforms_decide_which_paths_are_dropped():
    model = small(drop_path=0.5).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    keep_all = torch.full((model.num_drop_paths, 3), 0.999)
    uniforms = keep_all.clone()
    uniforms[-1, 1] = 0.0  # the last MLP branch (rate 0.5), second sample
    kept, dropped = model(images, drop_path_uniforms=keep_all), model(images, drop_path_uniforms=uniforms)
    assert torch.equal(dropped, model(images, drop_path_uniforms=uniforms))
    assert torch.equal(kept[[0, 2]], dropped[[0, 2]])
    assert not torch.allclose(kept[1], dropped[1])
    # A row of the batch depends on its own draws only: any split over ranks gives the same.
    torch.testing.assert_close(model(images[1:2], drop_path_uniforms=uniforms[:, 1:2]), dropped[1:2])
    model.eval()
    assert torch.equal(model(images, drop_path_uniforms=uniforms), model(images))


def test_dropped_paths_leave_the_mean_unchanged():
    from models.block import drop_path

    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    out = drop_path(torch.ones(20000, 1, 1), uniforms, 0.3)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)  # four standard errors of 0.0046


def test_without_given_uniforms_training_draws_from_torchs_generator():
    model = small(drop_path=0.5)
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    first = model(images)
    assert not torch.equal(first, model(images))
    torch.manual_seed(1)
    assert torch.equal(first, model(images))


@pytest.mark.parametrize("policy", ["all", (False, True, True, False)])
def test_activation_checkpointing_gives_the_same_loss_and_gradients(policy):
    model = small(drop_path=0.3).double()
    images, uniforms = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.rand(model.num_drop_paths, 2)
    plain = step(model, images, uniforms)
    model.set_activation_checkpointing(policy)
    recomputed = step(model, images, uniforms)
    assert torch.equal(plain[0], recomputed[0])
    torch.testing.assert_close(recomputed, plain)


def test_layer_groups_hold_every_parameter_once_from_stem_to_head():
    model = small()
    groups = model.layer_groups()
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(groups) == 2 + 8
    assert groups[0] == [n for n in names if n.startswith(("stages.0.embed", "stages.0.position"))]
    assert "stages.1.residual.gamma" in groups[2]
    assert "stages.1.blocks.1.norm1.weight" in groups[3]
    assert "head.weight" in groups[-1]


def test_weight_decay_spares_norms_biases_layerscale_positions_and_the_class_token():
    model = small()
    spared = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        expected = parameter.ndim == 1 or name.endswith("position.table")
        assert (name in spared) == expected, name


@pytest.mark.parametrize("residual", [True, False])
def test_scores_are_kept_only_where_less_attention_or_the_residual_reads_them(residual, monkeypatch):
    model = small(depths=(2, 2, 4, 2), vanilla_blocks=(2, 1, 3, 2), attention_residual=residual).eval()
    given, returned, fused = [], [], []

    def note(module, args, out):
        given.append(args[2])
        returned.append(out[1])

    for stage in model.stages:
        for block in stage.blocks:
            block.register_forward_hook(note)
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: fused.append(1) or original(*a, **k)
    )
    model(torch.randn(1, 3, 32, 32))
    kept = [False, residual, True, True, False, False, True, True, False, False]
    assert [scores is not None for scores in returned] == kept
    # The class attention is fused, too; a block that is given the residual (the first of stages 3 and 4) is not.
    assert len(fused) == kept.count(False) + 1 - 2 * residual
    for index, (scores, before) in enumerate(zip(given, [None, *returned], strict=False)):
        if index in (3, 7):  # less attention
            assert scores is before
        elif residual and index in (2, 4, 8):  # the first block of a stage
            assert scores.shape[1] == {2: 2, 4: 2, 8: 3}[index]
            assert scores is not before
        else:
            assert scores is None


def test_without_learned_maps_a_less_attention_block_repeats_scores_and_has_no_maps():
    model = shaken(learned_maps=False)
    assert not any("theta" in name or "psi" in name for name, _ in model.named_parameters())
    images = torch.rand(2, 3, 32, 32)
    rows = [row for row in attention_diagnostics(model, images) if row.kind == "less"]
    assert rows
    assert all(row.saturation == pytest.approx(1) for row in rows)
    learned = [row.saturation for row in attention_diagnostics(shaken(), images) if row.kind == "less"]
    assert max(learned) < 0.999
    logits, loss = model(images, with_diagonality=True)
    (logits.sum() + loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_printed_sign_turns_the_second_term_of_the_loss_alone():
    attention = torch.rand(2, 3, 4, 4).softmax(-1)
    asymmetry = (attention - attention.mT).abs().sum((-2, -1)).mean() / 4
    intended, printed = diagonality_loss(attention), diagonality_loss(attention, as_printed=True)
    torch.testing.assert_close(intended - asymmetry, asymmetry - printed)
    torch.testing.assert_close(printed, diagonality_loss_as_printed(attention) / (6 * 4))
    model, images = shaken().eval(), torch.rand(2, 3, 32, 32)
    (same, one), (logits, other) = (model(images, with_diagonality=form) for form in (True, "as_printed"))
    assert torch.equal(same, logits)
    assert not torch.equal(one, other)
