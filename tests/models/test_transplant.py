"""A plain ViT of either public layout becomes a less-attention one and keeps its trained weights."""

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
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2))


class QkvBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), QkvAttention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MultiheadBlock(nn.Module):
    """A block with the attribute layout of torchvision's EncoderBlock."""

    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        return x + y + self.mlp(self.ln_2(x + y))


class StandIn(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.patch = nn.Linear(5, WIDTH)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        if layout == "timm":
            self.blocks = nn.Sequential(*(QkvBlock() for _ in range(DEPTH)))
        else:
            self.encoder = nn.Module()
            self.encoder.layers = nn.Sequential(*(MultiheadBlock() for _ in range(DEPTH)))
            self.seq_length = TOKENS

    def forward(self, x):
        x = torch.cat([self.class_token.expand(len(x), -1, -1), self.patch(x)], 1) + self.pos_embed
        return (self.blocks if hasattr(self, "blocks") else self.encoder.layers)(x)


def layers(vit):
    return vit.blocks if hasattr(vit, "blocks") else vit.encoder.layers


@pytest.fixture(params=["timm", "torchvision"])
def vit(request):
    torch.manual_seed(0)
    return StandIn(request.param)


def test_the_vanilla_blocks_compute_what_they_did(vit):
    changed = apply_less_attention(copy.deepcopy(vit), vanilla_blocks=2)
    x = torch.randn(2, 4, 5)
    outputs = []
    for model in (vit, changed):
        hook = layers(model)[1].register_forward_hook(lambda module, args, output: outputs.append(output))
        model(x)
        hook.remove()
    torch.testing.assert_close(outputs[0], outputs[1])


def test_later_blocks_equal_the_formula_with_the_trained_values_and_projection(vit):
    changed = apply_less_attention(copy.deepcopy(vit), vanilla_blocks=DEPTH - 1)
    name = "attn" if hasattr(vit, "blocks") else "self_attention"
    old = [getattr(layer, name) for layer in layers(vit)]
    new = getattr(layers(changed)[-1], name)
    with torch.no_grad():
        for parameter in (new.theta.weight, new.theta.bias, new.psi.weight):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    seen = {}
    for index in (-2, -1):
        module = getattr(layers(changed)[index], name)
        module.register_forward_hook(lambda module, args, output, i=index: seen.update({i: (args[0], output)}))
    changed(torch.randn(2, 4, 5))
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
    out = changed(torch.randn(2, 4, 5))
    (out * torch.randn_like(out)).sum().backward()
    for index, layer in enumerate(layers(changed)):
        names = {n.split(".")[1] for n, _ in layer.named_parameters() if n.startswith(("attn.", "self_attention."))}
        assert names == ({"qkv", "proj"} if index == 0 else {"v", "theta", "psi", "proj"})
    assert [n for n, p in changed.named_parameters() if p.grad is None] == []


def test_the_state_survives_a_round_trip(vit):
    changed = apply_less_attention(copy.deepcopy(vit), vanilla_blocks=2)
    twin = apply_less_attention(vit, vanilla_blocks=2)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.normal_()
    twin.load_state_dict(changed.state_dict())
    x = torch.randn(1, 4, 5)
    assert torch.equal(changed(x), twin(x))


def test_what_cannot_work_is_refused_by_name(vit):
    for bad in (0, DEPTH):
        with pytest.raises(ValueError, match="vanilla_blocks"):
            apply_less_attention(copy.deepcopy(vit), vanilla_blocks=bad)
    with pytest.raises(ValueError, match=r"blocks\[i\]\.attn"):
        apply_less_attention(nn.Linear(2, 2), vanilla_blocks=1)
    changed = apply_less_attention(vit, vanilla_blocks=2)
    with pytest.raises(ValueError, match="before"):
        apply_less_attention(changed, vanilla_blocks=2)
    changed.pos_embed = nn.Parameter(torch.randn(1, 1 + 9, WIDTH))
    with pytest.raises(RuntimeError, match="10 tokens"):
        changed(torch.randn(1, 9, 5))
    with pytest.raises(RuntimeError, match="checkpointing"):
        layers(changed)[-1](torch.randn(1, TOKENS, WIDTH))


@pytest.mark.gpu  # timm needs torchvision, which only an environment with a CUDA build of torch has here
def test_timms_own_vision_transformer_is_understood():
    timm = pytest.importorskip("timm", reason="timm, the optional extra, is not installed")
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=7, depth=4).eval()
    changed = apply_less_attention(vit, vanilla_blocks=2)
    logits = changed(torch.randn(1, 3, 224, 224))
    assert logits.shape == (1, 7)
    logits.sum().backward()
    assert changed.blocks[3].attn.theta.weight.grad is not None
