"""Begins and ends an attempt, for the batch script on its host: ``python -m slurm.attempt begin|end ...``.

``begin`` prints shell code that sets up srun; ``end`` decides what follows. Between them srun runs ``slurm.job``, one
task per GPU. The batch script ignores SIGTERM, so that ``end`` has Slurm's KillWait to do its work when a job is taken
away; it therefore imports nothing heavy.
"""

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from pretrain import ports
from pretrain.files import digest, digest_of_file
from pretrain.outcome import ExitCode, UserError
from pretrain.run_state import write_event
from slurm import scheduler
from slurm.folder import Launch, SlurmFolder, say
from slurm.job_state import current_job, job_state
from slurm.restart import Action, Attempt, AttemptRecord, Decision, Outcome, decide
from slurm.scheduler import SlurmError

ROOT = Path(__file__).resolve().parent.parent

STATUS = {"finished": ExitCode.FINISHED, "stopped": ExitCode.STOPPED, "cancelled": ExitCode.STOPPED,
          "will fail again": ExitCode.WILL_FAIL_AGAIN}  # fmt: skip


def this_attempt() -> Attempt:
    """The one whose batch script or task this is."""
    return Attempt(os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0")))


def begin(folder: SlurmFolder) -> str:
    """Write down that an attempt begins; the shell code that prepares srun, or ends the script.

    Raises:
        UserError: the nodes that Slurm gave are of no use to this run.
    """
    attempt, launch, records, state = this_attempt(), folder.read_launch(), folder.history.records(), folder.state()
    if state is not None and state.state == "finished":
        return _leave("the run is finished", ExitCode.FINISHED)
    if folder.stop_request():
        return _leave(f"the run must not continue: {folder.stop_request()}", ExitCode.FINISHED)
    if other := _other_that_runs(records, attempt.job):
        return _leave(f"job {other.job} already trains this run", ExitCode.FINISHED)
    if _gave_up_on_the_lost(folder, records, attempt, launch):
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
    folder.forget_exits(attempt)
    step, code = folder.saved_step(), code_digest()
    before = next((record.code for record in reversed(records) if record.code), code)
    if code != before:
        text = f"the code differs from the previous attempt's: its digest was {before}, and is {code}"
        seen = state.samples_seen if state else 0
        write_event(folder.run / "events.jsonl", "other code", step=step, samples_seen=seen, text=text)
        say(text)
    folder.history.begin(attempt, nodes=nodes, ranks=ranks, step=step, code=code)
    say(f"attempt {attempt}: {ranks} ranks on {', '.join(nodes)}, from step {step}")
    log = folder.srun_log(attempt)
    log.parent.mkdir(parents=True, exist_ok=True)
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


def _other_that_runs(records: list[AttemptRecord], job: str) -> AttemptRecord | None:
    """The attempt that another job makes of this run at this time."""
    last = records[-1] if records else None
    if last is None or last.ended or last.job == job:
        return None
    try:
        other = scheduler.queue().get(last.job)
    except SlurmError as error:
        say(f"WARNING {error}")
        return None
    return last if other is not None and other.state == "RUNNING" else None


def rendezvous_port(attempt: Attempt) -> int:
    """Another one for every attempt: a previous one may linger on a node."""
    return ports.FIRST + (int(attempt.job) * 31 + attempt.restart) % ports.COUNT


def end(folder: SlurmFolder, status: int) -> int:
    """Decide what follows, write it down, and do it; the exit status of the batch script.

    Args:
        folder: the run.
        status: of srun.
    """
    attempt, launch, history = this_attempt(), folder.read_launch(), folder.history
    record = next((r for r in reversed(history.records()) if r.attempt == attempt), None)
    errors = folder.srun_errors(attempt, since=record.begun if record else 0.0)
    for line in errors:
        say(line)
    down = scheduler.any_down(scheduler.expand(os.environ["SLURM_JOB_NODELIST"]))
    state_of_job = job_state(attempt.job, attempt.restart, save_within_s=launch.policy.save_within_s, node_down=down)
    state, step = folder.state(), folder.saved_step()  # now: Slurm may have taken its time to answer
    outcome = Outcome(
        job_state=state_of_job,
        exits=tuple(folder.read_exits(attempt)),
        status=status,
        node_down=down,
        finished=state is not None and state.state == "finished",
        stop_request=folder.stop_request(),
        begun_at=record.step if record else step,
        saved_at=step,
        slow=folder.slow_nodes(attempt),
        nodes=tuple(record.nodes) if record else (),
        srun_errors=errors,
    )
    decision = decide(outcome, history.before(attempt), launch.policy)
    history.end(attempt, decision, step=step)
    say(f"attempt {attempt} ended: {decision.cause}: {decision.reason}")
    try:
        _act(decision, folder, attempt)
    except SlurmError as error:
        reason = f"{decision.reason}; {decision.action} failed: {error}"
        action = "release" if decision.action == "requeue" else decision.action
        history.end(attempt, replace(decision, action=action, reason=reason), step=step)
        say(reason)
        return ExitCode.RETRY
    return int(STATUS.get(decision.cause, ExitCode.RETRY))


def _act(decision: Decision, folder: SlurmFolder, attempt: Attempt) -> None:
    job, history = attempt.job, folder.history
    if decision.action == "cancel":
        scheduler.cancel(job)
    if decision.action in ("none", "cancel"):
        return
    queue = scheduler.queue(retry_s=scheduler.OUTAGE_S)
    own = queue.pop(job, None)
    if other := current_job(folder, history.records(), queue):  # submitted while this one could not ask Slurm
        history.note(attempt, f"job {other.id} continues it", next_job=other.id)
        say(f"job {other.id} already continues the run")
        return
    exclude = scheduler.avoidable(folder.script(job), decision.exclude)
    if newly := {decision.node, *decision.slow} & {*exclude}:
        history.note(attempt, f"avoiding {', '.join(sorted(newly))} from now on: failed or slow more than once")
    if decision.action == "requeue":
        try:
            scheduler.requeue(job)
        except SlurmError as error:
            say(f"cannot be requeued ({error}): submitting a job instead")
            follower = scheduler.submit(
                folder.script(job),
                folder.read_launch().environment,
                after=job if own else "",
                wait_s=decision.wait_s,
                exclude=exclude,
                retry_s=scheduler.OUTAGE_S,
            )
            waits = f", {decision.wait_s:.0f} s from now as --retry-wait asks" if decision.wait_s else ""
            history.note(attempt, f"continues as job {follower}{waits}", next_job=follower)
            say(f"job {follower} continues it")
            return
    try:  # what follows improves a restart but is not worth losing it
        imposed_s = scheduler.imposed_wait_s()
        if decision.wait_s > imposed_s:
            scheduler.update(job, f"StartTime=now+{decision.wait_s:.0f}")
        asked = "as --retry-wait asks" if decision.wait_s > imposed_s else "which Slurm imposes"
        history.note(attempt, f"starts again after {max(decision.wait_s, imposed_s):.0f} s, {asked}")
        if decision.exclude:
            scheduler.update(job, f"ExcNodeList={scheduler.excluded(folder.script(job), exclude)}")
    except SlurmError as error:
        say(f"WARNING {error}")


def _gave_up_on_the_lost(folder: SlurmFolder, records: list[AttemptRecord], now: Attempt, launch: Launch) -> bool:
    """Write down the end of an attempt that could not do it itself; whether that was one too many."""
    if not records or (previous := records[-1]).ended or previous.attempt == now:
        return False
    lost, step = previous.attempt, folder.saved_step()
    outcome = Outcome("running", (), 0, node_down=False, finished=False, stop_request="", begun_at=previous.step,
                      saved_at=step, slow=folder.slow_nodes(lost))  # fmt: skip
    decision = decide(outcome, folder.history.before(lost), launch.policy)
    saved = f"saved at step {step}" if step else "nothing was saved"
    reason = f"killed with its node, or before it could write its exit record; {saved}"
    action: Action = "none" if decision.action == "none" else "leave"
    folder.history.end(lost, Decision(action, "lost", reason, slow=outcome.slow), step=step)
    return action == "none"


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
        return ExitCode.WILL_FAIL_AGAIN
    except SlurmError as error:
        say(f"error: {error}")
        return ExitCode.RETRY


if __name__ == "__main__":
    sys.exit(main())
