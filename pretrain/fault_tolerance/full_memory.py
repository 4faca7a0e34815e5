"""The message and the exit status where a GPU's memory is full."""

from pretrain.outcome import ExitCode
from pretrain.state import TrainState

_ADVICE = {
    "evaluating": "lower evaluation.batch_size",
    "probing": "give probes a smaller set, or leave them out",
    "copying a checkpoint": "the copy is pinned in the host's memory, which may be what is full: give the job "
    "more of it (--mem)",
}
_TRAINING = (
    "lower train_micro_batch_size_per_gpu, or recompute with model.activation_checkpointing; python -m pretrain.plan "
    "estimates what fits"
)


def full_memory_message(error: BaseException, phase: str, advice: str) -> str:
    """One line: what was being done, the library's words, and what to do."""
    return f"the GPU's memory is full, {phase} ({' '.join(str(error).split())[:200]}): {advice}"


def explain_full_memory(error: BaseException, phase: str, progress: TrainState | None) -> tuple[str, ExitCode]:
    """One line, and the exit code.

    What this run has done before did fit, so that something else was in the way, or the ranks are fewer; the limit of
    restarts without a new checkpoint holds. What it has never done would fail again.

    Args:
        error: of which ``gpu_memory_is_full`` is true.
        phase: what this rank was doing, in the words of ``Watchdog.beat``.
        progress: of the run; None before it is built.
    """
    text = full_memory_message(error, phase, _ADVICE.get(phase, _TRAINING))
    if progress is None or phase == "copying a checkpoint":
        return text, ExitCode.RETRY
    done = {"evaluating": progress.evaluated_at, "probing": progress.probed_at}.get(phase, progress.step)
    return text, ExitCode.RETRY if done else ExitCode.WILL_FAIL_AGAIN
