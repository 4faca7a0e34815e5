"""torch's meta device in the place of a GPU: everything runs there, nothing is computed, and no GPU is needed.

A host that reads a value of the device fails on it. What else a GPU would fail on or let its host wait for is noted by
``HostWaits``.
"""

import os
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.pretrain.ranks import start_ranks

DEVICE = torch.device("meta")
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
MAKES = (torch.tensor, torch.as_tensor, torch.asarray)


class HostWaits(TorchDispatchMode):
    """Notes what makes a host wait until its GPU has done all that was asked of it before, or fails on a GPU.

    That is reading a value of the device, a copy to it that is not ``non_blocking``, a tensor made there of numbers of
    the host, ``synchronize``, and an operation on tensors of both, but for numbers (0-dim) and indices.
    """

    current: "ClassVar[HostWaits | None]" = None

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._made = _Made(self)

    def __enter__(self) -> "HostWaits":
        super().__enter__()
        self._made.__enter__()
        HostWaits.current = self
        return self

    def __exit__(self, *error: Any) -> None:
        HostWaits.current = None
        self._made.__exit__(*error)
        super().__exit__(*error)

    def note(self, what: str) -> None:
        """One wait more."""
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if __file__ != frame.filename]
        self.found.append(f"{what} in {' < '.join(places[:-4:-1])}")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            self.note(str(function))
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default:
            self._copied(args[0], result, bool((kwargs or {}).get("non_blocking")))
        elif function is torch.ops.aten.copy_.default:
            self._copied(args[1], args[0], bool(args[2]) if len(args) > 2 else False)
        elif {one.device.type for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor) and one.ndim} > {
            DEVICE.type
        }:
            self.note(f"{function} of host and device")
        return result

    def _copied(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
        if source.device != target.device and not non_blocking:
            self.note(f"copy from {source.device} to {target.device}")


class Operators(TorchDispatchMode):
    """Counts the operators that do work, which a view does not, by the phase of the step that they are in."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: str | None = None
        self.counts: Counter[str | None] = Counter()

    def enter(self, phase: str | None) -> None:
        """From here on operators are of this phase; in the place of ``StepTimer.enter``."""
        self.phase = phase

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[self.phase] += not function.is_view
        return function(*args, **kwargs or {})


class _Made(TorchFunctionMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        if function in MAKES and device is not None and torch.device(device).type != "cpu":
            self._waits.note(f"{function.__name__}(..., device={device})")
        return function(*args, **kwargs or {})


def on_stand_in(function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(*arguments)`` as rank 0 of two, in a process of its own; an exception is raised here."""
    start_ranks(1, _as_first_of_two, function, arguments)


def _as_first_of_two(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def synchronize(*_: object) -> None:  # it waits, as on a GPU
        if HostWaits.current is not None:
            HostWaits.current.note("synchronize()")

    accelerator = CPU_Accelerator()  # tells DeepSpeed where to compute
    names = {"device_name": DEVICE.type, "current_device_name": DEVICE.type, "communication_backend_name": "fake"}
    for method, name in names.items():
        setattr(accelerator, method, lambda *_, name=name: name)
    accelerator.on_accelerator = lambda tensor: tensor.device == DEVICE
    accelerator.synchronize = synchronize
    deepspeed.ops.__compatible_ops__ = {}  # as init_distributed does it: else a kernel is compiled for a minute
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    set_accelerator(accelerator)
    # Lists of devices that torch's foreach and fused kernels are for; those of a GPU are what is looked at.
    _foreach_utils._get_foreach_kernels_supported_devices = lambda: [DEVICE.type]
    _foreach_utils._get_fused_kernels_supported_devices = lambda: [DEVICE.type]
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())  # its collectives do nothing
    deepspeed.init_distributed(dist_backend="fake", verbose=False)
    function(*arguments)
