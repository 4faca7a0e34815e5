"""Takes a run folder for an attempt: lock, checks, and the description of what runs."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.checkpoints.checkpoint import CheckpointDamagedError, list_checkpoints, read_manifest
from pretrain.engine.distributed import Rank
from pretrain.files import lock
from pretrain.handoff.initialize import Beginning
from pretrain.outcome import BusyError, ExitCode, UserError, storage_code
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder
from pretrain.run_state import RunState

LOCK_WAIT_S = 90.0
"""How long a start waits for a previous attempt that is still saving."""
_locks: list[Any] = []  # held open for the life of the process


def claim(
    folder: RunFolder,
    recipe: Recipe,
    deepspeed: dict[str, Any],
    facts: dict[str, Any],
    fingerprints: dict[str, str],
    *,
    rank: Rank,
    begin: Callable[[], Beginning],
) -> tuple[RunState, Beginning]:
    """Lock the folder, check that it holds this run or none, begin, and describe what runs now. For rank 0.

    Args:
        folder: of the run.
        recipe: of the run.
        deepspeed: DeepSpeed's resolved configuration.
        facts: further entries of ``environment.json``.
        fingerprints: of the content of the splits "train" and "val".
        rank: of this process.
        begin: fills the network with its first weights, under the lock.

    Raises:
        UserError: it holds another run, or cannot be written.
        BusyError: another process is training it.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        _lock(folder.path / ".lock")
        folder.start_attempt()
        folder.check_recipe(recipe, deepspeed)
        previous = folder.read_state()
        _check_content(folder, recipe, fingerprints, previous)
        if previous is not None and previous.state == "finished":
            raise UserError(
                f"{folder.path} was finished by another process; nothing is left to do",
                ExitCode.FINISHED,
            )
        beginning = begin()
        folder.write_description(recipe, deepspeed, facts | {"initialized_from": beginning.origin})
    except OSError as error:
        raise UserError(f"{folder.path} cannot be written: {error}", storage_code(error)) from None
    state = RunState(
        state="running",
        restarts=previous.restarts + 1 if previous else 0,
        world_size=rank.world_size,
        job_id=rank.job_id,
        host=rank.host,
        fingerprints=fingerprints,
    )
    return state, beginning


def _check_content(folder: RunFolder, recipe: Recipe, here: dict[str, str], previous: RunState | None) -> None:
    """Refuse splits whose content is not that of ``environment.json``, ``run.json`` and the newest checkpoint."""
    recorded = [] if previous is None else [previous.fingerprints]
    if all((folder.path / name).exists() for name in ("recipe.yaml", "environment.json")):
        recorded.append({"train": folder.read_dataset()["fingerprint"]})
    for path in list_checkpoints(folder.checkpoints):
        with suppress(CheckpointDamagedError):  # it is passed over later
            manifest = read_manifest(path)
            folder.check_checkpoint(path, manifest, recipe)
            recorded.append(manifest.get("fingerprints", {}))
            break
    for split, fingerprint in here.items():
        if any(old.get(split, fingerprint) != fingerprint for old in recorded):
            raise UserError(
                f"{recipe.data.path} holds other images or labels for '{split}' than when {folder.path} was started: "
                "give the run another name with --set name=..., or put the old dataset back"
            )


def _lock(path: Path) -> None:
    deadline = time.monotonic() + LOCK_WAIT_S
    while (handle := lock(path)) is None:
        if time.monotonic() > deadline:
            raise BusyError(
                f"another process is training {path.parent}: stop it first, or choose another name with --set name=..."
            )
        time.sleep(0.2)
    _locks.append(handle)
