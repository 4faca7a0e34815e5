"""A run on disk: what really ran, how it stands, what it measured."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipeline.batch import BadSample
from data_pipeline.errors import printable, without_secrets
from data_pipeline.files import write_atomically
from pretrain.files import write_json
from pretrain.outcome import UserError
from pretrain.recipe import Recipe, recipe_differences, validate_recipe
from pretrain.run_state import RunState, read_state


class RunFolder:
    """``runs/NAME``. Only rank 0 writes to it, but for checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.handoff = path / "handoff"
        self.metrics = path / "metrics.jsonl"
        self.bad_samples = path / "bad_samples.jsonl"
        self.tensorboard = path / "tensorboard"
        self.summary = path / "summary.json"
        self.hangs = path / "hangs"
        self.failure = path / "failure.txt"
        self.loss_spikes = path / "loss_spikes.jsonl"
        self.events = path / "events.jsonl"
        self.profile = path / "profile"
        self.show = path / "show"
        """A person makes this file to see training pictures and attention; the run removes it."""

    def read_recipe(self) -> dict[str, Any] | None:
        """The recipe as it was resolved when the run was started last; None for a new run."""
        try:
            content: dict[str, Any] = yaml.safe_load((self.path / "recipe.yaml").read_text())
        except FileNotFoundError:
            return None
        return content

    def recorded_stage(self) -> int | None:
        """ZeRO stage of the previous attempt; None for a new run, and where it cannot be read."""
        try:
            stage = json.loads((self.path / "ds_config.json").read_text())["zero_optimization"]["stage"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return stage if isinstance(stage, int) else None

    def read_dataset(self) -> dict[str, Any]:
        """Name, fingerprint, size, class names and class ids of the training split, as in ``environment.json``.

        Raises:
            UserError: it is not there or damaged.
        """
        content: dict[str, Any] = self._read_fact("dataset")
        return content

    def read_origin(self) -> dict[str, Any] | None:
        """The hand-off that this run began with, as ``handoff.initialize`` gave it; None: it began with fresh weights.

        Raises:
            UserError: ``environment.json`` is not there or damaged.
        """
        origin: dict[str, Any] | None = self._read_fact("initialized_from", None)
        return origin

    def _read_fact(self, name: str, *default: Any) -> Any:
        path = self.path / "environment.json"
        try:
            content = json.loads(path.read_text())
            return content.get(name, *default) if default else content[name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error}): it belongs to every run, put it back") from None

    def read_state(self) -> RunState | None:
        """``run.json``; None for a new run."""
        return read_state(self.path)

    def write_state(self, state: RunState) -> None:
        """Replace ``run.json``."""
        state.updated, state.reason = time.time(), printable(without_secrets(state.reason))
        write_json(self.path / "run.json", asdict(state))

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
        lines = recipe_differences(old, recipe.model_dump(mode="json"))
        try:
            before = json.loads((self.path / "ds_config.json").read_text())
            if not isinstance(before, dict):
                raise ValueError(f"no configuration, but {before!r:.60}")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path / 'ds_config.json'} cannot be read ({error}): put it back, or remove "
                f"{self.path / 'recipe.yaml'} to go on without this check"
            ) from None
        batch = deepspeed.get("train_batch_size")
        if not isinstance(batch, int):
            raise UserError(
                f"train_batch_size must be given as a number, got {batch!r}: {self.path} goes on only with the global "
                f"batch that it has, {before.get('train_batch_size')}"
            )
        lines += [
            f"{key}: {before.get(key)} -> {deepspeed.get(key)}"
            for key in ("train_batch_size", "gradient_clipping")
            if before.get(key) != deepspeed.get(key)
        ]
        if lines:
            raise UserError(
                f"{self.path} holds a run of another recipe ({'; '.join(lines)}): choose another name with "
                f"--set name=..., or remove the folder to start over"
            )

    def write_description(self, recipe: Recipe, deepspeed: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write what really runs: ``recipe.yaml``, ``ds_config.json``, ``environment.json``."""
        self.failure.unlink(missing_ok=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "ds_config.json", deepspeed)
        write_json(self.path / "environment.json", describe_environment() | facts)
        # Last: with it the folder is a run, whose other files must be there.
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        write_atomically(self.path / "recipe.yaml", text.encode())

    def first_failure(self, reason: str) -> str:
        """Note why this rank fails, unless another one did before; the result is the reason of the first.

        When one rank fails the others soon do too, with reasons that are its echo. ``failure.txt`` is of this start
        only: the next one removes it.
        """
        try:
            with self.failure.open("x") as handle:
                handle.write(without_secrets(reason))
        except FileExistsError:
            return self.failure.read_text() or reason
        return reason

    def append_bad_sample(self, bad: BadSample, *, rank: int) -> None:
        """Add a line to ``bad_samples.jsonl``; any rank may. A disk that refuses it is only reported."""
        line = json.dumps({**asdict(bad), "rank": rank, "time": time.time()})
        try:
            with self.bad_samples.open("a") as handle:
                handle.write(f"{line}\n")
        except OSError as error:
            print(f"WARNING bad sample {bad.name} could not be listed: {error}", file=sys.stderr)  # noqa: T201


def describe_environment() -> dict[str, Any]:
    """Versions, machine and source state, for whoever wants to repeat the run."""
    packages = ("torch", "deepspeed", "numpy", "safetensors", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
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
