"""Steps with non-finite gradients change nothing, and the host need not wait for the device to know.

Every rank has the norm of the whole gradient. Where it is not finite, the optimizer's kernel leaves weights and moments
as they are (``found_inf``, which torch's fused optimizers know from gradient scaling), so nothing depends on what the
host knows. It learns of it ``RUN_AHEAD`` steps later, when the device has long continued.
"""

from collections import deque
from typing import Any

import torch

from pretrain.deepspeed_compat import SCALER_STATE, gradient_norm, loss_scaler, skip_on_device, torch_optimizer

RUN_AHEAD = 2
"""Steps that the host is ahead of its device before it waits; the same on all ranks, which roll back together."""


class NonFiniteSteps:
    """Makes an engine skip steps with non-finite gradients, and reports which ones were skipped.

    Three ways, the first wherever it can be:
      - torch's fused AdamW and SGD at any ZeRO stage: decided on the device, no host waits for that (at stage 3
        DeepSpeed waits for the device for other reasons);
      - fp16 (whose loss scale the host adapts) and CPU offloading (whose optimizer is the host): DeepSpeed decides;
      - LAMB, at stage 0: the host reads the gradient's norm and drops the gradients.
    """

    def __init__(self, engine: Any, loss_scale: dict[str, float] | None = None) -> None:
        self._engine = engine
        self._stage: int = engine.zero_optimization_stage()
        self._optimizer = torch_optimizer(engine)
        sections = filter(None, (engine.zero_offload_optimizer(), engine.zero_offload_param()))
        offloads = any(section.device == "cpu" for section in sections)
        self.waits = engine.fp16_enabled() or offloads or not self._optimizer.defaults.get("fused")
        """Whether the host waits for the device in every step to learn of a skipped one."""
        self._nonfinite: torch.Tensor | None = None
        self._dropped = self._reported = 0
        self._flags: deque[bool | tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self._scaler = loss_scaler(engine)
        self.set_loss_scale(loss_scale or {})
        if not self.waits:
            self._optimizer.register_step_pre_hook(self._pass_to_kernel)
            if self._stage:
                skip_on_device(engine)
        elif self._stage == 0:
            self._optimizer.register_step_pre_hook(self._drop_gradients)

    def note_step(self) -> bool | torch.Tensor:
        """Remember whether the step just taken was skipped; called after every step of the optimizer.

        Returns:
            whether it was; on the device where the host does not wait for it.
        """
        if self.waits:
            skipped = self._engine.skipped_steps + self._dropped
            self._flags.append(was_skipped := skipped > self._reported)
            self._reported = skipped
            return was_skipped
        assert self._nonfinite is not None, "the optimizer took no step"
        there, self._nonfinite = self._nonfinite, None
        here, event = there, None
        if there.is_cuda:
            here = there.to("cpu", non_blocking=True)  # pinned; readable after the event
            event = torch.cuda.Event(blocking=True)  # waiting for it leaves the core to the decoders
            event.record()
        self._flags.append((here, event))
        return there

    def skipped(self, *, skip_last: int = 0) -> list[bool]:
        """Whether each step noted and not asked for yet was skipped, oldest first; the same on every rank.

        Args:
            skip_last: leave out the newest so many, which the device still works on while the host waits.
        """
        flags = []
        while len(self._flags) > skip_last:
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
        """Restore what ``loss_scale`` returned; nothing where there is none on either side."""
        if self._scaler is not None:
            for name in state.keys() & set(SCALER_STATE):
                setattr(self._scaler, name, state[name])

    def _pass_to_kernel(self, *_: Any) -> None:
        """Before the optimizer steps, at ZeRO once for each partition: pass to its kernel whether to skip."""
        if self._nonfinite is None:
            clips = self._stage or self._engine.gradient_clipping() != 0
            norm = gradient_norm(self._engine) if clips else self._norm()
            self._nonfinite = (~(norm.isfinite() & (norm >= 0))).float()  # DeepSpeed writes -1 for a non-finite norm
        self._optimizer.found_inf = self._nonfinite  # type: ignore[attr-defined]

    def _drop_gradients(self, *_: Any) -> None:
        """Before a step at stage 0: drop the gradients if one is not finite, so that the optimizer does nothing.

        They are reduced at this point, so all ranks decide alike.
        """
        if not self._norm().isfinite():
            self._dropped += 1
            for parameter in self._engine.module.parameters():
                parameter.grad = None

    def _norm(self) -> torch.Tensor:
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, foreach=True)
