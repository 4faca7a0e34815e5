"""A plain ViT of either public layout becomes a less-attention one and keeps its trained weights.

Every test runs on small stand-ins with timm's and torchvision's attributes, and on those libraries' own
VisionTransformer where they are installed.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import apply_less_attention

WIDTH, HEADS, DEPTH, TOKENS = 12, 3, 4, 1 + 4


class QkvAttention(nn.Module):
    """Attention with the attribute layout of timm's."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block that calls its attention as timm's or as torchvision's does."""

    def __init__(self, layout):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        if layout == "timm":
            self.attn = QkvAttention()
        else:
            self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        x = x + (self.attn(y) if hasattr(self, "attn") else self.self_attention(y, y, y, need_weights=False)[0])
        return x + self.mlp(self.norm(x))


class StandIn(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.patch = nn.Linear(5, WIDTH)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        blocks = nn.Sequential(*(Block(layout) for _ in range(DEPTH)))
        if layout == "timm":
            self.blocks = blocks
        else:
            self.encoder, self.seq_length = nn.Module(), TOKENS
            self.encoder.layers = blocks

    def forward(self, x):
        x = torch.cat([self.class_token.expand(len(x), -1, -1), self.patch(x)], 1) + self.pos_embed
        return layers(self)(x)


def layers(vit):
    return vit.blocks if hasattr(vit, "blocks") else vit.encoder.layers


def published(library):
    """The library's own class, as small as the stand-ins."""
    if library == "timm":
        import timm

        return timm.models.VisionTransformer(
            img_size=4, patch_size=2, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=7
        )
    import torchvision

    vit = torchvision.models.VisionTransformer(
        image_size=4, patch_size=2, num_layers=DEPTH, num_heads=HEADS, hidden_dim=WIDTH, mlp_dim=24, num_classes=7
    )
    nn.init.normal_(vit.heads.head.weight)  # zero as it comes: nothing below would get a gradient
    return vit


@pytest.fixture(
    params=[
        "timm's layout",
        "torchvision's layout",
        pytest.param("timm", marks=pytest.mark.timm),
        pytest.param("torchvision", marks=pytest.mark.timm),
    ]
)
def vit(request):
    torch.manual_seed(0)
    library, _, is_stand_in = request.param.partition("'")
    return (StandIn(library) if is_stand_in else published(library)).double()


def images_for(vit, batch):
    """The input of `vit`: four patches an image."""
    return torch.randn(batch, *((4, 5) if isinstance(vit, StandIn) else (3, 4, 4)), dtype=torch.float64)


def attentions(vit):
    name = "attn" if hasattr(vit, "blocks") else "self_attention"
    return [getattr(layer, name) for layer in layers(vit)]


def test_the_vanilla_blocks_compute_what_they_did(vit):
    x, outputs = images_for(vit, 2), []
    for model in (vit, apply_less_attention(copy.deepcopy(vit), vanilla_blocks=2)):
        layers(model)[1].register_forward_hook(lambda module, args, output: outputs.append(output))
        model(x)
    torch.testing.assert_close(outputs[0], outputs[1])


def test_later_blocks_equal_the_formula_with_the_trained_values_and_projection(vit):
    changed = apply_less_attention(copy.deepcopy(vit), vanilla_blocks=DEPTH - 1)
    old, new = attentions(vit), attentions(changed)[-1]
    with torch.no_grad():
        for parameter in (new.theta.weight, new.theta.bias, new.psi.weight):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    seen = {}
    for index in (-2, -1):
        module = attentions(changed)[index]
        module.register_forward_hook(lambda module, args, output, i=index: seen.update({i: (args[0], output)}))
    changed(images_for(vit, 2))
    joint = [(a.qkv.weight, a.qkv.bias) if hasattr(a, "qkv") else (a.in_proj_weight, a.in_proj_bias) for a in old]

    def heads(x):
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    q, k, _ = (heads(part) for part in F.linear(seen[-2][0], *joint[-2]).chunk(3, -1))
    scores = q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5
    scores = scores @ new.theta.weight.T + new.theta.bias
    scores = (scores.transpose(-2, -1) @ new.psi.weight.T).transpose(-2, -1)
    value = heads(F.linear(seen[-1][0], *joint[-1]).chunk(3, -1)[2])
    expected = new.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    output = seen[-1][1][0] if isinstance(seen[-1][1], tuple) else seen[-1][1]
    torch.testing.assert_close(output, expected)


def test_less_attention_blocks_lose_queries_and_keys_and_every_parameter_trains(vit):
    changed = apply_less_attention(vit, vanilla_blocks=1)
    out = changed(images_for(vit, 2))
    (out * torch.randn_like(out)).sum().backward()
    for index, layer in enumerate(layers(changed)):
        names = {n.split(".")[1] for n, _ in layer.named_parameters() if n.startswith(("attn.", "self_attention."))}
        assert names == ({"qkv", "proj"} if index == 0 else {"v", "theta", "psi", "proj"})
    assert [n for n, p in changed.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_state_survives_a_round_trip(vit):
    changed = apply_less_attention(copy.deepcopy(vit), vanilla_blocks=2)
    twin = apply_less_attention(vit, vanilla_blocks=2)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.normal_()
    twin.load_state_dict(changed.state_dict())
    x = images_for(vit, 1)
    assert torch.equal(changed(x), twin(x))


def test_what_cannot_work_is_refused_by_name_and_changes_nothing(vit):
    for bad in (0, DEPTH):
        with pytest.raises(ValueError, match="vanilla_blocks"):
            apply_less_attention(vit, vanilla_blocks=bad)
    with pytest.raises(ValueError, match=r"blocks\[i\]\.attn"):
        apply_less_attention(nn.Linear(2, 2), vanilla_blocks=1)
    changed = apply_less_attention(vit, vanilla_blocks=3)
    before = attentions(changed)
    for again in (1, 3):
        with pytest.raises(ValueError, match="before"):
            apply_less_attention(changed, vanilla_blocks=again)
    assert attentions(changed) == before
    tokens = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="checkpointing"):
        layers(changed)[-1](tokens)
    before[2](tokens)
    with pytest.raises(RuntimeError, match="4 tokens; less attention was applied for 5"):
        before[3](tokens[:, 1:])
    for more in ({"attn_mask": torch.zeros(TOKENS, TOKENS)}, {"rope": torch.zeros(TOKENS, 4)}, {"is_causal": True}):
        for attention in before[2:]:
            with pytest.raises(RuntimeError, match=f"the tokens alone, got {next(iter(more))} too"):
                attention(tokens, **more)
    with pytest.raises(RuntimeError, match="other keys or values"):
        before[2](tokens, torch.zeros_like(tokens), tokens)


@pytest.mark.parametrize("extra", ["gate", "q_norm"])
def test_attention_that_is_more_than_qkv_and_a_projection_is_refused(extra):
    vit = StandIn("timm")
    setattr(vit.blocks[-1].attn, extra, nn.Linear(WIDTH, WIDTH))
    with pytest.raises(ValueError, match=f"QkvAttention with .*{extra}|attention with {extra}"):
        apply_less_attention(vit, vanilla_blocks=1)
    assert {type(attention) for attention in attentions(vit)} == {QkvAttention}


@pytest.mark.parametrize("vit", ["timm's layout", pytest.param("timm", marks=pytest.mark.timm)], indirect=True)
def test_heads_of_another_width_than_the_tokens_keep_their_values(vit):
    """timm's attn_head_dim: all heads together need not be as wide as the tokens."""
    for block in vit.blocks:
        block.attn.qkv, block.attn.proj = nn.Linear(WIDTH, 3 * 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        block.attn.head_dim, block.attn.attn_dim = 2 * WIDTH // HEADS, 2 * WIDTH
    trained = vit.double().blocks[-1].attn.qkv.weight[2 * 2 * WIDTH :]
    changed = apply_less_attention(vit, vanilla_blocks=2)
    assert torch.equal(changed.blocks[-1].attn.v.weight, trained)
    assert changed(images_for(vit, 2)).isfinite().all()


def test_no_scores_outlive_the_forward_pass(vit):
    """They would hold memory until the next step, and a network that holds them cannot be copied (for EMA, say)."""
    changed = apply_less_attention(vit, vanilla_blocks=2)
    changed(images_for(vit, 2))
    assert {module.handover.scores for module in attentions(changed)[1:]} == {None}
    copy.deepcopy(changed)


def timms(kind="VisionTransformer", **options):
    import timm

    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return getattr(timm.models, kind)(**size, **options)


@pytest.mark.timm
@pytest.mark.parametrize(
    "options",
    [
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2, "no_embed_class": True},
        {"reg_tokens": 2},
        {"qkv_bias": False},
        {"init_values": 1e-5, "pre_norm": True},
        {"attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.1},
    ],
    ids=str,
)
def test_timms_options_are_understood(options):
    changed = apply_less_attention(timms(**options), vanilla_blocks=1)
    changed(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [n for n, p in changed.named_parameters() if p.grad is None] == []


@pytest.mark.timm
@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_attn_norm": True}, {"attn_layer": "diff"}], ids=str)
def test_timms_other_kinds_of_attention_are_refused(options):
    with pytest.raises(ValueError, match=r"vit: .*is not supported"):
        apply_less_attention(timms(**options), vanilla_blocks=1)


@pytest.mark.timm
def test_rotary_positions_and_activation_checkpointing_of_timm_are_refused_and_not_wrong():
    with pytest.raises((ValueError, RuntimeError), match=r"is not supported|the tokens alone, got rope"):
        apply_less_attention(timms("Eva", use_rot_pos_emb=True), vanilla_blocks=1)(torch.randn(1, 3, 32, 32))
    vit = timms()
    vit.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match="checkpointing"):
        apply_less_attention(vit, vanilla_blocks=1)(torch.randn(1, 3, 32, 32)).sum().backward()
