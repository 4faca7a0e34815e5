"""A run folder as far as it can be read."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pretrain.outcome import UserError
from pretrain.report.curves import Metrics, as_number, read_curves
from pretrain.report.marks import Mark, read_marks
from pretrain.run_state import RunState, read_state

_OF_A_RUN = ("run.json", "recipe.yaml", "metrics.jsonl", "events.jsonl", "slurm/launch.json")
_LARGEST_TEXT = 100_000
"""Characters of a file that are shown."""
_LARGEST_PICTURE = 2_000_000
"""Bytes of a picture that is put into the page."""
_MOST_EVALUATIONS = 12
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class StoredEvaluation:
    """What ``pretrain.evaluate`` left: its report, and its picture where there is one."""

    name: str
    """DATASET-SPLIT."""
    content: dict[str, Any]
    picture: bytes | None


@dataclass
class RunRecord:
    """All that the page says of a run."""

    path: Path
    name: str
    """Of the run; the report makes it unique among those on the page."""
    metrics: Metrics = field(default_factory=Metrics)
    marks: list[Mark] = field(default_factory=list)
    began: float | None = None
    """Unix time of its first sign of life."""
    state: RunState | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    evaluations: list[StoredEvaluation] = field(default_factory=list)
    card: str = ""
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged, a line each."""

    @property
    def epoch_size(self) -> float | None:
        """Pictures of an epoch."""
        dataset = self.environment.get("dataset")
        size = as_number(dataset.get("samples")) if isinstance(dataset, dict) else None
        return size or self.metrics.epoch_size


def read_run(path: Path) -> RunRecord:
    """Read a run folder; damage to one of its files is noted and costs that file only.

    Raises:
        UserError: it is no run folder.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a run, such as runs/demo")
    if not any((path / name).exists() for name in _OF_A_RUN):
        raise UserError(f"{path} is no run folder: it has none of {', '.join(_OF_A_RUN)}; give one such as runs/demo")
    record = RunRecord(path, path.resolve().name)
    notes = record.notes
    try:
        record.state = read_state(path)
        if record.state is None:
            notes.append("run.json is missing: the run did not come to its first step, or is not started yet")
        elif wrong := _wrong_fields(record.state):
            notes.append(f"run.json has no number in {', '.join(wrong)}, and is left out")
            record.state = None
    except (UserError, OSError) as error:
        notes.append(str(error))
    record.recipe = _mapping(path / "recipe.yaml", notes)
    record.deepspeed = _mapping(path / "ds_config.json", notes)
    record.environment = _mapping(path / "environment.json", notes)
    if (path / "summary.json").exists():
        record.summary = _mapping(path / "summary.json", notes)
    try:
        record.metrics = read_curves(path / "metrics.jsonl")
    except OSError as error:
        notes.append(f"metrics.jsonl cannot be read: {error}")
    if record.metrics.unreadable:
        notes.append(
            f"metrics.jsonl: {record.metrics.unreadable:,} of {record.metrics.lines:,} lines are damaged and left out"
        )
    if not record.metrics.curves:
        notes.append("nothing was measured yet: metrics.jsonl is missing or empty")
    log = read_marks(path, record.metrics, record.state)
    record.marks = log.marks
    record.began = min((time for time in (log.began, record.metrics.began) if time is not None), default=None)
    notes += log.notes
    record.evaluations = _evaluations(path / "evaluation", notes)
    record.card = _text(path / "handoff/README.md", notes)
    failure = _text(path / "failure.txt", notes).strip()
    if failure and not (record.state and record.state.reason == failure):  # else it is told with the state
        notes.append(f"the last start failed: {failure[:2000]}")
    return record


def _wrong_fields(state: RunState) -> list[str]:
    numbers = ("step", "total_steps", "samples_seen", "restarts", "world_size", "updated")
    return [name for name in numbers if as_number(getattr(state, name)) is None]


def _mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """A file of YAML or JSON; empty, with a note, where it is not there or not readable."""
    try:
        text = path.read_text()
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} cannot be read: a mapping is wanted, this is {type(content).__name__}")
        return {}
    return content


def _text(path: Path, notes: list[str]) -> str:
    try:
        with path.open(errors="replace") as handle:
            text = handle.read(_LARGEST_TEXT + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return ""
    return text if len(text) <= _LARGEST_TEXT else f"{text[:_LARGEST_TEXT]}\n[cut here]"


def _evaluations(folder: Path, notes: list[str]) -> list[StoredEvaluation]:
    files = sorted(folder.glob("*.json"))
    if len(files) > _MOST_EVALUATIONS:
        notes.append(f"evaluation: the first {_MOST_EVALUATIONS} of {len(files)} reports are shown")
    found = []
    for file in files[:_MOST_EVALUATIONS]:
        content = _mapping(file, notes)
        if content:
            picture = _picture(file.with_name(f"{file.stem}-confusion.png"), notes)
            found.append(StoredEvaluation(file.stem, content, picture))
    return found


def _picture(path: Path, notes: list[str]) -> bytes | None:
    try:
        with path.open("rb") as handle:
            content = handle.read(_LARGEST_PICTURE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return None
    if len(content) > _LARGEST_PICTURE or not content.startswith(_PNG):
        notes.append(f"{path.name} is left out: it is no PNG below {_LARGEST_PICTURE // 10**6} MB")
        return None
    return content
