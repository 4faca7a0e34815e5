"""Checkpoints that are keyed by parameter name: N ranks of any ZeRO stage write, M ranks of any stage read.

    checkpoints/step-00001000/
        rank-00000.safetensors     what rank 0 owned: flat fp32 tensors "parameter", "exp_avg", "exp_avg_sq"; its
        rank-00001.safetensors     metadata "pieces" lists (name, shape, offset, length, step) in the same order.
                                   Since format 2 also "buffer/NAME", each buffer of the network on this rank
        manifest.json              format, progress, sizes and BLAKE2 digests of the files; written last

A checkpoint is written into a hidden folder that is renamed when all is on disk, so it is complete or absent. It is
verified when read; one that fails is passed over, with a warning, for the one before. Nothing in it is ever unpickled.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from pretrain.checkpoints.buffers import mean_over_ranks
from pretrain.checkpoints.optimizer_shards import AVERAGE, OptimizerShards
from pretrain.files import SEAL, aside, digest_of_fields, digest_of_file
from pretrain.outcome import ExitCode, UserError, storage_code
from pretrain.state import TrainState

FORMAT = 2
READABLE = (1, 2)
BUFFER = "buffer/"
"""What names of buffers begin with in a rank's file."""
MANIFEST = "manifest.json"


class CheckpointDamagedError(UserError):
    """A checkpoint that cannot be trusted; the text names the file and what is wrong with it.

    ``code`` is the exit status where there is no other checkpoint.
    """


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints under ``folder``, the newest first; unfinished ones do not count."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdecimal()), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def load_newest(
    folder: Path,
    shards: OptimizerShards,
    *,
    group: dist.ProcessGroup,
    good: Callable[[TrainState], bool] = lambda _: True,
) -> tuple[TrainState, list[str]] | None:
    """Fill the engine from the newest checkpoint that is intact and ``good``. Collective.

    Returns:
        the state and a line for each newer checkpoint that was passed over as damaged; None if there is no checkpoint.

    Raises:
        UserError: there are checkpoints but none is intact; the newest intact one is of another model; or, with
            ``ExitCode.RETRY``, one cannot be read now.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    listing = [list_checkpoints(folder) if rank == 0 else []]
    dist.broadcast_object_list(listing, src=0, group=group)
    warnings: list[str] = []
    damaged: list[Path] = []
    for path in listing[0]:
        problem: CheckpointDamagedError | None = None
        try:
            verify(path, part=rank, parts=world)
        except CheckpointDamagedError as error:
            problem = error
        gathered: list[CheckpointDamagedError | None] = [None] * world
        dist.all_gather_object(gathered, problem, group=group)
        problems = [one for one in gathered if one is not None]
        for one in problems:
            if one.code is ExitCode.RETRY:
                raise UserError(f"{one}; nothing was discarded: start again", ExitCode.RETRY)
        if problems:
            warnings.append(f"checkpoint {path.name} is damaged, going back to the one before: {problems[0]}")
            damaged.append(path)
            continue
        try:
            state = TrainState(**read_manifest(path)["progress"])
        except TypeError as error:
            raise UserError(f"{path} was written by another version: {error}") from None
        if good(state):
            _fill(path, shards)
            if rank == 0:
                warnings += _put_aside(damaged)
            return state, warnings
    if warnings:
        raise UserError(f"no usable checkpoint in {folder}: {'; '.join(warnings)}; move the folder away to start over")
    return None


def _put_aside(damaged: Iterable[Path]) -> Iterator[str]:
    """Rename checkpoints, which must neither count as kept nor be found again when they are older history."""
    for path in damaged:
        try:
            path.rename(aside(path))
        except OSError as error:
            yield f"{path} cannot be renamed: {error}"


def verify(path: Path, *, part: int = 0, parts: int = 1) -> None:
    """Check sizes and digests of a checkpoint's files; with ``parts`` > 1 only of every ``parts``-th.

    Raises:
        CheckpointDamagedError: a file is missing, has another size or other content than when it was written.
    """
    manifest = read_manifest(path)
    if manifest["progress"].get("step", step_of(path)) != step_of(path):
        raise CheckpointDamagedError(f"{path / MANIFEST} is of step {manifest['progress']['step']}")
    for name, expected in sorted(manifest["files"].items())[part::parts]:
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["size"]:
                raise CheckpointDamagedError(f"{file} has {size} bytes instead of {expected['size']}")
            if digest_of_file(file) != expected["blake2"]:
                raise CheckpointDamagedError(f"{file} has other content than when it was written")
        except OSError as error:
            raise CheckpointDamagedError(f"{file} cannot be read: {error.strerror}", storage_code(error)) from None


def read_weights(path: Path, *, average: bool = False) -> dict[str, torch.Tensor]:
    """Put the fp32 weights of a checkpoint together, and the mean of its buffers, by name, without an engine.

    Args:
        path: the checkpoint.
        average: take the moving average of the weights, which the run must have kept.

    Raises:
        CheckpointDamagedError: the shards do not cover every parameter exactly once.
    """
    index, kind = _ShardIndex(path), AVERAGE if average else "parameter"
    weights = {name: index.read(name, kind, 0, math.prod(shape)).view(shape) for name, shape in index.shapes.items()}
    buffers = {name: one.float() if one.is_floating_point() else one for name, one in index.buffers().items()}
    return weights | buffers


def _fill(path: Path, shards: OptimizerShards) -> None:
    index = _ShardIndex(path)
    buffers = index.buffers(dist.get_rank(), dist.get_world_size())
    there = index.shapes | {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    here = {name: tuple(buffer.shape) for name, buffer in shards.buffers.tensors().items()}
    here |= {shard.name: shard.shape for shard in shards.shards}  # of this rank alone
    for name in sorted(here.keys() | buffers.keys()):
        if here.get(name) != there.get(name):
            raise UserError(
                f"{path} holds another model: {name} is {there.get(name, 'missing')} there and "
                f"{here.get(name, 'missing')} here; give this run another name"
            )
    for shard in shards.shards:
        for kind in shards.kinds:
            shard.view(kind, shards.optimizer).copy_(index.read(shard.name, kind, shard.offset, shard.length))
    shards.buffers.fill(buffers)
    shards.filled(index.steps)


def check_pieces(pieces: Sequence[Sequence[Any]], where: Path) -> None:
    """Check that pieces, (name, shape, offset, length, step) each, cover every parameter exactly once.

    Raises:
        CheckpointDamagedError: elements are missing or there twice; ``where`` names the checkpoint.
    """
    ends: dict[str, int] = {}
    for name, _, offset, length, _ in sorted(pieces, key=itemgetter(0, 2, 3)):
        if offset != ends.setdefault(name, 0):
            raise CheckpointDamagedError(f"{where}: {name} has a gap or an overlap at element {ends[name]}")
        ends[name] += length
    for name, shape, *_ in pieces:
        if ends[name] != math.prod(shape):
            raise CheckpointDamagedError(f"{where}: {name} ends at element {ends[name]} of {math.prod(shape)}")


class _ShardIndex:
    """Where every stretch of every parameter is in the files of a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.steps: dict[str, float] = {}
        self._stretches: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)  # offset, length, file, at
        self._files = [safe_open(path / name, framework="pt") for name in sorted(read_manifest(path)["files"])]
        pieces = [json.loads(file.metadata()["pieces"]) for file in self._files]
        for number, of_a_file in enumerate(pieces):
            at = 0
            for name, shape, offset, length, step in of_a_file:
                self.shapes[name] = tuple(shape)
                self.steps[name] = step
                self._stretches[name].append((offset, length, number, at))
                at += length
        check_pieces([*chain(*pieces)], path)

    def read(self, name: str, kind: str, offset: int, length: int) -> torch.Tensor:
        """Elements ``[offset, offset + length)`` of a flattened parameter or moment, fp32."""
        parts = []
        for start, size, number, at in self._stretches[name]:
            a, b = max(start, offset), min(start + size, offset + length)
            if a < b:
                parts.append(self._files[number].get_slice(kind)[at + a - start : at + b - start])
        return torch.cat(parts) if parts else torch.empty(0)

    def buffers(self, rank: int = 0, ranks: int = 0) -> dict[str, torch.Tensor]:
        """The buffers by name: of this rank where as many ``ranks`` wrote the checkpoint, else their mean."""
        files = self._files[rank : rank + 1] if ranks == len(self._files) else self._files
        names = [name for name in self._files[0].keys() if name.startswith(BUFFER)]  # noqa: SIM118 - no mapping
        values = {name: torch.stack([file.get_tensor(name) for file in files]) for name in names}
        return {name.removeprefix(BUFFER): mean_over_ranks(value) for name, value in values.items()}


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the digest that ``read_manifest`` checks."""
    return manifest | {SEAL: digest_of_fields(manifest)}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, verified by its own digest.

    Raises:
        CheckpointDamagedError: missing, not JSON, or changed since it was written.
        UserError: of a format that this version does not read.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        written = manifest.pop(SEAL, None) if isinstance(manifest, dict) else None
        same = written is not None and written == digest_of_fields(manifest)
    except OSError as error:
        raise CheckpointDamagedError(f"{path / MANIFEST} cannot be read: {error}", storage_code(error)) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path / MANIFEST} cannot be read: {error}") from None
    if not same:
        raise CheckpointDamagedError(f"{path / MANIFEST} has other content than when it was written")
    if manifest.get("format") not in READABLE:
        raise UserError(f"{path} has checkpoint format {manifest.get('format')}, this version reads {READABLE}")
    for name in manifest["files"]:
        if name in ("", ".", "..") or Path(name).name != name:
            raise CheckpointDamagedError(f"{path / MANIFEST} names {name!r}, which is no plain name of a file")
    return manifest
