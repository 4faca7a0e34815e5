"""Recompute past steps of a run, and find what went wrong: ``python -m pretrain.replay RUN --steps A:B``.

On several processes: ``deepspeed --num_accelerators N --module pretrain.replay RUN --steps A:B``.

A step follows from the state before it, the dataset and the recipe. The steps after A up to B are taken again from the
newest checkpoint at or before A, by the trainer's own code in a temporary run folder. Each is compared with the run's
ledger, and the state with the checkpoints on the way.
"""

import argparse
import math
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from data_pipeline.batch import Batch
from data_pipeline.errors import DataError
from data_pipeline.preview import Pixels, draw_grid, to_pixels
from pretrain.arguments import add_device_argument, add_set_argument, add_trust_argument
from pretrain.build import open_trainer
from pretrain.checkpoints.checkpoint import list_checkpoints, load_newest, step_of
from pretrain.engine.distributed import Rank, choose_device, fail, first_rank_decides, init_distributed, read_rank
from pretrain.factory import require_trust
from pretrain.fault_tolerance.preflight import meet
from pretrain.files import json_lines, read_sealed
from pretrain.ledger import SETUP, Row, read_rows
from pretrain.outcome import ExitCode, UserError, exit_code, storage_code
from pretrain.recipe import Recipe, WatchSection, load_recipe, recipe_differences
from pretrain.run_folder import RunFolder
from pretrain.trainer import Trainer

DIFFERS = 3
"""Exit status where a step or a checkpoint is not as recorded."""
BOUND, WIDE_BOUND, DOUBLING = 1e-5, 1e-2, 5
"""Where bits need not agree: largest relative difference of loss and gradient norm; ten times as much of the weights,
since Adam takes whole steps along gradients that are only rounding. It doubles every so many steps since the state was
equal, as training amplifies rounding (measured: twofold in 9 steps); from 1 on, only batches are compared. The wide one
is for 16 bits, and for kinds of devices that decode to other pixels."""
MEET_WITHIN_S = 600.0
SHEET = 128
"""Images of a contact sheet at most."""
Cell = tuple[float, str, Pixels]
"""An image of a contact sheet: loss, caption, pixels."""


@dataclass(frozen=True)
class Plan:
    """What a replay needs of a run folder."""

    recipe: Recipe
    deepspeed: dict[str, Any]
    """DeepSpeed's configuration, with the stage and the micro-batch of the first step."""
    ledger: dict[int, Row]
    """Rows by step."""
    starts: list[Path]
    """Checkpoints to start from, the newest first; none for the first weights."""
    checkpoints: dict[int, Path]
    """All of them, by step."""


def make_plan(run: Path, steps: tuple[int, int], assignments: list[str], *, trust_factory: bool = False) -> Plan:
    """Read what a replay of ``steps`` needs, and check that it is possible. For rank 0.

    Raises:
        UserError: it is not.
    """
    folder, (first, last) = RunFolder(run), steps
    if folder.read_recipe() is None:
        raise UserError(f"{run} is no run folder: it has no recipe.yaml; give runs/NAME")
    recorded, recipe = (load_recipe(run / "recipe.yaml", changes) for changes in ([], assignments))
    if recipe.model.factory is not None:
        require_trust({"factory": recipe.model.factory}, run, trusted=trust_factory)
    if lines := recipe_differences(recorded.model_dump(mode="json"), recipe.model_dump(mode="json")):
        raise UserError(f"--set changes what {run} computes ({'; '.join(lines)}): set only what a resume may change")
    checkpoints = {step_of(path): path for path in list_checkpoints(folder.checkpoints)}
    starts = [step for step in checkpoints if step <= first][:2] or [0]  # the newest first, and one if it is damaged
    if first and starts == [0]:
        there = ", ".join(map(str, sorted(checkpoints))) or "none"
        raise UserError(
            f"{run} has no checkpoint at or before step {first} (there: {there}): --steps 0:{last} starts from the "
            "first weights; checkpoint.keep_every_steps would have kept one"
        )
    try:
        ledger, deepspeed = read_rows(folder.ledger, starts[-1] + 1, last), read_sealed(run / "ds_config.json")
        events = [*json_lines(folder.events)] if folder.events.exists() else []
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); runs of older versions have no ledger",
            storage_code(error),
        ) from None
    for step in (event.get("step") for event in events if event is not None and event.get("event") == "went back"):
        if isinstance(step, int) and starts[0] < step < last:
            raise UserError(
                f"the weights of {run} went back after step {step} (events.jsonl), which is not replayed: end there, "
                "or start from a checkpoint after it"
            )
    if max(ledger, default=0) < last:
        raise UserError(f"{folder.ledger} ends before step {last}, at step {max(ledger, default=0)}")
    row = ledger.get(starts[0] + 1, ledger[last])
    deepspeed["zero_optimization"] = deepspeed.get("zero_optimization", {}) | {"stage": row["stage"]}
    deepspeed |= {"train_micro_batch_size_per_gpu": row["micro_batch"], "gradient_accumulation_steps": "auto"}
    recipe = recipe.model_copy(update={"probes": None, "watch": WatchSection(attention_images=0)})
    return Plan(recipe, deepspeed, ledger, [checkpoints[step] for step in starts if step], checkpoints)


def copy_description(run: Path) -> Path:
    """Make a temporary run folder with what describes a run. For rank 0."""
    scratch = Path(tempfile.mkdtemp(prefix=f"replay-{run.resolve().name}-"))
    for name in ("recipe.yaml", "ds_config.json", "environment.json"):
        shutil.copy(run / name, scratch)
    return scratch


def start(plan: Plan, scratch: Path, device: torch.device, control: dist.ProcessGroup) -> Trainer:
    """Build a trainer in a temporary run folder, at the newest of the checkpoints to start from that is intact."""
    if device.type != "cuda" and "fp16" in plan.deepspeed:
        plan.deepspeed["fp16"]["enabled"] = False  # there is none; the report names the precision
    folder = RunFolder(scratch)
    for path in plan.starts:
        link(path, folder.checkpoints)
    return open_trainer(plan.recipe, plan.deepspeed, folder, device=device, control=control)


def link(checkpoint: Path, folder: Path) -> None:
    """Let a checkpoint appear in a folder of this node, for every rank of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (folder / checkpoint.name).symlink_to(checkpoint.resolve())


class Replay:
    """Takes steps again and compares them with the run's.

    Args:
        trainer: at the state to start from, in a temporary run folder.
        plan: of the run.
        images: folder for contact sheets of the steps' images, ``step-00000041-1.png`` and following, if wanted.
    """

    def __init__(self, trainer: Trainer, plan: Plan, images: Path | None = None) -> None:
        self._trainer, self._plan, self._images = trainer, plan, images
        self._start, self._bound = trainer.state.step, 0.0
        """Step, and largest relative difference; 0 where all bits must agree."""
        self._distances: list[float] = []
        self._notes: Counter[str] = Counter()
        """Why steps were not, or not wholly, compared, and how many."""
        self._why: set[str] = set()
        self._states: list[str] = []
        self.difference = ""
        """The first one, if any."""

    def run(self, last: int) -> None:
        """Take the steps up to ``last``, or to the first difference where no images are wanted. Collective."""
        trainer, state, images, cells = self._trainer, self._trainer.state, self._images, list[Cell]()
        batches = iter(trainer.train_loader)
        if images is not None:
            batches = watched(batches, trainer, trainer.monitor.class_names, cells)
        while state.step < last and (images is not None or not self.difference):
            trainer.train_step(batches)
            state.step += 1
            state.samples_seen += trainer.batch.global_batch
            trainer.log.console.step_done(state.step)
            (row,) = trainer.monitor.take(state)
            trainer.monitor.reset()
            if images is not None:
                draw_sheets(cells, images / f"step-{state.step:08d}", trainer.stop.group)
                cells.clear()
            if not self.difference:
                self._compare(row | trainer.log.setup, self._plan.ledger.get(state.step))
            if not self.difference and state.step in self._plan.checkpoints:
                self._compare_state(self._plan.checkpoints[state.step])

    def report(self) -> Iterator[str]:
        """Describe in lines what was found."""
        exact, close = self._distances.count(0), max(self._distances, default=0)
        count = len(self._distances)
        how = "bit for bit" if exact == count else f"{exact} bit for bit, the others within bounds, {close:.1e} at most"
        yield f"{count} step{'s' * (count != 1)} reproduced after step {self._start}" + (f": {how}" if count else "")
        yield from (f"WARNING {number} more steps {note}" for note, number in self._notes.items())
        if self._why:
            yield f"bits need not agree: {'; '.join(sorted(self._why))}"
        yield from self._states
        if self.difference:
            yield f"DIFFERENT: {self.difference}"

    def _widen(self, least: float) -> None:
        self._bound = max(self._bound, least) * 2 ** (1 / DOUBLING)

    def _compare(self, here: Row, there: Row | None) -> None:
        """Compare a step with its row of the ledger."""
        if there is None:
            self._notes["are not in the ledger and were not compared"] += 1
            self._widen(BOUND)
            return
        why = {f"{name} was {there[name]}, is {here[name]}" for name in SETUP if there[name] != here[name]}
        if self._trainer.engine.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
            why.add("a GPU is bitwise reproducible only with deterministic: true")
        kinds = {(one["precision"], "cpu" if one["on"].startswith("cpu") else one["on"]) for one in (here, there)}
        narrow = len(kinds) == 1 and here["precision"] == "fp32"
        self._widen((BOUND if narrow else WIDE_BOUND) if why else 0.0)
        self._why |= why
        wrong = [name for name in ("samples_seen", "batch") if there[name] != here[name]]
        cause = "data: other images, labels or bytes" if wrong else "numerics, on the same batch"
        distances = {name: relative(there[name], here[name]) for name in ("skipped", "loss", "grad_norm")}
        if self._bound < 1:
            wrong += [name for name, distance in distances.items() if not distance <= self._bound]
        if wrong:
            values = ", ".join(f"{name} {there[name]} recorded, {here[name]} now" for name in wrong)
            self.difference = f"step {here['step']} ({cause}): {values}"
        elif self._bound < 1:
            self._distances.append(max(distances.values()))
        else:
            self._notes["are too far from an equal state: only their batches were compared"] += 1

    def _compare_state(self, path: Path) -> None:
        """Compare weights, moments and average with a checkpoint, and continue from it."""
        shards, group = self._trainer.optimizer_shards, self._trainer.stop.group
        owned = [(shard, kind) for shard in shards.shards for kind in shards.kinds]
        before = [shard.view(kind, shards.optimizer).to("cpu", copy=True) for shard, kind in owned]
        folder = self._trainer.log.folder.path / path.name  # with no other checkpoint, to which loading could go back
        link(path, folder)
        try:
            load_newest(folder, shards, group=group)
        except UserError as error:  # on all ranks alike
            self._states.append(f"WARNING {path.name} was not compared: {error}")
            return
        changed: list[tuple[float, str]] = []
        squares = torch.zeros(2, dtype=torch.float64)
        for (shard, kind), here in zip(owned, before, strict=True):
            there = shard.view(kind, shards.optimizer).cpu()
            difference = (here - there).double()
            if not torch.equal(here.view(torch.int32), there.view(torch.int32)):
                changed.append((float(difference.abs().max()), f"{shard.name} ({kind})"))
            if kind == "parameter":
                squares += torch.stack([difference.square().sum(), there.double().square().sum()])
        parts: list[list[tuple[float, str]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, changed, group=group)
        dist.all_reduce(squares, group=group)
        changed, distance = sorted(chain(*parts), reverse=True), math.sqrt(squares[0] / squares[1])
        bound, how = self._bound, "agrees bit for bit"
        if changed and (not bound or (bound < 1 and not distance <= 10 * bound)):
            most = ", ".join(f"{name} by {largest:.2e}" for largest, name in changed[:3])
            self.difference = f"{path.name} (state): {len(changed)} tensors differ, most {most}"
            return
        if changed:
            how = f"agrees within bounds: {distance:.1e}" if bound < 1 else "was not compared, but continued from"
        self._states.append(f"{path.name} {how}")
        self._bound = 0.0


def watched(batches: Iterator[Batch], trainer: Trainer, classes: Sequence[str], cells: list[Cell]) -> Iterator[Batch]:
    """Pass micro-batches on, and add to ``cells`` their images as the network is fed them, by a forward pass more."""
    loss, data, buffers = trainer.loss, trainer.recipe.data, trainer.optimizer_shards.buffers
    for batch in batches:
        before = {name: buffer.clone() for name, buffer in buffers.tensors().items()}
        with torch.no_grad():
            images, targets, logits, _ = loss.predict(batch, trainer.state)
        buffers.fill(before)
        pixels = to_pixels(images, data.mean, data.std)
        for row, (sample, label) in enumerate(zip(batch.sample_ids.tolist(), batch.labels.tolist(), strict=True)):
            value = float(loss.classification(logits[row : row + 1], targets[row : row + 1]))
            cells.append((value, f"{sample}: {classes[label]}\nloss {value:.4g}", pixels[row]))
        yield batch


def draw_sheets(cells: list[Cell], file: Path, group: dist.ProcessGroup) -> None:
    """Draw the images of a global batch, the highest loss first, to ``file-1.png`` and following. Collective.

    Raises:
        UserError: it cannot be written.
    """
    parts: list[list[Cell]] = [[] for _ in range(dist.get_world_size())]
    dist.gather_object(cells, parts if dist.get_rank() == 0 else None, dst=0, group=group)
    worst_first = sorted(chain(*parts), key=itemgetter(0), reverse=True)
    for page, start in enumerate(range(0, len(worst_first), SHEET), 1):
        _, captions, images = zip(*worst_first[start : start + SHEET], strict=True)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_grid(images, captions)).save(f"{file}-{page}.png")
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error}): name another folder with --images") from None


def relative(there: Any, here: Any) -> float:
    """Difference of two numbers, relative to the larger; 0 where both are NaN, or one is not known."""
    if there is None or here is None or there == here or (math.isnan(there) and math.isnan(here)):
        return 0.0
    return abs(there - here) / max(abs(there), abs(here))


def parse_steps(text: str) -> tuple[int, int]:
    """Read "40:41"."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError("write A:B with A below B, for example 40:41 to take step 41 again")
    return int(found[1]), int(found[2])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    epilog = f"exit status: 0 reproduced, {DIFFERS} different, 2 not possible, 1 failed for a reason that may pass"
    parser = argparse.ArgumentParser(prog="python -m pretrain.replay", description=main.__doc__, epilog=epilog)
    parser.add_argument("run", type=Path, metavar="RUN", help="runs/NAME; nothing is written there")
    parser.add_argument("--steps", type=parse_steps, required=True, metavar="A:B", help="take A+1, A+2, ... B again")
    parser.add_argument("--images", type=Path, metavar="DIR", help="draw the images of each step, highest loss first")
    add_set_argument(parser, "change a field of the recipe that a resume may change, such as data.path")
    add_device_argument(parser)
    add_trust_argument(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the launcher
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Recompute past steps of a run, compare them with its ledger and its checkpoints, and name what differs first."""
    options = parse_arguments(arguments)
    run, steps, changes, trust = options.run, options.steps, options.assignments, options.trust_factory
    rank: Rank | None = None
    trainer: Trainer | None = None
    scratch: Path | None = None
    try:
        rank = read_rank()
        device = choose_device(rank, options.device)
        meet(rank, MEET_WITHIN_S)
        control = init_distributed(device)
        plan = first_rank_decides(control, lambda: make_plan(run, steps, changes, trust_factory=trust))
        scratch = first_rank_decides(control, lambda: copy_description(run))
        trainer = start(plan, scratch, device, control)
        if rank.is_first:
            there, here = (read_sealed(folder / "environment.json").get("git") for folder in (run, scratch))
            if there != here:
                trainer.log.say(f"WARNING the code is another than at the run's last start: {there} then, {here} now")
        replay = Replay(trainer, plan, options.images)
        replay.run(steps[1])
        trainer.log.say("\n".join(replay.report()))
        trainer.close()
        dist.barrier(control)  # the launcher ends the others as soon as one is gone
        dist.destroy_process_group()
    except (UserError, DataError) as error:
        return fail(str(error), rank, started=trainer is not None, code=exit_code(error))
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return DIFFERS if replay.difference else ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
