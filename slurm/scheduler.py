"""Slurm's commands as functions. Their output is trusted, submitit's cache is not; sacct is never needed."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import without_secrets
from pretrain.outcome import ExitCode, UserError
from slurm.folder import say

FAILED = ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "TIMEOUT", "PREEMPTED")
OVER = (*FAILED, "COMPLETED", "CANCELLED", "DEADLINE", "REVOKED")
_HELD = re.compile(r"held|JobHold", re.IGNORECASE)
PATIENCE_S = 60.0
"""A controller that restarts or is overloaded may take its time to answer."""
OUTAGE_S = 24 * 3600.0
"""A batch script waits so long for a controller that does not answer: nobody else would start the run again."""
_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SQUEUE_", "SINFO_", "SCANCEL_", "SUBMITIT_")
_RANK = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_NAMES")
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Variables of Slurm without which its commands may not find or not know the cluster."""
_SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|COOKIE|AUTH|PRIVATE|JWT", re.IGNORECASE)
_NO_NODES = re.compile(r"nodes? .*(busy|not available)|invalid node", re.IGNORECASE)
EXPIRY_S, MIN_EXPIRY_S = 120, 5
"""Slurm's default of AuthInfo's cred_expire, which it takes where less than the minimum is set."""
# What 22.05 says of it. scontrol requeue and update only say that a message was unexpected: there was none.
_UNREACHED = re.compile(
    r"unable to contact|connect(ion|ed)|communication|timed out|zero bytes|unexpected message|(send|receive) failure|"
    r"broken pipe|standby mode",
    re.IGNORECASE,
)


class SlurmError(UserError):
    """A command of Slurm failed; the text is its output."""


class UnreachedError(SlurmError):
    """The controller did not answer. It may have heard the command all the same."""

    code = ExitCode.RETRY


def cleaned(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what changes how Slurm's commands act and what they print, and without another job's."""
    dropped = {name for name in environment if name in _RANK or (name.startswith(_PREFIXES) and name not in KEPT)}
    return {name: value for name, value in environment.items() if name not in dropped}


def reusable(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment may be kept for later jobs: neither Slurm's nor a rank's variables, and no secrets.

    Secret is what is called so, and what holds a URL with a secret.
    """
    return {
        name: value
        for name, value in cleaned(environment).items()
        if name not in KEPT and not _SECRET.search(name) and without_secrets(value) == value
    }


@dataclass(frozen=True)
class Job:
    """A job as ``squeue`` shows it."""

    id: str
    state: str
    reason: str
    command: str = ""
    """Its batch script."""

    @property
    def over(self) -> bool:
        """Whether it has ended for good."""
        return self.state in OVER

    @property
    def held(self) -> bool:
        """Whether it waits for someone to release it, and for nothing else."""
        return self.state == "PENDING" and _HELD.search(self.reason) is not None

    @property
    def launch_failed(self) -> bool:
        """Whether Slurm holds it because it could not start it. Its user may release it."""
        return self.held and self.reason.lower().startswith("launch")


def run(*words: str, retry_s: float = 0.0, done: str = "") -> str:
    """Run a command of Slurm, again for ``retry_s`` seconds while the controller does not answer; its output.

    Only for what may be heard twice. An error with the words ``done`` means that it was heard before. Raises an
    UnreachedError without an answer, another SlurmError where it failed or there is no such command.
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
        except SlurmError as error:
            if not done or done not in str(error):
                raise
            return ""
        time.sleep(1.0)


def _try(*words: str, environment: Mapping[str, str] | None = None) -> str:
    if environment is None:
        environment = cleaned(os.environ) | {"SLURM_TIME_FORMAT": "%s"}
    try:
        ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    except FileNotFoundError:
        raise SlurmError(f"{words[0]}: no such command: this is not a machine of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise UnreachedError(f"{words[0]}: no answer within {PATIENCE_S:.0f} s") from None
    if ended.returncode == 0:
        return ended.stdout.strip()
    raise failure(words[0], ended.stderr or ended.stdout)


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


def any_down(nodes: str) -> bool:
    """Whether Slurm reports one of the nodes of a list as down."""
    states = run("sinfo", "-a", "-h", "-N", "-n", nodes, "-o", "%T", retry_s=OUTAGE_S).lower().split()
    return any(state.startswith(("down", "fail")) or state.endswith("*") for state in states)


def requeue(job: str) -> None:
    """Let Slurm run the job again, under its id; a SlurmError where that is not allowed."""
    run("scontrol", "requeue", job, retry_s=OUTAGE_S, done="pending")


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
    words = ["sbatch", "--parsable"]
    if after:
        words.append(f"--dependency=afterany:{after}")
    if wait_s:
        words.append(f"--begin=now+{wait_s:.0f}")
    if exclude:
        words.append(f"--exclude={excluded(script, exclude)}")
    here = cleaned(os.environ)
    if environment:
        not_kept = here.keys() - reusable(here).keys()
        here = {**environment, **{name: here[name] for name in not_kept}}
    deadline, before = time.monotonic() + retry_s, _jobs_of(script, retry_s)
    while True:
        try:
            return _try(*words, str(script), environment=here).split(";")[0]
        except UnreachedError as error:
            if time.monotonic() > deadline:
                raise
            say(f"{error}; looking whether it was heard")
        _jobs_of(script, retry_s)  # which waits until the controller answers again
        time.sleep(5.0)  # within which it does what it heard before
        if heard := _jobs_of(script, retry_s) - before:
            return max(heard, key=int)


def _jobs_of(script: Path, retry_s: float) -> set[str]:
    """All jobs that Slurm knows of a batch script."""
    return {job.id for job in queue(retry_s).values() if job.command == str(script)}


def release(job: str) -> None:
    """Release a held job; a SlurmError where that is not allowed, as where an administrator holds it."""
    run("scontrol", "release", job, retry_s=PATIENCE_S, done="no longer pending")


def cancel(job: str, signal: str = "") -> None:
    """Cancel a job, or only send a signal to its steps."""
    run("scancel", *([f"--signal={signal}"] if signal else []), job, retry_s=PATIENCE_S)


def queue(retry_s: float = 0.0) -> dict[str, Job]:
    """All jobs that Slurm still knows, by id, those that ended a short while ago too."""
    text = run("squeue", "-a", "-h", "-t", "all", "-o", "%i|%T|%r|%o", retry_s=retry_s)
    rows = [line.split("|", 3) for line in text.splitlines() if line.count("|") >= 3]
    return {row[0]: Job(*row) for row in rows}


def expand(nodes: str) -> list[str]:
    """Names of a list of nodes as Slurm writes it."""
    return run("scontrol", "show", "hostnames", nodes).split() if nodes not in ("", "(null)") else []


def excluded(script: Path, more: Sequence[str] = ()) -> str:
    """Value of ``--exclude``: the nodes that a batch script leaves out by itself, and more."""
    asked = re.search(r"^#SBATCH --exclude=(.+)$", script.read_text() if script.exists() else "", re.MULTILINE)
    return ",".join([*(shlex.split(asked[1]) if asked else []), *more])


def avoidable(script: Path, nodes: Sequence[str]) -> Sequence[str]:
    """The nodes, if Slurm could start a batch script without them now; with too few others it would wait for ever."""
    if not nodes:
        return ()
    try:
        run("sbatch", "--test-only", f"--exclude={excluded(script, nodes)}", str(script), retry_s=PATIENCE_S)
    except SlurmError as error:
        if _NO_NODES.search(str(error)):  # of others nothing follows, as where no more jobs are allowed
            say(f"{', '.join(nodes)} failed more than once, but none is avoided: the job could not start: {error}")
            return ()
    return nodes
