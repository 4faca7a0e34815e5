"""Begins and ends an attempt, for the batch script on its host: ``python -m slurm.attempt begin|end ...``.

``begin`` prints shell code that sets up srun; ``end`` decides what follows. Between them srun runs ``slurm.job``, one
task per GPU. The batch script ignores SIGTERM, so that ``end`` has Slurm's KillWait to do its work when a job is taken
away; it therefore imports nothing heavy.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from pretrain import ports
from pretrain.files import digest, digest_of_file
from pretrain.outcome import ExitCode, UserError
from pretrain.run_state import write_event
from slurm import restart, scheduler
from slurm.folder import Launch, SlurmFolder, say
from slurm.job_state import job_of, job_state
from slurm.restart import Attempt, AttemptRecord, Outcome
from slurm.scheduler import OUTAGE_S, SlurmError

ROOT = Path(__file__).resolve().parent.parent

STATUS = {"finished": ExitCode.FINISHED, "stopped": ExitCode.STOPPED, "cancelled": ExitCode.STOPPED,
          "will fail again": ExitCode.WILL_FAIL_AGAIN}  # fmt: skip


def this_attempt() -> Attempt:
    """The one whose batch script or task this is."""
    return Attempt(os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0")))


def begin(folder: SlurmFolder) -> str:
    """Record that an attempt begins; the shell code that prepares srun, or ends the script."""
    attempt, launch, records, state = this_attempt(), folder.read_launch(), folder.attempts(), folder.state()
    if state is not None and state.state == "finished":
        return _leave("the run is finished", ExitCode.FINISHED)
    if folder.stop_request():
        return _leave(f"the run must not continue: {folder.stop_request()}", ExitCode.FINISHED)
    if records and not records[-1].ended and records[-1].attempt != attempt:
        if records[-1].job != attempt.job and _runs(records[-1].job):
            return _leave(f"job {records[-1].job} already trains this run", ExitCode.FINISHED)
        if _gave_up_on_the_lost(folder, records, launch.policy.max_restarts):
            return _leave("too many restarts in a row brought no new checkpoint", ExitCode.RETRY)
    folder.adopt(attempt.job)
    given = scheduler.expand(os.environ["SLURM_JOB_NODELIST"])
    usable = max((n for n in launch.usable_nodes if n <= len(given)), default=0)
    if not usable:
        raise UserError(
            f"Slurm gave {len(given)} nodes, but the global batch of {launch.global_batch} can be divided among the "
            f"ranks of {', '.join(map(str, launch.usable_nodes))} nodes only"
        )
    nodes, ranks = given[:usable], usable * launch.gpus_per_node
    if usable < len(given):
        say(f"using {usable} of {len(given)} nodes: the ranks must divide the global batch of {launch.global_batch}")
    log = folder.new_logs(attempt) / "srun.txt"
    step, code = folder.saved_step(), code_digest()
    before = next((record.code for record in reversed(records) if record.code), code)
    if code != before:
        text = f"the code differs from the previous attempt's: its digest was {before}, and is {code}"
        seen = state.samples_seen if state else 0
        write_event(folder.run / "events.jsonl", "other code", step=step, samples_seen=seen, text=text)
        say(text)
    folder.begin(attempt, nodes=nodes, ranks=ranks, step=step, code=code)
    say(f"attempt {attempt}: {ranks} ranks on {', '.join(nodes)}, from step {step}")
    exports = {
        "SLURM_NNODES": usable,
        "SLURM_JOB_NUM_NODES": usable,  # srun heeds this one when both are set
        "SLURM_NTASKS": ranks,
        "SLURM_NTASKS_PER_NODE": launch.gpus_per_node,
        "SLURM_DISTRIBUTION": "block",
        "SLURM_KILL_BAD_EXIT": 1,  # a rank that fails ends the step, even if the others do not notice
        "SLURM_WAIT": 120,  # as does one that has ended well when the others do not follow
        "SLURM_CPU_BIND": "none",  # loaders share a node's cores among its ranks by themselves
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": rendezvous_port(attempt),
        "NODE_NAMES": ",".join(nodes),
    }
    lines = [f"export {name}={shlex.quote(str(value))}" for name, value in exports.items()]
    return "\n".join([*lines, f"exec 3>&2 2>>{shlex.quote(str(log))}  # until slurm.attempt end"])


def code_digest() -> str:
    """Digest of the code that the ranks run."""
    packages = ("models", "data_pipeline", "pretrain", "slurm")
    return digest("".join(digest_of_file(f) for p in packages for f in sorted((ROOT / p).rglob("*.py"))).encode())


def _runs(job: str) -> bool:
    """Whether Slurm reports a job as running; where it does not answer, the lock of the run's folder has to do."""
    try:
        queue = scheduler.queue()
    except SlurmError as error:
        say(f"WARNING {error}")
        return False
    return job in queue and queue[job].state == "RUNNING"


def rendezvous_port(attempt: Attempt) -> int:
    """Another one for every attempt: a previous one may linger on a node."""
    return ports.FIRST + (int(attempt.job) * 31 + attempt.restart) % ports.COUNT


def end(folder: SlurmFolder, status: int) -> int:
    """Decide what follows after srun's exit ``status``, record and do it; the exit status of the batch script."""
    attempt, launch, records = this_attempt(), folder.read_launch(), folder.attempts()
    unknown = AttemptRecord(folder.saved_step(), job=attempt.job, restart=attempt.restart)
    record = next((one for one in reversed(records) if one.attempt == attempt), unknown)
    past = [one for one in records if one is not record]
    errors = folder.srun_errors(attempt, since=record.begun)
    for line in errors:
        say(line)
    down = scheduler.any_down(os.environ["SLURM_JOB_NODELIST"])
    state_of_job = job_state(attempt.job, attempt.restart, save_within_s=launch.policy.save_within_s, node_down=down)
    state = folder.state()  # now: Slurm may have taken its time to answer
    outcome = Outcome(
        job_state=state_of_job,
        saved_at=folder.saved_step(),
        exits=tuple(folder.read_exits(attempt)),
        status=status,
        node_down=down,
        finished=state is not None and state.state == "finished",
        stop_request=folder.stop_request(),
        srun_errors=errors,
    )
    record.slow = folder.slow_nodes(attempt)
    record = restart.decide(record, outcome, past, launch.policy)
    folder.end(record)
    say(f"attempt {attempt} ended: {record.cause}: {record.reason}")
    try:
        _act(folder, launch, [*past, record])
    except SlurmError as error:
        record.reason += f"; {record.action} failed: {error}"
        record.action = "release" if record.action == "requeue" else record.action
        folder.end(record)
        say(record.reason)
        return ExitCode.RETRY
    return STATUS.get(record.cause, ExitCode.RETRY)


def _act(folder: SlurmFolder, launch: Launch, records: list[AttemptRecord]) -> None:
    """Do what is decided about the last attempt."""
    last, job = records[-1], records[-1].job
    if last.action == "cancel":
        scheduler.cancel(job)
    if last.action in ("none", "cancel"):
        return
    queue = scheduler.queue(retry_s=OUTAGE_S)
    after = job if queue.pop(job, None) else ""  # Slurm may have forgotten it
    other = job_of(folder, folder.attempts(), queue)
    if other is not None and not other.over:  # submitted while this one could not ask Slurm
        folder.note(last.attempt, f"job {other.id} continues it", next_job=other.id)
        return
    bad = restart.nodes_to_exclude(records)
    exclude = scheduler.avoidable(folder.script(job), bad)
    if newly := {last.node, *last.slow} & {*exclude}:
        folder.note(last.attempt, f"avoiding {', '.join(sorted(newly))} from now on: failed or slow more than once")
    wait_s = restart.wait_before_restart_s(records, launch.policy)
    if last.action == "requeue":
        try:
            scheduler.requeue(job)
        except SlurmError as error:
            say(f"cannot be requeued ({error}): submitting a job instead")
            follower = scheduler.submit(
                folder.script(job), launch.environment, after=after, wait_s=wait_s, exclude=exclude, retry_s=OUTAGE_S
            )
            waits = f", {wait_s:.0f} s from now as --retry-wait asks" if wait_s else ""
            folder.note(last.attempt, f"continues as job {follower}{waits}", next_job=follower)
            return
    try:  # what follows improves a restart but is not worth losing it
        imposed_s = scheduler.imposed_wait_s()
        if wait_s > imposed_s:
            scheduler.update(job, f"StartTime=now+{wait_s:.0f}")
        asked = "as --retry-wait asks" if wait_s > imposed_s else "which Slurm imposes"
        folder.note(last.attempt, f"starts again after {max(wait_s, imposed_s):.0f} s, {asked}")
        if bad:
            scheduler.update(job, f"ExcNodeList={scheduler.excluded(folder.script(job), exclude)}")
    except SlurmError as error:
        say(f"WARNING {error}")


def _gave_up_on_the_lost(folder: SlurmFolder, records: list[AttemptRecord], max_restarts: int) -> bool:
    """Record the end of the last attempt, which could not do it itself; whether that was one too many."""
    lost = records[-1]
    lost.end_step, lost.slow = folder.saved_step(), folder.slow_nodes(lost.attempt)
    saved = f"saved at step {lost.end_step}" if lost.end_step else "nothing was saved"
    lost.reason = f"killed with its node, or before it could write its exit record; {saved}"
    gave_up = restart.restarts_without_progress(records) > max_restarts
    lost.action = "none" if gave_up else "leave"
    folder.end(lost)
    return gave_up


def _leave(why: str, status: ExitCode) -> str:
    say(why)
    return f"exit {int(status)}"


def main(arguments: list[str] | None = None) -> int:
    """Begin or end an attempt; for batch scripts."""
    parser = argparse.ArgumentParser(prog="python -m slurm.attempt", description=main.__doc__)
    parser.add_argument("event", choices=["begin", "end"])
    parser.add_argument("run", type=Path, metavar="RUN", help="runs/NAME")
    parser.add_argument("--status", type=int, default=0, help="exit status of srun")
    options = parser.parse_args(arguments)
    folder = SlurmFolder(options.run.resolve())
    try:
        if options.event == "begin":
            print(begin(folder))  # noqa: T201
            return ExitCode.FINISHED
        return end(folder, options.status)
    except UserError as error:
        say(f"error: {error}")
        return ExitCode.RETRY if isinstance(error, SlurmError) else error.code


if __name__ == "__main__":
    sys.exit(main())
