"""Replays runs that were killed and resumed, and runs with a fault: ``python -m tests.system.replays --folder /tmp/x``.

Clean runs are killed at random moments and resumed with other numbers of ranks and ZeRO stages; no replay of them may
find a difference. Faults are one flipped bit each, in a weight, a gradient, a moment, an image or a label, at a random
step. A replay must name the first step whose loss or gradient norm has other bits than without the fault, else the
next checkpoint; where it finds nothing, the fault must have left no trace in that checkpoint.
"""

import argparse
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pretrain.checkpoints.checkpoint import _ShardIndex
from pretrain.ledger import read_rows
from pretrain.outcome import ExitCode
from pretrain.run_folder import RunFolder
from tests.pretrain.ranks import run_ranks
from tests.system.launching import RECIPE, ROOT, Launched, changes, launched, new_log, starter
from tests.system.soak import at_stage, kill, wait_for_step

HALF = 8
"""Steps of a faulty run before and after the checkpoint that it is resumed from."""
KINDS = ("weight", "gradient", "moment", "image", "label")
CPU = torch.device("cpu")
REPRODUCED = re.compile(r"(\d+) steps reproduced after step \d+: (?:(\d+) )?bit for bit.*")


def fields(data: Path, steps: int) -> list[str]:
    """Of a run of so many steps with everything on that takes part in one; its checkpoints stay."""
    epochs = (steps * 64 + 1) / 1437
    return changes(data__path=data, schedule__epochs=epochs, schedule__warmup_epochs=epochs / 4, log_every_steps=3,
                   checkpoint__every_steps=HALF, checkpoint__keep=9, ema__decay=0.9, mixing__mixup=0.8,
                   mixing__cutmix=1.0, watch__attention_images=0)  # fmt: skip


def replayed(run: Path, steps: str, *more: str, ranks: int) -> tuple[int, str]:
    """Exit status and output of the command."""
    command = [*starter("deepspeed", ranks), "--module", "pretrain.replay", str(run), "--steps", steps, *more]
    replay = Launched(command, new_log(run.parent))
    try:
        return replay.end(), replay.output()
    finally:
        replay.kill_all()


def killed_run(folder: Path, data: Path, chance: random.Random, *, steps: int) -> list[int]:
    """Train ``folder/demo`` to its end, killed twice; the ranks of the attempts."""
    attempts = []
    for number in range(3):
        ranks, stage = chance.choice([one for one in (1, 2, 4) if one not in attempts[-1:]]), chance.randrange(4)
        attempts.append(ranks)
        with launched(folder, *fields(data, steps), *at_stage(stage), ranks=ranks) as run:
            if number < 2:
                wait_for_step(run, folder / "demo", chance.randint((number + 1) * HALF + 2, (number + 2) * HALF - 2))
                kill(run, chance.choice(["a rank", "the launcher", "everything"]), chance)
                run.end()
                run.assert_no_rank_stays()
            else:
                assert run.end() == ExitCode.FINISHED, run.output()
    return attempts


def clean(folder: Path, data: Path, *, runs: int, seed: int) -> Counter[str]:
    """Replay so many killed runs, each on two numbers of ranks; asserts that none differs. Returns counts of steps."""
    chance, counts, steps = random.Random(seed), Counter[str](), 4 * HALF
    for number in range(runs):
        attempts = killed_run(folder / str(number), data, chance, steps=steps)
        run = folder / str(number) / "demo"
        ledger = read_rows(run / "ledger.jsonl", 1, steps)
        assert [*ledger] == [*range(1, steps + 1)], "a step is missing, or out of order"
        assert len((run / "ledger.jsonl").read_text().splitlines()) == steps
        for ranks, first in zip(chance.sample([1, 2, 4], 2), (0, HALF), strict=True):
            code, output = replayed(run, f"{first}:{steps}", ranks=ranks)
            assert code == ExitCode.FINISHED, output
            found = REPRODUCED.search(output)
            assert found is not None, output
            assert int(found[1]) == steps - first, output
            counts.update(replays=1, steps=steps - first, exact=int(found[2] or found[1]))
            print(f"CLEAN {number}: attempts on {attempts} ranks, replayed on {ranks}: {found[0]}", flush=True)
    return counts


def flip(values: torch.Tensor | np.ndarray, chance: random.Random) -> str:
    """Flip one bit of one element, in place."""
    array = values.detach().numpy() if isinstance(values, torch.Tensor) else values
    flat = array.reshape(-1).view(f"u{array.itemsize}")
    assert np.shares_memory(flat, array)
    place, bit = chance.randrange(len(flat)), chance.randrange(8 * array.itemsize)
    flat[place] ^= flat.dtype.type(1 << bit)
    return f"element {place}, bit {bit}"


class Fault:
    """One flipped bit in a trainer's step; ``what`` says where."""

    def __init__(self, trainer: Any, kind: str, step: int, chance: random.Random) -> None:
        self._trainer, self._step, self._chance, self.what = trainer, step, chance, "not reached"
        self._step_as_it_is: Callable[..., Any] = trainer.train_step
        self._inject = getattr(self, f"_{kind}")
        if kind in ("image", "label") and chance.random() < 0.5:
            self._inject = self._bytes() if kind == "image" else self._table()
        trainer.train_step = self._train_step

    def _train_step(self, batches: Iterator[Any], **options: Any) -> Any:
        if self._trainer.state.step + 1 == self._step:
            batches = self._inject(batches) or batches
        return self._step_as_it_is(batches, **options)

    def _weight(self, batches: Any) -> None:
        if self._chance.random() < 0.5 and self._trainer.optimizer_shards.stage < 3:
            name, parameter = self._chance.choice([*self._trainer.engine.module.named_parameters()])
            self.what = f"{name} of the network, {flip(parameter.data, self._chance)}"
        else:
            self._state("parameter")

    def _moment(self, batches: Any) -> None:
        self._state(self._chance.choice(["exp_avg", "exp_avg_sq"]))

    def _state(self, kind: str) -> None:
        shards = self._trainer.optimizer_shards
        shard = self._chance.choice(shards.shards)
        self.what = f"{kind} of {shard.name}, {flip(shard.view(kind, shards.optimizer), self._chance)}"

    def _gradient(self, batches: Any) -> None:
        name, parameter = self._chance.choice([*self._trainer.engine.module.named_parameters()])

        def corrupt(gradient: torch.Tensor) -> torch.Tensor:
            hook.remove()
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            self.what = f"gradient of {name}, {flip(gradient, self._chance)}"
            return gradient

        hook = parameter.register_hook(corrupt)

    def _bytes(self) -> Callable[[Any], None]:
        """In the bytes of an image's file, as they are read; that is long before the step."""
        loader, chance = self._trainer.train_loader, self._chance
        position = (self._step - 1) * 64 + chance.randrange(64)
        sample = int(loader.samples(position, position + 1)[1][0])
        read = loader._reader._bytes

        def corrupt(asked: int) -> bytes:
            data = read(asked)
            if asked == sample:
                content = np.frombuffer(data, np.uint8).copy()
                self.what = f"file of image {sample}, {flip(content, random.Random(position))}"
                data = content.tobytes()
            return data

        loader._reader._bytes = corrupt
        return lambda batches: None

    def _table(self) -> Callable[[Any], None]:
        """In the label that the loader has of a sample."""
        loader, position = self._trainer.train_loader, (self._step - 1) * 64 + self._chance.randrange(64)
        sample = int(loader.samples(position, position + 1)[1][0])
        loader._dataset.labels[sample] ^= 1
        self.what = f"label of image {sample} in the table, bit 0"
        return lambda batches: None

    def _image(self, batches: Iterator[Any]) -> Iterator[Any]:
        batch = next(batches)
        self.what = f"pixels, {flip(batch.images, self._chance)}"
        return iter([batch])

    def _label(self, batches: Iterator[Any]) -> Iterator[Any]:
        batch = next(batches)
        labels = batch.labels.clone()
        row = self._chance.randrange(len(labels))
        labels[row] ^= 1  # the other bits would name a class that does not exist
        self.what = f"label of row {row}, bit 0"
        return iter([replace(batch, labels=labels)])


def resumed(control: dist.ProcessGroup, folder: Path, data: Path, stage: int, prepare: Callable[[Any], Any]) -> Any:
    """Take a run from where it is to its end, in this process. ``prepare`` is called with the trainer."""
    from pretrain.build import open_trainer
    from pretrain.engine.deepspeed_config import read_deepspeed_config
    from pretrain.fault_tolerance.signals import StopFlag
    from pretrain.recipe import load_recipe

    words = [word for word in (*fields(data, 2 * HALF), *at_stage(stage)) if word != "--set"]
    recipe, flag = load_recipe(RECIPE, words), StopFlag()
    config = read_deepspeed_config(ROOT / "ds_config.json", recipe.deepspeed)
    trainer = open_trainer(recipe, config, RunFolder(folder), device=CPU, control=control, flag=flag)
    prepared = prepare(trainer)
    original = trainer.log.console.step_done

    def stop_at_half(step: int, **waited: float) -> None:
        original(step, **waited)
        if prepared == "half" and step == HALF - 1:  # a stop is agreed on a step later
            flag.request("half")

    trainer.log.console.step_done = stop_at_half
    trainer.train()
    trainer.close()
    return prepared


def replay_here(control: dist.ProcessGroup, run: Path) -> str:
    """The first difference that a replay of the second half finds, in this process."""
    from pretrain.replay import Replay, copy_description, make_plan, start

    plan, scratch = make_plan(run, (HALF, 2 * HALF), []), copy_description(run)
    trainer = start(plan, scratch, CPU, control)
    replay = Replay(trainer, plan)
    replay.run(2 * HALF)
    trainer.close()
    shutil.rmtree(scratch)
    return replay.difference


def final_state(run: Path) -> dict[tuple[str, str], bytes]:
    index = _ShardIndex(run / f"checkpoints/step-{2 * HALF:08d}")
    return {
        (name, kind): index.read(name, kind, 0, math.prod(shape)).numpy().tobytes()
        for name, shape in index.shapes.items()
        for kind in ("parameter", "exp_avg", "exp_avg_sq", "average")
    }


def inject(control: dist.ProcessGroup, folder: Path, data: Path, stage: int, faults: int) -> None:
    """So many faults at a ZeRO stage; asserts that each is reported where it first shows, or has left no trace."""
    chance, counts = random.Random(stage), Counter[tuple[str, str]]()
    half, twin = folder / "half", folder / "clean"
    resumed(control, half, data, stage, lambda _: "half")
    shutil.copytree(half, twin)
    resumed(control, twin, data, stage, lambda _: None)
    assert not replay_here(control, twin)
    for number in range(faults):
        kind, step, run = KINDS[number % len(KINDS)], chance.randint(HALF + 1, 2 * HALF), folder / f"fault-{number}"
        shutil.copytree(half, run)
        fault = resumed(control, run, data, stage, lambda trainer: Fault(trainer, kind, step, chance))  # noqa: B023
        assert fault.what != "not reached"
        found = replay_here(control, run)
        rows, expected = (read_rows(one / "ledger.jsonl", HALF + 1, 2 * HALF) for one in (run, twin))
        names = ("loss", "grad_norm", "skipped", "batch")
        changed = [at for at in rows if str([rows[at][n] for n in names]) != str([expected[at][n] for n in names])]
        if changed:
            where = "in its own step" if changed[0] == step else "in a later step"
            assert found.startswith(f"step {changed[0]} ("), (fault.what, step, changed, found)
            assert ("data" in found) == (rows[changed[0]]["batch"] != expected[changed[0]]["batch"])
        elif final_state(run) != final_state(twin):
            where = "by the next checkpoint"
            assert found.startswith(f"step-{2 * HALF:08d} (state)"), (fault.what, step, found)
        else:
            where = "without effect"
            assert not found, (fault.what, step, found)
        counts[kind, where] += 1
        print(f"FAULT stage {stage}, {kind} in step {step}: {fault.what}: reported {where}; {found}", flush=True)
        shutil.rmtree(run)
    for pair, count in sorted(counts.items()):
        print(f"FAULTS stage {stage}: {count} {' '.join(pair)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/digits"))
    options = parser.parse_args()
    data = options.data.resolve()
    for stage in range(4 if options.faults else 0):  # a process each: at stage 3 DeepSpeed replaces F.linear for good
        run_ranks(1, inject, options.folder / f"faults-{stage}", data, stage, options.faults // 4)
    if options.runs:
        print(dict(clean(options.folder / "clean", data, runs=options.runs, seed=options.seed)))


if __name__ == "__main__":
    main()
