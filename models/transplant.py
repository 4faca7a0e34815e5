"""The technique on other trunks: a plain ViT becomes a less-attention one and keeps its trained weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def apply_less_attention(vit: nn.Module, vanilla_blocks: int) -> nn.Module:
    """Turn all blocks of a plain ViT but its first few into Less Attention blocks, in place.

    The first `vanilla_blocks` blocks keep all they learned. The last of them shows its pre-softmax scores; each later
    block makes its own from its predecessor's with a fresh Theta and Psi, the identity, drops its trained Q and K, and
    keeps V, the output projection, norms and MLP. Scores cover all tokens, the class token included, as a plain ViT has
    no grid to protect.

    Two layouts are understood: timm's (`blocks[i].attn` with `qkv`, `proj` and `num_heads`) and torchvision's
    (`encoder.layers[i].self_attention`, an nn.MultiheadAttention with batch_first).

    Args:
        vit: a VisionTransformer for a fixed number of tokens.
        vanilla_blocks: at least 1, below the number of blocks.

    Returns:
        The same module.

    Raises:
        ValueError: an unknown layout, a bad `vanilla_blocks`, a trunk already changed, or attention that is more than
            qkv and a projection (norms, a gate, relative positions). The trunk is unchanged then.
        RuntimeError: while running: another number of tokens, a mask, rotary positions or the like, or activation
            checkpointing, which would recompute a block without its predecessor's scores.
    """
    blocks, name = _blocks(vit)
    if not 1 <= vanilla_blocks < len(blocks):
        raise ValueError(f"vanilla_blocks: at least 1 and below the {len(blocks)} blocks, got {vanilla_blocks}")
    tokens = _token_count(vit)
    before = ScoreKeepingAttention(getattr(blocks[vanilla_blocks - 1], name), vanilla_blocks - 1)
    less = []
    for index in range(vanilla_blocks, len(blocks)):
        attention, is_last = getattr(blocks[index], name), index + 1 == len(blocks)
        less.append(TransplantedLessAttention(attention, before.handover, index, tokens, is_last=is_last))
    for block, attention in zip(blocks[vanilla_blocks - 1 :], [before, *less], strict=True):
        setattr(block, name, attention)
    return vit


class _Handover:
    """The scores on their way from a block to the next; taken out when read, so nothing outlives the forward pass."""

    def __init__(self) -> None:
        self.scores: Tensor | None = None
        self.block = -1

    def give(self, scores: Tensor, block: int) -> None:
        self.scores, self.block = scores, block

    def take(self, block: int) -> Tensor:
        scores, self.scores = self.scores, None
        if scores is None or self.block != block - 1:
            raise RuntimeError(
                f"block {block} did not find its predecessor's scores: blocks of a less-attention ViT run in order, "
                "all of them, and without activation checkpointing"
            )
        return scores


class _TransplantedAttention(nn.Module):
    """What both kinds take over from the attention that they replace."""

    handover: _Handover
    is_last = False

    def __init__(self, attention: nn.Module, block: int) -> None:
        super().__init__()
        if isinstance(attention, _TransplantedAttention):
            raise ValueError("vit: less attention was applied to it before")
        self.block = block
        self.is_torchvision = isinstance(attention, nn.MultiheadAttention)
        self.num_heads: int = attention.num_heads  # type: ignore[assignment]
        self.proj: nn.Module
        if isinstance(attention, nn.MultiheadAttention):
            if not attention.batch_first or attention.in_proj_weight is None or attention.add_zero_attn:
                raise ValueError(
                    "vit: nn.MultiheadAttention with batch_first, one in_proj_weight and no zero attention is wanted"
                )
            _refuse_further_parameters(attention, ("in_proj_weight", "in_proj_bias", "out_proj."))
            self.proj = attention.out_proj
            self.attention_dropout = attention.dropout
            self.proj_drop: nn.Module = nn.Identity()
        else:
            if not all(hasattr(attention, part) for part in ("qkv", "proj", "num_heads")):
                raise ValueError(f"vit: {type(attention).__name__} has no qkv, proj and num_heads")
            for part in ("q_norm", "k_norm", "norm"):
                if not isinstance(getattr(attention, part, nn.Identity()), nn.Identity):
                    raise ValueError(f"vit: attention with {part} is not supported")
            _refuse_further_parameters(attention, ("qkv.", "proj."))
            self.proj = attention.proj  # type: ignore[assignment]
            self.attention_dropout = getattr(getattr(attention, "attn_drop", None), "p", 0.0)
            self.proj_drop = getattr(attention, "proj_drop", nn.Identity())

    def split(self, features: Tensor) -> Tensor:
        """(batch, tokens, C) to (batch, heads, tokens, d)."""
        return features.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, scores: Tensor, value: Tensor) -> Any:
        """Hand the scores on and return what the replaced module would have."""
        if not self.is_last:
            self.handover.give(scores, self.block)
        attention = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        output = self.proj_drop(self.proj((attention @ value).transpose(1, 2).flatten(2)))
        return (output, None) if self.is_torchvision else output


def _refuse_further_parameters(attention: nn.Module, known: tuple[str, ...]) -> None:
    """A gate, relative positions or lambdas would be dropped in silence."""
    further = [name for name, _ in attention.named_parameters() if not name.startswith(known)]
    if further:
        raise ValueError(f"vit: {type(attention).__name__} with {', '.join(further)} is not supported")


def _refuse_more(tokens: Tensor, others: tuple[Any, ...], arguments: dict[str, Any]) -> None:
    """Plain self-attention only: torchvision passes the tokens thrice, and anything else would change the result."""
    plain = (tokens, None, False)
    more = [n for n, v in arguments.items() if n != "need_weights" and not any(v is value for value in plain)]
    if more or not all(any(other is value for value in plain) for other in others):
        names = ", ".join(more) or "other keys or values"
        raise RuntimeError(f"less attention takes the tokens alone, got {names} too")


class ScoreKeepingAttention(_TransplantedAttention):
    """The last Vanilla Attention block: the trained weights, with scores that the next block can read."""

    def __init__(self, attention: nn.Module, block: int) -> None:
        super().__init__(attention, block)
        self.handover = _Handover()
        self.qkv = _joint_projection(attention)

    def forward(self, tokens: Tensor, *others: Any, **arguments: Any) -> Any:
        """(batch, tokens, C) to the same shape; for torchvision's layout a pair of it and None."""
        _refuse_more(tokens, others, arguments)
        query, key, value = (self.split(part) for part in self.qkv(tokens).chunk(3, dim=-1))
        return self.attend((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1), value)


class TransplantedLessAttention(_TransplantedAttention):
    """`A_l = Psi(Theta(A_{l-1})^T)^T` with the trained V and output projection."""

    def __init__(self, attention: nn.Module, handover: _Handover, block: int, tokens: int, *, is_last: bool) -> None:
        super().__init__(attention, block)
        self.handover = handover
        self.is_last = is_last
        joint = _joint_projection(attention)
        width = joint.out_features // 3  # all heads; a ViT may choose another width for them than the tokens'
        like: dict[str, Any] = {"device": joint.weight.device, "dtype": joint.weight.dtype}
        self.v = nn.Linear(joint.in_features, width, bias=joint.bias is not None, **like)
        self.theta = nn.Linear(tokens, tokens, **like)
        # No bias: it would add one number to all of a query's scores, which the softmax does not see.
        self.psi = nn.Linear(tokens, tokens, bias=False, **like)
        with torch.no_grad():
            self.v.weight.copy_(joint.weight[2 * width :])
            if joint.bias is not None:
                self.v.bias.copy_(joint.bias[2 * width :])
            nn.init.eye_(self.theta.weight)
            nn.init.zeros_(self.theta.bias)
            nn.init.eye_(self.psi.weight)

    def forward(self, tokens: Tensor, *others: Any, **arguments: Any) -> Any:
        """(batch, tokens, C) to the same shape; for torchvision's layout a pair of it and None."""
        _refuse_more(tokens, others, arguments)
        if tokens.shape[1] != self.psi.in_features:
            raise RuntimeError(f"{tokens.shape[1]} tokens; less attention was applied for {self.psi.in_features}")
        scores = self.theta(self.handover.take(self.block))
        scores = self.psi(scores.transpose(-2, -1)).transpose(-2, -1)
        return self.attend(scores, self.split(self.v(tokens)))


def _joint_projection(attention: nn.Module) -> nn.Linear:
    """The Linear layer (C to 3 C: queries, keys, values) of either layout, with its own parameters."""
    if not isinstance(attention, nn.MultiheadAttention):
        return attention.qkv  # type: ignore[return-value]
    weight = attention.in_proj_weight
    joint = nn.Linear(weight.shape[1], weight.shape[0], attention.in_proj_bias is not None, device="meta")
    joint.weight = weight
    if attention.in_proj_bias is not None:
        joint.bias = attention.in_proj_bias
    return joint


def _blocks(vit: nn.Module) -> tuple[list[nn.Module], str]:
    """The blocks, and the name under which each holds its attention."""
    for path, name in (("blocks", "attn"), ("encoder.layers", "self_attention")):
        module: Any = vit
        for part in path.split("."):
            module = getattr(module, part, None)
        if isinstance(module, nn.Sequential | nn.ModuleList) and all(hasattr(block, name) for block in module):
            return list(module), name
    raise ValueError("vit: neither blocks[i].attn (timm) nor encoder.layers[i].self_attention (torchvision) is there")


def _token_count(vit: nn.Module) -> int:
    """Tokens in the sequence, prefix tokens such as the class token included."""
    if hasattr(vit, "seq_length"):  # torchvision counts its class token in
        return int(vit.seq_length)  # type: ignore[arg-type]
    position = getattr(vit, "pos_embed", None)
    if not isinstance(position, Tensor):
        raise ValueError("vit: neither seq_length nor pos_embed gives the number of tokens")
    prefix = int(getattr(vit, "num_prefix_tokens", 0)) if getattr(vit, "no_embed_class", False) else 0
    return int(position.shape[1]) + prefix
