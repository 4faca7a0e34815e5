"""Model, optimizer and DeepSpeed engine, from the recipe and DeepSpeed's configuration."""

import io
import logging
import os
import shlex
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any

import torch

from pretrain.deepspeed_compat import record_gradient_norm
from pretrain.engine.deepspeed_config import ResolvedDeepSpeed, input_dtype
from pretrain.engine.distributed import use_deterministic_algorithms
from pretrain.engine.optimizers import build_optimizer, peak_learning_rate
from pretrain.factory import (
    architecture,
    build_network,
    cast_statistics,
    classifier_of,
    layers_of,
    notes_on,
    recompute_activations,
    spared_names,
)
from pretrain.outcome import ExitCode, UserError, storage_code
from pretrain.recipe import Recipe


def build_model(recipe: Recipe, num_classes: int) -> Any:
    """The recipe's network, a ``LaViT`` or that of ``model.factory``, with weights drawn from its seed on every rank.

    Raises:
        UserError: the variant or factory does not exist, a field or argument of it makes no sense, or the network has
            not what the recipe asks of it.
    """
    torch.manual_seed(recipe.seed)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        logging.getLogger("models").setLevel(logging.ERROR)  # rank 0 logs warnings about the recipe's model
    config = architecture(recipe, num_classes)
    try:
        model = build_network(config)
        recompute_activations(model, recipe.model.activation_checkpointing)
        if recipe.probes is not None:
            classifier_of(model)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model: {error}") from None
    return model


def build_engine(
    model: torch.nn.Module, recipe: Recipe, resolved: ResolvedDeepSpeed, device: torch.device, *, verbose: bool = False
) -> tuple[Any, list[str]]:
    """Wrap the model by ``deepspeed.initialize``; the process group must exist. ``verbose`` lets it print all it wants.

    Returns:
        ``deepspeed.DeepSpeedEngine``, which takes what the network's ``forward`` takes; and lines about what was
        chosen.

    Raises:
        UserError: DeepSpeed refuses the configuration for a reason that was not foreseen, or the network cannot be
            compiled here, or its layers are not known.
    """
    import deepspeed  # noqa: PLC0415 - slow to import, and reads the environment that distributed.py sets

    section, notes = recipe.optimizer, []
    if recipe.deterministic:
        notes.append(use_deterministic_algorithms())
    model.to(device)
    layers = layers_of(model) if section.layer_decay < 1 else ()
    optimizer, more = build_optimizer(model, section, no_decay=spared_names(model), layers=layers)
    notes += more
    notes += notes_on(model, recipe, input_dtype(resolved.precision))
    cast_statistics(model, input_dtype(resolved.precision))
    if recipe.model.compile:
        notes.append(_compile(model, resolved.stage, device))
    try:
        with start_up_noise(wanted=verbose, first=torch.distributed.get_rank() == 0):
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=resolved.config, dist_init_required=False
            )
    except (AssertionError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"DeepSpeed refuses its configuration: {reason}") from error
    record_gradient_norm(engine)
    return engine, [peak_learning_rate(section, resolved.batch.global_batch)[1], *notes]


@contextmanager
def start_up_noise(*, wanted: bool, first: bool) -> Iterator[None]:
    """Keep out what libraries print within the block, such as DeepSpeed's reports of memory; warnings are kept.

    Args:
        wanted: let everything through, and have DeepSpeed print more.
        first: on other ranks than the first, warnings are kept out too, since every rank has the same ones.
    """
    logger = logging.getLogger("DeepSpeed")
    if wanted:
        logger.setLevel(logging.INFO)
        for handler in logger.handlers:
            handler.setLevel(logging.INFO)
        yield
        return
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        if not first:
            warnings.simplefilter("ignore")
        logger.setLevel(logging.WARNING if first else logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(logging.WARNING)


def _compile(model: torch.nn.Module, stage: int, device: torch.device) -> str:
    """Compile the network in place: its parameters keep their names, and checkpoints fit either way."""
    if stage == 3:
        raise UserError(
            "model.compile does not go with ZeRO stage 3, which gathers parameters between layers: use "
            "zero_optimization.stage 2 or less, or model.compile=false"
        )
    lacking = _missing_compiler(device)
    if lacking:
        raise UserError(f"model.compile needs a {lacking} and finds none: install it, or set model.compile=false")
    compile_forward(model)
    return "compiled by torch.compile: the first steps take minutes"


def _missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks here, so that no rank raises a long error in its first step; "" for nothing."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415 - slow to import
        from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "C++ compiler (g++)"
        return ""
    # Triton compiles launchers of its kernels, on each node, with the compiler that CC names, or gcc or clang.
    if find_spec("triton") is None:
        return "Triton (torch's builds for CUDA bring it along)"
    compilers = [shlex.split(os.environ["CC"])[0]] if os.environ.get("CC") else ["gcc", "clang"]
    return "" if any(map(shutil.which, compilers)) else "C compiler (gcc)"


def compile_forward(model: torch.nn.Module) -> None:
    """Compile a network's forward pass in place, one graph for each size of a batch.

    Left to itself torch compiles whatever batch comes second for any size, and a run that resumes may evaluate before
    it trains.
    """
    # Of nn.Module.compile the graph would hold DeepSpeed's hooks, which read clocks.
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)


def compilation_error(error: Exception) -> UserError | None:
    """The one line for a network that torch could not compile when it was first called; None for any other error."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    cause = error.__cause__ or error.__context__
    code = storage_code(cause) if isinstance(cause, OSError) else ExitCode.WILL_FAIL_AGAIN
    reason = " ".join(str(error).split("\n\n")[0].split())[:300]  # without advice for torch's developers
    return UserError(f"model.compile: the network cannot be compiled here: {reason}; try model.compile=false", code)
