"""The network of a recipe: a LaViT, or what a callable of any package builds. What differs between both is here.

A network maps images (batch, 3, height, width) to logits (batch, classes). Used where it has them:
``no_weight_decay()``; ``layer_groups()`` as ``LaViT`` has it, or timm's ``group_matcher()``; timm's
``set_grad_checkpointing()`` and ``get_classifier()``.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.flop_counter import FlopCounterMode

from models import LaViT, LaViTConfig, model_config
from models.cost import count_macs
from pretrain.outcome import UserError
from pretrain.recipe import Recipe

Factory = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class FactoryConfig:
    """A network as its callable and arguments; what ``LaViTConfig`` is for a LaViT."""

    name: str
    """``package.module:callable``."""
    arguments: dict[str, Any]
    """Keyword arguments of the recipe."""
    num_classes: int
    image_size: tuple[int, int]
    """Height and width, in pixels."""

    def to_dict(self) -> dict[str, Any]:
        """What a hand-off records as its architecture."""
        own = {"arguments": self.arguments, "num_classes": self.num_classes, "image_size": list(self.image_size)}
        return {"name": self.name, "factory": self.name, **own}

    def build(self, factory: Factory | None = None) -> nn.Module:
        """The network on the CPU, in training mode.

        ``num_classes`` is passed to a callable that has it as an argument or takes any (``**kwargs``); the image size
        to one that has ``img_size`` or ``image_size``, as one number where images are square. The recipe's own
        arguments win. Parameters that need no gradient become buffers, which are state that the optimizer does not own.

        Args:
            factory: the callable; None imports ``name``.

        Raises:
            UserError: it cannot be imported or called with these arguments, or gives no network.
        """
        call, (height, width) = factory or _import(self.name), self.image_size
        takes = inspect.signature(call).parameters
        given = dict.fromkeys(("img_size", "image_size"), height if height == width else (height, width))
        given = {key: value for key, value in given.items() if key in takes}
        if "num_classes" in takes or any(one.kind is one.VAR_KEYWORD for one in takes.values()):
            given["num_classes"] = self.num_classes
        given |= self.arguments
        network: object
        shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
        with users_code(f"model.factory: {self.name}({shown})"):
            network = call(**given)
        if not isinstance(network, nn.Module):
            raise UserError(f"model.factory: {self.name} gives a {type(network).__name__}, no torch.nn.Module")
        for module in [*network.modules()]:
            for name, parameter in [*module.named_parameters(recurse=False)]:
                if not parameter.requires_grad:
                    delattr(module, name)
                    module.register_buffer(name, parameter.data)
        network.of_factory = True  # type: ignore[assignment]
        return network.train()


NetworkConfig = LaViTConfig | FactoryConfig


def architecture(recipe: Recipe, num_classes: int) -> NetworkConfig:
    """Configuration of the recipe's network; UserError where the variant does not exist or a field makes no sense."""
    model = recipe.model
    if model.factory is not None:
        return FactoryConfig(model.factory, model.arguments, num_classes, recipe.data.size)
    try:
        return model_config(model.title, num_classes=num_classes, image_size=recipe.data.size, **model.overrides)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from None


def build_network(config: NetworkConfig) -> Any:
    """The network on the CPU, in training mode; errors are those of ``LaViT`` or ``FactoryConfig.build``."""
    return LaViT(config) if isinstance(config, LaViTConfig) else config.build()


@cache
def on_meta(config: NetworkConfig) -> Any:
    """The network on torch's meta device, without memory."""
    return build_network(config).to("meta")


def count_parameters(config: NetworkConfig) -> int:
    """How many parameters the network has."""
    return sum(parameter.numel() for parameter in on_meta(config).parameters())


def is_lavit(network: object) -> TypeGuard[LaViT]:
    """Whether a network is trained as a LaViT; one that a factory made is trained as any other."""
    return isinstance(network, LaViT) and not hasattr(network, "of_factory")


def call_network(
    network: nn.Module, call: Callable[..., Any], images: Tensor, uniforms: Tensor | None, form: Any = True
) -> tuple[Tensor, Tensor | None]:
    """Logits of images (m, 3, H, W), and a LaViT's diagonality loss.

    ``network`` is what ``call``, itself or DeepSpeed's engine, runs; ``uniforms`` (branches, m) decide which residual
    branches of a LaViT are skipped; ``form`` of the loss is as ``LaViT.forward`` takes it.
    """
    if not is_lavit(network):
        return call(images), None
    logits, diagonality = call(images, drop_path_uniforms=uniforms, with_diagonality=form)
    return logits, diagonality


def drawn_branches(network: Any) -> int:
    """How many residual branches are skipped by numbers that are drawn for it: a LaViT's, with drop path on."""
    return network.num_drop_paths if is_lavit(network) and network.config.drop_path else 0


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Turn whatever the user's own code raises within the block into one line that begins with ``what``."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise UserError(f"{what}: {reason}") from error


def _import(name: str) -> Factory:
    module, _, attributes = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(1, here)
    with users_code(f"model.factory: {name} is found neither from the current folder, {here}, nor installed"):
        found: Any = reduce(getattr, attributes.split("."), importlib.import_module(module))
    if not callable(found):
        raise UserError(f"model.factory: {name} is a {type(found).__name__}, and cannot be called")
    return found


def require_trust(architecture: Mapping[str, Any], source: object, *, trusted: bool) -> None:
    """Raise a UserError for a network whose callable a file names, unless the user trusts the file."""
    if "factory" in architecture and not trusted:
        raise UserError(
            f"{source}: its network is built by {architecture['factory']}, which is not imported just because a "
            "file names it: give --trust-factory if you trust the file, or load_handoff(..., factory=CALLABLE)"
        )


def try_network(network: nn.Module, config: NetworkConfig, device: torch.device) -> int:
    """Pass two blank images through a network of a factory, in evaluation mode; it is moved to the device.

    Returns:
        multiply-accumulates of one image, by ``torch.utils.flop_counter``; for a LaViT in closed form.

    Raises:
        UserError: the network does not take the images, or its output are no logits.
    """
    if isinstance(config, LaViTConfig):
        return count_macs(config)
    images, counter = torch.zeros(2, 3, *config.image_size, device=device), FlopCounterMode(display=False)
    network.to(device).eval()
    reported = users_code(f"model.factory: {config.name} does not take images {tuple(images.shape)}")
    with reported, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # whose products are counted
        logits = network(images)
    network.train()
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if shape != (2, config.num_classes):
        raise UserError(
            f"model.factory: {config.name} returns {shape} for images {tuple(images.shape)}; logits must be "
            f"{(2, config.num_classes)}, (batch, classes)"
        )
    return counter.get_total_flops() // (2 * len(images))


def load_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a network with all of its parameters and buffers; of tied ones, one name is enough; else RuntimeError."""
    found = network.load_state_dict(state, strict=False)
    own = {name for names in (network.named_parameters(), network.named_buffers()) for name, _ in names}
    if wrong := [*found.unexpected_keys, *own.intersection(found.missing_keys)]:
        raise RuntimeError(f"names that only one of both has: {', '.join(sorted(wrong)[:3])}")


def seed_generators(seed: int, step: int, row: int) -> None:
    """Seed torch's generators for the forward pass of a micro-batch, which begins at ``row`` of the global batch.

    With as many ranks and micro-batches, row stands for (micro-batch, rank). The host waits for nothing.
    """
    key, counter = np.array([seed, 0x6E6574], np.uint64), np.array([0, row, 0, step], np.uint64)
    torch.manual_seed(int(np.random.Philox(key=key, counter=counter).random_raw()))


def notes_on(network: nn.Module, recipe: Recipe, dtype: torch.dtype) -> Iterator[str]:
    """Lines about what is other for a network of a factory; ``dtype`` is that of its weights."""
    if isinstance(network, LaViT):
        return
    yield (
        "random numbers that the network draws (dropout, drop path) are seeded from (seed, step, micro-batch, rank): "
        "resuming is exact with as many ranks and the same micro-batch"
    )
    if recipe.loss.diagonality_weight or recipe.watch.attention_images:
        yield "left out, as they are LaViT's: the diagonality loss (loss), the attention of images (watch)"
    if any(buffer.is_floating_point() for buffer in network.buffers()):
        yield "buffers (running statistics): each rank has its own; their mean is evaluated and handed off"
    if dtype is not torch.float32 and any(isinstance(module, _NormBase) for module in network.modules()):
        yield f"WARNING running statistics are kept in {dtype}, which rounds them; torch_autocast keeps them in fp32"


def cast_statistics(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep running statistics in the type of the weights, as torch wants; DeepSpeed casts parameters only."""
    for module in network.modules():
        if isinstance(module, _NormBase):
            module.to(dtype)


def spared_names(network: Any) -> set[str]:
    """Parameters that weight decay spares: vectors, biases, and what ``no_weight_decay()`` names."""
    own = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    return {name for name, one in network.named_parameters() if one.ndim <= 1 or name.endswith(".bias") or name in own}


def layers_of(network: Any) -> Sequence[Sequence[str]]:
    """Names of all parameters in the order of depth; UserError where the network does not know them."""
    if hasattr(network, "layer_groups"):
        return network.layer_groups()
    if hasattr(network, "group_matcher"):
        from timm.models import group_parameters  # noqa: PLC0415 - an optional extra

        return [*group_parameters(network, network.group_matcher(coarse=False)).values()]
    raise UserError(
        "optimizer.layer_decay: the network has neither layer_groups() nor timm's group_matcher(): set it to 1"
    )


def recompute_activations(network: Any, policy: Any) -> None:
    """Set ``model.activation_checkpointing``; UserError or, by a LaViT, ValueError where the network cannot."""
    if hasattr(network, "set_activation_checkpointing"):
        network.set_activation_checkpointing(policy)
    elif policy == "all" and hasattr(network, "set_grad_checkpointing"):
        network.set_grad_checkpointing(True)
    elif policy != "none":
        raise UserError(
            "model.activation_checkpointing: a factory's network takes all where it has set_grad_checkpointing(), else "
            "none; stage by stage is for a LaViT"
        )


def classifier_of(network: Any) -> nn.Linear:
    """The layer that makes logits of features: timm's ``get_classifier()``, else ``head``; or UserError."""
    found = network.get_classifier() if hasattr(network, "get_classifier") else getattr(network, "head", None)
    if not isinstance(found, nn.Linear):
        raise UserError("probes need get_classifier(), as timm's networks have, or a linear head: leave them out")
    return found
