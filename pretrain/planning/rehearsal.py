"""A forward and backward pass on tensors without memory: what autograd keeps, and when each gradient arrives.

torch's FakeTensorMode runs the real network, with its real kernels' shapes and types, but computes and allocates
nothing. Every storage that an operator would allocate is noted when it is born and when it dies.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import LaViT
from models.config import STAGES, LaViTConfig
from pretrain.engine.precision import Precision, input_dtype

Policy = Literal["none", "all"] | Sequence[bool]
SIZES = (2, 4)
"""Micro-batches that are rehearsed."""


@dataclass(frozen=True)
class Passes:
    """One micro-batch forward and backward. Bytes; weights are not counted, and gradients only until they arrive."""

    kept: int
    """What lives when the forward pass has ended: activations for the backward pass, the batch, the loss."""
    forward_peak: int
    """Most that lives at once until then."""
    live: NDArray[np.int64]
    """(parameters,) most that lives at once in the backward pass between the arrival of one gradient and the next."""

    @property
    def peak(self) -> int:
        """Most bytes that live at once, gradients that have arrived left out."""
        return max(self.forward_peak, int(self.live.max()))


@dataclass(frozen=True)
class _Account:
    """What one rehearsal noted. Parts are the four stages and, as the fifth, the batch, the head and the loss."""

    forward: NDArray[np.float64]
    """(parts,) most that lived while the part ran forward."""
    standing: NDArray[np.float64]
    """(parts,) of what the part made, what lived when it had run."""
    kept: NDArray[np.float64]
    """(parts,) of what the part made, what lived when the forward pass had ended."""
    live: NDArray[np.float64]
    """(parameters,) as in ``Passes``."""


class Rehearsal:
    """Forward and backward pass of a network, for any micro-batch and any choice of recomputed stages.

    Four passes are rehearsed: with no and with all stages recomputed, of two micro-batches each. Bytes are affine in
    the micro-batch. While a stage runs, only what the stages before it keep depends on whether these are recomputed, so
    every choice can be put together from the two.

    Args:
        config: the network.
        precision: what the engine computes in.
        mixed: whether mixup or CutMix make a new picture of two.
        gpu: whether autocast keeps the types that it keeps on a GPU, or those of a CPU.
    """

    def __init__(self, config: LaViTConfig, precision: Precision, *, mixed: bool, gpu: bool) -> None:
        self.names: tuple[str, ...] = ()
        """Parameters in the order in which their gradients arrive."""
        self._accounts: dict[bool, tuple[_Account, _Account]] = {}
        for recomputed in (False, True):
            two = []
            for size in SIZES:
                self.names, account = _rehearse(config, [recomputed] * STAGES, size, precision, mixed=mixed, gpu=gpu)
                two.append(account)
            self._accounts[recomputed] = (two[0], two[1])
        self._part = np.array([_part_of(name) for name in self.names])

    def passes(self, policy: Policy, micro_batch: int) -> Passes:
        """One micro-batch of so many pictures.

        Args:
            policy: which stages are recomputed, as ``LaViT.set_activation_checkpointing`` takes it.
            micro_batch: pictures.
        """
        chosen = [policy == "all"] * STAGES if isinstance(policy, str) else [bool(one) for one in policy]
        accounts = {which: _at(two, micro_batch) for which, two in self._accounts.items()}
        own = [accounts[which] for which in (*chosen, False)]  # the head is never recomputed
        kept = np.array([account.kept[part] for part, account in enumerate(own)])
        standing = np.array([account.standing[part] for part, account in enumerate(own)])
        forward = [
            account.forward[part] + (standing - account.standing)[:part].sum() for part, account in enumerate(own)
        ]
        live = np.zeros(len(self.names))
        for part, account in enumerate(own):
            mine = self._part == part
            live[mine] = account.live[mine] + (kept - account.kept)[:part].sum()
        return Passes(round(kept.sum()), round(max(forward)), live.round().astype(np.int64))


def _at(two: tuple[_Account, _Account], micro_batch: int) -> _Account:
    share = (micro_batch - SIZES[0]) / (SIZES[1] - SIZES[0])
    fields = (field.name for field in dataclasses.fields(_Account))
    small, large = two
    return _Account(**{n: getattr(small, n) + share * (getattr(large, n) - getattr(small, n)) for n in fields})


def _part_of(name: str) -> int:
    head, _, rest = name.partition(".")
    return int(rest.split(".")[0]) if head == "stages" else STAGES


def _rehearse(
    config: LaViTConfig, policy: list[bool], micro_batch: int, precision: Precision, *, mixed: bool, gpu: bool
) -> tuple[tuple[str, ...], _Account]:
    """Run one micro-batch as ``pretrain.train`` does, without computing it."""
    with torch.device("meta"):
        model = LaViT(config)
    model.set_activation_checkpointing(policy)
    model.train()
    dtype = input_dtype(precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_shapes(model, dtype)
        if gpu and precision == "bf16 autocast":
            for module in (model, *(block for stage in model.stages for block in stage.blocks)):
                _autocast_as_on_gpu(module)  # the backward pass recomputes blocks, behind the model's back
        ledger = _Ledger()
        names, live = _note_arrivals(model, ledger)
        forward, standing = _note_stages(model, ledger)
        with ledger:
            loss, batch = _loss(model, micro_batch, dtype, precision, mixed=mixed)
            forward.append(ledger.restart_peak())
            kept = ledger.live_by_part.copy()
            loss.backward()
            del loss, batch  # the loop holds the loader's batch until the next one
    account = _Account(*(np.array(one, float) for one in (forward, [*standing, kept[STAGES]], kept, live)))
    return tuple(names), account


def _loss(
    model: LaViT, micro_batch: int, dtype: torch.dtype, precision: Precision, *, mixed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``pretrain.train.micro_batch_loss``: soft targets, both losses, in fp32. Also gives the loader's batch."""
    config = model.config
    batch = torch.empty(micro_batch, config.in_channels, *config.image_size)
    images = batch.clone() if mixed else batch
    targets = torch.empty(micro_batch, config.num_classes)
    uniforms = torch.empty(model.num_drop_paths, micro_batch) if config.drop_path > 0 else None
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16 autocast" else contextlib.nullcontext()
    with autocast:
        logits, diagonality = model(images.to(dtype), drop_path_uniforms=uniforms, with_diagonality=True)
    return F.cross_entropy(logits.float(), targets) + diagonality.float(), batch


class GpuAutocast(TorchFunctionMode):
    """On top of autocast for CPUs: what autocast for GPUs computes in fp32, of the functions that LaViT calls.

    Lists: aten/src/ATen/autocast_mode.h of torch, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE.
    """

    FP32 = frozenset({F.layer_norm})
    FP32_RESULT = frozenset({torch.Tensor.softmax, torch.Tensor.sum})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FP32:
            args = [_wide(one) for one in args]
            kwargs = {name: _wide(one) for name, one in kwargs.items()}
        elif func in self.FP32_RESULT and args[0].dtype in {torch.bfloat16, torch.float16}:
            kwargs.setdefault("dtype", torch.float32)
        return func(*args, **kwargs)


def _autocast_as_on_gpu(module: nn.Module) -> None:
    forward = module.forward

    def as_on_gpu(*args: Any, **kwargs: Any) -> Any:
        with GpuAutocast():
            return forward(*args, **kwargs)

    module.forward = as_on_gpu


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _give_shapes(model: nn.Module, dtype: torch.dtype) -> None:
    """Put parameters of the mode that is on in the place of the meta device's."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))


def _note_arrivals(model: nn.Module, ledger: "_Ledger") -> tuple[list[str], list[int]]:
    """Note every gradient as it arrives, and take it away: what happens to it is the engine's business."""
    names: list[str] = []
    live: list[int] = []

    def hook(name: str) -> Callable[[torch.Tensor], None]:
        def arrived(parameter: torch.Tensor) -> None:
            parameter.grad = None
            names.append(name)
            live.append(ledger.restart_peak())

        return arrived

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(hook(name))
    return names, live


def _note_stages(model: LaViT, ledger: "_Ledger") -> tuple[list[int], list[int]]:
    """Note for every stage the most that lives while it runs forward, and what it has made that lives behind it."""
    peaks: list[int] = []
    standing: list[int] = []

    def before(stage: int) -> Callable[..., None]:
        return lambda *_: ledger.enter(stage)

    def behind(stage: int) -> Callable[..., None]:
        def note(*_: object) -> None:
            peaks.append(ledger.restart_peak())
            standing.append(ledger.live_by_part[stage])
            ledger.enter(STAGES)

        return note

    for index, stage in enumerate(model.stages):
        stage.register_forward_pre_hook(before(index))
        stage.register_forward_hook(behind(index))
    return peaks, standing


class _Ledger(TorchDispatchMode):
    """Counts the bytes of storages that operators make, from birth to death, by the part that made them."""

    def __init__(self) -> None:
        super().__init__()
        self.live_by_part = [0] * (STAGES + 1)
        self._live = self._peak = 0
        self._part = STAGES
        self._known: dict[int, weakref.ref] = {}

    def enter(self, part: int) -> None:
        """What is made from now on was made by this part."""
        self._part = part

    def restart_peak(self) -> int:
        """Most bytes that lived at once since it was last asked."""
        peak, self._peak = self._peak, self._live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}  # noqa: SLF001
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata  # noqa: SLF001
            if key not in self._known and key not in given:
                self._born(key, storage)
        return result

    def _born(self, key: int, storage: torch.UntypedStorage) -> None:
        size, part = storage.nbytes(), self._part

        def died(_: object) -> None:
            del self._known[key]
            self._live -= size
            self.live_by_part[part] -= size

        self._known[key] = weakref.ref(storage, died)
        self._live += size
        self.live_by_part[part] += size
        self._peak = max(self._peak, self._live)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
