"""Steps whose gradients are not finite change nothing, and the host need not wait for the device to see to it.

Every rank has the norm of the whole gradient. Where it is not finite the optimizer's kernel leaves weights and moments
as they are (``found_inf``, which torch's fused optimizers know from gradient scaling), so nothing depends on what the
host knows. It learns of it ``RUN_AHEAD`` steps later, when the device has long gone on.
"""

import sys
from collections import deque
from typing import Any

import torch

RUN_AHEAD = 2
"""Steps that the host is ahead of its device before it waits for it; the same on all ranks, which go back together."""
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in DeepSpeed's ``DynamicLossScaler`` from step to step."""


def mask_nan_or_inf_with_val_inplace(norm: torch.Tensor, device: object = None, val: float = -1.0) -> None:  # noqa: ARG001
    """What DeepSpeed's function of this name does, without the copy of ``val`` to the device that a host waits for."""
    norm.masked_fill_(~norm.isfinite(), val)


def clip_tensors_by_global_norm(
    input_tensors: list[torch.Tensor],
    max_norm: float,
    global_norm: torch.Tensor,
    mpu: object = None,  # noqa: ARG001
    eps: float = 1e-6,
) -> None:
    """What DeepSpeed's function of this name does, without asking the device whether anything is to be clipped."""
    torch._foreach_mul_(input_tensors, (max_norm / (global_norm + eps)).clamp(max=1.0))


class BadSteps:
    """Makes an engine skip steps whose gradients are not finite, and tells which ones were.

    Three ways, the first wherever it can be:
      - torch's fused AdamW and SGD at any ZeRO stage: decided on the device, no host waits for that (at stage 3
        DeepSpeed waits for the device on other grounds);
      - fp16 (whose loss scale the host adapts) and CPU offloading (whose optimizer is the host): DeepSpeed decides;
      - LAMB, at stage 0: the host looks at the gradient's norm and drops the gradients.

    Args:
        engine: ``deepspeed.DeepSpeedEngine``. Its internals are used: DeepSpeed's version is pinned.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._stage: int = engine.zero_optimization_stage()
        self._optimizer: torch.optim.Optimizer = self._zero.optimizer if self._stage else self._zero
        sections = (engine.zero_offload_optimizer(), engine.zero_offload_param())
        offloads = any(section is not None and section.device == "cpu" for section in sections)
        self.waits = engine.fp16_enabled() or offloads or not self._optimizer.defaults.get("fused")
        """Whether the host waits for the device in every step to learn of a bad one."""
        self._bad: torch.Tensor | None = None
        self._dropped = self._told = 0
        self._flags: deque[bool | tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self._scaler = self._zero.loss_scaler if engine.fp16_enabled() and engine.dynamic_loss_scale() else None
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False  # how many bad steps are too many is the recipe's
        if not self.waits:
            self._optimizer.register_step_pre_hook(self._skip_on_device)
            if self._stage:
                self._let_device_decide()
        elif self._stage == 0:
            self._optimizer.register_step_pre_hook(self._drop_bad_gradients)

    def note_step(self) -> None:
        """Remember what became of the step just taken; called after every step of the optimizer."""
        if self.waits:
            skipped = self._engine.skipped_steps + self._dropped
            self._flags.append(skipped > self._told)
            self._told = skipped
            return
        assert self._bad is not None, "the optimizer took no step"
        event = None
        if self._bad.is_cuda:
            self._bad = self._bad.to("cpu", non_blocking=True)  # into pinned memory; readable once the event is over
            event = torch.cuda.Event(blocking=True)  # whoever waits for it leaves the core to the decoders
            event.record()
        self._flags.append((self._bad, event))
        self._bad = None

    def settled(self, *, but: int = 0) -> list[bool]:
        """Whether the steps noted and not asked for yet were skipped, oldest first; the same on every rank.

        Args:
            but: leave out the newest so many, of which the device has work left while the host waits for this answer.
        """
        flags = []
        while len(self._flags) > but:
            flag = self._flags.popleft()
            if not isinstance(flag, bool):
                value, event = flag
                if event is not None:
                    event.synchronize()
                flag = bool(value.numpy()[()])
            flags.append(flag)
        return flags

    def loss_scale(self) -> dict[str, float]:
        """State of fp16's dynamic loss scale, for a checkpoint; empty in other precisions."""
        return {} if self._scaler is None else {name: getattr(self._scaler, name) for name in SCALER_STATE}

    def set_loss_scale(self, state: dict[str, float]) -> None:
        """Go on with a loss scale as ``loss_scale`` gave it; nothing where there is none on either side."""
        if self._scaler is not None:
            for name in state.keys() & set(SCALER_STATE):
                setattr(self._scaler, name, state[name])

    def _skip_on_device(self, *_: Any) -> None:
        """Before the optimizer steps, at ZeRO once for each partition: let its kernel know the norm's verdict."""
        if self._bad is None:
            norm = self._norm()
            self._bad = (~(norm.isfinite() & (norm >= 0))).float()  # DeepSpeed writes -1 for a norm that is not finite
        self._optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    def _norm(self) -> torch.Tensor:
        if self._stage == 0 and self._engine.gradient_clipping() == 0:
            return torch.nn.utils.get_total_norm(self._gradients(), foreach=True)
        holder = self._zero if self._stage else self._engine  # at stage 0 our own clipping leaves it there
        norm: torch.Tensor = holder._global_grad_norm  # noqa: SLF001
        return norm

    def _let_device_decide(self) -> None:
        """Keep DeepSpeed's ZeRO optimizers from asking the device whether the norm is finite, and how large it is."""
        zero, module = self._zero, sys.modules[type(self._zero).__module__]
        for own in (mask_nan_or_inf_with_val_inplace, clip_tensors_by_global_norm):
            for user in (module, sys.modules["deepspeed.runtime.utils"]):
                if hasattr(user, own.__name__):
                    setattr(user, own.__name__, own)
        original, question = zero.step, module.is_invalid_grad_norm

        def step(closure: Any = None) -> None:
            module.is_invalid_grad_norm = lambda _norm: False  # type: ignore[attr-defined]
            try:
                original(closure)
            finally:
                module.is_invalid_grad_norm = question  # type: ignore[attr-defined]

        zero.step = step
        zero.check_overflow = lambda *_, **__: None

    def _drop_bad_gradients(self, *_: Any) -> None:
        """Before a step at stage 0: take the gradients away if one is not finite, so that the optimizer does nothing.

        They are reduced at this point, so all ranks decide alike.
        """
        if not torch.nn.utils.get_total_norm(self._gradients(), foreach=True).isfinite():
            self._dropped += 1
            for parameter in self._engine.module.parameters():
                parameter.grad = None

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._engine.module.parameters() if p.grad is not None]
