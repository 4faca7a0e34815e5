"""Random damage to every file of a run that is read again: never silent, never a traceback."""

import errno
import hashlib
import random
import shutil
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from data_pipeline.errors import DataError
from pretrain import evaluate
from pretrain.checkpoints.checkpoint import CheckpointDamagedError, load_newest
from pretrain.checkpoints.optimizer_shards import OptimizerShards
from pretrain.engine.deepspeed_config import resolve_deepspeed_config
from pretrain.engine.engine import build_engine, build_model
from pretrain.export import export_run
from pretrain.files import read_sealed, write_sealed
from pretrain.handoff.folder import load_handoff
from pretrain.metrics import MetricsWriter
from pretrain.monitoring.bad_samples import BadSampleCount
from pretrain.outcome import ExitCode, UserError
from pretrain.recipe import load_recipe
from pretrain.replay import make_plan
from pretrain.report import read_run, render
from pretrain.run_folder import RunFolder, record_handoff_evaluation, summary_lines
from pretrain.run_log import RunLog, RunStatus
from pretrain.run_state import RunState
from slurm.folder import SlurmFolder
from slurm.status import _last_training_row
from tests.pretrain.damage import KINDS, STRUCTURE, change_without_digest, delete, unreadable
from tests.pretrain.ranks import run_ranks
from tests.pretrain.test_round_trip import train

Found = tuple[Any, list[str]]
"""What was read, and the warnings."""

READ_BY = {
    "handoff": ("handoff", "summary"), "checkpoints": ("export", "resume"),
    "recipe.yaml": ("export", "report", "resume"), "ds_config.json": ("report", "resume"),
    "environment.json": ("export", "report", "resume"), "run.json": ("page", "report", "status", "resume"),
    "summary.json": ("page", "report", "summary", "resume"), "metrics.jsonl": ("report", "status", "resume"),
    "events.jsonl": ("page", "replay", "resume"), "bad_samples.jsonl": ("page", "resume"), "trackers.json": ("resume",),
    "loss_spikes.jsonl": ("page", "resume"), "tensorboard": ("report", "resume"), "evaluation": ("page",),
    "ledger.jsonl": ("replay", "resume"),
}  # fmt: skip
MEASURED = (".jsonl", "trackers.json", "tfevents", "evaluation/")
"""In files that have no digest a changed number cannot be seen; a line that is intact must stay."""


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.blake2b(b"".join(tensor.numpy().tobytes() for _, tensor in sorted(tensors.items()))).hexdigest()


def lines(file: Path) -> set[bytes]:
    return set(file.read_bytes().splitlines()) if file.is_file() else set()


class Readers:
    """All that reads a run again; built once, since an engine takes seconds."""

    def __init__(self, control: dist.ProcessGroup, run: Path) -> None:
        self.control, self.intact = control, set[bytes]()
        self.recipe = load_recipe(run / "recipe.yaml")
        self.config = read_sealed(run / "ds_config.json")
        resolved = resolve_deepspeed_config(self.config, world_size=1, has_bf16_gpu=False)
        engine, _ = build_engine(build_model(self.recipe, 10), self.recipe, resolved, torch.device("cpu"))
        self.shards = OptimizerShards(engine, average=True)

    def handoff(self, run: Path) -> Found:
        model, config = load_handoff(run / "handoff")
        return (digest(model.state_dict()), config), []

    def export(self, run: Path) -> Found:
        shutil.rmtree(run / "handoff")
        return self.handoff(export_run(RunFolder(run)).parent)

    def summary(self, run: Path) -> Found:
        try:
            record_handoff_evaluation(RunFolder(run), 12.5)
            warnings = []
        except (UserError, FileNotFoundError) as error:
            warnings = [str(error)]
        shown = summary_lines(RunFolder(run))
        return shown, warnings + shown

    def report(self, run: Path) -> Found:
        found = read_run(run)
        return (found.settings, found.status), found.notes

    def page(self, run: Path) -> Found:
        found = read_run(run)
        found.curves.clear()  # they are numbers by now, and slow to draw
        return bool(render([found])), found.notes

    def status(self, run: Path) -> Found:
        _last_training_row(run / "metrics.jsonl")
        state = SlurmFolder(run).state()
        return state, [] if state else ["run.json cannot be read"]  # as slurm.status says

    def replay(self, run: Path) -> Found:
        """As far as it reads the run's own measurements."""
        return make_plan(run, (8, 9), []).ledger, []

    def resume(self, run: Path) -> Found:
        """A start, as far as it reads. Every intact line of the metrics is there afterwards, if the weights are."""
        folder, said = RunFolder(run), list[str]()
        folder.start_attempt()
        folder.check_recipe(self.recipe, self.config)
        dataset, origin, state = folder.read_dataset(), folder.read_origin(), folder.read_state()
        folder.write_description(self.recipe, self.config, {"dataset": dataset, "initialized_from": origin})
        loaded = load_newest(folder.checkpoints, self.shards, group=self.control)
        assert loaded is not None
        progress, warnings = loaded
        writer = MetricsWriter(
            folder.metrics, folder.tensorboard, samples_seen=progress.samples_seen, trackers={"book": mock.Mock()},
            done=dict.fromkeys(("eval", "eval_average", "attention", "probe"), progress.samples_seen), say=said.append,
        )  # fmt: skip
        status = RunStatus(folder, first=True)
        status.run_state = RunState("running")
        RunLog(folder, status, mock.Mock(say=said.append), writer, 100).start(progress, (), {})
        writer.close()
        assert warnings or self.intact <= lines(folder.metrics), "intact lines are gone"
        BadSampleCount(folder.bad_samples)()
        held = {
            f"{shard.name} {kind}": shard.view(kind, self.shards.optimizer)
            for shard in self.shards.shards
            for kind in self.shards.kinds
        }
        return (digest(held), asdict(progress), dataset, origin, state), warnings + said


def survives(control: dist.ProcessGroup, run: Path) -> None:
    readers, copy, problems, cases = Readers(control, run), run.with_name("copy"), list[str](), 0

    def read(name: str, damage: Any = None, file: Path = run) -> Found:
        """What a reader finds on a copy in which a file is damaged, an error in the place of all."""
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        damaged = copy / file.relative_to(run)
        if damage is not None and not isinstance(damage, int):
            damage(damaged, random.Random(f"{file.relative_to(run)} {cases}"))
        readers.intact = lines(run / "metrics.jsonl") & lines(copy / "metrics.jsonl")
        printed, found = StringIO(), (None, list[str]())
        with redirect_stderr(printed), unreadable(damaged, damage) if isinstance(damage, int) else nullcontext():
            try:
                found = getattr(readers, name)(copy)
            except (UserError, DataError, CheckpointDamagedError) as error:
                found[1].append(str(error))
                if damage == errno.EIO and getattr(error, "code", None) != ExitCode.RETRY:
                    problems.append(f"{file} {name}: may pass by itself: {error}")
            except Exception as error:  # noqa: BLE001 - any that is not one of those
                problems.append(f"{file} {name} {damage}: {error!r:.300}")
        return found[0], [*found[1], *printed.getvalue().splitlines()]

    good = {name: read(name)[0] for name in {name for names in READ_BY.values() for name in names}}
    assert None not in good.values()
    for file in (path for path in sorted(run.rglob("*")) if path.is_file() and path.name != "README.md"):
        kinds = [*KINDS, *KINDS[:3], *(STRUCTURE * 4 if file.suffix in (".json", ".jsonl", ".yaml") else ())]
        names = READ_BY.get(file.relative_to(run).parts[0], ())
        for kind in [*kinds, errno.EACCES, errno.EIO] if names else ():
            cases += 1
            for name in names:
                value, told = read(name, kind, file)
                allowed = kind is change_without_digest  # then it is enough that nothing crashes
                allowed = allowed or (kind is delete and file.name in ("run.json", "summary.json"))
                allowed = allowed or (value is not None and any(part in str(file) for part in MEASURED))
                named = any(part in line for line in told for part in (file.name, file.parent.name))
                if value != good[name] and not named and not allowed:
                    problems.append(f"{file} {name} {kind}: silent, {told}")
                problems += [f"{file} {name} {kind}: not one line: {line!r}" for line in told if "\n" in line]
    assert not problems, "\n".join(["", *problems])
    assert cases >= 300


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_damage_of_300_is_silent_or_a_traceback(tmp_path: Path, digits: Path) -> None:
    run = train(tmp_path, digits, 1, stage=1, checkpoint__every_steps=8, log_every_steps=1)
    assert evaluate.main([str(run), "--data", str(digits)]) == ExitCode.FINISHED
    write_sealed(run / "trackers.json", {"train": 5})
    (run / "bad_samples.jsonl").write_text(
        '{"id": 3, "name": "a", "shard": "b", "reason": "c", "time": 1.5, "rank": 0}\n'
    )
    (run / "loss_spikes.jsonl").write_text('{"step": 3, "loss": 9.0, "level": 1.0, "sample_ids": [1]}\n')
    run_ranks(1, survives, run)


@pytest.mark.parametrize("name", ["summary.json", "recipe.yaml"])
def test_any_flipped_bit_of_a_sealed_file_is_noticed_or_changes_nothing(name: str, tmp_path: Path) -> None:
    path, fields = tmp_path / name, {"top1": 98.5, "name": "demo"}
    write_sealed(path, fields)
    content, noticed = path.read_bytes(), 0
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert read_sealed(path) == fields, bit
        except UserError:
            noticed += 1
    assert noticed > 7.5 * len(content)  # blanks between JSON's tokens may change
