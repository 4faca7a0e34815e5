"""Both ends of an incarnation, called by the batch script on its host: ``python -m slurm.incarnation begin|end ...``.

``begin`` prints shell code that sets up srun; ``end`` decides what follows. Between them srun runs ``slurm.job``, one
task per GPU. The batch script ignores SIGTERM, so that ``end`` has Slurm's KillWait to do its work when a job is taken
away; it therefore imports nothing heavy.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from pretrain import ports
from pretrain.outcome import ExitCode, UserError
from slurm import scheduler
from slurm.folder import Incarnation, Launch, SlurmFolder, say
from slurm.history import History, current_job
from slurm.preflight import slow_nodes
from slurm.restart import Decision, Ending, decide
from slurm.scheduler import SlurmError

STATUS = {"finished": ExitCode.FINISHED, "stopped": ExitCode.STOPPED, "cancelled": ExitCode.STOPPED,
          "will fail again": ExitCode.WILL_FAIL_AGAIN}  # fmt: skip


def this_incarnation() -> Incarnation:
    """The one whose batch script or task this is."""
    return Incarnation(os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0")))


def begin(folder: SlurmFolder) -> str:
    """Write down that an incarnation begins; the shell code that prepares srun, or ends the script.

    Raises:
        UserError: the nodes that Slurm gave are of no use to this run.
    """
    incarnation, history, launch = this_incarnation(), History(folder.history), folder.read_launch()
    state = folder.state()
    if state is not None and state.state == "finished":
        return _leave("the run is finished", ExitCode.FINISHED)
    if folder.stop_request():
        return _leave(f"the run is not to go on: {folder.stop_request()}", ExitCode.FINISHED)
    if _gave_up_on_the_lost(folder, history, incarnation, launch):
        return _leave("too many restarts in a row brought no new checkpoint", ExitCode.RETRY)
    _adopt_submission(folder, incarnation.job)
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
    folder.forget_exits(incarnation)
    history.begin(incarnation, nodes=nodes, ranks=ranks, step=folder.saved_step())
    say(f"incarnation {incarnation}: {ranks} ranks on {', '.join(nodes)}, from step {folder.saved_step()}")
    exports = {
        "SLURM_NNODES": usable,
        "SLURM_JOB_NUM_NODES": usable,  # srun heeds this one when both are set
        "SLURM_NTASKS": ranks,
        "SLURM_NTASKS_PER_NODE": launch.gpus_per_node,
        "SLURM_DISTRIBUTION": "block",
        "SLURM_KILL_BAD_EXIT": 1,  # one dead rank ends the step, even if the others do not notice
        "SLURM_WAIT": 120,  # as does one that has ended well when the others do not follow
        "SLURM_CPU_BIND": "none",  # loaders share a node's cores among its ranks by themselves
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": rendezvous_port(incarnation),
        "NODE_NAMES": ",".join(nodes),
    }
    return "\n".join(f"export {name}={shlex.quote(str(value))}" for name, value in exports.items())


def rendezvous_port(incarnation: Incarnation) -> int:
    """Another one for every incarnation: a former one may linger on a node."""
    return ports.FIRST + (int(incarnation.job) * 31 + incarnation.restart) % ports.COUNT


def end(folder: SlurmFolder, status: int, script: Path) -> int:
    """Decide what follows, write it down, and do it; the exit status of the batch script.

    Args:
        folder: the run.
        status: of srun.
        script: the batch script, to be submitted again where requeueing is not allowed.
    """
    incarnation, history, launch = this_incarnation(), History(folder.history), folder.read_launch()
    chapter = next((c for c in reversed(history.chapters()) if c.incarnation == incarnation), None)
    down = scheduler.any_down(scheduler.expand(os.environ["SLURM_JOB_NODELIST"]))
    fate = scheduler.fate_of(
        incarnation.job, incarnation.restart, save_within_s=launch.policy.save_within_s, node_down=down
    )
    state, step = folder.state(), folder.saved_step()  # now: Slurm may have taken its time to answer
    ending = Ending(
        fate=fate,
        exits=tuple(folder.read_exits(incarnation)),
        status=status,
        node_down=down,
        finished=state is not None and state.state == "finished",
        stop_request=folder.stop_request(),
        begun_at=chapter.step if chapter else step,
        saved_at=step,
        slow=slow_nodes(folder.log(incarnation, 0)),
    )
    decision = decide(ending, history.past(incarnation), launch.policy)
    history.end(incarnation, decision, step=step)
    say(f"incarnation {incarnation} ended: {decision.cause}: {decision.reason}")
    try:
        _act(decision, folder, history, incarnation, script)
    except SlurmError as error:
        failed = Decision("none", decision.cause, f"{decision.reason}; could not be started again: {error}")
        history.end(incarnation, failed, step=step)
        say(failed.reason)
        return ExitCode.RETRY
    return int(STATUS.get(decision.cause, ExitCode.RETRY))


def _act(decision: Decision, folder: SlurmFolder, history: History, incarnation: Incarnation, script: Path) -> None:
    job = incarnation.job
    if decision.action == "cancel":
        scheduler.cancel(job)
    if decision.action in ("none", "cancel"):
        return
    queue = scheduler.queue(retry_s=scheduler.OUTAGE_S)
    own = queue.pop(job, None)
    if other := current_job(folder, history.chapters(), queue):  # submitted while this one could not ask Slurm
        history.note(incarnation, f"job {other.id} goes on in its place", next_job=other.id)
        say(f"job {other.id} goes on in its place already")
        return
    exclude = [node for node in decision.exclude if _can_do_without(node, decision, folder)]
    if newly := {decision.node, *decision.slow} & {*exclude}:
        history.note(incarnation, f"avoiding {', '.join(sorted(newly))} from now on: failed or slow more than once")
    if decision.action == "requeue":
        try:
            scheduler.requeue(job)
        except SlurmError as error:
            say(f"cannot be requeued ({error}): submitting a job in its place")
            follower = scheduler.submit(script, after=job if own else "", wait_s=decision.wait_s, exclude=exclude,
                                        retry_s=scheduler.OUTAGE_S)  # fmt: skip
            history.note(incarnation, f"goes on as job {follower}", next_job=follower)
            copy_submission(folder, job, follower)
            say(f"job {follower} goes on in its place")
            return
    if exclude:
        _tolerating(lambda: scheduler.exclude_nodes(job, exclude))
    if decision.wait_s:
        history.note(incarnation, f"waits {decision.wait_s:.0f} s before it starts again")
        _tolerating(lambda: scheduler.wait_before_start(job, decision.wait_s))


def _adopt_submission(folder: SlurmFolder, job: str) -> None:
    """Give submitit its files for a job whose submission nobody lived to write down."""
    known = folder.submitted()
    if known and job not in known:
        copy_submission(folder, known[-1], job)


def copy_submission(folder: SlurmFolder, job: str, follower: str) -> None:
    """Give submitit its files under the new job's id, where it looks for them."""
    if job == follower:  # a slurmctld that forgot a job counts from where it was before
        return
    for path in folder.submitit.glob(f"{job}_subm*"):
        shutil.copy2(path, path.with_name(path.name.replace(job, follower, 1)))


def _can_do_without(node: str, decision: Decision, folder: SlurmFolder) -> bool:
    """Whether enough nodes stay when all that failed are left out; with too few the job would wait for ever."""
    try:
        left = scheduler.nodes_of(os.environ.get("SLURM_JOB_PARTITION", "")) - set(decision.exclude)
    except SlurmError as error:
        say(f"WARNING {node} failed more than once, but nothing can be asked about the partition: {error}")
        return False
    if len(left) >= folder.read_launch().min_nodes:
        return True
    say(f"{node} failed more than once, but the partition has too few other nodes to do without it")
    return False


def _gave_up_on_the_lost(folder: SlurmFolder, history: History, now: Incarnation, launch: Launch) -> bool:
    """Write down the end of an incarnation that could not do it itself; whether that was one too many."""
    former = next(iter(reversed(history.chapters())), None)
    if former is None or former.ended or former.incarnation == now:
        return False
    step = folder.saved_step()
    ending = Ending("running", (), 0, node_down=False, finished=False, stop_request="", begun_at=former.step,
                    saved_at=step, slow=slow_nodes(folder.log(former.incarnation, 0)))  # fmt: skip
    past = history.past(former.incarnation)
    decision = decide(ending, past, launch.policy)
    saved = f"saved at step {step}" if step else "nothing was saved"
    reason = f"killed with its node, or before it could say anything; {saved}"
    gave_up = decision.action == "none"
    ended = Decision("none" if gave_up else "leave", "lost", reason, slow=ending.slow)
    history.end(former.incarnation, ended, step=step)
    return gave_up


def _tolerating(act: Callable[[], None]) -> None:
    """Do what improves a restart but is not worth losing it."""
    try:
        act()
    except SlurmError as error:
        say(f"WARNING {error}")


def _leave(why: str, status: ExitCode) -> str:
    say(why)
    return f"exit {int(status)}"


def main(arguments: list[str] | None = None) -> int:
    """Begin or end an incarnation; for batch scripts."""
    parser = argparse.ArgumentParser(prog="python -m slurm.incarnation", description=main.__doc__)
    parser.add_argument("event", choices=["begin", "end"])
    parser.add_argument("run", type=Path, metavar="RUN", help="runs/NAME")
    parser.add_argument("--status", type=int, default=0, help="exit status of srun")
    parser.add_argument("--script", type=Path, help="the batch script, for sites where jobs may not be requeued")
    options = parser.parse_args(arguments)
    folder = SlurmFolder(options.run.resolve())
    try:
        if options.event == "begin":
            print(begin(folder))  # noqa: T201
            return ExitCode.FINISHED
        job = os.environ["SLURM_JOB_ID"]
        return end(folder, options.status, options.script or folder.submitit / f"{job}_submission.sh")
    except UserError as error:
        say(f"error: {error}")
        return ExitCode.WILL_FAIL_AGAIN
    except SlurmError as error:
        say(f"error: {error}")
        return ExitCode.RETRY


if __name__ == "__main__":
    sys.exit(main())
