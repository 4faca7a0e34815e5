"""What this room keeps in a run's folder. Imports nothing heavy: it is read on batch hosts while the seconds count.

::

    runs/NAME/slurm/launch.json       how the run was launched: what every incarnation needs to know
    runs/NAME/slurm/recipe.yaml, ds_config.json      as launched; later edits of the originals do not reach the run
    runs/NAME/slurm/pretrain.sbatch   the batch script of ``slurm.launch --plain``
    runs/NAME/slurm/history.jsonl     the incarnations: where each ran and why it ended
    runs/NAME/slurm/stop              someone asked to stop: nothing restarts this run while it exists
    runs/NAME/slurm/release.lock      held by the one ``slurm.release`` that submits it again
    runs/NAME/slurm/submitit/         submitit's batch scripts, pickles and outputs
    runs/NAME/logs/JOB-RESTART/       one log per rank, and how ranks that did not finish ended
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.files import write_atomically, write_json
from pretrain.outcome import UserError
from pretrain.run_state import RunState, read_state
from slurm.restart import Policy, RankExit


@dataclass(frozen=True)
class Launch:
    """``launch.json``: what incarnations need to know about how the run was launched."""

    gpus_per_node: int
    min_nodes: int
    global_batch: int
    usable_nodes: tuple[int, ...]
    """Numbers of nodes whose ranks divide the global batch, ascending."""
    policy: Policy
    device: str = "auto"
    """As ``pretrain/main.py --device``."""


@dataclass(frozen=True)
class Incarnation:
    """Which start of a run: Slurm's job and how often Slurm has restarted that job."""

    job: str
    restart: int

    def __str__(self) -> str:
        return f"{self.job}-{self.restart}"


class SlurmFolder:
    """``runs/NAME`` as this room sees it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.own = run / "slurm"
        self.recipe = self.own / "recipe.yaml"
        self.deepspeed_config = self.own / "ds_config.json"
        self.submitit = self.own / "submitit"
        self.plain_script = self.own / "pretrain.sbatch"
        self.release_lock = self.own / "release.lock"
        self.history = self.own / "history.jsonl"
        self._launch = self.own / "launch.json"
        self._stop = self.own / "stop"

    def read_launch(self) -> Launch:
        """How the run was launched.

        Raises:
            UserError: it was not launched by ``slurm.launch``, or the file is damaged.
        """
        try:
            content = json.loads(self._launch.read_text())
            content["policy"] = Policy(**content["policy"])
            content["usable_nodes"] = tuple(content["usable_nodes"])
            return Launch(**content)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{self._launch} cannot be read ({error}): start the run with `python -m slurm.launch`"
            ) from None

    def write_launch(self, launch: Launch) -> None:
        """Replace ``launch.json``."""
        self.own.mkdir(parents=True, exist_ok=True)
        write_json(self._launch, asdict(launch))

    def launched(self) -> bool:
        """Whether ``slurm.launch`` has been here."""
        return self._launch.exists()

    def request_stop(self, reason: str) -> None:
        """Let nothing restart this run until it is launched again."""
        self.own.mkdir(parents=True, exist_ok=True)
        write_atomically(self._stop, f"{reason}\n".encode())

    def withdraw_stop(self) -> None:
        """The run is launched anew."""
        self._stop.unlink(missing_ok=True)

    def stop_request(self) -> str:
        """Who asked to stop and when; "" when nobody did."""
        try:
            return self._stop.read_text().strip() or "asked to stop"
        except FileNotFoundError:
            return ""

    def is_script(self, command: str) -> bool:
        """Whether a job's command is one of the batch scripts of this run."""
        return Path(command).is_relative_to(self.own)

    def submitted(self) -> list[str]:
        """Jobs that submitit has submitted for this run, the earliest first."""
        names = [path.name.split("_")[0] for path in self.submitit.glob("*_submission.sh")]
        return sorted((name for name in names if name.isdigit()), key=int)

    def state(self) -> RunState | None:
        """``run.json``; None before the first start, or where it cannot be read."""
        try:
            return read_state(self.run)
        except UserError:
            return None

    def saved_step(self) -> int:
        """Step of the newest checkpoint; 0 when there is none."""
        steps = [path.name.removeprefix("step-") for path in (self.run / "checkpoints").glob("step-*")]
        return max((int(step) for step in steps if step.isdigit()), default=0)

    def logs(self, incarnation: Incarnation) -> Path:
        """Folder of the logs of one incarnation."""
        return self.run / "logs" / str(incarnation)

    def log(self, incarnation: Incarnation, rank: int) -> Path:
        """Log of a rank."""
        return self.logs(incarnation) / f"rank-{rank:05d}.log"

    def write_exit(self, incarnation: Incarnation, ended: RankExit) -> None:
        """Write down how a rank ended."""
        path = self.logs(incarnation) / f"rank-{ended.rank:05d}.exit.json"
        write_atomically(path, json.dumps(asdict(ended)).encode())

    def forget_exits(self, incarnation: Incarnation) -> None:
        """Remove what one of the same name left: a slurmctld that forgot a job may give its number again."""
        for path in self.logs(incarnation).glob("rank-*.exit.json"):
            path.unlink(missing_ok=True)

    def read_exits(self, incarnation: Incarnation) -> list[RankExit]:
        """How the ranks of an incarnation ended, as far as they could tell, the earliest first."""
        found = []
        for path in self.logs(incarnation).glob("rank-*.exit.json"):
            try:
                found.append(RankExit(**json.loads(path.read_text())))
            except (OSError, ValueError, TypeError, RecursionError):  # a node died while it was being written
                continue
        return sorted(found, key=lambda ended: ended.time)


def stamp(seconds: float | None = None) -> str:
    """Local time for a person."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def say(text: str) -> None:
    """Print a line with the time to standard error, which is the batch script's log."""
    print(f"{stamp()} {text}", file=sys.stderr, flush=True)  # noqa: T201
