"""Writes checkpoints while training continues: the loop waits for a copy in memory, a thread does the rest.

Every rank copies the shards that it owns to the CPU and continues. Its thread writes its file; the threads of all ranks
then agree, over a process group of their own, and rank 0 publishes the checkpoint and removes old ones. Whether it
worked is printed at once, but acted on at points that all ranks reach together (``finish``), so that they never differ.
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_pipeline.errors import is_lasting
from pretrain.checkpoints.checkpoint import (
    BUFFER,
    FORMAT,
    MANIFEST,
    CheckpointDamagedError,
    check_pieces,
    list_checkpoints,
    read_manifest,
    seal,
    step_of,
)
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.files import digest_of_file, fsync, write_json
from pretrain.state import TrainState

PAUSES_S = (5.0, 30.0)
"""A checkpoint that cannot be written is tried again after these pauses, from the same copy."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is there."""

    newest: int = 2
    """So many of the newest."""
    every_steps: int | None = None
    """In addition, the first one at or behind every multiple of so many optimizer steps."""
    best: bool = False
    """In addition, the one with the highest top-1 of those that were evaluated at their own step."""


class CheckpointWriter:
    """Writes one checkpoint at a time in the background. All methods are called on all ranks at the same point.

    Args:
        folder: the run's ``checkpoints`` folder, on storage that all ranks share.
        shards: what this rank owns.
        retention: which ones stay.
        facts: further JSON for the manifests.
        group: CPU group over all ranks that nothing else uses.
        say: prints a line; called on rank 0 from the thread.
    """

    def __init__(
        self,
        folder: Path,
        shards: OptimizerShards,
        *,
        retention: Retention,
        facts: dict[str, Any],
        group: dist.ProcessGroup,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder, self._shards, self._retention, self._facts = folder, shards, retention, facts
        self.group, self._say = group, say
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._buffers: dict[str, torch.Tensor] = {}
        self._outcome: Future[tuple[str, bool]] | None = None
        self._hurry = threading.Event()
        self.lasting = False
        """Whether the problem that ``finish`` returned will not pass by itself."""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint was started whose outcome has not been read yet."""
        return self._outcome is not None

    def start(self, state: TrainState) -> None:
        """Copy this rank's shards and begin to write them; the one before must be finished."""
        assert self._outcome is None, "finish the checkpoint before first"
        self._copy_shards()
        index = [(p.name, p.shape, p.offset, p.length, self._shards.step_of(p)) for p in self._shards.shards]
        self._hurry.clear()
        self._outcome = Future()
        arguments = (self._outcome, asdict(state), index)
        # Not by an executor, whose threads the interpreter waits for even where other ranks are gone.
        threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True).start()

    def finish(self, *, hurry: bool = True) -> str:
        """Wait for the checkpoint that was begun. Nothing half-written is left when it failed.

        Args:
            hurry: try no more once an attempt failed.

        Returns:
            "" when it is on disk, else what failed on which rank; the same on all ranks.

        Raises:
            Exception: whatever kept the ranks from agreeing, such as one that died.
        """
        if self._outcome is None:
            return ""
        if hurry:
            self._hurry.set()
        outcome, self._outcome = self._outcome, None
        problem, self.lasting = outcome.result()
        return problem

    def _copy_shards(self) -> None:
        optimizer, shards = self._shards.optimizer, self._shards.shards
        total = sum(shard.length for shard in shards)
        on_gpu = bool(shards) and shards[0].partition.is_cuda
        for kind in self._shards.kinds:
            if kind not in self._buffers:
                self._buffers[kind] = torch.empty(total, dtype=torch.float32, pin_memory=on_gpu)
            at = 0
            for shard in shards:
                self._buffers[kind][at : at + shard.length].copy_(shard.view(kind, optimizer), non_blocking=on_gpu)
                at += shard.length
        for name, buffer in self._shards.buffers.tensors().items():
            self._buffers[BUFFER + name] = buffer.detach().to("cpu", copy=True).contiguous()
        if on_gpu:
            torch.cuda.current_stream(shards[0].partition.device).synchronize()

    def _run(self, outcome: Future[tuple[str, bool]], progress: dict[str, Any], index: list[Any]) -> None:
        try:
            outcome.set_result(self._try(progress, index))
        except BaseException as error:  # noqa: BLE001 - it is raised where the outcome is asked for
            outcome.set_exception(error)

    def _try(self, progress: dict[str, Any], index: list[Any]) -> tuple[str, bool]:
        for pause in (*PAUSES_S, None):
            problem, lasting = self._attempt(progress, index)
            again = False
            if self._rank == 0 and problem:
                text = f"WARNING checkpoint at step {progress['step']} could not be written: {problem}"
                self._say(text if pause is None else f"{text}; trying again for a while")
                again = pause is not None and not self._hurry.wait(pause)
            result: list[Any] = [problem, lasting, again]
            dist.broadcast_object_list(result, src=0, group=self.group)
            if not result[2]:
                break
        return result[0], result[1]

    def _attempt(self, progress: dict[str, Any], index: list[Any]) -> tuple[str, bool]:
        """Write this rank's file; rank 0 publishes when all have theirs, and learns what failed and if it lasts."""
        final = self._folder / f"step-{progress['step']:08d}"
        draft = self._folder / f".{final.name}.unfinished"
        problem, lasting, files = "", False, {}
        try:
            draft.mkdir(parents=True, exist_ok=True)
            file = draft / f"rank-{self._rank:05d}.safetensors"
            save_file(self._buffers, file, metadata={"pieces": json.dumps(index)})
            fsync(file)
            with suppress(OSError):  # safetensors lets only its owner read a file
                file.chmod(draft.stat().st_mode & 0o666)
            files = {file.name: {"size": file.stat().st_size, "blake2": digest_of_file(file)}}
        except (OSError, SafetensorError, RuntimeError) as error:
            problem, lasting = f"rank {self._rank}: {error}", _is_lasting(error)
        reports: list[Any] | None = [None] * self._world if self._rank == 0 else None
        dist.gather_object((problem, files, index, lasting), reports, dst=0, group=self.group)
        if reports is None:
            return "", False
        problem = next((report[0] for report in reports if report[0]), "")
        lasting = all(report[3] for report in reports if report[0])
        try:
            if not problem:
                check_pieces([piece for report in reports for piece in report[2]], final)  # else it could not be read
                all_files = {name: entry for report in reports for name, entry in report[1].items()}
                manifest = {"format": FORMAT, "progress": progress, **self._facts, "world_size": self._world}
                _publish(draft, final, manifest | {"zero_stage": self._shards.stage, "files": all_files})
        except (OSError, CheckpointDamagedError) as error:
            problem, lasting = f"rank 0: {error}", _is_lasting(error)
        if problem:
            shutil.rmtree(draft, ignore_errors=True)
            return problem, lasting
        try:
            _prune(self._folder, self._retention)
        except OSError as error:
            self._say(f"WARNING old checkpoints could not be removed: {error}; tried again with the next one")
        return "", False


def _is_lasting(error: Exception) -> bool:
    """Whether what kept a file from being written will not pass by itself; safetensors gives the number as text."""
    if isinstance(error, OSError):
        return is_lasting(error)
    number = re.search(r"os error (\d+)", str(error))
    return number is None or is_lasting(OSError(int(number[1]), ""))


def _publish(draft: Path, final: Path, manifest: dict[str, Any]) -> None:
    for file in draft.iterdir():
        if file.name not in manifest["files"]:
            file.unlink()  # left by an earlier attempt with more ranks
    write_json(draft / MANIFEST, seal(manifest))
    fsync(draft)
    if final.exists():
        _hide(final)
    draft.rename(final)
    fsync(final.parent)


def _prune(folder: Path, retention: Retention) -> None:
    """Remove what need not stay, and whatever earlier attempts left."""
    found = list_checkpoints(folder)
    for path in set(found) - _kept(found, retention):
        _hide(path)  # so that a half-deleted one never looks complete
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # what cannot be removed now is removed with the next checkpoint


def _hide(path: Path) -> None:
    """Give a checkpoint a name that none has, by which it is removed."""
    path.rename(path.with_name(f".{path.name}.old-{time.time_ns()}"))


def _kept(found: list[Path], retention: Retention) -> set[Path]:
    kept = set(found[: retention.newest])
    if retention.every_steps is not None:
        first: dict[int, Path] = {}
        for path in found:  # the newest first, so the oldest of each interval is what remains
            first[step_of(path) // retention.every_steps] = path
        kept |= {path for interval, path in first.items() if interval}
    if retention.best:
        rated = [(top1, path) for path in found if (top1 := _top1_of(path)) is not None]
        kept |= {max(rated)[1]} if rated else set()
    return kept


def _top1_of(path: Path) -> float | None:
    """Top-1 of the very weights in a checkpoint, in percent; None where they were not evaluated, or it is damaged."""
    try:
        progress = read_manifest(path)["progress"]
    except Exception:  # noqa: BLE001 - whatever is wrong with an old one, it is not the best
        return None
    if progress["evaluated_at"] != progress["samples_seen"] or not progress["evaluation"]:
        return None
    return float(progress["evaluation"]["top1"])
