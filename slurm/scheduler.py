"""Slurm's commands as functions. Their output is trusted, submitit's cache is not; sacct is never needed."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import without_secrets as _hide_in_urls
from slurm.folder import say

_OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL",
         "DEADLINE", "REVOKED")  # fmt: skip
_FAILED = ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "TIMEOUT", "PREEMPTED")
_HELD = re.compile(r"held|JobHold", re.IGNORECASE)
PATIENCE_S = 60.0
"""A controller that restarts or is overloaded may take its time to answer."""
OUTAGE_S = 24 * 3600.0
"""A batch script waits so long for a controller that does not answer: meanwhile nobody else can get its nodes, and
nobody else would start the run again."""
SETTLES_S = 5.0
"""When a controller answers again, what it heard before is done within so long."""
_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SQUEUE_", "SINFO_", "SCANCEL_", "SUBMITIT_")
_RANK = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_NAMES")
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Variables of Slurm without which its commands may not find or not know the cluster."""
_SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|COOKIE|AUTH|PRIVATE|JWT", re.IGNORECASE)
EXPIRY_S, MIN_EXPIRY_S = 120, 5
"""Slurm's default of AuthInfo's cred_expire, which it takes where less than the minimum is set."""
# What 22.05 says of it. scontrol requeue and update only say that a message was unexpected: there was none.
_UNREACHED = re.compile(
    r"unable to contact|connect(ion|ed)|communication|timed out|zero bytes|unexpected message|(send|receive) failure|"
    r"broken pipe|standby mode",
    re.IGNORECASE,
)


def cleaned(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what changes how Slurm's commands act and what they print, and without another job's."""
    return {
        name: value
        for name, value in environment.items()
        if name in KEPT or not (name.startswith(_PREFIXES) or name in _RANK)
    }


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that neither are called like secrets nor hold a URL with one."""
    return {
        name: value for name, value in environment.items() if not _SECRET.search(name) and _hide_in_urls(value) == value
    }


class SlurmError(Exception):
    """A command of Slurm failed; the text is its output."""


class UnreachedError(SlurmError):
    """The controller did not answer. It may have heard the command all the same."""


@dataclass(frozen=True)
class Job:
    """A job as ``squeue`` shows it."""

    id: str
    state: str
    reason: str
    nodes: str
    command: str = ""
    """Its batch script."""

    @property
    def over(self) -> bool:
        """Whether it has ended for good."""
        return self.state in _OVER

    @property
    def failed(self) -> bool:
        """Whether it has ended, neither well nor because a user ended it."""
        return self.state in _FAILED

    @property
    def held(self) -> bool:
        """Whether it waits for someone to release it, and for nothing else."""
        return self.state == "PENDING" and _HELD.search(self.reason) is not None

    @property
    def lacks_nodes(self) -> bool:
        """Whether it waits for nodes that are down, drained or excluded."""
        return self.state == "PENDING" and self.reason.startswith(("ReqNodeNotAvail", "BadConstraints"))

    @property
    def launch_failed(self) -> bool:
        """Whether Slurm holds it because it could not start it. Its user may release it."""
        return self.held and self.reason.lower().startswith("launch")


def run(*words: str, retry_s: float = 0.0) -> str:
    """Run a command of Slurm, again for ``retry_s`` seconds while the controller does not answer; its output.

    Only for what may be heard twice.

    Raises:
        UnreachedError: there was no answer.
        SlurmError: it failed, or there is no such command here.
    """
    deadline, reported = time.monotonic() + retry_s, False
    while True:
        try:
            return _try(*words)
        except UnreachedError as error:
            if time.monotonic() > deadline:
                raise
            if not reported:
                reported = True
                say(f"{error}; trying again for up to {retry_s / 60:.0f} min")
        time.sleep(1.0)


def _try(*words: str, environment: Mapping[str, str] | None = None) -> str:
    if environment is None:
        environment = cleaned(os.environ) | {"SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    except FileNotFoundError:
        raise SlurmError(f"{words[0]}: no such command: this is not a machine of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise UnreachedError(f"{words[0]}: no answer within {PATIENCE_S:.0f} s") from None
    if done.returncode == 0:
        return done.stdout.strip()
    raise failure(words[0], done.stderr or done.stdout)


def failure(command: str, said: str) -> SlurmError:
    """What a command's last words mean."""
    line = f"{command}: {' '.join(said.split())}"
    return UnreachedError(line) if _UNREACHED.search(line) else SlurmError(line)


def show_job(job: str, retry_s: float = 0.0) -> dict[str, str]:
    """Fields of a job that Slurm still knows, times in seconds since 1970; empty for one that it has forgotten."""
    try:
        text = run("scontrol", "-o", "show", "job", job, retry_s=retry_s)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    # Users' words, such as a path or a comment, come after what is read here.
    return dict(word.split("=", 1) for word in reversed(text.split()) if "=" in word)


def any_down(nodes: list[str]) -> bool:
    """Whether Slurm reports one of the nodes as down."""
    states = run("sinfo", "-a", "-h", "-N", "-n", ",".join(nodes), "-o", "%T", retry_s=OUTAGE_S).lower().split()
    return any(state.startswith(("down", "fail")) or state.endswith("*") for state in states)


def requeue(job: str) -> None:
    """Let Slurm run the job again, under its id.

    Raises:
        SlurmError: it is not allowed.
    """
    _order("scontrol", "requeue", job, done="pending", retry_s=OUTAGE_S)


def _order(*words: str, done: str, retry_s: float) -> None:
    """Run a command that is refused with these words where it had been heard before."""
    try:
        run(*words, retry_s=retry_s)
    except SlurmError as error:
        if done not in str(error):
            raise


def imposed_wait_s() -> float:
    """Seconds before Slurm starts a requeued job: until the credentials of the start before have expired."""
    found = re.search(r"\bcred_expire=(\d+)", run("scontrol", "show", "config", retry_s=PATIENCE_S))
    seconds = int(found[1]) if found else 0
    return 1.0 + (seconds if seconds >= MIN_EXPIRY_S else EXPIRY_S)


def update(job: str, field: str) -> None:
    """Change a field of a pending job, such as ``StartTime=now+60``."""
    run("scontrol", "update", f"JobId={job}", field, retry_s=PATIENCE_S)


def submit(
    script: Path,
    environment: Mapping[str, str],
    *,
    after: str = "",
    wait_s: float = 0.0,
    exclude: Sequence[str] = (),
    retry_s: float = PATIENCE_S,
) -> str:
    """Submit a batch script again as a job of its own, once, however often the controller has to be asked; the new id.

    The environment is that of the launch as it was kept, with the secrets of this process; where it is empty, that of
    this process. The job waits for the end of job ``after`` and for ``wait_s`` seconds.
    """
    words = ["sbatch", "--parsable", *([f"--dependency=afterany:{after}"] if after else [])]
    if wait_s:
        words.append(f"--begin=now+{wait_s:.0f}")
    if exclude:
        words.append(f"--exclude={excluded(script, exclude)}")
    here = cleaned(os.environ)
    kept = without_secrets(here).keys() - KEPT
    environment = {**environment, **{n: v for n, v in here.items() if n not in kept}} if environment else here
    deadline, before = time.monotonic() + retry_s, _jobs_of(script, retry_s)
    while True:
        try:
            return _try(*words, str(script), environment=environment).split(";")[0]
        except UnreachedError as error:
            if time.monotonic() > deadline:
                raise
            say(f"{error}; looking whether it was heard")
        _jobs_of(script, retry_s)  # which waits until the controller answers again
        time.sleep(SETTLES_S)
        if heard := _jobs_of(script, retry_s) - before:
            return max(heard, key=int)


def _jobs_of(script: Path, retry_s: float) -> set[str]:
    """All jobs that Slurm knows of a batch script."""
    return {job.id for job in queue(retry_s).values() if job.command == str(script)}


def release(job: str) -> None:
    """Release a held job.

    Raises:
        SlurmError: it is not allowed, as where an administrator holds it.
    """
    _order("scontrol", "release", job, done="no longer pending", retry_s=PATIENCE_S)


def cancel(job: str, signal: str = "") -> None:
    """Cancel a job, or only send a signal to its steps."""
    run("scancel", *([f"--signal={signal}"] if signal else []), job, retry_s=PATIENCE_S)


def queue(retry_s: float = 0.0) -> dict[str, Job]:
    """All jobs that Slurm still knows, by id, those that ended a short while ago too."""
    text = run("squeue", "-a", "-h", "-t", "all", "-o", "%i|%T|%r|%N|%o", retry_s=retry_s)
    rows = [line.split("|", 4) for line in text.splitlines() if line.count("|") >= 4]
    return {row[0]: Job(*row) for row in rows}


def expand(nodes: str) -> list[str]:
    """Names of a list of nodes as Slurm writes it."""
    return run("scontrol", "show", "hostnames", nodes).split() if nodes not in ("", "(null)") else []


def excluded(script: Path, more: Sequence[str] = ()) -> str:
    """Value of ``--exclude``: the nodes that a batch script leaves out by itself, and more."""
    asked = re.search(r"^#SBATCH --exclude=(.+)$", script.read_text() if script.exists() else "", re.MULTILINE)
    return ",".join([*(shlex.split(asked[1]) if asked else []), *more])


def avoidable(script: Path, nodes: Sequence[str]) -> tuple[str, ...]:
    """The nodes, if Slurm could start a batch script without them now; with too few others it would wait for ever."""
    if not nodes:
        return ()
    failed = f"{', '.join(nodes)} failed more than once, but"
    try:
        run("sbatch", "--test-only", f"--exclude={excluded(script, nodes)}", str(script), retry_s=PATIENCE_S)
    except SlurmError as error:
        if "policy" not in str(error):  # the user's limit of jobs is reached; slurm.release undoes it where it must
            say(f"{failed} none is avoided, as the job could not start without them: {error}")
            return ()
    return tuple(nodes)
