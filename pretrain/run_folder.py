"""A run folder: recipe, environment, status, summary; and how an attempt claims it."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from data_pipeline.batch import BadSample
from data_pipeline.errors import printable, without_secrets
from pretrain.checkpoints.checkpoint import CheckpointDamagedError, list_checkpoints, read_manifest
from pretrain.engine.distributed import Rank
from pretrain.files import aside, lock, read_sealed, write_sealed
from pretrain.outcome import BusyError, ExitCode, UserError, storage_code
from pretrain.recipe import Recipe, fixed_fields, recipe_differences, validate_recipe
from pretrain.run_state import RunState, read_state
from pretrain.state import TrainState

if TYPE_CHECKING:
    from pretrain.handoff.initialize import Beginning

LOCK_WAIT_S = 90.0
"""How long a start waits for a previous attempt that is still saving."""


class RunFolder:
    """``runs/NAME``. Rank 0 writes it.

    Other ranks write their files of checkpoints, ``bad_samples.jsonl``, ``hangs/``, ``profile/`` and, where they fail
    first, ``failure.txt`` and ``run.json``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.locked = False
        """Whether rank 0 of this start holds the folder's lock."""
        self.lock: IO[str] | None = None
        """Held in this process, until it ends."""
        self.checkpoints = path / "checkpoints"
        self.handoff = path / "handoff"
        self.metrics = path / "metrics.jsonl"
        self.ledger = path / "ledger.jsonl"
        self.bad_samples = path / "bad_samples.jsonl"
        self.tensorboard = path / "tensorboard"
        self.summary = path / "summary.json"
        self.hangs = path / "hangs"
        self.failure = path / "failure.txt"
        self.loss_spikes = path / "loss_spikes.jsonl"
        self.events = path / "events.jsonl"
        self.profile = path / "profile"
        self.show = path / "show"
        """A user creates this file to see training images and attention; the run removes it."""

    def read_recipe(self) -> dict[str, Any] | None:
        """The recipe as it was resolved when the run was started last; None for a new run.

        Raises:
            UserError: it is damaged.
        """
        try:
            return read_sealed(self.path / "recipe.yaml")
        except FileNotFoundError:
            return None

    def recorded_stage(self) -> int | None:
        """ZeRO stage of the previous attempt; None for a new run, and where it cannot be read."""
        try:
            stage = read_sealed(self.path / "ds_config.json")["zero_optimization"]["stage"]
        except (OSError, UserError, KeyError, TypeError):
            return None  # the check of the recipe reports it
        return stage if isinstance(stage, int) else None

    def read_dataset(self) -> dict[str, Any]:
        """Name, fingerprint, size, class names and class ids of the training split, as in ``environment.json``.

        Raises:
            UserError: it is not there or damaged.
        """
        content = self._environment().get("dataset")
        if not isinstance(content, dict) or not isinstance(content.get("fingerprint"), str):
            raise UserError(f"{self.path / 'environment.json'} has no fingerprint of the dataset: put it back")
        return content

    def read_origin(self) -> dict[str, Any] | None:
        """The hand-off that this run began with, as ``handoff.initialize`` gave it; None: it began with fresh weights.

        Raises:
            UserError: ``environment.json`` is not there or damaged.
        """
        origin = self._environment().get("initialized_from")
        if origin is not None and not (isinstance(origin, dict) and {"handoff", "weights_blake2"} <= origin.keys()):
            raise UserError(f"{self.path / 'environment.json'} has no valid initialized_from: put it back")
        return origin

    def _environment(self) -> dict[str, Any]:
        path = self.path / "environment.json"
        try:
            return read_sealed(path)
        except FileNotFoundError as error:
            raise UserError(f"{path} cannot be read ({error}): it belongs to every run, put it back") from None

    def read_state(self) -> RunState | None:
        """``run.json``; None for a new run, or where it is damaged: a run can do without it."""
        try:
            return read_state(self.path)
        except UserError:
            return None

    def write_state(self, state: RunState) -> None:
        """Replace ``run.json``."""
        state.updated, state.reason = time.time(), printable(without_secrets(state.reason))
        write_sealed(self.path / "run.json", asdict(state))

    def check_recipe(self, recipe: Recipe, deepspeed: dict[str, Any]) -> None:
        """Refuse to continue a run with a recipe that computes something else.

        Raises:
            UserError: names every field that differs and may not; or the global batch is not given, which never follows
                from the ranks.
        """
        old = self.read_recipe()
        if old is None:
            return
        # Read as a recipe, so that a field which is newer than the run has its default on both sides.
        old = validate_recipe(old, where=str(self.path / "recipe.yaml")).model_dump(mode="json")
        lines = recipe_differences(old | {"name": recipe.name}, recipe.model_dump(mode="json"))  # it may be renamed
        path = self.path / "ds_config.json"
        try:
            before = read_sealed(path)
        except FileNotFoundError as error:
            raise UserError(f"{path} cannot be read ({error}): put it back") from None
        batch = deepspeed.get("train_batch_size")
        if not isinstance(batch, int):
            raise UserError(
                f"train_batch_size must be given as a number, got {batch!r}: {self.path} continues only with its "
                f"global batch, {before.get('train_batch_size')}"
            )
        lines += [
            f"{key}: {before.get(key)} -> {deepspeed.get(key)}"
            for key in ("train_batch_size", "gradient_clipping")
            if before.get(key) != deepspeed.get(key)
        ]
        if not lines:
            return
        state = self.read_state()
        if state is not None and state.state == "finished" and all(line.startswith("schedule.") for line in lines):
            raise UserError(
                f"{self.path} is finished, and its schedule cannot be changed ({'; '.join(lines)}): to train its "
                f"weights further, start a new run with --set name=... --set initialize_from.handoff={self.handoff}"
            )
        raise UserError(
            f"{self.path} holds a run of another recipe ({'; '.join(lines)}): choose another name with "
            f"--set name=..., or remove the folder to start over"
        )

    def check_checkpoint(self, path: Path, manifest: dict[str, Any], recipe: Recipe) -> None:
        """Refuse a checkpoint that was written with another recipe; those of older versions do not record it.

        Raises:
            UserError: names every field that differs, of those that the checkpoint knows.
        """
        old = manifest.get("recipe", {})
        if lines := recipe_differences(old, recipe.model_dump(mode="json"), known_only=True):
            raise UserError(
                f"{path} was written with another recipe ({'; '.join(lines)}): choose another name with "
                f"--set name=..., or put {self.path / 'recipe.yaml'} back"
            )

    def write_description(self, recipe: Recipe, deepspeed: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write what really runs: ``recipe.yaml``, ``ds_config.json``, ``environment.json``. For rank 0."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_sealed(self.path / "ds_config.json", deepspeed)
        write_sealed(self.path / "environment.json", describe_environment() | facts)
        # Last: with it the folder is a run, whose other files must be there.
        write_sealed(self.path / "recipe.yaml", recipe.model_dump(mode="json"))

    def claim(
        self,
        recipe: Recipe,
        deepspeed: dict[str, Any],
        facts: dict[str, Any],
        fingerprints: dict[str, str],
        *,
        rank: Rank,
        begin: "Callable[[], Beginning]",
    ) -> "tuple[RunState, Beginning]":
        """Lock the folder, check that it holds this run or none, begin, and describe what runs now. For rank 0.

        ``facts`` are further entries of ``environment.json``, ``fingerprints`` those of the content of the splits
        "train" and "val"; ``begin`` fills the network with its first weights, under the lock.

        Raises:
            UserError: it holds another run, or cannot be written.
            BusyError: another process is training it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._wait_for_lock()
            self.start_attempt()
            self.check_recipe(recipe, deepspeed)
            previous = self.read_state()
            self._check_content(recipe, fingerprints, previous)
            if previous is not None and previous.state == "finished":
                raise UserError(
                    f"{self.path} was finished by another process; nothing is left to do",
                    ExitCode.FINISHED,
                )
            beginning = begin()
            self.write_description(recipe, deepspeed, facts | {"initialized_from": beginning.origin})
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}", storage_code(error)) from None
        state = RunState(
            state="running",
            restarts=previous.restarts + 1 if previous else 0,
            world_size=rank.world_size,
            job_id=rank.job_id,
            host=rank.host,
            fingerprints=fingerprints,
        )
        return state, beginning

    def _wait_for_lock(self) -> None:
        deadline = time.monotonic() + LOCK_WAIT_S
        while (handle := lock(self.path / ".lock")) is None:
            if time.monotonic() > deadline:
                raise BusyError(
                    f"another process is training {self.path}: stop it first, or choose another name with "
                    "--set name=..."
                )
            time.sleep(0.2)
        self.lock = handle

    def _check_content(self, recipe: Recipe, here: dict[str, str], previous: RunState | None) -> None:
        """Refuse splits whose content is not that of ``environment.json``, ``run.json`` and the newest checkpoint."""
        recorded = [] if previous is None else [previous.fingerprints]
        if all((self.path / name).exists() for name in ("recipe.yaml", "environment.json")):
            recorded.append({"train": self.read_dataset()["fingerprint"]})
        for path in list_checkpoints(self.checkpoints):
            with suppress(CheckpointDamagedError):  # it is passed over later
                manifest = read_manifest(path)
                self.check_checkpoint(path, manifest, recipe)
                recorded.append(manifest.get("fingerprints", {}))
                break
        for split, fingerprint in here.items():
            if any(old.get(split, fingerprint) != fingerprint for old in recorded):
                raise UserError(
                    f"{recipe.data.path} holds other images or labels for '{split}' than when {self.path} was "
                    "started: give the run another name with --set name=..., or put the old dataset back"
                )

    def start_attempt(self) -> None:
        """Prepare the folder for an attempt, which has its lock: no obstacles, no failure of the previous attempt."""
        self._move_obstacles()
        self.failure.unlink(missing_ok=True)
        self.locked = True

    def _move_obstacles(self) -> None:
        """Move aside what a run can do without and cannot write: a damaged ``run.json``, files that are folders."""
        damaged = {}
        try:
            read_state(self.path)
        except UserError as error:
            damaged[self.path / "run.json"] = str(error)
        names = ("run.json", "trackers.json", "tracker_id.txt")
        files = [*(self.path / name for name in names), self.metrics, self.bad_samples, self.summary, self.failure]
        files += [self.loss_spikes, self.events, self.ledger]
        damaged |= {path: f"{path} is a folder" for path in files if path.is_dir()}
        folders = [self.handoff, self.tensorboard, self.hangs, self.profile, self.path / "evaluation"]
        damaged |= {path: f"{path} is no folder" for path in folders if path.exists() and not path.is_dir()}
        for path, why in damaged.items():
            moved = path.rename(aside(path))
            print(f"WARNING {why}; the run continues without it, it is now {moved}", file=sys.stderr)  # noqa: T201

    def append_bad_sample(self, bad: BadSample, *, rank: int) -> None:
        """Add a line to ``bad_samples.jsonl``; any rank may. A disk that refuses it is only reported."""
        line = json.dumps({**asdict(bad), "rank": rank, "time": time.time()})
        try:
            with self.bad_samples.open("a") as handle:
                handle.write(f"{line}\n")
        except OSError as error:
            print(f"WARNING bad sample {printable(bad.name)} could not be listed: {error}", file=sys.stderr)  # noqa: T201


def checkpoint_facts(recipe: Recipe, fingerprints: dict[str, str], origin: dict[str, Any] | None) -> dict[str, Any]:
    """What checkpoints record of a run: what no start may change, but not its name."""
    return {
        "fingerprints": fingerprints,
        "recipe": fixed_fields(recipe.model_dump(mode="json")),
        "initialized_from": None if origin is None else origin["weights_blake2"],
    }


def describe_environment() -> dict[str, Any]:
    """Versions, machine and source state, to repeat the run with."""
    packages = ("torch", "deepspeed", "numpy", "safetensors", "nvidia-dali-cuda130")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "user": os.environ.get("USER", str(os.getuid())),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": without_secrets(sys.argv),
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    git = shutil.which("git")
    if git is None:
        return None
    root = Path(__file__).parent

    def ask(*words: str) -> str:
        return subprocess.run([git, *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (subprocess.CalledProcessError, OSError):
        return None


def write_summary(folder: RunFolder, state: TrainState) -> None:
    """Write the summary of a finished run."""
    write_sealed(
        folder.summary,
        {
            "top1": state.evaluation["top1"],
            "train_images": state.samples_seen,
            "seconds": round(state.train_seconds, 2),
            "images_per_second": round(state.samples_seen / state.train_seconds, 2),
            "handoff_top1": None,
        },
    )


def record_handoff_evaluation(folder: RunFolder, top1: float) -> None:
    """Add the top-1 (percent) that ``pretrain.evaluate`` measured on the hand-off itself.

    Raises:
        UserError: ``summary.json`` is damaged.
    """
    write_sealed(folder.summary, read_sealed(folder.summary) | {"handoff_top1": top1})


def summary_lines(folder: RunFolder) -> list[str]:
    """The summary as lines for the terminal; a missing or damaged one is named in them."""
    try:
        summary = read_sealed(folder.summary)
        handoff = summary["handoff_top1"]
        results = [
            f"top-1         {summary['top1']:.2f} %" + (f" (hand-off: {handoff:.2f} %)" if handoff is not None else ""),
            (
                f"trained on    {summary['train_images']:,} images in {summary['seconds']:.0f} s "
                f"({summary['images_per_second']:.0f} images/s, evaluations included)"
            ),
        ]
    except (OSError, UserError, KeyError, ValueError, TypeError, OverflowError) as error:
        why = error if isinstance(error, UserError) else f"{folder.summary} is missing or damaged"
        results = [f"WARNING       {why}; metrics.jsonl has the results"]
    lines = [
        f"run           {folder.path}",
        *results,
        f"hand-off      {folder.handoff}",
        f"curves        tensorboard --logdir {folder.path.parent}",
    ]
    width = max(len(line) for line in lines)
    return ["-" * width, *lines, "-" * width]
